"""What clients hear: the name and the shape of every message from server to client, as the contract has it."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from models.base import Amount, Time, UuidText, View
from models.event import Type
from models.order import Agent, Expiry, PaymentMethod, PaymentSummary, Status, TrackedAgent, TrackedPayment
from models.payment import PaymentStatus, Provider
from models.user import Role


class ActorShown(View):
    """Who made a change. Tracking guests do not see it."""

    role: Role
    id: str | None = None


Seq = Annotated[int, Meta(description="number in the order's log")]


class OrderEvent(View):
    """What every durable event carries: its order, its number in the order's log (1, 2, 3, ...), its time."""

    order_id: UuidText
    seq: Seq
    at: Time


class OrderStatusUpdate(OrderEvent):
    status: Status
    previous_status: Status | None = None
    note: str | None = None
    actor: ActorShown | None = None


class DeliveryAgentAssigned(msgspec.Struct, kw_only=True, rename="camel"):
    """`agent` is null when the order was taken from its agent."""

    order_id: UuidText
    seq: Seq
    at: Time
    agent: Agent | TrackedAgent | None


class OrderOutForDelivery(OrderEvent):
    """Follows the orderStatusUpdate with the next `seq`."""


class OrderDelivered(OrderEvent):
    """Follows the orderStatusUpdate with the next `seq`."""


class RefundedLine(View):
    line_id: str
    refunded: Annotated[int, Meta(description="of the line's total, minor units")]


class PaymentUpdate(OrderEvent):
    """A payment of the order has changed. `payment` is the order's own sums after that. Guests that track see no
    amounts."""

    payment_id: UuidText
    status: PaymentStatus
    provider: Provider
    currency: str
    payment: PaymentSummary | TrackedPayment
    amount: Amount | None = None
    refunded: Annotated[int | None, Meta(description="what went back of this payment")] = None
    reason: Annotated[
        str | None,
        Meta(description="late_refunded, duplicate_refunded, mismatch_refunded or revived"),
    ] = None
    lines: Annotated[list[RefundedLine] | None, Meta(description="lines of which something went back")] = None
    expires_at: Expiry = None


class PaymentMethodUpdate(OrderEvent):
    """How the order is to be paid has changed. `payment` is the order's own sums. Guests that track see no amounts."""

    method: PaymentMethod
    payment: PaymentSummary | TrackedPayment
    expires_at: Expiry = None


class OrderLocationUpdate(View):
    """Degrees, metres, metres per second; `ts` is Unix milliseconds, as the agent sent it. Keep the highest `ts`."""

    order_id: UuidText
    lat: Annotated[float, Meta(description="degrees")]
    lng: Annotated[float, Meta(description="degrees")]
    ts: Annotated[int | float, Meta(description="Unix milliseconds of the fix")]
    accuracy: Annotated[float | None, Meta(description="metres")] = None
    heading: Annotated[float | None, Meta(description="degrees from north, clockwise")] = None
    speed: Annotated[float | None, Meta(description="metres per second")] = None


class SubscriptionClosed(View):
    """Access to the order has ended: `reassigned`, `revoked` or `expired`."""

    order_id: UuidText
    code: Annotated[str, Meta(description="reassigned, revoked or expired")]


class TokenExpiring(View):
    """Send refreshToken before `expiresAt`."""

    expires_at: Time


class ServerDraining(View):
    """This instance stops: the transport ends, come back after `retryInMs`."""

    retry_in_ms: int


class Disconnected(View):
    """The session has ended for good: `expired`, `revoked`, `malformed`."""

    code: str


DURABLE = (Type.STATUS, Type.ASSIGNED, Type.OUT_FOR_DELIVERY, Type.DELIVERED, Type.PAYMENT, Type.METHOD)
"""Events that are rows of the order's log: they carry a `seq` and are never lost."""

DurableEvent = (
    OrderStatusUpdate
    | DeliveryAgentAssigned
    | OrderOutForDelivery
    | OrderDelivered
    | PaymentUpdate
    | PaymentMethodUpdate
)

HEARD: dict[str, type[msgspec.Struct]] = {
    Type.STATUS: OrderStatusUpdate,
    Type.ASSIGNED: DeliveryAgentAssigned,
    Type.OUT_FOR_DELIVERY: OrderOutForDelivery,
    Type.DELIVERED: OrderDelivered,
    Type.PAYMENT: PaymentUpdate,
    Type.METHOD: PaymentMethodUpdate,
    "orderLocationUpdate": OrderLocationUpdate,
    "subscriptionClosed": SubscriptionClosed,
    "tokenExpiring": TokenExpiring,
    "serverDraining": ServerDraining,
    "disconnected": Disconnected,
}
