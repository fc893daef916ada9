"""Connection state recovery: the JavaScript client's own protocol, for sockets that opt in with `recovery: true`.

Such a socket gets a `pid`, and each of its durable events carries a last argument that the client keeps: its offset. A
client that comes back shows both. The offset says, for each room, the last number that the client had; Redis says, for
each room of the `pid`, the number at which it joined. The higher of the two is where it goes on. So an offset holds
only what is above the numbers in Redis, and stays valid under any later `pid`.

Recovered is a promise: the client will not ask again. So what cannot be proven is not recovered. A room is *open* in
Redis before the answer to its subscribe is sent, and gets its number when the client has proven that it has received
that answer; a session with an open room is lost. docs/decisions/0018-connection-state-recovery.md.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping

from server import metrics
from server.realtime.bus import Bus
from server.realtime.connections import Connection, Frame
from server.realtime.link import BusAway

SHORTENED_FROM = 3
"""From this part of its bound on, an offset is shortened: what its client has proven to have goes to Redis."""

SEQ_DIGITS_MAX = 10

_PID = re.compile(r"[A-Za-z0-9_-]{24}")
_WHO = b"who"
_OPEN = b"?"


class Unsaved(Exception):
    """Redis could not be told what the client is about to be told."""


class Lost(Exception):
    """The session cannot be recovered; the message is the reason, as the metric names it."""


class Recoverable:
    """What is kept of one connection that may be recovered."""

    __slots__ = ("_above", "_connection", "_joins", "_opened", "_sessions", "_shortening", "pid")

    def __init__(self, sessions: Sessions, connection: Connection, pid: str) -> None:
        self.pid = pid
        self._sessions = sessions
        self._connection = connection
        self._above: dict[str, int] = {}
        """For each room the last number given, if it is above the one in Redis."""
        self._opened: dict[str, int] = {}
        """Rooms whose number in Redis is open, and which of all joins opened it."""
        self._joins = 0
        self._shortening: dict[str, int] | None = None
        """Numbers that are on their way from the offset to Redis."""

    def stamp(self, key: str, seq: int, message: Frame) -> Frame:
        """The message with the offset that its client has once it has it. A client that proves too slowly what it has
        is sent away before its offset becomes too long to come back with."""
        self._above[key] = seq
        offset = ",".join([f"{room}:{mark}" for room, mark in self._above.items()])
        most = self._sessions.offset_max_bytes
        if len(offset) > most:
            metrics.connections_cut.labels("recovery_offset").inc()
            self._connection.hang_up()
        elif len(offset) > most // SHORTENED_FROM and self._shortening is None:
            self._shorten()
        return Frame(f'{message.text[:-1]},"{offset}"]')

    async def joining(self, key: str) -> None:
        """Before a subscribe is answered. Raises Unsaved."""
        self._set_aside(key)
        self._joins += 1
        self._opened[key] = self._joins
        await self._sessions.save(self.pid, key, _OPEN)

    def joined(self, key: str, seq: int) -> None:
        """The answer, which ends at `seq`, is on the wire."""
        self._set_aside(key)
        join = self._opened.get(key)

        def received() -> None:
            if self._opened.get(key) == join:  # else it was left, or asked for again
                del self._opened[key]
                self._sessions.note(self.pid, {key: seq})

        self._connection.wire.when_received(received)

    async def leaving(self, key: str) -> None:
        """Before an unsubscribe is answered. Raises Unsaved."""
        self._set_aside(key)
        self._opened.pop(key, None)
        await self._sessions.save(self.pid, key, None)

    def left(self, key: str) -> None:
        """The server has ended a subscription, or refused one."""
        self._set_aside(key)
        self._opened.pop(key, None)
        self._sessions.forget(self.pid, key)

    def _set_aside(self, key: str) -> None:
        """What the offset says of this room counts no more: Redis will know better."""
        self._above.pop(key, None)
        if self._shortening is not None:
            self._shortening.pop(key, None)

    def _shorten(self) -> None:
        moving = self._shortening = dict(self._above)

        def noted(reply: object) -> None:
            self._shortening = None
            for key, seq in moving.items():
                if isinstance(reply, int) and self._above.get(key) == seq:
                    del self._above[key]

        self._connection.wire.when_received(
            lambda: self._sessions.note(self.pid, moving, noted) if moving else noted(None)
        )


class Sessions:
    """The sessions of all instances, in Redis: a hash for each `pid`, with who it is and the number of each room."""

    def __init__(self, bus: Bus, *, keep_s: int, offset_max_bytes: int) -> None:
        self._bus = bus
        self.keep_s = keep_s
        self.offset_max_bytes = offset_max_bytes
        """The client sends its offset back in one frame with its token."""

    def begin(self, connection: Connection, who: str) -> Recoverable | None:
        """A session for a new connection; None while Redis is away: then the client gets no `pid`."""
        if not self._bus.up:
            return None
        pid = secrets.token_urlsafe(18)
        self._bus.send(("HSET", _name(pid), _WHO, who))
        return Recoverable(self, connection, pid)

    async def find(self, pid: str, offset: object, who: str) -> dict[str, int]:
        """For each room of a session that a client comes back to: the last number that the client has. Raises Lost."""
        if not _PID.fullmatch(pid):
            raise Lost("unknown")
        try:
            reply = await self._bus.call("HGETALL", _name(pid))
            fields = dict(zip(reply[::2], reply[1::2], strict=True)) if isinstance(reply, list) else {}
            if fields.pop(_WHO, None) != who.encode():
                raise Lost("unknown")
            if _OPEN in fields.values():
                raise Lost("unproven")
            marks = {key.decode(): int(seq) for key, seq in fields.items()}
            above = {key: seq for key, seq in self._read(offset).items() if seq > marks.get(key, seq)}
            if above:
                marks.update(above)
                await self._bus.call("HSET", _name(pid), *[part for pair in above.items() for part in pair])
        except BusAway:
            raise Lost("unavailable") from None
        return marks

    def keep(self, pid: str) -> None:
        """Keep the session for `keep_s` more seconds."""
        self._bus.send(("EXPIRE", _name(pid), self.keep_s))

    async def save(self, pid: str, key: str, value: bytes | None) -> None:
        """Write, or with None delete, a room's number, and wait until Redis has it. Raises Unsaved."""
        try:
            if value is None:
                await self._bus.call("HDEL", _name(pid), key)
            else:
                await self._bus.call("HSET", _name(pid), key, value)
        except BusAway:
            raise Unsaved from None
        self.keep(pid)

    def note(self, pid: str, numbers: Mapping[str, int], answer: Callable[[object], None] | None = None) -> None:
        """Write numbers of rooms without waiting."""
        self._bus.send(("HSET", _name(pid), *[part for pair in numbers.items() for part in pair]), answer)

    def forget(self, pid: str, key: str) -> None:
        """Delete a room's number without waiting."""
        self._bus.send(("HDEL", _name(pid), key))

    def _read(self, offset: object) -> dict[str, int]:
        """What a client says that it has; nonsense says nothing."""
        if not isinstance(offset, str) or len(offset) > self.offset_max_bytes:
            return {}
        found: dict[str, int] = {}
        for part in offset.split(","):
            key, _, digits = part.rpartition(":")
            if len(digits) <= SEQ_DIGITS_MAX and digits.isascii() and digits.isdigit():
                found[key] = int(digits)
        return found


def _name(pid: str) -> str:
    return f"waybill:session:{pid}"
