"""Both transports by hand: HTTP and WebSocket against a server in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import WSMsgType, web

from server.realtime.engine import Engine
from server.realtime.transports import EngineServer
from tests.conformance.serve import application
from tests.harness import SOON_S


class Door:
    """A server and how to knock at it."""

    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self.url = url
        self.http = http

    async def get(self, query: str) -> tuple[int, str]:
        async with asyncio.timeout(SOON_S), self.http.get(f"{self.url}?{query}") as response:
            return response.status, await response.text()

    async def send(self, method: str, query: str, body: str | bytes = b"") -> tuple[int, str]:
        async with asyncio.timeout(SOON_S), self.http.request(method, f"{self.url}?{query}", data=body) as response:
            return response.status, await response.text()

    async def poller(self) -> Poller:
        """A new session that polls."""
        status, text = await self.get("EIO=4&transport=polling")
        assert (status, text[0]) == (200, "0"), text
        return Poller(self, json.loads(text[1:]))

    @asynccontextmanager
    async def websocket(self, query: str = "EIO=4&transport=websocket") -> AsyncIterator[WebSocket]:
        """A WebSocket as it is before anything was said."""
        async with self.http.ws_connect(f"{self.url}?{query}", max_msg_size=0, compress=15) as socket:
            assert not socket.compress, "deflate was negotiated"
            yield WebSocket(socket)

    @asynccontextmanager
    async def session(self) -> AsyncIterator[WebSocket]:
        """A new session on a WebSocket, greeted."""
        async with self.websocket() as socket:
            assert (await socket.text()).startswith("0{")
            yield socket


class Poller:
    def __init__(self, door: Door, greeting: dict[str, Any]) -> None:
        self.door = door
        self.greeting = greeting
        self.query = f"EIO=4&transport=polling&sid={greeting['sid']}"
        self.probe = f"EIO=4&transport=websocket&sid={greeting['sid']}"

    async def poll(self) -> tuple[int, str]:
        return await self.door.get(self.query)

    async def post(self, body: str | bytes) -> tuple[int, str]:
        return await self.door.send("POST", self.query, body)

    def waiting_poll(self) -> asyncio.Task[tuple[int, str]]:
        return asyncio.create_task(self.poll())

    async def packets(self, count: int) -> list[str]:
        """The next messages, pings answered and passed over."""
        found: list[str] = []
        while len(found) < count:
            status, text = await self.poll()
            assert status == 200, text
            for packet in text.split("\x1e"):
                if packet == "2":
                    assert await self.post("3") == (200, "ok")
                elif packet != "6":
                    found.append(packet)
        return found

    async def upgrade(self, socket: WebSocket) -> None:
        await socket.socket.send_str("2probe")
        assert await socket.text() == "3probe"
        await socket.socket.send_str("5")


class WebSocket:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.heard: list[Any] = []
        """Every message, pings too."""

    async def send(self, *messages: str | bytes) -> None:
        for message in messages:
            await (self.socket.send_str(message) if isinstance(message, str) else self.socket.send_bytes(message))

    async def receive(self) -> Any:
        """The next message, whatever it is; None at the end."""
        message = await self.socket.receive(timeout=SOON_S)
        if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
            self.heard.append(message.data)
            return message.data
        return None

    async def text(self) -> Any:
        """The next message, pings answered and passed over; None at the end."""
        while (message := await self.receive()) == "2":
            await self.send("3")
        return message

    async def connect(self, packet: str = "40") -> Any:
        """Send a CONNECT; the payload of the answer."""
        await self.send(packet)
        answer = await self.text()
        assert answer.startswith(packet.partition(",")[0].partition("{")[0]), answer
        return json.loads(answer[answer.index("{") :])

    async def rest(self) -> list[Any]:
        """Everything until the server hangs up."""
        found = []
        while (message := await self.text()) is not None:
            found.append(message)
        return found


@asynccontextmanager
async def serving(server: EngineServer | Engine, path: str = "/socket.io/") -> AsyncIterator[Door]:
    """The server on a port of its own."""
    runner = web.AppRunner(application(server, path), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    engine = server.eio if isinstance(server, Engine) else server
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            yield Door(f"http://127.0.0.1:{runner.addresses[0][1]}{path}", http)
    finally:
        for session in list(engine.sockets.values()):
            session.abort()
        await runner.cleanup()
