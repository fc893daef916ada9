"""The orders desk: place, quote, read, list, events, change status, assign, cancel.

Place, change status, assign and cancel are one prepared statement each: the guard, the change and its event rows go to
Postgres in one round trip. A guard that lets nothing through is explained by a second read.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType
from sqlalchemy import Text, literal_column, select, tuple_

from handlers.book import stop_payments
from handlers.context import Row, Tx
from handlers.cursors import decode_cursor, encode_cursor, instant
from handlers.ports import Closing
from handlers.settlement import return_money
from models.address import Address, Billing, Contact
from models.base import Id, Later, LongText, Reason, Reference, ShortText, Strict, View, rfc3339
from models.errors import Conflict, Invalid, NotFound, PaymentInProgress
from models.event import Event, Type, event
from models.money import EXPONENTS
from models.order import (
    FINAL,
    HOLD_MAX_S,
    PAYMENT_EXPIRY_S,
    Agent,
    AskedItem,
    Fulfilment,
    Line,
    Order,
    PaymentMethod,
    PaymentSummary,
    Status,
    Totals,
    TrackedOrder,
    check_currency,
    from_row,
    orders,
    payment_status,
    price,
    require_role,
    sight,
    sources,
    waits_for_payment,
)
from models.user import BACK_OFFICE, STAFF, Actor, Role

T = TypeVar("T")

LINES_MAX = 200
"""Most lines of one order."""

EXPORT_PAGE = 200
"""Orders that an export reads at once."""

MOVE_ATTEMPTS = 3
"""A guard that refuses and a read that finds nothing wrong mean that the order moved in between: look again."""

LINES = """(select json_agg(json_build_object('lineId', l.position::text, 'sku', l.sku, 'name', l.name,
    'quantity', l.quantity, 'unitPrice', l.unit_price, 'discount', l.discount, 'taxRateBp', l.tax_rate_bp,
    'tax', l.tax, 'total', l.total, 'returned', l.returned, 'refunded', l.refunded) order by l.position)::text
    from order_lines l where l.order_id = o.id) as lines"""

SEEN = "($2::boolean or o.customer_id = $3::text or o.agent_id = $4::text)"
"""`models.order.sight` as a guard; $1 is the order."""


def order_uuid(order_id: str) -> uuid.UUID:
    """Raises NotFound: a text that is no UUID in its canonical form names nothing."""
    try:
        found = uuid.UUID(order_id)
    except ValueError:
        raise NotFound("There is no such order.") from None
    if str(found) != order_id:
        raise NotFound("There is no such order.")
    return found


# place and quote


class Place(Strict):
    SCHEMA: ClassVar[dict[str, Any]] = {
        "required": ["fulfilment", "currency", "items"],
        "examples": [
            {
                "reference": "SO-1042",
                "customerId": "c1",
                "fulfilment": "delivery",
                "currency": "INR",
                "items": [{"name": "Masala dosa", "quantity": 2, "unitPrice": 12000, "taxRateBp": 500}],
                "deliveryAddress": {
                    "line1": "12 MG Road",
                    "city": "Bengaluru",
                    "postalCode": "560001",
                    "country": "IN",
                },
                "contact": {"name": "Meera", "phone": "+919000090000"},
                "paymentMethod": "cash",
                "notes": "Ring twice",
            }
        ],
    }

    fulfilment: Fulfilment
    currency: Annotated[
        str, Meta(min_length=3, max_length=3, description="ISO 4217", extra_json_schema={"enum": sorted(EXPONENTS)})
    ]
    items: Annotated[list[AskedItem], Meta(min_length=1, max_length=LINES_MAX)] | UnsetType = UNSET
    customer_id: Id | UnsetType = UNSET
    reference: Reference | UnsetType = UNSET
    delivery_address: Address | UnsetType = UNSET
    contact: Contact | UnsetType = UNSET
    billing: Billing | UnsetType = UNSET
    payment_method: PaymentMethod | UnsetType = UNSET
    table: ShortText | UnsetType = UNSET
    notes: LongText | UnsetType = UNSET
    # known to the contract, not to this version: see `_refuse_what_needs_stock`
    cart_id: Annotated[Id, Later] | UnsetType = UNSET
    address_id: Annotated[Id, Later] | UnsetType = UNSET
    coupon_code: Annotated[ShortText, Later] | UnsetType = UNSET
    prescription_upload_id: Annotated[Id, Later] | UnsetType = UNSET
    expected_total: Annotated[int, Later] | UnsetType = UNSET


class Quote(View):
    currency: str
    items: list[Line]
    totals: Totals
    availability: list[str]
    changes: list[str]


def _refuse_what_needs_stock(actor: Actor, cmd: Place) -> list[AskedItem]:
    """The free lines of the command, or Invalid with a pointer at what cannot be ordered until there is stock."""
    for name in ("cart_id", "address_id", "coupon_code", "prescription_upload_id", "expected_total"):
        if getattr(cmd, name) is not UNSET:
            member = msgspec.structs.fields(Place)[Place.__struct_fields__.index(name)].encode_name
            raise Invalid(f"{member} is not supported yet.", f"/{member}")
    if isinstance(cmd.items, UnsetType):
        raise Invalid("An order needs items.", "/items")
    for number, item in enumerate(cmd.items):
        if item.sku is not UNSET:
            raise Invalid("There is no product with this sku.", f"/items/{number}/sku")
        if actor.role not in BACK_OFFICE:
            raise Invalid("Only staff and services may order free lines.", f"/items/{number}")
        if item.name is UNSET:
            raise Invalid("A free line needs a name.", f"/items/{number}/name")
        if item.unit_price is UNSET:
            raise Invalid("A free line needs a unitPrice.", f"/items/{number}/unitPrice")
    return cmd.items


async def quote(tx: Tx, actor: Actor, cmd: Place) -> Quote:
    """What placing this would cost. Changes nothing."""
    require_role(actor, BACK_OFFICE | {Role.CUSTOMER}, "quote orders")
    lines, totals = price(_refuse_what_needs_stock(actor, cmd))
    return Quote(currency=check_currency(cmd.currency), items=lines, totals=totals, availability=[], changes=[])


PLACE = """
with placed as (
    insert into orders (id, reference, customer_id, fulfilment, status, seq, currency, payment_method, items_total, tax,
        total, delivery_address, contact, billing, dining_table, notes, created_at, updated_at, expires_at)
    values ($1, $2, $3, $4, $5, cardinality($6::text[]), $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $17, $19)
    on conflict (reference) do nothing
    returning id, number
), lined as (
    insert into order_lines (order_id, position, name, quantity, unit_price, tax_rate_bp, tax, total)
    select placed.id, l."lineId", l.name, l.quantity, l."unitPrice", l."taxRateBp", l.tax, l.total
    from placed, json_to_recordset($18::json) as l("lineId" integer, name text, quantity integer, "unitPrice" bigint,
        "taxRateBp" integer, tax bigint, total bigint)
), told as (
    insert into order_events (order_id, seq, type, at, body)
    select placed.id, e.seq, 'orderStatusUpdate', $17, e.body
    from placed, unnest($6::text[]) with ordinality as e(body, seq)
)
select number from placed"""


async def place(tx: Tx, actor: Actor, cmd: Place, *, expiry_s: int = PAYMENT_EXPIRY_S) -> Order:
    """Place an order. An `online` order without a price is confirmed at once: there is no money to wait for. Any other
    `online` order is cancelled after `expiry_s` seconds unless it is being paid.

    Raises:
        Forbidden, Invalid; Conflict: another order has this reference.
    """
    require_role(actor, BACK_OFFICE | {Role.CUSTOMER}, "place orders")
    lines, totals = price(_refuse_what_needs_stock(actor, cmd))
    currency = check_currency(cmd.currency)
    usual = PaymentMethod.LATER if actor.role in BACK_OFFICE else PaymentMethod.ONLINE
    method = usual if isinstance(cmd.payment_method, UnsetType) else cmd.payment_method
    bodies = [_status_body(Status.PENDING, None, None, actor)]
    status = Status.PENDING
    if method is PaymentMethod.ONLINE and totals.total == 0:
        status = Status.CONFIRMED
        bodies.append(_status_body(status, Status.PENDING, None, actor))
    order_id, now = tx.new_id(), tx.now()
    waits = waits_for_payment(status, method, totals.total)
    expires_at = now + dt.timedelta(seconds=expiry_s) if waits else None
    reference, customer_id, table, notes = (
        _or_none(cmd.reference),
        _or_none(cmd.customer_id),
        _or_none(cmd.table),
        _or_none(cmd.notes),
    )
    row = await tx.one(
        PLACE,
        uuid.UUID(order_id),
        reference,
        customer_id,
        cmd.fulfilment,
        status,
        bodies,
        currency,
        method,
        totals.items,
        totals.tax,
        totals.total,
        _json_or_none(cmd.delivery_address),
        _json_or_none(cmd.contact),
        _json_or_none(cmd.billing),
        table,
        notes,
        now,
        msgspec.json.encode(lines).decode(),
        expires_at,
    )
    if row is None:
        raise Conflict(f"Another order has the reference {reference!r}.")
    tx.tell(order_id, [event(order_id, seq, Type.STATUS, now, body) for seq, body in enumerate(bodies, 1)])
    return Order(
        id=order_id,
        number=str(row["number"]),
        reference=reference,
        customer_id=customer_id,
        fulfilment=cmd.fulfilment,
        status=status,
        seq=len(bodies),
        currency=currency,
        items=lines,
        totals=totals,
        payment=PaymentSummary(
            method=method, status=payment_status(totals.total, 0, 0), due=totals.total, paid=0, refunded=0
        ),
        delivery_address=_or_none(cmd.delivery_address),
        contact=_or_none(cmd.contact),
        table=table,
        notes=notes,
        created_at=rfc3339(now),
        updated_at=rfc3339(now),
        expires_at=rfc3339(expires_at) if expires_at is not None else None,
    ).waiting()


# read


READ = f"select o.*, {LINES} from orders o where o.id = $1 and {SEEN}"


async def read(tx: Tx, actor: Actor, order_id: str) -> Order | TrackedOrder:
    """Raises NotFound: no such order, or somebody else's."""
    return (await _read(tx, actor, order_id)).view(actor)


async def _read(tx: Tx, actor: Actor, order_id: str) -> Order:
    seen = sight(actor, order_id)
    row = await tx.one(READ, order_uuid(order_id), seen.all, seen.customer, seen.agent)
    if row is None:
        raise NotFound("There is no such order.")
    return from_row(row)


Instant = Annotated[dt.datetime, Meta(tz=True)]


class OrderFilters(Strict):
    """Which orders; `from` and `to` are a half-open range of `createdAt`."""

    status: Status | UnsetType = UNSET
    customer_id: Id | UnsetType = UNSET
    agent_id: Id | UnsetType = UNSET
    reference: ShortText | UnsetType = UNSET
    from_: Instant | UnsetType = msgspec.field(default=UNSET, name="from")
    to: Instant | UnsetType = UNSET


class ListOrders(OrderFilters):
    """A page of them."""

    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: Annotated[str, Meta(max_length=200)] | UnsetType = UNSET


class OrderPage(msgspec.Struct, frozen=True, rename="camel"):
    items: list[Order]
    next_cursor: Annotated[str | None, Meta(description="`cursor` of the next page; null on the last one")]


async def list_orders(tx: Tx, actor: Actor, cmd: ListOrders) -> OrderPage:
    """A page of the orders that the actor sees, newest first. Rows that are added meanwhile do not move it."""
    require_role(actor, BACK_OFFICE | {Role.CUSTOMER, Role.AGENT}, "list orders")
    o = orders.alias("o")
    query = select(o, literal_column(LINES.removesuffix(" as lines")).label("lines"))
    if actor.role is Role.CUSTOMER:
        query = query.where(o.c.customer_id == actor.sub)
    elif actor.role is Role.AGENT:
        query = query.where(o.c.agent_id == actor.sub)
    if actor.orders is not None:
        query = query.where(o.c.id.cast(Text).in_(sorted(actor.orders)))
    for name in ("status", "customer_id", "agent_id", "reference"):
        if (wanted := getattr(cmd, name)) is not UNSET:
            query = query.where(o.c[name] == wanted)
    if isinstance(cmd.from_, dt.datetime):
        query = query.where(o.c.created_at >= instant(cmd.from_, "/from"))
    if isinstance(cmd.to, dt.datetime):
        query = query.where(o.c.created_at < instant(cmd.to, "/to"))
    if isinstance(cmd.cursor, str):
        query = query.where(tuple_(o.c.created_at, o.c.id) < tuple_(*decode_cursor(cmd.cursor)))
    rows = await tx.select(query.order_by(o.c.created_at.desc(), o.c.id.desc()).limit(cmd.limit + 1))
    page = rows[: cmd.limit]
    return OrderPage(
        [from_row(row) for row in page],
        encode_cursor(page[-1]["created_at"], page[-1]["id"]) if len(rows) > cmd.limit else None,
    )


async def export_orders(
    statement: Callable[[], AbstractAsyncContextManager[Tx]], actor: Actor, cmd: OrderFilters
) -> AsyncIterator[list[Order]]:
    """All pages of the list, newest first. Each is a transaction of its own: nothing is open while a page is sent."""
    page = ListOrders(**msgspec.structs.asdict(cmd), limit=EXPORT_PAGE)
    while True:
        async with statement() as tx:
            found = await list_orders(tx, actor, page)
        yield found.items
        if found.next_cursor is None:
            return
        page = msgspec.structs.replace(page, cursor=found.next_cursor)


EVENTS = f"""
select o.seq as top, e.seq, e.type, e.at, e.body from orders o
left join order_events e on e.order_id = o.id and e.seq > $5
where o.id = $1 and {SEEN} order by e.seq"""


class Timeline(msgspec.Struct, frozen=True):
    """Events of one order, whole and oldest first; `seq` is the order's top at the moment of reading."""

    events: Sequence[Event]
    seq: int


async def events(tx: Tx, actor: Actor, order_id: str, after: int = 0) -> Timeline:
    """Every event after number `after`.

    Raises:
        NotFound; Invalid: `after` is above the top.
    """
    seen = sight(actor, order_id)
    rows = await tx.all(EVENTS, order_uuid(order_id), seen.all, seen.customer, seen.agent, after)
    if not rows:
        raise NotFound("There is no such order.")
    top = rows[0]["top"]
    if after > top:
        raise Invalid(f"The order's events end at {top}.", "/after")
    found = [event(order_id, row["seq"], row["type"], row["at"], row["body"]) for row in rows if row["seq"]]
    return Timeline([one.for_tracking() for one in found] if actor.tracks_only else found, top)


# change status and cancel


class Override(Strict):
    reason: Reason


class ChangeStatus(Strict):
    SCHEMA: ClassVar[dict[str, Any]] = {"examples": [{"status": "preparing", "note": "20 minutes"}]}

    status: Status
    note: Reason | UnsetType = UNSET
    override: (
        Annotated[Override, Meta(description="staff only: deliver although the cash was not paid")] | UnsetType
    ) = UNSET


class Cancel(Strict):
    SCHEMA: ClassVar[dict[str, Any]] = {"examples": [{"reason": "Ordered twice"}]}

    reason: Reason


# `prior` locks the row, so that the previous status in the event is the one that this change replaced.
# A delivery's end and start are told a second time under their own name, with the next seq.
MOVE = f"""
with prior as (
    select o.id, o.status from orders o where o.id = $1 and {SEEN} for update
), moved as (
    update orders o set status = $5, status_reason = $6, seq = o.seq + cardinality($7::text[]), updated_at = $8
    from prior
    where o.id = prior.id and (o.fulfilment || ':' || o.status) = any ($9::text[])
        and not ($5 = 'confirmed' and o.payment_method = 'online')
        and not ($5 = 'delivered' and o.status <> 'return_requested' and not $10::boolean
            and o.payment_method = 'cash' and o.total > o.paid)
    returning o.*, prior.status as previous_status
), told as (
    insert into order_events (order_id, seq, type, at, body)
    select o.id, o.seq - cardinality($7::text[]) + e.n, e.type, $8,
        case e.n when 1 then '{{"status":"' || $5 || '","previousStatus":"' || o.previous_status || '"' || $11
            else '{{}}' end
    from moved o, unnest($7::text[]) with ordinality as e(type, n)
)
select o.*, {LINES} from moved o"""

TOLD_TWICE = {
    Status.OUT_FOR_DELIVERY: [Type.STATUS, Type.OUT_FOR_DELIVERY],
    Status.DELIVERED: [Type.STATUS, Type.DELIVERED],
}


async def change_status(tx: Tx, actor: Actor, order_id: str, cmd: ChangeStatus) -> Order:
    """Move the order along its MOVES table.

    Raises:
        NotFound, Forbidden, IllegalMove, PaymentRequired.
    """
    require_role(actor, BACK_OFFICE | {Role.AGENT}, "change the status of an order")
    override = _or_none(cmd.override)
    if override and actor.role not in STAFF:
        require_role(actor, STAFF, "override a payment that is due")
    note = _or_none(cmd.note) or (override.reason if override else None)
    return await _move(tx, actor, order_id, cmd.status, note, override is not None)


async def cancel(
    tx: Tx, actor: Actor, order_id: str, cmd: Cancel, *, returns_money: bool = True
) -> Order | TrackedOrder:
    """Cancel the order: its customer until it is confirmed, the back office until it is ready. What was paid goes back,
    unless the caller has decided how much does.

    Raises:
        NotFound, Forbidden, IllegalMove.
    """
    require_role(actor, BACK_OFFICE | {Role.CUSTOMER, Role.GUEST}, "cancel an order")
    if actor.tracks_only:
        require_role(actor, (), "cancel an order with a tracking link")
    return await _move(tx, actor, order_id, Status.CANCELLED, cmd.reason, False, returns_money)


async def _move(
    tx: Tx,
    actor: Actor,
    order_id: str,
    target: Status,
    note: str | None,
    override: bool,
    returns_money: bool = True,
) -> Order:
    if target is Status.CANCELLED:
        tx.atomically()  # with what it does to the order's money
    seen, now = sight(actor, order_id), tx.now()
    types = TOLD_TWICE.get(target, [Type.STATUS])
    rest = _status_body(target, None, note, actor).removeprefix(f'{{"status":"{target}"')

    guard = (order_uuid(order_id), seen.all, seen.customer, seen.agent)
    row = await _change(
        tx,
        actor,
        order_id,
        MOVE,
        (*guard, target, note, types, now, sources(actor, target), override, rest),
        lambda order: order.check_move(actor, target, override),
    )
    assert not isinstance(row, Order)
    order = from_row(row)
    first = order.seq - len(types) + 1
    body = _status_body(target, Status(row["previous_status"]), note, actor)
    tx.tell(
        order_id,
        [event(order_id, first + n, type_, now, "{}" if n else body) for n, type_ in enumerate(types)],
    )
    if target is Status.CANCELLED and not returns_money:
        await stop_payments(tx, order_id)
    elif target is Status.CANCELLED:
        await return_money(tx, order_id, note or "cancelled", actor=actor)
    return order


# assign


class Assign(Strict):
    SCHEMA: ClassVar[dict[str, Any]] = {
        "examples": [{"agentId": "rider-7", "agentName": "Ravi Kumar", "vehicle": "KA 01 AB 1234"}, {"agentId": None}]
    }

    agent_id: Annotated[Id | None, Meta(description="null takes the order from its agent")]
    agent_name: ShortText | UnsetType = UNSET
    vehicle: ShortText | UnsetType = UNSET


ASSIGNED = f"select o.assignment, o.agent_id from orders o where o.id = $1 and {SEEN}"

FINAL_STATUSES = ", ".join(f"'{status}'" for status in sorted(FINAL))

# The number of an assignment is the seq of its event: it grows with every change and can never be used twice.
ASSIGN = f"""
with assigned as (
    update orders o set agent_id = $5, agent_name = $6, vehicle = $7, seq = o.seq + 1, updated_at = $8,
        assignment = case when $5::text is null then 0 else o.seq + 1 end
    where o.id = $1 and {SEEN} and o.status not in ({FINAL_STATUSES})
        and (o.agent_id, o.agent_name, o.vehicle) is distinct from ($5::text, $6::text, $7::text)
    returning o.*
), told as (
    insert into order_events (order_id, seq, type, at, body)
    select o.id, o.seq, 'deliveryAgentAssigned', $8, $9 from assigned o
)
select o.*, {LINES} from assigned o"""


async def before_assign(tx: Tx, actor: Actor, order_id: str, cmd: Assign) -> Closing | None:
    """What the door closes before the transaction of `assign`: the positions of the assignment that it replaces.

    Whoever sees the new agent in the order's events has seen the last position of the old one.

    Raises:
        What `assign` raises.
    """
    require_role(actor, BACK_OFFICE, "assign agents")
    order = await _read(tx, actor, order_id)
    order.check_assignable()
    if order.agent is not None and order.agent.id != cmd.agent_id:
        return Closing(order_id, order.seq)
    return None


async def assign(tx: Tx, actor: Actor, order_id: str, cmd: Assign) -> Order:
    """Give the order to an agent, or to nobody (`agentId` null). The same again changes nothing.

    Raises:
        NotFound, Forbidden; OrderClosed: the order is in a final status.
    """
    require_role(actor, BACK_OFFICE, "assign agents")
    seen, now = sight(actor, order_id), tx.now()
    name, vehicle = (_or_none(cmd.agent_name), _or_none(cmd.vehicle)) if cmd.agent_id is not None else (None, None)
    agent = Agent(id=cmd.agent_id, name=name, vehicle=vehicle) if cmd.agent_id is not None else None
    body = msgspec.json.encode({"agent": agent}).decode()

    def check(order: Order) -> Order | None:
        order.check_assignable()
        return order if order.agent == agent else None

    row = await _change(
        tx,
        actor,
        order_id,
        ASSIGN,
        (order_uuid(order_id), seen.all, seen.customer, seen.agent, cmd.agent_id, name, vehicle, now, body),
        check,
    )
    if isinstance(row, Order):
        return row
    order = from_row(row)
    tx.tell(order_id, [event(order_id, order.seq, Type.ASSIGNED, now, body)])
    return order


# payment method


class ChangePaymentMethod(Strict):
    SCHEMA: ClassVar[dict[str, Any]] = {"examples": [{"paymentMethod": "cash"}]}

    payment_method: PaymentMethod


# Nothing was paid, so the order's sums follow from its total alone. $7: when a pending online order expires; $8, the
# same as the event tells it; $9: the back office.
CHANGE_PAYMENT_METHOD = f"""
with changed as (
    update orders o set payment_method = $5, seq = o.seq + 1, updated_at = $6,
        expires_at = case o.status when 'pending' then $7::timestamptz end
    where o.id = $1 and {SEEN} and o.status not in ({FINAL_STATUSES}) and o.paid = 0 and not o.paying
        and ($9::boolean or o.status = 'pending') and not ($5 = 'online' and o.total = 0) and o.payment_method <> $5
    returning o.*
), told as (
    insert into order_events (order_id, seq, type, at, body)
    select o.id, o.seq, 'paymentMethodUpdate', $6, '{{"method":"' || $5 || '","payment":{{"method":"' || $5
        || '","status":"' || case o.total when 0 then 'paid' else 'unpaid' end || '","due":' || o.total
        || ',"paid":0,"refunded":0}}' || case o.status when 'pending' then $8 else '' end || '}}'
    from changed o
)
select o.*, {LINES} from changed o"""

PLACED = "select created_at from orders where id = $1"

ONLINE_LEAST_S = 60
"""How long an order that becomes `online` waits for somebody to pay, however long ago it was placed. Starting a payment
holds it longer."""

MOVING_PAYMENT = """
select id from payments where order_id = $1 and status in ('processing', 'authorized', 'unknown')
order by status_at desc, id limit 1"""


async def change_payment_method(
    tx: Tx,
    actor: Actor,
    order_id: str,
    cmd: ChangePaymentMethod,
    *,
    expiry_s: int = PAYMENT_EXPIRY_S,
    hold_max_s: int = HOLD_MAX_S,
) -> Order | TrackedOrder:
    """Let the order be paid in another way: by its customer until it is confirmed, by the back office until something
    was paid. A pending order that becomes `online` is cancelled after `expiry_s` seconds unless it is being paid, and
    `hold_max_s` after placing at the latest, but never within `ONLINE_LEAST_S`; one that is no longer `online` is not.
    The same again changes nothing.

    Raises:
        NotFound, Forbidden, OrderClosed, Invalid; PaymentInProgress: somebody is paying it now.
    """
    require_role(actor, BACK_OFFICE | {Role.CUSTOMER, Role.GUEST}, "change how an order is paid")
    if actor.tracks_only:
        require_role(actor, (), "change how an order is paid with a tracking link")
    seen, now, method = sight(actor, order_id), tx.now(), cmd.payment_method
    expires_at = None
    if method is PaymentMethod.ONLINE and (placed := await tx.one(PLACED, order_uuid(order_id))) is not None:
        full, latest = now + dt.timedelta(seconds=expiry_s), placed["created_at"] + dt.timedelta(seconds=hold_max_s)
        expires_at = max(min(full, latest), now + dt.timedelta(seconds=min(expiry_s, ONLINE_LEAST_S)))
    told = f',"expiresAt":"{rfc3339(expires_at)}"' if expires_at is not None else ""

    def check(order: Order) -> Order | None:
        order.check_payment_method(actor, method)
        return order if order.payment.status == "processing" or order.payment.method is method else None

    guard = (order_uuid(order_id), seen.all, seen.customer, seen.agent)
    row = await _change(
        tx,
        actor,
        order_id,
        CHANGE_PAYMENT_METHOD,
        (*guard, method, now, expires_at, told, actor.role in BACK_OFFICE),
        check,
    )
    if isinstance(row, Order) and row.payment.status == "processing":
        moving = await tx.one(MOVING_PAYMENT, order_uuid(order_id))
        if moving is None:  # it has ended since
            raise Conflict("The order keeps changing; try again.")
        raise PaymentInProgress("Somebody is paying the order now; wait for the outcome.", str(moving["id"]))
    if isinstance(row, Order):
        return row
    order = from_row(row)
    body: dict[str, object] = {"method": method, "payment": order.payment}
    if order.expires_at is not None:
        body["expiresAt"] = order.expires_at
    tx.tell(order_id, [event(order_id, order.seq, Type.METHOD, now, msgspec.json.encode(body).decode())])
    return order


async def _change(
    tx: Tx,
    actor: Actor,
    order_id: str,
    statement: str,
    args: Sequence[object],
    check: Callable[[Order], Order | None],
) -> Row | Order:
    """The row of a guarded change; where its guard let nothing through, `check` refuses with the reason.

    `check` returns the order when there is nothing left to change, and None when it finds nothing wrong: then the order
    moved between the statement and the read, and the statement is tried again.
    """
    for _ in range(MOVE_ATTEMPTS):
        row = await tx.one(statement, *args)
        if row is not None:
            return row
        order = await _read(tx, actor, order_id)
        if check(order) is not None:
            return order
    raise Conflict("The order keeps changing; try again.")


def _status_body(status: Status, previous: Status | None, note: str | None, actor: Actor) -> str:
    body: dict[str, object] = {"status": status}
    if previous is not None:
        body["previousStatus"] = previous
    if note is not None:
        body["note"] = note
    body["actor"] = {"role": actor.role, "id": actor.sub}
    return msgspec.json.encode(body).decode()


def _or_none(value: T | UnsetType) -> T | None:
    return None if isinstance(value, UnsetType) else value


def _json_or_none(value: msgspec.Struct | UnsetType) -> str | None:
    return None if isinstance(value, UnsetType) else msgspec.json.encode(value).decode()
