"""A real Chromium, and pages that write down what went wrong in them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Error, Page, async_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
REQUIRED = os.environ.get("CI") == "true"

ARGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
"""Chromium must look up nothing by itself: a test's network is this machine."""

SERVER_AWAY = re.compile(
    r"ERR_CONNECTION_REFUSED|ERR_EMPTY_RESPONSE|ERR_CONNECTION_RESET|Unexpected response code: 503"
    r"|responded with a status of 503"
)
"""What Chromium says on its console while a server is down. No page can prevent that."""


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """The browser of this machine; Playwright downloads none."""
    assert CHROMIUM is not None
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        try:
            yield browser
        finally:
            await browser.close()


class Visitor:
    """Opens pages, each in a browser profile of its own, and keeps what they complained about."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._contexts: list[BrowserContext] = []
        self.complaints: list[str] = []
        self.expected: list[re.Pattern[str]] = []
        """Complaints that the test makes on purpose."""
        self.requested: list[str] = []
        """Every address that a page asked for."""

    async def page(self, *, script: str = "", **options: Any) -> Page:
        """An empty page. `script` runs before any of the page's own; `options` are those of a Playwright context."""
        context = await self._browser.new_context(
            **{"viewport": {"width": 1000, "height": 700}, "locale": "en-IN", "timezone_id": "Asia/Kolkata", **options}
        )
        self._contexts.append(context)
        if script:
            await context.add_init_script(script)
        page = await context.new_page()
        page.on("console", self._hear)
        page.on("pageerror", self._fail)
        page.on("request", lambda request: self.requested.append(request.url))
        page.on("websocket", lambda socket: self.requested.append(socket.url))
        return page

    async def open(self, url: str, **how: Any) -> Page:
        page = await self.page(**how)
        await page.goto(url)
        return page

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _fail(self, error: Error) -> None:
        self.complaints.append(f"uncaught: {error}")

    def unexpected(self) -> list[str]:
        return [one for one in self.complaints if not any(known.search(one) for known in self.expected)]

    async def leave(self) -> None:
        for context in self._contexts:
            await context.close()
