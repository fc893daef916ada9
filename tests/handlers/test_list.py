"""The list of orders: who sees which, the filters, and pages that stay where they are while orders are added."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import itertools
import random
import uuid
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from handlers import orders
from models.errors import Invalid
from models.order import Order
from models.user import Actor, Role
from tests.handlers.desk import AGENT, CUSTOMER, SERVICE, STAFF, Desk, command
from tests.handlers.test_place import pointer
from tests.models.making import actor

START = dt.datetime(2026, 11, 21, 9, 30, tzinfo=dt.UTC)


Asked = dict[str, Any]


async def page(desk: Desk, by: Actor = SERVICE, **asked: Any) -> orders.OrderPage:
    found: orders.OrderPage = await desk.do(orders.list_orders, by, command(orders.ListOrders, **asked))
    return found


async def everything(desk: Desk, by: Actor = SERVICE, limit: int = 3, **asked: Any) -> list[Order]:
    """All pages, one after the other."""
    found: list[Order] = []
    cursor: Asked = {}
    for _ in range(100):
        one = await page(desk, by, limit=limit, **asked, **cursor)
        assert len(one.items) <= limit
        found += one.items
        if one.next_cursor is None:
            return found
        assert len(one.items) == limit
        cursor = {"cursor": one.next_cursor}
    raise AssertionError("the pages do not end")


def clock(desk: Desk, at: dt.datetime) -> None:
    desk.database.clock = lambda: at


async def many(desk: Desk, count: int = 24, seed: int = 7) -> list[Order]:
    """Orders of two customers and two agents, in several statuses; some of the same moment. Newest first."""
    dice = random.Random(seed)
    at = START
    for number in range(count):
        at += dt.timedelta(milliseconds=dice.choice([0, 0, 1, 60_000]))
        clock(desk, at)
        order = await desk.place(
            customerId=dice.choice(["c1", "c2", None]), reference=f"shop-{number}" if number % 2 else None
        )
        if number % 3:
            await desk.assign(order.id, dice.choice(["a1", "a2"]))
        if number % 4:
            await desk.move(order.id, *["confirmed", "preparing", "ready"][: number % 4])
    rows = await desk.fetch("select id, created_at from orders")
    placed = await desk.orders()
    newest_first = sorted(rows, key=lambda row: (row["created_at"], row["id"]), reverse=True)
    return [placed[str(row["id"])] for row in newest_first]


def ids(found: list[Order]) -> list[str]:
    return [order.id for order in found]


async def test_filters_narrow_and_combine(desk: Desk) -> None:
    placed = await many(desk)
    filters: dict[str, tuple[list[Any], Callable[[Order, Any], bool]]] = {
        "status": (["pending", "ready", "returned"], lambda order, value: order.status == value),
        "customerId": (["c1", "nobody"], lambda order, value: order.customer_id == value),
        "agentId": (["a1"], lambda order, value: order.agent is not None and order.agent.id == value),
        "reference": (["shop-3", "shop-4"], lambda order, value: order.reference == value),
        "from": ([placed[9].created_at], lambda order, value: order.created_at >= value),
        "to": ([placed[3].created_at], lambda order, value: order.created_at < value),
    }
    choices = [[None, *values] for values, _ in filters.values()]
    for chosen in itertools.product(*choices):
        asked = {name: value for name, value in zip(filters, chosen, strict=True) if value is not None}
        wanted = [order for order in placed if all(filters[name][1](order, value) for name, value in asked.items())]
        assert ids((await page(desk, limit=200, **asked)).items) == ids(wanted), asked


async def test_the_items_are_whole_orders(desk: Desk) -> None:
    placed = await many(desk, 6)
    assert (await page(desk)).items == placed
    assert (await page(desk, CUSTOMER)).items == [order for order in placed if order.customer_id == "c1"]


async def test_pages_make_the_whole_list(desk: Desk) -> None:
    placed = await many(desk)
    for limit in (1, 2, 3, 5, 23, 24, 25, 200):
        assert ids(await everything(desk, limit=limit)) == ids(placed)


async def test_a_page_of_the_limit_is_the_last_when_nothing_follows(desk: Desk) -> None:
    await many(desk, 4)
    assert (await page(desk, limit=4)).next_cursor is None
    assert (await page(desk, limit=3)).next_cursor is not None
    assert (await page(desk, status="returned")) == orders.OrderPage([], None)


async def test_the_first_page_holds_50_when_nobody_says(desk: Desk) -> None:
    for _ in range(51):
        await desk.place()
    assert len((await page(desk)).items) == 50


async def test_rows_that_are_added_move_no_page(desk: Desk) -> None:
    """Between two pages orders are placed, now and in the same moment as those already read."""
    clock(desk, START)
    placed = [(await desk.place()).id for _ in range(10)]
    found: list[str] = []
    cursor: Asked = {}
    for step in range(20):
        one = await page(desk, limit=2, **cursor)
        found += ids(one.items)
        clock(desk, START + dt.timedelta(seconds=step))
        await desk.place()
        if one.next_cursor is None:
            break
        cursor = {"cursor": one.next_cursor}
    assert len(set(found)) == len(found), "an order came twice"
    assert set(placed) <= set(found), "an order was skipped"


async def test_changes_of_an_order_do_not_move_it(desk: Desk) -> None:
    placed = ids(await many(desk, 6))
    first = await page(desk, limit=3)
    await desk.assign(first.items[0].id, "a9")
    rest = await page(desk, limit=3, cursor=first.next_cursor)
    assert ids(first.items) + ids(rest.items) == placed


async def test_everybody_sees_their_own(desk: Desk) -> None:
    placed = await many(desk)
    people = {
        SERVICE: placed,
        STAFF: placed,
        actor(Role.ADMIN): placed,
        CUSTOMER: [order for order in placed if order.customer_id == "c1"],
        AGENT: [order for order in placed if order.agent and order.agent.id == "a1"],
        actor(Role.CUSTOMER, "a1"): [],
        actor(Role.AGENT, "c1"): [],
    }
    for by, wanted in people.items():
        assert ids(await everything(desk, by)) == ids(wanted), by
        filters: list[Asked] = [{"customerId": "c2"}, {"agentId": "a2"}, {"customerId": "c1", "agentId": "a1"}]
        for asked in filters:
            found = ids(await everything(desk, by, **asked))
            assert set(found) <= set(ids(wanted)), "a filter shows more than there was without it"
    assert await everything(desk, CUSTOMER, customerId="c2") == []


async def test_the_orders_claim_narrows_the_list(desk: Desk) -> None:
    placed = await many(desk)
    some = frozenset(ids(placed)[::2])
    for role, sub in ((Role.SERVICE, "shop"), (Role.CUSTOMER, "c1"), (Role.AGENT, "a1")):
        free = ids(await everything(desk, actor(role, sub)))
        narrowed = ids(await everything(desk, actor(role, sub, orders=some)))
        assert narrowed == [order_id for order_id in free if order_id in some]
        assert await everything(desk, actor(role, sub, orders=frozenset())) == []
    odd = frozenset({placed[0].id, "order-7", "", str(uuid.uuid4()), placed[1].id.upper()})
    assert ids(await everything(desk, actor(Role.SERVICE, orders=odd))) == [placed[0].id]


def encoded(inside: bytes) -> str:
    return base64.urlsafe_b64encode(inside).decode()


NOT_OURS = [
    "",
    "x",
    "AAAA",
    "not a cursor",
    "ü",
    "=",
    encoded(b"2026-11-21T09:30:00+00:00|short"),
    encoded(b"2026-11-21T09:30:00+00:00"),
    encoded(b"yesterday|" + bytes(16)),
    encoded(b"|" + bytes(16)),
    encoded(b"2026-11-21T09:30:00|" + bytes(16)),
    encoded(b"0001-01-01T00:00:00+14:00|" + bytes(16)),
    encoded(b"9999-12-31T23:59:59-14:00|" + bytes(16)),
    encoded(b"\xff\xfe|" + bytes(16)),
]


async def test_a_cursor_that_is_not_ours_is_invalid(desk: Desk) -> None:
    for cursor in NOT_OURS:
        refusal = await desk.refused(orders.list_orders, SERVICE, command(orders.ListOrders, cursor=cursor))
        assert pointer(refusal) == "/cursor", cursor


@effort(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cursor=st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: base64.urlsafe_b64encode(raw).decode()))
async def test_no_cursor_breaks_the_list(desk: Desk, cursor: str) -> None:
    with contextlib.suppress(Invalid):
        await page(desk, cursor=cursor)


async def test_a_time_outside_the_calendar_is_invalid(desk: Desk) -> None:
    for name, at in itertools.product(("from", "to"), ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00")):
        refusal = await desk.refused(orders.list_orders, SERVICE, command(orders.ListOrders, **{name: at}))
        assert pointer(refusal) == f"/{name}", at


@pytest.mark.parametrize("name", ["from", "to"])
@pytest.mark.parametrize("at", ["2026-11-21T09:30:00", "2026-11-21", "today", 1_790_000_000, None])
def test_a_bound_is_a_time_with_its_offset(name: str, at: object) -> None:
    with pytest.raises(msgspec.ValidationError, match=rf"\$\.{name}`"):
        command(orders.ListOrders, **{name: at})


async def test_the_ends_of_the_calendar_are_times(desk: Desk) -> None:
    placed = await many(desk, 3)
    ever: Asked = {"from": "0001-01-01T00:00:00Z", "to": "9999-12-31T23:59:59Z"}
    assert ids((await page(desk, **ever)).items) == ids(placed)


async def test_a_bound_is_an_instant_whatever_its_offset(desk: Desk) -> None:
    placed = await many(desk, 8)
    middle = dt.datetime.fromisoformat(placed[4].created_at)
    for hours in (0, 5.5, -8):
        local: Asked = {"from": middle.astimezone(dt.timezone(dt.timedelta(hours=hours))).isoformat()}
        newer = ids((await page(desk, **local)).items)
        older = ids((await page(desk, to=local["from"])).items)
        assert newer + older == ids(placed), "half open: nothing is in both, nothing in neither"
        assert placed[4].id in newer
