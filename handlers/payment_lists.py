"""Reading payments: the list and its export, one payment, and everything that ever reached it."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType
from sqlalchemy import Text, select, tuple_

from handlers.book_rows import read_row, view
from handlers.context import Tx
from handlers.cursors import decode_cursor, encode_cursor, instant
from handlers.orders import EXPORT_PAGE, Instant
from handlers.payments import PAYERS, payment_uuid, permit_all, require
from models.base import Id, ShortText, Strict, Time, View, rfc3339
from models.errors import Invalid
from models.order import require_role
from models.payment import Attention, Payment, PaymentStatus, Provider, Source, payment_inputs, payments
from models.user import BACK_OFFICE, STAFF, Actor, Role


class PaymentFilters(Strict):
    """Which payments; `from` and `to` are a half-open range of `createdAt`."""

    order_id: Annotated[str, Meta(extra_json_schema={"format": "uuid"})] | UnsetType = UNSET
    customer_id: Id | UnsetType = UNSET
    status: PaymentStatus | UnsetType = UNSET
    provider: Provider | UnsetType = UNSET
    method: ShortText | UnsetType = UNSET
    attention: Attention | UnsetType = UNSET
    from_: Instant | UnsetType = msgspec.field(default=UNSET, name="from")
    to: Instant | UnsetType = UNSET


class ListPayments(PaymentFilters):
    """A page of them."""

    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: Annotated[str, Meta(max_length=200)] | UnsetType = UNSET


class PaymentPage(msgspec.Struct, frozen=True, rename="camel"):
    items: list[Payment]
    next_cursor: Annotated[str | None, Meta(description="`cursor` of the next page; null on the last one")]


async def list_payments(tx: Tx, actor: Actor, cmd: ListPayments) -> PaymentPage:
    """A page of the payments that the actor sees, newest first. Rows that are added meanwhile do not move it."""
    require(actor, BACK_OFFICE | PAYERS, "list payments")
    p = payments.c
    query = select(payments)
    if actor.role is Role.CUSTOMER:
        query = query.where(p.customer_id == actor.sub)
    if actor.orders is not None:
        query = query.where(p.order_id.cast(Text).in_(sorted(actor.orders)))
    if isinstance(cmd.order_id, str):
        query = query.where(p.order_id == _uuid(cmd.order_id))
    for name in ("customer_id", "status", "provider", "method", "attention"):
        if (wanted := getattr(cmd, name)) is not UNSET:
            query = query.where(p[name] == wanted)
    if isinstance(cmd.from_, dt.datetime):
        query = query.where(p.created_at >= instant(cmd.from_, "/from"))
    if isinstance(cmd.to, dt.datetime):
        query = query.where(p.created_at < instant(cmd.to, "/to"))
    if isinstance(cmd.cursor, str):
        query = query.where(tuple_(p.created_at, p.id) < tuple_(*decode_cursor(cmd.cursor)))
    rows = await tx.select(query.order_by(p.created_at.desc(), p.id.desc()).limit(cmd.limit + 1))
    page = rows[: cmd.limit]
    cursor = encode_cursor(page[-1]["created_at"], page[-1]["id"]) if len(rows) > cmd.limit else None
    return PaymentPage([view(read_row(row)) for row in page], cursor)


def _uuid(order_id: str) -> uuid.UUID:
    try:
        return uuid.UUID(order_id)
    except ValueError:
        raise Invalid("Write the id of an order.", "/orderId") from None


async def export_payments(
    statement: Callable[[], AbstractAsyncContextManager[Tx]], actor: Actor, cmd: PaymentFilters
) -> AsyncIterator[list[Payment]]:
    """All pages of the list, newest first. Each is a transaction of its own: nothing is open while a page is sent."""
    require_role(actor, STAFF, "export payments")
    page = ListPayments(**msgspec.structs.asdict(cmd), limit=EXPORT_PAGE)
    while True:
        async with statement() as tx:
            found = await list_payments(tx, actor, page)
        yield found.items
        if found.next_cursor is None:
            return
        page = msgspec.structs.replace(page, cursor=found.next_cursor)


TOP = "select o.seq from orders o join payments p on p.order_id = o.id where p.id = $1"


class Seen(NamedTuple):
    """A payment, and the number of its order's last event before it was read."""

    payment: Payment
    order_id: str
    seq: int


async def read(tx: Tx, actor: Actor, payment_id: str) -> Seen:
    """Raises NotFound, Forbidden."""
    top = await tx.one(TOP, payment_uuid(payment_id))
    row = await permit_all(tx, actor, payment_id)
    assert top is not None, "payments and orders are never deleted"
    return Seen(view(row), str(row.order_id), top["seq"])


class PaymentInput(View):
    """Something that reached a payment, also when it changed nothing."""

    at: Time
    source: Source
    kind: Annotated[str, Meta(description="what it was: started, created, captured, failed …")]
    after: PaymentStatus
    detail: Annotated[Any, Meta(description="what it said")]
    before: PaymentStatus | None = None
    actor: Annotated[str, Meta(description="role and id of who did it")] | None = None


class PaymentHistory(msgspec.Struct, frozen=True, rename="camel"):
    items: list[PaymentInput]
    next_cursor: Annotated[str | None, Meta(description="`cursor` of the next page; null on the last one")]


class ReadHistory(Strict):
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: Annotated[str, Meta(max_length=20, pattern=r"^[0-9]{1,18}\Z")] | UnsetType = UNSET


async def history(tx: Tx, actor: Actor, payment_id: str, cmd: ReadHistory) -> PaymentHistory:
    """Every input that reached the payment, newest first.

    Raises:
        NotFound, Forbidden.
    """
    await permit_all(tx, actor, payment_id)
    h = payment_inputs.c
    query = select(payment_inputs).where(h.payment_id == uuid.UUID(payment_id))
    if isinstance(cmd.cursor, str):
        query = query.where(h.id < int(cmd.cursor))
    rows = await tx.select(query.order_by(h.id.desc()).limit(cmd.limit + 1))
    page = rows[: cmd.limit]
    items = [
        PaymentInput(
            at=rfc3339(row["at"]),
            source=Source(row["source"]),
            kind=row["kind"],
            after=PaymentStatus(row["after"]),
            detail=msgspec.json.decode(row["detail"]),
            before=PaymentStatus(row["before"]) if row["before"] is not None else None,
            actor=row["actor"],
        )
        for row in page
    ]
    return PaymentHistory(items, str(page[-1]["id"]) if len(rows) > cmd.limit else None)
