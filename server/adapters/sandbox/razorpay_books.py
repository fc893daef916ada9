"""The simulated Razorpay without its HTTP: orders, payments, refunds and disputes, what moves them, and what it tells.

Everything here follows Razorpay's documents and recorded deliveries (tests/fixtures/razorpay/SOURCES.md): the members
of each body and their order, the refusals and their words, which events a step brings.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from server.adapters.sandbox.mischief import Mischief

ACCOUNT = "acc_Sandbox0000000"

FAILING_REFUND = 2468
"""Paise: a refund of so much fails, as in Razorpay's test mode."""

NOTES_MAX, NOTE_CHARS_MAX, RECEIPT_CHARS_MAX = 15, 256, 40

DECLINED = {
    "error_code": "BAD_REQUEST_ERROR",
    "error_description": "Payment failed",
    "error_source": "gateway",
    "error_step": "payment_authorization",
    "error_reason": "payment_failed",
}
CANCELLED = {
    "error_code": "BAD_REQUEST_ERROR",
    "error_description": "Your payment has been cancelled. Try again or complete the payment later.",
    "error_source": "customer",
    "error_step": "payment_authentication",
    "error_reason": "payment_cancelled",
}
NO_ERROR = dict.fromkeys(DECLINED)

METHODS: dict[str, dict[str, Any]] = {
    "upi": {"vpa": "success@razorpay", "upi": {"vpa": "success@razorpay", "flow": "collect"}},
    "card": {"card_id": "card_Sandbox0000000"},
    "netbanking": {"bank": "BARB_R"},
    "wallet": {"wallet": "airtelmoney"},
}

ORDER_FIELDS = {
    *("amount", "currency", "receipt", "notes", "payment", "payment_capture", "unique_receipt"),
    *("partial_payment", "first_payment_min_amount"),
}
REFUND_FIELDS = {"amount", "speed", "notes", "receipt"}
CAPTURE_FIELDS = {"amount", "currency"}

T = TypeVar("T")

Emit = Callable[[str, dict[str, dict[str, Any]]], None]
"""Takes an event: its kind and the entities of its payload, by name, in their order."""


class ApiError(Exception):
    """A refusal of the API."""

    def __init__(self, description: str, *, status: int = 400, field: str | None = None, na: bool = False) -> None:
        super().__init__(description)
        self.status = status
        source, step, reason = ("NA",) * 3 if na else ("business", "payment_initiation", "input_validation_failed")
        error = {
            "code": "BAD_REQUEST_ERROR",
            "description": description,
            "source": source,
            "step": step,
            "reason": reason,
            "metadata": {},
        }
        self.body = msgspec.json.encode({"error": error | ({"field": field} if field else {})})


class SimOrder(msgspec.Struct):
    id: str
    amount: int
    currency: str
    receipt: str | None
    notes: dict[str, str]
    automatic: bool
    created_at: int
    status: str = "created"
    attempts: int = 0
    amount_paid: int = 0


class SimPayment(msgspec.Struct):
    id: str
    order_id: str
    amount: int
    currency: str
    method: str
    created_at: int
    status: str = "created"
    captured: bool = False
    amount_refunded: int = 0
    fee: int | None = None
    tax: int | None = None
    error: dict[str, str | None] = {}
    changed_at: float = 0


class SimRefund(msgspec.Struct):
    id: str
    payment_id: str
    amount: int
    currency: str
    notes: dict[str, str]
    receipt: str | None
    speed: str
    created_at: int
    status: str


class SimDispute(msgspec.Struct):
    id: str
    payment_id: str
    amount: int
    currency: str
    created_at: int
    status: str = "open"


class UsedKey(msgspec.Struct):
    """An X-Refund-Idempotency key. `refund_id` None: the first request is being carried out."""

    body: bytes
    refund_id: str | None = None


class State(msgspec.Struct):
    """All that is kept over a restart."""

    orders: dict[str, SimOrder] = {}
    payments: dict[str, SimPayment] = {}
    refunds: dict[str, SimRefund] = {}
    disputes: dict[str, SimDispute] = {}
    receipts: dict[str, str] = {}
    keys: dict[str, UsedKey] = {}


class Books:
    """`clock`: Unix seconds. `emit` is called for every event, at the moment of its snapshot."""

    def __init__(self, state: State, mischief: Mischief, clock: Callable[[], float], emit: Emit, seed: int) -> None:
        self.state = state
        self._mischief, self._clock, self._emit = mischief, clock, emit
        self._random = random.Random(seed)

    # what merchants ask

    def create_order(self, wanted: dict[str, Any]) -> dict[str, Any]:
        _refuse_unknown(wanted, ORDER_FIELDS)
        _refuse_unknown(wanted.get("payment") or {}, {"capture", "capture_options"})
        for field in ("amount", "currency"):
            if wanted.get(field) is None:
                raise ApiError(f"The {field} field is required.", field=field)
        amount, currency = _amount(wanted["amount"]), wanted["currency"]
        if currency == "INR" and amount < 100:
            raise ApiError("The amount must be at least INR 1.00", field="amount")
        receipt = wanted.get("receipt")
        if receipt is not None and (not isinstance(receipt, str) or len(receipt) > RECEIPT_CHARS_MAX):
            raise ApiError(f"The receipt may not be greater than {RECEIPT_CHARS_MAX} characters.", field="receipt")
        if receipt and wanted.get("unique_receipt") and receipt in self.state.receipts:
            return self.order(self.state.receipts[receipt])
        order = SimOrder(
            id=self._id("order"),
            amount=amount,
            currency=currency,
            receipt=receipt,
            notes=_notes(wanted.get("notes")),
            automatic=(wanted.get("payment") or {}).get("capture") != "manual" and wanted.get("payment_capture") != 0,
            created_at=int(self._clock()),
        )
        self.state.orders[order.id] = order
        if receipt:
            self.state.receipts.setdefault(receipt, order.id)
        return self.order(order.id)

    def order(self, order_id: str) -> dict[str, Any]:
        return _order_body(self.find_order(order_id))

    def payment(self, payment_id: str) -> dict[str, Any]:
        return _payment_body(self._find_payment(payment_id))

    def payments_of(self, order_id: str) -> list[dict[str, Any]]:
        """Newest first."""
        self.find_order(order_id)
        return [_payment_body(one) for one in reversed(self.state.payments.values()) if one.order_id == order_id]

    def all_payments(self, start: int, end: int) -> list[dict[str, Any]]:
        """Newest first; those that changed a moment ago are not there yet."""
        shown_until = self._clock() - self._mischief.list_lag_s
        return [
            _payment_body(one)
            for one in reversed(self.state.payments.values())
            if start <= one.created_at <= end and one.changed_at <= shown_until
        ]

    def capture(self, payment_id: str, wanted: dict[str, Any]) -> dict[str, Any]:
        _refuse_unknown(wanted, CAPTURE_FIELDS)
        payment = self._find_payment(payment_id)
        if _amount(wanted.get("amount")) != payment.amount:
            raise ApiError("Capture amount must be equal to the amount authorized", field="amount")
        if wanted.get("currency", payment.currency) != payment.currency:
            raise ApiError("Payment currency must be equal to the currency of the capture", field="currency")
        if payment.captured:
            raise ApiError("This payment has already been captured")
        if payment.status != "authorized":
            raise ApiError("Only payments which have been authorized and not yet captured can be captured")
        self._capture(payment)
        return _payment_body(payment)

    def begin_refund(self, payment_id: str, wanted: dict[str, Any], key: str | None, body: bytes) -> SimRefund | None:
        """The refund that this key has made already, or None: it is to be made, and the key is in use from now on."""
        _refuse_unknown(wanted, REFUND_FIELDS)
        self._find_payment(payment_id)
        if not key:
            return None
        if len(key) < 10 or not set(key) <= set(string.ascii_letters + string.digits + "-_"):
            raise ApiError(
                "The idempotency key must have 10 or more letters, digits, hyphens and underscores.", na=True
            )
        fingerprint = payment_id.encode() + b"|" + body
        used = self.state.keys.get(key)
        if used is None:
            self.state.keys[key] = UsedKey(fingerprint)
            return None
        if used.body != fingerprint:
            raise ApiError(
                "Different request with the same idempotency key has already been processed.", status=409, na=True
            )
        if used.refund_id is None:
            raise ApiError("Request with the same idempotency key is still in progress.", status=409, na=True)
        return self.state.refunds[used.refund_id]

    def end_refund(self, payment_id: str, wanted: dict[str, Any], key: str | None) -> SimRefund:
        """Make the refund. A refused one frees its key."""
        try:
            refund = self._refund(self._find_payment(payment_id), wanted)
        except ApiError:
            if key:
                self.state.keys.pop(key, None)
            raise
        if key and key in self.state.keys:
            self.state.keys[key].refund_id = refund.id
        return refund

    def refund(self, refund_id: str) -> dict[str, Any]:
        return refund_body(self._find_refund(refund_id))

    def refunds_of(self, payment_id: str) -> list[dict[str, Any]]:
        """Newest first."""
        self._find_payment(payment_id)
        return [refund_body(one) for one in reversed(self.state.refunds.values()) if one.payment_id == payment_id]

    # what payers and banks do

    def begin(self, order_id: str, method: str) -> SimPayment:
        """An attempt to pay whose outcome is open."""
        order = self.find_order(order_id)
        if order.status == "paid":
            raise ApiError("Payment already done for this order.")
        if any(one.order_id == order_id and one.status == "authorized" for one in self.state.payments.values()):
            raise ApiError("Payment already in progress for this order.")
        if method not in METHODS:
            raise ApiError("The selected method is invalid.", field="method")
        payment = SimPayment(
            id=self._id("pay"),
            order_id=order_id,
            amount=order.amount,
            currency=order.currency,
            method=method,
            created_at=int(self._clock()),
            error=dict(NO_ERROR),
            changed_at=self._clock(),
        )
        self.state.payments[payment.id] = payment
        order.attempts += 1
        order.status = "attempted"
        return payment

    def succeed(self, payment_id: str) -> SimPayment:
        """The bank says yes, at once or days after it said no. With automatic capture the money moves."""
        payment = self._find_payment(payment_id)
        if payment.status not in ("created", "failed"):
            raise ApiError("The payment is decided already.")
        payment.status, payment.error = "authorized", dict(NO_ERROR)
        payment.changed_at = self._clock()
        self._tell("payment.authorized", payment)
        if self.find_order(payment.order_id).automatic:
            self._capture(payment)
        return payment

    def fail(self, payment_id: str, error: dict[str, str | None]) -> SimPayment:
        """The bank says no, or the payer goes back."""
        payment = self._find_payment(payment_id)
        if payment.status != "created":
            raise ApiError("The payment is decided already.")
        payment.status, payment.error = "failed", dict(error)
        payment.changed_at = self._clock()
        self._tell("payment.failed", payment)
        return payment

    def lapse(self, payment_id: str) -> SimPayment:
        """Nobody captured it in time: the payer gets the money back."""
        payment = self._find_payment(payment_id)
        if payment.status != "authorized":
            raise ApiError("Only an authorized payment can lapse.")
        refund = self._refunded(payment, payment.amount, {}, "processed")
        payment.status = "refunded"
        self._tell_refund("refund.created", refund)
        self._tell_refund("refund.processed", refund)
        return payment

    def settle_refund(self, refund_id: str, succeeded: bool) -> SimRefund:
        """The bank has carried out a refund, or could not."""
        refund = self._find_refund(refund_id)
        if refund.status == "failed" or (refund.status == "processed" and succeeded):
            raise ApiError("The refund is decided already.")
        refund.status = "processed" if succeeded else "failed"
        payment = self._find_payment(refund.payment_id)
        if not succeeded:
            payment.amount_refunded -= refund.amount
            payment.status = "captured"
        self._tell_refund("refund.processed" if succeeded else "refund.failed", refund)
        return refund

    def dispute(self, payment_id: str, amount: int) -> SimDispute:
        """The payer's bank wants money back."""
        payment = self._find_payment(payment_id)
        dispute = SimDispute(self._id("disp"), payment_id, amount, payment.currency, int(self._clock()))
        self.state.disputes[dispute.id] = dispute
        self._tell_dispute("payment.dispute.created", dispute)
        return dispute

    def close_dispute(self, dispute_id: str, outcome: str) -> SimDispute:
        """`outcome`: won, lost or closed."""
        if dispute_id not in self.state.disputes or outcome not in ("won", "lost", "closed"):
            raise ApiError("The id provided does not exist")
        dispute = self.state.disputes[dispute_id]
        dispute.status = outcome
        self._tell_dispute(f"payment.dispute.{outcome}", dispute)
        return dispute

    def find_order(self, order_id: str) -> SimOrder:
        return _found(self.state.orders, order_id)

    # inside

    def _capture(self, payment: SimPayment) -> None:
        order = self.find_order(payment.order_id)
        first = order.status != "paid"
        payment.status, payment.captured = "captured", True
        fee = payment.amount * 2 // 100
        payment.tax = fee * 18 // 100
        payment.fee = fee + payment.tax
        payment.changed_at = self._clock()
        if first:
            order.status, order.amount_paid = "paid", order.amount
        self._tell("payment.captured", payment, base_amount=payment.amount)
        if first:
            body = _order_body(order) | {"description": None, "checkout": None}
            paid = _payment_body(payment, reward=None)
            self._emit("order.paid", {"payment": paid, "order": body})
        elif self._mischief.duplicates_refunded:
            self._refund(payment, {})

    def _refund(self, payment: SimPayment, wanted: dict[str, Any]) -> SimRefund:
        if not payment.captured:
            raise ApiError("The payment status should be captured for action to be taken")
        left = payment.amount - payment.amount_refunded
        if not left:
            raise ApiError("The payment has been fully refunded already")
        amount = left if wanted.get("amount") is None else _amount(wanted["amount"])
        if payment.currency == "INR" and amount < 100:
            raise ApiError("The amount must be at least INR 1.00", field="amount")
        if amount > left:
            raise ApiError("The refund amount provided is greater than amount captured", field="amount")
        fails = amount == FAILING_REFUND or self._mischief.refunds == "failed"
        pending = fails or self._mischief.refunds == "pending"
        refund = self._refunded(payment, amount, wanted, "pending" if pending else "processed")
        payment.status = "refunded" if payment.amount_refunded == payment.amount else "captured"
        self._tell_refund("refund.created", refund)
        if fails:
            self.settle_refund(refund.id, succeeded=False)
        elif refund.status == "processed":
            self._tell_refund("refund.processed", refund)
        return refund

    def _refunded(self, payment: SimPayment, amount: int, wanted: dict[str, Any], status: str) -> SimRefund:
        """A new refund, in the books of its payment."""
        refund = SimRefund(
            id=self._id("rfnd"),
            payment_id=payment.id,
            amount=amount,
            currency=payment.currency,
            notes=_notes(wanted.get("notes")),
            receipt=wanted.get("receipt"),
            speed=wanted.get("speed", "normal"),
            created_at=int(self._clock()),
            status=status,
        )
        self.state.refunds[refund.id] = refund
        payment.amount_refunded += amount
        payment.changed_at = self._clock()
        return refund

    def _tell(self, kind: str, payment: SimPayment, **more: object) -> None:
        reward = {} if kind == "payment.authorized" else {"reward": None}
        self._emit(kind, {"payment": _payment_body(payment, **reward) | more})

    def _tell_refund(self, kind: str, refund: SimRefund) -> None:
        payment = self._find_payment(refund.payment_id)
        body = _payment_body(payment, base_amount=payment.amount) | _MORE_OF_REFUNDED
        self._emit(kind, {"refund": refund_body(refund), "payment": body})

    def _tell_dispute(self, kind: str, dispute: SimDispute) -> None:
        payment = self._find_payment(dispute.payment_id)
        body = {
            "id": dispute.id,
            "entity": "dispute",
            "payment_id": dispute.payment_id,
            "amount": dispute.amount,
            "currency": dispute.currency,
            "amount_deducted": dispute.amount if dispute.status == "lost" else 0,
            "reason_code": "processed_invalid_expired_card",
            "respond_by": dispute.created_at + 7 * 24 * 3600,
            "status": dispute.status,
            "phase": "chargeback",
            "created_at": dispute.created_at,
        }
        self._emit(kind, {"payment": _payment_body(payment), "dispute": body})

    def _find_payment(self, payment_id: str) -> SimPayment:
        return _found(self.state.payments, payment_id)

    def _find_refund(self, refund_id: str) -> SimRefund:
        return _found(self.state.refunds, refund_id)

    def _id(self, kind: str) -> str:
        return f"{kind}_" + "".join(self._random.choices(string.ascii_letters + string.digits, k=14))


_MORE_OF_REFUNDED = dict.fromkeys(
    (
        *("account_id", "customer_id", "device_id", "fee_bearer", "gateway_merchant_id", "gateway_terminal_id"),
        *("internal_status", "optimizer_provider", "provider", "receiver_type", "settled_by", "store_id"),
        *("terminal_id", "token_id"),
    )
) | {"amount_transferred": 0, "gateway_provider": "Razorpay", "source_channel": "online"}
"""What the payment inside refund events has besides: another service makes those bodies, with sorted keys."""


def _found(things: dict[str, T], key: str) -> T:
    try:
        return things[key]
    except KeyError:
        raise ApiError("The id provided does not exist", na=True) from None


def _refuse_unknown(wanted: dict[str, Any], known: set[str]) -> None:
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ApiError(f"{', '.join(unknown)} is/are not required and should not be sent")


def _amount(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ApiError("The amount must be an integer.", field="amount")
    return value


def _notes(value: object) -> dict[str, str]:
    notes = value or {}
    if not isinstance(notes, dict) or len(notes) > NOTES_MAX:
        raise ApiError("Number of fields in notes should be less than or equal to 15", field="notes")
    if any(not isinstance(text, str) or len(text) > NOTE_CHARS_MAX for text in notes.values()):
        raise ApiError("The notes may not be greater than 256 characters.", field="notes")
    return notes


def _order_body(order: SimOrder) -> dict[str, Any]:
    return {
        "id": order.id,
        "entity": "order",
        "amount": order.amount,
        "amount_paid": order.amount_paid,
        "amount_due": order.amount - order.amount_paid,
        "currency": order.currency,
        "receipt": order.receipt,
        "offer_id": None,
        "status": order.status,
        "attempts": order.attempts,
        "notes": order.notes or [],
        "created_at": order.created_at,
    }


def _payment_body(payment: SimPayment, **more: object) -> dict[str, Any]:
    """`more` stands where Razorpay puts it, before what belongs to the method."""
    how = METHODS[payment.method]
    refunded = {0: None, payment.amount: "full"}.get(payment.amount_refunded, "partial")
    return {
        "id": payment.id,
        "entity": "payment",
        "amount": payment.amount,
        "currency": payment.currency,
        "status": payment.status,
        "order_id": payment.order_id,
        "invoice_id": None,
        "international": False,
        "method": payment.method,
        "amount_refunded": payment.amount_refunded,
        "refund_status": refunded,
        "captured": payment.captured,
        "description": None,
        "card_id": how.get("card_id"),
        "bank": how.get("bank"),
        "wallet": how.get("wallet"),
        "vpa": how.get("vpa"),
        "email": "void@razorpay.com",
        "contact": "+919000090000",
        "notes": [],
        "fee": payment.fee,
        "tax": payment.tax,
        **payment.error,
        "acquirer_data": {},
        "created_at": payment.created_at,
        **more,
        **({"upi": how["upi"]} if "upi" in how else {}),
    }


def refund_body(refund: SimRefund) -> dict[str, Any]:
    return {
        "id": refund.id,
        "entity": "refund",
        "amount": refund.amount,
        "currency": refund.currency,
        "payment_id": refund.payment_id,
        "notes": refund.notes or [],
        "receipt": refund.receipt,
        "acquirer_data": {"arn": None},
        "created_at": refund.created_at,
        "batch_id": None,
        "status": refund.status,
        "speed_processed": "normal",
        "speed_requested": refund.speed,
    }
