"""Paying through the doors, at simulators of the gateways: what works, what goes wrong, and what is refused."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import asyncpg
import pytest

from server.embedded import DataServers
from tests.harness import SERVICE, Fleet, Instance, Reply, Watcher, token, until
from tests.shared import everything, refusal, shared_fleet

CUSTOMER, STRANGER = token("customer", "c1"), token("customer", "c2")
STAFF, ADMIN, AGENT = token("staff", "s1"), token("admin", "x1"), token("agent", "a1")
OPEN_S = 1
"""BREAKER_OPEN_S of these instances."""
FAILURES_MAX = 5
"""BREAKER_FAILURES_MAX of these instances."""

Body = dict[str, Any]


class Shop(NamedTuple):
    """Two instances, and their database."""

    a: Instance
    b: Instance
    sql: asyncpg.Connection


@pytest.fixture(scope="module")
async def shop(data: DataServers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    async with shared_fleet(data, tmp_path_factory.mktemp("shop")) as fleet:
        limits = {"BREAKER_OPEN_S": str(OPEN_S), "BREAKER_FAILURES_MAX": str(FAILURES_MAX)}
        a, b = await fleet.pair(GATEWAY_TIMEOUT_MS="3000", **limits)
        sql = await asyncpg.connect(fleet.database_url)
        yield Shop(a, b, sql)
        await sql.close()


@pytest.fixture
async def calm(shop: Shop) -> AsyncIterator[None]:
    """What a test let the gateways do wrong ends with it, and their breakers are closed again."""
    yield
    for provider in ("razorpay", "stripe"):
        found = await shop.a.place(paymentMethod="online")

        async def offered(order: Body = found, provider: str = provider) -> bool:
            return all([(await begin(one, order, provider)).status in (200, 201) for one in (shop.a, shop.b)])

        await until(offered, f"{provider} is offered again")


async def begin(instance: Instance, order: Body, provider: str | None = None, **members: Any) -> Reply:
    how = {name: members.pop(name) for name in ("by", "headers") if name in members}
    body = {"orderId": order["id"], **({"provider": provider} if provider else {}), **members}
    return await instance.post("/payments", body, **{"by": CUSTOMER, **how})


async def started(instance: Instance, order: Body, provider: str = "razorpay", **members: Any) -> Body:
    reply = await begin(instance, order, provider, **members)
    assert reply.status == 201, reply
    payment: Body = reply.body
    return payment


async def online(instance: Instance, **changes: Any) -> Body:
    return await instance.place(paymentMethod="online", **changes)


async def sandbox(payment: Body, path: str, body: Body | None = None) -> Any:
    """Ask the simulator that the payment's checkout leads to."""
    where = urlsplit(payment["checkout"]["url"])
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{where.scheme}://{where.netloc}/sandbox{path}", json=body or {}) as response,
    ):
        text = await response.text()
        assert response.status == 200, (path, text)
        return json.loads(text)


async def pays(payment: Body, action: str = "pay", **body: Any) -> Any:
    kind = "orders" if payment["provider"] == "razorpay" else "intents"
    return await sandbox(payment, f"/{kind}/{payment['gatewayOrderId']}/{action}", body)


def proof(handed: Body) -> Body:
    """What Razorpay's checkout hands to a page, as the page hands it on."""
    return {
        "razorpayPaymentId": handed["razorpay_payment_id"],
        "razorpayOrderId": handed["razorpay_order_id"],
        "razorpaySignature": handed["razorpay_signature"],
    }


async def becomes(instance: Instance, payment: Body, **members: Any) -> Body:
    async def there() -> Body | None:
        found = (await instance.get(f"/payments/{payment['id']}", by=STAFF)).body
        return found if all(found.get(name) == value for name, value in members.items()) else None

    found: Body = await until(there, f"the payment becomes {members}")
    return found


MONEY = {
    "orders": "select * from orders where id = any ($1::uuid[])",
    "events": "select order_id, seq, type, body from order_events where order_id = any ($1::uuid[])",
    "payments": "select * from payments where order_id = any ($1::uuid[])",
    "inputs": "select i.* from payment_inputs i join payments p on p.id = i.payment_id"
    " where p.order_id = any ($1::uuid[])",
    "captures": "select c.* from captures c join payments p on p.id = c.payment_id where p.order_id = any ($1::uuid[])",
    "refunds": "select * from refunds where order_id = any ($1::uuid[])",
    "ledger": "select * from ledger_rows where order_id = any ($1::uuid[])",
    "lifecycle": "select * from lifecycle_events where order_id = any ($1::uuid[])",
    "audit": "select * from audit where subject = any (select 'payment:' || id from payments"
    " where order_id = any ($1::uuid[]))",
    "jobs": "select entrypoint, payload from jobs.pgqueuer where payload = any (select convert_to(id::text, 'utf8')"
    " from payments where order_id = any ($1::uuid[]))",
}


async def money_of(shop: Shop, *order_ids: str) -> dict[str, list[tuple[Any, ...]]]:
    """Every row that has to do with the money of these orders."""
    return {
        name: sorted(map(tuple, await shop.sql.fetch(query, list(order_ids))), key=repr)
        for name, query in MONEY.items()
    }


async def all_applied(shop: Shop, payment: Body, count: int) -> None:
    """Wait until so many webhooks about the payment have been applied."""

    async def applied() -> bool:
        found: int = await shop.sql.fetchval(
            "select count(*) from webhooks where status = 'applied' and refs && array[$1]", payment["gatewayOrderId"]
        )
        return found >= count

    await until(applied, f"{count} webhooks are applied")


async def order_of(instance: Instance, payment: Body) -> Body:
    order: Body = (await instance.get(f"/orders/{payment['orderId']}")).body
    return order


# paying


async def test_razorpay_from_the_button_to_the_room(shop: Shop) -> None:
    order = await online(shop.a)
    async with Watcher(shop.b, CUSTOMER) as watcher:
        await watcher.watch(order["id"])
        payment = await started(shop.a, order)
        checkout = payment["checkout"]
        assert checkout["gatewayOrderId"] == payment["gatewayOrderId"]
        assert (checkout["amount"], checkout["currency"]) == (25_200, "INR")
        assert checkout["keyId"].startswith("rzp_test_")
        assert checkout["prefill"] == {"name": "Meera", "contact": "+919000090000"}
        # verified at the other instance, which uses the same simulator
        reply = await shop.b.post(f"/payments/{payment['id']}/verify", proof(await pays(payment)), by=CUSTOMER)
        assert (reply.status, reply.body["status"], reply.body["method"]) == (200, "completed", "upi")
        await watcher.hears("paymentUpdate", paymentId=payment["id"], status="completed")
        await watcher.hears("orderStatusUpdate", orderId=order["id"], status="confirmed")
    paid = await order_of(shop.a, payment)
    assert (paid["status"], paid["payment"]["status"], paid["payment"]["due"]) == ("confirmed", "paid", 0)
    refusal(await begin(shop.a, order), 409, "already_paid")
    history = (await shop.a.get(f"/payments/{payment['id']}/history", by=CUSTOMER)).body["items"]
    assert [one["kind"] for one in history][-2:] == ["created", "started"]
    assert history[-1]["actor"] == "customer:c1"
    assert {"client"} < {one["source"] for one in history}
    assert all(set(one) >= {"at", "source", "kind", "after", "detail"} for one in history)


async def test_the_webhook_is_enough(shop: Shop) -> None:
    for provider in ("razorpay", "stripe"):
        payment = await started(shop.a, await online(shop.a), provider)
        waiting = asyncio.create_task(shop.b.get(f"/payments/{payment['id']}?wait=20", by=CUSTOMER))
        await pays(payment)
        reply = await waiting
        assert (reply.status, reply.body["status"] in ("authorized", "completed")) == (200, True), reply
        assert "checkout" not in reply.body
        await becomes(shop.a, payment, status="completed")
        assert (await order_of(shop.b, payment))["status"] == "confirmed"


async def test_stripe_by_asking(shop: Shop) -> None:
    payment = await started(shop.a, await online(shop.a), "stripe")
    assert payment["checkout"]["publishableKey"].startswith("pk_test_")
    assert payment["checkout"]["clientSecret"].startswith(payment["gatewayOrderId"])
    reply = await shop.b.post(f"/payments/{payment['id']}/verify", {}, by=CUSTOMER)
    assert (reply.status, reply.body["status"]) == (200, "pending")
    await sandbox(payment, "/mischief", {"webhooksLost": 10})
    await pays(payment)
    reply = await shop.b.post(f"/payments/{payment['id']}/verify", {}, by=CUSTOMER)
    assert (reply.status, reply.body["status"]) == (200, "completed")
    await sandbox(payment, "/mischief", {"webhooksLost": 0})


async def test_stripe_by_confirming(shop: Shop) -> None:
    back = "https://shop.example/back"
    payment = await started(shop.a, await online(shop.a), "stripe")
    path = f"/payments/{payment['id']}/confirm"
    declined = {"paymentMethodId": "pm_card_chargeDeclined", "returnUrl": back}
    refusal(await shop.a.post(path, declined, by=CUSTOMER), 402, "payment_declined")
    failed = await becomes(shop.a, payment, status="failed")
    assert failed["failure"]["code"] in ("card_declined", "generic_decline")
    reply = await shop.b.post(path, {"paymentMethodId": "pm_card_visa", "returnUrl": back}, by=CUSTOMER)
    assert (reply.status, reply.body["status"]) == (200, "completed"), reply

    payment = await started(shop.a, await online(shop.a), "stripe")
    path = f"/payments/{payment['id']}/confirm"
    asks = {"paymentMethodId": "pm_card_authenticationRequired", "returnUrl": back}
    reply = await shop.a.post(path, asks, by=CUSTOMER)
    assert (reply.status, reply.body["nextAction"]["type"]) == (200, "redirect"), reply
    assert reply.body["nextAction"]["url"].startswith("http")
    await pays(payment, "approve")
    await becomes(shop.b, payment, status="completed")


async def test_a_declined_payment_is_tried_again(shop: Shop) -> None:
    order = await online(shop.a)
    payment = await started(shop.a, order)
    await pays(payment, "fail")
    failed = await becomes(shop.a, payment, status="failed")
    assert failed["failure"].keys() == {"code", "message", "retryable"}
    again = await started(shop.a, order)
    assert again["id"] != payment["id"]
    await pays(again)
    await becomes(shop.a, again, status="completed")
    assert (await order_of(shop.a, again))["status"] == "confirmed"


async def test_a_failed_attempt_that_succeeds_later_counts(shop: Shop) -> None:
    payment = await started(shop.a, await online(shop.a))
    await pays(payment, "pay_late", afterS=0.2)
    await becomes(shop.b, payment, status="completed")
    assert (await order_of(shop.b, payment))["status"] == "confirmed"


async def test_money_for_a_cancelled_order_is_late(shop: Shop) -> None:
    payment = await started(shop.a, await online(shop.a))
    reply = await shop.a.post(f"/orders/{payment['orderId']}/cancel", {"reason": "No"}, by=CUSTOMER)
    assert reply.status == 200
    await pays(payment)
    late = await until(lambda: _captured(shop.b, payment), "the money is booked")
    assert (await order_of(shop.b, payment))["status"] == "cancelled"
    found = await shop.sql.fetchrow(
        "select cause, amount from refunds where payment_id = $1::text::uuid", payment["id"]
    )
    assert tuple(found) == ("late_refunded", 25_200)
    assert late["captured"] == 25_200
    refusal(await begin(shop.a, {"id": payment["orderId"]}), 409, "order_closed")


async def _captured(instance: Instance, payment: Body) -> Body | None:
    found: Body = (await instance.get(f"/payments/{payment['id']}", by=STAFF)).body
    return found if found["captured"] else None


async def test_what_was_authorized_is_captured_by_hand(shop: Shop) -> None:
    for provider in ("razorpay", "stripe"):
        payment = await started(shop.a, await online(shop.a), provider, by=SERVICE, capture="manual")
        path = f"/payments/{payment['id']}/capture"
        whole = {"amount": 25_200, "currency": "INR"}
        refusal(await shop.a.post(path, whole, by=STAFF), 409, "conflict")
        await pays(payment)
        await becomes(shop.b, payment, status="authorized")
        assert (await order_of(shop.a, payment))["payment"]["status"] == "processing"
        refusal(await shop.b.post(path, {"amount": 25_201, "currency": "INR"}, by=STAFF), 422, "amount_mismatch")
        refusal(await shop.b.post(path, {"amount": 25_200, "currency": "USD"}, by=STAFF), 422, "currency_mismatch")
        refusal(await shop.b.post(path, whole, by=CUSTOMER), 403, "forbidden")
        reply = await shop.b.post(path, whole, by=STAFF)
        assert (reply.status, reply.body["status"]) == (200, "completed")
        refusal(await shop.a.post(path, whole, by=STAFF), 409, "money_moved")
        refusal(await shop.a.post(f"/payments/{payment['id']}/cancel", {}, by=STAFF), 409, "money_moved")


async def test_a_payment_that_is_not_wanted_any_more(shop: Shop) -> None:
    order = await online(shop.a)
    card = await started(shop.a, order, "stripe")
    upi = await started(shop.b, order, "razorpay")
    assert (await shop.a.get(f"/payments/{card['id']}", by=CUSTOMER)).body["status"] == "cancelled"
    reply = await shop.a.post(f"/payments/{upi['id']}/cancel", {}, by=CUSTOMER)
    assert (reply.status, reply.body["status"]) == (200, "cancelled")
    third = await started(shop.a, order, "stripe")
    assert (await shop.b.request("DELETE", f"/payments/{third['id']}", by=ADMIN)).status == 204
    assert (await shop.a.get(f"/payments/{third['id']}", by=ADMIN)).body["status"] == "cancelled"
    refusal(await shop.b.request("DELETE", f"/payments/{third['id']}", by=STAFF), 403, "forbidden")


# what goes wrong


async def test_an_unknown_creation_is_carried_on_under_the_same_receipt(shop: Shop, calm: None) -> None:
    """Whether reconciliation is faster or not: it does the same."""
    for provider in ("razorpay", "stripe"):
        any_payment = await started(shop.a, await online(shop.a), provider)
        for fault in ("drop_after", "html_after", "drop"):
            order = await online(shop.a)
            await sandbox(any_payment, "/mischief", {"fault": fault, "faultMethod": "POST", "faultCalls": 1})
            reply = await begin(shop.a, order, provider)
            assert (reply.status, reply.body["status"], reply.body["attention"]) == (202, "unknown", "unknown"), reply
            assert "checkout" not in reply.body
            again = await begin(shop.b, order, provider)
            assert (again.status, again.body["id"], again.body["status"]) == (200, reply.body["id"], "pending"), again
            assert "attention" not in again.body
            await pays(again.body)
            await becomes(shop.a, again.body, status="completed")


async def test_a_gateway_that_refuses_or_is_not_reached_fails_the_payment(shop: Shop, calm: None) -> None:
    any_payment = await started(shop.a, await online(shop.a))
    order = await online(shop.a)
    await sandbox(any_payment, "/mischief", {"fault": "throttle", "faultMethod": "POST"})
    refusal(await begin(shop.a, order, "razorpay"), 502, "gateway_error")
    (failed,) = (await shop.a.get(f"/payments?orderId={order['id']}", by=CUSTOMER)).body["items"]
    assert failed["status"] == "failed"
    assert failed["failure"]["retryable"] is True
    assert (await begin(shop.a, order, "razorpay")).status == 201


async def test_a_gateway_that_does_not_answer_is_not_offered(shop: Shop, calm: None) -> None:
    any_payment = await started(shop.a, await online(shop.a))
    await sandbox(any_payment, "/mischief", {"fault": "html", "faultMethod": "POST", "faultCalls": 1000})
    for _ in range(FAILURES_MAX):  # reconciliation asks too, so it may be open before
        reply = await begin(shop.a, await online(shop.a), "razorpay")
        assert reply.status in (202, 503)
    order = await online(shop.a)
    refusal(await begin(shop.a, order, "razorpay"), 503, "unavailable")
    assert await shop.sql.fetchval("select count(*) from payments where order_id = $1::text::uuid", order["id"]) == 0
    other = await begin(shop.a, order)
    assert (other.status, other.body["provider"]) == (201, "stripe"), "the others are offered"
    await sandbox(any_payment, "/mischief", {"fault": None})


async def test_a_proof_is_kept_while_the_gateway_does_not_say(shop: Shop, calm: None) -> None:
    payment = await started(shop.a, await online(shop.a))
    await sandbox(payment, "/mischief", {"webhooksLost": 10})
    handed = await pays(payment)
    await sandbox(payment, "/mischief", {"fault": "html", "faultMethod": "GET", "faultCalls": 1})
    reply = await shop.a.post(f"/payments/{payment['id']}/verify", proof(handed), by=CUSTOMER)
    assert (reply.status, reply.body["status"]) == (202, "processing")
    assert (await order_of(shop.b, payment))["payment"]["status"] == "processing"
    reply = await shop.b.post(f"/payments/{payment['id']}/reconcile", {}, by=STAFF)
    assert (reply.status, reply.body["status"]) == (200, "completed")
    await sandbox(payment, "/mischief", {"webhooksLost": 0})


# once


async def test_a_key_begins_one_payment_and_replays_its_answer(shop: Shop) -> None:
    for provider in ("razorpay", "stripe"):
        order, key = await online(shop.a), {"Idempotency-Key": str(uuid.uuid4())}
        replies = [await begin(one, order, provider, headers=key) for one in (shop.a, shop.b, shop.a)]
        assert [reply.status for reply in replies] == [201] * 3
        assert replies[0].body == replies[1].body == replies[2].body
        assert replies[0].body["checkout"]
        refusal(await begin(shop.b, order, provider, headers=key, description="Other"), 422, "idempotency_mismatch")
        payment = replies[0].body
        await pays(payment)
        await becomes(shop.a, payment, status="completed")
        after = await begin(shop.b, order, provider, headers=key)
        assert (after.status, after.body["id"]) == (201, payment["id"])
        assert "checkout" not in after.body, "there is nothing to pay any more"
        stored = "\n".join((await everything(shop.sql)).values())
        assert payment["id"] in stored
        if provider == "stripe":
            assert payment["checkout"]["clientSecret"] not in stored


async def test_a_refusal_under_a_key_is_judged_anew(shop: Shop) -> None:
    key = {"Idempotency-Key": str(uuid.uuid4())}
    payment = await started(shop.a, await online(shop.a), by=SERVICE, capture="manual")
    path, whole = f"/payments/{payment['id']}/capture", {"amount": 25_200, "currency": "INR"}
    refusal(await shop.a.post(path, whole, by=STAFF, headers=key), 409, "conflict")
    await pays(payment)
    await becomes(shop.a, payment, status="authorized")
    done = await shop.b.post(path, whole, by=STAFF, headers=key)
    assert done.status == 200
    again = await shop.a.post(path, whole, by=STAFF, headers=key)
    assert (again.status, again.body) == (200, done.body)


async def test_a_storm_of_starts_is_one_payment(shop: Shop) -> None:
    order = await online(shop.a)
    replies = await asyncio.gather(*(begin((shop.a, shop.b)[n % 2], order) for n in range(10)))
    assert {reply.status for reply in replies} <= {200, 201}, replies
    assert len({reply.body["id"] for reply in replies}) == 1
    assert len({reply.body["gatewayOrderId"] for reply in replies}) == 1


# reading


async def test_lists_show_everybody_their_own(shop: Shop) -> None:
    customer = f"c-{uuid.uuid4()}"
    by = token("customer", customer)
    mine = [await started(shop.a, await online(shop.a, customerId=customer), by=by) for _ in range(3)]
    card = await started(shop.a, await online(shop.a, customerId=customer), "stripe", by=by)
    newest_first = [card["id"], *(one["id"] for one in reversed(mine))]
    listed = (await shop.b.get("/payments", by=by)).body
    assert [one["id"] for one in listed["items"]] == newest_first
    assert listed["nextCursor"] is None
    assert (await shop.b.get("/payments", by=token("customer", "nobody"))).body["items"] == []
    page = (await shop.b.get("/payments?limit=3", by=by)).body
    rest = (await shop.b.get(f"/payments?limit=3&cursor={page['nextCursor']}", by=by)).body
    assert [one["id"] for one in page["items"] + rest["items"]] == newest_first
    for query, found in (
        ("provider=stripe", [card["id"]]),
        (f"orderId={card['orderId']}", [card["id"]]),
        ("status=completed", []),
        ("method=upi", []),
        ("attention=late", []),
        ("from=2999-01-01T00:00:00Z", []),
        ("to=2999-01-01T00:00:00Z", newest_first),
    ):
        items = (await shop.a.get(f"/payments?customerId={customer}&{query}", by=STAFF)).body["items"]
        assert [one["id"] for one in items] == found, query
    link = (await shop.a.post(f"/orders/{card['orderId']}/payment-link", {})).body
    assert [x["id"] for x in (await shop.a.get("/payments", by=link["token"])).body["items"]] == [card["id"]]
    export = await shop.a.get(f"/payments.csv?customerId={customer}", by=STAFF)
    rows = list(csv.DictReader(io.StringIO(export.body.decode())))
    assert [row["id"] for row in rows] == newest_first
    assert rows[0]["amount"] == "25200"
    refusal(await shop.a.get("/payments.csv", by=SERVICE), 403, "forbidden")
    refusal(await shop.a.get("/payments", by=AGENT), 403, "forbidden")


async def test_a_history_is_read_in_pages(shop: Shop) -> None:
    payment = await started(shop.a, await online(shop.a))
    await pays(payment)
    await all_applied(shop, payment, 3)
    path = f"/payments/{payment['id']}/history"
    whole = (await shop.a.get(f"{path}?limit=200", by=STAFF)).body["items"]
    first = (await shop.a.get(f"{path}?limit=1", by=STAFF)).body
    rest = (await shop.a.get(f"{path}?limit=1&cursor={first['nextCursor']}", by=STAFF)).body
    assert first["items"] + rest["items"] == whole[:2]
    assert whole[-1] == {**whole[-1], "kind": "started", "source": "client", "after": "pending"}
    assert "before" not in whole[-1]


async def test_annotations(shop: Shop) -> None:
    payment = await started(shop.a, await online(shop.a))
    path = f"/payments/{payment['id']}"
    reply = await shop.b.request("PATCH", path, {"description": "Table 7", "metadata": {"a": "1"}})
    assert (reply.status, reply.body["description"], reply.body["metadata"]) == (200, "Table 7", {"a": "1"})
    refusal(await shop.b.request("PATCH", path, {"description": "x"}, by=STAFF), 403, "forbidden")
    refusal(await shop.b.request("PATCH", path, {"amount": 1}), 422, "invalid", "/amount")


async def test_a_long_poll_holds_no_connection_and_ends_with_the_instance(fleet: Fleet) -> None:
    instance = await fleet.start(DB_POOL_SIZE="2")
    payments = [await started(instance, await online(instance)) for _ in range(4)]
    waiting = [asyncio.create_task(instance.get(f"/payments/{one['id']}?wait=25", by=CUSTOMER)) for one in payments]
    sql = await asyncpg.connect(fleet.database_url)

    async def waits() -> bool:
        text = (await instance.get("/metrics", by=None)).body.decode()
        return 'waybill_db_connections{state="busy"} 0.0' in text

    await until(waits, "nobody holds a connection")
    await pays(payments[0])
    assert (await waiting[0]).body["status"] == "completed"
    stopping = asyncio.create_task(instance.stop())
    for task in waiting[1:]:
        assert (await task).body["status"] == "pending"
    assert await stopping == 0
    await sql.close()


# who is offered what


async def test_web_alone_offers_no_simulator(fleet: Fleet) -> None:
    instance = await fleet.start("web")
    order = await online(instance)
    refusal(await begin(instance, order), 503, "unavailable")
    refusal(await begin(instance, order, "razorpay"), 503, "unavailable")


# bad input


def bad_starts(order: Body) -> list[tuple[Any, int, str]]:
    money = {"amount": 25_200, "currency": "INR"}
    return [
        ({}, 422, "invalid"),
        ({"orderId": "x"}, 404, "not_found"),
        ({"orderId": str(uuid.uuid4())}, 404, "not_found"),
        ({"orderId": 5}, 422, "invalid"),
        ({"orderId": order["id"], "provider": "paypal"}, 422, "invalid"),
        ({"orderId": order["id"], "provider": "cash"}, 422, "invalid"),
        ({"orderId": order["id"], "amount": 25_200}, 422, "invalid"),
        ({"orderId": order["id"], **money, "amount": 1}, 422, "amount_mismatch"),
        ({"orderId": order["id"], **money, "amount": 25_201}, 422, "amount_mismatch"),
        ({"orderId": order["id"], **money, "amount": -25_200}, 422, "invalid"),
        ({"orderId": order["id"], **money, "amount": 0}, 422, "invalid"),
        ({"orderId": order["id"], **money, "amount": 252.5}, 422, "invalid"),
        ({"orderId": order["id"], **money, "amount": 10**30}, 422, "invalid"),
        ({"orderId": order["id"], **money, "amount": "25200"}, 422, "invalid"),
        ({"orderId": order["id"], **money, "amount": True}, 422, "invalid"),
        ({"orderId": order["id"], **money, "amount": None}, 422, "invalid"),
        ({"orderId": order["id"], **money, "currency": "USD"}, 422, "currency_mismatch"),
        ({"orderId": order["id"], **money, "currency": "inr"}, 422, "invalid"),
        ({"orderId": order["id"], **money, "currency": "₹"}, 422, "invalid"),
        ({"orderId": order["id"], "capture": "manual"}, 403, "forbidden"),
        ({"orderId": order["id"], "capture": "never"}, 422, "invalid"),
        ({"orderId": order["id"], "returnUrl": "javascript:alert(1)"}, 422, "invalid"),
        ({"orderId": order["id"], "returnUrl": "//shop.example"}, 422, "invalid"),
        ({"orderId": order["id"], "metadata": {"a": 1}}, 422, "invalid"),
        ({"orderId": order["id"], "metadata": {str(n): "" for n in range(16)}}, 422, "invalid"),
        ({"orderId": order["id"], "description": "\0"}, 422, "invalid"),
        ({"orderId": order["id"], "status": "completed"}, 422, "invalid"),
        ([], 422, "invalid"),
        ("text", 422, "invalid"),
    ]


async def test_bad_starts_change_nothing(shop: Shop) -> None:
    order = await online(shop.a)
    before = await money_of(shop, order["id"])
    for n, (body, status, code) in enumerate(bad_starts(order)):
        key = {"Idempotency-Key": str(uuid.uuid4())} if n % 2 else {}
        refusal(await shop.a.post("/payments", body, by=CUSTOMER, headers=key), status, code)
    refusal(await shop.a.post("/payments", {"orderId": order["id"]}, by=STRANGER), 404, "not_found")
    refusal(await shop.a.post("/payments", {"orderId": order["id"]}, by=AGENT), 403, "forbidden")
    refusal(await shop.a.post("/payments", {"orderId": order["id"]}, by=None), 401, "unauthenticated")
    refusal(await shop.a.post("/payments", raw=b"{", by=CUSTOMER), 400, "malformed")
    refusal(await shop.a.post("/payments", raw=b"\xff{}", by=CUSTOMER), 400, "malformed")
    big = json.dumps({"orderId": order["id"], "description": "x" * 300_000}).encode()
    refusal(await shop.a.post("/payments", raw=big, by=CUSTOMER), 413, "too_large")
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    refusal(await shop.a.post("/payments", raw=b"orderId=1", headers=form), 415, "unsupported_media")
    assert await money_of(shop, order["id"]) == before


async def test_bad_requests_about_a_payment_change_nothing(shop: Shop) -> None:
    payment = await started(shop.a, await online(shop.a))
    other = await started(shop.a, await online(shop.a))
    card = await started(shop.a, await online(shop.a), "stripe")
    theirs = proof(await pays(other))
    await becomes(shop.a, other, status="completed")
    await all_applied(shop, other, 3)
    right = {**theirs, "razorpayOrderId": payment["gatewayOrderId"]}
    money = {"amount": 25_200, "currency": "INR"}
    confirm = {"paymentMethodId": "pm_card_visa", "returnUrl": "https://shop.example"}
    mine, nobody = f"/payments/{payment['id']}", f"/payments/{uuid.uuid4()}"
    cases: list[tuple[str, str, Any, str, int, str]] = [
        ("POST", f"{mine}/verify", theirs, CUSTOMER, 422, "invalid_signature"),
        ("POST", f"{mine}/verify", right, CUSTOMER, 422, "invalid_signature"),
        ("POST", f"{mine}/verify", {**right, "razorpaySignature": "ü"}, CUSTOMER, 422, "invalid_signature"),
        ("POST", f"{mine}/verify", {**right, "razorpaySignature": ""}, CUSTOMER, 422, "invalid"),
        ("POST", f"{mine}/verify", {**right, "razorpayPaymentId": "pay ü"}, CUSTOMER, 422, "invalid"),
        ("POST", f"{mine}/verify", {**right, "razorpayPaymentId": None}, CUSTOMER, 422, "invalid"),
        ("POST", f"{mine}/verify", {}, CUSTOMER, 422, "invalid"),
        ("POST", f"{mine}/verify", {**right, "more": 1}, CUSTOMER, 422, "invalid"),
        ("POST", f"{mine}/verify", right, SERVICE, 403, "forbidden"),
        ("POST", f"{mine}/verify", right, STRANGER, 404, "not_found"),
        ("POST", f"{nobody}/verify", right, CUSTOMER, 404, "not_found"),
        ("POST", f"/payments/{card['id']}/verify", right, CUSTOMER, 422, "invalid"),
        ("POST", f"{mine}/confirm", confirm, CUSTOMER, 422, "invalid"),
        ("POST", f"/payments/{card['id']}/confirm", {**confirm, "returnUrl": "ftp://x"}, CUSTOMER, 422, "invalid"),
        ("POST", f"/payments/{card['id']}/confirm", {**confirm, "paymentMethodId": ""}, CUSTOMER, 422, "invalid"),
        ("POST", f"/payments/{card['id']}/confirm", {"paymentMethodId": "pm_1"}, CUSTOMER, 422, "invalid"),
        ("POST", f"/payments/{card['id']}/confirm", confirm, STAFF, 403, "forbidden"),
        ("POST", f"{mine}/capture", money, CUSTOMER, 403, "forbidden"),
        ("POST", f"{mine}/capture", money, STAFF, 409, "conflict"),
        ("POST", f"{mine}/capture", {"amount": 25_200}, STAFF, 422, "invalid"),
        ("POST", f"{mine}/capture", {**money, "amount": -1}, STAFF, 422, "invalid"),
        ("POST", f"{mine}/capture", {**money, "amount": 1.5}, STAFF, 422, "invalid"),
        ("POST", f"{mine}/capture", {}, STAFF, 422, "invalid"),
        ("POST", f"/payments/{other['id']}/capture", money, STAFF, 409, "money_moved"),
        ("POST", f"/payments/{other['id']}/cancel", {}, CUSTOMER, 409, "money_moved"),
        ("POST", f"{mine}/cancel", {"now": True}, CUSTOMER, 422, "invalid"),
        ("POST", f"{mine}/cancel", {}, STRANGER, 404, "not_found"),
        ("POST", f"{mine}/cancel", {}, AGENT, 403, "forbidden"),
        ("POST", f"{mine}/reconcile", {}, SERVICE, 403, "forbidden"),
        ("POST", f"{mine}/reconcile", {}, CUSTOMER, 403, "forbidden"),
        ("POST", f"{nobody}/reconcile", {}, STAFF, 404, "not_found"),
        ("PATCH", mine, {"metadata": {"a": None}}, SERVICE, 422, "invalid"),
        ("PATCH", mine, {"status": "completed"}, ADMIN, 422, "invalid"),
        ("PATCH", mine, {"description": "x"}, CUSTOMER, 403, "forbidden"),
        ("PATCH", nobody, {"description": "x"}, SERVICE, 404, "not_found"),
        ("DELETE", f"/payments/{other['id']}", None, ADMIN, 409, "money_moved"),
        ("DELETE", mine, None, SERVICE, 403, "forbidden"),
        ("DELETE", nobody, None, ADMIN, 404, "not_found"),
        ("GET", mine, None, STRANGER, 404, "not_found"),
        ("GET", mine, None, AGENT, 403, "forbidden"),
        ("GET", f"{mine}?wait=-1", None, CUSTOMER, 422, "invalid"),
        ("GET", f"{mine}?wait=x", None, CUSTOMER, 422, "invalid"),
        ("GET", nobody, None, STAFF, 404, "not_found"),
        ("GET", f"/payments/{'-' * 36}", None, STAFF, 404, "not_found"),
        ("GET", f"{mine}/history", None, STRANGER, 404, "not_found"),
        ("GET", f"{mine}/history?cursor=x", None, STAFF, 422, "invalid"),
        ("GET", f"{mine}/history?limit=0", None, STAFF, 422, "invalid"),
        ("GET", "/payments?limit=201", None, STAFF, 422, "invalid"),
        ("GET", "/payments?orderId=x", None, STAFF, 422, "invalid"),
        ("GET", "/payments?status=done", None, STAFF, 422, "invalid"),
        ("GET", "/payments?provider=paypal", None, STAFF, 422, "invalid"),
        ("GET", "/payments?cursor=zzz", None, STAFF, 422, "invalid"),
        ("GET", "/payments?from=yesterday", None, STAFF, 422, "invalid"),
        ("GET", "/payments?colour=red", None, STAFF, 422, "invalid"),
        ("GET", "/payments.csv?limit=5", None, STAFF, 422, "invalid"),
    ]
    ids = [one["orderId"] for one in (payment, other, card)]
    before = await money_of(shop, *ids)
    for method, path, body, by, status, code in cases:
        reply = await shop.b.request(method, path, body, by=by)
        assert (reply.status, reply.code) == (status, code), (method, path, body, reply)
    assert await money_of(shop, *ids) == before
