"""What clients hear: the name and the shape of every message from server to client, as the contract has it."""

from __future__ import annotations

import msgspec

from models.base import View
from models.event import Type
from models.order import Agent, Status, TrackedAgent
from models.user import Role


class ActorShown(View):
    """Who made a change. Tracking guests do not see it."""

    role: Role
    id: str | None = None


class OrderEvent(View):
    """What every durable event carries: its order, its number in the order's log (1, 2, 3, ...), its time."""

    order_id: str
    seq: int
    at: str


class OrderStatusUpdate(OrderEvent):
    status: Status
    previous_status: Status | None = None
    note: str | None = None
    actor: ActorShown | None = None


class DeliveryAgentAssigned(msgspec.Struct, kw_only=True, rename="camel"):
    """`agent` is null when the order was taken from its agent."""

    order_id: str
    seq: int
    at: str
    agent: Agent | TrackedAgent | None


class OrderOutForDelivery(OrderEvent):
    """Follows the orderStatusUpdate with the next `seq`."""


class OrderDelivered(OrderEvent):
    """Follows the orderStatusUpdate with the next `seq`."""


class OrderLocationUpdate(View):
    """Degrees, metres, metres per second; `ts` is Unix milliseconds, as the agent sent it. Keep the highest `ts`."""

    order_id: str
    lat: float
    lng: float
    ts: int | float
    accuracy: float | None = None
    heading: float | None = None
    speed: float | None = None


class SubscriptionClosed(View):
    """Access to the order has ended: `reassigned`, `revoked` or `expired`."""

    order_id: str
    code: str


class TokenExpiring(View):
    """Send refreshToken before `expiresAt`."""

    expires_at: str


class ServerDraining(View):
    """This instance stops: the transport ends, come back after `retryInMs`."""

    retry_in_ms: int


class Disconnected(View):
    """The session has ended for good: `expired`, `revoked`, `malformed`."""

    code: str


HEARD: dict[str, type[msgspec.Struct]] = {
    Type.STATUS: OrderStatusUpdate,
    Type.ASSIGNED: DeliveryAgentAssigned,
    Type.OUT_FOR_DELIVERY: OrderOutForDelivery,
    Type.DELIVERED: OrderDelivered,
    "orderLocationUpdate": OrderLocationUpdate,
    "subscriptionClosed": SubscriptionClosed,
    "tokenExpiring": TokenExpiring,
    "serverDraining": ServerDraining,
    "disconnected": Disconnected,
}
