"""An order on its way, as the tests and the screenshots need it."""

from __future__ import annotations

import math
import time
from itertools import pairwise
from typing import Any

from tests.harness import ORDER, Instance, token

WAY = [
    (12.9716, 77.5946),
    (12.9667, 77.5966),
    (12.9674, 77.6002),
    (12.9618, 77.6031),
    (12.9606, 77.5993),
    (12.9532, 77.6025),
    (12.9549, 77.6089),
    (12.9489, 77.6117),
    (12.9498, 77.6160),
    (12.9436, 77.6189),
    (12.9431, 77.6228),
    (12.9352, 77.6245),
]
"""Corners of the way from the kitchen to the door: latitude and longitude."""
LEGS = [math.dist(start, end) for start, end in pairwise(WAY)]
ADDRESS = {**ORDER["deliveryAddress"], "lat": WAY[-1][0], "lng": WAY[-1][1]}  # type: ignore[dict-item]  # ORDER is a plain JSON object

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
    """The courier's position after this share of the way, taken `age_s` ago."""
    along = share * sum(LEGS)
    corner = 0
    while along > LEGS[corner] and corner < len(LEGS) - 1:
        along -= LEGS[corner]
        corner += 1
    on_leg = along / LEGS[corner]
    lat, lng = (a + (b - a) * on_leg for a, b in zip(WAY[corner], WAY[corner + 1], strict=True))
    return {"lat": round(lat, 6), "lng": round(lng, 6), "ts": int((time.time() - age_s) * 1000), "accuracy": 8}


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
