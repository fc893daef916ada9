"""The refunds desk's reads: one refund, those of a payment, and those that are still due."""

from __future__ import annotations

import uuid
from typing import Annotated, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType
from sqlalchemy import Text, literal_column, select, tuple_

from handlers.context import Row, Tx
from handlers.cursors import decode_cursor, encode_cursor
from models.base import Strict, rfc3339
from models.errors import NotFound
from models.order import may_see, require_role
from models.payment import Failure
from models.refund import Cause, Channel, Refund, RefundLine, RefundStatus, refunds
from models.user import BACK_OFFICE, Actor, Role

READERS = BACK_OFFICE | {Role.CUSTOMER, Role.GUEST}

AnyUuid = Annotated[
    str,
    Meta(
        pattern="^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\\Z", extra_json_schema={"format": "uuid"}
    ),
]


class ListRefunds(Strict):
    """A page of refunds. Those that are not `succeeded` are money that is still due to payers."""

    status: RefundStatus | UnsetType = UNSET
    order_id: AnyUuid | UnsetType = UNSET
    payment_id: AnyUuid | UnsetType = UNSET
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: Annotated[str, Meta(max_length=200)] | UnsetType = UNSET


class PageOfRefunds(Strict):
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: Annotated[str, Meta(max_length=200)] | UnsetType = UNSET


class RefundPage(msgspec.Struct, frozen=True, rename="camel"):
    items: list[Refund]
    next_cursor: Annotated[str | None, Meta(description="`cursor` of the next page; null on the last one")]


LINES = """(select json_agg(json_build_object('lineId', l.position::text, 'quantity', l.quantity, 'amount', l.amount)
    order by l.position)::text from refund_lines l where l.refund_id = r.id) as lines"""
FOUND = f"""
select r.*, {LINES}, o.customer_id from refunds r join orders o on o.id = r.order_id
where r.id = any ($1::uuid[]) order by r.created_at desc, r.id desc"""
OWNER_OF_PAYMENT = """
select o.id, o.customer_id from payments p join orders o on o.id = p.order_id where p.id = $1"""
OWNER_OF_ORDER = "select o.id, o.customer_id from orders o where o.id = $1"
OWNER_OF_REFUND = """
select o.id, o.customer_id, o.seq from refunds r join orders o on o.id = r.order_id where r.id = $1"""

_decode_lines = msgspec.json.Decoder(list[RefundLine]).decode


def view(row: Row) -> Refund:
    """A row of `refunds` with its lines as JSON text in `lines`."""
    return Refund(
        id=str(row["id"]),
        payment_id=str(row["payment_id"]),
        order_id=str(row["order_id"]),
        amount=row["amount"],
        currency=row["currency"],
        status=RefundStatus(row["status"]),
        reason=row["reason"],
        channel=Channel(row["channel"]),
        cause=Cause(row["cause"]) if row["cause"] else None,
        lines=_decode_lines(row["lines"]) if row["lines"] else None,
        reference=row["reference"],
        failure=msgspec.json.decode(row["failure"], type=Failure) if row["failure"] else None,
        created_at=rfc3339(row["created_at"]),
        settled_at=rfc3339(row["settled_at"]) if row["settled_at"] else None,
    )


class Seen(NamedTuple):
    """A refund, and the number of its order's last event before it was read."""

    refund: Refund
    order_id: str
    seq: int


async def read(tx: Tx, actor: Actor, refund_id: str) -> Seen:
    """Raises NotFound: no such refund, or of somebody else's order. Forbidden."""
    _require_reader(actor)
    found = as_uuid(refund_id, "refund")
    order = await owner(tx, actor, OWNER_OF_REFUND, found, "refund")
    (row,) = await tx.all(FOUND, [found])
    return Seen(view(row), str(order["id"]), order["seq"])


async def list_of_payment(tx: Tx, actor: Actor, payment_id: str, cmd: PageOfRefunds) -> RefundPage:
    """The refunds of one payment, newest first. Raises NotFound, Forbidden."""
    _require_reader(actor)
    await owner(tx, actor, OWNER_OF_PAYMENT, as_uuid(payment_id, "payment"), "payment")
    return await _page(tx, ListRefunds(payment_id=payment_id, limit=cmd.limit, cursor=cmd.cursor), None)


async def list_refunds(tx: Tx, actor: Actor, cmd: ListRefunds) -> RefundPage:
    """All refunds, newest first. Raises Forbidden."""
    require_role(actor, BACK_OFFICE, "list refunds")
    return await _page(tx, cmd, actor.orders)


async def _page(tx: Tx, cmd: ListRefunds, order_ids: frozenset[str] | None) -> RefundPage:
    r = refunds.alias("r")
    query = select(r, literal_column(LINES.removesuffix(" as lines")).label("lines"))
    if order_ids is not None:
        query = query.where(r.c.order_id.cast(Text).in_(sorted(order_ids)))
    if isinstance(cmd.status, RefundStatus):
        query = query.where(r.c.status == cmd.status)
    if isinstance(cmd.order_id, str):
        query = query.where(r.c.order_id == uuid.UUID(cmd.order_id))
    if isinstance(cmd.payment_id, str):
        query = query.where(r.c.payment_id == uuid.UUID(cmd.payment_id))
    if isinstance(cmd.cursor, str):
        query = query.where(tuple_(r.c.created_at, r.c.id) < tuple_(*decode_cursor(cmd.cursor)))
    rows = await tx.select(query.order_by(r.c.created_at.desc(), r.c.id.desc()).limit(cmd.limit + 1))
    page = rows[: cmd.limit]
    more = len(rows) > cmd.limit
    return RefundPage(
        [view(row) for row in page], encode_cursor(page[-1]["created_at"], page[-1]["id"]) if more else None
    )


def _require_reader(actor: Actor) -> None:
    require_role(actor, READERS, "see refunds")
    if actor.tracks_only:
        require_role(actor, (), "see refunds with a tracking link")


async def owner(tx: Tx, actor: Actor, query: str, found: uuid.UUID, what: str) -> Row:
    """The order that `found` belongs to, if the actor sees it. Raises NotFound."""
    row = await tx.one(query, found)
    if row is None or not may_see(actor, str(row["id"]), row["customer_id"], None):
        raise NotFound(f"There is no such {what}.")
    return row


def as_uuid(text: str, what: str) -> uuid.UUID:
    """Raises NotFound: a text that is no UUID in its canonical form names nothing."""
    try:
        found = uuid.UUID(text)
    except ValueError:
        raise NotFound(f"There is no such {what}.") from None
    if str(found) != text:
        raise NotFound(f"There is no such {what}.")
    return found
