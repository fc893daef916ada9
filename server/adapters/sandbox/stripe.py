"""A simulator of Stripe on 127.0.0.1: what of its API, its webhooks and its checkout the adapter and a buyer meet.

It keeps to what is documented and recorded (facts of the gateways, fixtures of its objects) and shows objects in the
shape of API 2024-10-28 and later. What it cannot show: real limits, real settlement, a bank's time-outs, Stripe.js.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import msgspec
import structlog
from aiohttp import web

from server.adapters.sandbox.courier import Courier, Parcel
from server.adapters.sandbox.mischief import Fault, Mischief, meet_fault, mischief_routes

log = structlog.get_logger()

API_VERSION = "2026-10-28.endive"
RETRIES_S = (3600.0, 3 * 3600.0, 8 * 3600.0)
"""Stripe tries three times more in a sandbox, over hours."""
ANSWER_LIMIT_S = 10.0
UNHEARD = frozenset({"payment_intent.created"})
"""Events that the account's endpoint has not enabled: docs/payments.md names those that it should."""
SETTLES_S = 5.0
"""How long a payment that is processing takes."""
PAGE = Path(__file__).with_name("stripe_checkout.html")

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
Verb = Callable[["StripeSimulator", Object, str], Awaitable[Object]]


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
    status: int = 0
    body: Object = {}


class State(msgspec.Struct):
    """Everything that the simulator remembers, also in its file."""

    intents: dict[str, Object] = {}
    charges: dict[str, Object] = {}
    refunds: dict[str, Object] = {}
    disputes: dict[str, Object] = {}
    balance: dict[str, Object] = {}
    keys: dict[str, Stored] = {}


class StripeSimulator:
    """One account in test mode.

    `webhook_url`: where events go, empty: nowhere. `pace`: Stripe's seconds (retries, processing) are multiplied by it.
    `file`: keeps the state over restarts.
    """

    def __init__(
        self,
        now: Callable[[], dt.datetime],
        *,
        secret_key: str = "sk_test_simulator",
        publishable_key: str = "pk_test_simulator",
        webhook_url: str = "",
        pace: float = 1.0,
        file: Path | None = None,
        seed: int = 0,
    ) -> None:
        if not secret_key.startswith("sk_test_") or not publishable_key.startswith("pk_test_"):
            raise ValueError("the simulator of Stripe takes test keys only")
        self.secret_key, self.publishable_key = secret_key, publishable_key
        self.webhook_secrets = [f"whsec_{secrets.token_hex(16)}"]
        """Newest first. Several while one is rolled: events are signed with each."""
        self.next_webhook_secret = f"whsec_{secrets.token_hex(16)}"
        """Of the next roll, so that an adapter can know it beforehand."""
        self.mischief = Mischief()
        self.courier = Courier(webhook_url, self.mischief, pace=pace, answer_limit_s=ANSWER_LIMIT_S, seed=seed)
        self.events: list[Object] = []
        """Every event, oldest first."""
        self.calls: list[tuple[str, str, str]] = []
        """Method, path and idempotency key of every call of the API."""
        self.url, self.port = "", 0
        self._now, self._pace, self._file = now, pace, file
        self._runner: web.AppRunner | None = None
        self._stopping = asyncio.Event()
        self._later: set[asyncio.Task[None]] = set()
        self.state = State()
        if file is not None and file.is_file():
            self.state = msgspec.json.decode(file.read_bytes(), type=State)
            # calls that were under way when the simulator ended
            self.state.keys = {key: stored for key, stored in self.state.keys.items() if stored.status}

    async def start(self, port: int = 0) -> None:
        """Listen on 127.0.0.1; port 0: a free one. Then `url` and `port` are known."""
        self._stopping.clear()
        app = web.Application()
        app.router.add_route("*", "/v1/{tail:.*}", self._serve)
        app.router.add_get("/checkout/{intent}", self._page)
        app.router.add_get("/checkout/{intent}/state", self._page_state)
        app.router.add_post("/checkout/{intent}/{action}", self._page_action)
        app.add_routes(mischief_routes(self.mischief))
        await self.courier.start()
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.port = int(self._runner.addresses[0][1])
        self.url = f"http://127.0.0.1:{self.port}"
        log.warning("sandbox_simulator", provider="stripe", url=self.url, note="a simulator, no money moves")

    async def stop(self) -> None:
        """Answer nobody any more."""
        self._stopping.set()
        for task in self._later:
            task.cancel()
        await asyncio.gather(*self._later, return_exceptions=True)
        await self.courier.stop()
        if self._runner is not None:
            await self._runner.cleanup()

    def roll_secret(self) -> str:
        """A new secret of the endpoint; until `end_roll` events carry a signature with each."""
        self.webhook_secrets.insert(0, self.next_webhook_secret)
        self.next_webhook_secret = f"whsec_{secrets.token_hex(16)}"
        return self.webhook_secrets[0]

    def end_roll(self) -> None:
        """The old secrets end."""
        del self.webhook_secrets[1:]

    # what a buyer and a bank do

    def pay(self, intent_id: str, method: str = PAYS, return_url: str | None = None) -> Object:
        """Somebody confirms the intent in the browser; a declined card leaves it payable. Returns the intent."""
        intent = self._intent(intent_id)
        try:
            self._attempt(intent, method, return_url)
        except Refusal as refusal:
            if refusal.status != 402:
                raise
        self._keep()
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
        self._keep()
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
        self._keep()
        return intent

    def lapse(self, intent_id: str) -> Object:
        """The authorization ends after its seven days."""
        intent = self._intent(intent_id)
        self._cancel(intent, "automatic")
        self._keep()
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
            self._tell("refund.failed", refund)
        self._keep()
        return refund

    def dispute(self, intent_id: str) -> Object:
        """The payer's bank takes the money back for now."""
        charge = self._charge_of(self._intent(intent_id))
        charge["disputed"] = True
        dispute: Object = {
            "id": _id("dp"),
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
        self._tell("charge.dispute.created", dispute)
        self._tell("charge.dispute.funds_withdrawn", dispute)
        self._keep()
        return dispute

    def close_dispute(self, dispute_id: str, status: str) -> Object:
        """It ends: `won`, `lost` or `warning_closed`."""
        dispute = self.state.disputes[dispute_id]
        dispute["status"] = status
        self._tell("charge.dispute.closed", dispute)
        if status == "won":
            self._tell("charge.dispute.funds_reinstated", dispute)
        self._keep()
        return dispute

    # the API

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        key = request.headers.get("Idempotency-Key", "")
        self.calls.append((request.method, request.path, key))
        fault = self.mischief.take_fault(request.method)
        if fault in (Fault.ERROR, Fault.ERROR_AFTER):
            return await self._answer(request, key, fault)
        throttled = {"error": {"type": "invalid_request_error", "code": "rate_limit", "message": "Too many requests."}}

        async def answer(_: web.Request) -> web.StreamResponse:
            return await self._answer(request, key, None)

        return await meet_fault(fault, request, answer, json.dumps(throttled).encode(), self._stopping)

    async def _answer(self, request: web.Request, key: str, fault: Fault | None) -> web.StreamResponse:
        try:
            self._let_in(request)
            params = nested(await request.text() if request.method == "POST" else request.query_string)
            verb, subject = self._route(request)
            stored = self._begin(key, request.path, params) if key and request.method == "POST" else None
        except Refusal as refusal:
            return _respond(refusal.status, {"error": refusal.error})
        if stored is not None and stored.status:
            return _respond(stored.status, stored.body, replayed=True)
        keep = False
        try:
            if fault is not Fault.ERROR:
                body = await verb(self, params, subject)
            status, keep = 200, True
            if fault is not None:
                body = {"error": {"type": "api_error", "message": "An error occurred on our end."}}
                status = 500
        except Refusal as refusal:
            status, body, keep = refusal.status, {"error": refusal.error}, refusal.stored
        finally:
            if stored is not None and not keep:
                del self.state.keys[key]
        if stored is not None and keep:
            stored.status, stored.body = status, json.loads(json.dumps(body))
        self._keep()
        return _respond(status, body)

    def _let_in(self, request: web.Request) -> None:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if given.startswith(("sk_live_", "rk_live_")):
            raise Refusal(403, "invalid_request_error", "This is a simulator. It takes no live keys.")
        if scheme != "Bearer" or given != self.secret_key:
            raise Refusal(401, "invalid_request_error", f"Invalid API Key provided: {given[:8]}****")

    def _begin(self, key: str, path: str, params: Object) -> Stored:
        stored = self.state.keys.get(key)
        if stored is None:
            stored = self.state.keys[key] = Stored(path, params)
            return stored
        if stored.path != path or stored.params != params:
            message = (
                "Keys for idempotent requests can only be used with the same parameters they were first used with."
            )
            raise Refusal(400, "idempotency_error", message)
        if not stored.status:
            message = "There is currently another in-progress request using this Stripe-Idempotency-Key."
            raise Refusal(409, "idempotency_error", message, code="idempotency_key_in_use")
        return stored

    def _route(self, request: web.Request) -> tuple[Verb, str]:
        for method, pattern, verb in ROUTES:
            found = re.fullmatch(pattern, request.path)
            if found and method == request.method:
                return verb, found.group(1) if found.groups() else ""
        raise Refusal(404, "invalid_request_error", f"Unrecognized request URL ({request.method}: {request.path}).")

    async def _create(self, params: Object, _: str) -> Object:
        _only(params, "amount currency capture_method automatic_payment_methods metadata description expand")
        currency = str(params.get("currency", ""))
        if not re.fullmatch(r"[a-z]{3}", currency):
            raise invalid(f"Invalid currency: {currency}", param="currency")
        amount = _whole(params, "amount")
        if amount < _LEAST.get(currency, 1):
            raise invalid("Amount must be at least the minimum charge.", code="amount_too_small", param="amount")
        if (currency in _THREE_DECIMAL and amount % 10) or (currency in ("isk", "ugx") and amount % 100):
            raise invalid(f"Invalid amount for {currency}", code="parameter_invalid_integer", param="amount")
        intent_id = _id("pi")
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
        self._tell("payment_intent.created", intent)
        return self._shown(intent, params)

    async def _retrieve(self, params: Object, intent_id: str) -> Object:
        _only(params, "expand client_secret")
        return self._shown(self._intent(intent_id), params)

    async def _confirm(self, params: Object, intent_id: str) -> Object:
        _only(params, "payment_method return_url expand")
        intent = self._intent(intent_id)
        if "return_url" not in params:
            raise invalid("A return_url is needed to confirm this PaymentIntent.", param="return_url")
        self._attempt(intent, str(params.get("payment_method", "")), str(params["return_url"]))
        return self._shown(intent, params)

    async def _capture(self, params: Object, intent_id: str) -> Object:
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
        self._tell("charge.captured", charge)
        if released:
            # what is left of the authorization goes back as a refund that never touched the balance
            self._give_back(charge, released, {}, "succeeded", balance=False)
        self._tell("payment_intent.succeeded", intent)
        return self._shown(intent, params)

    async def _cancel_call(self, params: Object, intent_id: str) -> Object:
        _only(params, "cancellation_reason expand")
        intent = self._intent(intent_id)
        if intent["status"] in ("succeeded", "canceled", "processing"):
            raise self._unexpected(intent, "cancel")
        self._cancel(intent, params.get("cancellation_reason"))
        return self._shown(intent, params)

    async def _refund(self, params: Object, _: str) -> Object:
        _only(params, "payment_intent charge amount reason metadata expand")
        if "payment_intent" in params:
            charge = self._charge_of(self._intent(str(params["payment_intent"])))
        else:
            charge = self._found(self.state.charges, str(params.get("charge", "")), "charge")
        await asyncio.sleep(self.mischief.refund_takes_s)
        left = charge["amount_captured"] - _given_back(self.state, charge)
        amount = _whole(params, "amount") if "amount" in params else left
        if charge["disputed"]:
            raise invalid("The charge has been charged back.", code="charge_disputed", stored=True)
        if left <= 0:
            raise invalid("The charge has already been refunded.", code="charge_already_refunded", stored=True)
        if not 0 < amount <= left:
            raise invalid("Refund amount is greater than unrefunded amount on charge.", param="amount", stored=True)
        status = {"processed": "succeeded"}.get(self.mischief.refunds, self.mischief.refunds)
        if charge["payment_method"] == REFUND_WAITS:
            status = "pending"
        refund = self._give_back(charge, amount, params.get("metadata") or {}, status, balance=True)
        if charge["payment_method"] == REFUND_FAILS:
            self._after(SETTLES_S, lambda: self.settle_refund(refund["id"], "failed", "expired_or_canceled_card"))
        elif charge["payment_method"] == REFUND_WAITS:
            self._after(SETTLES_S, lambda: self.settle_refund(refund["id"], "succeeded"))
        return refund

    async def _refund_retrieve(self, params: Object, refund_id: str) -> Object:
        return self._found(self.state.refunds, refund_id, "refund")

    async def _refunds(self, params: Object, _: str) -> Object:
        _only(params, "payment_intent charge limit starting_after expand")
        return self._listed(self.state.refunds, params, "payment_intent", "charge")

    async def _disputes(self, params: Object, _: str) -> Object:
        _only(params, "payment_intent charge limit starting_after expand")
        return self._listed(self.state.disputes, params, "payment_intent", "charge")

    async def _charges(self, params: Object, _: str) -> Object:
        _only(params, "payment_intent created limit starting_after expand")
        return self._listed(self.state.charges, params, "payment_intent", lag=True)

    async def _balance(self, params: Object, _: str) -> Object:
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
            query = {"client_secret": intent["client_secret"], "return_url": return_url or ""}
            url = f"{self.url}/checkout/{intent['id']}?{urlencode(query)}"
            intent["status"] = "requires_action"
            intent["next_action"] = {
                "type": "redirect_to_url",
                "redirect_to_url": {"url": url, "return_url": return_url},
            }
            self._tell("payment_intent.requires_action", intent)
        elif method in PROCESSES:
            intent["status"], intent["processing"] = "processing", {"type": "us_bank_account"}
            self._new_charge(intent, method, "pending")
            self._tell("payment_intent.processing", intent)
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
            self._tell("charge.succeeded", charge)
            self._tell("payment_intent.amount_capturable_updated", intent)
        else:
            self._take(intent, charge, intent["amount"])
            self._tell("charge.succeeded", charge)
            self._tell("payment_intent.succeeded", intent)

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
        self._tell("charge.failed", charge)
        self._tell("payment_intent.payment_failed", intent)
        more = {name: value for name, value in error.items() if name not in ("type", "message")}
        return Refusal(402, "card_error", message, stored=True, payment_intent=intent, **more)

    def _cancel(self, intent: Object, reason: object) -> None:
        held = intent["status"] == "requires_capture"
        intent["status"], intent["canceled_at"], intent["cancellation_reason"] = "canceled", self._time(), reason
        intent["amount_capturable"], intent["next_action"] = 0, None
        if held:
            charge = self._charge_of(intent)
            self._give_back(charge, charge["amount"], {}, "succeeded", balance=False)
        self._tell("payment_intent.canceled", intent)

    def _new_charge(self, intent: Object, method: str, status: str) -> Object:
        charge: Object = {
            "id": _id("ch"),
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
            "id": _id("re"),
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
        self._tell("refund.created", refund)
        self._tell("charge.refunded", charge)
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
            "id": _id("txn"),
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

    # events

    def _tell(self, kind: str, thing: Object, before: Object | None = None) -> None:
        data: Object = {"object": json.loads(json.dumps(thing))}
        if before is not None:
            data["previous_attributes"] = before
        event: Object = {
            "id": _id("evt"),
            "object": "event",
            "api_version": API_VERSION,
            "created": self._time(),
            "data": data,
            "livemode": False,
            "pending_webhooks": 1,
            "request": {"id": None, "idempotency_key": None},
            "type": kind,
        }
        self.events.append(event)
        if kind not in UNHEARD:
            self.deliver(event)

    def deliver(self, event: Object) -> None:
        """Send an event, again if it was sent before."""
        body = json.dumps(event, indent=2).encode()
        self.courier.send(
            Parcel(
                event_id=event["id"],
                kind=event["type"],
                body=body,
                headers=lambda: {"Content-Type": "application/json", "Stripe-Signature": self.signature(body)},
                retries_s=RETRIES_S,
            )
        )

    def signature(self, body: bytes) -> str:
        """The Stripe-Signature header of this moment."""
        stamp = str(self._time())
        signed = stamp.encode() + b"." + body
        digests = [hmac.new(one.encode(), signed, hashlib.sha256).hexdigest() for one in self.webhook_secrets]
        return ",".join([f"t={stamp}", *(f"v1={digest}" for digest in digests)])

    # the checkout page

    async def _page(self, request: web.Request) -> web.Response:
        self._of_buyer(request)
        return web.Response(text=PAGE.read_text(), content_type="text/html")

    async def _page_state(self, request: web.Request) -> web.Response:
        intent = self._of_buyer(request)
        shown = {name: intent[name] for name in ("id", "amount", "currency", "status", "description")}
        fault = intent["last_payment_error"]
        return web.json_response({**shown, "message": fault["message"] if fault else None})

    async def _page_action(self, request: web.Request) -> web.Response:
        intent = self._of_buyer(request)
        return_url = request.query.get("return_url", "")
        try:
            match request.match_info["action"]:
                case "pay":
                    self.pay(intent["id"], return_url=return_url)
                case "fail":
                    self.pay(intent["id"], "pm_card_chargeDeclined", return_url)
                case "secure":
                    self.pay(intent["id"], "pm_card_authenticationRequired", return_url)
                case "late":
                    self.pay(intent["id"], "pm_usBankAccount_success", return_url)
                    self._after(SETTLES_S, lambda: self.finish(intent["id"]))
                case "approve":
                    self.authenticate(intent["id"], approve=True)
                case "refuse":
                    self.authenticate(intent["id"], approve=False)
                case "cancel":
                    pass  # the buyer goes away; the intent stays payable
                case _:
                    raise web.HTTPNotFound
        except Refusal as refusal:
            return web.json_response({"message": str(refusal)}, status=refusal.status)
        done = intent["status"] in ("succeeded", "requires_capture", "processing")
        goes = done or request.match_info["action"] in ("cancel", "refuse")
        back = _return_to(return_url, intent) if goes and return_url else None
        return web.json_response({"status": intent["status"], "return": back})

    def _of_buyer(self, request: web.Request) -> Object:
        intent = self.state.intents.get(request.match_info["intent"])
        given = request.query.get("client_secret", "")
        if intent is None or not hmac.compare_digest(given.encode(), intent["client_secret"].encode()):
            raise web.HTTPNotFound
        return intent

    # helpers

    def _after(self, seconds: float, do: Callable[[], object]) -> None:
        async def later() -> None:
            await asyncio.sleep(seconds * self._pace)
            do()

        task = asyncio.create_task(later())
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    def _time(self) -> int:
        return int(self._now().timestamp())

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
        youngest = self._time() - self.mischief.list_lag_s if lag else float("inf")
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

    def _keep(self) -> None:
        if self._file is None:
            return
        fresh = self._file.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(self.state))
        fresh.replace(self._file)


_INTENT = r"/v1/payment_intents/(pi_\w+)"
ROUTES: tuple[tuple[str, str, Verb], ...] = (
    ("POST", r"/v1/payment_intents", StripeSimulator._create),
    ("GET", _INTENT, StripeSimulator._retrieve),
    ("POST", rf"{_INTENT}/confirm", StripeSimulator._confirm),
    ("POST", rf"{_INTENT}/capture", StripeSimulator._capture),
    ("POST", rf"{_INTENT}/cancel", StripeSimulator._cancel_call),
    ("POST", r"/v1/refunds", StripeSimulator._refund),
    ("GET", r"/v1/refunds", StripeSimulator._refunds),
    ("GET", r"/v1/refunds/(re_\w+)", StripeSimulator._refund_retrieve),
    ("GET", r"/v1/disputes", StripeSimulator._disputes),
    ("GET", r"/v1/charges", StripeSimulator._charges),
    ("GET", r"/v1/balance_transactions", StripeSimulator._balance),
)


def nested(text: str) -> Object:
    """A form body or a query as Stripe reads it: `a[b]=c` is an object, `a[]=c` and `a[0]=c` are lists."""
    root: Object = {}
    for name, value in parse_qsl(text, keep_blank_values=True):
        first, *rest = re.findall(r"[^\[\]]+|(?<=\[)(?=\])", name)
        place, key = root, first
        for part in rest:
            place, key = place.setdefault(key, {}), part or str(len(place.get(key, {})))
        place[key] = value
    return {key: _lists(value) for key, value in root.items()}


def _lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {key: _lists(one) for key, one in value.items()}
    return list(inner.values()) if inner and all(key.isdigit() for key in inner) else inner


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


def _return_to(return_url: str, intent: Object) -> str:
    """Where Stripe sends the buyer, with what it adds to the address."""
    status = {"succeeded": "succeeded", "requires_capture": "succeeded", "processing": "processing"}
    query = {
        "payment_intent": intent["id"],
        "payment_intent_client_secret": intent["client_secret"],
        "redirect_status": status.get(intent["status"], "failed"),
    }
    return f"{return_url}{'&' if '?' in return_url else '?'}{urlencode(query)}"


def _respond(status: int, body: Mapping[str, Any], *, replayed: bool = False) -> web.Response:
    headers = {"Request-Id": _id("req")} | ({"Idempotent-Replayed": "true"} if replayed else {})
    return web.json_response(body, status=status, headers=headers)


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"
