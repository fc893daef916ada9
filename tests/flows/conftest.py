"""A pair of instances for a whole file: most flows need orders of their own, not servers of their own."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

import asyncpg
import pytest

from server.embedded import DataServers
from tests.conftest import TEMPLATE
from tests.harness import Fleet, Instance, with_database


@pytest.fixture(scope="module")
async def pair(data: DataServers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Instance, Instance]]:
    """Two instances that behave as one, shared by the tests of a file."""
    name = f"test_{uuid.uuid4().hex}"
    connection = await asyncpg.connect(data.database_url)
    await connection.execute(f"create database {name} template {TEMPLATE} strategy file_copy")
    fleet = Fleet(with_database(data.database_url, name), data.redis_url, tmp_path_factory.mktemp("pair"))
    yield await fleet.pair()
    await fleet.stop()
    await connection.execute(f"drop database {name} with (force)")
    await connection.close()
    fleet.check_logs()
