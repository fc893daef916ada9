"""Background jobs: asking for one inside a change's transaction.

A job is a name and a subject, mostly an id; whoever runs it reads the state that it finds. So the same job asked for
twice is one job, and one that runs twice must do no harm.
"""

from __future__ import annotations

from handlers.context import Tx

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
