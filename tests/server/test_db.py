"""Postgres killed, frozen, full, late, or behind PgBouncer: a statement ends in time, and the link heals by itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, quote, unquote, urlsplit, urlunsplit

import asyncpg
import msgspec
import psutil
import pytest

from handlers import orders, tracking
from handlers.context import Told
from models.errors import Conflict, IllegalMove, Refused, Unavailable
from models.order import Order
from models.user import Actor, Role
from server.app import utc_now
from server.binaries import postgres_user
from server.children import running
from server.db import Database, Transaction
from server.doors import Doors, Verb
from server.embedded import DataServers, data_servers
from server.migrate import at_head, head, migrate
from server.outbox import Outbox
from server.settings import Settings
from tests.harness import ORDER, free_port, until, with_database

TIMEOUT_S = 0.4
SLACK_S = 1.5
"""What a busy machine may add to a bound."""

POOL = 3
SHOP = Actor(sub="shop", role=Role.SERVICE, exp=2e9)
PLACE = msgspec.convert(ORDER, orders.Place)


class PrivatePostgres:
    """A Postgres of these tests' own, to be killed and frozen. Its address stays the same when it is started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = AsyncExitStack()
        self.url = ""
        self.running = False

    async def start(self) -> None:
        servers = await self._stack.enter_async_context(
            data_servers(self._folder, None, "redis://nobody", lambda sentence: None)
        )
        self.url, self.running = servers.database_url, True

    async def stop(self) -> None:
        self.running = False
        await self._stack.aclose()

    def _processes(self) -> list[psutil.Process]:
        first = psutil.Process(int((self._folder / "postgres" / "postmaster.pid").read_text().split()[0]))
        return [first, *first.children(recursive=True)]

    def freeze(self) -> None:
        for process in self._processes():
            process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        for process in self._processes():
            process.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        for process in self._processes():
            process.kill()
        await self.stop()


@pytest.fixture(scope="module")
async def private() -> AsyncIterator[PrivatePostgres]:
    folder = Path(tempfile.mkdtemp(prefix="waybill-test-", dir="/tmp"))  # short: sockets live in it
    folder.chmod(0o755)
    server = PrivatePostgres(folder)
    await server.start()
    await migrate(server.url)
    yield server
    await server.stop()
    shutil.rmtree(folder)


@asynccontextmanager
async def opened(url: str, *, wait: bool = True, timeout_ms: int = int(TIMEOUT_S * 1000)) -> AsyncIterator[Database]:
    database = Database(url, Settings(db_timeout_ms=timeout_ms, db_pool_size=POOL), utc_now)
    task = asyncio.create_task(database.run())
    try:
        if wait:
            await asyncio.wait_for(database.reached.wait(), 10)
        yield database
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await database.close()


async def ask(database: Database, statement: str = "select 1 as one") -> Any:
    async with database.statement() as tx:
        row = await tx.one(statement)
        assert row is not None
        return row[0]  # type: ignore[index]


async def timed(asked: Coroutine[Any, Any, object]) -> float:
    """How long this took to be unavailable; it must."""
    began = time.monotonic()
    with pytest.raises(Unavailable):
        await asyncio.wait_for(asked, 10 * (TIMEOUT_S + SLACK_S))
    return time.monotonic() - began


async def healed(database: Database) -> None:
    """It answers again, without anybody doing anything, and no connection is lost for good."""
    await until(lambda: database.gone_since is None, "Postgres is known to be back")

    async def answers() -> bool:
        with contextlib.suppress(Unavailable):
            return bool(await ask(database) == 1)
        return False

    await until(answers, "it answers")
    assert (
        await asyncio.gather(*(ask(database, "select 1 from pg_sleep(0.01)") for _ in range(4 * POOL)))
        == [1] * 4 * POOL
    )
    assert database.connections()["busy"] == 0


# a Postgres that goes


async def test_a_frozen_postgres_is_unavailable_in_time_and_heals(private: PrivatePostgres) -> None:
    async with opened(private.url) as database:
        await healed(database)
        private.freeze()
        try:
            assert await timed(ask(database)) < TIMEOUT_S + SLACK_S
            assert database.gone_since is not None
            # more callers than connections: each waits for a connection, then for its answer
            waits = await asyncio.gather(*(timed(ask(database)) for _ in range(20 * POOL)))
            assert max(waits) < 2 * TIMEOUT_S + SLACK_S
        finally:
            private.thaw()
        await healed(database)


async def test_a_transaction_that_freezes_is_unavailable_in_time(private: PrivatePostgres) -> None:
    async def between_statements(database: Database) -> None:
        async with database.transaction() as tx:
            await tx.one("select 1")
            private.freeze()
            await tx.one("select 1")

    async def before_its_commit(database: Database) -> None:
        async with database.transaction() as tx:
            await tx.one("select 1")
            private.freeze()

    async def before_its_rollback(database: Database) -> None:
        async with database.transaction() as tx:
            await tx.one("select 1")
            private.freeze()
            raise Unavailable("what the verb itself says comes first")

    async with opened(private.url) as database:
        for story in (between_statements, before_its_commit, before_its_rollback):
            try:
                assert await timed(story(database)) < TIMEOUT_S + SLACK_S, story.__name__
            finally:
                private.thaw()
            await healed(database)


async def test_a_caller_that_hangs_up_on_a_frozen_postgres_is_let_go_in_time(private: PrivatePostgres) -> None:
    async def in_a_transaction(database: Database) -> None:
        async with database.transaction() as tx:
            await tx.one("select 1")
            private.freeze()
            await tx.one("select 1")

    async def alone(database: Database) -> None:
        private.freeze()
        await ask(database)

    async with opened(private.url, timeout_ms=1000) as database:
        for story in (in_a_transaction, alone):
            task = asyncio.create_task(story(database))
            try:
                await until(lambda: database.connections()["busy"], "it has its connection")
                await asyncio.wait((task,), timeout=0.1)
                began = time.monotonic()
                task.cancel()
                await asyncio.wait((task,))
                assert time.monotonic() - began < 1 + SLACK_S, story.__name__
                assert task.cancelled(), story.__name__
            finally:
                private.thaw()
            await healed(database)


async def test_an_answer_that_froze_on_its_way_is_found_under_its_key(private: PrivatePostgres) -> None:
    """Nobody knows whether a commit that was not answered has happened. The key does."""
    async with opened(private.url) as database:
        doors, frozen = house(database), asyncio.Event()

        async def place(tx: Any, by: Actor, cmd: orders.Place) -> Order:
            order = await orders.place(tx, by, cmd)
            if not frozen.is_set():
                frozen.set()
                asyncio.get_running_loop().call_soon(private.freeze)
            return order

        key, before = uuid.uuid4().hex, await ask(database, "select count(*) from orders")
        try:
            await timed(doors.perform(Verb("place", place, status=201), SHOP, PLACE, key=key))
        finally:
            private.thaw()
        await healed(database)

        async def once() -> bool:
            with contextlib.suppress(Unavailable, Conflict):
                return (await doors.perform(Verb("place", place, status=201), SHOP, PLACE, key=key)).status == 201
            return False

        await until(once, "the repeat is answered")
        assert await ask(database, "select count(*) from orders") == before + 1


async def test_a_killed_postgres_is_unavailable_at_once_and_heals(private: PrivatePostgres) -> None:
    async with opened(private.url) as database, database.transaction() as tx:
        await tx.one("select 1")
        await private.kill()
        try:
            assert await timed(ask(database)) < TIMEOUT_S + SLACK_S
            assert max(await asyncio.gather(*(timed(ask(database)) for _ in range(4 * POOL)))) < TIMEOUT_S + SLACK_S
            with pytest.raises(Unavailable):
                await tx.one("select 1")
        finally:
            await private.start()
        await healed_while_open(database)
        with pytest.raises(Unavailable):
            await tx.one("select 1")  # a transaction that was cut stays cut
        with pytest.raises(Unavailable):
            await tx.one("select 1")


async def healed_while_open(database: Database) -> None:
    async def answers() -> bool:
        with contextlib.suppress(Unavailable):
            return bool(await ask(database) == 1)
        return False

    await until(answers, "it answers", 30)


async def test_a_postgres_that_comes_late_is_waited_for(private: PrivatePostgres) -> None:
    await private.kill()
    try:
        async with opened(private.url, wait=False) as database:
            for _ in range(3):
                assert await timed(ask(database)) < SLACK_S
            assert not database.reached.is_set()
            assert database.gone_since is not None
            await private.start()
            await asyncio.wait_for(database.reached.wait(), 30)
            await healed(database)
    finally:
        if not private.running:
            await private.start()


async def test_connections_that_postgres_closed_are_replaced_before_anybody_notices(private: PrivatePostgres) -> None:
    async with opened(private.url) as database:
        await healed(database)
        others = "select count(pg_terminate_backend(pid, 5000)) from pg_stat_activity where pid <> pg_backend_pid()"
        for _ in range(3):
            assert await ask(database, others + " and datname = current_database()") >= 1
            await until(lambda: database.connections()["idle"] <= 1, "the pool has noticed")
            assert await asyncio.gather(*(ask(database) for _ in range(2 * POOL))) == [1] * 2 * POOL
        assert database.gone_since is None


async def test_a_full_postgres_is_unavailable_and_no_error_of_ours(private: PrivatePostgres) -> None:
    admin = await asyncpg.connect(private.url)
    await admin.execute("create role narrow login connection limit 2")
    try:
        parts = urlsplit(private.url)
        async with opened(urlunsplit(parts._replace(netloc="narrow@"))) as database:
            answers = await asyncio.gather(
                *(ask(database, "select 1 from pg_sleep(0.05)") for _ in range(POOL)), return_exceptions=True
            )
            assert {1 if answer == 1 else type(answer) for answer in answers} == {1, Unavailable}
            await healed_while_open(database)
    finally:
        await admin.execute("drop role narrow")
        await admin.close()


# transactions


async def test_a_transaction_is_all_or_nothing_and_gives_its_connection_back(database: Database) -> None:
    await ask(database, "select 1")
    async with database.statement() as tx:
        await tx.one("create table notes (word text)")
    async with database.transaction() as tx:
        await tx.one("insert into notes values ('kept')")
        assert [row["word"] for row in await tx.all("select word from notes")] == ["kept"]
    with pytest.raises(ZeroDivisionError):
        await _write_and(database, lambda tx: tx.now().second / 0)
    twice = "insert into alembic_version select version_num from alembic_version"
    with pytest.raises(asyncpg.UniqueViolationError):
        await _write_and(database, lambda tx: tx.one(twice))
    assert await ask(database, "select string_agg(word, ',') from notes") == "kept"
    async with database.transaction():
        pass  # nothing was asked: no connection was taken
    assert database.connections()["busy"] == 0
    assert database.gone_since is None, "what is wrong with a query is no news of the link"


async def _write_and(database: Database, then: Callable[[Transaction], Any]) -> None:
    async with database.transaction() as tx:
        await tx.one("insert into notes values ('lost')")
        await then(tx)


async def test_callers_that_hang_up_are_no_news_of_postgres(database: Database) -> None:
    """At whatever step a caller goes, its connection comes back whole and Postgres is not thought to be gone."""
    dice = random.Random(5)

    async def work() -> None:
        opening = database.transaction() if dice.random() < 0.7 else database.statement()
        async with opening as tx:
            await tx.one("select pg_sleep(0.002)")
            await tx.all("select * from generate_series(1, 50)")

    for _ in range(40):
        tasks = [asyncio.create_task(work()) for _ in range(6)]
        for task in tasks:
            for _ in range(dice.randint(0, 12)):
                await asyncio.sleep(0)  # let it get a step further
            if dice.random() < 0.6:
                task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert outcome is None or isinstance(outcome, asyncio.CancelledError)
        assert database.gone_since is None
    await until(lambda: database.connections()["busy"] == 0, "every connection is given back")
    assert await ask(database, "select count(*) from pg_stat_activity where state like 'idle in transaction%'") == 0


async def test_the_clock_and_the_ids_are_those_that_were_given(database: Database) -> None:
    async with database.statement() as tx:
        assert isinstance(tx, Transaction)
        assert tx.now().microsecond % 1000 == 0
        assert tx.now().utcoffset() is not None
        assert len({tx.new_id() for _ in range(100)}) == 100
    assert not database.pooled


# PgBouncer


def bouncer_binary() -> str:
    found = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if found is None and os.environ.get("CI") == "true":
        pytest.fail("CI needs PgBouncer (Debian: apt install pgbouncer).")
    if found is None:
        pytest.skip("PgBouncer is not installed (Debian: apt install pgbouncer).")
    return found


def upstream(url: str) -> str:
    """A Postgres URL in the words of PgBouncer's configuration."""
    parts = urlsplit(url)
    named = {name: values[0] for name, values in parse_qs(parts.query).items()}
    words = {
        "host": named.get("host") or parts.hostname or "127.0.0.1",
        "port": str(named.get("port") or parts.port or 5432),
        "user": unquote(parts.username or "waybill"),
        "password": unquote(parts.password or ""),
    }
    return " ".join(f"{name}='{value}'" for name, value in words.items() if value)


@pytest.fixture(scope="module")
async def bouncer(data: DataServers) -> AsyncIterator[str]:
    """The URL of a PgBouncer in transaction mode, with two connections to each database of the run's Postgres."""
    binary, port = bouncer_binary(), free_port()
    folder = Path(tempfile.mkdtemp(prefix="waybill-test-", dir="/tmp"))
    folder.chmod(0o755)  # PgBouncer refuses to run as root, and must read its configuration as somebody else
    configuration = folder / "pgbouncer.ini"
    configuration.write_text(
        f"""[databases]
* = {upstream(data.database_url)}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 2
max_client_conn = 200
"""
    )
    user = postgres_user(folder / "nowhere")
    log = folder / "pgbouncer.log"
    async with running("PgBouncer", [binary, configuration], log, signal.SIGTERM, user) as child:

        async def listens() -> bool:
            assert child.process.returncode is None, child.tail()
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                return False
            writer.close()
            await writer.wait_closed()
            return True

        await until(listens, "PgBouncer listens")
        yield f"postgresql://anybody@127.0.0.1:{port}/postgres"
    shutil.rmtree(folder)


@pytest.fixture
def bounced_url(bouncer: str, database_url: str) -> str:
    """This test's database, through PgBouncer."""
    return with_database(bouncer, quote(urlsplit(database_url).path.strip("/")))


def house(database: Database) -> Doors:
    """The doors of one instance, whose news nobody hears."""

    class Nobody:
        def publish(self, told: Iterable[Told]) -> None:
            list(told)

        async def close(self, order_id: str, assignment: int) -> None:
            pass

    return Doors(database, cast(Outbox, Nobody()), Nobody())


async def test_pgbouncer_is_noticed(bounced_url: str, database_url: str) -> None:
    async with opened(bounced_url) as behind, opened(database_url) as direct:
        assert (behind.pooled, direct.pooled) == (True, False)


async def test_verbs_work_through_pgbouncer_however_many_at_once(bounced_url: str) -> None:
    """Two instances, far more callers than server connections: the next statement meets another server process."""

    async def story(database: Database, number: int) -> None:
        async def do(verb: Any, by: Actor, *args: Any) -> Any:
            async with database.statement() as tx:
                return await verb(tx, by, *args)

        order = await do(orders.place, SHOP, PLACE)
        for status in ("confirmed", "preparing", "ready"):
            cmd = msgspec.convert({"status": status}, orders.ChangeStatus)
            assert (await do(orders.change_status, SHOP, order.id, cmd)).status == status
            with pytest.raises(IllegalMove):
                await do(orders.change_status, SHOP, order.id, cmd)
        agent = msgspec.convert({"agentId": f"a{number}", "agentName": "Asha"}, orders.Assign)
        assert (await do(orders.assign, SHOP, order.id, agent)).agent.id == f"a{number}"
        timeline = await do(orders.events, SHOP, order.id, 2)
        assert ([event.seq for event in timeline.events], timeline.seq) == ([3, 4, 5], 5)
        assert await do(tracking.assignment, Actor(sub=f"a{number}", role=Role.AGENT, exp=2e9), order.id) == (5, None)
        async with database.statement() as tx:
            (snapshot,) = await tracking.snapshot(tx, [tracking.Asked(SHOP, order.id, 0)])
        assert isinstance(snapshot, tracking.Snapshot)
        assert [event.seq for event in snapshot.events] == [1, 2, 3, 4, 5]
        page = await do(orders.list_orders, SHOP, msgspec.convert({"agentId": f"a{number}"}, orders.ListOrders))
        assert [item.id for item in page.items] == [order.id]
        async with database.transaction() as tx:
            found = await tracking.missed(tx, {order.id: 3})
            assert [event.seq for event in found[order.id]] == [4, 5]

    async with opened(bounced_url, timeout_ms=8000) as one, opened(bounced_url, timeout_ms=8000) as other:
        await asyncio.gather(*(story((one, other)[number % 2], number) for number in range(24)))
        assert await ask(one, "select count(*) from orders") == 24
        assert one.connections()["busy"] == other.connections()["busy"] == 0
        assert one.gone_since is other.gone_since is None


async def test_a_race_through_pgbouncer_has_one_winner(bounced_url: str) -> None:
    async with opened(bounced_url, timeout_ms=8000) as one, opened(bounced_url, timeout_ms=8000) as other:
        async with one.statement() as tx:
            order = await orders.place(tx, SHOP, PLACE)

        async def confirm(database: Database) -> str:
            try:
                async with database.statement() as tx:
                    cmd = msgspec.convert({"status": "confirmed"}, orders.ChangeStatus)
                    return (await orders.change_status(tx, SHOP, order.id, cmd)).status
            except Refused as refusal:
                return refusal.code

        answers = await asyncio.gather(*(confirm((one, other)[n % 2]) for n in range(12)))
        assert sorted(answers) == ["confirmed", *["illegal_move"] * 11]


async def test_keys_work_through_pgbouncer(bounced_url: str) -> None:
    """The lock of a running command lives in its transaction, so it needs no session of its own."""
    async with opened(bounced_url, timeout_ms=8000) as one, opened(bounced_url, timeout_ms=8000) as other:
        verb = Verb("place", orders.place, status=201)

        async def place(database: Database) -> str | None:
            try:
                return str(json.loads((await house(database).perform(verb, SHOP, PLACE, key="k1")).body)["id"])
            except Conflict:
                return None

        placed = set(await asyncio.gather(*(place((one, other)[n % 2]) for n in range(12))))
        assert len(placed - {None}) == 1
        assert await ask(one, "select count(*) from orders") == 1


async def test_migrations_work_through_pgbouncer(data: DataServers, bouncer: str) -> None:
    name = f"test_{uuid.uuid4().hex}"
    admin = await asyncpg.connect(data.database_url)
    await admin.execute(f"create database {name}")
    try:
        await asyncio.gather(*(migrate(with_database(bouncer, name)) for _ in range(3)))
        async with opened(with_database(bouncer, name)) as database, database.statement() as tx:
            assert await at_head(tx, head())
    finally:
        await admin.execute(f"drop database {name} with (force)")
        await admin.close()


async def test_a_pgbouncer_that_loses_its_postgres_heals(private: PrivatePostgres, tmp_path: Path) -> None:
    binary, port = bouncer_binary(), free_port()
    folder = Path(tempfile.mkdtemp(prefix="waybill-test-", dir="/tmp"))
    folder.chmod(0o755)
    configuration = folder / "pgbouncer.ini"
    configuration.write_text(
        f"[databases]\n* = {upstream(private.url)}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n"
        "unix_socket_dir =\nauth_type = any\npool_mode = transaction\nserver_login_retry = 0.2\n"
    )
    user = postgres_user(folder / "nowhere")
    async with running("PgBouncer", [binary, configuration], tmp_path / "log", signal.SIGTERM, user):
        path = urlsplit(private.url).path
        async with opened(f"postgresql://anybody@127.0.0.1:{port}{path}") as database:
            await private.kill()
            try:
                assert await timed(ask(database)) < TIMEOUT_S + SLACK_S
            finally:
                await private.start()
            await healed(database)
            assert database.pooled
    shutil.rmtree(folder)
