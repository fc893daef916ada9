"""The relay: publishes the events that the fast path missed, because its instance died or Redis was away.

It takes unsent rows older than `RELAY_GRACE_MS`, never "numbers above the last one seen": numbers are taken before the
commit, so a late commit would be skipped for good. Any number of relays may run; `skip locked` keeps them apart.
"""

from __future__ import annotations

import asyncio

import structlog

from handlers.context import Told
from models.errors import Unavailable
from models.event import Event, event
from server import metrics
from server.db import Database
from server.outbox import Outbox
from server.realtime.bus import Bus
from server.realtime.link import BusAway

log = structlog.get_logger()

UNSENT = """
select order_id, seq, type, at, body from order_events
where not sent and recorded_at < now() - $1::integer * interval '1 millisecond'
order by recorded_at, order_id, seq limit $2 for update skip locked"""

BACKLOG = """
select count(*) as unsent, coalesce(extract(epoch from now() - min(recorded_at)), 0)::float8 as oldest
from (select recorded_at from order_events where not sent order by recorded_at limit $1) as unsent"""

BACKLOG_INTERVAL_S = 2.0
"""How often the unsent events are counted."""

BACKLOG_COUNT_MAX = 100_000
"""No more are counted: what is beyond is no better news."""


class Relay:
    def __init__(self, database: Database, bus: Bus, outbox: Outbox, *, grace_ms: int, batch_max: int) -> None:
        self._database = database
        self._bus = bus
        self._outbox = outbox
        self._grace_ms = grace_ms
        self._batch_max = batch_max

    async def run(self) -> None:
        """Look every `RELAY_GRACE_MS`, and at once again while there is more, until cancelled."""
        while True:
            found = 0
            try:
                if self._bus.up:
                    found = await self.look()
            except (Unavailable, BusAway):
                pass  # the rows wait for us
            except Exception:
                log.exception("relay_failed")
            if found < self._batch_max:
                await asyncio.sleep(self._grace_ms / 1000)

    async def watch_backlog(self) -> None:
        """Count what is unsent, also while the bus is away and in processes that relay nothing, until cancelled."""
        while True:
            try:
                async with self._database.statement() as tx:
                    row = await tx.one(BACKLOG, BACKLOG_COUNT_MAX)
                assert row is not None
                metrics.events_unsent.set(row["unsent"])
                metrics.oldest_unsent.set(row["oldest"])
            except Unavailable:
                pass  # the last count stays: what is unsent is not sent meanwhile
            await asyncio.sleep(BACKLOG_INTERVAL_S)

    async def look(self) -> int:
        """Publish one batch of unsent events; returns how many there were."""
        async with self._database.transaction() as tx:
            rows = await tx.all(UNSENT, self._grace_ms, self._batch_max)
        by_order: dict[str, list[Event]] = {}
        for order_id, seq, type_, at, body in rows:
            by_order.setdefault(str(order_id), []).append(event(str(order_id), seq, type_, at, body))
        if not rows:
            return 0
        self._outbox.publish((Told(order_id, events) for order_id, events in by_order.items()), by="relay")
        await self._bus.answered()
        await self._outbox.flush()
        log.info("relayed", events=len(rows), orders=len(by_order))
        return len(rows)
