"""The REST functions of links and of the tokens that they are exchanged for."""

from __future__ import annotations

import datetime as dt
import time
from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import Meta

from handlers import links, users
from models.base import Time, UuidText, rfc3339
from models.user import Scope
from server.auth import secret_digest
from server.calls import Call, answer
from server.context import Rest
from server.doors import Verb

REVOKE = Verb("revoke", users.revoke)


class FollowLink(msgspec.Struct, forbid_unknown_fields=True):
    secret: Annotated[
        str, Meta(min_length=1, max_length=200, description="what follows /track/ or /pay/ in the link's url")
    ]


class FollowedLink(msgspec.Struct, rename="camel"):
    token: Annotated[str, Meta(description="a bearer token, a JWT")]
    order_id: UuidText
    scope: Scope
    expires_at: Time


class CreatedLink(msgspec.Struct, rename="camel"):
    id: UuidText
    url: Annotated[str, Meta(description="for people: opens the page")]
    token: Annotated[str, Meta(description="for programs: a bearer token, a JWT")]
    scope: Scope
    expires_at: Time


async def create_tracking_link(rest: Rest, call: Call) -> web.Response:
    return await _answer_link(rest, call, Scope.TRACK, "track")


async def create_payment_link(rest: Rest, call: Call) -> web.Response:
    return await _answer_link(rest, call, Scope.PAY, "pay")


async def _answer_link(rest: Rest, call: Call, scope: Scope, page: str) -> web.Response:
    """A link. Its secrets are made from its id each time the answer is given, and kept nowhere."""
    given = await rest.perform(call, rest.links.create[scope])
    link = msgspec.json.decode(given.body, type=links.Link)
    token = rest.authenticator.guest_token(
        link_id=link.id,
        order_id=link.order_id,
        scope=link.scope,
        expires_at=dt.datetime.fromisoformat(link.expires_at).timestamp(),
    )
    url = f"{rest.public_url}/{page}/{rest.authenticator.link_secret(link.id)}"
    return answer(CreatedLink(link.id, url, token, link.scope, link.expires_at), status=given.status)


async def end_link(rest: Rest, call: Call) -> web.Response:
    async with rest.doors.database.statement() as tx:
        link_id = await links.end_link(tx, call.actor, call.order_id, call.request.match_info["link_id"])
    rest.on_revoked(users.Revoked("jti", link_id, time.time()))
    return web.Response(status=204)


async def follow_link(rest: Rest, call: Call) -> web.Response:
    """Exchange a link's secret for a short guest token."""
    command: FollowLink = call.command
    async with rest.doors.database.statement() as tx:
        grant = await links.follow_link(tx, secret_digest(command.secret))
    expires_at = min(grant.expires_at.timestamp(), time.time() + rest.settings.guest_token_ttl_s)
    token = rest.authenticator.guest_token(
        link_id=grant.link_id, order_id=grant.order_id, scope=grant.scope, expires_at=expires_at
    )
    at = rfc3339(dt.datetime.fromtimestamp(expires_at, dt.UTC))
    return answer(FollowedLink(token, grant.order_id, grant.scope, at))


async def revoke(rest: Rest, call: Call) -> web.Response:
    given = await rest.perform(call, REVOKE)
    rest.on_revoked(msgspec.json.decode(given.body, type=users.Revoked))
    return web.Response(status=204)
