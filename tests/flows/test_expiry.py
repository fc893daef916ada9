"""The end of a token on a live socket: told before, a grace in which it may only be refreshed, then cut, everywhere."""

from __future__ import annotations

import asyncio
import time
import uuid

import pytest

from tests.flows.wire import Wire
from tests.harness import SOON_S, Fleet, Instance, token, until

GRACE_S = 3
LOOKED_AT_S = 1.0
"""Within this after a token's time something happens to it, on a busy machine too."""


def short(seconds: float, sub: str = "c1") -> str:
    """A token that expires after so many seconds, to the second."""
    return token("customer", sub, exp=int(time.time() + seconds))


@pytest.fixture
async def pair(fleet: Fleet) -> tuple[Instance, Instance]:
    return await fleet.pair(TOKEN_EXPIRY_GRACE_S=str(GRACE_S))


def names(wire: Wire) -> list[str]:
    return [name for kind, name, _ in wire.frames if kind == "event"]


async def test_in_the_grace_a_socket_hears_on_but_begins_nothing(pair: tuple[Instance, Instance]) -> None:
    a, b = pair
    seen, other = await a.place(), await a.place()
    exp = int(time.time() + 3)
    by = token("customer", "c1", exp=exp)
    async with Wire(a, by) as here, Wire(b, by) as there:
        for wire in (here, there):
            assert (await wire.call("subscribeToOrder", {"orderId": seen["id"]}))["ok"]
        await asyncio.sleep(exp - time.time())
        for wire in (here, there):
            for event, payload in (
                ("subscribeToOrder", {"orderId": other["id"]}),
                ("subscribeToOrder", {"orderId": seen["id"], "afterSeq": 0}),
                ("updateOrderStatus", {"orderId": seen["id"], "status": "cancelled"}),
                ("updateLocation", {"orderId": seen["id"], "lat": 1.0, "lng": 1.0, "ts": time.time() * 1000}),
            ):
                answer = await wire.call(event, payload)
                assert answer["error"]["code"] == "unauthenticated", (event, answer)
        await a.move(seen["id"], "confirmed")
        for wire in (here, there):
            await until(lambda wire=wire: wire.seqs(seen["id"]) == [2], "the grace is not deaf")
        assert time.time() < exp + GRACE_S, "the machine is too busy for this test"
        for wire in (here, there):
            await until(lambda wire=wire: wire.closed, "it is cut when the grace is over", SOON_S)
            assert exp + GRACE_S <= time.time() < exp + GRACE_S + LOOKED_AT_S
            assert names(wire) == ["tokenExpiring", "orderStatusUpdate", "subscriptionClosed", "disconnected"]
            assert wire.frames[-1] == ("event", "disconnected", {"code": "expired"})
            assert wire.sent_away


async def test_a_refresh_in_the_grace_is_in_time_and_moves_the_end(pair: tuple[Instance, Instance]) -> None:
    a, _ = pair
    order = await a.place()
    async with Wire(a, short(2)) as wire:
        assert (await wire.call("subscribeToOrder", {"orderId": order["id"]}))["ok"]
        await asyncio.sleep(2.2)
        answer = await wire.call("refreshToken", {"token": short(2 * GRACE_S)})
        assert answer["ok"], answer
        until_s = time.monotonic() + GRACE_S
        while time.monotonic() < until_s:  # the time at which the first token would have been ended passes
            assert not wire.closed
            await asyncio.sleep(0.1)
        assert (await wire.call("subscribeToOrder", {"orderId": (await a.place())["id"]}))["ok"]
        await until(lambda: wire.closed, "the new token ends too", SOON_S)
        assert names(wire) == ["tokenExpiring", "subscriptionClosed", "subscriptionClosed", "disconnected"]


async def test_hundreds_of_tokens_of_one_second_end_together_and_nobody_waits(fleet: Fleet) -> None:
    a = await fleet.start(TOKEN_EXPIRY_GRACE_S="1", RATE_ADDRESS_HANDSHAKES_BURST_MAX="1000000")
    exp = int(time.time() + 12)
    by = token("customer", uuid.uuid4().hex, exp=exp)
    wires: list[Wire] = []
    try:
        for _ in range(8):
            wires += await asyncio.gather(*(Wire(a, by).__aenter__() for _ in range(50)))
        slowest = 0.0
        while not all(wire.closed for wire in wires):
            assert time.time() < exp + SOON_S
            began = time.monotonic()
            assert (await a.get("/orders?limit=1")).status == 200
            slowest = max(slowest, time.monotonic() - began)
        assert slowest < 1
    finally:
        await asyncio.gather(*(wire.__aexit__() for wire in wires))
    assert all(wire.frames[-1] == ("event", "disconnected", {"code": "expired"}) for wire in wires)
