"""Two instances on a Redis Cluster behave as one, and keep every event through what clusters do: move slots, lose and
replace primaries, freeze."""

from __future__ import annotations

import asyncio
import signal
import uuid
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest

from server.embedded import DataServers
from server.outbox import order_channel
from server.realtime.cluster import key_slot
from tests.faults.test_delivery import (
    PING_MS,
    QUICK,
    REDIS_TIMEOUT_MS,
    SLACK_S,
    Listener,
    again_and_again,
    complete,
    listening,
    metric,
    placed,
    position,
    says,
    stir,
    timed,
)
from tests.harness import Instance, Watcher, token, until
from tests.redis_servers import RedisCluster, killed_at_the_end, redis_of_major
from tests.shared import shared_fleet

RATES: dict[str, Any] = {"RATE_USER_REQUESTS_PER_MIN": "60", "RATE_USER_BURST_MAX": "10"}

SIX_AND_SEVEN = pytest.mark.parametrize("house", [6, 7], indirect=True)
SEVEN = pytest.mark.parametrize("house", [7], indirect=True)


class House(NamedTuple):
    """Two instances on a cluster of three primaries, of which the first has a replica."""

    cluster: RedisCluster
    a: Instance
    b: Instance

    async def well(self) -> None:
        for instance in (self.a, self.b):
            await until(lambda i=instance: says(i, "ok"), "all is well")


@pytest.fixture(scope="module")
async def house(
    request: pytest.FixtureRequest, data: DataServers, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[House]:
    made = RedisCluster(tmp_path_factory.mktemp("redis"), redis_of_major(request.param), primaries=3, others=1)
    with killed_at_the_end(made):
        await made.start()
        await made.replicate(made.nodes[3], made.nodes[0])
        async with shared_fleet(data, tmp_path_factory.mktemp("cluster")) as fleet:
            fleet.redis_url = made.url
            a, b = await asyncio.gather(fleet.start(**QUICK, **RATES), fleet.start(**QUICK, **RATES))
            yield House(made, a, b)
            await fleet.stop()  # before its Redis goes


async def placed_in(house: House, primary: int) -> str:
    """An order that belongs to this primary."""
    while True:
        order_id = await placed(house.a)
        owner = await house.cluster.owner(key_slot(order_channel(order_id)), house.cluster.nodes[1])
        if owner is house.cluster.nodes[primary]:
            return order_id


@SIX_AND_SEVEN
async def test_events_positions_rates_and_revocations_reach_both(house: House) -> None:
    a, b = house.a, house.b
    await house.well()
    order_ids = [await placed_in(house, primary) for primary in range(3)]
    for order_id in order_ids:
        await a.assign(order_id, "rider")
        async with listening(order_id, a, b) as listeners, Watcher(b, token("agent", "rider")) as agent:
            shown = {"orderId": order_id, **position()}
            assert (await agent.call("updateLocation", shown))["ok"]
            for listener in listeners:
                await listener.hears("orderLocationUpdate", **shown)
            assert (await listeners[0].watch(order_id))["location"]["ts"] == shown["ts"], "the last one is kept"
            gaps = await metric(a, "waybill_gap_events_total") + await metric(b, "waybill_gap_events_total")
            await complete(a, order_id, listeners)
            assert gaps == await metric(a, "waybill_gap_events_total") + await metric(b, "waybill_gap_events_total")
    assert await metric(a, "waybill_events_unsent") == 0
    customer = token("customer", f"c-{uuid.uuid4()}")
    statuses = [(await (a, b)[number % 2].get("/orders", by=customer)).status for number in range(14)]
    assert statuses[:10] == [200] * 10
    assert 429 in statuses[10:], "one quota for both"
    revoked = token("customer", "c1", jti=(jti := str(uuid.uuid4())))
    async with Watcher(b, revoked) as ended:
        assert (await a.post("/tokens/revoke", {"jti": jti})).status == 204
        await asyncio.wait_for(ended.disconnected.wait(), 1 + SLACK_S)


@SEVEN
async def test_slots_that_move_while_orders_move_lose_nothing(house: House) -> None:
    await house.well()
    order_ids = [await placed_in(house, primary) for primary in (1, 2)]
    lost = await metric(house.a, "waybill_bus_losses_total")
    async with listening(order_ids[0], house.a, house.b) as one, listening(order_ids[1], house.a, house.b) as other:
        for order_id, source, target in ((order_ids[0], 1, 2), (order_ids[1], 2, 1), (order_ids[0], 2, 1)):
            async with (
                again_and_again(lambda: stir(house.a, order_ids[0], 1)),
                again_and_again(lambda: stir(house.b, order_ids[1], 1)),
            ):
                nodes = house.cluster.nodes
                await house.cluster.move(key_slot(order_channel(order_id)), nodes[source], nodes[target])
                top = (await house.a.get(f"/orders/{order_id}/events")).body["events"][-1]["seq"]
                listener = (one if order_id == order_ids[0] else other)[-1]
                await until(lambda x=listener, o=order_id, t=top: x.seqs(o)[-1:] > [t], "it goes on meanwhile")
        await complete(house.a, order_ids[0], one)
        await complete(house.b, order_ids[1], other)
        await until(lambda: _heard_by_bus(house, order_ids[0], one), "the bus carries it again, not the table")
    assert await metric(house.a, "waybill_bus_losses_total") == lost, "nothing was away"


async def _heard_by_bus(house: House, order_id: str, listeners: list[Listener]) -> bool:
    """Whether one more event is heard at the other instance without a look at the table."""
    before = await metric(house.b, "waybill_gap_events_total")
    await complete(house.a, order_id, listeners)
    return await metric(house.b, "waybill_gap_events_total") == before


@SEVEN
async def test_a_frozen_shard_and_a_dead_primary_lose_nothing(house: House) -> None:
    await house.well()
    order_ids = [await placed_in(house, primary) for primary in range(2)]
    async with listening(order_ids[0], house.a, house.b) as one, listening(order_ids[1], house.a, house.b) as other:
        async with (
            again_and_again(lambda: stir(house.a, order_ids[0], 1)),
            again_and_again(lambda: stir(house.b, order_ids[1], 1)),
        ):
            house.cluster.nodes[1].signal(signal.SIGSTOP)
            for instance in (house.a, house.b):
                noticed_s, _ = await timed(until(lambda i=instance: says(i, "degraded"), "the silence is noticed"))
                assert noticed_s < (PING_MS + REDIS_TIMEOUT_MS) / 1000 + SLACK_S
            await complete_now(house, order_ids[0], one)
            await complete_now(house, order_ids[1], other)
            house.cluster.nodes[1].signal(signal.SIGCONT)
            await house.well()
            house.cluster.nodes[0].kill()  # the one that REDIS_URL names
            for instance in (house.a, house.b):
                await until(lambda i=instance: says(i, "degraded"), "the loss is noticed")
            await house.well()  # its replica is the primary now
        await complete(house.a, order_ids[0], one)
        await complete(house.b, order_ids[1], other)
    assert await house.cluster.owner(0, house.cluster.nodes[1]) is house.cluster.nodes[3]


async def complete_now(house: House, order_id: str, listeners: list[Listener]) -> None:
    """What the table holds at this moment is heard soon, while the bus is away."""
    top = (await house.a.get(f"/orders/{order_id}/events")).body["events"][-1]["seq"]
    for listener in listeners:
        await until(lambda one=listener: one.seqs(order_id)[-1:] >= [top], f"everybody hears of {top}")
