"""The audit desk: what staff and services did is written with what they did, and read by admins."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType
from sqlalchemy import select

from handlers.context import Row, Tx
from handlers.cursors import instant
from models.audit import audit
from models.base import ShortText, Strict, Time, View, as_json, rfc3339
from models.order import require_all_orders, require_role
from models.user import Actor, Role

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
        as_json(before),
        as_json(after),
        tx.request_id,
    )


class ListAudit(Strict):
    subject: Annotated[ShortText, Meta(description="as it is shown: payment:ID")] | UnsetType = UNSET
    actor: Annotated[ShortText, Meta(description="role and subject, as it is shown: staff:s1")] | UnsetType = UNSET
    from_: Annotated[dt.datetime, Meta(tz=True)] | UnsetType = msgspec.field(default=UNSET, name="from")
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: Annotated[str, Meta(pattern=r"^[0-9]{1,18}\Z")] | UnsetType = UNSET


class AuditRow(View):
    at: Time
    actor: Annotated[str, Meta(description="role and subject")]
    action: str
    subject: str
    before: Any = None
    after: Any = None
    request_id: str | None = None


class AuditPage(msgspec.Struct, frozen=True, rename="camel"):
    items: list[AuditRow]
    next_cursor: Annotated[str | None, Meta(description="`cursor` of the next page; null on the last one")]


async def list_audit(tx: Tx, actor: Actor, cmd: ListAudit) -> AuditPage:
    """What was done, newest first.

    Raises:
        Forbidden, Invalid.
    """
    require_role(actor, {Role.ADMIN}, "read the audit log")
    require_all_orders(actor, "read the audit log")
    query = select(audit)
    for name in ("subject", "actor"):
        if (wanted := getattr(cmd, name)) is not UNSET:
            query = query.where(audit.c[name] == wanted)
    if isinstance(cmd.from_, dt.datetime):
        query = query.where(audit.c.at >= instant(cmd.from_, "/from"))
    if isinstance(cmd.cursor, str):
        query = query.where(audit.c.id < int(cmd.cursor))
    rows = await tx.select(query.order_by(audit.c.id.desc()).limit(cmd.limit + 1))
    page = rows[: cmd.limit]
    return AuditPage([_shown(row) for row in page], str(page[-1]["id"]) if len(rows) > cmd.limit else None)


def _shown(row: Row) -> AuditRow:
    return AuditRow(
        at=rfc3339(row["at"]),
        actor=row["actor"],
        action=row["action"],
        subject=row["subject"],
        before=msgspec.json.decode(row["before"]) if row["before"] else None,
        after=msgspec.json.decode(row["after"]) if row["after"] else None,
        request_id=row["request_id"],
    )
