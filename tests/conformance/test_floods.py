"""Whatever comes too fast on one session is read more slowly, refused nothing, and nobody else waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from models.user import Actor, Role
from server.realtime.connections import Connection, Frame, Opening
from server.realtime.engine import Engine
from server.realtime.quota import Quota
from server.realtime.websocket import CONTINUATION, PING, PONG, TEXT
from tests.conformance.serve import LIMITS
from tests.conformance.wire import Door, serving
from tests.harness import SOON_S, until
from tests.server.test_websocket import masked

PER_S, BURST, MANY = 200, 10, 200
LEAST_S = 0.9 * (MANY - BURST) / PER_S
"""What so many take, less a little: clocks are not the same."""

FLOODS: dict[str, bytes] = {
    "events": masked(TEXT, b'42["x"]') * MANY,
    "acknowledgements": masked(TEXT, b"431[]") * MANY,
    "CONNECT again": masked(TEXT, b"40{}") * MANY,
    "pongs": masked(TEXT, b"3") * MANY,
    "pings of the WebSocket": masked(PING, b"x") * MANY,
    "pongs of the WebSocket": masked(PONG, b"1") * MANY,
    "attachments": (masked(TEXT, b'451-["x",{"_placeholder":true,"num":0}]') + masked(2, b"x")) * (MANY // 2),
    "crumbs": masked(TEXT, b"3", final=False)
    + masked(CONTINUATION, b"", final=False) * MANY
    + masked(CONTINUATION, b""),
}


class Paced(Engine):
    """Answers every event with its name. Each session has a quota."""

    def __init__(self, **changes: Any) -> None:
        options = {**LIMITS, "ping_interval_s": 25, "ping_timeout_s": 20, "new_quota": lambda: Quota(PER_S, BURST)}
        super().__init__(
            authenticate=self._welcome,
            open_connection=self._open_plain,
            on_event=lambda connection, name, args, number: connection.send(Frame(f'2["heard {name}"]')),
            on_close=lambda connection: None,
            connect_timeout_s=30,
            attachments_max=1,
            **{**options, **changes},
        )

    async def _welcome(self, auth: object, caller: str) -> Actor:
        return Actor(sub="somebody", role=Role.SERVICE, exp=time.time() + 3600)

    async def _open_plain(self, connection: Connection, auth: object) -> Opening:
        return Opening({}, lambda: None)


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with serving(Paced()) as door:
        yield door


@asynccontextmanager
async def raw(door: Door) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connected session as bytes."""
    port = int(door.url.split(":")[2].split("/")[0])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**16)
    writer.write(
        b"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
    )
    async with asyncio.timeout(SOON_S):
        await reader.readuntil(b'"maxPayload"')
        writer.write(masked(TEXT, b"40{}"))
        await reader.readuntil(b'40{"sid"')
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("what", FLOODS)
async def test_a_flood_of_anything_waits_at_its_sender(door: Door, what: str) -> None:
    async with raw(door) as (reader, writer), door.session() as other:
        await other.connect()
        began = time.monotonic()
        writer.write(FLOODS[what] + masked(TEXT, b'42["end"]'))
        await other.send('42["calm"]')
        assert await other.text() == '42["heard calm"]'
        assert time.monotonic() - began < LEAST_S / 2, "another session waits for nothing"
        async with asyncio.timeout(SOON_S):
            await reader.readuntil(b'"heard end"')
        assert time.monotonic() - began > LEAST_S


async def test_a_flood_by_polling_waits_too(door: Door) -> None:
    client = await door.poller()
    began = time.monotonic()
    assert await client.post("\x1e".join(["3"] * MANY)) == (200, "ok")
    assert time.monotonic() - began > LEAST_S


async def test_after_a_rest_a_session_is_read_at_once_again(door: Door) -> None:
    async with raw(door) as (reader, writer):
        writer.write(FLOODS["pongs"] + masked(TEXT, b'42["end"]'))
        async with asyncio.timeout(SOON_S):
            await reader.readuntil(b'"heard end"')
            await asyncio.sleep(2 * BURST / PER_S)
            began = time.monotonic()
            writer.write(masked(TEXT, b"3") * (BURST - 2) + masked(TEXT, b'42["calm"]'))
            await reader.readuntil(b'"heard calm"')
        assert time.monotonic() - began < 0.5 * BURST / PER_S


async def test_who_floods_pings_of_the_websocket_and_reads_no_pong_is_held_and_then_cut() -> None:
    """Without a quota: what bounds it is what any slow reader meets."""
    server = Paced(new_quota=lambda: None, slow_max_s=0.5)
    async with serving(server) as door, raw(door) as (_, writer):
        (session,) = server.eio.sockets.values()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        pings, most, stopped = masked(PING, b"x" * 100) * 500, 0, False

        async def flood() -> None:
            while True:
                writer.write(pings)
                await writer.drain()

        flooding = asyncio.create_task(flood())

        def watch() -> object:
            nonlocal most, stopped
            transport = session._transport
            if transport is not None:
                most = max(most, transport.get_write_buffer_size())
                stopped = stopped or session._held != 0
            return session.closing

        await until(watch, "it is cut", 20)
        with pytest.raises(ConnectionError):
            await flooding
    assert stopped, "it was read no further"
    assert most < 2 * LIMITS["slow_bytes"]
