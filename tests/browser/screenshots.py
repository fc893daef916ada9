"""What `scripts/screenshots` runs: the tracking page of an order on its way, as a phone and a desktop show it."""

from __future__ import annotations

import asyncio
import datetime as dt
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import asyncpg
from playwright.async_api import Browser, expect

from server.embedded import data_servers
from tests.browser.browsing import chromium
from tests.browser.courier import ride, send
from tests.harness import ROOT, Fleet, Instance, token

IMAGES = ROOT / "docs" / "images"
BYTES_MAX = 200_000
DEVICES: dict[str, Any] = {
    "phone": {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2},
    "desktop": {"viewport": {"width": 1280, "height": 800}, "device_scale_factor": 1.5},
}
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
MINUTES = [41, 39, 34, 33, 16, 12, 12]
"""How long ago each event of the order was; the pictures shall not show that it was all done in a second."""


async def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        folder.chmod(0o755)  # Postgres refuses to run as root and must reach its folder as somebody else
        async with data_servers(folder / "data", None, None, print) as data, chromium() as browser:
            fleet = Fleet(data.database_url, data.redis_url, folder)
            try:
                shop = await fleet.start()
                await _take(browser, shop, await _order(shop, data.database_url))
            finally:
                await fleet.stop()


async def _order(shop: Instance, database_url: str) -> dict[str, Any]:
    """An order on its way, with a past."""
    order = await send(
        shop,
        reference="WEB-20417",
        items=[
            {"name": "Masala dosa", "quantity": 2, "unitPrice": 12000, "taxRateBp": 500},
            {"name": "Filter coffee", "quantity": 1, "unitPrice": 4000, "taxRateBp": 500},
        ],
    )
    connection = await asyncpg.connect(database_url)
    now = dt.datetime.now(dt.UTC)
    for seq, minutes in enumerate(MINUTES, 1):
        at = now - dt.timedelta(minutes=minutes)
        await connection.execute("update order_events set at = $2 where seq = $1", seq, at)
    await connection.close()
    return order


async def _take(browser: Browser, shop: Instance, order: dict[str, Any]) -> None:
    """Open all pages, let the courier ride before their eyes, and take the pictures."""
    address = f"{shop.url}/track/{order['id']}#token={token('customer', 'c1')}"
    pages = {}
    for device, options in DEVICES.items():
        for scheme in SCHEMES:
            context = await browser.new_context(
                **options, color_scheme=scheme, locale="en-IN", timezone_id="Asia/Kolkata", reduced_motion="reduce"
            )
            pages[f"track-{device}-{scheme}.png"] = page = await context.new_page()
            await page.goto(address)
            await expect(page.locator("#link")).to_have_attribute("data-state", "live")
    last = await ride(shop, order, 0.05, 0.68, 60)
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, page in pages.items():
        await page.bring_to_front()
        await expect(page.locator("#marker")).to_have_attribute("data-ts", str(last["ts"]))
        await page.evaluate(
            "() => new Promise((painted) => requestAnimationFrame(() => requestAnimationFrame(painted)))"
        )
        await page.screenshot(path=IMAGES / name)
        size = (IMAGES / name).stat().st_size
        assert size < BYTES_MAX, f"{name} has {size} bytes"
        sys.stdout.write(f"docs/images/{name}: {size // 1000} KB\n")


if __name__ == "__main__":
    asyncio.run(main())
