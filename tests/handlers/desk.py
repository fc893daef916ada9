"""Runs verbs as the doors do, and holds every one of them to the replay equation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
import pytest

from handlers import orders, tracking
from handlers.context import Told
from handlers.orders import LINES
from models.errors import Refused
from models.event import Event, event
from models.order import Fulfilment, Order, Status, from_row
from models.user import Actor, Role, Scope
from server.db import Database
from tests.harness import ORDER
from tests.models.making import actor

CommandT = TypeVar("CommandT")
Verb = Callable[..., Coroutine[Any, Any, Any]]

SERVICE, STAFF, ADMIN = actor(Role.SERVICE, "shop"), actor(Role.STAFF, "s1"), actor(Role.ADMIN, "x1")
CUSTOMER, AGENT = actor(Role.CUSTOMER, "c1"), actor(Role.AGENT, "a1")
"""The customer of ORDER, and the agent that tests assign."""

WAY: dict[Fulfilment, list[Status]] = {
    Fulfilment.DELIVERY: [
        Status.CONFIRMED,
        Status.PREPARING,
        Status.READY,
        Status.OUT_FOR_DELIVERY,
        Status.DELIVERED,
        Status.RETURN_REQUESTED,
        Status.RETURNED,
    ],
    Fulfilment.PICKUP: [
        Status.CONFIRMED,
        Status.PREPARING,
        Status.READY,
        Status.DELIVERED,
        Status.RETURN_REQUESTED,
        Status.RETURNED,
    ],
    Fulfilment.SERVICE: [
        Status.CONFIRMED,
        Status.IN_PROGRESS,
        Status.DELIVERED,
        Status.RETURN_REQUESTED,
        Status.RETURNED,
    ],
}
WAY[Fulfilment.DINE_IN] = WAY[Fulfilment.PICKUP]
"""The way of an order from `pending` with which nothing goes wrong, until it comes back."""


def guest(order_id: str, scope: Scope, sub: str = "link:1") -> Actor:
    return actor(Role.GUEST, sub, orders=frozenset({order_id}), scope=scope)


def command(type_: type[CommandT], **members: Any) -> CommandT:
    """A command from its JSON members, as both doors read it."""
    return msgspec.convert(members, type_)


def placing(**changes: Any) -> orders.Place:
    """The command of ORDER; `changes` replace members, None removes one."""
    return command(orders.Place, **{k: v for k, v in {**ORDER, **changes}.items() if v is not None})


class Desk:
    """Runs verbs, one transaction each, and writes down what they tell."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.told: list[Told] = []
        self.ran: list[Verb] = []
        self.replayed: set[Verb] = set()
        """The verbs for which the replay equation was shown."""

    async def do(self, verb: Verb, *args: Any, **more: Any) -> Any:
        """Carry out `verb(tx, *args)`."""
        async with self.database.statement() as tx:
            result = await verb(tx, *args, **more)
        self.told += tx.told
        self.ran.append(verb)
        return result

    async def ask(self, verb: Verb, by: Actor, order_id: str, after: int | None) -> Any:
        """The answer of a verb that takes the questions of many, to one; a refusal is raised."""
        (answer,) = await self.do(verb, [tracking.Asked(by, order_id, after)])
        if isinstance(answer, Refused):
            raise answer
        return answer

    async def refused(self, verb: Verb, *args: Any, **more: Any) -> Refused:
        """How the verb refuses this; it must."""
        with pytest.raises(Refused) as refusal:
            await self.do(verb, *args, **more)
        return refusal.value

    # orders

    async def place(self, by: Actor = SERVICE, **changes: Any) -> Order:
        order: Order = await self.do(orders.place, by, placing(**changes))
        return order

    async def move(self, order_id: str, *statuses: str, by: Actor = SERVICE) -> Order:
        """Change the status, step by step; the order after the last one."""
        for status in statuses:
            order: Order = await self.do(
                orders.change_status, by, order_id, command(orders.ChangeStatus, status=status)
            )
        return order

    async def assign(self, order_id: str, agent_id: str | None, **more: str) -> Order:
        order: Order = await self.do(orders.assign, SERVICE, order_id, command(orders.Assign, agentId=agent_id, **more))
        return order

    async def timeline(self, order_id: str, after: int = 0, by: Actor = SERVICE) -> Sequence[Event]:
        timeline: orders.Timeline = await self.do(orders.events, by, order_id, after)
        return timeline.events

    # everything

    async def fetch(self, statement: str, *args: Any) -> Sequence[Any]:
        async with self.database.statement() as tx:
            return await tx.all(statement, *args)

    async def orders(self) -> dict[str, Order]:
        """A fresh snapshot of every order."""
        rows = await self.fetch(f"select o.*, {LINES} from orders o")
        return {str(row["id"]): from_row(row) for row in rows}

    async def tables(self) -> dict[str, list[tuple[Any, ...]]]:
        """Every row of every table."""
        names = await self.fetch("select tablename from pg_tables where schemaname = 'public'")
        return {name: sorted(map(tuple, await self.fetch(f"select * from {name}")), key=repr) for (name,) in names}

    async def log(self, order_id: str) -> list[Event]:
        """The rows of the event table of one order, as events."""
        rows = await self.fetch(
            "select seq, type, at, body from order_events where order_id = $1::text::uuid order by seq", order_id
        )
        return [event(order_id, *row) for row in rows]


@asynccontextmanager
async def replay(desk: Desk) -> AsyncIterator[dict[str, list[Event]]]:
    """The replay equation, for what is done in the block: the old snapshot and the events that were told make the fresh
    snapshot, and those events are the new rows of the event table, and what both doors read from it.

    Gives the events that were told of each order, once the block has ended.
    """
    before, heard, ran = await desk.orders(), len(desk.told), len(desk.ran)
    told: dict[str, list[Event]] = {}
    yield told
    after, done = await desk.orders(), desk.ran[ran:]
    for order_id, events in desk.told[heard:]:
        told.setdefault(order_id, []).extend(events)
    for events in told.values():
        events.sort(key=lambda event: event.seq)  # callers that race are told in any order
    assert before.keys() <= after.keys()
    assert told.keys() <= after.keys()
    for order_id, order in after.items():
        copy = before.get(order_id) or unplaced(order)
        known = copy.seq
        for one in told.get(order_id, ()):
            copy = copy.apply(one)
        assert copy == order
        if order_id in told:
            await check_doors(desk, order, known, told[order_id])
    desk.replayed.update(done)


def unplaced(order: Order) -> Order:
    """What a client knows of the order before its first event: all that no event will change."""
    due = msgspec.structs.replace(order.payment, due=order.totals.total - order.payment.paid)
    return msgspec.structs.replace(
        order, seq=0, status=Status.PENDING, status_reason=None, agent=None, payment=due, updated_at=order.created_at
    )


async def check_doors(desk: Desk, order: Order, known: int, told: list[Event]) -> None:
    """The event table, GET events and the subscribe answer agree on what happened after number `known`."""
    log = await desk.log(order.id)
    assert [one.seq for one in log] == list(range(1, order.seq + 1))
    assert log[known:] == told
    for after in (0, known, order.seq):
        timeline = await desk.do(orders.events, SERVICE, order.id, after)
        assert (list(timeline.events), timeline.seq) == (log[after:], order.seq)
        snapshot = await desk.ask(tracking.snapshot, SERVICE, order.id, after)
        assert (snapshot.order, list(snapshot.events)) == (order, log[after:])
    assert await desk.do(orders.read, SERVICE, order.id) == order
    missed = await desk.do(tracking.missed, {order.id: known})
    assert missed == ({order.id: log[known:]} if log[known:] else {})
    redacted = await desk.timeline(order.id, by=guest(order.id, Scope.TRACK))
    assert redacted == [one.for_tracking() for one in log]
