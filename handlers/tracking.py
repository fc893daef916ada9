"""The tracking desk: who may watch an order, what it looks like now, and where its agent is.

Subscribing permits here, joins in ring 3, then reads here: in that order, or an event is lost or leaked.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from handlers.context import Tx
from handlers.orders import LINES, SEEN, order_uuid
from models.errors import Forbidden, Invalid, NotFound, OrderClosed
from models.event import Event, event
from models.order import LOCATABLE, Order, TrackedOrder, from_row, sight
from models.user import Actor, Role

PERMIT = f"select o.seq from orders o where o.id = $1 and {SEEN}"


async def permit(tx: Tx, actor: Actor, order_id: str, after: int | None) -> None:
    """Let the actor watch this order from event number `after` on (None: from now on).

    Raises:
        NotFound: the actor may not watch it, or there is none. Invalid: `after` is above the top.
    """
    seen = sight(actor, order_id)
    row = await tx.one(PERMIT, order_uuid(order_id), seen.all, seen.customer, seen.agent)
    if row is None:
        raise NotFound("There is no such order.")
    if after is not None and after > row["seq"]:
        raise Invalid(f"The order's events end at {row['seq']}.", "/afterSeq")


SNAPSHOT = f"""
select o.*, {LINES}, (select array_agg((e.seq, e.type, e.at, e.body) order by e.seq)
    from order_events e where e.order_id = o.id and e.seq > $5) as missed
from orders o where o.id = $1 and {SEEN}"""


class Snapshot(msgspec.Struct, frozen=True):
    """An order at one instant: `events` end at exactly `order.seq`."""

    order: Order | TrackedOrder
    events: Sequence[Event]
    assignment: int
    """Number of the current assignment, 0 when no positions flow."""


async def snapshot(tx: Tx, actor: Actor, order_id: str, after: int | None) -> Snapshot:
    """The order with every event after number `after` (None: without events), in one statement. Raises NotFound."""
    seen = sight(actor, order_id)
    row = await tx.one(SNAPSHOT, order_uuid(order_id), seen.all, seen.customer, seen.agent, after)
    if row is None:
        raise NotFound("There is no such order.")
    order = from_row(row)
    missed = [event(order_id, *each) for each in row["missed"] or ()]
    return Snapshot(
        order.view(actor),
        [one.for_tracking() for one in missed] if actor.tracks_only else missed,
        row["assignment"] if order.status in LOCATABLE else 0,
    )


LOCATE = "select o.status, o.assignment from orders o where o.id = $1 and o.agent_id = $2"


async def assignment(tx: Tx, actor: Actor, order_id: str) -> int:
    """The number of the actor's assignment to this order, under which its positions may be shown.

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
    number: int = row["assignment"]
    return number


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
