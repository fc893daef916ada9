"""Socket.IO v5: python-socketio's server over sessions of our own.

Its public API stays, for any namespace: `on`, `emit`, `call`, rooms, sessions, AsyncNamespace. Replaced are the parts
that the contract cannot live with: reading of packets (strict JSON, refusals instead of tracebacks, few attachments),
the client manager, and everything below (transports.py). The default namespace goes a short way of its own: a table of
events instead of `on_<any name>`, acknowledgements in order with what else is sent.
docs/decisions/0003-extending-python-socketio.md, 0014-one-session-for-all-transports.md.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

import msgspec
import socketio
import structlog
from aiohttp import web
from engineio.async_drivers.aiohttp import translate_request
from socketio import packet as sio_packet

from models.errors import Refused, Unavailable
from models.message import Disconnected
from models.user import Actor
from server.realtime.connections import Connection, Frame, Opening, acknowledgement
from server.realtime.registry import Registry, frame_of
from server.realtime.session import ACK_DIGITS_MAX, Session
from server.realtime.transports import EngineServer

log = structlog.get_logger()

NAMESPACE = "/"

BINARY = (sio_packet.BINARY_EVENT, sio_packet.BINARY_ACK)
EVENTS = (sio_packet.EVENT, sio_packet.BINARY_EVENT)
ACKS = (sio_packet.ACK, sio_packet.BINARY_ACK)

_HANDLING = 4
"""Why a session is held, besides those in session.py: a handler of the library's runs, and the next packet waits."""


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


class _Packet(sio_packet.Packet):  # type: ignore[misc]  # the library is not typed
    json = _Json


class Engine(socketio.AsyncServer):  # type: ignore[misc]  # the library is not typed
    """The Socket.IO server of one instance.

    Of the default namespace: `authenticate(auth, caller)` turns the client's CONNECT payload into an Actor, or raises a
    refusal. `open_connection(connection, auth)` may refuse too; what it returns says how the connection begins.
    `on_event` is called for every event of a connected client with its name, its arguments and the number of the
    acknowledgement that it wants, if any. `on_close` is called once for every connection that was opened, when it has
    ended.
    """

    def __init__(
        self,
        *,
        authenticate: Callable[[object, str], Awaitable[Actor]],
        open_connection: Callable[[Connection, object], Awaitable[Opening]],
        on_event: Callable[[Connection, str, list[Any], int | None], None],
        on_close: Callable[[Connection], None],
        connect_timeout_s: float,
        attachments_max: int,
        **engine_options: Any,
    ) -> None:
        """`engine_options`: those of EngineServer."""
        super().__init__(
            client_manager=Registry(),
            serializer=_Packet,
            logger=False,
            engineio_logger=False,
            upgrade_timeout_s=connect_timeout_s,
            **engine_options,
        )
        self._authenticate = authenticate
        self._open_connection = open_connection
        self._on_close = on_close
        self._connect_timeout_s = connect_timeout_s
        self._attachments_max = attachments_max
        self.connections: dict[str, Connection] = {}
        """Of the default namespace, by Engine.IO session id."""
        self._tasks: set[asyncio.Task[None]] = set()
        self.eio.on_opened = self._on_opened
        self.eio.on_packet = self._on_packet
        self.eio.on_event = on_event
        self.eio.on_ended = self._on_ended
        self.manager.on_left = self._on_left
        self.manager.initialize()

    @property
    def unconnected(self) -> int:
        """How many sessions have not said yet who they are."""
        return max(len(self.eio.sockets) - len(self.connections), 0)

    def _engineio_server_class(self) -> type[EngineServer]:
        return EngineServer

    @property
    def on_event(self) -> Callable[[Connection, str, list[Any], int | None], None]:
        handler: Callable[[Connection, str, list[Any], int | None], None] = self.eio.on_event
        return handler

    # a session's life

    def _on_opened(self, session: Session, request: web.Request) -> None:
        """A session has begun: whoever stands behind it has until the deadline to say who it is."""
        if self.handlers or self.namespace_handlers:
            self.environ[session.sid] = translate_request(request)
        self._await_connect(session)

    def _on_left(self, eio_sid: str) -> None:
        """A client has left a namespace. It may come back over the same transport, or to another one, but if it is
        nowhere it has the same time for that as a new one."""
        session = self.eio.sockets.get(eio_sid)
        if session is not None and not session.closing:
            self._await_connect(session)

    def _await_connect(self, session: Session) -> None:
        unwatched = not session.connect_by
        session.connect_by = self.eio.wheel.now() + self._connect_timeout_s
        if unwatched:
            self.eio.wheel.after(self._connect_timeout_s, partial(self._check_connected, session))

    def _check_connected(self, session: Session) -> None:
        if session.closing or self.manager.namespaces_of(session.sid):
            session.connect_by = 0.0
        elif (left_s := session.connect_by - self.eio.wheel.now()) > 0:
            self.eio.wheel.after(left_s, partial(self._check_connected, session))
        else:
            session.cut("no_connect")

    def end_unconnected(self) -> None:
        """A drain: whoever has not said yet who it is shall say it elsewhere."""
        for session in list(self.eio.sockets.values()):
            if session.connection is None:
                session.hang_up()

    def _on_ended(self, session: Session) -> None:
        self._leave(session)
        self._binary_packet.pop(session.sid, None)
        namespaces = self.manager.namespaces_of(session.sid)
        if namespaces:
            self._spawn(self._end_namespaces(session, namespaces))
        else:
            self.environ.pop(session.sid, None)

    async def _end_namespaces(self, session: Session, namespaces: list[str]) -> None:
        for namespace in namespaces:
            await self._handle_disconnect(session.sid, namespace, self.reason.TRANSPORT_CLOSE)
            sid = self.manager.sid_from_eio_sid(session.sid, namespace)
            if sid is not None:  # was still connecting: no handler knows of it
                self.manager.remove(sid, namespace)
        self.environ.pop(session.sid, None)

    # the default namespace

    async def _open(self, session: Session, auth: object, opening: object) -> None:
        """Answer a CONNECT. The client may leave while this waits: then `opening` is no more what the session opens."""
        try:
            actor = await self._authenticate(auth, session.caller)
            if session.opening is not opening or session.closing:
                return
            connection = Connection(self.eio.generate_id(), session, actor)
            payload, then = await self._open_connection(connection, auth)
        except Exception as error:
            if session.opening is opening:
                session.opening = None
                self._turn_away(session, error)
            return
        if session.opening is not opening or session.closing:
            connection.left = True
            self._on_close(connection)
            return
        session.opening = None
        self.manager.add(connection.id, session.sid, NAMESPACE)
        session.connection = self.connections[session.sid] = connection
        connection.rewire()
        answer = msgspec.json.encode({"sid": connection.id, **payload})
        session.send_frame(Frame("0" + answer.decode()))
        then()

    def _turn_away(self, session: Session, error: Exception) -> None:
        if isinstance(error, Refused) and not isinstance(error, Unavailable):
            told = {"code": error.code, "message": error.detail, **error.fields}
            self._refuse_connect(session, NAMESPACE, error.detail, told)
            return
        if not isinstance(error, Unavailable):
            log.error("connect_failed", exc_info=error)
        # refused for now: a closed transport makes the client come back, a CONNECT_ERROR would not
        session.hang_up()

    def _refuse_connect(self, session: Session, namespace: str, message: str, data: object = None) -> None:
        told = {"message": message} if data is None else {"message": message, "data": data}
        session.send_frame(frame_of(self.packet_class(sio_packet.CONNECT_ERROR, data=told, namespace=namespace)))

    def _leave(self, session: Session) -> None:
        """The connection has ended. Calls that are being worked on go on: a status change is not taken back."""
        session.opening = None
        connection, session.connection = session.connection, None
        if connection is not None:
            self.connections.pop(session.sid, None)
            connection.left = True
            self.manager.remove(connection.id, NAMESPACE)
            self._on_close(connection)

    def acknowledge(self, connection: Connection, number: int, args: list[Any]) -> None:
        """Answer the event that carried this number; arguments may hold bytes."""
        connection.send(frame_of(self.packet_class(sio_packet.ACK, id=number, data=args)))

    async def disconnect(self, sid: str, namespace: str | None = None, ignore_queue: bool = False) -> None:
        if namespace not in (None, NAMESPACE):
            await super().disconnect(sid, namespace, ignore_queue)
            return
        session = self.eio.sockets.get(self.manager.eio_sid_from_sid(sid, NAMESPACE))
        if session is not None and session.connection is not None:
            session.send_frame(Frame(str(sio_packet.DISCONNECT)))
            self._leave(session)

    async def expel(self, connection: Connection, code: str) -> None:
        """End a session for good: `disconnected {code}`, then DISCONNECT, after which clients stay away."""
        connection.emit("disconnected", Disconnected(code=code))
        await self.disconnect(connection.id)
        connection.hang_up()

    # what clients send

    def _on_packet(self, session: Session, message: str | bytes) -> None:
        if session.closing:
            return
        try:
            packet = self._read(session, message)
        except (ValueError, LookupError, TypeError, RecursionError):
            self._refuse_packet(session)
            return
        if packet is None:
            return
        if packet.namespace in (None, NAMESPACE):
            self._on_own_packet(session, packet)
        else:
            self._on_other_packet(session, packet)

    def _read(self, session: Session, message: str | bytes) -> sio_packet.Packet | None:
        """The packet that is whole now; None while attachments are missing. Raises ValueError and its like: not a
        packet that a client of this server may send."""
        waiting = self._binary_packet.get(session.sid)
        if waiting is not None:
            if isinstance(message, str):
                raise ValueError("attachments are missing")
            if not waiting.add_attachment(message):
                return None
            del self._binary_packet[session.sid]
            return waiting
        if not isinstance(message, str):
            raise ValueError("nobody waits for an attachment")
        packet = self.packet_class(encoded_packet=message)
        kind = packet.packet_type
        if kind in EVENTS or kind in ACKS:
            if not isinstance(packet.data, list) or len(str(packet.id or 0)) > ACK_DIGITS_MAX:
                raise ValueError("an event is a list")
            if kind in EVENTS and not (packet.data and isinstance(packet.data[0], str)):
                raise ValueError("an event has a name")
        elif kind == sio_packet.CONNECT:
            if packet.data is not None and not isinstance(packet.data, dict):
                raise ValueError("the payload of CONNECT is an object")
        elif kind != sio_packet.DISCONNECT:
            raise ValueError("not for a server")
        if kind not in BINARY:
            if packet.attachment_count:
                raise ValueError("not for attachments")
            return packet
        if not 0 < packet.attachment_count <= self._attachments_max:
            raise ValueError("no attachments, or too many")
        self._binary_packet[session.sid] = packet
        return None

    def _on_own_packet(self, session: Session, packet: sio_packet.Packet) -> None:
        kind, connection = packet.packet_type, session.connection
        if kind in EVENTS:
            if connection is None:
                self._refuse_packet(session, code="unauthenticated", number=packet.id)
            else:
                name, *args = packet.data
                self.eio.on_event(connection, name, args, packet.id)
        elif kind == sio_packet.CONNECT:
            if connection is not None or session.opening is not None:
                self._refuse_connect(session, NAMESPACE, "Connected already")
            else:
                session.opening = opening = object()
                self._spawn(self._open(session, packet.data, opening))
        elif kind == sio_packet.DISCONNECT:
            self._leave(session)
        elif connection is not None:
            self._spawn(self.manager.trigger_callback(connection.id, packet.id, packet.data))

    def _on_other_packet(self, session: Session, packet: sio_packet.Packet) -> None:
        """A packet for a namespace of the library's handlers."""
        kind, namespace, sid = packet.packet_type, packet.namespace, session.sid
        if kind == sio_packet.CONNECT:
            if not self._serves(namespace):
                self._refuse_connect(session, namespace, "Invalid namespace")
            elif self.manager.sid_from_eio_sid(sid, namespace) is not None:
                self._refuse_connect(session, namespace, "Connected already")
            else:
                self._handle_in_turn(session, self._handle_connect(sid, namespace, packet.data))
        elif not self._serves(namespace):
            if kind in EVENTS:
                self._refuse_packet(session, code="unauthenticated", number=packet.id)
        elif kind == sio_packet.DISCONNECT:
            self._handle_in_turn(session, self._handle_disconnect(sid, namespace, self.reason.CLIENT_DISCONNECT))
        elif kind in EVENTS:
            self._spawn(self._handle_event(sid, namespace, packet.id, packet.data))
        else:
            self._spawn(self._handle_ack(sid, namespace, packet.id, packet.data))

    def _serves(self, namespace: str) -> bool:
        return any(namespace in known or "*" in known for known in (self.handlers, self.namespace_handlers))

    def _handle_in_turn(self, session: Session, work: Coroutine[Any, Any, None]) -> None:
        """What the client sent after this packet waits for its end."""
        session.hold(_HANDLING)
        self._spawn(work).add_done_callback(lambda _: session.resume(_HANDLING))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("socket_handler_failed", exc_info=error)

    async def _send_packet(self, eio_sid: str, pkt: sio_packet.Packet) -> None:
        session = self.eio.sockets.get(eio_sid)
        if session is not None:
            session.send_frame(frame_of(pkt))

    def _refuse_packet(self, session: Session, code: str = "malformed", number: int | None = None) -> None:
        """Tell the client why, then end the transport: after a packet that is not understood nothing can be."""
        message = "Send CONNECT first." if code == "unauthenticated" else "This is not a Socket.IO packet."
        error = {"code": code, "message": message}
        if number is not None:
            session.send_frame(acknowledgement(number, msgspec.json.encode({"ok": False, "error": error})))
        if session.connection is not None:
            session.connection.emit("disconnected", Disconnected(code=code))
        else:
            self._refuse_connect(session, NAMESPACE, message, error)
        session.hang_up()
