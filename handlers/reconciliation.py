"""The reconciliation desk: asking gateways what became of payments that move, expiring orders that nobody has paid, and
comparing the books of a day.

The verbs that end in a job (`handlers/jobs.py`) may run twice and on several instances at once: they ask the gateway,
and what it says goes to the settle path, which books everything once.
"""

from __future__ import annotations

import datetime as dt
import uuid
import zoneinfo
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

from handlers.book import open_book, open_order
from handlers.book_rows import PaymentRow, read_row
from handlers.context import Row, Tx
from handlers.jobs import GiveUp, NotYet, enqueue
from handlers.payments import (
    READ,
    Desk,
    as_refusal,
    created_as,
    creation_failed,
    gateway_of,
    known,
    new_payment,
    settle_all,
)
from handlers.ports import Gateway, GatewayAway, GatewayFailed, GatewayRefused, GatewayUnknown, Movement
from handlers.settlement import expire_order
from models.base import Strict, rfc3339
from models.errors import Forbidden, GatewayError, Invalid, NotFound
from models.order import Status, require_role
from models.payment import (
    GATEWAYS,
    MOVING,
    OPEN,
    Attention,
    Capture,
    News,
    PaymentStatus,
    Provider,
    Report,
    Source,
)
from models.reconciliation import Booked, Difference, Kind, Reconciliation, sums
from models.user import Actor, Role

BATCH_MAX = 500
"""Most payments or orders that one look finds; the next look finds the rest."""

MARGIN = dt.timedelta(hours=1)
"""How far beyond a day its captures are looked for in the gateway's books: clocks differ, and news take time."""

LATE = dt.timedelta(days=5)
"""How far before a day Razorpay's books are searched for captures of which we have not heard: it counts them when the
attempt began, and authorizes late for up to so long."""


class Patience(NamedTuple):
    """How often the same payment is asked about."""

    first_s: float
    longest_s: float
    between: Callable[[float, float], float]
    """Chance: a number between two others."""
    pending_s: float
    """Until which age one is asked about that nobody seems to have paid."""


def pause_s(age_s: float, patience: Patience) -> float:
    """Until the next question about a payment that has been as it is for `age_s`: as long again, so the pauses double,
    and up to half of it less, so that payments that stopped together are not asked about together."""
    longest = min(max(age_s, patience.first_s), patience.longest_s)
    return patience.between(longest / 2, longest)


# finding what is due


def _no_job(name: str, subject: str) -> str:
    """That no job waits, runs, or is held for staff. To ask for one that waits would bring it forward."""
    return f"""not exists (
    select from jobs.pgqueuer job left join jobs.notes note on note.job_id = job.id
    where job.entrypoint = '{name}' and job.payload = convert_to({subject}::text, 'UTF8')
        and note.held is distinct from 'dismissed')"""


MOVING_LONG = f"""
select id from payments
where status in ('pending', 'processing', 'authorized', 'unknown') and status_at <= $1 and provider = any ($2)
    and (status <> 'pending' or gateway_order_id is not null and status_at > $3)
    and {_no_job("reconcile", "payments.id")}
order by status_at limit {BATCH_MAX}"""
EXPIRING = f"""
select id from orders
where status = 'pending' and expires_at <= $1 and {_no_job("expire_order", "orders.id")}
order by expires_at limit {BATCH_MAX}"""


async def find_moving(tx: Tx, after_s: float, pending_s: float) -> int:
    """Ask for a `reconcile` of each payment that has been moving for `after_s` seconds; how many there are.

    One that nobody seems to have paid is asked about too, until it is `pending_s` old: its webhook may be lost, and the
    payer's browser gone.
    """
    tx.atomically()
    now = tx.now()
    since, until = (now - dt.timedelta(seconds=s) for s in (after_s, pending_s))
    return await _enqueue_all(tx, "reconcile", await tx.all(MOVING_LONG, since, sorted(GATEWAYS), until))


async def find_expiring(tx: Tx) -> int:
    """Ask for an `expire_order` of each order whose time is over; how many there are."""
    tx.atomically()
    return await _enqueue_all(tx, "expire_order", await tx.all(EXPIRING, tx.now()))


async def _enqueue_all(tx: Tx, name: str, rows: Sequence[Row]) -> int:
    for subject in sorted(str(row["id"]) for row in rows):  # always in one order, so that no two looks lock crosswise
        await enqueue(tx, name, subject)
    return len(rows)


# asking about one payment


async def reconcile(desk: Desk, payment_id: str, patience: Patience) -> None:
    """Ask the gateway what became of a payment. The job `reconcile`.

    Raises:
        NotYet: it is still moving, or the gateway does not answer, or not now. GiveUp: there is no such payment.
    """
    row, now = await _read(desk, payment_id)
    try:
        row = await ask(desk, row)
    except GatewayRefused as refused:
        if not refused.may_pass:
            raise
        raise NotYet(pause_s(_age_s(row, now), patience)) from refused
    except (GatewayAway, GatewayUnknown) as error:
        raise NotYet(pause_s(_age_s(row, now), patience)) from error
    is_young = _age_s(row, now) < patience.pending_s
    if row.status in MOVING or (row.status is PaymentStatus.PENDING and is_young):
        raise NotYet(pause_s(_age_s(row, now), patience))


async def cancel_payment(desk: Desk, payment_id: str, patience: Patience) -> None:
    """Let nobody pay a payment any more that was superseded, or whose order is closed. The job `cancel_payment`.

    Raises:
        NotYet: the gateway does not answer, or not now. GiveUp: there is no such payment.
    """
    row, now = await _read(desk, payment_id)
    try:
        gateway = _gateway(desk, row.provider)
        row = await _created(desk, gateway, row)
        if row.gateway_order_id is None or row.status not in OPEN | {PaymentStatus.FAILED}:
            return
        try:
            news = await gateway.cancel(known(row))
        except GatewayRefused as refused:
            if refused.may_pass:
                raise
            # it is too late for that; what it has become says the gateway
            news = await gateway.fetch(known(row))
        await settle_all(desk, payment_id, news, Source.SYSTEM, None)
    except GatewayRefused as refused:
        if not refused.may_pass:
            raise
        raise NotYet(pause_s(_age_s(row, now), patience)) from refused
    except (GatewayAway, GatewayUnknown) as error:
        raise NotYet(pause_s(_age_s(row, now), patience)) from error


async def ask(desk: Desk, row: PaymentRow) -> PaymentRow:
    """Ask the gateway about a payment, book what it says, and capture what was authorized and is wanted. A creation of
    which nobody knows how it ended is repeated under its reference first.

    Raises:
        GatewayFailed.
    """
    gateway = _gateway(desk, row.provider)
    row = await _created(desk, gateway, row)
    if row.gateway_order_id is None:
        return row
    row = await _settled(desk, row, await gateway.fetch(known(row)))
    if row.status is PaymentStatus.AUTHORIZED and row.capture is Capture.AUTOMATIC:
        row = await _take(desk, gateway, row)
    return row


async def _created(desk: Desk, gateway: Gateway, row: PaymentRow) -> PaymentRow:
    if row.gateway_order_id is not None or row.status not in OPEN:
        return row
    try:
        created = await gateway.create(new_payment(row))
    except GatewayRefused as refused:
        if refused.may_pass:
            raise
        await creation_failed(desk, row, refused)
        return row
    _, row = await created_as(desk, row, created, Source.RECONCILIATION)
    return row


async def _take(desk: Desk, gateway: Gateway, row: PaymentRow) -> PaymentRow:
    """Capture what the gateway was to capture by itself. Money that nobody wants is let go, where the gateway can do
    that; else it is captured too, and the settle path gives it back."""
    if row.attention is Attention.MISMATCH:
        return row  # it is not what was asked for: staff decide, or the authorization lapses
    async with desk.transactions() as tx:
        order = (await open_book(tx, str(row.id))).order
    wanted = order.due > 0 or (order.status is Status.CANCELLED and order.expired_at is not None)
    if not wanted:
        row = await _settled(desk, row, await gateway.cancel(known(row)))
        if row.status is not PaymentStatus.AUTHORIZED:
            return row
    return await _settled(desk, row, [await gateway.capture(known(row), row.expected, row.currency)])


async def _settled(desk: Desk, row: PaymentRow, news: Sequence[News]) -> PaymentRow:
    return await settle_all(desk, str(row.id), news, Source.RECONCILIATION, None)


async def _read(desk: Desk, payment_id: str) -> tuple[PaymentRow, dt.datetime]:
    async with desk.transactions() as tx:
        row = await tx.one(READ, uuid.UUID(payment_id))
        now = tx.now()
    if row is None:
        raise GiveUp("There is no such payment.")
    return read_row(row), now


def _age_s(row: PaymentRow, now: dt.datetime) -> float:
    return (now - row.status_at).total_seconds()


def _gateway(desk: Desk, provider: Provider) -> Gateway:
    """Raises GatewayAway: it is not set up in this process."""
    gateway = desk.gateways.get(provider)
    if gateway is None:
        raise GatewayAway(provider, "not_set_up", "this process has no keys for it")
    return gateway


# expiring an order

# A payment that failed can be paid again under the same gateway order, and nobody may have told us.
ATTEMPTS = """
select * from payments
where order_id = $1 and provider = any ($2) and gateway_order_id is not null
    and status in ('pending', 'processing', 'authorized', 'unknown', 'failed')
order by created_at"""

UNREACHED_PAUSE_S = 10.0
"""When to ask again whether an order was paid that would expire now."""


async def expire(desk: Desk, order_id: str, patience: Patience) -> None:
    """Cancel an order that nobody has paid in time; its gateways are asked before. The job `expire_order`.

    A gateway that does not answer, or answers nonsense, holds it up, but not beyond `HOLD_MAX_S` after placing: money
    that came all the same revives the order, or goes back.

    Raises:
        NotYet: a gateway does not answer.
    """
    async with desk.transactions() as tx:
        attempts = [read_row(row) for row in await tx.all(ATTEMPTS, uuid.UUID(order_id), sorted(GATEWAYS))]
    unreached: GatewayFailed | GatewayError | None = None
    for row in attempts:
        try:
            await ask(desk, row)
        except (GatewayFailed, GatewayError) as error:
            unreached = error
    async with desk.transactions() as tx:
        order = (await open_order(tx, order_id)).order
        held_until = order.created_at + dt.timedelta(seconds=desk.house.terms.hold_max_s)
        if unreached is not None and order.waits and tx.now() < held_until:
            raise NotYet(patience.between(UNREACHED_PAUSE_S / 2, UNREACHED_PAUSE_S)) from unreached
        await expire_order(tx, order_id)


# the books of a day

OURS = """
select c.key, c.amount, c.currency, p.id, p.order_id, coalesce(p.gateway_order_id, '') as gateway_order_id
from captures c join payments p on p.id = c.payment_id
where c.provider = $1 and (c.key = any ($2::text[]) or (c.at >= $3 and c.at < $4))"""
PAYMENTS = (
    "select id, order_id, gateway_order_id from payments where provider = $1 and gateway_order_id = any ($2::text[])"
)
STORED = "select report from reconciliations where provider = $1 and day = $2"
STORE = """
insert into reconciliations (provider, day, made_at, report) values ($1, $2, $3, $4)
on conflict (provider, day) do update set made_at = excluded.made_at, report = excluded.report"""


def bounds(day: dt.date, zone: zoneinfo.ZoneInfo) -> tuple[dt.datetime, dt.datetime]:
    """When a day begins and ends, half-open, in UTC."""
    begin, end = (dt.datetime.combine(one, dt.time(), zone) for one in (day, day + dt.timedelta(days=1)))
    return begin.astimezone(dt.UTC), end.astimezone(dt.UTC)


class _Capture(NamedTuple):
    """Money that we have booked."""

    key: str
    booked: Booked
    payment_id: uuid.UUID
    order_id: uuid.UUID


async def compare(desk: Desk, provider: Provider, day: dt.date, zone: zoneinfo.ZoneInfo) -> Reconciliation:
    """Compare what the gateway says it captured on `day` with what we have booked, keep the report, and have each
    payment asked about of which the books differ.

    Raises:
        GatewayFailed.
    """
    gateway = _gateway(desk, provider)
    start, end = bounds(day, zone)
    since = start - (LATE if provider is Provider.RAZORPAY else MARGIN)
    theirs = {_key(provider, one): one async for one in gateway.movements(since, end + MARGIN)}
    async with desk.transactions() as tx:
        rows = await tx.all(OURS, provider, list(theirs), start, end)
        of_theirs = await tx.all(PAYMENTS, provider, sorted({one.gateway_order_id for one in theirs.values()}))
    ours = {capture.key: capture for capture in map(_capture, rows)}
    payments = {row["gateway_order_id"]: (row["id"], row["order_id"]) for row in of_theirs}
    that_day = {key: one for key, one in theirs.items() if start <= one.captured_at < end}
    unheard = {key: one for key, one in theirs.items() if one.captured_at < start and key not in ours}
    differences = [
        difference
        for key, one in sorted((that_day | unheard).items())
        if (difference := _judge(one, ours.get(key), payments)) is not None
    ]
    counted = [ours[key].booked for key in that_day if key in ours]
    for key in sorted(ours.keys() - theirs.keys()):
        # it may be in their books on another day: what counts is the payment itself
        found = await _theirs_of(desk, gateway, ours[key])
        if found is not None and found == ours[key].booked:
            continue
        counted.append(ours[key].booked)
        differences.append(_of_ours(provider, ours[key], found))
    async with desk.transactions() as tx:
        report = Reconciliation(
            provider=provider,
            date=day.isoformat(),
            made_at=rfc3339(tx.now()),
            ours=sums(counted),
            theirs=sums(_booked(one) for one in that_day.values()),
            differences=differences,
        )
        await tx.one(STORE, provider, day, tx.now(), msgspec.json.encode(report).decode())
        for payment_id in sorted({one.payment_id for one in differences if one.payment_id is not None}):
            await enqueue(tx, "reconcile", payment_id)
    return report


def _key(provider: Provider, one: Movement) -> str:
    """Under which money is booked: Razorpay's payment, or Stripe's intent, which succeeds once."""
    return one.gateway_order_id if provider is Provider.STRIPE else one.gateway_payment_id


def _booked(one: Movement) -> Booked:
    return Booked(gateway_order_id=one.gateway_order_id, amount=one.amount, currency=one.currency)


def _capture(row: Row) -> _Capture:
    booked = Booked(gateway_order_id=row["gateway_order_id"], amount=row["amount"], currency=row["currency"])
    return _Capture(row["key"], booked, row["id"], row["order_id"])


def _judge(
    one: Movement, ours: _Capture | None, payments: Mapping[str, tuple[uuid.UUID, uuid.UUID]]
) -> Difference | None:
    theirs = _booked(one)
    if ours is not None and ours.booked == theirs:
        return None
    found = Difference(
        kind=Kind.MISSING if ours is None else Kind.ALTERED,
        gateway_order_id=one.gateway_order_id,
        gateway_payment_id=one.gateway_payment_id,
        ours=ours.booked if ours is not None else None,
        theirs=theirs,
    )
    named = (ours.payment_id, ours.order_id) if ours is not None else payments.get(one.gateway_order_id)
    if named is not None:
        found.payment_id, found.order_id = map(str, named)
    return found


def _of_ours(provider: Provider, ours: _Capture, theirs: Booked | None) -> Difference:
    return Difference(
        kind=Kind.EXTRA if theirs is None else Kind.ALTERED,
        gateway_order_id=ours.booked.gateway_order_id,
        gateway_payment_id=None if provider is Provider.STRIPE else ours.key,
        payment_id=str(ours.payment_id),
        order_id=str(ours.order_id),
        ours=ours.booked,
        theirs=theirs,
    )


async def _theirs_of(desk: Desk, gateway: Gateway, ours: _Capture) -> Booked | None:
    """What the gateway says of a capture of ours, whichever day it counts it on; None: it has none."""
    row, _ = await _read(desk, str(ours.payment_id))
    if row.gateway_order_id is None:
        return None
    try:
        news = await gateway.fetch(known(row))
    except GatewayRefused as refused:
        if refused.may_pass:
            raise
        return None  # it does not know such a payment
    for one in news:
        key = one.gateway_order_id if row.provider is Provider.STRIPE else one.gateway_payment_id
        if one.report is Report.CAPTURED and key == ours.key:
            return Booked(gateway_order_id=row.gateway_order_id, amount=one.amount, currency=one.currency)
    return None


class ReadReconciliation(Strict):
    """Whose books; by default Razorpay's where it is set up, else Stripe's."""

    provider: Annotated[Provider, Meta(extra_json_schema={"enum": sorted(GATEWAYS)})] | UnsetType = UNSET


async def read_reconciliation(
    desk: Desk, actor: Actor, date: str, cmd: ReadReconciliation, zone: zoneinfo.ZoneInfo
) -> Reconciliation:
    """The report of a day. The day of which there is none yet is compared now.

    Raises:
        Forbidden; NotFound: there is no such day, or it has not ended; Invalid: no gateway; Unavailable: it is not set
        up here, or its breaker is open; GatewayError.
    """
    require_role(actor, (Role.ADMIN,), "read reconciliations")
    if actor.orders is not None:
        raise Forbidden("This token is for some orders only; reconciliations are about all.")
    provider = cmd.provider if isinstance(cmd.provider, Provider) else _first(desk)
    if provider not in GATEWAYS:
        raise Invalid("Only gateways have books to compare ours with.", "/provider")
    try:
        day = dt.date.fromisoformat(date)
        start, end = bounds(day, zone)
        start -= LATE  # the first that is looked at
    except (ValueError, OverflowError):
        raise NotFound("There is no such day.") from None
    async with desk.transactions() as tx:
        stored = await tx.one(STORED, provider, day)
        now = tx.now()
    if stored is not None:
        return msgspec.json.decode(stored["report"], type=Reconciliation)
    if end > now:
        raise NotFound("This day has not ended.")
    gateway_of(desk.gateways, provider)
    try:
        return await compare(desk, provider, day, zone)
    except GatewayFailed as error:
        raise as_refusal(error) from error


def _first(desk: Desk) -> Provider:
    return next((one for one in (Provider.RAZORPAY, Provider.STRIPE) if one in desk.gateways), Provider.RAZORPAY)
