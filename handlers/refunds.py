"""The refunds desk: give money back, look at what was given back, and try again what failed.

A refund is two short transactions around one gateway call. The first reserves the money under the order's lock, so that
no race gives back more than came; the gateway is asked under a key of ours that stays the same, so that asking twice is
one refund; the second books what became of it. The job `refund` carries on what a crash or a silent gateway left open.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import msgspec
import structlog
from msgspec import UNSET, Meta, UnsetType
from sqlalchemy import Text, literal_column, select, tuple_

from handlers import audit, orders
from handlers.context import Row, Tx
from handlers.cursors import decode_cursor, encode_cursor
from handlers.jobs import NotYet, enqueue
from handlers.ports import (
    Done,
    Gateway,
    GatewayFailed,
    GatewayRefused,
    Gateways,
    GatewayUnknown,
    Known,
    NewRefund,
    Once,
    Transactions,
)
from handlers.settlement import open_book, open_refund, tell_refund
from models.base import Id, Later, Quantity, Reason, ShortText, Strict, rfc3339
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
from models.order import check_currency, may_see, require_role
from models.payment import GATEWAYS, Capture, Failure, Provider, RefundNews, RefundReport, Source
from models.refund import (
    Cause,
    Channel,
    Money,
    Refund,
    RefundedLine,
    RefundStatus,
    allot,
    line_share,
    refunds,
    spread,
)
from models.refund import after as after_news
from models.user import BACK_OFFICE, STAFF, Actor, Role

log = structlog.get_logger()

READERS = BACK_OFFICE | {Role.CUSTOMER, Role.GUEST}

ASK_AGAIN_MAX_S = 600
"""Longest pause between two questions about a refund that is not settled."""

SETTLED = frozenset({RefundStatus.SUCCEEDED, RefundStatus.FAILED})


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What the refunds desk is set to; settings of the same names."""

    staff_refund_max_minor: int
    refund_ask_after_s: int


class Desk(NamedTuple):
    """What the verbs need of the world."""

    transactions: Transactions
    gateways: Gateways
    terms: Terms


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
    next_cursor: Annotated[str | None, Meta(description="`cursor` of the next page; null on the last one")] = None


class RefundList(msgspec.Struct, frozen=True):
    """What one request gave back: a refund for each payment that it was taken from."""

    items: list[Refund]


# reading


LINES = """(select json_agg(json_build_object('lineId', l.position::text, 'quantity', l.quantity, 'amount', l.amount)
    order by l.position)::text from refund_lines l where l.refund_id = r.id) as lines"""
FOUND = f"""
select r.*, {LINES}, o.customer_id from refunds r join orders o on o.id = r.order_id
where r.id = any ($1::uuid[]) order by r.created_at desc, r.id desc"""
OWNER_OF_PAYMENT = """
select o.id, o.customer_id from payments p join orders o on o.id = p.order_id where p.id = $1"""
OWNER_OF_ORDER = "select o.id, o.customer_id from orders o where o.id = $1"
OWNER_OF_REFUND = """
select o.id, o.customer_id from refunds r join orders o on o.id = r.order_id where r.id = $1"""

_decode_lines = msgspec.json.Decoder(list[RefundedLine]).decode


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


async def read(tx: Tx, actor: Actor, refund_id: str) -> Refund:
    """Raises NotFound: no such refund, or of somebody else's order. Forbidden."""
    _require_reader(actor)
    found = _uuid(refund_id, "refund")
    await _seen(tx, actor, OWNER_OF_REFUND, found, "refund")
    (row,) = await tx.all(FOUND, [found])
    return view(row)


async def list_of_payment(tx: Tx, actor: Actor, payment_id: str, cmd: PageOfRefunds) -> RefundPage:
    """The refunds of one payment, newest first. Raises NotFound, Forbidden."""
    _require_reader(actor)
    await _seen(tx, actor, OWNER_OF_PAYMENT, _uuid(payment_id, "payment"), "payment")
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


async def _seen(tx: Tx, actor: Actor, owner: str, found: uuid.UUID, what: str) -> str:
    """The id of the order that `found` belongs to, if the actor sees it. Raises NotFound."""
    row = await tx.one(owner, found)
    if row is None or not may_see(actor, str(row["id"]), row["customer_id"], None):
        raise NotFound(f"There is no such {what}.")
    return str(row["id"])


def _uuid(text: str, what: str) -> uuid.UUID:
    """Raises NotFound: a text that is no UUID in its canonical form names nothing."""
    try:
        found = uuid.UUID(text)
    except ValueError:
        raise NotFound(f"There is no such {what}.") from None
    if str(found) != text:
        raise NotFound(f"There is no such {what}.")
    return found


# refunding


async def permit_payment(tx: Tx, actor: Actor, payment_id: str, cmd: CreateRefund) -> str:
    """The order of the payment. Raises NotFound; Forbidden: only the back office gives money back."""
    require_role(actor, BACK_OFFICE, "refund payments")
    return await _seen(tx, actor, OWNER_OF_PAYMENT, _uuid(payment_id, "payment"), "payment")


async def permit_order(tx: Tx, actor: Actor, order_id: str, cmd: CreateRefund) -> str:
    """As `permit_payment`."""
    require_role(actor, BACK_OFFICE, "refund payments")
    return await _seen(tx, actor, OWNER_OF_ORDER, _uuid(order_id, "order"), "order")


async def permit_retry(tx: Tx, actor: Actor, refund_id: str, cmd: RetryRefund) -> str:
    """As `permit_payment`; for staff."""
    require_role(actor, STAFF, "retry refunds")
    return await _seen(tx, actor, OWNER_OF_REFUND, _uuid(refund_id, "refund"), "refund")


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
    lines: list[RefundedLine]


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
    lines: list[RefundedLine] = []
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
            lines.append(RefundedLine(line_id=asked.line_id, quantity=asked.quantity, amount=share))
    amount = sum(line.amount for line in lines) + (max(0, delivery["left"]) if cmd.include_delivery else 0)
    return _Wanted(amount, lines)


async def _reserve(
    tx: Tx, actor: Actor, terms: Terms, row: Row, amount: int, lines: list[RefundedLine], cmd: CreateRefund
) -> list[str]:
    """Reserve `amount` of one payment; by hand, settle it too."""
    by_hand = cmd.channel is Channel.MANUAL or row["provider"] not in GATEWAYS
    book = await open_book(tx, str(row["id"]))
    made = await book.reserve(
        amount,
        cmd.reason,
        channel=Channel.MANUAL if by_hand else Channel.ORIGINAL,
        requested_by=actor.who,
        lines=[(int(line.line_id), line.quantity, line.amount) for line in lines],
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


# the gateway


class _Asking(NamedTuple):
    """A refund as its gateway is asked for it, and what is known of it."""

    new: NewRefund
    provider: Provider
    status: RefundStatus
    gateway_refund_id: str | None
    earlier: Sequence[str]
    updated_at: dt.datetime

    @property
    def answered(self) -> bool:
        """Whether the gateway has said what became, or becomes, of it."""
        return self.status in SETTLED or self.gateway_refund_id is not None


ASKING = """
select r.*, p.order_id as order_id, p.gateway_order_id, p.gateway_payment_id, p.reference as payment_reference,
    p.amount as payment_amount, p.currency as payment_currency, p.capture
from refunds r join payments p on p.id = r.payment_id where r.id = $1"""


async def _asking(tx: Tx, refund_id: str) -> _Asking:
    row = await tx.one(ASKING, uuid.UUID(refund_id))
    if row is None:
        raise NotFound("There is no such refund.")
    known = Known(
        payment_id=str(row["payment_id"]),
        gateway_order_id=row["gateway_order_id"] or "",
        gateway_payment_id=row["gateway_payment_id"],
        reference=row["payment_reference"],
        amount=row["payment_amount"],
        currency=row["payment_currency"],
        capture=Capture(row["capture"]),
    )
    new = NewRefund(
        refund_id=refund_id,
        attempt=row["attempt"],
        payment=known,
        capture_key=row["capture_key"],
        amount=row["amount"],
        currency=row["currency"],
        reason=row["reason"],
    )
    return _Asking(
        new,
        Provider(row["provider"]),
        RefundStatus(row["status"]),
        row["gateway_refund_id"],
        row["earlier"],
        row["updated_at"],
    )


async def _ask(desk: Desk, refund_id: str, source: Source, actor: Actor | None) -> _Asking:
    """Ask the gateway for a refund, or about it, unless it is settled; what is known of it then.

    Never raises for what the gateway does: what stays open is asked about again by the job.
    """
    async with desk.transactions() as tx:
        asking = await _asking(tx, refund_id)
    gateway = desk.gateways.get(asking.provider)
    if asking.status in SETTLED or gateway is None:
        return asking
    news = await _news(gateway, asking)
    if news is None:
        return asking
    if after_news(asking.status, news.report) is asking.status and news.gateway_refund_id in (
        "",
        asking.gateway_refund_id,
    ):
        return asking
    async with desk.transactions() as tx:
        await tell_refund(tx, refund_id, asking.new.attempt, news, source, actor=actor)
    async with desk.transactions() as tx:
        return await _asking(tx, refund_id)


async def _news(gateway: Gateway, asking: _Asking) -> RefundNews | None:
    """What the gateway says of the refund; None: nothing that is known for sure."""
    new = asking.new
    try:
        if asking.status is RefundStatus.PROCESSING:
            told = await gateway.fetch_refund(new, asking.gateway_refund_id)
            if told is not None and told.gateway_refund_id not in asking.earlier:
                return told
            if asking.gateway_refund_id is not None:
                log.warning("refund_not_found", refund_id=new.refund_id, gateway_refund_id=asking.gateway_refund_id)
                return None
    except GatewayFailed as error:
        log.warning("refund_open", refund_id=new.refund_id, error=str(error))
        return None
    try:
        told = await gateway.refund(new)
    except GatewayRefused as error:
        if _may_pass(error):
            log.warning("refund_open", refund_id=new.refund_id, error=str(error))
            return None
        log.warning("refund_refused", refund_id=new.refund_id, error=str(error))
        return _said(new, RefundReport.FAILED, error.failure)
    except GatewayUnknown as error:
        log.warning("refund_unknown", refund_id=new.refund_id, error=str(error))
        return _said(new, RefundReport.PROCESSING)
    except GatewayFailed as error:
        log.warning("refund_open", refund_id=new.refund_id, error=str(error))
        return None
    if told.gateway_refund_id in asking.earlier:  # it shows the attempt that failed instead of a new one
        return _said(new, RefundReport.FAILED, told.failure)
    return told


def _may_pass(error: GatewayRefused) -> bool:
    """Whether the same request may be accepted later: our key was refused (401, 403), we asked too often (429), or the
    same request is still being carried out (409)."""
    return error.failure.retryable or error.status in (401, 403, 409, 429)


def _said(new: NewRefund, report: RefundReport, failure: Failure | None = None) -> RefundNews:
    """What we say ourselves of a refund that has no id of the gateway's."""
    return RefundNews(
        gateway_refund_id="",
        report=report,
        amount=new.amount,
        currency=new.currency,
        refund_id=new.refund_id,
        failure=failure,
    )


async def _carry_out(desk: Desk, actor: Actor, ids: Sequence[str]) -> tuple[list[Refund], int]:
    """Ask the gateways for refunds that are reserved; the refunds, and the status of the answer."""
    asked = [await _ask(desk, refund_id, Source.STAFF, actor) for refund_id in ids]
    async with desk.transactions() as tx:
        rows = {str(row["id"]): view(row) for row in await tx.all(FOUND, [uuid.UUID(one) for one in ids])}
    return [rows[one] for one in ids], 201 if all(one.answered for one in asked) else 202


async def carry_on(
    desk: Desk,
    refund_id: str,
    between: Callable[[float, float], float],
) -> None:
    """The job `refund`: ask the gateway for a refund that it was not asked for, or about one that it has not settled.

    `between(low, high)` draws the pause, so that those which were open together do not all come back together.

    Raises:
        NotYet: it is still open. The pause grows with the time for which it has been.
    """
    asked = await _ask(desk, refund_id, Source.RECONCILIATION, None)
    if asked.status in SETTLED:
        return
    async with desk.transactions() as tx:
        open_s = (tx.now() - asked.updated_at).total_seconds()
    pause_s = min(ASK_AGAIN_MAX_S, max(desk.terms.refund_ask_after_s, open_s))
    raise NotYet(between(pause_s / 2, pause_s))


# what failed


RETRY = """
update refunds set status = 'pending', attempt = attempt + 1, failure = null, gateway_refund_id = null, updated_at = $2,
    earlier = case when gateway_refund_id is null then earlier else array_append(earlier, gateway_refund_id) end
where id = $1"""


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
        await tx.one(RETRY, row.id, tx.now())
        await book.close(Source.STAFF, "refund.retried", {"refund": refund_id, "attempt": row.attempt + 1}, actor=actor)
    await enqueue(tx, "refund", refund_id, after_s=terms.refund_ask_after_s)
    await audit.record(tx, actor, "refund.retry", f"refund:{refund_id}", before, None)
