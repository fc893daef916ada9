"""The mechanics of a REST call: read it, answer it, and say as a problem why not."""

from __future__ import annotations

import math
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Hashable
from functools import cache
from typing import Any, NamedTuple

import msgspec
import structlog
from aiohttp import hdrs, web
from msgspec import inspect as info

from models.errors import Malformed, NotFound, Refused, TooLarge, UnsupportedMedia
from models.user import Actor
from server import metrics
from server.doors import Answer, convert
from server.edges import CALLER

log = structlog.get_logger()

RETRY_AFTER_MS = 1000
"""When to come back after a refusal that does not know it better."""

INTEGER = re.compile(r"-?[0-9]{1,20}")
REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Call(NamedTuple):
    """A request that was read: by whom, on which order ("" for none), with which command."""

    request: web.Request
    actor: Actor
    order_id: str
    command: Any


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
    except web.RequestPayloadError:
        raise Malformed("The body is cut off, or is not what its headers say.") from None


def query(request: web.Request, type_: Any) -> Any:
    """The query parameters as a command. A repeated parameter is malformed."""
    given = request.query
    if len(set(given)) != len(given):
        raise Malformed("A query parameter is given twice.")
    # only what is an integer by its type is read as one: msgspec's lax mode also takes `1e1`, and 0 for a time
    integers = _integers(type_)
    read = {
        name: int(value) if name in integers and INTEGER.fullmatch(value) else value for name, value in given.items()
    }
    return convert(read, type_)


@cache
def _integers(type_: Hashable) -> frozenset[str]:
    """The members of a command that are integers."""
    command = info.type_info(type_)
    assert isinstance(command, info.StructType)
    return frozenset(field.encode_name for field in command.fields if _is_integer(field.type))


def _is_integer(type_: info.Type) -> bool:
    if isinstance(type_, info.Metadata):
        return _is_integer(type_.type)
    if isinstance(type_, info.UnionType):
        return any(_is_integer(one) for one in type_.types)
    return isinstance(type_, info.IntType)


def written(given: Answer) -> web.Response:
    return web.Response(status=given.status, body=given.body, content_type="application/json")


def answer(value: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")


def error_page(kind: type[Refused]) -> str:
    """Where the refusal is explained: the `type` of its problem."""
    return f"/docs#error-{kind.code}"


def problem(refusal: Refused, request_id: str) -> web.Response:
    """A refusal as RFC 9457 says it."""
    body = {
        "type": error_page(type(refusal)),
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
    if refusal.status in (429, 503):
        wait_ms = refusal.fields.get("retryAfterMs", RETRY_AFTER_MS)
        assert isinstance(wait_ms, int)
        response.headers["Retry-After"] = str(math.ceil(wait_ms / 1000))
    return response


class _Broken(Refused):
    code, status, title = "internal", 500, "This failed on our side"


class MethodNotAllowed(Refused):
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
        response = problem(MethodNotAllowed(f"Use {', '.join(sorted(error.allowed_methods))}."), request_id)
        response.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
    except web.HTTPNotFound:
        response = problem(NotFound("There is nothing at this address; GET /docs lists the routes."), request_id)
    except web.HTTPException:
        raise
    except ConnectionResetError:
        raise
    except Exception:
        log.exception("request_failed", method=request.method, route=_route_of(request))
        response = problem(_Broken("The request failed; nothing is known of its outcome. Try again."), request_id)
    if not response.prepared:
        response.headers["X-Request-Id"] = request_id
    route = _route_of(request)
    seconds = time.perf_counter() - began
    metrics.requests.labels(request.method, route, response.status).inc()
    if response.status == 101:
        return response  # a socket's life is no request's time
    metrics.request_seconds.labels(request.method, route).observe(seconds)
    client, ms = request[CALLER].address if CALLER in request else None, round(seconds * 1000, 1)
    log.info("request", method=request.method, route=route, status=response.status, ms=ms, client=client)
    return response


def _route_of(request: web.Request) -> str:
    """The route as it is declared: an address may hold a secret."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "none"
