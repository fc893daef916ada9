"""What we have already received: answers kept under the caller's Idempotency-Key."""

from __future__ import annotations

from sqlalchemy import Column, Index, Integer, LargeBinary, Table, Text

from models.base import UtcTime, metadata

KEY_CHARACTERS_MAX = 255
"""Longest Idempotency-Key."""

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("caller", Text, primary_key=True),
    Column("verb", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    # sha-256 of the parsed command: another command under the same key is refused
    Column("fingerprint", LargeBinary, nullable=False),
    Column("status", Integer, nullable=False),
    Column("answer", Text, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Index("ix_idempotency_keys_created_at", "created_at"),
)
