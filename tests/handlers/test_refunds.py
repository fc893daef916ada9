"""The refunds desk: who may, how much, what the gateway does, and that no race gives back more than came."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from handlers import cash, refund_lists
from handlers.ports import GatewayAway, GatewayRefused, GatewayUnknown
from handlers.refund_calls import ASK_AGAIN_MAX_S
from handlers.refund_lists import ListRefunds, PageOfRefunds
from handlers.settlement import tell_refund
from models.errors import (
    ApprovalRequired,
    Conflict,
    CurrencyMismatch,
    Forbidden,
    IllegalMove,
    Invalid,
    MoneyMoved,
    NotFound,
    NotRefundable,
    Refused,
)
from models.event import Type
from models.ledger import ORDER_RECEIVABLE, REFUNDS_DUE, TILL
from models.order import Status
from models.payment import DisputeNews, DisputeReport, PaymentStatus, Provider, RefundNews, RefundReport, Source
from models.refund import Cause, Channel, RefundStatus
from models.user import Actor, Role, Scope
from tests.handlers.desk import ADMIN, AGENT, CUSTOMER, SERVICE, STAFF, Desk, command, guest, replay
from tests.handlers.money import TERMS
from tests.handlers.refunding import PAUSE_S, STAFF_MAX, Counter, Once, after
from tests.models.making import actor

R = RefundStatus
TOTAL = 25_200
"""Of the order that tests place: two dosas at 12,600."""

REFUSED = GatewayRefused(Provider.RAZORPAY, 400, "BAD_REQUEST_ERROR", "The payment is older than six months.")


def unknown() -> GatewayUnknown:
    return GatewayUnknown(Provider.RAZORPAY, "timeout", "no answer")


def away() -> GatewayAway:
    return GatewayAway(Provider.RAZORPAY, "refused", "connection refused")


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
async def counter(desk: Desk) -> AsyncIterator[Counter]:
    """Its books are checked when the test is over."""
    counter = Counter(desk)
    yield counter
    await counter.check_books()


# how much


async def test_without_an_amount_everything_goes_back(counter: Counter) -> None:
    order = await counter.order()
    payment_id = await counter.pay(order)
    async with replay(counter.shop) as told:
        status, refund = await counter.refund(payment_id)
    assert (status, refund.status, refund.amount, refund.currency) == (201, R.SUCCEEDED, TOTAL, "INR")
    assert (refund.payment_id, refund.order_id, refund.reason) == (payment_id, order.id, "Cold")
    assert refund.settled_at is not None
    assert (refund.channel, refund.failure, refund.lines, refund.cause) == (Channel.ORIGINAL, None, None, None)
    assert await counter.show(refund.id) == refund
    (event,) = told[order.id]
    assert (event.type, event.data["status"], event.data["refunded"]) == (Type.PAYMENT, "refunded", TOTAL)
    assert event.data["payment"] == {
        "method": "online",
        "status": "refunded",
        "due": 0,
        "paid": TOTAL,
        "refunded": TOTAL,
    }
    assert await counter.till.balances() == {}
    kinds = await counter.shop.fetch("select type from lifecycle_events order by id")
    assert [row["type"] for row in kinds] == ["payment.created", "payment.completed", "payment.refund"]
    (row,) = await counter.shop.fetch("select actor, action, subject from audit")
    assert tuple(row) == ("admin:x1", "refund.create", f"refund:{refund.id}")
    history = await counter.shop.fetch("select source, kind from payment_inputs order by id desc limit 2")
    assert [tuple(one) for one in history] == [("staff", "refund.succeeded"), ("staff", "refund.reserved")]


async def test_parts_go_back_until_nothing_is_left(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    for amount in (200, 20_000):
        assert (await counter.refund(payment_id, amount=amount, currency="INR"))[0] == 201
    money = await counter.money(payment_id)
    assert (money["status"], money["refunded"], money["reserved"]) == (PaymentStatus.PARTIALLY_REFUNDED, 20_200, 0)
    refusal = await counter.refused(payment_id, amount=5001, currency="INR")
    assert isinstance(refusal, NotRefundable)
    assert refusal.fields == {"refundable": 5000}
    assert (await counter.refund(payment_id))[1].amount == 5000
    assert (await counter.money(payment_id))["status"] == PaymentStatus.REFUNDED
    assert (await counter.refused(payment_id)).fields == {"refundable": 0}
    assert len(counter.gateway.asked) == 3


async def test_what_never_came_cannot_go_back(counter: Counter) -> None:
    order = await counter.order()
    name = await counter.till.begin(order)
    payment_id = str((await counter.till.payment(name))["id"])
    assert (await counter.refused(payment_id)).fields == {"refundable": 0}
    with pytest.raises(NotRefundable):
        await counter.refund_order(order.id)


async def test_disputed_money_is_not_refundable(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    dispute = DisputeNews(gateway_dispute_id="disp_1", report=DisputeReport.OPEN, amount=20_000, currency="INR")
    await counter.hear(payment_id, disputes=(dispute,))
    assert (await counter.refused(payment_id, amount=5201, currency="INR")).fields == {"refundable": 5200}
    assert (await counter.refund(payment_id))[1].amount == 5200
    won = DisputeNews(gateway_dispute_id="disp_1", report=DisputeReport.WON, amount=20_000, currency="INR")
    await counter.hear(payment_id, disputes=(won,))
    assert (await counter.refund(payment_id))[1].amount == 20_000


SENSELESS: list[tuple[dict[str, Any], str]] = [
    ({"amount": 100}, "/currency"),
    ({"currency": "INR"}, "/amount"),
    ({"amount": 100, "currency": "INR", "lines": [{"lineId": "1", "quantity": 1}]}, "/lines"),
    ({"amount": 100, "currency": "INR", "includeDelivery": True}, "/includeDelivery"),
    ({"amount": 100, "currency": "inr"}, "/currency"),
    ({"amount": 0, "currency": "INR"}, "/amount"),
    ({"amount": -100, "currency": "INR"}, "/amount"),
    ({"amount": 10.5, "currency": "INR"}, "/amount"),
    ({"amount": "100", "currency": "INR"}, "/amount"),
    ({"amount": 2**53, "currency": "INR"}, "/amount"),
    ({"restock": True}, "/restock"),
    ({"restock": False}, "/restock"),
    ({"lines": []}, "/lines"),
    ({"lines": [{"lineId": "1", "quantity": 0}]}, "/lines/0/quantity"),
    ({"lines": [{"lineId": "1", "quantity": 3}]}, "/lines/0/quantity"),
    ({"lines": [{"lineId": "7", "quantity": 1}]}, "/lines/0/lineId"),
    ({"lines": [{"lineId": "1", "quantity": 1}, {"lineId": "1", "quantity": 1}]}, "/lines"),
    ({"channel": "cash"}, "/channel"),
    ({"reason": ""}, "/reason"),
    ({"note": "x"}, "/note"),
]
"""Members of the body, and where the refusal points."""


async def test_what_makes_no_sense_is_invalid_with_a_pointer(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    before = await counter.shop.tables()
    for body, pointer in SENSELESS:
        with pytest.raises(Invalid) as refusal:
            await counter.send(payment_id, {"reason": "Cold", **body})
        assert [error["pointer"] for error in refusal.value.fields["errors"]] == [pointer], body  # type: ignore[attr-defined]
    assert await counter.shop.tables() == before


async def test_another_currency_is_refused(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    assert isinstance(await counter.refused(payment_id, amount=100, currency="USD"), CurrencyMismatch)


# by line


async def test_a_line_goes_back_in_parts_without_losing_a_unit_of_money(counter: Counter) -> None:
    order = await counter.order(items=[{"name": "Idli", "quantity": 3, "unitPrice": 3334}])
    assert order.totals.total == 10_002
    await counter.shop.fetch("update order_lines set total = 10001 where order_id = $1", uuid.UUID(order.id))
    payment_id = await counter.pay(order)
    amounts = []
    for _ in range(3):
        async with replay(counter.shop):
            _, refund = await counter.refund(payment_id, lines=[{"lineId": "1", "quantity": 1}])
        assert [(line.line_id, line.quantity, line.amount) for line in refund.lines or []] == [("1", 1, refund.amount)]
        amounts.append(refund.amount)
    assert amounts == [3333, 3334, 3334]
    (line,) = (await counter.shop.orders())[order.id].items
    assert line.refunded == 10_001
    refusal = await counter.refused(payment_id, lines=[{"lineId": "1", "quantity": 1}])
    assert isinstance(refusal, NotRefundable)
    assert (await counter.refund(payment_id))[1].amount == 1


async def test_delivery_goes_back_once(counter: Counter) -> None:
    order = await counter.order()
    await counter.shop.fetch(
        "update orders set delivery = 4000, total = total + 4000 where id = $1", uuid.UUID(order.id)
    )
    payment_id = await counter.pay(order, TOTAL + 4000)
    _, one = await counter.refund(payment_id, lines=[{"lineId": "1", "quantity": 1}], includeDelivery=True)
    assert one.amount == 12_600 + 4000
    assert isinstance(await counter.refused(payment_id, includeDelivery=True), NotRefundable)
    _, other = await counter.refund(payment_id, lines=[{"lineId": "1", "quantity": 1}], includeDelivery=True)
    assert other.amount == 12_600
    assert (await counter.money(payment_id))["status"] == PaymentStatus.REFUNDED


async def test_lines_are_worth_no_more_than_was_paid(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order(), 10_000)
    refusal = await counter.refused(payment_id, lines=[{"lineId": "1", "quantity": 1}])
    assert isinstance(refusal, NotRefundable)
    assert refusal.fields == {"refundable": 10_000}


# of an order


async def test_an_order_is_refunded_from_its_newest_payment_on(counter: Counter) -> None:
    order = await counter.order()
    first = await counter.pay(order, 20_000)
    second = await counter.pay(order, 5200)
    status, made = await counter.refund_order(order.id, amount=6000, currency="INR")
    assert status == 201
    assert [(one.payment_id, one.amount, one.status) for one in made] == [
        (second, 5200, R.SUCCEEDED),
        (first, 800, R.SUCCEEDED),
    ]
    _, (rest,) = await counter.refund_order(order.id)
    assert (rest.payment_id, rest.amount) == (first, 19_200)
    with pytest.raises(NotRefundable) as refusal:
        await counter.refund_order(order.id)
    assert refusal.value.fields == {"refundable": 0}


async def test_lines_that_two_payments_share_are_counted_once(counter: Counter) -> None:
    order = await counter.order()
    await counter.pay(order, 20_000)
    await counter.pay(order, 5200)
    _, made = await counter.refund_order(order.id, lines=[{"lineId": "1", "quantity": 1}])
    assert [[(line.quantity, line.amount) for line in one.lines or []] for one in made] == [[(1, 5200)], [(0, 7400)]]
    _, (last,) = await counter.refund_order(order.id, lines=[{"lineId": "1", "quantity": 1}])
    assert [(line.quantity, line.amount) for line in last.lines or []] == [(1, 12_600)]
    assert (await counter.shop.orders())[order.id].items[0].refunded == TOTAL


async def test_lines_and_delivery_that_two_captures_share_follow_the_money(counter: Counter) -> None:
    order = await counter.order()
    await counter.shop.fetch(
        "update orders set delivery = 3000, total = total + 3000 where id = $1", uuid.UUID(order.id)
    )
    name = await counter.till.begin(order, amount=10_000)
    for attempt in ("pay_first", "pay_second"):
        await counter.capture(name, 10_000, attempt=attempt)
    payment_id = str((await counter.till.payment(name))["id"])
    asked: dict[str, Any] = {"lines": [{"lineId": "1", "quantity": 1}], "includeDelivery": True}
    assert (await counter.refund(payment_id, **asked))[0] == 201
    made = await counter.shop.fetch(
        "select r.amount, r.delivery, l.quantity, l.amount as line from refunds r "
        "join refund_lines l on l.refund_id = r.id order by l.quantity desc"
    )
    assert [tuple(row) for row in made] == [(10_000, 0, 1, 10_000), (5600, 3000, 0, 2600)]


# and cancel it


async def test_cancelling_too_returns_all_that_was_paid_for_the_order(counter: Counter) -> None:
    order = await counter.order()
    first = await counter.pay(order, 20_000)
    second = await counter.pay(order, 5200)
    async with replay(counter.shop):
        status, refund = await counter.refund(second, cancelOrder=True)
    assert (status, refund.payment_id, refund.amount) == (201, second, 5200)
    cancelled = (await counter.shop.orders())[order.id]
    assert (cancelled.status, cancelled.status_reason) == (Status.CANCELLED, "Cold")
    (other,) = (await counter.shop.do(refund_lists.list_of_payment, ADMIN, first, PageOfRefunds())).items
    assert (other.amount, other.status) == (20_000, R.PENDING)
    assert ("refund", other.id) in await counter.till.jobs()
    assert await counter.job(other.id) is None
    assert (await counter.money(first))["status"] == PaymentStatus.REFUNDED


@pytest.mark.parametrize("asked", [{"amount": 20_000, "currency": "INR"}, {"lines": [{"lineId": "1", "quantity": 1}]}])
async def test_cancelling_with_a_part_returns_only_that(desk: Desk, asked: dict[str, Any]) -> None:
    counter = Counter(desk)  # what is kept of a cancelled order is no error here
    order = await counter.order()
    payment_id = await counter.pay(order)
    open_name = await counter.till.begin(order, amount=1)
    _, refund = await counter.refund(payment_id, cancelOrder=True, **asked)
    assert (await counter.shop.orders())[order.id].status is Status.CANCELLED
    assert await counter.money(payment_id) == {
        "status": PaymentStatus.PARTIALLY_REFUNDED,
        "captured": TOTAL,
        "refunded": refund.amount,
        "reserved": 0,
        "disputed": 0,
    }
    open_id = str((await counter.till.payment(open_name))["id"])
    assert ("cancel_payment", open_id) in await counter.till.jobs()


async def test_an_order_that_cannot_be_cancelled_is_not_refunded_either(counter: Counter) -> None:
    order = await counter.order(fulfilment="pickup")
    payment_id = await counter.pay(order)
    await counter.shop.move(order.id, "preparing", "ready", "delivered")
    assert isinstance(await counter.refused(payment_id, cancelOrder=True), IllegalMove)
    assert counter.gateway.asked == []


# who


@pytest.mark.parametrize("by", [CUSTOMER, AGENT])
async def test_only_the_back_office_gives_money_back(counter: Counter, by: Actor) -> None:
    order = await counter.order()
    payment_id = await counter.pay(order)
    assert isinstance(await counter.refused(payment_id, by), Forbidden)
    assert isinstance(await counter.refused(payment_id, guest(order.id, Scope.PAY)), Forbidden)
    with pytest.raises(Forbidden):
        await counter.refund_order(order.id, by)
    _, refund = await counter.refund(payment_id)
    for one in (by, SERVICE, guest(order.id, Scope.PAY)):
        with pytest.raises(Forbidden):
            await counter.retry(refund.id, one)


async def test_staff_gives_back_so_much_and_others_more(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    assert isinstance(await counter.refused(payment_id, STAFF), ApprovalRequired)
    refusal = await counter.refused(payment_id, STAFF, amount=STAFF_MAX + 1, currency="INR")
    assert isinstance(refusal, ApprovalRequired)
    assert (await counter.refund(payment_id, STAFF, amount=STAFF_MAX, currency="INR"))[0] == 201
    assert (await counter.refund(payment_id, SERVICE, amount=STAFF_MAX + 1, currency="INR"))[0] == 201


async def test_the_limit_of_staff_is_for_all_payments_of_the_order_together(counter: Counter) -> None:
    order = await counter.order()
    await counter.pay(order, TOTAL - STAFF_MAX)
    await counter.pay(order, STAFF_MAX)
    with pytest.raises(ApprovalRequired):
        await counter.refund_order(order.id, STAFF, amount=STAFF_MAX + 1, currency="INR")
    assert len((await counter.refund_order(order.id, STAFF, amount=STAFF_MAX, currency="INR"))[1]) == 1


async def test_somebody_elses_money_is_not_found(counter: Counter) -> None:
    order = await counter.order()
    payment_id = await counter.pay(order)
    _, refund = await counter.refund(payment_id, amount=100, currency="INR")
    elsewhere = actor(Role.SERVICE, "shop", orders=frozenset({str(uuid.uuid4())}))
    assert isinstance(await counter.refused(payment_id, elsewhere), NotFound)
    assert isinstance(await counter.refused(str(uuid.uuid4())), NotFound)
    assert isinstance(await counter.refused("x"), NotFound)
    with pytest.raises(NotFound):
        await counter.refund_order(order.id, elsewhere)
    assert isinstance(await counter.shop.refused(refund_lists.read, elsewhere, refund.id), NotFound)
    assert (await counter.shop.do(refund_lists.list_refunds, elsewhere, ListRefunds())).items == []
    narrowed = actor(Role.SERVICE, "shop", orders=frozenset({order.id}))
    assert (await counter.shop.do(refund_lists.list_refunds, narrowed, ListRefunds())).items == [refund]


async def test_who_sees_the_payment_sees_its_refunds(counter: Counter) -> None:
    order = await counter.order()
    payment_id = await counter.pay(order)
    _, refund = await counter.refund(payment_id)
    stranger = actor(Role.CUSTOMER, "c2")
    for by in (CUSTOMER, guest(order.id, Scope.PAY), STAFF, ADMIN, SERVICE):
        assert await counter.show(refund.id, by) == refund
        page = await counter.shop.do(refund_lists.list_of_payment, by, payment_id, PageOfRefunds())
        assert (page.items, page.next_cursor) == ([refund], None)
    for by, kind in ((stranger, NotFound), (AGENT, Forbidden), (guest(order.id, Scope.TRACK), Forbidden)):
        assert isinstance(await counter.shop.refused(refund_lists.read, by, refund.id), kind)
        assert isinstance(
            await counter.shop.refused(refund_lists.list_of_payment, by, payment_id, PageOfRefunds()), kind
        )
    for by in (CUSTOMER, AGENT, guest(order.id, Scope.PAY)):
        assert isinstance(await counter.shop.refused(refund_lists.list_refunds, by, ListRefunds()), Forbidden)


async def test_the_list_of_refunds_pages_and_filters(counter: Counter) -> None:
    order = await counter.order()
    payment_id = await counter.pay(order)
    counter.gateway.script = [REFUSED, unknown()]
    made = [(await counter.refund(payment_id, amount=100, currency="INR"))[1] for _ in range(4)]
    seen, cursor = [], None
    while True:
        cmd = command(ListRefunds, limit=3, **({"cursor": cursor} if cursor else {}))
        page = await counter.shop.do(refund_lists.list_refunds, STAFF, cmd)
        seen += page.items
        cursor = page.next_cursor
        if cursor is None:
            break
    assert sorted(one.id for one in seen) == sorted(one.id for one in made)
    assert [one.created_at for one in seen] == sorted((one.created_at for one in made), reverse=True)
    for status, number in ((R.FAILED, 1), (R.PROCESSING, 1), (R.SUCCEEDED, 2), (R.PENDING, 0)):
        page = await counter.shop.do(refund_lists.list_refunds, STAFF, ListRefunds(status=status))
        assert [one.status for one in page.items] == [status] * number
    by: list[tuple[dict[str, Any], int]] = [
        ({"order_id": order.id}, 4),
        ({"order_id": payment_id}, 0),
        ({"payment_id": payment_id}, 4),
        ({"payment_id": order.id}, 0),
    ]
    for members, number in by:
        assert len((await counter.shop.do(refund_lists.list_refunds, STAFF, ListRefunds(**members))).items) == number


# cash, and by hand


async def test_cash_is_paid_back_from_the_till(counter: Counter) -> None:
    order = await counter.order()
    payment_id = await counter.pay(order, provider=Provider.CASH)
    assert await counter.till.balances() == {(TILL, "INR"): TOTAL, (ORDER_RECEIVABLE, "INR"): -TOTAL}
    status, refund = await counter.refund(payment_id, STAFF, amount=200, currency="INR")
    assert (status, refund.status, refund.channel, refund.reference) == (201, R.SUCCEEDED, Channel.MANUAL, refund.id)
    assert await counter.till.balances() == {(TILL, "INR"): TOTAL - 200, (ORDER_RECEIVABLE, "INR"): 200 - TOTAL}
    _, other = await counter.refund(payment_id, channel="original", reference="VOUCHER 7")
    assert (other.channel, other.reference, other.settled_at is not None) == (Channel.MANUAL, "VOUCHER 7", True)
    assert counter.gateway.asked == []
    assert not [job for job in await counter.till.jobs() if job[0] == "refund"]


async def test_lines_that_were_paid_in_coins_go_back_in_coins(counter: Counter) -> None:
    order = await counter.order(items=[{"name": "Tea", "quantity": 2, "unitPrice": 12_620}])
    rules = cash.Rules({"INR": 100}, partial=False)
    taken = command(cash.TakeCash, orderId=order.id, amount=25_200, currency="INR")
    payment_id = (await counter.shop.do(cash.take_cash, STAFF, taken, rules, TERMS)).id
    amounts = [(await counter.refund(payment_id, lines=[{"lineId": "1", "quantity": 1}]))[1].amount for _ in range(2)]
    assert amounts == [12_620, 12_580]
    assert await counter.till.balances() == {}
    assert isinstance(await counter.refused(payment_id, lines=[{"lineId": "1", "quantity": 1}]), NotRefundable)


async def test_what_was_paid_online_may_go_back_by_hand(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    _, refund = await counter.refund(payment_id, channel="manual", reference="NEFT 4711")
    assert (refund.status, refund.reference) == (R.SUCCEEDED, "NEFT 4711")
    assert counter.gateway.asked == []
    assert await counter.till.balances() == {("gateway:razorpay", "INR"): TOTAL, (TILL, "INR"): -TOTAL}
    assert (await counter.refused(payment_id)).fields == {"refundable": 0}


async def test_cash_of_a_cancelled_order_waits_for_staff(desk: Desk) -> None:
    counter = Counter(desk)
    order = await counter.order()
    first = await counter.pay(order, 200, provider=Provider.CASH)
    second = await counter.pay(order, TOTAL - 200)
    await counter.refund(second, cancelOrder=True)
    (due,) = (await desk.do(refund_lists.list_refunds, STAFF, ListRefunds(status=R.PENDING))).items
    assert (due.payment_id, due.amount) == (first, 200)
    assert (await counter.job(due.id)) == PAUSE_S, "nobody asks a gateway for cash"
    status, paid = await counter.retry(due.id, STAFF)
    assert (status, paid.status, paid.channel) == (200, R.SUCCEEDED, Channel.MANUAL)
    await counter.check_books()


# what the gateway does


async def test_what_the_gateway_settles_later_is_begun(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    counter.gateway.script = [RefundReport.PROCESSING]
    status, refund = await counter.refund(payment_id)
    assert (status, refund.status) == (201, R.PROCESSING)
    assert (await counter.money(payment_id))["reserved"] == TOTAL
    assert await counter.job(refund.id) == PAUSE_S
    assert counter.gateway.looked_up == [counter.gateway.made[f"{refund.id}-0"].gateway_refund_id]
    await counter.hear(payment_id, counter.gateway.becomes(refund.id, RefundReport.SUCCEEDED))
    settled = await counter.show(refund.id)
    assert settled.status is R.SUCCEEDED
    await counter.hear(payment_id, counter.gateway.made[f"{refund.id}-0"])
    assert await counter.show(refund.id) == settled, "a repeat changes nothing, not even when it was settled"
    assert await counter.job(refund.id) is None
    assert len(counter.gateway.asked) == 1


async def test_the_job_hears_of_the_end_when_no_webhook_comes(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    counter.gateway.script = [RefundReport.PROCESSING]
    _, refund = await counter.refund(payment_id)
    counter.gateway.becomes(refund.id, RefundReport.SUCCEEDED)
    assert await counter.job(refund.id) is None
    assert (await counter.show(refund.id)).status is R.SUCCEEDED


async def test_a_refusal_for_good_fails_and_stays_due(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    counter.gateway.script = [REFUSED]
    status, refund = await counter.refund(payment_id, amount=20_000, currency="INR")
    assert (status, refund.status) == (201, R.FAILED)
    assert refund.failure == REFUSED.failure
    money = await counter.money(payment_id)
    assert (money["refunded"], money["reserved"]) == (0, 20_000)
    assert (await counter.till.balances())[REFUNDS_DUE, "INR"] == -20_000
    assert (await counter.refused(payment_id, amount=5201, currency="INR")).fields == {"refundable": 5200}
    assert await counter.job(refund.id) is None
    assert len(counter.gateway.asked) == 1, "only a person tries again"


async def test_a_refusal_that_may_pass_leaves_it_open(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    for http, retryable in ((401, False), (403, False), (409, False), (429, False), (400, True)):
        counter.gateway.script = [GatewayRefused(Provider.RAZORPAY, http, "X", "Not now.", retryable=retryable)]
        status, refund = await counter.refund(payment_id, amount=100, currency="INR")
        assert (status, refund.status) == (202, R.PENDING)
        assert await counter.job(refund.id) is None
        assert (await counter.show(refund.id)).status is R.SUCCEEDED


async def test_a_gateway_that_is_away_is_asked_by_the_job(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    counter.gateway.script = [away(), away()]
    status, refund = await counter.refund(payment_id)
    assert (status, refund.status) == (202, R.PENDING)
    assert ("refund", refund.id) in await counter.till.jobs()
    assert await counter.job(refund.id) == PAUSE_S
    assert await counter.job(refund.id) is None
    assert [one.key for one in counter.gateway.asked] == [f"{refund.id}-0"] * 3
    assert (await counter.show(refund.id)).status is R.SUCCEEDED


async def test_a_provider_that_is_not_set_up_here_is_waited_for(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    counter.desk = counter.desk._replace(gateways={})
    status, refund = await counter.refund(payment_id)
    assert (status, refund.status) == (202, R.PENDING)
    assert await counter.job(refund.id) == PAUSE_S


@pytest.mark.parametrize("happened", [True, False])
async def test_an_unknown_outcome_is_found_out(counter: Counter, happened: bool) -> None:
    payment_id = await counter.pay(await counter.order())
    counter.gateway.script = [after(unknown()) if happened else unknown()]
    status, refund = await counter.refund(payment_id)
    assert (status, refund.status) == (202, R.PROCESSING)
    assert (await counter.money(payment_id))["reserved"] == TOTAL
    assert await counter.job(refund.id) is None
    assert (await counter.show(refund.id)).status is R.SUCCEEDED
    assert len(counter.gateway.made) == 1
    assert len(counter.gateway.asked) == (1 if happened else 2)


async def test_a_question_that_is_not_answered_fails_nothing(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    counter.gateway.script = [after(unknown())]
    _, refund = await counter.refund(payment_id)
    counter.gateway.lookups = [GatewayRefused(Provider.RAZORPAY, 404, "X", "No such id."), away(), unknown()]
    for _ in range(3):
        assert await counter.job(refund.id) == PAUSE_S
        assert (await counter.show(refund.id)).status is R.PROCESSING
    assert await counter.job(refund.id) is None


async def test_the_same_key_carries_on_what_it_began(counter: Counter) -> None:
    order = await counter.order()
    payment_id = await counter.pay(order, 20_000)
    await counter.pay(order, 5200)
    once = Once()
    counter.gateway.script = [unknown()]
    status, refund = await counter.refund(payment_id, once=once, amount=100, currency="INR")
    assert status == 202
    status, again = await counter.refund(payment_id, once=once, amount=100, currency="INR")
    assert (status, again.id, again.status) == (201, refund.id, R.SUCCEEDED)
    both = Once()
    counter.gateway.script = [away(), away()]
    status, made = await counter.refund_order(order.id, once=both)
    assert (status, len(made), {one.status for one in made}) == (202, 2, {R.PENDING})
    status, made = await counter.refund_order(order.id, once=both)
    assert status == 201
    counter.gateway.script = [away()]
    assert (await counter.refund_order(order.id, once=both))[1] == made, "what is settled is not asked again"


@pytest.mark.parametrize("where", ["before the call", "after the call"])
async def test_a_process_that_dies_around_the_call_leaves_one_refund(counter: Counter, where: str) -> None:
    payment_id = await counter.pay(await counter.order())
    counter.gateway.script = [after(Killed()) if where == "after the call" else Killed()]
    with pytest.raises(Killed):
        await counter.refund(payment_id)
    ((_, refund_id),) = [job for job in await counter.till.jobs() if job[0] == "refund"]
    assert (await counter.show(refund_id)).status is R.PENDING
    assert await counter.job(refund_id) is None
    assert (await counter.show(refund_id)).status is R.SUCCEEDED
    assert counter.gateway.back() == TOTAL
    assert len(counter.gateway.made) == 1


async def test_a_webhook_may_be_faster_than_the_answer(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    counter.gateway.go.clear()
    asking = asyncio.create_task(counter.refund(payment_id))
    await counter.gateway.entered.wait()
    refund_id = counter.gateway.asked[0].refund_id
    news = RefundNews(
        gateway_refund_id="rfnd_early",
        report=RefundReport.SUCCEEDED,
        amount=TOTAL,
        currency="INR",
        refund_id=refund_id,
    )
    counter.gateway.made[f"{refund_id}-0"] = news
    counter.gateway.captures[f"{refund_id}-0"] = counter.gateway.asked[0].capture_key
    await counter.hear(payment_id, news)
    counter.gateway.go.set()
    status, refund = await asking
    assert (status, refund.status) == (201, R.SUCCEEDED)
    assert (await counter.money(payment_id))["refunded"] == TOTAL


# what failed


async def test_a_retry_is_another_refund_for_the_gateway(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    counter.gateway.script = [REFUSED, RefundReport.FAILED]
    _, refund = await counter.refund(payment_id)
    status, again = await counter.retry(refund.id, STAFF)
    assert (status, again.status) == (200, R.FAILED)
    status, again = await counter.retry(refund.id, STAFF)
    assert (status, again.id, again.status, again.failure) == (200, refund.id, R.SUCCEEDED, None)
    assert [one.key for one in counter.gateway.asked] == [f"{refund.id}-{attempt}" for attempt in range(3)]
    assert counter.gateway.back() == TOTAL
    actions = await counter.shop.fetch("select actor, action from audit order by id")
    assert [tuple(row) for row in actions] == [
        ("admin:x1", "refund.create"),
        ("staff:s1", "refund.retry"),
        ("staff:s1", "refund.retry"),
    ]


async def test_what_failed_may_be_settled_by_hand(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    counter.gateway.script = [RefundReport.FAILED]
    _, refund = await counter.refund(payment_id)
    failed = counter.gateway.made[f"{refund.id}-0"]
    with pytest.raises(Invalid) as refusal:
        await counter.retry(refund.id, STAFF, channel="manual")
    assert refusal.value.fields["errors"][0]["pointer"] == "/reference"  # type: ignore[index]
    with pytest.raises(Invalid):
        await counter.retry(refund.id, STAFF, reference="NEFT 1")
    status, done = await counter.retry(refund.id, STAFF, channel="manual", reference="NEFT 1")
    assert (status, done.status, done.channel, done.reference) == (200, R.SUCCEEDED, Channel.MANUAL, "NEFT 1")
    await counter.hear(payment_id, failed)
    assert (await counter.show(refund.id)) == done, "late news of what failed before"
    assert await counter.till.balances() == {("gateway:razorpay", "INR"): TOTAL, (TILL, "INR"): -TOTAL}
    with pytest.raises(MoneyMoved):
        await counter.retry(refund.id)


async def test_what_is_open_is_not_settled_by_hand_but_asked_for_again(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    counter.gateway.script = [unknown()]
    _, refund = await counter.refund(payment_id)
    with pytest.raises(Conflict):
        await counter.retry(refund.id, channel="manual", reference="NEFT 1")
    status, done = await counter.retry(refund.id)
    assert (status, done.status) == (200, R.SUCCEEDED)
    assert {one.key for one in counter.gateway.asked} == {f"{refund.id}-0"}


async def test_a_success_that_is_taken_back_is_due_again(counter: Counter) -> None:
    order = await counter.order()
    payment_id = await counter.pay(order)
    _, refund = await counter.refund(payment_id)
    async with replay(counter.shop):
        await counter.hear(payment_id, counter.gateway.becomes(refund.id, RefundReport.FAILED))
    assert (await counter.show(refund.id)).status is R.FAILED
    money = await counter.money(payment_id)
    assert (money["status"], money["refunded"], money["reserved"]) == (PaymentStatus.COMPLETED, 0, TOTAL)
    assert (await counter.till.balances())[REFUNDS_DUE, "INR"] == -TOTAL
    assert (await counter.retry(refund.id))[1].status is R.SUCCEEDED
    assert (await counter.money(payment_id))["status"] == PaymentStatus.REFUNDED


async def test_late_news_of_an_attempt_says_nothing_of_the_next_one(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    counter.gateway.script = [RefundReport.FAILED]
    _, refund = await counter.refund(payment_id)
    old = counter.gateway.made[f"{refund.id}-0"]
    counter.gateway.script = [unknown()]
    assert (await counter.retry(refund.id))[1].status is R.PROCESSING
    await counter.hear(payment_id, old)
    said = msgspec.structs.replace(old, gateway_refund_id="")
    await counter.shop.do(tell_refund, refund.id, 0, said, Source.STAFF)
    assert (await counter.show(refund.id)).status is R.PROCESSING
    assert await counter.job(refund.id) is None
    assert (await counter.show(refund.id)).status is R.SUCCEEDED


async def test_a_gateway_that_shows_the_failed_attempt_again_has_failed_again(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    counter.gateway.script = [RefundReport.FAILED]
    _, refund = await counter.refund(payment_id)
    counter.gateway.made[f"{refund.id}-1"] = counter.gateway.made[f"{refund.id}-0"]
    counter.gateway.captures[f"{refund.id}-1"] = counter.gateway.captures[f"{refund.id}-0"]
    status, again = await counter.retry(refund.id)
    assert (status, again.status) == (200, R.FAILED)


async def test_a_refusal_that_was_none_is_believed_when_the_money_went(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    counter.gateway.script = [after(REFUSED_BUT_MADE)]
    _, refund = await counter.refund(payment_id)
    assert refund.status is R.FAILED
    await counter.hear(payment_id, counter.gateway.made[f"{refund.id}-0"])
    assert (await counter.show(refund.id)).status is R.SUCCEEDED


REFUSED_BUT_MADE = GatewayRefused(Provider.RAZORPAY, 400, "BAD_REQUEST_ERROR", "No.")


# what goes back by itself


async def test_automatic_refunds_are_carried_out_by_the_job(counter: Counter) -> None:
    order = await counter.order()
    await counter.pay(order)
    name = await counter.till.begin(order, amount=TOTAL)
    await counter.capture(name, TOTAL)
    (row,) = await counter.till.refunds(name)
    assert ("refund", str(row["id"])) in await counter.till.jobs()
    async with replay(counter.shop) as told:
        assert await counter.job(str(row["id"])) is None
    assert [one.data["reason"] for one in told[order.id]] == ["duplicate_refunded"]
    refund = await counter.show(str(row["id"]))
    assert (refund.status, refund.cause, refund.amount) == (R.SUCCEEDED, Cause.DUPLICATE, TOTAL)


async def test_money_of_another_amount_waits_and_then_goes_back(counter: Counter) -> None:
    order = await counter.order()
    name = await counter.till.begin(order)
    await counter.capture(name, 200)
    (row,) = await counter.till.refunds(name)
    (due,) = await counter.shop.fetch(
        "select extract(epoch from execute_after - now())::integer as s from jobs.pgqueuer where entrypoint = 'refund'"
    )
    assert 3590 <= due["s"] <= 3600
    payment_id = str(row["payment_id"])
    assert (await counter.refused(payment_id)).fields == {"refundable": 0}
    assert await counter.job(str(row["id"])) is None
    assert (await counter.show(str(row["id"]))).cause is Cause.MISMATCH


async def test_the_pause_grows_with_the_time_for_which_a_refund_is_open(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    counter.gateway.script = [RefundReport.PROCESSING]
    _, refund = await counter.refund(payment_id)
    pauses = []
    for age_s in (1, 100, 100_000):
        await counter.shop.fetch(
            "update refunds set updated_at = now() - $1 * interval '1 second' where id = $2",
            float(age_s),
            uuid.UUID(refund.id),
        )
        pauses.append(await counter.job(refund.id))
    assert pauses == [PAUSE_S, pytest.approx(100, abs=5), ASK_AGAIN_MAX_S]


# races


async def race(*calls: Any) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


async def test_many_refunds_at_once_give_back_no_more_than_came(counter: Counter) -> None:
    order = await counter.order()
    payment_id = await counter.pay(order)
    outcomes = await race(*(counter.refund(payment_id, amount=4000, currency="INR") for _ in range(24)))
    assert [one for one in outcomes if isinstance(one, BaseException) and not isinstance(one, NotRefundable)] == []
    made = [one for one in outcomes if not isinstance(one, BaseException)]
    assert len(made) == TOTAL // 4000
    assert counter.gateway.back() == 24_000
    assert (await counter.money(payment_id))["refunded"] == 24_000


async def test_a_unit_that_many_give_back_at_once_goes_back_once(counter: Counter) -> None:
    items = [{"name": name, "quantity": 2, "unitPrice": 5000} for name in ("Idli", "Vada")]
    order = await counter.order(items=items)
    payment_id = await counter.pay(order)
    one: dict[str, Any] = {"lines": [{"lineId": "1", "quantity": 1}], "includeDelivery": True}
    outcomes = await race(*(counter.refund(payment_id, **one) for _ in range(10)))
    assert len([outcome for outcome in outcomes if isinstance(outcome, NotRefundable)]) == 8
    assert (await counter.money(payment_id))["refunded"] == 10_000
    assert [line.refunded for line in (await counter.shop.orders())[order.id].items] == [10_000, 0]


async def test_all_ways_to_give_back_race_and_none_gives_back_twice(counter: Counter) -> None:
    order = await counter.order()
    first = await counter.pay(order, 20_000)
    second = await counter.pay(order, 5200)
    ways: list[Callable[[], Any]] = [
        lambda: counter.refund(first),
        lambda: counter.refund(second),
        lambda: counter.refund_order(order.id),
        lambda: counter.refund(first, lines=[{"lineId": "1", "quantity": 1}]),
        lambda: counter.refund_order(order.id, lines=[{"lineId": "1", "quantity": 2}]),
        lambda: counter.refund(second, channel="manual", reference="NEFT 1"),
        lambda: counter.refund(first, cancelOrder=True),
        lambda: counter.refund_order(order.id, amount=100, currency="INR"),
    ]
    outcomes = await race(*(way() for way in ways * 3))
    assert [one for one in outcomes if isinstance(one, BaseException) and not isinstance(one, Refused)] == []
    for row in await counter.shop.fetch("select id from refunds where status <> 'succeeded'"):
        assert await counter.job(str(row["id"])) is None
    (row,) = await counter.shop.fetch("select sum(amount)::bigint as sum from refunds")
    assert row["sum"] == TOTAL
    assert (await counter.shop.orders())[order.id].payment.refunded == TOTAL


async def test_inline_call_job_and_webhook_of_one_refund_are_one(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    counter.gateway.script = [unknown()]
    _, refund = await counter.refund(payment_id)
    counter.gateway.script = [RefundReport.SUCCEEDED] * 8
    outcomes = await race(*(counter.job(refund.id) for _ in range(4)), *(counter.retry(refund.id) for _ in range(4)))
    assert [one for one in outcomes if isinstance(one, BaseException) and not isinstance(one, MoneyMoved)] == []
    assert len(counter.gateway.made) == 1
    assert (await counter.money(payment_id))["refunded"] == TOTAL


async def test_nothing_is_open_while_the_gateway_is_asked(counter: Counter) -> None:
    payment_id = await counter.pay(await counter.order())
    counter.gateway.go.clear()
    asking = asyncio.create_task(counter.refund(payment_id))
    await counter.gateway.entered.wait()
    assert counter.shop.database.connections()["busy"] == 0
    counter.gateway.go.set()
    assert (await asking)[0] == 201
