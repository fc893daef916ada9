"""The Engine.IO v4 server: which request belongs to which session, and what it is answered.

python-engineio's server stays the base class, because python-socketio is written against it; its way with requests,
sockets and pings is replaced. docs/decisions/0014-one-session-for-all-transports.md.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from functools import partial
from typing import Any

import engineio
import msgspec
import structlog
from aiohttp import web

from models.errors import Malformed, TooLarge
from server.realtime.backlog import Backlog, Wheel
from server.realtime.connections import Connection
from server.realtime.polling import Polling, packets_of
from server.realtime.quota import Quota
from server.realtime.session import Probe, Session
from server.realtime.websocket import can_take_over, is_handshake

log = structlog.get_logger()

TRANSPORTS = ("polling", "websocket")

SESSION_UNKNOWN = (
    "Session ID unknown. It ended, or it lives on another instance: polling needs sticky sessions, "
    'or connect with transports: ["websocket"].'
)


def _refusal(code: int, message: str) -> web.Response:
    """Engine.IO's own form of an error. It is the client's fault, or that of an instance that is gone: no error of
    ours. A session id is as good as a password: the log does not name it."""
    log.info("socket_request_refused", reason=code)
    body = msgspec.json.encode({"code": code, "message": message})
    return web.Response(status=400, body=body, content_type="application/json")


def _payload(packets: bytes) -> web.Response:
    return web.Response(body=packets, content_type="text/plain", charset="UTF-8")


class TakenOver(web.Response):
    """Stands for the answer to a request whose connection is not aiohttp's any more: nothing is written."""

    def __init__(self) -> None:
        super().__init__(status=101)

    @property
    def prepared(self) -> bool:
        return True

    async def prepare(self, request: web.BaseRequest) -> None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


class EngineServer(engineio.AsyncServer):  # type: ignore[misc]  # the library is not typed
    """Engine.IO over aiohttp. Used alone it has the library's handlers (`on("message")`, `send`); whoever sets
    `on_opened`, `on_packet`, `on_event` and `on_ended` gets the same without a task for each."""

    def __init__(
        self,
        *,
        frame_max_bytes: int,
        ping_interval_s: float,
        ping_timeout_s: float,
        upgrade_timeout_s: float,
        slow_bytes: int,
        queue_max_bytes: int,
        slow_max_s: float,
        slot_s: float = 1.0,
        caller_of: Callable[[web.Request], str] = lambda request: request.remote or "",
        new_quota: Callable[[], Quota | None] = lambda: None,
        **options: Any,
    ) -> None:
        super().__init__(
            async_mode="aiohttp",
            max_http_buffer_size=frame_max_bytes,
            ping_interval=ping_interval_s,
            ping_timeout=ping_timeout_s,
            monitor_clients=False,  # sessions have deadlines of their own
            cors_allowed_origins=[],  # which pages may call is decided before
            **options,
        )
        self.frame_max_bytes = frame_max_bytes
        self.ping_interval_s, self.ping_timeout_s = ping_interval_s, ping_timeout_s
        self.upgrade_timeout_s = upgrade_timeout_s
        self.slow_bytes, self.queue_max_bytes, self.slow_max_s = slow_bytes, queue_max_bytes, slow_max_s
        self.new_quota = new_quota
        self._caller_of = caller_of
        self.sockets: dict[str, Session]
        self.backlog = Backlog()
        self.wheel = Wheel(self.backlog, slot_s)
        self.websockets = 0
        """How many WebSockets are open: the HTTP side does not know of them any more."""
        self.empty = asyncio.Event()
        """Set while there is none."""
        self.empty.set()
        self.on_opened: Callable[[Session, web.Request], None] = self._tell_connect
        self.on_packet: Callable[[Session, str | bytes], None] = self._tell_message
        self.on_event: Callable[[Connection, str, list[Any], int | None], None]
        self.on_ended: Callable[[Session], None] = self._tell_disconnect
        self._tasks: set[asyncio.Task[Any]] = set()

    def generate_id(self) -> str:
        return secrets.token_urlsafe(15)

    # requests

    async def handle_request(self, request: web.Request) -> web.StreamResponse:
        """Answer a request of Engine.IO, or take its connection over.

        Raises:
            Malformed: half a WebSocket handshake, or a body that is no payload; the latter ends the session.
            TooLarge: the body is larger than a message may be.
        """
        query = request.query
        transport = query.get("transport")
        if transport not in TRANSPORTS:
            return _refusal(0, "Transport unknown")
        upgrades = request.headers.get("Upgrade", "").lower() == "websocket"
        if request.method == "GET" and (upgrades or transport == "websocket") and not is_handshake(request):
            raise Malformed("This is not the handshake of a WebSocket (RFC 6455).")
        if "j" in query or upgrades != (transport == "websocket"):
            return _refusal(3, "Bad request")
        sid = query.get("sid")
        if not sid:
            return self._open(request, transport)
        session = self.sockets.get(sid)
        if session is None:
            return _refusal(1, SESSION_UNKNOWN)
        if request.method == "GET" and transport == "websocket":
            return self._probe(request, session)
        session.check_alive()
        polling = session.polling
        if polling is None:
            return _refusal(1, SESSION_UNKNOWN) if session.closing else _refusal(3, "This session has a WebSocket.")
        if request.method == "GET":
            return await self._get(request, session, polling)
        if request.method == "POST":
            return await self._post(request, session, polling)
        return _refusal(3, "Bad request")

    def _open(self, request: web.Request, transport: str) -> web.StreamResponse:
        if request.method != "GET":
            return _refusal(2, "Bad handshake method")
        if request.query.getall("EIO", ()) != ["4"]:
            return _refusal(5, "Unsupported protocol version")
        possible = can_take_over(request)
        if transport == "websocket" and not possible:
            return _refusal(3, "There are no WebSockets here; connect by polling.")
        session = Session(self, self.generate_id(), self._caller_of(request))
        greeting = b"0" + msgspec.json.encode(
            {
                "sid": session.sid,
                "upgrades": ["websocket"] if possible and transport == "polling" else [],
                "pingInterval": round(self.ping_interval_s * 1000),
                "pingTimeout": round(self.ping_timeout_s * 1000),
                "maxPayload": self.frame_max_bytes,
            }
        )
        if transport == "websocket":
            session.open(request, greeting)
        else:
            session.open_polling()
        self.sockets[session.sid] = session
        self.on_opened(session, request)
        return TakenOver() if transport == "websocket" else _payload(greeting)

    def _probe(self, request: web.Request, session: Session) -> web.StreamResponse:
        if not can_take_over(request):
            return _refusal(3, "There are no WebSockets here; go on polling.")
        Probe(self, session).open(request)
        return TakenOver()

    async def _get(self, request: web.Request, session: Session, polling: Polling) -> web.StreamResponse:
        packets = await polling.poll()
        if packets is None:
            return _refusal(3, "Another GET of this session was waiting already.")
        if request.transport is None or request.transport.is_closing():
            session.abort()  # what is in this answer is lost
        return _payload(packets)

    async def _post(self, request: web.Request, session: Session, polling: Polling) -> web.StreamResponse:
        if polling.posting:
            session.close()
            return _refusal(3, "Another POST of this session was being read already.")
        polling.posting = True
        try:
            packets = packets_of(await self._read(request))
            if session.polling is None:
                return _refusal(1, SESSION_UNKNOWN)  # ended while the body came
            await polling.receive(packets)
        except Malformed:
            session.abort()
            raise
        finally:
            polling.posting = False
        return web.Response(body=b"ok", content_type="text/plain")

    async def _read(self, request: web.Request) -> bytes:
        """A request's whole body, within the limits of any request."""
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise TooLarge("The body is larger than this server takes.") from None
        except web.RequestPayloadError:
            raise Malformed("The body is cut off, or is not what its headers say.") from None
        if len(body) > self.frame_max_bytes:
            raise TooLarge("The payload is larger than this server takes.")
        return body

    # sessions

    def count_websocket(self, difference: int) -> None:
        self.websockets += difference
        if self.websockets:
            self.empty.clear()
        else:
            self.empty.set()

    def end(self, session: Session) -> None:
        """A session has ended: what that costs is worked off in slices."""
        self.backlog.add(partial(self._finish, session))

    def _finish(self, session: Session) -> None:
        session.abort()
        if self.sockets.pop(session.sid, None) is not None:
            session.forget()
            self.on_ended(session)

    def _get_socket(self, sid: str) -> Session:
        """Replaces the library's method, which forgets a session that is closing before what it left is cleaned up."""
        session = self.sockets[sid]
        if session.closing:
            raise KeyError("Session is disconnected")
        return session

    async def disconnect(self, sid: str | None = None) -> None:
        for session in list(self.sockets.values()):
            if sid in (None, session.sid):
                session.hang_up()

    # the library's handlers

    def _tell_connect(self, session: Session, request: web.Request) -> None:
        self._tell("connect", session.sid, {})

    def _tell_message(self, session: Session, message: str | bytes) -> None:
        self._tell("message", session.sid, message)

    def _tell_disconnect(self, session: Session) -> None:
        self._tell("disconnect", session.sid, self.reason.TRANSPORT_CLOSE)

    def _tell(self, event: str, *args: Any) -> None:
        if event in self.handlers:
            task = asyncio.ensure_future(self._trigger_event(event, *args))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
