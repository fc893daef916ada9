"""A refunds desk over a real database, and a gateway that does what a test says."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec
import pytest

from handlers import refund_calls, refund_lists, refunds
from handlers.context import Tx
from handlers.jobs import NotYet
from handlers.ports import Done, Gateway, GatewayRefused, NewRefund
from handlers.refunds import CreateRefund, RetryRefund
from handlers.settlement import settle
from models.errors import Refused
from models.order import Order
from models.payment import News, Provider, RefundNews, RefundReport, Report, Source
from models.refund import Refund
from models.user import Actor
from server.doors import decode
from tests.handlers.desk import ADMIN, Desk, command
from tests.handlers.money import Till, begin, check_books, news

PAUSE_S = 30
STAFF_MAX = 10_000


class FakeGateway:
    """Keeps refunds as a gateway does: the same key is the same refund, and never more goes back than came.

    `script` says what the next calls of `refund` do: an exception is raised; one that is marked with `after()` is
    raised when the refund was made. Without a script a refund succeeds at once.
    """

    provider = Provider.RAZORPAY
    offered = True

    def __init__(self) -> None:
        self.captured: dict[str, int] = {}
        self.made: dict[str, RefundNews] = {}
        """By key."""
        self.captures: dict[str, str] = {}
        self.asked: list[NewRefund] = []
        self.looked_up: list[str | None] = []
        self.script: list[RefundReport | BaseException] = []
        self.lookups: list[BaseException] = []
        self.entered, self.go = asyncio.Event(), asyncio.Event()
        self.go.set()

    async def refund(self, new: NewRefund) -> RefundNews:
        self.asked.append(new)
        self.entered.set()
        await self.go.wait()
        step = self.script.pop(0) if self.script else RefundReport.SUCCEEDED
        if isinstance(step, BaseException) and not getattr(step, "after", False):
            raise step
        if new.key not in self.made:
            if self.back(new.capture_key) + new.amount > self.captured[new.capture_key]:
                raise GatewayRefused(self.provider, 400, "BAD_REQUEST_ERROR", "The amount is greater than captured.")
            self.made[new.key] = RefundNews(
                gateway_refund_id=f"rfnd_{uuid.uuid4().hex[:14]}",
                report=step if isinstance(step, RefundReport) else RefundReport.SUCCEEDED,
                amount=new.amount,
                currency=new.currency,
                refund_id=new.refund_id,
            )
            self.captures[new.key] = new.capture_key
        if isinstance(step, BaseException):
            raise step
        return self.made[new.key]

    async def fetch_refund(self, new: NewRefund, gateway_refund_id: str | None) -> RefundNews | None:
        self.looked_up.append(gateway_refund_id)
        if self.lookups:
            raise self.lookups.pop(0)
        known = [one for one in self.made.values() if one.refund_id == new.refund_id]
        if gateway_refund_id is not None:
            known = [one for one in known if one.gateway_refund_id == gateway_refund_id]
        return known[-1] if known else None

    def becomes(self, refund_id: str, report: RefundReport) -> RefundNews:
        """The newest refund of ours by this id is now this; what the gateway says of it."""
        key = [key for key, one in self.made.items() if one.refund_id == refund_id][-1]
        was = self.made[key]
        self.made[key] = RefundNews(
            gateway_refund_id=was.gateway_refund_id,
            report=report,
            amount=was.amount,
            currency=was.currency,
            refund_id=refund_id,
        )
        return self.made[key]

    def back(self, capture_key: str | None = None) -> int:
        """How much went back, or is on its way."""
        return sum(
            one.amount
            for key, one in self.made.items()
            if one.report is not RefundReport.FAILED and capture_key in (None, self.captures[key])
        )


def after(error: BaseException) -> BaseException:
    """The error of a call that was carried out."""
    error.after = True  # type: ignore[attr-defined]
    return error


class Once:
    """An Idempotency-Key that only remembers."""

    def __init__(self) -> None:
        self.ids: Sequence[str] = ()

    async def begun(self, tx: Tx) -> Sequence[str]:
        return self.ids

    async def begin(self, tx: Tx, *subjects: str) -> None:
        self.ids = subjects


class Counter:
    """Pays, refunds, and checks the books."""

    def __init__(self, desk: Desk) -> None:
        self.shop = desk
        self.till = Till(desk)
        self.gateway = FakeGateway()
        self.desk = refund_calls.Desk(
            self.transactions,
            {Provider.RAZORPAY: cast(Gateway, self.gateway)},
            refund_calls.Terms(staff_refund_max_minor=STAFF_MAX, refund_ask_after_s=PAUSE_S),
        )

    @asynccontextmanager
    async def transactions(self) -> AsyncIterator[Tx]:
        async with self.shop.database.transaction() as tx:
            yield tx
        self.shop.told += tx.told

    # paying

    async def order(self, **changes: Any) -> Order:
        return await self.till.order(**changes)

    async def pay(self, order: Order, amount: int | None = None, provider: Provider = Provider.RAZORPAY) -> str:
        """A completed payment of the order; its id."""
        if provider is Provider.CASH:
            payment_id: str = await self.shop.do(begin, order.id, provider, amount, None)
            cash = News(
                provider=provider,
                gateway_order_id=None,
                gateway_payment_id=payment_id,
                report=Report.CAPTURED,
                amount=amount or order.totals.total,
                currency=order.currency,
            )
            await self.shop.do(settle, cash, Source.STAFF, self.till.house, payment_id=payment_id)
            return payment_id
        name = await self.till.begin(order, provider, amount)
        await self.capture(name, amount or order.totals.total)
        return str((await self.till.payment(name))["id"])

    async def capture(self, name: str, amount: int, **members: Any) -> None:
        """News that money came for the gateway order `name`."""
        said = news(name, Report.CAPTURED, amount=amount, **members)
        assert said.gateway_payment_id is not None
        self.gateway.captured[said.gateway_payment_id] = amount
        await self.till.tell(name, Report.CAPTURED, amount=amount, **members)

    async def hear(self, payment_id: str, *said: RefundNews, **members: Any) -> None:
        """News of a completed payment, as a webhook brings it."""
        (row,) = await self.shop.fetch("select * from payments where id = $1", uuid.UUID(payment_id))
        await self.till.tell(row["gateway_order_id"], None, refunds=said, **members)

    # refunding

    async def refund(
        self, payment_id: str, by: Actor = ADMIN, once: Once | None = None, **members: Any
    ) -> tuple[int, Refund]:
        cmd = command(CreateRefund, **{"reason": "Cold", **members})
        done = await refunds.refund_payment(self.desk, once or Once(), by, payment_id, cmd)
        return done.status, done.result

    async def send(self, payment_id: str, body: object) -> None:
        """Ask for a refund as the REST door does."""
        cmd = decode(msgspec.json.encode(body), CreateRefund)
        await refunds.refund_payment(self.desk, Once(), ADMIN, payment_id, cmd)

    async def refund_order(
        self, order_id: str, by: Actor = ADMIN, once: Once | None = None, **members: Any
    ) -> tuple[int, list[Refund]]:
        cmd = command(CreateRefund, **{"reason": "Cold", **members})
        done = await refunds.refund_order(self.desk, once or Once(), by, order_id, cmd)
        return done.status, done.result.items

    async def retry(self, refund_id: str, by: Actor = ADMIN, **members: Any) -> tuple[int, Refund]:
        done: Done = await refunds.retry(self.desk, Once(), by, refund_id, command(RetryRefund, **members))
        return done.status, done.result

    async def refused(self, payment_id: str, by: Actor = ADMIN, **members: Any) -> Refused:
        """How a refund of the payment is refused; it must be, and nothing changes."""
        before = await self.shop.tables()
        with pytest.raises(Refused) as refusal:
            await self.refund(payment_id, by, **members)
        assert await self.shop.tables() == before
        return refusal.value

    async def job(self, refund_id: str) -> float | None:
        """Run the job of a refund: None, or after how many seconds it wants to run again."""
        try:
            await refund_calls.carry_on(self.desk, refund_id, lambda low, high: high)
        except NotYet as asked:
            return asked.after_s
        return None

    # looking

    async def show(self, refund_id: str, by: Actor = ADMIN) -> Refund:
        seen: refund_lists.Seen = await self.shop.do(refund_lists.read, by, refund_id)
        return seen.refund

    async def money(self, payment_id: str) -> dict[str, Any]:
        (row,) = await self.shop.fetch(
            "select status, captured, refunded, reserved, disputed from payments where id = $1", uuid.UUID(payment_id)
        )
        return dict(row)

    async def check_books(self) -> None:
        """Whatever has happened: the books are right, and the gateway gave back no more than came."""
        await check_books(self.shop)
        for key, captured in self.gateway.captured.items():
            assert self.gateway.back(key) <= captured
