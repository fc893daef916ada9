"""What staff see of background jobs, and decide about those that nobody runs any more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlencode

import asyncpg
import pytest

from server.embedded import DataServers
from tests.harness import SERVICE, Fleet, Instance, token
from tests.shared import refusal, shared_fleet

STAFF, ADMIN = token("staff", "s1"), token("admin", "x1")


@pytest.fixture(scope="module")
async def fleet(data: DataServers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    async with shared_fleet(data, tmp_path_factory.mktemp("jobs")) as fleet:
        yield fleet


@pytest.fixture(scope="module")
async def shop(fleet: Fleet) -> Instance:
    return await fleet.start("all")


@pytest.fixture
async def sql(fleet: Fleet) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(fleet.database_url)
    await connection.execute("delete from jobs.pgqueuer where entrypoint = 'nobody_runs_this'")
    yield connection
    await connection.close()


async def job(sql: asyncpg.Connection, subject: str, held: str | None = None) -> str:
    """A job of a kind that this version has no code for: no worker takes it."""
    row = await sql.fetchval(
        "insert into jobs.pgqueuer (priority, entrypoint, payload, status, attempts)"
        " values (0, 'nobody_runs_this', $1, $2, 7) returning id",
        subject.encode(),
        "queued" if held is None else "failed",
    )
    if held is not None:
        await sql.execute("insert into jobs.notes (job_id, error, held) values ($1, 'OSError: no way', $2)", row, held)
    return str(row)


async def listed(shop: Instance, **filters: Any) -> list[dict[str, Any]]:
    reply = await shop.get(f"/jobs?{urlencode(filters)}", by=STAFF)
    assert reply.status == 200, reply
    return [one for one in reply.body["items"] if one["name"] == "nobody_runs_this"]


async def test_jobs_are_listed_by_what_has_become_of_them(shop: Instance, sql: asyncpg.Connection) -> None:
    made = {held: await job(sql, f"s-{held}", held) for held in (None, "dead", "parked", "dismissed")}
    assert [one["id"] for one in await listed(shop)] == [*made.values()][::-1]
    for held, job_id in made.items():
        [found] = await listed(shop, status=held or "received")
        assert (found["id"], found["subject"], found["attempts"]) == (job_id, f"s-{held}", 7)
        assert ("nextAt" in found, "error" in found) == ((True, False) if held is None else (False, True))
    assert await listed(shop, status="applied") == []


async def test_pages_are_stable_while_jobs_are_added(shop: Instance, sql: asyncpg.Connection) -> None:
    made = [await job(sql, f"s{number}", "dead") for number in range(5)][::-1]
    found: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        reply = await shop.get(f"/jobs?{urlencode({'limit': 2, 'status': 'dead'} | cursor)}", by=STAFF)
        found += [one["id"] for one in reply.body["items"]]
        if reply.body["nextCursor"] is None:
            break
        cursor = {"cursor": reply.body["nextCursor"]}
        await job(sql, f"later {len(found)}", "dead")
    assert found == made


@pytest.mark.parametrize("cursor", ["x", "-1", "1e3", "9" * 40, "٣"])
async def test_a_cursor_that_is_not_ours_is_refused(shop: Instance, cursor: str) -> None:
    refusal(await shop.get(f"/jobs?{urlencode({'cursor': cursor})}", by=STAFF), 422, "invalid")


@pytest.mark.parametrize(
    "by",
    [SERVICE, token("customer", "c1"), token("agent", "a1"), token("staff", "s2", orders=["x"])],
    ids=["service", "customer", "agent", "narrowed"],
)
async def test_only_staff_see_and_decide(shop: Instance, sql: asyncpg.Connection, by: str) -> None:
    job_id = await job(sql, "a", "dead")
    refusal(await shop.get("/jobs", by=by), 403, "forbidden")
    refusal(await shop.post(f"/jobs/{job_id}/retry", {}, by=by), 403, "forbidden")
    refusal(await shop.post(f"/jobs/{job_id}/dismiss", {"reason": "x"}, by=by), 403, "forbidden")
    [found] = await listed(shop)
    assert found["status"] == "dead"


@pytest.mark.parametrize("held", ["dead", "parked"])
async def test_what_is_held_can_be_retried_once(shop: Instance, sql: asyncpg.Connection, held: str) -> None:
    job_id = await job(sql, "a", held)
    replies = await asyncio.gather(*(shop.post(f"/jobs/{job_id}/retry", {}, by=STAFF) for _ in range(3)))
    assert sorted(reply.status for reply in replies) == [200, 409, 409]
    [again] = [reply.body for reply in replies if reply.status == 200]
    assert (again["id"], again["status"], again["attempts"]) == (job_id, "received", 0)
    assert [again] == await listed(shop)
    [row] = await sql.fetch("select * from audit where subject = $1", f"job:{job_id}")
    assert (row["actor"], row["action"]) == ("staff:s1", "job.retry")
    assert [json.loads(row[name])["status"] for name in ("before", "after")] == [held, "received"]


async def test_a_retry_of_what_was_asked_for_anew_is_that_job(shop: Instance, sql: asyncpg.Connection) -> None:
    dead, waiting = await job(sql, "a", "dead"), await job(sql, "a")
    reply = await shop.post(f"/jobs/{dead}/retry", {}, by=STAFF)
    assert (reply.status, reply.body["id"]) == (200, waiting)
    assert [one["id"] for one in await listed(shop)] == [waiting]


async def test_what_is_held_can_be_dismissed_and_stays_so(shop: Instance, sql: asyncpg.Connection) -> None:
    job_id = await job(sql, "a", "dead")
    reply = await shop.post(f"/jobs/{job_id}/dismiss", {"reason": "paid by hand"}, by=ADMIN)
    assert reply.status == 200
    assert (reply.body["status"], reply.body["reason"]) == ("dismissed", "paid by hand")
    assert [reply.body] == await listed(shop, status="dismissed")
    for verb, body in (("retry", {}), ("dismiss", {"reason": "again"})):
        refusal(await shop.post(f"/jobs/{job_id}/{verb}", body, by=STAFF), 409, "conflict")
    [row] = await sql.fetch("select * from audit where subject = $1", f"job:{job_id}")
    assert (row["actor"], row["action"]) == ("admin:x1", "job.dismiss")
    assert json.loads(row["after"])["reason"] == "paid by hand"


async def test_what_is_not_held_or_not_there_is_refused(shop: Instance, sql: asyncpg.Connection) -> None:
    waiting = await job(sql, "a")
    for verb, body in (("retry", {}), ("dismiss", {"reason": "x"})):
        refusal(await shop.post(f"/jobs/{waiting}/{verb}", body, by=STAFF), 409, "conflict")
        for missing in ("0", "9" * 18, "9" * 19):
            refusal(await shop.post(f"/jobs/{missing}/{verb}", body, by=STAFF), 404, "not_found")
    refusal(await shop.post(f"/jobs/{waiting}/dismiss", {}, by=STAFF), 422, "invalid")


async def test_a_repeat_under_a_key_is_answered_alike(shop: Instance, sql: asyncpg.Connection) -> None:
    job_id = await job(sql, "a", "dead")
    once = {"by": STAFF, "headers": {"Idempotency-Key": f"retry-{job_id}"}}
    first = await shop.post(f"/jobs/{job_id}/retry", {}, **once)
    again = await shop.post(f"/jobs/{job_id}/retry", {}, **once)
    assert (first.status, first.body) == (again.status, again.body) == (200, first.body)
