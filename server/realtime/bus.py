"""The bus: Redis pub/sub between instances, over two connections of our own.

Why our own: all commands of one tick of the event loop leave in one write and their answers are matched by order, which
costs a tenth of an awaited command (docs/realtime.md); a half-open or frozen Redis is noticed by a ping that stays
unanswered; and who publishes learns at once that it failed. The bus wakes, the table decides: nothing durable is lost
here.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

import hiredis
import structlog

log = structlog.get_logger()

RECONNECT_MIN_S, RECONNECT_MAX_S = 0.05, 1.0
"""Pause before Redis is tried again: doubled after every failure, half of it random."""

SUBSCRIBE_BATCH_MAX = 500
"""Most channels in one SUBSCRIBE."""

SYNCED = b"synced"
"""Echoed by Redis after the confirmations of all channels that were asked for before it."""

Arg = str | bytes | int | float


class BusAway(Exception):
    """Redis does not answer. What was asked may or may not have happened."""


class _Link(asyncio.Protocol):
    """One connection that speaks RESP2: commands of a tick leave in one write, answers come back in order."""

    def __init__(self, on_push: Callable[[Any], None] | None = None) -> None:
        self._reader = hiredis.Reader()
        self._waiting: deque[Callable[[object], None] | None] = deque()
        self._outgoing: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._on_push = on_push
        self._loop = asyncio.get_running_loop()
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
            if self._on_push is not None:
                self._on_push(reply)
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

    def send(self, args: Sequence[Arg], answer: Callable[[object], None] | None = None) -> None:
        """Send a command. `answer` is called once: with the reply, a hiredis.ReplyError, or BusAway."""
        if self.closed.done():
            if answer is not None:
                answer(BusAway("the connection to Redis was lost"))
            return
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        packed = hiredis.pack_command(tuple(args))  # type: ignore[arg-type]  # its stub means tuple[..., ...]
        self._outgoing.append(packed)
        if self._on_push is None:
            self._waiting.append(answer)

    def _flush(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        if self._transport is not None and not self.closed.done():
            self._transport.write(b"".join(outgoing))

    async def call(self, *args: Arg, timeout_s: float) -> object:
        """The reply to one command. Raises BusAway; on silence the connection is given up."""
        future: asyncio.Future[object] = self._loop.create_future()

        def answer(reply: object) -> None:
            if not future.done():
                future.set_result(reply)

        self.send(args, answer)
        try:
            async with asyncio.timeout(timeout_s):
                reply = await future
        except TimeoutError:
            self.abort()
            raise BusAway("Redis does not answer") from None
        if isinstance(reply, BusAway):
            raise reply
        if isinstance(reply, hiredis.ReplyError):
            raise BusAway(str(reply))
        return reply


class Script:
    """A Lua script, called by its digest."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.digest = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


class Bus:
    """Publishing, subscribing and small calls, with one word on whether Redis is there: `up`.

    `on_message(channel, payload)` is called for every message of a subscribed channel, in the order of arrival.
    `on_change()` is called when `up` changes. Nothing here waits longer than `timeout_s`.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        ping_interval_s: float,
        scripts: Iterable[Script],
        on_message: Callable[[str, bytes], None],
        on_change: Callable[[], None],
    ) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._ping_interval_s = ping_interval_s
        self._scripts = list(scripts)
        self._on_message = on_message
        self._on_change = on_change
        self._commands: _Link | None = None
        self._subscriber: _Link | None = None
        self._wanted: dict[str, None] = {}
        """Channels that shall be subscribed, in the order of asking."""
        self._confirmed: set[str] = set()
        self._asked: dict[str, int] = {}
        """SUBSCRIBEs of a channel that Redis has not confirmed yet."""
        self._unsent: list[str] = []
        self._synced: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters: dict[str, list[asyncio.Future[bool]]] = {}
        self.up = False
        self.reached = asyncio.Event()
        """Set once Redis was reached for the first time."""

    async def run(self) -> None:
        """Keep both connections alive until cancelled."""
        pause_s = RECONNECT_MIN_S
        while True:
            try:
                await self._connect()
                pause_s = RECONNECT_MIN_S
                await self._watch()
            except (OSError, TimeoutError, BusAway, ssl.SSLError) as error:
                log.debug("bus_not_reached", error=str(error))
            except asyncio.CancelledError:
                self.up = False  # we leave it, it does not leave us
                self._drop()
                raise
            self._drop()
            await asyncio.sleep(pause_s * (0.5 + random.random() / 2))
            pause_s = min(pause_s * 2, RECONNECT_MAX_S)

    async def _connect(self) -> None:
        commands = await self._open(None)
        try:
            for script in self._scripts:
                await commands.call("SCRIPT", "LOAD", script.source, timeout_s=self._timeout_s)
            subscriber = await self._open(self._push)
        except BaseException:
            commands.abort()
            raise
        self._commands, self._subscriber = commands, subscriber
        await self._resubscribe()
        self.up = True
        self.reached.set()
        log.info("bus_up", channels=len(self._wanted))
        self._on_change()

    async def _resubscribe(self) -> None:
        """Ask for every wanted channel again. Returns when Redis has confirmed the last one: what is published from now
        on arrives, so whoever looks for gaps next misses nothing."""
        assert self._subscriber is not None
        self._confirmed.clear()
        self._asked.clear()
        self._synced = asyncio.get_running_loop().create_future()
        self._unsent = list(self._wanted)
        self._flush_subscriptions()
        self._subscriber.send(("PING", SYNCED))
        async with asyncio.timeout(self._timeout_s):
            await asyncio.wait((self._synced, self._subscriber.closed), return_when="FIRST_COMPLETED")
        if not self._synced.done():
            raise BusAway("the connection to Redis was lost")

    async def _watch(self) -> None:
        """Ping both links; return when one is closed. Raises TimeoutError: one stays silent."""
        commands, subscriber = self._commands, self._subscriber
        assert commands is not None
        assert subscriber is not None
        links = (commands, subscriber)
        while not (commands.closed.done() or subscriber.closed.done()):
            for link in links:
                link.heard.clear()
                link.send(["PING"])
            async with asyncio.timeout(self._timeout_s):
                for link in links:
                    await link.heard.wait()
            await asyncio.wait(
                (commands.closed, subscriber.closed), timeout=self._ping_interval_s, return_when="FIRST_COMPLETED"
            )

    def _drop(self) -> None:
        for link in (self._commands, self._subscriber):
            if link is not None:
                link.abort()
        self._commands = self._subscriber = None
        self._release_waiters()
        if self.up:
            self.up = False
            log.warning("bus_away")
            self._on_change()

    async def _open(self, on_push: Callable[[Any], None] | None) -> _Link:
        parts = urlsplit(self._url)
        loop = asyncio.get_running_loop()
        query = parse_qs(parts.query)
        async with asyncio.timeout(self._timeout_s):
            if parts.scheme == "unix":
                _, link = await loop.create_unix_connection(lambda: _Link(on_push), parts.path)
            else:
                tls = ssl.create_default_context() if parts.scheme == "rediss" else None
                _, link = await loop.create_connection(
                    lambda: _Link(on_push), parts.hostname or "127.0.0.1", parts.port or 6379, ssl=tls
                )
        # greet as a plain connection: a subscriber gets its answers as pushes only after its first SUBSCRIBE
        link._on_push = None
        try:
            if parts.password:
                credentials = [unquote(part) for part in (parts.username, parts.password) if part]
                await link.call("AUTH", *credentials, timeout_s=self._timeout_s)
            number = query.get("db", [parts.path.strip("/") if parts.scheme != "unix" else ""])[0]
            if number and number != "0":
                await link.call("SELECT", number, timeout_s=self._timeout_s)
            await link.call("PING", timeout_s=self._timeout_s)
        except BaseException:
            link.abort()
            raise
        link._on_push = on_push
        return link

    # publishing and calling

    def publish(self, channel: str, payload: bytes, answer: Callable[[object], None] | None = None) -> None:
        """Publish without waiting. `answer` gets the number of subscribers that Redis knows, or an error."""
        self.send(("PUBLISH", channel, payload), answer)

    def send(self, args: Sequence[Arg], answer: Callable[[object], None] | None = None) -> None:
        if self._commands is None:
            if answer is not None:
                answer(BusAway("Redis is away"))
            return
        self._commands.send(args, answer)

    async def call(self, *args: Arg) -> object:
        """Raises BusAway."""
        if self._commands is None:
            raise BusAway("Redis is away")
        return await self._commands.call(*args, timeout_s=self._timeout_s)

    # subscribing

    def subscribe(self, channel: str) -> Awaitable[bool]:
        """Subscribe; the answer is True once Redis confirmed it, False while Redis is away (it will be subscribed when
        Redis is back). All channels of one tick are asked for together."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if channel in self._confirmed:
            future.set_result(True)
        elif self._subscriber is None:
            self._wanted[channel] = None
            future.set_result(False)
        else:
            if channel not in self._wanted:
                self._wanted[channel] = None
                if not self._unsent:
                    asyncio.get_running_loop().call_soon(self._flush_subscriptions)
                self._unsent.append(channel)
            self._waiters.setdefault(channel, []).append(future)
        return future

    def unsubscribe(self, channel: str) -> None:
        self._wanted.pop(channel, None)
        self._confirmed.discard(channel)
        for future in self._waiters.pop(channel, ()):
            if not future.done():
                future.set_result(False)
        if self._subscriber is not None:
            self._subscriber.send(("UNSUBSCRIBE", channel))

    def _flush_subscriptions(self) -> None:
        unsent, self._unsent = self._unsent, []
        if self._subscriber is None:
            return
        channels = [channel for channel in unsent if channel in self._wanted]
        for channel in channels:
            self._asked[channel] = self._asked.get(channel, 0) + 1
        for start in range(0, len(channels), SUBSCRIBE_BATCH_MAX):
            self._subscriber.send(("SUBSCRIBE", *channels[start : start + SUBSCRIBE_BATCH_MAX]))

    def _push(self, reply: Any) -> None:
        if reply == SYNCED or not isinstance(reply, list):  # PONG has this form while no channel is subscribed
            if reply == SYNCED and not self._synced.done():
                self._synced.set_result(None)
            return
        kind = reply[0]
        if kind == b"message":
            self._on_message(reply[1].decode(), reply[2])
        elif kind == b"pong":
            self._push(reply[1])
        elif kind == b"subscribe":
            channel = reply[1].decode()
            self._asked[channel] -= 1
            if self._asked[channel]:
                return  # left and joined again meanwhile: only the last confirmation counts
            del self._asked[channel]
            if channel in self._wanted:
                self._confirmed.add(channel)
            for future in self._waiters.pop(channel, ()):
                if not future.done():
                    future.set_result(True)

    def _release_waiters(self) -> None:
        waiters, self._waiters = self._waiters, {}
        self._confirmed.clear()
        for futures in waiters.values():
            for future in futures:
                if not future.done():
                    future.set_result(False)
