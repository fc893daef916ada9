"""The REST door: ROUTES is every URL, one line each; the functions below read requests and write answers."""

from __future__ import annotations

import datetime as dt
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, NamedTuple

import msgspec
import structlog
from aiohttp import hdrs, web
from msgspec import Meta

from handlers import links, orders, users
from handlers.context import Tx
from models.errors import Malformed, NotFound, Refused, TooLarge, Unavailable, UnsupportedMedia
from models.position import Position
from models.user import Actor
from server import metrics
from server.auth import Authenticator, bearer, secret_digest
from server.doors import Answer, Doors, Verb, convert, decode
from server.locations import Locations
from server.realtime.positions import PositionLane
from server.settings import Settings
from server.sockets import CHANGE_STATUS, Sockets, listed

log = structlog.get_logger()

API = "/api/v1"
REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Rest:
    """The functions behind the routes, and what they need."""

    def __init__(
        self,
        settings: Settings,
        doors: Doors,
        authenticator: Authenticator,
        sockets: Sockets,
        locations: Locations,
        lane: PositionLane,
        on_revoked: Callable[[users.Revoked], None],
        takes_requests: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._doors = doors
        self._authenticator = authenticator
        self._sockets = sockets
        self._locations = locations
        self._on_revoked = on_revoked
        self._takes_requests = takes_requests
        self.public_url = settings.public_url
        """What links start with; the process fills it in when it knows its port."""

        async def before_assign(tx: Tx, actor: Actor, order_id: str, command: orders.Assign) -> None:
            await orders.before_assign(tx, actor, order_id, command, lane)

        async def create_link(tx: Tx, actor: Actor, order_id: str, command: links.CreateLink) -> links.Link:
            return await links.create_tracking_link(
                tx,
                actor,
                order_id,
                command,
                digest=lambda link_id: secret_digest(authenticator.link_secret(link_id)),
                ttl_s=settings.link_ttl_s,
                ttl_max_s=settings.link_ttl_max_s,
            )

        self._assign = Verb("assign", orders.assign, before=before_assign)
        self._create_link = Verb("create_tracking_link", create_link, status=201)

    # orders

    async def place(self, request: web.Request) -> web.Response:
        return await self._perform(request, Verb("place", orders.place, status=201), orders.Place)

    async def quote(self, request: web.Request) -> web.Response:
        return await self._perform(request, Verb("quote", orders.quote), orders.Place)

    async def list_orders(self, request: web.Request) -> web.Response:
        actor = await self._actor(request)
        command = query(request, orders.ListOrders)
        async with self._doors.database.statement() as tx:
            return answer(await orders.list_orders(tx, actor, command))

    async def read(self, request: web.Request) -> web.Response:
        actor = await self._actor(request)
        async with self._doors.database.statement() as tx:
            return answer(await orders.read(tx, actor, request.match_info["order_id"]))

    async def events(self, request: web.Request) -> web.Response:
        """The order's events. `wait` holds the request, but no database connection, until there are some."""
        actor = await self._actor(request)
        order_id, asked = request.match_info["order_id"], query(request, ReadEvents)
        found: list[orders.Timeline] = []

        async def look() -> tuple[bool, int]:
            async with self._doors.database.statement() as tx:
                found.append(await orders.events(tx, actor, order_id, asked.after))
            return bool(found[-1].events), found[-1].seq

        await look()
        wait_s = min(asked.wait, self._settings.long_poll_max_s)
        if wait_s and not found[-1].events:
            await self._sockets.rooms.wait(order_id, look, wait_s)
        return answer({"events": listed(found[-1].events), "seq": found[-1].seq})

    async def change_status(self, request: web.Request) -> web.Response:
        return await self._perform(request, CHANGE_STATUS, orders.ChangeStatus)

    async def assign(self, request: web.Request) -> web.Response:
        return await self._perform(request, self._assign, orders.Assign)

    async def cancel(self, request: web.Request) -> web.Response:
        return await self._perform(request, Verb("cancel", orders.cancel), orders.Cancel)

    async def locate(self, request: web.Request) -> web.Response:
        """One position, or a batch of them; each is judged by itself."""
        actor = await self._actor(request)
        order_id = request.match_info["order_id"]
        body = decode(await read_json(request), dict[str, Any])
        batch = isinstance(body.get("positions"), list)
        given = body["positions"] if batch else [body]
        if len(given) > self._settings.location_batch_max:
            raise TooLarge(f"One request takes {self._settings.location_batch_max} positions at most.")
        # all are read before one is shown: a request that is refused changes nothing
        found = [convert(one, Position) for one in given] if not batch else convert(body, _Batch).positions
        for position in found:
            await self._locations.accept(actor, order_id, position, "-")
        return answer(
            {"accepted": len(found), "refused": [], "nextIntervalMs": self._settings.location_next_interval_ms}
        )

    # links and tokens

    async def create_link(self, request: web.Request) -> web.Response:
        """A link. Its secrets are made from its id each time the answer is given, and kept nowhere."""
        given = await self._command(request, self._create_link, links.CreateLink)
        link = msgspec.json.decode(given.body, type=links.Link)
        expires_at = dt.datetime.fromisoformat(link.expires_at).timestamp()
        token = self._authenticator.guest_token(
            link_id=link.id, order_id=link.order_id, scope=link.scope, expires_at=expires_at
        )
        url = f"{self.public_url}/track/{self._authenticator.link_secret(link.id)}"
        told = {"id": link.id, "url": url, "token": token, "scope": link.scope, "expiresAt": link.expires_at}
        return answer(told, status=given.status)

    async def end_link(self, request: web.Request) -> web.Response:
        actor = await self._actor(request)
        async with self._doors.database.statement() as tx:
            link_id = await links.end_link(tx, actor, request.match_info["order_id"], request.match_info["link_id"])
        self._on_revoked(users.Revoked("jti", link_id, time.time()))
        return web.Response(status=204)

    async def follow_link(self, request: web.Request) -> web.Response:
        """Exchange a link's secret for a short guest token."""
        command = decode(await read_json(request), FollowLink)
        async with self._doors.database.statement() as tx:
            grant = await links.follow_link(tx, secret_digest(command.secret))
        expires_at = min(grant.expires_at.timestamp(), time.time() + self._settings.guest_token_ttl_s)
        token = self._authenticator.guest_token(
            link_id=grant.link_id, order_id=grant.order_id, scope=grant.scope, expires_at=expires_at
        )
        at = dt.datetime.fromtimestamp(expires_at, dt.UTC)
        return answer({"token": token, "orderId": grant.order_id, "scope": grant.scope, "expiresAt": at})

    async def revoke(self, request: web.Request) -> web.Response:
        given = await self._command(request, Verb("revoke", users.revoke), users.Revoke)
        self._on_revoked(msgspec.json.decode(given.body, type=users.Revoked))
        return web.Response(status=204)

    # how requests are read

    async def _actor(self, request: web.Request) -> Actor:
        if not self._takes_requests():
            raise Unavailable("This instance is starting; try again.")
        return await self._authenticator.actor(bearer(request.headers.get(hdrs.AUTHORIZATION)))

    async def _command(self, request: web.Request, verb: Verb, type_: type[Any]) -> Answer:
        actor = await self._actor(request)
        command = decode(await read_json(request), type_)
        order_id = request.match_info.get("order_id")
        args = (command,) if order_id is None else (order_id, command)
        return await self._doors.perform(verb, actor, *args, key=request.headers.get("Idempotency-Key"))

    async def _perform(self, request: web.Request, verb: Verb, type_: type[Any]) -> web.Response:
        given = await self._command(request, verb, type_)
        return web.Response(status=given.status, body=given.body, content_type="application/json")


class ReadEvents(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    after: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    wait: Annotated[int, Meta(ge=0, le=86_400)] = 0


class FollowLink(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    secret: Annotated[str, Meta(min_length=1, max_length=200)]


class _Batch(msgspec.Struct, frozen=True):
    positions: Annotated[list[Position], Meta(min_length=1)]


class Route(NamedTuple):
    method: str
    path: str
    function: Callable[[Rest, web.Request], Awaitable[web.Response]]
    doing: str


ROUTES = [
    Route("POST", "/orders", Rest.place, "place an order"),
    Route("POST", "/orders/quote", Rest.quote, "what placing it would cost; changes nothing"),
    Route("GET", "/orders", Rest.list_orders, "list the orders you see, newest first"),
    Route("GET", "/orders/{order_id}", Rest.read, "read one order"),
    Route(
        "GET", "/orders/{order_id}/events", Rest.events, "its events after a number; `wait` holds until there are some"
    ),
    Route("POST", "/orders/{order_id}/status", Rest.change_status, "move it to another status"),
    Route("POST", "/orders/{order_id}/assign", Rest.assign, "give it to an agent, or to nobody"),
    Route("POST", "/orders/{order_id}/cancel", Rest.cancel, "cancel it"),
    Route("POST", "/orders/{order_id}/location", Rest.locate, "the agent's position, or a batch of them"),
    Route("POST", "/orders/{order_id}/tracking-link", Rest.create_link, "a link to follow it without an account"),
    Route("DELETE", "/orders/{order_id}/links/{link_id}", Rest.end_link, "end a link"),
    Route("POST", "/links/follow", Rest.follow_link, "exchange a link's secret for a guest token"),
    Route("POST", "/tokens/revoke", Rest.revoke, "end a token, or all tokens of somebody"),
]


def add_routes(app: web.Application, rest: Rest) -> None:
    for method, path, function, _ in ROUTES:
        app.router.add_route(method, API + path, _bound(function, rest))


def _bound(function: Callable[[Rest, web.Request], Awaitable[web.Response]], rest: Rest) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await function(rest, request)

    return handler


def answer(value: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")


async def read_json(request: web.Request) -> bytes:
    """The body of a request that may carry JSON; empty when there is none.

    Raises:
        UnsupportedMedia: it says that it carries something else. TooLarge: above `BODY_MAX_BYTES`.
    """
    if not request.can_read_body:
        return b""
    if request.content_type != "application/json" or (request.charset or "utf-8").lower() not in ("utf-8", "utf8"):
        raise UnsupportedMedia("Send application/json in UTF-8.")
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise UnsupportedMedia("Send the body as it is, without Content-Encoding.")
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise TooLarge("The body is larger than this server takes.") from None


def query(request: web.Request, type_: type[Any]) -> Any:
    """The query parameters as a command. A repeated parameter is malformed."""
    given = request.query
    if len(set(given)) != len(given):
        raise Malformed("A query parameter is given twice.")
    return convert(dict(given), type_, strict=False)


def problem(refusal: Refused, request_id: str) -> web.Response:
    """A refusal as RFC 9457 says it."""
    body = {
        "type": f"/docs#error-{refusal.code}",
        "title": refusal.title,
        "status": refusal.status,
        "detail": refusal.detail,
        "code": refusal.code,
        "requestId": request_id,
        **refusal.fields,
    }
    response = web.Response(
        status=refusal.status, body=msgspec.json.encode(body), content_type="application/problem+json"
    )
    if refusal.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if refusal.status == 503:
        response.headers["Retry-After"] = "1"
    return response


class _Broken(Refused):
    code, status, title = "internal", 500, "This failed on our side"


class _MethodNotAllowed(Refused):
    code, status, title = "not_found", 405, "The method is not supported here"


@web.middleware
async def edge(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Around every request: its id, its refusal as an answer, its log line and its measurements."""
    began = time.perf_counter()
    given = request.headers.get("X-Request-Id", "")
    request_id = given if REQUEST_ID.fullmatch(given) else str(uuid.uuid4())
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(request_id=request_id)
    if "order_id" in request.match_info:
        structlog.contextvars.bind_contextvars(order_id=request.match_info["order_id"][:64])
    try:
        response = await handler(request)
    except Refused as refusal:
        response = problem(refusal, request_id)
    except web.HTTPMethodNotAllowed as error:
        response = problem(_MethodNotAllowed(f"Use {', '.join(sorted(error.allowed_methods))}."), request_id)
        response.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
    except web.HTTPNotFound:
        response = problem(NotFound("There is nothing at this address; GET /docs lists the routes."), request_id)
    except web.HTTPException:
        raise
    except ConnectionResetError:
        raise
    except Exception:
        log.exception("request_failed", method=request.method, path=request.path)
        response = problem(_Broken("The request failed; nothing is known of its outcome. Try again."), request_id)
    if not response.prepared:
        response.headers["X-Request-Id"] = request_id
    resource = request.match_info.route.resource
    route = resource.canonical if resource is not None else "none"
    seconds = time.perf_counter() - began
    metrics.requests.labels(request.method, route, response.status).inc()
    if response.status == 101:
        return response  # a socket's life is no request's time
    metrics.request_seconds.labels(request.method, route).observe(seconds)
    log.info("request", method=request.method, route=route, status=response.status, ms=round(seconds * 1000, 1))
    return response
