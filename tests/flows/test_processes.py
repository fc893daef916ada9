"""`python -m server …` as operators run it: what each mode does, what it waits for, what it refuses, what it leaves."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import asyncpg
import jwt
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.embedded import DataServers
from server.migrate import head
from server.settings import Settings
from tests.faults.proxy import proxied
from tests.harness import ROOT, SECRET, SERVICE, Fleet, Instance, Watcher, free_port, until, with_database
from tests.shared import refusal

COMMAND_S = 30.0
"""Longest run of a command that ends by itself."""


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself, in an environment of its own."""
    ours = {name.upper() for name in Settings.__struct_fields__}
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, "-m", "server", *command],
        cwd=ROOT,
        env={**clean, "JWT_SECRET": SECRET, "PORT": str(free_port()), **env},
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
        check=False,
    )


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """What a start that was refused says: one sentence on stderr, nothing else."""
    assert done.returncode == 1, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("waybill: ")
    assert line.endswith((".", "?"))
    assert SECRET not in line
    return line.removeprefix("waybill: ")


@pytest.fixture
async def empty(data: DataServers, tmp_path: Path) -> AsyncIterator[Fleet]:
    """A fleet on a database without any schema."""
    name = f"test_{uuid.uuid4().hex}"
    connection = await asyncpg.connect(data.database_url)
    await connection.execute(f"create database {name}")
    fleet = Fleet(with_database(data.database_url, name), data.redis_url, tmp_path)
    yield fleet
    await fleet.stop()
    await connection.execute(f"drop database {name} with (force)")
    await connection.close()
    fleet.check_logs()


async def is_alive(instance: Instance) -> bool:
    try:
        reply = await instance.get("/health/live", by=None)
    except aiohttp.ClientError:
        return False
    return reply.status == 200


async def says(instance: Instance, code: int, /, **parts: str) -> bool:
    """Whether /health/ready has this status and these parts."""
    reply = await instance.get("/health/ready", by=None)
    assert (reply.status == 200) == (reply.body["status"] == "ready"), reply
    return reply.status == code and parts.items() <= reply.body.items()


async def tables(fleet: Fleet) -> int:
    connection = await asyncpg.connect(fleet.database_url)
    found: int = await connection.fetchval("select count(*) from pg_tables where schemaname = 'public'")
    await connection.close()
    return found


# commands that end by themselves


async def test_token_prints_one_token_that_the_server_accepts(fleet: Fleet) -> None:
    instance = await fleet.start("web")
    order, other = await instance.place(), await instance.place()
    done = run("token", "--sub", "c1", "--role", "customer", "--order", order["id"], "--ttl", "60")
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    claims = jwt.decode(line, SECRET, ["HS256"])
    assert (claims["sub"], claims["role"], claims["orders"]) == ("c1", "customer", [order["id"]])
    assert claims["exp"] - claims["iat"] == 60
    assert (await instance.get(f"/orders/{order['id']}", by=line)).status == 200
    refusal(await instance.get(f"/orders/{other['id']}", by=line), 404, "not_found")
    async with Watcher(instance, line) as watcher:
        await watcher.watch(order["id"])


def test_a_token_that_cannot_be_is_a_sentence() -> None:
    assert "--order" in sentence(run("token", "--sub", "g1", "--role", "guest"))
    assert "0 seconds" in sentence(run("token", "--sub", "c1", "--role", "customer", "--ttl", "0"))
    for ttl in (10**12, 10**400):
        assert "year 10000" in sentence(run("token", "--sub", "c1", "--role", "customer", "--ttl", str(ttl)))
    for subject in ("", "x" * 201, "\udcff"):
        assert "subject" in sentence(run("token", "--sub", subject, "--role", "customer"))
    assert "orders" in sentence(run("token", "--sub", "g1", "--role", "guest", "--order", "\udcff"))


def test_settings_prints_the_table() -> None:
    done = run("settings", METRICS_TOKEN="not-to-be-shown")
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert list(rows) == [field.upper() for field in Settings.__struct_fields__]
    assert "15" in rows["DRAIN_TIMEOUT_S"]
    assert "not-to-be-shown" not in done.stdout
    assert SECRET not in done.stdout


PRODUCTION = {
    "ENVIRONMENT": "production",
    "DATABASE_URL": "postgresql://127.0.0.1:1/none",
    "REDIS_URL": "redis://127.0.0.1:1",
}
REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "production with the default secret": ({**PRODUCTION, "JWT_SECRET": ""}, "JWT_SECRET"),
    "production with a short secret": ({**PRODUCTION, "JWT_SECRET": "short"}, "JWT_SECRET"),
    "production with the embedded Postgres": ({**PRODUCTION, "DATABASE_URL": ""}, "DATABASE_URL"),
    "production with the embedded Redis": ({**PRODUCTION, "REDIS_URL": ""}, "REDIS_URL"),
    "production without limits": ({**PRODUCTION, "RATE_LIMITS": "off"}, "RATE_LIMITS"),
    "no number": ({"PORT": "http"}, "PORT='http' is wrong: write a whole number from 0 to 65535"),
    "a number out of range": ({"DB_POOL_SIZE": "0"}, "DB_POOL_SIZE='0'"),
    "no choice": ({"ENVIRONMENT": "staging"}, "development or production"),
    "a misspelt name": ({"RATE_LIMIT": "off"}, "did you mean RATE_LIMITS?"),
    "a contradiction": ({"DB_TIMEOUT_MS": "5000"}, "SUBSCRIBE_TIMEOUT_MS"),
    "another database": ({"DATABASE_URL": "mysql://root:hunter2@db/shop"}, "DATABASE_URL"),
    "another store": ({"REDIS_URL": "memcached://cache"}, "REDIS_URL"),
    "no public key": ({"JWT_PUBLIC_KEY": "ssh-rsa AAAA"}, "JWT_PUBLIC_KEY"),
    "no key set": ({"JWT_JWKS_URL": "file:///keys.json"}, "JWT_JWKS_URL"),
}


@pytest.mark.parametrize(("env", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_start_says_so_in_one_sentence(env: dict[str, str], named: str, tmp_path: Path) -> None:
    urls = {name: PRODUCTION[name] for name in ("DATABASE_URL", "REDIS_URL")}
    said = sentence(run("web", **{**urls, "DATA_DIR": str(tmp_path / "data"), **env}))
    assert named in said
    assert "hunter2" not in said
    assert not (tmp_path / "data").exists(), "refused before anything was begun"


# the schema


async def test_web_and_worker_never_migrate_and_wait_for_who_does(empty: Fleet) -> None:
    web, worker = await empty.start("web", ready=False), await empty.start("worker", ready=False)
    for instance in (web, worker):
        await until(lambda i=instance: is_alive(i), "it is alive", COMMAND_S)
        await until(lambda i=instance: says(i, 503, postgres="ok", redis="ok", schema="behind"), "it waits")
    refusal(await web.get("/orders"), 503, "unavailable")
    assert await tables(empty) == 0
    migrated = await empty.start("migrate", ready=False)
    assert await asyncio.to_thread(migrated.process.wait, COMMAND_S) == 0
    for instance in (web, worker):
        await instance.ready()
    assert (await web.place())["seq"] == 1
    # a worker shows how it is, and takes no orders
    assert (await worker.get("/health/live", by=None)).status == 200
    async with aiohttp.ClientSession() as session, session.get(f"{worker.url}/api/v1/orders") as reply:
        assert reply.status == 404
    again = await empty.start("migrate", ready=False)
    assert await asyncio.to_thread(again.process.wait, COMMAND_S) == 0, "the same again is nothing"


async def test_all_migrates_and_a_newer_schema_is_left_alone(empty: Fleet) -> None:
    first, second = await empty.start("all", ready=False), await empty.start("all", ready=False)
    for instance in (first, second):  # both at once: one migrates
        await instance.ready()
    order = await first.place()
    connection = await asyncpg.connect(empty.database_url)
    assert await connection.fetchval("select version_num from alembic_version") == head()
    await connection.execute("update alembic_version set version_num = '9999'")
    started = [await empty.start(mode, ready=False) for mode in ("web", "worker", "all")]
    for newer in started:
        await newer.ready()
    assert (await newer.get(f"/orders/{order['id']}")).status == 200
    migrated = await empty.start("migrate", ready=False)
    assert await asyncio.to_thread(migrated.process.wait, COMMAND_S) == 0
    assert await connection.fetchval("select version_num from alembic_version") == "9999"
    await connection.close()


# data servers that come late, and go


async def test_data_servers_are_waited_for_and_their_loss_is_told(fleet: Fleet) -> None:
    async with proxied(fleet.database_url) as postgres, proxied(fleet.redis_url) as redis:
        postgres.refuse()  # their ports are known, and nobody is there
        redis.refuse()
        instance = await fleet.start(
            "all", ready=False, DATABASE_URL=postgres.url, REDIS_URL=redis.url, READY_DB_GRACE_S="1"
        )
        await until(lambda: is_alive(instance), "it is alive without its data servers", COMMAND_S)
        await until(lambda: says(instance, 503, postgres="starting", redis="starting"), "it is not ready")
        refusal(await instance.get("/orders"), 503, "unavailable")
        await redis.heal()
        await until(lambda: says(instance, 503, postgres="starting", redis="ok"), "Redis is there")
        await postgres.heal()
        await instance.ready()
        order = await instance.place()

        redis.refuse()
        redis.cut()
        await until(
            lambda: says(instance, 200, redis="degraded"), "Redis is lost, which is no reason to send nobody here"
        )
        assert (await instance.get(f"/orders/{order['id']}")).status == 200
        await instance.move(order["id"], "confirmed")
        await redis.heal()
        await until(lambda: says(instance, 200, redis="ok"), "Redis is back")

        postgres.refuse()
        postgres.cut()
        lost = time.monotonic()
        await until(lambda: says(instance, 503, postgres="gone"), "Postgres is gone for too long")
        assert time.monotonic() - lost >= 1, "a short loss is none"
        assert await is_alive(instance)
        refusal(await instance.get(f"/orders/{order['id']}"), 503, "unavailable")
        await postgres.heal()
        await until(lambda: says(instance, 200, postgres="ok"), "Postgres is back")
        assert (await instance.get(f"/orders/{order['id']}")).body["seq"] == 2
        await instance.stop()


async def test_a_process_that_waits_can_be_stopped_and_logs_no_password(fleet: Fleet) -> None:
    nowhere = {
        "DATABASE_URL": "postgresql://shop:hunter2-pg@127.0.0.1:1/shop",
        "REDIS_URL": "redis://:hunter2-redis@127.0.0.1:1",
        "METRICS_TOKEN": "hunter2-metrics",
        "LOG_LEVEL": "debug",
    }
    waiting = [await fleet.start(mode, ready=False, **nowhere) for mode in ("web", "worker", "all")]
    for instance in waiting:
        await until(lambda i=instance: is_alive(i), "it is alive", COMMAND_S)
        assert await says(instance, 503, postgres="starting", redis="starting")
    refusal(await waiting[0].get("/orders"), 503, "unavailable")
    began = time.monotonic()
    assert await asyncio.gather(*(instance.stop() for instance in waiting)) == [0, 0, 0]
    assert time.monotonic() - began < 10
    for instance in waiting:
        assert "hunter2" not in instance.log.read_text()


async def test_migrate_waits_for_a_database_that_does_not_answer(fleet: Fleet) -> None:
    async with proxied(fleet.database_url) as postgres:
        postgres.refuse()
        waiting, stopped = [await fleet.start("migrate", ready=False, DATABASE_URL=postgres.url) for _ in range(2)]
        for instance in (waiting, stopped):
            await until(
                lambda i=instance: "waiting for it" in i.log.read_text(), "it says what it waits for", COMMAND_S
            )
        assert await stopped.stop() == 0
        await postgres.heal()
        assert await asyncio.to_thread(waiting.process.wait, COMMAND_S) == 0
    nobodys = with_database(fleet.database_url, "no_such_database")
    assert "lets nobody in" in sentence(run("migrate", DATABASE_URL=nobodys, REDIS_URL=fleet.redis_url))


# SIGTERM


async def test_sigterm_ends_what_waits_and_finishes_what_runs(fleet: Fleet) -> None:
    limit_s = 8
    instance = await fleet.start("all", DRAIN_TIMEOUT_S=str(limit_s))
    order, held = await instance.place(), await instance.place()
    sql = await asyncpg.connect(fleet.database_url)
    async with Watcher(instance, SERVICE) as watcher:
        await watcher.watch(order["id"])
        polling = asyncio.create_task(instance.get(f"/orders/{order['id']}/events?after=1&wait=30"))
        async with sql.transaction():
            await sql.execute("select from orders where id = $1::text::uuid for update", held["id"])
            running = asyncio.create_task(instance.post(f"/orders/{held['id']}/status", {"status": "confirmed"}))

            async def waits() -> bool:
                return bool(await sql.fetchval("select exists (select from pg_locks where not granted)"))

            await until(waits, "a change waits for its order")
            began = time.monotonic()
            instance.process.send_signal(signal.SIGTERM)
            reply = await polling
            assert (reply.status, reply.body) == (200, {"events": [], "seq": 1})
            await watcher.hears("serverDraining")
            await until(watcher.disconnected.is_set, "sockets are sent away")
            # whoever asks now gets no "ready": 503, or nobody takes the connection any more
            try:
                assert await says(instance, 503, status="draining")
            except aiohttp.ClientError:
                assert instance.process.poll() is None
        assert (await running).status == 200
    assert await asyncio.to_thread(instance.process.wait, limit_s) == 0
    assert time.monotonic() - began < limit_s
    marked = await sql.fetch("select sent from order_events where order_id = $1::text::uuid", held["id"])
    assert [row["sent"] for row in marked] == [True, True], "what was sent is marked"
    await sql.close()


async def test_every_mode_ends_well(fleet: Fleet) -> None:
    how = {"web": signal.SIGTERM, "worker": signal.SIGTERM, "all": signal.SIGINT}
    started = [(await fleet.start(mode, ready=False), number) for mode, number in how.items()]
    for instance, number in started:
        await instance.ready()
        instance.process.send_signal(number)
    for instance, _ in started:
        assert await asyncio.to_thread(instance.process.wait, 15) == 0


# logs and numbers


async def test_logs_are_json_lines_that_name_request_order_and_connection(fleet: Fleet) -> None:
    instance = await fleet.start("all", LOG_LEVEL="DEBUG")
    order = await instance.place()
    given = f"from-the-shop:{uuid.uuid4()}"
    reply = await instance.get(f"/orders/{order['id']}", headers={"X-Request-Id": given})
    assert reply.headers["X-Request-Id"] == given
    refused = await instance.get(f"/orders/{uuid.uuid4()}", headers={"X-Request-Id": given + "/2"})
    assert refused.body["requestId"] == refused.headers["X-Request-Id"] == given + "/2"
    made = await instance.get("/orders")
    uuid.UUID(made.headers["X-Request-Id"])
    link = (await instance.post(f"/orders/{order['id']}/tracking-link", {})).body
    secret = link["url"].rsplit("/", 1)[1]
    assert (await instance.post("/links/follow", {"secret": secret}, by=None)).status == 200
    async with aiohttp.ClientSession() as session, session.get(f"{instance.url}/track/{secret}") as page:
        assert page.status == 200
    async with Watcher(instance, link["token"]) as watcher:
        await watcher.watch(order["id"])
    async with Watcher(instance, SERVICE) as watcher:
        await watcher.call("refreshToken", {"token": SERVICE})
        await watcher.call("refreshToken", {"token": "eyJ" + "x" * 40})

    def closed() -> bool:
        events = [record.get("event") for record in instance.log_records()]
        return events.count("socket_closed") == 2

    await until(closed, "the sockets are gone")
    records = []
    for line in instance.log.read_text().splitlines():
        record = json.loads(line)
        assert {"event", "level", "timestamp"} <= record.keys(), line
        records.append(record)
    by_id = {record["request_id"]: record for record in records if record["event"] == "request"}
    wanted = {"order_id": order["id"], "method": "GET", "status": 200, "level": "info"}
    assert by_id[given].items() >= wanted.items(), by_id[given]
    assert by_id[given + "/2"]["status"] == 404
    assert by_id[made.headers["X-Request-Id"]].get("order_id") is None, "an id of one request is not kept for the next"
    assert all(record["connection_id"] for record in records if record["event"].startswith("socket_"))
    text = instance.log.read_text()
    for hidden in (secret, link["token"], SERVICE, SERVICE.rsplit(".", 1)[1], SECRET):
        assert hidden not in text


async def test_metrics_are_prometheus_text_and_in_production_behind_a_token(fleet: Fleet) -> None:
    bearer = "a-token-of-the-tests"
    started: list[tuple[Instance, dict[str | None, int]]] = [
        (await fleet.start("web", ready=False), {None: 200, bearer: 200}),
        (await fleet.start("web", ready=False, METRICS_TOKEN=bearer), {None: 404, "wrong": 404, bearer: 200}),
        (await fleet.start("web", ready=False, ENVIRONMENT="production"), {None: 404, "": 404, SERVICE: 404}),
        (
            await fleet.start("worker", ready=False, ENVIRONMENT="production", METRICS_TOKEN=bearer),
            {None: 404, "wrong": 404, bearer: 200},
        ),
    ]
    for instance, wanted in started:
        await instance.ready()
        for by, status in wanted.items():
            reply = await instance.get("/metrics", by=by)
            assert reply.status == status, (by, reply)
            if status == 200:
                assert reply.headers["Content-Type"].startswith("text/plain; version=")
                families = {family.name: family for family in text_string_to_metric_families(reply.body.decode())}
                assert families["waybill_ready"].samples[0].value == 1
            else:
                assert b"waybill_" not in json.dumps(reply.body).encode()
