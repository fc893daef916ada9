"""What Stripe says, in our words: its objects, read from answers and from webhooks, become `News`.

Objects come in several ages of its API: a webhook has the version of the account, an answer that of the SDK. Before
2022-11-15 an intent carries its list of `charges`, later `latest_charge`; a charge carries its `refunds` or does not.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from models.money import MINOR_UNITS_MAX
from models.payment import (
    DisputeNews,
    DisputeReport,
    Failure,
    News,
    Provider,
    RefundNews,
    RefundReport,
    Report,
)
from server.adapters.bounds import Currency, Minor, words
from server.adapters.stripe_money import from_stripe

# What is stored is bounded here, as of any gateway (bounds.py). Stripe promises ids of at most 255 characters.
Id = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_]{1,255}\Z")]
Fee = Annotated[int, Meta(ge=-MINOR_UNITS_MAX, le=MINOR_UNITS_MAX)]
"""Negative when it is given back."""


class Named(msgspec.Struct, frozen=True):
    """Any object that was expanded where an id would do."""

    id: Id


class Fault(msgspec.Struct, frozen=True):
    """`error` of a refusal, and `last_payment_error` of an intent."""

    type: str = ""
    code: str | None = None
    decline_code: str | None = None
    advice_code: str | None = None
    message: str | None = None
    charge: Id | None = None


class BalanceTransaction(msgspec.Struct, frozen=True):
    id: Id
    fee: Fee = 0
    currency: Currency = ""


class MethodDetails(msgspec.Struct, frozen=True):
    type: str | None = None


class Refund(msgspec.Struct, frozen=True):
    id: Id
    amount: Minor
    currency: Currency
    status: str | None = None
    charge: Id | Named | None = None
    payment_intent: Id | Named | None = None
    metadata: dict[str, str] | None = None
    failure_reason: str | None = None
    balance_transaction: Id | Named | None = None

    @property
    def releases(self) -> bool:
        """Whether no money went back: what is left of an authorization after a capture, or after its cancellation, is
        released as a refund that never touched the balance."""
        return self.status == "succeeded" and self.balance_transaction is None and not self.ours

    @property
    def ours(self) -> str | None:
        """Our id of it."""
        return words((self.metadata or {}).get("refund_id")) or None


class RefundList(msgspec.Struct, frozen=True):
    data: tuple[Refund, ...] = ()
    has_more: bool = False


class Charge(msgspec.Struct, frozen=True):
    id: Id
    payment_intent: Id | Named | None = None
    payment_method_details: MethodDetails | None = None
    balance_transaction: Id | BalanceTransaction | None = None
    refunds: RefundList | None = None
    disputed: bool = False


class ChargeList(msgspec.Struct, frozen=True):
    data: tuple[Charge, ...] = ()


class Redirect(msgspec.Struct, frozen=True):
    url: str | None = None


class NextAction(msgspec.Struct, frozen=True):
    type: str = ""
    redirect_to_url: Redirect | None = None


class Intent(msgspec.Struct, frozen=True):
    id: Id
    amount: Minor
    currency: Currency
    status: str
    amount_received: Minor = 0
    amount_capturable: Minor = 0
    client_secret: str | None = None
    last_payment_error: Fault | None = None
    latest_charge: Id | Charge | None = None
    charges: ChargeList | None = None
    next_action: NextAction | None = None


class Dispute(msgspec.Struct, frozen=True):
    id: Id
    amount: Minor
    currency: Currency
    status: str
    charge: Id | Named | None = None
    payment_intent: Id | Named | None = None


_WITHOUT_ERROR = {
    "requires_payment_method": Report.PENDING,
    "requires_confirmation": Report.PENDING,
    "requires_action": Report.PROCESSING,
    "processing": Report.PROCESSING,
    "requires_capture": Report.AUTHORIZED,
    "succeeded": Report.CAPTURED,
    "canceled": Report.CANCELLED,
}
_REFUNDS = {
    "succeeded": RefundReport.SUCCEEDED,
    "failed": RefundReport.FAILED,
    "canceled": RefundReport.FAILED,
}
_DISPUTES = {
    "won": DisputeReport.WON,
    # an inquiry that ended without a chargeback, or a chargeback that was headed off by a refund
    "warning_closed": DisputeReport.WON,
    "prevented": DisputeReport.WON,
    "lost": DisputeReport.LOST,
}
_PASSING_REFUND_FAILURES = frozenset({"insufficient_funds", "declined", "unknown"})


def id_of(thing: str | Named | Charge | None) -> str | None:
    """The id of what may be expanded or not."""
    return thing if thing is None or isinstance(thing, str) else thing.id


def failure_of(fault: Fault) -> Failure:
    """Why the payer's bank said no. Stripe lets any refused card be tried again unless it advises not to."""
    return Failure(
        code=words(fault.decline_code or fault.code or fault.type) or "unknown",
        message=words(fault.message),
        retryable=fault.advice_code != "do_not_try_again",
    )


def news_of_refund(refund: Refund) -> RefundNews:
    """One refund. A cancelled refund is a failed one: the money stays with the merchant."""
    currency = refund.currency.upper()
    report = _REFUNDS.get(refund.status or "", RefundReport.PROCESSING)
    failure = None
    if report is RefundReport.FAILED:
        code = words(refund.failure_reason or refund.status) or "unknown"
        failure = Failure(code=code, message=f"the refund {refund.status}", retryable=code in _PASSING_REFUND_FAILURES)
    return RefundNews(
        gateway_refund_id=refund.id,
        report=report,
        amount=from_stripe(refund.amount, currency),
        currency=currency,
        refund_id=refund.ours,
        failure=failure,
    )


def news_of_dispute(dispute: Dispute) -> DisputeNews:
    """One dispute; `amount` is what it is about."""
    currency = dispute.currency.upper()
    return DisputeNews(
        gateway_dispute_id=dispute.id,
        report=_DISPUTES.get(dispute.status, DisputeReport.OPEN),
        amount=from_stripe(dispute.amount, currency),
        currency=currency,
    )


def news_of_intent(intent: Intent, *, fresh: bool, disputes: tuple[DisputeNews, ...] = ()) -> News:
    """One intent, with what its newest charge carries.

    A failed attempt leaves the intent where it can be paid again; what says that there was one is
    `last_payment_error`.
    """
    currency = intent.currency.upper()
    report = _WITHOUT_ERROR.get(intent.status)
    error = intent.last_payment_error if intent.status == "requires_payment_method" else None
    if error is not None:
        report = Report.FAILED
    amount = {
        Report.CAPTURED: intent.amount_received,
        Report.AUTHORIZED: intent.amount_capturable,
    }.get(report or Report.UNKNOWN, intent.amount)
    charge = intent.latest_charge
    if charge is None and intent.charges is not None and intent.charges.data:
        charge = intent.charges.data[0]  # newest first
    expanded = charge if isinstance(charge, Charge) else None
    details = expanded.payment_method_details if expanded is not None else None
    return News(
        provider=Provider.STRIPE,
        gateway_order_id=intent.id,
        gateway_payment_id=id_of(charge) or (error.charge if error is not None else None),
        report=report,
        amount=from_stripe(amount, currency),
        currency=currency,
        method=(words(details.type) or None) if details is not None else None,
        fee=_fee_of(expanded, currency) if report is Report.CAPTURED else None,
        failure=failure_of(error) if error is not None else None,
        refunds=_refunds_of(expanded) if expanded is not None else (),
        disputes=disputes,
        fresh=fresh,
    )


def _refunds_of(charge: Charge) -> tuple[RefundNews, ...]:
    refunds = charge.refunds.data if charge.refunds is not None else ()
    return tuple(news_of_refund(refund) for refund in refunds if not refund.releases)


def _fee_of(charge: Charge | None, currency: str) -> int | None:
    """The fee, when it was taken in the currency of the payment; in another one it says nothing about this money."""
    taken = charge.balance_transaction if charge is not None else None
    if not isinstance(taken, BalanceTransaction) or taken.currency.upper() != currency:
        return None
    return from_stripe(taken.fee, currency)


_INTENTS = frozenset(
    f"payment_intent.{name}"
    for name in (
        "succeeded",
        "payment_failed",
        "processing",
        "canceled",
        "requires_action",
        "amount_capturable_updated",
    )
)
_REFUND_EVENTS = frozenset({"refund.created", "refund.updated", "refund.failed", "charge.refund.updated"})
_DISPUTE_EVENTS = frozenset(
    f"charge.dispute.{name}" for name in ("created", "updated", "closed", "funds_withdrawn", "funds_reinstated")
)


def news_of_event(kind: str, thing: dict[str, Any]) -> tuple[News, ...]:
    """What an event says, `thing` being its `data.object`; nothing for kinds that say nothing new.

    Raises:
        msgspec.ValidationError: a kind that we know, in a shape that we don't.
    """
    if kind in _INTENTS:
        return (news_of_intent(msgspec.convert(thing, Intent), fresh=False),)
    if kind in _REFUND_EVENTS:
        refund = msgspec.convert(thing, Refund)
        if refund.releases:
            return ()
        return _aside(refund.payment_intent, refund.charge, refunds=(news_of_refund(refund),))
    if kind in _DISPUTE_EVENTS:
        dispute = msgspec.convert(thing, Dispute)
        return _aside(dispute.payment_intent, dispute.charge, disputes=(news_of_dispute(dispute),))
    if kind == "charge.refunded":
        charge = msgspec.convert(thing, Charge)
        # since 2022-11-15 without its refunds, each of which has events of its own
        refunds = _refunds_of(charge)
        return _aside(charge.payment_intent, charge.id, refunds=refunds) if refunds else ()
    return ()


def _aside(
    intent: str | Named | None,
    charge: str | Named | None,
    *,
    refunds: tuple[RefundNews, ...] = (),
    disputes: tuple[DisputeNews, ...] = (),
) -> tuple[News, ...]:
    """News that says nothing of the payment itself. Without a name of the payment it is nobody's."""
    if intent is None and charge is None:
        return ()
    return (
        News(
            provider=Provider.STRIPE,
            gateway_order_id=id_of(intent),
            gateway_payment_id=id_of(charge),
            refunds=refunds,
            disputes=disputes,
        ),
    )
