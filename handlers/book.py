"""The book of an order: the row of the order is locked, and its money is changed in memory and written at once.

The row of the order is the mutex of all its money: it is locked first, then payments, captures, refunds and the ledger
are read and written, and the events of payment and order follow. Nothing here calls a gateway: what must be called
becomes a job.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from handlers.book_rows import (
    ADD_CAPTURE,
    ADD_REFUND,
    ADD_REFUND_LINES,
    CAPTURED,
    CAPTURES_LEFT,
    COLUMNS,
    DISPUTE,
    INSERT_PAYMENT,
    LOCK_ORDER,
    LOCK_ORDER_OF,
    MOVING_ON,
    MUTABLE,
    PAYMENTS_OF_ORDER,
    READ_PAYMENT,
    REFUND,
    REFUND_ANEW,
    REFUND_LINES,
    REFUNDS_OF,
    SET_DISPUTE,
    SET_FEE,
    SET_REFUND,
    UPDATE_PAYMENT,
    WAKE_PARKED,
    WRITE_HISTORY,
    WRITE_LEDGER,
    WRITE_ORDER,
    OrderMoney,
    PaymentRow,
    RefundRow,
    order_of,
    read_row,
    refund_of,
    view,
)
from handlers.context import Tx
from handlers.jobs import enqueue
from handlers.ports import Reservations
from models.base import as_json, rfc3339
from models.cash import Taken
from models.errors import NotFound, NotRefundable
from models.event import Event, Type, event
from models.ledger import DISPUTES, FEES, ORDER_RECEIVABLE, REFUNDS_DUE, ROUNDING, Post, balanced, money_of
from models.order import PaymentMethod, Status
from models.payment import (
    GATEWAYS,
    MOVING,
    OPEN,
    Attention,
    DisputeNews,
    DisputeReport,
    Failure,
    News,
    PaymentStatus,
    Provider,
    RefundNews,
    RefundReport,
    Report,
    Source,
    after,
    with_refunds,
)
from models.refund import Cause, Channel, RefundLine, RefundStatus, allot, spread
from models.refund import after as refund_after
from models.user import Actor

AT_GATEWAY = "refunded at the gateway"
"""The reason of a refund that somebody made elsewhere."""


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """The time limits of payments, in seconds; settings of the same names."""

    payment_window_s: int
    hold_max_s: int
    revive_window_s: int
    mismatch_hold_s: int


class House(NamedTuple):
    """What the settle path asks besides the tables."""

    terms: Terms
    reservations: Reservations


class UnknownPayment(Exception):
    """News about something that we do not know, or do not know yet."""


async def open_book(tx: Tx, payment_id: str) -> Book:
    """Lock the order of a payment, and read both.

    Raises:
        NotFound.
    """
    found = uuid.UUID(payment_id)
    order = await tx.one(LOCK_ORDER_OF, found)
    row = await tx.one(READ_PAYMENT, found) if order is not None else None
    if order is None or row is None:
        raise NotFound("There is no such payment.")
    return Book(tx, order_of(order), read_row(row), row["others_moving"])


async def open_order(tx: Tx, order_id: str) -> Book:
    """Lock an order whose money is to be written; its book has no payment until one is started.

    Raises:
        NotFound.
    """
    row = await tx.one(LOCK_ORDER, uuid.UUID(order_id))
    moving = await tx.one(MOVING_ON, uuid.UUID(order_id)) if row is not None else None
    if row is None or moving is None:
        raise NotFound("There is no such order.")
    return Book(tx, order_of(row), None, moving["moving"])


class _Entry(NamedTuple):
    kind: str
    currency: str
    posts: list[Post]
    refund_id: uuid.UUID | None


class Book:
    """An order that is locked, and one of its payments: changed in memory, written by `close`."""

    def __init__(self, tx: Tx, order: OrderMoney, payment: PaymentRow | None, others_moving: bool) -> None:
        self.tx = tx
        self.order = order
        self._payment = payment
        self._others_moving = others_moving
        self._is_new = False
        self._reviving = False
        """Late money is about to take back that the order expired: clients still know it as cancelled."""
        self._before = payment.status if payment is not None else None
        self._events: list[tuple[str, dict[str, Any]]] = []
        self._entries: list[_Entry] = []
        self._lifecycle: list[str] = []

    @property
    def payment(self) -> PaymentRow:
        assert self._payment is not None, "this book has no payment"
        return self._payment

    @property
    def order_id(self) -> str:
        return str(self.order.id)

    # a payment begins

    def start(self, payment: PaymentRow, terms: Terms) -> None:
        """Begin a payment: told as pending, and the order is held for as long as paying takes."""
        self._payment, self._is_new = payment, True
        self._hold_until(self.tx.now() + dt.timedelta(seconds=terms.payment_window_s))
        self._lifecycle.append("payment.created")
        self.tell_payment()

    def resume(self, terms: Terms) -> bool:
        """Somebody asks for the open payment again instead of another one: whether that changes anything. When less
        than half of its window is left, the order is held for another one."""
        payment, order, now = self.payment, self.order, self.tx.now()
        resumed, payment.superseded = payment.superseded, False
        half = now + dt.timedelta(seconds=terms.payment_window_s / 2)
        if order.status is Status.PENDING and order.expires_at is not None and order.expires_at < half:
            self._hold_until(now + dt.timedelta(seconds=terms.payment_window_s))
            self.tell_payment()
            return True
        return resumed

    def _hold_until(self, at: dt.datetime) -> None:
        if self.order.status is Status.PENDING and self.order.expires_at is not None:
            self.order.expires_at = max(self.order.expires_at, at)

    # news that moves no money

    def report(self, news: News, terms: Terms) -> None:
        """Book what news says of the payment, except that it was captured."""
        payment, report = self.payment, news.report
        assert report is not None
        if report in (Report.PROCESSING, Report.AUTHORIZED, Report.FAILED):
            payment.attempted = True
        if report is Report.AUTHORIZED and (news.amount, news.currency) != (payment.amount, payment.currency):
            payment.attention = Attention.MISMATCH
        status = after(payment.status, report, news.fresh)
        if report is Report.FAILED and status is PaymentStatus.FAILED:
            payment.failure = as_json(news.failure)
        if status is payment.status:
            return
        self._become(status)
        if status in (PaymentStatus.PROCESSING, PaymentStatus.AUTHORIZED):
            self._hold_until(self.order.created_at + dt.timedelta(seconds=terms.hold_max_s))
        if status is PaymentStatus.FAILED:
            self._lifecycle.append("payment.failed")
        self.tell_payment()

    def _become(self, status: PaymentStatus) -> None:
        payment = self.payment
        if payment.status is not status:
            payment.status, payment.status_at = status, self.tx.now()
        if status is PaymentStatus.UNKNOWN:
            payment.attention = Attention.UNKNOWN
        elif payment.attention is Attention.UNKNOWN:
            payment.attention = None
        self.order.paying = self._others_moving or status in MOVING

    async def learn(self, news: News) -> None:
        """Keep the names that the gateway gives the payment; webhooks that waited for them are looked at again."""
        payment = self.payment
        if news.report is Report.FAILED and not news.fresh and payment.status is PaymentStatus.AUTHORIZED:
            return  # of an attempt before the one that is to be captured: see `after`
        before = {payment.gateway_order_id, payment.gateway_payment_id}
        payment.gateway_order_id = payment.gateway_order_id or news.gateway_order_id
        # a later attempt has another id, but what was captured keeps the id of its money
        if news.gateway_payment_id is not None and (payment.gateway_payment_id is None or not payment.has_completed):
            payment.gateway_payment_id = news.gateway_payment_id
        learned = {payment.gateway_order_id, payment.gateway_payment_id} - before
        if learned:
            await self.tx.one(WAKE_PARKED, sorted(filter(None, learned)), self.tx.now())
        if news.method is not None and not payment.has_completed:
            payment.method = news.method

    # money that comes

    async def capture(self, key: str, amount: int, currency: str, fee: int | None, house: House) -> None:
        """Book money that came, once per `key`: to the order as far as it owes it, the rest is refunded.

        `amount` and `fee`: minor units of `currency`.
        """
        payment, now = self.payment, self.tx.now()
        booked = await self.tx.one(CAPTURED, payment.provider, key)
        if booked is not None:
            if booked["fee"] is None and fee:
                await self.tx.one(SET_FEE, payment.provider, key, fee)
                self._post_fee(fee, booked["currency"])
            return
        payment.attempted = True
        right = (amount, currency) == (payment.expected, payment.currency)
        applied, cause = (await self._apply(amount, house)) if right else (0, Cause.MISMATCH)
        self.order.paid += applied
        await self.tx.one(ADD_CAPTURE, payment.provider, key, payment.id, amount, currency, applied, fee, now)
        self.post(
            "capture",
            currency,
            Post(money_of(payment.provider), amount),
            Post(ORDER_RECEIVABLE, -applied),
            Post(REFUNDS_DUE, applied - amount),
        )
        if fee:
            self._post_fee(fee, currency)
        if currency == payment.currency:
            payment.captured += amount
        if right:
            self._complete(cause)
        else:
            self._become(after(payment.status, Report.PROCESSING, fresh=True))
            self.tell_payment()
        if cause is not None:
            payment.attention = _ATTENTION[cause]
            excess = amount if cause is Cause.LATE else amount - applied
            await self._reserve_one(
                key,
                currency,
                excess,
                applied if cause is Cause.LATE else 0,
                reason=_REASON[cause],
                cause=cause,
                after_s=house.terms.mismatch_hold_s if cause is Cause.MISMATCH else 0,
            )
        if applied and self.order.due == 0:
            await stop_payments(self.tx, self.order_id, but=payment.id)  # nobody is to pay it twice

    async def take_cash(self, taken: Taken, account: str) -> None:
        """Book cash that came into `account`: it settles `taken.applied`, in the coins there were for it."""
        payment = self.payment
        await self._write_payment()  # the capture names it
        payment.attempted = True
        self.order.paid += taken.applied
        payment.captured += taken.amount
        await self.tx.one(
            ADD_CAPTURE,
            payment.provider,
            str(payment.id),
            payment.id,
            taken.amount,
            payment.currency,
            taken.applied,
            None,
            self.tx.now(),
        )
        self.post(
            "cash",
            payment.currency,
            Post(account, taken.amount),
            Post(ORDER_RECEIVABLE, -taken.applied),
            Post(ROUNDING, taken.rounding),
        )
        self._complete(None)

    async def _apply(self, amount: int, house: House) -> tuple[int, Cause | None]:
        """How much of `amount` the order is owed, and why the rest, or all of it, goes back."""
        order = self.order
        if order.status is Status.CANCELLED:
            if not await self._revives(amount, house):
                return amount, Cause.LATE
            self._reviving = True
            order.status, order.status_reason, order.expired_at = Status.PENDING, None, None
        applied = min(amount, order.due)
        return applied, Cause.DUPLICATE if applied < amount else None

    async def _revives(self, amount: int, house: House) -> bool:
        """Late money revives only an order that was cancelled because it was late, whole, and if all is still there."""
        order = self.order
        if order.expired_at is None or order.paid or amount < order.total:
            return False
        if self.tx.now() - order.expired_at > dt.timedelta(seconds=house.terms.revive_window_s):
            return False
        return await house.reservations.retake(self.tx, self.order_id)

    def _complete(self, cause: Cause | None) -> None:
        order, payment = self.order, self.payment
        payment.failure = None
        if payment.completed_at is None:
            payment.completed_at = self.tx.now()
            self._lifecycle.append("payment.completed")
        if payment.attention is not Attention.DISPUTE:
            payment.attention = None
        self._become(with_refunds(payment.captured, payment.refunded))
        self.tell_payment(cause or ("revived" if self._reviving else None))
        if order.status is Status.PENDING and order.payment_method is PaymentMethod.ONLINE and order.due == 0:
            self.move(Status.CONFIRMED)

    def _post_fee(self, fee: int, currency: str) -> None:
        self.post("fee", currency, Post(FEES, fee), Post(money_of(self.payment.provider), -fee))

    # money that goes back

    async def reserve(
        self,
        amount: int,
        reason: str,
        *,
        capture_key: str | None = None,
        channel: Channel = Channel.ORIGINAL,
        requested_by: str | None = None,
        reference: str | None = None,
        lines: Sequence[RefundLine] = (),
        delivery: int = 0,
        after_s: float = 0,
    ) -> list[uuid.UUID]:
        """Reserve `amount` of what came (minor units of the payment's currency); a job carries it out, not before
        `after_s`. One refund for each capture that it is taken from, newest first: nearly always one. `lines`: what of
        the order it stands for; `delivery`: how much of the rest is for delivery.

        Raises:
            NotRefundable: more than came and is neither back, nor on its way, nor in dispute.
        """
        payment = self.payment
        if not 0 < amount <= payment.money.refundable:
            raise NotRefundable("There is not so much to refund.", payment.money.refundable)
        captures = [
            row
            for row in await self.tx.all(CAPTURES_LEFT, payment.id)
            if row["left"] > 0 and row["currency"] == payment.currency and capture_key in (None, row["key"])
        ]
        parts = spread(amount, [row["left"] for row in captures])
        made: list[uuid.UUID] = []
        for row, part, mine in zip(captures, parts, allot(lines, parts), strict=True):
            if not part:
                break
            # what is for delivery comes after the lines
            for_delivery = min(delivery, part - sum(line.amount for line in mine))
            delivery -= for_delivery
            made.append(
                await self._reserve_one(
                    row["key"],
                    payment.currency,
                    part,
                    # cash settled what was due in the coins there were, and so does its last refund
                    row["applied_left"] if part == row["left"] else min(part, row["applied_left"]),
                    reason=reason,
                    channel=channel,
                    requested_by=requested_by,
                    reference=reference,
                    lines=mine,
                    delivery=for_delivery,
                    after_s=after_s,
                )
            )
        return made

    async def _reserve_one(
        self,
        key: str,
        currency: str,
        amount: int,
        applied: int,
        *,
        reason: str,
        cause: Cause | None = None,
        channel: Channel = Channel.ORIGINAL,
        requested_by: str | None = None,
        reference: str | None = None,
        lines: Sequence[RefundLine] = (),
        delivery: int = 0,
        after_s: float = 0,
    ) -> uuid.UUID:
        payment, refund_id = self.payment, uuid.UUID(self.tx.new_id())
        await self.tx.one(
            ADD_REFUND,
            refund_id,
            self.order.id,
            payment.id,
            payment.provider,
            key,
            amount,
            currency,
            reason,
            cause,
            applied,
            delivery,
            channel,
            reference,
            requested_by,
            self.tx.now(),
        )
        if lines:
            of_each = [(int(line.line_id), line.quantity, line.amount) for line in lines]
            await self.tx.one(ADD_REFUND_LINES, refund_id, *map(list, zip(*of_each, strict=True)))
        if currency == payment.currency:
            payment.reserved += amount
        # what was too much lies in the refunds due already
        rounding = amount - applied if cause is None else 0
        owed = (Post(ORDER_RECEIVABLE, applied), Post(REFUNDS_DUE, -applied - rounding), Post(ROUNDING, rounding))
        self.post("refund_reserved", currency, *owed, refund_id=refund_id)
        if channel is Channel.ORIGINAL and payment.provider in GATEWAYS and requested_by != AT_GATEWAY:
            await enqueue(self.tx, "refund", str(refund_id), after_s=after_s)
        return refund_id

    async def refund_told(self, news: RefundNews, key: str | None) -> None:
        """Book what a gateway says of a refund: one that we asked for, or one that somebody made elsewhere, of the
        capture `key`."""
        rows = [refund_of(row) for row in await self.tx.all(REFUNDS_OF, self.payment.id)]
        if any(news.gateway_refund_id in row.earlier for row in rows):
            return
        found = next((row for row in rows if row.gateway_refund_id == news.gateway_refund_id), None)
        found = found or next(
            (row for row in rows if str(row.id) == news.refund_id and row.gateway_refund_id is None), None
        )
        found = found or await self._owed(rows, news, key)
        made_elsewhere = found is None
        if found is None:
            if news.currency != self.payment.currency:
                return
            # also one that failed: should an older message call it made, that must not look as if it were
            (refund_id, *_) = await self.reserve(news.amount, AT_GATEWAY, capture_key=key, requested_by=AT_GATEWAY)
            rows = [refund_of(row) for row in await self.tx.all(REFUNDS_OF, self.payment.id)]
            found = next(row for row in rows if row.id == refund_id)
        await self.settle_refund(found, refund_status_after(found, news), news.gateway_refund_id, news.failure)
        if made_elsewhere and news.report is RefundReport.PROCESSING:
            await enqueue(self.tx, "refund", str(found.id))  # the message that ends it may be lost

    async def _owed(self, rows: Sequence[RefundRow], news: RefundNews, key: str | None) -> RefundRow | None:
        """The refund of ours that somebody else has made: gateways give back by themselves what was paid twice, and
        merchants make anew, at the gateway, what failed."""
        if news.report is RefundReport.FAILED:
            return None
        fitting = [
            row
            for row in rows
            if row.channel is Channel.ORIGINAL
            and row.status is not RefundStatus.SUCCEEDED
            and (row.status is RefundStatus.FAILED or row.gateway_refund_id is None)
            and (row.amount, row.currency) == (news.amount, news.currency)
            and key in (None, row.capture_key)
        ]
        found = min(fitting, key=lambda row: row.status is RefundStatus.FAILED, default=None)
        if found is None or found.gateway_refund_id is None:
            return found
        await self.tx.one(REFUND_ANEW, found.id, self.tx.now())
        again = await self.tx.one(REFUND, found.id)
        assert again is not None
        return refund_of(again)

    async def settle_refund(
        self,
        row: RefundRow,
        status: RefundStatus,
        gateway_refund_id: str | None,
        failure: Failure | None = None,
        reference: str | None = None,
    ) -> None:
        """Let a refund become `status`, with all that follows for payment, order and ledger."""
        if status is row.status and gateway_refund_id in (None, "", row.gateway_refund_id):
            return  # a repeat
        payment, order, now = self.payment, self.order, self.tx.now()
        succeeded, was = status is RefundStatus.SUCCEEDED, row.status is RefundStatus.SUCCEEDED
        await self.tx.one(
            SET_REFUND,
            row.id,
            status,
            gateway_refund_id or row.gateway_refund_id,
            as_json(failure) if status is RefundStatus.FAILED else None,
            now if succeeded else None,
            now,
            reference,
        )
        if succeeded == was:
            if status is RefundStatus.FAILED and row.status is not status:
                self.tell_payment()  # whoever waits for it looks again
            return
        sign = 1 if succeeded else -1
        if row.currency == payment.currency:
            payment.refunded += sign * row.amount
            payment.reserved -= sign * row.amount
        order.refunded += sign * row.applied
        account = money_of(Provider.MANUAL if row.channel is Channel.MANUAL else payment.provider)
        self.post(
            "refund" if succeeded else "refund_taken_back",
            row.currency,
            Post(REFUNDS_DUE, sign * row.amount),
            Post(account, -sign * row.amount),
            refund_id=row.id,
        )
        lines = await self.tx.all(REFUND_LINES, order.id, row.id, sign)
        if succeeded:
            self._lifecycle.append("payment.refund")
            if row.cause is not None and payment.attention is _ATTENTION[row.cause]:
                payment.attention = None
        if payment.has_completed:
            self._become(with_refunds(payment.captured, payment.refunded))
        elif row.cause is Cause.MISMATCH and succeeded:
            payment.failure = as_json(Failure(code="mismatch", message=_REASON[Cause.MISMATCH], retryable=True))
            if payment.status is not PaymentStatus.FAILED:
                self._lifecycle.append("payment.failed")
            self._become(PaymentStatus.FAILED)
        self.tell_payment(row.cause, [{"lineId": str(x["position"]), "refunded": x["refunded"]} for x in lines])

    # money that the payer's bank holds back

    async def dispute(self, news: DisputeNews) -> None:
        """Book a dispute. What is lost stays on the account of disputes."""
        payment = self.payment
        known = await self.tx.one(DISPUTE, payment.provider, news.gateway_dispute_id)
        was = DisputeReport(known["status"]) if known is not None else None
        if was in (DisputeReport.WON, DisputeReport.LOST) or was is news.report:
            return  # it has ended, or this is a repeat
        amount, currency = (known["amount"], known["currency"]) if known is not None else (news.amount, news.currency)
        held = (was is not None, news.report is not DisputeReport.WON)
        if held[0] != held[1]:
            sign = 1 if held[1] else -1
            if currency == payment.currency:
                payment.disputed += sign * amount
            self.post(
                "dispute", currency, Post(DISPUTES, sign * amount), Post(money_of(payment.provider), -sign * amount)
            )
            back = min(amount, payment.money.refundable) if sign < 0 and currency == payment.currency else 0
            if back > 0 and self.order.status is Status.CANCELLED:
                # the cancel could not give back what the bank held
                await self.reserve(back, "The dispute of a cancelled order was won.")
        if news.report is DisputeReport.OPEN:
            payment.attention = Attention.DISPUTE
        elif payment.attention is Attention.DISPUTE:
            payment.attention = None
        await self.tx.one(
            SET_DISPUTE,
            payment.provider,
            news.gateway_dispute_id,
            payment.id,
            news.report,
            amount,
            currency,
            self.tx.now(),
        )

    # what is written

    def post(self, kind: str, currency: str, *posts: Post, refund_id: uuid.UUID | None = None) -> None:
        """Add an entry to the ledger. Raises ValueError: it does not balance."""
        rows = balanced(*posts)
        if rows:
            self._entries.append(_Entry(kind, currency, rows, refund_id))

    def move(self, status: Status, note: str | None = None) -> None:
        """Let the order become `status`, and tell it."""
        order = self.order
        previous = Status.CANCELLED if self._reviving else order.status
        self._reviving = False
        body: dict[str, Any] = {"status": status, "previousStatus": previous}
        if note is not None:
            body["note"] = note
        order.status, order.status_reason = status, note
        self._events.append((Type.STATUS, body))

    def tell_payment(self, reason: str | None = None, lines: Sequence[dict[str, Any]] = ()) -> None:
        """Tell the room what the payment is now, and what the order's sums are."""
        payment, order = self.payment, self.order
        body: dict[str, Any] = {
            "paymentId": str(payment.id),
            "status": payment.status,
            "amount": payment.amount,
            "currency": payment.currency,
            "provider": payment.provider,
            "refunded": payment.refunded,
        }
        if reason is not None:
            body["reason"] = reason
        shown = body["payment"] = order.summary()
        if lines:
            body["lines"] = list(lines)
        if self._reviving:
            shown.due = 0  # it is told as confirmed by the next event: until then it is what it was
        elif order.status is Status.PENDING and order.expires_at is not None:
            body["expiresAt"] = rfc3339(order.expires_at)
        self._events.append((Type.PAYMENT, body))

    async def close(
        self, source: Source, kind: str, detail: object, *, actor: Actor | None = None, note: str | None = None
    ) -> PaymentRow:
        """Write everything, and give the payment as it is now. `kind` and `detail` (what JSON can hold) are kept in its
        history."""
        payment, now = self.payment, self.tx.now()
        payment.updated_at = now
        await self._write_payment()
        await self.write_order()
        await self._write_ledger(note)
        await self.tx.one(
            WRITE_HISTORY,
            payment.id,
            now,
            self.order.id,
            as_json(view(payment)) if self._lifecycle else None,
            self._lifecycle,
            source,
            actor.who if actor is not None else None,
            kind,
            self._before,
            payment.status,
            as_json(detail),
        )
        return payment

    async def _write_payment(self) -> None:
        payment = self.payment
        if self._is_new:
            await self.tx.one(INSERT_PAYMENT, *(getattr(payment, name) for name in COLUMNS))
            self._is_new = False
        else:
            await self.tx.one(UPDATE_PAYMENT, payment.id, *(getattr(payment, name) for name in MUTABLE))

    async def write_order(self) -> None:
        """Write the order and its events alone: for verbs that change no payment."""
        order, now = self.order, self.tx.now()
        if not self._events:
            return
        first = order.seq + 1
        order.seq += len(self._events)
        seqs = list(range(first, order.seq + 1))
        bodies = [msgspec.json.encode(body).decode() for _, body in self._events]
        types = [type_ for type_, _ in self._events]
        await self.tx.one(
            WRITE_ORDER,
            order.id,
            now,
            seqs,
            types,
            bodies,
            order.status,
            order.paid,
            order.refunded,
            order.paying,
            order.seq,
            order.expires_at,
            order.expired_at,
            order.status_reason,
            order.payment_method,
        )
        told: list[Event] = [
            event(self.order_id, seq, type_, now, body) for seq, type_, body in zip(seqs, types, bodies, strict=True)
        ]
        self.tx.tell(self.order_id, told)
        self._events = []

    async def _write_ledger(self, note: str | None) -> None:
        if not self._entries:
            return
        rows = [
            (entry_id, entry.kind, post.account, entry.currency, post.amount, entry.refund_id)
            for entry in self._entries
            for entry_id in [uuid.UUID(self.tx.new_id())]
            for post in entry.posts
        ]
        columns = [list(column) for column in zip(*rows, strict=True)]
        await self.tx.one(WRITE_LEDGER, self.tx.now(), self.order.id, self.payment.id, note, *columns)


_ATTENTION = {
    Cause.LATE: Attention.LATE,
    Cause.DUPLICATE: Attention.DUPLICATE,
    Cause.MISMATCH: Attention.MISMATCH,
}


_REASON = {
    Cause.LATE: "The money came after the order was cancelled.",
    Cause.DUPLICATE: "More money came than was due.",
    Cause.MISMATCH: "The amount or the currency is not the one that was asked for.",
}


async def open_refund(tx: Tx, refund_id: str) -> tuple[Book, RefundRow]:
    """Lock the order of a refund, and read the refund and its payment.

    Raises:
        NotFound.
    """
    first = await tx.one(REFUND, uuid.UUID(refund_id))
    if first is None:
        raise NotFound("There is no such refund.")
    book = await open_book(tx, str(first["payment_id"]))
    row = await tx.one(REFUND, uuid.UUID(refund_id))  # again, now that nobody else may change it
    assert row is not None
    return book, refund_of(row)


def refund_status_after(row: RefundRow, news: RefundNews) -> RefundStatus:
    """The status after news of it. A refund that was refused has no id; when the gateway has made it all the same, that
    is the first news of it."""
    refused = row.status is RefundStatus.FAILED and row.gateway_refund_id is None and news.gateway_refund_id
    return refund_after(RefundStatus.PENDING if refused else row.status, news.report)


async def stop_payments(tx: Tx, order_id: str, *, but: uuid.UUID | None = None) -> None:
    """Let nobody pay the order any more, as far as its gateways can do that, `but` by one payment."""
    for row in await tx.all(PAYMENTS_OF_ORDER, uuid.UUID(order_id)):
        if row["status"] in OPEN and row["provider"] in GATEWAYS and row["id"] != but:
            await enqueue(tx, "cancel_payment", str(row["id"]))
