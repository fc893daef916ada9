"""All tables together, for migrations and for the test that compares them with the migrated database."""

from __future__ import annotations

from models import audit, event, inbox, ledger, link, order, payment, position, reconciliation, refund, user
from models.base import metadata

__all__ = [
    "audit",
    "event",
    "inbox",
    "ledger",
    "link",
    "metadata",
    "order",
    "payment",
    "position",
    "reconciliation",
    "refund",
    "user",
]
