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
from handlers.book import Book, House, UnknownPayment, open_book
from handlers.book_rows import OrderMoney, PaymentRow, read_row, view
from handlers.context import Tx
from handlers.jobs import enqueue
from handlers.ports import (
    Confirmed,
    Created,
    Done,
    Gateway,
    GatewayAway,
    GatewayFailed,
    GatewayNotAsked,
    GatewayRefused,
    Gateways,
    GatewayUnknown,
    Known,
    NewPayment,
    Once,
    Transactions,
)
from handlers.settlement import settle
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
    NotRefundable,
    OrderClosed,
    PaymentDeclined,
    PaymentInProgress,
    Unavailable,
)
from models.money import MINOR_UNITS_MAX
from models.order import Status, check_currency, may_see, require_role
from models.payment import (
    GATEWAYS,
    OPEN,
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

CLOSED = frozenset({Status.CANCELLED, Status.RETURNED})
"""Orders that nobody pays any more. What was delivered unpaid can still be paid."""

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
Address = Annotated[str, Meta(min_length=8, max_length=2000, pattern=Words, description="an http or https address")]
GatewayId = Annotated[str, Meta(min_length=1, max_length=200, pattern="^[!-~]+\\Z")]
Description = Annotated[str, Meta(min_length=1, max_length=255, pattern=Words)]
Metadata = Annotated[
    dict[
        Annotated[str, Meta(min_length=1, max_length=40, pattern=Words)],
        Annotated[str, Meta(max_length=256, pattern=Words)],
    ],
    Meta(max_length=15, description="what the merchant wants to remember: 15 pairs of texts at most"),
]


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


READ = "select * from payments where id = $1"


def require(actor: Actor, allowed: frozenset[Role], doing: str) -> None:
    """Raises Forbidden: the role never does this, or it is a guest that only looks."""
    require_role(actor, allowed, doing)
    if actor.tracks_only:
        require_role(actor, (), f"{doing} with a tracking link")


async def permit_payer(tx: Tx, actor: Actor, payment_id: str, *_: object) -> PaymentRow:
    return await permit(tx, actor, payment_id, PAYERS, "say that a payment was made")


async def permit_back_office(tx: Tx, actor: Actor, payment_id: str, *_: object) -> PaymentRow:
    return await permit(tx, actor, payment_id, BACK_OFFICE, "capture payments")


async def permit_all(tx: Tx, actor: Actor, payment_id: str, *_: object) -> PaymentRow:
    return await permit(tx, actor, payment_id, BACK_OFFICE | PAYERS, "see payments")


async def permit_staff(tx: Tx, actor: Actor, payment_id: str, *_: object) -> PaymentRow:
    return await permit(tx, actor, payment_id, STAFF, "reconcile payments")


async def permit(tx: Tx, actor: Actor, payment_id: str, allowed: frozenset[Role], doing: str) -> PaymentRow:
    """The payment, if the actor's role may do this and the actor sees its order.

    Raises:
        NotFound, Forbidden.
    """
    require(actor, allowed, doing)
    row = await tx.one(READ, payment_uuid(payment_id))
    if row is None or not may_see(actor, str(row["order_id"]), row["customer_id"], None):
        raise NotFound("There is no such payment.")
    return read_row(row)


def payment_uuid(payment_id: str) -> uuid.UUID:
    """Raises NotFound: a text that is no UUID names nothing."""
    try:
        return uuid.UUID(payment_id)
    except ValueError:
        raise NotFound("There is no such payment.") from None


def source_of(actor: Actor) -> Source:
    return Source.STAFF if actor.role in BACK_OFFICE else Source.CLIENT


async def record(tx: Tx, actor: Actor, action: str, row: PaymentRow, before: object, after: object) -> None:
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
        raise Unavailable(f"Payments by {provider.capitalize()} are not set up here.")
    if not gateway.offered:
        raise _not_offered(provider)
    return gateway


def _not_offered(provider: Provider) -> Unavailable:
    name = provider.capitalize()
    return Unavailable(f"Payments by {name} are not available now; try again, or pay in another way.")


def as_refusal(error: GatewayFailed) -> GatewayError | Unavailable:
    """What the caller hears. The breaker may have opened since `gateway_of` looked: that is the same refusal."""
    if isinstance(error, GatewayNotAsked):
        return _not_offered(error.provider)
    if isinstance(error, GatewayRefused):
        return GatewayError(f"{error.provider.capitalize()} refused: {error.message} ({error.code})")
    return GatewayError(f"{error.provider.capitalize()} was not reached; nothing has happened.")


# a gateway is asked to create it


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
    await creation_failed(desk, row, error)
    raise as_refusal(error)


TAKEN = "select id from payments where provider = $1 and gateway_order_id = $2 and id <> $3"


async def creation_failed(desk: Desk, row: PaymentRow, error: GatewayRefused | GatewayAway) -> None:
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


# what is judged


def check_payable(order: OrderMoney) -> None:
    """Raises OrderClosed, AlreadyPaid."""
    if order.status in CLOSED:
        raise OrderClosed(f"The order is {order.status}; it cannot be paid any more.")
    if order.due <= 0:
        raise AlreadyPaid("Nothing is due for this order.")


def check_address(url: str) -> None:
    """Raises Invalid: not an address that a browser may be sent to."""
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        fine = False
    if not fine:
        raise Invalid("Write an address that starts with https:// or http://.", "/returnUrl")


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
            return Done(202, view(await read_payment(tx, payment_id)))
    return Done(200, view(await settle_all(desk, payment_id, news, Source.CLIENT, actor)))


def _proof(gateways: Gateways, row: PaymentRow, cmd: VerifyPayment) -> str | None:
    """The attempt that the checkout's signature proves; None for Stripe, which signs nothing.

    Raises:
        InvalidSignature, Invalid; Unavailable: the provider is not set up.
    """
    proof = (cmd.razorpay_payment_id, cmd.razorpay_order_id, cmd.razorpay_signature)
    if row.provider is not Provider.RAZORPAY:
        if any(part is not UNSET for part in proof):
            raise Invalid(f"This payment is by {row.provider.capitalize()}; there is nothing of Razorpay's to verify.")
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
        raise Unavailable(f"Payments by {row.provider.capitalize()} are not set up here.")
    # our own order id is signed for, never the posted one: else any payment of anybody would do
    if row.gateway_order_id is None or order_id != row.gateway_order_id:
        raise InvalidSignature("This was not signed for this payment.")
    if not gateway.proves_checkout(row.gateway_order_id, attempt, signature):
        raise InvalidSignature("This was not signed for this payment.")
    return attempt


async def settle_all(
    desk: Desk, payment_id: str, news: Sequence[News], source: Source, actor: Actor | None
) -> PaymentRow:
    """Raises GatewayError: it spoke of another payment, or of money that cannot be."""
    row = None
    async with desk.transactions() as tx:
        try:
            for one in news:
                row = await settle(tx, one, source, desk.house, actor=actor, payment_id=payment_id)
        except UnknownPayment as error:
            raise GatewayError(f"The gateway was asked about one payment, and answered otherwise: {error}.") from error
        except NotRefundable as error:
            raise GatewayError("The gateway speaks of refunds of more than is there.") from error
        return row or await read_payment(tx, payment_id)


async def read_payment(tx: Tx, payment_id: str) -> PaymentRow:
    row = await tx.one(READ, uuid.UUID(payment_id))
    assert row is not None, "payments are never deleted"
    return read_row(row)


async def _unknown(desk: Desk, payment_id: str, job: str, news: News | None = None) -> Done:
    """A call that may have happened: a job finds out."""
    async with desk.transactions() as tx:
        if news is not None:
            await settle(tx, news, Source.SYSTEM, desk.house, payment_id=payment_id)
        await enqueue(tx, job, payment_id)
        return Done(202, view(await read_payment(tx, payment_id)))


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
            gateway = gateway_of(desk.gateways, row.provider)
        await once.begin(tx, payment_id)
    if row.has_completed:
        return Done(200, view(row))
    try:
        confirmed: Confirmed = await gateway.confirm(known(row), cmd.payment_method_id, cmd.return_url)
    except GatewayRefused as error:
        if error.news is not None:
            await settle_all(desk, payment_id, [error.news], Source.CLIENT, actor)
        if error.status == 402:
            raise PaymentDeclined(f"{error.message} ({error.code})") from error
        raise as_refusal(error) from error
    except GatewayAway as error:
        raise as_refusal(error) from error
    except GatewayUnknown:
        moving = News(provider=row.provider, gateway_order_id=row.gateway_order_id, report=Report.PROCESSING)
        return await _unknown(desk, payment_id, "reconcile", moving)
    shown = view(await settle_all(desk, payment_id, [confirmed.news], Source.CLIENT, actor))
    if confirmed.redirect_url is not None:
        shown.next_action = {"type": "redirect", "url": confirmed.redirect_url}
    return Done(200, shown, anew=confirmed.redirect_url is not None)


# capture


async def capture(desk: Desk, once: Once, actor: Actor, payment_id: str, cmd: CapturePayment) -> Done:
    """Take what was authorized, or less of it where the gateway can do that.

    Raises:
        MoneyMoved: it was captured already. Conflict: nothing is authorized. PaymentInProgress: another amount was
        asked for, and nobody knows yet what became of that. AmountMismatch, CurrencyMismatch, OrderClosed, AlreadyPaid,
        Unavailable, GatewayError.
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
            asked_before = await tx.one(CAPTURE_ASKED, row.id)
            if asked_before is not None and asked_before["kind"] == "capture.asked" and row.expected != cmd.amount:
                # whichever of two amounts came would be taken for the wrong one
                raise PaymentInProgress(f"A capture of {row.expected} is under way.", payment_id)
            gateway = gateway_of(desk.gateways, row.provider)
            row.expected = cmd.amount
            await book.close(Source.STAFF, "capture.asked", cmd, actor=actor)
            asked = {"amount": cmd.amount, "currency": cmd.currency}
            await record(tx, actor, "capture", row, {"status": row.status}, asked)
        await once.begin(tx, payment_id)
    if repeated:
        return Done(200, view(row))
    try:
        news = await gateway.capture(known(row), cmd.amount, cmd.currency)
    except (GatewayRefused, GatewayAway) as error:
        async with desk.transactions() as tx:
            book = await open_book(tx, payment_id)
            if not book.payment.captured:
                book.payment.expected = before
            await book.close(Source.SYSTEM, "capture.failed", {"message": str(error)})
            if isinstance(error, GatewayRefused) and error.news is not None:
                await settle(tx, error.news, Source.STAFF, desk.house, actor=actor, payment_id=payment_id)
        raise as_refusal(error) from error
    except GatewayUnknown:
        return await _unknown(desk, payment_id, "reconcile")
    return Done(200, view(await settle_all(desk, payment_id, [news], Source.STAFF, actor)))


CAPTURE_ASKED = """
select kind from payment_inputs where payment_id = $1 and kind in ('capture.asked', 'capture.failed')
order by id desc limit 1"""


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


async def cancel(desk: Desk, once: Once, actor: Actor, payment_id: str, cmd: Nothing) -> Done:
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
    return await permit(tx, actor, payment_id, frozenset({Role.ADMIN}), "void payments")


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
        # what was asked for: whether it came so is in the payment's history
        await record(tx, actor, action, row, {"status": row.status}, {"status": P.CANCELLED})
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
    row = await settle_all(desk, payment_id, told, source_of(actor), actor)
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


async def reconcile(desk: Desk, once: Once, actor: Actor, payment_id: str, cmd: Nothing) -> Done:
    """Ask the gateway now what became of it.

    Raises:
        Invalid: it is not a gateway's. Unavailable, GatewayError.
    """
    async with desk.transactions() as tx:
        await once.begun(tx)
        row = await permit_staff(tx, actor, payment_id)
        if row.provider not in GATEWAYS:
            raise Invalid("Only payments by a gateway can be asked about.")
        gateway = gateway_of(desk.gateways, row.provider)
        await once.begin(tx, payment_id)
        await record(tx, actor, "reconcile", row, {"status": row.status}, None)
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
    return Done(200, view(await settle_all(desk, payment_id, news, Source.RECONCILIATION, actor)))


# annotate


async def annotate(tx: Tx, actor: Actor, payment_id: str, cmd: AnnotatePayment) -> Payment:
    """Change what the merchant remembers with it.

    Raises:
        NotFound, Forbidden.
    """
    tx.atomically()
    await permit(tx, actor, payment_id, frozenset({Role.ADMIN, Role.SERVICE}), "annotate payments")
    book = await open_book(tx, payment_id)
    row = book.payment
    before = {"description": row.description, "metadata": msgspec.json.decode(row.metadata)}
    if not isinstance(cmd.description, UnsetType):
        row.description = cmd.description or None
    if not isinstance(cmd.metadata, UnsetType):
        row.metadata = msgspec.json.encode(cmd.metadata).decode()
    await book.close(Source.STAFF, "annotated", cmd, actor=actor)
    await record(tx, actor, "annotate", row, before, cmd)
    return view(row)
