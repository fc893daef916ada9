"""One connected client, as the rooms and the doors see it."""

from __future__ import annotations

import asyncio
from typing import TypeAlias

import msgspec
from engineio import packet as eio_packet
from engineio.async_socket import AsyncSocket

from models.user import Actor

Frame: TypeAlias = eio_packet.Packet
"""A finished message, made once and shared by everybody who gets it."""


def frame(event: str, payload: bytes) -> Frame:
    """The wire form of a Socket.IO event whose one argument is `payload`, a JSON text."""
    return eio_packet.Packet(eio_packet.MESSAGE, f'2["{event}",{payload.decode()}]')


def acknowledgement(number: int, payload: bytes) -> Frame:
    """The wire form of the answer to the client's event that carried this number."""
    return eio_packet.Packet(eio_packet.MESSAGE, f"3{number}[{payload.decode()}]")


class Connection:
    """A Socket.IO session on the default namespace."""

    __slots__ = ("actor", "calls", "id", "keys", "last_calls", "socket")

    def __init__(self, id_: str, socket: AsyncSocket, actor: Actor) -> None:
        self.id = id_
        self.socket = socket
        self.actor = actor
        self.keys: set[str] = set()
        """The rooms that it is in."""
        self.calls: set[asyncio.Task[None]] = set()
        """Events of this client that are being worked on."""
        self.last_calls: dict[str, asyncio.Task[None]] = {}
        """The last of them for each order: what a client asks of one order is done in its sequence."""

    @property
    def gone(self) -> bool:
        return bool(self.socket.closed or self.socket.closing)

    @property
    def unread(self) -> int:
        """Messages that wait for the client to take them."""
        return int(self.socket.queue.qsize())

    def send(self, message: Frame) -> None:
        """Put a message on the wire, after everything that was sent before. Nothing happens on a closed connection."""
        if not self.gone:
            self.socket.queue.put_nowait(message)

    def emit(self, event: str, payload: object) -> None:
        self.send(frame(event, msgspec.json.encode(payload)))

    def hang_up(self) -> None:
        """End the transport after what is queued: the client notices, comes back by itself and recovers."""
        self.socket.queue.put_nowait(None)
