"""A page in the system's Chromium, headless, driven by Playwright."""

import os
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

MISSING = "it opens a page in Chromium, and there is none: as root, apt-get install chromium"


class Chromium:
    """One browser with one page; a context manager. No call has a time limit.

    console: what the page wrote there, errors included. requests: the addresses it asked for.
    """

    def __init__(self) -> None:
        binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if not binary:
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(MISSING)
        self.console: list[str] = []
        self.requests: list[str] = []
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=binary, timeout=0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._browser.close()
        self._playwright.stop()

    def open(self, path: Path, width: int = 1280, height: int = 800, dark: bool = False) -> None:
        """Load a file and wait until it has loaded, at a size in CSS pixels."""
        for context in self._browser.contexts:
            context.close()
        self.console.clear()
        self.requests.clear()
        self.page = self._browser.new_page(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            is_mobile=width < 600,
        )
        self.page.set_default_timeout(0)
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.resolve().as_uri())

    def resize(self, width: int, height: int = 800) -> None:
        self.page.set_viewport_size({"width": width, "height": height})

    def value(self, expression: str):
        """What a JavaScript expression evaluates to in the page."""
        return self.page.evaluate(expression)

    def key(self, key: str) -> None:
        self.page.keyboard.press(key)

    def move(self, x: float, y: float) -> None:
        self.page.mouse.move(x, y)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        self.page.screenshot(path=path, full_page=whole)
