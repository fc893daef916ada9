"""The daily report as a job: its differences are counted, and it is made later when a gateway does not answer."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest

from handlers.jobs import NotYet
from handlers.payments import Desk
from models.payment import Provider
from server import metrics
from server.db import Database
from server.settings import Settings
from server.workers.reconciliation import Reconciliation
from tests.adapters.razorpay_world import open_razorpay
from tests.adapters.worlds import new_payment, started
from tests.handlers.money import house


async def test_a_difference_is_counted_and_a_gateway_that_is_away_is_asked_again(database: Database) -> None:
    yesterday = dt.datetime.now(dt.UTC).date() - dt.timedelta(days=1)
    async with open_razorpay() as world:
        desk = Desk(database.transaction, {Provider.RAZORPAY: world.gateway}, house())
        run = next(job.run for job in Reconciliation(desk, Settings()).jobs if job.name == "daily_report")
        known = await started(world, new_payment())
        await world.pay(known)
        for payment in world.sandbox.books.state.payments.values():
            payment.created_at -= 24 * 3600
        counted: Any = metrics.books_differ.labels(Provider.RAZORPAY, "missing")
        before = counted._value.get()
        await run(yesterday.isoformat())
        assert counted._value.get() - before == 1
        async with database.statement() as tx:
            [row] = await tx.all("select provider, day from reconciliations")
        assert (row["provider"], row["day"]) == ("razorpay", yesterday)
        await world.go_away()
        with pytest.raises(NotYet):
            await run(yesterday.isoformat())
