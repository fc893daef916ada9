"""All tables together, for migrations and for the test that compares them with the migrated database."""

from __future__ import annotations

from models import event, inbox, link, order, position, user
from models.base import metadata

__all__ = ["event", "inbox", "link", "metadata", "order", "position", "user"]
