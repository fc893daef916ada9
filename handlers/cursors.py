"""Where a page of a list ends: the time and the id of its last row, as a text that clients hand back unread."""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import uuid

from models.errors import Invalid


def instant(at: dt.datetime, pointer: str) -> dt.datetime:
    """`at` in UTC. Raises Invalid: without its offset it is no instant, or Postgres' calendar does not know it."""
    if at.tzinfo is None:
        raise Invalid("A time needs its offset, as in 2026-11-21T00:00:00Z.", pointer)
    try:
        return at.astimezone(dt.UTC)
    except OverflowError:
        raise Invalid("This time is out of range.", pointer) from None


def encode_cursor(at: dt.datetime, row_id: uuid.UUID) -> str:
    return base64.urlsafe_b64encode(at.isoformat().encode() + b"|" + row_id.bytes).decode()


def decode_cursor(cursor: str) -> tuple[dt.datetime, uuid.UUID]:
    """Raises Invalid: `encode_cursor` has not made it."""
    try:
        at, _, row_id = base64.urlsafe_b64decode(cursor.encode("ascii")).partition(b"|")
        return instant(dt.datetime.fromisoformat(at.decode("ascii")), "/cursor"), uuid.UUID(bytes=row_id)
    except (ValueError, binascii.Error, Invalid):
        raise Invalid("This cursor is not one of ours; start again without it.", "/cursor") from None
