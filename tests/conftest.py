"""Fixtures: real data servers, a fresh database per test, and servers as the processes that users run."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from server.app import utc_now
from server.db import Database
from server.embedded import DataServers, data_servers
from server.migrate import migrate
from server.settings import Settings
from tests.harness import Fleet, with_database

TEMPLATE = "waybill_template"


@pytest.fixture(scope="session")
async def data(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[DataServers]:
    """One Postgres and one Redis for the whole run: those that the environment names, those that the command in
    TEST_SERVERS starts (for each process of a parallel run its own), else the embedded ones."""
    async with (
        given_servers(os.environ.get("TEST_SERVERS")) as (database_url, redis_url),
        _servers(tmp_path_factory, database_url, redis_url) as servers,
    ):
        yield servers


@asynccontextmanager
async def given_servers(command: str | None) -> AsyncIterator[tuple[str | None, str | None]]:
    """The URLs of servers that somebody else runs. `command` runs what follows it with servers, and names them in the
    environment, as scripts/with-external-data does."""
    if command is None:
        yield os.environ.get("TEST_DATABASE_URL"), os.environ.get("TEST_REDIS_URL")
        return
    say = 'echo "urls $TEST_DATABASE_URL $TEST_REDIS_URL"; exec cat'
    process = await asyncio.create_subprocess_exec(
        command, "sh", "-c", say, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        while not (line := await process.stdout.readline()).startswith(b"urls "):
            assert line, f"{command} started nothing"
        _, database_url, redis_url = line.decode().split()
        yield database_url, redis_url
    finally:
        process.stdin.close()  # the end of its input is the end of `cat`, and of the servers
        await process.wait()


@asynccontextmanager
async def _servers(
    tmp_path_factory: pytest.TempPathFactory, database_url: str | None, redis_url: str | None
) -> AsyncIterator[DataServers]:
    folder = tmp_path_factory.mktemp("data")
    for parent in (folder, *folder.parents):
        if parent.stat().st_mode & 0o005 == 0o005:
            break
        parent.chmod(0o755)  # Postgres refuses to run as root and must reach its folder as somebody else
    async with data_servers(folder, database_url, redis_url, lambda sentence: None) as servers:
        connection = await asyncpg.connect(servers.database_url)
        # A test kills processes, never the machine, so nothing need reach the disk: a third of the time is saved.
        for name in ("fsync", "full_page_writes", "synchronous_commit"):
            await connection.execute(f"alter system set {name} = off")
        await connection.execute("select pg_reload_conf()")
        await connection.execute(f"drop database if exists {TEMPLATE}")
        await connection.execute(f"create database {TEMPLATE}")
        await connection.close()
        await migrate(with_database(servers.database_url, TEMPLATE))
        yield servers


@pytest.fixture
async def database_url(data: DataServers) -> AsyncIterator[str]:
    """A migrated database of this test's own."""
    name = f"test_{uuid.uuid4().hex}"
    connection = await asyncpg.connect(data.database_url)
    await connection.execute(f"create database {name} template {TEMPLATE} strategy file_copy")
    yield with_database(data.database_url, name)
    await connection.execute(f"drop database {name} with (force)")
    await connection.close()


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The database as verbs get it, without a server around it."""
    opened = Database(database_url, Settings(), utc_now)
    running = asyncio.create_task(opened.run())
    await opened.reached.wait()
    yield opened
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await opened.close()


@pytest.fixture
async def fleet(data: DataServers, database_url: str, tmp_path: Path) -> AsyncIterator[Fleet]:
    """Starts instances on this test's database; stops them, and reads their logs for what must not be there."""
    started = Fleet(database_url, data.redis_url, tmp_path)
    yield started
    await started.stop()
    started.check_logs()
