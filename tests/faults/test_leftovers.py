"""Clients that come, ask, change their minds and vanish, in every order: each that stays hears everything once and in
order, and when all have gone nothing of them is left."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import time
import uuid
from typing import Any

import aiohttp
import socketio

from tests.harness import SERVICE, Fleet, Instance, Watcher, token, until

CHAOS_S = 8.0
"""How long; FUZZ_SEED in the environment repeats who does what."""
CLIENTS = 12
ORDERS = 4


class Client:
    """Does what it likes with a few orders, and checks what it hears."""

    def __init__(
        self,
        chance: random.Random,
        http: aiohttp.ClientSession,
        instances: tuple[Instance, ...],
        orders: list[str],
    ) -> None:
        self._chance, self._http, self._instances, self._orders = chance, http, instances, orders

    async def live(self, until_s: float) -> None:
        while time.monotonic() < until_s:
            jti = str(uuid.uuid4())
            role, sub = self._chance.choice([("customer", "c1"), ("service", "shop"), ("agent", "a1"), ("guest", "g1")])
            claims: dict[str, Any] = {"orders": self._orders} if role == "guest" else {}
            transports = self._chance.choice([["websocket"], ["polling"], ["polling", "websocket"]])
            watcher = Watcher(
                self._chance.choice(self._instances), token(role, sub, jti=jti, **claims), transports=transports
            )
            # the client forgets to close a session of its own when it is sent away while it polls
            watcher.client.eio.http, watcher.client.eio.external_http = self._http, True
            with contextlib.suppress(socketio.exceptions.SocketIOError, aiohttp.ClientError):
                async with watcher:
                    for _ in range(self._chance.randrange(1, 12)):
                        if watcher.disconnected.is_set() or not await self._act(watcher, jti):
                            break
            for order_id in self._orders:
                seqs = watcher.seqs(order_id)
                assert seqs == sorted(set(seqs)), (order_id, watcher.heard)

    async def _act(self, watcher: Watcher, jti: str) -> bool:
        """One thing. False: it has gone."""
        order_id = self._chance.choice(self._orders)
        asked: dict[str, Any] = {"orderId": order_id}
        match self._chance.randrange(8):
            case 0 | 1 | 2:
                await watcher.call(
                    "subscribeToOrder", asked | self._chance.choice([{}, {"afterSeq": 0}, {"afterSeq": 10**6}])
                )
            case 3:
                await watcher.call("unsubscribeFromOrder", asked)
            case 4:
                await asyncio.gather(
                    *(watcher.call(event, asked) for event in ("subscribeToOrder", "unsubscribeFromOrder") * 3)
                )
            case 5:
                await watcher.client.emit("subscribeToOrder", asked)
                await watcher.client.disconnect()
                return False
            case 6:
                await watcher.client.emit("subscribeToOrder", asked)
                await self._chance.choice(self._instances).post("/tokens/revoke", {"jti": jti})
                await until(
                    watcher.disconnected.is_set, f"a revoked session ends {watcher._transports} {watcher.heard[-3:]}"
                )
                return False
            case _:
                await watcher.call("updateOrderStatus", asked | {"status": "returned"})
        return True


async def test_nothing_is_left_of_clients_that_have_gone(fleet: Fleet) -> None:
    seed = int(os.environ.get("FUZZ_SEED") or random.SystemRandom().randrange(2**32))
    print(f"FUZZ_SEED={seed}")  # noqa: T201  # shown when the test fails
    instances = await fleet.pair(RATE_LIMITS="off")
    orders = [(await instances[0].place())["id"] for _ in range(ORDERS)]
    deadline = time.monotonic() + CHAOS_S
    agents = (f"a{number}" for number in itertools.count(1))

    async def stir() -> None:
        while time.monotonic() < deadline:
            for order_id in orders:
                await instances[0].assign(order_id, next(agents))

    async with Watcher(instances[1], SERVICE) as steady:
        for order_id in orders:
            await steady.watch(order_id)
        async with aiohttp.ClientSession() as http:
            clients = (Client(random.Random(f"{seed}/{n}"), http, instances, orders) for n in range(CLIENTS))
            await asyncio.gather(stir(), *(client.live(deadline) for client in clients))
        for order_id in orders:
            top = (await instances[0].get(f"/orders/{order_id}")).body["seq"]
            await until(
                lambda key=order_id, seq=top: steady.seqs(key)[-1:] == [seq], "the steady one hears the last event"
            )
            assert steady.seqs(order_id) == list(range(2, top + 1))

    async def left(instance: Instance) -> bool:
        page = (await instance.get("/metrics", by=None)).body.decode()
        return "waybill_connections 0.0" in page and "waybill_watched_orders 0.0" in page

    for instance in instances:
        await until(lambda one=instance: left(one), "nothing is left")
