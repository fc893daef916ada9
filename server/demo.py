"""The demo: an order that is placed, cooked, carried through Bengaluru and delivered, again and again; and one that
waits for somebody to pay it.

It uses the doors as any client would: REST on loopback, with tokens of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec

from models.user import Role, Scope
from server.app import Process
from server.auth import mint

STEP_S = 1.0
"""Pause between two positions."""

STAGE_S = 4.0
"""Pause between two statuses."""

POSITIONS = 90
"""Positions of one ride."""

FROM, TO = (12.9716, 77.5946), (12.9352, 77.6245)
"""The kitchen and the door, in degrees."""

ORDER = {
    "customerId": "demo-customer",
    "fulfilment": "delivery",
    "currency": "INR",
    "items": [{"name": "Masala dosa", "quantity": 2, "unitPrice": 12000, "taxRateBp": 500}],
    "deliveryAddress": {
        "line1": "12 MG Road",
        "city": "Bengaluru",
        "postalCode": "560001",
        "country": "IN",
        "lat": TO[0],
        "lng": TO[1],
    },
}


async def run_demo(process: Process, say: Callable[[str], None]) -> None:
    """Move demo orders until cancelled."""
    await process.health.revocations.wait()
    await process.bus.reached.wait()
    base = f"http://127.0.0.1:{process.port}"
    async with aiohttp.ClientSession(trust_env=False) as session:
        client = _Client(session, base, process)
        order, to_pay = await client.place(), await client.payment_link()
        say(_welcome(process, order, to_pay))
        while True:
            try:
                await client.deliver(order["id"])
            except _STUMBLES as error:
                say(f"The demo order stumbled: {error}")
            order = await _next(client)
            say(f"A new demo order is on its way: {order['id']}")


async def _next(client: _Client) -> dict[str, Any]:
    """Another order, as soon as the server takes one: its data servers may be away."""
    while True:
        await asyncio.sleep(STAGE_S)
        with contextlib.suppress(*_STUMBLES):
            return await client.place()


class RefusedToDemo(Exception):
    """The server did not do what the demo asked."""


_STUMBLES = (RefusedToDemo, aiohttp.ClientError, TimeoutError)


class _Client:
    def __init__(self, session: aiohttp.ClientSession, base: str, process: Process) -> None:
        self._session, self._base, self._process = session, base, process

    async def _post(self, path: str, body: dict[str, Any], role: Role, sub: str) -> dict[str, Any]:
        token = mint(self._process.settings, sub=sub, role=role, ttl_s=60)
        async with self._session.post(
            f"{self._base}/api/v1{path}", json=body, headers={"Authorization": f"Bearer {token}"}
        ) as response:
            answer: dict[str, Any] = msgspec.json.decode(await response.read())
            if response.status >= 300:
                raise RefusedToDemo(f"{path} was refused: {answer['detail']}")
            return answer

    async def place(self) -> dict[str, Any]:
        order = await self._post("/orders", ORDER, Role.SERVICE, "demo-shop")
        agent = {"agentId": "demo-agent", "agentName": "Asha Kumar", "vehicle": "KA 01 1234"}
        return await self._post(f"/orders/{order['id']}/assign", agent, Role.SERVICE, "demo-shop")

    async def payment_link(self) -> str:
        """Where an order can be paid that waits for its money."""
        order = await self._post("/orders", {**ORDER, "paymentMethod": "online"}, Role.SERVICE, "demo-shop")
        link = await self._post(f"/orders/{order['id']}/payment-link", {}, Role.SERVICE, "demo-shop")
        url: str = link["url"]
        return url

    async def deliver(self, order_id: str) -> None:
        for status in ("confirmed", "preparing", "ready"):
            await asyncio.sleep(STAGE_S)
            await self._post(f"/orders/{order_id}/status", {"status": status}, Role.SERVICE, "demo-shop")
        await asyncio.sleep(STAGE_S)
        await self._post(f"/orders/{order_id}/status", {"status": "out_for_delivery"}, Role.AGENT, "demo-agent")
        for step in range(POSITIONS):
            await self._post(
                f"/orders/{order_id}/location", _position(step / (POSITIONS - 1)), Role.AGENT, "demo-agent"
            )
            await asyncio.sleep(STEP_S)
        await self._post(f"/orders/{order_id}/status", {"status": "delivered"}, Role.AGENT, "demo-agent")


def _position(share: float) -> dict[str, Any]:
    """Where the courier is after this share of the way: a bent line, because streets are."""
    bend = math.sin(share * math.pi) * 0.006
    lat = FROM[0] + (TO[0] - FROM[0]) * share + bend
    lng = FROM[1] + (TO[1] - FROM[1]) * share - bend
    return {"lat": round(lat, 6), "lng": round(lng, 6), "ts": int(time.time() * 1000), "accuracy": 8}


def _welcome(process: Process, order: dict[str, Any], to_pay: str) -> str:
    day_s = 24 * 3600
    tokens = {
        role: mint(process.settings, sub=sub, role=role, ttl_s=day_s)
        for role, sub in (
            (Role.CUSTOMER, "demo-customer"),
            (Role.AGENT, "demo-agent"),
            (Role.SERVICE, "demo-shop"),
        )
    }
    guest = mint(
        process.settings, sub="demo-guest", role=Role.GUEST, orders=[order["id"]], scope=Scope.TRACK, ttl_s=day_s
    )
    base = f"http://localhost:{process.port}"
    return f"""
Waybill is ready.

  Open        {base}/docs
  Demo order  {order["id"]} (it moves by itself)
  See it move {base}/track/{order["id"]}#token={tokens[Role.CUSTOMER]}
  Pay another {to_pay}
              (it waits {process.settings.payment_expiry_s // 60} minutes; without a gateway's keys no money moves)

  Tokens, good for a day
    customer  {tokens[Role.CUSTOMER]}
    agent     {tokens[Role.AGENT]}
    service   {tokens[Role.SERVICE]}
    guest     {guest}

  Watch it move: each call waits for the next event
    curl -H 'Authorization: Bearer {tokens[Role.CUSTOMER]}' \\
      '{base}/api/v1/orders/{order["id"]}/events?after=2&wait=30'

  Ctrl-C stops everything; the data stays in {process.settings.data_dir}/ for the next start.
"""
