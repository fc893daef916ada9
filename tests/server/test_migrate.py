"""Migrations: the migrated database is what the models say, several may migrate at once, and newer is good enough."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect
from sqlalchemy.ext.asyncio import create_async_engine

from models import schema
from server.app import utc_now
from server.db import Database
from server.embedded import DataServers
from server.migrate import MIGRATIONS, at_head, head, migrate
from server.settings import Settings
from tests.harness import with_database

T = TypeVar("T")


@pytest.fixture
async def empty_url(data: DataServers) -> AsyncIterator[str]:
    """A database in which nothing is."""
    name = f"test_{uuid.uuid4().hex}"
    connection = await asyncpg.connect(data.database_url)
    await connection.execute(f"create database {name}")
    yield with_database(data.database_url, name)
    await connection.execute(f"drop database {name} with (force)")
    await connection.close()


async def look(url: str, at: Callable[[Connection], T]) -> T:
    """What `at` sees of the database, through SQLAlchemy."""
    engine = create_async_engine("postgresql+asyncpg://", async_creator=lambda **_: asyncpg.connect(url))
    try:
        async with engine.connect() as connection:
            return await connection.run_sync(at)
    finally:
        await engine.dispose()


async def execute(url: str, statement: str) -> Any:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetch(statement)
    finally:
        await connection.close()


async def is_at_head(url: str, wanted: str) -> bool:
    database = Database(url, Settings(), utc_now)
    running = asyncio.create_task(database.run())
    await database.reached.wait()
    try:
        async with database.statement() as tx:
            return await at_head(tx, wanted)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await database.close()


async def dump(url: str) -> Any:
    """Tables, columns, constraints, indexes and revision, as Postgres itself describes them."""
    return [
        await execute(url, statement)
        for statement in (
            "select table_name, column_name, data_type, is_nullable, column_default, ordinal_position"
            " from information_schema.columns where table_schema = 'public' order by 1, 6",
            "select conrelid::regclass::text, conname, pg_get_constraintdef(oid) from pg_constraint"
            " where connamespace = 'public'::regnamespace order by 1, 2",
            "select indexdef from pg_indexes where schemaname = 'public' order by 1",
            "select version_num from alembic_version",
        )
    ]


async def test_the_migrated_database_is_what_the_models_say(database_url: str) -> None:
    def differences(connection: Connection) -> Any:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return compare_metadata(context, schema.metadata)

    assert await look(database_url, differences) == []


async def test_the_models_and_the_migrations_make_the_same_database(database_url: str, empty_url: str) -> None:
    """What the comparison above does not see: names of constraints, expressions of indexes, identity columns."""
    engine = create_async_engine("postgresql+asyncpg://", async_creator=lambda **_: asyncpg.connect(empty_url))
    async with engine.begin() as connection:
        await connection.run_sync(schema.metadata.create_all)
    await engine.dispose()
    await execute(empty_url, f"create table alembic_version as select '{head()}'::varchar(32) as version_num")
    await execute(empty_url, "alter table alembic_version alter version_num set not null")
    await execute(empty_url, "alter table alembic_version add constraint alembic_version_pkc primary key (version_num)")

    def shape(found: Any) -> Any:
        columns, *rest = found
        # in which order the columns stand is the history of the table, not a difference
        return sorted(tuple(row)[:5] for row in columns), *rest

    assert shape(await dump(database_url)) == shape(await dump(empty_url))


async def test_several_may_migrate_at_once(empty_url: str, database_url: str) -> None:
    await asyncio.gather(*(migrate(empty_url) for _ in range(5)))
    assert await dump(empty_url) == await dump(database_url)


async def test_migrating_again_changes_nothing(database_url: str) -> None:
    before = await dump(database_url)
    await migrate(database_url)
    assert await dump(database_url) == before


async def test_a_migration_that_fails_leaves_nothing_behind(empty_url: str) -> None:
    await execute(empty_url, "create table order_events (in_the_way integer)")
    with pytest.raises(Exception, match="order_events"):
        await migrate(empty_url)
    assert await look(empty_url, lambda connection: inspect(connection).get_table_names()) == ["order_events"]
    await execute(empty_url, "drop table order_events")
    await migrate(empty_url)
    assert await is_at_head(empty_url, head())


async def test_an_instance_knows_a_schema_that_is_older_equal_or_newer(empty_url: str) -> None:
    assert not await is_at_head(empty_url, head()), "nothing is there"
    await migrate(empty_url)
    assert await is_at_head(empty_url, head())
    number = int(head())
    for there, enough in ((number - 1, False), (number, True), (number + 1, True), (number + 1000, True)):
        await execute(empty_url, f"update alembic_version set version_num = '{there:04}'")
        assert await is_at_head(empty_url, head()) is enough, there
    await execute(empty_url, "delete from alembic_version")
    assert not await is_at_head(empty_url, head())


async def test_an_instance_that_is_older_than_the_schema_leaves_it_alone(database_url: str) -> None:
    """A rolled back `all` migrates before it serves: on a newer schema there is nothing to do."""
    await execute(database_url, f"update alembic_version set version_num = '{int(head()) + 1:04}'")
    before = await dump(database_url)
    await migrate(database_url)
    assert await dump(database_url) == before
    assert await is_at_head(database_url, head())


def test_revisions_are_numbered_in_one_line() -> None:
    scripts = ScriptDirectory(str(MIGRATIONS))
    revisions = [script.revision for script in scripts.walk_revisions()][::-1]
    assert revisions == [f"{number:04}" for number in range(1, len(revisions) + 1)]
    assert head() == revisions[-1]
    for before, script in zip([None, *revisions], reversed(list(scripts.walk_revisions())), strict=False):
        assert script.down_revision == before
