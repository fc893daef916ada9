"""The jobs of reconciliation, and when the clock asks for them."""

from __future__ import annotations

import datetime as dt
import random
import zoneinfo

import structlog

from handlers import reconciliation
from handlers.jobs import NotYet
from handlers.payments import Desk
from handlers.ports import GatewayFailed
from server import metrics
from server.settings import Settings
from server.workers.jobs import Job, Schedule, daily, every

log = structlog.get_logger()

REPORT_HOUR = 1
"""When the report of yesterday is made, in SELLER_TIME_ZONE: gateways' lists lag behind."""

REPORT_AGAIN_S = 600.0
"""When it is tried again because a gateway does not answer."""


def schedules(settings: Settings) -> list[Schedule]:
    return [
        every("reconcile_due", settings.sweep_interval_s),
        every("expire_orders", settings.sweep_interval_s),
        daily("daily_report", zoneinfo.ZoneInfo(settings.seller_time_zone), REPORT_HOUR),
    ]


class Reconciliation:
    """What the jobs need. `jobs` are what a worker runs."""

    def __init__(self, desk: Desk, settings: Settings) -> None:
        self._desk = desk
        self._after_s = settings.reconcile_after_s
        self._zone = zoneinfo.ZoneInfo(settings.seller_time_zone)
        self._patience = reconciliation.Patience(
            settings.reconcile_after_s, settings.reconcile_retry_max_s, random.uniform, settings.hold_max_s
        )

    @property
    def jobs(self) -> list[Job]:
        return [
            Job("reconcile", self._reconcile),
            Job("cancel_payment", self._cancel_payment),
            Job("expire_order", self._expire_order),
            Job("reconcile_due", self._reconcile_due),
            Job("expire_orders", self._expire_orders),
            Job("daily_report", self._daily_report),
        ]

    async def _reconcile(self, payment_id: str) -> None:
        await reconciliation.reconcile(self._desk, payment_id, self._patience)

    async def _cancel_payment(self, payment_id: str) -> None:
        await reconciliation.cancel_payment(self._desk, payment_id, self._patience)

    async def _expire_order(self, order_id: str) -> None:
        await reconciliation.expire(self._desk, order_id, self._patience)

    async def _reconcile_due(self, _: str) -> None:
        async with self._desk.transactions() as tx:
            await reconciliation.find_moving(tx, self._after_s, self._patience.pending_s)

    async def _expire_orders(self, _: str) -> None:
        async with self._desk.transactions() as tx:
            await reconciliation.find_expiring(tx)

    async def _daily_report(self, day: str) -> None:
        unreached: GatewayFailed | None = None
        for provider in sorted(self._desk.gateways):
            try:
                report = await reconciliation.compare(self._desk, provider, dt.date.fromisoformat(day), self._zone)
            except GatewayFailed as error:
                unreached = error
                continue
            for one in report.differences:
                metrics.books_differ.labels(provider, one.kind).inc()
                log.error("books_differ", provider=provider, day=day, kind=one.kind, payment=one.gateway_order_id)
        if unreached is not None:
            log.warning("report_not_made", day=day, error=str(unreached))
            raise NotYet(REPORT_AGAIN_S) from unreached
