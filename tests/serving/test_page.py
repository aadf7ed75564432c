"""The page in a real Chromium, before the real server.

`PAGE_MODEL=FOLDER PAGE_SCREENSHOT=FILE pytest tests/serving/test_page.py` takes the README's
picture of another model.
"""

import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser import DESKTOP, PHONE, faint_texts, open_browser, set_scheme, set_size
from served_here import served_here
from server_process import Server
from tiny_models import attached_model, tiny_model

from lookup_experts.serving.guard import ApiKeys
from lookup_experts.serving.templates import PLAIN_TEMPLATE

PROMPT = "It was a cold evening, and the old man"
TAB, ENTER, CONTROL, ESCAPE = "\ue004", "\ue007", "\ue009", "\ue00c"
END, HOME, RIGHT = "\ue010", "\ue011", "\ue014"


@pytest.fixture(scope="module")
def page(table_folder) -> Iterator[Any]:
    """A browser with the page of a small model whose table is on disk."""
    folder = Path(os.environ.get("PAGE_MODEL", table_folder))
    options = ("--store", "direct", "--cache", "20kB" if folder == table_folder else "1MB")
    with open_browser() as browser, Server(folder, *options) as server:
        browser.get(server.url)
        browser.num_tokens = 100 if folder != table_folder else 60
        yield browser


def find(page, selector: str) -> Any:
    return page.find_element("css selector", selector)


def find_all(page, selector: str) -> list[Any]:
    return page.find_elements("css selector", selector)


def wait_for(condition, seconds: float = 30) -> Any:
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "what was waited for did not come"
        time.sleep(0.02)
    return found


def fill(page, selector: str, text: object) -> None:
    field = find(page, selector)
    field.clear()
    field.send_keys(str(text))


def send(page, prompt: str, tokens: int) -> None:
    fill(page, "#prompt", prompt)
    fill(page, "#max-tokens", tokens)
    fill(page, "#seed", 4)
    fill(page, "#temperature", 0.7)
    find(page, "#send").click()


def is_done(page) -> bool:
    return find(page, "#status").text.startswith(("Done", "Stopped"))


def num_tokens(page) -> int:
    return page.execute_script("return document.querySelectorAll('.turn .token').length")


def num_colours(png: bytes) -> int:
    image = pytest.importorskip("PIL.Image", reason="a picture is looked at with pillow")
    return len(image.open(io.BytesIO(png)).convert("RGB").getcolors(1 << 24))


@pytest.mark.timeout(120)
def test_a_prompt_is_continued_before_ones_eyes(page):
    wait_for(lambda: "layers" in find(page, "#model").text)
    height = find(page, "#details").rect["height"]
    page.execute_script(  # the page itself looks: it is done before a driver could look twice
        "window.seen = new Set();"
        "setInterval(() => seen.add(document.querySelectorAll('.turn .token').length), 1)"
    )
    send(page, PROMPT, page.num_tokens)
    wait_for(lambda: is_done(page))
    seen = set(page.execute_script("return [...seen]"))
    assert len(seen - {0, page.num_tokens}) >= 1  # it came piece by piece
    assert num_tokens(page) == page.num_tokens
    assert find(page, "#error").text == ""
    assert find(page, "#details").rect["height"] == pytest.approx(height, abs=2)  # nothing jumped
    classes = [token.get_attribute("class").split() for token in find_all(page, ".turn .token")]
    assert {"hit", "miss"} <= {name for names in classes for name in names}
    wait_for(lambda: "%" in find(page, "#live-hits").text)


@pytest.mark.timeout(120)
def test_a_token_is_pinned_by_keyboard(page):
    first = find_all(page, ".turn .token")[0]
    page.execute_script("arguments[0].focus()", find(page, "#transcript"))
    active = page.switch_to.active_element
    active.send_keys(TAB)
    assert page.switch_to.active_element == first
    first.send_keys(END)
    last = page.switch_to.active_element
    assert last == find_all(page, ".turn .token")[-1]
    last.send_keys(HOME)
    first.send_keys(RIGHT * 3)
    third = page.switch_to.active_element
    assert third == find_all(page, ".turn .token")[3]
    third.send_keys(ENTER)
    assert "Pinned" in find(page, "#detail-pin").text
    third.send_keys(ESCAPE)
    assert third.get_attribute("aria-pressed") == "false"
    assert "Pinned" not in find(page, "#detail-pin").text
    third.send_keys(ENTER)
    assert third.get_attribute("aria-pressed") == "true"
    assert "Pinned" in find(page, "#detail-pin").text
    assert find(page, "#detail-time").text.endswith("ms")
    rows = find_all(page, "#heat tbody tr")
    weights = [[float(cell.text) for cell in row.find_elements("tag name", "td")] for row in rows]
    assert weights and all(sum(layer) == pytest.approx(1, abs=0.03) for layer in weights)
    colour = "return getComputedStyle(arguments[0]).backgroundColor"
    cells = find_all(page, "#heat td")
    assert len({page.execute_script(colour, cell) for cell in cells}) > 1


@pytest.mark.timeout(120)
def test_light_dark_and_on_a_phone(page):
    time.sleep(0.3)  # the heat map's colours have come to rest
    picture = page.get_screenshot_as_png()
    assert num_colours(picture) > 50
    if path := os.environ.get("PAGE_SCREENSHOT"):
        Path(path).write_bytes(picture)
    background = "return getComputedStyle(document.body).backgroundColor"
    light = page.execute_script(background)
    assert faint_texts(page) == []
    set_scheme(page, "dark")
    assert page.execute_script(background) != light
    time.sleep(0.3)
    assert faint_texts(page) == []
    assert num_colours(page.get_screenshot_as_png()) > 50
    set_scheme(page, "light")
    set_size(page, PHONE, mobile=True)
    width = "return document.documentElement.scrollWidth"
    assert page.execute_script(width) == PHONE[0]
    set_size(page, DESKTOP)


def test_a_token_is_pinned_by_a_click(page):
    tokens = find_all(page, ".turn .token")
    visible = [token for token in tokens[:10] if token.text.strip()]
    visible[0].click()  # instead of the one that is pinned
    assert visible[0].get_attribute("aria-pressed") == "true"
    assert "Pinned" in find(page, "#detail-pin").text
    visible[1].click()
    assert [token.get_attribute("aria-pressed") for token in visible[:2]] == ["false", "true"]
    visible[1].click()
    assert visible[1].get_attribute("aria-pressed") == "false"
    assert "Pinned" not in find(page, "#detail-pin").text


@pytest.mark.timeout(120)
def test_stop_and_what_the_server_refuses(page):
    send(page, PROMPT, 10**6)
    wait_for(lambda: find(page, "#error").text)
    assert "token" in find(page, "#error").text
    find(page, "#clear").click()
    assert num_tokens(page) == 0
    send(page, "a", 100)
    wait_for(lambda: num_tokens(page) > 1)
    find(page, "#stop").click()
    wait_for(lambda: is_done(page))
    assert 1 < num_tokens(page) <= 100
    assert find(page, "#send").is_enabled()


@contextmanager
def page_of(page, *served: Any, **options: Any) -> Iterator[Any]:
    """The page of another model; gives its service. Left before the server ends."""
    with served_here(*served, **options) as (url, service):
        page.get(url)
        yield service
        page.get("about:blank")


def answered(page, tokens: int) -> bool:
    return num_tokens(page) == tokens and find(page, "#send").is_enabled()


@pytest.mark.timeout(120)
def test_a_conversation_with_a_key(page, tokenizer, tmp_path):
    (tmp_path / "keys").write_text("open-sesame\n")
    model = attached_model("llama", num_experts=12)
    keys = ApiKeys(tmp_path / "keys")
    with page_of(page, model, tokenizer, keys, chat_template=PLAIN_TEMPLATE) as service:
        heard = []
        chat = service.chat
        service.chat = lambda body: heard.append(body.messages) or chat(body)
        wait_for(lambda: "asks for an API key" in find(page, "#model").text)
        find(page, "#mode").send_keys("Chat")
        send(page, "the fox", 4)
        wait_for(lambda: "valid key" in find(page, "#error").text)
        assert heard == [] and find_all(page, ".turn") == []
        assert find(page, "#prompt").get_attribute("value") == "the fox"  # to be sent again
        key = page.switch_to.active_element
        assert key == find(page, "#key")
        key.send_keys("open-sesame", ENTER)
        wait_for(lambda: answered(page, 4))
        assert find(page, "#error").text == find(page, "#prompt").get_attribute("value") == ""
        wait_for(lambda: "12 lookup experts, training form" in find(page, "#model").text)
        find(page, "#prompt").send_keys("and then", CONTROL, ENTER)
        wait_for(lambda: answered(page, 8))
        assert [message.role for message in heard[-1]] == ["user", "assistant", "user"]
        assert find(page, "#detail-record").text == "In memory"
        shown = "return [...document.querySelectorAll('#heat td')].map((cell) => cell.textContent)"
        weights = [float(text) for text in page.execute_script(shown)]
        assert len(weights) == 3 * 12
        assert sum(weights) == pytest.approx(3, abs=0.2)
        fill(page, "#max-tokens", 40)
        find(page, "#prompt").send_keys("more", CONTROL, ENTER)
        wait_for(lambda: num_tokens(page) > 8)
        find(page, "#clear").click()
        wait_for(lambda: answered(page, 0))
        assert find(page, "#status").text == find(page, "#detail-pin").text == ""
        assert find(page, "#detail-token").text == "No token yet"
        assert set(page.execute_script(shown)) == {""}
        send(page, "anew", 2)
        wait_for(lambda: answered(page, 2))
        assert len(heard[-1]) == 1  # what was cleared away is forgotten


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("family", "form", "sentence"),
    [
        ("llama", "dense", "This is a dense model"),
        ("mixtral", "mixture of 4 experts", "compute on hidden states"),
    ],
)
def test_a_model_without_lookup_experts(page, tokenizer, family, form, sentence):
    with page_of(page, tiny_model(family), tokenizer):
        wait_for(lambda: form in find(page, "#model").text)
        send(page, "the fox", 5)
        wait_for(lambda: answered(page, 5))
        assert sentence in find(page, "#no-heat").text
        assert not find(page, "#heat").is_displayed()
        assert not find(page, "#legend").is_displayed()
        assert find_all(page, ".turn .hit, .turn .miss") == []
        assert find(page, "#live-hits").text == "–"
        assert find(page, "#detail-record").text == "None"
        assert find(page, "#detail-time").text.endswith("ms")
        find(page, "#mode").send_keys("Chat")
        find(page, "#send").click()
        wait_for(lambda: "no chat template" in find(page, "#error").text)
        assert find(page, "#prompt").get_attribute("value") == "the fox"


def test_nothing_is_said_on_the_console(page):
    """A refused script, style or request would be; refused prompts and keys alone are known."""
    said = [entry["message"] for entry in page.get_log("browser")]
    known = ("400 (Bad Request)", "401 (Unauthorized)")
    assert [line for line in said if not any(words in line for words in known)] == []
