"""The pinned tables of the job library are those that the installed version wants."""

from __future__ import annotations

from typing import Any

import asyncpg
from pgqueuer import Queries
from pgqueuer.adapters.persistence.qb import QueryBuilderEnvironment
from pgqueuer.domain.settings import DBSettings


async def test_the_installed_library_would_change_nothing(database_url: str) -> None:
    connection: Any = await asyncpg.connect(database_url)
    try:
        queries = Queries.from_asyncpg_connection(connection)
        queries.qbe = QueryBuilderEnvironment(DBSettings(db_schema="jobs"))
        plan = await queries.plan_upgrade()
    finally:
        await connection.close()
    assert list(plan.statements) == []
