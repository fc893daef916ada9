"""Who is asking: roles, and what a token says of its bearer."""

from __future__ import annotations

from enum import StrEnum

import msgspec
from sqlalchemy import Column, Index, Table, Text

from models.base import UtcTime, metadata

revocations = Table(
    "revocations",
    metadata,
    # jti: one token or link; sub: every token of a person that was issued until then
    Column("kind", Text, primary_key=True),
    Column("value", Text, primary_key=True),
    Column("revoked_at", UtcTime, nullable=False),
    Index("ix_revocations_revoked_at", "revoked_at"),
)


class Role(StrEnum):
    CUSTOMER = "customer"
    AGENT = "agent"
    STAFF = "staff"
    ADMIN = "admin"
    SERVICE = "service"
    GUEST = "guest"


class Scope(StrEnum):
    """What a guest may do with the orders of its token."""

    TRACK = "track"
    PAY = "pay"


STAFF = frozenset({Role.STAFF, Role.ADMIN})
BACK_OFFICE = STAFF | {Role.SERVICE}
"""Roles that see every order."""


class Actor(msgspec.Struct, frozen=True):
    """The bearer of an accepted token. Times are Unix seconds, as the claims carry them."""

    sub: str
    role: Role
    exp: float
    iat: float | None = None
    jti: str | None = None
    orders: frozenset[str] | None = None
    """Order ids that the token is narrowed to; None: not narrowed. For a guest it is the only grant."""
    scope: Scope | None = None
    """Set for guests only."""

    @property
    def who(self) -> str:
        """Whose keys, rates and sessions these are: two roles of one subject are two people."""
        return f"{self.role}:{self.sub}"

    @property
    def is_staff(self) -> bool:
        return self.role in STAFF

    @property
    def tracks_only(self) -> bool:
        """A guest that reads one order, redacted."""
        return self.role is Role.GUEST and self.scope is not Scope.PAY

    def reaches(self, order_id: str) -> bool:
        """Whether the token's `orders` claim leaves this order in reach. It narrows; only to guests it grants."""
        return self.orders is None or order_id in self.orders
