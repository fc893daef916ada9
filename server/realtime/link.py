"""One connection to one Redis: all commands of a tick leave in one write, answers are matched by order."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast
from urllib.parse import parse_qs, unquote, urlsplit

import hiredis

Arg = str | bytes | int | float

Answer = Callable[[object], None]
"""Called once: with the reply, a hiredis.ReplyError, or BusAway."""


class BusAway(Exception):
    """Redis does not answer. What was asked may or may not have happened."""


class BusRefused(BusAway):
    """Redis answered with an error."""


class Address(NamedTuple):
    """Where a Redis listens. Port 0: `host` is the path of a Unix socket."""

    host: str
    port: int


class Link(asyncio.Protocol):
    """One connection that speaks RESP2. With `on_push` it listens: whatever comes in goes there."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._reader = hiredis.Reader()
        self._waiting: deque[Answer | None] = deque()
        self._outgoing: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self.on_push: Callable[[Any], None] | None = None
        self.closed = self._loop.create_future()
        self.heard = asyncio.Event()
        """Set when anything comes in, and at the end."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.heard.set()
        self._reader.feed(data)
        while True:
            try:
                reply = self._reader.gets()
            except hiredis.ProtocolError:
                self.abort()
                return
            if reply is False:
                return
            if self.on_push is not None:
                self.on_push(reply)
            elif self._waiting:
                answer = self._waiting.popleft()
                if answer is not None:
                    answer(reply)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)
        self.heard.set()
        waiting, self._waiting = self._waiting, deque()
        for answer in waiting:
            if answer is not None:
                answer(BusAway("the connection to Redis was lost"))

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def send(self, args: Sequence[Arg], answer: Answer | None = None) -> None:
        """Send a command."""
        if self.closed.done():
            if answer is not None:
                answer(BusAway("the connection to Redis was lost"))
            return
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        packed = hiredis.pack_command(tuple(args))  # type: ignore[arg-type]  # its stub means tuple[..., ...]
        self._outgoing.append(packed)
        if self.on_push is None:
            self._waiting.append(answer)

    def _flush(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        if self._transport is not None and not self.closed.done():
            self._transport.write(b"".join(outgoing))

    async def call(self, *args: Arg, timeout_s: float) -> object:
        """The reply to one command. Raises BusAway; on silence the connection is given up."""
        return await replied(lambda answer: self.send(args, answer), timeout_s, self.abort)


async def replied(send: Callable[[Answer], None], timeout_s: float, give_up: Callable[[], None]) -> object:
    """The reply to what `send` sends. Raises BusAway; on silence `give_up` is called first."""
    future: asyncio.Future[object] = asyncio.get_running_loop().create_future()

    def answer(reply: object) -> None:
        if not future.done():
            future.set_result(reply)

    send(answer)
    try:
        async with asyncio.timeout(timeout_s):
            reply = await future
    except TimeoutError:
        give_up()
        raise BusAway("Redis does not answer") from None
    if isinstance(reply, BusAway):
        raise reply
    if isinstance(reply, hiredis.ReplyError):
        raise BusRefused(str(reply))
    return reply


class Dialer:
    """Opens links as a URL says, with its credentials, its TLS and its database, to its own address or to another one
    of the same cluster."""

    def __init__(self, url: str, timeout_s: float) -> None:
        parts = urlsplit(url)
        is_path = parts.scheme == "unix"
        self.address = Address(parts.path, 0) if is_path else Address(parts.hostname or "127.0.0.1", parts.port or 6379)
        self.timeout_s = timeout_s
        self._encrypted = parts.scheme == "rediss"
        self._tls: ssl.SSLContext | None = None
        self._credentials = [unquote(part) for part in (parts.username, parts.password) if part]
        self._authenticates = bool(parts.password)
        self._database = parse_qs(parts.query).get("db", ["" if is_path else parts.path.strip("/")])[0]

    async def open(self, address: Address, on_push: Callable[[Any], None] | None = None) -> Link:
        """A link whose other end has answered. Raises OSError, TimeoutError, ssl.SSLError, BusAway."""
        loop = asyncio.get_running_loop()
        if self._encrypted and self._tls is None:
            self._tls = ssl.create_default_context()
        async with asyncio.timeout(self.timeout_s):
            if not address.port:
                _, link = await loop.create_unix_connection(lambda: Link(address), address.host)
            else:
                _, link = await loop.create_connection(lambda: Link(address), address.host, address.port, ssl=self._tls)
        try:
            if self._authenticates:
                await link.call("AUTH", *self._credentials, timeout_s=self.timeout_s)
            if self._database and self._database != "0":
                await link.call("SELECT", self._database, timeout_s=self.timeout_s)
            await link.call("PING", timeout_s=self.timeout_s)
        except BaseException:
            link.abort()
            raise
        # only now: a subscriber gets its answers as pushes only after its first SUBSCRIBE
        link.on_push = on_push
        return link
