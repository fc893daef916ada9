"""A fleet that a module of tests shares, and the look that shows whether a request changed anything."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg

from models.schema import metadata
from server.embedded import DataServers
from tests.conftest import TEMPLATE
from tests.harness import Fleet, Instance, Reply, with_database

REFUSALS = {
    400: ("malformed",),
    401: ("unauthenticated",),
    403: ("forbidden",),
    404: ("not_found",),
    409: ("illegal_move", "conflict", "payment_required", "order_closed"),
    410: ("link_expired",),
    413: ("too_large",),
    415: ("unsupported_media",),
    422: ("invalid", "idempotency_mismatch", "stale", "future", "inaccurate", "jump"),
    429: ("rate_limited",),
    503: ("unavailable",),
}
"""The contract's table, as far as orders, links and tokens go."""


@asynccontextmanager
async def shared_fleet(data: DataServers, folder: Path) -> AsyncIterator[Fleet]:
    """A fleet on a database of its own, checked and stopped at the end as the `fleet` fixture does."""
    name = f"test_{uuid.uuid4().hex}"
    connection = await asyncpg.connect(data.database_url)
    await connection.execute(f"create database {name} template {TEMPLATE} strategy file_copy")
    fleet = Fleet(with_database(data.database_url, name), data.redis_url, folder)
    try:
        yield fleet
    finally:
        await fleet.stop()
        await connection.execute(f"drop database {name} with (force)")
        await connection.close()
    fleet.check_logs()


async def ask_simulator(url: str, path: str, body: dict[str, Any]) -> None:
    """Have a simulator of a gateway do something: a payer pays, or something goes wrong from now on."""
    async with aiohttp.ClientSession() as session, session.post(f"{url}/sandbox{path}", json=body) as response:
        assert response.status == 200, (path, await response.text())


async def everything(connection: Any) -> dict[str, str]:
    """Every row of every table, but for what is written later, of earlier requests: marks of sent events, the trail."""
    looks = []
    for table in metadata.sorted_tables:
        if table.name == "positions":
            continue
        columns = ", ".join(column.name for column in table.columns if column.name != "sent")
        rows = "coalesce(string_agg(row::text, e'\\n' order by row::text), '')"
        looks.append(f"select '{table.name}', {rows} from (select {columns} from {table.name}) row")
    return dict(await connection.fetch(" union all ".join(looks)))


def refusal(reply: Reply, status: int, code: str, pointer: str | None = None) -> None:
    """The reply is this refusal, in the form of RFC 9457; with a pointer, it points there."""
    assert (reply.status, reply.code) == (status, code), reply
    body = reply.body
    assert body["status"] == status
    assert body["requestId"] == reply.headers["X-Request-Id"]
    assert body["type"].endswith(code)
    assert all(isinstance(body[name], str) and body[name] for name in ("type", "title", "detail", "requestId")), body
    if pointer is not None:
        assert [error["pointer"] for error in body["errors"]] == [pointer], body
        assert all(error["code"] and error["message"] for error in body["errors"])


class LogReader:
    """Reads what an instance has logged since the last look."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._read = 0

    def news(self) -> str:
        with self._instance.log.open("rb") as log:
            log.seek(self._read)
            found = log.read()
        self._read += len(found)
        return found.decode()

    def check_quiet(self) -> None:
        """Nothing that was logged since the last look is a traceback or an error."""
        bad = [line[:2000] for line in self.news().splitlines() if "Traceback" in line or '"level": "error"' in line]
        assert bad == []
