"""What watchers read: the events after a number, the snapshot, and what several orders missed, in one query."""

from __future__ import annotations

import itertools
import random
import uuid
from typing import Any

import pytest

from handlers import orders, tracking
from models.errors import NotFound, Refused
from models.position import Place
from models.user import Actor, Role, Scope
from server.db import Transaction
from tests.handlers.desk import ADMIN, AGENT, CUSTOMER, SERVICE, STAFF, Desk, command, guest
from tests.handlers.test_place import pointer
from tests.models.making import actor


async def refused(desk: Desk, by: Actor, order_id: str, after: int | None) -> Refused:
    """How a subscriber is refused; it must be."""
    with pytest.raises(Refused) as refusal:
        await desk.ask(tracking.permit, by, order_id, after)
    return refusal.value


async def test_events_are_whole_oldest_first_and_end_at_the_top(desk: Desk) -> None:
    order = await desk.place()
    await desk.move(order.id, "confirmed", "preparing", "ready", "out_for_delivery", "delivered")
    log = await desk.log(order.id)
    assert [one.type for one in log] == [
        *["orderStatusUpdate"] * 5,
        "orderOutForDelivery",
        "orderStatusUpdate",
        "orderDelivered",
    ]
    for after in range(len(log) + 1):
        timeline = await desk.do(orders.events, CUSTOMER, order.id, after)
        assert (list(timeline.events), timeline.seq) == (log[after:], len(log))
        snapshot = await desk.ask(tracking.snapshot, CUSTOMER, order.id, after)
        assert (list(snapshot.events), snapshot.order.seq) == (log[after:], len(log))
        await desk.ask(tracking.permit, CUSTOMER, order.id, after)


async def test_a_number_above_the_top_is_invalid(desk: Desk) -> None:
    order = await desk.place()
    for by, after in itertools.product((CUSTOMER, guest(order.id, Scope.TRACK)), (2, 3, 2**31 - 1)):
        assert pointer(await desk.refused(orders.events, by, order.id, after)) == "/after"
        assert pointer(await refused(desk, by, order.id, after)) == "/afterSeq"


async def test_an_assignment_says_where_the_order_goes_if_the_address_does(desk: Desk) -> None:
    line = {"line1": "12 MG Road", "city": "Bengaluru", "country": "IN"}
    for address, place in (
        ({**line, "lat": 12.97, "lng": 77.59}, Place(12.97, 77.59)),
        ({**line, "lat": 0, "lng": 0}, Place(0, 0)),
        ({**line, "lat": 12.97}, None),
        (line, None),
    ):
        order = await desk.place(deliveryAddress=address)
        at = await desk.assign(order.id, "a1")
        assert await desk.do(tracking.assignment, AGENT, order.id) == (at.seq, place)


async def test_a_stranger_does_not_learn_where_the_top_is(desk: Desk) -> None:
    order = await desk.place()
    stranger = guest(str(uuid.uuid4()), Scope.TRACK)
    assert (await desk.refused(orders.events, stranger, order.id, 99)).code == "not_found"
    assert (await refused(desk, stranger, order.id, 99)).code == "not_found"


async def test_a_subscriber_who_names_no_number_gets_no_events(desk: Desk) -> None:
    order = await desk.place()
    snapshot = await desk.ask(tracking.snapshot, CUSTOMER, order.id, None)
    assert (list(snapshot.events), snapshot.order) == ([], order)


async def test_what_many_orders_missed_is_one_answer(desk: Desk) -> None:
    dice = random.Random(3)
    placed = [await desk.place() for _ in range(12)]
    for order in placed:
        await desk.move(order.id, *["confirmed", "preparing", "ready"][: dice.randint(1, 3)])
        if dice.random() < 0.5:
            await desk.assign(order.id, "a1")
    logs = {order.id: await desk.log(order.id) for order in placed}
    tops = {order_id: dice.randint(0, len(log)) for order_id, log in logs.items()}
    nowhere = str(uuid.uuid4())
    missed = await desk.do(tracking.missed, {**tops, nowhere: 0})
    assert missed == {key: log[tops[key] :] for key, log in logs.items() if log[tops[key] :]}
    assert await desk.do(tracking.missed, {}) == {}
    assert await desk.do(tracking.missed, {key: len(log) for key, log in logs.items()}) == {}
    assert await desk.do(tracking.missed, {key: 2**31 - 1 for key in logs}) == {}


async def test_an_order_says_the_same_on_every_way_to_it(desk: Desk) -> None:
    order = await desk.place()
    await desk.assign(order.id, "a1", agentName="Asha Rao")
    read = await desk.do(orders.read, SERVICE, order.id)
    listed = await desk.do(orders.list_orders, SERVICE, orders.ListOrders())
    snapshot = await desk.ask(tracking.snapshot, SERVICE, order.id, None)
    assert read == snapshot.order == listed.items[0] == (await desk.orders())[order.id]


# many at once

PEOPLE = [
    SERVICE,
    STAFF,
    ADMIN,
    CUSTOMER,
    AGENT,
    actor(Role.CUSTOMER, "c2"),
    actor(Role.AGENT, "a2"),
    actor(Role.GUEST, "nobody"),
]


@pytest.mark.parametrize("seed", range(5))
async def test_many_are_answered_exactly_as_each_alone(desk: Desk, seed: int) -> None:
    dice = random.Random(seed)
    ids = []
    for _ in range(6):
        order = await desk.place(customerId=dice.choice(["c1", "c2", None]))
        ids.append(order.id)
        await desk.move(order.id, *["confirmed", "preparing", "ready"][: dice.randint(1, 3)])
        if dice.random() < 0.7:
            await desk.assign(order.id, dice.choice(["a1", "a2"]), agentName="Asha Rao")
        if dice.random() < 0.3:
            await desk.do(orders.cancel, STAFF, order.id, command(orders.Cancel, reason="Late"))
    people = [
        *PEOPLE,
        *(guest(order_id, scope) for order_id in ids for scope in Scope),
        *(actor(role, sub, orders=frozenset(ids[:2])) for role, sub in ((Role.STAFF, "s2"), (Role.CUSTOMER, "c1"))),
    ]
    named = [*ids, str(uuid.uuid4()), "no such order", ids[0].upper(), "{" + ids[0] + "}"]
    asked = [
        tracking.Asked(by, order_id, after)
        for by in people
        for order_id in named
        for after in (None, dice.randint(0, 7), dice.randint(0, 7))
    ]
    dice.shuffle(asked)
    for verb in (tracking.permit, tracking.snapshot):
        together = await desk.do(verb, asked)
        alone = [(await desk.do(verb, [one]))[0] for one in asked]
        assert list(map(told, together)) == list(map(told, alone))
        for one, answer in zip(asked, together, strict=True):
            seen = await readable(desk, one)
            if not seen:
                assert told(answer) == ("not_found", "There is no such order.", {}), one
            elif isinstance(answer, tracking.Snapshot):
                timeline = await desk.timeline(one.order_id, by=one.actor)
                assert answer.order == await desk.do(orders.read, one.actor, one.order_id)
                assert list(answer.events) == ([] if one.after is None else list(timeline[one.after :]))


async def readable(desk: Desk, one: tracking.Asked) -> bool:
    """Whether the actor may read the order by the other door."""
    try:
        await desk.do(orders.read, one.actor, one.order_id)
    except NotFound:
        return False
    return True


def told(answer: object) -> object:
    """What the caller would be told, refusals too, as a value that compares."""
    return (answer.code, answer.detail, answer.fields) if isinstance(answer, Refused) else answer


async def test_many_are_one_statement(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    placed = [await desk.place() for _ in range(3)]
    asked = [tracking.Asked(by, order.id, 0) for by in (SERVICE, CUSTOMER, AGENT) for order in placed]
    statements: list[str] = []
    ask = Transaction.all

    async def noted(self: Transaction, statement: str, *args: object) -> Any:
        statements.append(statement)
        return await ask(self, statement, *args)

    monkeypatch.setattr(Transaction, "all", noted)
    await desk.do(tracking.permit, asked)
    await desk.do(tracking.snapshot, asked)
    assert statements == [tracking.PERMIT, tracking.SNAPSHOT]
    assert await desk.do(tracking.permit, []) == await desk.do(tracking.snapshot, []) == []
