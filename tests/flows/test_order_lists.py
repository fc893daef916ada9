"""Lists of orders, their filters and their export, through the real door and while orders are placed."""

from __future__ import annotations

import asyncio
import csv
import datetime as dt
import io
import uuid
from collections.abc import AsyncIterator
from fractions import Fraction
from typing import Any
from urllib.parse import urlencode

import aiohttp
import asyncpg
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.money import MINOR_UNITS_MAX
from server.csv_export import RISKY
from server.embedded import DataServers
from tests.harness import ORDER, SERVICE, Fleet, Instance, Reply, token
from tests.shared import refusal, shared_fleet

STAFF = token("staff", "s1")
HELD = 45
"""Orders that exist before somebody starts to page through them."""


@pytest.fixture(scope="module")
async def fleet(data: DataServers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    async with shared_fleet(data, tmp_path_factory.mktemp("lists")) as fleet:
        yield fleet


@pytest.fixture(scope="module")
async def shop(fleet: Fleet) -> Instance:
    return await fleet.start("all", RATE_LIMITS="off")


@pytest.fixture
async def sql(fleet: Fleet) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(fleet.database_url)
    yield connection
    await connection.close()


def somebody() -> str:
    """A customer of this test's own, so that the tests of this file share a server."""
    return f"c-{uuid.uuid4().hex[:12]}"


async def place(shop: Instance, count: int, **changes: Any) -> list[dict[str, Any]]:
    """`count` orders, placed together: many of them share their millisecond."""
    return list(await asyncio.gather(*(shop.place(**changes) for _ in range(count))))


async def listed(shop: Instance, by: str = SERVICE, **filters: Any) -> Reply:
    return await shop.get(f"/orders?{urlencode(filters)}", by=by)


async def walk(shop: Instance, by: str = SERVICE, **filters: Any) -> list[dict[str, Any]]:
    """All pages of the list, one after the other."""
    found: list[dict[str, Any]] = []
    while True:
        reply = await listed(shop, by, **filters)
        assert reply.status == 200, reply
        assert len(reply.body["items"]) <= filters.get("limit", 50)
        found += reply.body["items"]
        if reply.body["nextCursor"] is None:
            return found
        assert len(reply.body["items"]) == filters.get("limit", 50)
        filters["cursor"] = reply.body["nextCursor"]


def newest_first(orders: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(orders, key=lambda order: (order["createdAt"], uuid.UUID(order["id"]).bytes), reverse=True)


def ids(orders: list[dict[str, Any]]) -> list[str]:
    return [order["id"] for order in orders]


def cells(body: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(body.decode("utf-8"), newline=""), strict=True))


async def exported(shop: Instance, by: str = SERVICE, **filters: Any) -> list[dict[str, str]]:
    reply = await shop.get(f"/orders.csv?{urlencode(filters)}", by=by)
    assert reply.status == 200, reply
    return cells(reply.body)


# pages


@pytest.mark.parametrize("limit", [1, 2, 7, HELD - 1, HELD, 200])
async def test_pages_are_stable_while_orders_are_placed(shop: Instance, limit: int) -> None:
    customer = somebody()
    there = await place(shop, HELD, customerId=customer)
    stop = asyncio.Event()

    async def keep_placing() -> list[dict[str, Any]]:
        placed: list[dict[str, Any]] = []
        while not stop.is_set() or not placed:
            placed += await place(shop, 2, customerId=customer)
        return placed

    others = asyncio.create_task(keep_placing())
    found = await walk(shop, customerId=customer, limit=limit)
    stop.set()
    placed = await others

    assert len(ids(found)) == len(set(ids(found)))
    assert [one for one in ids(found) if one in ids(there)] == ids(newest_first(there))
    assert set(ids(found)) <= set(ids(there)) | set(ids(placed))
    assert found == newest_first(found)
    assert await walk(shop, customerId=customer, limit=limit) == newest_first(there + placed)


async def test_orders_of_one_instant_are_paged_by_their_id(shop: Instance, sql: asyncpg.Connection) -> None:
    customer = somebody()
    there = await place(shop, 12, customerId=customer)
    await sql.execute("update orders set created_at = $1 where customer_id = $2", dt.datetime.now(dt.UTC), customer)
    for limit in (1, 5, 12):
        found = await walk(shop, customerId=customer, limit=limit)
        assert len({order["createdAt"] for order in found}) == 1
        assert ids(found) == sorted(ids(there), reverse=True)


async def test_the_export_is_stable_too_and_ends_with_the_list(shop: Instance) -> None:
    customer = somebody()
    there = [order for _ in range(5) for order in await place(shop, 90, customerId=customer)]
    stop = asyncio.Event()

    async def keep_placing() -> None:
        while not stop.is_set():
            await place(shop, 2, customerId=customer)

    others = asyncio.create_task(keep_placing())
    found = await exported(shop, customerId=customer)
    stop.set()
    await others
    rows = [row["id"] for row in found]
    assert len(rows) == len(set(rows))
    assert [one for one in rows if one in set(ids(there))] == ids(newest_first(there))
    assert len(there) > 400  # several pages


# filters


async def test_filters_narrow_and_combine(shop: Instance) -> None:
    mine, other = somebody(), somebody()
    agent, reference = somebody(), f"R-{uuid.uuid4().hex[:8]}"
    first = await shop.place(customerId=mine)
    second = await shop.place(customerId=mine, reference=reference)
    third = await shop.place(customerId=other)
    await shop.assign(second["id"], agent)
    await shop.assign(third["id"], agent)
    await shop.move(third["id"], "confirmed")

    async def found(by: str = SERVICE, **filters: Any) -> list[str]:
        exported_ids = [row["id"] for row in await exported(shop, by, **filters)]
        listed_ids = ids(await walk(shop, by, **filters))
        assert exported_ids == listed_ids, "the export has the rows of the list"
        return listed_ids

    assert await found(customerId=mine) == [second["id"], first["id"]]
    assert await found(agentId=agent) == [third["id"], second["id"]]
    assert await found(agentId=agent, status="confirmed") == [third["id"]]
    assert await found(agentId=agent, customerId=mine) == [second["id"]]
    assert await found(reference=reference) == [second["id"]]
    assert await found(reference=reference, status="confirmed") == []
    assert await found(reference=reference.lower()) == [], "a reference is what the merchant wrote"
    # who lists: the owner's own, the agent's assigned, the back office all
    assert await found(token("customer", mine)) == [second["id"], first["id"]]
    assert await found(token("customer", mine), customerId=other) == []
    assert await found(token("agent", agent)) == [third["id"], second["id"]]
    assert await found(token("agent", agent), status="pending") == [second["id"]]
    for role in ("staff", "service", "admin"):
        assert await found(token(role, "x"), agentId=agent) == [third["id"], second["id"]]
    narrowed = token("staff", "s1", orders=[first["id"]])
    assert await found(narrowed) == [first["id"]]
    for path in ("/orders", "/orders.csv"):
        refusal(await shop.get(path, by=token("guest", "g", orders=[first["id"]])), 403, "forbidden")
        refusal(await shop.get(path, by=None), 401, "unauthenticated")


async def test_from_and_to_are_a_half_open_range(shop: Instance, sql: asyncpg.Connection) -> None:
    customer = somebody()
    placed = await place(shop, 3, customerId=customer)
    at = dt.datetime(2026, 3, 1, 9, 30, 0, 125_000, tzinfo=dt.UTC)
    times = [at - dt.timedelta(milliseconds=1), at, at + dt.timedelta(milliseconds=1)]
    for order, created in zip(placed, times, strict=True):
        await sql.execute("update orders set created_at = $1 where id = $2", created, uuid.UUID(order["id"]))
    before, on, after = ids(placed)

    async def found(**range_: str) -> list[str]:
        return ids(await walk(shop, customerId=customer, **range_))

    moment = "2026-03-01T09:30:00.125Z"
    assert await found(**{"from": moment}) == [after, on]
    assert await found(to=moment) == [before]
    assert await found(**{"from": moment, "to": "2026-03-01T09:30:00.126Z"}) == [on]
    assert await found(**{"from": moment, "to": moment}) == []
    assert await found(**{"from": "2026-03-01T09:30:00.126Z", "to": moment}) == []
    # the same instant with offsets, and with fractions of any length
    for same in ("2026-03-01T15:00:00.125+05:30", "2026-03-01T04:30:00.125-05:00", "2026-03-01T09:30:00.125000Z"):
        assert await found(**{"from": same}) == [after, on]
    assert await found(**{"from": "2026-03-01T09:30:00.1250001Z"}) in ([after, on], [after])
    assert await found(**{"from": "2026-03-01T09:30:00Z"}) == [after, on, before]
    assert await found(to="2026-03-01T09:30:01Z") == [after, on, before]


WRONG = [
    ({"status": "lost"}, "/status"),
    ({"status": "Pending"}, "/status"),
    ({"customerId": ""}, "/customerId"),
    ({"customerId": "c" * 201}, "/customerId"),
    ({"agentId": "a\0"}, "/agentId"),
    ({"reference": ""}, "/reference"),
    ({"from": "2026-03-01T09:30:00"}, "/from"),
    ({"to": "2026-03-01T09:30:00"}, "/to"),
    ({"from": "2026-03-01T00:00:00Z", "to": "2026-03-02T00:00:00"}, "/to"),
    ({"from": "yesterday"}, "/from"),
    ({"to": "2026-13-01T00:00:00Z"}, "/to"),
    ({"from": "2026-03-01"}, "/from"),
    ({"from": "0001-01-01T00:00:00+14:00"}, "/from"),
    ({"to": "9999-12-31T23:59:59-14:00"}, "/to"),
    ({"colour": "red"}, "/colour"),
]
WRONG_PAGES = [
    ({"limit": "0"}, "/limit"),
    ({"limit": "201"}, "/limit"),
    ({"limit": "many"}, "/limit"),
    ({"cursor": "!"}, "/cursor"),
    ({"cursor": "c" * 201}, "/cursor"),
    # cursors that somebody made: no offset, and beyond the calendar
    ({"cursor": "MjAyNi0wMy0wMVQwOTozMDowMHwAAAAAAAAAAAAAAAAAAAAA"}, "/cursor"),
    ({"cursor": "MDAwMS0wMS0wMVQwMDowMDowMCsxNDowMHwAAAAAAAAAAAAAAAAAAAAA"}, "/cursor"),
]


@pytest.mark.parametrize(("wrong", "pointer"), WRONG)
async def test_wrong_filters_are_named(shop: Instance, wrong: dict[str, str], pointer: str) -> None:
    for path in ("/orders", "/orders.csv"):
        refusal(await shop.get(f"{path}?{urlencode(wrong)}"), 422, "invalid", pointer)


@pytest.mark.parametrize(("wrong", "pointer"), WRONG_PAGES)
async def test_wrong_pages_are_named(shop: Instance, wrong: dict[str, str], pointer: str) -> None:
    refusal(await listed(shop, **wrong), 422, "invalid", pointer)


@pytest.mark.parametrize("name", ["limit", "cursor"])
async def test_an_export_has_no_pages(shop: Instance, name: str) -> None:
    refusal(await shop.get(f"/orders.csv?{name}=1"), 422, "invalid", f"/{name}")


# reference and contact


async def test_a_reference_is_unique_and_comes_back(shop: Instance) -> None:
    reference = f"Größe/{uuid.uuid4().hex[:8]} №1"
    order = await shop.place(reference=reference)
    assert order["reference"] == reference
    body = {**ORDER, "reference": reference}
    refusal(await shop.post("/orders", body), 409, "conflict")
    refusal(await shop.post("/orders", {**body, "customerId": "c2"}), 409, "conflict")
    assert ids((await listed(shop, reference=reference)).body["items"]) == [order["id"]]
    racing = {**ORDER, "reference": f"race-{uuid.uuid4().hex[:8]}"}
    replies = await asyncio.gather(*(shop.post("/orders", racing) for _ in range(5)))
    assert sorted(reply.status for reply in replies) == [201, 409, 409, 409, 409]


@pytest.mark.parametrize(
    "contact",
    [{"name": "Meera", "phone": "+919000090000", "email": "meera@example.in"}, {"phone": "9000090000"}, {}],
)
async def test_contact_comes_back_everywhere(shop: Instance, contact: dict[str, str]) -> None:
    customer = somebody()
    order = await shop.place(customerId=customer, contact=contact)
    assert order["contact"] == contact
    assert (await shop.get(f"/orders/{order['id']}")).body == order
    assert (await listed(shop, customerId=customer)).body["items"] == [order]
    (row,) = await exported(shop, customerId=customer)
    for name in ("name", "phone", "email"):
        text = contact.get(name, "")
        assert row[f"contact.{name}"] == (f"'{text}" if text.startswith(RISKY) else text)


# totals

FREE_LINE = st.fixed_dictionaries(
    {
        "name": st.just("line"),
        "quantity": st.integers(1, 1000) | st.just(1_000_000),
        "unitPrice": st.integers(0, 10**6) | st.integers(0, 10**9),
    },
    optional={"taxRateBp": st.sampled_from([0, 1, 250, 500, 1200, 1800, 2800, 9_999, 10_000]) | st.integers(0, 10_000)},
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(FREE_LINE, min_size=1, max_size=8))
async def test_totals_of_free_lines_are_exact(shop: Instance, items: list[dict[str, Any]]) -> None:
    reply = await shop.post("/orders/quote", {**ORDER, "items": items})
    nets = [item["quantity"] * item["unitPrice"] for item in items]
    halves = [
        int(Fraction(net * item.get("taxRateBp", 0), 20_000) + Fraction(1, 2))
        for net, item in zip(nets, items, strict=True)
    ]
    if sum(nets) + 2 * sum(halves) > MINOR_UNITS_MAX:
        refusal(reply, 422, "invalid", "/items")
        return
    assert reply.status == 200, reply
    lines, totals = reply.body["items"], reply.body["totals"]
    assert [line["tax"] for line in lines] == [2 * half for half in halves]
    assert [line["total"] for line in lines] == [net + 2 * half for net, half in zip(nets, halves, strict=True)]
    assert totals == {
        "items": sum(nets),
        "discount": 0,
        "delivery": 0,
        "tax": 2 * sum(halves),
        "rounding": 0,
        "total": sum(nets) + 2 * sum(halves),
    }
    placed = await shop.post("/orders", {**ORDER, "customerId": somebody(), "items": items})
    assert placed.status == 201, placed
    assert (placed.body["items"], placed.body["totals"]) == (lines, totals)
    assert (await shop.get(f"/orders/{placed.body['id']}")).body == placed.body


# the export


def flat(order: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in order.items():
        found.update(flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value})
    return found


async def test_an_export_shows_every_member_of_every_order(shop: Instance) -> None:
    customer = somebody()
    notes = ['say "now", please', "two\nlines", "नमस्ते ₹ 😀", *(f"{first}1+1|x" for first in RISKY)]
    for text in notes:
        address = {**ORDER["deliveryAddress"], "lat": -33.8688, "lng": 151.2093, "landmark": text}  # type: ignore[dict-item]
        await shop.place(customerId=customer, notes=text, table=text, deliveryAddress=address)
    bare = await shop.place(customerId=customer, contact=None, notes=None)
    await shop.assign(bare["id"], "agent-7", agentName="Ravi", vehicle="-7")
    orders = await walk(shop, customerId=customer)
    rows = await exported(shop, customerId=customer)
    assert len(rows) == len(orders) == len(notes) + 1
    for order, row in zip(orders, rows, strict=True):
        members = flat(order)
        assert members.keys() <= row.keys()
        for name, cell in row.items():
            value = members.get(name)
            if isinstance(value, str):
                assert cell == (f"'{value}" if value.startswith(RISKY) else value)
            elif name == "items":
                assert cell.startswith('[{"lineId":"1"')
            else:
                assert cell == ("" if value is None else str(value))


async def test_an_export_of_nothing_is_its_header(shop: Instance) -> None:
    reply = await shop.get(f"/orders.csv?customerId={somebody()}")
    assert reply.status == 200
    assert reply.body.count(b"\r\n") == 1
    assert reply.body.startswith(b"id,number,")
    assert reply.headers["Content-Type"] == "text/csv; charset=utf-8"
    assert reply.headers["Content-Disposition"] == 'attachment; filename="orders.csv"'
    assert reply.headers["X-Request-Id"]


MANY = 8_000


async def fill(sql: asyncpg.Connection, customer: str, order_id: str) -> None:
    """Many copies of one order, straight into the tables."""
    names = "fulfilment, status, seq, currency, payment_method, items_total, tax, total, contact, notes, updated_at"
    await sql.execute(
        f"insert into orders (id, customer_id, created_at, {names})"
        f" select gen_random_uuid(), $1, created_at - n * interval '1 ms', {names.replace('notes', '$4')}"
        " from orders, generate_series(1, $2::integer) n where id = $3",
        customer,
        MANY,
        uuid.UUID(order_id),
        "n" * 900,
    )
    await sql.execute(
        "insert into order_lines (order_id, position, name, quantity, unit_price, tax_rate_bp, tax, total)"
        " select o.id, l.position, l.name, l.quantity, l.unit_price, l.tax_rate_bp, l.tax, l.total"
        " from orders o, order_lines l where l.order_id = $2 and o.customer_id = $1 and o.id <> $2",
        customer,
        uuid.UUID(order_id),
    )


async def test_a_long_export_holds_no_connection_and_no_table_in_memory(
    fleet: Fleet, shop: Instance, sql: asyncpg.Connection
) -> None:
    """Many slow readers at once: more than the pool has connections, and others are served meanwhile."""
    customer = somebody()
    order = await shop.place(customerId=customer)
    await fill(sql, customer, order["id"])
    small = await fleet.start("web", RATE_LIMITS="off", DB_POOL_SIZE="2")
    before = memory(small)
    headers = {"Authorization": f"Bearer {STAFF}"}
    async with aiohttp.ClientSession(headers=headers, read_bufsize=2**14) as session:
        address = f"{small.url}/api/v1/orders.csv?customerId={customer}"
        slow = [await session.get(address) for _ in range(10)]
        for response in slow:
            assert response.status == 200
        for _ in range(20):  # nobody of them reads, all of them are under way
            assert (await small.get(f"/orders/{order['id']}")).status == 200
        busy = await sql.fetchval(
            "select count(*) from pg_stat_activity where datname = current_database() and state like '%transaction%'"
        )
        assert busy == 0
        assert memory(small) - before < 60 * 2**20, "ten times ten megabytes would not fit"
        bodies = [await response.read() for response in slow]
    for body in bodies:
        rows = cells(body)
        assert len({row["id"] for row in rows}) == len(rows) == MANY + 1


def memory(instance: Instance) -> int:
    size: int = psutil.Process(instance.process.pid).memory_info().rss
    return size


async def test_an_export_that_cannot_go_on_is_cut_not_ended(fleet: Fleet, shop: Instance) -> None:
    customer = somebody()
    order = await shop.place(customerId=customer)
    connection = await asyncpg.connect(fleet.database_url)
    await fill(connection, customer, order["id"])
    brief = await fleet.start("web", RATE_LIMITS="off", DB_TIMEOUT_MS="300")
    brief.may_log_errors = True
    headers = {"Authorization": f"Bearer {STAFF}"}
    async with aiohttp.ClientSession(headers=headers, read_bufsize=2**14) as session:
        response = await session.get(f"{brief.url}/api/v1/orders.csv?customerId={customer}")
        assert response.status == 200
        async with connection.transaction():
            await connection.execute("lock table orders in access exclusive mode")
            with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ClientConnectionError)):
                await response.read()
    await connection.close()
    assert any(record["event"] == "export_cut" for record in brief.log_records())
    assert "Traceback" not in brief.log.read_text()
