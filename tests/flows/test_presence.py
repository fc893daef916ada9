"""How many watch an order, over two instances; and how agents are asked for more where it pays."""

from __future__ import annotations

import time
import uuid
from contextlib import AsyncExitStack
from typing import Any

from redis.asyncio import Redis

from tests.faults.proxy import proxied
from tests.harness import ORDER, SERVICE, Fleet, Instance, Watcher, token, until

COUNTED_S = 5.0
"""Longest time until a change is in the count, on a busy machine."""
ALIVE_S = 3
NORMAL_MS, NEAR_MS, UNWATCHED_MS = 5000, 2000, 15_000
GOAL = (12.9716, 77.5946)
HALF_A_DEGREE = 0.5  # some 55 km


async def counted(instance: Instance, order_id: str, by: str = SERVICE) -> int:
    reply = await instance.get(f"/orders/{order_id}/watchers", by=by)
    assert reply.status == 200, reply
    count: int = reply.body["watchers"]
    return count


async def all_count(wanted: int, order_id: str, *instances: Instance, within_s: float = COUNTED_S) -> None:
    async def agree() -> bool:
        return [await counted(instance, order_id) for instance in instances] == [wanted] * len(instances)

    await until(agree, f"{wanted} are counted", within_s)


def customer() -> str:
    return token("customer", "c1")


async def test_everybody_who_watches_anywhere_is_counted(fleet: Fleet) -> None:
    a, b = await fleet.pair()
    order_id, other_id = (await a.place())["id"], (await a.place())["id"]
    rider = uuid.uuid4().hex
    await a.assign(order_id, rider)
    agent = token("agent", rider)
    await all_count(0, order_id, a, b)
    async with AsyncExitStack() as stack:
        watchers = []
        for instance, count in ((a, 3), (b, 2)):
            for _ in range(count):
                watchers.append(await stack.enter_async_context(Watcher(instance, customer())))
                await watchers[-1].watch(order_id)
        await watchers[0].watch(order_id)  # once more is not one more
        await watchers[0].watch(other_id)
        pushing = await stack.enter_async_context(Watcher(a, agent))
        assert (await pushing.call("updateLocation", fix(order_id, GOAL)))["ok"]
        await all_count(5, order_id, a, b)
        await all_count(1, other_id, a, b)
        assert await counted(b, order_id, agent) == 5
        text = (await a.get("/metrics", by=None)).body.decode()
        assert "waybill_watchers 4.0" in text
        await watchers[0].call("unsubscribeFromOrder", {"orderId": order_id})
        await watchers[4].client.disconnect()
        await all_count(3, order_id, a, b)
    await all_count(0, order_id, a, b)


async def test_the_counts_of_a_killed_instance_vanish(fleet: Fleet) -> None:
    a = await fleet.start()
    killed, stopped = await fleet.start(PRESENCE_ALIVE_S=str(ALIVE_S)), await fleet.start(PRESENCE_ALIVE_S="3600")
    order_id = (await a.place())["id"]
    async with Watcher(a, customer()) as here, Watcher(killed, customer()) as one, Watcher(stopped, customer()) as two:
        for watcher in (here, one, two):
            await watcher.watch(order_id)
        await all_count(3, order_id, a)
        killed.kill()
        killed_at = time.monotonic()
        await all_count(2, order_id, a, within_s=ALIVE_S + 2)
        assert time.monotonic() - killed_at < ALIVE_S + 2
        assert await stopped.stop() == 0
        assert await counted(a, order_id) == 1, "who ends well says so"


async def test_a_redis_that_forgot_is_told_again(fleet: Fleet) -> None:
    async with proxied(fleet.redis_url) as link:
        quick: dict[str, Any] = {"BUS_PING_INTERVAL_MS": "300", "REDIS_TIMEOUT_MS": "500"}
        a, b = await fleet.start(), await fleet.start(REDIS_URL=link.url, **quick)
        order_id = (await a.place())["id"]
        async with Watcher(b, customer()) as stays, Watcher(b, customer()) as goes:
            for watcher in (stays, goes):
                await watcher.watch(order_id)
            await all_count(2, order_id, a, b)
            link.refuse()
            link.cut()

            async def unknown() -> bool:
                return (await b.get(f"/orders/{order_id}/watchers")).status == 503

            await until(unknown, "Redis is away")
            await goes.client.disconnect()
            async with Redis.from_url(fleet.redis_url) as redis:
                assert await redis.delete(f"waybill:{{{order_id}}}:watchers") == 1
            await link.heal()

            async def known() -> bool:
                return (await b.get(f"/orders/{order_id}/watchers")).status == 200

            await until(known, "Redis is back")
            await all_count(1, order_id, a, b)
        await fleet.stop()


# how often agents are asked


def fix(order_id: str, at: tuple[float, float], ts: float | None = None) -> dict[str, Any]:
    return {"orderId": order_id, "lat": at[0], "lng": at[1], "ts": time.time() * 1000 if ts is None else ts}


async def ridden(instance: Instance, **address: float) -> tuple[str, str]:
    """An order under way, and its agent's token."""
    whole: dict[str, Any] = {**ORDER["deliveryAddress"], **address}  # type: ignore[dict-item]
    order_id, rider = (await instance.place(deliveryAddress=whole))["id"], uuid.uuid4().hex
    await instance.assign(order_id, rider)
    return order_id, token("agent", rider)


async def test_an_agent_is_asked_for_more_where_somebody_watches_and_for_most_at_the_door(fleet: Fleet) -> None:
    a, b = await fleet.pair(LOCATION_SPEED_MAX_MPS="10000", LOCATION_JUMP_SLACK_M="100000")
    order_id, by = await ridden(a, lat=GOAL[0], lng=GOAL[1])
    far = (GOAL[0] + HALF_A_DEGREE, GOAL[1])
    async with Watcher(a, by) as agent:

        async def asked(at: tuple[float, float]) -> int:
            answer = await agent.call("updateLocation", fix(order_id, at))
            assert answer["ok"], answer
            rest = await b.post(f"/orders/{order_id}/location", fix(order_id, at), by=by)
            assert rest.body["nextIntervalMs"] == answer["nextIntervalMs"], "both doors of both instances agree"
            pause_ms: int = answer["nextIntervalMs"]
            return pause_ms

        assert await asked(far) == UNWATCHED_MS
        assert await asked(GOAL) == UNWATCHED_MS, "nobody looks"
        async with Watcher(b, customer()) as watcher:
            await watcher.watch(order_id)
            assert await asked(far) == NORMAL_MS
            assert await asked(GOAL) == NEAR_MS
            assert await asked(far) == NORMAL_MS
            old = await agent.call("updateLocation", fix(order_id, GOAL, time.time() * 1000 - 60_000))
            assert old["nextIntervalMs"] == NORMAL_MS, "an older position changes nothing"

        async def unwatched() -> bool:
            return await counted(a, order_id) == 0

        await until(unwatched, "the watcher has left")
        assert await asked(GOAL) == UNWATCHED_MS


async def test_without_degrees_in_the_address_nothing_is_near(fleet: Fleet) -> None:
    a = await fleet.start()
    order_id, by = await ridden(a)
    async with Watcher(a, by) as agent, Watcher(a, customer()) as watcher:
        await watcher.watch(order_id)
        answer = await agent.call("updateLocation", fix(order_id, GOAL))
        assert answer["nextIntervalMs"] == NORMAL_MS


async def test_a_position_that_thinning_holds_back_is_answered_as_the_last_one_shown(fleet: Fleet) -> None:
    a = await fleet.start(LOCATION_MIN_INTERVAL_MS="3600000")
    order_id, by = await ridden(a)
    async with Watcher(a, by) as agent, Watcher(a, customer()) as watcher:
        await watcher.watch(order_id)
        for _ in range(3):
            answer = await agent.call("updateLocation", fix(order_id, GOAL))
            assert answer["nextIntervalMs"] == NORMAL_MS
