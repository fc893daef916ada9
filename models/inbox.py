"""What we have already received: answers kept under the caller's Idempotency-Key, and webhooks of gateways."""

from __future__ import annotations

from enum import StrEnum

from sqlalchemy import Column, Index, Integer, LargeBinary, Table, Text, UniqueConstraint, Uuid, text
from sqlalchemy.dialects.postgresql import ARRAY

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
    # both empty while the verb waits for a gateway: then `subjects` are the payment or refunds that a repeat carries on
    Column("status", Integer),
    Column("answer", Text),
    Column("subjects", ARRAY(Uuid)),
    Column("created_at", UtcTime, nullable=False),
    Index("ix_idempotency_keys_created_at", "created_at"),
)


class WebhookStatus(StrEnum):
    RECEIVED = "received"
    """Stored, and not applied yet."""
    APPLIED = "applied"
    """Its news is booked, or it was of no concern to us."""
    PARKED = "parked"
    """It speaks of something that we do not know yet."""
    DEAD = "dead"
    """Given up: somebody must look at it."""
    DISMISSED = "dismissed"
    """Somebody has looked, and said why it does not matter."""


webhooks = Table(
    "webhooks",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("provider", Text, nullable=False),
    # the gateway's id of the event, the same for every repeat; kept for ever, because a signed body can be replayed
    Column("event_id", Text, nullable=False),
    Column("kind", Text, nullable=False),
    # the gateway ids that it speaks of
    Column("refs", ARRAY(Text), nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("status", Text, nullable=False),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("received_at", UtcTime, nullable=False),
    Column("next_at", UtcTime, nullable=False),
    Column("settled_at", UtcTime),
    Column("error", Text),
    Column("reason", Text),
    UniqueConstraint("provider", "event_id", name="uq_webhooks_event"),
    Index("ix_webhooks_due", "next_at", postgresql_where=text("status in ('received', 'parked')")),
    # A signed body can be sent again under another event id, which Razorpay does not sign: it is the same webhook.
    Index("uq_webhooks_body", "provider", text("sha256(body)"), unique=True),
    Index("ix_webhooks_newest", text("received_at desc"), text("id desc")),
    Index(
        "ix_webhooks_status",
        "status",
        text("received_at desc"),
        text("id desc"),
        postgresql_where=text("status <> 'applied'"),
    ),
    Index("ix_webhooks_parked", "refs", postgresql_using="gin", postgresql_where=text("status = 'parked'")),
)
