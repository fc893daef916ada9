"""What is Stripe's own: intents and cards, idempotency keys, faults on the wire. The rest is in test_contract.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest
from aiohttp import web

from handlers.ports import GatewayAway, GatewayRefused, GatewayUnknown
from models.payment import Capture, DisputeReport, RefundReport, Report
from server.adapters.sandbox.mischief import Fault
from tests.adapters.stripe_world import PATIENT_S, StripeWorld, gateway_at, open_world
from tests.adapters.worlds import as_known, day, new_payment, new_refund, paid, started

RETURN_URL = "https://shop.example/back?order=7"


@pytest.fixture
async def world() -> AsyncIterator[StripeWorld]:
    async with open_world(PATIENT_S) as opened:
        assert isinstance(opened, StripeWorld)
        yield opened


def intents(world: StripeWorld) -> int:
    return len(world.sandbox.books.state.intents)


# confirming on the server


async def test_a_good_card_pays_at_once(world: StripeWorld) -> None:
    known = await started(world)
    confirmed = await world.gateway.confirm(known, "pm_card_visa", RETURN_URL)
    assert confirmed.redirect_url is None
    assert (confirmed.news.report, confirmed.news.amount, confirmed.news.method) == (
        Report.CAPTURED,
        known.amount,
        "card",
    )
    again = await world.gateway.confirm(known, "pm_card_visa", RETURN_URL)
    assert again.news.report is Report.CAPTURED
    assert again.news.gateway_payment_id == confirmed.news.gateway_payment_id


async def test_a_card_that_wants_to_ask_its_owner_redirects(world: StripeWorld) -> None:
    known = await started(world)
    confirmed = await world.gateway.confirm(known, "pm_card_authenticationRequired", RETURN_URL)
    assert confirmed.news.report is Report.PROCESSING
    assert confirmed.redirect_url
    assert known.gateway_order_id in confirmed.redirect_url
    world.sandbox.books.authenticate(known.gateway_order_id, approve=False)
    (news,) = await world.gateway.fetch(known)
    assert news.report is Report.FAILED
    await world.gateway.confirm(known, "pm_card_authenticationRequired", RETURN_URL)
    world.sandbox.books.authenticate(known.gateway_order_id, approve=True)
    (news,) = await world.gateway.fetch(known)
    assert news.report is Report.CAPTURED


@pytest.mark.parametrize(
    ("method", "code", "retryable"),
    [
        ("pm_card_chargeDeclined", "generic_decline", True),
        ("pm_card_chargeDeclinedInsufficientFunds", "insufficient_funds", True),
        ("pm_card_chargeDeclinedExpiredCard", "expired_card", True),
        ("pm_card_chargeDeclinedFraudulent", "fraudulent", False),
    ],
)
async def test_a_declined_card_is_a_refusal_with_news(
    world: StripeWorld, method: str, code: str, retryable: bool
) -> None:
    known = await started(world)
    with pytest.raises(GatewayRefused) as refused:
        await world.gateway.confirm(known, method, RETURN_URL)
    assert (refused.value.status, refused.value.code) == (402, code)
    assert refused.value.failure.retryable is retryable
    news = refused.value.news
    assert news
    assert (news.report, news.gateway_order_id) == (Report.FAILED, known.gateway_order_id)
    assert news.failure
    assert (news.failure.code, news.failure.retryable) == (code, retryable)
    # the same card again is another attempt, not a stored refusal
    with pytest.raises(GatewayRefused) as second:
        await world.gateway.confirm(known, method, RETURN_URL)
    assert second.value.news
    assert second.value.news.gateway_payment_id != news.gateway_payment_id


async def test_an_unknown_card_is_refused(world: StripeWorld) -> None:
    with pytest.raises(GatewayRefused) as refused:
        await world.gateway.confirm(await started(world), "pm_nobodys", RETURN_URL)
    assert (refused.value.status, refused.value.code) == (404, "resource_missing")


# authorizations


async def test_a_part_is_captured_and_the_rest_released_without_a_refund(world: StripeWorld) -> None:
    known = await started(world, new_payment(10_000, capture=Capture.MANUAL))
    await world.pay(known)
    captured = await world.gateway.capture(known, 6_000, "INR")
    assert (captured.report, captured.amount, captured.refunds) == (Report.CAPTURED, 6_000, ())
    (news,) = await world.gateway.fetch(known)
    assert (news.amount, news.refunds) == (6_000, ())
    with pytest.raises(GatewayRefused):
        await world.gateway.capture(known, 4_000, "INR")


async def test_an_authorization_that_lapsed_is_cancelled(world: StripeWorld) -> None:
    known = await started(world, new_payment(capture=Capture.MANUAL))
    await world.pay(known)
    world.sandbox.books.lapse(known.gateway_order_id)
    (news,) = await world.gateway.fetch(known)
    assert (news.report, news.refunds) == (Report.CANCELLED, ())


async def test_what_is_processing_is_not_cancelled(world: StripeWorld) -> None:
    known = await started(world)
    await world.begin(known)
    (news,) = await world.gateway.cancel(known)
    assert news.report is Report.PROCESSING
    world.sandbox.books.finish(known.gateway_order_id)
    (news,) = await world.gateway.fetch(known)
    assert news.report is Report.CAPTURED


async def test_a_capture_is_not_hindered_by_an_earlier_refusal(world: StripeWorld) -> None:
    known = await started(world, new_payment(capture=Capture.MANUAL))
    with pytest.raises(GatewayRefused):
        await world.gateway.capture(known, known.amount, "INR")  # nobody has paid
    await world.pay(known)
    assert (await world.gateway.capture(known, known.amount, "INR")).report is Report.CAPTURED


# fees, disputes, currencies


async def test_the_fee_is_told_in_the_currency_of_the_payment_only(world: StripeWorld) -> None:
    known = await started(world, new_payment(10_000))
    await world.pay(known)
    assert (await world.gateway.fetch(known))[0].fee == 300
    (entry,) = world.sandbox.books.state.balance.values()
    entry["currency"] = "usd"
    assert (await world.gateway.fetch(known))[0].fee is None


async def test_a_dispute_comes_with_the_payment(world: StripeWorld) -> None:
    known, _ = await paid(world, 10_000)
    opened = world.sandbox.books.dispute(known.gateway_order_id)
    (news,) = await world.gateway.fetch(known)
    assert [(one.gateway_dispute_id, one.report, one.amount) for one in news.disputes] == [
        (opened["id"], DisputeReport.OPEN, 10_000)
    ]
    with pytest.raises(GatewayRefused) as refused:
        await world.gateway.refund(new_refund(known, known.gateway_order_id, 100))
    assert refused.value.code == "charge_disputed"
    world.sandbox.books.close_dispute(opened["id"], "won")
    (news,) = await world.gateway.fetch(known)
    assert news.disputes[0].report is DisputeReport.WON


@pytest.mark.parametrize(
    ("amount", "currency", "sent"),
    [(500, "UGX", 50_000), (500, "ISK", 50_000), (50_000, "MGA", 500), (99_990, "KWD", 99_990)],
)
async def test_amounts_go_out_and_come_back(world: StripeWorld, amount: int, currency: str, sent: int) -> None:
    known = await started(world, new_payment(amount, currency))
    assert world.sandbox.books.state.intents[known.gateway_order_id]["amount"] == sent
    await world.pay(known)
    (news,) = await world.gateway.fetch(known)
    assert (news.amount, news.currency) == (amount, currency)
    start, end = day()
    assert [(one.amount, one.currency) async for one in world.gateway.movements(start, end)] == [(amount, currency)]
    refund = await world.gateway.refund(new_refund(known, known.gateway_order_id, amount))
    assert (refund.amount, refund.currency) == (amount, currency)


async def test_a_part_that_stripe_cannot_refund_is_refused_without_asking(world: StripeWorld) -> None:
    known = await started(world, new_payment(99_990, "KWD"))
    await world.pay(known)
    await world.go_away()
    with pytest.raises(GatewayRefused) as refused:
        await world.gateway.refund(new_refund(known, known.gateway_order_id, 99_985))
    assert refused.value.code == "invalid_amount"


async def test_long_lists_are_read_to_their_end(world: StripeWorld) -> None:
    known, _ = await paid(world, 13_000)
    world.sandbox.courier.url = ""  # nobody hears of them
    for number in range(120):
        world.sandbox.books.refund({"payment_intent": known.gateway_order_id, "amount": "100"}, "")
        if number == 0:
            # the oldest is ours
            refund = next(iter(world.sandbox.books.state.refunds.values()))
            ours = new_refund(known, known.gateway_order_id, 100)
            refund["metadata"] = {"refund_id": ours.refund_id, "attempt": "0"}
    found = await world.gateway.fetch_refund(ours, None)
    assert found
    assert found.refund_id == ours.refund_id


# keys


async def test_an_error_that_is_stored_under_a_key_does_not_end_the_payment(world: StripeWorld) -> None:
    new = new_payment()
    world.mischief.fault = Fault.ERROR
    with pytest.raises(GatewayUnknown):
        await world.gateway.create(new)
    created = await world.gateway.create(new)
    assert (await world.gateway.create(new)).gateway_order_id == created.gateway_order_id
    assert intents(world) == 1


async def test_of_two_intents_one_is_ever_known(world: StripeWorld) -> None:
    """Stripe made the intent and stored a 500 all the same: nobody has the secret of that one, so nobody can pay it."""
    new = new_payment()
    world.mischief.fault = Fault.ERROR_AFTER
    with pytest.raises(GatewayUnknown):
        await world.gateway.create(new)
    first, second = await asyncio.gather(world.gateway.create(new), world.gateway.create(new))
    assert first == second
    assert intents(world) == 2
    orphan = next(iter(world.sandbox.books.state.intents))
    assert first.gateway_order_id != orphan


async def test_a_proxys_error_is_no_stored_one(world: StripeWorld) -> None:
    new = new_payment()
    world.mischief.fault, world.mischief.fault_calls = Fault.HTML_AFTER, 2
    for _ in range(2):
        with pytest.raises(GatewayUnknown):
            await world.gateway.create(new)
    await world.gateway.create(new)
    assert intents(world) == 1
    assert list(world.sandbox.books.state.keys) == [new.reference]


async def test_another_amount_under_the_same_reference_is_refused(world: StripeWorld) -> None:
    new = new_payment()
    await world.gateway.create(new)
    with pytest.raises(GatewayRefused) as refused:
        await world.gateway.create(msgspec.structs.replace(new, amount=new.amount + 100))
    assert (refused.value.status, refused.value.code) == (400, "idempotency_error")
    assert intents(world) == 1


@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.ERROR_AFTER])
async def test_an_error_that_is_stored_under_a_refunds_key_pays_once(world: StripeWorld, fault: Fault) -> None:
    known, _ = await paid(world, 10_000)
    new = new_refund(known, known.gateway_order_id, 4_000)
    world.mischief.fault, world.mischief.fault_method = fault, "POST"
    with pytest.raises(GatewayUnknown):
        await world.gateway.refund(new)
    refund = await world.gateway.refund(new)
    assert await world.gateway.refund(new) == refund
    assert refund.report is RefundReport.SUCCEEDED
    assert len(world.sandbox.books.state.refunds) == 1


async def test_a_refund_is_found_when_its_key_is_forgotten(world: StripeWorld) -> None:
    known, _ = await paid(world, 10_000)
    new = new_refund(known, known.gateway_order_id, 4_000)
    first = await world.gateway.refund(new)
    world.sandbox.books.state.keys.clear()  # Stripe keeps them for a day
    assert await world.gateway.refund(new) == first
    assert len(world.sandbox.books.state.refunds) == 1


async def test_a_refund_that_was_refused_can_be_made_later(world: StripeWorld) -> None:
    known, _ = await paid(world, 10_000)
    opened = world.sandbox.books.dispute(known.gateway_order_id)
    new = new_refund(known, known.gateway_order_id, 4_000)
    with pytest.raises(GatewayRefused):
        await world.gateway.refund(new)
    world.sandbox.books.close_dispute(opened["id"], "won")
    assert (await world.gateway.refund(new)).report is RefundReport.SUCCEEDED


async def test_a_refund_that_failed_is_told_until_it_is_begun_anew(world: StripeWorld) -> None:
    known, _ = await paid(world, 10_000)
    new = new_refund(known, known.gateway_order_id, 4_000)
    first = await world.gateway.refund(new)
    await world.settle_refund(first.gateway_refund_id, succeeded=False)
    assert (await world.gateway.refund(new)).report is RefundReport.FAILED
    anew = await world.gateway.refund(msgspec.structs.replace(new, attempt=1))
    assert (anew.report, anew.refund_id) == (RefundReport.SUCCEEDED, new.refund_id)
    assert anew.gateway_refund_id != first.gateway_refund_id


# what the wire does


async def served(answer: web.Response) -> AsyncIterator[str]:
    async def every(request: web.Request) -> web.Response:
        return web.Response(
            status=answer.status, body=answer.body, content_type=answer.content_type, headers={"X-Nonsense": "1"}
        )

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", every)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


KNOWN = as_known(new_payment(), "pi_1")


def error(kind: str, code: str | None = None) -> dict[str, object]:
    return {"error": {"type": kind, "code": code, "message": "no"}}


@pytest.mark.parametrize(
    ("status", "body", "raised", "code"),
    [
        (400, error("invalid_request_error", "parameter_unknown"), GatewayRefused, "parameter_unknown"),
        (400, error("idempotency_error"), GatewayRefused, "idempotency_error"),
        (401, error("invalid_request_error"), GatewayRefused, "invalid_request_error"),
        (403, error("invalid_request_error"), GatewayRefused, "invalid_request_error"),
        (404, error("invalid_request_error", "resource_missing"), GatewayRefused, "resource_missing"),
        (409, error("idempotency_error", "idempotency_key_in_use"), GatewayUnknown, "idempotency_key_in_use"),
        (429, error("invalid_request_error", "lock_timeout"), GatewayAway, "rate_limit"),
        (500, error("api_error"), GatewayUnknown, "api_error"),
        (503, error("api_error"), GatewayUnknown, "api_error"),
        (502, "<html>502</html>", GatewayUnknown, "unreadable"),
        (403, "<html>blocked</html>", GatewayUnknown, "unreadable"),
        (200, "<html>welcome</html>", GatewayUnknown, "unreadable"),
        (200, {"object": "payment_intent"}, GatewayUnknown, "unreadable"),
        (200, [], GatewayUnknown, "unreadable"),
        (200, {"id": "pi_1", "amount": "7", "currency": "inr", "status": "succeeded"}, GatewayUnknown, "unreadable"),
        (400, {"error": "no"}, GatewayUnknown, "unreadable"),
        (400, {"error": {"type": 7, "payment_intent": {"id": 1}}}, GatewayUnknown, "unreadable"),
    ],
)
async def test_every_answer_has_its_meaning(
    status: int, body: object, raised: type[GatewayRefused | GatewayAway | GatewayUnknown], code: str
) -> None:
    answer = (
        web.Response(status=status, text=body, content_type="text/html")
        if isinstance(body, str)
        else web.json_response(body, status=status)
    )
    async for url in served(answer):
        gateway = gateway_at(url)
        with pytest.raises(raised) as failed:
            await gateway.fetch(KNOWN)
        await gateway.close()
    assert failed.value.code == code
    if isinstance(failed.value, GatewayRefused):
        assert failed.value.status == status


async def test_a_refused_connection_is_known_to_have_done_nothing(unused_port: int) -> None:
    gateway = gateway_at(f"http://127.0.0.1:{unused_port}")
    with pytest.raises(GatewayAway):
        await gateway.create(new_payment())
    await gateway.close()


async def test_an_intent_of_another_amount_is_not_taken_for_ours(world: StripeWorld) -> None:
    new = new_payment()
    created = await world.gateway.create(new)
    intent = world.sandbox.books.state.keys[new.reference].body
    intent["amount"] += 1
    with pytest.raises(GatewayUnknown):
        await world.gateway.create(new)
    assert created.gateway_order_id == intent["id"]


async def test_no_proxy_stands_before_a_loopback_address(
    world: StripeWorld, monkeypatch: pytest.MonkeyPatch, unused_port: int
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{unused_port}")
    gateway = gateway_at(world.sandbox.url)
    await gateway.create(new_payment())
    await gateway.close()


async def test_the_secret_key_is_in_no_error(world: StripeWorld) -> None:
    world.sandbox._secret_key = "sk_test_another_key_altogether"
    with pytest.raises(GatewayRefused) as refused:
        await world.gateway.create(new_payment())
    assert refused.value.status == 401
    assert "sk_test_contract" not in f"{refused.value} {refused.value.__cause__!r}"


async def test_a_question_is_bounded_as_a_whole(world: StripeWorld) -> None:
    known, _ = await paid(world)
    world.mischief.refund_takes_s = PATIENT_S / 2
    hurried = gateway_at(world.sandbox.url, timeout_s=0.2)
    began = asyncio.get_running_loop().time()
    with pytest.raises(GatewayUnknown) as unknown:
        await hurried.refund(new_refund(known, known.gateway_order_id, 100))
    await hurried.close()
    assert unknown.value.code == "timeout"
    assert asyncio.get_running_loop().time() - began < PATIENT_S / 4


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])
