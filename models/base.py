"""What all models share: one metadata object with predictable constraint names, and the plain kinds of value."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta
from sqlalchemy import DDL, DateTime, MetaData, Table, event

from models.money import MINOR_UNITS_MAX

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

UtcTime = DateTime(timezone=True)

REFUSE_CHANGE = """
create or replace function refuse_change() returns trigger language plpgsql as $$
begin
    raise exception 'rows of % are only ever added', tg_table_name;
end $$"""


def add_only(table: Table) -> None:
    """Let the database itself refuse to change or delete rows of the table."""
    row = f"create trigger {table.name}_add_only before update or delete on {table.name} for each row"
    whole = f"create trigger {table.name}_not_emptied before truncate on {table.name}"
    for ddl in (REFUSE_CHANGE.replace("%", "%%"), f"{row} execute function refuse_change()"):
        event.listen(table, "after_create", DDL(ddl))  # type: ignore[no-untyped-call]
    event.listen(table, "after_create", DDL(f"{whole} execute function refuse_change()"))  # type: ignore[no-untyped-call]


def rfc3339(at: dt.datetime) -> str:
    """`at` (aware UTC) as the contract writes times: `2026-11-21T09:30:00.125Z`."""
    return at.isoformat(timespec="milliseconds")[:-6] + "Z"


def as_json(value: object) -> str | None:
    """`value` as JSON text; None where there is none."""
    return None if value is None else msgspec.json.encode(value).decode()


def listed(values: Iterable[str]) -> str:
    """The words between the parentheses of an SQL `in (…)`. For words of ours only: nothing is escaped."""
    return ", ".join(f"'{value}'" for value in sorted(values))


Words = "^[^\\x00]*\\Z"
"""Text that Postgres can hold: anything but NUL."""


class Holds(NamedTuple):
    """Says of JSON that is handed on as it is which shape it has: `Annotated[msgspec.Raw, Holds(Position)]`."""

    shape: Any


Later = Meta(extra={"later": True})
"""Marks a member that the contract knows and this version always refuses: the documents leave it out."""

Time = Annotated[str, Meta(description="RFC 3339, UTC", extra_json_schema={"format": "date-time"})]
UuidText = Annotated[str, Meta(extra_json_schema={"format": "uuid"})]

Id = Annotated[str, Meta(min_length=1, max_length=200, pattern=Words)]
ShortText = Annotated[str, Meta(min_length=1, max_length=200, pattern=Words)]
Reference = Annotated[str, Meta(min_length=1, max_length=64, pattern=Words)]
LongText = Annotated[str, Meta(max_length=1000, pattern=Words)]
Reason = Annotated[str, Meta(min_length=1, max_length=500, pattern=Words)]
Quantity = Annotated[int, Meta(ge=1, le=1_000_000)]
MinorUnits = Annotated[int, Meta(ge=0, le=MINOR_UNITS_MAX, description="minor units of the currency: 12000 is ₹120")]
Amount = Annotated[int, Meta(description="minor units of the currency")]
"""An amount of ours, on its way out."""


# A struct may carry `SCHEMA: ClassVar[dict[str, Any]]`: members of its JSON Schema that its fields do not tell, such as
# examples, or which of its members go together.


class Strict(msgspec.Struct, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """A shape from outside: unknown fields are refused, a field that is not sent is UNSET, null is refused."""


class View(msgspec.Struct, kw_only=True, rename="camel", omit_defaults=True):
    """A shape that goes outside: absent members are left out, never null."""


class FieldError(msgspec.Struct, frozen=True):
    """`pointer`: RFC 6901 pointer to the member of the request; empty for the whole of it."""

    pointer: str
    code: str
    message: str
