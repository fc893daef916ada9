"""What becomes of a refund at its gateway: asked under a key that stays the same, and asked about until it is settled.

Every outcome that is not known for sure leaves the refund open: its money stays reserved, and the job asks again.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import structlog

from handlers.context import Tx
from handlers.jobs import NotYet
from handlers.ports import (
    Gateway,
    GatewayFailed,
    GatewayRefused,
    Gateways,
    GatewayUnknown,
    Known,
    NewRefund,
    Transactions,
)
from handlers.settlement import tell_refund
from models.errors import NotFound
from models.payment import Capture, Failure, Provider, RefundNews, RefundReport, Source
from models.refund import SETTLED, RefundStatus
from models.refund import after as after_news
from models.user import Actor

log = structlog.get_logger()

ASK_AGAIN_MAX_S = 600
"""Longest pause between two questions about a refund that is not settled."""


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What the refunds desk is set to; settings of the same names."""

    staff_refund_max_minor: int
    refund_ask_after_s: int


class Desk(NamedTuple):
    """What the verbs need of the world."""

    transactions: Transactions
    gateways: Gateways
    terms: Terms


class Asking(NamedTuple):
    """A refund as its gateway is asked for it, and what is known of it."""

    new: NewRefund
    provider: Provider
    status: RefundStatus
    gateway_refund_id: str | None
    earlier: Sequence[str]
    updated_at: dt.datetime

    @property
    def answered(self) -> bool:
        """Whether the gateway has said what became, or becomes, of it."""
        return self.status in SETTLED or self.gateway_refund_id is not None


ASKING = """
select r.*, p.order_id as order_id, p.gateway_order_id, p.gateway_payment_id, p.reference as payment_reference,
    p.amount as payment_amount, p.currency as payment_currency, p.capture
from refunds r join payments p on p.id = r.payment_id where r.id = $1"""


async def _asking(tx: Tx, refund_id: str) -> Asking:
    row = await tx.one(ASKING, uuid.UUID(refund_id))
    if row is None:
        raise NotFound("There is no such refund.")
    known = Known(
        payment_id=str(row["payment_id"]),
        gateway_order_id=row["gateway_order_id"] or "",
        gateway_payment_id=row["gateway_payment_id"],
        reference=row["payment_reference"],
        amount=row["payment_amount"],
        currency=row["payment_currency"],
        capture=Capture(row["capture"]),
    )
    new = NewRefund(
        refund_id=refund_id,
        attempt=row["attempt"],
        payment=known,
        capture_key=row["capture_key"],
        amount=row["amount"],
        currency=row["currency"],
        reason=row["reason"],
    )
    return Asking(
        new,
        Provider(row["provider"]),
        RefundStatus(row["status"]),
        row["gateway_refund_id"],
        row["earlier"],
        row["updated_at"],
    )


async def ask(desk: Desk, refund_id: str, source: Source, actor: Actor | None) -> Asking:
    """Ask the gateway for a refund, or about it, unless it is settled; what is known of it then.

    Never raises for what the gateway does: what stays open is asked about again by the job.
    """
    async with desk.transactions() as tx:
        asking = await _asking(tx, refund_id)
    gateway = desk.gateways.get(asking.provider)
    if asking.status in SETTLED or gateway is None:
        return asking
    news = await _news(gateway, asking)
    if news is None:
        return asking
    if after_news(asking.status, news.report) is asking.status and news.gateway_refund_id in (
        "",
        asking.gateway_refund_id,
    ):
        return asking
    async with desk.transactions() as tx:
        await tell_refund(tx, refund_id, asking.new.attempt, news, source, actor=actor)
    async with desk.transactions() as tx:
        return await _asking(tx, refund_id)


async def _news(gateway: Gateway, asking: Asking) -> RefundNews | None:
    """What the gateway says of the refund; None: nothing that is known for sure."""
    new = asking.new
    try:
        if asking.status is RefundStatus.PROCESSING:
            told = await gateway.fetch_refund(new, asking.gateway_refund_id)
            if told is not None and told.gateway_refund_id not in asking.earlier:
                return told
            if asking.gateway_refund_id is not None:
                log.warning("refund_not_found", refund_id=new.refund_id, gateway_refund_id=asking.gateway_refund_id)
                return None
    except GatewayFailed as error:
        log.warning("refund_open", refund_id=new.refund_id, error=str(error))
        return None
    try:
        told = await gateway.refund(new)
    except GatewayRefused as error:
        if error.may_pass:
            log.warning("refund_open", refund_id=new.refund_id, error=str(error))
            return None
        log.warning("refund_refused", refund_id=new.refund_id, error=str(error))
        return _said(new, RefundReport.FAILED, error.failure)
    except GatewayUnknown as error:
        log.warning("refund_unknown", refund_id=new.refund_id, error=str(error))
        return _said(new, RefundReport.PROCESSING)
    except GatewayFailed as error:
        log.warning("refund_open", refund_id=new.refund_id, error=str(error))
        return None
    if told.gateway_refund_id in asking.earlier:  # it shows the attempt that failed instead of a new one
        return _said(new, RefundReport.FAILED, told.failure)
    return told


def _said(new: NewRefund, report: RefundReport, failure: Failure | None = None) -> RefundNews:
    """What we say ourselves of a refund that has no id of the gateway's."""
    return RefundNews(
        gateway_refund_id="",
        report=report,
        amount=new.amount,
        currency=new.currency,
        refund_id=new.refund_id,
        failure=failure,
    )


async def carry_on(
    desk: Desk,
    refund_id: str,
    between: Callable[[float, float], float],
) -> None:
    """The job `refund`: ask the gateway for a refund that it was not asked for, or about one that it has not settled.

    `between(low, high)` draws the pause, so that those which were open together do not all come back together.

    Raises:
        NotYet: it is still open. The pause grows with the time for which it has been.
    """
    asked = await ask(desk, refund_id, Source.RECONCILIATION, None)
    if asked.status in SETTLED:
        return
    async with desk.transactions() as tx:
        open_s = (tx.now() - asked.updated_at).total_seconds()
    pause_s = min(ASK_AGAIN_MAX_S, max(desk.terms.refund_ask_after_s, open_s))
    raise NotYet(between(pause_s / 2, pause_s))
