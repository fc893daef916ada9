"""What Razorpay says, in our words: its payments, orders, refunds, disputes and events become `News`.

Every body is a snapshot of when it was made, whatever its event is called: the status in the entity decides. Its notes
are the payer's and ours, so nothing is identified by them but a refund of ours.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from handlers.ports import Delivery
from models.errors import Malformed
from models.payment import DisputeNews, DisputeReport, Failure, News, Provider, RefundNews, RefundReport, Report
from server.adapters.bounds import Currency, Minor, words

REFUND_NOTE = "refund_id"
"""Under this note a refund carries our id."""


UUID_CHARS = 36

# What is stored is bounded here, so that no body of theirs can break a statement of ours.
REF = re.compile(r"(?:order|pay|rfnd)_[A-Za-z0-9_]{1,58}")
Id = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_]{1,64}\Z")]
Kind = Annotated[str, Meta(pattern=r"\A[a-z0-9_.]{1,100}\Z")]
Unix = Annotated[int, Meta(ge=0, le=253_402_300_799)]
"""Seconds; the last one of the year 9999, the last that Python knows."""


class Order(msgspec.Struct):
    """Razorpay's order: what may be paid, in any number of attempts. `amount`: minor units."""

    id: Id
    amount: Minor
    currency: Currency
    status: str
    attempts: int = 0


class Payment(msgspec.Struct):
    """Razorpay's payment: one attempt to pay. `fee`: minor units, GST included; null until it is captured."""

    id: Id
    amount: Minor
    currency: Currency
    status: str
    order_id: Id | None = None
    method: str | None = None
    fee: Minor | None = None
    captured: bool | None = None
    amount_refunded: Minor | None = None
    error_code: str | None = None
    error_description: str | None = None
    error_reason: str | None = None
    created_at: Unix = 0

    @property
    def report(self) -> Report:
        """What became of it. Who never captures gets no money: after some days Razorpay gives it back to the payer, and
        calls that `refunded` too. (`captured` says nothing in other statuses: samples have it true beside `failed`.)"""
        if self.status == "refunded" and self.captured is False:
            return Report.CANCELLED
        return REPORTS.get(self.status, Report.UNKNOWN)


class Refund(msgspec.Struct):
    """Razorpay's refund of one payment. `notes` is an object, or `[]` when there are none."""

    id: Id
    payment_id: Id
    amount: Minor
    currency: Currency
    status: str
    receipt: str | None = None
    notes: Any = None

    @property
    def refund_id(self) -> str | None:
        """Our id, if it carries one: in the notes, and at the beginning of the receipt."""
        note = self.notes.get(REFUND_NOTE) if isinstance(self.notes, dict) else None
        for text in (note, (self.receipt or "")[:UUID_CHARS]):
            try:
                if isinstance(text, str) and str(uuid.UUID(text)) == text:
                    return text
            except ValueError:
                continue
        return None


class Dispute(msgspec.Struct):
    """A chargeback."""

    id: Id
    payment_id: Id
    amount: Minor
    currency: Currency


class Collection(msgspec.Struct):
    items: list[Any]


class Event(msgspec.Struct):
    """The envelope of a webhook."""

    event: Kind
    payload: dict[str, Any] = {}

    def entity(self, name: str, type_: type[Any]) -> Any:
        """One entity of the payload, or None."""
        there = self.payload.get(name)
        return None if there is None else msgspec.convert(there["entity"], type_)


REPORTS = {
    "created": Report.PROCESSING,
    "authorized": Report.AUTHORIZED,
    "captured": Report.CAPTURED,
    "refunded": Report.CAPTURED,  # it was; the refunds tell the rest
    "failed": Report.FAILED,
}
"""Statuses of a payment. Source: Razorpay's payment life cycle. `created` waits for the bank, for up to days."""

REFUND_REPORTS = {
    "created": RefundReport.PROCESSING,
    "pending": RefundReport.PROCESSING,
    "processed": RefundReport.SUCCEEDED,
    "failed": RefundReport.FAILED,
}

DISPUTE_REPORTS = {
    "created": DisputeReport.OPEN,
    "action_required": DisputeReport.OPEN,
    "under_review": DisputeReport.OPEN,
    "won": DisputeReport.WON,
    "closed": DisputeReport.WON,
    "lost": DisputeReport.LOST,
}
"""By the last word of the event: the status in the entity stays `open` in several of them."""


def of_payment(payment: Payment, *, fresh: bool = False, refunds: Iterable[RefundNews] = ()) -> News:
    """News of one attempt."""
    report = payment.report
    return News(
        provider=Provider.RAZORPAY,
        gateway_order_id=payment.order_id,
        gateway_payment_id=payment.id,
        report=report,
        amount=payment.amount,
        currency=payment.currency.upper(),
        method=words(payment.method) or None,
        fee=payment.fee if report is Report.CAPTURED else None,
        failure=_failure(payment) if report is Report.FAILED else None,
        refunds=tuple(refunds) if report is Report.CAPTURED else (),
        fresh=fresh,
    )


def of_order(order: Order, payments: Sequence[Payment], refunds: dict[str, Sequence[RefundNews]]) -> Sequence[News]:
    """Fresh news of an order: of every captured attempt, oldest first; else of the one that got furthest, and of those
    the newest; else that nobody has paid. `refunds`: by payment."""
    news = [
        of_payment(one, fresh=True, refunds=refunds.get(one.id, ()))
        for one in sorted(payments, key=lambda one: one.created_at)
    ]
    captured = [one for one in news if one.report is Report.CAPTURED]
    if captured:
        return captured
    if order.status == "paid" or (order.attempts and not news):
        return [_of_order(order, Report.PROCESSING)]  # the list of payments is behind
    if not news:
        return [_of_order(order, Report.PENDING)]
    furthest = [Report.CANCELLED, Report.FAILED, Report.UNKNOWN, Report.PROCESSING, Report.AUTHORIZED]
    return [max(reversed(news), key=lambda one: furthest.index(one.report or Report.UNKNOWN))]


def _of_order(order: Order, report: Report) -> News:
    return News(
        provider=Provider.RAZORPAY, gateway_order_id=order.id, report=report, currency=order.currency, fresh=True
    )


def of_refund(refund: Refund) -> RefundNews:
    """News of one refund."""
    report = REFUND_REPORTS.get(refund.status, RefundReport.PROCESSING)
    failure = Failure(code="refund_failed", message="Razorpay could not carry out the refund.", retryable=True)
    return RefundNews(
        gateway_refund_id=refund.id,
        report=report,
        amount=refund.amount,
        currency=refund.currency.upper(),
        refund_id=refund.refund_id,
        failure=failure if report is RefundReport.FAILED else None,
    )


def _failure(payment: Payment) -> Failure:
    """Why. The order can be paid all the same, so another attempt may always help."""
    reasons = [word for word in (payment.error_reason, payment.error_code) if word and word != "NA"]
    return Failure(
        code=words(reasons[0] if reasons else None) or "payment_failed",
        message=words(payment.error_description) or "The payment failed.",
        retryable=True,
    )


def delivery_of(body: bytes, event_id: str | None) -> Delivery:
    """What a webhook is about, without judging it. One that cannot be read has no kind; `read` says so then.

    Razorpay sends the event's id as a header that is not signed; without one, the same body is the same event.
    """
    event_id = event_id or "sha256:" + hashlib.sha256(body).hexdigest()
    try:
        event = msgspec.json.decode(body, type=Event)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Delivery(event_id=event_id, kind="", refs=())
    refs: dict[str, None] = {}
    for part in event.payload.values():
        entity = part.get("entity") if isinstance(part, dict) else None
        if isinstance(entity, dict):
            names = [entity.get(name) for name in ("order_id", "payment_id", "id")]
            refs |= {ref: None for ref in names if isinstance(ref, str) and REF.fullmatch(ref)}
    return Delivery(event_id=event_id, kind=event.event, refs=tuple(refs))


def read(kind: str, body: bytes) -> Sequence[News]:
    """What a webhook says; nothing when it is irrelevant.

    Raises:
        models.errors.Malformed: it is relevant by its kind, and cannot be read.
    """
    try:
        return _read(kind, msgspec.json.decode(body, type=Event))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, KeyError, TypeError) as error:
        raise Malformed(f"The body of this {kind or 'webhook'} cannot be read: {error}") from error


def _read(kind: str, event: Event) -> Sequence[News]:
    family, _, last = kind.rpartition(".")
    payment: Payment | None = event.entity("payment", Payment)
    if kind in ("payment.authorized", "payment.captured", "payment.failed", "order.paid"):
        if payment is None:
            raise KeyError("payment")
        return [of_payment(payment)]
    if family == "refund" and last in ("created", "processed", "failed"):
        refund: Refund = msgspec.convert(event.payload["refund"]["entity"], Refund)
        return [_beside(payment, refund.payment_id, refunds=(of_refund(refund),))]
    if family == "payment.dispute" and last in DISPUTE_REPORTS:
        dispute: Dispute = msgspec.convert(event.payload["dispute"]["entity"], Dispute)
        said = DisputeNews(
            gateway_dispute_id=dispute.id,
            report=DISPUTE_REPORTS[last],
            amount=dispute.amount,
            currency=dispute.currency.upper(),
        )
        return [_beside(payment, dispute.payment_id, disputes=(said,))]
    return []


def _beside(
    payment: Payment | None,
    payment_id: str,
    *,
    refunds: tuple[RefundNews, ...] = (),
    disputes: tuple[DisputeNews, ...] = (),
) -> News:
    """News of refunds or disputes. If the payment that comes with them was captured, that is said as well: the event
    that says only this may still be under way. What was never captured has no refund to book."""
    if payment is not None and payment.id == payment_id:
        if payment.report is Report.CAPTURED:
            return msgspec.structs.replace(of_payment(payment), refunds=refunds, disputes=disputes)
        if payment.report is Report.CANCELLED:
            return msgspec.structs.replace(of_payment(payment), disputes=disputes)
    return News(
        provider=Provider.RAZORPAY,
        gateway_order_id=payment.order_id if payment is not None and payment.id == payment_id else None,
        gateway_payment_id=payment_id,
        refunds=refunds,
        disputes=disputes,
    )
