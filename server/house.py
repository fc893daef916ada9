"""What the settle path asks besides the tables, as this server answers it."""

from __future__ import annotations

from handlers import refund_calls
from handlers.book import Terms
from handlers.context import Tx
from server.settings import Settings


class AllThere:
    """`handlers.ports.Reservations` until there is stock: what an order had can always be had again."""

    async def retake(self, tx: Tx, order_id: str) -> bool:
        return True


def terms_of(settings: Settings) -> Terms:
    return Terms(
        payment_window_s=settings.payment_window_s,
        hold_max_s=settings.hold_max_s,
        revive_window_s=settings.revive_window_s,
        mismatch_hold_s=settings.mismatch_hold_s,
    )


def refund_terms(settings: Settings) -> refund_calls.Terms:
    return refund_calls.Terms(
        staff_refund_max_minor=settings.staff_refund_max_minor, refund_ask_after_s=settings.refund_ask_after_s
    )
