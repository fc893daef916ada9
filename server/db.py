"""Postgres: one pool of asyncpg connections, the transactions that verbs run in, and the state of the link.

SQLAlchemy owns the schema, the migrations and the queries of pages; hot statements go to asyncpg as they are, because
preparing them once per connection costs a tenth of building them (docs/decisions/0002-two-ways-to-postgres.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import structlog
from sqlalchemy import Select
from sqlalchemy.dialects.postgresql import asyncpg as sqlalchemy_asyncpg

from handlers.context import Row, Told
from models.errors import Unavailable
from models.event import Event
from server.settings import Settings

log = structlog.get_logger()

CONNECT_RETRY_S = 0.5
"""Pause between two attempts to reach a Postgres that does not answer yet."""

PROBE_INTERVAL_S = 1.0
"""How often Postgres is asked whether it lives."""

_DIALECT = sqlalchemy_asyncpg.dialect()  # type: ignore[no-untyped-call]

GONE = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.InternalClientError,  # a statement was sent just when Postgres said that it stops
)
"""What asyncpg raises when Postgres does not answer, starts, stops or is full: news of the link, not of the query."""

BUSY = (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError)
"""What Postgres says when a row is held by somebody else for too long, or by each other."""

_SHUT_OUT = (*GONE, asyncpg.PostgresError)
"""What may end an attempt to connect: besides, Postgres may refuse us, or have no such database yet."""


class Transaction:
    """`handlers.context.Tx` over one connection, taken at the first statement."""

    def __init__(self, database: Database, atomic: bool) -> None:
        self.told: list[Told] = []
        self.request_id: str | None = structlog.contextvars.get_contextvars().get("request_id")
        self._database = database
        self._atomic = atomic
        self._connection: Any = None
        self._block: Any = None

    def atomically(self) -> None:
        assert self._connection is None or self._block is not None, "the first statement has been committed"
        self._atomic = True

    def now(self) -> dt.datetime:
        return self._database.clock()

    def new_id(self) -> str:
        return str(self._database.new_id())

    def tell(self, order_id: str, events: Sequence[Event]) -> None:
        self.told.append(Told(order_id, events))

    async def one(self, statement: str, *args: object) -> Row | None:
        connection = self._connection or await self._begin()
        try:
            row: Row | None = await connection.fetchrow(statement, *args)
        except BUSY as error:
            raise Unavailable("Somebody else holds this for too long.") from error
        except GONE as error:
            raise self._lost(error) from error
        return row

    async def all(self, statement: str, *args: object) -> Sequence[Row]:
        connection = self._connection or await self._begin()
        try:
            rows: Sequence[Row] = await connection.fetch(statement, *args)
        except BUSY as error:
            raise Unavailable("Somebody else holds this for too long.") from error
        except GONE as error:
            raise self._lost(error) from error
        return rows

    async def select(self, query: Select[Any]) -> Sequence[Row]:
        compiled = query.compile(dialect=_DIALECT, compile_kwargs={"render_postcompile": True})
        params = compiled.construct_params()
        return await self.all(compiled.string, *(params[name] for name in compiled.positiontup or ()))

    async def _begin(self) -> Any:
        self._connection = await self._database.acquire()
        if self._atomic or self._database.pooled:
            self._block = self._connection.transaction()
            try:
                await self._block.start()
            except GONE as error:
                raise self._lost(error) from error
        return self._connection

    def _lost(self, error: BaseException) -> Unavailable:
        _terminate(self._connection)  # never wait for an answer that did not come in time
        self._block = None
        return self._database.lost(error)

    async def finish(self, failed: bool) -> None:
        """Commit, or roll back when `failed`, and give the connection back."""
        if self._connection is None:
            return
        connection, block, self._connection, self._block = self._connection, self._block, None, None
        try:
            if block is not None:
                await (block.rollback() if failed else block.commit())
        except GONE as error:
            _terminate(connection)
            if not failed:  # else it may be an echo: of a caller that hung up during `begin`, say
                raise self._database.lost(error) from error
        except BaseException:
            _terminate(connection)
            raise
        finally:
            await self._database.release(connection)


class Database:
    """The pool, and what is known of Postgres' health.

    A Postgres that does not answer at start is waited for; meanwhile, and while it is gone, every statement raises
    `Unavailable`. `clock` and `new_id` are passed in so that tests own them.
    """

    def __init__(
        self,
        url: str,
        settings: Settings,
        clock: Callable[[], dt.datetime],
        new_id: Callable[[], uuid.UUID] = uuid.uuid4,
    ) -> None:
        self.clock = clock
        self.new_id = new_id
        self.pooled = False
        """Whether a pooler such as PgBouncer stands between: then every statement runs in an explicit transaction and
        nothing is prepared by name, because the next statement may meet another server process."""
        self.reached = asyncio.Event()
        self.gone_since: float | None = time.monotonic()
        """Monotonic time at which Postgres was last found gone; None while it answers."""
        self._url = url
        self._settings = settings
        self._timeout_s = settings.db_timeout_ms / 1000
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None

    async def run(self) -> None:
        """Connect, then watch over the link until cancelled."""
        while self._pool is None:
            try:
                self._pool = await self._open()
            except _SHUT_OUT as error:
                log.warning("postgres_not_reached", error=type(error).__name__)
                await asyncio.sleep(CONNECT_RETRY_S)
        self._back()
        while True:
            await asyncio.sleep(PROBE_INTERVAL_S)
            with contextlib.suppress(Unavailable):
                async with self.statement() as tx:
                    await tx.one("select 1")
                self._back()

    async def close(self) -> None:
        if self._pool is not None:
            with contextlib.suppress(*GONE):
                async with asyncio.timeout(self._timeout_s):
                    await self._pool.close()
            self._pool.terminate()

    @asynccontextmanager
    async def statement(self) -> AsyncIterator[Transaction]:
        """A transaction for one statement: it commits by itself, without a round trip of its own."""
        async with self._transaction(atomic=False) as tx:
            yield tx

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """A transaction of several statements: committed when the block ends, rolled back when it raises."""
        async with self._transaction(atomic=True) as tx:
            yield tx

    @asynccontextmanager
    async def _transaction(self, atomic: bool) -> AsyncIterator[Transaction]:
        tx = Transaction(self, atomic)
        try:
            yield tx
        except BaseException:
            await tx.finish(failed=True)
            raise
        await tx.finish(failed=False)

    async def acquire(self) -> Any:
        """A connection of the pool. Raises Unavailable: none within `DB_TIMEOUT_MS`."""
        if self._pool is None:
            raise Unavailable("The database is not reached yet.")
        try:
            return await self._pool.acquire(timeout=self._timeout_s)
        except _SHUT_OUT as error:
            raise self.lost(error) from error

    async def connect(self) -> Any:
        """A connection outside the pool, for whoever listens; closing it is the caller's. Raises what `GONE` names."""
        return await asyncpg.connect(
            self._url, timeout=self._timeout_s, command_timeout=self._timeout_s, statement_cache_size=0
        )

    def connections(self) -> dict[str, int]:
        """How many connections work for somebody now, and how many wait."""
        size, idle = (self._pool.get_size(), self._pool.get_idle_size()) if self._pool is not None else (0, 0)
        return {"busy": size - idle, "idle": idle}

    async def release(self, connection: Any) -> None:
        if self._pool is not None:
            try:
                await self._pool.release(connection)
            except GONE as error:
                self.lost(error)  # its statement was cancelled, and Postgres did not even say that it has heard

    def lost(self, error: BaseException) -> Unavailable:
        if self.gone_since is None:
            self.gone_since = time.monotonic()
            log.warning("postgres_gone", error=type(error).__name__)
        return Unavailable("The database does not answer.")

    def _back(self) -> None:
        if self.gone_since is not None:
            self.gone_since = None
            log.info("postgres_reached", pooled=self.pooled)
        self.reached.set()

    async def _open(self) -> asyncpg.Pool[asyncpg.Record]:
        async with asyncio.timeout(self._timeout_s):
            first = await asyncpg.connect(self._url, timeout=self._timeout_s, statement_cache_size=0)
            try:
                # a pooler cannot know which server process it will use, so it makes up the id that it greets with
                async with first.transaction():
                    self.pooled = await first.fetchval("select pg_backend_pid()") != first.get_server_pid()
            finally:
                first.terminate()
        # A session that is cut off while it waits for a lock waits on, and holds others: so it gives up first.
        # Poolers refuse such a setting of the session.
        session = {"server_settings": {"lock_timeout": f"{self._settings.db_timeout_ms * 3 // 4}ms"}}
        return await asyncpg.create_pool(
            self._url,
            min_size=1,
            max_size=self._settings.db_pool_size,
            timeout=self._timeout_s,
            command_timeout=self._timeout_s,
            max_inactive_connection_lifetime=0,
            reset=_keep_as_it_is,
            **({"statement_cache_size": 0} if self.pooled else session),
        )


def _terminate(connection: Any) -> None:
    # one that was closed by Postgres between two statements is the pool's again, and cannot be used even for this
    with contextlib.suppress(asyncpg.InterfaceError):
        connection.terminate()


async def _keep_as_it_is(connection: object) -> None:
    """Nothing of ours leaves a trace in the session, so nothing is reset: that would be a round trip per statement."""
