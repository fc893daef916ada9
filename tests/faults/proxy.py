"""A TCP proxy before Postgres or Redis that does what networks do: passes, cuts, refuses, freezes, swallows."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from urllib.parse import parse_qs, urlsplit, urlunsplit

CHUNK_BYTES = 65_536

_MESSAGE = re.compile(rb"\*3\r\n\$7\r\nmessage\r\n\$\d+\r\n([^\r\n]*)\r\n\$(\d+)\r\n")


class Way:
    """One direction of all connections."""

    def __init__(self) -> None:
        self._moving = asyncio.Event()
        self._moving.set()
        self._edit: Callable[[bytes], bytes] | None = None
        self._late_s = 0.0

    def move(self) -> None:
        """Pass everything on; what a freeze held back goes first."""
        self._edit = None
        self._late_s = 0.0
        self._moving.set()

    def slow(self, late_s: float) -> None:
        """Pass each piece on so much later than the one before."""
        self._late_s = late_s

    def freeze(self) -> None:
        """Pass nothing on, lose nothing, close nothing."""
        self._moving.clear()

    def swallow(self) -> None:
        """Lose everything silently."""
        self.edit(lambda chunk: b"")

    def edit(self, edit: Callable[[bytes], bytes]) -> None:
        """Pass on what `edit` makes of each piece that comes."""
        self._edit = edit
        self._moving.set()

    async def through(self, chunk: bytes) -> bytes:
        await self._moving.wait()
        if self._late_s:
            await asyncio.sleep(self._late_s)
        return self._edit(chunk) if self._edit is not None else chunk


class Proxy:
    """Stands before the server of a URL, which may be a Unix socket. `url` is that server through this proxy."""

    def __init__(self, url: str) -> None:
        self._target = url
        self.up = Way()
        """What clients say."""
        self.down = Way()
        """What the server says."""
        self.url = ""
        self._server: asyncio.Server | None = None
        self._port = 0
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._serving: set[asyncio.Task[None]] = set()

    # faults

    async def heal(self) -> None:
        """Take connections and pass everything on again, both ways."""
        if self._server is None:
            await self._listen()
        self.up.move()
        self.down.move()

    def freeze(self) -> None:
        """Stand still, both ways: connections stay open and new ones are taken, but nobody hears a word."""
        self.up.freeze()
        self.down.freeze()

    async def freeze_for(self, seconds: float) -> None:
        """Stand still for so long, then go on."""
        self.freeze()
        await asyncio.sleep(seconds)
        await self.heal()

    def swallow(self) -> None:
        """Lose everything silently, both ways."""
        self.up.swallow()
        self.down.swallow()

    def cut(self) -> None:
        """Reset every connection; new ones are served."""
        for pair in self._pairs:
            for writer in pair:
                writer.transport.abort()

    def refuse(self) -> None:
        """Take no new connections; those that are open stay."""
        assert self._server is not None
        self._server.close()
        self._server = None

    # passing

    async def _listen(self) -> None:
        """At the same port as before."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        self.url = self._url()

    def _url(self) -> str:
        parts = urlsplit(self._target)
        if parts.scheme == "unix":
            return f"redis://127.0.0.1:{self._port}"
        credentials, at, _ = parts.netloc.rpartition("@")
        query = "" if parts.scheme.startswith("postgres") else parts.query
        return urlunsplit(parts._replace(netloc=f"{credentials}{at}127.0.0.1:{self._port}", query=query))

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        parts = urlsplit(self._target)
        if parts.scheme == "unix":
            return await asyncio.open_unix_connection(parts.path)
        is_postgres = parts.scheme.startswith("postgres")
        query = parse_qs(parts.query)
        folder = query.get("host", [""])[0]
        if is_postgres and folder.startswith("/"):
            return await asyncio.open_unix_connection(f"{folder}/.s.PGSQL.{query.get('port', ['5432'])[0]}")
        return await asyncio.open_connection(parts.hostname, parts.port or (5432 if is_postgres else 6379))

    def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._connect(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await self._open()
        except OSError:
            writer.transport.abort()  # nobody is there
            return
        pair = (writer, server_writer)
        self._pairs.add(pair)
        try:
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(_pump(reader, server_writer, self.up))
                pumps.create_task(_pump(server_reader, writer, self.down))
        finally:
            self._pairs.discard(pair)
            for one in pair:
                one.transport.abort()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self.cut()
        serving = list(self._serving)
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way) -> None:
    """Pass on until the giver ends; then the taker is told, after all that was given before."""
    with contextlib.suppress(OSError):
        while chunk := await reader.read(CHUNK_BYTES):
            writer.write(await way.through(chunk))
            await writer.drain()
    writer.close()


@asynccontextmanager
async def proxied(url: str) -> AsyncIterator[Proxy]:
    """A proxy before the server of this URL."""
    proxy = Proxy(url)
    await proxy.heal()
    try:
        yield proxy
    finally:
        await proxy.close()


class Dropper:
    """An edit for what a Redis says: loses the messages of one channel, and nothing else, not even a byte beside them.

    Redis writes a small message in one piece, so a message is not looked for across pieces.
    """

    def __init__(self, channel: str) -> None:
        self._channel = channel.encode()
        self.dropped: list[bytes] = []

    def __call__(self, chunk: bytes) -> bytes:
        kept, position = b"", 0
        while found := _MESSAGE.search(chunk, position):
            end = found.end() + int(found[2]) + 2
            if found[1] == self._channel:
                self.dropped.append(chunk[found.end() : end - 2])
                kept += chunk[position : found.start()]
            else:
                kept += chunk[position:end]
            position = end
        return kept + chunk[position:]


class Jumbler:
    """An edit for what a Redis says: some messages of order channels come twice, some come after their successors, some
    twice and late. Held ones that nothing follows are lost: no successor reveals them."""

    def __init__(self, rng: random.Random, lose: float = 0.0) -> None:
        self._rng = rng
        self._lose = lose
        """Share of messages that are lost instead."""
        self._held: list[bytes] = []
        self.struck = 0

    def __call__(self, chunk: bytes) -> bytes:
        passed, position = b"", 0
        while found := _MESSAGE.search(chunk, position):
            end = found.end() + int(found[2]) + 2
            if end > len(chunk):
                break  # the rest of it comes with the next piece
            passed += chunk[position : found.start()]
            message, position = chunk[found.start() : end], end
            passed += self._jumbled(message) if found[1].startswith(b"waybill:order:") else message
        return passed + chunk[position:]

    def _jumbled(self, message: bytes) -> bytes:
        due, self._held = self._held, []
        self._rng.shuffle(due)
        if self._rng.random() < self._lose:
            self.struck += 1
            return b"".join(due)
        fate = self._rng.choice(["whole", "twice", "late", "twice and late"])
        self.struck += fate != "whole"
        if "late" in fate:
            self._held.append(message)
        now = {"whole": 1, "twice": 2, "late": 0, "twice and late": 1}[fate]
        return message * now + b"".join(due)
