"""Bring the schema to this version, and tell whether it is.

Revisions are numbered `0001`, `0002`, ..., so that an instance knows a schema that is newer than itself: during a
rolling deploy old instances keep serving on the new schema.
"""

from __future__ import annotations

import uuid
from pathlib import Path

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from handlers.context import Tx
from models.errors import Unavailable
from server.db import GONE

MIGRATIONS = Path(__file__).parent.parent / "models" / "migrations"

MIGRATION_LOCK = 7_236_001
"""Advisory lock that lets one process migrate at a time."""


def head() -> str:
    """The newest revision that this code knows."""
    found = ScriptDirectory(str(MIGRATIONS)).get_current_head()
    assert found is not None
    return found


async def migrate(database_url: str) -> None:
    """Apply what is missing, in one transaction; a schema newer than this code is left as it is.

    Several processes may call this at once.

    Raises:
        OSError, asyncpg.PostgresError: there is no way in (yet). Unavailable: Postgres went away meanwhile.
    """
    # by itself, because SQLAlchemy wraps what it raises
    await (await asyncpg.connect(database_url, statement_cache_size=0)).close()
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda **_: asyncpg.connect(database_url, statement_cache_size=0),
        poolclass=NullPool,
        # behind a pooler the server process may already know a statement of another client by the usual name
        connect_args={"prepared_statement_name_func": lambda: f"__{uuid.uuid4()}__"},
    )
    try:
        async with engine.begin() as connection:
            await connection.execute(text("select pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
            await connection.run_sync(_upgrade)
    except DBAPIError as error:
        if isinstance(error.orig and error.orig.__cause__, GONE):
            raise Unavailable("Postgres went away during the migration.") from error
        raise
    finally:
        await engine.dispose()


def _upgrade(connection: Connection) -> None:
    there = MigrationContext.configure(connection).get_current_revision()
    if there is not None and there > head():
        return  # a newer release has been here
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


async def at_head(tx: Tx, wanted: str) -> bool:
    """Whether the schema is at revision `wanted` or newer."""
    exists = await tx.one("select to_regclass('alembic_version') is not null as there")
    if exists is None or not exists["there"]:
        return False
    row = await tx.one("select version_num from alembic_version")
    return row is not None and row["version_num"] >= wanted
