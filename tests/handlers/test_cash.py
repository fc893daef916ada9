"""The cash desk: who may take how much, what follows for order, payment and ledger, and what agents carry."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec
import pytest

from handlers import cash, orders, payments
from handlers.book import open_book
from handlers.context import Tx
from handlers.ports import Gateway, GatewayFailed, GatewayUnknown, Known
from handlers.settlement import tell_refund
from models.errors import (
    AlreadyPaid,
    AmountMismatch,
    Conflict,
    CurrencyMismatch,
    Forbidden,
    Invalid,
    NotFound,
    OrderClosed,
    Refused,
)
from models.order import Order
from models.payment import News, Payment, Provider, RefundNews, RefundReport, Report, Source
from models.user import Actor, Role, Scope
from tests.handlers.desk import ADMIN, AGENT, CUSTOMER, SERVICE, STAFF, Desk, command, guest, replay
from tests.handlers.money import TERMS, Till, check_books, news
from tests.models.making import actor

RULES = cash.Rules({"INR": 100, "CHF": 5}, partial=False)
PARTIAL = RULES._replace(partial=True)
ROUND_TRIPS = {25_249: 25_200, 25_250: 25_300, 25_200: 25_200}
"""What is due, and what is taken for it in rupees."""


@pytest.fixture
def till(desk: Desk) -> Till:
    return Till(desk)


def taking(order_id: str, amount: int, currency: str = "INR", **more: Any) -> cash.TakeCash:
    return command(cash.TakeCash, orderId=order_id, amount=amount, currency=currency, **more)


async def take(
    desk: Desk, order: Order, amount: int = 25_200, by: Actor = STAFF, rules: cash.Rules = RULES, **more: Any
) -> Payment:
    payment: Payment = await desk.do(cash.take_cash, by, taking(order.id, amount, **more), rules, TERMS)
    return payment


async def refused(
    desk: Desk, order: Order, amount: int = 25_200, by: Actor = STAFF, rules: cash.Rules = RULES, **more: Any
) -> Refused:
    """How the cash is refused; nothing was written."""
    before = await desk.tables()
    refusal = await desk.refused(cash.take_cash, by, taking(order.id, amount, **more), rules, TERMS)
    assert await desk.tables() == before
    return refusal


def priced(total: int) -> dict[str, Any]:
    return {"items": [{"name": "Tea", "quantity": 1, "unitPrice": total}], "paymentMethod": "cash"}


async def out_for_delivery(desk: Desk, **changes: Any) -> Order:
    order = await desk.place(**{"paymentMethod": "cash", **changes})
    await desk.assign(order.id, "a1")
    return await desk.move(order.id, "confirmed", "preparing", "ready", "out_for_delivery")


async def shown(desk: Desk, order: Order) -> Order:
    return (await desk.orders())[order.id]


# what is taken


async def test_cash_at_the_till_pays_the_order(till: Till) -> None:
    desk, order = till.desk, await till.desk.place(paymentMethod="cash", fulfilment="dine_in")
    async with replay(desk) as told:
        payment = await take(desk, order, tendered=30_000, note="two notes")
    assert (payment.provider, payment.method, payment.status) == ("cash", "cash", "completed")
    assert (payment.amount, payment.captured, payment.refundable, payment.currency) == (25_200, 25_200, 25_200, "INR")
    assert (payment.change, payment.confirmed_by, payment.order_id) == (4_800, "s1", order.id)
    assert payment.completed_at is not None
    assert [one.data["status"] for one in told[order.id]] == ["pending", "completed"]
    paid = await shown(desk, order)
    assert (paid.status, paid.payment.status, paid.payment.due) == ("pending", "paid", 0)
    assert await till.balances() == {("till", "INR"): 25_200, ("order_receivable", "INR"): -25_200}
    assert [row["type"] for row in await desk.fetch("select type from lifecycle_events order by id")] == [
        "payment.created",
        "payment.completed",
    ]
    await check_books(desk)


async def test_who_took_how_much_and_when_is_in_the_audit_log_and_the_history(desk: Desk) -> None:
    order = await out_for_delivery(desk)
    payment = await take(desk, order, by=AGENT, note="at the gate")
    (row,) = await desk.fetch("select * from audit")
    assert (row["actor"], row["action"], row["subject"]) == ("agent:a1", "payment.cash", f"payment:{payment.id}")
    assert row["at"] is not None
    after = msgspec.json.decode(row["after"])
    assert after == {"orderId": order.id, "amount": 25_200, "currency": "INR", "account": "cash:a1", "due": 0}
    (told,) = await desk.fetch("select * from payment_inputs")
    assert (told["source"], told["actor"], told["kind"], told["after"]) == ("staff", "agent:a1", "cash", "completed")
    notes = await desk.fetch("select distinct note from ledger_rows")
    assert [row["note"] for row in notes] == ["at the gate"]


@pytest.mark.parametrize(("due", "asked"), ROUND_TRIPS.items())
async def test_cash_is_rounded_and_the_difference_is_an_entry(till: Till, due: int, asked: int) -> None:
    desk, order = till.desk, await till.desk.place(**priced(due))
    for wrong in {due, asked - 1, asked + 1, asked + 100} - {asked}:
        assert isinstance(await refused(desk, order, wrong), AmountMismatch)
    await take(desk, order, asked)
    assert (await shown(desk, order)).payment.due == 0
    expected = {("till", "INR"): asked, ("order_receivable", "INR"): -due, ("rounding", "INR"): due - asked}
    assert await till.balances() == {account: sum_ for account, sum_ in expected.items() if sum_}
    await check_books(desk)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("due", "asked"), ROUND_TRIPS.items())
async def test_rounding_is_undone_by_the_refund_of_the_last_coin(till: Till, due: int, asked: int, parts: int) -> None:
    desk, order = till.desk, await till.desk.place(**priced(due))
    payment = await take(desk, order, asked)
    amounts = [asked // parts] * (parts - 1)
    for amount in [*amounts, asked - sum(amounts)]:
        await check_books(desk)
        assert (await shown(desk, order)).payment.status in ("paid", "partially_refunded")
        refund_id = await desk.do(_reserve, payment.id, amount)
        await check_books(desk)
        back = RefundNews(
            gateway_refund_id=refund_id,
            report=RefundReport.SUCCEEDED,
            amount=amount,
            currency="INR",
            refund_id=refund_id,
        )
        await desk.do(tell_refund, refund_id, 0, back, Source.STAFF)
    assert (await shown(desk, order)).payment.status == "refunded"
    assert await till.balances() == {}
    await check_books(desk)


async def _reserve(tx: Any, payment_id: str, amount: int) -> str:
    tx.atomically()
    book = await open_book(tx, payment_id)
    (refund_id,) = await book.reserve(amount, "came back")
    await book.close(Source.STAFF, "refund.reserved", {})
    return str(refund_id)


async def test_a_part_is_taken_only_when_the_house_says_so(till: Till) -> None:
    desk, order = till.desk, await till.order()
    assert isinstance(await refused(desk, order, 10_000), AmountMismatch)
    async with replay(desk):
        await take(desk, order, 10_000, rules=PARTIAL)
        part = await shown(desk, order)
        assert (part.status, part.payment.status, part.payment.due) == ("pending", "partially_paid", 15_200)
        assert isinstance(await refused(desk, order, 15_300, rules=PARTIAL), AmountMismatch)
        await take(desk, order, 15_200, rules=PARTIAL)
    assert (await shown(desk, order)).status == "confirmed"
    await check_books(desk)


async def test_an_online_order_that_is_paid_in_cash_is_confirmed_once(till: Till) -> None:
    order = await till.order()
    async with replay(till.desk) as told:
        await take(till.desk, order)
        assert isinstance(await refused(till.desk, order), AlreadyPaid)
    assert [one.data["status"] for one in told[order.id]] == ["pending", "completed", "confirmed"]
    await check_books(till.desk)


async def test_what_a_cancel_by_staff_gives_back_waits_by_hand_and_is_in_the_audit_log(till: Till) -> None:
    order = await till.desk.place(**priced(25_249))
    await take(till.desk, order, 25_200)
    async with replay(till.desk):
        await till.desk.do(orders.cancel, STAFF, order.id, command(orders.Cancel, reason="sold out"))
    (refund,) = await till.desk.fetch("select * from refunds")
    assert (refund["amount"], refund["status"]) == (25_200, "pending")
    assert await till.jobs() == []
    assert await till.balances() == {("till", "INR"): 25_200, ("refunds_due", "INR"): -25_200}
    (row,) = await till.desk.fetch("select * from audit where action = 'refund.create'")
    assert (row["actor"], row["subject"]) == ("staff:s1", f"refund:{refund['id']}")
    await check_books(till.desk)


async def test_a_delivered_order_is_paid_later(desk: Desk) -> None:
    order = await desk.place(paymentMethod="later", fulfilment="pickup")
    await desk.move(order.id, "confirmed", "preparing", "ready", "delivered")
    await take(desk, order)
    assert (await shown(desk, order)).payment.status == "paid"


async def test_cash_lets_a_cash_order_be_delivered(desk: Desk) -> None:
    order = await out_for_delivery(desk)
    delivered = command(orders.ChangeStatus, status="delivered")
    assert (await desk.refused(orders.change_status, AGENT, order.id, delivered)).code == "payment_required"
    await take(desk, order, by=AGENT)
    assert (await desk.do(orders.change_status, AGENT, order.id, delivered)).status == "delivered"


# what is refused


async def test_who_takes_cash(desk: Desk) -> None:
    order = await desk.place(paymentMethod="cash")
    await desk.assign(order.id, "a1")
    other = actor(Role.AGENT, "a2")
    for by in (CUSTOMER, SERVICE, guest(order.id, Scope.PAY), guest(order.id, Scope.TRACK)):
        assert isinstance(await refused(desk, order, by=by), Forbidden)
    for status in ("confirmed", "preparing", "ready", "out_for_delivery"):
        assert isinstance(await refused(desk, order, by=AGENT), Forbidden)
        assert isinstance(await refused(desk, order, by=other), NotFound)
        await desk.move(order.id, status)
    assert isinstance(await refused(desk, order, by=other), NotFound)
    for by in (actor(Role.STAFF, "s1", orders=frozenset()), actor(Role.AGENT, "a1", orders=frozenset())):
        assert isinstance(await refused(desk, order, by=by), NotFound)
    await take(desk, order, by=AGENT)
    await desk.move(order.id, "delivered")
    assert isinstance(await refused(desk, order, by=AGENT), Forbidden)
    assert (await take(desk, await desk.place(), by=ADMIN)).confirmed_by == "x1"


async def test_what_is_wrong_with_the_order_or_the_money_is_said(desk: Desk) -> None:
    order = await desk.place(paymentMethod="cash")
    assert isinstance(await refused(desk, order, currency="USD"), CurrencyMismatch)
    assert isinstance(await refused(desk, order, tendered=25_100), AmountMismatch)
    for order_id in ("x", str(uuid.uuid4()), "\0"):
        asked = msgspec.structs.replace(taking(order.id, 25_200), order_id=order_id)
        assert isinstance(await desk.refused(cash.take_cash, STAFF, asked, RULES, TERMS), NotFound)
    await take(desk, order)
    assert isinstance(await refused(desk, order), AlreadyPaid)
    cancelled = await desk.place()
    await desk.do(orders.cancel, SERVICE, cancelled.id, command(orders.Cancel, reason="x"))
    assert isinstance(await refused(desk, cancelled), OrderClosed)
    returned = await desk.place(fulfilment="pickup")
    await desk.move(returned.id, "confirmed", "preparing", "ready", "delivered", "return_requested", "returned")
    assert isinstance(await refused(desk, returned), OrderClosed)


@pytest.mark.parametrize("amount", [0, -25_200, 252.5, 2**53, "25200", True])
def test_an_amount_is_a_whole_number_of_minor_units(amount: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        taking("x", amount)  # type: ignore[arg-type]


# cash beside other money


async def test_cash_closes_what_is_open_at_gateways(till: Till) -> None:
    order = await till.order()
    upi, card = await till.begin(order), await till.begin(order, Provider.STRIPE, name="pi_1")
    failed = await till.begin(order)
    await till.tell(failed, Report.FAILED)
    await take(till.desk, order)
    payments = {name: await till.payment(name) for name in (upi, card, failed)}
    assert [row["superseded"] for row in payments.values()] == [True, True, False]
    assert await till.jobs() == [("cancel_payment", str(payments[name]["id"])) for name in (upi, card)]


class Intents:
    """A gateway that is asked to cancel: it says what it is told to say, or does not answer."""

    def __init__(self, says: Report | GatewayFailed) -> None:
        self.says = says
        self.asked: list[Known] = []

    async def cancel(self, known: Known) -> list[News]:
        self.asked.append(known)
        if isinstance(self.says, GatewayFailed):
            raise self.says
        return [news(known.gateway_order_id, self.says, fresh=True)]


async def take_at_the_door(till: Till, order: Order, gateway: Intents, amount: int = 25_200, by: Actor = STAFF) -> Any:
    """As the door does it: first the gateways, then the cash. The payment, or how it was refused."""

    @asynccontextmanager
    async def transactions() -> AsyncIterator[Tx]:
        async with till.desk.database.transaction() as tx:
            yield tx
        till.desk.told += tx.told

    at = payments.Desk(transactions, {Provider.STRIPE: cast(Gateway, gateway)}, till.house)
    asked = taking(order.id, amount)
    try:
        await cash.make_room(at, by, asked, RULES)
        return await till.desk.do(cash.take_cash, by, asked, RULES, TERMS)
    except Refused as refusal:
        return refusal


async def test_an_open_intent_is_cancelled_before_the_cash_is_booked(till: Till) -> None:
    order, gateway = await till.order(), Intents(Report.CANCELLED)
    await till.begin(order, Provider.STRIPE, name="pi_1")
    await till.begin(order)
    async with replay(till.desk) as told:
        payment = await take_at_the_door(till, order, gateway)
    assert isinstance(payment, Payment)
    assert [one.gateway_order_id for one in gateway.asked] == ["pi_1"], "Razorpay has nothing to cancel"
    assert [one.data["status"] for one in told[order.id]] == ["cancelled", "pending", "completed", "confirmed"]
    assert (await till.payment("pi_1"))["status"] == "cancelled"
    await check_books(till.desk)


async def test_an_intent_that_was_paid_meanwhile_needs_no_cash(till: Till) -> None:
    order, gateway = await till.order(), Intents(Report.CAPTURED)
    await till.begin(order, Provider.STRIPE, name="pi_1")
    assert isinstance(await take_at_the_door(till, order, gateway), AlreadyPaid)
    assert (await shown(till.desk, order)).status == "confirmed"
    assert await till.refunds("pi_1") == []
    await check_books(till.desk)


async def test_a_gateway_that_does_not_answer_keeps_nobody_from_taking_cash(till: Till) -> None:
    order, gateway = await till.order(), Intents(GatewayUnknown(Provider.STRIPE, "timeout", "no answer"))
    await till.begin(order, Provider.STRIPE, name="pi_1")
    assert isinstance(await take_at_the_door(till, order, gateway), Payment)
    intent = await till.payment("pi_1")
    assert (intent["status"], intent["superseded"]) == ("pending", True)
    assert await till.jobs() == [("cancel_payment", str(intent["id"]))]
    await till.tell("pi_1", Report.CAPTURED)
    assert [row["amount"] for row in await till.refunds("pi_1")] == [25_200]
    await check_books(till.desk)


async def test_cash_that_is_refused_cancels_nothing(till: Till) -> None:
    order, gateway = await till.order(), Intents(Report.CANCELLED)
    await till.begin(order, Provider.STRIPE, name="pi_1")
    for amount, by in ((25_100, STAFF), (25_200, CUSTOMER), (25_200, SERVICE), (25_200, AGENT)):
        assert isinstance(await take_at_the_door(till, order, gateway, amount, by), Refused)
    assert gateway.asked == []
    assert (await till.payment("pi_1"))["status"] == "pending"


async def test_money_that_comes_after_the_cash_goes_back_by_itself(till: Till) -> None:
    order = await till.order()
    upi = await till.begin(order)
    async with replay(till.desk) as told:
        await take(till.desk, order)
        await till.tell(upi, Report.CAPTURED)
    assert told[order.id][-1].data["reason"] == "duplicate_refunded"
    assert [row["amount"] for row in await till.refunds(upi)] == [25_200]
    assert (await shown(till.desk, order)).payment.paid == 25_200
    await check_books(till.desk)


async def test_cash_is_refused_once_the_money_has_come(till: Till) -> None:
    order = await till.order()
    await till.tell(await till.begin(order), Report.CAPTURED)
    assert isinstance(await refused(till.desk, order), AlreadyPaid)


async def at_once(desk: Desk, *attempts: Callable[[], Any]) -> list[Any]:
    """All of them, together; a refusal instead of an answer."""
    found = await asyncio.gather(*(attempt() for attempt in attempts), return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException) and not isinstance(one, Refused):
            raise one
    return found


@pytest.mark.parametrize("seed", range(4))
async def test_of_many_who_take_the_cash_one_does(till: Till, seed: int) -> None:
    order = await till.order()
    upi = await till.begin(order)
    attempts: list[Callable[[], Any]] = [lambda: take(till.desk, order) for _ in range(6)]
    attempts.append(lambda: till.tell(upi, Report.CAPTURED))
    random.Random(seed).shuffle(attempts)
    found = await at_once(till.desk, *attempts)
    taken = [one for one in found if isinstance(one, Payment)]
    upi_refunds = await till.refunds(upi)
    assert len(taken) + (not upi_refunds) == 1, "paid by cash, or by the gateway whose money is not given back"
    assert {type(one) for one in found if isinstance(one, Refused)} <= {AlreadyPaid}
    paid = await shown(till.desk, order)
    assert (paid.status, paid.payment.status, paid.payment.paid) == ("confirmed", "paid", 25_200)
    await check_books(till.desk)


# what agents carry


def handing(amount: int, currency: str = "INR", agent_id: str = "a1", **more: Any) -> cash.HandOver:
    return command(cash.HandOver, agentId=agent_id, amount=amount, currency=currency, **more)


async def carried(desk: Desk, by: Actor = STAFF, agent_id: str = "a1", **asked: Any) -> cash.AgentCash:
    found: cash.AgentCash = await desk.do(cash.read_agent_cash, by, agent_id, command(cash.ReadAgentCash, **asked))
    return found


async def test_an_agent_carries_what_was_taken_until_it_is_handed_over(till: Till) -> None:
    desk = till.desk
    assert await carried(desk) == cash.AgentCash(balance=0, entries=[])
    first, second = await out_for_delivery(desk), await out_for_delivery(desk)
    await take(desk, first, by=AGENT)
    await take(desk, second, by=AGENT, note="exact")
    held = await carried(desk, AGENT)
    assert (held.currency, held.balance, held.next_cursor) == ("INR", 50_400, None)
    assert [(one.kind, one.amount, one.order_id, one.note) for one in held.entries] == [
        ("cash", 25_200, second.id, "exact"),
        ("cash", 25_200, first.id, None),
    ]
    given: cash.Handover = await desk.do(cash.hand_over, STAFF, handing(50_000, note="one note is missing"))
    assert (given.expected, given.difference) == (50_400, -400)
    assert await till.balances() == {
        ("till", "INR"): 50_000,
        ("cash:a1", "INR"): 400,
        ("order_receivable", "INR"): -50_400,
    }
    held = await carried(desk)
    assert held.balance == 400
    newest = held.entries[0]
    assert (newest.kind, newest.amount, newest.note) == ("handover", -50_000, "one note is missing")
    again: cash.Handover = await desk.do(cash.hand_over, ADMIN, handing(500))
    assert (again.expected, again.difference) == (400, 100)
    assert (await carried(desk)).balance == -100
    rows = await desk.fetch("select * from audit where action = 'cash.handover' order by id")
    assert [(row["actor"], row["subject"]) for row in rows] == [("staff:s1", "agent:a1"), ("admin:x1", "agent:a1")]
    assert msgspec.json.decode(rows[0]["before"]) == {"currency": "INR", "balance": 50_400}
    assert msgspec.json.decode(rows[0]["after"]) == {
        "currency": "INR",
        "balance": 400,
        "amount": 50_000,
        "handoverId": given.id,
    }
    await check_books(desk)


async def test_cash_at_the_till_is_nobodys_to_carry(desk: Desk) -> None:
    order = await out_for_delivery(desk)
    await take(desk, order, by=STAFF)
    assert (await carried(desk)).balance == 0


async def test_currencies_are_carried_apart(desk: Desk) -> None:
    for currency in ("INR", "CHF"):
        await take(desk, await out_for_delivery(desk, currency=currency), 25_200, AGENT, currency=currency)
    await desk.do(cash.hand_over, STAFF, handing(200))
    assert (await carried(desk)).currency == "INR", "the last that was moved"
    assert (await carried(desk)).balance == 25_000
    francs = await carried(desk, currency="CHF")
    assert (francs.balance, [one.amount for one in francs.entries]) == (25_200, [25_200])
    assert await carried(desk, currency="USD") == cash.AgentCash(currency="USD", balance=0, entries=[])


async def test_entries_come_in_pages(desk: Desk) -> None:
    for amount in range(1, 8):
        await desk.do(cash.hand_over, STAFF, handing(amount))
    found: list[int] = []
    cursor: dict[str, Any] = {}
    while True:
        page = await carried(desk, limit=3, **cursor)
        assert page.balance == -28
        found += [one.amount for one in page.entries]
        if page.next_cursor is None:
            break
        cursor = {"cursor": page.next_cursor}
    assert found == [-amount for amount in range(7, 0, -1)]
    assert (await carried(desk, cursor="1")).entries == []


async def test_who_sees_and_takes_over_what_an_agent_carries(desk: Desk) -> None:
    other, narrow = actor(Role.AGENT, "a2"), frozenset({str(uuid.uuid4())})
    read, asked = cash.read_agent_cash, command(cash.ReadAgentCash)
    for by in (STAFF, ADMIN, AGENT):
        await desk.do(read, by, "a1", asked)
    assert isinstance(await desk.refused(read, other, "a1", asked), NotFound)
    for by in (CUSTOMER, SERVICE, guest(str(uuid.uuid4()), Scope.PAY), actor(Role.STAFF, "s1", orders=narrow)):
        assert isinstance(await desk.refused(read, by, "a1", asked), Forbidden)
    for by in (AGENT, CUSTOMER, SERVICE, actor(Role.STAFF, "s1", orders=narrow)):
        assert isinstance(await desk.refused(cash.hand_over, by, handing(100)), Forbidden)
    assert isinstance(await desk.refused(cash.hand_over, STAFF, handing(100, "XXX")), Invalid)
    assert isinstance(await desk.refused(read, STAFF, "a1", command(cash.ReadAgentCash, currency="XXX")), Invalid)


async def test_handovers_at_once_each_expect_what_the_other_left(desk: Desk) -> None:
    order = await out_for_delivery(desk)
    await take(desk, order, by=AGENT)
    handed = [1_000 + number for number in range(8)]
    found = await at_once(
        desk, *(lambda amount=amount: desk.do(cash.hand_over, STAFF, handing(amount)) for amount in handed)
    )
    given = sorted((one for one in found if isinstance(one, cash.Handover)), key=lambda one: -one.expected)
    assert len(given) == len(handed)
    left = 25_200
    for one in given:
        assert one.expected == left
        left -= one.difference + one.expected
    assert (await carried(desk)).balance == left == 25_200 - sum(handed)
    assert not any(isinstance(one, Conflict) for one in found)
