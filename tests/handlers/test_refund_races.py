"""Refunds that gateways and merchants make beside ours: what is owed goes back once, and the books hear of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from handlers import orders
from handlers.ports import GatewayRefused
from models.payment import DisputeNews, DisputeReport, Provider, RefundNews, RefundReport, Report
from models.refund import RefundStatus as R
from tests.handlers.desk import ADMIN, Desk, command
from tests.handlers.refunding import Counter

TOTAL = 25_200
REFUSED = GatewayRefused(Provider.RAZORPAY, 400, "BAD_REQUEST_ERROR", "The payment has been fully refunded already")


@pytest.fixture
async def counter(desk: Desk) -> AsyncIterator[Counter]:
    opened = Counter(desk)
    yield opened
    await opened.check_books()


def elsewhere(name: str, report: RefundReport = RefundReport.SUCCEEDED, amount: int = TOTAL) -> RefundNews:
    """A refund that nobody asked for through us."""
    return RefundNews(gateway_refund_id=name, report=report, amount=amount, currency="INR")


async def duplicate(counter: Counter) -> tuple[str, str]:
    """An order that was paid twice in two attempts: its gateway order, and the refund that is due by itself."""
    name = await counter.till.begin(await counter.order())
    await counter.capture(name, TOTAL)
    await counter.capture(name, TOTAL, attempt="pay_second")
    (row,) = await counter.till.refunds(name)
    return name, str(row["id"])


async def test_a_gateway_that_gave_back_by_itself_refuses_ours_first(counter: Counter) -> None:
    name, refund_id = await duplicate(counter)
    counter.gateway.script = [REFUSED]
    await counter.job(refund_id)
    assert (await counter.show(refund_id)).status is R.FAILED
    await counter.till.tell(name, None, attempt="pay_second", refunds=(elsewhere("rfnd_x"),))
    assert (await counter.show(refund_id)).status is R.SUCCEEDED


async def test_a_gateway_that_gave_back_by_itself_says_so_before_it_refuses_ours(counter: Counter) -> None:
    name, refund_id = await duplicate(counter)
    counter.gateway.script = [REFUSED]
    counter.gateway.go.clear()
    asking = asyncio.create_task(counter.job(refund_id))
    await counter.gateway.entered.wait()
    await counter.till.tell(name, None, attempt="pay_second", refunds=(elsewhere("rfnd_x"),))
    counter.gateway.go.set()
    await asking
    assert (await counter.show(refund_id)).status is R.SUCCEEDED


async def test_a_refund_of_the_same_amount_made_elsewhere_meanwhile_is_another_one(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    counter.gateway.go.clear()
    asking = asyncio.create_task(counter.refund(payment_id, amount=5000, currency="INR"))
    await counter.gateway.entered.wait()
    await counter.hear(payment_id, elsewhere("rfnd_dashboard", amount=5000))
    counter.gateway.go.set()
    await asking
    assert (await counter.money(payment_id))["refunded"] == 10_000


async def test_a_refund_that_failed_and_was_made_anew_elsewhere_is_back(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    _, refund = await counter.refund(payment_id)
    await counter.hear(payment_id, counter.gateway.becomes(refund.id, RefundReport.FAILED))
    await counter.hear(payment_id, elsewhere("rfnd_again"))
    assert (await counter.show(refund.id)).status is R.SUCCEEDED
    await counter.hear(payment_id, next(iter(counter.gateway.made.values())))
    assert (await counter.money(payment_id))["refunded"] == TOTAL


async def test_a_refund_made_elsewhere_that_is_under_way_is_asked_about(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    await counter.hear(payment_id, elsewhere("rfnd_x", RefundReport.PROCESSING))
    (row,) = await counter.shop.fetch("select id from refunds")
    assert ("refund", str(row["id"])) in await counter.till.jobs()


async def test_money_that_comes_back_from_a_dispute_of_a_cancelled_order_goes_to_its_payer(counter: Counter) -> None:
    order = await counter.order()
    payment_id = await counter.pay(order)
    (row,) = await counter.shop.fetch("select gateway_order_id as name from payments")
    dispute = DisputeNews(gateway_dispute_id="disp_1", report=DisputeReport.OPEN, amount=TOTAL, currency="INR")
    await counter.till.tell(row["name"], None, disputes=(dispute,))
    await counter.shop.do(orders.cancel, ADMIN, order.id, command(orders.Cancel, reason="No dosa"))
    won = msgspec.structs.replace(dispute, report=DisputeReport.WON)
    await counter.till.tell(row["name"], None, disputes=(won,))
    assert (await counter.money(payment_id))["reserved"] == TOTAL


async def test_a_mismatch_that_went_back_is_told_as_failed(counter: Counter) -> None:
    name = await counter.till.begin(await counter.order())
    await counter.capture(name, 200)
    (row,) = await counter.till.refunds(name)
    await counter.job(str(row["id"]))
    kinds = [one["type"] for one in await counter.shop.fetch("select type from lifecycle_events order by id")]
    assert kinds == ["payment.created", "payment.refund", "payment.failed"]


async def test_old_news_of_a_failed_attempt_leaves_the_authorized_one_its_name(counter: Counter) -> None:
    name = await counter.till.begin(await counter.order())
    await counter.till.tell(name, Report.AUTHORIZED, attempt="pay_good")
    await counter.till.tell(name, Report.FAILED, attempt="pay_bad")
    row = await counter.till.payment(name)
    assert (row["status"], row["gateway_payment_id"]) == ("authorized", "pay_good")
