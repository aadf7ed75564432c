"""A real headless Chromium."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

DESKTOP = (1200, 800)
PHONE = (360, 740)


@contextmanager
def open_browser() -> Iterator[Any]:
    """A driver of a fresh Chromium; the test is skipped where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="the page's test needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("the page's test needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--force-prefers-reduced-motion",  # colours are looked at, not on their way
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        set_size(browser, DESKTOP)
        yield browser
    finally:
        browser.quit()


def set_size(browser: Any, size: tuple[int, int], mobile: bool = False, scale: float = 1) -> None:
    """The viewport of a desktop, or of a phone."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": scale, "mobile": mobile}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def set_scheme(browser: Any, scheme: str) -> None:
    """`light` or `dark`, as the visitor's system would say."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


_FAINT = """
const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
const context = canvas.getContext("2d", { willReadFrequently: true });
function painted(colours) {
  for (const colour of ["white", ...colours]) {
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
  }
  const linear = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) =>
    value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
}
function behind(element) {
  if (!element) return [];
  return [...behind(element.parentElement), getComputedStyle(element).backgroundColor];
}
const faint = [];
for (const element of document.body.querySelectorAll("*")) {
  const own = [...element.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE);
  const text = (own.map((node) => node.data).join("") || element.value || "").trim();
  if (!text || element.disabled || !element.getClientRects().length) continue;
  const ground = behind(element);
  const lights = [painted(ground), painted([...ground, getComputedStyle(element).color])];
  const ratio = (Math.max(...lights) + 0.05) / (Math.min(...lights) + 0.05);
  if (ratio < 4.5) faint.push([text, ratio]);
}
return faint;
"""


def faint_texts(browser: Any) -> list[Any]:
    """Visible texts with less contrast than 4.5:1 (WCAG 2, AA), each with its contrast."""
    return browser.execute_script(_FAINT)
