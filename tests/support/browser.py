"""A real Chromium without a window, for tests of the page."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import ActionChains, Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
FRAMES = """
const long = [];
const observer = new PerformanceObserver((list) => long.push(...list.getEntries().map((each) => each.duration)));
observer.observe({ entryTypes: ["longtask"] });
const times = [];
let going = true;
const tick = (now) => { times.push(now); if (going) requestAnimationFrame(tick); };
requestAnimationFrame(tick);
"""
"""A script that records the times of frames in `times`, and long tasks in `long`, until `going` is false."""


class Browser:
    """Chromium with one tab. It must end without a message in its console, but those that `allowed` is in."""

    def __init__(self, driver: Chrome):
        self.driver = driver
        self.allowed: tuple[str, ...] = ()

    def open(self, url: str) -> None:
        """Show an address with nothing kept from before."""
        origin = url.split("#")[0].rstrip("/")
        self.driver.get(f"{origin}/page/icon.svg")
        self.driver.execute_script("sessionStorage.clear()")
        self.driver.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": origin, "storageTypes": "all"})
        self.driver.get(url)

    def run(self, script: str, *arguments: Any) -> Any:
        """What an async function with this body returns."""
        wrapped = (
            "const done = arguments[arguments.length - 1];"
            f"(async (...args) => {{{script}}})(...arguments).then(done, (e) => done('failed: ' + e.stack));"
        )
        return self.driver.execute_async_script(wrapped, *arguments)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        """The first element that can be seen, once there is one."""
        return self.until(lambda: next((each for each in self.all(selector) if each.is_displayed()), None), selector)

    def click(self, selector: str) -> None:
        """Click the first element that can be seen, even if it is made anew meanwhile."""

        def clicked() -> bool:
            self.one(selector).click()
            return True

        self.until(clicked, selector)

    def button(self, name: str) -> WebElement:
        """A button by its text or label."""
        path = f"//button[normalize-space()='{name}' or @aria-label='{name}']"
        found = self.driver.find_elements
        return self.until(lambda: next((each for each in found(By.XPATH, path) if each.is_displayed()), None), name)

    def texts(self, selector: str) -> list[str]:
        return [
            str(text)
            for text in self.run("return [...document.querySelectorAll(args[0])].map((e) => e.textContent)", selector)
        ]

    def press(self, *keys: str, held: str = "") -> None:
        """Press keys one after the other, while `held` is held down."""
        actions = ActionChains(self.driver)
        if held:
            actions.key_down(held)
        actions.send_keys(*keys)
        if held:
            actions.key_up(held)
        actions.perform()

    def size(self, width: int, height: int, is_phone: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_phone}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme: str) -> None:
        """Prefer a light or dark color scheme."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def until(self, condition: Callable[[], Any], what: str = "it", seconds: float = 20) -> Any:
        """Wait until a condition is true, and return its value."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if value := condition():
                    return value
            except StaleElementReferenceException:
                pass
            assert time.monotonic() < deadline, f"{what} does not happen; the console has {self.console()}"
            time.sleep(0.02)

    def console(self) -> list[str]:
        """New messages of the console."""
        messages = [str(entry["message"]) for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]
        return [each for each in messages if not any(part in each for part in ("favicon.ico", *self.allowed))]


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A new browser, with its files in `folder`. Skips the test where Chromium or its driver is missing."""
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with Chrome(options=options, service=Service(driver)) as chrome:
        chrome.set_script_timeout(30)
        browser = Browser(chrome)
        browser.size(1280, 860)
        yield browser
