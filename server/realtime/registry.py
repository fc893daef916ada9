"""Who is in which room of which namespace: what python-socketio calls a client manager.

The library's own walks all rooms for every client that leaves, and starts a task for every recipient of an emit. Here a
client knows its rooms, and a packet is made once and written to each session.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import socketio
from socketio import packet as sio_packet

from server.realtime.connections import Frame


def frame_of(packet: sio_packet.Packet) -> Frame:
    """The wire form of a packet of the library's."""
    encoded = packet.encode()
    return Frame(encoded) if isinstance(encoded, str) else Frame(encoded[0], encoded[1:])


class _Namespace:
    __slots__ = ("clients", "ids", "rooms")

    def __init__(self) -> None:
        self.clients: dict[str, str] = {}
        """The Engine.IO session of each client, by its Socket.IO id."""
        self.ids: dict[str, str] = {}
        """The same the other way round."""
        self.rooms: dict[Any, set[str]] = {}


class Registry(socketio.AsyncManager):  # type: ignore[misc]  # the library is not typed
    """The clients of one instance. Every client is also alone in a room that has its id for a name."""

    def __init__(self) -> None:
        super().__init__()
        self._namespaces: dict[str, _Namespace] = {}
        self._rooms_of: dict[str, set[Any]] = {}
        self._connecting: set[str] = set()
        self._disconnecting: set[str] = set()
        self._ack_ids = itertools.count(1)
        self.on_left: Callable[[str], None] = lambda eio_sid: None
        """Told of each client that was connected and is not any more, by its Engine.IO session."""

    # who is there

    def add(self, sid: str, eio_sid: str, namespace: str) -> None:
        """A client is connected."""
        known = self._namespaces.setdefault(namespace, _Namespace())
        known.clients[sid] = eio_sid
        known.ids[eio_sid] = sid

    def remove(self, sid: str, namespace: str) -> None:
        """A client has left, and all its rooms with it."""
        known = self._namespaces.get(namespace)
        if known is None or sid not in known.clients:
            return
        for room in self._rooms_of.get(sid, set()).copy():
            self.basic_leave_room(sid, namespace, room)
        eio_sid = known.clients.pop(sid)
        known.ids.pop(eio_sid, None)
        if not known.clients:
            del self._namespaces[namespace]
        self.callbacks.pop(sid, None)
        self._disconnecting.discard(sid)
        if sid in self._connecting:
            self._connecting.discard(sid)
        else:
            self.on_left(eio_sid)

    def namespaces_of(self, eio_sid: str) -> list[str]:
        """Where an Engine.IO session is connected, or about to be."""
        return [name for name, known in self._namespaces.items() if eio_sid in known.ids]

    def get_namespaces(self) -> Iterable[str]:
        return self._namespaces.keys()

    def sid_from_eio_sid(self, eio_sid: str, namespace: str) -> str | None:
        known = self._namespaces.get(namespace)
        return None if known is None else known.ids.get(eio_sid)

    def eio_sid_from_sid(self, sid: str, namespace: str) -> str | None:
        known = self._namespaces.get(namespace)
        return None if known is None else known.clients.get(sid)

    async def pre_connect(self, eio_sid: str, namespace: str) -> str | None:
        if self.sid_from_eio_sid(eio_sid, namespace) is not None:
            return None  # connected already
        sid: str = self.server.eio.generate_id()
        self.add(sid, eio_sid, namespace)
        self._connecting.add(sid)
        return sid

    async def connect(self, sid: str, namespace: str) -> str:
        self._connecting.discard(sid)
        return sid

    def is_pre_connected(self, sid: str, namespace: str) -> bool:
        return sid in self._connecting

    def is_connected(self, sid: str, namespace: str) -> bool:
        settled = sid not in self._connecting and sid not in self._disconnecting
        return settled and self.eio_sid_from_sid(sid, namespace) is not None

    def pre_disconnect(self, sid: str, namespace: str) -> str | None:
        self._disconnecting.add(sid)
        return self.eio_sid_from_sid(sid, namespace)

    def basic_disconnect(self, sid: str, namespace: str, **_: Any) -> None:
        self.remove(sid, namespace)

    # rooms

    def is_sid_room(self, namespace: str, room: Any) -> bool:
        return isinstance(room, str) and self.eio_sid_from_sid(room, namespace) is not None

    def basic_enter_room(self, sid: str, namespace: str, room: Any, eio_sid: str | None = None) -> None:
        known = self._namespaces.get(namespace)
        if known is None or sid not in known.clients:
            raise ValueError("sid is not connected to requested namespace")
        if sid == room:
            return
        if self.is_sid_room(namespace, room):
            raise ValueError("cannot enter a sid room")
        known.rooms.setdefault(room, set()).add(sid)
        self._rooms_of.setdefault(sid, set()).add(room)

    def basic_leave_room(self, sid: str, namespace: str, room: Any) -> None:
        known = self._namespaces.get(namespace)
        members = None if known is None else known.rooms.get(room)
        if known is None or members is None or sid not in members:
            return
        members.discard(sid)
        if not members:
            del known.rooms[room]
        rooms = self._rooms_of[sid]
        rooms.discard(room)
        if not rooms:
            del self._rooms_of[sid]

    def basic_close_room(self, room: Any, namespace: str) -> None:
        if self.is_sid_room(namespace, room):
            raise ValueError("cannot close a sid room")
        known = self._namespaces.get(namespace)
        for sid in list(known.rooms.get(room, ())) if known is not None else ():
            self.basic_leave_room(sid, namespace, room)

    def get_rooms(self, sid: str, namespace: str) -> list[Any]:
        if self.eio_sid_from_sid(sid, namespace) is None:
            return []
        return [sid, *self._rooms_of.get(sid, ())]

    def get_participants(self, namespace: str, room: Any) -> Iterator[tuple[str, str]]:
        """(id, Engine.IO session id) of everybody in a room, in any of a list of rooms, or with None in the
        namespace."""
        known = self._namespaces.get(namespace)
        if known is None:
            return
        sids: Iterable[str]
        if room is None:
            sids = list(known.clients)
        else:
            found: set[str] = set()
            for one in room if isinstance(room, list | tuple | set) else [room]:
                found |= {one} if one in known.clients else known.rooms.get(one, set())
            sids = found
        for sid in sids:
            yield sid, known.clients[sid]

    # sending

    async def emit(
        self,
        event: str,
        data: Any,
        namespace: str,
        room: Any = None,
        skip_sid: Any = None,
        callback: Callable[..., Any] | None = None,
        to: Any = None,
        **_: Any,
    ) -> None:
        """Send an event to a client, to rooms or to a namespace. It is on the wire when this returns."""
        skipped = skip_sid if isinstance(skip_sid, list | tuple | set) else (skip_sid,)
        recipients = [each for each in self.get_participants(namespace, to or room) if each[0] not in skipped]
        if not recipients:
            return
        args = list(data) if isinstance(data, tuple) else [] if data is None else [data]
        packet_class, sockets = self.server.packet_class, self.server.eio.sockets
        message = None
        for sid, eio_sid in recipients:
            session = sockets.get(eio_sid)
            if session is None:
                continue
            if callback is not None:
                number = self._generate_ack_id(sid, callback)
                packet = packet_class(sio_packet.EVENT, namespace=namespace, data=[event, *args], id=number)
                message = frame_of(packet)
            elif message is None:
                message = frame_of(packet_class(sio_packet.EVENT, namespace=namespace, data=[event, *args]))
            session.send_frame(message)

    def _generate_ack_id(self, sid: str, callback: Callable[..., Any]) -> int:
        number = next(self._ack_ids)
        self.callbacks.setdefault(sid, {})[number] = callback
        return number

    async def trigger_callback(self, sid: str, id: int | None, data: list[Any]) -> None:
        """A client has acknowledged. What nobody asked it for is passed over."""
        callback = self.callbacks.get(sid, {}).pop(id, None)
        if callback is not None:
            answer = callback(*data)
            if inspect.isawaitable(answer):
                await answer
