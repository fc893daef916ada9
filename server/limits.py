"""Rates: how much one user or one address may ask for, counted in Redis, so that all instances share one limit; and how
fast one socket may send and one process takes sockets, counted in memory.

The count is a GCRA: for each (rate, who) Redis keeps one time, at which its quota would be whole again. One script call
judges and counts. Redis is asked once per request and waited for `RATE_LIMIT_WAIT_MS` at most; while it is away
everything is let through, and a metric says so. Who is known to be over a limit is refused from memory, so a flood
costs Redis nothing. docs/decisions/0011-edges-and-limits.md.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import NamedTuple

import hiredis
from aiohttp import web

from models.errors import RateLimited, Unavailable
from models.user import BACK_OFFICE, Actor
from server import metrics
from server.edges import Edges
from server.realtime.bus import Bus, Script
from server.realtime.quota import Quota
from server.settings import Settings

SPEND = Script(
    """
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local interval, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local known = tonumber(redis.call('GET', KEYS[1]) or now)
local empty = now + interval * burst
if known > empty + 1 then
  known = empty
  redis.call('SET', KEYS[1], string.format('%.0f', empty), 'PX', math.ceil((empty - now) / 1000))
end
local whole = math.max(now, known) + interval
local left = empty - whole
if left < -1 then return -math.ceil(-left / 1000) end
redis.call('SET', KEYS[1], string.format('%.0f', whole), 'PX', math.ceil((whole - now) / 1000))
return math.floor(math.max(left, 0) / interval)
"""
)
"""KEYS: who. ARGV: microseconds per request, burst. Replies how many are left, or minus the milliseconds to wait.

What was counted under settings that were stricter is cut to an empty quota of these: nobody waits for the old ones."""

REFUSED_MAX = 10_000
"""Most of those who are over a limit that a process remembers; further ones are judged by Redis each time."""

HANDSHAKE_AGAIN_MS = 1000
"""Least time after which to open a socket again: the process is busy with others."""

PAUSE_S = 1.0
"""How long Redis is not asked again after it did not answer in time."""

_TOO_LATE = object()


class Rate(NamedTuple):
    """A limit: a quota of `burst` that fills at `per_min`."""

    name: str
    per_min: int
    burst: int

    @property
    def window_s(self) -> int:
        """Time in which an empty quota is whole again."""
        return math.ceil(self.burst * 60 / self.per_min)

    @property
    def policy(self) -> str:
        return f'"{self.name}";q={self.burst};w={self.window_s}'


class Standing(NamedTuple):
    """What a request left of a quota."""

    rate: Rate
    left: int

    def headers(self) -> dict[str, str]:
        """As draft-ietf-httpapi-ratelimit-headers-10 says it: `r` are left, in `t` seconds the quota is whole."""
        whole_s = math.ceil((self.rate.burst - self.left) * 60 / self.rate.per_min)
        return {"RateLimit-Policy": self.rate.policy, "RateLimit": f'"{self.rate.name}";r={self.left};t={whole_s}'}


STANDING = web.RequestKey("standing", Standing)


class Limits:
    """Counts requests, events and handshakes. Everything here raises RateLimited and nothing else, but for handshakes:
    those are Unavailable, because clients come back from that by themselves."""

    def __init__(self, settings: Settings, bus: Bus, edges: Edges) -> None:
        s = settings
        self._on = s.rate_limits == "on"
        self._wait_s = s.rate_limit_wait_ms / 1000
        self._bus = bus
        self._edges = edges
        self._user_requests = Rate("user", s.rate_user_requests_per_min, s.rate_user_burst_max)
        self._user_events = Rate("user-events", s.rate_user_events_per_min, s.rate_user_burst_max)
        self._service_requests = Rate("service", s.rate_service_requests_per_min, s.rate_service_burst_max)
        self._service_events = Rate("service-events", s.rate_service_events_per_min, s.rate_service_burst_max)
        self._address = Rate("address", s.rate_address_requests_per_min, s.rate_address_burst_max)
        self._handshakes = Rate("handshakes", s.rate_address_handshakes_per_min, s.rate_address_handshakes_burst_max)
        self._per_socket = s.socket_events_per_s_max, s.socket_events_burst_max
        self._all_handshakes = Quota(s.handshakes_per_s_max, s.handshakes_burst_max)
        self._handshakes_open_max = s.handshakes_open_max
        self._refused: dict[str, float] = {}
        """Monotonic time until which a key is over its limit."""
        self._paused_until = 0.0

    # requests

    async def user(self, request: web.Request, actor: Actor) -> None:
        """A request with an accepted token."""
        rate = self._service_requests if actor.role in BACK_OFFICE else self._user_requests
        await self._request(request, rate, actor.who)

    async def stranger(self, request: web.Request) -> None:
        """A request without an accepted token."""
        if self._on:
            await self._request(request, self._address, self._edges.caller(request).network)

    async def stranger_network(self, network: str) -> None:
        """A CONNECT without an accepted token, from a caller of this network."""
        if self._on:
            await self._spend(self._address, network)

    def network_of(self, request: web.Request) -> str:
        """Whom the limits of strangers count: the caller's address, or its network where many belong to one."""
        return self._edges.caller(request).network

    async def handshake(self, request: web.Request) -> None:
        """A socket that is being opened.

        Raises:
            Unavailable: over the limit; clients come back by themselves.
        """
        if not self._on:
            return
        try:
            await self._spend(self._handshakes, self._edges.caller(request).network)
        except RateLimited as refusal:
            raise Unavailable("Too many sockets are being opened from this address.", **refusal.fields) from None

    def admit(self, unconnected: int) -> None:
        """A socket that is being opened at this process, where so many have not said yet who they are.

        Raises:
            Unavailable: it takes no more for now, so that those who are connected go on hearing in time.
        """
        if not self._on:
            return
        now = time.monotonic()
        wait_s = self._all_handshakes.wait_s(now)
        full = unconnected >= self._handshakes_open_max
        if wait_s or full:
            metrics.rate_limited.labels("handshakes-open" if full else "handshakes-all").inc()
            wait_ms = max(math.ceil(wait_s * 1000), HANDSHAKE_AGAIN_MS)
            raise Unavailable("Too many sockets are being opened at this instance.", retryAfterMs=wait_ms)
        self._all_handshakes.take(now)

    async def _request(self, request: web.Request, rate: Rate, who: str) -> None:
        if not self._on:
            return
        try:
            left = await self._spend(rate, who)
        except RateLimited:
            request[STANDING] = Standing(rate, 0)
            raise
        if left is not None:
            request[STANDING] = Standing(rate, left)

    async def on_prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        """Called by aiohttp right before the headers of any answer are written."""
        standing = request.get(STANDING)
        if standing is not None:
            response.headers.update(standing.headers())

    # sockets

    def socket_quota(self) -> Quota | None:
        """Of what a new socket may send; None: as much as it likes. What comes too fast is not refused, it waits on
        the sender's side."""
        return Quota(*self._per_socket) if self._on else None

    async def event(self, actor: Actor) -> None:
        """An event that is about to be carried out."""
        if self._on:
            await self._spend(*self._of_events(actor))

    def check_event(self, actor: Actor) -> None:
        """Refuse who is known to be over the limit, without asking Redis."""
        if self._on and self._refused:
            rate, who = self._of_events(actor)
            self._check(rate, _key(rate, who), time.monotonic())

    def count_event(self, actor: Actor) -> None:
        """Count an event that is refused anyway: nobody waits for this, it shows in the next check."""
        if self._on and self._bus.up:
            rate, who = self._of_events(actor)
            key = _key(rate, who)

            def answer(reply: object) -> None:
                if isinstance(reply, int) and reply < 0:
                    self._remember(key, -reply, time.monotonic())

            self._ask(rate, key, answer)

    def _of_events(self, actor: Actor) -> tuple[Rate, str]:
        rate = self._service_events if actor.role in BACK_OFFICE else self._user_events
        return rate, actor.who

    # counting

    async def _spend(self, rate: Rate, who: str) -> int | None:
        """How many are left; None: nobody knows, Redis is away."""
        now = time.monotonic()
        key = _key(rate, who)
        self._check(rate, key, now)
        if not self._bus.up or now < self._paused_until:
            metrics.rates_not_counted.labels("away").inc()
            return None
        loop = asyncio.get_running_loop()
        future: asyncio.Future[object] = loop.create_future()

        def answer(reply: object) -> None:
            if not future.done():
                future.set_result(reply)

        late = loop.call_later(self._wait_s, answer, _TOO_LATE)
        self._ask(rate, key, answer)
        reply = await future
        late.cancel()
        if isinstance(reply, int):
            if reply < 0:
                self._remember(key, -reply, now)
                raise self._over(rate, -reply)
            return reply
        if reply is _TOO_LATE:
            self._paused_until = now + PAUSE_S
        elif isinstance(reply, hiredis.ReplyError) and str(reply).startswith("NOSCRIPT"):
            self._bus.load_scripts()  # somebody flushed Redis' scripts
        metrics.rates_not_counted.labels("late" if reply is _TOO_LATE else "error").inc()
        return None

    def _ask(self, rate: Rate, key: str, answer: object) -> None:
        interval_us = 60_000_000 / rate.per_min
        self._bus.send(("EVALSHA", SPEND.digest, 1, key, repr(interval_us), rate.burst), answer)  # type: ignore[arg-type]

    def _check(self, rate: Rate, key: str, now: float) -> None:
        until = self._refused.get(key)
        if until is None:
            return
        if until <= now:
            del self._refused[key]
            return
        raise self._over(rate, math.ceil((until - now) * 1000))

    def _remember(self, key: str, wait_ms: int, now: float) -> None:
        self._refused[key] = now + wait_ms / 1000
        if len(self._refused) > REFUSED_MAX:
            del self._refused[next(iter(self._refused))]

    def _over(self, rate: Rate, wait_ms: int) -> RateLimited:
        metrics.rate_limited.labels(rate.name).inc()
        return RateLimited(f"{rate.per_min} a minute are taken, {rate.burst} at once.", retry_after_ms=wait_ms)


def _key(rate: Rate, who: str) -> str:
    return f"waybill:rate:{rate.name}:{who}"
