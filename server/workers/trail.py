"""The trail: where agents were, written in batches, later, and forgotten when it is old.

One position of each `LOCATION_TRAIL_INTERVAL_MS` is kept, whoever sends it first. The trail is history: under pressure
it is thinned from its oldest end, never the other way round, and nothing waits for it.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections import OrderedDict

import structlog

from handlers.orders import order_uuid
from models.errors import Unavailable
from models.position import Position
from server import metrics
from server.db import Database

log = structlog.get_logger()

SWEEP_INTERVAL_S = 600
"""How often positions that are too old are looked for."""

SWEEP_ROWS_MAX = 5000
"""Most rows that one statement deletes."""

STORE = """
insert into positions (order_id, assignment, slot, ts, lat, lng, accuracy, heading, speed)
select * from unnest($1::uuid[], $2::integer[], $3::bigint[], $4::double precision[], $5::double precision[],
    $6::double precision[], $7::double precision[], $8::double precision[], $9::double precision[])
on conflict do nothing"""

FORGET = """
delete from positions where ctid = any (array(
    select ctid from positions where recorded_at < $1 order by recorded_at limit $2))
returning 1"""


class Trail:
    """Positions on their way to the table."""

    def __init__(self, database: Database, *, interval_ms: int, flush_ms: int, buffer_max: int, keep_s: int) -> None:
        self._database = database
        self._interval_ms = interval_ms
        self._flush_s = flush_ms / 1000
        self._buffer_max = buffer_max
        self._keep_s = keep_s
        self._waiting: OrderedDict[tuple[str, int, int], Position] = OrderedDict()

    def add(self, order_id: str, assignment: int, position: Position) -> None:
        """Keep this position, unless there is one of its interval already."""
        slot = (order_id, assignment, int(position.ts // self._interval_ms))
        if slot in self._waiting:
            return
        self._waiting[slot] = position
        if len(self._waiting) > self._buffer_max:
            self._waiting.popitem(last=False)
            metrics.trail_dropped.inc()

    async def run(self) -> None:
        """Write what waits, every `LOCATION_TRAIL_FLUSH_MS`, until cancelled."""
        while True:
            await asyncio.sleep(self._flush_s)
            await self.flush()

    async def flush(self) -> None:
        """Write what waits. While Postgres is away it goes on waiting, within its bound."""
        waiting, self._waiting = self._waiting, OrderedDict()
        if not waiting:
            return
        rows = [
            (order_uuid(order_id), number, slot, p.ts, p.lat, p.lng, p.accuracy, p.heading, p.speed)
            for (order_id, number, slot), p in waiting.items()
        ]
        try:
            async with self._database.statement() as tx:
                await tx.one(STORE, *(list(column) for column in zip(*rows, strict=True)))
        except Unavailable:
            for key, position in self._waiting.items():  # what came meanwhile is newer
                waiting.setdefault(key, position)
            while len(waiting) > self._buffer_max:
                waiting.popitem(last=False)
                metrics.trail_dropped.inc()
            self._waiting = waiting
            return
        metrics.trail_stored.inc(len(rows))

    async def sweep(self) -> None:
        """Delete positions that are older than `LOCATION_TRAIL_KEEP_S`, a batch at a time, until cancelled."""
        while True:
            deleted = 0
            try:
                async with self._database.statement() as tx:
                    oldest = tx.now() - dt.timedelta(seconds=self._keep_s)
                    deleted = len(await tx.all(FORGET, oldest, SWEEP_ROWS_MAX))
            except Unavailable:
                log.warning("trail_not_swept")
            if deleted < SWEEP_ROWS_MAX:
                await asyncio.sleep(SWEEP_INTERVAL_S)
