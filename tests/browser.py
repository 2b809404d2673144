"""Debian's Chromium without a screen, driven by Selenium: every wait has a bound, and nothing of it is left in the end."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException, TimeoutException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

PROGRAMS = "chromium", "chromedriver"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--enable-unsafe-swiftshader",  # WebGL without a GPU
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4",  # there is a mouse
    "--hide-scrollbars",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
DEADLINE_S = 60.0
"""Of a page on a machine that has much else to do."""
_PASSING = (NoSuchElementException, StaleElementReferenceException)  # a page that is still being built


class Browser:
    """One window. Elements are named by CSS selectors; what is found lies in the frame that was entered."""

    def __init__(self, driver: webdriver.Chrome, screenshots: Path) -> None:
        self.driver, self._screenshots = driver, screenshots
        self._size = (0, 0)

    def open(self, url: str, *, width: int = 1500, height: int = 1300) -> None:
        """In a new tab: an address that differs in its fragment alone loads too, and no page is left while it still loads."""
        self.leave_frame()
        self.errors()
        self.driver.switch_to.new_window("tab")
        self.resize(width, height)
        self.driver.get(url)

    def follow(self, text: str) -> None:
        """Go where a link leads that opens another tab."""
        href = self.visible("a[target=_blank]", text).get_attribute("href")
        assert href
        self.open(href, width=self._size[0], height=self._size[1])

    def resize(self, width: int, height: int) -> None:
        """The page in a window of this size in CSS pixels."""
        self._size = (width, height)
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    def enter_frame(self, selector: str) -> None:
        self.driver.switch_to.frame(self.visible(selector))

    def leave_frame(self) -> None:
        self.driver.switch_to.default_content()

    def ask(self, expression: str, *given: Any) -> Any:
        """The value of a JavaScript expression, in which `arguments` are those given."""
        return self.driver.execute_script(f"return {expression}", *given)

    def wait(self, found: Callable[[], Any], what: str) -> Any:
        """The first true answer of `found`. Where it stays out, a picture of the page is kept."""
        waiting = WebDriverWait(self.driver, DEADLINE_S, poll_frequency=0.1, ignored_exceptions=_PASSING)
        try:
            return waiting.until(lambda _: found())
        except TimeoutException:
            shown = self.screenshot("missing")
            raise AssertionError(f"no {what} within {DEADLINE_S:g} s; see {shown}; the page says: {self.text[:2000]}") from None

    def wait_for_text(self, *words: str) -> None:
        """Until all of them can be read."""
        for each in words:
            self.wait(lambda each=each: each in self.text, repr(each))

    def visible(self, selector: str, text: str | None = None) -> WebElement:
        """The first such element that is shown, and whose text it is; awaited."""

        def found() -> WebElement | None:
            fitting = (element for element in self.all(selector) if text is None or element.text.strip() == text)
            return next((element for element in fitting if element.is_displayed()), None)

        return self.wait(found, selector if text is None else f"{selector} with the text {text!r}")

    def click(self, selector: str, text: str | None = None) -> None:
        self.visible(selector, text).click()

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return list(self.ask("[...document.querySelectorAll(arguments[0])].map(element => element.textContent)", selector))

    @property
    def text(self) -> str:
        """All that a reader sees."""
        return str(self.ask("document.body?.innerText ?? ''"))

    def colourful(self, left: float, top: float, right: float, bottom: float) -> int:
        """How many pixels of this part of the window are neither white, grey nor black."""
        with Image.open(io.BytesIO(self.driver.get_screenshot_as_png())) as picture:
            part = picture.convert("HSV").crop((int(left), int(top), int(right), int(bottom)))
        return sum(part.getchannel("S").histogram()[100:])

    def errors(self) -> list[str]:
        """The errors that the console logged since the last call."""
        return [line["message"] for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]

    def screenshot(self, name: str) -> Path:
        """Keep what the window shows."""
        path = self._screenshots / f"{name}.png"
        assert self.driver.save_screenshot(path)
        return path


@contextmanager
def chromium(profile: Path, *, screenshots: Path) -> Iterator[Browser]:
    """A browser with a new profile in that folder. The test is skipped where Chromium or its driver is not installed."""
    program, driver = (shutil.which(name) for name in PROGRAMS)
    if program is None or driver is None:
        pytest.skip(f"no {' or no '.join(PROGRAMS)} on the PATH: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program  # with both paths given, Selenium looks for nothing and downloads nothing
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--crash-dumps-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options=options, service=Service(driver))
    try:
        window.set_page_load_timeout(DEADLINE_S)
        window.set_script_timeout(DEADLINE_S)
        yield Browser(window, screenshots)
    finally:
        window.quit()
