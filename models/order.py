"""An order: its tables, its lines and totals, where it may move and who may move it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Protocol

import msgspec
from msgspec import UNSET, Meta, UnsetType
from sqlalchemy import BigInteger, Boolean, Column, ForeignKey, Identity, Index, Integer, Table, Text, Uuid, text

from models.address import Address, Contact
from models.base import (
    Amount,
    Later,
    MinorUnits,
    Quantity,
    ShortText,
    Strict,
    Time,
    UtcTime,
    UuidText,
    View,
    metadata,
    rfc3339,
)
from models.errors import Forbidden, IllegalMove, Invalid, NotFound, OrderClosed, PaymentRequired
from models.event import Event, Type, tracked_agent
from models.money import EXPONENTS, MINOR_UNITS_MAX, tax_of
from models.user import BACK_OFFICE, Actor, Role

orders = Table(
    "orders",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("number", BigInteger, Identity(start=1001), nullable=False, unique=True),
    Column("reference", Text, unique=True),
    Column("customer_id", Text),
    Column("fulfilment", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("status_reason", Text),
    Column("seq", Integer, nullable=False),
    Column("currency", Text, nullable=False),
    Column("payment_method", Text, nullable=False),
    Column("items_total", BigInteger, nullable=False),
    Column("discount", BigInteger, nullable=False, server_default=text("0")),
    Column("delivery", BigInteger, nullable=False, server_default=text("0")),
    Column("tax", BigInteger, nullable=False),
    Column("rounding", BigInteger, nullable=False, server_default=text("0")),
    Column("total", BigInteger, nullable=False),
    Column("paid", BigInteger, nullable=False, server_default=text("0")),
    Column("refunded", BigInteger, nullable=False, server_default=text("0")),
    # whether somebody is trying to pay: a payment is processing, authorized or unknown
    Column("paying", Boolean, nullable=False, server_default=text("false")),
    # when it is cancelled unless the money comes, and when it was
    Column("expires_at", UtcTime),
    Column("expired_at", UtcTime),
    Column("delivery_address", Text),
    Column("contact", Text),
    Column("billing", Text),
    Column("dining_table", Text),
    Column("notes", Text),
    Column("agent_id", Text),
    Column("agent_name", Text),
    Column("vehicle", Text),
    # number of the current assignment: the seq of its deliveryAgentAssigned; 0: nobody is assigned
    Column("assignment", Integer, nullable=False, server_default=text("0")),
    Column("created_at", UtcTime, nullable=False),
    Column("updated_at", UtcTime, nullable=False),
    Index("ix_orders_newest", text("created_at desc"), text("id desc")),
    Index("ix_orders_customer", "customer_id", text("created_at desc"), text("id desc")),
    Index("ix_orders_agent", "agent_id", text("created_at desc"), text("id desc")),
    Index("ix_orders_status", "status", text("created_at desc"), text("id desc")),
    Index("ix_orders_expiring", "expires_at", postgresql_where=text("status = 'pending'")),
)

order_lines = Table(
    "order_lines",
    metadata,
    Column("order_id", Uuid, ForeignKey("orders.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("sku", Text),
    Column("name", Text, nullable=False),
    Column("quantity", Integer, nullable=False),
    Column("unit_price", BigInteger, nullable=False),
    Column("discount", BigInteger, nullable=False, server_default=text("0")),
    Column("tax_rate_bp", Integer, nullable=False),
    Column("tax", BigInteger, nullable=False),
    Column("total", BigInteger, nullable=False),
    Column("returned", Integer, nullable=False, server_default=text("0")),
    Column("refunded", BigInteger, nullable=False, server_default=text("0")),
)


class Fulfilment(StrEnum):
    DELIVERY = "delivery"
    PICKUP = "pickup"
    DINE_IN = "dine_in"
    SERVICE = "service"


class Status(StrEnum):
    PENDING = "pending"
    CONFIRMED = "confirmed"
    PREPARING = "preparing"
    READY = "ready"
    IN_PROGRESS = "in_progress"
    OUT_FOR_DELIVERY = "out_for_delivery"
    DELIVERY_FAILED = "delivery_failed"
    DELIVERED = "delivered"
    RETURN_REQUESTED = "return_requested"
    RETURNED = "returned"
    CANCELLED = "cancelled"


class PaymentMethod(StrEnum):
    ONLINE = "online"
    """Confirmed only by the money."""
    CASH = "cash"
    """Confirmed before the money, delivered with it."""
    LATER = "later"
    """Money is agreed upon elsewhere."""


S = Status
_AFTER_DELIVERY: dict[Status, tuple[Status, ...]] = {
    S.DELIVERED: (S.RETURN_REQUESTED,),
    S.RETURN_REQUESTED: (S.DELIVERED, S.RETURNED),
}
_PICKUP: dict[Status, tuple[Status, ...]] = {
    S.PENDING: (S.CONFIRMED, S.CANCELLED),
    S.CONFIRMED: (S.PREPARING, S.CANCELLED),
    S.PREPARING: (S.READY, S.CANCELLED),
    S.READY: (S.DELIVERED, S.CANCELLED),
    **_AFTER_DELIVERY,
}
MOVES: dict[Fulfilment, dict[Status, tuple[Status, ...]]] = {
    Fulfilment.DELIVERY: {
        **_PICKUP,
        S.READY: (S.OUT_FOR_DELIVERY, S.CANCELLED),
        S.OUT_FOR_DELIVERY: (S.DELIVERED, S.DELIVERY_FAILED),
        S.DELIVERY_FAILED: (S.OUT_FOR_DELIVERY, S.CANCELLED),
    },
    Fulfilment.PICKUP: _PICKUP,
    Fulfilment.DINE_IN: _PICKUP,
    Fulfilment.SERVICE: {
        S.PENDING: (S.CONFIRMED, S.CANCELLED),
        S.CONFIRMED: (S.IN_PROGRESS, S.CANCELLED),
        S.IN_PROGRESS: (S.DELIVERED,),
        **_AFTER_DELIVERY,
    },
}
"""Where an order may go from where it is. `cancelled -> confirmed` is not here: only late money does that."""

AGENT_MOVES = frozenset(
    {(S.READY, S.OUT_FOR_DELIVERY), (S.OUT_FOR_DELIVERY, S.DELIVERED), (S.OUT_FOR_DELIVERY, S.DELIVERY_FAILED)}
)
OWNER_MOVES = frozenset({(S.PENDING, S.CANCELLED), (S.CONFIRMED, S.CANCELLED)})
"""What the customer, or the guest who pays, may do."""

FINAL = frozenset({S.DELIVERED, S.CANCELLED, S.RETURNED})
LOCATABLE = frozenset(S) - FINAL - {S.RETURN_REQUESTED}
"""Statuses in which positions of the agent flow: from assignment until a final status."""


def may_move(actor: Actor, source: Status, target: Status) -> bool:
    """Whether the actor's role may make this step, the MOVES table permitting."""
    if actor.role in BACK_OFFICE:
        return True
    if actor.role is Role.AGENT:
        return (source, target) in AGENT_MOVES
    if actor.role is Role.CUSTOMER or (actor.role is Role.GUEST and not actor.tracks_only):
        return (source, target) in OWNER_MOVES
    return False


def sources(actor: Actor, target: Status) -> list[str]:
    """Every `fulfilment:status` from which the actor may move an order to `target`: the table as one SQL guard."""
    return [
        f"{fulfilment}:{source}"
        for fulfilment, moves in MOVES.items()
        for source, targets in moves.items()
        if target in targets and may_move(actor, source, target)
    ]


PAYMENT_EXPIRY_S = 900
"""How long an online order waits for somebody to pay, unless the setting of this name says otherwise."""

HOLD_MAX_S = 2700
"""How long after placing it does so at most, unless the setting of this name says otherwise."""


class AskedItem(Strict):
    """A line as it is asked for: of a product (`sku`), or free (`name` and `unitPrice`, minor units before tax)."""

    # until there are products, a line can only be free
    SCHEMA: ClassVar[dict[str, Any]] = {"required": ["quantity", "name", "unitPrice"]}

    quantity: Quantity
    sku: Annotated[ShortText, Later] | UnsetType = UNSET
    name: ShortText | UnsetType = UNSET
    unit_price: MinorUnits | UnsetType = UNSET
    tax_rate_bp: Annotated[int, Meta(ge=0, le=10_000, description="basis points: 1800 is 18 %")] | UnsetType = UNSET


class Line(View):
    line_id: str
    name: str
    quantity: int
    unit_price: Amount
    discount: Amount
    tax_rate_bp: Annotated[int, Meta(description="basis points: 1800 is 18 %")]
    tax: Amount
    total: Amount
    returned: Annotated[int, Meta(description="how many of the quantity came back")]
    refunded: Amount
    sku: str | None = None


class TrackedLine(View):
    line_id: str
    name: str
    quantity: int
    returned: int
    sku: str | None = None


class Totals(View):
    """Minor units. total = items - discount + delivery + tax + rounding."""

    items: Amount
    discount: Amount
    delivery: Amount
    tax: Amount
    rounding: Amount
    total: Amount


PaymentState = Annotated[
    str, Meta(description="unpaid, processing, partially_paid, paid, partially_refunded or refunded")
]


class PaymentSummary(View):
    method: PaymentMethod
    status: PaymentState
    due: Amount
    paid: Amount
    refunded: Amount


Waits = Annotated[list[str] | None, Meta(description="what the order waits for: payment")]
Expiry = Annotated[Time | None, Meta(description="when it is cancelled unless the payment comes")]


class TrackedPayment(View):
    method: PaymentMethod
    status: PaymentState


class Agent(View):
    id: str
    name: str | None = None
    vehicle: str | None = None


class TrackedAgent(View):
    name: str | None = None


class TrackedOrder(View):
    """The order as a guest with scope `track` sees it: no people, no address, no notes, no amounts."""

    id: UuidText
    number: Annotated[str, Meta(description="short and unique, for people")]
    fulfilment: Fulfilment
    status: Status
    seq: Annotated[int, Meta(description="number of the last event")]
    currency: Annotated[str, Meta(description="ISO 4217")]
    items: list[TrackedLine]
    payment: TrackedPayment
    created_at: Time
    updated_at: Time
    reference: str | None = None
    agent: TrackedAgent | None = None
    waiting_for: Waits = None
    expires_at: Expiry = None


class Order(View):
    """An order as its customer, its agent and the back office see it."""

    # It also judges its own moves and applies its own events.

    id: UuidText
    number: Annotated[str, Meta(description="short and unique, for people")]
    fulfilment: Fulfilment
    status: Status
    seq: Annotated[int, Meta(description="number of the last event")]
    currency: Annotated[str, Meta(description="ISO 4217")]
    items: list[Line]
    totals: Totals
    payment: PaymentSummary
    created_at: Time
    updated_at: Time
    reference: str | None = None
    customer_id: str | None = None
    status_reason: str | None = None
    delivery_address: Address | None = None
    contact: Contact | None = None
    table: str | None = None
    agent: Agent | None = None
    notes: str | None = None
    waiting_for: Waits = None
    expires_at: Expiry = None

    def allowed(self, actor: Actor) -> list[str]:
        """Where this actor may move the order now; what only an override lets through, staff may."""
        return [
            target
            for target in MOVES[self.fulfilment].get(self.status, ())
            if may_move(actor, self.status, target) and self._unpaid(target, override=actor.is_staff) is None
        ]

    def check_move(self, actor: Actor, target: Status, override: bool) -> None:
        """Refuse the move that `actor` asks for, or return.

        Raises:
            IllegalMove: not from here, or not by this role.
            PaymentRequired: `online` is confirmed by its money only; `cash` is delivered with nothing due, unless staff
                override that.
        """
        moves = MOVES[self.fulfilment].get(self.status, ())
        # whoever asks: an online order is confirmed by its money only
        waits = target is Status.CONFIRMED and self.payment.method is PaymentMethod.ONLINE
        if target not in moves or not (may_move(actor, self.status, target) or waits):
            allowed = self.allowed(actor)
            may = f"you may move it to {' or '.join(allowed)}" if allowed else "you cannot move it any further"
            raise IllegalMove(f"The order is {self.status}; {may}, not to {target}.", allowed)
        unpaid = self._unpaid(target, override)
        if unpaid is not None:
            raise PaymentRequired(unpaid, self.payment.due)

    def _unpaid(self, target: Status, override: bool) -> str | None:
        """Why its money keeps the order from `target`, or None."""
        if target is Status.CONFIRMED and self.payment.method is PaymentMethod.ONLINE:
            return "An online order is confirmed by its payment."
        if target is Status.DELIVERED and self.status is not Status.RETURN_REQUESTED and not override:
            if self.payment.method is PaymentMethod.CASH and self.payment.due > 0:
                return "The cash is still due; staff may override with a reason."
        return None

    def check_assignable(self) -> None:
        """Raises OrderClosed: an agent can be assigned in every status that is not final."""
        if self.status in FINAL:
            raise OrderClosed(f"The order is {self.status}; nobody can be assigned any more.")

    def check_payment_method(self, actor: Actor, method: PaymentMethod) -> None:
        """Refuse that the order is paid in this way from now on, or return. Nobody looks here whether it is being paid.

        Raises:
            OrderClosed: it is in a final status, something was paid, or its customer comes after it was confirmed.
            Invalid: an order without a price is not paid online.
        """
        if self.status in FINAL:
            raise OrderClosed(f"The order is {self.status}; how it is paid cannot change any more.")
        if self.payment.paid > 0:
            raise OrderClosed("Something has been paid; how the order is paid cannot change any more.")
        if self.status is not Status.PENDING and actor.role not in BACK_OFFICE:
            raise OrderClosed(f"The order is {self.status}; only the shop changes how it is paid.")
        if method is PaymentMethod.ONLINE and self.totals.total == 0:
            raise Invalid("An order without a price has nothing to be paid online.", "/paymentMethod")

    def for_tracking(self) -> TrackedOrder:
        agent = TrackedAgent(**tracked_agent({"name": self.agent.name})) if self.agent else None
        return TrackedOrder(
            id=self.id,
            number=self.number,
            fulfilment=self.fulfilment,
            status=self.status,
            seq=self.seq,
            currency=self.currency,
            items=[
                TrackedLine(line_id=x.line_id, name=x.name, quantity=x.quantity, returned=x.returned, sku=x.sku)
                for x in self.items
            ],
            payment=TrackedPayment(method=self.payment.method, status=self.payment.status),
            created_at=self.created_at,
            updated_at=self.updated_at,
            reference=self.reference,
            agent=agent,
            waiting_for=self.waiting_for,
            expires_at=self.expires_at,
        )

    def view(self, actor: Actor) -> Order | TrackedOrder:
        return self.for_tracking() if actor.tracks_only else self

    def apply(self, event: Event) -> Order:
        """The order after `event`: what a client that keeps its own copy does with what it hears.

        Raises:
            ValueError: the event is not the next one.
        """
        if event.seq != self.seq + 1:
            raise ValueError(f"event {event.seq} does not follow {self.seq}")
        data = event.data
        after = msgspec.structs.replace(self, seq=event.seq, updated_at=event.at)
        if event.type == Type.STATUS:
            status = Status(data["status"])
            payment = msgspec.structs.replace(self.payment, due=due(status, self.totals.total, self.payment.paid))
            after = msgspec.structs.replace(after, status=status, status_reason=data.get("note"), payment=payment)
            return after if status is Status.PENDING else msgspec.structs.replace(after, expires_at=None).waiting()
        if event.type == Type.ASSIGNED:
            agent = data["agent"]
            return msgspec.structs.replace(after, agent=msgspec.convert(agent, Agent) if agent else None)
        if event.type in (Type.PAYMENT, Type.METHOD):
            payment = msgspec.convert(data["payment"], PaymentSummary)
            refunded = {line["lineId"]: line["refunded"] for line in data.get("lines", ())}
            items = [msgspec.structs.replace(x, refunded=refunded.get(x.line_id, x.refunded)) for x in self.items]
            expires_at = data.get("expiresAt")
            return msgspec.structs.replace(after, payment=payment, items=items, expires_at=expires_at).waiting()
        return after

    def waiting(self) -> Order:
        """The same order, with what it waits for."""
        for_payment = waits_for_payment(self.status, self.payment.method, self.payment.due)
        return msgspec.structs.replace(self, waiting_for=["payment"] if for_payment else None)


class Row(Protocol):
    """Columns by name."""

    def __getitem__(self, name: str) -> Any: ...


def from_row(row: Row) -> Order:
    """The order of a row of `orders` that carries its lines as JSON text in `lines`."""
    agent_id, total, paid, refunded = row["agent_id"], row["total"], row["paid"], row["refunded"]
    status, expires_at = Status(row["status"]), row["expires_at"]
    return Order(
        id=str(row["id"]),
        number=str(row["number"]),
        reference=row["reference"],
        customer_id=row["customer_id"],
        fulfilment=Fulfilment(row["fulfilment"]),
        status=status,
        status_reason=row["status_reason"],
        seq=row["seq"],
        currency=row["currency"],
        items=_decode_lines(row["lines"]),
        totals=Totals(
            items=row["items_total"],
            discount=row["discount"],
            delivery=row["delivery"],
            tax=row["tax"],
            rounding=row["rounding"],
            total=total,
        ),
        payment=PaymentSummary(
            method=PaymentMethod(row["payment_method"]),
            status=payment_status(total, paid, refunded, paying=row["paying"]),
            due=due(status, total, paid),
            paid=paid,
            refunded=refunded,
        ),
        delivery_address=_decode_address(row["delivery_address"]) if row["delivery_address"] else None,
        contact=_decode_contact(row["contact"]) if row["contact"] else None,
        table=row["dining_table"],
        agent=Agent(id=agent_id, name=row["agent_name"], vehicle=row["vehicle"]) if agent_id else None,
        notes=row["notes"],
        created_at=rfc3339(row["created_at"]),
        updated_at=rfc3339(row["updated_at"]),
        expires_at=rfc3339(expires_at) if expires_at is not None and status is Status.PENDING else None,
    ).waiting()


_decode_lines = msgspec.json.Decoder(list[Line]).decode
_decode_address = msgspec.json.Decoder(Address).decode
_decode_contact = msgspec.json.Decoder(Contact).decode


def due(status: Status, total: int, paid: int) -> int:
    """What is still to be paid: nothing for an order that is cancelled."""
    return 0 if status is Status.CANCELLED else max(0, total - paid)


def waits_for_payment(status: Status, method: PaymentMethod, due: int) -> bool:
    return status is Status.PENDING and method is PaymentMethod.ONLINE and due > 0


def payment_status(total: int, paid: int, refunded: int, *, paying: bool = False) -> str:
    """The order's payment status from its sums, all in minor units of one currency; `paying`: somebody is trying to."""
    if refunded:
        return "refunded" if refunded >= paid else "partially_refunded"
    if paid:
        return "paid" if paid >= total else "partially_paid"
    if total == 0:
        return "paid"
    return "processing" if paying else "unpaid"


def check_currency(currency: str) -> str:
    if currency not in EXPONENTS:
        raise Invalid(f"{currency!r} is not an ISO 4217 currency code.", "/currency")
    return currency


def price(items: Sequence[AskedItem]) -> tuple[list[Line], Totals]:
    """The lines and totals of free lines: net = quantity x unit price, tax on the net of each line.

    Raises:
        Invalid: the sum is larger than an amount can be.
    """
    lines = []
    for number, item in enumerate(items, 1):
        assert isinstance(item.name, str)
        assert isinstance(item.unit_price, int)
        net = item.quantity * item.unit_price
        rate = item.tax_rate_bp if isinstance(item.tax_rate_bp, int) else 0
        tax = tax_of(net, rate)
        lines.append(
            Line(
                line_id=str(number),
                name=item.name,
                quantity=item.quantity,
                unit_price=item.unit_price,
                discount=0,
                tax_rate_bp=rate,
                tax=tax,
                total=net + tax,
                returned=0,
                refunded=0,
            )
        )
    items_total, tax = sum(x.total - x.tax for x in lines), sum(x.tax for x in lines)
    if items_total + tax > MINOR_UNITS_MAX:
        raise Invalid(f"The total is above the largest amount, {MINOR_UNITS_MAX}.", "/items")
    return lines, Totals(items=items_total, discount=0, delivery=0, tax=tax, rounding=0, total=items_total + tax)


def may_see(actor: Actor, order_id: str, customer_id: str | None, agent_id: str | None) -> bool:
    """The one rule of who reads an order: its owner, its agent, its guests, and the back office."""
    if not actor.reaches(order_id):
        return False
    if actor.role in BACK_OFFICE:
        return True
    if actor.role is Role.CUSTOMER:
        return actor.sub == customer_id
    if actor.role is Role.AGENT:
        return actor.sub == agent_id
    return actor.orders is not None  # a guest: the claim is the grant


class Sight(msgspec.Struct, frozen=True):
    """`may_see` as the three parameters of a SQL guard: `$all or customer_id = $customer or agent_id = $agent`."""

    all: bool
    customer: str | None
    agent: str | None


def sight(actor: Actor, order_id: str) -> Sight:
    """What of an order's row decides whether the actor sees it.

    Raises:
        NotFound: the token does not reach the order at all.
    """
    if not actor.reaches(order_id) or (actor.role is Role.GUEST and actor.orders is None):
        raise NotFound("There is no such order.")
    return Sight(
        all=actor.role in BACK_OFFICE or actor.role is Role.GUEST,
        customer=actor.sub if actor.role is Role.CUSTOMER else None,
        agent=actor.sub if actor.role is Role.AGENT else None,
    )


def require_role(actor: Actor, allowed: Iterable[Role], doing: str) -> None:
    """Raises Forbidden: the role never does this, whatever the order."""
    if actor.role not in allowed:
        raise Forbidden(f"The role {actor.role} may not {doing}.")


def require_all_orders(actor: Actor, doing: str) -> None:
    """Raises Forbidden: the token was narrowed to some orders, and what is asked tells of all."""
    if actor.orders is not None:
        raise Forbidden(f"A token for some orders only may not {doing}.")
