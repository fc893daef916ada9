"""The trail: one position of each interval, bounded while Postgres is away, forgotten when old."""

from __future__ import annotations

import datetime as dt
import uuid

import pytest

from models.errors import Unavailable
from models.position import Position
from server import metrics
from server.db import Database
from server.workers.trail import FORGET, Trail

ORDER = str(uuid.uuid4())


def trail(database: Database, **changes: int) -> Trail:
    limits = {"interval_ms": 1000, "flush_ms": 1000, "buffer_max": 10, "keep_s": 60} | changes
    return Trail(database, **limits)


async def stored(database: Database) -> list[float]:
    async with database.statement() as tx:
        return [row["ts"] for row in await tx.all("select ts from positions order by ts")]


async def test_one_position_of_each_interval_is_kept(database: Database) -> None:
    kept = trail(database)
    for ts in (1000, 1999, 2000, 1500, 3100):
        kept.add(ORDER, 2, Position(lat=1, lng=2, ts=ts))
    await kept.flush()
    kept.add(ORDER, 2, Position(lat=1, lng=2, ts=2900))
    await kept.flush()
    assert await stored(database) == [1000, 2000, 3100]


async def test_while_postgres_is_away_the_newest_wait(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = trail(database, buffer_max=3)
    dropped = metrics.trail_dropped._value.get()

    async def away() -> object:
        raise Unavailable("away")

    with monkeypatch.context() as fault:
        fault.setattr(database, "acquire", away)
        for ts in range(1000, 6000, 1000):
            kept.add(ORDER, 2, Position(lat=1, lng=2, ts=ts))
            await kept.flush()
    assert metrics.trail_dropped._value.get() - dropped == 2
    await kept.flush()
    assert await stored(database) == [3000, 4000, 5000]


async def test_what_is_old_is_forgotten(database: Database) -> None:
    kept = trail(database)
    for ts in (1000, 2000, 3000):
        kept.add(ORDER, 2, Position(lat=1, lng=2, ts=ts))
    await kept.flush()
    async with database.statement() as tx:
        await tx.one("update positions set recorded_at = now() - interval '1 hour' where ts < 3000")
    async with database.statement() as tx:
        assert len(await tx.all(FORGET, tx.now() - dt.timedelta(seconds=60), 1)) == 1
        assert len(await tx.all(FORGET, tx.now() - dt.timedelta(seconds=60), 10)) == 1
    assert await stored(database) == [3000]
