"""Whoever was revoked before an event was written never hears it, whatever becomes of the bus meanwhile."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest

from tests.faults.proxy import Proxy, proxied
from tests.harness import Fleet, Instance, Watcher, token, until

QUIET: dict[str, Any] = {
    "BUS_PING_INTERVAL_MS": "300",
    "REDIS_TIMEOUT_MS": "500",
    "DB_TIMEOUT_MS": "800",
    "REVOCATION_POLL_S": "3600",
    "BUS_FALLBACK_POLL_MS": "60000",
    "GAP_CHECK_INTERVAL_S": "3600",
}
"""Outages are noticed at once, and nothing is read by the clock: each test lets in the one way that it is about."""


class Stage(NamedTuple):
    """An order, watched on B by somebody who stays and by somebody who is revoked, and B's ways to its data."""

    a: Instance
    b: Instance
    redis: Proxy
    postgres: Proxy
    order_id: str
    stays: Watcher
    goes: Watcher
    revoke: Callable[[], Awaitable[None]]

    async def outcome(self, *seqs: int) -> None:
        """Who stays has heard these events, and who was revoked none of them, but why."""
        await until(lambda: self.stays.seqs(self.order_id) == [*seqs], f"{seqs}; heard {self.stays.heard}")
        await until(self.goes.disconnected.is_set, "the revoked session ends")
        assert self.goes.heard == [
            ("subscriptionClosed", {"orderId": self.order_id, "code": "revoked"}),
            ("disconnected", {"code": "revoked"}),
        ]


@asynccontextmanager
async def stage(fleet: Fleet, how: str, **env: str) -> AsyncIterator[Stage]:
    async with proxied(fleet.redis_url) as redis, proxied(fleet.database_url) as postgres:
        a = await fleet.start()
        b = await fleet.start(REDIS_URL=redis.url, DATABASE_URL=postgres.url, **{**QUIET, **env})
        order_id = (await a.place())["id"]
        jti, sub = str(uuid.uuid4()), uuid.uuid4().hex
        link = (await a.post(f"/orders/{order_id}/tracking-link", {})).body
        by = link["token"] if how == "link" else token("service", sub, jti=jti)

        async def revoke() -> None:
            if how == "link":
                reply = await a.request("DELETE", f"/orders/{order_id}/links/{link['id']}")
            else:
                reply = await a.post("/tokens/revoke", {"jti": jti} if how == "token" else {"sub": sub})
            assert reply.status == 204

        async with Watcher(b, token("customer", "c1")) as stays, Watcher(b, by) as goes:
            for watcher in (stays, goes):
                await watcher.watch(order_id)
            yield Stage(a, b, redis, postgres, order_id, stays, goes, revoke)
            await redis.heal()
            await postgres.heal()
        await fleet.stop()  # before its links go


async def lose_redis(on: Stage) -> None:
    on.redis.refuse()
    on.redis.cut()

    async def lost() -> bool:
        return bool((await on.b.get("/health/ready", by=None)).body["redis"] == "degraded")

    await until(lost, "Redis is lost")


async def passed_over(instance: Instance) -> float:
    text = (await instance.get("/metrics", by=None)).body.decode()
    return next(
        float(line.split()[1]) for line in text.splitlines() if line.startswith("waybill_bus_passed_over_total")
    )


@pytest.mark.parametrize("how", ["token", "user", "link"])
async def test_what_was_written_during_an_outage_is_caught_up_without_the_revoked(fleet: Fleet, how: str) -> None:
    async with stage(fleet, how) as on:
        await lose_redis(on)
        await on.revoke()
        await on.a.move(on.order_id, "confirmed", "preparing")
        await on.redis.heal()
        await on.outcome(2, 3)


async def test_the_poll_of_an_outage_shows_nothing_to_the_revoked(fleet: Fleet) -> None:
    async with stage(fleet, "token", BUS_FALLBACK_POLL_MS="300") as on:
        await lose_redis(on)
        await on.a.move(on.order_id, "confirmed")
        for watcher in (on.stays, on.goes):
            await watcher.hears("orderStatusUpdate", status="confirmed")
        on.goes.heard.clear()
        await on.revoke()
        await on.a.move(on.order_id, "preparing")
        await on.outcome(2, 3)


async def test_a_gap_check_on_a_deaf_link_shows_nothing_to_the_revoked(fleet: Fleet) -> None:
    """The instance believes that its bus is well; only the table tells it otherwise."""
    deaf = {"BUS_PING_INTERVAL_MS": "3600000", "GAP_CHECK_INTERVAL_S": "1", "RELAY_GRACE_MS": "300"}
    async with stage(fleet, "user", **deaf) as on:
        on.redis.down.swallow()
        await on.revoke()
        await on.a.move(on.order_id, "confirmed")
        await on.outcome(2)


async def test_a_bus_that_is_back_is_not_believed_before_revocations_are_read(fleet: Fleet) -> None:
    async with stage(fleet, "token", REVOCATION_HOLD_MAX_S="3600", DB_TIMEOUT_MS="300") as on:
        await lose_redis(on)
        await on.revoke()
        on.postgres.freeze()
        await on.redis.heal()
        statuses = iter(["confirmed", "preparing", "ready", "out_for_delivery"])

        async def passes_over() -> bool:
            if (await on.b.get("/health/ready", by=None)).body["redis"] != "ok":
                return False
            if (status := next(statuses, None)) is not None:
                await on.a.move(on.order_id, status)
            return await passed_over(on.b) > 0

        await until(passes_over, "the bus brings events, but to nobody")
        assert on.stays.heard == on.goes.heard == []
        await on.postgres.heal()
        top = (await on.a.get(f"/orders/{on.order_id}")).body["seq"]
        await on.outcome(*range(2, top + 1))


async def test_an_instance_that_cannot_read_revocations_is_not_deaf_for_ever(fleet: Fleet) -> None:
    async with stage(fleet, "token", REVOCATION_HOLD_MAX_S="1", DB_TIMEOUT_MS="300", BUS_FALLBACK_POLL_MS="300") as on:
        await lose_redis(on)
        on.postgres.freeze()
        await on.redis.heal()

        async def believed() -> bool:
            text = (await on.b.get("/metrics", by=None)).body.decode()
            return "waybill_revocations_overdue_total 1.0" in text

        await until(believed, "the hold is over", 15)
        await on.a.move(on.order_id, "confirmed")
        await until(lambda: on.stays.seqs(on.order_id) == [2], "the bus is heard")
