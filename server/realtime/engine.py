"""Socket.IO and Engine.IO: python-socketio's server, with the parts replaced that the contract cannot live with.

Replaced: parsing of incoming packets (strict JSON, refusals instead of tracebacks), dispatch (a table instead of
`on_<any name>`, acknowledgements in order with what else is sent), the WebSocket driver (no deflate, bounded frames).
Everything else, long polling and the upgrade from it included, is the library's. docs/decisions/0003-extending-
python-socketio.md.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import engineio
import msgspec
import socketio
import structlog
from aiohttp import WSMsgType, web
from engineio import packet as eio_packet
from engineio.async_drivers.aiohttp import translate_request
from engineio.payload import Payload
from socketio import packet as sio_packet

from models.errors import Malformed, Refused, TooLarge, Unavailable
from models.message import Disconnected
from models.user import Actor
from server import metrics
from server.realtime.connections import Connection, Frame, acknowledgement
from server.realtime.session import ACK_DIGITS_MAX, Polled, Session, Wheel
from server.realtime.websocket import is_handshake

log = structlog.get_logger()

NAMESPACE = "/"

POLLED = (eio_packet.CLOSE, eio_packet.PONG, eio_packet.MESSAGE, eio_packet.UPGRADE)
"""Engine.IO packets that a client may send by polling."""


class Unreadable:
    """Stands for arguments that are no JSON (RFC 8259) but whose event and acknowledgement number could be read."""


class _Json:
    """The JSON of the wire. Python's own reader accepts NaN, Infinity and lone surrogates; what only it can read
    becomes `Unreadable`, so that the client's event is refused with a code instead of the connection being dropped."""

    @staticmethod
    def dumps(value: object, **_: object) -> str:
        return msgspec.json.encode(value).decode()

    @staticmethod
    def loads(text: str) -> Any:
        try:
            return msgspec.json.decode(text)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            value = json.loads(text)  # RecursionError and ValueError: not readable at all
            if isinstance(value, list) and value and isinstance(value[0], str):
                return [value[0], Unreadable()]
            raise ValueError("not JSON") from None


class _WebSocket:
    """Engine.IO's WebSocket driver for aiohttp: five methods, uncompressed, with a bound on the size of a frame."""

    def __init__(self, handler: Callable[[Any], Awaitable[None]], server: engineio.AsyncServer) -> None:
        self._handler = handler
        self._upgrade_timeout_s: float = server.upgrade_timeout_s
        self._socket = web.WebSocketResponse(max_msg_size=server.max_http_buffer_size, compress=False, timeout=1.0)

    async def __call__(self, environ: dict[str, Any]) -> web.WebSocketResponse:
        request: web.Request = environ["aiohttp.request"]
        await self._socket.prepare(request)
        late = asyncio.get_running_loop().call_later(self._upgrade_timeout_s, self._end_if_not_upgraded, request)
        try:
            await self._handler(self)
        finally:
            late.cancel()
        return self._socket

    def _end_if_not_upgraded(self, request: web.Request) -> None:
        """The library waits for ever for the two packets that end an upgrade from polling."""
        session = self._handler.__self__  # type: ignore[attr-defined]  # a method of the library's socket
        if not session.upgraded and request.transport is not None:
            request.transport.abort()

    async def close(self) -> None:
        await self._socket.close()

    async def send(self, message: str | bytes) -> None:
        if isinstance(message, bytes):
            await self._socket.send_bytes(message)
        else:
            await self._socket.send_str(message)

    async def wait(self) -> str | bytes | None:
        """The next message; None when the connection has ended, or speaks no Engine.IO."""
        message = await self._socket.receive()
        if message.type is WSMsgType.BINARY:
            return bytes(message.data)
        if message.type is WSMsgType.TEXT and message.data and message.data[0] in "123456":
            return str(message.data)
        return None


class _Body:
    """A request's body as the library reads it. aiohttp's own stream gives what has arrived, not all that was sent."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def read(self, length: int) -> bytes:
        return self._body[:length]


class _EngineServer(engineio.AsyncServer):  # type: ignore[misc]  # the library is not typed
    """Engine.IO whose errors say what to do."""

    def __init__(self, *args: Any, upgrade_timeout_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.upgrade_timeout_s = upgrade_timeout_s
        self._async: dict[str, Any] = dict(self._async, websocket=_WebSocket, translate_request=self._translate)

    def generate_id(self) -> str:
        return secrets.token_urlsafe(15)

    async def _translate(self, request: web.Request) -> dict[str, Any]:
        """A request as the library wants it: with its whole body, read within the limits of any request. A payload that
        the library would answer with OK and a traceback in the log, or not before the next poll, is refused here."""
        environ: dict[str, Any] = translate_request(request)
        if request.method == "POST":
            try:
                body = await request.read()
            except web.HTTPRequestEntityTooLarge:
                raise TooLarge("The body is larger than this server takes.") from None
            except web.RequestPayloadError:
                raise Malformed("The body is cut off, or is not what its headers say.") from None
            if len(body) > self.max_http_buffer_size:
                raise TooLarge("The payload is larger than this server takes.")
            try:
                packets = Payload(encoded_payload=body.decode()).packets
            except (ValueError, LookupError):
                raise Malformed("The body is not a payload of Engine.IO.") from None
            if any(packet.packet_type not in POLLED for packet in packets):
                raise Malformed("The payload holds a packet that no client may send.")
            environ |= {"wsgi.input": _Body(body), "CONTENT_LENGTH": str(len(body))}
            sid = request.query.get("sid", "")
            if sid in self.sockets and self.sockets[sid].closed:
                del self.sockets[sid]  # ended while the body came, and not collected yet: the library would raise
        return environ

    def _log_error_once(self, message: str, message_key: str) -> None:
        """A refused request is its client's fault, or that of an instance that is gone: no error of ours. The library's
        message names the session, which is as good as a password."""
        log.info("socket_request_refused", reason=message_key)

    def _bad_request(self, message: str | None = None) -> dict[str, Any]:
        if message is not None and message.startswith("Invalid session"):
            message = (
                "Session ID unknown. It ended, or it lives on another instance: polling needs sticky sessions, "
                'or connect with transports: ["websocket"].'
            )
        body = msgspec.json.encode({"code": 1 if message else 3, "message": message or "Bad request"})
        return {"status": "400 BAD REQUEST", "headers": [("Content-Type", "application/json")], "response": body}


class Engine(socketio.AsyncServer):  # type: ignore[misc]  # the library is not typed
    """The Socket.IO server of one instance.

    `authenticate(auth, request)` turns the client's CONNECT payload into an Actor, or raises a refusal. `on_event` is
    called for every event of a connected client with its name, its arguments and a function that answers it (None when
    the client wants no answer). `on_open` and `on_close` frame a connection's life.
    """

    def __init__(
        self,
        *,
        authenticate: Callable[[object, str], Awaitable[Actor]],
        caller_of: Callable[[web.Request], str],
        on_event: Callable[[Connection, str, list[Any], int | None], None],
        on_open: Callable[[Connection], None],
        on_close: Callable[[Connection], None],
        connect_timeout_s: float,
        frame_max_bytes: int,
        ping_interval_s: int,
        ping_timeout_s: int,
        slow_bytes: int,
        queue_max_bytes: int,
        slow_max_s: int,
        messages_queued_max: int,
    ) -> None:
        super().__init__(
            async_mode="aiohttp",
            json=_Json,
            max_http_buffer_size=frame_max_bytes,
            ping_interval=ping_interval_s,
            ping_timeout=ping_timeout_s,
            upgrade_timeout_s=connect_timeout_s,
            cors_allowed_origins=[],  # which pages may call is decided in server/edges.py
            logger=False,
            engineio_logger=False,
        )
        self._authenticate = authenticate
        self._caller_of = caller_of
        self.on_event = on_event
        self._on_open = on_open
        self._frame_max_bytes = frame_max_bytes
        self._on_close = on_close
        self.connect_timeout_s = connect_timeout_s
        self.ping_interval_s, self.ping_timeout_s = ping_interval_s, ping_timeout_s
        self.slow_bytes, self.queue_max_bytes, self.slow_max_s = slow_bytes, queue_max_bytes, slow_max_s
        self._messages_queued_max = messages_queued_max
        self.wheel = Wheel()
        self.sessions = 0
        """How many lean WebSockets are open: the HTTP side does not know of them any more."""
        self.empty = asyncio.Event()
        """Set while there is none."""
        self.empty.set()
        self.connections: dict[str, Connection] = {}
        """By Engine.IO session id."""
        self.on("connect", self._connected, namespace=NAMESPACE)
        self.on("disconnect", self._disconnected, namespace=NAMESPACE)

    @property
    def unconnected(self) -> int:
        """How many sessions have not said yet who they are."""
        return max(len(self.eio.sockets) - len(self.connections), 0)

    def _engineio_server_class(self) -> type[engineio.AsyncServer]:
        return _EngineServer

    def takes(self, request: web.Request) -> bool:
        """Whether the request opens a session on a WebSocket at once, without polling first.

        Raises:
            Malformed: it half asks for a WebSocket, which the library answers with what is no answer.
        """
        half = "websocket" in (request.query.get("transport"), request.headers.get("Upgrade", "").lower())
        if request.method == "GET" and half and not is_handshake(request):
            raise Malformed("This is not the handshake of a WebSocket (RFC 6455).")
        return (
            "sid" not in request.query
            and request.query.get("EIO") == "4"
            and request.query.get("transport") == "websocket"
            and is_handshake(request)
        )

    def take(self, request: web.Request) -> None:
        """Take the request's connection over as a session of its own; see server/realtime/websocket.py."""
        sid = self.eio.generate_id()
        session = Session(self, sid, self._frame_max_bytes, self._caller_of(request))
        greeting = {
            "sid": sid,
            "upgrades": [],
            "pingInterval": self.ping_interval_s * 1000,
            "pingTimeout": self.ping_timeout_s * 1000,
            "maxPayload": self._frame_max_bytes,
        }
        session.open(request, b"0" + msgspec.json.encode(greeting))
        self.sessions += 1
        self.empty.clear()
        self.eio.sockets[sid] = session
        self.environ[sid] = {}

    async def on_packet(self, session: Session, packet: str) -> None:
        """A lean session has read a Socket.IO packet that is not an event of a connected client."""
        await self._handle_eio_message(session.sid, packet)

    async def on_gone(self, session: Session, reason: str) -> None:
        """A lean session's connection has ended."""
        self.sessions -= 1
        if not self.sessions:
            self.empty.set()
        await super()._handle_eio_disconnect(session.sid, reason)
        self.eio.sockets.pop(session.sid, None)
        session.connection = None

    def _wire(self, eio_sid: str) -> Session | Polled | None:
        socket = self.eio.sockets.get(eio_sid)
        if socket is None or isinstance(socket, Session):
            return socket
        return Polled(socket, self._messages_queued_max)

    async def _connected(self, sid: str, environ: dict[str, Any], auth: object = None) -> None:
        eio_sid = self.manager.eio_sid_from_sid(sid, NAMESPACE)
        wire = self._wire(eio_sid)
        assert wire is not None
        caller = wire.caller if isinstance(wire, Session) else self._caller_of(environ["aiohttp.request"])
        try:
            actor = await self._authenticate(auth, caller)
        except Unavailable as refusal:
            # refused for now: a closed transport makes the client come back, a CONNECT_ERROR would not
            if isinstance(wire, Polled):
                await self._end_transport(eio_sid)  # at once: what is queued now would still be read
            else:
                wire.hang_up()
            raise socketio.exceptions.ConnectionRefusedError(refusal.detail) from None
        except Refused as refusal:
            raise socketio.exceptions.ConnectionRefusedError(
                refusal.detail, {"code": refusal.code, "message": refusal.detail, **refusal.fields}
            ) from None
        if wire.gone:
            raise socketio.exceptions.ConnectionRefusedError("gone")
        self.connections[eio_sid] = connection = Connection(sid, wire, actor)
        if isinstance(wire, Session):
            wire.connection = connection
        self._on_open(connection)

    async def _disconnected(self, sid: str, reason: str) -> None:
        eio_sid = self.manager.eio_sid_from_sid(sid, NAMESPACE)
        connection = self.connections.pop(eio_sid, None)
        if connection is not None:
            connection.left = True
            if isinstance(connection.wire, Session):
                connection.wire.connection = None
            self._on_close(connection)  # calls that are being worked on go on: a status change is not taken back

    async def _handle_eio_disconnect(self, eio_sid: str, reason: str) -> None:
        """A session has ended. Replaces the library's method, which leaves a poll that waits hanging until the ping
        times out: the client waits for it, and so does a drain."""
        socket = self.eio.sockets.get(eio_sid)
        await super()._handle_eio_disconnect(eio_sid, reason)
        if socket is not None and not socket.upgraded:
            socket.queue.put_nowait(eio_packet.Packet(eio_packet.NOOP))

    async def expel(self, connection: Connection, code: str) -> None:
        """End a session for good: `disconnected {code}`, then DISCONNECT, after which clients stay away."""
        connection.emit("disconnected", Disconnected(code=code))
        await self.disconnect(connection.id)
        connection.hang_up()

    async def _handle_eio_connect(self, eio_sid: str, environ: dict[str, Any]) -> None:
        """A transport was opened: whoever stands behind it has until the deadline to say who it is."""
        await super()._handle_eio_connect(eio_sid, environ)
        asyncio.get_running_loop().call_later(self.connect_timeout_s, self._end_if_unconnected, eio_sid)

    def _end_if_unconnected(self, eio_sid: str) -> None:
        if eio_sid not in self.connections and eio_sid in self.eio.sockets:
            metrics.connections_cut.labels("connect").inc()
            self.start_background_task(self._end_transport, eio_sid)

    def end_unconnected(self) -> None:
        """A drain: whoever has not said yet who it is shall say it elsewhere."""
        for eio_sid in self.eio.sockets.keys() - self.connections.keys():
            socket = self.eio.sockets[eio_sid]
            if isinstance(socket, Session):
                socket.hang_up()
            else:
                self.start_background_task(self._end_transport, eio_sid)

    async def _end_transport(self, eio_sid: str) -> None:
        """Close a transport, whether or not anybody is at its other end."""
        socket = self.eio.sockets.pop(eio_sid, None)
        if socket is not None:
            await socket.close(wait=False)
            socket.queue.put_nowait(None)

    async def _handle_eio_message(self, eio_sid: str, data: object) -> None:
        """An Engine.IO message has arrived. Replaces the library's method: what is not understood ends the session."""
        wire = self._wire(eio_sid)
        if wire is None or wire.gone:
            return
        try:
            if not isinstance(data, str):
                raise ValueError("binary or not a Socket.IO packet")
            packet = self._read(data)
        except (ValueError, RecursionError):
            self._refuse_packet(eio_sid)
            return
        if packet.packet_type == sio_packet.EVENT:
            await self._event(eio_sid, packet)
        elif packet.packet_type == sio_packet.CONNECT:
            await self._handle_connect(eio_sid, packet.namespace, packet.data)
        elif packet.packet_type == sio_packet.DISCONNECT:
            await self._handle_disconnect(eio_sid, packet.namespace, self.reason.CLIENT_DISCONNECT)
        elif packet.packet_type == sio_packet.ACK:
            await self._handle_ack(eio_sid, packet.namespace, packet.id, packet.data)

    def _read(self, data: str) -> sio_packet.Packet:
        """Raises ValueError: not a packet that a client of this server may send."""
        packet = self.packet_class(encoded_packet=data)
        if packet.packet_type in (sio_packet.EVENT, sio_packet.ACK):
            if not isinstance(packet.data, list) or len(str(packet.id or 0)) > ACK_DIGITS_MAX:
                raise ValueError("an event is a list")
            if packet.packet_type == sio_packet.EVENT and not (packet.data and isinstance(packet.data[0], str)):
                raise ValueError("an event has a name")
        elif packet.packet_type == sio_packet.CONNECT:
            if packet.data is not None and not isinstance(packet.data, dict):
                raise ValueError("the payload of CONNECT is an object")
        elif packet.packet_type != sio_packet.DISCONNECT:
            raise ValueError("not for a server")
        return packet

    async def _handle_connect(self, eio_sid: str, namespace: str | None, data: object) -> None:
        if namespace not in (None, NAMESPACE):
            await self._send_packet(
                eio_sid,
                self.packet_class(sio_packet.CONNECT_ERROR, data={"message": "Invalid namespace"}, namespace=namespace),
            )
            return
        # an empty object is a payload too; the library would call the handler as if there were none
        await super()._handle_connect(eio_sid, namespace, data)

    async def _event(self, eio_sid: str, packet: sio_packet.Packet) -> None:
        connection = self.connections.get(eio_sid)
        if connection is None or packet.namespace not in (None, NAMESPACE):
            self._refuse_packet(eio_sid, code="unauthenticated", number=packet.id)
            return
        name, *args = packet.data
        self.on_event(connection, name, args, packet.id)
        while isinstance(connection.wire, Polled) and connection.wire.held:
            await asyncio.wait(connection.calls, return_when="FIRST_COMPLETED")

    def _refuse_packet(self, eio_sid: str, code: str = "malformed", number: int | None = None) -> None:
        """Tell the client why, then end the transport: after a packet that is not understood nothing can be."""
        wire = self._wire(eio_sid)
        if wire is None:
            return
        message = "Send CONNECT first." if code == "unauthenticated" else "This is not a Socket.IO packet."
        error = {"code": code, "message": message}
        if number is not None:
            wire.send_frame(acknowledgement(number, msgspec.json.encode({"ok": False, "error": error})))
        if eio_sid in self.connections:
            self.connections[eio_sid].emit("disconnected", Disconnected(code=code))
        else:
            wire.send_frame(Frame("4" + msgspec.json.encode({"message": message, "data": error}).decode()))
        wire.hang_up()
