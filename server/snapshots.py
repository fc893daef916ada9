"""What a subscriber is answered with: the order at one instant, from memory when that is as good, else from the table.

Memory is as good exactly when the order's last event, which this subscribe's permit has just seen in the table, is the
last one that the room has delivered: then the table would say the same. docs/decisions/0015-snapshots-from-memory.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from handlers import tracking
from handlers.tracking import Asked
from models.base import Holds, Time
from models.errors import Refused
from models.event import Event
from models.message import DURABLE, DurableEvent, OrderLocationUpdate, Seq
from models.order import Order, TrackedOrder
from models.user import Actor
from server import metrics
from server.batches import Batches
from server.doors import Doors
from server.realtime.link import BusAway
from server.realtime.positions import Known, PositionLane
from server.realtime.rooms import Image, Kept, Room, Rooms

FULL, TRACKED = "full", "tracked"
"""Views of an event: as it is, and without what a guest with scope `track` may not see."""


def view_of(actor: Actor) -> str:
    return TRACKED if actor.tracks_only else FULL


class ToldEvent(msgspec.Struct, frozen=True):
    """An event as an entry of a list: its payload under `data`."""

    type: Annotated[str, Meta(extra_json_schema={"enum": list(DURABLE)})]
    seq: Seq
    at: Time
    data: Annotated[msgspec.Raw, Holds(DurableEvent)]


class Subscribed(msgspec.Struct, frozen=True):
    """The order at one instant: `events` end at exactly `seq`."""

    ok: Literal[True]
    seq: int
    order: Annotated[msgspec.Raw, Holds(Order | TrackedOrder)]
    location: Annotated[msgspec.Raw | None, Holds(OrderLocationUpdate | None)]
    events: list[Annotated[msgspec.Raw, Holds(ToldEvent)]]


def listed(events: Sequence[Event]) -> list[ToldEvent]:
    """Events as both doors list them."""
    return [ToldEvent(one.type, one.seq, one.at, msgspec.Raw(one.payload)) for one in events]


class Picture(NamedTuple):
    """An order right after event number `seq`, as one subscriber sees it; `order` and each of `events` are JSON."""

    seq: int
    epoch: int
    view: str
    order: bytes
    events: list[msgspec.Raw]
    read: Sequence[Event] = ()
    """The events as they were read."""
    last: Known | None = None
    """The last position that Redis knew, if it was asked."""
    position_since: int = -1
    """For `Room.position_since`."""


class Snapshots:
    """Permits and pictures of orders for the subscribers of one instance."""

    def __init__(self, doors: Doors, lane: PositionLane, rooms: Rooms[Event], batch_max: int) -> None:
        self._doors = doors
        self._lane = lane
        self._rooms = rooms
        self._permits = Batches("permits", self._permit, batch_max)
        self._reads = Batches("snapshots", self._read, batch_max)
        self._asking: dict[tuple[Room[Event], int, bool], asyncio.Task[tuple[bool, Known | None]]] = {}
        """Questions for last positions that are under way."""

    async def permit(self, actor: Actor, order_id: str, after: int | None) -> int:
        """The number of the order's last event. Raises NotFound, Invalid or Unavailable."""
        return await self._permits.ask(Asked(actor, order_id, after))

    async def take(
        self, room: Room[Event], actor: Actor, after: int | None, permitted: int, *, listening: bool
    ) -> Picture:
        """A picture for an actor who was permitted when `permitted` was the last event, and who has joined since.

        `listening`: whether the bus has confirmed the room's channel.

        Raises:
            NotFound: the actor has lost the order since. Unavailable: Postgres does not answer.
        """
        picture = _remembered(room, view_of(actor), after, permitted)
        metrics.snapshots.labels("table" if picture is None else "memory").inc()
        changes = self._rooms.bus_changes
        known = None
        if room.position_since != changes and (picture is None or picture.epoch):
            known = self._last_position(room, changes, listening)
        if picture is None:
            snapshot = await self._reads.ask(Asked(actor, room.key, after))
            events = [msgspec.Raw(msgspec.json.encode(one)) for one in listed(snapshot.events)]
            order = msgspec.json.encode(snapshot.order)
            picture = Picture(snapshot.order.seq, snapshot.assignment, view_of(actor), order, events, snapshot.events)
        if known is not None:
            asked, last = await asyncio.shield(known)  # others wait for it too
            picture = picture._replace(last=last, position_since=changes if listening and asked else -1)
        return picture

    def answer(self, room: Room[Event], picture: Picture) -> bytes:
        """The picture as the answer to a subscribe, with the newest position that is known now."""
        location = self.location(room, picture)
        told = None if location is None else msgspec.Raw(location)
        return msgspec.json.encode(Subscribed(True, picture.seq, msgspec.Raw(picture.order), told, picture.events))

    def location(self, room: Room[Event], picture: Picture) -> bytes | None:
        """The newest position of the picture's assignment that is known now."""
        if not picture.epoch:
            return None
        seen = [room.position] if room.position is not None and room.epoch == picture.epoch else []
        if picture.last is not None and picture.last.assignment == picture.epoch:
            seen.append((picture.last.ts, picture.last.payload))
        return max(seen)[1] if seen else None

    def keep(self, room: Room[Event], picture: Picture) -> None:
        """Remember what the next subscriber need not ask for. The room's member has been settled with the picture."""
        if picture.seq == room.top:
            if room.image is None:
                room.image = Image(picture.seq, picture.epoch)
            room.image.views[picture.view] = picture.order
            if picture.view == FULL:
                room.recall(picture.read)
        if picture.position_since >= 0 and picture.epoch == room.epoch:
            room.position_since = picture.position_since
            last = picture.last
            if last is not None and last.assignment == room.epoch:
                room.position = max(room.position or (last.ts, last.payload), (last.ts, last.payload))

    def _last_position(
        self, room: Room[Event], changes: int, listening: bool
    ) -> asyncio.Task[tuple[bool, Known | None]]:
        """Whether Redis could be asked, and the last position that it knows. One question for all who wait for it, if
        it was asked no earlier than the bus was known to listen."""
        question = (room, changes, listening)
        task = self._asking.get(question)
        if task is None:
            task = self._asking[question] = asyncio.create_task(self._ask_position(room.key))
            task.add_done_callback(lambda _: self._asking.pop(question))
        return task

    async def _ask_position(self, order_id: str) -> tuple[bool, Known | None]:
        try:
            return True, await self._lane.known(order_id)
        except BusAway:
            return False, None

    async def _permit(self, asked: Sequence[Asked]) -> Sequence[int | Refused]:
        async with self._doors.database.statement() as tx:
            return await tracking.permit(tx, asked)

    async def _read(self, asked: Sequence[Asked]) -> Sequence[tracking.Snapshot | Refused]:
        async with self._doors.database.statement() as tx:
            return await tracking.snapshot(tx, asked)


def _remembered(room: Room[Event], view: str, after: int | None, permitted: int) -> Picture | None:
    """The picture from memory; None: it does not hold it, or the table has seen more, or less, than the room."""
    image = room.image
    if image is None or view not in image.views or not room.top == image.seq == permitted:
        return None
    if after is None or after == permitted:
        return Picture(permitted, image.epoch, view, image.views[view], [])
    if not room.covers(after):
        return None
    kept = [one for one in room.recent if one.seq > after]
    events = [msgspec.Raw(_listed(one, view)) for one in kept]
    return Picture(permitted, image.epoch, view, image.views[view], events, [one.entry for one in kept])


def _listed(kept: Kept[Event], view: str) -> bytes:
    if kept.listed is None:
        kept.listed = {}
    item = kept.listed.get(view)
    if item is None:
        event = kept.entry.for_tracking() if view == TRACKED else kept.entry
        item = kept.listed[view] = msgspec.json.encode(listed([event])[0])
    return item
