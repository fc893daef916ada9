"""Outages that are longer than a cut link: a Postgres that restarts, a database that is not there yet, a Redis that
stays away. What was promised holds meanwhile, and nothing has to be restarted afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import jwt
import pytest

from server.embedded import DataServers, data_servers
from server.migrate import migrate
from tests.faults.proxy import proxied
from tests.harness import POLL_S, READY_S, SERVICE, Fleet, Instance, Reply, Watcher, token, until, with_database
from tests.shared import refusal

QUICK: dict[str, Any] = {
    "BUS_FALLBACK_POLL_MS": "300",
    "BUS_PING_INTERVAL_MS": "300",
    "REDIS_TIMEOUT_MS": "500",
    "DB_TIMEOUT_MS": "800",
}
REVOKED_WITHIN_S = 1.0
"""The contract's, for links and tokens that were ended."""


async def says(instance: Instance, status: int, **parts: str) -> bool:
    """Whether /health/ready answers so."""
    try:
        reply = await instance.get("/health/ready", by=None)
    except aiohttp.ClientError:
        return False
    return reply.status == status and parts.items() <= reply.body.items()


# Postgres


class RestartablePostgres:
    """A Postgres of this test's own, which keeps its data and its address when it restarts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running = AsyncExitStack()
        self.running = False
        self.url = ""

    async def start(self) -> None:
        servers = data_servers(self._folder, None, "redis://somewhere.invalid", lambda sentence: None)
        self.url = (await self._running.enter_async_context(servers)).database_url
        self.running = True

    async def stop(self) -> None:
        self.running = False
        await self._running.aclose()


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


_agents = (f"agent-{number}" for number in itertools.count())


async def assign_somebody_else(instances: tuple[Instance, ...], order_id: str) -> None:
    """As a merchant's backend does it: under one key, again and again, on any instance, until it is done."""
    body, headers = {"agentId": next(_agents)}, {"Idempotency-Key": str(uuid.uuid4())}
    deadline = time.monotonic() + READY_S
    for instance in itertools.cycle(instances):
        reply = await instance.post(f"/orders/{order_id}/assign", body, headers=headers)
        if reply.status == 200:
            return
        assert (reply.status, reply.code) in [(503, "unavailable"), (409, "conflict")], reply
        assert time.monotonic() < deadline, reply
        await asyncio.sleep(POLL_S)


@asynccontextmanager
async def stirring(instances: tuple[Instance, ...], order_id: str) -> AsyncIterator[None]:
    """The order changes all the time meanwhile."""
    enough = asyncio.Event()

    async def stir() -> None:
        while not enough.is_set():
            await assign_somebody_else(instances, order_id)

    task = asyncio.create_task(stir())
    try:
        yield
    finally:
        enough.set()
        await task


async def test_a_restart_of_postgres_costs_no_event_and_no_watcher(
    data: DataServers, postgres: RestartablePostgres, tmp_path: Path
) -> None:
    fleet = Fleet(postgres.url, data.redis_url, tmp_path)
    a, b = await fleet.pair(**QUICK)
    order_id = (await a.place())["id"]
    async with Watcher(a, SERVICE) as here, Watcher(b, token("customer", "c1"), transports=("polling",)) as there:
        for watcher in (here, there):
            assert (await watcher.watch(order_id, after=0))["seq"] == 1
        for _ in range(2):
            async with stirring((a, b), order_id):
                await here.hears("deliveryAgentAssigned", orderId=order_id)
                await postgres.stop()
                refusal(await b.get(f"/orders/{order_id}"), 503, "unavailable")
                async with Watcher(b, SERVICE) as late:
                    answer = await late.call("subscribeToOrder", {"orderId": order_id})
                    assert answer["error"]["code"] == "unavailable"
                await postgres.start()
                for instance in (a, b):
                    await until(lambda i=instance: says(i, 200, postgres="ok"), "Postgres is back", READY_S)
        for instance in (a, b):
            await assign_somebody_else((instance,), order_id)
        listed = (await a.get(f"/orders/{order_id}/events")).body
        wanted = [(event["type"], event["data"]) for event in listed["events"]]
        assert [data["seq"] for _, data in wanted] == list(range(1, len(wanted) + 1))
        for watcher in (here, there):
            await until(lambda one=watcher: len(one.seqs(order_id)) >= len(wanted) - 1, "all events")
            assert watcher.events(order_id) == wanted[1:]
            assert not watcher.disconnected.is_set()
    await fleet.stop()
    fleet.check_logs()


async def test_a_database_that_is_made_later_is_found(data: DataServers, tmp_path: Path) -> None:
    name = f"test_{uuid.uuid4().hex}"
    fleet = Fleet(with_database(data.database_url, name), data.redis_url, tmp_path)
    started = [await fleet.start(mode, ready=False) for mode in ("all", "web", "worker")]
    for instance in started:
        await until(lambda i=instance: says(i, 503, postgres="starting", redis="ok"), "it waits", READY_S)
    sql = await asyncpg.connect(data.database_url)
    await sql.execute(f"create database {name}")
    try:
        for instance in started:
            await instance.ready()
        assert (await started[1].place())["seq"] == 1
    finally:
        await fleet.stop()
        await sql.execute(f"drop database {name} with (force)")
        await sql.close()
    fleet.check_logs()


# Redis


async def test_a_revocation_reaches_an_instance_that_has_lost_redis(fleet: Fleet) -> None:
    async with proxied(fleet.redis_url) as link:
        a, b = await fleet.start(**QUICK), await fleet.start(REDIS_URL=link.url, **QUICK)
        order_id = (await a.place())["id"]
        made = (await a.post(f"/orders/{order_id}/tracking-link", {})).body
        async with Watcher(b, made["token"]) as watcher:
            await watcher.watch(order_id)
            link.refuse()
            link.cut()
            await until(lambda: says(b, 200, redis="degraded"), "Redis is lost")
            assert (await a.request("DELETE", f"/orders/{order_id}/links/{made['id']}")).status == 204

            async def refused() -> Reply | None:
                reply = await b.get(f"/orders/{order_id}", by=made["token"])
                return reply if reply.status == 401 else None

            await until(refused, "the link works no more", REVOKED_WITHIN_S)
            await until(watcher.disconnected.is_set, "its socket ends", REVOKED_WITHIN_S)
            assert ("disconnected", {"code": "revoked"}) in watcher.heard
        await link.heal()
        await until(lambda: says(b, 200, redis="ok"), "Redis is back")


async def test_a_revocation_that_the_bus_lost_is_known_when_it_is_back(fleet: Fleet) -> None:
    async with proxied(fleet.redis_url) as link:
        quick = {**QUICK, "REVOCATION_POLL_S": "3600"}
        a, b = await fleet.start(**QUICK), await fleet.start(REDIS_URL=link.url, **quick)
        bad = token("service", jti=str(uuid.uuid4()))
        assert (await b.get("/orders", by=bad)).status == 200
        link.swallow()
        assert (await a.post("/tokens/revoke", {"jti": "nobody"})).status == 204
        link.refuse()
        link.cut()
        assert (await a.post("/tokens/revoke", {"jti": jti_of(bad)})).status == 204
        await link.heal()

        async def refused() -> bool:
            return (await b.get("/orders", by=bad)).status == 401

        await until(refused, "the token works no more")


def jti_of(token_: str) -> str:
    claims = jwt.decode(token_, options={"verify_signature": False})
    jti: str = claims["jti"]
    return jti


# long polls


@pytest.mark.parametrize("how", ["revoked", "expired"])
async def test_who_waits_for_events_while_the_token_ends_gets_none(fleet: Fleet, how: str) -> None:
    a, b = await fleet.pair()
    order_id = (await a.place())["id"]
    jti = str(uuid.uuid4())
    by = token("service", jti=jti, ttl_s=3600 if how == "revoked" else 3)
    waiting = asyncio.create_task(b.get(f"/orders/{order_id}/events?after=1&wait=20", by=by))

    async def watched() -> bool:
        return "waybill_watched_orders 1.0" in (await b.get("/metrics", by=None)).body.decode()

    await until(watched, "it waits")
    if how == "revoked":
        assert (await a.post("/tokens/revoke", {"jti": jti})).status == 204

    async def refused() -> bool:
        return (await b.get(f"/orders/{order_id}", by=by)).status == 401

    await until(refused, "the token works no more")
    await a.move(order_id, "confirmed")
    with contextlib.suppress(aiohttp.ClientError):
        refusal(await waiting, 401, "unauthenticated")
