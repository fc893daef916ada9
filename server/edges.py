"""The outermost layer: where a request really comes from, which pages may send it, what every answer carries, and the
limit on the whole of a request.

Tokens are bearer tokens, never cookies, so no answer allows credentials: a page of another origin can do nothing here
that a program could not. docs/decisions/0011-edges-and-limits.md.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import NamedTuple
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from models.errors import Unavailable
from server import settings as settings_page
from server.settings import Settings

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

OPEN_PATHS = ("/api/", "/socket.io/", "/openapi.json", "/asyncapi.json")
"""Where pages of other origins may be allowed. The rest of the server is for people and operators."""

UNTIMED_PATH = "/socket.io/"
"""Polls last as long as the ping interval says, sockets as long as they like."""

METHODS = "GET, POST, PUT, PATCH, DELETE"
REQUEST_HEADERS = "Authorization, Content-Type, Idempotency-Key, If-Match, If-None-Match, X-Cart-Token, X-Request-Id"
EXPOSED_HEADERS = "ETag, RateLimit, RateLimit-Policy, Retry-After, X-Request-Id"
PREFLIGHT_AGE_S = 7200
"""How long a browser may remember a preflight; none keeps it longer."""

HSTS_AGE_S = 365 * 24 * 3600

NO_FRAMES = "frame-ancestors 'none'"


class Caller(NamedTuple):
    """Where a request comes from, after what trusted proxies say of it."""

    address: str
    secure: bool
    host: str

    @property
    def network(self) -> str:
        """What limits count: the address, or its /64, since one customer of an IPv6 network has all of that."""
        if ":" not in self.address:
            return self.address
        return str(ipaddress.ip_network((self.address, 64), strict=False))


CALLER = web.RequestKey("caller", Caller)


def protect(headers: MutableMapping[str, str]) -> None:
    """What every answer carries, unless the page that makes it said otherwise."""
    headers.setdefault("X-Content-Type-Options", "nosniff")
    headers.setdefault("Referrer-Policy", "no-referrer")
    headers.setdefault("X-Frame-Options", "DENY")
    policy = headers.get("Content-Security-Policy")
    if policy is None:
        page = headers.get(hdrs.CONTENT_TYPE, "").startswith("text/html")
        headers["Content-Security-Policy"] = NO_FRAMES if page else f"default-src 'none'; {NO_FRAMES}"
    elif "frame-ancestors" not in policy:
        headers["Content-Security-Policy"] = f"{policy}; {NO_FRAMES}"
    headers.pop(hdrs.SERVER, None)  # the versions in it help nobody but attackers


class Edges:
    """The settings of the outermost layer at work."""

    def __init__(self, settings: Settings) -> None:
        self._origins = settings_page.origins(settings.cors_origins)
        self._proxies = settings_page.networks(settings.trusted_proxies)
        self._hsts = settings.production
        self._request_s = settings.request_timeout_ms / 1000
        self._wait_s = settings.long_poll_max_s

    # where a request comes from

    def caller(self, request: web.Request) -> Caller:
        known: Caller | None = request.get(CALLER)
        if known is None:
            known = request[CALLER] = self._find_caller(request)
        return known

    def _find_caller(self, request: web.Request) -> Caller:
        address = _plain(request.remote or "")
        if not self._trusted(address):
            return Caller(address, request.secure, request.host)
        # every proxy appends whom it heard from, so only what trusted ones wrote is true: it is read from the right
        hops = [hop.strip() for line in request.headers.getall("X-Forwarded-For", ()) for hop in line.split(",")]
        while hops and self._trusted(address):
            hop = _plain(hops.pop())
            if not hop:
                break
            address = hop
        scheme, host = (_nearest(request, f"X-Forwarded-{name}") for name in ("Proto", "Host"))
        return Caller(address, request.secure or scheme.lower() in ("https", "wss"), host or request.host)

    def _trusted(self, address: str) -> bool:
        if not self._proxies or not address:
            return False
        parsed = ipaddress.ip_address(address)
        return any(parsed in network for network in self._proxies if network.version == parsed.version)

    # who may ask from a page

    def welcomes(self, request: web.Request) -> bool:
        """Whether a page of the request's origin may speak to this server. What is no browser says no origin."""
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is None or self._allows(origin):
            return True
        # the scheme is not compared: behind a proxy that is not trusted, nobody here knows it
        return urlsplit(origin).netloc.lower() == self.caller(request).host.lower()

    def _allows(self, origin: str) -> bool:
        return "*" in self._origins or origin.lower() in self._origins

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer preflights, and end what takes longer than `REQUEST_TIMEOUT_MS`."""
        self.caller(request)  # known from here on, for the log and the limits
        if request.method == hdrs.METH_OPTIONS and self._is_preflight(request):
            return web.Response(
                status=204,
                headers={
                    hdrs.ACCESS_CONTROL_ALLOW_METHODS: METHODS,
                    hdrs.ACCESS_CONTROL_ALLOW_HEADERS: REQUEST_HEADERS,
                    hdrs.ACCESS_CONTROL_MAX_AGE: str(PREFLIGHT_AGE_S),
                },
            )
        if request.path.startswith(UNTIMED_PATH):
            return await handler(request)
        limit_s = self._request_s + (self._wait_s if "wait=" in request.query_string else 0)
        try:
            async with asyncio.timeout(limit_s) as limit:
                return await handler(request)
        except TimeoutError:
            if not limit.expired():
                raise
            raise Unavailable("This took too long; nothing is known of its outcome. Try again.") from None

    def _is_preflight(self, request: web.Request) -> bool:
        return (
            hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
            and request.path.startswith(OPEN_PATHS)
            and self._allows(request.headers.get(hdrs.ORIGIN, ""))
        )

    # what answers carry

    async def on_prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        """Called by aiohttp right before the headers of any answer are written."""
        headers = response.headers
        protect(headers)
        if request.path.startswith(OPEN_PATHS):
            headers.setdefault(hdrs.CACHE_CONTROL, "no-store")
            if self._origins:
                self._allow_origin(request, headers)
        if self._hsts and self.caller(request).secure:
            headers.setdefault("Strict-Transport-Security", f"max-age={HSTS_AGE_S}; includeSubDomains")

    def _allow_origin(self, request: web.Request, headers: MutableMapping[str, str]) -> None:
        origin = request.headers.get(hdrs.ORIGIN)
        everybody = "*" in self._origins
        if not everybody:
            headers[hdrs.VARY] = f"{headers[hdrs.VARY]}, Origin" if hdrs.VARY in headers else "Origin"
        if origin is not None and self._allows(origin):
            headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = "*" if everybody else origin
            headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = EXPOSED_HEADERS


@functools.lru_cache(maxsize=1024)
def _plain(hop: str) -> str:
    """The address in `203.0.113.7`, `203.0.113.7:4711`, `2001:db8::1`, `[2001:db8::1]:4711`; "" when there is none."""
    if hop.startswith("["):
        hop = hop[1:].partition("]")[0]
    elif hop.count(":") == 1:
        hop = hop.partition(":")[0]
    try:
        address = ipaddress.ip_address(hop.partition("%")[0])
    except ValueError:
        return ""
    return str(getattr(address, "ipv4_mapped", None) or address)


def _nearest(request: web.Request, header: str) -> str:
    """What the nearest proxy wrote last."""
    return request.headers.get(header, "").rpartition(",")[2].strip()
