"""An order event: a row of the order's log, an entry of the outbox and a message on the socket, all in one.

Events of an order are numbered 1, 2, 3 ... (`seq`) in the transaction of the change they report, without a hole.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

import msgspec
from sqlalchemy import Boolean, Column, ForeignKey, Index, Integer, Table, Text, Uuid, func, text

from models.base import UtcTime, metadata, rfc3339

order_events = Table(
    "order_events",
    metadata,
    Column("order_id", Uuid, ForeignKey("orders.id"), primary_key=True),
    Column("seq", Integer, primary_key=True),
    Column("type", Text, nullable=False),
    Column("at", UtcTime, nullable=False),
    # JSON object of what is special to the type; text, because it is only ever handed on, never searched
    Column("body", Text, nullable=False),
    # the database's clock, so that the relay's grace does not depend on the clocks of the instances
    Column("recorded_at", UtcTime, nullable=False, server_default=func.now()),
    Column("sent", Boolean, nullable=False, server_default=text("false")),
    Index("ix_order_events_unsent", "recorded_at", postgresql_where=text("not sent")),
)


class Type:
    """Names of the event types, the same in the table, on the socket and in the documents."""

    STATUS = "orderStatusUpdate"
    ASSIGNED = "deliveryAgentAssigned"
    OUT_FOR_DELIVERY = "orderOutForDelivery"
    DELIVERED = "orderDelivered"
    PAYMENT = "paymentUpdate"
    METHOD = "paymentMethodUpdate"


HIDDEN_FROM_TRACKING = ("note", "actor", "amount", "refunded", "override", "lines")
"""Members that a guest with scope `track` does not see."""


class Event(msgspec.Struct, frozen=True):
    """One event of one order. `payload` is the whole JSON object that clients get."""

    seq: int
    type: str
    at: str
    payload: bytes

    @property
    def data(self) -> dict[str, Any]:
        decoded: dict[str, Any] = msgspec.json.decode(self.payload)
        return decoded

    def for_tracking(self) -> Event:
        """The same event as a guest with scope `track` may see it: every `seq`, without notes, actors and amounts."""
        if self.type == Type.OUT_FOR_DELIVERY or self.type == Type.DELIVERED:
            return self
        data = {name: value for name, value in self.data.items() if name not in HIDDEN_FROM_TRACKING}
        if data.get("agent"):
            data["agent"] = tracked_agent(data["agent"])
        if "payment" in data:
            data["payment"] = {name: data["payment"][name] for name in ("method", "status")}
        return Event(self.seq, self.type, self.at, msgspec.json.encode(data))


def event(order_id: str, seq: int, type_: str, at: dt.datetime, body: str) -> Event:
    """The event that `body` (a JSON object as text) makes as number `seq` of the order."""
    stamp = rfc3339(at)
    head = f'{{"orderId":"{order_id}","seq":{seq},"at":"{stamp}"'
    return Event(seq, type_, stamp, (head + ("}" if body == "{}" else "," + body[1:])).encode())


def tracked_agent(agent: dict[str, Any]) -> dict[str, Any]:
    """The agent as a tracking guest sees it: the first name only, and no id."""
    name = agent.get("name")
    return {"name": name.split()[0]} if name and name.split() else {}
