"""Every verb of handlers/ keeps the replay equation: old snapshot + what it tells = fresh snapshot."""

from __future__ import annotations

import datetime as dt
import importlib
import inspect
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from handlers import links, orders, tracking, users
from handlers.ports import Closing
from models.event import Type
from models.order import MOVES, Fulfilment, Order, Status
from models.user import Actor, Role, Scope
from tests.handlers.desk import (
    ADMIN,
    AGENT,
    CUSTOMER,
    SERVICE,
    STAFF,
    WAY,
    Desk,
    Verb,
    command,
    guest,
    placing,
    replay,
)
from tests.models.making import actor

Story = Callable[[Desk], Awaitable[None]]
STORIES: list[tuple[Verb, Story]] = []


def story(verb: Verb) -> Callable[[Story], Story]:
    """Marks a function that carries out `verb` inside `replay`."""

    def mark(function: Story) -> Story:
        STORIES.append((verb, function))
        return function

    return mark


DESKS = ("links", "orders", "tracking", "users")
"""Of orders. Money's verbs are many steps, or change no order: test_settlement.py and the tests of its desks hold
them to the same equation."""


def verbs() -> set[Verb]:
    """Every public coroutine function of the desks of orders, which take a transaction first."""
    found: set[Verb] = set()
    for desk in DESKS:
        names = importlib.import_module(f"handlers.{desk}")
        for name, value in inspect.getmembers(names, inspect.iscoroutinefunction):
            if value.__module__ == names.__name__ and not name.startswith("_"):
                assert next(iter(inspect.signature(value).parameters)) == "tx", f"{name} is no verb"
                found.add(value)
    return found


def test_every_verb_has_its_story() -> None:
    assert {verb.__name__ for verb in verbs()} == {verb.__name__ for verb, _ in STORIES}


# place and quote


@story(orders.place)
async def placed(desk: Desk) -> None:
    async with replay(desk) as told:
        order = await desk.place(reference="shop-1", billing={"name": "Meera"}, table="7")
    assert [(one.seq, one.type, one.data["status"]) for one in told[order.id]] == [(1, Type.STATUS, "pending")]
    assert told[order.id][0].data["actor"] == {"role": "service", "id": "shop"}
    assert order == (await desk.orders())[order.id]


@story(orders.place)
async def placed_online_without_a_price(desk: Desk) -> None:
    async with replay(desk) as told:
        order = await desk.place(paymentMethod="online", items=[{"name": "Sample", "quantity": 1, "unitPrice": 0}])
    assert [(one.data["status"], one.data.get("previousStatus")) for one in told[order.id]] == [
        ("pending", None),
        ("confirmed", "pending"),
    ]
    assert order == (await desk.orders())[order.id]


@story(orders.quote)
async def quoted(desk: Desk) -> None:
    before = await desk.tables()
    async with replay(desk) as told:
        quote = await desk.do(orders.quote, SERVICE, placing())
    assert told == {}
    assert await desk.tables() == before
    assert quote.totals == (await desk.place()).totals


# change status, cancel


def edges() -> list[tuple[Fulfilment, Status, Status]]:
    return [
        (fulfilment, source, target)
        for fulfilment, moves in MOVES.items()
        for source, targets in moves.items()
        for target in targets
    ]


async def bring(desk: Desk, fulfilment: Fulfilment, status: Status) -> Order:
    """An order in this status, by the shortest legal way."""
    order = await desk.place(fulfilment=fulfilment)
    way = WAY[fulfilment]
    if status in way:
        way = way[: way.index(status) + 1]
    elif status is Status.DELIVERY_FAILED:
        way = [*way[: way.index(Status.OUT_FOR_DELIVERY) + 1], status]
    else:
        assert status is Status.PENDING
        return order
    return await desk.move(order.id, *way)


@story(orders.change_status)
async def moved_along_every_edge(desk: Desk) -> None:
    for fulfilment, source, target in edges():
        order = await bring(desk, fulfilment, source)
        async with replay(desk) as told:
            after = await desk.do(
                orders.change_status, STAFF, order.id, command(orders.ChangeStatus, status=target, note="As agreed")
            )
        first, *rest = told[order.id]
        assert first.data["status"] == after.status == target
        assert first.data["previousStatus"] == source
        assert first.data["note"] == after.status_reason == "As agreed"
        assert first.data["actor"] == {"role": "staff", "id": "s1"}
        named = {"out_for_delivery": ["orderOutForDelivery"], "delivered": ["orderDelivered"]}
        assert [one.type for one in rest] == named.get(target, [])
        assert all(one.data.keys() == {"orderId", "seq", "at"} for one in rest)
        assert after == (await desk.orders())[order.id]


@story(orders.change_status)
async def handed_over_unpaid_by_an_override(desk: Desk) -> None:
    order = await desk.place(fulfilment="pickup", paymentMethod="cash")
    await desk.move(order.id, "confirmed", "preparing", "ready")
    async with replay(desk) as told:
        cmd = command(orders.ChangeStatus, status="delivered", override={"reason": "Pays on Friday"})
        await desk.do(orders.change_status, ADMIN, order.id, cmd)
    assert told[order.id][0].data["note"] == "Pays on Friday"


@story(orders.change_status)
async def moved_with_a_note_that_json_must_escape(desk: Desk) -> None:
    note = 'Said "no" \\ then\n\tyes: ü 🙂 \u2028 {"status":"cancelled"} $1 %s'
    who = actor(Role.STAFF, 's"\\1')
    order = await desk.place()
    async with replay(desk) as told:
        cmd = command(orders.ChangeStatus, status="confirmed", note=note)
        await desk.do(orders.change_status, who, order.id, cmd)
    assert told[order.id][0].data["note"] == note
    assert told[order.id][0].data["actor"] == {"role": "staff", "id": who.sub}


@story(orders.cancel)
async def cancelled_by_everybody_who_may(desk: Desk) -> None:
    async def by(who: Actor | Scope, *statuses: str) -> None:
        order = await desk.place()
        if statuses:
            await desk.move(order.id, *statuses)
        caller = guest(order.id, who) if isinstance(who, Scope) else who
        async with replay(desk) as told:
            after = await desk.do(orders.cancel, caller, order.id, command(orders.Cancel, reason="Changed my mind"))
        assert after == (await desk.orders())[order.id]
        assert (after.status, after.status_reason, after.payment.due) == ("cancelled", "Changed my mind", 0)
        (one,) = told[order.id]
        assert one.data["note"] == "Changed my mind"
        assert one.data["actor"] == {"role": caller.role, "id": caller.sub}

    await by(CUSTOMER)
    await by(CUSTOMER, "confirmed")
    await by(Scope.PAY)
    await by(STAFF, "confirmed", "preparing", "ready")
    await by(SERVICE, "confirmed", "preparing", "ready", "out_for_delivery", "delivery_failed")


# payment method


@story(orders.change_payment_method)
async def paid_in_another_way_by_everybody_who_may(desk: Desk) -> None:
    order = await desk.place()
    at = dt.datetime(2026, 11, 21, 9, 30, tzinfo=dt.UTC)

    async def change(by: Actor, method: str) -> Order:
        cmd = command(orders.ChangePaymentMethod, paymentMethod=method)
        after: Order = await desk.do(orders.change_payment_method, by, order.id, cmd, expiry_s=900)
        return after

    for seq, (by, method) in enumerate(
        ((CUSTOMER, "online"), (guest(order.id, Scope.PAY), "cash"), (STAFF, "online"), (SERVICE, "later")), 2
    ):
        desk.database.clock = lambda seq=seq: at + dt.timedelta(minutes=seq)  # type: ignore[misc]
        async with replay(desk) as told:
            after = await change(by, method)
        online = method == "online"
        assert after == (await desk.orders())[order.id]
        assert after.expires_at == (f"2026-11-21T09:{30 + seq + 15}:00.000Z" if online else None)
        assert after.waiting_for == (["payment"] if online else None)
        (one,) = told[order.id]
        assert (one.seq, one.type, one.data["method"]) == (seq, Type.METHOD, method)
        assert one.data["payment"] == {"method": method, "status": "unpaid", "due": 25_200, "paid": 0, "refunded": 0}
        assert one.data.get("expiresAt") == after.expires_at
        assert json.loads(one.for_tracking().payload)["payment"] == {"method": method, "status": "unpaid"}
        before = await desk.tables()
        async with replay(desk) as told:
            assert await change(by, method) == after
        assert told == {}
        assert await desk.tables() == before, "the same again changes nothing"


@story(orders.change_payment_method)
async def a_confirmed_order_waits_for_no_payment(desk: Desk) -> None:
    order = await desk.place(paymentMethod="cash")
    await desk.move(order.id, "confirmed")
    async with replay(desk) as told:
        cmd = command(orders.ChangePaymentMethod, paymentMethod="online")
        after = await desk.do(orders.change_payment_method, STAFF, order.id, cmd)
    assert after == (await desk.orders())[order.id]
    assert (after.expires_at, after.waiting_for) == (None, None)
    assert "expiresAt" not in told[order.id][0].data


@story(orders.change_payment_method)
async def a_free_order_is_paid_in_any_way_but_online(desk: Desk) -> None:
    order = await desk.place(items=[{"name": "Sample", "quantity": 1, "unitPrice": 0}])
    async with replay(desk) as told:
        cmd = command(orders.ChangePaymentMethod, paymentMethod="cash")
        after = await desk.do(orders.change_payment_method, CUSTOMER, order.id, cmd)
    assert told[order.id][0].data["payment"]["status"] == after.payment.status == "paid"


# assign


@story(orders.assign)
async def assigned_reassigned_and_unassigned(desk: Desk) -> None:
    order = await desk.place()

    async def agent(agent_id: str | None, shown: dict[str, str] | None, **more: str) -> None:
        top = (await desk.orders())[order.id].seq
        async with replay(desk) as told:
            after = await desk.assign(order.id, agent_id, **more)
        assert [(one.seq, one.type, one.data["agent"]) for one in told[order.id]] == [(top + 1, Type.ASSIGNED, shown)]
        assert after == (await desk.orders())[order.id]
        (row,) = await desk.fetch("select assignment from orders")
        assert row["assignment"] == (top + 1 if agent_id else 0)

    async def again(agent_id: str | None, **more: str) -> None:
        before = await desk.tables()
        async with replay(desk) as told:
            after = await desk.assign(order.id, agent_id, **more)
        assert told == {}
        assert await desk.tables() == before
        assert after == (await desk.orders())[order.id]

    await again(None)
    await agent("a1", {"id": "a1", "name": "Asha Rao", "vehicle": "KA-01"}, agentName="Asha Rao", vehicle="KA-01")
    await again("a1", agentName="Asha Rao", vehicle="KA-01")
    await agent("a1", {"id": "a1", "name": "Asha Rao", "vehicle": "KA-02"}, agentName="Asha Rao", vehicle="KA-02")
    await agent("a2", {"id": "a2"})
    await again("a2")
    await agent(None, None)
    await again(None, agentName="Nobody")
    await agent("a1", {"id": "a1", "name": 'A "\\ 🙂'}, agentName='A "\\ 🙂')


@story(orders.before_assign)
async def positions_are_closed_before_the_agent_changes(desk: Desk) -> None:
    order = await desk.place()

    async def prepare(agent_id: str | None) -> Closing | None:
        before = await desk.tables()
        async with replay(desk) as told:
            closing: Closing | None = await desk.do(
                orders.before_assign, SERVICE, order.id, command(orders.Assign, agentId=agent_id)
            )
        assert told == {}
        assert await desk.tables() == before
        return closing

    assert await prepare("a1") is None
    at = await desk.assign(order.id, "a1")
    assert await prepare("a1") is None
    for next_agent in ("a2", None):
        closing = await prepare(next_agent)
        assert closing is not None
        (row,) = await desk.fetch("select assignment from orders")
        assert closing.order_id == order.id
        assert row["assignment"] <= closing.assignment <= at.seq, "it closes the present assignment, and not the next"


# what only reads


@story(orders.read)
@story(orders.list_orders)
@story(orders.events)
@story(tracking.permit)
@story(tracking.permit_count)
@story(tracking.snapshot)
@story(tracking.assignment)
@story(tracking.missed)
@story(links.follow_link)
@story(users.revocations)
async def read(desk: Desk) -> None:
    order = await desk.place()
    await desk.assign(order.id, "a1")
    await link(desk, order.id)
    before = await desk.tables()
    async with replay(desk) as told:
        await desk.do(orders.read, CUSTOMER, order.id)
        await desk.do(orders.list_orders, AGENT, command(orders.ListOrders))
        await desk.do(orders.events, STAFF, order.id)
        await desk.ask(tracking.permit, AGENT, order.id, 1)
        await desk.do(tracking.permit_count, STAFF, order.id)
        await desk.ask(tracking.snapshot, CUSTOMER, order.id, None)
        await desk.do(tracking.assignment, AGENT, order.id)
        await desk.do(tracking.missed, {order.id: 0})
        await desk.do(links.follow_link, b"secret of the link")
        await desk.do(users.revocations)
    assert told == {}
    assert await desk.tables() == before


# links and tokens


async def link(desk: Desk, order_id: str) -> Any:
    return await desk.do(
        links.create_link,
        CUSTOMER,
        order_id,
        command(links.CreateLink),
        scope=Scope.TRACK,
        digest=lambda link_id: b"secret of the link",
        ttl_s=60,
        ttl_max_s=600,
    )


@story(links.create_link)
@story(links.end_link)
async def linked_and_unlinked(desk: Desk) -> None:
    order = await desk.place()
    async with replay(desk) as told:
        created = await link(desk, order.id)
    assert told == {}
    assert len((await desk.tables())["links"]) == 1
    async with replay(desk) as told:
        await desk.do(links.end_link, CUSTOMER, order.id, created.id)
    assert told == {}
    ended = await desk.tables()
    assert len(ended["revocations"]) == 1
    async with replay(desk) as told:
        await desk.do(links.end_link, STAFF, order.id, created.id)
    assert told == {}
    assert await desk.tables() == ended, "a link ends once"


@story(users.revoke)
async def revoked(desk: Desk) -> None:
    await desk.place()
    before = await desk.tables()
    async with replay(desk) as told:
        await desk.do(users.revoke, ADMIN, command(users.Revoke, jti="j1"))
        await desk.do(users.revoke, SERVICE, command(users.Revoke, sub="c1"))
    assert told == {}
    after = await desk.tables()
    assert sorted((kind, value) for kind, value, _ in after.pop("revocations")) == [("jti", "j1"), ("sub", "c1")]
    assert after == {name: rows for name, rows in before.items() if name != "revocations"}


@pytest.mark.parametrize(("verb", "tell"), STORIES, ids=lambda part: part.__name__)
async def test_the_old_snapshot_and_the_events_make_the_new_snapshot(desk: Desk, verb: Verb, tell: Story) -> None:
    await tell(desk)
    assert verb in desk.replayed, "the story never carried out its verb inside replay()"
