"""What operators see of a process: the numbers of /metrics follow what happens."""

from __future__ import annotations

import asyncpg
from prometheus_client.parser import text_string_to_metric_families

from tests.harness import Fleet, Instance, until

SCRAPED_S = 15.0
"""Longest time until a number that is measured every few seconds has followed."""


async def scraped(instance: Instance) -> dict[str, float]:
    """Every sample, by its name and its labels as they are written."""
    reply = await instance.get("/metrics", by=None)
    assert reply.status == 200, reply
    found = {}
    for family in text_string_to_metric_families(reply.body.decode()):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


async def test_a_process_says_how_it_is_doing(fleet: Fleet) -> None:
    web = await fleet.start("all", DB_POOL_SIZE="7", CONNECTIONS_MAX="100")
    order = await web.place()
    await web.get(f"/orders/{order['id']}")

    async def lag_is_measured() -> bool:
        return (await scraped(web))["waybill_loop_lag_seconds_count"] > 0

    await until(lag_is_measured, "the loop's lag is measured")
    found = await scraped(web)
    assert found["waybill_ready"] == found["waybill_database_up"] == found["waybill_bus_up"] == 1
    assert found["waybill_db_pool_size"] == 7
    assert 1 <= found['waybill_db_connections{state="busy"}'] + found['waybill_db_connections{state="idle"}'] <= 7
    assert found["waybill_connections_max"] == 100
    assert found["waybill_connections_open"] >= 1, "the one that asks"
    assert found["waybill_loop_lag_seconds_sum"] < SCRAPED_S
    assert found['waybill_http_requests_total{method="POST",route="/api/v1/orders",status="201"}'] == 1
    assert found["process_resident_memory_bytes"] > 0


async def test_events_that_nobody_relays_are_counted_and_aged(fleet: Fleet) -> None:
    web = await fleet.start("web")
    order = await web.place()
    connection = await asyncpg.connect(fleet.database_url)

    async def marked() -> bool:
        return bool(await connection.fetchval("select bool_and(sent) from order_events"))

    await until(marked, "the fast path has sent it")
    await connection.execute(
        "update order_events set sent = false, recorded_at = now() - interval '1 hour' where order_id = $1::text::uuid",
        order["id"],
    )

    async def shows(count: int) -> bool:
        found = await scraped(web)
        age_s = found["waybill_oldest_unsent_seconds"]
        return found["waybill_events_unsent"] == count and (3600 <= age_s < 3700 if count else age_s == 0)

    await until(lambda: shows(1), "the unsent event is counted", SCRAPED_S)
    await fleet.start("worker")
    await until(marked, "the relay has sent it")
    await until(lambda: shows(0), "nothing is unsent any more", SCRAPED_S)
    await connection.close()
