"""One connected client, as the rooms and the doors see it, and the two lanes to it."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import msgspec
from engineio import packet as eio_packet

from models.user import Actor
from server.realtime.websocket import TEXT, encode


class Frame:
    """A finished Socket.IO packet, made once and shared by everybody who gets it."""

    __slots__ = ("text", "wire")

    def __init__(self, text: str) -> None:
        self.text = text
        self.wire = encode(TEXT, b"4" + text.encode())
        """As a WebSocket frame with the Engine.IO packet type."""

    @property
    def packet(self) -> Any:
        """As the library's packet, for sessions that poll."""
        return eio_packet.Packet(eio_packet.MESSAGE, self.text)


def frame(event: str, payload: bytes) -> Frame:
    """The wire form of a Socket.IO event whose one argument is `payload`, a JSON text."""
    return Frame(f'2["{event}",{payload.decode()}]')


def acknowledgement(number: int, payload: bytes) -> Frame:
    """The wire form of the answer to the client's event that carried this number."""
    return Frame(f"3{number}[{payload.decode()}]")


class Wire(Protocol):
    """The way to one client: a lean WebSocket, or the library's session for those that poll or came from polling."""

    @property
    def gone(self) -> bool: ...

    def send_frame(self, message: Frame) -> None:
        """Put a message on the wire, after everything that was sent before. Nothing happens on a closed connection."""

    def send_latest(self, key: str, message: Frame) -> None:
        """Put state on the wire: while the client reads too slowly, only the newest message of each key is kept."""

    def hold(self, why: int = 1) -> None:
        """Read nothing more from this client until `resume`."""

    def resume(self, why: int = 1) -> None: ...

    def hang_up(self) -> None:
        """End the transport after what is queued: the client notices, comes back by itself and recovers."""


class Connection:
    """A Socket.IO session on the default namespace."""

    __slots__ = ("actor", "calls", "hang_up", "id", "keys", "last_calls", "left", "send", "send_latest", "wire")

    def __init__(self, id_: str, wire: Wire, actor: Actor) -> None:
        self.id = id_
        self.wire = wire
        self.actor = actor
        self.send = wire.send_frame
        self.send_latest = wire.send_latest
        self.hang_up = wire.hang_up
        self.left = False
        """Whether the session has ended; its transport may live on."""
        self.keys: set[str] = set()
        """The rooms that it is in."""
        self.calls: set[asyncio.Task[None]] = set()
        """Events of this client that are being worked on."""
        self.last_calls: dict[str, asyncio.Task[None]] = {}
        """The last of them for each order: what a client asks of one order is done in its sequence."""

    @property
    def gone(self) -> bool:
        return self.left or self.wire.gone

    def emit(self, event: str, payload: object) -> None:
        self.send(frame(event, msgspec.json.encode(payload)))
