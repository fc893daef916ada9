"""From the event table to the bus: what the bus says of an order, who says it, and which rows are marked as sent.

Two callers publish: the door right after its commit (the fast path), and the relay for whatever the fast path missed.
Publishing twice is harmless, because rooms drop repeats; not marking only means that the relay publishes again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import msgspec
import structlog

from handlers.context import Told
from handlers.orders import order_uuid
from models.errors import Unavailable
from models.event import Event, Type
from models.order import FINAL, Status
from server import metrics
from server.db import Database
from server.realtime.bus import Bus
from server.realtime.positions import PositionLane

log = structlog.get_logger()

MARK_INTERVAL_S = 0.05
"""How long sent events are collected before one statement marks them all."""

ORDER_PREFIX, USER_PREFIX, CONTROL = "waybill:order:", "waybill:user:", "waybill:control"
"""Channels: one for each watched order, one for each connected agent, one for everybody."""


def order_channel(order_id: str) -> str:
    return f"{ORDER_PREFIX}{{{order_id}}}"


def user_channel(user_id: str) -> str:
    return USER_PREFIX + user_id


class _Packed(NamedTuple):
    """An event on the bus: its payload is handed on as it is, never parsed."""

    seq: int
    type: str
    at: str
    payload: msgspec.Raw


_decode = msgspec.json.Decoder(tuple[str, list[_Packed]]).decode


def pack(order_id: str, events: Iterable[Event]) -> bytes:
    """The events of one commit as one message."""
    packed = [_Packed(one.seq, one.type, one.at, msgspec.Raw(one.payload)) for one in events]
    return b"e" + msgspec.json.encode((order_id, packed))


def unpack(message: bytes) -> tuple[str, list[Event]]:
    """(order id, events) of a message that `pack` made, without its leading `e`."""
    order_id, packed = _decode(message)
    return order_id, [Event(one.seq, one.type, one.at, bytes(one.payload)) for one in packed]


class Outbox:
    """Hands events to the bus and marks them."""

    def __init__(self, database: Database, bus: Bus, lane: PositionLane) -> None:
        self._database = database
        self._bus = bus
        self._lane = lane
        self._sent: list[tuple[str, int]] = []
        self._something = asyncio.Event()
        self._flushing = asyncio.Lock()

    def publish(self, told: Iterable[Told], by: str = "door") -> None:
        """Publish committed events. Nobody waits for this: what fails here is found unsent by the relay."""
        for one in told:
            if not one.events:
                continue
            message = pack(one.order_id, one.events)
            self._bus.publish(order_channel(one.order_id), message, self._marker(one.order_id, one.events, by))
            for event in one.events:
                if event.type == Type.ASSIGNED:
                    self._assigned(one.order_id, event)
                elif event.type == Type.STATUS and Status(event.data["status"]) in FINAL:
                    self._lane.closed(one.order_id, event.seq)

    def _assigned(self, order_id: str, event: Event) -> None:
        """An assignment ends the one before it, and its agent hears of it on every socket."""
        self._lane.closed(order_id, event.seq - 1)
        agent = event.data["agent"]
        if agent is not None:
            self._bus.publish(user_channel(agent["id"]), pack(order_id, [event]))

    def _marker(self, order_id: str, events: Sequence[Event], by: str) -> Callable[[object], None]:
        def answer(reply: object) -> None:
            if isinstance(reply, int):
                metrics.events_published.labels(by).inc(len(events))
                self._sent.extend((order_id, event.seq) for event in events)
                self._something.set()

        return answer

    async def run(self) -> None:
        """Mark what was sent, in batches, until cancelled."""
        while True:
            await self._something.wait()
            await asyncio.sleep(MARK_INTERVAL_S)
            await self.flush()

    async def flush(self) -> None:
        """Mark everything that was sent so far. What cannot be marked now is published again by the relay."""
        async with self._flushing:  # whoever flushes last, at a drain, waits for the marks that are under way
            self._something.clear()
            sent, self._sent = self._sent, []
            if not sent:
                return
            try:
                async with self._database.statement() as tx:
                    await tx.one(MARK, [order_uuid(order_id) for order_id, _ in sent], [seq for _, seq in sent])
            except Unavailable:
                log.warning("events_not_marked", count=len(sent))
                return
            metrics.events_marked.inc(len(sent))


MARK = """
update order_events e set sent = true from unnest($1::uuid[], $2::integer[]) as done(order_id, seq)
where e.order_id = done.order_id and e.seq = done.seq and not e.sent"""
