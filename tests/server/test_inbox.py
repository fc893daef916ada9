"""The inbox worker: woken at once, several at a time but not too many, and nothing that one webhook does stops it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, cast

from structlog.testing import capture_logs

from handlers import webhooks
from handlers.context import Told
from handlers.ports import Delivery
from models.payment import Provider, Report
from server.db import Database
from server.outbox import Outbox
from server.settings import Settings
from server.workers.inbox import Inbox
from tests.handlers.desk import Desk
from tests.handlers.gateway import PlainGateway, as_gateway, said
from tests.handlers.money import Till, check_books, house, news
from tests.harness import until

NEVER_MS = 3_600_000


class Published:
    """An outbox that writes down what it is given."""

    def __init__(self) -> None:
        self.told: list[Told] = []

    def publish(self, told: Iterable[Told], by: str = "door") -> None:
        self.told += told


class Worker:
    """An inbox worker, and what it is worked on with."""

    def __init__(self, database: Database, *, on_read: Callable[[bytes], None] | None = None, **settings: Any) -> None:
        self.desk = Desk(database)
        self.till = Till(self.desk)
        self.published = Published()
        self.read: list[bytes] = []
        self._on_read = on_read
        gateways = {Provider.RAZORPAY: as_gateway(PlainGateway(on_read=self._note))}
        given = Settings(**{"inbox_poll_ms": NEVER_MS, "inbox_concurrency_max": 4, **settings})
        self.inbox = Inbox(given, database, cast(Outbox, self.published), gateways, house())
        self._stored = 0

    def _note(self, body: bytes) -> None:
        self.read.append(body)
        if self._on_read is not None:
            self._on_read(body)

    async def store(self, body: bytes) -> None:
        self._stored += 1
        delivery = Delivery(event_id=f"event-{self._stored}", kind="news", refs=())
        assert await self.desk.do(webhooks.store, Provider.RAZORPAY, delivery, body)

    async def statuses(self) -> list[str]:
        return [row["status"] for row in await self.desk.fetch("select status from webhooks order by event_id")]

    async def all_are(self, status: str) -> None:
        async def holds() -> bool:
            return set(await self.statuses()) == {status}

        await until(holds, f"every webhook is {status}")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.inbox.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def locked(worker: Worker, *order_ids: str) -> AsyncIterator[None]:
    """Somebody else holds these orders meanwhile."""
    async with worker.desk.database.transaction() as tx:
        await tx.all("select 1 from orders where id = any ($1::text[]::uuid[]) for update", list(order_ids))
        yield


async def paid(worker: Worker) -> tuple[str, str]:
    """(order id, gateway order) of a new payment, and a stored webhook that says it was captured."""
    order = await worker.till.order()
    name = await worker.till.begin(order)
    await worker.store(said(news(name, Report.CAPTURED)))
    return order.id, name


async def test_it_is_woken_at_once(database: Database) -> None:
    worker = Worker(database)
    async with worker.running():
        order_id, _ = await paid(worker)
        worker.inbox.wake()
        await worker.all_are("applied")
    types = [event.type for told in worker.published.told for event in told.events if told.order_id == order_id]
    assert types == ["paymentUpdate", "orderStatusUpdate"], "what was booked is published"


async def test_it_finds_by_itself_what_other_processes_stored(database: Database) -> None:
    worker = Worker(database, inbox_poll_ms=10)
    async with worker.running():
        await paid(worker)
        await worker.all_are("applied")


async def test_many_are_worked_off_by_one_call(database: Database) -> None:
    """There is more than it may do at once, and nobody wakes it for the rest."""
    worker = Worker(database)
    for number in range(50):
        await worker.store(said() + b" " * number)
    async with worker.running():
        await worker.all_are("applied")


async def test_no_more_than_allowed_are_tried_at_once(database: Database) -> None:
    worker = Worker(database, inbox_concurrency_max=2)
    orders = [(await paid(worker))[0] for _ in range(5)]
    async with worker.running():
        async with locked(worker, *orders):
            await until(lambda: len(worker.read) == 2, "two are tried")
            for _ in range(5):
                worker.inbox.wake()
                await worker.statuses()  # time for the worker to do wrong
            assert len(worker.read) == 2
        await worker.all_are("applied")


async def test_one_that_waits_holds_up_no_other(database: Database) -> None:
    worker = Worker(database)
    stuck, _ = await paid(worker)
    async with worker.running(), locked(worker, stuck):
        await until(lambda: len(worker.read) == 1, "it is tried")
        for _ in range(10):
            await paid(worker)
        worker.inbox.wake()

        async def others_are_done() -> bool:
            return sorted(await worker.statuses()) == ["applied"] * 10 + ["received"]

        await until(others_are_done, "the others are applied")


async def test_webhooks_of_one_payment_in_any_order_and_at_once(database: Database) -> None:
    worker = Worker(database)
    name = await worker.till.begin(await worker.till.order())
    reports = [Report.AUTHORIZED, Report.CAPTURED, Report.FAILED, Report.PROCESSING] * 5
    random.Random(5).shuffle(reports)
    for number, report in enumerate(reports):
        await worker.store(said(news(name, report)) + b" " * number)
    async with worker.running():
        await worker.all_are("applied")
    assert (await worker.till.payment(name))["status"] == "completed"
    (order,) = (await worker.desk.orders()).values()
    assert (order.status, order.payment.paid) == ("confirmed", order.totals.total)
    await check_books(worker.desk)


async def test_several_workers_share_the_work(database: Database) -> None:
    one, other = Worker(database), Worker(database)
    names = [(await paid(one))[1] for _ in range(20)]
    async with one.running(), other.running():
        await one.all_are("applied")
    assert len(one.read) + len(other.read) == 20, "none was tried twice"
    for name in names:
        assert (await one.till.payment(name))["status"] == "completed"
    await check_books(one.desk)


async def test_a_bug_in_one_stops_nobody(database: Database) -> None:
    def stumble(body: bytes) -> None:
        if body.endswith(b" "):
            raise RuntimeError("a bug")

    worker = Worker(database, on_read=stumble, webhook_attempts_max=1)
    await worker.store(said() + b" ")
    await worker.store(said())
    with capture_logs() as logs:
        async with worker.running():

            async def are_done() -> bool:
                return await worker.statuses() == ["dead", "applied"]

            await until(are_done, "one is given up, the other applied")
    (row,) = await worker.desk.fetch("select error from webhooks where status = 'dead'")
    assert row["error"] == "RuntimeError: a bug"
    (logged,) = [one for one in logs if one["event"] == "webhook_dead"]
    assert isinstance(logged["exc_info"], RuntimeError)


async def test_a_drain_finishes_what_was_taken_and_takes_no_more(database: Database) -> None:
    worker = Worker(database, inbox_concurrency_max=1)
    orders = [(await paid(worker))[0] for _ in range(2)]
    task = asyncio.create_task(worker.inbox.run())
    async with locked(worker, *orders):
        await until(lambda: len(worker.read) == 1, "one is tried")
        closing = asyncio.create_task(worker.inbox.close())
    await closing
    await task
    assert sorted(await worker.statuses()) == ["applied", "received"]
    rows = await worker.desk.fetch("select attempts from webhooks where status = 'received'")
    assert [row["attempts"] for row in rows] == [0]


async def test_one_that_is_cut_off_is_booked_not_at_all(database: Database) -> None:
    worker = Worker(database)
    order_id, name = await paid(worker)
    async with locked(worker, order_id), worker.running():
        await until(lambda: len(worker.read) == 1, "it is tried")
    assert await worker.statuses() == ["received"]
    assert (await worker.till.payment(name))["status"] == "pending"
    await worker.desk.fetch("update webhooks set next_at = received_at")
    async with worker.running():
        await worker.all_are("applied")
    await check_books(worker.desk)


async def test_an_order_that_is_held_too_long_costs_no_attempt(database: Database) -> None:
    worker = Worker(database, db_timeout_ms=200)
    order_id, _ = await paid(worker)
    async with worker.running(), locked(worker, order_id):

        async def given_back() -> bool:
            (row,) = await worker.desk.fetch("select attempts from webhooks")
            return len(worker.read) == 1 and row["attempts"] == 0

        await until(given_back, "its try is not counted")
