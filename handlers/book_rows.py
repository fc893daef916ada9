"""The rows of an order's money, as the book reads and writes them, and its statements."""

from __future__ import annotations

import datetime as dt
import uuid

import msgspec

from handlers.context import Row
from models.base import rfc3339
from models.order import Fulfilment, PaymentMethod, PaymentSummary, Status, due, payment_status, waits_for_payment
from models.payment import (
    Attention,
    Capture,
    Failure,
    Payment,
    PaymentStatus,
    Provider,
)
from models.refund import Cause, Channel, Money, RefundStatus


class OrderMoney(msgspec.Struct):
    """What the row of an order says of its money. Amounts: minor units of `currency`."""

    id: uuid.UUID
    status: Status
    fulfilment: Fulfilment
    payment_method: PaymentMethod
    currency: str
    total: int
    paid: int
    refunded: int
    paying: bool
    seq: int
    customer_id: str | None
    agent_id: str | None
    created_at: dt.datetime
    expires_at: dt.datetime | None
    expired_at: dt.datetime | None
    status_reason: str | None

    @property
    def due(self) -> int:
        return due(self.status, self.total, self.paid)

    @property
    def waits(self) -> bool:
        """Whether it is confirmed as soon as it is paid."""
        return waits_for_payment(self.status, self.payment_method, self.due)

    def summary(self) -> PaymentSummary:
        status = payment_status(self.total, self.paid, self.refunded, paying=self.paying)
        return PaymentSummary(
            method=self.payment_method, status=status, due=self.due, paid=self.paid, refunded=self.refunded
        )


class PaymentRow(msgspec.Struct, kw_only=True):
    """A row of `payments`. Amounts: minor units of `currency`."""

    id: uuid.UUID
    order_id: uuid.UUID
    provider: Provider
    status: PaymentStatus
    amount: int
    currency: str
    reference: str
    created_at: dt.datetime
    updated_at: dt.datetime
    status_at: dt.datetime
    expected: int
    purpose: str = "order"
    customer_id: str | None = None
    method: str | None = None
    capture: Capture = Capture.AUTOMATIC
    captured: int = 0
    refunded: int = 0
    reserved: int = 0
    disputed: int = 0
    gateway_order_id: str | None = None
    gateway_payment_id: str | None = None
    description: str | None = None
    metadata: str = "{}"
    return_url: str | None = None
    failure: str | None = None
    attention: Attention | None = None
    superseded: bool = False
    attempted: bool = False
    confirmed_by: str | None = None
    tendered: int | None = None
    completed_at: dt.datetime | None = None

    @property
    def money(self) -> Money:
        return Money(self.captured, self.refunded, self.reserved, self.disputed)

    @property
    def has_completed(self) -> bool:
        return self.completed_at is not None


COLUMNS = PaymentRow.__struct_fields__

MUTABLE = [
    name
    for name in COLUMNS
    if name not in ("id", "order_id", "provider", "amount", "currency", "reference", "created_at", "purpose")
]

INSERT_PAYMENT = (
    f"insert into payments ({', '.join(COLUMNS)}) values ({', '.join(f'${n}' for n in range(1, len(COLUMNS) + 1))})"
)

UPDATE_PAYMENT = f"update payments set {', '.join(f'{name} = ${n}' for n, name in enumerate(MUTABLE, 2))} where id = $1"


def read_row(row: Row) -> PaymentRow:
    """A row of `payments`, all its columns selected."""
    return msgspec.convert({name: row[name] for name in COLUMNS}, PaymentRow, builtin_types=(uuid.UUID, dt.datetime))


def view(row: PaymentRow) -> Payment:
    """The payment as it is shown."""
    return Payment(
        id=str(row.id),
        purpose=row.purpose,
        order_id=str(row.order_id),
        customer_id=row.customer_id,
        provider=row.provider,
        method=row.method,
        status=row.status,
        amount=row.amount,
        currency=row.currency,
        captured=row.captured,
        refunded=row.refunded,
        refundable=row.money.refundable,
        disputed=row.disputed,
        gateway_order_id=row.gateway_order_id,
        gateway_payment_id=row.gateway_payment_id,
        reference=row.reference,
        description=row.description,
        metadata=msgspec.json.decode(row.metadata, type=dict[str, str]),
        failure=msgspec.json.decode(row.failure, type=Failure) if row.failure else None,
        attention=row.attention,
        confirmed_by=row.confirmed_by,
        created_at=rfc3339(row.created_at),
        completed_at=rfc3339(row.completed_at) if row.completed_at else None,
    )


LOCK_ORDER = f"select {', '.join(OrderMoney.__struct_fields__)} from orders where id = $1 for update"

LOCK_ORDER_OF = f"""
select {", ".join(OrderMoney.__struct_fields__)} from orders
where id = (select order_id from payments where id = $1) for update"""

# A statement of its own, after the lock: it sees what the holder before us has committed.
READ_PAYMENT = """
select p.*, exists(select from payments q where q.order_id = p.order_id and q.id <> p.id
    and q.status in ('processing', 'authorized', 'unknown')) as others_moving
from payments p where p.id = $1"""

MOVING_ON = """
select exists(select from payments where order_id = $1
    and status in ('processing', 'authorized', 'unknown')) as moving"""


def order_of(row: Row) -> OrderMoney:
    names = OrderMoney.__struct_fields__
    return msgspec.convert({name: row[name] for name in names}, OrderMoney, builtin_types=(uuid.UUID, dt.datetime))


CAPTURED = "select payment_id, amount, currency, applied, fee from captures where provider = $1 and key = $2"

ADD_CAPTURE = """
insert into captures (provider, key, payment_id, amount, currency, applied, fee, at)
values ($1, $2, $3, $4, $5, $6, $7, $8)"""

SET_FEE = "update captures set fee = $3 where provider = $1 and key = $2"

# newest first; `left` is what neither has gone back nor is about to
CAPTURES_LEFT = """
select c.key, c.currency, c.amount - coalesce(sum(r.amount), 0)::bigint as left,
    c.applied - coalesce(sum(r.applied), 0)::bigint as applied_left
from captures c left join refunds r on r.provider = c.provider and r.capture_key = c.key
where c.payment_id = $1 group by c.provider, c.key order by c.at desc, c.key"""

ADD_REFUND = """
insert into refunds (id, order_id, payment_id, provider, capture_key, amount, currency, status, reason, cause, applied,
    delivery, channel, reference, requested_by, created_at, updated_at)
values ($1, $2, $3, $4, $5, $6, $7, 'pending', $8, $9, $10, $11, $12, $13, $14, $15, $15)"""

ADD_REFUND_LINES = """
insert into refund_lines (refund_id, position, quantity, amount)
select $1, * from unnest($2::integer[], $3::integer[], $4::bigint[])"""

REFUND_COLUMNS = """id, payment_id, capture_key, amount, currency, status, cause, applied, delivery, channel,
    gateway_refund_id, earlier, attempt"""

REFUNDS_OF = f"select {REFUND_COLUMNS} from refunds where payment_id = $1 order by created_at, id"

SET_REFUND = """
update refunds set status = $2, gateway_refund_id = $3, failure = $4, settled_at = $5, updated_at = $6, reference = $7
where id = $1"""

# begun anew after it failed, by us or by somebody else: another refund for the gateway, and another key
REFUND_ANEW = """
update refunds set status = 'pending', attempt = attempt + 1, failure = null, gateway_refund_id = null, updated_at = $2,
    earlier = case when gateway_refund_id is null then earlier else array_append(earlier, gateway_refund_id) end
where id = $1"""

REFUND_LINES = """
update order_lines l set refunded = l.refunded + $3 * x.amount
from refund_lines x where x.refund_id = $2 and l.order_id = $1 and l.position = x.position
returning l.position, l.refunded"""

DISPUTE = "select status, amount, currency from disputes where provider = $1 and gateway_dispute_id = $2"

SET_DISPUTE = """
insert into disputes (provider, gateway_dispute_id, payment_id, status, amount, currency, at)
values ($1, $2, $3, $4, $5, $6, $7)
on conflict (provider, gateway_dispute_id) do update set status = excluded.status"""

WRITE_ORDER = """
with told as (
    insert into order_events (order_id, seq, type, at, body)
    select $1, e.seq, e.type, $2, e.body from unnest($3::integer[], $4::text[], $5::text[]) as e(seq, type, body))
update orders set status = $6, paid = $7, refunded = $8, paying = $9, seq = $10, expires_at = $11, expired_at = $12,
    status_reason = $13, payment_method = $14, updated_at = $2
where id = $1"""

WRITE_LEDGER = """
insert into ledger_rows (entry, at, kind, account, currency, amount, order_id, payment_id, refund_id, note)
select x.entry, $1, x.kind, x.account, x.currency, x.amount, $2, $3, x.refund, $4
from unnest($5::uuid[], $6::text[], $7::text[], $8::text[], $9::bigint[], $10::uuid[])
    as x(entry, kind, account, currency, amount, refund)"""

WRITE_HISTORY = """
with lifecycle as (
    insert into lifecycle_events (type, at, order_id, payment_id, data)
    select x, $2, $3, $1, $4 from unnest($5::text[]) as x)
insert into payment_inputs (payment_id, at, source, actor, kind, before, after, detail)
values ($1, $2, $6, $7, $8, $9, $10, $11)"""

# What a worker tries just now is skipped: it may wait for the order that is locked here. It comes round by itself.
WAKE_PARKED = """
update webhooks set next_at = $2 where id = any (array(
    select id from webhooks where status = 'parked' and refs && $1::text[] for update skip locked))"""


class RefundRow(msgspec.Struct):
    """A row of `refunds` as the book needs it."""

    id: uuid.UUID
    payment_id: uuid.UUID
    capture_key: str
    amount: int
    currency: str
    status: RefundStatus
    cause: Cause | None
    applied: int
    delivery: int
    channel: Channel
    gateway_refund_id: str | None
    earlier: list[str]
    attempt: int


REFUND = f"select {REFUND_COLUMNS} from refunds where id = $1"


def refund_of(row: Row) -> RefundRow:
    names = RefundRow.__struct_fields__
    return msgspec.convert({name: row[name] for name in names}, RefundRow, builtin_types=(uuid.UUID, dt.datetime))


PAYMENTS_OF_ORDER = "select id, provider, status from payments where order_id = $1 order by created_at, id"
