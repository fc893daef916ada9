"""A lean WebSocket: one asyncio protocol a connection, taken over from aiohttp right after the handshake.

Why our own: aiohttp's WebSocket keeps the request with its headers, two tasks and several queues for every
connection, and wakes a task for every message. Here a message is parsed in the callback that read it and handed on in
the same step, and a prepared frame goes to the kernel in one call (docs/decisions/0012-lean-websocket.md has the
figures). RFC 6455, server side, without extensions.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re

from aiohttp import hdrs, web

KEY = re.compile("[A-Za-z0-9+/]{22}==")
"""Sec-WebSocket-Key: 16 bytes in base64."""
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
TEXT, BINARY, CLOSE, PING, PONG, CONTINUATION = 1, 2, 8, 9, 10, 0

NORMAL, GOING_AWAY, PROTOCOL_ERROR, NOT_UTF8, TOO_BIG = 1000, 1001, 1002, 1007, 1009
"""Close codes (RFC 6455 section 7.4.1)."""

CLOSE_TIMEOUT_S = 2.0
"""How long a peer may take to answer a close frame, and to read what was sent before it."""


def encode(opcode: int, payload: bytes) -> bytes:
    """A whole frame from server to client: final, unmasked."""
    length = len(payload)
    if length < 126:
        return bytes((0x80 | opcode, length)) + payload
    if length < 65536:
        return bytes((0x80 | opcode, 126)) + length.to_bytes(2) + payload
    return bytes((0x80 | opcode, 127)) + length.to_bytes(8) + payload


def is_handshake(request: web.BaseRequest) -> bool:
    """Whether the request asks for a WebSocket (RFC 6455 section 4.2.1)."""
    headers = request.headers
    return (
        request.method == "GET"
        and headers.get(hdrs.UPGRADE, "").lower() == "websocket"
        and "upgrade" in headers.get(hdrs.CONNECTION, "").lower()
        and headers.get(hdrs.SEC_WEBSOCKET_VERSION) == "13"
        and KEY.fullmatch(headers.get(hdrs.SEC_WEBSOCKET_KEY, "")) is not None
    )


def can_take_over(request: web.BaseRequest) -> bool:
    """Whether `WebSocket.take_over` can work here: not every transport lets its protocol be changed."""
    transport = request.transport
    return transport is not None and hasattr(transport, "set_protocol") and hasattr(request.protocol, "connection_lost")


class WebSocket(asyncio.Protocol):
    """One connection. Subclasses get each message in `on_text` or `on_binary`, and `on_close` once at the end."""

    __slots__ = ("_buffer", "_fragments", "_held", "_max_bytes", "_transport", "closing")

    def __init__(self, max_bytes: int) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._fragments: tuple[int, bytearray] | None = None
        self._max_bytes = max_bytes
        self._held = 0
        self.closing = False
        """Whether a close frame was sent, or the transport is going: nothing more is sent."""

    def take_over(self, request: web.BaseRequest) -> None:
        """Answer the handshake and take the transport from aiohttp, in one step: not a byte is read in between.

        aiohttp is told that the connection was lost, so it lets go of the request and of everything it kept for it.
        Raises ConnectionResetError: the connection is gone already.
        """
        protocol, transport = request.protocol, request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has gone")
        key = request.headers[hdrs.SEC_WEBSOCKET_KEY].encode()
        accept = base64.b64encode(hashlib.sha1(key + GUID, usedforsecurity=False).digest())
        transport.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )
        self._transport = transport
        self._transport.set_protocol(self)
        protocol.transport = None
        protocol.connection_lost(None)

    # what subclasses fill in

    def on_frame(self) -> None:
        """A frame was read, and is handed on next: a message, a part of one, or one of the WebSocket's own."""

    def on_text(self, message: str) -> None:
        """A whole text message."""

    def on_binary(self, message: bytes) -> None:
        """A whole binary message."""

    def on_pong(self, payload: bytes) -> None:
        """The peer has answered a PING that carried this."""

    def on_close(self) -> None:
        """The connection is gone."""

    # sending

    def write(self, frame: bytes) -> None:
        """Send a frame that `encode` made. Nothing happens on a closing connection."""
        if not self.closing:
            self._transport.write(frame)  # type: ignore[union-attr]

    def close(self, code: int = NORMAL) -> None:
        """Say goodbye; the transport ends when the peer has answered, or after CLOSE_TIMEOUT_S."""
        if self.closing or self._transport is None:
            return
        self._transport.write(encode(CLOSE, code.to_bytes(2)))
        self._stop()
        asyncio.get_running_loop().call_later(CLOSE_TIMEOUT_S, self.abort)

    def _stop(self) -> None:
        """From here on nothing more is sent."""
        self.closing = True

    def abort(self) -> None:
        """End the transport at once; what was not sent yet is dropped."""
        self._stop()
        if self._transport is not None:
            self._transport.abort()

    def hold(self, why: int = 1) -> None:
        """Read nothing more from this peer until `resume`. `why` is one bit: all reasons must be gone."""
        if not self._held and self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()
        self._held |= why

    def resume(self, why: int = 1) -> None:
        if not self._held:
            return
        self._held &= ~why
        if not self._held and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
            self.data_received(b"")

    # receiving

    def connection_lost(self, error: Exception | None) -> None:
        self._stop()
        self._transport = None
        self._buffer = b""
        self.on_close()

    def data_received(self, data: bytes) -> None:
        if self._buffer:
            data = self._buffer + data
        position, end = 0, len(data)
        while end - position >= 2 and not self._held and self._transport is not None:
            first, second = data[position], data[position + 1]
            length, start = second & 0x7F, position + 2
            if length == 126:
                if end - position < 4:
                    break
                length, start = int.from_bytes(data[start : start + 2]), start + 2
            elif length == 127:
                if end - position < 10:
                    break
                length, start = int.from_bytes(data[start : start + 8]), start + 8
            if not second & 0x80 or first & 0x70 or (first & 0x08 and (length > 125 or not first & 0x80)):
                self._fail(PROTOCOL_ERROR)
                return
            if length > self._max_bytes:
                self._fail(TOO_BIG)
                return
            stop = start + 4 + length
            if end < stop:
                break
            payload = _unmask(data[start : start + 4], data[start + 4 : stop])
            position = stop
            self.on_frame()
            self._frame(first & 0x0F, bool(first & 0x80), payload)
        self._buffer = data[position:] if position < end and self._transport is not None else b""

    def _frame(self, opcode: int, final: bool, payload: bytes) -> None:
        if opcode == TEXT and final and self._fragments is None:
            self._message(TEXT, payload)
        elif opcode in (TEXT, BINARY, CONTINUATION):
            self._fragment(opcode, final, payload)
        elif opcode == PING:
            self.write(encode(PONG, payload))
        elif opcode == CLOSE:
            if not self.closing:
                self.write(encode(CLOSE, payload[:2]))
            self._end()
        elif opcode == PONG:
            self.on_pong(payload)
        else:
            self._fail(PROTOCOL_ERROR)

    def _fragment(self, opcode: int, final: bool, payload: bytes) -> None:
        if (opcode == CONTINUATION) == (self._fragments is None):
            self._fail(PROTOCOL_ERROR)
            return
        if self._fragments is None:
            self._fragments = opcode, bytearray()
        kind, parts = self._fragments
        parts += payload  # grows in place: a message may come in any number of crumbs
        if len(parts) > self._max_bytes:
            self._fail(TOO_BIG)
        elif final:
            self._fragments = None
            self._message(kind, bytes(parts))

    def _message(self, opcode: int, payload: bytes) -> None:
        if self.closing:
            return
        if opcode == BINARY:
            self.on_binary(payload)
            return
        try:
            text = payload.decode()
        except UnicodeDecodeError:
            self._fail(NOT_UTF8)
            return
        self.on_text(text)

    def _fail(self, code: int) -> None:
        """The peer broke the protocol: say which rule, and go."""
        if self._transport is not None:
            if not self.closing:
                self._transport.write(encode(CLOSE, code.to_bytes(2)))
            self._end()

    def _end(self) -> None:
        """Close the transport after what was sent, for which a peer that reads nothing has CLOSE_TIMEOUT_S."""
        self._stop()
        if self._transport is not None:
            self._transport.close()
            asyncio.get_running_loop().call_later(CLOSE_TIMEOUT_S, self.abort)


def _unmask(mask: bytes, payload: bytes) -> bytes:
    """XOR with the repeated mask: two big integers are the fastest way in plain Python."""
    length = len(payload)
    if not length:
        return b""
    if mask == b"\0\0\0\0":
        return payload
    whole = mask * ((length + 3) // 4)
    return (int.from_bytes(payload) ^ int.from_bytes(whole[:length])).to_bytes(length)
