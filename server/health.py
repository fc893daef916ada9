"""Is this process alive, may it be given work, and how is it doing."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable
from typing import Any

from aiohttp import hdrs, web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from models.errors import NotFound
from server import metrics
from server.auth import bearer
from server.calls import answer
from server.db import Database
from server.realtime.bus import Bus
from server.realtime.rooms import Rooms
from server.settings import Settings

LAG_INTERVAL_S = 0.1
"""How often the event loop is asked how late it is."""


async def watch_loop_lag() -> None:
    """Measure how late the event loop is, until cancelled."""
    while True:
        wanted = time.perf_counter() + LAG_INTERVAL_S
        await asyncio.sleep(LAG_INTERVAL_S)
        metrics.loop_lag_seconds.observe(max(time.perf_counter() - wanted, 0))


class Health:
    """The answers of /health/live, /health/ready and /metrics."""

    def __init__(self, settings: Settings, database: Database, bus: Bus, rooms: Rooms[Any]) -> None:
        self._settings = settings
        self._database = database
        self._bus = bus
        self._rooms = rooms
        self.schema = asyncio.Event()
        """Set once the schema is at this version or newer."""
        self.revocations = asyncio.Event()
        """Set once it is known which tokens are revoked; before, none is accepted."""
        self.loops_running: Callable[[], bool] = lambda: False
        self.draining = False
        self.open_connections: Callable[[], int] = lambda: 0

    def state(self) -> dict[str, str]:
        """Each part and its state; `ready` sums them up."""
        gone_since = self._database.gone_since
        gone_long = gone_since is not None and time.monotonic() - gone_since > self._settings.ready_db_grace_s
        database = "starting" if not self._database.reached.is_set() else "gone" if gone_long else "ok"
        redis = "ok" if self._bus.up else "degraded" if self._bus.reached.is_set() else "starting"
        schema = "ok" if self.schema.is_set() else "behind"
        loops = "ok" if self.loops_running() else "stopped"
        known = "ok" if self.revocations.is_set() else "unknown"
        good = database == schema == known == loops == "ok" and redis != "starting" and not self.draining
        status = "draining" if self.draining else "ready" if good else "not ready"
        parts = {"postgres": database, "redis": redis, "schema": schema, "revocations": known, "loops": loops}
        return {"status": status, **parts}

    async def live(self, request: web.Request) -> web.Response:
        return answer({"status": "alive"})

    async def show_ready(self, request: web.Request) -> web.Response:
        state = self.state()
        return answer(state, status=200 if state["status"] == "ready" else 503)

    async def show_metrics(self, request: web.Request) -> web.Response:
        """Prometheus' text format. With METRICS_TOKEN its bearer only; in production never without one."""
        wanted = self._settings.metrics_token
        given = bearer(request.headers.get(hdrs.AUTHORIZATION)) or ""
        if (wanted and not hmac.compare_digest(given.encode(), wanted.encode())) or (
            not wanted and self._settings.production
        ):
            raise NotFound("There is nothing at this address.")
        metrics.connections_open.set(self.open_connections())
        metrics.connections_max.set(self._settings.connections_max if self._settings.rate_limits == "on" else 0)
        metrics.ready.set(self.state()["status"] == "ready")
        metrics.bus_up.set(self._bus.up)
        metrics.database_up.set(self._database.gone_since is None)
        for state, count in self._database.connections().items():
            metrics.db_connections.labels(state).set(count)
        metrics.db_pool_size.set(self._settings.db_pool_size)
        metrics.watched_orders.set(len(self._rooms))
        metrics.watchers.set(sum(self._rooms.members(key) for key in self._rooms.watched()))
        return web.Response(body=generate_latest(), headers={hdrs.CONTENT_TYPE: CONTENT_TYPE_LATEST})
