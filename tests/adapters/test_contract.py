"""The contract of a gateway: the same suite on every adapter, against its simulator, over real HTTP."""

from __future__ import annotations

import asyncio
import uuid

import msgspec
import pytest

from handlers.ports import GatewayAway, GatewayRefused, GatewayUnknown
from models.errors import AmountTooSmall, BadSignature, Invalid
from models.payment import Capture, News, RefundReport, Report
from server.adapters.sandbox.mischief import Fault
from tests.adapters.worlds import (
    BREAKER_FAILURES,
    BREAKER_OPEN_S,
    World,
    as_known,
    capture_key,
    day,
    new_payment,
    new_refund,
    paid,
    started,
)

NOTHING_DONE = [(Fault.THROTTLE, GatewayAway), (Fault.HTML, GatewayUnknown), (Fault.DROP, GatewayUnknown)]
DONE = [(fault, GatewayUnknown) for fault in (Fault.HTML_AFTER, Fault.HANG_AFTER, Fault.DROP_AFTER)]


def read(world: World, kind: str | None = None) -> list[News]:
    """What the webhooks that came say, one after the other."""
    said: list[News] = []
    for hook in world.hooks.came:
        delivery = world.gateway.receive(hook.body, hook.headers)
        if kind is None or delivery.kind == kind:
            said += world.gateway.read(delivery.kind, hook.body)
    return said


# creating


async def test_nobody_has_paid_a_new_payment(world: World) -> None:
    known = await started(world)
    (news,) = await world.gateway.fetch(known)
    assert (news.provider, news.gateway_order_id) == (world.provider, known.gateway_order_id)
    assert (news.report, news.fresh) == (Report.PENDING, True)


async def test_the_same_reference_gives_the_same_gateway_order(world: World) -> None:
    new = new_payment()
    first, second = await world.gateway.create(new), await world.gateway.create(new)
    assert first.gateway_order_id == second.gateway_order_id
    other = await world.gateway.create(new_payment())
    assert other.gateway_order_id != first.gateway_order_id


@pytest.mark.parametrize(("fault", "error"), DONE)
async def test_a_creation_without_an_answer_is_unknown_and_repeating_it_finds_it(
    world: World, fault: Fault, error: type[Exception]
) -> None:
    new = new_payment()
    world.mischief.fault = fault
    with pytest.raises(error):
        await world.gateway.create(new)
    created = await world.gateway.create(new)
    (news,) = await world.gateway.fetch(as_known(new, created.gateway_order_id))
    assert news.report is Report.PENDING


async def test_the_checkout_names_the_payment_and_the_simulators_page(world: World) -> None:
    new = new_payment()
    created = await world.gateway.create(new)
    known = as_known(new, created.gateway_order_id)
    secret = created.client_secret
    assert await world.gateway.client_secret(known) == secret
    checkout = world.gateway.checkout(known, secret, {"name": "Asha"})
    assert known.gateway_order_id in checkout["url"]
    assert checkout["url"].startswith("http://127.0.0.1:")


# paying


async def test_a_payment_that_succeeds_is_captured_with_its_amount(world: World) -> None:
    known = await started(world)
    await world.pay(known)
    (news,) = await world.gateway.fetch(known)
    assert (news.report, news.amount, news.currency) == (Report.CAPTURED, known.amount, known.currency)
    assert news.gateway_order_id == known.gateway_order_id
    assert news.gateway_payment_id
    assert news.method
    assert not news.refunds
    assert not news.disputes


async def test_a_declined_payment_says_why_and_may_be_paid_later(world: World) -> None:
    known = await started(world)
    await world.fail(known)
    (news,) = await world.gateway.fetch(known)
    assert news.report in (Report.FAILED, Report.PENDING)  # Stripe's intent waits for another attempt
    assert news.failure
    assert news.failure.message
    assert news.failure.retryable
    await world.pay(known)
    (news,) = await world.gateway.fetch(known)
    assert news.report is Report.CAPTURED


async def test_a_payment_under_way_is_processing(world: World) -> None:
    known = await started(world)
    await world.begin(known)
    (news,) = await world.gateway.fetch(known)
    assert news.report is Report.PROCESSING


async def test_money_that_comes_late_is_news_like_any_other(world: World) -> None:
    known = await started(world)
    await world.pay_late(known)
    assert (await world.gateway.fetch(known))[0].report is Report.CAPTURED
    await world.hooks.until(lambda hooks: any(n.report is Report.CAPTURED for n in read(world)))


async def test_manual_capture_waits_for_the_word(world: World) -> None:
    known = await started(world, new_payment(capture=Capture.MANUAL))
    await world.pay(known)
    (news,) = await world.gateway.fetch(known)
    assert (news.report, news.amount) == (Report.AUTHORIZED, known.amount)
    captured = await world.gateway.capture(known, known.amount, known.currency)
    assert (captured.report, captured.amount, captured.fresh) == (Report.CAPTURED, known.amount, True)
    again = await world.gateway.capture(known, known.amount, known.currency)
    assert again.gateway_payment_id == captured.gateway_payment_id
    assert again.report is Report.CAPTURED


@pytest.mark.parametrize(("fault", "error"), DONE)
async def test_a_capture_without_an_answer_is_unknown_and_repeating_it_finds_it(
    world: World, fault: Fault, error: type[Exception]
) -> None:
    known = await started(world, new_payment(capture=Capture.MANUAL))
    await world.pay(known)
    (news,) = await world.gateway.fetch(known)
    known = msgspec.structs.replace(known, gateway_payment_id=news.gateway_payment_id)
    world.mischief.fault = fault
    with pytest.raises(error):
        await world.gateway.capture(known, known.amount, known.currency)
    assert (await world.gateway.capture(known, known.amount, known.currency)).report is Report.CAPTURED


async def test_capturing_more_than_was_authorized_is_refused(world: World) -> None:
    known = await started(world, new_payment(capture=Capture.MANUAL))
    await world.pay(known)
    with pytest.raises(GatewayRefused) as refused:
        await world.gateway.capture(known, known.amount + 1, known.currency)
    assert refused.value.status == 400
    assert (await world.gateway.fetch(known))[0].report is Report.AUTHORIZED


async def test_what_nobody_paid_cannot_be_captured(world: World) -> None:
    known = await started(world, new_payment(capture=Capture.MANUAL))
    with pytest.raises(GatewayRefused):
        await world.gateway.capture(known, known.amount, known.currency)


async def test_cancelling_says_cancelled_unless_the_money_came(world: World) -> None:
    known = await started(world)
    (news,) = await world.gateway.cancel(known)
    assert news.report is Report.CANCELLED
    known, _ = await paid(world)
    (news,) = await world.gateway.cancel(known)
    assert news.report is Report.CAPTURED


# refunds


async def test_a_refund_goes_back_in_parts(world: World) -> None:
    known, news = await paid(world, 10_000)
    key = capture_key(world.provider, news)
    for amount in (4_000, 6_000):
        new = new_refund(known, key, amount)
        refund = await world.gateway.refund(new)
        assert (refund.report, refund.amount, refund.currency) == (RefundReport.SUCCEEDED, amount, "INR")
        assert refund.refund_id == new.refund_id
        assert await world.gateway.fetch_refund(new, refund.gateway_refund_id) == refund
        assert await world.gateway.fetch_refund(new, None) == refund
    (news,) = await world.gateway.fetch(known)
    assert (news.report, news.amount) == (Report.CAPTURED, 10_000)  # what came, came
    with pytest.raises(GatewayRefused) as refused:
        await world.gateway.refund(new_refund(known, key, 100))
    assert refused.value.status == 400


async def test_more_than_was_captured_is_not_refunded(world: World) -> None:
    known, news = await paid(world, 10_000)
    with pytest.raises(GatewayRefused):
        await world.gateway.refund(new_refund(known, capture_key(world.provider, news), 10_001))


async def test_a_refund_that_the_gateway_never_heard_of_is_none(world: World) -> None:
    known, news = await paid(world)
    new = new_refund(known, capture_key(world.provider, news), 100)
    assert await world.gateway.fetch_refund(new, None) is None


@pytest.mark.parametrize(("fault", "error"), DONE)
async def test_a_refund_without_an_answer_is_unknown_and_repeating_it_pays_once(
    world: World, fault: Fault, error: type[Exception]
) -> None:
    known, news = await paid(world, 10_000)
    key = capture_key(world.provider, news)
    new = new_refund(known, key, 10_000)
    world.mischief.fault, world.mischief.fault_method = fault, "POST"  # Stripe's adapter looks first
    with pytest.raises(error):
        await world.gateway.refund(new)
    found = await world.gateway.fetch_refund(new, None)
    again = await world.gateway.refund(new)
    assert found == again
    assert again.refund_id == new.refund_id


async def test_a_failed_refund_is_begun_anew_as_another_one(world: World) -> None:
    known, news = await paid(world, 10_000)
    new = new_refund(known, capture_key(world.provider, news), 10_000)
    world.mischief.refunds = "pending"
    first = await world.gateway.refund(new)
    await world.settle_refund(first.gateway_refund_id, False)
    world.mischief.refunds = "processed"
    assert (await world.gateway.refund(new)).gateway_refund_id == first.gateway_refund_id
    anew = msgspec.structs.replace(new, attempt=1)
    assert await world.gateway.fetch_refund(anew, None) is None
    second = await world.gateway.refund(anew)
    assert second.gateway_refund_id != first.gateway_refund_id
    assert (second.report, second.refund_id) == (RefundReport.SUCCEEDED, new.refund_id)
    assert await world.gateway.fetch_refund(anew, None) == second


async def test_one_key_is_one_refund(world: World) -> None:
    known, news = await paid(world, 10_000)
    key = capture_key(world.provider, news)
    new = new_refund(known, key, 1_000)
    await world.gateway.refund(new)
    with pytest.raises(GatewayRefused):
        await world.gateway.refund(new_refund(known, key, 2_000, new.refund_id))


async def test_a_refund_whose_key_is_in_use_is_unknown(world: World) -> None:
    known, news = await paid(world, 10_000)
    new = new_refund(known, capture_key(world.provider, news), 1_000)
    world.mischief.refund_takes_s = 0.2
    ended = await asyncio.gather(*(world.gateway.refund(new) for _ in range(2)), return_exceptions=True)
    unknown = [one for one in ended if isinstance(one, GatewayUnknown)]
    assert len(unknown) == 1, ended
    world.mischief.refund_takes_s = 0
    assert await world.gateway.refund(new) in ended


@pytest.mark.parametrize("succeeded", [True, False])
async def test_a_pending_refund_is_decided_later(world: World, succeeded: bool) -> None:
    known, news = await paid(world)
    new = new_refund(known, capture_key(world.provider, news), 1_000)
    world.mischief.refunds = "pending"
    refund = await world.gateway.refund(new)
    assert refund.report is RefundReport.PROCESSING
    await world.settle_refund(refund.gateway_refund_id, succeeded)
    wanted = RefundReport.SUCCEEDED if succeeded else RefundReport.FAILED
    found = await world.gateway.fetch_refund(new, refund.gateway_refund_id)
    assert found
    assert found.report is wanted
    assert (found.failure is None) is succeeded

    def told(report: RefundReport) -> bool:
        said = [refund for news in read(world) for refund in news.refunds]
        return any(one.report is report and one.refund_id == new.refund_id for one in said)

    await world.hooks.until(lambda hooks: told(wanted))


# faults


@pytest.mark.parametrize(("fault", "error"), [*NOTHING_DONE, (Fault.HANG, GatewayUnknown)])
async def test_every_call_ends_in_a_known_error(world: World, fault: Fault, error: type[Exception]) -> None:
    known, news = await paid(world)
    new = new_refund(known, capture_key(world.provider, news), 100)
    for call in (
        lambda: world.gateway.create(new_payment()),
        lambda: world.gateway.fetch(known),
        lambda: world.gateway.refund(new),
    ):
        world.mischief.fault = fault
        with pytest.raises(error):
            await call()
        await world.gateway.fetch(known)  # the fault is over, and the breaker counts anew


async def test_a_gateway_that_nobody_reaches_is_away_then_not_offered_then_probed(world: World) -> None:
    def offered() -> bool:
        return world.gateway.offered

    await started(world)
    await world.go_away()
    for _ in range(BREAKER_FAILURES):
        assert offered()
        with pytest.raises(GatewayAway):
            await world.gateway.create(new_payment())
    assert not offered()
    await world.come_back()
    with pytest.raises(GatewayAway):
        await started(world)  # it is not even asked
    world.pass_time(BREAKER_OPEN_S)
    assert offered()
    await started(world)
    assert offered()


async def test_refusals_do_not_open_the_breaker(world: World) -> None:
    known = await started(world, new_payment(capture=Capture.MANUAL))
    for _ in range(BREAKER_FAILURES + 1):
        with pytest.raises(GatewayRefused):
            await world.gateway.refund(new_refund(known, capture_key_that_is_not(world), 100))
    assert world.gateway.offered


def capture_key_that_is_not(world: World) -> str:
    return {"razorpay": "pay_00000000000000", "stripe": "pi_000000000000000000000000"}[world.provider]


async def test_a_payment_that_the_gateway_does_not_know_is_refused(world: World) -> None:
    known = as_known(new_payment(), {"razorpay": "order_00000000000000", "stripe": "pi_0000"}[world.provider])
    with pytest.raises(GatewayRefused) as refused:
        await world.gateway.fetch(known)
    assert refused.value.status in (400, 404)


# amounts


def test_amounts_are_judged_before_the_gateway_is_asked(world: World) -> None:
    world.gateway.check_amount(100_000, "INR")
    world.gateway.check_amount(100_000, "JPY")
    world.gateway.check_amount(99_990, "KWD")
    with pytest.raises(Invalid):
        world.gateway.check_amount(99_991, "KWD")
    with pytest.raises(AmountTooSmall):
        world.gateway.check_amount(1, "INR")


# the daily report


async def test_the_gateways_books_name_each_capture(world: World) -> None:
    wanted = set()
    for amount in (10_000, 20_000, 30_000):
        known, news = await paid(world, amount)
        wanted.add((known.gateway_order_id, news.gateway_payment_id, amount, "INR"))
    await started(world)
    failed = await started(world)
    await world.fail(failed)
    start, end = day()
    moved = [m async for m in world.gateway.movements(start, end)]
    assert {(m.gateway_order_id, m.gateway_payment_id, m.amount, m.currency) for m in moved} == wanted
    assert len(moved) == len(wanted)
    assert all(start <= m.captured_at < end for m in moved)
    assert [m async for m in world.gateway.movements(end, end + (end - start))] == []
    assert [m async for m in world.gateway.movements(start - (end - start), start)] == []


# webhooks


async def test_a_success_is_told_by_webhooks_in_our_words(world: World) -> None:
    known = await started(world)
    await world.pay(known)
    kinds = set(world.success_kinds)
    hooks = await world.hooks.until(lambda hooks: len(hooks) >= len(kinds))
    deliveries = [world.gateway.receive(hook.body, hook.headers) for hook in hooks]
    assert {delivery.kind for delivery in deliveries} == kinds
    assert len({delivery.event_id for delivery in deliveries}) == len(deliveries)
    for hook, delivery in zip(hooks, deliveries, strict=True):
        assert known.gateway_order_id in delivery.refs
        for news in world.gateway.read(delivery.kind, hook.body):
            assert news.gateway_order_id == known.gateway_order_id
            assert not news.fresh
    assert any(n.report is Report.CAPTURED and n.amount == known.amount for n in read(world))


async def test_a_webhook_is_repeated_under_its_event_id_until_it_is_taken(world: World) -> None:
    known = await started(world)
    world.hooks.statuses = [503, 400]
    await world.pay(known)
    kinds = len(world.success_kinds)
    hooks = await world.hooks.until(lambda hooks: len(hooks) >= kinds + 2)
    ids = [world.gateway.receive(hook.body, hook.headers).event_id for hook in hooks]
    assert len(set(ids)) == kinds


async def test_duplicates_and_losses_on_command(world: World) -> None:
    known = await started(world)
    world.mischief.webhook_copies = 3
    world.mischief.webhooks_lost = len(world.success_kinds) - 1
    await world.pay(known)
    hooks = await world.hooks.until(lambda hooks: len(hooks) >= 3)
    assert len({hook.body for hook in hooks}) == 1


async def test_a_forged_or_changed_webhook_is_refused(world: World) -> None:
    await world.pay(await started(world))
    hook = (await world.hooks.until(bool))[0]
    (name,) = [name for name in hook.headers if name.lower().endswith("signature")]
    for body, headers in (
        (hook.body + b" ", hook.headers),
        (hook.body, {}),
        (hook.body, {**hook.headers, name: ""}),
        (hook.body, {**hook.headers, name: "é" * 64}),
        (hook.body, {**hook.headers, name: "0" * 64}),
    ):
        with pytest.raises(BadSignature):
            world.gateway.receive(body, headers)


async def test_webhooks_of_the_new_and_the_old_secret_are_taken(world: World) -> None:
    await world.pay(await started(world))
    before = len(await world.hooks.until(lambda hooks: len(hooks) >= len(world.success_kinds)))
    world.rotate_secret()
    await world.pay(await started(world))
    for hook in await world.hooks.until(lambda hooks: len(hooks) >= before + len(world.success_kinds)):
        assert world.gateway.receive(hook.body, hook.headers).event_id


async def test_irrelevant_kinds_say_nothing(world: World) -> None:
    await world.pay(await started(world))
    hook = (await world.hooks.until(bool))[0]
    assert list(world.gateway.read("something.new", hook.body)) == []


def test_no_checkout_is_proven_by_guessing(world: World) -> None:
    for signature in ("", "0" * 64, "é", "zz", str(uuid.uuid4())):
        assert not world.gateway.proves_checkout("order_1", "pay_1", signature)
