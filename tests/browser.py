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
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
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
