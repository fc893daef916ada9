"""The tracking desk: who may watch an order, what it looks like now, and where its agent is.

Subscribing permits here, joins in ring 3, then reads here: in that order, or an event is lost or leaked.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import msgspec

from handlers.context import Row, Tx
from handlers.orders import LINES, order_uuid
from models.errors import Forbidden, Invalid, NotFound, OrderClosed, Refused
from models.event import Event, event
from models.order import LOCATABLE, Order, TrackedOrder, from_row, may_see, require_role
from models.position import Place
from models.user import BACK_OFFICE, Actor, Role


class Asked(NamedTuple):
    """A subscriber's question: this order, with every event after number `after` (None: without events)."""

    actor: Actor
    order_id: str
    after: int | None


PERMIT = "select o.id, o.seq, o.customer_id, o.agent_id from orders o where o.id = any($1::uuid[])"


async def permit(tx: Tx, asked: Sequence[Asked]) -> list[int | Refused]:
    """May these watch their orders? One statement for all: for each the number of the order's last event, or why not.

    Refusals:
        NotFound: the actor may not watch it, or there is none. Invalid: `after` is above the top.
    """
    rows = {str(row["id"]): row for row in await tx.all(PERMIT, _ids(one.order_id for one in asked))}
    return [_permitted(one, rows.get(one.order_id)) for one in asked]


def _permitted(one: Asked, row: Row | None) -> int | Refused:
    if row is None or not may_see(one.actor, one.order_id, row["customer_id"], row["agent_id"]):
        return NotFound("There is no such order.")
    top: int = row["seq"]
    if one.after is not None and one.after > top:
        return Invalid(f"The order's events end at {top}.", "/afterSeq")
    return top


async def permit_count(tx: Tx, actor: Actor, order_id: str) -> None:
    """Let the actor know how many watch this order.

    Raises:
        Forbidden: neither the shop nor an agent. NotFound: the actor may not see the order, or there is none.
    """
    require_role(actor, BACK_OFFICE | {Role.AGENT}, "see how many watch")
    (found,) = await permit(tx, [Asked(actor, order_id, None)])
    if isinstance(found, Refused):
        raise found


SNAPSHOT = f"""
select o.*, {LINES}, (select array_agg((e.seq, e.type, e.at, e.body) order by e.seq)
    from order_events e where e.order_id = o.id and e.seq > asked.after) as missed
from unnest($1::uuid[], $2::integer[]) as asked(id, after) join orders o on o.id = asked.id"""


class Snapshot(msgspec.Struct, frozen=True):
    """An order at one instant, as its reader may see it: `events` end at exactly `order.seq`."""

    order: Order | TrackedOrder
    events: Sequence[Event]
    assignment: int
    """Number of the current assignment, 0 when no positions flow."""


async def snapshot(tx: Tx, asked: Sequence[Asked]) -> list[Snapshot | Refused]:
    """The orders with the events that are asked for, in one statement for all. Each order is read once, however many
    ask for it. Refusals: NotFound.
    """
    lowest: dict[str, int | None] = {}
    for one in asked:
        known = lowest.get(one.order_id)
        lowest[one.order_id] = one.after if known is None else known if one.after is None else min(known, one.after)
    ids = _ids(lowest)
    rows = await tx.all(SNAPSHOT, ids, [lowest[str(id_)] for id_ in ids])
    read = {str(row["id"]): _Read(row) for row in rows}
    return [_seen(one, read.get(one.order_id)) for one in asked]


class _Read:
    """An order that was read, and its views: each is made once."""

    def __init__(self, row: Row) -> None:
        self.customer_id, self.agent_id = row["customer_id"], row["agent_id"]
        self.order = from_row(row)
        self.events = [event(self.order.id, *each) for each in row["missed"] or ()]
        self.assignment = row["assignment"] if self.order.status in LOCATABLE else 0

    @cached_property
    def tracked(self) -> tuple[TrackedOrder, list[Event]]:
        return self.order.for_tracking(), [one.for_tracking() for one in self.events]


def _seen(one: Asked, read: _Read | None) -> Snapshot | Refused:
    if read is None or not may_see(one.actor, one.order_id, read.customer_id, read.agent_id):
        return NotFound("There is no such order.")
    order, events = read.tracked if one.actor.tracks_only else (read.order, read.events)
    missed = read.order.seq - one.after if one.after is not None else 0
    return Snapshot(order, events[len(events) - missed :] if missed > 0 else [], read.assignment)


def _ids(order_ids: Iterable[str]) -> list[uuid.UUID]:
    """Each once; what cannot be the id of an order names none."""
    found = []
    for order_id in dict.fromkeys(order_ids):
        with contextlib.suppress(NotFound):
            found.append(order_uuid(order_id))
    return found


LOCATE = "select o.status, o.assignment, o.delivery_address from orders o where o.id = $1 and o.agent_id = $2"


class Assigned(NamedTuple):
    """An agent's assignment: its number, and where the order goes, if the address says so in degrees."""

    number: int
    destination: Place | None


class _Address(msgspec.Struct):
    lat: float | None = None
    lng: float | None = None


async def assignment(tx: Tx, actor: Actor, order_id: str) -> Assigned:
    """The actor's assignment to this order, under whose number its positions may be shown.

    Raises:
        Forbidden: not an agent. NotFound: not this order's agent. OrderClosed: no positions flow any more.
    """
    if actor.role is not Role.AGENT:
        raise Forbidden("Only the assigned agent has a position.")
    if not actor.reaches(order_id):
        raise NotFound("There is no such order.")
    row = await tx.one(LOCATE, order_uuid(order_id), actor.sub)
    if row is None:
        raise NotFound("There is no such order.")
    if row["status"] not in LOCATABLE:
        raise OrderClosed(f"The order is {row['status']}; its positions are not shown any more.")
    to = msgspec.json.decode(row["delivery_address"] or "{}", type=_Address)
    return Assigned(row["assignment"], Place(to.lat, to.lng) if to.lat is not None and to.lng is not None else None)


MISSED = """
select e.order_id, e.seq, e.type, e.at, e.body
from unnest($1::uuid[], $2::integer[]) as watched(order_id, top)
join order_events e on e.order_id = watched.order_id and e.seq > watched.top
order by e.order_id, e.seq"""


async def missed(tx: Tx, tops: dict[str, int]) -> dict[str, list[Event]]:
    """For each order and the top that is known of it: the events above, in one query for all."""
    found: dict[str, list[Event]] = {}
    for order_id, *rest in await tx.all(MISSED, [order_uuid(key) for key in tops], list(tops.values())):
        found.setdefault(str(order_id), []).append(event(str(order_id), *rest))
    return found
