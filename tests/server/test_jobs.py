"""Background jobs: asked for with a change, run once each, again after a failure, and by others when a worker dies."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import sys
import zoneinfo
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from handlers.jobs import GiveUp, NotYet, enqueue
from server.app import utc_now
from server.db import Database
from server.migrate import migrate
from server.settings import Settings
from server.workers.jobs import TAKEOVERS_MAX, Job, Jobs, Schedule, backoff_s, daily, every
from tests.harness import ROOT, SOON_S, until
from tests.server.test_db import PrivatePostgres, bounced_url, bouncer, opened, private

__all__ = ["bounced_url", "bouncer", "private"]  # fixtures

NEVER_MS = 3_600_000
"""A poll that no test waits for."""


def settings(**changes: Any) -> Settings:
    return Settings(**{"job_poll_ms": 50, "job_retry_base_s": 1, "job_retry_max_s": 1, "job_takeover_s": 2} | changes)


class Work:
    """A kind of job that writes down what it was given, and then does what it is told to."""

    def __init__(self, then: Callable[[str], Awaitable[None]] | None = None) -> None:
        self.ran: list[str] = []
        self._then = then

    async def __call__(self, subject: str) -> None:
        self.ran.append(subject)
        if self._then is not None:
            await self._then(subject)


@asynccontextmanager
async def working(
    database: Database, jobs: Sequence[Job], schedules: Sequence[Schedule] = (), **changes: Any
) -> AsyncIterator[Jobs]:
    worker = Jobs(database, settings(**changes), jobs, schedules)
    running = asyncio.create_task(worker.run())
    try:
        yield worker
        worker.close()
        async with asyncio.timeout(SOON_S):
            await running
    finally:
        worker.abandon()
        await asyncio.gather(running, return_exceptions=True)


async def ask(database: Database, name: str, *subjects: str, after_s: float = 0) -> None:
    for subject in subjects:
        async with database.transaction() as tx:
            await enqueue(tx, name, subject, after_s=after_s)


ROWS = """
select entrypoint, convert_from(payload, 'utf8') as subject, status::text, attempts, execute_after, created,
    starts, error, held
from jobs.pgqueuer as job left join jobs.notes on job_id = job.id order by job.id"""


async def rows(database: Database) -> list[dict[str, Any]]:
    async with database.statement() as tx:
        return [dict(row) for row in await tx.all(ROWS)]


async def empty(database: Database) -> bool:
    return not await rows(database)


# asking


async def test_a_job_begins_at_once_when_its_change_is_committed(database: Database) -> None:
    work = Work()
    async with working(database, [Job("work", work)], job_poll_ms=NEVER_MS):
        await ask(database, "work", "first")
        await until(lambda: work.ran == ["first"], "the worker has come up")
        await until(lambda: empty(database), "it is done")
        loop = asyncio.get_running_loop()
        began = loop.time()
        await ask(database, "work", "second")
        await until(lambda: work.ran == ["first", "second"], "nobody polls, so it was news")
        assert loop.time() - began < 1


async def test_a_change_that_is_rolled_back_has_asked_for_nothing(database: Database) -> None:
    work = Work()
    with contextlib.suppress(ZeroDivisionError):
        async with database.transaction() as tx:
            await enqueue(tx, "work", "gone")
            raise ZeroDivisionError
    async with working(database, [Job("work", work)]):
        await ask(database, "work", "kept")
        await until(lambda: empty(database), "all is done")
    assert work.ran == ["kept"]


async def test_the_same_job_twice_is_one_and_runs_at_the_earlier_time(database: Database) -> None:
    work = Work()
    await ask(database, "work", "a", after_s=3600)
    await ask(database, "work", "a", "b")
    await ask(database, "work", "b", after_s=3600)
    assert [row["subject"] for row in await rows(database)] == ["a", "b"]
    async with working(database, [Job("work", work)]):
        await until(lambda: empty(database), "both are done")
    assert sorted(work.ran) == ["a", "b"]


async def test_a_job_that_is_asked_for_while_it_runs_runs_again(database: Database) -> None:
    go_on = asyncio.Event()

    async def wait(subject: str) -> None:
        await go_on.wait()

    work = Work(wait)
    async with working(database, [Job("work", work)]):
        await ask(database, "work", "a")
        await until(lambda: len(work.ran) == 1, "it runs")
        await ask(database, "work", "a")
        go_on.set()
        await until(lambda: empty(database), "both are done")
    assert work.ran == ["a", "a"]


async def test_a_job_that_fails_makes_way_for_the_same_one_asked_for_meanwhile(database: Database) -> None:
    go_on = asyncio.Event()

    async def fail_once(subject: str) -> None:
        await go_on.wait()
        if len(work.ran) == 1:
            raise OSError

    work = Work(fail_once)
    async with working(database, [Job("work", work)], job_retry_base_s=600, job_retry_max_s=600):
        await ask(database, "work", "a")
        await until(lambda: len(work.ran) == 1, "it runs")
        await ask(database, "work", "a", after_s=0.3)
        go_on.set()
        await until(lambda: empty(database), "the second one is done, and nothing waits for ten minutes")
    assert work.ran == ["a", "a"]


async def test_a_job_that_waits_is_not_begun_before_the_change_that_asked_for_it_again_is_seen(
    database: Database,
) -> None:
    seen: list[Any] = []

    async def read(subject: str) -> None:
        async with database.statement() as tx:
            row = await tx.one("select due from jobs.schedules where name = 'the change'")
            seen.append(row and row["due"])

    marker = Work()
    await ask(database, "work", "a")
    async with database.transaction() as tx:
        await enqueue(tx, "work", "a")
        await tx.one("insert into jobs.schedules (name, due) values ('the change', $1)", tx.now())
        changed = tx.now()
        async with working(database, [Job("work", read), Job("marker", marker)]):
            await ask(database, "marker", "")
            await until(lambda: marker.ran, "the worker has looked")
            assert seen == []
    async with working(database, [Job("work", read)]):
        await until(lambda: empty(database), "it is done")
    assert len(seen) == 1
    assert abs(seen[0] - changed) < dt.timedelta(seconds=5)


# what becomes of a run


async def test_a_failure_is_tried_again_and_then_held(database: Database) -> None:
    async def fail(subject: str) -> None:
        raise OSError("no way")

    work = Work(fail)
    async with working(database, [Job("work", work)], job_attempts_max=2):
        await ask(database, "work", "a")
        await until(lambda: work.ran == ["a"], "the first run")
        again = await until(lambda: waits(database), "it waits for the second one")
        assert again["attempts"] == 1
        assert again["error"] == "OSError: no way"
        assert dt.timedelta(seconds=0.3) < again["execute_after"] - again["created"]
        held = await until(lambda: is_held(database), "the second failure is the last")
    assert work.ran == ["a", "a"]
    assert held["held"] == "dead"
    assert held["error"] == "OSError: no way"
    assert held["attempts"] == 2


async def waits(database: Database) -> dict[str, Any] | None:
    [row] = await rows(database)
    return row if row["status"] == "queued" and row["attempts"] else None


async def is_held(database: Database) -> dict[str, Any] | None:
    [row] = await rows(database)
    return row if row["status"] == "failed" else None


async def test_asking_again_later_is_no_failure(database: Database) -> None:
    async def not_yet(subject: str) -> None:
        if len(work.ran) < 6:
            raise NotYet(0.01)

    work = Work(not_yet)
    async with working(database, [Job("work", work)], job_attempts_max=1):
        await ask(database, "work", "a")
        await until(lambda: empty(database), "it is done at last")
    assert work.ran == ["a"] * 6


async def test_a_job_that_gives_up_is_held_at_once(database: Database) -> None:
    async def give_up(subject: str) -> None:
        raise GiveUp("there is no such payment")

    async with working(database, [Job("work", Work(give_up))]):
        await ask(database, "work", "a")
        held = await until(lambda: is_held(database), "it is held")
    assert held["held"] == "dead"
    assert held["error"] == "there is no such payment"


async def test_a_run_that_takes_too_long_has_failed(database: Database) -> None:
    async def hang(subject: str) -> None:
        await asyncio.Event().wait()

    async with working(database, [Job("work", Work(hang))], job_timeout_s=1, job_attempts_max=1):
        await ask(database, "work", "a")
        held = await until(lambda: is_held(database), "it is held")
    assert held["held"] == "dead"
    assert held["error"].startswith("TimeoutError")


def test_pauses_double_up_to_a_bound_and_spread() -> None:
    longest = [backoff_s(attempts, 2, 600, lambda low, high: high) for attempts in (1, 2, 3, 9, 10, 11, 5000)]
    assert longest == [2, 4, 8, 512, 600, 600, 600]
    assert [backoff_s(attempts, 2, 600, lambda low, high: low) for attempts in (1, 10)] == [1, 300]


# many workers


async def test_several_workers_run_each_job_once(database: Database) -> None:
    works = [Work() for _ in range(3)]
    subjects = {str(number) for number in range(200)}
    await ask(database, "work", *subjects)
    async with contextlib.AsyncExitStack() as stack:
        for work in works:
            await stack.enter_async_context(working(database, [Job("work", work)]))
        await until(lambda: empty(database), "all are done")
    assert sorted(subject for work in works for subject in work.ran) == sorted(subjects)
    assert all(work.ran for work in works), "one worker has done it all"


class Child:
    """A worker process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def says(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(SOON_S * 2):
            return (await self.process.stdout.readline()).decode().strip()

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


async def child(url: str) -> Child:
    return Child(
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.server.job_worker", url), cwd=ROOT, stdout=asyncio.subprocess.PIPE
        )
    )


async def test_the_job_of_a_killed_worker_is_taken_over(database: Database, database_url: str) -> None:
    await ask(database, "hang", "a")
    first = await child(database_url)
    try:
        assert await first.says() == "begun a"
    finally:
        await first.kill()
    work = Work()
    async with working(database, [Job("hang", work)]):
        await until(lambda: empty(database), "somebody else has done it")
    assert work.ran == ["a"]


async def test_a_job_that_takes_its_workers_down_is_parked(database: Database, database_url: str) -> None:
    await ask(database, "poison", "a")
    for _ in range(TAKEOVERS_MAX):
        worker = await child(database_url)
        try:
            assert await worker.says() == "begun a"
            await worker.process.wait()
        finally:
            await worker.kill()
    await ask(database, "quick", "b")
    last = await child(database_url)
    try:
        assert await last.says() == "done b"
        held = await until(lambda: parked(database), "nobody runs it any more")
        assert last.process.returncode is None
    finally:
        await last.kill()
    assert held["subject"] == "a"


async def parked(database: Database) -> dict[str, Any] | None:
    return next((row for row in await rows(database) if row["held"] == "parked"), None)


# stopping


async def test_a_worker_that_stops_ends_what_it_runs_and_takes_nothing_new(database: Database) -> None:
    go_on = asyncio.Event()

    async def wait(subject: str) -> None:
        await go_on.wait()

    work = Work(wait)
    async with working(database, [Job("work", work)]) as worker:
        await ask(database, "work", "a")
        await until(lambda: work.ran == ["a"], "it runs")
        worker.close()
        await ask(database, "work", "b")
        draining = asyncio.create_task(worker.drained())
        go_on.set()
        await draining
        assert [row["subject"] for row in await rows(database)] == ["b"]
    assert work.ran == ["a"]


async def test_a_job_that_outlasts_the_drain_is_left_to_another_worker(database: Database) -> None:
    async def hang(subject: str) -> None:
        await asyncio.Event().wait()

    slow = Work(hang)
    worker = Jobs(database, settings(), [Job("work", slow)])
    running = asyncio.create_task(worker.run())
    await ask(database, "work", "a")
    await until(lambda: slow.ran == ["a"], "it runs")
    worker.close()
    worker.abandon()
    async with asyncio.timeout(SOON_S):
        await running
    assert [row["status"] for row in await rows(database)] == ["picked"], "it is neither done nor forgotten"
    work = Work()
    async with working(database, [Job("work", work)]):
        await until(lambda: empty(database), "somebody else has done it")
    assert work.ran == ["a"]


# outages


async def test_a_postgres_that_restarts_loses_no_job(private: PrivatePostgres) -> None:
    await migrate(private.url)
    go_on = asyncio.Event()

    async def wait(subject: str) -> None:
        await go_on.wait()

    work = Work(wait)
    async with (
        opened(private.url, timeout_ms=2000) as database,
        working(database, [Job("work", work)], job_poll_ms=NEVER_MS),
    ):
        await ask(database, "work", "a")
        await until(lambda: work.ran == ["a"], "it runs")
        await private.kill()
        go_on.set()
        await private.start()
        await until(lambda: answers(database), "the link is back")
        await until(lambda: empty(database), "that it was done is written down")
        await ask(database, "work", "b")
        await until(lambda: empty(database), "and news are heard again")
    # one whose end could not be written in time is begun again: a job may run twice, and is never lost
    assert (work.ran[-1], set(work.ran)) == ("b", {"a", "b"})


async def test_an_idle_worker_stops_at_once_although_postgres_is_gone(private: PrivatePostgres) -> None:
    await migrate(private.url)
    async with opened(private.url, timeout_ms=2000) as database:
        worker = Jobs(database, settings(), [Job("work", Work())])
        running = asyncio.create_task(worker.run())
        await private.kill()
        await until(lambda: database.gone_since, "the loss is noticed")
        worker.close()
        async with asyncio.timeout(SOON_S):
            await running


async def answers(database: Database) -> bool:
    with contextlib.suppress(Exception):
        await rows(database)
        return True
    return False


async def test_behind_pgbouncer_jobs_are_found_by_looking(bounced_url: str) -> None:
    work = Work()
    async with opened(bounced_url, timeout_ms=5000) as database, working(database, [Job("work", work)]):
        assert database.pooled
        await ask(database, "work", "a", "b")
        await until(lambda: empty(database), "they are done")
    assert sorted(work.ran) == ["a", "b"]


async def test_a_listener_that_is_cut_off_hears_again(database: Database, database_url: str) -> None:
    work = Work()
    async with working(database, [Job("work", work)], job_poll_ms=NEVER_MS):
        await ask(database, "work", "a")
        await until(lambda: empty(database), "the worker has come up")
        connection = await asyncpg.connect(database_url)
        cut = (
            "select count(pg_terminate_backend(pid)) from pg_stat_activity"
            " where query ilike 'listen%' and datname = current_database()"
        )
        assert await connection.fetchval(cut) == 1
        await connection.close()
        await ask(database, "work", "b")
        await until(lambda: empty(database), "it was looked for when the listener came back")
    assert work.ran == ["a", "b"]


# schedules


class Clock:
    def __init__(self, at: str) -> None:
        self.at = dt.datetime.fromisoformat(at)

    def __call__(self) -> dt.datetime:
        return self.at


async def test_a_schedule_asks_once_however_many_workers_there_are(database: Database) -> None:
    clock = database.clock = Clock("2026-11-20T23:59:58+00:00")
    schedules = [every("sweep", 5), daily("report", zoneinfo.ZoneInfo("UTC"), hour=1)]
    workers = [Jobs(database, settings(), [], schedules) for _ in range(4)]

    async def look() -> list[tuple[str, str]]:
        await asyncio.gather(*(worker.look_at_clock() for worker in workers))
        found = [(row["entrypoint"], row["subject"]) for row in await rows(database)]
        async with database.statement() as tx:
            await tx.one("delete from jobs.pgqueuer")
        return found

    assert await look() + await look() == [("sweep", "")], "planned, then asked for"
    assert await look() == [], "five seconds have not passed"
    clock.at += dt.timedelta(seconds=5)
    assert await look() == [("sweep", "")]
    clock.at += dt.timedelta(hours=1)
    assert await look() == [("sweep", ""), ("report", "2026-11-20")], "an hour of sweeps is not made up for"
    clock.at += dt.timedelta(days=2)
    assert ("report", "2026-11-21") in await look()
    assert await look() == [("report", "2026-11-22")], "each day is"
    assert await look() == []


async def test_a_worker_asks_for_what_is_due(database: Database) -> None:
    work = Work()
    async with working(database, [Job("sweep", work)], [every("sweep", 3600)]) as worker:
        keeping = asyncio.create_task(worker.keep_time())
        await until(lambda: work.ran == [""], "it has run")
        keeping.cancel()


def test_a_day_ends_at_its_own_midnight() -> None:
    report = daily("report", zoneinfo.ZoneInfo("Europe/Berlin"), hour=1)
    due = report.first(dt.datetime(2026, 10, 24, 12, tzinfo=dt.UTC))
    assert due == dt.datetime(2026, 10, 24, 23, tzinfo=dt.UTC)
    assert report.subject(due) == "2026-10-24"
    due = report.after(due, utc_now())
    assert due == dt.datetime(2026, 10, 26, 0, tzinfo=dt.UTC), "the day with 25 hours"
    assert report.subject(due) == "2026-10-25"


@pytest.mark.parametrize("name", ["CHANNEL", "QUEUE_TABLE", "PGQUEUER_PREFIX"])
async def test_no_variable_of_the_environment_renames_the_tables(
    database: Database, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "elsewhere")
    work = Work()
    async with working(database, [Job("work", work)], job_poll_ms=NEVER_MS):
        await ask(database, "work", "a")
        await until(lambda: empty(database), "it is done")
