"""How long a client may take: connections that dawdle with their headers, with their body or with reading are closed.

aiohttp waits for ever for the rest of a request and for a client that reads nothing; each of these waits has a limit
here. A connection that is idle between two requests ends after `KEEP_ALIVE_TIMEOUT_S` (aiohttp's own). No clock runs
while a whole request is being worked on: that is `REQUEST_TIMEOUT_MS`, in server/edges.py.
"""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import Callable
from typing import Any, cast

import structlog
from aiohttp import hdrs, web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.streams import StreamReader

from models.errors import Malformed, Refused, TooLarge
from server import metrics
from server.calls import problem
from server.edges import protect
from server.settings import Settings

log = structlog.get_logger()

BACKLOG = 4096
LINGER_S = 2.0
"""How long the rest of a body that nobody wants is read, so that the client gets to see the answer."""

TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class TooSlow(Refused):
    code, status, title = "malformed", 408, "The request did not arrive in time"


class _HeadersTooLarge(TooLarge):
    status = 431


class Site(web.BaseSite):
    """A listening socket whose connections have limits."""

    def __init__(self, runner: web.AppRunner, listener: socket.socket, settings: Settings) -> None:
        super().__init__(runner)
        self._listener = listener
        self._limits = settings
        self.open = 0
        """HTTP connections that are open now."""
        self.taken_over: Callable[[], int] = lambda: 0
        """Connections that were HTTP once and still are open."""

    @property
    def name(self) -> str:
        host, port = self._listener.getsockname()[:2]
        return f"http://{host}:{port}"

    @property
    def full(self) -> bool:
        return self._limits.rate_limits == "on" and self.open + self.taken_over() >= self._limits.connections_max

    async def start(self) -> None:
        """Listen."""
        await super().start()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._connection, sock=self._listener, backlog=BACKLOG)

    def _connection(self) -> Connection:
        server = self._runner.server
        assert server is not None
        return Connection(
            self,
            self._limits,
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=self._limits.keep_alive_timeout_s,
            lingering_time=LINGER_S,
            access_log=None,
            auto_decompress=False,  # an encoded body is refused by `read_json`, not unpacked to be thrown away
            max_field_size=2 * max(self._limits.token_max_bytes, 4096),  # too long a token gets its refusal
        )


class Connection(web.RequestHandler):
    """aiohttp's side of one connection, with a clock on every wait for the client."""

    __slots__ = ("_body", "_clock", "_counted", "_heard", "_leaving", "_settings", "_site", "_stalled", "_wire")

    def __init__(self, site: Site, settings: Settings, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._site = site
        self._settings = settings
        self._wire: asyncio.Transport | None = None
        self._counted = False
        self._heard = False
        """Whether part of a request was heard that is not whole yet."""
        self._body: StreamReader | None = None
        """The body that the client is in the middle of."""
        self._clock: asyncio.TimerHandle | None = None
        """Runs while the client is in the middle of something."""
        self._stalled: asyncio.TimerHandle | None = None
        self._leaving: asyncio.TimerHandle | None = None

    # a connection's life

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._wire = cast(asyncio.Transport, transport)
        if self._site.full:
            self._cut("full")
            return
        self._site.open += 1
        self._counted = True
        super().connection_made(transport)
        self._start_clock(self._settings.headers_timeout_ms)
        if self._task_handler is not None:
            self._task_handler.add_done_callback(self._leave)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._counted:
            self._site.open -= 1
            self._counted = False
        self._wire = None
        self._stop_clock()
        for handle in (self._stalled, self._leaving):
            if handle is not None:
                handle.cancel()
        super().connection_lost(exc)

    def _leave(self, task: asyncio.Task[None]) -> None:
        """The server is done with the connection: what is still unsent has the time of a write."""
        if self._wire is not None:
            self._leaving = self._loop.call_later(self._settings.write_timeout_ms / 1000, self._cut, "unread")

    def _cut(self, why: str) -> None:
        metrics.connections_cut.labels(why).inc()
        if self._wire is not None:
            self._wire.abort()

    # what the client sends

    def data_received(self, data: bytes) -> None:
        heads = self._request_count
        super().data_received(data)
        if self._upgraded:
            self._stop_clock()
        elif self._request_count != heads:
            self._stop_clock()
            body = self._messages[-1][1]
            if not body.is_eof():
                self._body = body
                self._start_clock(self._settings.body_timeout_ms)
        elif self._body is not None:
            if self._body.is_eof():
                self._stop_clock()
        elif data and not self._buffer_paused:
            self._heard = True
            if self._clock is None:
                self._start_clock(self._settings.headers_timeout_ms)

    def _start_clock(self, limit_ms: int) -> None:
        self._clock = self._loop.call_later(limit_ms / 1000, self._too_slow)

    def _stop_clock(self) -> None:
        self._body = None
        self._heard = False
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _too_slow(self) -> None:
        body, heard = self._body, self._heard
        self._stop_clock()
        if body is None:
            metrics.connections_cut.labels("headers").inc()
            if heard and self.transport is not None:
                self.transport.write(TOO_SLOW)
            self.force_close()
        elif self._request_in_progress:
            # whoever reads the body is told, answers, and the connection ends after that
            metrics.connections_cut.labels("body").inc()
            body.set_exception(TooSlow("The body did not arrive in time."))
            body.feed_eof()
            self.close()
        else:
            self._cut("body")

    # what the client reads

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self._loop.call_later(self._settings.write_timeout_ms / 1000, self._cut, "unread")

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        super().resume_writing()

    # what never became a request

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Bytes that are no HTTP are refused in the form of any refusal; they are no error of ours."""
        if isinstance(exc, ConnectionError):
            raise exc  # the client has gone: there is nobody to answer
        if status >= 500:
            return super().handle_error(request, status, exc, message)
        refusal = (
            _HeadersTooLarge("The request line or a header is longer than this server takes.")
            if isinstance(exc, LineTooLong)
            else Malformed("This is not a request of HTTP/1.1.")
        )
        request_id = str(uuid.uuid4())
        log.info("request_unreadable", request_id=request_id, error=type(exc).__name__)
        response = problem(refusal, request_id)
        response.headers["X-Request-Id"] = request_id
        protect(response.headers)
        response.headers[hdrs.SERVER] = "waybill"  # or aiohttp names itself and its version
        response.force_close()
        return response
