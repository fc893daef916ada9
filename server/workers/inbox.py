"""The inbox worker: applies stored webhooks, each in one transaction, and puts off what cannot be applied yet.

Any number of workers may run: `skip locked` keeps them apart when they take a webhook, the order's row when two
webhooks speak of one order.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import structlog

from handlers import webhooks
from handlers.book import House
from handlers.ports import Gateways
from handlers.webhooks import Patience, Taken
from models.errors import Unavailable
from server import metrics
from server.db import Database
from server.outbox import Outbox
from server.settings import Settings

log = structlog.get_logger()

BACKLOG_INTERVAL_S = 2.0
"""How often what is left is counted."""


class Inbox:
    def __init__(
        self, settings: Settings, database: Database, outbox: Outbox, gateways: Gateways, house: House
    ) -> None:
        self._database = database
        self._outbox = outbox
        self._gateways = gateways
        self._house = house
        self._patience = Patience(
            attempts_max=settings.webhook_attempts_max,
            retry_base_s=settings.webhook_retry_base_s,
            retry_max_s=settings.webhook_retry_max_s,
            park_s=settings.webhook_park_s,
            lock_wait_ms=settings.db_timeout_ms // 2,
        )
        self._poll_s = settings.inbox_poll_ms / 1000
        self._concurrency_max = settings.inbox_concurrency_max
        self._stirred = asyncio.Event()
        self._more = False
        """Whether there was more to take than room for it."""
        self._tries: set[asyncio.Task[None]] = set()
        self._closed = False

    def wake(self) -> None:
        """Look at once: a webhook was stored."""
        self._stirred.set()

    async def run(self) -> None:
        """Take what is due, when somebody says so and every `INBOX_POLL_MS`, until cancelled or closed."""
        try:
            while not self._closed:
                self._stirred.clear()
                await self._take()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._poll_s):
                        await self._stirred.wait()
        finally:
            if not self._closed:
                for one in self._tries:
                    one.cancel()
            await asyncio.gather(*self._tries, return_exceptions=True)

    async def close(self) -> None:
        """Take no more, and finish what was taken."""
        self._closed = True
        self._stirred.set()
        await asyncio.gather(*self._tries, return_exceptions=True)

    async def _take(self) -> None:
        room = self._concurrency_max - len(self._tries)
        if room == 0:
            return
        found: Sequence[Taken] = ()
        try:
            async with self._database.statement() as tx:
                found = await webhooks.take(tx, self._gateways, self._patience, room)
        except Unavailable:
            pass  # the rows wait for us
        except Exception:
            log.exception("inbox_failed")
        self._more = len(found) == room
        for taken in found:
            task = asyncio.create_task(self._try(taken), name=f"webhook {taken.id}")
            self._tries.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tries.discard(task)
        if self._more:
            self._stirred.set()
        if not task.cancelled() and task.exception() is not None:
            log.error("inbox_failed", exc_info=task.exception())

    async def _try(self, taken: Taken) -> None:
        try:
            webhooks.check_attempts(taken, self._patience)
            async with self._database.statement() as tx:
                applied = await webhooks.apply(tx, self._gateways, self._house, self._patience, taken)
        except Exception as error:
            await self._put_off(taken, error)
            return
        self._outbox.publish(tx.told)
        metrics.webhooks_tried.labels(taken.provider, "applied" if applied else "taken").inc()

    async def _put_off(self, taken: Taken, error: Exception) -> None:
        try:
            async with self._database.statement() as tx:
                outcome, text = await webhooks.put_off(tx, taken, error, self._patience)
        except Unavailable:
            outcome, text = "away", "the database does not answer"  # the try stays counted, and is repeated
        metrics.webhooks_tried.labels(taken.provider, outcome).inc()
        told = {"webhook": str(taken.id), "provider": taken.provider, "kind": taken.kind, "error": text}
        if outcome == "parked":
            log.info("webhook_parked", **told)
        elif outcome == "failed":
            log.warning("webhook_failed", attempts=taken.attempts, **told)
        elif outcome == "dead":
            log.error("webhook_dead", attempts=taken.attempts, **told, exc_info=error)

    async def watch_backlog(self) -> None:
        """Count what is left, until cancelled."""
        while True:
            try:
                async with self._database.statement() as tx:
                    left = await webhooks.backlog(tx)
                metrics.webhooks_left.labels("dead").set(left.dead)
                metrics.webhooks_left.labels("parked").set(left.parked)
                metrics.oldest_webhook.set(left.late_s)
            except Unavailable:
                pass  # the last count stays
            await asyncio.sleep(BACKLOG_INTERVAL_S)
