"""The audit desk: what staff and services did is written with what they did."""

from __future__ import annotations

import msgspec

from handlers.context import Tx
from models.user import Actor

RECORD = """
insert into audit (at, actor, action, subject, before, after, request_id) values ($1, $2, $3, $4, $5, $6, $7)"""


async def record(tx: Tx, actor: Actor, action: str, subject: str, before: object = None, after: object = None) -> None:
    """Write down that `actor` did `action` (as `payment.capture`) to `subject` (as `payment:ID`). `before` and `after`
    are what changed, as JSON can hold it."""
    await tx.one(
        RECORD,
        tx.now(),
        actor.who,
        action,
        subject,
        _json(before),
        _json(after),
        tx.request_id,
    )


def _json(value: object) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()
