"""The payments desk: who may pay what, what becomes of each answer of a gateway, and what is written of it."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import msgspec
import pytest

from handlers import orders, payments
from handlers.book_rows import read_row, view
from handlers.checkout import StartPayment, checkout
from handlers.payments import AnnotatePayment, CapturePayment, ConfirmPayment, Nothing, VerifyPayment
from handlers.ports import Created, GatewayNotAsked
from models.errors import Refused
from models.order import Order
from models.payment import Failure, PaymentStatus, Provider, Report
from models.user import Actor, Role, Scope
from server.doors import convert
from tests.handlers.desk import ADMIN, AGENT, CUSTOMER, SERVICE, STAFF, Desk, command, guest, replay
from tests.handlers.money import check_books, news
from tests.handlers.paying import Counter, away, payment_of, refused, unknown
from tests.models.making import actor

R, P = Report, PaymentStatus
STRANGER = actor(Role.CUSTOMER, "c2")
NOBODY = str(uuid.uuid4())


@pytest.fixture
def counter(desk: Desk) -> Counter:
    return Counter(desk)


def payer(order: Order) -> Actor:
    return guest(order.id, Scope.PAY)


# start: who, and how much


async def test_the_owner_pays_what_is_due(counter: Counter) -> None:
    order = await counter.order()
    async with replay(counter.desk) as told:
        payment = await counter.start(order)
    assert (payment.status, payment.provider, payment.amount, payment.currency) == (
        P.PENDING,
        Provider.RAZORPAY,
        25_200,
        "INR",
    )
    assert payment.order_id == order.id
    assert payment.customer_id == "c1"
    assert payment.reference == payment.id
    assert payment.gateway_order_id == counter.razorpay.names[payment.id]
    assert [one.type for one in told[order.id]] == ["paymentUpdate"]
    assert counter.razorpay.asked == [("create", payment.id)]
    assert await counter.inputs(payment) == ["started", "created"]
    assert await counter.audited() == [], "payers are not audited: the history of the payment says it"
    rows = await counter.desk.fetch("select type from lifecycle_events")
    assert [row["type"] for row in rows] == ["payment.created"]


async def test_who_may_start(counter: Counter) -> None:
    order = await counter.order()
    for by in (CUSTOMER, payer(order), SERVICE, STAFF, ADMIN):
        await counter.start(order, by=by, status=200 if by is not CUSTOMER else 201)
    assert (await counter.refused_start(order, by=AGENT)).code == "forbidden"
    assert (await counter.refused_start(order, by=guest(order.id, Scope.TRACK))).code == "forbidden"
    assert (await counter.refused_start(order, by=STRANGER)).code == "not_found"
    assert (await counter.refused_start(order, by=guest(NOBODY, Scope.PAY))).code == "not_found"
    narrowed = actor(Role.CUSTOMER, "c1", orders=frozenset({NOBODY}))
    assert (await counter.refused_start(order, by=narrowed)).code == "not_found"
    for text in (NOBODY, "no-uuid", ""):
        start = command(StartPayment, orderId=text)
        assert (await counter.refusal(counter.verbs.start, start)).code == "not_found"
    assert await counter.audited() == []


async def test_what_staff_and_services_start_is_audited(counter: Counter) -> None:
    await counter.start(await counter.order(), by=STAFF)
    await counter.start(await counter.order(), by=SERVICE)
    assert await counter.audited() == [(STAFF.who, "payment.start"), (SERVICE.who, "payment.start")]


@pytest.mark.parametrize(
    ("by", "members", "code"),
    [
        (CUSTOMER, {"amount": 25_200}, "invalid"),
        (CUSTOMER, {"amount": 25_200, "currency": "USD"}, "currency_mismatch"),
        (CUSTOMER, {"currency": "USD"}, "currency_mismatch"),
        (CUSTOMER, {"currency": "ZZZ"}, "invalid"),
        (CUSTOMER, {"amount": 25_199, "currency": "INR"}, "amount_mismatch"),
        (CUSTOMER, {"amount": 25_201, "currency": "INR"}, "amount_mismatch"),
        (SERVICE, {"amount": 25_201, "currency": "INR"}, "amount_mismatch"),
        (SERVICE, {"amount": 99, "currency": "INR"}, "amount_too_small"),
        (CUSTOMER, {"capture": "manual"}, "forbidden"),
        (CUSTOMER, {"returnUrl": "javascript:alert(1)"}, "invalid"),
        (CUSTOMER, {"returnUrl": "https://"}, "invalid"),
        (CUSTOMER, {"returnUrl": "http://[::1"}, "invalid"),
    ],
)
async def test_what_is_refused_changes_nothing(counter: Counter, by: Actor, members: Any, code: str) -> None:
    order = await counter.order()
    before = await counter.desk.tables()
    assert (await counter.refused_start(order, by=by, key="k1", **members)).code == code
    assert await counter.desk.tables() == before
    assert counter.razorpay.asked == []


async def test_staff_and_services_may_ask_for_less_and_the_customer_says_all(counter: Counter) -> None:
    order = await counter.order()
    part = await counter.start(order, by=SERVICE, amount=10_000, currency="INR")
    assert part.amount == 10_000
    await counter.tell(part, R.CAPTURED)
    assert (await counter.order_of(part)).payment.due == 15_200
    assert (await counter.refused_start(order, amount=25_200, currency="INR")).code == "amount_mismatch"
    rest = await counter.start(order, amount=15_200, currency="INR")
    await counter.tell(rest, R.CAPTURED)
    assert (await counter.order_of(rest)).status == "confirmed"
    await check_books(counter.desk)


@pytest.mark.parametrize(
    "members",
    [
        {"amount": -1, "currency": "INR"},
        {"amount": 0, "currency": "INR"},
        {"amount": 252.5, "currency": "INR"},
        {"amount": "25200", "currency": "INR"},
        {"amount": True, "currency": "INR"},
        {"amount": 2**53, "currency": "INR"},
        {"amount": None, "currency": "INR"},
        {"currency": "RUPEE"},
        {"provider": "paypal"},
        {"provider": "cash"},
        {"provider": "manual"},
        {"capture": "later"},
        {"metadata": {str(n): "x" for n in range(16)}},
        {"metadata": {"k" * 41: "x"}},
        {"metadata": {"": "x"}},
        {"metadata": {"k": "v" * 257}},
        {"metadata": {"k": 1}},
        {"metadata": {"k": "a\0b"}},
        {"description": "a\0b"},
        {"description": "x" * 256},
        {"returnUrl": "https://shop.example/" + "x" * 2000},
        {"surprise": 1},
    ],
)
def test_what_is_no_command(members: Any) -> None:
    with pytest.raises(Refused) as refusal:
        convert({"orderId": NOBODY, **members}, StartPayment)
    assert refusal.value.code == "invalid"


async def test_what_the_merchant_remembers_is_kept(counter: Counter) -> None:
    order = await counter.order()
    metadata = {f"key {n}": "v" * 256 for n in range(14)} | {"k" * 40: ""}
    payment = await counter.start(
        order, description="Table 7", metadata=metadata, returnUrl="https://shop.example/thanks?a=1"
    )
    assert (payment.description, payment.metadata) == ("Table 7", metadata)
    (row,) = await counter.desk.fetch("select return_url from payments")
    assert row["return_url"] == "https://shop.example/thanks?a=1"


async def test_an_order_that_is_closed_or_paid_takes_no_payment(counter: Counter) -> None:
    order = await counter.order()
    await counter.desk.do(orders.cancel, SERVICE, order.id, command(orders.Cancel, reason="No"))
    assert (await counter.refused_start(order)).code == "order_closed"
    order = await counter.order()
    await counter.tell(await counter.start(order), R.CAPTURED)
    assert (await counter.refused_start(order)).code == "already_paid"
    free = [{"name": "Water", "quantity": 1, "unitPrice": 0}]
    assert (await counter.refused_start(await counter.order(items=free))).code == "already_paid"


async def test_what_was_delivered_unpaid_can_still_be_paid(counter: Counter) -> None:
    order = await counter.desk.place(paymentMethod="later", fulfilment="pickup")
    await counter.desk.move(order.id, "confirmed", "preparing", "ready", "delivered")
    payment = await counter.start(order)
    await counter.tell(payment, R.CAPTURED)
    assert (await counter.order_of(payment)).payment.due == 0
    await counter.desk.move(order.id, "return_requested", "returned")
    assert (await counter.refused_start(order)).code == "order_closed"


# start: which provider


async def test_the_first_one_offered_is_taken(counter: Counter) -> None:
    counter.razorpay.offered = False
    assert (await counter.start(await counter.order())).provider == "stripe"
    counter.stripe.offered = False
    before = await counter.desk.tables()
    assert (await counter.refused_start(await counter.order())).code == "unavailable"
    counter.razorpay.offered = True
    order = await counter.order()
    before = await counter.desk.tables()
    assert (await counter.refused_start(order, provider="stripe", key="k1")).code == "unavailable"
    assert await counter.desk.tables() == before, "nothing is written while the breaker is open"
    counter.gateways.clear()
    assert (await counter.refused_start(order, provider="razorpay")).code == "unavailable"
    assert (await counter.refused_start(order)).code == "unavailable"


# start: what becomes of it


async def test_the_same_again_is_the_same_payment(counter: Counter) -> None:
    order = await counter.order()
    first = await counter.start(order)
    before = await counter.desk.tables()
    for by in (CUSTOMER, payer(order), STAFF):
        assert await counter.start(order, by=by, status=200) == first
    assert await counter.desk.tables() == before
    assert counter.razorpay.operations() == ["create"]


async def test_asked_again_when_its_window_ends_the_order_is_held_for_another(counter: Counter) -> None:
    order = await counter.order()
    first = await counter.start(order)
    await counter.till.age(order.id, 640)
    async with replay(counter.desk) as told:
        await counter.start(order, status=200)
    assert "expiresAt" in told[order.id][0].data
    (row,) = await counter.desk.fetch("select expires_at - now() > interval '9 minutes' as held from orders")
    assert row["held"]
    assert await counter.inputs(first) == ["started", "created", "resumed"]


async def test_refused_and_not_reached_fail_and_the_next_is_another_one(counter: Counter) -> None:
    order = await counter.order()
    for failure, code, retryable in (
        (refused(Provider.RAZORPAY), "BAD_REQUEST_ERROR", False),
        *((refused(Provider.RAZORPAY, status), "BAD_REQUEST_ERROR", True) for status in (401, 403, 409, 429)),
        (away(Provider.RAZORPAY), "connect", True),
    ):
        counter.razorpay.fails = [failure]
        refusal = await counter.refused_start(order)
        assert (refusal.code, refusal.status) == ("gateway_error", 502)
        (row,) = await counter.desk.fetch("select * from payments order by created_at desc, id limit 1")
        failed = view(read_row(row))
        assert failed.status == "failed"
        assert failed.failure is not None
        assert (failed.failure.code, failed.failure.retryable) == (code, retryable)
        assert failed.gateway_order_id is None
        assert not row["attempted"], "nobody has tried to pay"
        assert code in refusal.detail or failure.message in refusal.detail or "not reached" in refusal.detail
    assert len({reference for _, reference in counter.razorpay.asked}) == 6
    assert (await counter.start(order)).status == "pending"
    kinds = [row["type"] for row in await counter.desk.fetch("select type from lifecycle_events order by id")]
    assert kinds.count("payment.failed") == 6


async def test_who_comes_while_another_one_tries_the_gateway_fails_nothing(counter: Counter) -> None:
    """Both have seen a half-open breaker; it lets one of them through."""
    order = await counter.order()
    counter.razorpay.fails = [GatewayNotAsked(Provider.RAZORPAY, "breaker_open", "left alone")]
    refusal = await counter.refused_start(order)
    assert (refusal.code, refusal.status) == ("unavailable", 503)
    (row,) = await counter.desk.fetch("select id, status from payments")
    assert row["status"] == "pending"
    again = await counter.start(order, status=200)
    assert (again.id, again.status) == (str(row["id"]), "pending")
    assert again.gateway_order_id is not None
    kinds = [row["type"] for row in await counter.desk.fetch("select type from lifecycle_events")]
    assert "payment.failed" not in kinds


async def test_an_unknown_creation_is_open_and_asking_again_repeats_it(counter: Counter) -> None:
    order = await counter.order()
    counter.razorpay.fails = [unknown(Provider.RAZORPAY), unknown(Provider.RAZORPAY)]
    async with replay(counter.desk):
        first = await counter.start(order, status=202)
    assert (first.status, first.attention, first.checkout) == ("unknown", "unknown", None)
    assert await counter.till.jobs() == [("reconcile", first.id)]
    assert (await counter.start(order, status=202)).id == first.id
    async with replay(counter.desk):
        again = await counter.start(order, status=200)
    assert (again.id, again.status, again.attention) == (first.id, "pending", None)
    assert counter.razorpay.asked == [("create", first.id)] * 3
    await counter.tell(again, R.CAPTURED)
    assert (await counter.order_of(again)).status == "confirmed"


async def test_whoever_finds_out_first_ends_the_doubt_of_all(counter: Counter) -> None:
    """A repeat whose own call is not answered hears what another one has learned meanwhile."""
    order = await counter.order()
    counter.razorpay.fails = [unknown(Provider.RAZORPAY)]
    first = await counter.start(order, status=202)
    counter.razorpay.go.clear()
    counter.razorpay.entered.clear()
    repeat = asyncio.create_task(counter.start(order, status=200))
    await counter.razorpay.entered.wait()
    desk = payments.Desk(counter.doors.transaction, counter.gateways, counter.house)
    async with counter.doors.transaction() as tx:
        row = await payments.permit_all(tx, SERVICE, first.id)
    await payments.created_as(desk, row, Created(gateway_order_id="order_found"))
    counter.razorpay.fails = [unknown(Provider.RAZORPAY)]
    counter.razorpay.go.set()
    assert (await repeat).gateway_order_id == "order_found"


async def test_an_unknown_creation_stays_so_while_its_repeat_is_not_answered(counter: Counter) -> None:
    """What was perhaps created is not given up because somebody else could not be reached."""
    order = await counter.order()
    throttled = refused(Provider.RAZORPAY, 429)
    counter.razorpay.fails = [unknown(Provider.RAZORPAY), away(Provider.RAZORPAY), throttled, None]
    first = await counter.start(order, status=202)
    for _ in range(2):
        assert (await counter.refused_start(order)).code == "gateway_error"
        assert (await counter.read(first.id)).status == "unknown"
    assert (await counter.start(order, status=200)).id == first.id
    assert counter.razorpay.asked == [("create", first.id)] * 4


async def test_what_a_killed_process_left_is_carried_on(counter: Counter) -> None:
    """It was written, and nobody knows whether the gateway was asked."""
    order = await counter.order()
    counter.razorpay.fails = [ZeroDivisionError()]  # type: ignore[list-item]  # as good as a kill
    with pytest.raises(ZeroDivisionError):
        await counter.start(order, key="k1")
    (row,) = await counter.desk.fetch("select id, status, gateway_order_id from payments")
    assert (row["status"], row["gateway_order_id"]) == ("pending", None)
    again = await counter.start(order, key="k1", status=201)
    assert again.id == str(row["id"])
    assert counter.razorpay.asked == [("create", again.id)] * 2
    assert await counter.start(order, key="k1", status=201) == again, "and from now on it is replayed"
    assert counter.razorpay.asked == [("create", again.id)] * 2


async def test_a_key_whose_payment_came_to_nothing_begins_another_one(counter: Counter) -> None:
    order = await counter.order()
    counter.razorpay.fails = [refused(Provider.RAZORPAY)]
    assert (await counter.refused_start(order, key="k1")).code == "gateway_error"
    payment = await counter.start(order, key="k1")
    assert await counter.start(order, key="k1") == payment
    assert len(counter.razorpay.asked) == 2
    other = counter.starting(order, description="Another command")
    assert (await counter.refusal(counter.verbs.start, other, key="k1")).code == "idempotency_mismatch"


async def test_a_replay_is_for_those_who_still_see_the_order(counter: Counter) -> None:
    order = await counter.order()
    await counter.start(order, key="k1")
    narrowed = actor(Role.CUSTOMER, "c1", orders=frozenset({NOBODY}))
    assert (await counter.refused_start(order, by=narrowed, key="k1")).code == "not_found"


async def test_an_order_that_is_cancelled_while_the_gateway_thinks_is_not_paid(counter: Counter) -> None:
    order = await counter.order()
    counter.razorpay.go.clear()
    starting = asyncio.create_task(counter.refused_start(order))
    await counter.razorpay.entered.wait()
    await counter.desk.do(orders.cancel, CUSTOMER, order.id, command(orders.Cancel, reason="No"))
    counter.razorpay.go.set()
    assert (await starting).code == "order_closed"
    (row,) = await counter.desk.fetch("select * from payments")
    assert row["gateway_order_id"] is not None, "its name is kept: money may come for it"
    assert ("cancel_payment", str(row["id"])) in await counter.till.jobs()


async def test_a_gateway_that_gives_the_name_of_another_payment_is_not_believed(counter: Counter) -> None:
    one = await counter.start(await counter.order())
    other = await counter.order()
    counter.razorpay.names = {reference: str(one.gateway_order_id) for reference in counter.razorpay.names}

    class Liar(dict[str, str]):
        def setdefault(self, key: str, default: str = "") -> str:
            return str(one.gateway_order_id)

    counter.razorpay.names = Liar()
    assert (await counter.refused_start(other)).code == "gateway_error"
    statuses = [row["status"] for row in await counter.desk.fetch("select status from payments order by created_at")]
    assert statuses == ["pending", "failed"]


async def test_webhooks_that_were_here_first_are_woken_by_the_name(counter: Counter) -> None:
    order = await counter.order()
    name = "order_known_before"

    class Known(dict[str, str]):
        def setdefault(self, key: str, default: str = "") -> str:
            return name

    counter.razorpay.names = Known()
    await counter.desk.fetch(
        "insert into webhooks (id, provider, event_id, kind, refs, body, status, received_at, next_at) values "
        "(gen_random_uuid(), 'razorpay', 'e1', 'order.paid', array[$1], '', 'parked', now(), now() + interval '1 day')",
        name,
    )
    await counter.start(order)
    (row,) = await counter.desk.fetch("select status, next_at <= now() + interval '1 second' as due from webhooks")
    assert row["due"]


# another provider


async def test_another_provider_supersedes_what_razorpay_still_takes(counter: Counter) -> None:
    order = await counter.order()
    first = await counter.start(order)
    second = await counter.start(order, provider="stripe")
    rows = await counter.desk.fetch("select id, superseded, status from payments order by created_at, id")
    assert {str(row["id"]): (row["superseded"], row["status"]) for row in rows} == {
        first.id: (True, "pending"),
        second.id: (False, "pending"),
    }
    assert counter.razorpay.operations() == ["create"], "Razorpay withdraws nothing"
    # and back again: the intent is cancelled, the old order of Razorpay is taken up again
    third = await counter.start(order, status=200)
    assert third.id == first.id
    assert counter.stripe.operations() == ["create", "cancel"]
    assert (await counter.read(second.id)).status == "cancelled"
    (row,) = await counter.desk.fetch("select superseded from payments where id = $1", uuid.UUID(first.id))
    assert not row["superseded"]


async def test_money_that_comes_for_both_is_refunded_once(counter: Counter) -> None:
    order = await counter.order()
    first = await counter.start(order)
    second = await counter.start(order, provider="stripe")
    await counter.tell(second, R.CAPTURED)
    await counter.tell(first, R.CAPTURED)
    late = await counter.read(first.id)
    assert late.attention == "duplicate"
    assert len(await counter.till.refunds(str(first.gateway_order_id))) == 1
    await check_books(counter.desk)


async def test_an_intent_that_succeeded_meanwhile_pays_the_order(counter: Counter) -> None:
    order = await counter.order()
    first = await counter.start(order, provider="stripe")
    counter.stripe.say(first, R.CAPTURED)
    assert (await counter.refused_start(order, provider="razorpay")).code == "already_paid"
    assert (await counter.read(first.id)).status == "completed"
    assert (await counter.order_of(first)).status == "confirmed"
    assert counter.razorpay.asked == []


async def test_an_intent_that_cannot_be_cancelled_bars_others(counter: Counter) -> None:
    order = await counter.order()
    first = await counter.start(order, provider="stripe")
    counter.stripe.say(first, R.PROCESSING)
    refusal = await counter.refused_start(order, provider="razorpay")
    assert (refusal.code, refusal.fields) == ("payment_in_progress", {"paymentId": first.id})
    assert (await counter.read(first.id)).status == "processing"


@pytest.mark.parametrize("failure", [away, unknown, refused])
async def test_an_intent_that_is_not_cancelled_now_is_cancelled_by_a_job(counter: Counter, failure: Any) -> None:
    order = await counter.order()
    first = await counter.start(order, provider="stripe")
    counter.stripe.fails = [failure(Provider.STRIPE)]
    second = await counter.start(order, provider="razorpay")
    assert second.status == "pending"
    assert ("cancel_payment", first.id) in await counter.till.jobs()
    (row,) = await counter.desk.fetch("select superseded from payments where id = $1", uuid.UUID(first.id))
    assert row["superseded"]


@pytest.mark.parametrize("report", [R.PROCESSING, R.AUTHORIZED])
async def test_money_that_is_moving_bars_other_providers(counter: Counter, report: Report) -> None:
    order = await counter.order()
    first = await counter.start(order)
    await counter.tell(first, report)
    refusal = await counter.refused_start(order, provider="stripe")
    assert (refusal.code, refusal.fields) == ("payment_in_progress", {"paymentId": first.id})
    assert (await counter.start(order, status=200)).id == first.id


async def test_an_unknown_creation_bars_nobody(counter: Counter) -> None:
    """Nobody was given anything to pay with."""
    order = await counter.order()
    counter.razorpay.fails = [unknown(Provider.RAZORPAY)]
    first = await counter.start(order, status=202)
    assert (await counter.start(order, provider="stripe")).status == "pending"
    (row,) = await counter.desk.fetch("select superseded from payments where id = $1", uuid.UUID(first.id))
    assert row["superseded"]


async def test_another_amount_takes_the_place_of_the_first(counter: Counter) -> None:
    order = await counter.order()
    first = await counter.start(order)
    second = await counter.start(order, by=STAFF, amount=10_000, currency="INR")
    assert second.id != first.id
    (row,) = await counter.desk.fetch("select superseded from payments where id = $1", uuid.UUID(first.id))
    assert row["superseded"]


async def test_many_starts_at_once_are_one_payment(counter: Counter) -> None:
    order = await counter.order()
    counter.razorpay.crowded = True
    await asyncio.gather(*(counter.do(counter.verbs.start, counter.starting(order)) for _ in range(8)))
    assert len(await counter.desk.fetch("select 1 from payments")) == 1
    assert len({reference for _, reference in counter.razorpay.asked}) == 1


# what a browser is given


async def test_the_checkout_is_made_anew_each_time_and_its_secret_is_stored_nowhere(counter: Counter) -> None:
    desk = payments.Desk(counter.doors.transaction, counter.gateways, counter.house)
    payment = await counter.start(await counter.order(), provider="stripe", key="k1")
    secret = f"{payment.gateway_order_id}_secret_x"
    shown = {
        "for": payment.gateway_order_id,
        "secret": secret,
        "prefill": {"name": "Meera", "contact": "+919000090000"},
    }
    assert await checkout(desk, payment.id, secret) == shown
    assert counter.stripe.operations() == ["create"]
    assert await checkout(desk, payment.id, None) == shown
    assert counter.stripe.operations() == ["create", "client_secret"]
    assert secret not in str(await counter.desk.tables())
    counter.stripe.fails = [away(Provider.STRIPE)]
    with pytest.raises(Refused) as refusal:
        await checkout(desk, payment.id, None)
    assert refusal.value.code == "unavailable"
    await counter.desk.do(orders.cancel, SERVICE, str(payment.order_id), command(orders.Cancel, reason="No"))
    assert await checkout(desk, payment.id, secret) is None, "nobody is to pay a cancelled order"
    await counter.tell(payment, R.CAPTURED)
    assert await checkout(desk, payment.id, None) is None


# verify


async def test_a_payment_that_was_made_confirms_its_order(counter: Counter) -> None:
    payment = await counter.start(await counter.order())
    counter.razorpay.say(payment, R.CAPTURED, attempt="pay_1", fee=595)
    async with replay(counter.desk):
        given = await counter.do(counter.verbs.verify, payment.id, counter.proof(payment))
    assert given.status == 200
    assert payment_of(given).status == "completed"
    assert (await counter.order_of(payment)).status == "confirmed"
    assert counter.razorpay.operations() == ["create", "fetch"]
    again = await counter.do(counter.verbs.verify, payment.id, counter.proof(payment))
    assert (again.status, again.body) == (200, given.body)
    assert counter.razorpay.operations() == ["create", "fetch"]
    await check_books(counter.desk)


async def test_a_wrong_proof_changes_nothing(counter: Counter) -> None:
    order = await counter.order()
    payment = await counter.start(order)
    other = await counter.start(await counter.order())
    counter.razorpay.say(payment, R.CAPTURED)
    before = await counter.desk.tables()
    right = counter.proof(payment)
    wrong = [
        counter.proof(payment, razorpaySignature="0" * 64),
        counter.proof(payment, razorpaySignature="no hex"),
        counter.proof(payment, razorpayPaymentId="pay_2"),
        counter.proof(payment, razorpayOrderId="order_other"),
        counter.proof(other),  # another payment, its own signature
        msgspec.structs.replace(counter.proof(other), razorpay_order_id=right.razorpay_order_id),
    ]
    for proof in wrong:
        refusal = await counter.refusal(counter.verbs.verify, payment.id, proof, key="k1")
        assert (refusal.code, refusal.status) == ("invalid_signature", 422)
    for missing in ("razorpayPaymentId", "razorpayOrderId", "razorpaySignature"):
        members = {k: v for k, v in msgspec.to_builtins(right).items() if k != missing}
        refusal = await counter.refusal(counter.verbs.verify, payment.id, command(VerifyPayment, **members))
        assert refusal.code == "invalid"
    assert (await counter.refusal(counter.verbs.verify, payment.id, VerifyPayment())).code == "invalid"
    assert await counter.desk.tables() == before
    assert counter.razorpay.operations() == ["create", "create"]


async def test_who_may_verify(counter: Counter) -> None:
    order = await counter.order()
    payment = await counter.start(order)
    proof = counter.proof(payment)
    assert (await counter.do(counter.verbs.verify, payment.id, proof, by=payer(order))).status == 200
    for by in (SERVICE, STAFF, AGENT, guest(order.id, Scope.TRACK)):
        assert (await counter.refusal(counter.verbs.verify, payment.id, proof, by=by)).code == "forbidden"
    assert (await counter.refusal(counter.verbs.verify, payment.id, proof, by=STRANGER)).code == "not_found"
    for name in (NOBODY, "-" * 36):
        assert (await counter.refusal(counter.verbs.verify, name, proof)).code == "not_found"


@pytest.mark.parametrize("failure", [away, unknown, refused])
async def test_a_proof_holds_the_order_while_the_gateway_does_not_say(counter: Counter, failure: Any) -> None:
    payment = await counter.start(await counter.order())
    counter.razorpay.fails = [failure(Provider.RAZORPAY)]
    given = await counter.do(counter.verbs.verify, payment.id, counter.proof(payment), key="k1")
    shown = payment_of(given)
    assert (given.status, shown.status, shown.gateway_payment_id) == (202, "processing", "pay_1")
    assert await counter.till.jobs() == [("reconcile", payment.id)]
    counter.razorpay.say(payment, R.CAPTURED, attempt="pay_1")
    later = await counter.do(counter.verbs.verify, payment.id, counter.proof(payment), key="k1")
    assert (later.status, payment_of(later).status) == (200, "completed"), "202 is judged anew"


async def test_while_the_breaker_is_open_a_proof_holds_the_order_too(counter: Counter) -> None:
    payment = await counter.start(await counter.order())
    counter.razorpay.offered = False
    given = await counter.do(counter.verbs.verify, payment.id, counter.proof(payment))
    assert (given.status, payment_of(given).status) == (202, "processing")


async def test_stripe_is_asked_and_nothing_is_believed(counter: Counter) -> None:
    payment = await counter.start(await counter.order(), provider="stripe")
    counter.stripe.fails = [away(Provider.STRIPE)]
    given = await counter.do(counter.verbs.verify, payment.id, VerifyPayment())
    assert (given.status, payment_of(given).status) == (202, "pending"), "nobody has proven anything"
    assert await counter.till.jobs() == [("reconcile", payment.id)]
    counter.stripe.say(payment, R.CAPTURED)
    given = await counter.do(counter.verbs.verify, payment.id, VerifyPayment())
    assert (given.status, payment_of(given).status) == (200, "completed")
    proof = VerifyPayment(razorpay_signature="x")
    assert (await counter.refusal(counter.verbs.verify, payment.id, proof)).code == "invalid"


async def test_an_amount_that_is_not_ours_never_completes(counter: Counter) -> None:
    payment = await counter.start(await counter.order())
    for members in ({"amount": 100}, {"currency": "USD"}):
        counter.razorpay.say(payment, R.CAPTURED, attempt=f"pay_{len(members)}", **members)
    given = await counter.do(counter.verbs.verify, payment.id, counter.proof(payment))
    assert (payment_of(given).status, payment_of(given).attention) == ("processing", "mismatch")
    assert (await counter.order_of(payment)).status == "pending"


async def test_a_gateway_that_speaks_of_another_payment_is_not_believed(counter: Counter) -> None:
    payment = await counter.start(await counter.order())
    counter.razorpay.news = [news("order_other", R.CAPTURED, fresh=True)]
    before = await counter.desk.tables()
    for verb, command_, by in (
        (counter.verbs.verify, counter.proof(payment), CUSTOMER),
        (counter.verbs.reconcile, Nothing(), STAFF),
    ):
        assert (await counter.refusal(verb, payment.id, command_, by=by)).code == "gateway_error"
    changed = await counter.desk.tables()
    assert changed.keys() == before.keys()
    assert [name for name in before if changed[name] != before[name]] == ["audit"]


# confirm


CONFIRM = ConfirmPayment(payment_method_id="pm_card_visa", return_url="https://shop.example/back")


async def test_a_confirmation_completes_redirects_or_is_declined(counter: Counter) -> None:
    payment = await counter.start(await counter.order(), provider="stripe")
    declined = counter.stripe.say(
        payment, R.FAILED, failure=Failure(code="card_declined", message="The bank said no.", retryable=True)
    )
    counter.stripe.fails = [refused(Provider.STRIPE, 402, news=declined)]
    refusal = await counter.refusal(counter.verbs.confirm, payment.id, CONFIRM)
    assert (refusal.code, refusal.status) == ("payment_declined", 402)
    failed = await counter.read(payment.id)
    assert (failed.status, failed.failure and failed.failure.code) == ("failed", "card_declined")

    counter.stripe.say(payment, R.PROCESSING)
    for address in ("https://bank.example/3ds?secret=1", "https://bank.example/3ds?secret=2"):
        counter.stripe.redirect_url = address  # a repeat gets a fresh one
        given = await counter.do(counter.verbs.confirm, payment.id, CONFIRM, key="k1")
        assert (given.status, payment_of(given).next_action) == (200, {"type": "redirect", "url": address})
    assert "bank.example" not in str(await counter.desk.tables())

    counter.stripe.say(payment, R.CAPTURED)
    counter.stripe.redirect_url = None
    given = await counter.do(counter.verbs.confirm, payment.id, CONFIRM)
    assert (payment_of(given).status, payment_of(given).next_action) == ("completed", None)
    asked = len(counter.stripe.asked)
    assert payment_of(await counter.do(counter.verbs.confirm, payment.id, CONFIRM)).status == "completed"
    assert len(counter.stripe.asked) == asked, "what is paid is not asked for again"


async def test_what_cannot_be_confirmed(counter: Counter) -> None:
    order = await counter.order()
    payment = await counter.start(order, provider="stripe")
    script = msgspec.structs.replace(CONFIRM, return_url="javascript:1")
    assert (await counter.refusal(counter.verbs.confirm, payment.id, script)).code == "invalid"
    for by, code in ((SERVICE, "forbidden"), (STAFF, "forbidden"), (AGENT, "forbidden"), (STRANGER, "not_found")):
        assert (await counter.refusal(counter.verbs.confirm, payment.id, CONFIRM, by=by)).code == code
    counter.stripe.fails = [refused(Provider.STRIPE, 400), away(Provider.STRIPE)]
    for _ in range(2):
        assert (await counter.refusal(counter.verbs.confirm, payment.id, CONFIRM)).code == "gateway_error"
    counter.stripe.offered = False
    assert (await counter.refusal(counter.verbs.confirm, payment.id, CONFIRM)).code == "unavailable"
    counter.stripe.offered = True
    counter.stripe.fails = [unknown(Provider.STRIPE)]
    given = await counter.do(counter.verbs.confirm, payment.id, CONFIRM)
    assert (given.status, payment_of(given).status) == (202, "processing")
    assert ("reconcile", payment.id) in await counter.till.jobs()
    await counter.tell(payment, R.CANCELLED)
    assert (await counter.refusal(counter.verbs.confirm, payment.id, CONFIRM)).code == "conflict"
    upi = await counter.start(order, provider="razorpay")
    assert (await counter.refusal(counter.verbs.confirm, upi.id, CONFIRM)).code == "invalid"
    await counter.desk.do(orders.cancel, SERVICE, order.id, command(orders.Cancel, reason="No"))
    assert (await counter.refusal(counter.verbs.confirm, payment.id, CONFIRM)).code == "order_closed"


# capture


def taking(amount: int = 25_200, currency: str = "INR") -> CapturePayment:
    return CapturePayment(amount=amount, currency=currency)


async def test_staff_captures_what_was_authorized(counter: Counter) -> None:
    order = await counter.order()
    payment = await counter.authorized(order)
    given = await counter.do(counter.verbs.capture, payment.id, taking(), by=STAFF, key="k1")
    assert (given.status, payment_of(given).status) == (200, "completed")
    assert (await counter.order_of(payment)).status == "confirmed"
    assert (await counter.do(counter.verbs.capture, payment.id, taking(), by=STAFF, key="k1")).body == given.body
    assert (await counter.refusal(counter.verbs.capture, payment.id, taking(), by=STAFF)).code == "money_moved"
    assert (STAFF.who, "payment.capture") in await counter.audited()
    assert counter.razorpay.operations() == ["create", "capture"]


async def test_stripe_captures_less_and_releases_the_rest(counter: Counter) -> None:
    payment = await counter.authorized(await counter.order(), "stripe")
    given = await counter.do(counter.verbs.capture, payment.id, taking(20_000), by=SERVICE)
    shown = payment_of(given)
    assert (shown.status, shown.captured, shown.attention) == ("completed", 20_000, None)
    assert (await counter.order_of(payment)).payment.due == 5200


async def test_what_cannot_be_captured(counter: Counter) -> None:
    order = await counter.order()
    payment = await counter.start(order, by=SERVICE, capture="manual")
    assert (await counter.refusal(counter.verbs.capture, payment.id, taking(), by=STAFF)).code == "conflict"
    await counter.tell(payment, R.AUTHORIZED)
    for by, code in (
        (CUSTOMER, "forbidden"),
        (payer(order), "forbidden"),
        (AGENT, "forbidden"),
        (actor(Role.STAFF, orders=frozenset({NOBODY})), "not_found"),
    ):
        assert (await counter.refusal(counter.verbs.capture, payment.id, taking(), by=by)).code == code
    before = await counter.desk.tables()
    for asked, code in (
        (taking(25_201), "amount_mismatch"),
        (taking(25_199), "amount_mismatch"),  # Razorpay takes all or nothing
        (taking(currency="USD"), "currency_mismatch"),
        (taking(currency="ZZZ"), "invalid"),
    ):
        assert (await counter.refusal(counter.verbs.capture, payment.id, asked, by=STAFF, key="k1")).code == code
    assert await counter.desk.tables() == before
    for failure, code in ((refused(Provider.RAZORPAY), "gateway_error"), (away(Provider.RAZORPAY), "gateway_error")):
        counter.razorpay.fails = [failure]
        assert (await counter.refusal(counter.verbs.capture, payment.id, taking(), by=STAFF)).code == code
    counter.razorpay.fails = [unknown(Provider.RAZORPAY)]
    given = await counter.do(counter.verbs.capture, payment.id, taking(), by=STAFF, key="k2")
    assert given.status == 202
    assert ("reconcile", payment.id) in await counter.till.jobs()
    await counter.tell(payment, R.CAPTURED)
    given = await counter.do(counter.verbs.capture, payment.id, taking(), by=STAFF, key="k2")
    assert (given.status, payment_of(given).status) == (200, "completed"), "it was this one's doing"


async def test_a_capture_that_was_refused_leaves_what_is_expected(counter: Counter) -> None:
    payment = await counter.authorized(await counter.order(), "stripe")
    counter.stripe.fails = [refused(Provider.STRIPE)]
    await counter.refusal(counter.verbs.capture, payment.id, taking(10_000), by=STAFF)
    await counter.tell(payment, R.CAPTURED)
    assert (await counter.read(payment.id)).status == "completed", "all of it was captured elsewhere, and is right"


async def test_an_order_that_was_cancelled_is_not_captured(counter: Counter) -> None:
    order = await counter.order()
    payment = await counter.authorized(order)
    await counter.desk.do(orders.cancel, SERVICE, order.id, command(orders.Cancel, reason="No"))
    assert (await counter.refusal(counter.verbs.capture, payment.id, taking(), by=STAFF)).code == "order_closed"


# cancel and void


async def test_a_pending_payment_is_cancelled(counter: Counter) -> None:
    order = await counter.order()
    upi = await counter.start(order)
    async with replay(counter.desk):
        given = await counter.do(counter.verbs.cancel, upi.id, Nothing())
    assert (given.status, payment_of(given).status) == (200, "cancelled")
    assert counter.razorpay.operations() == ["create"], "Razorpay withdraws nothing, so it is not asked"
    assert (await counter.do(counter.verbs.cancel, upi.id, Nothing())).body == given.body
    card = await counter.start(order, provider="stripe")
    given = await counter.do(counter.verbs.cancel, card.id, Nothing(), by=STAFF)
    assert payment_of(given).status == "cancelled"
    assert counter.stripe.operations() == ["create", "cancel"]
    assert await counter.audited() == [(STAFF.who, "payment.cancel")]
    # its money comes all the same
    await counter.tell(upi, R.CAPTURED)
    assert (await counter.order_of(upi)).status == "confirmed"


async def test_an_unknown_creation_is_cancelled_without_asking(counter: Counter) -> None:
    counter.razorpay.fails = [unknown(Provider.RAZORPAY)]
    payment = await counter.start(await counter.order(), status=202)
    given = await counter.do(counter.verbs.cancel, payment.id, Nothing())
    assert payment_of(given).status == "cancelled"


async def test_what_cannot_be_cancelled(counter: Counter) -> None:
    order = await counter.order()
    payment = await counter.start(order, provider="stripe")
    cases = ((AGENT, "forbidden"), (guest(order.id, Scope.TRACK), "forbidden"), (STRANGER, "not_found"))
    for by, code in cases:
        assert (await counter.refusal(counter.verbs.cancel, payment.id, Nothing(), by=by)).code == code
    counter.stripe.say(payment, R.PROCESSING)
    refusal = await counter.refusal(counter.verbs.cancel, payment.id, Nothing())
    assert (refusal.code, refusal.fields) == ("payment_in_progress", {"paymentId": payment.id})
    counter.stripe.fails = [unknown(Provider.STRIPE)]
    assert (await counter.do(counter.verbs.cancel, payment.id, Nothing())).status == 202
    assert ("cancel_payment", payment.id) in await counter.till.jobs()
    for failure in (away(Provider.STRIPE), refused(Provider.STRIPE)):
        counter.stripe.fails = [failure]
        assert (await counter.refusal(counter.verbs.cancel, payment.id, Nothing())).code == "gateway_error"
    counter.stripe.say(payment, R.CAPTURED)
    assert (await counter.refusal(counter.verbs.cancel, payment.id, Nothing())).code == "money_moved"
    assert (await counter.read(payment.id)).status == "completed"
    assert (await counter.refusal(counter.verbs.cancel, payment.id, Nothing(), by=STAFF)).code == "money_moved"


async def test_an_admin_voids_what_nobody_ever_tried(counter: Counter) -> None:
    order = await counter.order()
    payment = await counter.start(order)
    for by in (CUSTOMER, STAFF, SERVICE, payer(order)):
        assert (await counter.refusal(counter.verbs.void, payment.id, by=by)).code == "forbidden"
    given = await counter.do(counter.verbs.void, payment.id, by=ADMIN)
    assert (given.status, given.body) == (204, b"")
    assert (await counter.read(payment.id)).status == "cancelled", "the row stays"
    assert await counter.audited() == [(ADMIN.who, "payment.void")]
    assert (await counter.do(counter.verbs.void, payment.id, by=ADMIN)).status == 204
    for report in (R.FAILED, R.PROCESSING, R.CAPTURED):
        tried = await counter.start(await counter.order())
        await counter.tell(tried, report)
        assert (await counter.refusal(counter.verbs.void, tried.id, by=ADMIN)).code == "money_moved"
        assert (await counter.read(tried.id)).status != "cancelled"
    surprise = await counter.start(await counter.order())
    counter.razorpay.say(surprise, R.CAPTURED)
    assert (await counter.refusal(counter.verbs.void, surprise.id, by=ADMIN)).code == "money_moved"
    assert (await counter.read(surprise.id)).status == "completed", "the gateway knew more than we did"


# reconcile


async def test_staff_asks_now(counter: Counter) -> None:
    payment = await counter.start(await counter.order())
    for by in (CUSTOMER, SERVICE, AGENT):
        assert (await counter.refusal(counter.verbs.reconcile, payment.id, Nothing(), by=by)).code == "forbidden"
    given = await counter.do(counter.verbs.reconcile, payment.id, Nothing(), by=STAFF)
    assert (given.status, payment_of(given).status) == (200, "pending")
    counter.razorpay.fails = [unknown(Provider.RAZORPAY)]
    assert (await counter.do(counter.verbs.reconcile, payment.id, Nothing(), by=STAFF)).status == 202
    counter.razorpay.fails = [away(Provider.RAZORPAY)]
    assert (await counter.refusal(counter.verbs.reconcile, payment.id, Nothing(), by=STAFF)).code == "gateway_error"
    counter.razorpay.offered = False
    assert (await counter.refusal(counter.verbs.reconcile, payment.id, Nothing(), by=STAFF)).code == "unavailable"
    counter.razorpay.offered = True
    counter.razorpay.say(payment, R.CAPTURED)
    given = await counter.do(counter.verbs.reconcile, payment.id, Nothing(), by=STAFF)
    assert payment_of(given).status == "completed"
    assert (STAFF.who, "payment.reconcile") in await counter.audited()


async def test_asking_about_an_unknown_creation_repeats_it(counter: Counter) -> None:
    counter.razorpay.fails = [unknown(Provider.RAZORPAY)]
    payment = await counter.start(await counter.order(), status=202)
    given = await counter.do(counter.verbs.reconcile, payment.id, Nothing(), by=STAFF)
    shown = payment_of(given)
    assert (shown.status, shown.gateway_order_id) == ("pending", counter.razorpay.names[payment.id])
    assert counter.razorpay.operations() == ["create", "create"]


async def test_while_the_breaker_is_open_nothing_is_written(counter: Counter) -> None:
    order = await counter.order()
    taken, card = await counter.authorized(order), await counter.start(await counter.order(), provider="stripe")
    counter.razorpay.offered = counter.stripe.offered = False
    before = await counter.desk.tables()
    asked: list[tuple[Any, str, tuple[Any, ...], Actor]] = [
        (counter.verbs.capture, taken.id, (taking(),), STAFF),
        (counter.verbs.reconcile, taken.id, (Nothing(),), STAFF),
        (counter.verbs.confirm, card.id, (CONFIRM,), CUSTOMER),
        (counter.verbs.cancel, card.id, (Nothing(),), STAFF),
        (counter.verbs.void, card.id, (), ADMIN),
    ]
    for verb, payment_id, args, by in asked:
        assert (await counter.refusal(verb, payment_id, *args, by=by, key="k1")).code == "unavailable"
    assert await counter.desk.tables() == before


# annotate


async def test_the_back_office_annotates(counter: Counter) -> None:
    order = await counter.order()
    payment = await counter.start(order, description="Old", metadata={"a": "1"})
    note = AnnotatePayment(description="New", metadata={"b": "2"})
    for by in (STAFF, CUSTOMER, AGENT):
        assert (await counter.desk.refused(payments.annotate, by, payment.id, note)).code == "forbidden"
    assert (await counter.desk.refused(payments.annotate, ADMIN, NOBODY, note)).code == "not_found"
    shown = await counter.desk.do(payments.annotate, SERVICE, payment.id, note)
    assert (shown.description, shown.metadata) == ("New", {"b": "2"})
    shown = await counter.desk.do(payments.annotate, ADMIN, payment.id, AnnotatePayment(description=""))
    assert (shown.description, shown.metadata) == (None, {"b": "2"})
    assert await counter.audited() == [(SERVICE.who, "payment.annotate"), (ADMIN.who, "payment.annotate")]
    assert (await counter.order_of(payment)).seq == 2, "nobody in the room hears of it"
