"""Razorpay behind the gateway port (`handlers/ports.py: Gateway`).

Facts that shape it: an order is never cancelled and never expires, so money may always come late; only refunds have an
idempotency key, creation has `unique_receipt`, capture has neither (a repeat is refused, and the payment is looked at);
a checkout's signature proves which order was paid, not that or what was.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from handlers.ports import (
    Confirmed,
    Created,
    Delivery,
    GatewayRefused,
    GatewayUnknown,
    Known,
    Movement,
    NewPayment,
    NewRefund,
)
from models.errors import AmountTooSmall, BadSignature, Invalid
from models.money import EXPONENTS
from models.payment import Capture, News, Provider, RefundNews, Report
from server.adapters import razorpay_news
from server.adapters.breaker import Breaker
from server.adapters.razorpay_client import Client, Threads
from server.adapters.razorpay_news import REFUND_NOTE, Collection, Order, Payment, Refund

API_URL = "https://api.razorpay.com"
"""For test keys and live keys alike: the key picks the mode."""

INR_MIN = 100
"""Paise. Source: Razorpay, create an order."""

PAGE = 100
"""Entries of one page of a list: the most that Razorpay gives."""

_ID = re.compile(r"[A-Za-z0-9_]{1,64}")
_HEX = re.compile(r"[0-9a-f]{64}")
_EVENT_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

T = TypeVar("T")


class Razorpay:
    """Fulfils `Gateway`. `webhook_secrets`: newest first. `sandbox_url`: set when it talks to a simulator of ours,
    whose page the payer is then shown."""

    provider = Provider.RAZORPAY

    def __init__(
        self,
        *,
        key_id: str,
        key_secret: str,
        webhook_secrets: Sequence[str],
        breaker: Breaker,
        timeout_s: float,
        threads_max: int,
        api_url: str = API_URL,
        sandbox_url: str | None = None,
    ) -> None:
        self._key_id, self._key_secret = key_id, key_secret
        self._webhook_secrets = tuple(webhook_secrets)
        self._sandbox_url = sandbox_url
        self._breaker = breaker
        self._threads = Threads(
            key_id, key_secret, api_url.rstrip("/"), timeout_s=timeout_s, threads_max=threads_max, breaker=breaker
        )

    async def close(self) -> None:
        """Let the requests under way end."""
        await self._threads.close()

    @property
    def offered(self) -> bool:
        return self._breaker.offered

    @property
    def simulated(self) -> bool:
        return bool(self._sandbox_url)

    def check_amount(self, amount: int, currency: str) -> None:
        if currency == "INR" and amount < INR_MIN:
            raise AmountTooSmall("Razorpay takes INR 1.00 or more.")
        if EXPONENTS.get(currency) == 3 and amount % 10:
            raise Invalid(f"Razorpay takes {currency} in tens of its minor unit only.", "/amount")

    async def create(self, new: NewPayment) -> Created:
        """`unique_receipt`: the same receipt again gives the same order. Source: Razorpay, retries and idempotency."""

        def work(client: Client) -> Order:
            wanted = {
                "amount": new.amount,
                "currency": new.currency,
                "receipt": new.reference,
                "unique_receipt": True,
                "payment": {"capture": "manual" if new.capture is Capture.MANUAL else "automatic"},
                "notes": {"payment_id": new.payment_id, "order_id": new.order_id},
            }
            return _as(Order, client.order.create(wanted))

        order = await self._threads.run("create", work)
        if (order.amount, order.currency) != (new.amount, new.currency):
            raise _nonsense("the order is not the one that was asked for")
        return Created(gateway_order_id=order.id)

    async def fetch(self, known: Known) -> Sequence[News]:
        order_id = _id(known.gateway_order_id)

        def work(client: Client) -> Sequence[News]:
            order = _as(Order, client.order.fetch(order_id))
            payments = _payments(client, order_id)
            refunds = {one.id: _refunds(client, one.id) for one in payments if one.amount_refunded}
            return razorpay_news.of_order(
                order, payments, {key: [razorpay_news.of_refund(one) for one in made] for key, made in refunds.items()}
            )

        return await self._threads.run("fetch", work)

    async def capture(self, known: Known, amount: int, currency: str) -> News:
        """There is no key for this: a refusal may mean that an earlier call was carried out, so the payment is read."""
        order_id = _id(known.gateway_order_id)
        wanted_id = _id(known.gateway_payment_id) if known.gateway_payment_id else None

        def work(client: Client) -> News:
            payment_id = wanted_id or _capturable(_payments(client, order_id))
            try:
                captured = client.payment.capture(payment_id, amount, {"currency": currency})
            except GatewayRefused:
                news = razorpay_news.of_payment(_as(Payment, client.payment.fetch(payment_id)), fresh=True)
                if news.report is not Report.CAPTURED or (news.amount, news.currency) != (amount, currency):
                    raise
                return news
            return razorpay_news.of_payment(_as(Payment, captured), fresh=True)

        return await self._threads.run("capture", work)

    async def cancel(self, known: Known) -> Sequence[News]:
        news = await self.fetch(known)
        if any(one.report not in (Report.PENDING, Report.FAILED) for one in news):
            return news
        return [msgspec.structs.replace(one, report=Report.CANCELLED) for one in news]

    async def confirm(self, known: Known, payment_method_id: str, return_url: str) -> Confirmed:
        raise GatewayRefused(
            self.provider, 400, "unsupported", "Razorpay's payments are confirmed by its checkout only."
        )

    async def refund(self, new: NewRefund) -> RefundNews:
        """The key makes a repeat the same refund. What was refused may still be ours, when an earlier call was carried
        out and its key forgotten: then it is found among the payment's refunds."""
        payment_id = _id(new.capture_key)

        def work(client: Client) -> Refund | GatewayUnknown:
            wanted = {
                "amount": new.amount,
                "speed": "normal",
                "receipt": new.key,
                "notes": {REFUND_NOTE: new.refund_id, "payment_id": new.payment.payment_id},
            }
            try:
                made = client.payment.refund(payment_id, wanted, headers={"X-Refund-Idempotency": new.key})
            except GatewayRefused as refused:
                if refused.status == 409 and "different request" not in refused.message.lower():
                    # the first call with this key is still being carried out; the gateway answers, so it is no failure
                    return GatewayUnknown(self.provider, "in_progress", refused.message)
                found = _own(_refunds(client, payment_id), new)
                if found is None or found.amount != new.amount:
                    raise
                return found
            return _as(Refund, made)

        refund = await self._threads.run("refund", work)
        if isinstance(refund, GatewayUnknown):
            raise refund
        if refund.payment_id != payment_id or refund.amount != new.amount:
            raise _nonsense("the refund is not the one that was asked for")
        return razorpay_news.of_refund(refund)

    async def fetch_refund(self, new: NewRefund, gateway_refund_id: str | None) -> RefundNews | None:
        payment_id = _id(new.capture_key)
        refund_id = _id(gateway_refund_id) if gateway_refund_id else None

        def work(client: Client) -> Refund | None:
            if refund_id:
                return _as(Refund, client.refund.fetch(refund_id, {}))
            return _own(_refunds(client, payment_id), new)

        refund = await self._threads.run("fetch_refund", work)
        return None if refund is None else razorpay_news.of_refund(refund)

    async def movements(self, start: dt.datetime, end: dt.datetime) -> AsyncIterator[Movement]:
        """Razorpay does not say when it captured: `captured_at` is when the attempt began. Its list lags by minutes."""
        seen: set[str] = set()
        while True:
            page = await self._threads.run("movements", _page(start, end, len(seen)))
            for one in page:
                at = dt.datetime.fromtimestamp(one.created_at, dt.UTC)
                fits = start <= at < end and one.order_id and one.report is Report.CAPTURED
                if fits and one.id not in seen:
                    yield Movement(
                        gateway_order_id=one.order_id or "",
                        gateway_payment_id=one.id,
                        amount=one.amount,
                        currency=one.currency.upper(),
                        captured_at=at,
                    )
            known = len(seen)
            seen |= {one.id for one in page}
            if len(page) < PAGE or len(seen) == known:
                return

    def checkout(self, known: Known, client_secret: str | None, prefill: Mapping[str, str]) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "keyId": self._key_id,
            "gatewayOrderId": known.gateway_order_id,
            "amount": known.amount,
            "currency": known.currency,
            "prefill": dict(prefill),
        }
        if self._sandbox_url:
            shown["url"] = f"{self._sandbox_url}/checkout/{known.gateway_order_id}"
        return shown

    async def client_secret(self, known: Known) -> str | None:
        return None

    def proves_checkout(self, gateway_order_id: str, gateway_payment_id: str, signature: str) -> bool:
        signed = f"{gateway_order_id}|{gateway_payment_id}".encode()
        return _signed(signed, signature, [self._key_secret])

    def receive(self, body: bytes, headers: Mapping[str, str]) -> Delivery:
        given = {name.lower(): value for name, value in headers.items()}
        if not _signed(body, given.get("x-razorpay-signature", ""), self._webhook_secrets):
            raise BadSignature("The X-Razorpay-Signature does not belong to this body.")
        event_id = given.get("x-razorpay-event-id", "")
        return razorpay_news.delivery_of(body, event_id if _EVENT_ID.fullmatch(event_id) else None)

    def read(self, kind: str, body: bytes) -> Sequence[News]:
        return razorpay_news.read(kind, body)


def _signed(text: bytes, signature: str, secrets: Sequence[str]) -> bool:
    """Whether one of the secrets made this lower-case hex HMAC-SHA256. Every secret is tried, in constant time."""
    if not _HEX.fullmatch(signature):
        return False
    made = [hmac.digest(secret.encode(), text, hashlib.sha256).hex() for secret in secrets]
    return any([hmac.compare_digest(one, signature) for one in made])


def _as(type_: type[T], answer: object) -> T:
    """The gateway's answer, if it is what it should be."""
    try:
        return msgspec.convert(answer, type_)
    except msgspec.ValidationError as error:
        raise _nonsense(str(error)) from error


def _nonsense(why: str) -> GatewayUnknown:
    return GatewayUnknown(Provider.RAZORPAY, "nonsense", f"the answer makes no sense: {why}")


def _id(text: str) -> str:
    """An id that may stand in a path: payers send some of them."""
    if not _ID.fullmatch(text):
        raise GatewayRefused(Provider.RAZORPAY, 400, "BAD_REQUEST_ERROR", "The id is none of Razorpay's.")
    return text


def _items(type_: type[T], answer: object) -> list[T]:
    return [_as(type_, item) for item in _as(Collection, answer).items]


def _payments(client: Client, order_id: str) -> list[Payment]:
    """The attempts to pay an order, the newest hundred; a list has ten unless more are asked for."""
    return _items(Payment, client.order.payments(order_id, {"count": PAGE}))


def _refunds(client: Client, payment_id: str) -> list[Refund]:
    """Every refund of a payment."""
    found: list[Refund] = []
    while True:
        page = _items(Refund, client.payment.fetch_multiple_refund(payment_id, {"count": PAGE, "skip": len(found)}))
        found += page
        if len(page) < PAGE:
            return found


def _own(refunds: Sequence[Refund], new: NewRefund) -> Refund | None:
    """The refund that carries our key: of this attempt, not of one that failed before."""
    return next((one for one in refunds if one.receipt == new.key), None)


def _capturable(payments: Sequence[Payment]) -> str:
    """The attempt that waits for its capture, or was captured already."""
    for report in (Report.AUTHORIZED, Report.CAPTURED):
        for payment in payments:
            if payment.report is report:
                return payment.id
    raise GatewayRefused(Provider.RAZORPAY, 400, "BAD_REQUEST_ERROR", "Nobody has authorized this payment.")


def _page(start: dt.datetime, end: dt.datetime, skip: int) -> Any:
    """One page of all payments of a range of time."""
    wanted = {"from": int(start.timestamp()), "to": int(end.timestamp()), "count": PAGE, "skip": skip}
    return lambda client: _items(Payment, client.payment.all(wanted))
