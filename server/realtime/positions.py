"""The positions lane: state, not history. Newest wins, an assignment that ended is silent, no event waits for one.

Redis holds the last known position of each order and decides, in one script call per position, whether a new one is
shown: that is where positions of one order that arrive at several instances meet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from server.realtime.bus import Bus, Script
from server.realtime.link import BusAway

OLDER, CLOSED = -1, -2
"""Replies of SHOW: a newer position is known; the assignment has ended. Otherwise: how many instances heard of it."""

HELD = -3
"""Reply of a position that thinning holds back, or that a newer one replaced while it waited."""

CLOSING_MS = 10_000
"""Life of a close whose transaction may still fail: longer than any transaction, short enough to heal by itself."""

GATHER_S = 0.003
"""How long positions are gathered after one has gone to Redis, so that those of many agents leave in one write."""

SHOW = Script(
    """
local number, ts = tonumber(ARGV[1]), tonumber(ARGV[2])
local closed = redis.call('GET', KEYS[2])
if closed and number <= tonumber(closed) then return -2 end
local held = redis.call('HMGET', KEYS[1], 'number', 'ts')
if held[1] and tonumber(held[1]) > number then return -2 end
if held[1] and tonumber(held[1]) == number and tonumber(held[2]) >= ts then return -1 end
redis.call('HSET', KEYS[1], 'number', ARGV[1], 'ts', ARGV[2], 'payload', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[4])
return redis.call(ARGV[7], ARGV[5], ARGV[6] .. ARGV[3])
"""
)


class Known(NamedTuple):
    """The last known position of an order. `ts` is Unix milliseconds, `payload` JSON."""

    assignment: int
    ts: float
    payload: bytes


class _Slot:
    """What thinning holds of one order: when a position was last shown, and the newest that waits for its turn."""

    __slots__ = ("due", "newest")

    def __init__(self) -> None:
        self.due: asyncio.TimerHandle | None = None
        self.newest: tuple[tuple[int, float], Callable[[], None]] | None = None
        """Its assignment and ts, and what shows it."""


class PositionLane:
    """`handlers.ports.Positions`, and the way of every position from its agent to the bus."""

    def __init__(self, bus: Bus, channel_of: Callable[[str], str], *, min_interval_s: float, keep_s: int) -> None:
        self._bus = bus
        self._channel_of = channel_of
        self._min_interval_s = min_interval_s
        self._keep_s = keep_s
        self._slots: dict[str, _Slot] = {}
        self._gathered: list[tuple[tuple[str | bytes | int | float, ...], Callable[[object], None]]] | None = None
        """What leaves next; None: nothing has left for a while, so the next one leaves at once."""

    def show(
        self, key: str, assignment: int, ts: float, payload: bytes, origin: str, answer: Callable[[object], None]
    ) -> None:
        """Show a position to the watchers of `key`, but not to the connection `origin` that it came from.

        At most one a `LOCATION_MIN_INTERVAL_MS`: the first at once, of the others the newest when its turn has come.
        `answer` gets the reply of SHOW, or BusAway; of a position that waits for its turn HELD first.
        """
        if self._min_interval_s == 0:
            self._publish(key, assignment, ts, payload, origin, answer)
            return
        slot = self._slots.setdefault(key, _Slot())
        if slot.due is None:
            self._publish(key, assignment, ts, payload, origin, answer)
            slot.due = asyncio.get_running_loop().call_later(self._min_interval_s, self._turn, key, slot)
            return
        if slot.newest is None or slot.newest[0] <= (assignment, ts):
            slot.newest = ((assignment, ts), lambda: self._publish(key, assignment, ts, payload, origin, answer))

        def held(closed: object) -> None:
            ended = isinstance(closed, bytes) and assignment <= int(closed)
            answer(CLOSED if ended else closed if isinstance(closed, Exception) else HELD)

        self._bus.send(("GET", _closed_key(key)), held)  # or whoever pushes faster than the interval never learns it

    def _turn(self, key: str, slot: _Slot) -> None:
        if slot.newest is None:
            del self._slots[key]
            return
        _, now = slot.newest
        slot.newest = None
        now()
        slot.due = asyncio.get_running_loop().call_later(self._min_interval_s, self._turn, key, slot)

    def _publish(
        self, key: str, assignment: int, ts: float, payload: bytes, origin: str, answer: Callable[[object], None]
    ) -> None:
        command = (
            "EVALSHA",
            SHOW.digest,
            2,
            _position_key(key),
            _closed_key(key),
            assignment,
            ts,
            payload,
            self._keep_s,
            self._channel_of(key),
            f"p{assignment} {ts!r} {origin} ",
            self._bus.publish_command,
        )
        if self._gathered is not None:
            self._gathered.append((command, answer))
            return
        self._bus.send(command, answer)
        self._gather()

    def _gather(self) -> None:
        self._gathered = []
        asyncio.get_running_loop().call_later(GATHER_S, self._send_gathered)

    def _send_gathered(self) -> None:
        gathered, self._gathered = self._gathered, None
        for command, answer in gathered or ():
            self._bus.send(command, answer)
        if gathered:
            self._gather()

    async def known(self, key: str) -> Known | None:
        """The last known position, or None. Raises BusAway."""
        reply = await self._bus.call("HMGET", _position_key(key), "number", "ts", "payload")
        if not isinstance(reply, list) or None in reply:
            return None
        return Known(int(reply[0]), float(reply[1]), reply[2])

    async def close(self, order_id: str, assignment: int) -> None:
        try:
            await self._bus.call("SET", _closed_key(order_id), assignment, "PX", CLOSING_MS)
        except BusAway:
            return  # while Redis is away no position is shown; afterwards every instance knows the new assignment

    def closed(self, key: str, assignment: int) -> None:
        """Let no position of this assignment or an earlier one be shown again: it has ended, and that is committed."""
        self._bus.send(("SET", _closed_key(key), assignment, "EX", self._keep_s))


def parse(message: bytes) -> tuple[int, float, str, bytes]:
    """(assignment, ts, origin, payload) of a message that SHOW published, without its leading `p`."""
    assignment, ts, origin, payload = message.split(b" ", 3)
    return int(assignment), float(ts), origin.decode(), payload


def _position_key(key: str) -> str:
    return f"waybill:{{{key}}}:position"


def _closed_key(key: str) -> str:
    return f"waybill:{{{key}}}:closed"
