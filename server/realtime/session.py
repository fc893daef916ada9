"""Engine.IO sessions: one class, whether its client is on a WebSocket, polls, or moves from the one to the other.

A session is what python-socketio expects of an Engine.IO socket, so its rooms, acknowledgements and calls work with it.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
from aiohttp import web

from server import metrics
from server.realtime.backlog import Wheel
from server.realtime.connections import Connection, Frame
from server.realtime.polling import Polling
from server.realtime.quota import Quota
from server.realtime.websocket import BINARY, GOING_AWAY, NORMAL, PING, TEXT, WebSocket, encode

ACK_DIGITS_MAX = 15
"""Longest acknowledgement number: what a JavaScript number counts exactly."""

_decode = msgspec.json.Decoder(list[Any]).decode
_PING = encode(TEXT, b"2")

READ_AGAIN_S = 0.05
"""Least time for which a session that sends too fast is read no further: a wake for each frame would cost more."""

_SLOW, _TOO_FAST = 2, 8
"""Why a session is held, besides the 1 of its unanswered calls and the 4 of the engine."""

_MARK_DIGITS_MAX = 19
"""Longest number that comes back from a mark of ours."""

_marks = itertools.count(1)


class Handler(Protocol):
    """What sessions need of the server that they belong to."""

    wheel: Wheel
    ping_interval_s: float
    ping_timeout_s: float
    upgrade_timeout_s: float
    frame_max_bytes: int
    slow_bytes: int
    queue_max_bytes: int
    slow_max_s: float
    new_quota: Callable[[], Quota | None]
    """What a new session may send: frames of every kind, or packets of a payload. None: as much as it likes."""
    on_event: Callable[[Connection, str, list[Any], int | None], None]
    """An event of a client that is connected to the default namespace."""
    on_packet: Callable[[Session, str | bytes], None]
    """A Socket.IO packet that is anything else, or an attachment."""

    def count_websocket(self, difference: int) -> None:
        """A WebSocket was opened or has ended."""

    def end(self, session: Session) -> None:
        """A session has ended. May be told more than once."""


class Session(WebSocket):
    """An Engine.IO session, on a WebSocket from the start (`open`) or polling (`open_polling`) until it is upgraded.

    A slow reader is first coalesced: while more than `slow_bytes` wait for it, only the newest position of each order
    is kept. It is cut when `queue_max_bytes` wait, or when it has been slow for `slow_max_s`: its transport is aborted,
    so that all memory is free at once, and the client comes back and recovers.
    """

    __slots__ = (
        "_handler",
        "_latest",
        "_pong_due",
        "_quota",
        "_received",
        "_slow",
        "_user_session",
        "caller",
        "connect_by",
        "connection",
        "opening",
        "sid",
    )

    def __init__(self, handler: Handler, sid: str, caller: str) -> None:
        super().__init__(handler.frame_max_bytes)
        self._handler = handler
        self.sid = sid
        self.caller = caller
        """Whom the limits of strangers count."""
        self.connection: Connection | None = None
        """The Socket.IO session on the default namespace."""
        self.opening: object | None = None
        """Stands for the one that is being opened."""
        self.connect_by = 0.0
        """The deadline for a CONNECT, by the loop's time; 0: nobody looks after it."""
        self._user_session: dict[str, Any] | None = None
        self._quota = handler.new_quota()
        self._pong_due = 0.0
        """When a sign of life must have come, by the loop's time; 0: none is awaited."""
        self._slow: asyncio.TimerHandle | None = None
        self._latest: dict[str, Frame] | None = None
        self._received: dict[int, Callable[[], None]] | None = None

    def open(self, request: web.BaseRequest, greeting: bytes) -> None:
        """Take the connection over and greet. Raises ConnectionResetError: the client has gone."""
        self.take_over(request)
        assert self._transport is not None
        self._transport.set_write_buffer_limits(high=self._handler.slow_bytes)
        self._handler.count_websocket(1)
        self.write(encode(TEXT, greeting))
        self._handler.wheel.after(self._handler.ping_interval_s, self._ping)

    def open_polling(self) -> None:
        """Wait for requests; whoever asked for the session is greeted in the answer."""
        self._transport = Polling(self, self._handler.slow_bytes)
        self._handler.wheel.after(self._handler.ping_interval_s, self._ping)

    @property
    def polling(self) -> Polling | None:
        """The transport, unless it is a WebSocket or has ended."""
        transport = self._transport
        return transport if isinstance(transport, Polling) and not transport.ended else None

    def upgrade(self, transport: asyncio.Transport, rest: bytes) -> None:
        """Go on over this transport: what no poll has taken yet goes first. `rest` was read from it already."""
        polling = self.polling
        assert polling is not None
        self._transport = transport
        if queued := polling.leave():
            transport.write(queued)
        self._rewire()
        transport.set_protocol(self)
        if transport.get_write_buffer_size() > self._handler.slow_bytes:
            if self._slow is None:
                self.pause_writing()
        elif self._slow is not None:
            self.resume_writing()
        if self._held:
            transport.pause_reading()
        self.data_received(rest)

    # liveness

    def _ping(self) -> None:
        if not self.closing:
            self._pong_due = self._handler.wheel.now() + self._handler.ping_timeout_s
            self.write(_PING)
            self._handler.wheel.after(self._handler.ping_timeout_s, self._check_pong)

    def check_alive(self) -> None:
        """Cut a client that owes a sign of life, even if the wheel has not come round to it."""
        if self._pong_due and not self.closing and asyncio.get_running_loop().time() >= self._pong_due:
            self.cut("ping_timeout")

    def _check_pong(self) -> None:
        if self._pong_due and not self.closing:
            self.cut("ping_timeout")
        else:
            pause_s = self._handler.ping_interval_s - self._handler.ping_timeout_s
            self._handler.wheel.after(max(pause_s, 0), self._ping)

    def cut(self, reason: str) -> None:
        """End the transport at once, and count why."""
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
        if self._slow is not None and self._transport.get_write_buffer_size() > self._handler.queue_max_bytes:
            self.cut("slow_bytes")

    def send_latest(self, key: str, message: Frame) -> None:
        if self._latest is not None:
            if key in self._latest:
                metrics.coalesced.inc()
            self._latest[key] = message
        elif not self.closing:
            self._transport.write(message.wire)  # type: ignore[union-attr]

    @property
    def direct(self) -> Callable[[bytes], object] | None:
        """What `send_latest` comes down to while the client keeps up: its transport's own write."""
        if self.closing or self._latest is not None or self._transport is None:
            return None
        return self._transport.write

    def _rewire(self) -> None:
        if self.connection is not None:
            self.connection.rewire()

    def _stop(self) -> None:
        super()._stop()
        self._rewire()

    def when_received(self, callback: Callable[[], None]) -> None:
        """A PING of the WebSocket follows what was sent; its PONG is the proof, or while polling the GET after the one
        that took it."""
        if self.closing:
            return
        if self._received is None:
            self._received = {}
        mark = next(_marks)
        self._received[mark] = callback
        self.write(encode(PING, b"%d" % mark))

    def on_pong(self, payload: bytes) -> None:
        if self._received is None or not payload.isdigit() or len(payload) > _MARK_DIGITS_MAX:
            return
        mark = int(payload)
        proven = [each for each in self._received if each <= mark]
        callbacks = [self._received.pop(each) for each in proven]
        if not self._received:
            self._received = None
        for callback in callbacks:
            callback()

    def pause_writing(self) -> None:
        """The client reads more slowly than we write: so we read no more of what it asks."""
        self._latest = {}
        self._rewire()
        self._slow = asyncio.get_running_loop().call_later(self._handler.slow_max_s, self.cut, "slow_age")
        self.hold(_SLOW)

    def resume_writing(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None
        latest, self._latest = self._latest, None
        for message in (latest or {}).values():
            self.send_frame(message)
        self._rewire()
        self.resume(_SLOW)

    def hang_up(self) -> None:
        WebSocket.close(self, GOING_AWAY)

    # receiving

    def on_frame(self) -> None:
        """Whatever it holds, it counts: who floods us is read no further for a while, and refused nothing."""
        quota = self._quota
        if quota is None:
            return
        now = time.monotonic()
        quota.take(now)
        wait_s = quota.wait_s(now)
        if wait_s:
            metrics.rate_limited.labels("socket").inc()
            self.hold(_TOO_FAST)
            asyncio.get_running_loop().call_later(max(wait_s, READ_AGAIN_S), self.resume, _TOO_FAST)

    def on_text(self, message: str) -> None:
        self._pong_due = 0.0
        kind = message[:1]
        if kind == "4":
            if not (message[1:2] == "2" and self.connection is not None and self._event(self.connection, message)):
                self._handler.on_packet(self, message[1:])
        elif kind == "1" and self.polling is not None:
            self.abort()  # there is nobody to say goodbye to: the client takes its word as the end
        elif kind != "3":
            self.hang_up()  # 1 is goodbye; everything else is no packet of a client

    def on_binary(self, message: bytes) -> None:
        self._pong_due = 0.0
        self._handler.on_packet(self, message)

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
        self._handler.on_event(connection, name, args, int(digits) if digits else None)
        return True

    # the end

    def eof_received(self) -> bool:
        """The client has closed its side. Thousands may do so at once: the transport is closed when its turn comes."""
        self._stop()
        self._handler.end(self)
        return True

    def connection_lost(self, error: Exception | None) -> None:
        if not isinstance(self._transport, Polling):
            self._handler.count_websocket(-1)
        super().connection_lost(error)

    def on_close(self) -> None:
        self._handler.end(self)

    def forget(self) -> None:
        """Let go of what only a living session needs."""
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None
        self._latest = self._received = None

    # what python-socketio asks of an Engine.IO socket

    @property
    def closed(self) -> bool:
        return self.closing

    @property
    def upgraded(self) -> bool:
        return not isinstance(self._transport, Polling)

    @property
    def session(self) -> dict[str, Any]:
        """Kept for AsyncServer.save_session."""
        if self._user_session is None:
            self._user_session = {}
        return self._user_session

    @session.setter
    def session(self, value: dict[str, Any]) -> None:
        self._user_session = value

    async def send(self, packet: Any) -> None:
        """Send a packet of the library's."""
        encoded = packet.encode()
        self.write(encode(TEXT, encoded.encode()) if isinstance(encoded, str) else encode(BINARY, encoded))


class Probe(WebSocket):
    """A WebSocket that a polling session may change to: `2probe`, `3probe`, and `5` hands the transport over."""

    __slots__ = ("_handing_over", "_handler", "_session")

    def __init__(self, handler: Handler, session: Session) -> None:
        super().__init__(handler.frame_max_bytes)
        self._handler = handler
        self._session = session
        self._handing_over = False

    def open(self, request: web.BaseRequest) -> None:
        """Take the connection over. One that has nothing to change is closed: its session has a WebSocket, or is about
        to. Raises ConnectionResetError: the client has gone."""
        self.take_over(request)
        assert self._transport is not None
        self._transport.set_write_buffer_limits(high=self._handler.slow_bytes)
        self._handler.count_websocket(1)
        polling = self._session.polling
        if polling is None or polling.probe is not None or self._session.closing:
            self.close(NORMAL)
            return
        polling.probe = self
        self._handler.wheel.after(self._handler.upgrade_timeout_s, self._check_done)

    def _check_done(self) -> None:
        if self._transport is not None:
            metrics.connections_cut.labels("upgrade").inc()
            self.abort()

    def on_text(self, message: str) -> None:
        polling = self._session.polling
        if polling is None or polling.probe is not self:
            self.close(NORMAL)
        elif message == "2probe" and not polling.yields:
            self.write(encode(TEXT, b"3probe"))
            polling.yield_to_probe()
        elif message == "5" and polling.yields and not self._session.closing:
            self._handing_over = True
            self._held = 1  # what follows is for the session
        else:
            self._give_up()

    def on_binary(self, message: bytes) -> None:
        self._give_up()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._handing_over and self._transport is not None:
            transport, self._transport = self._transport, None
            self._session.upgrade(transport, self._buffer)

    def _give_up(self) -> None:
        self._forget()
        self.close(NORMAL)

    def _forget(self) -> None:
        polling = self._session.polling
        if polling is not None and polling.probe is self:
            polling.forget_probe()

    def on_close(self) -> None:
        self._forget()
        self._handler.count_websocket(-1)
