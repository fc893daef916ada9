"""Reconciliation: a day's captures in a gateway's books beside ours, payment by payment."""

from __future__ import annotations

from sqlalchemy import Column, Date, Table, Text

from models.base import UtcTime, metadata

reconciliations = Table(
    "reconciliations",
    metadata,
    Column("provider", Text, primary_key=True),
    # in SELLER_TIME_ZONE
    Column("day", Date, primary_key=True),
    Column("made_at", UtcTime, nullable=False),
    # JSON: what the desk answers
    Column("report", Text, nullable=False),
)
