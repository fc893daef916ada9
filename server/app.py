"""Wiring: the only place where the parts of a process meet, start and stop."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import asyncpg
import msgspec
import structlog
from aiohttp import web

from handlers import refund_calls
from handlers.book import House
from handlers.payments import Desk
from models.errors import Forbidden, Unavailable
from server import docs, metrics, migrate
from server.auth import Authenticator
from server.calls import edge
from server.context import Rest
from server.db import Database
from server.doors import FORGET, Doors
from server.edges import Edges
from server.gateways import GatewayRoom
from server.health import Health, watch_loop_lag
from server.house import AllThere, refund_terms, terms_of
from server.limits import SPEND, Limits
from server.locations import Locations
from server.outbox import CONTROL, Outbox, order_channel
from server.pages import Pages
from server.presence import Presence
from server.realtime.bus import Bus
from server.realtime.positions import SHOW, PositionLane
from server.rest import API, add_routes
from server.revocations import RevocationWatch
from server.settings import CannotStart, Settings
from server.sockets import Sockets
from server.timeouts import Site
from server.verbs import PaymentVerbs, RefundVerbs
from server.webhooks import WebhookDoor
from server.workers.inbox import Inbox
from server.workers.jobs import Jobs
from server.workers.reconciliation import Reconciliation, schedules
from server.workers.refunds import refund_job
from server.workers.relay import Relay
from server.workers.trail import Trail

log = structlog.get_logger()

DEFAULT_PORT = 8080
PORTS_TRIED_MAX = 20
"""How many ports from DEFAULT_PORT on are tried when PORT is not set."""

CLIENTS_LEAVE_S = 3
"""How long a drain waits for clients to answer their goodbye; those that do not are gone already."""

KEYS_SWEEP_S = 3600
"""How often idempotency keys that are too old are deleted."""

SCHEMA_POLL_S = 0.5
"""How often a process that may not migrate looks whether somebody else has."""


def utc_now() -> dt.datetime:
    """The wall clock, in whole milliseconds: the precision that the contract shows."""
    now = dt.datetime.now(dt.UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)


def bind(settings: Settings) -> socket.socket:
    """The address of this process, taken but not served yet, so that a taken port is noticed before anything starts.

    Raises:
        CannotStart: another program has it.
    """
    host, port = settings.bind_host, settings.port
    for candidate in [port] if port else range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED_MAX):
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
        except OSError as error:
            listener.close()
            why = error.strerror
            continue
        return listener
    if port:
        raise CannotStart(
            f"Port {port} on {host} cannot be used ({why}): another program has it. Stop that one or set PORT."
        )
    raise CannotStart(f"Ports {DEFAULT_PORT} to {candidate} are all taken: set PORT to a free one.")


def own_address(listener: socket.socket) -> str:
    """The URL under which this machine reaches the listener."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Process:
    """One process: it `serves` requests, `works` off what was left, or both. `migrates`: before it serves."""

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        database_url: str,
        redis_url: str,
        *,
        serves: bool,
        works: bool,
        migrates: bool,
    ) -> None:
        self._listener = listener
        self.settings = settings
        self._database_url = database_url
        self._serves, self._works, self._migrates = serves, works, migrates
        self.database = Database(database_url, settings, utc_now)
        self.bus = Bus(
            redis_url,
            timeout_s=settings.redis_timeout_ms / 1000,
            ping_interval_s=settings.bus_ping_interval_ms / 1000,
            scripts=[SHOW, SPEND],
            on_message=self._on_message,
            on_change=self._on_bus_change,
        )
        lane = PositionLane(
            self.bus,
            order_channel,
            min_interval_s=settings.location_min_interval_ms / 1000,
            keep_s=settings.location_keep_s,
        )
        self.outbox = Outbox(self.database, self.bus, lane)
        self.authenticator = Authenticator(settings)
        self.trail = Trail(
            self.database,
            interval_ms=settings.location_trail_interval_ms,
            flush_ms=settings.location_trail_flush_ms,
            buffer_max=settings.location_trail_buffer_max,
            keep_s=settings.location_trail_keep_s,
        )
        self.locations = Locations(settings, self.database, self.bus, lane, self.trail)
        doors = Doors(self.database, self.outbox, lane)
        self.gateway_room = GatewayRoom(settings, simulates=serves and works)
        self.gateways = self.gateway_room.gateways
        self.house = House(terms_of(settings), AllThere())
        desk = Desk(doors.transaction, self.gateways, self.house)
        refunds_desk = refund_calls.Desk(doors.transaction, self.gateways, refund_terms(settings))
        self.inbox = Inbox(settings, self.database, self.outbox, self.gateways, self.house)
        jobs = [*Reconciliation(desk, settings).jobs, refund_job(refunds_desk)]
        self.jobs = Jobs(self.database, settings, jobs, schedules(settings))
        self.edges = Edges(settings)
        self.limits = Limits(settings, self.bus, self.edges)
        self.sockets = Sockets(
            settings,
            doors,
            self.authenticator,
            self.bus,
            lane,
            self.locations,
            self.limits,
            lambda: self.revocations.read(),
        )
        self.presence = Presence(
            self.bus,
            flush_s=settings.presence_flush_ms / 1000,
            alive_s=settings.presence_alive_s,
            count=self.sockets.rooms.members,
            watched=self.sockets.rooms.watched,
        )
        self.sockets.rooms.on_members = self.presence.changed
        self.rest = Rest(
            settings,
            doors,
            self.authenticator,
            self.sockets,
            self.locations,
            self.limits,
            self.presence,
            WebhookDoor(settings, self.database, self.gateways, self.limits, self.inbox.wake),
            PaymentVerbs(doors, desk),
            RefundVerbs(doors, refunds_desk),
            lambda revoked: self.revocations.tell(revoked),
            lambda: self.health.revocations.is_set(),
        )
        self.relay = Relay(
            self.database,
            self.bus,
            self.outbox,
            grace_ms=settings.relay_grace_ms,
            batch_max=settings.relay_batch_max,
        )
        self.health = Health(settings, self.database, self.bus, self.sockets.rooms)
        self.health.loops_running = self._loops_running
        self._tasks: list[asyncio.Task[None]] = []
        self._runner: web.AppRunner | None = None
        self.revocations = RevocationWatch(
            settings,
            self.database,
            self.bus,
            self.authenticator.revocations,
            known=self.health.revocations,
            end_revoked=self.sockets.end_revoked,
            on_current=self._on_bus_believed,
        )
        self.port = 0

    # starting and stopping

    async def start(self) -> None:
        """Listen, then get ready in the background: a data server that does not answer yet is waited for."""
        await self.authenticator.start()
        await self.gateway_room.start(f"{own_address(self._listener)}{API}/webhooks")
        self.bus.subscribe(CONTROL)
        self._loop("postgres", self.database.run())
        self._loop("redis", self.bus.run())
        self._loop("schema", self._wait_for_schema())
        self._loop("revocations", self._when_schema_is_there(self.revocations.run))
        self._loop("outbox", self.outbox.run())
        self._loop("loop lag", watch_loop_lag())
        self._loop("backlog", self._when_schema_is_there(self.relay.watch_backlog))
        if self._serves:
            self._loop("rooms", self.sockets.rooms.run())
            self._loop("tokens", self.sockets.watch_tokens())
            self._loop("presence", self.presence.run())
            self._loop("trail", self.trail.run())
        if self._works:
            self._loop("relay", self._when_schema_is_there(self.relay.run))
            self._loop("inbox", self._when_schema_is_there(self.inbox.run))
            self._loop("left webhooks", self._when_schema_is_there(self.inbox.watch_backlog))
            self._loop("old positions", self._when_schema_is_there(self.trail.sweep))
            self._loop("jobs", self._when_schema_is_there(self.jobs.run))
            self._loop("schedules", self._when_schema_is_there(self.jobs.keep_time))
            self._loop("jobs that wait", self._when_schema_is_there(self.jobs.watch))
            self._loop("keys", self._when_schema_is_there(self._forget_old_keys))
        await self._listen()

    async def stop(self) -> None:
        """Drain: no new work, clients sent elsewhere, requests answered, what was sent marked, jobs ended. Bounded
        by `DRAIN_TIMEOUT_S`."""
        self.health.draining = True
        self.jobs.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.drain_timeout_s):
                self.sockets.rooms.close()
                # the listener stays open meanwhile, so that probes hear that we drain
                await self.sockets.drain()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(CLIENTS_LEAVE_S):
                        await self.sockets.engine.eio.empty.wait()
                if self._runner is not None:
                    await self._runner.cleanup()
                self.presence.close()
                await self.inbox.close()
                with contextlib.suppress(Exception):
                    await self.bus.answered()  # so that what was published is marked
                await self.outbox.flush()
                await self.trail.flush()
                if self._works and self.health.schema.is_set():
                    await self.jobs.drained()
        self.jobs.abandon()
        for task in reversed(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.gateway_room.stop()
        await self.database.close()
        await self.authenticator.stop()

    def _loop(self, name: str, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine, name=name)
        task.add_done_callback(_report)
        self._tasks.append(task)

    def _loops_running(self) -> bool:
        return all(not task.done() or (not task.cancelled() and task.exception() is None) for task in self._tasks)

    # the schema

    async def _wait_for_schema(self) -> None:
        await self.database.reached.wait()
        wanted = migrate.head()
        told = False
        while True:
            try:
                if self._migrates:
                    await migrate.migrate(self._database_url)
                async with self.database.statement() as tx:
                    if await migrate.at_head(tx, wanted):
                        break
                if not told:
                    told = True
                    log.warning("schema_behind", wanted=wanted, remedy="python -m server migrate")
            except (Unavailable, OSError, asyncpg.PostgresError):
                log.warning("schema_not_reached")
            await asyncio.sleep(SCHEMA_POLL_S)
        self.health.schema.set()
        log.info("schema_ready", revision=wanted)

    async def _when_schema_is_there(self, loop: Callable[[], Awaitable[None]]) -> None:
        await self.health.schema.wait()
        await loop()

    # the bus

    def _on_message(self, channel: str, message: bytes) -> None:
        try:
            if channel == CONTROL:
                self.revocations.hear(message)
            elif self.revocations.current:
                self.sockets.on_message(channel, message)
            else:
                metrics.bus_passed_over.inc()  # events are read from the table, once it is known who may hear them
        except (ValueError, KeyError, msgspec.MsgspecError):
            log.exception("bus_message_not_understood", channel=channel)

    def _on_bus_change(self) -> None:
        if not self.bus.up:
            metrics.bus_losses.inc()
            self.sockets.rooms.check_all()
        self.locations.forget_all()
        self.revocations.bus_changed()
        self.presence.bus_changed()

    def _on_bus_believed(self) -> None:
        """The bus is back, and it is known who may hear what it brings."""
        self.locations.forget_all()
        self.sockets.rooms.check_all()

    # idempotency keys

    async def _forget_old_keys(self) -> None:
        while True:
            try:
                async with self.database.statement() as tx:
                    await tx.one(FORGET, tx.now() - dt.timedelta(seconds=self.settings.idempotency_keep_s))
            except Unavailable:
                log.warning("idempotency_keys_not_swept")
            await asyncio.sleep(KEYS_SWEEP_S)

    # listening

    async def _listen(self) -> None:
        app = web.Application(middlewares=[edge, self.edges.middleware], client_max_size=self.settings.body_max_bytes)
        app.on_response_prepare.append(self.edges.on_prepare)
        app.on_response_prepare.append(self.limits.on_prepare)
        app.router.add_get("/health/live", self.health.live)
        app.router.add_get("/health/ready", self.health.show_ready)
        app.router.add_get("/metrics", self.health.show_metrics)
        if self._serves:
            app.router.add_get("/", docs.show_docs)
            docs.add_routes(app)
            for method in ("GET", "POST", "OPTIONS"):
                app.router.add_route(method, "/socket.io/", self._socket)
            Pages([name for name, gateway in self.gateways.items() if not gateway.simulated]).add_routes(app)
            add_routes(app, self.rest)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=5.0)
        await self._runner.setup()
        site = Site(self._runner, self._listener, self.settings)
        site.taken_over = lambda: self.sockets.engine.eio.websockets
        self.health.open_connections = lambda: site.open + site.taken_over()
        await site.start()
        self.port = self._listener.getsockname()[1]
        if not self.rest.public_url:
            self.rest.public_url = f"http://localhost:{self.port}"
            if self._serves and self.settings.production:
                log.warning("public_url_missing", remedy="set PUBLIC_URL: links start with http://localhost")
        log.info("listening", host=self.settings.bind_host, port=self.port)

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        if not self.edges.welcomes(request):
            raise Forbidden("Pages of this origin may not connect: it is not one of CORS_ORIGINS.")
        session_id = request.query.get("sid")
        if not session_id:
            if self.health.draining or not self.health.revocations.is_set():
                raise Unavailable("This instance takes no new connections now.")
            self.limits.admit(self.sockets.engine.unconnected)
            await self.limits.handshake(request)
        elif session_id not in self.sockets.engine.eio.sockets:
            await self.limits.stranger(request)
        response: web.StreamResponse = await self.sockets.engine.handle_request(request)
        return response


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("loop_ended", loop=task.get_name(), exc_info=task.exception())
