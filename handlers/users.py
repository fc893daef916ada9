"""The users desk. Until there are accounts it does one thing: it ends tokens before their time."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from handlers.context import Tx
from models.base import Id, Strict
from models.errors import Invalid
from models.order import require_role
from models.user import Actor, Role


class Revoke(Strict):
    """Either of the two."""

    SCHEMA: ClassVar[dict[str, Any]] = {
        "oneOf": [{"required": ["jti"]}, {"required": ["sub"]}],
        "examples": [{"sub": "c1"}],
    }

    jti: Annotated[Id, Meta(description="one token, or one link")] | UnsetType = UNSET
    sub: Annotated[Id, Meta(description="every token that this person was given until now")] | UnsetType = UNSET


class Revoked(msgspec.Struct, frozen=True):
    """One revocation. `at` is Unix seconds: a `sub` loses the tokens that were issued until then."""

    kind: str
    value: str
    at: float


REVOKE = """
insert into revocations (kind, value, revoked_at) values ($1, $2, $3)
on conflict (kind, value) do update set revoked_at = greatest(revocations.revoked_at, excluded.revoked_at)"""


async def revoke(tx: Tx, actor: Actor, cmd: Revoke) -> Revoked:
    """Revoke one token (`jti`), or every token of a person that was issued until now (`sub`).

    Raises:
        Forbidden; Invalid: not exactly one of the two.
    """
    require_role(actor, {Role.SERVICE, Role.ADMIN}, "revoke tokens")
    given = [(kind, value) for kind, value in (("jti", cmd.jti), ("sub", cmd.sub)) if not isinstance(value, UnsetType)]
    if len(given) != 1:
        raise Invalid("Name either a jti or a sub.", "/jti")
    (kind, value), now = given[0], tx.now()
    await tx.one(REVOKE, kind, value, now)
    return Revoked(kind, value, now.timestamp())


REVOCATIONS = "select kind, value, revoked_at from revocations"


async def revocations(tx: Tx) -> list[Revoked]:
    """Everything that is revoked."""
    return [Revoked(kind, value, at.timestamp()) for kind, value, at in await tx.all(REVOCATIONS)]
