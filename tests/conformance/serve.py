"""The server that the official protocol suites of Socket.IO expect, made of the classes of production.

    python -m tests.conformance.serve             for the Socket.IO v5 suite
    python -m tests.conformance.serve --engine    for the Engine.IO v4 suite

Both suites knock at port 3000; `--port` is for tests. `scripts/conformance` runs suites that were checked out.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

import msgspec
import socketio
from aiohttp import web

from models.errors import Refused
from models.user import Actor, Role
from server.realtime.connections import Connection, Frame, Opening
from server.realtime.engine import Engine
from server.realtime.transports import EngineServer

PORT = 3000

LIMITS: dict[str, Any] = {
    "ping_interval_s": 0.3,
    "ping_timeout_s": 0.2,
    "frame_max_bytes": 1_000_000,
    "slow_bytes": 64 * 1024,
    "queue_max_bytes": 8 * 1024 * 1024,
    "slow_max_s": 15,
    "slot_s": 0.0001,
}
CONNECT_TIMEOUT_S = 1.0
AUTH_AFTER_S = 0.02
"""The suite's client misses what comes in one read with the answer to its CONNECT."""
ATTACHMENTS_MAX = 10


class Echo(socketio.AsyncNamespace):  # type: ignore[misc]  # the library is not typed
    """What the suite wants of each namespace, by the library's own means."""

    async def on_connect(self, sid: str, environ: object, auth: object = None) -> None:
        await self.save_session(sid, {"auth": auth or {}})
        self.server.start_background_task(self._tell_auth, sid)

    async def _tell_auth(self, sid: str) -> None:
        await asyncio.sleep(AUTH_AFTER_S)
        await self.emit("auth", (await self.get_session(sid))["auth"], to=sid)

    async def on_message(self, sid: str, *args: object) -> None:
        await self.emit("message-back", args, to=sid)

    async def on_message_with_ack(self, sid: str, *args: object) -> object:
        return args

    async def trigger_event(self, event: str, *args: Any) -> Any:
        return await super().trigger_event(event.replace("-", "_"), *args)


class EchoEngine(Engine):
    """Production's Socket.IO server with the suite's events on the default namespace, and on /custom."""

    def __init__(self) -> None:
        super().__init__(
            authenticate=self._welcome,
            open_connection=self._open_echo,
            on_event=self._echo,
            on_close=lambda connection: None,
            connect_timeout_s=CONNECT_TIMEOUT_S,
            attachments_max=ATTACHMENTS_MAX,
            **LIMITS,
        )
        self.register_namespace(Echo("/custom"))

    async def _welcome(self, auth: object, caller: str) -> Actor:
        return Actor(sub=caller, role=Role.SERVICE, exp=time.time() + 3600)

    async def _open_echo(self, connection: Connection, auth: object) -> Opening:
        told = msgspec.json.encode(["auth", auth or {}]).decode()

        def then() -> None:
            asyncio.get_running_loop().call_later(AUTH_AFTER_S, connection.send, Frame("2" + told))

        return Opening({}, then)

    def _echo(self, connection: Connection, name: str, args: list[Any], number: int | None) -> None:
        if name == "message":
            self.start_background_task(self.emit, "message-back", tuple(args), to=connection.id)
        elif name == "message-with-ack" and number is not None:
            self.acknowledge(connection, number, args)


def engine_io() -> EngineServer:
    """Production's Engine.IO server alone, which sends back every message."""
    server = EngineServer(upgrade_timeout_s=CONNECT_TIMEOUT_S, logger=False, **LIMITS)
    server.on("message", server.send)
    return server


def application(server: EngineServer | Engine, path: str = "/socket.io/") -> web.Application:
    """A server under the path where clients look for it."""

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            response: web.StreamResponse = await server.handle_request(request)
        except Refused as refusal:
            response = web.json_response({"code": refusal.code, "message": refusal.detail}, status=refusal.status)
        response.headers["Access-Control-Allow-Origin"] = "*"
        return response

    app = web.Application(client_max_size=2 * LIMITS["frame_max_bytes"])
    app.router.add_route("*", path, handle)
    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="store_true", help="Engine.IO alone")
    parser.add_argument("--port", type=int, default=PORT)
    chosen = parser.parse_args()
    app = application(engine_io(), "/engine.io/") if chosen.engine else application(EchoEngine())
    web.run_app(app, port=chosen.port, access_log=None)
