"""How many sockets watch each order, on all instances together.

Each instance keeps its own counts in Redis, written in batches off the hot path and only where one has changed; and one
key that says that it lives. A count is believed as long as that key is there, so the counts of an instance that was
killed are gone within `PRESENCE_ALIVE_S`, without anybody cleaning up.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable

from models.errors import Unavailable
from server.realtime.bus import Bus
from server.realtime.link import BusAway

BATCH_MAX = 250
"""Most counts that are written before others get a turn."""

KEEP_S = 24 * 3600
"""How long Redis keeps the counts of an order that nobody writes any more."""

REWRITE_S = 3600
"""How often all counts are written again, long before they would be dropped."""

_UNKNOWN = -1


class Presence:
    """One instance's side of the counts. `count(key)` is how many watch the order here; `watched()` names all orders
    that somebody watches here."""

    def __init__(
        self,
        bus: Bus,
        *,
        flush_s: float,
        alive_s: float,
        count: Callable[[str], int],
        watched: Callable[[], Iterable[str]],
    ) -> None:
        self._bus = bus
        self._flush_s = flush_s
        self._alive_s = alive_s
        self._count = count
        self._watched = watched
        self._id = secrets.token_hex(8)
        self._alive_until = 0.0
        self._changed: set[str] = set()
        self._written: dict[str, int] = {}
        """What Redis has of us, where it is not 0."""

    def changed(self, key: str) -> None:
        """Somebody came to the order or left it."""
        if self._bus.up:
            self._changed.add(key)

    def bus_changed(self) -> None:
        """What Redis has of us is not known: it may have restarted empty, or not have heard us."""
        self._changed.clear()
        self._alive_until = 0.0
        if self._bus.up:
            self._rewrite()

    async def run(self) -> None:
        """Write what has changed, until cancelled."""
        loop = asyncio.get_running_loop()
        rewritten_at = loop.time()
        while True:
            await asyncio.sleep(self._flush_s)
            now = loop.time()
            if now >= rewritten_at + REWRITE_S:
                rewritten_at = now
                self._rewrite()
            if now >= self._alive_until - self._alive_s * 2 / 3:
                self._bus.send(("SET", _alive_key(self._id), 1, "PX", int(self._alive_s * 1000)))
                self._alive_until = now + self._alive_s
            await self._flush()

    def close(self) -> None:
        """This instance ends: its counts are believed no more."""
        self._bus.send(("DEL", _alive_key(self._id)))

    async def watchers(self, key: str) -> int:
        """How many sockets watch this order, on all instances.

        Raises:
            Unavailable: Redis is away.
        """
        try:
            reply = await self._bus.call("HGETALL", _watchers_key(key))
            assert isinstance(reply, list)
            counts = {instance.decode(): int(count) for instance, count in zip(reply[::2], reply[1::2], strict=True)}
            counts.pop(self._id, None)
            alive = await asyncio.gather(*(self._bus.call("EXISTS", _alive_key(instance)) for instance in counts))
        except BusAway:
            raise Unavailable("Nobody knows how many watch while Redis is away.") from None
        return self._count(key) + sum(count for count, is_alive in zip(counts.values(), alive, strict=True) if is_alive)

    def _rewrite(self) -> None:
        self._written = dict.fromkeys((*self._written, *self._watched()), _UNKNOWN)
        self._changed.update(self._written)

    async def _flush(self) -> None:
        while self._changed and self._bus.up:
            for _ in range(min(len(self._changed), BATCH_MAX)):
                self._write(self._changed.pop())
            await asyncio.sleep(0)

    def _write(self, key: str) -> None:
        count = self._count(key)
        if count == self._written.get(key, 0):
            return

        def answer(reply: object) -> None:
            if isinstance(reply, Exception):
                self._written[key] = _UNKNOWN
                self.changed(key)

        if count:
            self._written[key] = count
            self._bus.send(("HSET", _watchers_key(key), self._id, count), answer)
            self._bus.send(("EXPIRE", _watchers_key(key), KEEP_S))
        else:
            del self._written[key]
            self._bus.send(("HDEL", _watchers_key(key), self._id), answer)


def _watchers_key(key: str) -> str:
    return f"waybill:{{{key}}}:watchers"


def _alive_key(instance: str) -> str:
    return f"waybill:instance:{instance}"
