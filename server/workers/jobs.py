"""Background jobs: what a change asked for in its own transaction, run once it is committed.

pgqueuer takes the jobs, keeps them apart and takes over those of a dead worker. What it does not do for us, or does
otherwise than we need, is here; docs/decisions/0021-jobs-on-pgqueuer.md names each of these things.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import random
import zoneinfo
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, NamedTuple, Self, cast

import asyncpg
import structlog
from pgqueuer.adapters.persistence.qb import QueryBuilderEnvironment, QueryQueueBuilder, QuerySchedulerBuilder
from pgqueuer.adapters.persistence.queries import Queries
from pgqueuer.core.qm import QueueManager
from pgqueuer.core.tm import TaskManager
from pgqueuer.domain.models import Job as Row
from pgqueuer.domain.models import TracebackRecord
from pgqueuer.domain.settings import DBSettings
from pgqueuer.domain.types import Channel
from pgqueuer.errors import RetryRequested
from pgqueuer.ports.driver import NotifyCallback

from handlers.jobs import GiveUp, NotYet, enqueue
from models.errors import Unavailable
from server import metrics
from server.db import GONE, Database
from server.settings import Settings

log = structlog.get_logger()

TAKEOVERS_MAX = 3
"""How many workers a job may take down with it before nobody runs it any more."""

CHANNEL = "ch_pgqueuer"
"""Where Postgres tells that a job was asked for."""

WAKE_PAUSE_S = 0.01
"""Shortest pause between two looks that such news brings about: a burst of jobs is one look."""

AWAY_PAUSE_S = 0.5
"""Pause between two attempts while Postgres does not answer."""

LISTEN_PROBE_S = 5.0
"""How often the connection that listens is asked whether it lives."""

SCHEDULE_POLL_S = 1.0
"""How often schedules are looked at, and how late one may be."""

WATCH_S = 2.0
"""How often the jobs that wait are counted."""

LOG_SWEEP_S = 3600
"""How often the library's log is shortened."""

ERROR_CHARACTERS_MAX = 2000
"""How much of a failure is kept with its job."""


class Job(NamedTuple):
    """A kind of job. `run(subject)` raises NotYet, GiveUp, or anything else to be run again later."""

    name: str
    run: Callable[[str], Awaitable[None]]


class Schedule(NamedTuple):
    """A job that is asked for by the clock, once however many workers there are."""

    name: str
    first: Callable[[dt.datetime], dt.datetime]
    """When it is due for the first time, seen from now."""
    after: Callable[[dt.datetime, dt.datetime], dt.datetime]
    """When it is due again, after it was due then and seen from now."""
    subject: Callable[[dt.datetime], str]
    """What the job is about that is due then."""


def every(name: str, seconds: float) -> Schedule:
    """The job `name` every so often; what was missed while no worker ran is not made up for."""
    pause = dt.timedelta(seconds=seconds)
    return Schedule(name, lambda now: now, lambda due, now: now + pause, lambda due: "")


def daily(name: str, zone: zoneinfo.ZoneInfo, hour: int) -> Schedule:
    """The job `name` for each day of `zone` that has ended, at this hour of the next one. Its subject is the day, as
    2026-11-20. Days that were missed while no worker ran are made up for."""

    def on(day: dt.date) -> dt.datetime:
        return dt.datetime.combine(day, dt.time(hour), zone).astimezone(dt.UTC)

    def first(now: dt.datetime) -> dt.datetime:
        today = now.astimezone(zone).date()
        return on(today) if on(today) > now else on(today + dt.timedelta(days=1))

    def after(due: dt.datetime, now: dt.datetime) -> dt.datetime:
        return on(due.astimezone(zone).date() + dt.timedelta(days=1))

    def subject(due: dt.datetime) -> str:
        return (due.astimezone(zone).date() - dt.timedelta(days=1)).isoformat()

    return Schedule(name, first, after, subject)


def backoff_s(attempts: int, base_s: float, max_s: float, between: Callable[[float, float], float]) -> float:
    """How long to wait after the failure number `attempts`, from 1: twice as long each time, up to `max_s`, and up to
    half of it less, so that jobs which failed together do not come back together."""
    longest = min(max_s, base_s * 2 ** min(attempts - 1, 32))
    return between(longest / 2, longest)


class Verdict(NamedTuple):
    """How a run ended that did not do its job."""

    outcome: Literal["asked_again", "retried", "dead", "parked"]
    after_s: float = 0
    error: str | None = None


START = """
insert into jobs.notes as note (job_id, starts) values ($1, 1)
on conflict (job_id) do update set starts = note.starts + 1, held = null
returning starts"""

# The guard on the worker: a run that was taken over meanwhile has no say any more.
END = """
with ended as (
    update jobs.pgqueuer
    set status = $3::text::jobs.pgqueuer_status, execute_after = now() + $4::double precision * interval '1 second',
        attempts = $5, queue_manager_id = null, updated = now()
    where id = $1 and queue_manager_id = $2 and status = 'picked'
    returning id)
update jobs.notes set starts = 0, error = coalesce($6, error), held = $7 from ended where job_id = ended.id"""

# Somebody asked for the same anew while it ran: that one carries on.
YIELD = "delete from jobs.pgqueuer where id = $1 and queue_manager_id = $2 and status = 'picked'"

CLAIM = "update jobs.schedules set due = $3 where name = $1 and due = $2 returning name"
DUE = "select name, due from jobs.schedules where name = any($1)"
PLAN = "insert into jobs.schedules (name, due) values ($1, $2) on conflict do nothing"

WAITING = """
select count(*) filter (where status = 'queued') as due,
    coalesce(extract(epoch from now() - min(execute_after) filter (where status = 'queued')), 0)::float8 as oldest,
    count(*) filter (where status = 'failed' and coalesce(held, 'dead') = 'dead') as dead,
    count(*) filter (where status = 'failed' and held = 'parked') as parked
from jobs.pgqueuer as job left join jobs.notes on job_id = job.id
where status = 'failed' or (status = 'queued' and execute_after <= now())"""

FORGET = "delete from jobs.pgqueuer_log where created < now() - $1::double precision * interval '1 second'"


class Abandoned(Exception):
    """The worker stops, and Postgres is not asked any more."""


class _Driver:
    """pgqueuer's way to Postgres: our pool, statement by statement. While Postgres is away it waits."""

    def __init__(self, database: Database) -> None:
        self.closing = False
        self.abandoned = False
        self.shutdown = asyncio.Event()
        self.tm = TaskManager()
        self._database = database
        self._callbacks: list[NotifyCallback] = []
        self._waking: asyncio.TimerHandle | None = None

    async def fetch(self, query: str, *args: object) -> list[dict[str, object]]:
        """For what a worker asks: it asks no more when it stops."""
        return await self._perform(query, args, lambda: self.closing)

    async def execute(self, query: str, *args: object) -> str:
        """For what a worker writes down: that is tried to the end."""
        await self._perform(query, args, lambda: False)
        return ""

    async def _perform(
        self, query: str, args: tuple[object, ...], stops: Callable[[], bool]
    ) -> list[dict[str, object]]:
        while not self.abandoned:
            try:
                async with self._database.statement() as tx:
                    return [dict(cast(Any, row)) for row in await tx.all(query, *args)]
            except Unavailable:
                if stops():
                    break
                await asyncio.sleep(AWAY_PAUSE_S)
        raise Abandoned

    async def add_listener(self, channel: str, callback: NotifyCallback) -> None:
        self._callbacks.append(callback)

    async def notify(self, channel: str, payload: str) -> None:
        """What the library tells its workers is only ever this one's question whether it hears itself."""
        for callback in self._callbacks:
            callback(payload)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._callbacks.clear()

    # news of jobs

    async def listen(self) -> None:
        """Hear when a job is asked for, until cancelled. Behind a pooler nothing is heard: there the poll suffices."""
        await self._database.reached.wait()
        while not self._database.pooled:
            connection: Any = None
            try:
                connection = await self._database.connect()
                cut = asyncio.Event()
                connection.add_termination_listener(lambda _, cut=cut: cut.set())
                await connection.add_listener(CHANNEL, self._hear)
                self.wake()  # for what was asked for while nobody listened
                while not cut.is_set():
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(cut.wait(), LISTEN_PROBE_S)
                    await connection.execute("select 1")
            except (*GONE, asyncpg.PostgresError) as error:
                log.warning("jobs_not_heard", error=type(error).__name__)
                await asyncio.sleep(AWAY_PAUSE_S)
            finally:
                if connection is not None:
                    connection.terminate()

    def _hear(self, connection: object, pid: object, channel: object, payload: str) -> None:
        if json.loads(payload)["operation"] == "insert":  # that one was done is no news
            self.wake()

    def wake(self) -> None:
        """Have the worker look soon."""
        if self._waking is None:
            self._waking = asyncio.get_running_loop().call_later(WAKE_PAUSE_S, self._wake)

    def _wake(self) -> None:
        self._waking = None
        at = dt.datetime.now(dt.UTC).isoformat()
        news = {
            "channel": CHANNEL,
            "operation": "insert",
            "sent_at": at,
            "table": "pgqueuer",
            "type": "table_changed_event",
        }
        for callback in self._callbacks:
            callback(json.dumps(news))


class _Queries(Queries):
    """pgqueuer's statements, but for what becomes of a job that was not done."""

    verdicts: dict[int, Verdict]

    async def retry_job(self, job: Row, delay: dt.timedelta, traceback_record: TracebackRecord | None) -> None:
        verdict = self.verdicts.pop(job.id)
        again = verdict.outcome in ("asked_again", "retried")
        await self._end(job, verdict, "queued" if again else "failed", None if again else verdict.outcome)

    async def _end(self, job: Row, verdict: Verdict, status: str, held: str | None) -> None:
        # runs in a row that failed: asking again is none
        attempts = 0 if verdict.outcome == "asked_again" else job.attempts + 1
        worker = job.queue_manager_id
        try:
            await self.driver.execute(END, job.id, worker, status, verdict.after_s, attempts, verdict.error, held)
        except asyncpg.UniqueViolationError:
            await self.driver.execute(YIELD, job.id, worker)


class Jobs:
    """The worker of one process."""

    def __init__(
        self, database: Database, settings: Settings, jobs: Sequence[Job], schedules: Sequence[Schedule] = ()
    ) -> None:
        self._database = database
        self._settings = settings
        self._jobs = {job.name: job for job in jobs}
        self._schedules = {schedule.name: schedule for schedule in schedules}
        self._driver = _Driver(database)
        # each name is given: else the library takes it from the environment, where CHANNEL may be anybody's
        names = DBSettings(
            prefix="",
            db_schema="jobs",
            channel=Channel(CHANNEL),
            function="fn_pgqueuer_changed",
            statistics_table="pgqueuer_statistics",
            queue_status_type="pgqueuer_status",
            queue_table="pgqueuer",
            queue_table_log="pgqueuer_log",
            trigger="tg_pgqueuer_changed",
            schedules_table="pgqueuer_schedules",
        )
        self._queries = _Queries(
            self._driver, QueryBuilderEnvironment(names), QueryQueueBuilder(names), QuerySchedulerBuilder(names)
        )
        self._queries.verdicts = {}
        self._manager: QueueManager | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self._closing = asyncio.Event()
        self._ended = asyncio.Event()

    # running

    async def run(self) -> None:
        """Run jobs until `close`, and then until those that run have ended."""
        listening = asyncio.create_task(self._driver.listen())
        try:
            while not self._closing.is_set():
                self._manager = self._new_manager()
                try:
                    await self._manager.run(
                        dequeue_timeout=dt.timedelta(milliseconds=self._settings.job_poll_ms),
                        batch_size=self._settings.jobs_at_once_max // 2,
                        max_concurrent_tasks=self._settings.jobs_at_once_max,
                        heartbeat_timeout=dt.timedelta(seconds=self._settings.job_takeover_s),
                        log_aggregation_interval=dt.timedelta(0),
                    )
                except Abandoned:
                    return
                except Exception:
                    log.exception("jobs_failed")
                    await asyncio.sleep(AWAY_PAUSE_S)
        finally:
            self._ended.set()
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    def close(self) -> None:
        """Take no more jobs; those that run go on."""
        self._closing.set()
        self._driver.closing = True
        if self._manager is not None:
            self._manager.shutdown.set()

    async def drained(self) -> None:
        """Wait until the last job has ended and is written down."""
        await self._ended.wait()

    def abandon(self) -> None:
        """End what still runs, and `run` with it. Nothing is written of it, so another worker takes it over: the
        library alone would wait for it, and delete what was cancelled."""
        self.close()
        self._driver.abandoned = True
        for task in self._running:
            task.cancel()

    def _new_manager(self) -> QueueManager:
        manager = QueueManager(self._queries, Channel(CHANNEL))
        for job in self._jobs.values():
            manager.entrypoint(job.name, accepts_context=False, on_failure="hold")(self._runner(job))
        if self._closing.is_set():
            manager.shutdown.set()
        return manager

    def _runner(self, job: Job) -> Callable[[Row], Awaitable[None]]:
        async def run(row: Row) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._running.add(task)
            try:
                verdict = await self._judge(job, row)
            finally:
                self._running.discard(task)
            if verdict is None:
                metrics.jobs.labels(job.name, "done").inc()
                return
            metrics.jobs.labels(job.name, verdict.outcome).inc()
            self._queries.verdicts[row.id] = verdict
            raise RetryRequested  # the library's only way to be told what becomes of a job

        return run

    async def _judge(self, job: Job, row: Row) -> Verdict | None:
        """Run it; None when it was done."""
        subject = (row.payload or b"").decode()
        structlog.contextvars.bind_contextvars(job=job.name, subject=subject)
        try:
            starts = cast(int, (await self._driver.fetch(START, row.id))[0]["starts"])
        except asyncpg.ForeignKeyViolationError:
            return None  # another worker took it over and has done it
        except Abandoned:
            return Verdict("asked_again")  # we stop, and have not begun
        if starts > 1:
            log.warning("job_taken_over", takeovers=starts - 1)
            metrics.jobs.labels(job.name, "taken_over").inc()
        if starts > TAKEOVERS_MAX:
            log.error("job_parked")
            return Verdict("parked", error=f"Its worker ended or hung {TAKEOVERS_MAX} times while it ran.")
        try:
            with metrics.job_seconds.labels(job.name).time():
                async with asyncio.timeout(self._settings.job_timeout_s):
                    await job.run(subject)
        except NotYet as asked:
            return Verdict("asked_again", asked.after_s)
        except GiveUp as reason:
            log.error("job_dead", reason=str(reason))
            return Verdict("dead", error=str(reason)[:ERROR_CHARACTERS_MAX])
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS_MAX]
            attempts = row.attempts + 1
            if attempts >= self._settings.job_attempts_max:
                log.exception("job_dead", attempts=attempts)
                return Verdict("dead", error=text)
            after_s = backoff_s(
                attempts, self._settings.job_retry_base_s, self._settings.job_retry_max_s, random.uniform
            )
            log.warning("job_failed", attempts=attempts, after_s=round(after_s, 1), exc_info=True)
            return Verdict("retried", after_s, text)
        return None

    # schedules

    async def keep_time(self) -> None:
        """Ask for the jobs of the schedules when they are due, until cancelled."""
        while True:
            with contextlib.suppress(Unavailable):  # what is due stays due
                await self.look_at_clock()
            await asyncio.sleep(SCHEDULE_POLL_S)

    async def look_at_clock(self) -> None:
        """Ask for what is due now."""
        async with self._database.statement() as tx:
            due = {row["name"]: row["due"] for row in await tx.all(DUE, list(self._schedules))}
        for name, schedule in self._schedules.items():
            async with self._database.transaction() as tx:
                now = tx.now()
                if name not in due:
                    await tx.one(PLAN, name, schedule.first(now))
                elif due[name] <= now and await tx.one(CLAIM, name, due[name], schedule.after(due[name], now)):
                    await enqueue(tx, name, schedule.subject(due[name]))

    # watching

    async def watch(self) -> None:
        """Count what waits and what is held, and shorten the library's log, until cancelled."""
        loop = asyncio.get_running_loop()
        swept = loop.time()
        while True:
            try:
                async with self._database.statement() as tx:
                    row = await tx.one(WAITING)
                assert row is not None
                metrics.jobs_waiting.set(row["due"])
                metrics.oldest_job.set(row["oldest"])
                metrics.jobs_held.labels("dead").set(row["dead"])
                metrics.jobs_held.labels("parked").set(row["parked"])
                if loop.time() - swept > LOG_SWEEP_S:
                    swept = loop.time()
                    async with self._database.statement() as tx:
                        await tx.one(FORGET, float(self._settings.job_log_keep_s))
            except Unavailable:
                pass  # the last counts stay
            await asyncio.sleep(WATCH_S)
