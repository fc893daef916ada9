"""The settle path: news of payments, in any order and any number of times, is booked once and adds up."""

from __future__ import annotations

import datetime as dt
import random
import uuid
from typing import Any

import asyncpg
import pytest

from handlers import orders
from handlers.book import UnknownPayment
from handlers.settlement import expire_order, settle
from models.errors import NotRefundable
from models.ledger import Post, balanced
from models.order import Order
from models.payment import (
    DisputeNews,
    DisputeReport,
    Failure,
    News,
    PaymentStatus,
    Provider,
    RefundNews,
    RefundReport,
    Report,
    Source,
    after,
)
from tests.handlers.desk import CUSTOMER, SERVICE, Desk, command, replay
from tests.handlers.money import Till, check_books, house, news

P, R = PaymentStatus, Report
DECLINED = Failure(code="card_declined", message="The bank said no.", retryable=True)


@pytest.fixture
def till(desk: Desk) -> Till:
    return Till(desk)


async def shown(till: Till, order: Order) -> Order:
    return (await till.desk.orders())[order.id]


def told(events: list[Any]) -> list[tuple[str, str | None]]:
    return [(one.data["status"], one.data.get("reason")) for one in events]


async def test_paying_confirms_the_order_once(till: Till) -> None:
    order = await till.order()
    assert order.waiting_for == ["payment"]
    assert order.expires_at is not None
    async with replay(till.desk) as events:
        name = await till.begin(order)
        await till.tell(name, R.AUTHORIZED)
        assert (await shown(till, order)).payment.status == "processing"
        for _ in range(3):
            await till.tell(name, R.CAPTURED, fee=595)
        await till.tell(name, R.AUTHORIZED)
        await till.tell(name, R.FAILED, failure=DECLINED)
    assert told(events[order.id]) == [
        ("pending", None),
        ("authorized", None),
        ("completed", None),
        ("confirmed", None),
    ]
    paid = await shown(till, order)
    assert (paid.status, paid.payment.status, paid.payment.due, paid.waiting_for) == ("confirmed", "paid", 0, None)
    assert await till.balances() == {
        ("gateway:razorpay", "INR"): 25_200 - 595,
        ("fees", "INR"): 595,
        ("order_receivable", "INR"): -25_200,
    }
    await check_books(till.desk)


@pytest.mark.parametrize("before", [R.FAILED, R.CANCELLED, R.UNKNOWN])
async def test_late_news_of_money_completes_what_was_given_up(till: Till, before: Report) -> None:
    order = await till.order()
    name = await till.begin(order)
    if before is R.FAILED:
        await till.tell(name, R.PROCESSING)
    await till.tell(name, before, failure=DECLINED if before is R.FAILED else None)
    assert (await till.payment(name))["status"] == before
    await till.tell(name, R.CAPTURED)
    payment = await till.payment(name)
    assert (payment["status"], payment["attention"], payment["failure"]) == ("completed", None, None)
    assert (await shown(till, order)).status == "confirmed"


@pytest.mark.parametrize("wrong", [{"amount": 25_100}, {"amount": 25_300}, {"currency": "USD"}])
async def test_another_amount_or_currency_never_completes(till: Till, wrong: dict[str, Any]) -> None:
    order = await till.order()
    name = await till.begin(order)
    async with replay(till.desk):
        await till.tell(name, R.CAPTURED, **wrong)
        await till.tell(name, R.CAPTURED, **wrong)
    payment = await till.payment(name)
    assert (payment["status"], payment["attention"], payment["completed_at"]) == ("processing", "mismatch", None)
    assert (await shown(till, order)).status == "pending"
    (refund,) = await till.refunds(name)
    assert (refund["amount"], refund["currency"], refund["cause"]) == (
        wrong.get("amount", 25_200),
        wrong.get("currency", "INR"),
        "mismatch_refunded",
    )
    (held,) = await till.desk.fetch(
        "select execute_after - now() as wait from jobs.pgqueuer where entrypoint = 'refund'"
    )
    assert dt.timedelta(minutes=59) < held["wait"] <= dt.timedelta(hours=1)
    await check_books(till.desk)
    back = RefundNews(
        gateway_refund_id="rfnd_1", report=RefundReport.SUCCEEDED, amount=refund["amount"], currency=refund["currency"]
    )
    await till.tell(name, None, refunds=(back,))
    payment = await till.payment(name)
    assert (payment["status"], payment["attention"]) == ("failed", None)
    await check_books(till.desk)


async def test_a_second_payment_goes_back_by_itself(till: Till) -> None:
    order = await till.order()
    first, second = await till.begin(order), await till.begin(order, Provider.STRIPE, name="pi_2")
    async with replay(till.desk) as events:
        await till.tell(first, R.CAPTURED)
        await till.tell(second, R.CAPTURED)
    assert told(events[order.id])[-1] == ("completed", "duplicate_refunded")
    assert (await till.payment(second))["attention"] == "duplicate"
    assert [row["amount"] for row in await till.refunds(second)] == [25_200]
    assert await till.refunds(first) == []
    paid = await shown(till, order)
    assert (paid.payment.status, paid.payment.paid, paid.payment.refunded) == ("paid", 25_200, 0)
    await check_books(till.desk)


async def test_the_gateway_may_give_a_second_attempt_back_before_we_do(till: Till) -> None:
    order = await till.order()
    name = await till.begin(order)
    await till.tell(name, R.CAPTURED)
    await till.tell(name, R.CAPTURED, attempt="pay_second")
    back = RefundNews(gateway_refund_id="rfnd_x", report=RefundReport.SUCCEEDED, amount=25_200, currency="INR")
    for _ in range(2):
        await till.tell(name, None, attempt="pay_second", refunds=(back,))
    (refund,) = await till.refunds(name)
    assert (refund["capture_key"], refund["status"], refund["cause"]) == (
        "pay_second",
        "succeeded",
        "duplicate_refunded",
    )
    paid = await shown(till, order)
    assert (paid.status, paid.payment.status, paid.payment.refunded) == ("confirmed", "paid", 0)
    await check_books(till.desk)


async def expired(till: Till, **changes: Any) -> tuple[Order, str]:
    order = await till.order(**changes)
    name = await till.begin(order)
    assert not await till.desk.do(expire_order, order.id)
    await till.age(order.id, 3600)
    async with replay(till.desk) as events:
        assert await till.desk.do(expire_order, order.id)
        assert not await till.desk.do(expire_order, order.id)
    assert [(one.data["status"], one.data["note"]) for one in events[order.id]] == [("cancelled", "expired")]
    return order, name


async def test_late_money_revives_an_order_that_expired(till: Till) -> None:
    order, name = await expired(till)
    async with replay(till.desk) as events:
        await till.tell(name, R.CAPTURED)
    assert told(events[order.id]) == [("completed", "revived"), ("confirmed", None)]
    assert events[order.id][-1].data["previousStatus"] == "cancelled"
    assert (await shown(till, order)).status == "confirmed"
    assert await till.refunds(name) == []
    await check_books(till.desk)


@pytest.mark.parametrize("why", ["nothing is left", "too late", "cancelled by somebody"])
async def test_other_late_money_goes_back_once(till: Till, why: str) -> None:
    if why == "cancelled by somebody":
        order = await till.order()
        name = await till.begin(order)
        await till.desk.do(orders.cancel, CUSTOMER, order.id, command(orders.Cancel, reason="Changed my mind"))
        assert ("cancel_payment", str((await till.payment(name))["id"])) in await till.jobs()
    else:
        order, name = await expired(till)
    if why == "nothing is left":
        till.house = house(answer=False)
    if why == "too late":
        await till.age(order.id, 90_000)
    async with replay(till.desk) as events:
        for _ in range(2):
            await till.tell(name, R.CAPTURED)
    assert told(events[order.id]) == [("completed", "late_refunded")]
    (refund,) = await till.refunds(name)
    assert (refund["amount"], refund["cause"], refund["status"]) == (25_200, "late_refunded", "pending")
    assert [job for job in await till.jobs() if job[0] == "refund"] == [("refund", str(refund["id"]))]
    assert (await till.payment(name))["attention"] == "late"
    await check_books(till.desk)
    back = RefundNews(
        gateway_refund_id="rfnd_1",
        report=RefundReport.SUCCEEDED,
        amount=25_200,
        currency="INR",
        refund_id=str(refund["id"]),
    )
    async with replay(till.desk) as events:
        for _ in range(2):
            await till.tell(name, None, refunds=(back,))
    assert told(events[order.id]) == [("refunded", "late_refunded")]
    late = await shown(till, order)
    assert (late.status, late.payment.status, late.payment.due) == ("cancelled", "refunded", 0)
    assert (await till.payment(name))["attention"] is None
    await check_books(till.desk)


async def test_cancelling_a_paid_order_returns_its_money_in_the_same_transaction(till: Till) -> None:
    order = await till.order()
    name = await till.begin(order)
    await till.tell(name, R.CAPTURED)
    async with replay(till.desk):
        await till.desk.do(orders.cancel, SERVICE, order.id, command(orders.Cancel, reason="Sold out"))
    (refund,) = await till.refunds(name)
    assert (refund["amount"], refund["reason"], refund["requested_by"]) == (25_200, "Sold out", "service:shop")
    await check_books(till.desk)


async def test_a_success_that_is_taken_back_is_owed_again(till: Till) -> None:
    order = await till.order()
    name = await till.begin(order, Provider.STRIPE, name="pi_1")
    await till.tell(name, R.CAPTURED)

    def refund(report: RefundReport) -> RefundNews:
        return RefundNews(gateway_refund_id="re_1", report=report, amount=5_200, currency="INR", failure=DECLINED)

    async with replay(till.desk) as events:
        await till.tell(name, None, refunds=(refund(RefundReport.PROCESSING),))
        await till.tell(name, None, refunds=(refund(RefundReport.SUCCEEDED),))
        await till.tell(name, None, refunds=(refund(RefundReport.PROCESSING),))
        await check_books(till.desk)
        await till.tell(name, None, refunds=(refund(RefundReport.FAILED),))
        await till.tell(name, None, refunds=(refund(RefundReport.SUCCEEDED),))
    assert told(events[order.id]) == [("partially_refunded", None), ("completed", None)]
    payment = await till.payment(name)
    assert (payment["refunded"], payment["reserved"]) == (0, 5_200)
    await check_books(till.desk)


async def test_disputed_money_is_held_until_it_is_won(till: Till) -> None:
    order = await till.order()
    name = await till.begin(order)
    await till.tell(name, R.CAPTURED)

    def dispute(report: DisputeReport, name: str = "disp_1") -> DisputeNews:
        return DisputeNews(gateway_dispute_id=name, report=report, amount=10_000, currency="INR")

    for report in (DisputeReport.OPEN, DisputeReport.OPEN):
        await till.tell(name, None, disputes=(dispute(report),))
    payment = await till.payment(name)
    assert (payment["disputed"], payment["attention"]) == (10_000, "dispute")
    await check_books(till.desk)
    for report in (DisputeReport.WON, DisputeReport.OPEN, DisputeReport.LOST):
        await till.tell(name, None, disputes=(dispute(report),))
    payment = await till.payment(name)
    assert (payment["disputed"], payment["attention"]) == (0, None)
    for report in (DisputeReport.LOST, DisputeReport.OPEN):
        await till.tell(name, None, disputes=(dispute(report, "disp_2"),))
    assert (await till.balances())[("disputes", "INR")] == 10_000
    await check_books(till.desk)


async def test_news_of_something_unknown_changes_nothing(till: Till) -> None:
    before = await till.desk.tables()
    with pytest.raises(UnknownPayment):
        await till.tell("order_nobody", R.CAPTURED)
    assert await till.desk.tables() == before


async def test_what_waited_for_a_name_is_looked_at_again(till: Till) -> None:
    order = await till.order()
    await till.desk.fetch(
        "insert into webhooks (id, provider, event_id, kind, refs, body, status, received_at, next_at) values "
        "(gen_random_uuid(), 'razorpay', 'e', 'payment.captured', array['order_new', 'pay_new'], '', 'parked', now(), "
        "now() + interval '1 hour')"
    )
    await till.begin(order, name=None)
    (waiting,) = await till.desk.fetch("select status from webhooks")
    assert waiting["status"] == "parked"
    (row,) = await till.desk.fetch("update payments set gateway_order_id = null returning id")
    created = News(provider=Provider.RAZORPAY, gateway_order_id="order_new", report=R.PENDING)
    await till.desk.do(settle, created, Source.CLIENT, till.house, payment_id=str(row["id"]))
    (woken,) = await till.desk.fetch("select status, next_at <= now() + interval '1 second' as due from webhooks")
    assert (woken["status"], woken["due"]) == ("parked", True)


# the ladder

LEGAL = {
    P.PENDING: {P.PROCESSING, P.AUTHORIZED, P.FAILED, P.CANCELLED, P.UNKNOWN},
    P.PROCESSING: {P.AUTHORIZED, P.FAILED, P.CANCELLED, P.UNKNOWN},
    P.AUTHORIZED: {P.FAILED, P.CANCELLED},
    P.UNKNOWN: {P.PENDING, P.PROCESSING, P.AUTHORIZED, P.FAILED, P.CANCELLED},
    P.FAILED: {P.AUTHORIZED, P.CANCELLED},
    P.CANCELLED: set(),
    P.COMPLETED: set(),
    P.PARTIALLY_REFUNDED: set(),
    P.REFUNDED: set(),
}


def test_news_without_money_moves_a_payment_along_the_ladder_only() -> None:
    reached = {
        status: {after(status, report, fresh) for report in R if report is not R.CAPTURED for fresh in (True, False)}
        for status in P
    }
    assert {status: targets - {status} for status, targets in reached.items()} == LEGAL


def test_an_entry_that_does_not_balance_is_refused() -> None:
    with pytest.raises(ValueError, match="balance"):
        balanced(Post("till", 1), Post("fees", -2))


@pytest.mark.parametrize(
    "statement",
    [
        "insert into ledger_rows (entry, at, kind, account, currency, amount) "
        "values (gen_random_uuid(), now(), 'x', 'till', 'INR', 1)",
        "with e as (select gen_random_uuid() as id) "
        "insert into ledger_rows (entry, at, kind, account, currency, amount) "
        "select id, now(), 'x', 'till', c, n from e, (values ('INR', 1), ('USD', -1)) as v(c, n)",
    ],
)
async def test_the_database_refuses_it_too(till: Till, statement: str) -> None:
    with pytest.raises(asyncpg.PostgresError, match="does not balance"):
        await till.desk.fetch(statement)


@pytest.mark.parametrize("table", ["ledger_rows", "payment_inputs", "audit"])
@pytest.mark.parametrize("change", ["delete from {}", "update {} set at = now()", "truncate {}"])
async def test_the_books_are_only_ever_added_to(till: Till, table: str, change: str) -> None:
    order = await till.order()
    name = await till.begin(order)
    await till.tell(name, R.CAPTURED)
    await till.desk.fetch("insert into audit (at, actor, action, subject) values (now(), 'a', 'b', 'c')")
    with pytest.raises(asyncpg.PostgresError, match="only ever added"):
        await till.desk.fetch(change.format(table))


# everything at once


def gossip(luck: random.Random, name: str) -> list[News]:
    """All that a gateway may say of one gateway order, with repeats, in any order."""
    attempts = [f"pay_{name}_{n}" for n in range(luck.randint(1, 2))]
    said: list[News] = []
    for attempt in attempts:
        money = {
            "amount": luck.choice([25_200, 25_200, 25_200, 20_000]),
            "currency": luck.choice(["INR"] * 6 + ["USD"]),
        }
        said += [
            news(name, report, attempt=attempt, failure=DECLINED, fresh=luck.random() < 0.3, **money)
            for report in luck.sample([R.PENDING, R.PROCESSING, R.AUTHORIZED, R.FAILED, R.UNKNOWN], luck.randint(0, 4))
        ]
        if luck.random() < 0.7:
            said.append(news(name, R.CAPTURED, attempt=attempt, fee=luck.choice([None, 100]), **money))
            for n in range(luck.randint(0, 2)):
                part = RefundNews(
                    gateway_refund_id=f"rfnd_{attempt}_{n}",
                    report=luck.choice(list(RefundReport)),
                    amount=5_000,
                    currency=str(money["currency"]),
                )
                said.append(news(name, R.CAPTURED, attempt=attempt, refunds=(part,), **money))
            if luck.random() < 0.2:
                dispute = DisputeNews(
                    gateway_dispute_id=f"disp_{attempt}",
                    report=luck.choice(list(DisputeReport)),
                    amount=1_000,
                    currency=str(money["currency"]),
                )
                said.append(news(name, R.CAPTURED, attempt=attempt, disputes=(dispute,), **money))
    said += luck.choices(said, k=len(said)) if said else []
    luck.shuffle(said)
    return said


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_is_said_in_whatever_order_the_books_add_up(till: Till, seed: int) -> None:
    luck = random.Random(seed)
    for _ in range(4):
        order = await till.order()
        names = [await till.begin(order, name=f"order_{uuid.uuid4().hex[:10]}") for _ in range(luck.randint(1, 3))]
        said = [one for name in names for one in gossip(luck, name)]
        luck.shuffle(said)
        till.house = house(luck.random() < 0.5)
        turn, expires = luck.randint(0, len(said) * 2), luck.random() < 0.5
        if expires:
            await till.age(order.id, 3600)
        async with replay(till.desk):
            for number, one in enumerate(said):
                if number == turn and expires:
                    await till.desk.do(expire_order, order.id)
                elif number == turn:
                    if (await shown(till, order)).status in ("pending", "confirmed"):
                        await till.desk.do(orders.cancel, SERVICE, order.id, command(orders.Cancel, reason="x"))
                try:
                    await till.desk.do(_settle, one, till.house)
                except NotBookable:
                    continue
        await check_books(till.desk)
    assert sum((await till.balances()).values()) == 0


class NotBookable(Exception):
    """A refund of more than came, which no gateway makes."""


async def _settle(tx: Any, one: News, at: Any) -> None:
    try:
        await settle(tx, one, Source.WEBHOOK, at)
    except NotRefundable as error:
        raise NotBookable from error
