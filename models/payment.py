"""A payment: its tables, its ladder, and what the world may say of it.

One payment is one gateway order (Razorpay) or intent (Stripe) with many attempts, or one handover of cash. Callback,
webhook, reconciliation and staff all speak of it in the same words: `News`. News is a snapshot, never a command: it may
be late, repeated or out of order, so `after` says for every status and every report what becomes of it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Identity,
    Index,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)

from models.base import Amount, Time, UtcTime, UuidText, View, add_only, metadata


class Provider(StrEnum):
    RAZORPAY = "razorpay"
    STRIPE = "stripe"
    CASH = "cash"
    MANUAL = "manual"


GATEWAYS = frozenset({Provider.RAZORPAY, Provider.STRIPE})


class PaymentStatus(StrEnum):
    PENDING = "pending"
    PROCESSING = "processing"
    AUTHORIZED = "authorized"
    COMPLETED = "completed"
    PARTIALLY_REFUNDED = "partially_refunded"
    REFUNDED = "refunded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"
    """A gateway call ended without an answer: it may have happened."""


P = PaymentStatus
OPEN = frozenset({P.PENDING, P.PROCESSING, P.AUTHORIZED, P.UNKNOWN})
"""Money may still come without anybody starting anew. (It may come later than that, too.)"""
MOVING = frozenset({P.PROCESSING, P.AUTHORIZED, P.UNKNOWN})
"""Somebody has tried to pay: the order is held for longer, and reconciliation asks."""


class Capture(StrEnum):
    AUTOMATIC = "automatic"
    MANUAL = "manual"


class Attention(StrEnum):
    """Why a person should look at the payment."""

    UNKNOWN = "unknown"
    MISMATCH = "mismatch"
    LATE = "late"
    DUPLICATE = "duplicate"
    DISPUTE = "dispute"


class Source(StrEnum):
    """Where news came from."""

    CLIENT = "client"
    WEBHOOK = "webhook"
    RECONCILIATION = "reconciliation"
    STAFF = "staff"
    SYSTEM = "system"


class Report(StrEnum):
    """What news says of a payment."""

    PENDING = "pending"
    """Nobody has paid yet; the payment can be paid."""
    PROCESSING = "processing"
    AUTHORIZED = "authorized"
    CAPTURED = "captured"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"


class Failure(View):
    """Why an attempt failed. `code` is the gateway's; `retryable`: trying again may help."""

    code: str
    message: str
    retryable: bool


class RefundReport(StrEnum):
    PROCESSING = "processing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class RefundNews(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway says of one refund. `amount`: minor units of `currency` (upper case)."""

    gateway_refund_id: str
    report: RefundReport
    amount: int
    currency: str
    refund_id: str | None = None
    """Ours, when the gateway echoes it (metadata, notes or receipt); None for a refund that was made elsewhere."""
    failure: Failure | None = None


class DisputeReport(StrEnum):
    OPEN = "open"
    WON = "won"
    LOST = "lost"


class DisputeNews(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway says of one dispute (chargeback). `amount`: minor units of `currency` that were taken or given
    back. A dispute closed without loss is WON."""

    gateway_dispute_id: str
    report: DisputeReport
    amount: int
    currency: str


class News(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway says of one payment, in our words. `amount`: minor units of `currency` (upper case).

    `gateway_order_id` names the payment: Razorpay's order or Stripe's intent. It may be None when the source knows only
    the attempt; then `gateway_payment_id` names it. `report` None: nothing is said of the payment itself, only of its
    refunds or disputes.
    """

    provider: Provider
    gateway_order_id: str | None
    gateway_payment_id: str | None = None
    """The attempt: Razorpay's `pay_…`, Stripe's charge. Money is booked once per attempt (Stripe: per intent, which
    succeeds once)."""
    report: Report | None = None
    amount: int = 0
    """What was authorized or captured."""
    currency: str = ""
    method: str | None = None
    """card, upi, netbanking, wallet … as the gateway says it."""
    fee: int | None = None
    """What the gateway kept of a capture, minor units, its tax included."""
    failure: Failure | None = None
    refunds: tuple[RefundNews, ...] = ()
    disputes: tuple[DisputeNews, ...] = ()
    fresh: bool = False
    """Asked for just now, so it is the present and not a message that was under way."""


def after(status: PaymentStatus, report: Report, fresh: bool) -> PaymentStatus:
    """The status after news that moves no money; a capture is booked by the settle path.

    The source of each line is the contract's ladder (section 6) and how the gateways behave: a failed attempt at
    Razorpay may be authorized later, and a message about it may arrive after the one that says so.
    """
    if report is Report.PENDING and status is P.UNKNOWN:
        return P.PENDING  # the creation that nobody knew of has happened, and nobody has paid
    if report is Report.PROCESSING and status in (P.PENDING, P.UNKNOWN):
        return P.PROCESSING
    if report is Report.UNKNOWN and status in (P.PENDING, P.PROCESSING):
        return P.UNKNOWN
    if report is Report.AUTHORIZED and status in (P.PENDING, P.PROCESSING, P.UNKNOWN, P.FAILED):
        return P.AUTHORIZED
    if report is Report.FAILED:
        # a message that an attempt failed is older than the authorization that followed it
        if status in (P.PENDING, P.PROCESSING, P.UNKNOWN) or (status is P.AUTHORIZED and fresh):
            return P.FAILED
    if report is Report.CANCELLED and status in (OPEN | {P.FAILED}):
        return P.CANCELLED
    return status


def with_refunds(captured: int, refunded: int) -> PaymentStatus:
    """The status of a payment whose money came, from the sums of what came and what went back."""
    if refunded == 0:
        return P.COMPLETED
    return P.REFUNDED if refunded >= captured else P.PARTIALLY_REFUNDED


payments = Table(
    "payments",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("order_id", Uuid, ForeignKey("orders.id"), nullable=False),
    Column("customer_id", Text),
    Column("purpose", Text, nullable=False, server_default=text("'order'")),
    Column("provider", Text, nullable=False),
    Column("method", Text),
    Column("status", Text, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("currency", Text, nullable=False),
    Column("capture", Text, nullable=False, server_default=text("'automatic'")),
    # what a capture must bring: the amount, or what staff asked to capture of it
    Column("expected", BigInteger, nullable=False),
    # what came in this currency, also what was too much; sums of `captures`, `refunds` and `disputes`
    Column("captured", BigInteger, nullable=False, server_default=text("0")),
    Column("refunded", BigInteger, nullable=False, server_default=text("0")),
    # asked for and not yet succeeded
    Column("reserved", BigInteger, nullable=False, server_default=text("0")),
    Column("disputed", BigInteger, nullable=False, server_default=text("0")),
    Column("gateway_order_id", Text),
    Column("gateway_payment_id", Text),
    # the receipt or idempotency key under which the gateway was, and will be, asked to create it
    Column("reference", Text, nullable=False, unique=True),
    Column("description", Text),
    Column("metadata", Text, nullable=False, server_default=text("'{}'")),
    Column("return_url", Text),
    Column("failure", Text),
    Column("attention", Text),
    # another payment was started instead; money that comes all the same is judged by what is due then
    Column("superseded", Boolean, nullable=False, server_default=text("false")),
    # whether anybody ever tried to pay: then it is never voided
    Column("attempted", Boolean, nullable=False, server_default=text("false")),
    Column("confirmed_by", Text),
    Column("tendered", BigInteger),
    Column("created_at", UtcTime, nullable=False),
    Column("updated_at", UtcTime, nullable=False),
    Column("completed_at", UtcTime),
    # when the status last changed: what reconciliation counts from
    Column("status_at", UtcTime, nullable=False),
    UniqueConstraint("provider", "gateway_order_id", name="uq_payments_gateway_order"),
    CheckConstraint("amount > 0", name="amount"),
    CheckConstraint(
        "refunded >= 0 and reserved >= 0 and refunded + reserved <= captured", name="refunds_within_captured"
    ),
    Index("ix_payments_order", "order_id"),
    Index("ix_payments_newest", text("created_at desc"), text("id desc")),
    Index("ix_payments_customer", "customer_id", text("created_at desc"), text("id desc")),
    Index(
        "ix_payments_moving",
        "status_at",
        postgresql_where=text("status in ('pending', 'processing', 'authorized', 'unknown')"),
    ),
    Index("ix_payments_attention", "attention", postgresql_where=text("attention is not null")),
    Index("ix_payments_gateway_payment", "provider", "gateway_payment_id"),
    # what statistics count by
    Index("ix_payments_completed", "completed_at", postgresql_where=text("completed_at is not null")),
    Index("ix_payments_failed", "status_at", postgresql_where=text("status = 'failed'")),
)

captures = Table(
    "captures",
    metadata,
    # Money that came, once per key: Razorpay's payment, Stripe's intent, or our payment's id for cash.
    Column("provider", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("payment_id", Uuid, ForeignKey("payments.id"), nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("currency", Text, nullable=False),
    # how much of it the order was owed; the rest is refunded
    Column("applied", BigInteger, nullable=False),
    Column("fee", BigInteger),
    Column("at", UtcTime, nullable=False),
    # cash that was rounded down to coins that exist settles more than it is
    CheckConstraint("amount > 0 and applied >= 0 and (applied <= amount or provider = 'cash')", name="amounts"),
    Index("ix_captures_payment", "payment_id"),
    Index("ix_captures_at", "at"),
)

disputes = Table(
    "disputes",
    metadata,
    Column("provider", Text, primary_key=True),
    Column("gateway_dispute_id", Text, primary_key=True),
    Column("payment_id", Uuid, ForeignKey("payments.id"), nullable=False),
    Column("status", Text, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("currency", Text, nullable=False),
    Column("at", UtcTime, nullable=False),
    Index("ix_disputes_payment", "payment_id"),
)

payment_inputs = Table(
    "payment_inputs",
    metadata,
    # Every input that reached a payment, also those that changed nothing. Rows are never changed.
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("payment_id", Uuid, ForeignKey("payments.id"), nullable=False),
    Column("at", UtcTime, nullable=False),
    Column("source", Text, nullable=False),
    Column("actor", Text),
    Column("kind", Text, nullable=False),
    Column("before", Text),
    Column("after", Text, nullable=False),
    # JSON: what the input said
    Column("detail", Text, nullable=False),
    Index("ix_payment_inputs_payment", "payment_id", "id"),
)

add_only(payment_inputs)

lifecycle_events = Table(
    "lifecycle_events",
    metadata,
    # What backends will hear of, written with the change: payment.created, .completed, .failed, .refund.
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("type", Text, nullable=False),
    Column("at", UtcTime, nullable=False),
    Column("order_id", Uuid),
    Column("payment_id", Uuid),
    Column("data", Text, nullable=False),
)


class Payment(View):
    """A payment as its customer and the back office see it. Amounts: minor units of `currency`."""

    id: UuidText
    purpose: str
    provider: Provider
    status: PaymentStatus
    amount: Amount
    currency: Annotated[str, Meta(description="ISO 4217")]
    captured: Annotated[int, Meta(description="what came")]
    refunded: Annotated[int, Meta(description="what went back")]
    refundable: Annotated[int, Meta(description="what may still go back")]
    disputed: Annotated[int, Meta(description="what the payer's bank holds back")]
    reference: Annotated[str, Meta(description="ours at the gateway")]
    metadata: dict[str, str]
    created_at: Time
    order_id: UuidText | None = None
    customer_id: str | None = None
    method: str | None = None
    gateway_order_id: str | None = None
    gateway_payment_id: str | None = None
    description: str | None = None
    failure: Failure | None = None
    attention: Attention | None = None
    checkout: dict[str, Any] | None = None
    next_action: dict[str, Any] | None = None
    confirmed_by: str | None = None
    completed_at: Time | None = None
    change: int | None = None
