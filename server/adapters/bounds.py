"""Bounds of what gateways say: no body or answer of theirs may break a statement of ours."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from models.money import MINOR_UNITS_MAX

WORDS_CHARS_MAX = 500
"""Longest text of theirs that we keep."""

Minor = Annotated[int, Meta(ge=0, le=MINOR_UNITS_MAX)]
Currency = Annotated[str, Meta(pattern=r"\A[A-Za-z]{3}\Z")]


def words(text: str | None) -> str:
    """Text of theirs as we may store it: bounded, and without the one character that Postgres refuses."""
    return (text or "").replace("\0", "")[:WORDS_CHARS_MAX]
