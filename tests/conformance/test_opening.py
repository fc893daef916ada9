"""How a connection of the default namespace begins and ends: the two hooks that frame its life, and what mass does."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from models.errors import Forbidden, Unavailable
from models.user import Actor, Role
from server.realtime.connections import Connection, Frame, Opening
from server.realtime.engine import Engine
from tests.conformance.serve import LIMITS
from tests.conformance.wire import Door, serving
from tests.harness import until

LAG_MAX_S = 0.05
MANY = 1000


class Recorded(Engine):
    """An engine that writes down what its hooks are told. `gate` holds connections that are being opened."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.names: dict[str, str] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.refusal: Exception | None = None
        self.at_close: Callable[[], None] = lambda: None
        super().__init__(
            authenticate=self._welcome,
            open_connection=self._open_recorded,
            on_event=lambda connection, name, args, number: connection.send(Frame(f'2["heard","{name}"]')),
            on_close=self._close_recorded,
            connect_timeout_s=1.0,
            attachments_max=0,
            **{**LIMITS, "ping_interval_s": 25, "ping_timeout_s": 20},
        )

    async def _welcome(self, auth: object, caller: str) -> Actor:
        return Actor(sub="somebody", role=Role.SERVICE, exp=time.time() + 3600)

    async def _open_recorded(self, connection: Connection, auth: Any) -> Opening:
        self.seen.append(f"opens {auth['name']}")
        loop = asyncio.get_running_loop()
        for _ in range(3 if auth["name"] != "x" else 0):  # somebody who would come between
            loop.call_soon(lambda: asyncio.ensure_future(self.emit("rumour")))
        await self.gate.wait()
        if self.refusal is not None:
            raise self.refusal
        self.names[connection.id] = auth["name"]

        def then() -> None:
            self.seen.append(f"then {auth['name']}")
            connection.send(Frame('2["first"]'))

        return Opening({"pid": f"p-{auth['name']}"}, then)

    def _close_recorded(self, connection: Connection) -> None:
        assert connection.gone
        self.seen.append(f"closes {self.names[connection.id]}")
        self.at_close()


@pytest.fixture
async def server() -> Recorded:
    return Recorded()


@pytest.fixture
async def door(server: Recorded) -> AsyncIterator[Door]:
    async with serving(server) as door:
        yield door


async def test_the_answer_and_what_follows_it_are_one_step(server: Recorded, door: Door) -> None:
    async with door.session() as other, door.session() as socket:
        assert (await other.connect('40{"name":"a"}')).keys() == {"sid", "pid"}
        assert (await socket.connect('40{"name":"b"}'))["pid"] == "p-b"
        assert await socket.text() == '42["first"]'
    await until(lambda: len(server.seen) == 6, "both are gone")
    assert server.seen[:4] == ["opens a", "then a", "opens b", "then b"]
    assert sorted(server.seen[4:]) == ["closes a", "closes b"]


async def test_the_same_by_polling(server: Recorded, door: Door) -> None:
    client = await door.poller()
    assert await client.post('40{"name":"a"}') == (200, "ok")
    answer, first = (await client.packets(2))[:2]
    assert '"pid":"p-a"' in answer
    assert first == '42["first"]'
    assert await client.post("1") == (200, "ok")
    await until(lambda: server.seen == ["opens a", "then a", "closes a"], "it is closed")


async def test_a_refusal_for_good_is_told_and_may_be_tried_again(server: Recorded, door: Door) -> None:
    server.refusal = Forbidden("Not here.")
    async with door.session() as socket:
        await socket.send('40{"name":"a"}')
        assert await socket.text() == '44{"message":"Not here.","data":{"code":"forbidden","message":"Not here."}}'
        server.refusal = None
        await socket.connect('40{"name":"b"}')
    await until(lambda: server.seen[-1] == "closes b", "it is closed")
    assert server.seen == ["opens a", "opens b", "then b", "closes b"]


@pytest.mark.parametrize("error", [Unavailable("Later."), ZeroDivisionError()])
async def test_a_refusal_for_now_and_a_fault_of_ours_end_the_transport(
    server: Recorded, door: Door, error: Exception
) -> None:
    server.refusal = error
    async with door.session() as socket:
        await socket.send('40{"name":"a"}')
        assert await socket.rest() == []
    await until(lambda: not server.eio.sockets, "the session is over")
    assert server.seen == ["opens a"]


async def gone(server: Recorded) -> None:
    await until(lambda: not server.eio.sockets, "the session is over")


@pytest.mark.parametrize("how", ["lost", "leaves", "polls"])
async def test_who_goes_while_it_is_let_in_is_closed_and_never_began(server: Recorded, door: Door, how: str) -> None:
    server.gate.clear()
    if how == "polls":
        client = await door.poller()
        assert await client.post('40{"name":"a"}') == (200, "ok")
        await until(lambda: server.seen == ["opens a"], "it is being opened")
        assert await client.post("1") == (200, "ok")
        await gone(server)
    else:
        async with door.session() as socket:
            await socket.send('40{"name":"a"}')
            await until(lambda: server.seen == ["opens a"], "it is being opened")
            if how == "leaves":
                await socket.send("41")
                (session,) = server.eio.sockets.values()
                await until(lambda: session.opening is None, "it was heard")
            else:
                (session,) = server.eio.sockets.values()
                session.abort()
                await gone(server)
    assert server.seen == ["opens a"], "what was begun is not taken back before it is done"
    server.gate.set()
    await until(lambda: len(server.seen) == 2, "it is closed")
    assert server.seen == ["opens a", "closes a"]
    assert not server.connections
    assert list(server.manager.get_namespaces()) == []


async def test_who_leaves_and_comes_while_it_is_let_in_is_opened_once(server: Recorded, door: Door) -> None:
    server.gate.clear()
    async with door.session() as socket:
        await socket.send('40{"name":"a"}')
        await until(lambda: server.seen == ["opens a"], "the first is being opened")
        await socket.send("41", '40{"name":"b"}')
        await until(lambda: server.seen == ["opens a", "opens b"], "both are being opened")
        server.gate.set()
        assert '"pid":"p-b"' in await socket.text()
        await socket.send('42["x"]')
        while '"heard"' not in await socket.text():
            pass
        assert sorted(server.seen) == ["closes a", "opens a", "opens b", "then b"]
        assert len(server.connections) == 1
    await until(lambda: "closes b" in server.seen, "it is closed")
    assert len(server.seen) == 5


async def test_who_leaves_before_anybody_looked_is_not_opened(server: Recorded, door: Door) -> None:
    async with door.session() as socket:
        await socket.send('40{"name":"a"}', "41", '40{"name":"b"}')
        assert '"pid":"p-b"' in await socket.text()
        assert "opens a" not in server.seen


async def test_who_is_let_in_too_slowly_is_cut(server: Recorded, door: Door) -> None:
    server.gate.clear()
    async with door.session() as socket:
        await socket.send('40{"name":"a"}')
        assert await socket.rest() == []
    await gone(server)
    server.gate.set()
    await until(lambda: server.seen == ["opens a", "closes a"], "it is closed")


async def test_what_comes_before_the_answer_is_refused(server: Recorded, door: Door) -> None:
    server.gate.clear()
    async with door.session() as socket:
        await socket.send('40{"name":"a"}')
        await until(lambda: server.seen == ["opens a"], "it is being opened")
        await socket.send('421["x"]')
        assert '"unauthenticated"' in await socket.text()
        assert len(await socket.rest()) == 1
    server.gate.set()
    await until(lambda: server.seen == ["opens a", "closes a"], "it is closed")


# mass

CROWD = """
import os, socket, sys
port, many = int(sys.argv[1]), int(sys.argv[2])
head = (f"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\\r\\nHost: x\\r\\nConnection: Upgrade\\r\\n"
        "Upgrade: websocket\\r\\nSec-WebSocket-Version: 13\\r\\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\\r\\n\\r\\n").encode()
connect = b'40{"name":"x"}'
people = []
for _ in range(many):
    one = socket.create_connection(("127.0.0.1", port))
    one.sendall(head)
    heard = b""
    while b'"maxPayload"' not in heard: heard += one.recv(4096)
    one.sendall(bytes((0x81, 0x80 | len(connect))) + bytes(4) + connect)
    people.append(one)
for one in people:
    heard = b""
    while b'"pid"' not in heard: heard += one.recv(4096)
print("in", flush=True)
sys.stdin.readline()
os._exit(0)
"""


class LagProbe:
    """How long the loop was kept from coming round, at most."""

    def __init__(self) -> None:
        self.worst_s = 0.0

    async def run(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0)
            self.worst_s = max(self.worst_s, time.perf_counter() - before)


async def test_a_crowd_that_goes_at_once_does_not_block_the_loop(server: Recorded, door: Door) -> None:
    """Each costs a third of a millisecond, together many times what the loop may be kept."""

    def cost() -> None:
        until_then = time.perf_counter() + 0.0003
        while time.perf_counter() < until_then:
            pass

    server.at_close = cost
    port = door.url.split(":")[2].split("/")[0]
    crowd = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CROWD, port, str(MANY), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert crowd.stdin is not None
    assert crowd.stdout is not None
    async with asyncio.timeout(60):
        assert await crowd.stdout.readline() == b"in\n"
        assert len(server.connections) == MANY
        probe = LagProbe()
        probing = asyncio.create_task(probe.run())
        await asyncio.sleep(0.1)
        probe.worst_s = 0.0
        crowd.stdin.write(b"\n")
        await crowd.wait()
        await gone(server)
        probing.cancel()
    assert server.seen.count("closes x") == MANY
    assert not server.connections
    assert server.eio.websockets == 0
    assert probe.worst_s < LAG_MAX_S, f"the loop was blocked for {probe.worst_s * 1000:.0f} ms"


async def test_a_job_that_fails_keeps_nobody_from_being_closed(server: Recorded, door: Door) -> None:
    failed = iter([True, False, False])

    def fail_once() -> None:
        if next(failed):
            raise ZeroDivisionError

    server.at_close = fail_once
    async with door.session() as a, door.session() as b, door.session() as c:
        for socket in (a, b, c):
            await socket.connect('40{"name":"x"}')
        for session in list(server.eio.sockets.values()):
            session.abort()
        await gone(server)
    assert server.seen.count("closes x") == 3


# whoever leaves and keeps its transport


async def test_who_left_and_says_nothing_more_is_cut(server: Recorded, door: Door) -> None:
    async with door.session() as socket:
        await socket.connect('40{"name":"x"}')
        assert await socket.text() == '42["first"]'
        await asyncio.sleep(1.2)  # its first deadline is over: it was connected then
        left_at = time.monotonic()
        await socket.send("41")
        await until(lambda: server.unconnected == 1, "it has left")
        assert await socket.rest() == []
        assert 0.9 < time.monotonic() - left_at < 3
    await gone(server)
    assert server.seen == ["opens x", "then x", "closes x"]


async def test_who_left_has_as_long_to_come_back_as_a_new_one(server: Recorded, door: Door) -> None:
    """However late in an earlier deadline it left; and who came back stays."""
    async with door.session() as socket:
        await socket.connect('40{"name":"x"}')
        assert await socket.text() == '42["first"]'
        await asyncio.sleep(0.7)
        await socket.send("41")
        await asyncio.sleep(0.7)
        await socket.connect('40{"name":"x"}')
        assert await socket.text() == '42["first"]'
        await asyncio.sleep(1.3)
        await socket.send('42["x"]')
        assert await socket.text() == '42["heard","x"]'
    await gone(server)


@pytest.mark.parametrize("by", ["client", "server"])
async def test_the_deadline_is_for_who_is_in_no_namespace_at_all(server: Recorded, door: Door, by: str) -> None:
    server.on("connect", lambda sid, environ: None, namespace="/other")
    async with door.session() as socket:
        await socket.connect('40{"name":"x"}')
        assert await socket.text() == '42["first"]'
        answer = await socket.connect("40/other,")
        await socket.send("41")
        await asyncio.sleep(1.3)
        await socket.send("41/other,") if by == "client" else await server.disconnect(answer["sid"], "/other")
        left_at = time.monotonic()
        assert await socket.rest() == ([] if by == "client" else ["41/other,"])
        assert 0.9 < time.monotonic() - left_at < 3
    await gone(server)
