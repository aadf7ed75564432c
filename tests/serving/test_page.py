"""The page in a real Chromium, before the real server.

Every test has a tab of its own, so they pass in any order.
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
from scripted_model import scripted
from served_here import served_here
from server_process import Server
from tables_of_a_backbone import fold
from tiny_models import attached_model, tiny_model

import lookup_experts as le
from lookup_experts.serving.guard import ApiKeys
from lookup_experts.serving.templates import PLAIN_TEMPLATE

PROMPT = "It was a cold evening, and the old man"
TAB, ENTER, SHIFT, ESCAPE = "\ue004", "\ue007", "\ue008", "\ue00c"
END, HOME, RIGHT = "\ue010", "\ue011", "\ue014"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def table_server(table_folder) -> Iterator[Server]:
    """A small model whose table is on disk, without a chat template."""
    folder = Path(os.environ.get("PAGE_MODEL", table_folder))
    options = ("--store", "direct", "--cache", "20kB" if folder == table_folder else "1MB")
    with Server(folder, *options) as server:
        yield server


@pytest.fixture
def tab(browser) -> Iterator[Any]:
    """A tab without a past. Nothing may be said on its console but refused prompts and keys: a
    script, style or request that the policy refuses would be."""
    before = browser.current_window_handle
    browser.switch_to.new_window("tab")
    own = browser.current_window_handle
    browser.switch_to.window(before)
    browser.close()
    browser.switch_to.window(own)
    set_size(browser, DESKTOP)
    set_scheme(browser, "light")
    browser.get_log("browser")
    yield browser
    said = [entry["message"] for entry in browser.get_log("browser")]
    known = ("400 (Bad Request)", "401 (Unauthorized)")
    assert [line for line in said if not any(words in line for words in known)] == []


@pytest.fixture
def page(tab, table_server) -> Any:
    """The page of the model whose table is on disk."""
    tab.get(table_server.url)
    wait_for(lambda: "layers" in find(tab, "#model").text)
    return tab


@contextmanager
def page_of(tab, *served: Any, **options: Any) -> Iterator[Any]:
    """The page of another model; gives its service. Left before the server ends."""
    with served_here(*served, **options) as (url, service):
        tab.get(url)
        yield service
        tab.get("about:blank")


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
    fill(page, "#max-tokens", tokens)
    fill(page, "#seed", 4)
    fill(page, "#temperature", 0.7)
    fill(page, "#prompt", prompt)
    find(page, "#send").click()


def done(page) -> bool:
    """Whether an answer has come to its end, and another prompt can be sent."""
    status = find(page, "#status").text
    return status.startswith(("Done", "Stopped")) and find(page, "#send").is_enabled()


def generated(page, prompt: str, tokens: int) -> None:
    """Send a prompt and wait for all of its tokens."""
    send(page, prompt, tokens)
    wait_for(lambda: done(page))
    assert find(page, "#error").text == ""


def num_tokens(page) -> int:
    return page.execute_script("return document.querySelectorAll('.turn .token').length")


def texts(page, selector: str) -> list[str]:
    return page.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)",
        selector,
    )


def listen(service) -> list[Any]:
    """The bodies that a service is asked with from now on."""
    heard: list[Any] = []
    for name in ("chat", "completion"):
        answer = getattr(service, name)
        setattr(service, name, lambda body, answer=answer: heard.append(body) or answer(body))
    return heard


def num_colours(png: bytes) -> int:
    image = pytest.importorskip("PIL.Image", reason="a picture is looked at with pillow")
    return len(image.open(io.BytesIO(png)).convert("RGB").getcolors(1 << 24))


# --- several tables -------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_a_table_is_chosen(tab, tmp_path, tokenizer):
    """And remembered over a reload; who says so beside an answer is the model with that table."""
    tiny_model("llama").save_pretrained(tmp_path / "backbone")
    fold(tmp_path / "backbone", tmp_path / "novels", 1, num_experts=4, row_size=8)
    fold(tmp_path / "backbone", tmp_path / "law", 2, form="meki", row_size=16)
    tables = {name: tmp_path / name for name in ("novels", "law")}
    model = le.load(tmp_path / "backbone", tables=tables, store="direct")
    with page_of(tab, model, tokenizer, chat_template=PLAIN_TEMPLATE):
        wait_for(lambda: find(tab, "#table").is_displayed())
        assert texts(tab, "#table option") == ["none", "novels", "law"]
        assert find(tab, "#model").text == "tiny · 3 layers · dense"
        assert not find(tab, "#details").is_displayed()
        generated(tab, "the fox", 6)
        find(tab, "#table option[value=novels]").click()
        assert (
            find(tab, "#model").text == "tiny:novels · 3 layers · 4 lookup experts, table: direct"
        )
        assert find(tab, "#heat").is_displayed()
        generated(tab, "the fox", 6)
        assert texts(tab, ".speaker.model") == ["tiny", "tiny:novels"]
        tab.refresh()
        wait_for(lambda: find(tab, "#model").text.startswith("tiny:novels"))
        assert texts(tab, ".speaker.model") == ["tiny", "tiny:novels"]
        find(tab, "#table option[value=law]").click()
        assert find(tab, "#model").text.startswith("tiny:law · 3 layers · one row of 16 per layer")
        assert not find(tab, "#heat").is_displayed()


@pytest.mark.timeout(60)
def test_without_tables_there_is_nothing_to_choose(page):
    assert not find(page, "#table-row").is_displayed()


# --- a text is continued --------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_a_prompt_is_continued_before_ones_eyes(page):
    assert not find(page, "#mode-row").is_displayed()  # a chat isn't offered without a template
    assert not find(page, "#system-row").is_displayed()
    height = find(page, "#details").rect["height"]
    page.execute_script(  # the page itself looks: it is done before a driver could look twice
        "window.seen = new Set();"
        "setInterval(() => seen.add(document.querySelectorAll('.turn .token').length), 1)"
    )
    generated(page, PROMPT, 60)
    seen = set(page.execute_script("return [...seen]"))
    assert len(seen - {0, 60}) >= 1  # it came piece by piece
    assert num_tokens(page) == 60
    assert find(page, "#status").text.startswith("Done: 60 tokens in ")
    assert find(page, "#details").rect["height"] == pytest.approx(height, abs=2)  # nothing jumped
    classes = [token.get_attribute("class").split() for token in find_all(page, ".turn .token")]
    assert {"hit", "miss"} <= {name for names in classes for name in names}
    wait_for(lambda: "%" in find(page, "#live-hits").text)


@pytest.mark.timeout(120)
def test_cut_off_at_the_limit_it_says_so_and_goes_on(page):
    generated(page, PROMPT, 8)
    assert "Cut off at the limit of 8 tokens." in find(page, ".turn .end").text
    before = texts(page, ".turn .answer")[0]
    find(page, ".go-on").click()
    wait_for(lambda: num_tokens(page) == 16 and done(page))
    assert len(find_all(page, ".turn")) == 1
    assert texts(page, ".turn .answer")[0].startswith(before)
    generated(page, PROMPT, 4)
    assert len(find_all(page, ".end")) == 2
    assert len(find_all(page, ".go-on")) == 1  # of the last alone


@pytest.mark.timeout(120)
def test_a_token_is_pinned_by_keyboard(page):
    generated(page, PROMPT, 12)
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
    time.sleep(0.3)  # the heat map's colours have come to rest
    colour = "return getComputedStyle(arguments[0]).backgroundColor"
    cells = find_all(page, "#heat td")
    assert len({page.execute_script(colour, cell) for cell in cells}) > 1


@pytest.mark.timeout(120)
def test_a_token_is_pinned_by_a_click(page):
    generated(page, PROMPT, 12)
    tokens = find_all(page, ".turn .token")
    visible = [token for token in tokens if token.text.strip()]
    visible[0].click()
    assert visible[0].get_attribute("aria-pressed") == "true"
    assert "Pinned" in find(page, "#detail-pin").text
    visible[1].click()
    assert [token.get_attribute("aria-pressed") for token in visible[:2]] == ["false", "true"]
    visible[1].click()
    assert visible[1].get_attribute("aria-pressed") == "false"
    assert "Pinned" not in find(page, "#detail-pin").text


@pytest.mark.timeout(120)
def test_light_dark_and_on_a_phone(page):
    generated(page, PROMPT, 100 if "PAGE_MODEL" in os.environ else 60)
    words = [token for token in find_all(page, ".turn .token") if token.text.strip()]
    page.execute_script("arguments[0].click()", words[9])
    time.sleep(0.3)  # the heat map's colours have come to rest
    picture = page.get_screenshot_as_png()
    assert num_colours(picture) > 50
    if path := os.environ.get("PAGE_SCREENSHOT"):
        Path(path).write_bytes(picture)
    looks_well(page)


def looks_well(page) -> None:
    """Enough contrast in both schemes, other colours in the dark, nothing wider than a phone."""
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


@pytest.mark.timeout(120)
def test_stop_and_what_the_server_refuses(page):
    send(page, PROMPT, 10**6)
    wait_for(lambda: find(page, "#error").text)
    assert "token" in find(page, "#error").text
    assert find_all(page, ".turn") == []
    send(page, "a", 100)
    wait_for(lambda: num_tokens(page) > 1)
    find(page, "#stop").click()
    wait_for(lambda: done(page))
    assert 1 < num_tokens(page) <= 100
    if num_tokens(page) < 100:
        assert "Stopped." in find(page, ".turn .end").text
        assert find(page, ".go-on").is_displayed()
    find(page, "#clear").click()
    assert num_tokens(page) == 0


# --- a chat ---------------------------------------------------------------------------------------

SAID = [
    *(
        "## A ",
        "list\n",
        "\n",
        "Some **bo",
        "ld** words",
        ", *two",
        " slan",
        "ted* and `co",
        "de`:",
    ),
    *("\n\n1. one", "\n2. ", "<b>two", "</b>\n\n", "```python\n", "print('**", "no**')\n", "```\n"),
]


@pytest.fixture(scope="module")
def markdown_model() -> Any:
    """A model with lookup experts that says `SAID` and then ends."""
    return scripted(SAID, num_experts=4)


@pytest.mark.timeout(120)
def test_a_chat_has_speakers_a_system_prompt_and_markdown(tab, markdown_model):
    with page_of(tab, *markdown_model) as service:
        wait_for(lambda: "4 lookup experts, training form" in find(tab, "#model").text)
        heard = listen(service)
        assert find(tab, "#mode").get_attribute("value") == "chat"  # it opens as one
        find(tab, "#system-row summary").click()
        fill(tab, "#system", "Be brief.")
        fill(tab, "#prompt", "one line")
        find(tab, "#prompt").send_keys(SHIFT + ENTER)
        find(tab, "#prompt").send_keys("another")
        assert find(tab, "#prompt").get_attribute("value") == "one line\nanother"
        assert heard == []
        find(tab, "#prompt").send_keys(ENTER)
        wait_for(lambda: done(tab))
        assert [(message.role, message.content) for message in heard[0].messages] == [
            ("system", "Be brief."),
            ("user", "one line\nanother"),
        ]
        assert texts(tab, ".speaker") == ["You", "tiny"]
        assert texts(tab, ".turn .prompt") == ["one line\nanother"]
        answer = ".turn .answer"
        assert texts(tab, f"{answer} h4") == ["A list"]
        assert texts(tab, f"{answer} strong") == ["bold"]
        assert texts(tab, f"{answer} em") == ["two slanted"]
        assert texts(tab, f"{answer} :not(pre) > code") == ["code"]
        assert texts(tab, f"{answer} li") == ["one", "<b>two</b>"]  # what looks like HTML is text
        assert texts(tab, f"{answer} pre code") == ["print('**no**')"]
        assert find_all(tab, f"{answer} b") == []
        assert find_all(tab, ".end") == []  # it came to its own end
        assert "<|end|>" not in find(tab, "#transcript").text
        assert find(tab, "#status").text.startswith(f"Done: {len(SAID) + 1} tokens")
        # A token that lies in two elements is one: pinned as a whole, passed over with one key.
        pieces = find_all(tab, f"{answer} [data-token='4']")
        assert [piece.text for piece in pieces] == ["ld", " words"]
        pieces[1].click()
        assert [piece.get_attribute("aria-pressed") for piece in pieces] == ["true", "true"]
        assert "Pinned" in find(tab, "#detail-pin").text
        assert find(tab, "#detail-token").text == "ld**␣words"
        assert "the token “Some␣**bo”" in find(tab, "#detail-input").text
        pieces[1].send_keys(RIGHT)
        assert tab.switch_to.active_element.get_attribute("data-token") == "5"
        looks_well(tab)


@pytest.mark.timeout(120)
def test_a_chat_goes_on_where_it_was_cut_off(tab, markdown_model):
    with page_of(tab, *markdown_model) as service:
        wait_for(lambda: "lookup experts" in find(tab, "#model").text)
        heard = listen(service)
        generated(tab, "go", 4)
        assert texts(tab, ".turn .answer strong") == []  # its end has not come yet
        assert "Cut off at the limit of 4 tokens." in find(tab, ".turn .end").text
        fill(tab, "#max-tokens", 100)
        find(tab, ".go-on").click()
        wait_for(lambda: texts(tab, ".turn .answer pre") and done(tab))
        assert texts(tab, ".turn .answer strong") == ["bold"]
        assert [message.role for message in heard[1].messages] == ["user", "assistant"]
        assert heard[1].messages[1].content == "".join(SAID[:4])
        assert heard[1].continue_final_message
        assert len(find_all(tab, ".turn")) == 1
        assert find_all(tab, ".end") == []
        generated(tab, "more", 2)  # the whole answer is what was said
        assert [message.role for message in heard[2].messages] == ["user", "assistant", "user"]
        assert heard[2].messages[1].content == "".join(SAID)


@pytest.mark.timeout(120)
def test_a_turn_that_the_model_left_unanswered_is_not_said_again(tab):
    with page_of(tab, *scripted(["  "], num_experts=2)) as service:
        wait_for(lambda: "lookup experts" in find(tab, "#model").text)
        heard = listen(service)
        generated(tab, "first", 9)
        generated(tab, "second", 9)
        asked = [[(one.role, one.content) for one in body.messages] for body in heard]
        assert asked == [[("user", "first")], [("user", "second")]]


@pytest.mark.timeout(120)
def test_the_end_of_a_text_is_no_text(tab, markdown_model):
    with page_of(tab, *markdown_model):
        wait_for(lambda: find(tab, "#mode-row").is_displayed())
        find(tab, "#mode").send_keys("Continue")
        assert not find(tab, "#system-row").is_displayed()
        fill(tab, "#max-tokens", 50)
        set_value = "document.getElementById('prompt').value = arguments[0]"
        tab.execute_script(set_value, "".join(SAID[:12]))  # typed, its line ends would send it
        find(tab, "#send").click()
        wait_for(lambda: done(tab))
        assert texts(tab, ".turn .answer") == ["".join(SAID[12:])]  # as it is, without Markdown
        assert num_tokens(tab) == len(SAID) - 12 + 1
        last = find_all(tab, ".turn .token")[-1]
        assert "ending" in last.get_attribute("class") and last.text == ""
        last.click()
        assert "Pinned" in find(tab, "#detail-pin").text
        assert find_all(tab, ".end") == []


@pytest.mark.timeout(120)
def test_a_reload_keeps_the_conversation(tab, markdown_model):
    with page_of(tab, *markdown_model) as service:
        wait_for(lambda: "lookup experts" in find(tab, "#model").text)
        find(tab, "#system-row summary").click()
        fill(tab, "#system", "Be brief.")
        generated(tab, "first", 100)
        generated(tab, "second", 4)
        shown = find(tab, "#transcript").get_attribute("innerText")
        html = texts(tab, ".turn .answer")
        tab.refresh()
        wait_for(lambda: "lookup experts" in find(tab, "#model").text)
        assert find(tab, "#transcript").get_attribute("innerText") == shown
        assert texts(tab, ".turn .answer") == html
        assert find(tab, "#system").get_attribute("value") == "Be brief."
        find_all(tab, ".turn .token")[2].click()  # what its experts did is kept, too
        assert "Pinned" in find(tab, "#detail-pin").text
        heard = listen(service)
        fill(tab, "#max-tokens", 100)
        find(tab, ".go-on").click()
        wait_for(lambda: find_all(tab, ".end") == [] and done(tab))
        roles = [message.role for message in heard[0].messages]
        assert roles == ["system", "user", "assistant", "user", "assistant"]
        find(tab, "#clear").click()
        tab.refresh()
        wait_for(lambda: "lookup experts" in find(tab, "#model").text)
        assert find_all(tab, ".turn") == []
        assert find(tab, "#hint").is_displayed()


@pytest.mark.timeout(120)
def test_a_reload_while_a_text_is_written_keeps_what_had_come(page):
    send(page, PROMPT, 100)
    wait_for(lambda: num_tokens(page) > 2)
    page.refresh()
    wait_for(lambda: "layers" in find(page, "#model").text)
    assert 2 < num_tokens(page) <= 100
    assert find(page, "#send").is_enabled()
    if num_tokens(page) < 100:
        assert "Stopped." in find(page, ".turn .end").text


@pytest.mark.timeout(120)
@pytest.mark.parametrize("folded", [False, True])
def test_a_form_without_a_router_shows_its_records(tab, tokenizer, tmp_path, folded):
    model = attached_model("llama", form="meki", num_experts=1, expert_size=None, row_size=5)
    if folded:
        le.reparameterize(model, tmp_path / "folded", encoding="float32")
        model = le.load(tmp_path / "folded", store="direct", cache="1kB")
    with page_of(tab, model, tokenizer):
        wait_for(lambda: "layers" in find(tab, "#model").text)
        form = "table: direct" if folded else "training form"
        assert f"one row of 5 per layer, {form}" in find(tab, "#model").text
        generated(tab, "the fox", 12)
        assert num_tokens(tab) == 12
        assert find(tab, "#details").is_displayed()
        assert not find(tab, "#heat").is_displayed()
        assert find(tab, "#legend").is_displayed() is folded
        about = find(tab, "#detail-rows").text
        assert "one row of 5 numbers in each layer" in about and "no router" in about
        assert ("a record of 60 B" in about) is folded
        find_all(tab, ".turn .token")[-1].click()
        record = find(tab, "#detail-record").text
        assert record in (("In the cache", "From disk") if folded else ("In memory",))
        classes = {name for token in find_all(tab, ".turn .token") for name in class_names(token)}
        assert bool({"hit", "miss"} & classes) is folded
        assert faint_texts(tab) == []


def class_names(token) -> list[str]:
    return token.get_attribute("class").split()


@pytest.mark.timeout(120)
def test_a_conversation_with_a_key(tab, tokenizer, tmp_path):
    (tmp_path / "keys").write_text("open-sesame\n")
    model = attached_model("llama", num_experts=12)
    keys = ApiKeys(tmp_path / "keys")
    with page_of(tab, model, tokenizer, keys, chat_template=PLAIN_TEMPLATE) as service:
        heard = listen(service)
        wait_for(lambda: "asks for an API key" in find(tab, "#model").text)
        send(tab, "the fox", 4)
        wait_for(lambda: "valid key" in find(tab, "#error").text)
        assert heard == [] and find_all(tab, ".turn") == []
        assert find(tab, "#prompt").get_attribute("value") == "the fox"  # to be sent again
        key = tab.switch_to.active_element
        assert key == find(tab, "#key")
        key.send_keys("open-sesame", ENTER)
        wait_for(lambda: done(tab) and len(heard) == 1)
        assert find(tab, "#error").text == find(tab, "#prompt").get_attribute("value") == ""
        assert find(tab, "#status").text.startswith("Done: 4 tokens")
        assert "12 lookup experts, training form" in find(tab, "#model").text
        find(tab, "#prompt").send_keys("and then", ENTER)
        wait_for(lambda: len(heard) == 2 and done(tab))
        assert [message.role for message in heard[-1].messages] == ["user", "assistant", "user"]
        assert find(tab, "#detail-record").text == "In memory"
        weights = [float(text) for text in texts(tab, "#heat td")]
        assert len(weights) == 3 * 12
        assert sum(weights) == pytest.approx(3, abs=0.2)
        fill(tab, "#max-tokens", 40)
        find(tab, "#prompt").send_keys("more", ENTER)
        wait_for(lambda: len(find_all(tab, ".turn")) == 3)
        find(tab, "#clear").click()
        wait_for(lambda: find(tab, "#send").is_enabled())
        assert find_all(tab, ".turn") == []
        assert find(tab, "#status").text == find(tab, "#detail-pin").text == ""
        assert find(tab, "#detail-token").text == "No token yet"
        assert set(texts(tab, "#heat td")) == {""}
        generated(tab, "anew", 2)
        assert len(heard[-1].messages) == 1  # what was cleared away is forgotten
        assert "open-sesame" not in tab.execute_script("return JSON.stringify({...sessionStorage})")


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("family", "form"), [("llama", "dense"), ("mixtral", "mixture of 4 experts")]
)
def test_a_model_without_lookup_experts_is_not_asked_what_they_did(tab, tokenizer, family, form):
    with page_of(tab, tiny_model(family), tokenizer) as service:
        heard = listen(service)
        wait_for(lambda: form in find(tab, "#model").text)
        assert not find(tab, "#details").is_displayed()
        assert "experts" not in find(tab, "#hint").text
        generated(tab, "the fox", 5)
        assert not heard[0].lookup_details
        assert texts(tab, ".turn .answer")[0]
        assert num_tokens(tab) == 0
        assert find(tab, "#status").text.startswith("Done: 5 tokens")
        assert not find(tab, "#legend").is_displayed()
        assert find(tab, "#live-hits").text == "–"
        fill(tab, "#max-tokens", 3)
        find(tab, ".go-on").click()
        wait_for(lambda: "Done: 3 tokens" in find(tab, "#status").text)
        assert heard[1].prompt.startswith("the fox")


# --- Markdown -------------------------------------------------------------------------------------

_DRAW = """
const [text, done] = arguments;
import("./markdown.js").then(({ blocksOf }) => {
  const box = document.createElement("div");
  for (const { draw } of blocksOf(text)) box.append(draw((part) => [part]));
  done(box.innerHTML);
}, (error) => done(String(error)));
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\n\nc", "<p>a\nb</p><p>c</p>"),
        ("# One\n### Three ###", "<h3>One</h3><h5>Three</h5>"),
        ("***both*** __b__ snake_case_name", None),
        ("2 * 3 * 4 and **open", "<p>2 * 3 * 4 and **open</p>"),
        ("`` a`b `` `*c*`", "<p><code> a`b </code> <code>*c*</code></p>"),
        (r"\*no\* ~~gone~~", "<p>*no* <del>gone</del></p>"),
        (
            "- a\n  - b\n- c",
            "<ul><li><p>a</p><ul><li><p>b</p></li></ul></li><li><p>c</p></li></ul>",
        ),
        ("3. x\n4. y", '<ol start="3"><li><p>x</p></li><li><p>y</p></li></ol>'),
        ("> q\n> - r", "<blockquote><p>q</p><ul><li><p>r</p></li></ul></blockquote>"),
        ("---", "<hr>"),
        ("~~~\n<i>\n~~~\nx", "<pre><code>&lt;i&gt;</code></pre><p>x</p>"),
        ("```js\nstill **written", '<pre data-language="js"><code>still **written</code></pre>'),
        (
            "|a|b|\n|-|:-:|\n|1|*2*|",
            '<div class="wide"><table><thead><tr><th>a</th><th>b</th></tr></thead>'
            "<tbody><tr><td>1</td><td><em>2</em></td></tr></tbody></table></div>",
        ),
        ("<script>alert(1)</script>", "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>"),
        ("<img src=x onerror=alert(1)>", "<p>&lt;img src=x onerror=alert(1)&gt;</p>"),
        ("[x](javascript:alert(1))", "<p>[x](javascript:alert(1))</p>"),
        ("[x]( JaVa\tscript:alert(1))", None),
        (
            "[x](data:text/html,hi) ![p](file:///etc)",
            "<p>[x](data:text/html,hi) ![p](file:///etc)</p>",
        ),
        (
            '[*x*](https://a.example/?q="b) https://b.example/c.',
            '<p><a href="https://a.example/?q=%22b" target="_blank" rel="noopener noreferrer '
            'nofollow"><em>x</em></a> <a href="https://b.example/c" target="_blank" '
            'rel="noopener noreferrer nofollow">https://b.example/c</a>.</p>',
        ),
    ],
)
def test_markdown(page, text, expected):
    drawn = page.execute_async_script(_DRAW, text)
    if expected is not None:
        assert drawn == expected
    assert (
        "<script" not in drawn
        and "<img" not in drawn
        and "javascript:" not in drawn.split("<a")[-1].split(">")[0]
    )


@pytest.mark.timeout(120)
def test_markdown_of_anything_keeps_every_character_s_place_and_takes_no_time(page):
    """Random texts: what is drawn are characters of the text, in their order, from their places."""
    found = page.execute_async_script(
        r"""
        const done = arguments[0];
        const parts = ["*", "**", "_", "`", "```", "\n", "\n\n", "- ", "1. ", "> ", "# ", "|"];
        parts.push("|-|", "[", "](", "https://a.b/c", ")", "  ", "    ", "\\", "~~", "<b>");
        parts.push("word", "ü", "😀", " ");
        let seed = 7;
        const random = (below) => (seed = (seed * 48271) % 2147483647) % below;
        const anything = () => parts[random(parts.length)];
        import("./markdown.js").then(({ blocksOf }) => {
          const wrong = [];
          for (let round = 0; round < 4000; round += 1) {
            const text = Array.from({ length: random(40) }, anything).join("");
            let last = -1;
            const make = (part, places) => {
              if (part.length !== places.length) wrong.push([text, "lengths"]);
              for (let at = 0; at < part.length; at += 1) {
                if (part[at] === "\n") continue; // stands for its line's end, wherever that is
                const isRight = text[places[at]] === part[at] && places[at] > last;
                if (!isRight) wrong.push([text, part, at]);
                last = places[at];
              }
              return [part];
            };
            for (const { draw } of blocksOf(text)) draw(make);
          }
          const slow = [];
          for (const part of ["*", "**a", "_a ", "`", "[", "![a](", "> ", "- ", "|", "<h", "\\",
                              "~", "*a_"]) {
            const startedAt = performance.now();
            const text = part.repeat(20000 / part.length);
            for (const { draw } of blocksOf(text)) draw((piece) => [piece]);
            const seconds = (performance.now() - startedAt) / 1000;
            if (seconds > 3) slow.push([part, seconds]);
          }
          done([wrong.slice(0, 3), slow]);
        }).catch((error) => done(String(error.stack)));
        """
    )
    assert found == [[], []]
