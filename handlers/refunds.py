"""The refunds desk: give money back, and try again what failed.

A refund is two short transactions around one gateway call. The first reserves the money under the order's lock, so that
no race gives back more than came; the gateway is asked under a key of ours that stays the same, so that asking twice is
one refund (handlers/refund_calls.py); the second books what became of it. The job `refund` carries on what a crash or a
silent gateway left open.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

from handlers import audit, orders
from handlers.book import open_book, open_refund
from handlers.book_rows import REFUND_ANEW
from handlers.context import Row, Tx
from handlers.jobs import enqueue
from handlers.ports import Done, Once
from handlers.refund_calls import Desk, Terms, ask
from handlers.refund_lists import FOUND, OWNER_OF_ORDER, OWNER_OF_PAYMENT, OWNER_OF_REFUND, as_uuid, owner, view
from models.base import Id, Later, Quantity, Reason, ShortText, Strict
from models.errors import (
    ApprovalRequired,
    Conflict,
    CurrencyMismatch,
    Invalid,
    MoneyMoved,
    NotFound,
    NotRefundable,
)
from models.money import EXPONENTS, MINOR_UNITS_MAX
from models.order import check_currency, require_role
from models.payment import GATEWAYS, Source
from models.refund import Channel, Money, Refund, RefundLine, RefundStatus, allot, line_share, spread
from models.user import BACK_OFFICE, STAFF, Actor, Role

# what is asked for


class AskedLine(Strict):
    """Units of an order's line."""

    line_id: Id
    quantity: Quantity


class CreateRefund(Strict):
    """Without `amount`, `lines` and `includeDelivery`: everything that may still go back."""

    SCHEMA: ClassVar[dict[str, Any]] = {
        "dependentRequired": {"amount": ["currency"], "currency": ["amount"]},
        "not": {"anyOf": [{"required": ["amount", "lines"]}, {"required": ["amount", "includeDelivery"]}]},
        "examples": [
            {"reason": "The dosa was cold", "amount": 5000, "currency": "INR"},
            {"reason": "One dosa was missing", "lines": [{"lineId": "1", "quantity": 1}]},
            {"reason": "Out of batter", "cancelOrder": True},
        ],
    }

    reason: Reason
    amount: (
        Annotated[int, Meta(ge=1, le=MINOR_UNITS_MAX, description="minor units of the currency: 12000 is ₹120")]
        | UnsetType
    ) = UNSET
    currency: (
        Annotated[
            str, Meta(min_length=3, max_length=3, description="ISO 4217", extra_json_schema={"enum": sorted(EXPONENTS)})
        ]
        | UnsetType
    ) = UNSET
    lines: Annotated[list[AskedLine], Meta(min_length=1, max_length=orders.LINES_MAX)] | UnsetType = UNSET
    include_delivery: (
        Annotated[bool, Meta(description="also what delivery cost, as far as it did not go back yet")] | UnsetType
    ) = UNSET
    cancel_order: Annotated[
        bool,
        Meta(
            description="cancel the order too: with `amount`, `lines` or `includeDelivery` only that goes back, without"
            " them all that was paid for it"
        ),
    ] = False
    channel: (
        Annotated[
            Channel,
            Meta(description="manual: it was paid back by other means, and is settled at once. Cash always is"),
        ]
        | UnsetType
    ) = UNSET
    reference: (
        Annotated[ShortText, Meta(description="of what was paid back by hand; without one, the refund's id")]
        | UnsetType
    ) = UNSET
    # there is no stock yet
    restock: Annotated[bool, Later] | UnsetType = UNSET

    @property
    def everything(self) -> bool:
        return self.amount is UNSET and self.lines is UNSET and not self.include_delivery


class RetryRefund(Strict):
    """Without `channel`: the gateway is asked again."""

    SCHEMA: ClassVar[dict[str, Any]] = {
        "examples": [{}, {"channel": "manual", "reference": "NEFT 4711"}],
        "dependentRequired": {"reference": ["channel"]},
    }

    channel: (
        Annotated[Channel, Meta(description="manual: it was paid back by other means; `reference` says which")]
        | UnsetType
    ) = UNSET
    reference: ShortText | UnsetType = UNSET


class RefundList(msgspec.Struct, frozen=True):
    """What one request gave back: a refund for each payment that it was taken from."""

    items: list[Refund]


# refunding


async def permit_payment(tx: Tx, actor: Actor, payment_id: str, cmd: CreateRefund) -> str:
    """The order of the payment. Raises NotFound; Forbidden: only the back office gives money back."""
    require_role(actor, BACK_OFFICE, "refund payments")
    return str((await owner(tx, actor, OWNER_OF_PAYMENT, as_uuid(payment_id, "payment"), "payment"))["id"])


async def permit_order(tx: Tx, actor: Actor, order_id: str, cmd: CreateRefund) -> str:
    """As `permit_payment`."""
    require_role(actor, BACK_OFFICE, "refund payments")
    return str((await owner(tx, actor, OWNER_OF_ORDER, as_uuid(order_id, "order"), "order"))["id"])


async def permit_retry(tx: Tx, actor: Actor, refund_id: str, cmd: RetryRefund) -> str:
    """As `permit_payment`, for staff alone."""
    require_role(actor, STAFF, "retry refunds")
    return str((await owner(tx, actor, OWNER_OF_REFUND, as_uuid(refund_id, "refund"), "refund"))["id"])


async def refund_payment(
    desk: Desk,
    once: Once,
    actor: Actor,
    payment_id: str,
    cmd: CreateRefund,
) -> Done:
    """Give back money of one payment.

    The answer is 201 once its gateway has answered, also when that was a refusal: then the refund is `failed`, and its
    money stays reserved until somebody retries it. 202: nobody knows yet; the job carries it on.

    Raises:
        Forbidden, NotFound, Invalid, CurrencyMismatch; ApprovalRequired: more than staff may give back alone;
        NotRefundable: more than came and is neither back, nor on its way, nor in dispute; IllegalMove: `cancelOrder`
        of an order that cannot be cancelled any more.
    """
    _check(cmd)
    async with desk.transactions() as tx:
        ids = list(await once.begun(tx))
        if not ids:
            order_id = await permit_payment(tx, actor, payment_id, cmd)
            await tx.one(LOCK, uuid.UUID(order_id))
            ids = await _begin(tx, actor, desk.terms, order_id, [uuid.UUID(payment_id)], cmd)
            await once.begin(tx, *ids)
    made, status = await _carry_out(desk, actor, ids)
    # a payment with several captures is refunded from the newest on, nearly always from one: the list has them all
    return Done(status, made[0])


async def refund_order(
    desk: Desk,
    once: Once,
    actor: Actor,
    order_id: str,
    cmd: CreateRefund,
) -> Done:
    """Give back money of an order, from its newest payment on: one refund for each payment that it takes.

    Answers and raises as `refund_payment`.
    """
    _check(cmd)
    async with desk.transactions() as tx:
        ids = list(await once.begun(tx))
        if not ids:
            await permit_order(tx, actor, order_id, cmd)
            await tx.one(LOCK, uuid.UUID(order_id))
            rows = await tx.all(PAYMENTS, uuid.UUID(order_id))
            ids = await _begin(tx, actor, desk.terms, order_id, [row["id"] for row in rows], cmd)
            await once.begin(tx, *ids)
    made, status = await _carry_out(desk, actor, ids)
    return Done(status, RefundList(made))


LOCK = "select from orders where id = $1 for update"
# those whose newest money came last are first
PAYMENTS = """
select p.id from payments p where p.order_id = $1 and p.captured > 0
order by (select max(c.at) from captures c where c.payment_id = p.id) desc, p.created_at desc, p.id"""
MONEY = """
select p.id, p.provider, p.currency, p.captured, p.refunded, p.reserved, p.disputed from payments p
where p.id = any ($1::uuid[]) order by array_position($1::uuid[], p.id)"""
LINES_BEFORE = """
select l.position, l.quantity, l.total, coalesce(sum(x.quantity), 0)::integer as units,
    coalesce(sum(x.amount), 0)::bigint as refunded
from order_lines l
left join (refund_lines x join refunds r on r.id = x.refund_id and r.order_id = $1) on x.position = l.position
where l.order_id = $1 group by l.position, l.quantity, l.total"""
DELIVERY = """
select o.currency,
    o.delivery - (select coalesce(sum(r.delivery), 0)::bigint from refunds r where r.order_id = o.id) as left
from orders o where o.id = $1"""

# by how much cash that was paid is less than what it settled
ROUNDED_AWAY = """
select coalesce(sum(c.applied - c.amount), 0)::bigint as minor
from captures c join payments p on p.id = c.payment_id where p.order_id = $1 and c.applied > c.amount"""


def _check(cmd: CreateRefund) -> None:
    """Raises Invalid: members that cannot stand together."""
    if cmd.restock is not UNSET:
        raise Invalid("There is no stock yet.", "/restock")
    if cmd.amount is not UNSET and cmd.currency is UNSET:
        raise Invalid("An amount needs its currency.", "/currency")
    if cmd.currency is not UNSET and cmd.amount is UNSET:
        raise Invalid("A currency needs its amount.", "/amount")
    if cmd.amount is not UNSET and cmd.lines is not UNSET:
        raise Invalid("Send an amount or lines, not both.", "/lines")
    if cmd.amount is not UNSET and cmd.include_delivery is not UNSET:
        raise Invalid("An amount is for everything; delivery is added to lines.", "/includeDelivery")
    if isinstance(cmd.currency, str):
        check_currency(cmd.currency)
    if isinstance(cmd.lines, list) and len({line.line_id for line in cmd.lines}) < len(cmd.lines):
        raise Invalid("A line is named twice.", "/lines")


class _Wanted(NamedTuple):
    """What is to go back, in minor units of the order's currency."""

    amount: int
    lines: list[RefundLine]


async def _begin(
    tx: Tx, actor: Actor, terms: Terms, order_id: str, payment_ids: Sequence[uuid.UUID], cmd: CreateRefund
) -> list[str]:
    """Reserve what `cmd` asks for from these payments, of which the first is emptied first. Their order is locked."""
    money = await tx.all(MONEY, list(payment_ids))
    refundable = [Money(row["captured"], row["refunded"], row["reserved"], row["disputed"]).refundable for row in money]
    wanted = await _wanted(tx, uuid.UUID(order_id), cmd, sum(refundable))
    if actor.role is Role.STAFF and wanted.amount > terms.staff_refund_max_minor:
        raise ApprovalRequired(
            f"Staff refunds {terms.staff_refund_max_minor} minor units at most; an admin may refund this."
        )
    if not wanted.amount:
        raise NotRefundable("There is nothing to refund.", sum(refundable))
    parts = spread(wanted.amount, refundable)
    ids = []
    for row, part, lines in zip(money, parts, allot(wanted.lines, parts), strict=True):
        if part:
            ids += await _reserve(tx, actor, terms, row, part, lines, cmd)
    if cmd.cancel_order:
        cancel = orders.Cancel(reason=cmd.reason)
        await orders.cancel(tx, actor, order_id, cancel, returns_money=cmd.everything)
    return ids


async def _wanted(tx: Tx, order_id: uuid.UUID, cmd: CreateRefund, refundable: int) -> _Wanted:
    """Raises NotFound, Invalid, CurrencyMismatch, NotRefundable."""
    delivery = await tx.one(DELIVERY, order_id)
    if delivery is None:
        raise NotFound("There is no such order.")
    if isinstance(cmd.amount, int):
        if cmd.currency != delivery["currency"]:
            raise CurrencyMismatch(f"The order's currency is {delivery['currency']}.")
        return _Wanted(cmd.amount, [])
    if cmd.everything:
        return _Wanted(refundable, [])
    lines: list[RefundLine] = []
    if isinstance(cmd.lines, list):
        before = {str(row["position"]): row for row in await tx.all(LINES_BEFORE, order_id)}
        for number, asked in enumerate(cmd.lines):
            line = before.get(asked.line_id)
            if line is None:
                raise Invalid("The order has no such line.", f"/lines/{number}/lineId")
            if asked.quantity > line["quantity"]:
                raise Invalid(f"The line has {line['quantity']} units.", f"/lines/{number}/quantity")
            if line["units"] + asked.quantity > line["quantity"]:
                left = line["quantity"] - line["units"]
                raise NotRefundable(f"Of line {asked.line_id}, {left} units may still be refunded.", refundable)
            share = line_share(line["total"], line["quantity"], line["units"], line["refunded"], asked.quantity)
            lines.append(RefundLine(line_id=asked.line_id, quantity=asked.quantity, amount=share))
    amount = sum(line.amount for line in lines) + (max(0, delivery["left"]) if cmd.include_delivery else 0)
    if amount > refundable:
        row = await tx.one(ROUNDED_AWAY, order_id)
        if row is not None and amount - refundable <= row["minor"]:
            return _Wanted(refundable, lines)  # they were paid in coins, of which there are no smaller ones
    return _Wanted(amount, lines)


async def _reserve(
    tx: Tx, actor: Actor, terms: Terms, row: Row, amount: int, lines: list[RefundLine], cmd: CreateRefund
) -> list[str]:
    """Reserve `amount` of one payment; by hand, settle it too."""
    by_hand = cmd.channel is Channel.MANUAL or row["provider"] not in GATEWAYS
    book = await open_book(tx, str(row["id"]))
    made = await book.reserve(
        amount,
        cmd.reason,
        channel=Channel.MANUAL if by_hand else Channel.ORIGINAL,
        requested_by=actor.who,
        lines=lines,
        delivery=0 if cmd.lines is UNSET and not cmd.include_delivery else amount - sum(line.amount for line in lines),
        after_s=terms.refund_ask_after_s,
    )
    ids = [str(one) for one in made]
    told = {"amount": amount, "currency": row["currency"], "reason": cmd.reason, "refunds": ids}
    await book.close(Source.STAFF, "refund.reserved", told, actor=actor)
    for refund_id in ids:
        await audit.record(tx, actor, "refund.create", f"refund:{refund_id}", None, told)
        if by_hand:
            await _settle_by_hand(tx, actor, refund_id, cmd.reference)
    return ids


BY_HAND = """
update refunds set channel = 'manual', gateway_refund_id = null,
    earlier = case when gateway_refund_id is null then earlier else array_append(earlier, gateway_refund_id) end
where id = $1"""


async def _settle_by_hand(tx: Tx, actor: Actor, refund_id: str, reference: str | UnsetType) -> None:
    """Book that a refund was paid back by other means: from the till."""
    noted = refund_id if isinstance(reference, UnsetType) else reference
    await tx.one(BY_HAND, uuid.UUID(refund_id))
    book, row = await open_refund(tx, refund_id)
    await book.settle_refund(row, RefundStatus.SUCCEEDED, None, reference=noted)
    await book.close(Source.STAFF, "refund.by_hand", {"refund": refund_id, "reference": noted}, actor=actor)


async def _carry_out(desk: Desk, actor: Actor, ids: Sequence[str]) -> tuple[list[Refund], int]:
    """Ask the gateways for refunds that are reserved; the refunds, and the status of the answer."""
    asked = [await ask(desk, refund_id, Source.STAFF, actor) for refund_id in ids]
    async with desk.transactions() as tx:
        rows = {str(row["id"]): view(row) for row in await tx.all(FOUND, [uuid.UUID(one) for one in ids])}
    return [rows[one] for one in ids], 201 if all(one.answered for one in asked) else 202


# what failed


async def retry(
    desk: Desk,
    once: Once,
    actor: Actor,
    refund_id: str,
    cmd: RetryRefund,
) -> Done:
    """Ask for a refund that failed anew, under a new key; or note that it was paid back by other means. One that is
    open is asked about now. The answer is 200 once the gateway has answered, and 202 while nobody knows.

    Raises:
        Forbidden, NotFound; Invalid: `manual` without a reference; MoneyMoved: it has succeeded; Conflict: it cannot be
        settled by hand while the gateway may still carry it out.
    """
    by_hand = cmd.channel is Channel.MANUAL
    if by_hand and cmd.reference is UNSET:
        raise Invalid("What was paid back by hand needs a reference.", "/reference")
    if not by_hand and cmd.reference is not UNSET:
        raise Invalid("A reference is for what was paid back by hand.", "/reference")
    async with desk.transactions() as tx:
        if not await once.begun(tx):
            await permit_retry(tx, actor, refund_id, cmd)
            await _retry(tx, actor, desk.terms, refund_id, cmd, by_hand)
            await once.begin(tx, refund_id)
    (made,), status = await _carry_out(desk, actor, [refund_id])
    return Done(200 if status == 201 else status, made)


async def _retry(tx: Tx, actor: Actor, terms: Terms, refund_id: str, cmd: RetryRefund, by_hand: bool) -> None:
    book, row = await open_refund(tx, refund_id)
    before = {"status": row.status, "attempt": row.attempt}
    if row.status is RefundStatus.SUCCEEDED:
        raise MoneyMoved("This refund has succeeded.")
    if book.payment.provider not in GATEWAYS or by_hand:
        if row.status is not RefundStatus.FAILED and book.payment.provider in GATEWAYS:
            raise Conflict("The gateway may still carry this refund out; settle it by hand when it has failed.")
        await _settle_by_hand(tx, actor, refund_id, cmd.reference)
        await audit.record(tx, actor, "refund.by_hand", f"refund:{refund_id}", before, cmd)
        return
    if row.status is RefundStatus.FAILED:
        await tx.one(REFUND_ANEW, row.id, tx.now())
        await book.close(Source.STAFF, "refund.retried", {"refund": refund_id, "attempt": row.attempt + 1}, actor=actor)
    await enqueue(tx, "refund", refund_id, after_s=terms.refund_ask_after_s)
    await audit.record(tx, actor, "refund.retry", f"refund:{refund_id}", before, None)
