"""A link that lets a guest follow (or pay for) one order without an account: random, scoped, revocable, expiring."""

from __future__ import annotations

from sqlalchemy import Column, ForeignKey, Index, LargeBinary, Table, Text, Uuid

from models.base import UtcTime, metadata

links = Table(
    "links",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("order_id", Uuid, ForeignKey("orders.id"), nullable=False),
    Column("scope", Text, nullable=False),
    # sha-256 of the secret in the URL: who reads the table cannot follow the link
    Column("secret_digest", LargeBinary, nullable=False, unique=True),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime, nullable=False),
    Column("revoked_at", UtcTime),
    Index("ix_links_order_id", "order_id"),
)
