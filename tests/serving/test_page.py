"""The page in a real Chromium, before the real server.

`PAGE_MODEL=FOLDER PAGE_SCREENSHOT=FILE pytest tests/serving/test_page.py` takes the README's
picture of another model.
"""

import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import DESKTOP, PHONE, open_browser, set_scheme, set_size
from server_process import Server

PROMPT = "It was a cold evening, and the old man"


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
    send(page, PROMPT, page.num_tokens)
    seen = set()
    while not is_done(page):
        seen.add(num_tokens(page))
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
    active.send_keys("\ue004")  # Tab
    assert page.switch_to.active_element == first
    first.send_keys("\ue014\ue014\ue014")  # three times to the right
    third = page.switch_to.active_element
    assert third == find_all(page, ".turn .token")[3]
    third.send_keys("\ue007")  # Enter
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
    set_scheme(page, "dark")
    assert page.execute_script(background) != light
    assert num_colours(page.get_screenshot_as_png()) > 50
    set_scheme(page, "light")
    set_size(page, PHONE, mobile=True)
    width = "return document.documentElement.scrollWidth"
    assert page.execute_script(width) == PHONE[0]
    set_size(page, DESKTOP)


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


def test_nothing_is_said_on_the_console(page):
    """A refused script, style or request would be; the refused prompt's status alone is known."""
    said = [entry["message"] for entry in page.get_log("browser")]
    assert [line for line in said if "400 (Bad Request)" not in line] == []
