"""The audit log: what staff and services did to money and rights. Rows are only ever added."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Identity, Index, Table, Text

from models.base import UtcTime, add_only, metadata

audit = Table(
    "audit",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("at", UtcTime, nullable=False),
    # role and subject of who did it
    Column("actor", Text, nullable=False),
    # what was done, as `payment.capture`
    Column("action", Text, nullable=False),
    # to what, as `payment:ID`
    Column("subject", Text, nullable=False),
    # JSON
    Column("before", Text),
    Column("after", Text),
    Column("request_id", Text),
    Index("ix_audit_subject", "subject", "id"),
    Index("ix_audit_actor", "actor", "id"),
    Index("ix_audit_at", "at"),
)

add_only(audit)
