"""What the simulator of Stripe knows, and how its objects change: intents, charges, refunds, disputes, the balance.

The API's commands are the methods that take `params`, as the form said them. Objects have the shape of API 2024-10-28
and later: an intent has its `latest_charge`, a charge shows its refunds only when they are asked for, and every refund
has events of its own.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

import msgspec

from server.adapters.sandbox.mischief import Mischief

SETTLES_S = 5.0
"""How long a payment or a refund takes that is not done at once."""

DECLINES = {
    "pm_card_chargeDeclined": ("card_declined", "generic_decline", "Your card was declined."),
    "pm_card_chargeDeclinedInsufficientFunds": (
        "card_declined",
        "insufficient_funds",
        "Your card has insufficient funds.",
    ),
    "pm_card_chargeDeclinedFraudulent": ("card_declined", "fraudulent", "Your card was declined."),
    "pm_card_chargeDeclinedExpiredCard": ("expired_card", None, "Your card has expired."),
    "pm_card_chargeDeclinedProcessingError": (
        "processing_error",
        None,
        "An error occurred while processing your card. Try again in a little bit.",
    ),
}
"""Stripe's test payment methods that are refused: code, decline code, message."""
PAYS = "pm_card_visa"
ASKS = frozenset({"pm_card_authenticationRequired", "pm_card_threeDSecure2Required"})
PROCESSES = frozenset({"pm_usBankAccount_success"})
DISPUTED = "pm_card_createDispute"
REFUND_FAILS = "pm_card_refundFail"
REFUND_WAITS = "pm_card_pendingRefund"
_METHODS = frozenset({PAYS, DISPUTED, REFUND_FAILS, REFUND_WAITS, *ASKS, *PROCESSES, *DECLINES})

_THREE_DECIMAL = frozenset(["bhd", "jod", "kwd", "omr", "tnd"])
_LEAST = {"usd": 50, "eur": 50, "inr": 50, "gbp": 30, "jpy": 50}

Object = dict[str, Any]


class Refusal(Exception):
    """An answer of class 4xx. `stored`: the call had begun, so the answer is kept under its idempotency key."""

    def __init__(self, status: int, kind: str, message: str, *, stored: bool = False, **more: Any) -> None:
        super().__init__(message)
        self.status, self.stored = status, stored
        self.error: Object = {"type": kind, "message": message, **more}


def invalid(message: str, *, code: str | None = None, param: str | None = None, stored: bool = False) -> Refusal:
    """400 invalid_request_error."""
    return Refusal(400, "invalid_request_error", message, stored=stored, code=code, param=param)


class Stored(msgspec.Struct):
    """What an idempotency key stands for. `status` 0: the call is under way."""

    path: str
    params: Object
    at: float
    status: int = 0
    body: Object = {}


class State(msgspec.Struct):
    """Everything that the simulator remembers, also over a restart."""

    intents: dict[str, Object] = {}
    charges: dict[str, Object] = {}
    refunds: dict[str, Object] = {}
    disputes: dict[str, Object] = {}
    balance: dict[str, Object] = {}
    keys: dict[str, Stored] = {}


class Books:
    """One account in test mode. `tell(kind, object, before)`: an event; `after(seconds, do)`: later; `page(intent id)`:
    where a buyer answers the bank."""

    def __init__(
        self,
        state: State,
        mischief: Mischief,
        clock: Callable[[], float],
        *,
        tell: Callable[[str, Object, Object | None], None],
        after: Callable[[float, Callable[[], object]], None],
        page: Callable[[str], str],
    ) -> None:
        self.state, self._mischief, self._clock = state, mischief, clock
        self._tell, self._after, self._page = tell, after, page

    # what a buyer and a bank do

    def pay(self, intent_id: str, method: str = PAYS, return_url: str | None = None) -> Object:
        """Somebody confirms the intent in the browser; a declined card leaves it payable. Returns the intent."""
        intent = self._intent(intent_id)
        try:
            self._attempt(intent, method, return_url)
        except Refusal as refusal:
            if refusal.status != 402:
                raise
        return intent

    def authenticate(self, intent_id: str, approve: bool) -> Object:
        """The buyer answers the bank's question."""
        intent = self._intent(intent_id)
        if intent["status"] != "requires_action":
            raise self._unexpected(intent, "authenticate")
        if approve:
            self._succeed(intent, intent["payment_method"])
        else:
            message = "The provided PaymentMethod has failed authentication."
            self._fail(intent, "payment_intent_authentication_failure", None, message)
        return intent

    def finish(self, intent_id: str, success: bool = True) -> Object:
        """What is processing comes to its end."""
        intent = self._intent(intent_id)
        if intent["status"] != "processing":
            raise self._unexpected(intent, "finish")
        if success:
            self._succeed(intent, intent["payment_method"])
        else:
            self._fail(intent, "payment_intent_payment_attempt_failed", None, "The payment attempt failed.")
        return intent

    def lapse(self, intent_id: str) -> Object:
        """The authorization ends after its seven days."""
        intent = self._intent(intent_id)
        self._cancel(intent, "automatic")
        return intent

    def settle_refund(self, refund_id: str, status: str, failure_reason: str | None = None) -> Object:
        """A refund becomes `succeeded`, `failed` or `canceled`; also one that had succeeded."""
        refund = self.state.refunds[refund_id]
        before = {"status": refund["status"]}
        refund["status"] = status
        if status in ("failed", "canceled"):
            refund["failure_reason"] = failure_reason or ("unknown" if status == "failed" else None)
            self._tally(self.state.charges[refund["charge"]])
        self._tell("refund.updated", refund, before)
        self._tell("charge.refund.updated", refund, before)
        if status == "failed":
            self._tell("refund.failed", refund, None)
        return refund

    def dispute(self, intent_id: str) -> Object:
        """The payer's bank takes the money back for now."""
        charge = self._charge_of(self._intent(intent_id))
        charge["disputed"] = True
        dispute: Object = {
            "id": new_id("dp"),
            "object": "dispute",
            "amount": charge["amount_captured"],
            "balance_transactions": [],
            "charge": charge["id"],
            "created": self._time(),
            "currency": charge["currency"],
            "evidence": {},
            "is_charge_refundable": False,
            "livemode": False,
            "metadata": {},
            "payment_intent": intent_id,
            "reason": "fraudulent",
            "status": "needs_response",
        }
        self.state.disputes[dispute["id"]] = dispute
        self._tell("charge.dispute.created", dispute, None)
        self._tell("charge.dispute.funds_withdrawn", dispute, None)
        return dispute

    def close_dispute(self, dispute_id: str, status: str) -> Object:
        """It ends: `won`, `lost` or `warning_closed`."""
        dispute = self.state.disputes[dispute_id]
        dispute["status"] = status
        self._tell("charge.dispute.closed", dispute, None)
        if status == "won":
            self._tell("charge.dispute.funds_reinstated", dispute, None)
        return dispute

    def create(self, params: Object, _: str) -> Object:
        _only(params, "amount currency capture_method automatic_payment_methods metadata description expand")
        currency = str(params.get("currency", ""))
        if not re.fullmatch(r"[a-z]{3}", currency):
            raise invalid(f"Invalid currency: {currency}", param="currency")
        amount = _whole(params, "amount")
        if amount < _LEAST.get(currency, 1):
            raise invalid("Amount must be at least the minimum charge.", code="amount_too_small", param="amount")
        if (currency in _THREE_DECIMAL and amount % 10) or (currency in ("isk", "ugx") and amount % 100):
            raise invalid(f"Invalid amount for {currency}", code="parameter_invalid_integer", param="amount")
        intent_id = new_id("pi")
        intent: Object = {
            "id": intent_id,
            "object": "payment_intent",
            "amount": amount,
            "amount_capturable": 0,
            "amount_received": 0,
            "automatic_payment_methods": {"enabled": True},
            "canceled_at": None,
            "cancellation_reason": None,
            "capture_method": params.get("capture_method", "automatic"),
            "client_secret": f"{intent_id}_secret_{secrets.token_hex(12)}",
            "confirmation_method": "automatic",
            "created": self._time(),
            "currency": currency,
            "customer": None,
            "description": params.get("description"),
            "last_payment_error": None,
            "latest_charge": None,
            "livemode": False,
            "metadata": params.get("metadata") or {},
            "next_action": None,
            "payment_method": None,
            "payment_method_types": ["card"],
            "processing": None,
            "status": "requires_payment_method",
        }
        self.state.intents[intent_id] = intent
        self._tell("payment_intent.created", intent, None)
        return self._shown(intent, params)

    def retrieve(self, params: Object, intent_id: str) -> Object:
        _only(params, "expand client_secret")
        return self._shown(self._intent(intent_id), params)

    def confirm(self, params: Object, intent_id: str) -> Object:
        _only(params, "payment_method return_url expand")
        intent = self._intent(intent_id)
        if "return_url" not in params:
            raise invalid("A return_url is needed to confirm this PaymentIntent.", param="return_url")
        self._attempt(intent, str(params.get("payment_method", "")), str(params["return_url"]))
        return self._shown(intent, params)

    def capture(self, params: Object, intent_id: str) -> Object:
        _only(params, "amount_to_capture expand")
        intent = self._intent(intent_id)
        if intent["status"] != "requires_capture":
            raise self._unexpected(intent, "capture")
        amount = _whole(params, "amount_to_capture") if "amount_to_capture" in params else intent["amount_capturable"]
        if amount > intent["amount_capturable"] or amount < 1:
            raise invalid(
                "The amount to capture is more than what is capturable.", code="amount_too_large", stored=True
            )
        charge = self._charge_of(intent)
        released = intent["amount_capturable"] - amount
        self._take(intent, charge, amount)
        self._tell("charge.captured", charge, None)
        if released:
            # what is left of the authorization goes back as a refund that never touched the balance
            self._give_back(charge, released, {}, "succeeded", balance=False)
        self._tell("payment_intent.succeeded", intent, None)
        return self._shown(intent, params)

    def cancel(self, params: Object, intent_id: str) -> Object:
        _only(params, "cancellation_reason expand")
        intent = self._intent(intent_id)
        if intent["status"] in ("succeeded", "canceled", "processing"):
            raise self._unexpected(intent, "cancel")
        self._cancel(intent, params.get("cancellation_reason"))
        return self._shown(intent, params)

    def refund(self, params: Object, _: str) -> Object:
        _only(params, "payment_intent charge amount reason metadata expand")
        if "payment_intent" in params:
            charge = self._charge_of(self._intent(str(params["payment_intent"])))
        else:
            charge = self._found(self.state.charges, str(params.get("charge", "")), "charge")
        left = charge["amount_captured"] - _given_back(self.state, charge)
        amount = _whole(params, "amount") if "amount" in params else left
        if self._contested(charge):
            raise invalid("The charge has been charged back.", code="charge_disputed", stored=True)
        if left <= 0:
            raise invalid("The charge has already been refunded.", code="charge_already_refunded", stored=True)
        if not 0 < amount <= left:
            raise invalid("Refund amount is greater than unrefunded amount on charge.", param="amount", stored=True)
        status = {"processed": "succeeded"}.get(self._mischief.refunds, self._mischief.refunds)
        if charge["payment_method"] == REFUND_WAITS:
            status = "pending"
        refund = self._give_back(charge, amount, params.get("metadata") or {}, status, balance=True)
        if charge["payment_method"] == REFUND_FAILS:
            self._after(SETTLES_S, lambda: self.settle_refund(refund["id"], "failed", "expired_or_canceled_card"))
        elif charge["payment_method"] == REFUND_WAITS:
            self._after(SETTLES_S, lambda: self.settle_refund(refund["id"], "succeeded"))
        return refund

    def find_refund(self, params: Object, refund_id: str) -> Object:
        return self._found(self.state.refunds, refund_id, "refund")

    def refunds(self, params: Object, _: str) -> Object:
        _only(params, "payment_intent charge limit starting_after expand")
        return self._listed(self.state.refunds, params, "payment_intent", "charge")

    def disputes(self, params: Object, _: str) -> Object:
        _only(params, "payment_intent charge limit starting_after expand")
        return self._listed(self.state.disputes, params, "payment_intent", "charge")

    def charges(self, params: Object, _: str) -> Object:
        _only(params, "payment_intent created limit starting_after expand")
        return self._listed(self.state.charges, params, "payment_intent", lag=True)

    def balance(self, params: Object, _: str) -> Object:
        _only(params, "created type limit starting_after expand")
        page = self._listed(self.state.balance, params, "type", lag=True)
        if "data.source" in _expansions(params):
            every = self.state.charges | self.state.refunds
            page["data"] = [{**entry, "source": every[entry["source"]]} for entry in page["data"]]
        return page

    # what happens to objects

    def _attempt(self, intent: Object, method: str, return_url: str | None) -> None:
        if method not in _METHODS:
            raise Refusal(
                404,
                "invalid_request_error",
                f"No such PaymentMethod: '{method}'",
                code="resource_missing",
                param="payment_method",
            )
        if intent["status"] not in ("requires_payment_method", "requires_confirmation", "requires_action"):
            raise self._unexpected(intent, "confirm")
        intent["payment_method"], intent["last_payment_error"] = method, None
        if method in ASKS:
            query = {"client_secret": intent["client_secret"], "returnUrl": return_url or ""}
            url = f"{self._page(intent['id'])}?{urlencode(query)}"
            intent["status"] = "requires_action"
            intent["next_action"] = {
                "type": "redirect_to_url",
                "redirect_to_url": {"url": url, "return_url": return_url},
            }
            self._tell("payment_intent.requires_action", intent, None)
        elif method in PROCESSES:
            intent["status"], intent["processing"] = "processing", {"type": "us_bank_account"}
            self._new_charge(intent, method, "pending")
            self._tell("payment_intent.processing", intent, None)
        elif method in DECLINES:
            raise self._fail(intent, *DECLINES[method])
        else:
            self._succeed(intent, method)
            if method == DISPUTED:
                self.dispute(intent["id"])

    def _succeed(self, intent: Object, method: str) -> None:
        manual = intent["capture_method"] == "manual"
        charge = self._new_charge(intent, method, "succeeded")
        intent["next_action"] = intent["processing"] = None
        if manual:
            intent["status"], intent["amount_capturable"] = "requires_capture", intent["amount"]
            self._tell("charge.succeeded", charge, None)
            self._tell("payment_intent.amount_capturable_updated", intent, None)
        else:
            self._take(intent, charge, intent["amount"])
            self._tell("charge.succeeded", charge, None)
            self._tell("payment_intent.succeeded", intent, None)

    def _take(self, intent: Object, charge: Object, amount: int) -> None:
        intent["status"], intent["amount_capturable"], intent["amount_received"] = "succeeded", 0, amount
        charge["captured"], charge["amount_captured"] = True, amount
        charge["balance_transaction"] = self._book(
            "charge", amount, charge["currency"], charge["id"], amount * 3 // 100
        )

    def _fail(self, intent: Object, code: str, decline: str | None, message: str) -> Refusal:
        """A refused attempt; returns what the API says of it."""
        charge = self._new_charge(intent, intent["payment_method"], "failed")
        charge["failure_code"], charge["failure_message"] = code, message
        error: Object = {
            "type": "card_error",
            "code": code,
            "message": message,
            "charge": charge["id"],
            "payment_method": {"id": intent["payment_method"], "object": "payment_method", "type": "card"},
        }
        if decline is not None:
            error["decline_code"] = decline
        if decline == "fraudulent":
            error["advice_code"] = "do_not_try_again"
        intent["status"], intent["last_payment_error"] = "requires_payment_method", error
        intent["payment_method"] = intent["next_action"] = intent["processing"] = None
        self._tell("charge.failed", charge, None)
        self._tell("payment_intent.payment_failed", intent, None)
        more = {name: value for name, value in error.items() if name not in ("type", "message")}
        return Refusal(402, "card_error", message, stored=True, payment_intent=intent, **more)

    def _cancel(self, intent: Object, reason: object) -> None:
        held = intent["status"] == "requires_capture"
        intent["status"], intent["canceled_at"], intent["cancellation_reason"] = "canceled", self._time(), reason
        intent["amount_capturable"], intent["next_action"] = 0, None
        if held:
            charge = self._charge_of(intent)
            self._give_back(charge, charge["amount"], {}, "succeeded", balance=False)
        self._tell("payment_intent.canceled", intent, None)

    def _new_charge(self, intent: Object, method: str, status: str) -> Object:
        charge: Object = {
            "id": new_id("ch"),
            "object": "charge",
            "amount": intent["amount"],
            "amount_captured": 0,
            "amount_refunded": 0,
            "balance_transaction": None,
            "captured": False,
            "created": self._time(),
            "currency": intent["currency"],
            "disputed": False,
            "failure_code": None,
            "failure_message": None,
            "livemode": False,
            "metadata": intent["metadata"],
            "paid": status == "succeeded",
            "payment_intent": intent["id"],
            "payment_method": method,
            "payment_method_details": {"type": "us_bank_account" if method in PROCESSES else "card"},
            "refunded": False,
            "status": status,
        }
        self.state.charges[charge["id"]] = charge
        intent["latest_charge"] = charge["id"]
        return charge

    def _give_back(self, charge: Object, amount: int, metadata: Object, status: str, *, balance: bool) -> Object:
        refund: Object = {
            "id": new_id("re"),
            "object": "refund",
            "amount": amount,
            "balance_transaction": None,
            "charge": charge["id"],
            "created": self._time(),
            "currency": charge["currency"],
            "metadata": metadata,
            "payment_intent": charge["payment_intent"],
            "reason": None,
            "status": status,
        }
        if status == "failed":
            refund["failure_reason"] = "unknown"
        if balance:
            refund["balance_transaction"] = self._book("refund", -amount, charge["currency"], refund["id"], 0)
        self.state.refunds[refund["id"]] = refund
        self._tally(charge)
        self._tell("refund.created", refund, None)
        self._tell("charge.refunded", charge, None)
        return refund

    def _tally(self, charge: Object) -> None:
        charge["amount_refunded"] = sum(
            refund["amount"]
            for refund in self.state.refunds.values()
            if refund["charge"] == charge["id"] and refund["status"] not in ("failed", "canceled")
        )
        charge["refunded"] = charge["amount_refunded"] >= charge["amount"]

    def _book(self, kind: str, amount: int, currency: str, source: str, fee: int) -> str:
        entry: Object = {
            "id": new_id("txn"),
            "object": "balance_transaction",
            "amount": amount,
            "created": self._time(),
            "currency": currency,
            "fee": fee,
            "net": amount - fee,
            "source": source,
            "type": kind,
        }
        self.state.balance[entry["id"]] = entry
        return str(entry["id"])

    def _unexpected(self, intent: Object, verb: str) -> Refusal:
        return Refusal(
            400,
            "invalid_request_error",
            f"You cannot {verb} this PaymentIntent because it has a status of {intent['status']}.",
            stored=True,
            code="payment_intent_unexpected_state",
            payment_intent=dict(intent),
        )

    # looking things up

    def _contested(self, charge: Object) -> bool:
        """Whether a dispute stands between a charge and its refund: one that is open or lost."""
        ended = ("won", "warning_closed")
        return any(d["charge"] == charge["id"] and d["status"] not in ended for d in self.state.disputes.values())

    def _intent(self, intent_id: str) -> Object:
        return self._found(self.state.intents, intent_id, "payment_intent")

    def _charge_of(self, intent: Object) -> Object:
        if intent["latest_charge"] is None:
            raise invalid("This PaymentIntent does not have a successful charge.", stored=True)
        return self.state.charges[intent["latest_charge"]]

    def _found(self, things: dict[str, Object], thing_id: str, kind: str) -> Object:
        if thing_id not in things:
            message = f"No such {kind}: '{thing_id}'"
            raise Refusal(404, "invalid_request_error", message, code="resource_missing", param="id")
        return things[thing_id]

    def _shown(self, intent: Object, params: Object) -> Object:
        wanted = _expansions(params)
        shown = dict(intent)
        charge = self.state.charges.get(intent["latest_charge"] or "")
        if charge is not None and any(one.startswith("latest_charge") for one in wanted):
            charge = dict(charge)
            if "latest_charge.balance_transaction" in wanted and charge["balance_transaction"]:
                charge["balance_transaction"] = self.state.balance[charge["balance_transaction"]]
            if "latest_charge.refunds" in wanted:
                charge["refunds"] = self._listed(self.state.refunds, {"charge": charge["id"], "limit": "10"}, "charge")
            shown["latest_charge"] = charge
        return shown

    def _listed(self, things: dict[str, Object], params: Object, *filters: str, lag: bool = False) -> Object:
        created = params.get("created") or {}
        youngest = self._time() - self._mischief.list_lag_s if lag else float("inf")
        found = [
            thing
            for thing in reversed(list(things.values()))  # newest first
            if all(params[name] == thing[name] for name in filters if name in params)
            and int(created.get("gte", 0)) <= thing["created"] < int(created.get("lt", 2**53))
            and thing["created"] <= youngest
        ]
        after = params.get("starting_after")
        if after is not None:
            found = found[[thing["id"] for thing in found].index(after) + 1 :]
        limit = int(params.get("limit", 10))
        return {"object": "list", "data": found[:limit], "has_more": len(found) > limit, "url": "/v1/"}

    def _time(self) -> int:
        return int(self._clock())


def _expansions(params: Object) -> frozenset[str]:
    given = params.get("expand")
    return frozenset(given) if isinstance(given, list) else frozenset()


def _only(params: Object, known: str) -> None:
    for name in params:
        if name not in known.split():
            raise invalid(f"Received unknown parameter: {name}", code="parameter_unknown", param=name)


def _whole(params: Object, name: str) -> int:
    given = str(params.get(name, ""))
    if not given:
        raise invalid(f"Missing required param: {name}.", code="parameter_missing", param=name)
    if not re.fullmatch(r"[0-9]{1,12}", given):
        raise invalid(f"Invalid integer: {given}", code="parameter_invalid_integer", param=name)
    return int(given)


def _given_back(state: State, charge: Object) -> int:
    return sum(
        refund["amount"]
        for refund in state.refunds.values()
        if refund["charge"] == charge["id"]
        and refund["status"] not in ("failed", "canceled")
        and refund["balance_transaction"] is not None
    )


def new_id(prefix: str) -> str:
    """An id as Stripe writes it."""
    return f"{prefix}_{secrets.token_hex(12)}"
