"""The payments desk for tests: the doors of a real database, and gateways that answer what the test says."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, cast

import msgspec
import pytest

from handlers import checkout, payments
from handlers.book_rows import view
from handlers.context import Told
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
from models.errors import AmountTooSmall, Refused
from models.order import Order
from models.payment import News, Payment, Provider, RefundNews, Report
from models.user import Actor
from server.doors import Answer, Doors, Steps
from server.outbox import Outbox
from server.verbs import PaymentVerbs
from tests.handlers.desk import CUSTOMER, SERVICE, Desk, command
from tests.handlers.money import Till, house, news

KEY_SECRET = b"the key's secret"


def refused(provider: Provider, status: int = 400, **more: Any) -> GatewayRefused:
    return GatewayRefused(provider, status, "BAD_REQUEST_ERROR", "That is not possible", **more)


def away(provider: Provider) -> GatewayAway:
    return GatewayAway(provider, "connect", "no connection")


def unknown(provider: Provider) -> GatewayUnknown:
    return GatewayUnknown(provider, "timeout", "no answer")


class FakeGateway:
    """handlers.ports.Gateway. It fails as `fails` says, once for each; else it creates what it is asked to, and tells
    `news` of it."""

    def __init__(self, provider: Provider, database: Any) -> None:
        self.provider = provider
        self.offered, self.simulated = True, False
        self._database = database
        self.asked: list[tuple[str, str]] = []
        """(operation, reference of the payment), in their order."""
        self.fails: list[GatewayFailed | None] = []
        self.names: dict[str, str] = {}
        """Gateway order by reference."""
        self.news: list[News] = []
        self.redirect_url: str | None = None
        self.crowded = False
        """Several callers at once: then somebody else may hold a connection meanwhile."""
        self.entered, self.go = asyncio.Event(), asyncio.Event()
        self.go.set()

    async def _ask(self, operation: str, reference: str) -> None:
        assert self.crowded or self._database.connections()["busy"] == 0, "a connection waits for a gateway"
        self.asked.append((operation, reference))
        self.entered.set()
        await self.go.wait()
        failure = self.fails.pop(0) if self.fails else None
        if failure is not None:
            raise failure

    def operations(self) -> list[str]:
        return [operation for operation, _ in self.asked]

    def check_amount(self, amount: int, currency: str) -> None:
        if amount < 100:
            raise AmountTooSmall("At least 100.")

    async def create(self, new: NewPayment) -> Created:
        stem = "order" if self.provider is Provider.RAZORPAY else "pi"
        await self._ask("create", new.reference)
        name = self.names.setdefault(new.reference, f"{stem}_{uuid.uuid4().hex[:14]}")
        return Created(gateway_order_id=name, client_secret=self._secret(name))

    def _secret(self, name: str) -> str | None:
        return f"{name}_secret_x" if self.provider is Provider.STRIPE else None

    def say(self, payment: Payment, report: Report, **members: Any) -> News:
        """From now on the gateway says this of the payment."""
        assert payment.gateway_order_id
        said = news(payment.gateway_order_id, report, **{"amount": payment.amount, "fresh": True, **members})
        self.news = [said]
        return said

    async def fetch(self, known: Known) -> Sequence[News]:
        await self._ask("fetch", known.reference)
        return self.news or [news(known.gateway_order_id, Report.PENDING, fresh=True)]

    async def capture(self, known: Known, amount: int, currency: str) -> News:
        await self._ask("capture", known.reference)
        return news(known.gateway_order_id, Report.CAPTURED, amount=amount, currency=currency, fresh=True)

    async def cancel(self, known: Known) -> Sequence[News]:
        await self._ask("cancel", known.reference)
        return self.news or [news(known.gateway_order_id, Report.CANCELLED, fresh=True)]

    async def confirm(self, known: Known, payment_method_id: str, return_url: str) -> Confirmed:
        await self._ask("confirm", known.reference)
        return Confirmed(news=self.news[0], redirect_url=self.redirect_url)

    async def refund(self, new: NewRefund) -> RefundNews:
        raise NotImplementedError

    async def fetch_refund(self, new: NewRefund, gateway_refund_id: str | None) -> RefundNews | None:
        raise NotImplementedError

    def movements(self, start: object, end: object) -> AsyncIterator[Movement]:
        raise NotImplementedError

    def checkout(self, known: Known, client_secret: str | None, prefill: Mapping[str, str]) -> dict[str, Any]:
        return {"for": known.gateway_order_id, "secret": client_secret, "prefill": dict(prefill)}

    async def client_secret(self, known: Known) -> str | None:
        await self._ask("client_secret", known.reference)
        return self._secret(known.gateway_order_id)

    def proves_checkout(self, gateway_order_id: str, gateway_payment_id: str, signature: str) -> bool:
        return hmac.compare_digest(sign(gateway_order_id, gateway_payment_id), signature)

    def receive(self, body: bytes, headers: Mapping[str, str]) -> Delivery:
        raise NotImplementedError

    def read(self, kind: str, body: bytes) -> Sequence[News]:
        raise NotImplementedError


def sign(gateway_order_id: str, gateway_payment_id: str) -> str:
    return hmac.digest(KEY_SECRET, f"{gateway_order_id}|{gateway_payment_id}".encode(), hashlib.sha256).hex()


class Counter:
    """A shop where orders are paid."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.till = desk, Till(desk)
        self.razorpay = FakeGateway(Provider.RAZORPAY, desk.database)
        self.stripe = FakeGateway(Provider.STRIPE, desk.database)
        self.gateways = {Provider.RAZORPAY: self.razorpay, Provider.STRIPE: self.stripe}
        self.doors = Doors(desk.database, cast(Outbox, self), positions=None)  # type: ignore[arg-type]
        self.house = house()
        self.verbs = PaymentVerbs(self.doors, payments.Desk(self.doors.transaction, self.gateways, self.house))

    def publish(self, told: Iterable[Told]) -> None:
        self.desk.told += told

    async def order(self, **changes: Any) -> Order:
        return await self.till.order(**changes)

    async def do(self, verb: Steps, *args: object, by: Actor = CUSTOMER, key: str | None = None) -> Answer:
        return await self.doors.perform_in_steps(verb, by, *args, key=key)

    async def refusal(self, verb: Steps, *args: object, by: Actor = CUSTOMER, key: str | None = None) -> Refused:
        with pytest.raises(Refused) as found:
            await self.do(verb, *args, by=by, key=key)
        return found.value

    def starting(self, order: Order, **members: Any) -> checkout.StartPayment:
        return command(checkout.StartPayment, orderId=order.id, **members)

    async def start(
        self, order: Order, *, by: Actor = CUSTOMER, key: str | None = None, status: int = 201, **members: Any
    ) -> Payment:
        given = await self.do(self.verbs.start, self.starting(order, **members), by=by, key=key)
        assert given.status == status, given
        return payment_of(given)

    async def refused_start(
        self, order: Order, *, by: Actor = CUSTOMER, key: str | None = None, **members: Any
    ) -> Refused:
        return await self.refusal(self.verbs.start, self.starting(order, **members), by=by, key=key)

    def proof(self, payment: Payment, attempt: str = "pay_1", **changes: str) -> payments.VerifyPayment:
        name = payment.gateway_order_id
        assert name
        members = {"razorpayPaymentId": attempt, "razorpayOrderId": name, "razorpaySignature": sign(name, attempt)}
        return command(payments.VerifyPayment, **{**members, **changes})

    async def authorized(self, order: Order, provider: str = "razorpay") -> Payment:
        """A payment that staff may capture."""
        payment = await self.start(order, by=SERVICE, provider=provider, capture="manual")
        await self.tell(payment, Report.AUTHORIZED)
        return await self.read(payment.id)

    async def tell(self, payment: Payment, report: Report, **members: Any) -> None:
        assert payment.gateway_order_id
        await self.till.tell(payment.gateway_order_id, report, **{"amount": payment.amount, **members})

    async def read(self, payment_id: str) -> Payment:
        async with self.doors.transaction() as tx:
            return view(await payments.permit_all(tx, SERVICE, payment_id))

    async def order_of(self, payment: Payment) -> Order:
        assert payment.order_id
        return (await self.desk.orders())[payment.order_id]

    async def inputs(self, payment: Payment) -> list[str]:
        rows = await self.desk.fetch(
            "select kind from payment_inputs where payment_id = $1 order by id", uuid.UUID(payment.id)
        )
        return [row["kind"] for row in rows]

    async def audited(self) -> list[tuple[str, str]]:
        return [(row["actor"], row["action"]) for row in await self.desk.fetch("select * from audit order by id")]


def payment_of(given: Answer) -> Payment:
    return msgspec.json.decode(given.body, type=Payment)
