"""The audit desk: what staff and services did is written with what they did, and read by admins."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from handlers.context import Row, Tx
from models.base import ShortText, Strict, Time, View, rfc3339
from models.errors import Invalid
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
        _json(before),
        _json(after),
        tx.request_id,
    )


def _json(value: object) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()


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


LIST = """
select id, at, actor, action, subject, before, after, request_id from audit
where ($1::text is null or subject = $1) and ($2::text is null or actor = $2)
    and ($3::timestamptz is null or at >= $3) and ($4::bigint is null or id < $4)
order by id desc limit $5"""


async def list_audit(tx: Tx, actor: Actor, cmd: ListAudit) -> AuditPage:
    """What was done, newest first.

    Raises:
        Forbidden, Invalid.
    """
    require_role(actor, {Role.ADMIN}, "read the audit log")
    require_all_orders(actor, "read the audit log")
    rows = await tx.all(
        LIST,
        None if isinstance(cmd.subject, UnsetType) else cmd.subject,
        None if isinstance(cmd.actor, UnsetType) else cmd.actor,
        None if isinstance(cmd.from_, UnsetType) else _utc(cmd.from_),
        None if isinstance(cmd.cursor, UnsetType) else int(cmd.cursor),
        cmd.limit + 1,
    )
    page = rows[: cmd.limit]
    return AuditPage([_shown(row) for row in page], str(page[-1]["id"]) if len(rows) > cmd.limit else None)


def _utc(at: dt.datetime) -> dt.datetime:
    try:
        return at.astimezone(dt.UTC)
    except OverflowError:
        raise Invalid("This time is out of range.", "/from") from None


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
