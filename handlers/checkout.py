"""The checkout desk: begin to pay for an order, and what the payer's browser needs for it.

Starting is two short transactions around one gateway call. The first judges and writes the payment with the reference
under which the gateway is asked, so that asking again, by whoever finds it, gives the same gateway order; the second
keeps the name that the gateway gave it. Of an order one payment is open at a time: another one takes its place.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

from handlers.book import open_book, open_order
from handlers.book_rows import OrderMoney, PaymentRow, read_row, view
from handlers.context import Tx
from handlers.jobs import enqueue
from handlers.orders import SEEN, order_uuid
from handlers.payments import (
    CLOSED,
    PAYABLE,
    PAYERS,
    Address,
    AskedAmount,
    CurrencyCode,
    Description,
    Desk,
    Metadata,
    P,
    as_refusal,
    check_address,
    check_payable,
    created_as,
    creation_failed,
    gateway_of,
    known,
    new_payment,
    read_payment,
    record,
    require,
    settle_all,
    source_of,
)
from handlers.ports import (
    Done,
    GatewayAway,
    GatewayFailed,
    GatewayNotAsked,
    GatewayRefused,
    Gateways,
    GatewayUnknown,
    Once,
)
from models.base import Strict, View
from models.errors import (
    AmountMismatch,
    Conflict,
    CurrencyMismatch,
    Invalid,
    NotFound,
    PaymentInProgress,
    Unavailable,
)
from models.order import check_currency, require_role, sight
from models.payment import MOVING, OPEN, Capture, News, Provider, Report, Source
from models.user import BACK_OFFICE, Actor

OFFERED = (Provider.RAZORPAY, Provider.STRIPE)
"""Which provider is taken when none is named: the first one of these that is offered."""

WITHDRAWALS_MAX = 3
"""How many open payments of other providers one start cancels before it gives up."""

ORDER_SEEN = f"select 1 from orders o where o.id = $1 and {SEEN}"


class StartPayment(Strict):
    """`amount` is what is due unless staff or a service ask for less; whoever names an amount names its currency."""

    SCHEMA: ClassVar[dict[str, Any]] = {
        "examples": [
            {"orderId": "0d1b6c1e-6a3f-4f0e-9a52-0b8a4a1f7f10"},
            {
                "orderId": "0d1b6c1e-6a3f-4f0e-9a52-0b8a4a1f7f10",
                "provider": "razorpay",
                "amount": 25200,
                "currency": "INR",
                "returnUrl": "https://shop.example/thanks",
            },
        ]
    }

    order_id: Annotated[str, Meta(extra_json_schema={"format": "uuid"})]
    provider: (
        Annotated[Literal["razorpay", "stripe"], Meta(description="the first one offered, when none is named")]
        | UnsetType
    ) = UNSET
    amount: AskedAmount | UnsetType = UNSET
    currency: CurrencyCode | UnsetType = UNSET
    capture: (
        Annotated[Capture, Meta(description="manual: staff captures what was authorized; for staff and services")]
        | UnsetType
    ) = UNSET
    return_url: Address | UnsetType = UNSET
    description: Description | UnsetType = UNSET
    metadata: Metadata | UnsetType = UNSET


async def permit_start(tx: Tx, actor: Actor, cmd: StartPayment) -> None:
    """Raises NotFound, Forbidden: the actor may not pay for this order."""
    require(actor, BACK_OFFICE | PAYERS, "pay for orders")
    seen = sight(actor, cmd.order_id)
    row = await tx.one(ORDER_SEEN, order_uuid(cmd.order_id), seen.all, seen.customer, seen.agent)
    if row is None:
        raise NotFound("There is no such order.")
    if cmd.capture is Capture.MANUAL:
        require_role(actor, BACK_OFFICE, "ask for a payment that is captured by hand")


class Offer(View):
    provider: Provider
    sandbox: Annotated[bool | None, Meta(description="true: a simulator, no money moves")] = None


class Offers(msgspec.Struct, frozen=True):
    items: Annotated[list[Offer], Meta(description="what takes payments now, the one first that is taken by default")]


def offers(actor: Actor, gateways: Gateways) -> Offers:
    """The providers that take payments now.

    Raises:
        Forbidden.
    """
    require(actor, BACK_OFFICE | PAYERS, "pay for orders")
    found = [gateways[provider] for provider in OFFERED if provider in gateways]
    return Offers([Offer(provider=one.provider, sandbox=one.simulated or None) for one in found if one.offered])


def first_offered(gateways: Gateways) -> Provider:
    """Raises Unavailable: none is."""
    for provider in OFFERED:
        if provider in gateways and gateways[provider].offered:
            return provider
    raise Unavailable("No payment provider is available now.")


# start


class _Found(NamedTuple):
    payment: PaymentRow
    status: int
    is_new: bool
    """The gateway has never been asked for it."""


# An intent whose last attempt failed can be paid again with the secret that the browser has: it counts as open.
OPEN_PAYMENTS = """
select * from payments where order_id = $1 and (
    (provider in ('razorpay', 'stripe') and status in ('pending', 'processing', 'authorized', 'unknown'))
    or (provider = 'stripe' and status = 'failed' and gateway_order_id is not null and not superseded))
order by created_at, id"""


async def start(desk: Desk, once: Once, actor: Actor, cmd: StartPayment) -> Done:
    """Begin to pay for an order, or carry on the open payment of that provider and amount.

    Raises:
        OrderClosed, AlreadyPaid, AmountMismatch, CurrencyMismatch, AmountTooSmall, Invalid; PaymentInProgress: money of
        another one is moving; Unavailable: the provider is not offered; GatewayError: it refused, or was not reached.
    """
    if not isinstance(cmd.return_url, UnsetType):
        check_address(cmd.return_url)
    for _ in range(1 + WITHDRAWALS_MAX):
        async with desk.transactions() as tx:
            found = await _open_payment(tx, desk, once, actor, cmd)
        if isinstance(found, _Found):
            return await _create(desk, actor, found)
        await _withdraw(desk, actor, found)
    raise Conflict("The payments of this order change all the time; try again.")


async def _open_payment(tx: Tx, desk: Desk, once: Once, actor: Actor, cmd: StartPayment) -> _Found | PaymentRow:
    """The payment that is carried on: the one that this key began, the open one, or a new one. A row alone is an open
    intent of Stripe that must be cancelled first."""
    begun = await once.begun(tx)
    if begun:
        earlier = await read_payment(tx, begun[0])
        if earlier.status in OPEN or earlier.gateway_order_id is not None:
            return _Found(earlier, 201, is_new=False)
        # else it came to nothing, and this is judged anew
    book = await open_order(tx, cmd.order_id)
    order = book.order
    check_payable(order)
    amount = _amount(actor, cmd, order)
    provider = first_offered(desk.gateways) if isinstance(cmd.provider, UnsetType) else Provider(cmd.provider)
    gateway_of(desk.gateways, provider).check_amount(amount, order.currency)
    capture = Capture.AUTOMATIC if isinstance(cmd.capture, UnsetType) else cmd.capture
    rows = [read_row(row) for row in await tx.all(OPEN_PAYMENTS, order.id)]
    wanted = (provider, amount, capture)
    same = next((x for x in rows if x.status in OPEN and (x.provider, x.amount, x.capture) == wanted), None)
    others = [row for row in rows if row is not same]
    for other in others:
        if other.status in MOVING and other.gateway_order_id is not None:
            raise PaymentInProgress(f"A payment by {other.provider.capitalize()} is under way.", str(other.id))
    others = [row for row in others if not row.superseded]
    for other in others:
        if other.provider is Provider.STRIPE and other.gateway_order_id is not None:
            return other
    for other in others:
        await _supersede(tx, other, actor)
    if same is not None:
        old = await open_book(tx, str(same.id))
        if old.resume(desk.house.terms):
            await old.close(source_of(actor), "resumed", {}, actor=actor)
        await once.begin(tx, str(same.id))
        return _Found(old.payment, 200, is_new=False)
    row = _new_payment(tx, order, provider, amount, capture, cmd)
    book.start(row, desk.house.terms)
    await once.begin(tx, str(row.id))
    detail = {"provider": provider, "amount": amount, "currency": order.currency, "capture": capture}
    await book.close(source_of(actor), "started", detail, actor=actor)
    await record(tx, actor, "start", row, None, {"orderId": cmd.order_id, **detail})
    return _Found(row, 201, is_new=True)


def _amount(actor: Actor, cmd: StartPayment, order: OrderMoney) -> int:
    """What the payment is about, in minor units of the order's currency."""
    if not isinstance(cmd.currency, UnsetType):
        check_currency(cmd.currency)
        if cmd.currency != order.currency:
            raise CurrencyMismatch(f"The order is in {order.currency}.")
    if isinstance(cmd.amount, UnsetType):
        return order.due
    if isinstance(cmd.currency, UnsetType):
        raise Invalid("Whoever names an amount names its currency.", "/currency")
    if cmd.amount > order.due:
        raise AmountMismatch(f"No more than {order.due} is due.")
    if cmd.amount < order.due and actor.role not in BACK_OFFICE:
        raise AmountMismatch(f"{order.due} is due; only staff may ask for less.")
    return cmd.amount


def _new_payment(
    tx: Tx, order: OrderMoney, provider: Provider, amount: int, capture: Capture, cmd: StartPayment
) -> PaymentRow:
    payment_id, now = tx.new_id(), tx.now()
    return PaymentRow(
        id=uuid.UUID(payment_id),
        order_id=order.id,
        customer_id=order.customer_id,
        provider=provider,
        status=P.PENDING,
        amount=amount,
        expected=amount,
        currency=order.currency,
        capture=capture,
        reference=payment_id,
        description=None if isinstance(cmd.description, UnsetType) else cmd.description,
        metadata="{}" if isinstance(cmd.metadata, UnsetType) else msgspec.json.encode(cmd.metadata).decode(),
        return_url=None if isinstance(cmd.return_url, UnsetType) else cmd.return_url,
        created_at=now,
        updated_at=now,
        status_at=now,
    )


async def _supersede(tx: Tx, row: PaymentRow, actor: Actor | None) -> None:
    """Another payment takes its place. Money that comes all the same is judged by what is due then."""
    book = await open_book(tx, str(row.id))
    book.payment.superseded = True
    await book.close(Source.SYSTEM if actor is None else source_of(actor), "superseded", {}, actor=actor)


async def withdraw_intents(desk: Desk, actor: Actor, order_id: str) -> None:
    """Cancel the open intents of Stripe, because cash takes their place. What cannot be cancelled now, and what
    Razorpay still takes, is for whoever books the cash to supersede: should money come all the same, it goes back."""
    async with desk.transactions() as tx:
        rows = [read_row(row) for row in await tx.all(OPEN_PAYMENTS, order_uuid(order_id))]
    for row in rows:
        if row.provider is Provider.STRIPE and row.gateway_order_id is not None:
            await _withdraw(desk, actor, row)


async def _withdraw(desk: Desk, actor: Actor, row: PaymentRow) -> None:
    """Cancel an open intent because another payment takes its place, and book what its gateway says of it. One that
    cannot be cancelled now is superseded, and cancelled by a job."""
    gateway = desk.gateways.get(row.provider)
    news: Sequence[News] = ()
    if gateway is not None:
        with contextlib.suppress(GatewayFailed):  # then a job asks again
            news = await gateway.cancel(known(row))
    after = await settle_all(desk, str(row.id), news, source_of(actor), actor)
    if after.status in (P.PENDING, P.FAILED):
        async with desk.transactions() as tx:
            await _supersede(tx, row, actor)
            await enqueue(tx, "cancel_payment", str(row.id))


async def _create(desk: Desk, actor: Actor, found: _Found) -> Done:
    """Have the gateway create what it does not know yet, or may not know. The same reference gives the same one."""
    row = found.payment
    if row.status not in OPEN or (row.gateway_order_id is not None and row.status is not P.UNKNOWN):
        return Done(found.status, view(row))
    gateway = gateway_of(desk.gateways, row.provider)
    try:
        created = await gateway.create(new_payment(row))
    except GatewayNotAsked as error:
        raise as_refusal(error) from error  # it stays open: whoever starts again carries it on
    except (GatewayRefused, GatewayAway) as error:
        # of an earlier attempt it may be known to the gateway all the same: then only its own word ends it
        if found.is_new or (isinstance(error, GatewayRefused) and not error.may_pass):
            await creation_failed(desk, row, error)
        raise as_refusal(error) from error
    except GatewayUnknown as error:
        async with desk.transactions() as tx:
            book = await open_book(tx, str(row.id))
            row = book.payment
            if row.gateway_order_id is None:
                news = News(provider=row.provider, gateway_order_id=None, report=Report.UNKNOWN)
                book.report(news, desk.house.terms)
                await book.close(Source.SYSTEM, "creation.unknown", {"code": error.code, "message": error.message})
            await enqueue(tx, "reconcile", str(row.id))
        # somebody else may have found out meanwhile
        return Done(202 if row.status is P.UNKNOWN else found.status, view(row))
    order, row = await created_as(desk, row, created)
    if row.status in OPEN:
        check_payable(order)  # it was paid or cancelled meanwhile
    return Done(found.status, view(row), created.client_secret)


# what a payer's browser needs


CHECKOUT = (
    "select p.*, o.contact, o.status as order_status from payments p join orders o on o.id = p.order_id where p.id = $1"
)


async def checkout(desk: Desk, payment_id: str, secret: str | None) -> dict[str, Any] | None:
    """What the payer's browser needs to pay; None: there is nothing to pay. `secret`: as the creation gave it, if it
    was just now; else the gateway is asked, because it is never stored.

    Raises:
        Unavailable: the gateway does not answer.
    """
    async with desk.transactions() as tx:
        found = await tx.one(CHECKOUT, uuid.UUID(payment_id))
    assert found is not None
    row = read_row(found)
    gateway = desk.gateways.get(row.provider)
    if gateway is None or row.gateway_order_id is None or row.status not in PAYABLE or found["order_status"] in CLOSED:
        return None
    if secret is None:
        try:
            secret = await gateway.client_secret(known(row))
        except GatewayFailed as error:
            raise Unavailable(f"{row.provider.capitalize()} does not say how to go on; try again.") from error
    contact = msgspec.json.decode(found["contact"]) if found["contact"] else {}
    names = (("name", "name"), ("email", "email"), ("contact", "phone"))
    return gateway.checkout(known(row), secret, {ours: contact[name] for ours, name in names if contact.get(name)})
