"""What happens to orders and payments when nobody tells us anything: through a whole process and its simulator."""

from __future__ import annotations

import datetime as dt
from typing import Any

import aiohttp

from tests.harness import Fleet, Instance, token, until

QUICK: dict[str, Any] = {"SWEEP_INTERVAL_S": "1", "RECONCILE_AFTER_S": "1"}


async def order_of(shop: Instance, **changes: Any) -> dict[str, Any]:
    return await shop.place(paymentMethod="online", **changes)


async def status_of(shop: Instance, order: dict[str, Any]) -> str:
    reply = await shop.get(f"/orders/{order['id']}")
    return str(reply.body["status"])


async def test_an_order_that_nobody_pays_expires(fleet: Fleet) -> None:
    shop = await fleet.start("all", PAYMENT_EXPIRY_S="1", **QUICK)
    order = await order_of(shop)

    async def expired() -> bool:
        return await status_of(shop, order) == "cancelled"

    await until(expired, "the sweep has cancelled it")
    reply = await shop.get(f"/orders/{order['id']}")
    assert reply.body["statusReason"] == "expired"


async def test_a_payment_that_no_webhook_told_of_is_reconciled(fleet: Fleet) -> None:
    shop = await fleet.start("all", **QUICK)
    order = await order_of(shop)
    started = await shop.post("/payments", {"orderId": order["id"], "provider": "razorpay"})
    assert started.status == 201, started
    checkout = started.body["checkout"]
    gateway, name = checkout["url"].rsplit("/checkout/", 1)
    async with aiohttp.ClientSession() as payer:
        await payer.post(f"{gateway}/sandbox/mischief", json={"webhooksLost": 1000})
        begun = await (await payer.post(f"{gateway}/sandbox/orders/{name}/begin")).json()
        # the browser says that it has begun, and is never heard of again
        claimed = await shop.post(f"/payments/{started.body['id']}/reconcile", {}, by=token("staff", "s1"))
        assert claimed.body["status"] == "processing"
        await payer.post(f"{gateway}/sandbox/payments/{begun['id']}/finish")

    async def confirmed() -> bool:
        return await status_of(shop, order) == "confirmed"

    await until(confirmed, "reconciliation has asked the gateway", within_s=20)


async def test_the_books_of_a_day_are_compared_on_demand(fleet: Fleet) -> None:
    shop = await fleet.start("all")
    yesterday = (dt.datetime.now(dt.UTC).date() - dt.timedelta(days=1)).isoformat()
    for provider in ("razorpay", "stripe"):
        reply = await shop.get(f"/reconciliation/{yesterday}?provider={provider}", by=token("admin", "x1"))
        assert reply.status == 200, reply
        assert (reply.body["provider"], reply.body["ours"], reply.body["theirs"]) == (provider, [], [])
        assert reply.body["differences"] == []
    reply = await shop.get(f"/reconciliation/{yesterday}", by=token("admin", "x1"))
    assert reply.body["provider"] == "razorpay"
