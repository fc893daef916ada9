"""The simulator of Razorpay says what Razorpay says: bodies, refusals, webhooks and habits, asked over HTTP."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from server.adapters.sandbox.razorpay import RazorpaySandbox
from tests.adapters.razorpay_world import KEY_ID, KEY_SECRET, OLD_SECRET
from tests.adapters.worlds import Hook, Hooks
from tests.harness import ROOT

FIXTURES = ROOT / "tests" / "fixtures" / "razorpay"
EVENTS = {"payment.authorized", "payment.captured", "order.paid"}


def fixture(name: str) -> Any:
    return json.loads((FIXTURES / f"{name}.json").read_text())


def basic(key_id: str, key_secret: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{key_id}:{key_secret}".encode()).decode()}


@pytest.fixture
async def hooks() -> AsyncIterator[Hooks]:
    opened = Hooks()
    await opened.start()
    yield opened
    await opened.stop()


@pytest.fixture
async def sandbox(hooks: Hooks) -> AsyncIterator[RazorpaySandbox]:
    opened = RazorpaySandbox(KEY_ID, KEY_SECRET, OLD_SECRET, hooks.url, pace=0.001)
    await opened.start()
    yield opened
    await opened.stop()


@pytest.fixture
async def curl(sandbox: RazorpaySandbox) -> AsyncIterator[Curl]:
    async with aiohttp.ClientSession(headers=basic(KEY_ID, KEY_SECRET)) as session:
        yield Curl(session, sandbox)


class Curl:
    """Asks as a tester does."""

    def __init__(self, session: aiohttp.ClientSession, sandbox: RazorpaySandbox) -> None:
        self._session, self._sandbox = session, sandbox

    async def __call__(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body)
        async with self._session.request(method, self._sandbox.url + path, data=data, headers=headers) as answer:
            return answer.status, json.loads(await answer.read())

    async def order(self, amount: int = 50_000, **more: object) -> Any:
        status, order = await self("POST", "/v1/orders", {"amount": amount, "currency": "INR", **more})
        assert status == 200
        return order

    async def paid(self, amount: int = 50_000) -> tuple[str, str]:
        """(order, payment)"""
        order = await self.order(amount)
        status, said = await self("POST", f"/sandbox/orders/{order['id']}/pay")
        assert status == 200
        return order["id"], said["razorpay_payment_id"]


def event_of(hook: Hook) -> Any:
    return json.loads(hook.body)


def kinds(hooks: list[Hook]) -> list[str]:
    return [event_of(hook)["event"] for hook in hooks]


# who may use it


@pytest.mark.parametrize("key_id", ["rzp_live_00000000000000", "", "pk_test_1"])
def test_live_keys_are_refused(key_id: str) -> None:
    with pytest.raises(ValueError, match="rzp_test_"):
        RazorpaySandbox(key_id, "secret", "secret")


async def test_it_listens_on_this_machine_only_and_says_what_it_is(
    sandbox: RazorpaySandbox, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sandbox.url.startswith("http://127.0.0.1:")
    assert sandbox._runner
    assert [address[0] for address in sandbox._runner.addresses] == ["127.0.0.1"]
    async with (
        aiohttp.ClientSession() as session,
        session.get(
            f"{sandbox.url}/checkout/{sandbox.books.create_order({'amount': 100, 'currency': 'INR'})['id']}"
        ) as page,
    ):
        assert "Simulator" in await page.text()


async def test_without_the_key_nothing_is_told(sandbox: RazorpaySandbox) -> None:
    for headers in ({}, basic(KEY_ID, "wrong"), basic("rzp_live_1", KEY_SECRET)):
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.post(sandbox.url + "/v1/orders", json={"amount": 100, "currency": "INR"}) as answer,
        ):
            assert answer.status == 401
            assert (await answer.json())["error"]["description"] == "Authentication failed"


# orders


async def test_an_order_has_the_documented_members(curl: Curl) -> None:
    order = await curl.order(5000, receipt="receipt#1", notes={"key1": "value3", "key2": "value2"})
    assert order.keys() == fixture("doc-api-order-create-ok").keys()
    same = {key: value for key, value in order.items() if key not in ("id", "created_at")}
    documented = fixture("doc-api-order-create-ok")
    assert same == {key: documented[key] for key in same}
    assert re.fullmatch(r"order_[A-Za-z0-9]{14}", order["id"])
    assert await curl("GET", f"/v1/orders/{order['id']}") == (200, order)
    assert (await curl.order())["notes"] == []


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"amount": 99, "currency": "INR"}, fixture("doc-api-order-create-failure")),
        ({"amount": 100.0, "currency": "INR"}, fixture("doc-api-payment-capture-failure")),
        ({"amount": "100", "currency": "INR"}, fixture("doc-api-payment-capture-failure")),
        ({"amount": True, "currency": "INR"}, fixture("doc-api-payment-capture-failure")),
        ({"currency": "INR"}, "The amount field is required."),
        ({"amount": 100}, "The currency field is required."),
        ({"amount": 100, "currency": "INR", "color": 1}, "color is/are not required and should not be sent"),
        ({"amount": 100, "currency": "INR", "payment": {"x": 1}}, "x is/are not required and should not be sent"),
        ({"amount": 100, "currency": "INR", "receipt": "r" * 41}, "The receipt may not be greater than 40 characters."),
        ({"amount": 100, "currency": "INR", "notes": {str(n): "" for n in range(16)}}, "Number of fields in notes"),
        ({"amount": 100, "currency": "INR", "notes": {"a": "x" * 257}}, "The notes may not be greater than 256"),
    ],
)
async def test_what_an_order_may_not_be(curl: Curl, wanted: object, told: Any) -> None:
    status, said = await curl("POST", "/v1/orders", wanted)
    assert status == 400
    assert said == told if isinstance(told, dict) else said["error"]["description"].startswith(told)


async def test_a_receipt_is_unique_only_when_that_is_asked_for(curl: Curl) -> None:
    first = await curl.order(receipt="r", unique_receipt=True)
    assert (await curl.order(receipt="r", unique_receipt=True))["id"] == first["id"]
    assert (await curl.order(receipt="r"))["id"] != first["id"]


async def test_what_is_not_there(curl: Curl) -> None:
    for path in ("/v1/orders/order_1", "/v1/orders/order_1/payments", "/v1/payments/pay_1", "/v1/refunds/rfnd_1"):
        status, said = await curl("GET", path)
        assert (status, said["error"]["description"]) == (400, "The id provided does not exist")
    assert (await curl("GET", "/v1/nothing"))[0] == 404
    assert (await curl("POST", "/v1/orders", [1]))[0] == 400


# payments


async def test_an_order_goes_from_created_by_attempts_to_paid(curl: Curl) -> None:
    order = await curl.order()
    path = f"/v1/orders/{order['id']}"

    async def state() -> tuple[str, int, int, int]:
        _, now = await curl("GET", path)
        return now["status"], now["attempts"], now["amount_paid"], now["amount_due"]

    assert await state() == ("created", 0, 0, 50_000)
    _, failed = await curl("POST", f"/sandbox/orders/{order['id']}/fail", {"method": "card"})
    assert failed["error_reason"] == fixture("live-card-payment.failed")["payload"]["payment"]["entity"]["error_reason"]
    _, cancelled = await curl("POST", f"/sandbox/orders/{order['id']}/cancel")
    documented = fixture("doc-api-payment-entity-failure")
    for name in ("status", "error_code", "error_description", "error_source", "error_step", "error_reason"):
        assert cancelled[name] == documented[name]
    assert await state() == ("attempted", 2, 0, 50_000)
    await curl("POST", f"/sandbox/orders/{order['id']}/pay")
    assert await state() == ("paid", 3, 50_000, 0)
    status, said = await curl("POST", f"/sandbox/orders/{order['id']}/pay")
    assert (status, "error" in said) == (400, True)
    _, payments = await curl("GET", path + "/payments")
    assert [one["status"] for one in payments["items"]] == ["captured", "failed", "failed"]
    assert (payments["entity"], payments["count"]) == ("collection", 3)


async def test_a_captured_payment_has_the_recorded_members(curl: Curl, hooks: Hooks) -> None:
    order_id, payment_id = await curl.paid()
    _, payment = await curl("GET", f"/v1/payments/{payment_id}")
    assert (payment["fee"], payment["tax"], payment["order_id"]) == (1180, 180, order_id)
    recorded = fixture("live-upi-payment.captured")
    came = await hooks.until(lambda came: set(kinds(came)) >= EVENTS)
    (captured,) = [event_of(hook) for hook in came if event_of(hook)["event"] == "payment.captured"]
    assert list(captured) == list(recorded)
    assert list(captured["payload"]["payment"]["entity"]) == list(recorded["payload"]["payment"]["entity"])
    (authorized,) = [event_of(hook) for hook in came if event_of(hook)["event"] == "payment.authorized"]
    entity = authorized["payload"]["payment"]["entity"]
    assert (entity["status"], entity["captured"], entity["fee"]) == ("authorized", False, None)
    (paid,) = [event_of(hook) for hook in came if event_of(hook)["event"] == "order.paid"]
    recorded = fixture("live-netbanking-order.paid")
    assert list(paid["payload"]["order"]["entity"]) == list(recorded["payload"]["order"]["entity"])
    assert "base_amount" not in paid["payload"]["payment"]["entity"]


async def test_manual_capture_takes_exactly_what_was_authorized(curl: Curl) -> None:
    order = await curl.order(payment={"capture": "manual"})
    _, said = await curl("POST", f"/sandbox/orders/{order['id']}/pay")
    path = f"/v1/payments/{said['razorpay_payment_id']}/capture"
    for wanted, told in (
        ({"amount": 49_999, "currency": "INR"}, "Capture amount must be equal to the amount authorized"),
        ({"amount": "50000", "currency": "INR"}, "The amount must be an integer."),
        ({"amount": 50_000, "currency": "INR", "x": 1}, "x is/are not required and should not be sent"),
    ):
        status, refused = await curl("POST", path, wanted)
        assert (status, refused["error"]["description"]) == (400, told)
    status, _ = await curl("POST", f"/sandbox/orders/{order['id']}/pay")
    assert status == 400, "no new attempt while one is authorized"
    status, captured = await curl("POST", path, {"amount": 50_000, "currency": "INR"})
    assert (status, captured["status"], captured["captured"]) == (200, "captured", True)
    status, refused = await curl("POST", path, {"amount": 50_000, "currency": "INR"})
    assert (status, refused["error"]["description"]) == (400, "This payment has already been captured")


async def test_the_callback_is_signed_with_the_key(curl: Curl) -> None:
    order = await curl.order()
    _, said = await curl("POST", f"/sandbox/orders/{order['id']}/pay", {"method": "netbanking"})
    text = f"{order['id']}|{said['razorpay_payment_id']}".encode()
    assert said["razorpay_order_id"] == order["id"]
    assert said["razorpay_signature"] == hmac.digest(KEY_SECRET.encode(), text, hashlib.sha256).hex()


async def test_a_late_payment_fails_first(curl: Curl, hooks: Hooks) -> None:
    order = await curl.order()
    _, payment = await curl("POST", f"/sandbox/orders/{order['id']}/pay_late", {"afterS": 0.01})
    assert payment["status"] == "failed"
    came = await hooks.until(lambda came: set(kinds(came)) >= {*EVENTS, "payment.failed"})
    assert {event_of(hook)["payload"]["payment"]["entity"]["id"] for hook in came} == {payment["id"]}


# refunds


async def test_refunds_add_up_and_never_beyond(curl: Curl, hooks: Hooks) -> None:
    _, payment_id = await curl.paid()
    path = f"/v1/payments/{payment_id}/refund"
    status, refund = await curl("POST", path, {"amount": 20_000, "notes": {"a": "b"}})
    assert status == 200
    assert refund.keys() == fixture("doc-api-refund-create-ok").keys()
    _, payment = await curl("GET", f"/v1/payments/{payment_id}")
    assert (payment["status"], payment["amount_refunded"], payment["refund_status"]) == ("captured", 20_000, "partial")
    status, refused = await curl("POST", path, {"amount": 30_001})
    assert (status, refused["error"]["description"]) == (
        400,
        "The refund amount provided is greater than amount captured",
    )
    assert (await curl("POST", path, {"amount": 99}))[1] == fixture("doc-api-refund-create-failure")
    _, rest = await curl("POST", path, {})
    assert (rest["amount"], rest["notes"]) == (30_000, [])
    _, payment = await curl("GET", f"/v1/payments/{payment_id}")
    assert (payment["status"], payment["refund_status"], payment["captured"]) == ("refunded", "full", True)
    _, refused = await curl("POST", path, {})
    assert refused["error"]["description"] == "The payment has been fully refunded already"
    _, listed = await curl("GET", f"/v1/payments/{payment_id}/refunds?count=1&skip=1")
    assert [one["id"] for one in listed["items"]] == [refund["id"]]
    assert (await curl("GET", f"/v1/refunds/{refund['id']}"))[1] == refund
    came = await hooks.until(lambda came: kinds(came).count("refund.processed") == 2)
    recorded = (FIXTURES / "live-netbanking-refund.created.json").read_bytes()
    created = next(event_of(hook) for hook in came if event_of(hook)["event"] == "refund.created")
    theirs, ours = json.loads(recorded)["payload"]["payment"]["entity"], created["payload"]["payment"]["entity"]
    assert set(theirs) <= set(ours)


async def test_an_uncaptured_payment_is_not_refunded(curl: Curl) -> None:
    order = await curl.order(payment={"capture": "manual"})
    _, said = await curl("POST", f"/sandbox/orders/{order['id']}/pay")
    _, refused = await curl("POST", f"/v1/payments/{said['razorpay_payment_id']}/refund", {})
    assert refused["error"]["description"] == "The payment status should be captured for action to be taken"


async def test_an_idempotency_key_is_one_body(curl: Curl, sandbox: RazorpaySandbox) -> None:
    _, payment_id = await curl.paid()
    path, key = f"/v1/payments/{payment_id}/refund", {"X-Refund-Idempotency": "key-0123456789"}
    status, first = await curl("POST", path, {"amount": 1000}, **key)
    assert (await curl("POST", path, {"amount": 1000}, **key)) == (status, first)
    status, refused = await curl("POST", path, {"amount": 1001}, **key)
    assert (status, refused) == (409, fixture("doc-api-refund-idempotent-failure"))
    assert (await curl("POST", path, {"amount": 1000}, **{"X-Refund-Idempotency": "short"}))[0] == 400
    sandbox.mischief.refund_takes_s = 0.1
    other = {"X-Refund-Idempotency": "another-key-1"}
    ended = await asyncio.gather(*(curl("POST", path, {"amount": 2000}, **other) for _ in range(3)))
    assert sorted(status for status, _ in ended) == [200, 409, 409]


async def test_2468_fails_and_gives_the_amount_back(curl: Curl, hooks: Hooks) -> None:
    _, payment_id = await curl.paid()
    _, refund = await curl("POST", f"/v1/payments/{payment_id}/refund", {"amount": 2468})
    assert (await curl("GET", f"/v1/refunds/{refund['id']}"))[1]["status"] == "failed"
    assert (await curl("GET", f"/v1/payments/{payment_id}"))[1]["amount_refunded"] == 0
    await hooks.until(lambda came: "refund.failed" in kinds(came))


async def test_a_pending_refund_is_decided_on_command(curl: Curl, hooks: Hooks) -> None:
    await curl("POST", "/sandbox/mischief", {"refunds": "pending"})
    _, payment_id = await curl.paid()
    _, refund = await curl("POST", f"/v1/payments/{payment_id}/refund", {"amount": 1000})
    assert refund["status"] == "pending"
    _, refund = await curl("POST", f"/sandbox/refunds/{refund['id']}/succeed")
    assert refund["status"] == "processed"
    _, refund = await curl("POST", f"/sandbox/refunds/{refund['id']}/fail")  # a bank may change its mind
    assert refund["status"] == "failed"
    await hooks.until(lambda came: {"refund.processed", "refund.failed"} <= set(kinds(came)))


async def test_disputes(curl: Curl, hooks: Hooks) -> None:
    _, payment_id = await curl.paid()
    _, dispute = await curl("POST", f"/sandbox/payments/{payment_id}/dispute", {"amount": 500})
    await curl("POST", f"/sandbox/disputes/{dispute['id']}/lost")
    came = await hooks.until(lambda came: "payment.dispute.lost" in kinds(came))
    assert "payment.dispute.created" in kinds(came)


# webhooks


async def test_bodies_are_compact_and_those_of_refunds_sorted(curl: Curl, hooks: Hooks) -> None:
    _, payment_id = await curl.paid()
    await curl("POST", f"/v1/payments/{payment_id}/refund", {})
    for hook in await hooks.until(lambda came: len(came) >= 5):
        event, sort = event_of(hook), event_of(hook)["event"].startswith("refund.")
        assert hook.body == json.dumps(event, separators=(",", ":"), sort_keys=sort).encode()
        assert (next(iter(event)) == "account_id") is sort
        assert hook.headers["User-Agent"] == "Razorpay-Webhook/v1"
        assert re.fullmatch(r"[A-Za-z0-9]{14}", hook.headers["X-Razorpay-Event-Id"])
        assert "X-Razorpay-Event-Id" not in hook.body.decode()


async def test_repeats_are_the_same_to_the_byte_and_end_with_2xx(
    curl: Curl, hooks: Hooks, sandbox: RazorpaySandbox
) -> None:
    hooks.statuses = [500, 400, 302, 404]
    await curl.paid()
    await sandbox.courier.idle()
    assert len(hooks.came) == 3 + 4
    by_event: dict[str, set[tuple[bytes, str]]] = {}
    for hook in hooks.came:
        headers = hook.headers
        by_event.setdefault(headers["X-Razorpay-Event-Id"], set()).add((hook.body, headers["X-Razorpay-Signature"]))
    assert len(by_event) == 3
    assert all(len(seen) == 1 for seen in by_event.values())
    _, attempts = await curl("GET", "/sandbox/deliveries")
    assert sorted(attempt["status"] for attempt in attempts) == [200, 200, 200, 302, 400, 404, 500]


async def test_after_a_change_of_the_secret_old_events_keep_the_old_one(
    curl: Curl, hooks: Hooks, sandbox: RazorpaySandbox
) -> None:
    hooks.statuses = [500] * 6
    await curl.paid()
    await hooks.until(lambda came: len(came) >= 3)
    await curl("POST", "/sandbox/webhook-secret", {"secret": "the new one"})
    await sandbox.courier.idle()
    for hook in hooks.came:
        made = hmac.digest(OLD_SECRET.encode(), hook.body, hashlib.sha256).hex()
        assert hook.headers["X-Razorpay-Signature"] == made
    before = len(hooks.came)
    await curl.paid()
    await sandbox.courier.idle()
    for hook in hooks.came[before:]:
        assert hook.headers["X-Razorpay-Signature"] == hmac.digest(b"the new one", hook.body, hashlib.sha256).hex()


async def test_webhooks_come_shuffled_doubled_late_or_never(curl: Curl, hooks: Hooks, sandbox: RazorpaySandbox) -> None:
    await curl("POST", "/sandbox/mischief", {"webhookShuffleS": 0.2, "webhookCopies": 2, "webhooksLost": 1})
    await curl.paid()
    await sandbox.courier.idle()
    assert len(hooks.came) == 4
    assert len({hook.headers["X-Razorpay-Event-Id"] for hook in hooks.came}) == 2
    orders = set()
    await curl("POST", "/sandbox/mischief", {"webhookCopies": 1, "webhookShuffleS": 0.05})
    for _ in range(10):
        hooks.came.clear()
        await curl.paid()
        await sandbox.courier.idle()
        orders.add(tuple(kinds(hooks.came)))
    assert len(orders) > 1


async def test_mischief_is_shown_and_a_wrong_one_refused(curl: Curl) -> None:
    status, shown = await curl("POST", "/sandbox/mischief", {"listLagS": 2})
    assert (status, shown["listLagS"]) == (200, 2)
    assert await curl("GET", "/sandbox/mischief") == (200, shown)
    for wrong in ({"nothing": 1}, {"fault": "unheard of"}, {"refunds": "maybe"}, [1]):
        assert (await curl("POST", "/sandbox/mischief", wrong))[0] == 400
    assert await curl("GET", "/sandbox/mischief") == (200, shown)


# the page, and what is kept


async def test_the_page_holds_the_order_and_runs_no_foreign_address(curl: Curl, sandbox: RazorpaySandbox) -> None:
    order = await curl.order()
    async with aiohttp.ClientSession() as session:

        async def shown(back: str) -> Any:
            url = f"{sandbox.url}/checkout/{order['id']}"
            async with session.get(url, params={"returnUrl": back}) as answer:
                page = await answer.text()
            assert "Simulator" in page
            (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
            return json.loads(data)

        assert (await shown("https://shop.example/done?a=1"))["returnUrl"] == "https://shop.example/done?a=1"
        assert (await shown("javascript:alert(1)"))["returnUrl"] == ""
        hostile = "https://shop.example/</script><script>alert(1)</script>"
        seen = await shown(hostile)
        assert (seen["returnUrl"], seen["orderId"], seen["amount"]) == (hostile, order["id"], 50_000)


async def test_a_restart_knows_its_orders(tmp_path: Path) -> None:
    file = tmp_path / "data" / "sandbox-razorpay.json"
    before = RazorpaySandbox(KEY_ID, KEY_SECRET, OLD_SECRET, file=file)
    await before.start()
    async with aiohttp.ClientSession(headers=basic(KEY_ID, KEY_SECRET)) as session:
        order_id, payment_id = await Curl(session, before).paid()
    await before.stop()
    after = RazorpaySandbox(KEY_ID, KEY_SECRET, OLD_SECRET, file=file)
    assert after.books.order(order_id)["status"] == "paid"
    assert after.books.payment(payment_id)["status"] == "captured"
