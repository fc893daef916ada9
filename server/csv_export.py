"""Lists as CSV: the columns are the members of what is listed, and the rows leave page by page.

The text is RFC 4180 in UTF-8 with a header row and without a byte order mark. A member of a member has a dotted name
(`totals.total`), a list is JSON in its cell, an absent member is an empty cell.

A cell that starts with one of RISKY would be run by a spreadsheet as a formula, so it is quoted, and text gets an
apostrophe in front; a negative number runs nothing and stays a number.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
import structlog
from aiohttp import hdrs, web
from msgspec import inspect

from models.errors import Refused

log = structlog.get_logger()

MEDIA = "text/csv"

RISKY = ("=", "+", "-", "@", "\t", "\r")
"""How a cell starts that a spreadsheet takes for a formula."""

_SPECIAL = (",", '"', "\r", "\n")


class Column(NamedTuple):
    name: str
    path: tuple[str, ...]


def columns(type_: type[msgspec.Struct]) -> list[Column]:
    """The columns of a list of `type_`: its members in their order, those of its members flattened."""
    found = inspect.type_info(type_)
    assert isinstance(found, inspect.StructType)
    return list(_columns(found, ()))


def _columns(struct: inspect.StructType, above: tuple[str, ...]) -> Iterable[Column]:
    for field in struct.fields:
        path = (*above, field.encode_name)
        kinds = field.type.types if isinstance(field.type, inspect.UnionType) else (field.type,)
        inner = next((kind for kind in kinds if isinstance(kind, inspect.StructType)), None)
        if inner is not None:
            yield from _columns(inner, path)
        else:
            yield Column(".".join(path), path)


def header(columns: Sequence[Column]) -> bytes:
    return _line(column.name for column in columns)


def rows(columns: Sequence[Column], items: Iterable[msgspec.Struct]) -> bytes:
    return b"".join(_line(_at(item, column.path) for column in columns) for item in map(msgspec.to_builtins, items))


def _at(item: Any, path: tuple[str, ...]) -> object:
    for name in path:
        if item is None:
            return None
        item = item.get(name)
    return item


def _line(values: Iterable[object]) -> bytes:
    return (",".join(map(_cell, values)) + "\r\n").encode()


def _cell(value: object) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    risky = text.startswith(RISKY)
    if risky and isinstance(value, str):
        text = "'" + text
    if risky or any(special in text for special in _SPECIAL):
        return '"' + text.replace('"', '""') + '"'
    return text


async def answer(
    name: str,
    type_: type[msgspec.Struct],
    pages: AsyncIterator[Sequence[msgspec.Struct]],
) -> web.Response:
    """The answer that downloads `pages` as the file `name`.

    The first page is read before the answer starts, so what refuses the list refuses the export. When a later page
    cannot be read the connection is cut: a client must not take half a list for the whole.
    """
    found = columns(type_)
    first = await anext(pages)

    async def chunks() -> AsyncIterator[bytes]:
        yield header(found) + rows(found, first)
        try:
            async for page in pages:
                yield rows(found, page)
        except Refused as refusal:
            log.warning("export_cut", file=name, code=refusal.code)
            raise ConnectionResetError("a page could not be read") from refusal

    return web.Response(
        body=chunks(),
        headers={
            hdrs.CONTENT_TYPE: f"{MEDIA}; charset=utf-8",
            hdrs.CONTENT_DISPOSITION: f'attachment; filename="{name}"',
        },
    )
