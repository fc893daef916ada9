"""What every verb is given: the transaction it runs in, with its clock and its ids."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from sqlalchemy import Select

from models.event import Event


class Row(Protocol):
    """A row of an answer: its columns by name, and in their order."""

    def __getitem__(self, name: str) -> Any: ...

    def __iter__(self) -> Iterator[Any]: ...


class Told(NamedTuple):
    """Events that a transaction wrote for one order; the edge hands them to the bus after commit."""

    order_id: str
    events: Sequence[Event]


class Tx(Protocol):
    """One transaction. It takes no connection before its first statement, and commits when the verb returns.

    Every statement is bounded by `DB_TIMEOUT_MS`; one that does not finish raises models.errors.Unavailable.
    """

    told: list[Told]
    request_id: str | None
    """Of the request that this serves, for the audit log."""

    def atomically(self) -> None:
        """Make what follows one transaction, also where the door opened one for a single statement.

        Call it before the first statement.
        """
        ...

    def now(self) -> dt.datetime:
        """Aware UTC, in whole milliseconds."""
        ...

    def new_id(self) -> str:
        """A new unguessable id, a UUID in text form."""
        ...

    async def one(self, statement: str, *args: object) -> Row | None:
        """The first row of a statement that is prepared once per connection, or None."""
        ...

    async def all(self, statement: str, *args: object) -> Sequence[Row]: ...

    async def select(self, query: Select[Any]) -> Sequence[Row]:
        """The rows of a query built with SQLAlchemy: for pages, not for hot paths."""
        ...

    def tell(self, order_id: str, events: Sequence[Event]) -> None:
        """Note events that this transaction has written."""
        ...
