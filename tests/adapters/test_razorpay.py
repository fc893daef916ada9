"""What is Razorpay's own: its errors, its headers, its threads, and a gateway that lies."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from aiohttp import web

from handlers.ports import GatewayAway, GatewayFailed, GatewayRefused, GatewayUnknown, Known
from models.payment import Capture, News, Provider, RefundReport, Report
from server.adapters.breaker import Breaker
from server.adapters.razorpay import Razorpay
from server.adapters.sandbox.mischief import Fault
from tests.adapters.razorpay_world import RazorpayWorld, open_razorpay
from tests.adapters.worlds import as_known, new_payment, new_refund, started
from tests.harness import ROOT, until

FIXTURES = ROOT / "tests" / "fixtures" / "razorpay"

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture
async def world() -> AsyncIterator[RazorpayWorld]:
    async with open_razorpay() as opened:
        yield opened


def adapter(url: str, timeout_s: float = 5, threads_max: int = 2) -> Razorpay:
    return Razorpay(
        key_id="rzp_test_x",
        key_secret="secret",
        webhook_secrets=["secret"],
        breaker=Breaker(Provider.RAZORPAY, failures_max=1000, open_s=5),
        timeout_s=timeout_s,
        threads_max=threads_max,
        api_url=url,
    )


@asynccontextmanager
async def gateway_that(answer: Answer, **options: Any) -> AsyncIterator[Razorpay]:
    """An adapter against a server that answers everything like this."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    opened = adapter(f"http://127.0.0.1:{runner.addresses[0][1]}", **options)
    try:
        yield opened
    finally:
        await opened.close()
        await runner.cleanup()


def always(status: int, body: bytes, **headers: str) -> Answer:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, body=body, headers=headers)

    return answer


KNOWN = as_known(new_payment(), "order_00000000000000", "pay_00000000000000")
REFUND = new_refund(KNOWN, "pay_00000000000000", 100)
CALLS: dict[str, Callable[[Razorpay], Awaitable[object]]] = {
    "create": lambda gateway: gateway.create(new_payment()),
    "fetch": lambda gateway: gateway.fetch(KNOWN),
    "capture": lambda gateway: gateway.capture(KNOWN, 100, "INR"),
    "cancel": lambda gateway: gateway.cancel(KNOWN),
    "refund": lambda gateway: gateway.refund(REFUND),
    "fetch_refund": lambda gateway: gateway.fetch_refund(REFUND, None),
}

ERROR = (FIXTURES / "doc-api-order-create-failure.json").read_bytes()
HTML = b"<html><body><h1>502 Bad Gateway</h1></body></html>"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("status", "body", "error", "code"),
    [
        (400, ERROR, GatewayRefused, "BAD_REQUEST_ERROR"),
        (401, ERROR, GatewayRefused, "BAD_REQUEST_ERROR"),
        (404, ERROR, GatewayRefused, "BAD_REQUEST_ERROR"),
        (400, (FIXTURES / "sdk-api-error-bad-request.json").read_bytes(), GatewayRefused, "BAD_REQUEST_ERROR"),
        (400, (FIXTURES / "doc-api-error-sample.json").read_bytes(), GatewayRefused, "BAD_REQUEST_ERROR"),
        (400, b'{"error":{}}', GatewayRefused, "http_400"),
        (400, HTML, GatewayUnknown, "http_400"),
        (404, b'{"error":"text"}', GatewayUnknown, "http_404"),
        (408, ERROR, GatewayUnknown, "http_408"),
        (429, ERROR, GatewayAway, "rate_limited"),
        (429, HTML, GatewayAway, "rate_limited"),
        (302, b"", GatewayUnknown, "http_302"),
        (500, b'{"error":{"code":"SERVER_ERROR"}}', GatewayUnknown, "http_500"),
        (502, HTML, GatewayUnknown, "http_502"),
        (200, HTML, GatewayUnknown, "http_200"),
        (200, b"", GatewayUnknown, "http_200"),
        (200, b"[]", GatewayUnknown, "http_200"),
        (200, b"[" * 100_000, GatewayUnknown, "http_200"),
        (200, b"{}", GatewayUnknown, "nonsense"),
        (204, b"", GatewayUnknown, "http_204"),
    ],
)
async def test_every_answer_ends_in_one_of_three_errors(
    call: str, status: int, body: bytes, error: type[GatewayFailed], code: str
) -> None:
    async with gateway_that(always(status, body, Location="/v1/orders")) as gateway:
        with pytest.raises(error) as raised:
            await CALLS[call](gateway)
    assert type(raised.value) is error
    assert raised.value.code == code
    if isinstance(raised.value, GatewayRefused):
        assert raised.value.status == status


async def test_a_refusal_keeps_the_gateways_words(world: RazorpayWorld) -> None:
    with pytest.raises(GatewayRefused) as refused:
        await world.gateway.create(new_payment(amount=99))
    assert (refused.value.status, refused.value.code) == (400, "BAD_REQUEST_ERROR")
    assert refused.value.message == json.loads(ERROR)["error"]["description"]


async def test_a_wrong_key_is_told_apart(world: RazorpayWorld) -> None:
    stranger = adapter(world.sandbox.url)
    with pytest.raises(GatewayRefused) as refused:
        await stranger.create(new_payment())
    await stranger.close()
    assert (refused.value.status, refused.value.message) == (401, "Authentication failed")


async def test_nobody_there_is_away_and_a_lost_connection_is_unknown(world: RazorpayWorld) -> None:
    world.mischief.fault = Fault.DROP
    with pytest.raises(GatewayUnknown) as unknown:
        await world.gateway.create(new_payment())
    assert unknown.value.code == "connection_lost"
    await world.go_away()
    with pytest.raises(GatewayAway) as away:
        await world.gateway.create(new_payment())
    assert away.value.code == "not_reached"
    nowhere = adapter("http://no.such.host.invalid")
    with pytest.raises(GatewayAway):
        await nowhere.create(new_payment())
    await nowhere.close()


async def test_an_answer_that_breaks_off_is_unknown() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b'{"id":')
        assert request.transport
        request.transport.abort()
        return response

    async with gateway_that(answer) as gateway:
        with pytest.raises(GatewayUnknown):
            await gateway.create(new_payment())


async def test_an_answer_that_comes_byte_by_byte_is_given_up_in_time() -> None:
    given_up = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while not given_up.is_set():
            await response.write(b" ")
            await asyncio.sleep(0.02)
        return response

    async with gateway_that(answer, timeout_s=0.3) as gateway:
        try:
            with pytest.raises(GatewayUnknown) as unknown:
                async with asyncio.timeout(10):
                    await gateway.create(new_payment())
        finally:
            given_up.set()
        assert unknown.value.code == "timeout"


async def test_an_endless_answer_is_not_read_to_its_end() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" " * 2**20)

    async with gateway_that(answer, timeout_s=5) as gateway:
        with pytest.raises(GatewayUnknown):
            await gateway.create(new_payment())


async def test_threads_are_bounded_and_who_waits_too_long_has_asked_nothing() -> None:
    asked, open_now, most = 0, 0, 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal asked, open_now, most
        asked, open_now = asked + 1, open_now + 1
        most = max(most, open_now)
        await asyncio.sleep(5)
        raise AssertionError

    async with gateway_that(answer, timeout_s=0.3, threads_max=2) as gateway:
        ended = await asyncio.gather(*(gateway.create(new_payment()) for _ in range(5)), return_exceptions=True)
        kinds = [type(one) for one in ended]
        assert kinds.count(GatewayUnknown) == asked
        assert kinds.count(GatewayAway) == 5 - asked
        assert asked < 5
        assert sum(one.name.startswith("razorpay") for one in threading.enumerate()) == 2


async def test_a_caller_that_gives_up_leaves_no_thread_behind(world: RazorpayWorld) -> None:
    world.mischief.fault, world.mischief.fault_calls = Fault.HANG, 4
    calls = [asyncio.create_task(world.gateway.create(new_payment())) for _ in range(4)]
    await until(lambda: world.mischief.fault is None, "all four calls hang")
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert (await world.gateway.create(new_payment())).gateway_order_id


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1"])
async def test_no_proxy_stands_between_us_and_this_machine(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    proxied = 0

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal proxied
        proxied += 1
        writer.close()

    server = await asyncio.start_server(proxy, "127.0.0.1", 0)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    monkeypatch.delenv("no_proxy", raising=False)
    gateway = adapter(url)
    with pytest.raises(GatewayAway):
        await gateway.create(new_payment())
    await gateway.close()
    server.close()
    assert proxied == 0


async def test_nothing_is_printed(world: RazorpayWorld, capfd: pytest.CaptureFixture[str]) -> None:
    await world.go_away()
    with pytest.raises(GatewayAway):
        await world.gateway.create(new_payment())
    assert "failed" not in capfd.readouterr().out.lower()


# what is sent


class Sent(msgspec.Struct):
    method: str
    path: str
    headers: dict[str, str]
    body: Any


@asynccontextmanager
async def recorded(answers: dict[str, object]) -> AsyncIterator[tuple[Razorpay, list[Sent]]]:
    """What the adapter sends. `answers`: by the path's end."""
    sent: list[Sent] = []

    async def answer(request: web.Request) -> web.Response:
        body = await request.read()
        sent.append(Sent(request.method, request.path_qs, dict(request.headers), json.loads(body) if body else None))
        found = next(value for end, value in answers.items() if request.path.endswith(end))
        return web.json_response(found)

    async with gateway_that(answer) as gateway:
        yield gateway, sent


@pytest.mark.parametrize("capture", list(Capture))
async def test_an_order_is_asked_for_in_paise_under_our_receipt(capture: Capture) -> None:
    new = new_payment(amount=5000, capture=capture)
    order = json.loads((FIXTURES / "doc-api-order-create-ok.json").read_text())
    async with recorded({"/orders": order}) as (gateway, sent):
        assert (await gateway.create(new)).gateway_order_id == "order_RB58MiP5SPFYyM"
    (one,) = sent
    assert (one.method, one.path) == ("POST", "/v1/orders")
    assert one.headers["Authorization"] == "Basic cnpwX3Rlc3RfeDpzZWNyZXQ="
    assert one.body == {
        "amount": 5000,
        "currency": "INR",
        "receipt": new.reference,
        "unique_receipt": True,
        "payment": {"capture": capture.value},
        "notes": {"payment_id": new.payment_id, "order_id": new.order_id},
    }
    assert len(new.reference) <= 40


@pytest.mark.parametrize("fixture", ["doc-api-refund-create-ok", "doc-api-refund-idempotent-ok"])
async def test_a_refund_is_asked_for_under_its_key(fixture: str) -> None:
    refund = json.loads((FIXTURES / f"{fixture}.json").read_text())
    new = msgspec.structs.replace(new_refund(KNOWN, "pay_29QQoUBi66xm2f", 500100), attempt=3)
    async with recorded({"/refund": refund}) as (gateway, sent):
        made = await gateway.refund(new)
    assert (made.report, made.gateway_refund_id) == (RefundReport.SUCCEEDED, "rfnd_FP8QHiV938haTz")
    (one,) = sent
    assert (one.method, one.path) == ("POST", "/v1/payments/pay_29QQoUBi66xm2f/refund")
    assert one.headers["X-Refund-Idempotency"] == new.key
    assert one.body == {
        "amount": 500100,
        "speed": "normal",
        "receipt": new.key,
        "notes": {"refund_id": new.refund_id, "payment_id": KNOWN.payment_id},
    }
    assert len(new.key) <= 40


async def test_a_capture_names_amount_and_currency() -> None:
    captured = json.loads((FIXTURES / "doc-api-payment-capture-ok.json").read_text())
    known = as_known(new_payment(amount=1000), captured["order_id"], captured["id"])
    async with recorded({"/capture": captured}) as (gateway, sent):
        news = await gateway.capture(known, 1000, "INR")
    assert (news.report, news.amount, news.fee, news.method) == (Report.CAPTURED, 1000, 1, "card")
    assert [(one.path, one.body) for one in sent] == [
        (f"/v1/payments/{captured['id']}/capture", {"amount": 1000, "currency": "INR"})
    ]


@pytest.mark.parametrize("wrong", ["../orders", "pay_1/refund", "", "pay 1", "pay_1?x", "x" * 65])
async def test_an_id_never_leads_elsewhere(wrong: str) -> None:
    async with recorded({}) as (gateway, sent):
        refund = new_refund(KNOWN, wrong or "/", 100)
        for call in (
            gateway.fetch(as_known(new_payment(), wrong)),
            gateway.capture(as_known(new_payment(), KNOWN.gateway_order_id, wrong or "/"), 100, "INR"),
            gateway.refund(refund),
            gateway.fetch_refund(refund, None),
            gateway.fetch_refund(REFUND, wrong or "/"),
        ):
            with pytest.raises(GatewayRefused):
                await call
    assert sent == []


# a gateway that lies


async def test_an_order_of_another_amount_is_never_offered_to_the_payer() -> None:
    order = json.loads((FIXTURES / "doc-api-order-create-ok.json").read_text())
    async with recorded({"/orders": order}) as (gateway, _):
        for new in (new_payment(amount=5001), new_payment(amount=5000, currency="USD")):
            with pytest.raises(GatewayUnknown) as unknown:
                await gateway.create(new)
            assert unknown.value.code == "nonsense"


async def test_a_refund_of_another_amount_or_payment_is_not_ours() -> None:
    refund = json.loads((FIXTURES / "doc-api-refund-create-ok.json").read_text())
    async with recorded({"/refund": refund}) as (gateway, _):
        for new in (new_refund(KNOWN, "pay_29QQoUBi66xm2f", 100), new_refund(KNOWN, "pay_other", 500100)):
            with pytest.raises(GatewayUnknown):
                await gateway.refund(new)


# refunds whose answer was lost


async def test_a_refused_refund_that_was_made_before_is_found_by_its_receipt(world: RazorpayWorld) -> None:
    """Also when the gateway has forgotten the key: "fully refunded already" may be our own doing."""
    known = await started(world)
    world.sandbox.pay(known.gateway_order_id)
    (news,) = await world.gateway.fetch(known)
    new = new_refund(known, news.gateway_payment_id or "", known.amount)
    made = await world.gateway.refund(new)
    world.sandbox.books.state.keys.clear()
    assert await world.gateway.refund(new) == made
    with pytest.raises(GatewayRefused) as refused:
        await world.gateway.refund(new_refund(known, news.gateway_payment_id or "", known.amount))
    assert refused.value.message == "The payment has been fully refunded already"


async def test_the_refund_that_fails_on_purpose(world: RazorpayWorld) -> None:
    known = await started(world)
    world.sandbox.pay(known.gateway_order_id)
    (news,) = await world.gateway.fetch(known)
    new = new_refund(known, news.gateway_payment_id or "", 2468)
    refund = await world.gateway.refund(new)
    found = await world.gateway.fetch_refund(new, refund.gateway_refund_id)
    assert found
    assert found.report is RefundReport.FAILED


# attempts


async def fetched(world: RazorpayWorld, known: Known) -> list[News]:
    return list(await world.gateway.fetch(known))


async def test_a_second_payment_of_an_order_is_told_with_the_refund_that_the_gateway_made(
    world: RazorpayWorld,
) -> None:
    known = await started(world)
    declined = world.sandbox.fail(known.gateway_order_id)
    world.sandbox.pay(known.gateway_order_id)
    world.sandbox.finish(declined.id)
    news = await fetched(world, known)
    assert [one.report for one in news] == [Report.CAPTURED, Report.CAPTURED]
    by_payment = {one.gateway_payment_id: one for one in news}
    (refund,) = by_payment[declined.id].refunds
    assert (refund.report, refund.amount, refund.refund_id) == (RefundReport.SUCCEEDED, known.amount, None)
    assert sum(len(one.refunds) for one in news) == 1


async def test_a_second_payment_that_the_gateway_keeps_is_told_too(world: RazorpayWorld) -> None:
    world.mischief.duplicates_refunded = False
    known = await started(world)
    declined = world.sandbox.fail(known.gateway_order_id)
    world.sandbox.pay(known.gateway_order_id)
    world.sandbox.finish(declined.id)
    assert [(one.report, one.refunds) for one in await fetched(world, known)] == [(Report.CAPTURED, ())] * 2


async def test_a_cancelled_payment_whose_attempt_is_open_is_not_cancelled(world: RazorpayWorld) -> None:
    known = await started(world)
    attempt = world.sandbox.begin(known.gateway_order_id)
    assert [one.report for one in await world.gateway.cancel(known)] == [Report.PROCESSING]
    world.sandbox.fail_attempt(attempt.id)
    assert [one.report for one in await world.gateway.cancel(known)] == [Report.CANCELLED]


async def test_an_authorization_that_lapsed_brought_no_money(world: RazorpayWorld) -> None:
    known = await started(world, new_payment(capture=Capture.MANUAL))
    said = world.sandbox.pay(known.gateway_order_id)
    world.sandbox.lapse(said["razorpay_payment_id"])
    assert [(one.report, one.refunds) for one in await fetched(world, known)] == [(Report.CANCELLED, ())]
    with pytest.raises(GatewayRefused):
        await world.gateway.capture(known, known.amount, known.currency)
    for hook in await world.hooks.until(lambda came: len(came) >= 3):
        kind = world.gateway.receive(hook.body, hook.headers).kind
        (news,) = world.gateway.read(kind, hook.body)
        assert news.report is (Report.AUTHORIZED if kind == "payment.authorized" else Report.CANCELLED)
        assert not news.refunds


async def test_the_books_are_read_page_by_page_and_lag(world: RazorpayWorld) -> None:
    start = dt.datetime.now(dt.UTC) - dt.timedelta(minutes=5)
    end = start + dt.timedelta(minutes=10)
    world.mischief.webhooks_lost = 3 * 205
    for number in range(205):
        order = world.sandbox.books.create_order({"amount": 1000 + number, "currency": "INR"})
        world.sandbox.pay(order["id"])
    moved = [one async for one in world.gateway.movements(start, end)]
    assert {one.amount for one in moved} == set(range(1000, 1205))
    assert len(moved) == 205
    world.mischief.list_lag_s = 60
    assert [one async for one in world.gateway.movements(start, end)] == []


async def test_confirming_by_the_server_is_not_razorpays(world: RazorpayWorld) -> None:
    with pytest.raises(GatewayRefused):
        await world.gateway.confirm(KNOWN, "pm_1", "https://shop.example")


async def test_without_a_simulator_the_checkout_has_no_page() -> None:
    gateway = adapter("https://api.razorpay.com")
    assert gateway.checkout(KNOWN, None, {"name": "Asha"}) == {
        "keyId": "rzp_test_x",
        "gatewayOrderId": KNOWN.gateway_order_id,
        "amount": KNOWN.amount,
        "currency": "INR",
        "prefill": {"name": "Asha"},
    }
    await gateway.close()


async def test_an_attempt_is_found_behind_many_later_ones(world: RazorpayWorld) -> None:
    known = await started(world)
    first = world.sandbox.begin(known.gateway_order_id)
    for _ in range(12):
        world.sandbox.fail(known.gateway_order_id)
    world.sandbox.finish(first.id)
    (news,) = await world.gateway.fetch(known)
    assert (news.report, news.gateway_payment_id) == (Report.CAPTURED, first.id)
