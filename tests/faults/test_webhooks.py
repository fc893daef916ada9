"""Webhooks while things break: what was answered with 200 is booked, once, whatever dies in between."""

from __future__ import annotations

import asyncio
import hashlib
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest

from models.payment import Provider
from server.embedded import DataServers
from server.migrate import migrate
from tests.faults.test_outages import QUICK, RestartablePostgres
from tests.flows.gateways import NamingGateway, naming_gateway, signed
from tests.harness import POLL_S, READY_S, ROOT, Fleet, Instance, until

CAPTURED = (ROOT / "tests" / "fixtures" / "razorpay" / "live-netbanking-payment.captured.json").read_bytes()


@pytest.fixture
async def gateway() -> AsyncIterator[NamingGateway]:
    async with naming_gateway() as gateway:
        yield gateway


@pytest.fixture
async def tables(fleet: Fleet) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(fleet.database_url)
    yield connection
    await connection.close()


async def begin(instance: Instance, gateway: NamingGateway) -> tuple[str, bytes]:
    """(payment id, the webhook that says it was captured) of a new payment."""
    name = gateway.next_id = f"order_{uuid.uuid4().hex[:14]}"
    order = await instance.place(
        paymentMethod="online", items=[{"name": "Masala dosa", "quantity": 1, "unitPrice": 100}]
    )
    reply = await instance.post("/payments", {"orderId": order["id"], "provider": "razorpay"})
    assert reply.status == 201, reply
    body = json.loads(CAPTURED)
    body["payload"]["payment"]["entity"] |= {"order_id": name, "id": f"pay_{name[6:]}"}
    return reply.body["id"], json.dumps(body).encode()


async def send(instance: Instance, body: bytes) -> int:
    """The door's answer; 0: none."""
    headers = signed(Provider.RAZORPAY, body, hashlib.sha256(body).hexdigest()[:14])
    try:
        return (await instance.request("POST", "/webhooks/razorpay", raw=body, headers=headers, by=None)).status
    except aiohttp.ClientError:
        return 0


async def completed(instance: Instance, payment_id: str) -> dict[str, Any]:
    async def holds() -> dict[str, Any] | None:
        reply = await instance.get(f"/payments/{payment_id}")
        return reply.body if reply.status == 200 and reply.body["status"] == "completed" else None

    found: dict[str, Any] = await until(holds, "the payment is completed", READY_S)
    return found


async def booked_once(tables: Any, count: int = 1) -> None:
    assert await tables.fetchval("select count(*) from captures") == count
    entries = "select count(distinct entry) from ledger_rows where kind = 'capture'"
    assert await tables.fetchval(entries) == count
    confirmed = "select count(*) from order_events where type = 'orderStatusUpdate' and body like '%confirmed%'"
    assert await tables.fetchval(confirmed) == count


async def test_whoever_stored_it_may_die_before_it_is_applied(
    fleet: Fleet, gateway: NamingGateway, tables: Any
) -> None:
    web = await fleet.start("web", **gateway.settings)
    payment_id, body = await begin(web, gateway)
    assert await send(web, body) == 200
    web.kill()
    assert await tables.fetchval("select status from webhooks") == "received"
    heir = await fleet.start("all", **gateway.settings)
    await completed(heir, payment_id)
    await booked_once(tables)


@asynccontextmanager
async def held(database_url: str, table: str) -> AsyncIterator[Any]:
    """Somebody else holds every row of a table meanwhile."""
    other = await asyncpg.connect(database_url)
    block = other.transaction()
    await block.start()
    await other.fetch(f"select 1 from {table} for update")
    yield other
    await block.rollback()
    await other.close()


async def test_a_worker_that_dies_in_the_middle_leaves_it_to_another(
    fleet: Fleet, gateway: NamingGateway, tables: Any
) -> None:
    web = await fleet.start("web", **gateway.settings)
    payment_id, body = await begin(web, gateway)
    worker = await fleet.start("worker", **gateway.settings)
    async with held(fleet.database_url, "orders"):
        assert await send(web, body) == 200

        async def is_tried() -> bool:
            waits = (
                "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%from orders%'"
            )
            return bool(await tables.fetchval(waits))

        await until(is_tried, "the worker waits for the order")
        worker.kill()
    assert (await web.get(f"/payments/{payment_id}")).body["status"] == "pending"
    assert await tables.fetchval("select attempts from webhooks") >= 1, "the try was counted before it was made"
    await fleet.start("worker", **gateway.settings)
    await completed(web, payment_id)
    await booked_once(tables)
    assert await tables.fetchval("select attempts from webhooks") >= 2


async def deliver_at_last(instances: Sequence[Instance], body: bytes) -> list[int]:
    """As gateways do it: again and again until somebody says 2xx. Every answer but the last one."""
    answers: list[int] = []
    async with asyncio.timeout(READY_S):
        while True:
            for instance in instances:
                status = await send(instance, body)
                if status == 200:
                    return answers
                answers.append(status)
            await asyncio.sleep(POLL_S)


@pytest.fixture
async def postgres(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RestartablePostgres]:
    folder = tmp_path_factory.mktemp("postgres")
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)  # Postgres refuses to run as root and must reach its folder as somebody else
    found = RestartablePostgres(folder)
    await found.start()
    await migrate(found.url)
    yield found
    await found.stop()


async def test_a_restart_of_postgres_loses_no_webhook(
    data: DataServers, postgres: RestartablePostgres, gateway: NamingGateway, tmp_path: Path
) -> None:
    fleet = Fleet(postgres.url, data.redis_url, tmp_path)
    try:
        pair = await fleet.pair(**QUICK, **gateway.settings)
        waiting = [await begin(pair[0], gateway) for _ in range(6)]
        # one that is tried just when Postgres goes, the others are sent while it is away
        assert await deliver_at_last(pair, waiting[0][1]) == []
        await postgres.stop()
        assert await send(pair[0], waiting[1][1]) == 503, "not stored"
        sending = [asyncio.create_task(deliver_at_last(pair, body)) for _, body in waiting[1:]]
        await postgres.start()
        refusals = {status for answers in await asyncio.gather(*sending) for status in answers}
        assert refusals <= {503}
        for payment_id, _ in waiting:
            await completed(pair[1], payment_id)
        connection = await asyncpg.connect(postgres.url)
        await booked_once(connection, len(waiting))
        await connection.close()
    finally:
        await fleet.stop()
    fleet.check_logs()


async def test_a_secret_is_rotated_while_webhooks_come(fleet: Fleet, gateway: NamingGateway, tables: Any) -> None:
    """First every instance gets to know the new secret, then the gateway signs with it, then the old one goes."""
    given = dict(gateway.settings)
    old = given["RAZORPAY_WEBHOOK_SECRET"]
    one = await fleet.start(**given)
    first, second = [await begin(one, gateway) for _ in range(2)]
    before = signed(Provider.RAZORPAY, first[1], "event-1", old)
    after = signed(Provider.RAZORPAY, second[1], "event-2", "the-new-secret")

    async def answers(instance: Instance, body: bytes, headers: dict[str, str]) -> int:
        reply = await instance.request("POST", "/webhooks/razorpay", raw=body, headers=headers, by=None)
        return reply.status

    assert await answers(one, second[1], after) == 400
    assert await one.stop() == 0
    both = await fleet.start(**{**given, "RAZORPAY_WEBHOOK_SECRET": f"the-new-secret,{old}"})
    assert await answers(both, second[1], after) == 200
    assert await answers(both, first[1], before) == 200
    for payment_id, _ in (first, second):
        await completed(both, payment_id)
    assert await both.stop() == 0
    new = await fleet.start(**{**given, "RAZORPAY_WEBHOOK_SECRET": "the-new-secret"})
    assert await answers(new, first[1], before) == 400
    await booked_once(tables, 2)
