"""The cash desk and the reports desk as this deployment's settings have them."""

from __future__ import annotations

from handlers import cash, reports
from handlers.context import Tx
from handlers.settlement import Terms
from models.cash import read_units
from models.payment import Payment
from models.user import Actor
from server.doors import Verb
from server.settings import Settings


class Books:
    """Verbs with their rules filled in."""

    def __init__(self, settings: Settings) -> None:
        self.calendar = reports.Calendar(settings.seller_time_zone, settings.report_days_max)
        self.take_cash = Verb("take_cash", self._take_cash, status=201)
        self._rules = cash.Rules(read_units(settings.cash_rounding_minor), settings.cash_partial == "on")
        self._terms = Terms(
            payment_window_s=settings.payment_window_s,
            hold_max_s=settings.hold_max_s,
            revive_window_s=settings.revive_window_s,
            mismatch_hold_s=settings.mismatch_hold_s,
        )

    async def _take_cash(self, tx: Tx, actor: Actor, command: cash.TakeCash) -> Payment:
        return await cash.take_cash(tx, actor, command, self._rules, self._terms)
