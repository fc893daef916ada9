"""The official Razorpay SDK, made fit for a server: bounded threads, bounded time, and errors that keep their status.

The SDK (2.0.1) is synchronous, waits for ever by default, prints, and folds every refusal into three exceptions without
their HTTP status. Only its way through `Client.request` is replaced here; the resources above it are used as they are.
"""

from __future__ import annotations

import asyncio
import ipaddress
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
import razorpay
import requests
import urllib3

from handlers.ports import GatewayAway, GatewayFailed, GatewayRefused, GatewayUnknown
from models.payment import Provider
from server.adapters.bounds import words
from server.adapters.breaker import Breaker

ANSWER_MAX_BYTES = 4 * 1024 * 1024
"""Largest answer that is read; a full page of payments is about 200 KB."""

CONNECT_TIMEOUT_S = 5
"""Time limit of connecting, as part of the whole."""

GRACE_S = 0.25
"""How much later than the call's own time limit the caller gives up, for a gateway that answers byte by byte."""

T = TypeVar("T")


class _Error(msgspec.Struct):
    code: str | None = None
    description: str | None = None
    reason: str | None = None


class _ErrorBody(msgspec.Struct):
    error: _Error


class Client(razorpay.Client):  # type: ignore[misc]  # the SDK has no types
    """The SDK's client for one thread. `deadline`: when the operation must be over, in seconds of `time.monotonic`."""

    deadline: float

    def request(self, method: str, path: str, **options: Any) -> Any:
        """Send one request; in place of the SDK's, which loses the status, prints, and knows no time limit.

        Raises:
            GatewayRefused: 4xx.
            GatewayAway: nobody was reached, or 429: surely nothing happened.
            GatewayUnknown: no answer in time, 3xx, 5xx, or an answer that is no JSON object.
        """
        options = self._update_user_agent_header(options)
        left_s = self.deadline - time.monotonic()
        if left_s <= 0:
            raise GatewayUnknown(Provider.RAZORPAY, "timeout", "the time limit was over before the last request")
        try:
            response = self.session.request(
                method,
                self.base_url + path,
                auth=self.auth,
                verify=self.cert_path,
                timeout=(min(CONNECT_TIMEOUT_S, left_s), left_s),
                allow_redirects=False,
                stream=True,
                **options,
            )
            try:
                body = response.raw.read(ANSWER_MAX_BYTES + 1, decode_content=True)
            finally:
                response.close()
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise _transport(error) from error
        return _judged(response.status_code, body)


def _transport(error: Exception) -> GatewayFailed:
    """Whether anything can have happened: not when no connection was made."""
    reason = getattr(error.args[0] if error.args else None, "reason", None)
    if isinstance(error, requests.ConnectTimeout) or isinstance(
        reason, (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError)
    ):
        return GatewayAway(Provider.RAZORPAY, "not_reached", type(reason or error).__name__)
    code = "timeout" if isinstance(error, (requests.Timeout, urllib3.exceptions.TimeoutError)) else "connection_lost"
    return GatewayUnknown(Provider.RAZORPAY, code, type(reason or error).__name__)


def _judged(status: int, body: bytes) -> dict[str, Any]:
    """The answer, or the error that it means. Source: Razorpay's error codes, and what proxies answer in its place."""
    if status == 429:
        raise GatewayAway(Provider.RAZORPAY, "rate_limited", "too many requests")
    if status == 408 or not (200 <= status < 300 or 400 <= status < 500):
        raise GatewayUnknown(Provider.RAZORPAY, f"http_{status}", "the gateway failed")
    try:
        if status < 300:
            return msgspec.json.decode(body, type=dict[str, Any])
        error = msgspec.json.decode(body, type=_ErrorBody).error
    except (msgspec.MsgspecError, RecursionError) as wrong:
        raise GatewayUnknown(Provider.RAZORPAY, f"http_{status}", "the answer makes no sense") from wrong
    code, message = words(error.code) or f"http_{status}", words(error.description) or "refused"
    raise GatewayRefused(Provider.RAZORPAY, status, code, message)


class Threads:
    """Carries out operations on the SDK in threads of their own, at most `threads_max` at once, each within `timeout_s`
    from when it starts; it waits for a thread no longer than that either."""

    def __init__(
        self, key_id: str, key_secret: str, base_url: str, *, timeout_s: float, threads_max: int, breaker: Breaker
    ) -> None:
        self._auth, self._base_url = (key_id, key_secret), base_url
        self._timeout_s = timeout_s
        self._breaker = breaker
        self._pool = ThreadPoolExecutor(threads_max, thread_name_prefix="razorpay")
        self._free = asyncio.Semaphore(threads_max)
        self._own = threading.local()

    async def run(self, operation: str, work: Callable[[Client], T]) -> T:
        """The result of `work`, which may send several requests. `operation`: its name in the metrics.

        Raises:
            GatewayAway: also when every thread is taken for too long.
            GatewayRefused, GatewayUnknown.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._free.acquire()
        except TimeoutError:
            raise GatewayAway(Provider.RAZORPAY, "busy", "every thread for this gateway is taken") from None
        started = False
        try:
            with self._breaker.call(operation):
                future = self._pool.submit(self._work, work, time.monotonic() + self._timeout_s)
                started = True
                return await self._ended(future)
        finally:
            if not started:
                self._free.release()

    async def close(self) -> None:
        """End the threads, once the requests that they are in have ended."""
        await asyncio.to_thread(self._pool.shutdown, cancel_futures=True)

    async def _ended(self, future: Future[T]) -> T:
        """Wait for it. Its thread is free when it has really ended, also if nobody waits any more."""
        loop = asyncio.get_running_loop()
        waiting = asyncio.wrap_future(future, loop=loop)
        waiting.add_done_callback(self._release)
        try:
            async with asyncio.timeout(self._timeout_s + GRACE_S):
                return await asyncio.shield(waiting)
        except TimeoutError:
            raise GatewayUnknown(Provider.RAZORPAY, "timeout", "no whole answer in time") from None

    def _release(self, waiting: asyncio.Future[Any]) -> None:
        self._free.release()
        if not waiting.cancelled():
            waiting.exception()  # is looked at here in case nobody waits for it any more

    def _work(self, work: Callable[[Client], T], deadline: float) -> T:
        client = self._client()
        client.deadline = deadline
        return work(client)

    def _client(self) -> Client:
        """This thread's own: a session of `requests` is not for several threads."""
        if not hasattr(self._own, "client"):
            session = requests.Session()
            session.trust_env = not is_loopback(self._base_url)  # no proxy stands between us and this machine
            self._own.client = Client(session, auth=self._auth, base_url=self._base_url)
        client: Client = self._own.client
        return client


def is_loopback(url: str) -> bool:
    """Whether the URL's host is this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
