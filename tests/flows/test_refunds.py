"""Refunds through the REST door, with Razorpay's simulator: the story, what goes wrong at the gateway, and a killed
server."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import aiohttp
import pytest

from server.adapters.sandbox.mischief import Fault
from server.adapters.sandbox.razorpay import RazorpaySandbox
from server.embedded import DataServers
from tests.harness import Fleet, Instance, Reply, free_port, token, until
from tests.shared import refusal, shared_fleet

TOTAL = 25_200
ADMIN, STAFF, CUSTOMER = token("admin", "x1"), token("staff", "s1"), token("customer", "c1")
KEYS = ("rzp_test_refunds", "a-key-secret", "a-webhook-secret")


class Shop:
    """A fleet and the simulator that it calls; the simulator outlives every server."""

    def __init__(self, fleet: Fleet, sandbox: RazorpaySandbox) -> None:
        self.fleet, self.sandbox = fleet, sandbox

    async def start(self) -> Instance:
        port = free_port()
        self.sandbox.courier.url = f"http://127.0.0.1:{port}/api/v1/webhooks/razorpay"
        self.instance = await self.fleet.start(
            PORT=str(port),
            RAZORPAY_KEY_ID=KEYS[0],
            RAZORPAY_KEY_SECRET=KEYS[1],
            RAZORPAY_WEBHOOK_SECRET=KEYS[2],
            RAZORPAY_API_URL=self.sandbox.url,
            GATEWAY_TIMEOUT_MS="1000",
            REFUND_ASK_AFTER_S="1",
            STAFF_REFUND_MAX_MINOR="10000",
        )
        return self.instance

    async def paid(self, **changes: Any) -> Paid:
        """A completed payment of a new order."""
        order = await self.instance.place(paymentMethod="online", **changes)
        started = await self.instance.post("/payments", {"orderId": order["id"], "provider": "razorpay"}, by=CUSTOMER)
        assert started.status == 201, started
        self.sandbox.pay(started.body["gatewayOrderId"])
        payment_id = started.body["id"]

        async def completed() -> Any:
            reply = await self.instance.get(f"/payments/{payment_id}")
            return reply.body if reply.body["status"] == "completed" else None

        payment = await until(completed, "the payment is completed")
        return Paid(order["id"], payment_id, payment["gatewayPaymentId"])

    async def refund(self, paid: Paid, by: str = ADMIN, key: str | None = None, **members: Any) -> Reply:
        headers = {"Idempotency-Key": key} if key else {}
        body = {"reason": "Cold", **members}
        return await self.instance.post(f"/payments/{paid.payment_id}/refunds", body, by=by, headers=headers)

    async def settled(self, refund_id: str) -> Any:
        reply = await self.instance.get(f"/refunds/{refund_id}?wait=10")
        assert reply.status == 200, reply
        return reply.body

    def made(self, paid: Paid) -> list[Any]:
        """The refunds that the gateway knows of."""
        return list(self.sandbox.books.refunds_of(paid.gateway_payment_id))


class Paid(NamedTuple):
    order_id: str
    payment_id: str
    gateway_payment_id: str


@pytest.fixture(scope="module")
async def shop(data: DataServers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    sandbox = RazorpaySandbox(*KEYS, pace=0.05, seed=1)
    await sandbox.start()
    try:
        async with shared_fleet(data, tmp_path_factory.mktemp("refunds")) as fleet:
            shop = Shop(fleet, sandbox)
            await shop.start()
            yield shop
    finally:
        await sandbox.stop()


@pytest.fixture(autouse=True)
def well_behaved(shop: Shop) -> None:
    """The simulator's mischief ends with its test."""
    mischief = shop.sandbox.mischief
    mischief.fault, mischief.refunds, mischief.webhooks_lost = None, "processed", 0


async def test_the_story_of_a_refund(shop: Shop) -> None:
    paid = await shop.paid()
    one = await shop.refund(paid, STAFF, "k1", amount=5000, currency="INR")
    assert one.status == 201, one
    assert one.body == {
        "id": one.body["id"],
        "paymentId": paid.payment_id,
        "orderId": paid.order_id,
        "amount": 5000,
        "currency": "INR",
        "status": "succeeded",
        "reason": "Cold",
        "channel": "original",
        "createdAt": one.body["createdAt"],
        "settledAt": one.body["settledAt"],
    }
    again = await shop.refund(paid, STAFF, "k1", amount=5000, currency="INR")
    assert (again.status, again.body) == (201, one.body)
    refusal(await shop.refund(paid, STAFF, "k1", amount=5001, currency="INR"), 422, "idempotency_mismatch")
    refusal(await shop.refund(paid, STAFF, amount=10_001, currency="INR"), 403, "approval_required")
    refusal(await shop.refund(paid, CUSTOMER, amount=1, currency="INR"), 403, "forbidden")
    refusal(await shop.refund(paid, amount=0, currency="INR"), 422, "invalid", "/amount")
    refusal(await shop.refund(paid, restock=True), 422, "invalid", "/restock")
    refusal(await shop.refund(paid, amount=1, currency="USD"), 422, "currency_mismatch")
    refused = await shop.refund(paid, amount=TOTAL, currency="INR")
    refusal(refused, 409, "not_refundable")
    assert refused.body["refundable"] == TOTAL - 5000
    rest = await shop.instance.post(
        f"/orders/{paid.order_id}/refunds", {"reason": "Never came", "cancelOrder": True}, by=ADMIN
    )
    assert (rest.status, [item["amount"] for item in rest.body["items"]]) == (201, [TOTAL - 5000])
    order = (await shop.instance.get(f"/orders/{paid.order_id}", by=CUSTOMER)).body
    assert (order["status"], order["payment"]["status"], order["payment"]["refunded"]) == (
        "cancelled",
        "refunded",
        TOTAL,
    )
    listed = await shop.instance.get(f"/payments/{paid.payment_id}/refunds", by=CUSTOMER)
    assert listed.body == {"items": [*rest.body["items"], one.body], "nextCursor": None}
    refusal(await shop.instance.post(f"/refunds/{one.body['id']}/retry", {}, by=STAFF), 409, "money_moved")
    events = (await shop.instance.get(f"/orders/{paid.order_id}/events")).body["events"]
    told = [one["data"]["refunded"] for one in events if one["type"] == "paymentUpdate"]
    assert told[-2:] == [5000, TOTAL]
    assert [one["amount"] for one in shop.made(paid)] == [TOTAL - 5000, 5000]


async def test_a_refund_that_fails_on_purpose_stays_due_until_it_is_settled_by_hand(shop: Shop) -> None:
    paid = await shop.paid()
    failed = await shop.refund(paid, amount=2468, currency="INR")
    assert (failed.status, failed.body["status"]) == (201, "failed"), failed
    due = await shop.instance.get("/refunds?status=failed", by=STAFF)
    assert [one["id"] for one in due.body["items"]] == [failed.body["id"]]
    payment = (await shop.instance.get(f"/payments/{paid.payment_id}")).body
    assert (payment["refunded"], payment["refundable"]) == (0, TOTAL - 2468)
    retry = f"/refunds/{failed.body['id']}/retry"
    again = await shop.instance.post(retry, {}, by=STAFF)
    assert (again.status, again.body["status"]) == (200, "failed")
    assert len(shop.made(paid)) == 2, "another attempt is another refund for the gateway"
    refusal(await shop.instance.post(retry, {"channel": "manual"}, by=STAFF), 422, "invalid", "/reference")
    done = await shop.instance.post(retry, {"channel": "manual", "reference": "NEFT 1"}, by=STAFF)
    assert (done.status, done.body["status"], done.body["reference"]) == (200, "succeeded", "NEFT 1")
    assert (await shop.instance.get("/refunds?status=failed", by=STAFF)).body["items"] == []


async def test_who_waits_hears_of_a_pending_refund_by_webhook(shop: Shop) -> None:
    paid = await shop.paid()
    for succeeds, status in ((True, "succeeded"), (False, "failed")):
        shop.sandbox.mischief.refunds = "pending"
        pending = await shop.refund(paid, amount=1000, currency="INR")
        assert (pending.status, pending.body["status"]) == (201, "processing"), pending
        waiting = asyncio.create_task(shop.settled(pending.body["id"]))
        shop.sandbox.settle_refund(shop.made(paid)[0]["id"], succeeds)
        assert (await waiting)["status"] == status


@pytest.mark.parametrize("fault", [Fault.DROP_AFTER, Fault.HTML_AFTER, Fault.HTML, Fault.DROP])
async def test_an_outcome_that_is_unknown_is_found_out_by_the_job(shop: Shop, fault: Fault) -> None:
    paid = await shop.paid()
    mischief = shop.sandbox.mischief
    mischief.fault, mischief.fault_method, mischief.webhooks_lost = fault, "POST", 10
    open_ = await shop.refund(paid, key=f"found out {fault}")
    assert open_.status == 202, open_
    assert open_.body["status"] in ("pending", "processing")
    done = await shop.settled(open_.body["id"])
    assert done["status"] == "succeeded"
    assert [one["amount"] for one in shop.made(paid)] == [TOTAL]
    again = await shop.refund(paid, key=f"found out {fault}")
    assert (again.status, again.body["id"], again.body["status"]) == (201, done["id"], "succeeded")


@pytest.mark.parametrize("fault", [Fault.HANG, Fault.HANG_AFTER])
async def test_a_server_that_is_killed_during_the_call_gives_back_once(shop: Shop, fault: Fault) -> None:
    paid = await shop.paid()
    mischief = shop.sandbox.mischief
    mischief.fault, mischief.fault_method = fault, "POST"
    asking = asyncio.create_task(shop.refund(paid, key=f"killed {fault}"))
    await until(lambda: mischief.fault is None, "the gateway was asked")
    if fault is Fault.HANG_AFTER:
        await until(lambda: shop.made(paid), "the gateway has done it")
    shop.instance.kill()
    with pytest.raises(aiohttp.ClientError):
        await asking
    await shop.start()
    (refund,) = (await shop.instance.get(f"/payments/{paid.payment_id}/refunds")).body["items"]
    assert (await shop.settled(refund["id"]))["status"] == "succeeded"
    assert [one["amount"] for one in shop.made(paid)] == [TOTAL]
    again = await shop.refund(paid, key=f"killed {fault}")
    assert (again.status, again.body["id"]) == (201, refund["id"])
    payment = (await shop.instance.get(f"/payments/{paid.payment_id}")).body
    assert (payment["status"], payment["refunded"], payment["refundable"]) == ("refunded", TOTAL, 0)


async def test_refunds_that_race_give_back_no_more_than_came(shop: Shop) -> None:
    paid = await shop.paid()
    replies = await asyncio.gather(
        *(shop.refund(paid, amount=4000, currency="INR") for _ in range(12)),
        *(shop.instance.post(f"/orders/{paid.order_id}/refunds", {"reason": "All"}, by=ADMIN) for _ in range(3)),
    )
    assert {reply.status for reply in replies} == {201, 409}
    back = sum(one["amount"] for one in shop.made(paid))
    assert back == TOTAL
    assert (await shop.instance.get(f"/payments/{paid.payment_id}")).body["status"] == "refunded"


async def test_nothing_is_there_for_a_wrong_id(shop: Shop) -> None:
    nobody = str(uuid.uuid4())
    for method, path in (
        ("GET", f"/refunds/{nobody}"),
        ("GET", f"/payments/{nobody}/refunds"),
        ("POST", f"/refunds/{nobody}/retry"),
        ("POST", f"/payments/{nobody}/refunds"),
        ("POST", f"/orders/{nobody}/refunds"),
    ):
        body = {"reason": "x"} if path.endswith("refunds") and method == "POST" else {} if method == "POST" else None
        refusal(await shop.instance.request(method, path, body, by=ADMIN), 404, "not_found")
