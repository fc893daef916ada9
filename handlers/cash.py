"""The cash desk: cash that is taken at the till or at the door, and what agents carry and hand over."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, ClassVar, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

from handlers import audit
from handlers.book import Book, Terms, open_order, stop_payments
from handlers.book_rows import PaymentRow, view
from handlers.checkout import withdraw_intents
from handlers.context import Row, Tx
from handlers.orders import order_uuid
from handlers.payments import CLOSED, AskedAmount, CurrencyCode, Desk
from models.base import Id, LongText, Strict, Time, UuidText, View, rfc3339
from models.cash import Taken, Units, take
from models.errors import CurrencyMismatch, Forbidden, NotFound, OrderClosed
from models.ledger import TILL, agent_cash
from models.order import Status, check_currency, require_all_orders, require_role
from models.payment import Payment, PaymentStatus, Provider, Source
from models.user import STAFF, Actor, Role


class Rules(NamedTuple):
    """How a deployment takes cash."""

    units: Units
    partial: bool
    """Less than what is due may be taken."""


# cash for an order


class TakeCash(Strict):
    SCHEMA: ClassVar[dict[str, Any]] = {
        "examples": [
            {
                "orderId": "9e2c8d3c-4a8a-4bb5-8c06-9f4f6f0f5d11",
                "amount": 25200,
                "currency": "INR",
                "tendered": 50000,
            }
        ]
    }

    order_id: Annotated[str, Meta(extra_json_schema={"format": "uuid"})]
    amount: AskedAmount
    currency: CurrencyCode
    tendered: (
        Annotated[AskedAmount, Meta(description="what was handed over; the answer says the change")] | UnsetType
    ) = UNSET
    note: LongText | UnsetType = UNSET


# Nobody is to pay what the cash has paid. Money that comes all the same goes back by itself.
SUPERSEDE = """
update payments set superseded = true, updated_at = $2
where order_id = $1 and provider in ('razorpay', 'stripe')
    and status in ('pending', 'processing', 'authorized', 'unknown')"""


async def make_room(desk: Desk, actor: Actor, cmd: TakeCash, rules: Rules) -> None:
    """What comes before `take_cash`, outside its transaction: let nobody pay by a gateway what the cash will pay.

    Raises:
        What `take_cash` raises; then no gateway was asked.
    """
    async with desk.transactions() as tx:
        await _judge(tx, actor, cmd, rules)
    await withdraw_intents(desk, actor, cmd.order_id)


async def take_cash(tx: Tx, actor: Actor, cmd: TakeCash, rules: Rules, terms: Terms) -> Payment:
    """Confirm that cash was taken for an order: by staff into the till, by the assigned agent while the order is out.

    Raises:
        NotFound, Forbidden; OrderClosed; AlreadyPaid: nothing is due; CurrencyMismatch; AmountMismatch: not what is due
            once it is rounded to coins, or less was handed over.
    """
    book, taken, account = await _judge(tx, actor, cmd, rules)
    order, due = book.order, book.order.due
    note = None if isinstance(cmd.note, UnsetType) else cmd.note
    now, payment_id = tx.now(), uuid.UUID(tx.new_id())
    await tx.one(SUPERSEDE, order.id, now)
    await stop_payments(tx, book.order_id)
    payment = PaymentRow(
        id=payment_id,
        order_id=order.id,
        customer_id=order.customer_id,
        provider=Provider.CASH,
        method=Provider.CASH,
        status=PaymentStatus.PENDING,
        amount=taken.amount,
        expected=taken.amount,
        currency=order.currency,
        reference=str(payment_id),
        description=note,
        confirmed_by=actor.sub,
        tendered=_tendered(cmd),
        created_at=now,
        updated_at=now,
        status_at=now,
    )
    book.start(payment, terms)
    await book.take_cash(taken, account)
    said = {"orderId": book.order_id, "amount": taken.amount, "currency": order.currency, "account": account}
    await book.close(Source.STAFF, "cash", {**said, "tendered": payment.tendered}, actor=actor, note=note)
    await audit.record(tx, actor, "payment.cash", f"payment:{payment_id}", {"due": due}, {**said, "due": order.due})
    return msgspec.structs.replace(view(book.payment), change=taken.change)


async def _judge(tx: Tx, actor: Actor, cmd: TakeCash, rules: Rules) -> tuple[Book, Taken, str]:
    """The order, locked; what of it is paid; and the account where the cash then lies."""
    require_role(actor, STAFF | {Role.AGENT}, "take cash")
    if not actor.reaches(cmd.order_id):
        raise NotFound("There is no such order.")
    tx.atomically()
    book = await open_order(tx, str(order_uuid(cmd.order_id)))
    account, order = _account(actor, book), book.order
    if order.status in CLOSED:
        raise OrderClosed(f"The order is {order.status}; give the cash back.")
    if cmd.currency != order.currency:
        raise CurrencyMismatch(f"The order is in {order.currency}, not in {cmd.currency}.")
    taken = take(order.due, order.currency, cmd.amount, _tendered(cmd), rules.units, partial=rules.partial)
    return book, taken, account


def _tendered(cmd: TakeCash) -> int | None:
    return None if isinstance(cmd.tendered, UnsetType) else cmd.tendered


def _account(actor: Actor, book: Book) -> str:
    """Where the cash lies once this actor has it.

    Raises:
        NotFound: not the agent's order. Forbidden: it is not out for delivery.
    """
    if actor.role is not Role.AGENT:
        return TILL
    if book.order.agent_id != actor.sub:
        raise NotFound("There is no such order.")
    if book.order.status is not Status.OUT_FOR_DELIVERY:
        raise Forbidden(f"The order is {book.order.status}; an agent takes cash while it is out for delivery.")
    return agent_cash(actor.sub)


# what agents carry


class ReadAgentCash(Strict):
    """Newest entries first; without `currency`, the one that the agent was last given or handed over."""

    currency: CurrencyCode | UnsetType = UNSET
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: Annotated[str, Meta(pattern=r"^[0-9]{1,18}\Z")] | UnsetType = UNSET


class CashEntry(View):
    at: Time
    kind: Annotated[str, Meta(description="cash: taken for an order; handover: given to the till")]
    amount: Annotated[int, Meta(description="minor units; negative: the agent carries less")]
    order_id: UuidText | None = None
    note: str | None = None


class AgentCash(View):
    """What an agent carries. `currency` is absent when none was asked for and there never was any cash."""

    balance: Annotated[int, Meta(description="minor units of the currency")]
    entries: list[CashEntry]
    currency: str | None = None
    next_cursor: Annotated[str | None, Meta(description="`cursor` of older entries; absent when there are none")] = None


CARRIED = """
with held as (
    select currency, sum(amount)::bigint as balance from ledger_rows
    where account = $1 and ($2::text is null or currency = $2) group by currency order by max(id) desc limit 1
)
select h.currency, h.balance, r.id, r.at, r.kind, r.amount, r.order_id, r.note
from held h left join lateral (
    select * from ledger_rows r
    where r.account = $1 and r.currency = h.currency and ($3::bigint is null or r.id < $3) order by r.id desc limit $4
) r on true
order by r.id desc"""


async def read_agent_cash(tx: Tx, actor: Actor, agent_id: str, cmd: ReadAgentCash) -> AgentCash:
    """What an agent carries, for staff and the agent.

    Raises:
        Forbidden; NotFound: another agent's; Invalid: no such currency.
    """
    require_role(actor, STAFF | {Role.AGENT}, "see the cash of agents")
    require_all_orders(actor, "see the cash of agents")
    if (actor.role is Role.AGENT and actor.sub != agent_id) or "\0" in agent_id:
        raise NotFound("There is no such agent.")
    currency = None if isinstance(cmd.currency, UnsetType) else check_currency(cmd.currency)
    before = None if isinstance(cmd.cursor, UnsetType) else int(cmd.cursor)
    found = await tx.all(CARRIED, agent_cash(agent_id), currency, before, cmd.limit + 1)
    if not found:
        return AgentCash(currency=currency, balance=0, entries=[])
    rows = [row for row in found if row["id"] is not None]
    page = rows[: cmd.limit]
    return AgentCash(
        currency=found[0]["currency"],
        balance=found[0]["balance"],
        entries=[_entry(row) for row in page],
        next_cursor=str(page[-1]["id"]) if len(rows) > cmd.limit else None,
    )


def _entry(row: Row) -> CashEntry:
    return CashEntry(
        at=rfc3339(row["at"]),
        kind=row["kind"],
        amount=row["amount"],
        order_id=str(row["order_id"]) if row["order_id"] else None,
        note=row["note"],
    )


class HandOver(Strict):
    SCHEMA: ClassVar[dict[str, Any]] = {"examples": [{"agentId": "rider-7", "amount": 25200, "currency": "INR"}]}

    agent_id: Id
    amount: AskedAmount
    currency: CurrencyCode
    note: LongText | UnsetType = UNSET


class Handover(View):
    """Amounts: minor units of the currency."""

    id: UuidText
    expected: Annotated[int, Meta(description="what the agent carried")]
    difference: Annotated[int, Meta(description="what was handed over less that; what is missing stays the agent's")]


LOCK_ACCOUNT = "select pg_advisory_xact_lock(hashtextextended($1, 0))"
# a statement of its own, after the lock: it sees what the holder before us has committed
BALANCE = "select coalesce(sum(amount), 0)::bigint as balance from ledger_rows where account = $1 and currency = $2"
HAND_OVER = """
insert into ledger_rows (entry, at, kind, account, currency, amount, note)
values ($1, $2, 'handover', $3, $4, -$5::bigint, $6), ($1, $2, 'handover', $7, $4, $5::bigint, $6)"""


async def hand_over(tx: Tx, actor: Actor, cmd: HandOver) -> Handover:
    """Take an agent's cash into the till. It is booked as it was counted: a difference stays on the agent's account.

    Raises:
        Forbidden; Invalid: no such currency.
    """
    require_role(actor, STAFF, "take over cash")
    require_all_orders(actor, "take over cash")
    currency, account = check_currency(cmd.currency), agent_cash(cmd.agent_id)
    note = None if isinstance(cmd.note, UnsetType) else cmd.note
    tx.atomically()
    await tx.one(LOCK_ACCOUNT, f"{account} {currency}")
    row = await tx.one(BALANCE, account, currency)
    assert row is not None
    expected: int = row["balance"]
    entry = tx.new_id()
    await tx.one(HAND_OVER, uuid.UUID(entry), tx.now(), account, currency, cmd.amount, note, TILL)
    await audit.record(
        tx,
        actor,
        "cash.handover",
        f"agent:{cmd.agent_id}",
        {"currency": currency, "balance": expected},
        {"currency": currency, "balance": expected - cmd.amount, "amount": cmd.amount, "handoverId": entry},
    )
    return Handover(id=entry, expected=expected, difference=cmd.amount - expected)
