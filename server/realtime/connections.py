"""One connected client, as the rooms and the doors see it, and the two lanes to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from models.user import Actor
from server.realtime.websocket import BINARY, TEXT, encode

if TYPE_CHECKING:
    from server.realtime.recovery import Recoverable


class Frame:
    """A finished Socket.IO packet, made once and shared by everybody who gets it."""

    __slots__ = ("text", "wire")

    def __init__(self, text: str, attachments: list[bytes] | None = None) -> None:
        self.text = text
        self.wire = encode(TEXT, b"4" + text.encode())
        """As WebSocket frames: the packet with the Engine.IO packet type before it, then its binary attachments."""
        if attachments:
            self.wire += b"".join(encode(BINARY, attachment) for attachment in attachments)


def frame(event: str, payload: bytes) -> Frame:
    """The wire form of a Socket.IO event whose one argument is `payload`, a JSON text."""
    return Frame(f'2["{event}",{payload.decode()}]')


def acknowledgement(number: int, payload: bytes) -> Frame:
    """The wire form of the answer to the client's event that carried this number."""
    return Frame(f"3{number}[{payload.decode()}]")


class Wire(Protocol):
    """The way to one client, whether it is on a WebSocket or polls."""

    @property
    def gone(self) -> bool: ...

    def send_frame(self, message: Frame) -> None:
        """Put a message on the wire, after everything that was sent before. Nothing happens on a closed connection."""

    def send_latest(self, key: str, message: Frame) -> None:
        """Put state on the wire: while the client reads too slowly, only the newest message of each key is kept."""

    @property
    def direct(self) -> Callable[[bytes], object] | None:
        """What puts bytes on the wire as `send_latest` would; None while that has more to do, or nothing."""

    def when_received(self, callback: Callable[[], None]) -> None:
        """Call back when it is proven that the client has received everything that was sent until now; never, when the
        session ends before."""

    def hold(self, why: int = 1) -> None:
        """Read nothing more from this client until `resume`."""

    def resume(self, why: int = 1) -> None: ...

    def hang_up(self) -> None:
        """End the transport after what is queued: the client notices, comes back by itself and recovers."""


class Connection:
    """A Socket.IO session on the default namespace."""

    __slots__ = (
        "actor",
        "calls",
        "hang_up",
        "id",
        "keys",
        "last_calls",
        "left",
        "on_rewire",
        "recoverable",
        "send",
        "send_latest",
        "wire",
        "write",
    )

    def __init__(self, id_: str, wire: Wire, actor: Actor) -> None:
        self.id = id_
        self.wire = wire
        self.actor = actor
        self.send = wire.send_frame
        self.send_latest = wire.send_latest
        self.hang_up = wire.hang_up
        self.write: Callable[[bytes], object] | None = None
        """`wire.direct`, as it was told last."""
        self.on_rewire: Callable[[Connection], None] | None = None
        """Told when `write` has changed."""
        self.left = False
        """Whether the session has ended; its transport may live on."""
        self.keys: set[str] = set()
        """The rooms that it is in."""
        self.calls: set[asyncio.Task[None]] = set()
        """Events of this client that are being worked on."""
        self.last_calls: dict[str, asyncio.Task[None]] = {}
        """The last of them for each order: what a client asks of one order is done in its sequence."""
        self.recoverable: Recoverable | None = None
        """What is kept of it so that it can be recovered, if the client opted in."""

    @property
    def gone(self) -> bool:
        return self.left or self.wire.gone

    def rewire(self) -> None:
        """The way to the client has changed."""
        self.write = self.wire.direct
        if self.on_rewire is not None:
            self.on_rewire(self)

    def emit(self, event: str, payload: object) -> None:
        self.send(frame(event, msgspec.json.encode(payload)))


class Opening(NamedTuple):
    """How a connection begins."""

    payload: Mapping[str, object]
    """Stands in the answer to CONNECT, beside `sid`."""
    then: Callable[[], None]
    """Called in the very step in which that answer is put on the wire: nothing comes between."""


NOTHING_MORE = Opening({}, lambda: None)
"""The answer to CONNECT is `sid`, and nothing follows."""
