"""Stripe behind our port: the official SDK, asked asynchronously, with idempotency keys of ours.

Why it looks first, walks keys, and sometimes takes a fresh one: docs/decisions/0020-stripe-keys.md. What Stripe's
objects mean is in stripe_news.py, its amounts are in stripe_money.py, the signature of webhooks in stripe_webhooks.py.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import Any, TypeVar

import httpx
import msgspec
import stripe
from stripe import StripeObject
from stripe.params import PaymentIntentConfirmParams, PaymentIntentCreateParams, RefundCreateParams

from handlers.ports import (
    Confirmed,
    Created,
    Delivery,
    GatewayAway,
    GatewayFailed,
    GatewayRefused,
    GatewayUnknown,
    Known,
    Movement,
    NewPayment,
    NewRefund,
)
from models.errors import Invalid
from models.payment import Capture, DisputeNews, News, Provider, RefundNews, Report
from server.adapters import stripe_money
from server.adapters.bounds import Currency, Minor, words
from server.adapters.breaker import Breaker
from server.adapters.stripe_news import (
    Charge,
    Dispute,
    Id,
    Intent,
    Refund,
    news_of_dispute,
    news_of_event,
    news_of_intent,
    news_of_refund,
)
from server.adapters.stripe_webhooks import envelope_of, verified

API_URL = "https://api.stripe.com"
"""For test keys and live keys alike: the key picks the mode."""
KEYS_MAX = 12
"""Most keys that are walked for one command: an earlier try each."""
PAGE_MAX = 100
"""Stripe's longest page of a list."""
_INTENT = ["latest_charge.balance_transaction", "latest_charge.refunds"]
"""What an intent brings along: method, fee, refunds."""
_UNEXPECTED_STATE = "payment_intent_unexpected_state"
_CONFIRMED = (Report.PROCESSING, Report.AUTHORIZED, Report.CAPTURED)
_NEVER_CONNECTED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)

S = TypeVar("S", bound=StripeObject)
T = TypeVar("T")


class _Replayed(Exception):
    """Stripe repeated the refusal that it has stored under the key."""


class Stripe:
    """Fulfils handlers.ports.Gateway. Built inside the running loop, whose connections it holds until `close`.

    `webhook_secrets`: newest first. `timeout_s` bounds a whole question, `tolerance_s` how far the time of a webhook's
    signature may be off. `sandbox_url`: set when it talks to a simulator of ours, whose page then takes the payer's
    money in play. `clock`: Unix seconds.
    """

    provider = Provider.STRIPE

    def __init__(
        self,
        *,
        secret_key: str,
        publishable_key: str,
        webhook_secrets: Sequence[str],
        breaker: Breaker,
        timeout_s: float,
        tolerance_s: int,
        api_url: str = API_URL,
        sandbox_url: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        stripe.enable_telemetry = False
        self._publishable_key, self._webhook_secrets = publishable_key, tuple(webhook_secrets)
        self._breaker, self._clock, self._sandbox_url = breaker, clock, sandbox_url
        self._timeout_s, self._tolerance_s = timeout_s, tolerance_s
        # Half of the time for connecting: who was never reached is known to have done nothing.
        self._http = _Http(httpx.Timeout(timeout_s, connect=timeout_s / 2), api_url)
        self._client = stripe.StripeClient(
            secret_key,
            base_addresses={"api": api_url.rstrip("/")},
            http_client=self._http,
            max_network_retries=0,  # the caller repeats, and knows under which key
        )

    async def close(self) -> None:
        """Give the connections back."""
        await self._http.close_async()  # type: ignore[no-untyped-call]

    @property
    def offered(self) -> bool:
        return self._breaker.offered

    @property
    def simulated(self) -> bool:
        return bool(self._sandbox_url)

    def check_amount(self, amount: int, currency: str) -> None:
        """See the port."""
        stripe_money.check(amount, currency)

    # payments

    async def create(self, new: NewPayment) -> Created:
        """See the port. `reference` is the key; one that holds a stored refusal is followed by the next."""
        params: PaymentIntentCreateParams = {
            "amount": self._exactly(new.amount, new.currency),
            "currency": new.currency.lower(),
            "capture_method": "manual" if new.capture is Capture.MANUAL else "automatic",
            "automatic_payment_methods": {"enabled": True},
            "metadata": {"payment_id": new.payment_id, "order_id": new.order_id},
        }
        if new.description:
            params["description"] = new.description
        service = self._client.v1.payment_intents
        async with self._question("create"):
            intent = await self._walk(
                new.reference, lambda key: service.create_async(params, {"idempotency_key": key}), Intent
            )
        if (intent.amount, intent.currency) != (params["amount"], params["currency"]):
            raise GatewayUnknown(self.provider, "unreadable", "the intent is not the one that was asked for")
        return Created(gateway_order_id=intent.id, client_secret=intent.client_secret)

    async def fetch(self, known: Known) -> Sequence[News]:
        """See the port: the intent, which succeeds once, with its refunds and disputes."""
        async with self._question("fetch"):
            return (await self._fresh(known.gateway_order_id),)

    async def capture(self, known: Known, amount: int, currency: str) -> News:
        """See the port. What is not captured of an authorization is released. One that was captured before, of so
        much, is told as it is."""
        value = self._exactly(amount, currency)
        service = self._client.v1.payment_intents
        try:
            async with self._question("capture"):
                answer = await self._ask(
                    service.capture_async(
                        known.gateway_order_id, {"amount_to_capture": value, "expand": _INTENT}, _once()
                    )
                )
        except GatewayRefused as refused:
            told = refused.news
            if told is None or (told.report, told.amount, told.currency) != (Report.CAPTURED, amount, currency):
                raise
            return told
        return news_of_intent(self._read(answer, Intent), fresh=True)

    async def cancel(self, known: Known) -> Sequence[News]:
        """See the port. An intent that succeeded, or is being processed, stays as it is; its news say so."""
        service = self._client.v1.payment_intents
        async with self._question("cancel"):
            try:
                answer = await self._ask(service.cancel_async(known.gateway_order_id, {"expand": _INTENT}, _once()))
            except GatewayRefused as refused:
                if refused.code != _UNEXPECTED_STATE:
                    raise
                return (await self._fresh(known.gateway_order_id),)
        return (news_of_intent(self._read(answer, Intent), fresh=True),)

    async def confirm(self, known: Known, payment_method_id: str, return_url: str) -> Confirmed:
        """See the port. An intent that was confirmed before, or is paid, is told as it is."""
        service = self._client.v1.payment_intents
        params: PaymentIntentConfirmParams = {
            "payment_method": payment_method_id,
            "return_url": return_url,
            "expand": _INTENT,
        }
        try:
            async with self._question("confirm"):
                answer = await self._ask(service.confirm_async(known.gateway_order_id, params, _once()))
        except GatewayRefused as refused:
            told = refused.news
            if refused.code != _UNEXPECTED_STATE or told is None or told.report not in _CONFIRMED:
                raise
            return Confirmed(news=told)
        intent = self._read(answer, Intent)
        action = intent.next_action if intent.status == "requires_action" else None
        redirect = action.redirect_to_url if action is not None else None
        return Confirmed(
            news=news_of_intent(intent, fresh=True), redirect_url=redirect.url if redirect is not None else None
        )

    async def client_secret(self, known: Known) -> str | None:
        """See the port."""
        async with self._question("client_secret"):
            answer = await self._ask(self._client.v1.payment_intents.retrieve_async(known.gateway_order_id))
        return self._read(answer, Intent).client_secret

    def checkout(self, known: Known, client_secret: str | None, prefill: Mapping[str, str]) -> dict[str, Any]:
        """See the port."""
        data = {"publishableKey": self._publishable_key, "clientSecret": client_secret or ""}
        if self._sandbox_url and client_secret:
            data["url"] = f"{self._sandbox_url}/checkout/{known.gateway_order_id}?client_secret={client_secret}"
        return data

    def proves_checkout(self, gateway_order_id: str, gateway_payment_id: str, signature: str) -> bool:
        """See the port: Stripe's browser brings no proof, so it is asked instead."""
        return False

    # refunds

    async def refund(self, new: NewRefund) -> RefundNews:
        """See the port. This try of it is looked for first: keys are forgotten after a day, refunds never."""
        params: RefundCreateParams = {
            "payment_intent": new.capture_key,
            "amount": self._exactly(new.amount, new.currency),
            "metadata": {"refund_id": new.refund_id, "attempt": str(new.attempt)},
        }
        service = self._client.v1.refunds
        async with self._question("refund"):
            refund = await self._find(new)
            if refund is None:
                refund = await self._walk(
                    new.key, lambda key: service.create_async(params, {"idempotency_key": key}), Refund
                )
            elif (refund.amount, refund.currency) != (params["amount"], new.currency.lower()):
                raise GatewayRefused(self.provider, 400, "idempotency_error", "this refund was made of another amount")
        return news_of_refund(refund)

    async def fetch_refund(self, new: NewRefund, gateway_refund_id: str | None) -> RefundNews | None:
        """See the port."""
        async with self._question("fetch_refund"):
            if gateway_refund_id is None:
                found = await self._find(new)
                return news_of_refund(found) if found is not None else None
            try:
                answer = await self._ask(self._client.v1.refunds.retrieve_async(gateway_refund_id))
            except GatewayRefused as refused:
                if refused.status == 404:
                    return None
                raise
        return news_of_refund(self._read(answer, Refund))

    async def _find(self, new: NewRefund) -> Refund | None:
        """This try of a refund of ours among those of its intent."""
        async for refund in self._pages(
            self._client.v1.refunds.list_async, {"payment_intent": new.capture_key}, Refund
        ):
            if refund.ours == new.refund_id and (refund.metadata or {}).get("attempt") == str(new.attempt):
                return refund
        return None

    # books

    async def movements(self, start: dt.datetime, end: dt.datetime) -> AsyncIterator[Movement]:
        """See the port. Read from the balance, which has the time of the capture; a charge has only that of its
        authorization, up to a week earlier."""
        wanted = {"created": {"gte": _unix(start), "lt": _unix(end)}, "expand": ["data.source"]}
        listed = self._pages(
            self._client.v1.balance_transactions.list_async, wanted, _Entry, question_of_each="movements"
        )
        async for entry in listed:
            taken = entry.source
            if entry.type not in ("charge", "payment") or not isinstance(taken, _Taken):
                continue
            if taken.payment_intent is None or not taken.captured:
                continue
            currency = taken.currency.upper()
            yield Movement(
                gateway_order_id=taken.payment_intent,
                gateway_payment_id=taken.id,
                amount=stripe_money.from_stripe(taken.amount_captured, currency),
                currency=currency,
                captured_at=dt.datetime.fromtimestamp(entry.created, dt.UTC),
            )

    # webhooks

    def receive(self, body: bytes, headers: Mapping[str, str]) -> Delivery:
        """See the port."""
        header = next((value for name, value in headers.items() if name.lower() == "stripe-signature"), "")
        verified(body, header, self._webhook_secrets, self._clock(), self._tolerance_s)
        return envelope_of(body)

    def read(self, kind: str, body: bytes) -> Sequence[News]:
        """See the port.

        Raises:
            GatewayUnknown: a kind that we know, in a shape that we don't: a person must look.
        """
        try:
            return news_of_event(kind, msgspec.json.decode(body)["data"]["object"])
        except (msgspec.DecodeError, KeyError, TypeError) as error:
            raise GatewayUnknown(self.provider, "unreadable", f"{kind}: {error}") from error

    # how Stripe is asked

    async def _fresh(self, intent_id: str) -> News:
        answer = await self._ask(self._client.v1.payment_intents.retrieve_async(intent_id, {"expand": _INTENT}))
        intent = self._read(answer, Intent)
        disputes: list[DisputeNews] = []
        if isinstance(intent.latest_charge, Charge) and intent.latest_charge.disputed:
            listed = self._pages(self._client.v1.disputes.list_async, {"payment_intent": intent_id}, Dispute)
            disputes = [news_of_dispute(one) async for one in listed]
        return news_of_intent(intent, fresh=True, disputes=tuple(disputes))

    @asynccontextmanager
    async def _question(self, operation: str) -> AsyncIterator[None]:
        """Around all requests of one question: bounded in time, and counted by the breaker."""
        with self._breaker.call(operation):
            try:
                async with asyncio.timeout(self._timeout_s):
                    yield
            except TimeoutError as error:
                message = f"no answer within {self._timeout_s:g} s"
                raise GatewayUnknown(self.provider, "timeout", message) from error

    async def _walk(self, stem: str, send: Callable[[str], Awaitable[StripeObject]], shape: type[T]) -> T:
        """Send under `stem`, or the first key after it that holds no stored refusal.

        A refusal that Stripe replays is final for its key: the command ended, and made nothing, or nothing that anybody
        knows of.
        """
        for number in range(1, KEYS_MAX):
            try:
                return self._read(await self._ask(send(_numbered(stem, number)), walks=True), shape)
            except _Replayed:
                continue
        return self._read(await self._ask(send(_numbered(stem, KEYS_MAX))), shape)

    async def _pages(
        self,
        list_async: Callable[[Any], Awaitable[StripeObject]],
        params: dict[str, Any],
        shape: type[T],
        *,
        question_of_each: str = "",
    ) -> AsyncIterator[T]:
        """Every object of a list, page after page. A long list is no single question: then each of its pages is one."""
        wanted = {**params, "limit": PAGE_MAX}
        while True:
            async with self._question(question_of_each) if question_of_each else nullcontext():
                page = self._read(await self._ask(list_async(dict(wanted))), _Page)
            for item in page.data:
                yield self._convert(item, shape)
            if not page.has_more or not page.data:
                return
            wanted["starting_after"] = page.data[-1].get("id")

    async def _ask(self, request: Awaitable[S], *, walks: bool = False) -> S:
        """One request; whatever goes wrong is told in the words of the port.

        Raises:
            _Replayed: with `walks`, a refusal that was stored under the key.
        """
        try:
            return await request
        except stripe.StripeError as error:
            if walks and _replayed(error.headers or {}):
                raise _Replayed from error
            raise self._failure(error) from error
        except Exception as error:  # the SDK stumbles over what is no answer of Stripe's
            raise GatewayUnknown(self.provider, "unreadable", f"{type(error).__name__}: {error}") from error

    def _failure(self, error: stripe.StripeError) -> GatewayFailed:
        if isinstance(error, stripe.APIConnectionError):
            cause = error.__cause__
            kind = GatewayAway if isinstance(cause, _NEVER_CONNECTED) else GatewayUnknown
            return kind(self.provider, "connection", f"{type(cause).__name__}: {cause}")
        status, said = error.http_status or 0, error.error
        if status == 429:
            return GatewayAway(self.provider, "rate_limit", error.user_message or "too many requests")
        if said is None:
            return GatewayUnknown(self.provider, "unreadable", f"HTTP {status} without an error of Stripe's")
        fault = said.to_dict()
        code = words(str(fault.get("code") or fault.get("type") or f"http_{status}"))
        message = words(str(fault.get("message") or ""))
        if status == 409 or status >= 500:
            return GatewayUnknown(self.provider, code, message)
        intent = fault.get("payment_intent")
        decline = fault.get("decline_code")
        return GatewayRefused(
            self.provider,
            status,
            words(str(decline)) if decline else code,
            message,
            retryable=status == 402 and fault.get("advice_code") != "do_not_try_again",
            news=news_of_intent(self._convert(intent, Intent), fresh=True) if isinstance(intent, dict) else None,
        )

    def _exactly(self, amount: int, currency: str) -> int:
        try:
            return stripe_money.to_stripe(amount, currency)
        except Invalid as invalid:
            raise GatewayRefused(self.provider, 400, "invalid_amount", invalid.detail) from invalid

    def _read(self, answer: object, shape: type[T]) -> T:
        return self._convert(answer.to_dict() if isinstance(answer, StripeObject) else answer, shape)

    def _convert(self, thing: object, shape: type[T]) -> T:
        try:
            return msgspec.convert(thing, shape)
        except msgspec.ValidationError as error:
            raise GatewayUnknown(self.provider, "unreadable", str(error)) from error


class _Page(msgspec.Struct, frozen=True):
    data: list[dict[str, Any]]
    has_more: bool = False


class _Taken(msgspec.Struct, frozen=True):
    """A charge, as the source of an entry of the balance."""

    id: Id
    currency: Currency = ""
    amount_captured: Minor = 0
    captured: bool = False
    payment_intent: Id | None = None


class _Entry(msgspec.Struct, frozen=True):
    id: str
    type: str
    created: int
    source: str | _Taken | None = None


class _Http(stripe.HTTPXClient):
    """The SDK's httpx client. It goes to a loopback address (a simulator) directly, whatever proxies the environment
    names; the SDK has no switch for that."""

    def __init__(self, timeout: httpx.Timeout, url: str) -> None:
        super().__init__(timeout=timeout)
        if httpx.URL(url).host in ("127.0.0.1", "localhost", "::1"):
            self._client_async = httpx.AsyncClient(trust_env=False)

    def _get_request_args_kwargs(self, method: str, url: str, headers: Mapping[str, str], post_data: Any) -> Any:
        args, named = super()._get_request_args_kwargs(method, url, headers, post_data)
        named["content"] = named.pop("data") or None  # httpx deprecates `data` for what is encoded already
        return args, named


def _numbered(stem: str, number: int) -> str:
    return stem if number == 1 else f"{stem}-{number}"


def _once() -> stripe.RequestOptions:
    """Options of a command that an intent obeys once whatever the key: its own state is the guard, while a stored
    refusal would outlive its reason."""
    return {"idempotency_key": secrets.token_hex(16)}


def _replayed(headers: Mapping[str, str]) -> bool:
    return any(name.lower() == "idempotent-replayed" and value == "true" for name, value in headers.items())


def _unix(at: dt.datetime) -> int:
    return int(at.timestamp())
