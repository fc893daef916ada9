"""Positions that are not believed are refused by their code, on both doors; history goes to the trail only."""

from __future__ import annotations

import time
from typing import Any

import asyncpg
import pytest

from tests.harness import Fleet, Instance, Watcher, token, until

AGENT, CUSTOMER = token("agent", "a1"), token("customer", "c1")


def fix(order_id: str, ms: float = 0, **changes: Any) -> dict[str, Any]:
    """A position of just now."""
    return {"orderId": order_id, "lat": 12.97, "lng": 77.59, "ts": int(time.time() * 1000 + ms), **changes}


async def ride(instance: Instance) -> str:
    """An order that agent a1 is carrying."""
    order_id: str = (await instance.place())["id"]
    await instance.assign(order_id, "a1", agentName="Asha Kumar")
    return order_id


REFUSED = [
    ({"accuracy": 501}, 0, "inaccurate"),
    ({}, 31_000, "future"),
    ({}, -601_000, "stale"),
    ({"lat": 13.97}, 10, "jump"),
]


@pytest.mark.parametrize(("changes", "ms", "code"), REFUSED)
async def test_each_code_on_both_doors(fleet: Fleet, changes: dict[str, Any], ms: float, code: str) -> None:
    instance = await fleet.start()
    order_id = await ride(instance)
    async with Watcher(instance, CUSTOMER) as watcher, Watcher(instance, AGENT) as agent:
        await watcher.watch(order_id)
        assert (await agent.call("updateLocation", fix(order_id)))["ok"]
        first = await watcher.hears("orderLocationUpdate")
        answer = await agent.call("updateLocation", fix(order_id, ms, **changes))
        assert answer["error"]["code"] == code
        body = {key: value for key, value in fix(order_id, ms, **changes).items() if key != "orderId"}
        reply = await instance.post(f"/orders/{order_id}/location", body, by=AGENT)
        assert (reply.status, reply.body["accepted"]) == (200, 0)
        assert reply.body["refused"] == [{"index": 0, "code": code}]
        # a good one afterwards is heard, and nothing in between was
        assert (await agent.call("updateLocation", fix(order_id, 20, lat=12.9701)))["ok"]
        await watcher.hears("orderLocationUpdate", lat=12.9701)
        assert [position["lat"] for position in watcher.positions(order_id)] == [first["lat"], 12.9701]


async def test_a_batch_shows_its_newest_and_keeps_the_rest(fleet: Fleet, database_url: str) -> None:
    one, two = await fleet.pair(LOCATION_TRAIL_INTERVAL_MS="100", LOCATION_TRAIL_FLUSH_MS="50")
    order_id = await ride(one)
    now = int(time.time() * 1000)
    fixes = [{"lat": 12.97 + n / 100_000, "lng": 77.59, "ts": now - 5000 + n * 100} for n in range(20)]
    fixes.insert(3, {"lat": 12.97, "lng": 77.59, "ts": now - 700_000})
    async with Watcher(two, CUSTOMER) as watcher:
        await watcher.watch(order_id)
        reply = await one.post(f"/orders/{order_id}/location", {"positions": list(reversed(fixes))}, by=AGENT)
        assert reply.body["accepted"] == 20
        assert reply.body["refused"] == [{"index": 17, "code": "stale"}]
        assert reply.body["nextIntervalMs"] > 0
        newest = await watcher.hears("orderLocationUpdate")
        assert newest["ts"] == fixes[-1]["ts"]
        late = await one.post(f"/orders/{order_id}/location", fixes[0] | {"ts": now - 8000}, by=AGENT)
        assert late.body == {"accepted": 1, "refused": [], "nextIntervalMs": reply.body["nextIntervalMs"]}
        await one.post(f"/orders/{order_id}/location", {"lat": 12.9705, "lng": 77.59, "ts": now}, by=AGENT)
        await watcher.hears("orderLocationUpdate", ts=now)
        assert [position["ts"] for position in watcher.positions(order_id)] == [fixes[-1]["ts"], now]
    connection = await asyncpg.connect(database_url)

    async def stored() -> bool:
        rows = await connection.fetch("select ts from positions where order_id = $1 order by ts", order_id)
        good = sorted({x["ts"] for x in fixes if x["ts"] > now - 600_000} | {now - 8000, now})
        return [row["ts"] for row in rows] == good

    await until(stored, "the trail holds every accepted position once")
    await connection.close()


async def test_the_trail_survives_a_stop(fleet: Fleet, database_url: str) -> None:
    instance = await fleet.start(LOCATION_TRAIL_FLUSH_MS="3600000")
    order_id = await ride(instance)
    body = {"lat": 12.97, "lng": 77.59, "ts": int(time.time() * 1000)}
    assert (await instance.post(f"/orders/{order_id}/location", body, by=AGENT)).body["accepted"] == 1
    assert await instance.stop() == 0
    connection = await asyncpg.connect(database_url)
    assert await connection.fetchval("select count(*) from positions where order_id = $1", order_id) == 1
    await connection.close()
