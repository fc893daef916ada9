"""A refund: its tables, its states, and how much of a line or of a payment may go back."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY

from models.base import Amount, Time, UtcTime, UuidText, View, metadata
from models.errors import NotRefundable
from models.payment import Failure, RefundReport


class RefundStatus(StrEnum):
    PENDING = "pending"
    """Reserved: the gateway has not been asked, or it must be asked again."""
    PROCESSING = "processing"
    """Asked, and not yet settled; also when nobody knows whether the asking arrived."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """The money is still owed: it stays reserved until somebody retries it or settles it by hand."""


SETTLED = frozenset({RefundStatus.SUCCEEDED, RefundStatus.FAILED})


class Cause(StrEnum):
    """Why money goes back by itself: the `reason` of `paymentUpdate`."""

    LATE = "late_refunded"
    DUPLICATE = "duplicate_refunded"
    MISMATCH = "mismatch_refunded"


class Channel(StrEnum):
    ORIGINAL = "original"
    MANUAL = "manual"
    """Paid back by other means, cash from the till or a bank transfer, and noted here with its reference."""


refunds = Table(
    "refunds",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("order_id", Uuid, ForeignKey("orders.id"), nullable=False),
    Column("payment_id", Uuid, ForeignKey("payments.id"), nullable=False),
    Column("provider", Text, nullable=False),
    # which money: key of `captures`
    Column("capture_key", Text, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("currency", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("cause", Text),
    # how much of it had been applied to the order; the rest was too much from the beginning
    Column("applied", BigInteger, nullable=False),
    # how much of it is for delivery
    Column("delivery", BigInteger, nullable=False, server_default=text("0")),
    Column("channel", Text, nullable=False, server_default=text("'original'")),
    Column("reference", Text),
    Column("gateway_refund_id", Text),
    # how often it was begun anew after it had failed: each is another refund for the gateway
    Column("attempt", Integer, nullable=False, server_default=text("0")),
    # the gateway's ids of those that failed: news of them is no news of this one
    Column("earlier", ARRAY(Text), nullable=False, server_default=text("'{}'")),
    Column("failure", Text),
    Column("requested_by", Text),
    Column("created_at", UtcTime, nullable=False),
    Column("updated_at", UtcTime, nullable=False),
    Column("settled_at", UtcTime),
    UniqueConstraint("provider", "gateway_refund_id", name="uq_refunds_gateway_refund"),
    CheckConstraint("amount > 0 and applied >= 0 and (applied <= amount or provider = 'cash')", name="amounts"),
    Index("ix_refunds_payment", "payment_id"),
    Index("ix_refunds_order", "order_id"),
    Index("ix_refunds_settled", "settled_at"),
    Index("ix_refunds_newest", text("created_at desc"), text("id desc")),
    Index("ix_refunds_due", "status", "created_at", postgresql_where=text("status <> 'succeeded'")),
)

refund_lines = Table(
    "refund_lines",
    metadata,
    Column("refund_id", Uuid, ForeignKey("refunds.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("quantity", Integer, nullable=False),
    Column("amount", BigInteger, nullable=False),
)


class RefundLine(View):
    line_id: str
    quantity: int
    amount: Amount


class Refund(View):
    """A refund as those see it who see its payment."""

    id: UuidText
    payment_id: UuidText
    order_id: UuidText
    amount: Amount
    currency: str
    status: RefundStatus
    reason: str
    channel: Channel
    created_at: Time
    cause: Annotated[Cause | None, Meta(description="why it went back by itself")] = None
    lines: list[RefundLine] | None = None
    reference: str | None = None
    failure: Failure | None = None
    settled_at: Time | None = None


def after(status: RefundStatus, report: RefundReport) -> RefundStatus:
    """The status after news. A gateway may take a success back (succeeded to failed), and a repeat of an older message
    never undoes what is settled."""
    if report is RefundReport.PROCESSING:
        return RefundStatus.PROCESSING if status is RefundStatus.PENDING else status
    if report is RefundReport.SUCCEEDED:
        # a refund that failed has ended: what succeeds after that is a new one
        return status if status is RefundStatus.FAILED else RefundStatus.SUCCEEDED
    return RefundStatus.FAILED


class Money(msgspec.Struct, frozen=True):
    """What came of one payment and where it is, in minor units of one currency."""

    captured: int
    refunded: int
    reserved: int
    disputed: int

    @property
    def refundable(self) -> int:
        """Never more than came and is neither back, nor on its way back, nor in dispute."""
        return max(0, self.captured - self.refunded - self.reserved - self.disputed)


def line_share(total: int, quantity: int, units_before: int, refunded_before: int, units: int) -> int:
    """What goes back for `units` more of a line of `quantity` units that cost `total` minor units, when `units_before`
    went back for `refunded_before`: the floor of their share of the total, less what was refunded. So the last unit
    takes what rounding left, and no sequence of partial refunds gives back more, or less, than the line cost.

    Raises:
        ValueError: there are not so many units left.
    """
    if units < 1 or units_before + units > quantity:
        raise ValueError(f"{units} of {quantity - units_before} units")
    return max(0, total * (units_before + units) // quantity - refunded_before)


def spread(amount: int, refundable: Sequence[int]) -> list[int]:
    """How much of `amount` goes back from each of several sums, the first ones first and none above what it holds.

    Raises:
        NotRefundable: together they hold less.
    """
    if amount > sum(refundable):
        raise NotRefundable("There is not so much to refund.", sum(refundable))
    parts = []
    for holds in refundable:
        parts.append(min(amount, holds))
        amount -= parts[-1]
    return parts


def allot(lines: Sequence[RefundLine], amounts: Sequence[int]) -> list[list[RefundLine]]:
    """Which lines each of several refunds stands for, when one refund of `lines` is made as refunds of `amounts`.

    A line that two of them share is in both with its share of the money; its units are counted in the first. What the
    amounts do not reach is left out.
    """
    left, found = [(line.line_id, line.quantity, line.amount) for line in reversed(lines)], []
    for amount in amounts:
        mine: list[RefundLine] = []
        while left and (amount > 0 or left[-1][2] == 0):
            line_id, quantity, owed = left.pop()
            mine.append(RefundLine(line_id=line_id, quantity=quantity, amount=min(owed, amount)))
            if owed > amount:
                left.append((line_id, 0, owed - amount))
            amount -= mine[-1].amount
        found.append(mine)
    return found
