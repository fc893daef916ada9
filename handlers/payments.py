"""The payments desk: start, verify, confirm, capture, cancel, reconcile, annotate and void a payment.

A verb that asks a gateway is short transactions around the call, and nothing is held while the gateway thinks. What it
answers goes to the settle path, whoever asked. A call that may have happened is no failure: the payment says so, a job
asks again, and the caller hears 202.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple
from urllib.parse import urlsplit

import msgspec
from msgspec import UNSET, Meta, UnsetType

from handlers import audit
from handlers.context import Tx
from handlers.jobs import enqueue
from handlers.orders import SEEN, order_uuid
from handlers.ports import (
    Confirmed,
    Created,
    Done,
    Gateway,
    GatewayAway,
    GatewayFailed,
    GatewayRefused,
    Gateways,
    GatewayUnknown,
    Known,
    NewPayment,
    Once,
    Transactions,
)
from handlers.settlement import (
    Book,
    House,
    OrderMoney,
    PaymentRow,
    UnknownPayment,
    open_book,
    open_order,
    read_row,
    settle,
    view,
)
from models.base import LongText, Strict, Words
from models.errors import (
    AlreadyPaid,
    AmountMismatch,
    Conflict,
    CurrencyMismatch,
    GatewayError,
    Invalid,
    InvalidSignature,
    MoneyMoved,
    NotFound,
    OrderClosed,
    PaymentDeclined,
    PaymentInProgress,
    Unavailable,
)
from models.money import MINOR_UNITS_MAX
from models.order import Status, check_currency, may_see, require_role, sight
from models.payment import (
    GATEWAYS,
    OPEN,
    Capture,
    Failure,
    News,
    Payment,
    PaymentStatus,
    Provider,
    Report,
    Source,
)
from models.user import BACK_OFFICE, STAFF, Actor, Role

PAYERS = frozenset({Role.CUSTOMER, Role.GUEST})
"""Who pays: the owner of the order, or a guest that was sent a payment link."""

OFFERED = (Provider.RAZORPAY, Provider.STRIPE)
"""Which provider is taken when none is named: the first one of these that is offered."""

CLOSED = frozenset({Status.CANCELLED, Status.RETURNED})
"""Orders that nobody pays any more. What was delivered unpaid can still be paid."""

WITHDRAWALS_MAX = 3
"""How many open payments of other providers one start cancels before it gives up."""

P = PaymentStatus
PAYABLE = frozenset({P.PENDING, P.PROCESSING})
"""A payer's browser can do something about it."""


class Desk(NamedTuple):
    """What the verbs need of the world."""

    transactions: Transactions
    gateways: Gateways
    house: House


AskedAmount = Annotated[int, Meta(ge=1, le=MINOR_UNITS_MAX, description="minor units of `currency`: 12000 is ₹120")]
CurrencyCode = Annotated[str, Meta(min_length=3, max_length=3, description="ISO 4217")]
Address = Annotated[str, Meta(min_length=8, max_length=2000, pattern=Words, description="http:// or https://")]
GatewayId = Annotated[str, Meta(min_length=1, max_length=200, pattern="^[!-~]+\\Z")]
Description = Annotated[str, Meta(min_length=1, max_length=255, pattern=Words)]
Metadata = Annotated[
    dict[
        Annotated[str, Meta(min_length=1, max_length=40, pattern=Words)],
        Annotated[str, Meta(max_length=256, pattern=Words)],
    ],
    Meta(max_length=15, description="what the merchant wants to remember: 15 pairs of texts at most"),
]


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


class VerifyPayment(Strict):
    """What Razorpay's checkout handed to the browser, all of it; nothing for Stripe."""

    SCHEMA: ClassVar[dict[str, Any]] = {
        "examples": [
            {
                "razorpayPaymentId": "pay_29QQoUBi66xm2f",
                "razorpayOrderId": "order_9A33XWu170gUtm",
                "razorpaySignature": "9ef4dffbfd84f1318f6739a3ce19f9d85851857ae648f114332d8401e0949a3d",
            },
            {},
        ]
    }

    razorpay_payment_id: GatewayId | UnsetType = UNSET
    razorpay_order_id: GatewayId | UnsetType = UNSET
    razorpay_signature: Annotated[str, Meta(min_length=1, max_length=200)] | UnsetType = UNSET


class ConfirmPayment(Strict):
    SCHEMA: ClassVar[dict[str, Any]] = {
        "examples": [{"paymentMethodId": "pm_card_visa", "returnUrl": "https://shop.example/thanks"}]
    }

    payment_method_id: GatewayId
    return_url: Address


class CapturePayment(Strict):
    SCHEMA: ClassVar[dict[str, Any]] = {"examples": [{"amount": 25200, "currency": "INR"}]}

    amount: AskedAmount
    currency: CurrencyCode


class Nothing(Strict):
    """A command that says nothing more."""


class AnnotatePayment(Strict):
    """`metadata` replaces what was there."""

    SCHEMA: ClassVar[dict[str, Any]] = {"examples": [{"description": "Table 7", "metadata": {"invoice": "2026-117"}}]}

    description: LongText | UnsetType = UNSET
    metadata: Metadata | UnsetType = UNSET


# who may


ORDER_SEEN = f"select 1 from orders o where o.id = $1 and {SEEN}"
READ = "select * from payments where id = $1"


async def permit_start(tx: Tx, actor: Actor, cmd: StartPayment) -> None:
    """Raises NotFound, Forbidden: the actor may not pay for this order."""
    _require(actor, BACK_OFFICE | PAYERS, "pay for orders")
    seen = sight(actor, cmd.order_id)
    row = await tx.one(ORDER_SEEN, order_uuid(cmd.order_id), seen.all, seen.customer, seen.agent)
    if row is None:
        raise NotFound("There is no such order.")
    if cmd.capture is Capture.MANUAL:
        require_role(actor, BACK_OFFICE, "ask for a payment that is captured by hand")


def _require(actor: Actor, allowed: frozenset[Role], doing: str) -> None:
    """Raises Forbidden: the role never does this, or it is a guest that only looks."""
    require_role(actor, allowed, doing)
    if actor.tracks_only:
        require_role(actor, (), f"{doing} with a tracking link")


async def permit_payer(tx: Tx, actor: Actor, payment_id: str, *_: object) -> PaymentRow:
    return await _permit(tx, actor, payment_id, PAYERS, "say that a payment was made")


async def permit_back_office(tx: Tx, actor: Actor, payment_id: str, *_: object) -> PaymentRow:
    return await _permit(tx, actor, payment_id, BACK_OFFICE, "capture payments")


async def permit_all(tx: Tx, actor: Actor, payment_id: str, *_: object) -> PaymentRow:
    return await _permit(tx, actor, payment_id, BACK_OFFICE | PAYERS, "see payments")


async def permit_staff(tx: Tx, actor: Actor, payment_id: str, *_: object) -> PaymentRow:
    return await _permit(tx, actor, payment_id, STAFF, "reconcile payments")


async def _permit(tx: Tx, actor: Actor, payment_id: str, allowed: frozenset[Role], doing: str) -> PaymentRow:
    """The payment, if the actor's role may do this and the actor sees its order.

    Raises:
        NotFound, Forbidden.
    """
    _require(actor, allowed, doing)
    row = await tx.one(READ, uuid.UUID(payment_id))
    if row is None or not may_see(actor, str(row["order_id"]), row["customer_id"], None):
        raise NotFound("There is no such payment.")
    return read_row(row)


def source_of(actor: Actor) -> Source:
    return Source.STAFF if actor.role in BACK_OFFICE else Source.CLIENT


async def _audit(tx: Tx, actor: Actor, action: str, row: PaymentRow, before: object, after: object) -> None:
    """Keep what staff and services did; payers' doings are in the payment's history."""
    if actor.role in BACK_OFFICE:
        await audit.record(tx, actor, f"payment.{action}", f"payment:{row.id}", before, after)


# gateways


def known(row: PaymentRow) -> Known:
    """The payment as its gateway knows it; it must know it."""
    assert row.gateway_order_id is not None
    return Known(
        payment_id=str(row.id),
        gateway_order_id=row.gateway_order_id,
        gateway_payment_id=row.gateway_payment_id,
        reference=row.reference,
        amount=row.amount,
        currency=row.currency,
        capture=row.capture,
    )


def gateway_of(gateways: Gateways, provider: Provider) -> Gateway:
    """Raises Unavailable: the provider is not set up, or its breaker is open."""
    gateway = gateways.get(provider)
    if gateway is None:
        raise Unavailable(f"Payments by {provider} are not set up here.")
    if not gateway.offered:
        raise Unavailable(f"Payments by {provider} are not available now; try again, or pay in another way.")
    return gateway


def first_offered(gateways: Gateways) -> Provider:
    """Raises Unavailable: none is."""
    for provider in OFFERED:
        if provider in gateways and gateways[provider].offered:
            return provider
    raise Unavailable("No payment provider is available now.")


def as_refusal(error: GatewayFailed) -> GatewayError:
    if isinstance(error, GatewayRefused):
        return GatewayError(f"{error.provider} refused: {error.message} ({error.code})")
    return GatewayError(f"{error.provider} was not reached; nothing has happened.")


# start


class _Found(NamedTuple):
    payment: PaymentRow
    status: int
    is_new: bool
    """The gateway has never been asked for it."""


OPEN_PAYMENTS = """
select * from payments where order_id = $1 and provider in ('razorpay', 'stripe')
and status in ('pending', 'processing', 'authorized', 'unknown') order by created_at, id"""


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
        row = await tx.one(READ, uuid.UUID(begun[0]))
        assert row is not None, "payments are never deleted"
        earlier = read_row(row)
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
    same = next((x for x in rows if (x.provider, x.amount, x.capture) == (provider, amount, capture)), None)
    others = [row for row in rows if row is not same]
    for other in others:
        if other.status is not P.PENDING and other.gateway_order_id is not None:
            raise PaymentInProgress(f"A payment by {other.provider} is under way.", str(other.id))
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
    await _audit(tx, actor, "start", row, None, {"orderId": cmd.order_id, **detail})
    return _Found(row, 201, is_new=True)


def check_payable(order: OrderMoney) -> None:
    """Raises OrderClosed, AlreadyPaid."""
    if order.status in CLOSED:
        raise OrderClosed(f"The order is {order.status}; it cannot be paid any more.")
    if order.due <= 0:
        raise AlreadyPaid("Nothing is due for this order.")


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


def check_address(url: str) -> None:
    """Raises Invalid: not an address that a browser may be sent to."""
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        fine = False
    if not fine:
        raise Invalid("Write an address that starts with https:// or http://.", "/returnUrl")


async def _supersede(tx: Tx, row: PaymentRow, actor: Actor | None) -> None:
    """Another payment takes its place. Money that comes all the same is judged by what is due then."""
    book = await open_book(tx, str(row.id))
    book.payment.superseded = True
    await book.close(Source.SYSTEM if actor is None else source_of(actor), "superseded", {}, actor=actor)


async def make_room(desk: Desk, actor: Actor, order_id: str) -> None:
    """Let nobody pay this order by a gateway any more, so that it can be paid with cash: open intents of Stripe are
    cancelled, what Razorpay still takes is superseded.

    Raises:
        PaymentInProgress: money is moving.
    """
    for _ in range(1 + WITHDRAWALS_MAX):
        async with desk.transactions() as tx:
            book = await open_order(tx, order_id)
            rows = [read_row(row) for row in await tx.all(OPEN_PAYMENTS, book.order.id)]
            for row in rows:
                if row.status is not P.PENDING and row.gateway_order_id is not None:
                    raise PaymentInProgress(f"A payment by {row.provider} is under way.", str(row.id))
            rows = [row for row in rows if not row.superseded]
            intent = next((x for x in rows if x.provider is Provider.STRIPE and x.gateway_order_id is not None), None)
            if intent is None:
                for row in rows:
                    await _supersede(tx, row, actor)
                return
        await _withdraw(desk, actor, intent)
    raise Conflict("The payments of this order change all the time; try again.")


async def _withdraw(desk: Desk, actor: Actor, row: PaymentRow) -> None:
    """Cancel an open intent because another payment takes its place, and book what its gateway says of it. One that
    cannot be cancelled now is superseded, and cancelled by a job."""
    gateway = desk.gateways.get(row.provider)
    news: Sequence[News] = ()
    if gateway is not None:
        try:
            news = await gateway.cancel(known(row))
        except GatewayFailed:
            pass  # a job asks again
    after = await _settle_all(desk, str(row.id), news, source_of(actor), actor)
    if after.status is P.PENDING:
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
    except (GatewayRefused, GatewayAway) as error:
        # of an earlier attempt it may be known to the gateway all the same: then only its own word ends it
        if found.is_new or (isinstance(error, GatewayRefused) and not error.failure.retryable):
            await _creation_failed(desk, row, error)
        raise as_refusal(error) from error
    except GatewayUnknown as error:
        async with desk.transactions() as tx:
            book = await open_book(tx, str(row.id))
            if book.payment.gateway_order_id is None:
                news = News(provider=row.provider, gateway_order_id=None, report=Report.UNKNOWN)
                book.report(news, desk.house.terms)
                await book.close(Source.SYSTEM, "creation.unknown", {"code": error.code, "message": error.message})
            await enqueue(tx, "reconcile", str(row.id))
        return Done(202, view(book.payment))
    order, row = await created_as(desk, row, created)
    if row.status in OPEN:
        check_payable(order)  # it was paid or cancelled meanwhile
    return Done(found.status, view(row), created.client_secret)


def new_payment(row: PaymentRow) -> NewPayment:
    return NewPayment(
        payment_id=str(row.id),
        order_id=str(row.order_id),
        reference=row.reference,
        amount=row.amount,
        currency=row.currency,
        capture=row.capture,
        description=row.description,
    )


async def created_as(
    desk: Desk, row: PaymentRow, created: Created, source: Source = Source.SYSTEM
) -> tuple[OrderMoney, PaymentRow]:
    """Keep the name that the gateway gave the payment; webhooks that were here before it are looked at again.

    Raises:
        GatewayError: the gateway gave a name that is another payment's.
    """
    async with desk.transactions() as tx:
        taken = await tx.one(TAKEN, row.provider, created.gateway_order_id, row.id)
        if taken is None:
            news = News(
                provider=row.provider,
                gateway_order_id=created.gateway_order_id,
                report=Report.PENDING,
                fresh=True,
            )
            book = await open_book(tx, str(row.id))
            if book.payment.gateway_order_id in (None, created.gateway_order_id):
                await book.learn(news)
                book.report(news, desk.house.terms)
                await book.close(source, "created", {"gatewayOrderId": created.gateway_order_id})
            if book.payment.status in OPEN and (book.order.status in CLOSED or book.order.due <= 0):
                await enqueue(tx, "cancel_payment", str(row.id))
            return book.order, book.payment
    error = GatewayRefused(row.provider, 200, "taken", f"it answered with {created.gateway_order_id}, another payment")
    await _creation_failed(desk, row, error)
    raise as_refusal(error)


TAKEN = "select id from payments where provider = $1 and gateway_order_id = $2 and id <> $3"


async def _creation_failed(desk: Desk, row: PaymentRow, error: GatewayRefused | GatewayAway) -> None:
    async with desk.transactions() as tx:
        book = await open_book(tx, str(row.id))
        if book.payment.gateway_order_id is not None or book.payment.status not in OPEN:
            return  # somebody else has carried it on meanwhile
        attempted = book.payment.attempted
        failure = (
            error.failure
            if isinstance(error, GatewayRefused)
            else Failure(code=error.code, message=error.message, retryable=True)
        )
        news = News(provider=row.provider, gateway_order_id=None, report=Report.FAILED, failure=failure, fresh=True)
        book.report(news, desk.house.terms)
        book.payment.attempted = attempted  # nobody has tried to pay
        await book.close(Source.SYSTEM, "creation.failed", failure)


# what a payer's browser needs


CONTACT = "select p.*, o.contact from payments p join orders o on o.id = p.order_id where p.id = $1"


async def checkout(desk: Desk, payment_id: str, secret: str | None) -> dict[str, Any] | None:
    """What the payer's browser needs to pay; None: there is nothing to pay. `secret`: as the creation gave it, if it was
    just now; else the gateway is asked, because it is never stored.

    Raises:
        Unavailable: the gateway does not answer.
    """
    async with desk.transactions() as tx:
        found = await tx.one(CONTACT, uuid.UUID(payment_id))
    assert found is not None
    row = read_row(found)
    gateway = desk.gateways.get(row.provider)
    if gateway is None or row.gateway_order_id is None or row.status not in PAYABLE:
        return None
    if secret is None:
        try:
            secret = await gateway.client_secret(known(row))
        except GatewayFailed as error:
            raise Unavailable(f"{row.provider} does not say how to go on; try again.") from error
    contact = msgspec.json.decode(found["contact"]) if found["contact"] else {}
    names = (("name", "name"), ("email", "email"), ("contact", "phone"))
    return gateway.checkout(known(row), secret, {ours: contact[name] for ours, name in names if contact.get(name)})


# verify


async def verify(desk: Desk, once: Once, actor: Actor, payment_id: str, cmd: VerifyPayment) -> Done:
    """The browser says that the payer has paid: ask the gateway, and believe only that.

    Raises:
        InvalidSignature: it does not belong to this payment; nothing is changed. Invalid, Unavailable.
    """
    async with desk.transactions() as tx:
        await once.begun(tx)
        row = await permit_payer(tx, actor, payment_id)
        attempt = _proof(desk.gateways, row, cmd)
        await once.begin(tx, payment_id)
    if row.has_completed or row.gateway_order_id is None:
        return Done(200, view(row))
    claim = News(
        provider=row.provider,
        gateway_order_id=row.gateway_order_id,
        gateway_payment_id=attempt,
        report=Report.PROCESSING,
    )
    try:
        news = await gateway_of(desk.gateways, row.provider).fetch(known(row))
    except (GatewayFailed, Unavailable):
        # a signature proves that somebody has tried, so the order is held until the gateway says how it ended
        async with desk.transactions() as tx:
            if attempt is not None:
                await settle(tx, claim, Source.CLIENT, desk.house, actor=actor, payment_id=payment_id)
            await enqueue(tx, "reconcile", payment_id)
        return Done(202, view(await _read(desk, payment_id)))
    return Done(200, view(await _settle_all(desk, payment_id, news, Source.CLIENT, actor)))


def _proof(gateways: Gateways, row: PaymentRow, cmd: VerifyPayment) -> str | None:
    """The attempt that the checkout's signature proves; None for Stripe, which signs nothing.

    Raises:
        InvalidSignature, Invalid; Unavailable: the provider is not set up.
    """
    proof = (cmd.razorpay_payment_id, cmd.razorpay_order_id, cmd.razorpay_signature)
    if row.provider is not Provider.RAZORPAY:
        if any(part is not UNSET for part in proof):
            raise Invalid(f"This payment is by {row.provider}; there is nothing of Razorpay's to verify.")
        if row.provider not in GATEWAYS:
            raise Invalid("Cash is not verified by its payer.")
        return None
    attempt, order_id, signature = proof
    for name, part in (("razorpayPaymentId", attempt), ("razorpayOrderId", order_id), ("razorpaySignature", signature)):
        if isinstance(part, UnsetType):
            raise Invalid(f"A payment by Razorpay is verified with {name}.", f"/{name}")
    assert isinstance(attempt, str)
    assert isinstance(signature, str)
    gateway = gateways.get(row.provider)
    if gateway is None:
        raise Unavailable(f"Payments by {row.provider} are not set up here.")
    # our own order id is signed for, never the posted one: else any payment of anybody would do
    if row.gateway_order_id is None or order_id != row.gateway_order_id:
        raise InvalidSignature("This was not signed for this payment.")
    if not gateway.proves_checkout(row.gateway_order_id, attempt, signature):
        raise InvalidSignature("This was not signed for this payment.")
    return attempt


async def _settle_all(
    desk: Desk, payment_id: str, news: Sequence[News], source: Source, actor: Actor | None
) -> PaymentRow:
    """Raises GatewayError: it spoke of another payment."""
    async with desk.transactions() as tx:
        try:
            for one in news:
                await settle(tx, one, source, desk.house, actor=actor, payment_id=payment_id)
        except UnknownPayment as error:
            raise GatewayError(f"The gateway was asked about one payment, and answered otherwise: {error}.") from error
        row = await tx.one(READ, uuid.UUID(payment_id))
    assert row is not None
    return read_row(row)


async def _read(desk: Desk, payment_id: str) -> PaymentRow:
    return await _settle_all(desk, payment_id, (), Source.SYSTEM, None)


async def _unknown(desk: Desk, payment_id: str, job: str, news: News | None = None) -> Done:
    """A call that may have happened: a job finds out."""
    async with desk.transactions() as tx:
        if news is not None:
            await settle(tx, news, Source.SYSTEM, desk.house, payment_id=payment_id)
        await enqueue(tx, job, payment_id)
    return Done(202, view(await _read(desk, payment_id)))


# confirm


async def confirm(desk: Desk, once: Once, actor: Actor, payment_id: str, cmd: ConfirmPayment) -> Done:
    """Let Stripe charge a payment method that the browser has collected.

    Raises:
        PaymentDeclined: the payment keeps why. Invalid: the payment is not Stripe's. Conflict, OrderClosed,
        AlreadyPaid, Unavailable, GatewayError.
    """
    check_address(cmd.return_url)
    async with desk.transactions() as tx:
        await once.begun(tx)
        row = await permit_payer(tx, actor, payment_id)
        if row.provider is not Provider.STRIPE:
            raise Invalid(f"A payment by {row.provider} is not confirmed here.")
        if not row.has_completed:
            check_payable((await open_book(tx, payment_id)).order)
            if row.gateway_order_id is None or row.superseded or row.status not in {*PAYABLE, P.FAILED}:
                raise Conflict(f"This payment is {row.status}; start another one.")
        await once.begin(tx, payment_id)
    if row.has_completed:
        return Done(200, view(row))
    gateway = gateway_of(desk.gateways, row.provider)
    try:
        confirmed: Confirmed = await gateway.confirm(known(row), cmd.payment_method_id, cmd.return_url)
    except GatewayRefused as error:
        if error.news is not None:
            await _settle_all(desk, payment_id, [error.news], Source.CLIENT, actor)
        if error.status == 402:
            raise PaymentDeclined(f"{error.message} ({error.code})") from error
        raise as_refusal(error) from error
    except GatewayAway as error:
        raise as_refusal(error) from error
    except GatewayUnknown:
        moving = News(provider=row.provider, gateway_order_id=row.gateway_order_id, report=Report.PROCESSING)
        return await _unknown(desk, payment_id, "reconcile", moving)
    shown = view(await _settle_all(desk, payment_id, [confirmed.news], Source.CLIENT, actor))
    if confirmed.redirect_url is not None:
        shown.next_action = {"type": "redirect", "url": confirmed.redirect_url}
    return Done(200, shown)


# capture


async def capture(desk: Desk, once: Once, actor: Actor, payment_id: str, cmd: CapturePayment) -> Done:
    """Take what was authorized, or less of it where the gateway can do that.

    Raises:
        MoneyMoved: it was captured already. Conflict: nothing is authorized. AmountMismatch, CurrencyMismatch,
        OrderClosed, AlreadyPaid, Unavailable, GatewayError.
    """
    async with desk.transactions() as tx:
        begun = await once.begun(tx)
        await permit_back_office(tx, actor, payment_id)
        book = await open_book(tx, payment_id)
        row = book.payment
        repeated = bool(begun) and row.captured > 0 and row.expected == cmd.amount
        before = row.expected
        if not repeated:
            _check_capture(book, cmd)
            row.expected = cmd.amount
            await book.close(Source.STAFF, "capture.asked", cmd, actor=actor)
            asked = {"amount": cmd.amount, "currency": cmd.currency}
            await _audit(tx, actor, "capture", row, {"status": row.status}, asked)
        await once.begin(tx, payment_id)
    if repeated:
        return Done(200, view(row))
    try:
        gateway = gateway_of(desk.gateways, row.provider)
        news = await gateway.capture(known(row), cmd.amount, cmd.currency)
    except (GatewayRefused, GatewayAway, Unavailable) as error:
        async with desk.transactions() as tx:
            book = await open_book(tx, payment_id)
            if not book.payment.captured:
                book.payment.expected = before
            await book.close(Source.SYSTEM, "capture.failed", {"message": str(error)})
            if isinstance(error, GatewayRefused) and error.news is not None:
                await settle(tx, error.news, Source.STAFF, desk.house, actor=actor, payment_id=payment_id)
        raise (as_refusal(error) if isinstance(error, GatewayFailed) else error) from error
    except GatewayUnknown:
        return await _unknown(desk, payment_id, "reconcile")
    return Done(200, view(await _settle_all(desk, payment_id, [news], Source.STAFF, actor)))


def _check_capture(book: Book, cmd: CapturePayment) -> None:
    payment = book.payment
    if payment.captured:
        raise MoneyMoved("This payment was captured already.")
    if payment.status is not P.AUTHORIZED or payment.gateway_order_id is None:
        raise Conflict(f"Nothing is authorized: the payment is {payment.status}.")
    check_currency(cmd.currency)
    if cmd.currency != payment.currency:
        raise CurrencyMismatch(f"The payment is in {payment.currency}.")
    check_payable(book.order)
    if cmd.amount > min(payment.amount, book.order.due):
        raise AmountMismatch(f"No more than {min(payment.amount, book.order.due)} can be captured.")
    if payment.provider is Provider.RAZORPAY and cmd.amount != payment.amount:
        raise AmountMismatch(f"Razorpay captures the whole of it, {payment.amount}, or nothing.")


# cancel and void


async def cancel(desk: Desk, once: Once, actor: Actor, payment_id: str, _: Nothing) -> Done:
    """Let nobody pay it any more.

    Raises:
        MoneyMoved: it was captured. PaymentInProgress: money is moving, and its gateway cannot stop that.
        Unavailable, GatewayError.
    """
    return await _cancel(desk, once, actor, payment_id, "cancel")


async def void(desk: Desk, once: Once, actor: Actor, payment_id: str) -> Done:
    """Cancel a payment that nobody has ever tried to pay.

    Raises:
        MoneyMoved: somebody has. Unavailable, GatewayError.
    """
    done = await _cancel(desk, once, actor, payment_id, "void")
    return Done(204, None) if done.status == 200 else done


async def permit_admin(tx: Tx, actor: Actor, payment_id: str, *_: object) -> PaymentRow:
    return await _permit(tx, actor, payment_id, frozenset({Role.ADMIN}), "void payments")


async def _cancel(desk: Desk, once: Once, actor: Actor, payment_id: str, action: Literal["cancel", "void"]) -> Done:
    async with desk.transactions() as tx:
        await once.begun(tx)
        await (permit_admin if action == "void" else permit_all)(tx, actor, payment_id)
        book = await open_book(tx, payment_id)
        row = book.payment
        _check_not_moved(row, action)
        await once.begin(tx, payment_id)
        if row.status is P.CANCELLED:
            return Done(200, view(row))
        await _audit(tx, actor, action, row, {"status": row.status}, None)
        if row.gateway_order_id is None or (
            action == "cancel" and row.provider is Provider.RAZORPAY and row.status is P.PENDING
        ):
            # nobody was given anything to pay with, or Razorpay, which withdraws nothing, need not be asked: should
            # money come all the same, it is judged then
            news = News(provider=row.provider, gateway_order_id=None, report=Report.CANCELLED)
            book.report(news, desk.house.terms)
            await book.close(source_of(actor), action, {}, actor=actor)
            return Done(200, view(row))
    gateway = gateway_of(desk.gateways, row.provider)
    try:
        told = await gateway.cancel(known(row))
    except (GatewayRefused, GatewayAway) as error:
        raise as_refusal(error) from error
    except GatewayUnknown:
        return await _unknown(desk, payment_id, "cancel_payment")
    row = await _settle_all(desk, payment_id, told, source_of(actor), actor)
    if row.status is not P.CANCELLED:
        _check_not_moved(row, action)
        raise PaymentInProgress("Money is moving; wait until it has come or not.", payment_id)
    return Done(200, view(row))


def _check_not_moved(row: PaymentRow, action: str) -> None:
    """Raises MoneyMoved."""
    if row.captured or row.has_completed:
        raise MoneyMoved("The money has come; refund it instead.")
    if row.provider not in GATEWAYS:
        raise MoneyMoved("Cash has changed hands; settle it as a refund.")
    if action == "void" and row.attempted:
        raise MoneyMoved("Somebody has tried to pay; this stays in the books.")


# reconcile


async def reconcile(desk: Desk, once: Once, actor: Actor, payment_id: str, _: Nothing) -> Done:
    """Ask the gateway now what became of it.

    Raises:
        Invalid: it is not a gateway's. Unavailable, GatewayError.
    """
    async with desk.transactions() as tx:
        await once.begun(tx)
        row = await permit_staff(tx, actor, payment_id)
        if row.provider not in GATEWAYS:
            raise Invalid("Only payments by a gateway can be asked about.")
        await once.begin(tx, payment_id)
        await _audit(tx, actor, "reconcile", row, {"status": row.status}, None)
    gateway = gateway_of(desk.gateways, row.provider)
    try:
        if row.gateway_order_id is None:
            if row.status in OPEN:
                _, row = await created_as(desk, row, await gateway.create(new_payment(row)), Source.RECONCILIATION)
            return Done(200, view(row))
        news = await gateway.fetch(known(row))
    except (GatewayRefused, GatewayAway) as error:
        raise as_refusal(error) from error
    except GatewayUnknown:
        return await _unknown(desk, payment_id, "reconcile")
    return Done(200, view(await _settle_all(desk, payment_id, news, Source.RECONCILIATION, actor)))


# annotate


async def annotate(tx: Tx, actor: Actor, payment_id: str, cmd: AnnotatePayment) -> Payment:
    """Change what the merchant remembers with it.

    Raises:
        NotFound, Forbidden.
    """
    tx.atomically()
    await _permit(tx, actor, payment_id, frozenset({Role.ADMIN, Role.SERVICE}), "annotate payments")
    book = await open_book(tx, payment_id)
    row = book.payment
    before = {"description": row.description, "metadata": msgspec.json.decode(row.metadata)}
    if not isinstance(cmd.description, UnsetType):
        row.description = cmd.description or None
    if not isinstance(cmd.metadata, UnsetType):
        row.metadata = msgspec.json.encode(cmd.metadata).decode()
    await book.close(Source.STAFF, "annotated", cmd, actor=actor)
    await _audit(tx, actor, "annotate", row, before, cmd)
    return view(row)
