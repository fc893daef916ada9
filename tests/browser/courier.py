"""An order on its way, as the tests and the screenshots need it."""

from __future__ import annotations

import math
import time
from typing import Any

from tests.harness import ORDER, Instance, token

HOME = {"lat": 12.9352, "lng": 77.6245}
KITCHEN = {"lat": 12.9716, "lng": 77.5946}
ADDRESS = {**ORDER["deliveryAddress"], **HOME}  # type: ignore[dict-item]  # ORDER is a plain JSON object

RIDE_S = 540
"""How long a whole ride takes, in the courier's time; it fits into LOCATION_MAX_AGE_MS."""

AGENT = {"agentId": "a1", "agentName": "Asha Kumar", "vehicle": "KA 01 1234"}


async def send(shop: Instance, **changes: Any) -> dict[str, Any]:
    """Place an order and bring it on its way with AGENT."""
    order = await shop.place(deliveryAddress=ADDRESS, **changes)
    await shop.move(order["id"], "confirmed", "preparing")
    reply = await shop.post(f"/orders/{order['id']}/assign", AGENT)
    assert reply.status == 200, reply
    return await shop.move(order["id"], "ready", "out_for_delivery")


async def link_of(shop: Instance, order: dict[str, Any], **how: Any) -> dict[str, Any]:
    """A tracking link of an order, whose url is on 127.0.0.1."""
    reply = await shop.post(f"/orders/{order['id']}/tracking-link", how)
    assert reply.status == 201, reply
    secret = reply.body["url"].rpartition("/")[2]
    return {**reply.body, "secret": secret, "url": f"{shop.url}/track/{secret}"}


def fix(share: float, age_s: float = 0) -> dict[str, Any]:
    """The courier's position after this share of the way, taken `age_s` ago: streets bend and turn."""
    bend = math.sin(share * math.pi) * 0.008 + math.sin(share * 17) * 0.0013
    return {
        "lat": round(KITCHEN["lat"] + (HOME["lat"] - KITCHEN["lat"]) * share + bend, 6),
        "lng": round(KITCHEN["lng"] + (HOME["lng"] - KITCHEN["lng"]) * share - bend * 0.6, 6),
        "ts": int((time.time() - age_s) * 1000),
        "accuracy": 8,
    }


async def ride(
    shop: Instance, order: dict[str, Any], start: float, end: float, steps: int, *, age_s: float = 0
) -> dict[str, Any]:
    """Send positions from one share of the way to another, at the speed of a scooter; returns the last one."""
    by = token("agent", "a1")
    for step in range(steps):
        share = start + (end - start) * step / max(1, steps - 1)
        position = fix(share, age_s + (end - share) * RIDE_S)
        reply = await shop.post(f"/orders/{order['id']}/location", position, by=by)
        assert reply.status == 200, reply
        assert not reply.body["refused"], reply
    return position
