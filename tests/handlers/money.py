"""Payments for tests of the desks: how they are begun, what gateways say of them, and what must hold of the books."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any

from handlers.context import Tx
from handlers.settlement import House, PaymentRow, Settled, Terms, open_order, settle
from models.order import Order
from models.payment import News, PaymentStatus, Provider, Report, Source
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

    async def tell(self, name: str, report: Report | None, source: Source = Source.WEBHOOK, **members: Any) -> Settled:
        settled: Settled = await self.desk.do(settle, news(name, report, **members), source, self.house)
        return settled

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


CHECK = {
    "every entry balances": """
        select entry from ledger_rows group by entry, currency having sum(amount) <> 0""",
    "what a gateway holds is what came, less what went back, what it kept and what banks hold": """
        with expected as (
            select provider, currency, amount as n from captures
            union all select provider, currency, -coalesce(fee, 0) from captures
            union all select provider, currency, -amount from refunds
                where status = 'succeeded' and channel = 'original'
            union all select provider, currency, -amount from disputes where status <> 'won'),
        sums as (select 'gateway:' || provider as account, currency, sum(n) as s from expected
            where provider in ('razorpay', 'stripe') group by 1, 2),
        booked as (select account, currency, sum(amount) as s from ledger_rows
            where account like 'gateway:%' group by 1, 2)
        select * from sums full join booked using (account, currency)
        where coalesce(sums.s, 0) <> coalesce(booked.s, 0)""",
    "what is due to payers is what was reserved and is not back": """
        with owed as (select currency, sum(amount) as s from refunds where status <> 'succeeded' group by 1),
        booked as (select currency, sum(amount) as s from ledger_rows where account = 'refunds_due' group by 1)
        select * from owed full join booked using (currency) where coalesce(owed.s, 0) <> -coalesce(booked.s, 0)""",
    "an order's sums are those of its captures and refunds": """
        select o.id from orders o
        left join (select p.order_id, sum(c.applied) as s from captures c join payments p on p.id = c.payment_id
            group by 1) c on c.order_id = o.id
        left join (select order_id, sum(applied) as s from refunds where status = 'succeeded' group by 1) r
            on r.order_id = o.id
        where o.paid <> coalesce(c.s, 0) or o.refunded <> coalesce(r.s, 0)""",
    "a payment's sums are those of its captures, refunds and disputes": """
        select p.id from payments p
        left join (select payment_id, currency, sum(amount) as s from captures group by 1, 2) c
            on c.payment_id = p.id and c.currency = p.currency
        left join (select payment_id, currency, sum(amount) filter (where status = 'succeeded') as back,
            sum(amount) filter (where status <> 'succeeded') as reserved from refunds group by 1, 2) r
            on r.payment_id = p.id and r.currency = p.currency
        left join (select payment_id, currency, sum(amount) as s from disputes where status <> 'won' group by 1, 2) d
            on d.payment_id = p.id and d.currency = p.currency
        where p.captured <> coalesce(c.s, 0) or p.refunded <> coalesce(r.back, 0)
            or p.reserved <> coalesce(r.reserved, 0) or p.disputed <> coalesce(d.s, 0)""",
    "no online order is confirmed without its money": """
        select id from orders
        where payment_method = 'online' and status not in ('pending', 'cancelled') and paid < total""",
    "no money is without an order or a refund": """
        select c.key from captures c join payments p on p.id = c.payment_id join orders o on o.id = p.order_id
        left join (select provider, capture_key, sum(amount) as s from refunds group by 1, 2) r
            on r.provider = c.provider and r.capture_key = c.key
        left join (select payment_id, sum(amount) as s from disputes where status <> 'won' group by 1) d
            on d.payment_id = p.id
        where c.amount - coalesce(r.s, 0)
            > case when o.status = 'cancelled' then coalesce(d.s, 0)
                when c.provider = 'cash' then c.amount else c.applied end""",
    "the rounding of cash is what it settled less what it was, as far as it is not back": """
        with expected as (
            select payment_id, applied - amount as n from captures where provider = 'cash'
            union all select payment_id, amount - applied from refunds where provider = 'cash'),
        sums as (select payment_id, sum(n) as s from expected group by 1),
        booked as (select payment_id, sum(amount) as s from ledger_rows where account = 'rounding' group by 1)
        select * from sums full join booked using (payment_id) where coalesce(sums.s, 0) <> coalesce(booked.s, 0)""",
    "an order that waits for money has not got it": """
        select id from orders where payment_method = 'online' and status = 'pending' and paid >= total and total > 0""",
    "an order is confirmed once": """
        select order_id from order_events where type = 'orderStatusUpdate' and body::json ->> 'status' = 'confirmed'
        group by order_id having count(*) > 1""",
}
"""What must hold of the books at every moment, as queries that find what breaks it."""


async def check_books(desk: Desk) -> None:
    for rule, query in CHECK.items():
        assert list(await desk.fetch(query)) == [], rule
