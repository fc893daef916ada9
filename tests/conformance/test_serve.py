"""The server for the official suites starts as they are told to start it, and talks."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

from tests.conformance.wire import Door
from tests.harness import free_port, until


@asynccontextmanager
async def started(path: str, *options: str) -> AsyncIterator[Door]:
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.conformance.serve",
        "--port",
        str(port),
        *options,
        stdout=asyncio.subprocess.DEVNULL,
    )

    async def listens() -> bool:
        assert process.returncode is None, "it ended"
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    try:
        async with aiohttp.ClientSession() as http:
            await until(listens, "it listens", 30)
            yield Door(f"http://127.0.0.1:{port}{path}", http)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def test_the_socket_io_server() -> None:
    async with started("/socket.io/") as door, door.session() as socket:
        for namespace in ("", "/custom,"):
            assert (await socket.connect(f'40{namespace}{{"token":"1"}}')).keys() == {"sid"}
            assert await socket.text() == f'42{namespace}["auth",{{"token":"1"}}]'
            await socket.send(f'42{namespace}["message",1,"2",{{"3":[true]}}]')
            assert await socket.text() == f'42{namespace}["message-back",1,"2",{{"3":[true]}}]'
            await socket.send(f'42{namespace}7["message-with-ack",1]')
            assert await socket.text() == f"43{namespace}7[1]"


async def test_the_engine_io_server() -> None:
    async with started("/engine.io/", "--engine") as door:
        async with door.websocket() as socket:
            greeting = json.loads((await socket.text())[1:])
            assert (greeting["pingInterval"], greeting["pingTimeout"]) == (300, 200)
            await socket.send("4hello", b"\x01\x02")
            assert [await socket.text(), await socket.text()] == ["4hello", b"\x01\x02"]
        client = await door.poller()
        assert await client.post("4hello\x1ebAQI=") == (200, "ok")
        assert await client.packets(2) == ["4hello", "bAQI="]
