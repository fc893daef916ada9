"""Background jobs: asking for one inside a change's transaction, and what staff decide about those that failed.

A job is a name and a subject, mostly an id; whoever runs it reads the state that it finds. So the same job asked for
twice is one job, and one that runs twice must do no harm.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from handlers import audit
from handlers.context import Row, Tx
from models.base import Reason, Strict, Time, View, rfc3339
from models.errors import Conflict, Forbidden, Invalid, NotFound
from models.order import require_role
from models.user import STAFF, Actor

# The update locks the row that waits until this transaction ends, so that no worker takes it before it sees the change
# (`do nothing` would lose the job when a worker takes it just then). One that runs already does not count as waiting.
ENQUEUE = """
insert into jobs.pgqueuer as job (priority, entrypoint, payload, execute_after, status)
values (0, $1, $2, now() + $3::double precision * interval '1 second', 'queued')
on conflict (entrypoint, payload) where status = 'queued'
do update set execute_after = least(job.execute_after, excluded.execute_after)"""


async def enqueue(tx: Tx, name: str, subject: str, *, after_s: float = 0) -> None:
    """Have the job `name` run on `subject` once this transaction is committed, and not before `after_s` seconds.

    One that still waits for the same name and subject is the same job, and runs at the earlier of both times.
    """
    await tx.one(ENQUEUE, name, subject.encode(), after_s)


class NotYet(Exception):
    """Raised by a job that cannot be done yet and has not failed: it runs again after `after_s` seconds."""

    def __init__(self, after_s: float) -> None:
        super().__init__(f"again after {after_s:g} s")
        self.after_s = after_s


class GiveUp(Exception):
    """Raised by a job that can never be done: it is held for staff at once. The text says why."""


# the desk


class JobStatus(StrEnum):
    """What has become of a job, in the words of webhooks."""

    RECEIVED = "received"
    """It waits for its time, or runs."""
    APPLIED = "applied"
    """Done. Those are not kept, so no list shows any."""
    PARKED = "parked"
    """It took three workers down with it: nobody runs it until staff decide."""
    DEAD = "dead"
    """It failed too often, or can never be done: nobody runs it until staff decide."""
    DISMISSED = "dismissed"


class BackgroundJob(View):
    """Work that a change has asked for."""

    id: str
    name: str
    subject: Annotated[str, Meta(description="what it is about: the id of a payment, a refund, an order, or a day")]
    status: JobStatus
    attempts: Annotated[int, Meta(description="failures in a row")]
    created_at: Time
    next_at: Annotated[Time, Meta(description="when it may run")] | None = None
    error: Annotated[str, Meta(description="how its last failure ended")] | None = None
    reason: Annotated[str, Meta(description="why it was dismissed")] | None = None


class ListJobs(Strict):
    """A page of them."""

    status: JobStatus | UnsetType = UNSET
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: Annotated[str, Meta(max_length=200)] | UnsetType = UNSET


class JobPage(msgspec.Struct, frozen=True, rename="camel"):
    items: list[BackgroundJob]
    next_cursor: Annotated[str | None, Meta(description="`cursor` of the next page; null on the last one")]


class RetryJob(Strict):
    """Nothing more is to be said."""


class DismissJob(Strict):
    """Why it needs not be done."""

    reason: Reason


ID_MAX = 2**63 - 1

STATUS = "case when job.status = 'failed' then coalesce(note.held, 'dead') else 'received' end"
SHOWN = f"""
select job.id, job.entrypoint, job.payload, job.attempts, job.created, job.execute_after, note.error, note.reason,
    {STATUS} as status
from jobs.pgqueuer as job left join jobs.notes as note on note.job_id = job.id"""
LIST = f"""
{SHOWN} where job.id < $1 and ($2::text is null or {STATUS} = $2) order by job.id desc limit $3"""
READ = f"{SHOWN} where job.id = $1 for update of job"
TAKE_OUT = "delete from jobs.pgqueuer where id = $1 returning created"
# Under its old id, unless the same job waits already: then it is that one.
PUT_BACK = """
insert into jobs.pgqueuer as job (id, priority, entrypoint, payload, created, status)
values ($1, 0, $2, $3, $4, 'queued')
on conflict (entrypoint, payload) where status = 'queued'
do update set execute_after = least(job.execute_after, excluded.execute_after)
returning id"""
SET_ASIDE = """
insert into jobs.notes as note (job_id, held, reason) values ($1, 'dismissed', $2)
on conflict (job_id) do update set held = excluded.held, reason = excluded.reason"""


def _view(row: Row) -> BackgroundJob:
    status = JobStatus(row["status"])
    return BackgroundJob(
        id=str(row["id"]),
        name=row["entrypoint"],
        subject=(row["payload"] or b"").decode(),
        status=status,
        attempts=row["attempts"],
        created_at=rfc3339(row["created"]),
        next_at=rfc3339(row["execute_after"]) if status is JobStatus.RECEIVED else None,
        error=row["error"],
        reason=row["reason"],
    )


def _require_staff(actor: Actor) -> None:
    require_role(actor, STAFF, "see background jobs")
    if actor.orders is not None:
        raise Forbidden("This token is for some orders only; jobs are about any.")


def _job_id(text: str, pointer: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) > ID_MAX:
        raise Invalid("This cursor is not one of ours; start again without it.", pointer)
    return int(text)


async def list_jobs(tx: Tx, actor: Actor, cmd: ListJobs) -> JobPage:
    """A page of the jobs that are not done, newest first."""
    _require_staff(actor)
    before = _job_id(cmd.cursor, "/cursor") if isinstance(cmd.cursor, str) else ID_MAX
    status = cmd.status if isinstance(cmd.status, JobStatus) else None
    rows = await tx.all(LIST, before, status, cmd.limit + 1)
    page = [_view(row) for row in rows[: cmd.limit]]
    return JobPage(page, page[-1].id if len(rows) > cmd.limit else None)


async def retry_job(tx: Tx, actor: Actor, job_id: str, cmd: RetryJob) -> BackgroundJob:
    """Run it again, as if it had never failed. If the same job was asked for anew meanwhile, it is that one.

    Raises:
        Forbidden, NotFound; Conflict: it is neither dead nor parked.
    """
    tx.atomically()
    before, row = await _held(tx, actor, job_id)
    created = await tx.one(TAKE_OUT, row["id"])
    assert created is not None
    again = await tx.one(PUT_BACK, row["id"], row["entrypoint"], row["payload"], created["created"])
    assert again is not None
    after = await tx.one(READ, again["id"])
    assert after is not None
    await audit.record(tx, actor, "job.retry", f"job:{before.id}", before, _view(after))
    return _view(after)


async def dismiss_job(tx: Tx, actor: Actor, job_id: str, cmd: DismissJob) -> BackgroundJob:
    """Leave it undone. It is kept.

    Raises:
        Forbidden, NotFound; Conflict: it is neither dead nor parked.
    """
    tx.atomically()
    before, row = await _held(tx, actor, job_id)
    await tx.one(SET_ASIDE, row["id"], cmd.reason)
    after = await tx.one(READ, row["id"])
    assert after is not None
    await audit.record(tx, actor, "job.dismiss", f"job:{before.id}", before, _view(after))
    return _view(after)


async def _held(tx: Tx, actor: Actor, job_id: str) -> tuple[BackgroundJob, Row]:
    _require_staff(actor)
    row = None
    if int(job_id) <= ID_MAX:
        # the second look is for whoever waited for another's retry: it has put another row in the place of this one
        row = await tx.one(READ, int(job_id)) or await tx.one(READ, int(job_id))
    if row is None:
        raise NotFound("There is no such job; those that are done are not kept.")
    found = _view(row)
    if found.status not in (JobStatus.DEAD, JobStatus.PARKED):
        raise Conflict(f"Only what is dead or parked can be retried or dismissed; this is {found.status}.")
    return found, row
