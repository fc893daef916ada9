"""The links desk: hand out a link to one order, take it back, exchange its secret for a guest token."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from handlers.context import Tx
from handlers.orders import SEEN, order_uuid
from models.base import Strict, View, rfc3339
from models.errors import Invalid, LinkExpired, NotFound
from models.order import require_role, sight
from models.user import BACK_OFFICE, Actor, Role, Scope


class CreateLink(Strict):
    SCHEMA: ClassVar[dict[str, Any]] = {"examples": [{"ttlS": 86400}]}

    ttl_s: Annotated[int, Meta(ge=1, description="life in seconds, LINK_TTL_MAX_S at most")] | UnsetType = UNSET


class Link(View):
    """A link without its secrets; the door adds `url` and `token`, which are made from the id and never stored."""

    id: str
    order_id: str
    scope: Scope
    expires_at: str


CREATE = f"""
insert into links (id, order_id, scope, secret_digest, created_at, expires_at)
select $5, o.id, $6, $7, $8, $9 from orders o where o.id = $1 and {SEEN}
returning order_id"""


MAKERS = {Scope.TRACK: BACK_OFFICE | {Role.CUSTOMER}, Scope.PAY: BACK_OFFICE}
"""Who hands out links: its customer pays with the token that it has, a payment link is the shop asking for money."""


async def create_link(
    tx: Tx,
    actor: Actor,
    order_id: str,
    cmd: CreateLink,
    *,
    scope: Scope,
    digest: Callable[[str], bytes],
    ttl_s: int,
    ttl_max_s: int,
) -> Link:
    """A new link. `digest` gives the digest of the secret that belongs to a link's id.

    Raises:
        NotFound, Forbidden; Invalid: a longer life than `LINK_TTL_MAX_S`.
    """
    require_role(actor, MAKERS[scope], f"create links of scope {scope}")
    life_s = ttl_s if isinstance(cmd.ttl_s, UnsetType) else cmd.ttl_s
    if life_s > ttl_max_s:
        raise Invalid(f"A link lives {ttl_max_s} seconds at most.", "/ttlS")
    seen, now, link_id = sight(actor, order_id), tx.now(), tx.new_id()
    expires_at = now + dt.timedelta(seconds=life_s)
    created = await tx.one(
        CREATE,
        order_uuid(order_id),
        seen.all,
        seen.customer,
        seen.agent,
        uuid.UUID(link_id),
        scope,
        digest(link_id),
        now,
        expires_at,
    )
    if created is None:
        raise NotFound("There is no such order.")
    return Link(id=link_id, order_id=order_id, scope=scope, expires_at=rfc3339(expires_at))


# The guest's token carries the link's id as its `jti`, so ending a link is the revocation of that token.
END = f"""
with ended as (
    update links k set revoked_at = coalesce(k.revoked_at, $6) from orders o
    where k.id = $5 and k.order_id = o.id and o.id = $1 and {SEEN}
    returning k.id
)
insert into revocations (kind, value, revoked_at) select 'jti', ended.id::text, $6 from ended
on conflict (kind, value) do update set revoked_at = revocations.revoked_at
returning value"""


async def end_link(tx: Tx, actor: Actor, order_id: str, link_id: str) -> str:
    """End a link, and with it every token it was exchanged for. Returns the revoked `jti`.

    Raises:
        NotFound, Forbidden.
    """
    require_role(actor, BACK_OFFICE | {Role.CUSTOMER}, "end links")
    seen = sight(actor, order_id)
    ended = await tx.one(END, order_uuid(order_id), seen.all, seen.customer, seen.agent, order_uuid(link_id), tx.now())
    if ended is None:
        raise NotFound("There is no such link.")
    return link_id


FOLLOW = "select id, order_id, scope, expires_at, revoked_at from links where secret_digest = $1"


class Grant(msgspec.Struct, frozen=True):
    """What the secret of a living link stands for."""

    link_id: str
    order_id: str
    scope: Scope
    expires_at: dt.datetime


async def follow_link(tx: Tx, digest: bytes) -> Grant:
    """What a link's secret grants. `digest` is the sha-256 of the secret.

    Raises:
        NotFound: no such link. LinkExpired: its time is over, or it was ended.
    """
    row = await tx.one(FOLLOW, digest)
    if row is None:
        raise NotFound("There is no such link.")
    if row["revoked_at"] is not None or row["expires_at"] <= tx.now():
        raise LinkExpired("This link has ended; ask the shop for a new one.")
    return Grant(str(row["id"]), str(row["order_id"]), Scope(row["scope"]), row["expires_at"])
