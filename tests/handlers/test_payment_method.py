"""How an order is to be paid changes only while nobody is paying it and nothing was paid."""

from __future__ import annotations

import asyncio
import datetime as dt
import itertools
import uuid

import pytest

from handlers import orders
from handlers.book import House, Terms, open_order
from handlers.book_rows import PaymentRow
from handlers.context import Tx
from handlers.settlement import settle
from models.errors import Refused
from models.order import Order
from models.payment import News, PaymentStatus, Provider, Report, Source
from models.user import Actor, Scope
from tests.handlers.desk import ADMIN, CUSTOMER, SERVICE, STAFF, Desk, command, guest

TERMS = Terms(payment_window_s=600, hold_max_s=2700, revive_window_s=86_400, mismatch_hold_s=3600)


class NoStock:
    """Nothing is reserved yet, so everything can be had again."""

    async def retake(self, tx: Tx, order_id: str) -> bool:
        return True


HOUSE = House(TERMS, NoStock())


async def started(desk: Desk, order: Order) -> str:
    """The id of a payment of the order that nobody has paid yet."""
    async with desk.database.transaction() as tx:
        book = await open_order(tx, order.id)
        payment_id, now = tx.new_id(), tx.now()
        payment = PaymentRow(
            id=uuid.UUID(payment_id),
            order_id=uuid.UUID(order.id),
            provider=Provider.RAZORPAY,
            status=PaymentStatus.PENDING,
            amount=order.payment.due,
            currency=order.currency,
            reference=payment_id,
            created_at=now,
            updated_at=now,
            status_at=now,
            expected=order.payment.due,
            gateway_order_id=f"order_{payment_id}",
        )
        book.start(payment, TERMS)
        await book.close(Source.CLIENT, "start", {})
    return payment_id


async def reported(desk: Desk, payment_id: str, report: Report) -> None:
    news = News(
        provider=Provider.RAZORPAY,
        gateway_order_id=f"order_{payment_id}",
        gateway_payment_id=f"pay_{payment_id}",
        report=report,
        amount=25_200,
        currency="INR",
    )
    async with desk.database.transaction() as tx:
        await settle(tx, news, Source.WEBHOOK, HOUSE)


def to(method: str) -> orders.ChangePaymentMethod:
    return command(orders.ChangePaymentMethod, paymentMethod=method)


async def change(desk: Desk, by: Actor, order: Order, method: str) -> Order:
    after: Order = await desk.do(orders.change_payment_method, by, order.id, to(method))
    return after


async def refused(desk: Desk, by: Actor, order: Order, method: str) -> Refused:
    return await desk.refused(orders.change_payment_method, by, order.id, to(method))


@pytest.mark.parametrize("report", [Report.PROCESSING, Report.AUTHORIZED, Report.UNKNOWN])
async def test_it_stays_while_somebody_is_paying(desk: Desk, report: Report) -> None:
    order = await desk.place(paymentMethod="online")
    payment_id = await started(desk, order)
    await reported(desk, payment_id, report)
    before = await desk.tables()
    for by in (CUSTOMER, guest(order.id, Scope.PAY), STAFF, SERVICE, ADMIN):
        refusal = await refused(desk, by, order, "cash")
        assert (refusal.code, refusal.fields) == ("payment_in_progress", {"paymentId": payment_id})
    assert await desk.tables() == before
    await reported(desk, payment_id, Report.CANCELLED)
    after = await change(desk, CUSTOMER, order, "cash")
    assert (after.payment.method, after.expires_at, after.waiting_for) == ("cash", None, None)


@pytest.mark.parametrize("report", [None, Report.FAILED])
async def test_a_payment_that_nobody_is_making_does_not_stand_in_the_way(desk: Desk, report: Report | None) -> None:
    order = await desk.place(paymentMethod="online")
    payment_id = await started(desk, order)
    if report is not None:
        await reported(desk, payment_id, report)
    assert (await change(desk, CUSTOMER, order, "cash")).payment.method == "cash"
    # and whoever pays it all the same has paid the order, which the shop confirms now
    await reported(desk, payment_id, Report.CAPTURED)
    (paid,) = (await desk.orders()).values()
    assert (paid.payment.status, paid.payment.due, paid.status) == ("paid", 0, "pending")
    assert (await desk.move(order.id, "confirmed")).status == "confirmed"


async def test_it_stays_once_something_was_paid(desk: Desk) -> None:
    order = await desk.place(paymentMethod="online")
    await reported(desk, await started(desk, order), Report.CAPTURED)
    for by in (CUSTOMER, STAFF):
        assert (await refused(desk, by, order, "cash")).code == "order_closed"


@pytest.mark.parametrize(
    ("after_s", "until"),
    [
        (0, "2026-11-21T09:15:00.000Z"),
        (600, "2026-11-21T09:25:00.000Z"),
        (2000, "2026-11-21T09:45:00.000Z"),  # the longest hold
        (3 * 3600, "2026-11-21T12:01:00.000Z"),  # time enough to start a payment
    ],
)
async def test_an_order_that_becomes_online_has_its_time_but_no_more_than_the_longest_hold(
    desk: Desk, after_s: int, until: str
) -> None:
    placed = dt.datetime(2026, 11, 21, 9, tzinfo=dt.UTC)
    desk.database.clock = lambda: placed
    order = await desk.place(paymentMethod="later")
    desk.database.clock = lambda: placed + dt.timedelta(seconds=after_s)
    for method in ("cash", "online", "cash"):
        await change(desk, STAFF, order, method)
    after = await change(desk, STAFF, order, "online")
    assert after.expires_at == until
    assert (await desk.log(order.id))[-1].data["expiresAt"] == until


async def test_of_two_that_change_it_at_once_each_is_told_once(desk: Desk) -> None:
    order = await desk.place(paymentMethod="later")
    await asyncio.gather(*(change(desk, CUSTOMER, order, method) for method in ("cash", "online", "cash", "online")))
    (after,) = (await desk.orders()).values()
    log = await desk.log(order.id)
    methods = [one.data["method"] for one in log[1:]]
    assert methods[-1] == after.payment.method
    assert all(one != other for one, other in itertools.pairwise(methods)), "no event without a change"
    assert [one.seq for one in log] == list(range(1, after.seq + 1))
