"""A run with a lost, repeated or reordered event is a failed run: told from lists, and through the load generator."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from server.embedded import DataServers
from tests.bench.generator import Program, RunFailed, build
from tests.bench.judge import Event, faults, heard_in
from tests.bench.scenarios import check_events, connect_all
from tests.bench.stands import WAYBILL, Ground, Server, Stand

PLACED = Event(1, "orderStatusUpdate", "pending")
CONFIRMED = Event(2, "orderStatusUpdate", "confirmed")
SENT = Event(3, "orderOutForDelivery", "")
TABLE = {"a": [PLACED, CONFIRMED, SENT]}
WAIT_S = 10.0


def test_a_watcher_that_heard_the_table_is_no_fault() -> None:
    heard = heard_in("a 1:orderStatusUpdate:pending 2:orderStatusUpdate:confirmed 3:orderOutForDelivery:\n")
    assert heard == [("a", TABLE["a"])]
    assert faults(TABLE, heard) == []


def test_a_watcher_that_heard_nothing_is_read_as_one() -> None:
    assert faults(TABLE, heard_in("a\n")) == ["watcher 0 of order a: lost 1, 2, 3"]


@pytest.mark.parametrize(
    ("heard", "said"),
    [
        ([PLACED, SENT], "lost 2"),
        ([PLACED, CONFIRMED], "lost 3"),
        ([PLACED, CONFIRMED, CONFIRMED, SENT], "repeated 2"),
        ([PLACED, SENT, CONFIRMED], "out of order: 1, 3, 2"),
        ([PLACED, CONFIRMED, SENT, Event(4, "orderDelivered", "")], "not in the table: 4"),
        ([PLACED, CONFIRMED._replace(status="preparing"), SENT], "other events under the same numbers"),
    ],
)
def test_what_differs_from_the_table_is_named(heard: list[Event], said: str) -> None:
    assert faults(TABLE, [("a", TABLE["a"]), ("a", heard)]) == [f"watcher 1 of order a: {said}"]


# the same through the load generator: a server that speaks the protocol and may be told to do one thing wrong


class Liar:
    """Answers as Waybill does, for orders that have one event each; what it tells live is then `wrong`."""

    def __init__(self, wrong: str) -> None:
        self.wrong = wrong
        self.events: dict[str, list[dict[str, object]]] = {}
        self.watchers: dict[str, list[web.WebSocketResponse]] = {}
        self.held: dict[str, dict[str, object]] = {}

    def write(self, order: str, status: str, note: str = "") -> dict[str, object]:
        events = self.events.setdefault(order, [])
        payload = {"orderId": order, "seq": len(events) + 1, "at": "now", "status": status, "note": note}
        events.append(payload)
        return payload

    def listed(self, order: str) -> list[dict[str, object]]:
        return [
            {"type": "orderStatusUpdate", "seq": one["seq"], "at": "now", "data": one} for one in self.events[order]
        ]

    async def socket(self, request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        await ws.send_str('0{"sid":"s"}')
        async for message in ws:
            if message.data.startswith("40"):
                await ws.send_str('40{"sid":"s"}')
            elif message.data.startswith("421"):
                _, asked = json.loads(message.data[3:])
                events = self.listed(asked["orderId"])[asked["afterSeq"] :]
                if self.wrong == "the answer stops short":
                    events = []
                self.watchers.setdefault(asked["orderId"], []).append(ws)
                answer = {"ok": True, "order": {"seq": 99}, "seq": len(self.events[asked["orderId"]]), "events": events}
                await ws.send_str(f"431{json.dumps([answer])}")
        return ws

    async def move(self, request: web.Request) -> web.Response:
        order, body = request.match_info["order"], await request.json()
        if self.wrong == "refused":
            return web.json_response({"code": "illegal_move"}, status=409)
        told = [self.write(order, body["status"], body["note"])]
        if self.wrong == "lost" and told[0]["seq"] == 2:
            told = []
        if self.wrong == "repeated":
            told *= 2
        if self.wrong == "reordered":
            told = [*told, self.held.pop(order)] if order in self.held else []
            if not told:
                self.held[order] = self.events[order][-1]
        for ws in self.watchers[order]:
            for payload in told:
                await ws.send_str("42" + json.dumps(["orderStatusUpdate", payload]))
        return web.json_response({"id": order})

    async def table(self, request: web.Request) -> web.Response:
        return web.json_response({"events": self.listed(request.match_info["order"])})


@asynccontextmanager
async def lying(wrong: str, folder: Path) -> AsyncIterator[tuple[Stand, Program]]:
    """Two orders of such a server with two watchers each."""
    if shutil.which("cc") is None:
        assert os.environ.get("CI") != "true", "CI needs a C compiler for the load generator"
        pytest.skip("there is no C compiler (Debian: apt install gcc)")
    liar = Liar(wrong)
    orders = ["a", "b"]
    for order in orders:
        liar.write(order, "pending")
    app = web.Application()
    app.router.add_get("/socket.io/", liar.socket)
    app.router.add_post("/api/v1/orders/{order}/status", liar.move)
    app.router.add_get("/api/v1/orders/{order}/events", liar.table)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    ground = Ground(folder, DataServers("", "", embedded=False), build(folder), None, None)
    on = Stand(ground, WAYBILL, [Server(port, os.getpid())], orders, folder, database_url="")
    try:
        async with on.load(watchers=4) as load:
            yield on, load
    finally:
        await runner.cleanup()


async def moved(on: Stand, load: Program) -> int:
    """Six changes of the orders under the watchers' eyes; how many events were compared with the table."""
    await connect_all(load, "replay")
    await load.tell(f"move {on.servers[0].port} 200 2")
    await load.until(lambda now: now["posted"] >= 6, WAIT_S)
    return await check_events(on, load)


async def test_what_an_honest_server_tells_is_counted(tmp_path: Path) -> None:
    async with lying("", tmp_path) as (on, load):
        compared = await moved(on, load)
        assert compared == 2 * sum(map(len, (await on.table()).values())) >= 2 * (2 + 6)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("lost", "4 of 4 watchers .* lost 2"),
        ("repeated", "4 of 4 watchers .* repeated 2"),
        ("reordered", "4 of 4 watchers .* out of order: 1, 3, 2"),
        ("the answer stops short", "bad answers: 4"),
        ("refused", "refused: .*illegal_move"),
    ],
)
async def test_a_server_that_does_wrong_fails_the_run(wrong: str, said: str, tmp_path: Path) -> None:
    async with lying(wrong, tmp_path) as (on, load):
        with pytest.raises(RunFailed, match=said):
            await moved(on, load)
