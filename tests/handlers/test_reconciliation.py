"""Reconciliation, against Razorpay's simulator: what nobody told us is asked for, no order expires while it is paid,
and each payment of which the books differ is named."""

from __future__ import annotations

import datetime as dt
import uuid
import zoneinfo
from collections.abc import AsyncIterator
from typing import Any

import pytest

from handlers.jobs import GiveUp, NotYet
from handlers.payments import Desk as PaymentsDesk
from handlers.ports import GatewayRefused, NewPayment
from handlers.reconciliation import (
    Patience,
    ReadReconciliation,
    bounds,
    cancel_payment,
    compare,
    expire,
    find_expiring,
    find_moving,
    pause_s,
    read_reconciliation,
    reconcile,
)
from models.errors import Refused
from models.order import Order, Status
from models.payment import Capture, Provider, Report, Source
from models.reconciliation import Kind, Reconciliation
from models.user import Actor, Role
from server.adapters.sandbox.mischief import Fault
from tests.adapters.razorpay_world import RazorpayWorld, open_razorpay
from tests.handlers.desk import ADMIN, SERVICE, STAFF, Desk
from tests.handlers.money import TERMS, Till, check_books
from tests.models.making import actor

PATIENCE = Patience(first_s=15, longest_s=3600, between=lambda low, high: high, pending_s=2700)
KOLKATA = zoneinfo.ZoneInfo("Asia/Kolkata")
HOUR = dt.timedelta(hours=1)


@pytest.fixture
async def world() -> AsyncIterator[RazorpayWorld]:
    async with open_razorpay() as opened:
        yield opened


class Office(Till):
    """A till whose payments are at a simulated Razorpay."""

    def __init__(self, desk: Desk, world: RazorpayWorld) -> None:
        super().__init__(desk)
        self.world = world
        self.payments = PaymentsDesk(desk.database.transaction, {Provider.RAZORPAY: world.gateway}, self.house)

    async def started(self, order: Order | None = None, capture: Capture = Capture.AUTOMATIC) -> str:
        """A payment that the gateway knows and nobody has paid; the name of its gateway order. `capture`: what the
        gateway is told; we want it captured."""
        new = NewPayment(
            payment_id=str(uuid.uuid4()),
            order_id="o",
            reference=uuid.uuid4().hex,
            amount=25_200,
            currency="INR",
            capture=capture,
        )
        name = (await self.world.gateway.create(new)).gateway_order_id
        return await self.begin(order or await self.order(), name=name)

    async def id_of(self, name: str) -> str:
        return str((await self.payment(name))["id"])

    async def reconcile(self, name: str) -> Any:
        """Reconcile it; the row after that."""
        await reconcile(self.payments, await self.id_of(name), PATIENCE)
        return await self.payment(name)

    async def status_of(self, order: Order) -> Status:
        return (await self.desk.orders())[order.id].status

    async def since(self, name: str, seconds: float) -> None:
        """Let its status be so old."""
        await self.desk.fetch(
            "update payments set status_at = status_at - $2::interval where gateway_order_id = $1",
            name,
            dt.timedelta(seconds=seconds),
        )


@pytest.fixture
async def office(desk: Desk, world: RazorpayWorld) -> AsyncIterator[Office]:
    opened = Office(desk, world)
    yield opened
    await check_books(desk)


# one payment


async def test_what_nobody_told_us_is_asked_for(office: Office) -> None:
    order = await office.order()
    name = await office.started(order)
    office.world.sandbox.pay(name)
    row = await office.reconcile(name)
    assert (row["status"], row["captured"]) == ("completed", 25_200)
    assert await office.status_of(order) is Status.CONFIRMED
    [source] = await office.desk.fetch("select source from payment_inputs where kind = 'captured'")
    assert source["source"] == Source.RECONCILIATION


async def test_asking_twice_books_once(office: Office) -> None:
    name = await office.started()
    office.world.sandbox.pay(name)
    for _ in range(2):
        row = await office.reconcile(name)
    assert (row["captured"], len(await office.refunds(name))) == (25_200, 0)


@pytest.mark.parametrize("fault", [Fault.HTML_AFTER, Fault.DROP_AFTER, Fault.HTML])
async def test_a_creation_of_unknown_outcome_is_repeated_under_its_reference(office: Office, fault: Fault) -> None:
    order = await office.order()
    payment_id = await unnamed(office, order)
    office.world.mischief.fault, office.world.mischief.fault_method = fault, "POST"
    with pytest.raises(NotYet):
        await reconcile(office.payments, payment_id, PATIENCE)
    assert await status_of(office, payment_id) == "unknown"
    with pytest.raises(NotYet):  # it can be paid now, and is asked about until somebody does
        await reconcile(office.payments, payment_id, PATIENCE)
    assert await status_of(office, payment_id) == "pending"
    [made] = office.world.sandbox.books.state.orders.values()
    assert made.receipt == payment_id
    office.world.sandbox.pay(made.id)
    await reconcile(office.payments, payment_id, PATIENCE)
    assert await office.status_of(order) is Status.CONFIRMED


async def test_a_payment_that_nobody_seems_to_have_paid_is_asked_about_while_it_is_young(office: Office) -> None:
    """Its webhook may be lost, and the payer's browser gone."""
    order = await office.order()
    name = await office.started(order)
    payment_id = await office.id_of(name)
    assert await office.desk.do(find_moving, 0, 2700) == 1
    assert await office.jobs() == [("reconcile", payment_id)]
    with pytest.raises(NotYet):
        await reconcile(office.payments, payment_id, PATIENCE)
    office.world.sandbox.pay(name)
    await reconcile(office.payments, payment_id, PATIENCE)
    assert await office.status_of(order) is Status.CONFIRMED
    idle = await office.id_of(await office.started())
    await reconcile(office.payments, idle, PATIENCE._replace(pending_s=0))  # old enough: it is left alone


async def unnamed(office: Office, order: Order) -> str:
    """A payment of which nobody knows whether the gateway has made it."""
    name = await office.begin(order)
    payment_id = await office.id_of(name)
    await office.tell(name, Report.UNKNOWN, Source.SYSTEM)
    await office.desk.fetch(
        "update payments set gateway_order_id = null, gateway_payment_id = null where id = $1", uuid.UUID(payment_id)
    )
    return payment_id


async def status_of(office: Office, payment_id: str) -> str:
    [row] = await office.desk.fetch("select status from payments where id = $1", uuid.UUID(payment_id))
    return str(row["status"])


async def test_a_payment_that_still_moves_is_asked_about_again_and_more_seldom(office: Office) -> None:
    name = await office.started()
    attempt = office.world.sandbox.begin(name)
    pauses = []
    for age in (0, 60, 100_000):
        with pytest.raises(NotYet) as not_yet:
            await office.reconcile(name)
        pauses.append(round(not_yet.value.after_s))
        await office.since(name, age)
    assert (await office.payment(name))["status"] == "processing"
    with pytest.raises(NotYet) as not_yet:
        await office.reconcile(name)
    assert [*pauses, not_yet.value.after_s] == [15, 15, 60, 3600]
    office.world.sandbox.finish(attempt.id)
    assert (await office.reconcile(name))["status"] == "completed"


def test_pauses_grow_with_the_age_and_spread() -> None:
    seldom = Patience(15, 3600, lambda low, high: low, 2700)
    assert [pause_s(age, seldom) for age in (0, 15, 60, 7200)] == [7.5, 7.5, 30, 1800]


@pytest.mark.parametrize("fault", [Fault.THROTTLE, Fault.HTML, Fault.HANG, Fault.ERROR])
async def test_a_gateway_that_does_not_answer_is_asked_later(office: Office, fault: Fault) -> None:
    name = await office.started()
    office.world.sandbox.pay(name)
    office.world.mischief.fault, office.world.mischief.fault_calls = fault, 5
    with pytest.raises(NotYet):
        await office.reconcile(name)
    assert (await office.payment(name))["status"] == "pending"
    office.world.mischief.fault = None
    office.world.pass_time(60)
    assert (await office.reconcile(name))["status"] == "completed"


PASSING = [401, 403, 409, 429]


def refuses(monkeypatch: pytest.MonkeyPatch, office: Office, operation: str, status: int) -> None:
    """From now on the gateway refuses this operation."""

    async def refuse(*_: object) -> None:
        raise GatewayRefused(Provider.RAZORPAY, status, "BAD_REQUEST_ERROR", "Not now")

    monkeypatch.setattr(office.world.gateway, operation, refuse)


@pytest.mark.parametrize("status", PASSING)
async def test_a_refusal_that_may_pass_is_no_failure_of_the_job(
    office: Office, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    name = await office.started()
    office.world.sandbox.pay(name)
    with monkeypatch.context() as patch:
        refuses(patch, office, "fetch", status)
        with pytest.raises(NotYet):
            await office.reconcile(name)
        with pytest.raises(NotYet):  # Razorpay reads what it cancels
            await cancel_payment(office.payments, await office.id_of(name), PATIENCE)
    assert (await office.reconcile(name))["status"] == "completed"


async def test_a_refusal_for_good_is_a_failure_of_the_job(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    name = await office.started()
    refuses(monkeypatch, office, "fetch", 400)
    for job in (reconcile, cancel_payment):
        with pytest.raises(GatewayRefused):
            await job(office.payments, await office.id_of(name), PATIENCE)


@pytest.mark.parametrize("status", PASSING)
async def test_a_cancel_that_is_refused_for_now_is_repeated(
    office: Office, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    name = await office.started()
    with monkeypatch.context() as patch:
        refuses(patch, office, "cancel", status)
        with pytest.raises(NotYet):
            await cancel_payment(office.payments, await office.id_of(name), PATIENCE)
    assert (await office.payment(name))["status"] == "pending"
    await cancel_payment(office.payments, await office.id_of(name), PATIENCE)
    assert (await office.payment(name))["status"] == "cancelled"


@pytest.mark.parametrize("status", PASSING)
async def test_a_creation_that_is_refused_for_now_stays_unknown(
    office: Office, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    payment_id = await unnamed(office, await office.order())
    with monkeypatch.context() as patch:
        refuses(patch, office, "create", status)
        for job in (reconcile, cancel_payment):
            with pytest.raises(NotYet):
                await job(office.payments, payment_id, PATIENCE)
        assert await status_of(office, payment_id) == "unknown"
    with pytest.raises(NotYet):  # nobody has paid it yet
        await reconcile(office.payments, payment_id, PATIENCE)
    assert await status_of(office, payment_id) == "pending"


async def test_a_provider_without_keys_here_is_left_to_others(office: Office) -> None:
    name = await office.started()
    nowhere = office.payments._replace(gateways={})
    with pytest.raises(NotYet):
        await reconcile(nowhere, await office.id_of(name), PATIENCE)


async def test_a_payment_that_is_not_there_is_given_up(office: Office) -> None:
    with pytest.raises(GiveUp):
        await reconcile(office.payments, str(uuid.uuid4()), PATIENCE)


async def test_what_the_gateway_should_have_captured_is_captured(office: Office) -> None:
    order = await office.order()
    name = await office.started(order, Capture.MANUAL)
    office.world.sandbox.pay(name)
    assert (await office.reconcile(name))["status"] == "completed"
    assert await office.status_of(order) is Status.CONFIRMED


async def test_what_staff_capture_is_left_to_them(office: Office) -> None:
    name = await office.started(capture=Capture.MANUAL)
    await office.desk.fetch("update payments set capture = 'manual' where gateway_order_id = $1", name)
    office.world.sandbox.pay(name)
    with pytest.raises(NotYet):
        await office.reconcile(name)
    assert (await office.payment(name))["status"] == "authorized"


async def test_what_was_authorized_for_a_cancelled_order_goes_back(office: Office) -> None:
    order = await office.order()
    name = await office.started(order, Capture.MANUAL)
    office.world.sandbox.pay(name)
    await office.desk.move(order.id, "cancelled")
    assert (await office.reconcile(name))["status"] == "completed"
    [refund] = await office.refunds(name)
    assert (refund["amount"], refund["cause"]) == (25_200, "late_refunded")
    assert await office.status_of(order) is Status.CANCELLED


async def test_a_cancelled_payment_cannot_be_paid_and_money_that_was_faster_is_kept(office: Office) -> None:
    idle, paid = await office.started(), await office.started()
    office.world.sandbox.pay(paid)
    for name in (idle, paid):
        await cancel_payment(office.payments, await office.id_of(name), PATIENCE)
    assert (await office.payment(idle))["status"] == "cancelled"
    assert (await office.payment(paid))["status"] == "completed"
    await cancel_payment(office.payments, await office.id_of(paid), PATIENCE)
    other = await office.started()
    office.world.mischief.fault, office.world.mischief.fault_calls = Fault.HTML, 9
    with pytest.raises(NotYet):
        await cancel_payment(office.payments, await office.id_of(other), PATIENCE)


# finding


async def test_payments_that_have_moved_for_long_are_found_once(office: Office) -> None:
    for name in ("order_old", "order_new", "order_idle", "order_done"):
        await office.begin(await office.order(), name=name)
    for name in ("order_old", "order_new"):
        await office.tell(name, Report.PROCESSING)
    await office.tell("order_done", Report.CAPTURED)
    for name in ("order_old", "order_done"):
        await office.since(name, 60)
    await office.since("order_idle", 3000)  # nobody pays it any more
    assert await office.desk.do(find_moving, 15, 2700) == 1
    assert await office.jobs() == [("reconcile", await office.id_of("order_old"))]
    assert await office.desk.do(find_moving, 15, 2700) == 0, "it waits already, perhaps for a later time"
    held = "update jobs.pgqueuer set status = 'failed'"
    await office.desk.fetch(held)
    assert await office.desk.do(find_moving, 15, 2700) == 0, "it is for staff to decide"
    await office.desk.fetch(
        "insert into jobs.notes (job_id, held) select id, 'dismissed' from jobs.pgqueuer where status = 'failed'"
    )
    assert await office.desk.do(find_moving, 15, 2700) == 1, "the job was dismissed, the payment was not"


# expiring


async def overdue(office: Office, seconds: float = 3000) -> tuple[Order, str]:
    """An order whose time is over, with a payment that nobody told us more about."""
    order = await office.order()
    name = await office.started(order)
    await office.age(order.id, seconds)
    return order, name


async def test_orders_whose_time_is_over_are_found_once(office: Office) -> None:
    order, _ = await overdue(office)
    await office.order()
    assert await office.desk.do(find_expiring) == 1
    assert await office.jobs() == [("expire_order", order.id)]
    assert await office.desk.do(find_expiring) == 0


async def test_an_order_that_nobody_paid_expires(office: Office) -> None:
    order, name = await overdue(office)
    await expire(office.payments, order.id, PATIENCE)
    gone = (await office.desk.orders())[order.id]
    assert (gone.status, gone.status_reason) == (Status.CANCELLED, "expired")
    assert ("cancel_payment", await office.id_of(name)) in await office.jobs()
    seq = gone.seq
    await expire(office.payments, order.id, PATIENCE)
    assert (await office.desk.orders())[order.id].seq == seq, "once"


async def test_an_order_that_was_paid_unheard_is_confirmed_and_does_not_expire(office: Office) -> None:
    order, name = await overdue(office)
    office.world.sandbox.pay(name)
    await expire(office.payments, order.id, PATIENCE)
    assert await office.status_of(order) is Status.CONFIRMED


async def test_a_second_attempt_after_a_failed_one_is_heard_of(office: Office) -> None:
    order, name = await overdue(office)
    failed = office.world.sandbox.fail(name)
    await office.tell(name, Report.FAILED, attempt=failed.id)
    office.world.sandbox.pay(name)
    await expire(office.payments, order.id, PATIENCE)
    assert await office.status_of(order) is Status.CONFIRMED


async def test_an_order_whose_money_moves_is_held_until_the_longest_hold(office: Office) -> None:
    order, name = await overdue(office, 1500)
    office.world.sandbox.begin(name)
    await expire(office.payments, order.id, PATIENCE)
    assert await office.status_of(order) is Status.PENDING
    assert await office.desk.do(find_expiring) == 0, "it has got more time"
    await office.age(order.id, TERMS.hold_max_s)
    await expire(office.payments, order.id, PATIENCE)
    assert await office.status_of(order) is Status.CANCELLED


async def test_a_gateway_that_does_not_answer_holds_an_order_up_but_not_for_ever(office: Office) -> None:
    order, _ = await overdue(office, 1500)
    await office.world.go_away()
    with pytest.raises(NotYet):
        await expire(office.payments, order.id, PATIENCE)
    assert await office.status_of(order) is Status.PENDING
    await office.age(order.id, TERMS.hold_max_s)
    await expire(office.payments, order.id, PATIENCE)
    assert await office.status_of(order) is Status.CANCELLED


# the books of a day


def today() -> dt.date:
    return dt.datetime.now(KOLKATA).date()


async def completed(office: Office) -> str:
    name = await office.started()
    office.world.sandbox.pay(name)
    await office.reconcile(name)
    return name


async def report_of(office: Office, day: dt.date | None = None) -> Reconciliation:
    return await compare(office.payments, Provider.RAZORPAY, day or today(), KOLKATA)


def sim_payment(office: Office, name: str) -> Any:
    [found] = [one for one in office.world.sandbox.books.state.payments.values() if one.order_id == name]
    return found


async def test_books_that_agree_have_no_differences(office: Office) -> None:
    for _ in range(3):
        await completed(office)
    await office.started()
    report = await report_of(office)
    assert report.differences == []
    assert report.ours == report.theirs
    assert [(one.currency, one.count, one.amount) for one in report.ours] == [("INR", 3, 75_600)]


async def test_a_missing_an_extra_and_an_altered_payment_are_each_named(office: Office) -> None:
    fine, missing, altered = await completed(office), await office.started(), await completed(office)
    office.world.sandbox.pay(missing)
    sim_payment(office, altered).amount = 25_100
    extra = await office.begin(await office.order(), name="order_ThatNobodyHas")
    await office.tell(extra, Report.CAPTURED)
    foreign = (await office.world.gateway.create(new_payment_of_another_shop())).gateway_order_id
    office.world.sandbox.pay(foreign)

    report = await report_of(office)

    assert {(one.kind, one.gateway_order_id) for one in report.differences} == {
        (Kind.MISSING, missing),
        (Kind.MISSING, foreign),
        (Kind.ALTERED, altered),
        (Kind.EXTRA, extra),
    }
    named = {one.gateway_order_id: one for one in report.differences}
    for name in (missing, altered, extra):
        assert named[name].payment_id == await office.id_of(name)
        assert named[name].order_id is not None
    assert named[foreign].payment_id is None
    assert (named[missing].ours, named[missing].theirs.amount) == (None, 25_200)  # type: ignore[union-attr]
    assert (named[altered].ours.amount, named[altered].theirs.amount) == (25_200, 25_100)  # type: ignore[union-attr]
    assert (named[extra].ours.amount, named[extra].theirs) == (25_200, None)  # type: ignore[union-attr]
    assert named[altered].gateway_payment_id == sim_payment(office, altered).id
    assert [one.amount for one in report.ours] == [3 * 25_200]
    assert [one.amount for one in report.theirs] == [2 * 25_200 + 25_100 + 50_000]
    asked = {subject for name, subject in await office.jobs() if name == "reconcile"}
    assert asked == {await office.id_of(name) for name in (missing, altered, extra)}

    await office.reconcile(missing)
    healed = await report_of(office)
    assert missing not in {one.gateway_order_id for one in healed.differences}
    assert fine not in named


def new_payment_of_another_shop() -> NewPayment:
    return NewPayment(
        payment_id="p", order_id="o", reference="another shop", amount=50_000, currency="INR", capture=Capture.AUTOMATIC
    )


async def test_what_the_gateway_counts_on_another_day_is_no_difference(office: Office) -> None:
    """Its clock, and news that came late: what was paid yesterday and is booked today counts yesterday."""
    a_moment_ago, long_ago = await completed(office), await completed(office)
    begin, _ = bounds(today(), KOLKATA)
    sim_payment(office, a_moment_ago).created_at = int(begin.timestamp()) - 5
    sim_payment(office, long_ago).created_at = int(begin.timestamp()) - 30_000
    report = await report_of(office)
    assert (report.ours, report.theirs, report.differences) == ([], [], [])
    yesterday = await report_of(office, today() - dt.timedelta(days=1))
    assert yesterday.differences == []
    assert [one.count for one in yesterday.ours] == [one.count for one in yesterday.theirs] == [2]


async def test_what_was_captured_days_after_its_attempt_is_not_forgotten(office: Office) -> None:
    """Razorpay authorizes late and lists it under the day of the attempt: without a webhook, the report names it."""
    name = await office.started()
    office.world.sandbox.pay(name)
    begin, _ = bounds(today(), KOLKATA)
    sim_payment(office, name).created_at = int((begin - dt.timedelta(days=3)).timestamp())
    report = await report_of(office)
    assert [(one.kind, one.gateway_order_id) for one in report.differences] == [(Kind.MISSING, name)]
    assert report.theirs == []
    assert ("reconcile", await office.id_of(name)) in await office.jobs()
    await office.reconcile(name)
    assert (await report_of(office)).differences == []


def test_a_day_is_half_open_and_has_its_own_length() -> None:
    berlin = zoneinfo.ZoneInfo("Europe/Berlin")
    for day, hours in ((dt.date(2026, 3, 29), 23), (dt.date(2026, 10, 25), 25), (dt.date(2026, 11, 20), 24)):
        begin, end = bounds(day, berlin)
        assert end - begin == hours * HOUR
        assert end == bounds(day + dt.timedelta(days=1), berlin)[0]


# reading reports


async def read(office: Office, by: Actor, date: str, **more: Any) -> Reconciliation:
    return await read_reconciliation(office.payments, by, date, ReadReconciliation(**more), KOLKATA)


async def refused(office: Office, by: Actor, date: str, **more: Any) -> str:
    with pytest.raises(Refused) as refusal:
        await read(office, by, date, **more)
    return refusal.value.code


async def test_a_report_is_made_when_it_is_asked_for_and_kept(office: Office) -> None:
    name = await completed(office)
    begin, _ = bounds(today(), KOLKATA)
    sim_payment(office, name).created_at = int(begin.timestamp()) - 7200
    yesterday = (today() - dt.timedelta(days=1)).isoformat()
    first = await read(office, ADMIN, yesterday)
    assert (first.provider, first.date) == (Provider.RAZORPAY, yesterday)
    assert [one.count for one in first.theirs] == [1]
    await office.world.go_away()
    assert await read(office, ADMIN, yesterday, provider=Provider.RAZORPAY) == first


async def test_only_admins_read_reports_and_only_of_days_that_have_ended(office: Office) -> None:
    yesterday = (today() - dt.timedelta(days=1)).isoformat()
    for by in (STAFF, SERVICE, actor(Role.ADMIN, "x1", orders=frozenset({str(uuid.uuid4())}))):
        assert await refused(office, by, yesterday) == "forbidden"
    for date in (
        today().isoformat(),
        "2999-01-01",
        "2026-02-30",
        "2026-13-01",
        "0001-01-01",
        "9999-12-31",
        "----------",
    ):
        assert await refused(office, ADMIN, date) in ("not_found",), date
    assert await refused(office, ADMIN, yesterday, provider=Provider.CASH) == "invalid"
    assert await refused(office, ADMIN, yesterday, provider=Provider.STRIPE) == "unavailable"
    await office.world.go_away()
    assert await refused(office, ADMIN, yesterday) == "gateway_error"
