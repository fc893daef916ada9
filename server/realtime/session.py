"""Engine.IO sessions: over a lean WebSocket for those that connect so, over the library's socket for those that poll.

Both are what python-socketio expects of an Engine.IO socket, so its rooms, acknowledgements and calls work with either.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import msgspec
from aiohttp import web
from engineio.async_socket import AsyncSocket

from server import metrics
from server.realtime.connections import Connection, Frame
from server.realtime.websocket import GOING_AWAY, TEXT, WebSocket, encode

ACK_DIGITS_MAX = 15
"""Longest acknowledgement number: what a JavaScript number counts exactly."""

POLL_AGAIN_S = 1.0
"""How long a client that polls may take to come for the last messages of a session that ends."""

_decode = msgspec.json.Decoder(list[Any]).decode
_PING = encode(TEXT, b"2")

_SLOW = 2
"""Why a session is held, besides the 1 of its unanswered calls."""


class Handler(Protocol):
    """What sessions need of the engine."""

    wheel: Wheel
    connect_timeout_s: float
    ping_interval_s: float
    ping_timeout_s: float
    slow_bytes: int
    queue_max_bytes: int
    slow_max_s: float

    def on_packet(self, session: Session, packet: str) -> Coroutine[Any, Any, None]:
        """A Socket.IO packet that is not an event of a connected client."""

    def on_event(self, connection: Connection, name: str, args: list[Any], number: int | None) -> None: ...

    def on_gone(self, session: Session, reason: str) -> Coroutine[Any, Any, None]: ...


class Session(WebSocket):
    """An Engine.IO session whose transport was a WebSocket from the start.

    A slow reader is first coalesced: while more than `slow_bytes` wait for it, only the newest position of each order
    is kept. It is cut when `queue_max_bytes` wait, or when it has been slow for `slow_max_s`: its transport is aborted,
    so that all memory is free at once, and the client comes back and recovers.
    """

    __slots__ = ("_awaits_pong", "_engine", "_latest", "_slow", "_tasks", "caller", "connection", "session", "sid")

    connected = upgraded = True
    upgrading = False

    def __init__(self, engine: Handler, sid: str, max_bytes: int, caller: str) -> None:
        super().__init__(max_bytes)
        self._engine = engine
        self.sid = sid
        self.caller = caller
        """Whom the limits of strangers count."""
        self.connection: Connection | None = None
        self.session: dict[str, Any] = {}
        """Kept for AsyncServer.save_session."""
        self._awaits_pong = False
        self._slow: asyncio.TimerHandle | None = None
        self._latest: dict[str, Frame] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self, request: web.BaseRequest, greeting: bytes) -> None:
        """Take the connection over and greet. Raises ConnectionResetError: the client has gone."""
        self.take_over(request)
        assert self._transport is not None
        self._transport.set_write_buffer_limits(high=self._engine.slow_bytes)
        self.write(encode(TEXT, greeting))
        self._engine.wheel.after(self._engine.connect_timeout_s, self._check_connected)
        self._engine.wheel.after(self._engine.ping_interval_s, self._ping)

    # liveness

    def _check_connected(self) -> None:
        if self.connection is None and not self.closing:
            self._cut("no_connect")

    def _ping(self) -> None:
        if not self.closing:
            self._awaits_pong = True
            self.write(_PING)
            self._engine.wheel.after(self._engine.ping_timeout_s, self._check_pong)

    def _check_pong(self) -> None:
        if self._awaits_pong and not self.closing:
            self._cut("ping_timeout")
        else:
            self._engine.wheel.after(max(self._engine.ping_interval_s - self._engine.ping_timeout_s, 1), self._ping)

    def _cut(self, reason: str) -> None:
        metrics.connections_cut.labels(reason).inc()
        self.abort()

    # sending

    @property
    def gone(self) -> bool:
        return self.closing

    def send_frame(self, message: Frame) -> None:
        if self.closing or self._transport is None:
            return
        self._transport.write(message.wire)
        if self._slow is not None and self._transport.get_write_buffer_size() > self._engine.queue_max_bytes:
            self._cut("slow_bytes")

    def send_latest(self, key: str, message: Frame) -> None:
        if self._slow is not None:
            if key in self._latest:
                metrics.coalesced.inc()
            self._latest[key] = message
        elif not self.closing:
            self._transport.write(message.wire)  # type: ignore[union-attr]

    def pause_writing(self) -> None:
        """The client reads more slowly than we write: so we read no more of what it asks."""
        self.hold(_SLOW)
        self._slow = asyncio.get_running_loop().call_later(self._engine.slow_max_s, self._cut, "slow_age")

    def resume_writing(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None
        latest, self._latest = self._latest, {}
        for message in latest.values():
            self.send_frame(message)
        self.resume(_SLOW)

    def hang_up(self) -> None:
        WebSocket.close(self, GOING_AWAY)

    # receiving

    def on_text(self, message: str) -> None:
        self._awaits_pong = False
        kind = message[:1]
        if kind == "4":
            if not (message[1:2] == "2" and self.connection is not None and self._event(self.connection, message)):
                self._spawn(self._engine.on_packet(self, message[1:]))
        elif kind != "3":
            self.hang_up()  # 1 is goodbye; everything else is no packet of a client on a WebSocket

    def on_binary(self, message: bytes) -> None:
        self._spawn(self._engine.on_packet(self, ""))

    def _event(self, connection: Connection, message: str) -> bool:
        """Read `42<number>[name, ...]` and hand it on at once. False: it is not as simple as that."""
        start = message.find("[", 2, 2 + ACK_DIGITS_MAX + 1)
        digits = message[2:start]
        if start < 0 or (digits and not (digits.isascii() and digits.isdigit())):
            return False
        try:
            name, *args = _decode(message[start:])
        except (msgspec.MsgspecError, UnicodeError, RecursionError, ValueError):
            return False
        if not isinstance(name, str):
            return False
        self._engine.on_event(connection, name, args, int(digits) if digits else None)
        return True

    def on_close(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
        self._latest.clear()
        self._spawn(self._engine.on_gone(self, "transport close"))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # what python-socketio asks of an Engine.IO socket

    @property
    def closed(self) -> bool:
        return self.closing

    async def send(self, packet: Any) -> None:
        """Send a packet of the library's."""
        encoded = packet.encode()
        if isinstance(encoded, str):
            self.write(encode(TEXT, encoded.encode()))

    async def close(self, wait: bool = True, abort: bool = False, reason: object = None) -> None:  # type: ignore[override]
        self.hang_up()

    async def check_ping_timeout(self) -> bool:
        return not self.closing


class Polled:
    """The library's socket as a Wire: sessions that poll, and those that were upgraded from polling."""

    def __init__(self, socket: AsyncSocket, queue_max: int) -> None:
        self._socket = socket
        self._queue_max = queue_max
        self.held = False

    @property
    def gone(self) -> bool:
        return bool(self._socket.closed or self._socket.closing)

    def send_frame(self, message: Frame) -> None:
        if self.gone:
            return
        if self._socket.queue.qsize() >= self._queue_max:
            metrics.connections_cut.labels("slow_bytes").inc()
            self.hang_up()
            return
        self._socket.queue.put_nowait(message.packet)

    def send_latest(self, key: str, message: Frame) -> None:
        if self._socket.queue.qsize() < self._queue_max // 2:
            self.send_frame(message)
        else:
            metrics.coalesced.inc()

    def hold(self, why: int = 1) -> None:
        """The library reads the next packet when the last one was handled; the engine looks at `held` before."""
        self.held = True

    def resume(self, why: int = 1) -> None:
        self.held = False

    def hang_up(self) -> None:
        if self._socket.upgraded:
            self._socket.queue.put_nowait(None)
        else:
            self._socket.server.start_background_task(self._end_polling)

    async def _end_polling(self) -> None:
        """The session ends, not only a poll: when the client has taken what is queued, or does not come for it. It is
        not told CLOSE, because the official client drops what came with that in one answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_AGAIN_S):
                await self._socket.queue.join()
        await self._socket.close(wait=False, abort=True)


class Wheel:
    """Deadlines of all sessions in one timer: a second is precise enough, and a dict entry cheaper than a task."""

    def __init__(self) -> None:
        self._slots: dict[int, list[Callable[[], None]]] = {}

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        """Call `act` when at least `seconds` and at most a second more have passed."""
        slot = math.ceil(asyncio.get_running_loop().time() + seconds)
        self._slots.setdefault(slot, []).append(act)

    async def run(self) -> None:
        """Turn, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            now = math.floor(loop.time())
            for slot in [slot for slot in self._slots if slot <= now]:
                for act in self._slots.pop(slot):
                    act()
            await asyncio.sleep(math.floor(loop.time()) + 1 - loop.time())
