"""A browser for the whole run, a visitor for each test, one server for each file."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser, expect

from server.embedded import DataServers
from tests.browser.browsing import CHROMIUM, REQUIRED, Visitor, chromium
from tests.harness import SOON_S, Instance
from tests.shared import shared_fleet

expect.set_options(timeout=SOON_S * 1000)


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    if CHROMIUM is None:
        if REQUIRED:
            pytest.fail("CI needs Chromium (Debian: apt install chromium) for the tests of the pages.")
        pytest.skip("Chromium is not installed (Debian: apt install chromium).")
    async with chromium() as started:
        yield started


@pytest.fixture
async def visitor(browser: Browser) -> AsyncIterator[Visitor]:
    """Opens pages. At the end nothing may stand on a console that the test did not announce."""
    visiting = Visitor(browser)
    yield visiting
    await visiting.leave()
    assert not visiting.unexpected()


@pytest.fixture(scope="module")
async def shop(data: DataServers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Instance]:
    """One server, shared by the tests of a file."""
    async with shared_fleet(data, tmp_path_factory.mktemp("shop")) as fleet:
        yield await fleet.start()
