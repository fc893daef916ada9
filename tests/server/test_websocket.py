"""The lean WebSocket: RFC 6455 as a server, over a real socket and, for the bytes, over a transport made of a list."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType, web
from hypothesis import given
from hypothesis import strategies as st

from server.realtime.websocket import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, WebSocket, encode, is_handshake

MAX_BYTES = 100_000


class Echo(WebSocket):
    """Answers each text with itself and writes down what it got."""

    def __init__(self) -> None:
        super().__init__(MAX_BYTES)
        self.got: list[str | bytes] = []
        self.gone = asyncio.Event()

    def on_text(self, message: str) -> None:
        self.got.append(message)
        self.write(encode(TEXT, message.encode()))

    def on_binary(self, message: bytes) -> None:
        self.got.append(message)

    def on_close(self) -> None:
        self.gone.set()


class ListTransport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


def masked(opcode: int, payload: bytes, *, final: bool = True, mask: bytes | None = None, rsv: int = 0) -> bytes:
    """A frame as clients send it."""
    mask = os.urandom(4) if mask is None else mask
    head = bytes([(0x80 if final else 0) | rsv | opcode])
    if len(payload) < 126:
        head += bytes([0x80 | len(payload)])
    elif len(payload) < 65536:
        head += bytes([0x80 | 126]) + len(payload).to_bytes(2, "big")
    else:
        head += bytes([0x80 | 127]) + len(payload).to_bytes(8, "big")
    return head + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))


def opened() -> tuple[Echo, ListTransport]:
    socket, transport = Echo(), ListTransport()
    socket._transport = transport
    return socket, transport


@pytest.fixture
async def served() -> AsyncIterator[tuple[str, list[Echo]]]:
    """A server whose every WebSocket is an Echo."""
    sockets: list[Echo] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        assert is_handshake(request)
        sockets.append(Echo())
        sockets[-1].take_over(request)
        return web.Response()

    app = web.Application()
    app.router.add_get("/", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    yield f"http://127.0.0.1:{port}/", sockets
    for socket in sockets:
        socket.abort()
    await runner.cleanup()


async def test_a_conversation_over_a_real_socket(served: tuple[str, list[Echo]]) -> None:
    url, sockets = served
    async with aiohttp.ClientSession() as session, session.ws_connect(url, compress=15) as client:
        assert not client.compress, "no extension is negotiated"
        for message in ("", "x", "é" * 62, "a" * 125, "b" * 126, "c" * 65_535, "d" * 65_536, "e" * MAX_BYTES):
            await client.send_str(message)
            assert await client.receive_str() == message
        await client.ping(b"are you there")
        await client.send_str("after the ping")
        assert await client.receive_str() == "after the ping"
        await client.close(code=1000)
        assert client.close_code == 1000
    await asyncio.wait_for(sockets[0].gone.wait(), 5)
    assert sockets[0].closing


async def test_the_server_says_goodbye(served: tuple[str, list[Echo]]) -> None:
    url, sockets = served
    async with aiohttp.ClientSession() as session, session.ws_connect(url) as client:
        await client.send_str("hello")
        assert await client.receive_str() == "hello"
        sockets[0].close(1001)
        sockets[0].write(encode(TEXT, b"too late"))
        assert (await client.receive()).type is WSMsgType.CLOSE
        assert client.close_code == 1001
    await asyncio.wait_for(sockets[0].gone.wait(), 5)


async def test_an_aborted_peer_is_noticed(served: tuple[str, list[Echo]]) -> None:
    url, sockets = served
    async with aiohttp.ClientSession() as session:
        client = await session.ws_connect(url)
        await client.send_str("hello")
        await client.receive_str()
        transport = client.get_extra_info("socket")
        transport.shutdown(2)
        await asyncio.wait_for(sockets[0].gone.wait(), 5)
        await client.close()


@given(
    st.lists(st.binary(max_size=300), max_size=6),
    st.lists(st.integers(1, 40), min_size=1, max_size=60),
    st.booleans(),
)
async def test_however_the_bytes_are_cut(messages: list[bytes], cuts: list[int], fragmented: bool) -> None:
    """The same messages come out, wherever the network splits them and whether or not the client fragments them."""
    stream, wanted = b"", []
    for payload in messages:
        text = payload.decode("latin-1")
        wanted.append(text)
        whole = text.encode()
        if fragmented and len(whole) > 2:
            third = len(whole) // 3
            stream += masked(TEXT, whole[:third], final=False)
            stream += masked(PING, b"in between")
            stream += masked(CONTINUATION, whole[third : 2 * third], final=False)
            stream += masked(CONTINUATION, whole[2 * third :])
        else:
            stream += masked(TEXT, whole)
    socket, _ = opened()
    position = turn = 0
    while position < len(stream):
        step = cuts[turn % len(cuts)]
        socket.data_received(stream[position : position + step])
        position, turn = position + step, turn + 1
    assert socket.got == wanted
    assert socket._buffer == b""


@pytest.mark.parametrize(
    ("bytes_", "code"),
    [
        (encode(TEXT, b"unmasked"), 1002),
        (masked(TEXT, b"x", rsv=0x40), 1002),
        (masked(3, b"x"), 1002),
        (masked(PING, b"x" * 126), 1002),
        (masked(PING, b"x", final=False), 1002),
        (masked(CONTINUATION, b"x"), 1002),
        (masked(TEXT, b"x", final=False) + masked(TEXT, b"y"), 1002),
        (masked(TEXT, b"\xff\xfe"), 1007),
        (masked(TEXT, b"x" * (MAX_BYTES + 1)), 1009),
        (masked(TEXT, b"x" * MAX_BYTES, final=False) + masked(CONTINUATION, b"x"), 1009),
    ],
    ids=[
        "unmasked",
        "a reserved bit",
        "no opcode",
        "a long ping",
        "a ping in pieces",
        "nothing to go on with",
        "not gone on with",
        "no UTF-8",
        "too long",
        "too long in pieces",
    ],
)
async def test_a_broken_rule_ends_the_connection_with_its_code(bytes_: bytes, code: int) -> None:
    socket, transport = opened()
    socket.data_received(bytes_)
    assert transport.written[-1] == encode(CLOSE, code.to_bytes(2, "big"))
    assert transport.closed
    assert socket.got == []
    socket.data_received(masked(TEXT, b"more"))
    assert socket.got == []


async def test_control_frames() -> None:
    socket, transport = opened()
    socket.data_received(masked(PING, b"hi") + masked(PONG, b"unasked") + masked(BINARY, b"\x00\xff"))
    assert transport.written == [encode(PONG, b"hi")]
    assert socket.got == [b"\x00\xff"]
    socket.data_received(masked(CLOSE, (1000).to_bytes(2, "big")))
    assert transport.written[-1] == encode(CLOSE, (1000).to_bytes(2, "big"))
    assert transport.closed


async def test_a_held_peer_is_read_no_further() -> None:
    socket, _ = opened()
    socket.hold()
    socket.data_received(masked(TEXT, b"one") + masked(TEXT, b"two"))
    assert socket.got == []
    socket.resume()
    assert socket.got == ["one", "two"]


@pytest.mark.parametrize("length", [0, 125, 126, 65_535, 65_536])
def test_frames_have_the_shortest_length_form(length: int) -> None:
    head = {0: 2, 125: 2, 126: 4, 65_535: 4, 65_536: 10}[length]
    assert len(encode(TEXT, b"x" * length)) == head + length
