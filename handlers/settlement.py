"""The one settle path: whatever the world says of a payment is booked here, in one transaction (`handlers/book.py`).

`settle` judges news from a gateway, whoever asked for it or was told; the other verbs say what a cancel, an expiry and
an answered refund do to the money of an order.
"""

from __future__ import annotations

import uuid

from handlers import audit
from handlers.book import (
    House,
    UnknownPayment,
    open_book,
    open_order,
    open_refund,
    refund_status_after,
    stop_payments,
)
from handlers.book_rows import PAYMENTS_OF_ORDER, PaymentRow
from handlers.context import Tx
from models.money import MINOR_UNITS_MAX
from models.order import Status
from models.payment import (
    News,
    Provider,
    RefundNews,
    Report,
    Source,
)
from models.user import BACK_OFFICE, Actor

EXPIRED = "expired"
"""The `note` of an order that was cancelled because its money did not come."""


PAYMENT_OF = """
select coalesce(
    (select id from payments where provider = $1 and gateway_order_id = $2),
    (select payment_id from captures where provider = $1 and key = $3),
    (select id from payments where provider = $1 and gateway_payment_id = $3 limit 1),
    (select payment_id from refunds where provider = $1 and gateway_refund_id = any ($4::text[]) limit 1),
    (select payment_id from disputes where provider = $1 and gateway_dispute_id = any ($5::text[]) limit 1)
) as id"""


async def settle(
    tx: Tx, news: News, source: Source, house: House, *, actor: Actor | None = None, payment_id: str | None = None
) -> PaymentRow:
    """Book what a gateway says of a payment: once, whatever is repeated, late or out of order. Gives the payment as it
    is then.

    `payment_id`: whose news it is, where the asker knows it; else the gateway's names tell.

    Raises:
        UnknownPayment: it speaks of a payment that we do not know.
    """
    tx.atomically()
    if not _believable(news):
        raise UnknownPayment(f"{news.provider} speaks of amounts that are none")
    if payment_id is None:
        payment_id = await _payment_of(tx, news)
    book = await open_book(tx, payment_id)
    if news.gateway_order_id is not None and book.payment.gateway_order_id not in (None, news.gateway_order_id):
        raise UnknownPayment(f"{news.provider} speaks of {news.gateway_order_id}, which is not this payment")
    await book.learn(news)
    key = _capture_key(news)
    if news.report is Report.CAPTURED:
        assert key is not None, "a capture names its money"
        await book.capture(key, news.amount, news.currency, news.fee, house)
    elif news.report is not None:
        book.report(news, house.terms)
    for dispute in news.disputes:
        await book.dispute(dispute)
    for refund in news.refunds:
        await book.refund_told(refund, key)
    return await book.close(source, news.report or "news", news, actor=actor)


async def _payment_of(tx: Tx, news: News) -> str:
    row = await tx.one(
        PAYMENT_OF,
        news.provider,
        news.gateway_order_id,
        news.gateway_payment_id,
        [one.gateway_refund_id for one in news.refunds],
        [one.gateway_dispute_id for one in news.disputes],
    )
    if row is None or row["id"] is None:
        raise UnknownPayment(f"{news.provider} speaks of {news.gateway_order_id or news.gateway_payment_id}")
    return str(row["id"])


def _believable(news: News) -> bool:
    """Whether its amounts can be booked at all."""
    told = (*(one.amount for one in news.refunds), *(one.amount for one in news.disputes))
    amounts = (news.amount, news.fee or 0, *told)
    least = 1 if news.report is Report.CAPTURED else 0
    return news.amount >= least and all(0 <= amount <= MINOR_UNITS_MAX for amount in amounts)


def _capture_key(news: News) -> str | None:
    """Which money the news is about: Razorpay's payment, or Stripe's intent, which succeeds once."""
    return news.gateway_order_id if news.provider is Provider.STRIPE else news.gateway_payment_id


async def tell_refund(
    tx: Tx, refund_id: str, attempt: int, news: RefundNews, source: Source, *, actor: Actor | None = None
) -> PaymentRow:
    """Book what became of a refund that we asked for. `attempt`: which of its attempts the news is about; when another
    one has begun meanwhile, it is no news of the refund any more.

    Raises:
        NotFound.
    """
    tx.atomically()
    book, row = await open_refund(tx, refund_id)
    named = row.gateway_refund_id
    if attempt != row.attempt or news.gateway_refund_id in row.earlier or (named and not news.gateway_refund_id):
        pass  # also a refusal of what the gateway, as it has told meanwhile, has given back by itself
    elif named and named != news.gateway_refund_id:
        await book.refund_told(news, row.capture_key)  # what looked like this one was made beside it
    else:
        await book.settle_refund(row, refund_status_after(row, news), news.gateway_refund_id, news.failure)
    return await book.close(source, f"refund.{news.report}", news, actor=actor)


async def return_money(tx: Tx, order_id: str, reason: str, *, actor: Actor | None = None) -> None:
    """What a cancelled order does to its money: what came goes back, and nobody may pay it any more. Call it in the
    transaction of the cancel.

    Cash goes back by hand: its refund waits for staff among the refunds due.
    """
    await stop_payments(tx, order_id)
    for row in await tx.all(PAYMENTS_OF_ORDER, uuid.UUID(order_id)):
        book = await open_book(tx, str(row["id"]))
        refundable = book.payment.money.refundable
        if refundable:
            made = await book.reserve(refundable, reason, requested_by=actor.who if actor is not None else None)
            source = Source.STAFF if actor is not None else Source.SYSTEM
            told = {"amount": refundable, "reason": reason}
            await book.close(source, "refund.reserved", told, actor=actor)
            if actor is not None and actor.role in BACK_OFFICE:
                for refund_id in made:
                    await audit.record(tx, actor, "refund.create", f"refund:{refund_id}", None, told)


async def expire_order(tx: Tx, order_id: str) -> bool:
    """Cancel an order whose money did not come in time; whether it was. What came in part goes back.

    Raises:
        NotFound.
    """
    tx.atomically()
    book = await open_order(tx, order_id)
    order = book.order
    if not order.waits or order.expires_at is None or order.expires_at > tx.now():
        return False
    order.expired_at = tx.now()
    book.move(Status.CANCELLED, EXPIRED)
    await book.write_order()
    await return_money(tx, order_id, EXPIRED)
    return True
