"""What gateways leave open, and what they say that cannot be: no 500, no changed balance, no state without an end."""

from __future__ import annotations

import asyncio
import zoneinfo
from typing import Any

import pytest

from handlers.payments import CapturePayment
from handlers.reconciliation import Patience, ReadReconciliation, cancel_payment, expire, read_reconciliation
from models.errors import Refused
from models.payment import DisputeNews, DisputeReport, RefundNews, RefundReport, Report
from server.doors import Steps
from tests.handlers.desk import ADMIN, STAFF, Desk
from tests.handlers.money import TERMS, check_books, news
from tests.handlers.paying import Counter, away

R = Report
PATIENCE = Patience(first_s=15, longest_s=3600, between=lambda low, high: high, pending_s=2700)


@pytest.fixture
def counter(desk: Desk) -> Counter:
    return Counter(desk)


ABSURD: list[dict[str, Any]] = [
    {"amount": 0},
    {"amount": -5},
    {"amount": 10**19},
    {"fee": 10**19},
    {"disputes": (DisputeNews(gateway_dispute_id="disp_1", report=DisputeReport.OPEN, amount=10**19, currency="INR"),)},
    {
        "refunds": (
            RefundNews(gateway_refund_id="rfnd_1", report=RefundReport.SUCCEEDED, amount=99_999, currency="INR"),
        )
    },
]


@pytest.mark.parametrize("said", ABSURD)
async def test_amounts_that_cannot_be_are_not_believed(counter: Counter, said: dict[str, Any]) -> None:
    payment = await counter.start(await counter.order())
    counter.razorpay.say(payment, R.CAPTURED, **said)
    refusal = await counter.refusal(counter.verbs.verify, payment.id, counter.proof(payment))
    assert refusal.code == "gateway_error"
    assert await counter.till.balances() == {}


async def test_nonsense_does_not_hold_an_order_for_ever(counter: Counter) -> None:
    order = await counter.order()
    payment = await counter.start(order)
    counter.razorpay.news = [news("order_other", R.CAPTURED, fresh=True)]
    await counter.till.age(order.id, TERMS.hold_max_s)
    await expire(counter.verbs.desk, order.id, PATIENCE)
    assert (await counter.order_of(payment)).status == "cancelled"


async def test_before_the_first_day_there_are_no_books(counter: Counter) -> None:
    with pytest.raises(Refused) as refusal:
        await read_reconciliation(
            counter.verbs.desk, ADMIN, "0001-01-01", ReadReconciliation(), zoneinfo.ZoneInfo("UTC")
        )
    assert refusal.value.code == "not_found"


async def test_an_intent_whose_attempt_failed_is_withdrawn_too(counter: Counter) -> None:
    order = await counter.order()
    first = await counter.start(order, provider="stripe")
    await counter.tell(first, R.FAILED)
    await counter.start(order, provider="razorpay")
    assert counter.stripe.operations() == ["create", "cancel"]
    assert (await counter.read(first.id)).status == "cancelled"


async def test_an_intent_whose_attempt_failed_and_that_is_not_cancelled_now_is_by_a_job(counter: Counter) -> None:
    order = await counter.order()
    first = await counter.start(order, provider="stripe")
    await counter.tell(first, R.FAILED)
    counter.stripe.fails = [away(counter.stripe.provider)]
    await counter.start(order, provider="razorpay")
    assert ("cancel_payment", first.id) in await counter.till.jobs()
    await cancel_payment(counter.verbs.desk, first.id, PATIENCE)
    assert (await counter.read(first.id)).status == "cancelled"


async def test_what_another_payment_has_paid_is_open_no_more(counter: Counter) -> None:
    order = await counter.order()
    first = await counter.start(order)
    second = await counter.start(order, provider="stripe")
    await counter.tell(second, R.CAPTURED)
    assert await counter.till.jobs() == [("cancel_payment", first.id)]
    await cancel_payment(counter.verbs.desk, first.id, PATIENCE)
    assert (await counter.read(first.id)).status == "cancelled"
    await check_books(counter.desk)


async def test_two_captures_of_different_amounts_are_not_under_way_at_once(counter: Counter) -> None:
    payment = await counter.authorized(await counter.order(), "stripe")
    counter.stripe.crowded = True
    counter.stripe.entered.clear()
    counter.stripe.go.clear()

    def capture(amount: int) -> tuple[Steps, str, CapturePayment]:
        return counter.verbs.capture, payment.id, CapturePayment(amount, "INR")

    asking = asyncio.create_task(counter.do(*capture(10_000), by=STAFF))
    await counter.stripe.entered.wait()
    assert (await counter.refusal(*capture(25_200), by=STAFF)).code == "payment_in_progress"
    await counter.tell(payment, R.CAPTURED, amount=10_000)
    counter.stripe.go.set()
    await asking
    captured = await counter.read(payment.id)
    assert (captured.status, captured.attention, captured.captured) == ("completed", None, 10_000)
