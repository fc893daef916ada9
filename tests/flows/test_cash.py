"""Cash through the real door: taken at the table and at the door, told to the room, handed over and reported."""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import asyncpg
import pytest
from yarl import URL

from server.embedded import DataServers
from tests.harness import SERVICE, Fleet, Instance, Reply, Watcher, token
from tests.shared import everything, refusal, shared_fleet

STAFF, ADMIN = token("staff", "s1"), token("admin", "x1")


@pytest.fixture(scope="module")
async def fleet(data: DataServers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    async with shared_fleet(data, tmp_path_factory.mktemp("cash")) as fleet:
        yield fleet


@pytest.fixture(scope="module")
async def pair(fleet: Fleet) -> tuple[Instance, Instance]:
    return await fleet.pair()


@pytest.fixture
async def sql(fleet: Fleet) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(fleet.database_url)
    yield connection
    await connection.close()


def rider() -> str:
    """An agent of this test's own."""
    return f"rider-{uuid.uuid4().hex[:8]}"


async def out_for_delivery(instance: Instance, agent_id: str, **changes: Any) -> str:
    order = await instance.place(paymentMethod="cash", **changes)
    await instance.assign(order["id"], agent_id)
    await instance.move(order["id"], "confirmed", "preparing", "ready", "out_for_delivery")
    return str(order["id"])


def cash(order_id: str, amount: Any = 25_200, **more: Any) -> dict[str, Any]:
    return {"orderId": order_id, "amount": amount, "currency": "INR", **more}


async def test_cash_at_the_door_is_heard_delivered_carried_and_handed_over(pair: tuple[Instance, Instance]) -> None:
    here, there = pair
    agent_id = rider()
    agent = token("agent", agent_id)
    order_id = await out_for_delivery(here, agent_id)
    refusal(await here.post(f"/orders/{order_id}/status", {"status": "delivered"}, by=agent), 409, "payment_required")
    key = {"Idempotency-Key": str(uuid.uuid4())}
    async with Watcher(there, token("customer", "c1")) as watcher:
        await watcher.watch(order_id)
        began = dt.datetime.now(dt.UTC)
        taken = await here.post("/payments/cash", cash(order_id, tendered=30_000), by=agent, headers=key)
        assert taken.status == 201
        heard = await watcher.hears("paymentUpdate", status="completed")
    payment = taken.body
    assert (heard["paymentId"], heard["amount"], heard["provider"]) == (payment["id"], 25_200, "cash")
    assert (heard["payment"]["status"], heard["payment"]["due"]) == ("paid", 0)
    assert (payment["status"], payment["change"], payment["confirmedBy"]) == ("completed", 4_800, agent_id)
    assert began - dt.timedelta(seconds=1) < dt.datetime.fromisoformat(payment["completedAt"])

    again = await there.post("/payments/cash", cash(order_id, tendered=30_000), by=agent, headers=key)
    assert (again.status, again.body) == (201, payment), "the same key is the same cash"
    refusal(await there.post("/payments/cash", cash(order_id), by=agent, headers=key), 422, "idempotency_mismatch")
    refusal(await there.post("/payments/cash", cash(order_id, tendered=30_000), by=agent), 409, "already_paid")
    assert (await here.post(f"/orders/{order_id}/status", {"status": "delivered"}, by=agent)).status == 200

    carried = (await there.get(f"/cash/agents/{agent_id}", by=agent)).body
    assert (carried["currency"], carried["balance"]) == ("INR", 25_200)
    assert [(one["kind"], one["amount"], one["orderId"]) for one in carried["entries"]] == [("cash", 25_200, order_id)]
    handed = {"agentId": agent_id, "amount": 25_000, "currency": "INR", "note": "two notes short"}
    handover = await here.post("/cash/handovers", handed, by=STAFF, headers=key)
    assert (handover.status, handover.body["expected"], handover.body["difference"]) == (201, 25_200, -200)
    assert (await there.post("/cash/handovers", handed, by=STAFF, headers=key)).body == handover.body
    assert (await here.get(f"/cash/agents/{agent_id}?currency=INR", by=STAFF)).body["balance"] == 200

    logged = (await there.get(f"/audit?subject=payment:{payment['id']}", by=ADMIN)).body["items"]
    assert [(one["action"], one["actor"]) for one in logged] == [("payment.cash", f"agent:{agent_id}")]
    assert logged[0]["requestId"] == taken.headers["X-Request-Id"]
    logged = (await there.get(f"/audit?subject=agent:{agent_id}", by=ADMIN)).body["items"]
    assert [one["after"]["balance"] for one in logged] == [200]


async def test_the_table_pays_in_coins_that_exist(pair: tuple[Instance, Instance]) -> None:
    here, there = pair
    items = [{"name": "Tea", "quantity": 1, "unitPrice": 25_249}]
    order = await here.place(fulfilment="dine_in", table="7", paymentMethod="cash", items=items)
    refusal(await there.post("/payments/cash", cash(order["id"], 25_249), by=STAFF), 422, "amount_mismatch")
    taken = await there.post("/payments/cash", cash(order["id"], 25_200), by=STAFF)
    assert (taken.status, taken.body["amount"], "change" in taken.body) == (201, 25_200, False)
    paid = (await here.get(f"/orders/{order['id']}")).body["payment"]
    assert (paid["status"], paid["due"]) == ("paid", 0)
    balance = (await here.get("/ledger/trial-balance?currency=INR", by=ADMIN)).body
    assert balance["sum"] == 0
    assert {one["account"]: one["balance"] for one in balance["accounts"]}["rounding"] == 49


async def test_cash_of_many_tills_is_taken_once(pair: tuple[Instance, Instance]) -> None:
    order = await pair[0].place(paymentMethod="online")
    replies = await asyncio.gather(
        *(pair[number % 2].post("/payments/cash", cash(order["id"]), by=STAFF) for number in range(8))
    )
    assert sorted(reply.status for reply in replies) == [201, *[409] * 7]
    assert {reply.code for reply in replies if reply.status == 409} == {"already_paid"}
    paid = (await pair[1].get(f"/orders/{order['id']}")).body
    assert (paid["status"], paid["payment"]["paid"]) == ("confirmed", 25_200)


async def test_statistics_and_lists_show_the_cash(pair: tuple[Instance, Instance]) -> None:
    here, there = pair
    before = await stats(there)
    order = await here.place(paymentMethod="cash", fulfilment="pickup")
    assert (await here.post("/payments/cash", cash(order["id"]), by=STAFF)).status == 201
    after = await stats(there)
    grown = {name: after[name] - before.get(name, 0) for name in ("started", "completed", "gross", "net")}
    assert grown == {"started": 1, "completed": 1, "gross": 25_200, "net": 25_200}
    by_method = (await there.get("/payments/analytics?groupBy=month&by=method&tz=Asia/Kolkata")).body
    assert by_method["tz"] == "Asia/Kolkata"
    assert "cash" in [row["key"] for row in by_method["rows"]]


async def stats(instance: Instance) -> dict[str, Any]:
    """The row of today."""
    reply = await instance.get("/payments/stats/daily", by=STAFF)
    assert reply.status == 200
    rows: list[dict[str, Any]] = reply.body["rows"]
    return next((row for row in reversed(rows) if row["currency"] == "INR"), {})


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"amount": 0}, 422, "invalid"),
        ({"amount": -25_200}, 422, "invalid"),
        ({"amount": 252.5}, 422, "invalid"),
        ({"amount": "25200"}, 422, "invalid"),
        ({"amount": 2**53}, 422, "invalid"),
        ({"amount": None}, 422, "invalid"),
        ({"amount": 25_100}, 422, "amount_mismatch"),
        ({"amount": 25_300}, 422, "amount_mismatch"),
        ({"tendered": 25_100}, 422, "amount_mismatch"),
        ({"tendered": -1}, 422, "invalid"),
        ({"currency": "USD"}, 422, "currency_mismatch"),
        ({"currency": "rupees"}, 422, "invalid"),
        ({"orderId": "00000000-0000-4000-8000-000000000000"}, 404, "not_found"),
        ({"orderId": "1042"}, 404, "not_found"),
        ({"provider": "cash"}, 422, "invalid"),
        ({"note": "\0"}, 422, "invalid"),
    ],
    ids=str,
)
async def test_bad_cash_changes_nothing(
    pair: tuple[Instance, Instance], sql: asyncpg.Connection, changes: dict[str, Any], status: int, code: str
) -> None:
    order = await pair[0].place(paymentMethod="cash")
    before = await everything(sql)
    refusal(await pair[1].post("/payments/cash", {**cash(order["id"]), **changes}, by=STAFF), status, code)
    assert await everything(sql) == before


async def test_a_cancelled_order_takes_no_cash(pair: tuple[Instance, Instance]) -> None:
    order = await pair[0].place(paymentMethod="cash")
    await pair[0].post(f"/orders/{order['id']}/cancel", {"reason": "No"})
    refusal(await pair[1].post("/payments/cash", cash(order["id"]), by=STAFF), 409, "order_closed")


@pytest.mark.parametrize(
    "path",
    [
        "/payments/stats/daily?tz=IST",
        "/payments/analytics?by=agent",
        "/payments/analytics?groupBy=year",
        "/payments/stats/daily?from=yesterday",
        "/payments/stats/daily?groupBy=day",
        "/ledger/trial-balance?currency=XXX",
        "/audit?cursor=-1",
        "/audit?limit=0",
        "/cash/agents/a1?currency=rupee",
    ],
)
async def test_bad_questions_are_invalid(pair: tuple[Instance, Instance], path: str) -> None:
    refusal(await pair[0].get(path, by=ADMIN), 422, "invalid")


@pytest.mark.parametrize("agent_id", ["%00", "%ED%A0%80", "%2F", "%F0%9F%9A%B2", "x" * 2000, "a%20b", "..%2Fa1"])
async def test_any_name_may_be_asked_for(pair: tuple[Instance, Instance], agent_id: str) -> None:
    async with aiohttp.ClientSession() as session:
        address = URL(f"{pair[0].url}/api/v1/cash/agents/{agent_id}", encoded=True)
        async with session.get(address, headers={"Authorization": f"Bearer {STAFF}"}) as reply:
            said = await reply.json(content_type=None)
    assert (reply.status, said.get("balance")) in ((200, 0), (404, None))


async def test_a_house_may_take_parts_and_count_its_own_days(fleet: Fleet) -> None:
    house = await fleet.start(
        "web", CASH_PARTIAL="on", CASH_ROUNDING_MINOR="INR=500", SELLER_TIME_ZONE="Pacific/Kiritimati"
    )
    order = await house.place(paymentMethod="online")
    first: Reply = await house.post("/payments/cash", cash(order["id"], 10_000), by=STAFF)
    assert first.status == 201
    part = (await house.get(f"/orders/{order['id']}")).body
    assert (part["status"], part["payment"]["status"], part["payment"]["due"]) == ("pending", "partially_paid", 15_200)
    assert (await house.post("/payments/cash", cash(order["id"], 15_000), by=STAFF)).status == 201
    assert (await house.get(f"/orders/{order['id']}")).body["status"] == "confirmed"
    days = (await house.get("/payments/stats/daily", by=SERVICE)).body
    assert days["tz"] == "Pacific/Kiritimati"
    today = dt.datetime.now(dt.timezone(dt.timedelta(hours=14))).date()
    assert days["rows"][-1]["period"] in (today.isoformat(), (today - dt.timedelta(days=1)).isoformat())
