"""Engine.IO's other transport: HTTP requests in the shape of an asyncio transport.

A session writes WebSocket frames, whatever its transport is. Here they wait for the next GET and leave as its payload;
when the session moves to a WebSocket, those that still wait are what that WebSocket sends first, byte for byte.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from models.errors import Malformed
from server.realtime.websocket import BINARY, CLOSE, GOING_AWAY, PING, TEXT

if TYPE_CHECKING:
    from server.realtime.session import Probe, Session

SEPARATOR = b"\x1e"
GOODBYE, NOOP = b"1", b"6"
_COME_BACK = GOING_AWAY.to_bytes(2)

POLLED = "134"
"""Types of the packets that a client may send in a payload: close, pong, message."""


def packets_of(body: bytes) -> list[str | bytes]:
    """The packets of a payload: text as it is, binary unpacked.

    Raises:
        Malformed: it is no payload, or holds a packet that no client sends so.
    """
    packets: list[str | bytes] = []
    try:
        for packet in body.decode().split(SEPARATOR.decode()):
            if packet[:1] == "b":
                packets.append(base64.b64decode(packet[1:], validate=True))
            elif packet and packet[0] in POLLED:
                packets.append(packet)
            else:
                raise Malformed("The payload holds a packet that no client may send.")
    except (UnicodeError, binascii.Error):
        raise Malformed("The body is not a payload of Engine.IO.") from None
    return packets


class Polling(asyncio.Transport):
    """The transport of a session that polls. Bounded like a WebSocket's: the session is told when too much waits."""

    __slots__ = (
        "_ended",
        "_frames",
        "_high_bytes",
        "_paused",
        "_reading",
        "_session",
        "_size_bytes",
        "_unproven",
        "_waiting",
        "posting",
        "probe",
        "yields",
    )

    def __init__(self, session: Session, high_bytes: int) -> None:
        super().__init__()
        self._session = session
        self._high_bytes = high_bytes
        self._frames: list[bytes] = []
        self._size_bytes = 0
        self._paused = False
        """Whether the session was told to write less."""
        self._reading: asyncio.Future[None] | None = None
        """Pending while the session wants to read nothing."""
        self._waiting: asyncio.Future[None] | None = None
        """The GET that waits, if one does."""
        self._unproven: list[bytes] = []
        """Marks among the packets of the last answer: the next GET proves that it came."""
        self._ended = False
        self.posting = False
        """Whether a POST is being worked on."""
        self.probe: Probe | None = None
        """The WebSocket that the client wants to change to."""
        self.yields = False
        """Whether the client has tried it, and now waits for its last GET to be answered."""

    @property
    def ended(self) -> bool:
        return self._ended

    # what the client sends

    async def poll(self) -> bytes | None:
        """The payload that answers a GET, as soon as there is one. None: another GET waits already, so that nobody
        could say who gets what; the session ends, and the other one is told so."""
        if self._waiting is not None:
            self._session.close()
            return None
        self._prove()
        if not (self._frames or self.yields or self._ended):
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        return NOOP if self._ended else self._take()

    async def receive(self, packets: list[str | bytes]) -> None:
        """Hand on what a POST brought, as fast as the session takes it."""
        for packet in packets:
            while self._reading is not None:
                await asyncio.shield(self._reading)
            if self._session.closing:
                return
            self._session.on_frame()
            if isinstance(packet, str):
                self._session.on_text(packet)
            else:
                self._session.on_binary(packet)

    def _prove(self) -> None:
        unproven, self._unproven = self._unproven, []
        for mark in unproven:
            self._session.on_pong(mark)

    def _take(self) -> bytes:
        packets, ends = [], b""
        for opcode, payload in _frames(self._drain()):
            if opcode == TEXT:
                packets.append(payload)
            elif opcode == BINARY:
                packets.append(b"b" + base64.b64encode(payload))
            elif opcode == PING:
                self._unproven.append(payload)
            elif opcode == CLOSE:
                ends = payload
        if ends:
            # With other packets it would make the JavaScript client drop them, and the Python client takes it for good.
            # Who shall come back is told nothing: its next GET finds no session.
            self.abort()
            return SEPARATOR.join(packets) or (NOOP if ends == _COME_BACK else GOODBYE)
        if self._paused:
            self._paused = False
            self._session.resume_writing()
        return SEPARATOR.join(packets) or NOOP

    def _drain(self) -> bytes:
        frames = b"".join(self._frames)
        self._frames.clear()
        self._size_bytes = 0
        return frames

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    # the change to a WebSocket

    def yield_to_probe(self) -> None:
        """The client has tried the WebSocket: it sends nothing there before its GET is answered."""
        self.yields = True
        self._wake()

    def forget_probe(self) -> None:
        """The WebSocket came to nothing: the session goes on polling."""
        self.probe, self.yields = None, False

    def leave(self) -> bytes:
        """The session goes on without this transport: everything that no GET has taken yet. The client came here
        because its last GET was answered."""
        self._prove()
        frames = self._drain()
        self._ended = True
        self._wake()
        return frames

    # what a session asks of its transport

    def write(self, data: Any) -> None:
        if self._ended:
            return
        self._frames.append(data)
        self._size_bytes += len(data)
        self._wake()
        if self._size_bytes > self._high_bytes and not self._paused:
            self._paused = True
            self._session.pause_writing()

    def get_write_buffer_size(self) -> int:
        return self._size_bytes

    def is_closing(self) -> bool:
        return self._ended

    def pause_reading(self) -> None:
        if self._reading is None:
            self._reading = asyncio.get_running_loop().create_future()

    def resume_reading(self) -> None:
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.set_result(None)

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        """End at once. A GET that waits is answered, else its client hangs, and a drain waits for it."""
        if self._ended:
            return
        self._ended = True
        self._drain()
        self._wake()
        self.resume_reading()
        if self.probe is not None:
            self.probe.abort()
        asyncio.get_running_loop().call_soon(self._session.connection_lost, None)


def _frames(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(opcode, payload) of frames that `websocket.encode` made."""
    position = 0
    while position < len(data):
        opcode, length = data[position] & 0x0F, data[position + 1]
        position += 2
        if length > 125:
            width = 2 if length == 126 else 8
            length = int.from_bytes(data[position : position + width])
            position += width
        yield opcode, data[position : position + length]
        position += length
