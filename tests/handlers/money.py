"""Payments for tests of the desks: how they are begun, what gateways say of them, and what must hold of the books."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any

from handlers.book import House, Terms, open_order
from handlers.book_rows import PaymentRow
from handlers.context import Tx
from handlers.settlement import settle
from models.order import Order
from models.payment import News, PaymentStatus, Provider, Report, Source
from tests.books import CHECK
from tests.handlers.desk import Desk

TERMS = Terms(payment_window_s=600, hold_max_s=2700, revive_window_s=86_400, mismatch_hold_s=3600)


class Shelves:
    """The reservations port, with the answer that a test wants."""

    def __init__(self, answer: bool = True) -> None:
        self.answer = answer
        self.asked: list[str] = []

    async def retake(self, tx: Tx, order_id: str) -> bool:
        self.asked.append(order_id)
        return self.answer


def house(answer: bool = True) -> House:
    return House(TERMS, Shelves(answer))


async def begin(tx: Tx, order_id: str, provider: Provider, amount: int | None, gateway_order_id: str | None) -> str:
    """Begin a payment as the desk does, and return its id."""
    tx.atomically()
    book = await open_order(tx, order_id)
    payment_id, now = tx.new_id(), tx.now()
    asked = amount or book.order.due
    book.start(
        PaymentRow(
            id=uuid.UUID(payment_id),
            order_id=book.order.id,
            provider=provider,
            status=PaymentStatus.PENDING,
            amount=asked,
            expected=asked,
            currency=book.order.currency,
            reference=payment_id,
            gateway_order_id=gateway_order_id,
            created_at=now,
            updated_at=now,
            status_at=now,
        ),
        TERMS,
    )
    await book.close(Source.CLIENT, "start", {})
    return payment_id


class Till:
    """One desk's payments."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.house = house()

    async def order(self, **changes: Any) -> Order:
        return await self.desk.place(paymentMethod="online", **changes)

    async def begin(
        self, order: Order, provider: Provider = Provider.RAZORPAY, amount: int | None = None, name: str | None = None
    ) -> str:
        """Begin a payment whose gateway order is `name`, and return that."""
        name = name or f"order_{uuid.uuid4().hex[:14]}"
        await self.desk.do(begin, order.id, provider, amount, name)
        return name

    async def tell(self, name: str, report: Report | None, source: Source = Source.WEBHOOK, **members: Any) -> None:
        await self.desk.do(settle, news(name, report, **members), source, self.house)

    async def payment(self, name: str) -> Any:
        (row,) = await self.desk.fetch("select * from payments where gateway_order_id = $1", name)
        return row

    async def refunds(self, name: str) -> list[Any]:
        return list(
            await self.desk.fetch(
                "select r.* from refunds r join payments p on p.id = r.payment_id where p.gateway_order_id = $1 "
                "order by r.created_at, r.id",
                name,
            )
        )

    async def balances(self) -> dict[tuple[str, str], int]:
        rows = await self.desk.fetch(
            "select account, currency, sum(amount)::bigint as s from ledger_rows group by 1, 2"
        )
        return {(row["account"], row["currency"]): row["s"] for row in rows if row["s"]}

    async def jobs(self) -> list[tuple[str, str]]:
        rows = await self.desk.fetch("select entrypoint, payload from jobs.pgqueuer order by id")
        return [(row["entrypoint"], row["payload"].decode()) for row in rows]

    async def age(self, order_id: str, seconds: float) -> None:
        """Let an order have been placed, and have expired, so much earlier."""
        await self.desk.fetch(
            "update orders set expires_at = expires_at - $2::interval, expired_at = expired_at - $2::interval, "
            "created_at = created_at - $2::interval where id = $1",
            uuid.UUID(order_id),
            dt.timedelta(seconds=seconds),
        )


def news(name: str, report: Report | None, *, attempt: str | None = None, **members: Any) -> News:
    """Of the gateway order `name`; its attempt has a name of its own."""
    provider = Provider.STRIPE if name.startswith("pi_") else Provider.RAZORPAY
    attempt = attempt or f"pay_{name.partition('_')[2]}"
    given = {"amount": 25_200, "currency": "INR", **members}
    return News(provider=provider, gateway_order_id=name, gateway_payment_id=attempt, report=report, **given)


async def check_books(desk: Desk) -> None:
    for rule, query in CHECK.items():
        assert list(await desk.fetch(query)) == [], rule
