"""Delivers a simulator's webhooks as a gateway does: in no order, and again and again until somebody says 2xx."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import aiohttp
import msgspec
import structlog

from server.adapters.sandbox.mischief import Mischief

log = structlog.get_logger()

ATTEMPTS_KEPT = 1000
"""How many attempts a simulator remembers, for tests and for `/sandbox/deliveries`."""


class Parcel(msgspec.Struct, frozen=True, kw_only=True):
    """One event, the same bytes in every attempt. `headers` are made anew for each, as some gateways sign the time."""

    event_id: str
    kind: str
    body: bytes
    headers: Callable[[], Mapping[str, str]]
    retries_s: Sequence[float]
    """How long after the first attempt each further one comes."""


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One delivery. `status` None: no answer in time."""

    event_id: str
    kind: str
    status: int | None


class Courier:
    """Sends parcels to one address. `pace`: the gateway's seconds are multiplied by it, so that tests need not wait."""

    def __init__(self, url: str, mischief: Mischief, *, pace: float, answer_limit_s: float, seed: int) -> None:
        self.url = url
        self._mischief = mischief
        self._pace, self._answer_limit_s = pace, answer_limit_s
        self._random = random.Random(seed)
        self._tasks: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None
        self.attempts: deque[Attempt] = deque(maxlen=ATTEMPTS_KEPT)

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self._answer_limit_s))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._session:
            await self._session.close()

    def send(self, parcel: Parcel) -> None:
        """Begin to deliver. Without an address, and when the mischief loses it, nothing is sent."""
        if not self.url or self._mischief.take_loss():
            return
        for _ in range(self._mischief.webhook_copies):
            wait_s = self._mischief.webhook_delay_s + self._random.random() * self._mischief.webhook_shuffle_s
            task = asyncio.create_task(self._deliver(parcel, wait_s))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def idle(self) -> None:
        """Wait until nothing is under way any more."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def _deliver(self, parcel: Parcel, wait_s: float) -> None:
        began_s = 0.0
        await asyncio.sleep(wait_s)
        for after_s in (0.0, *parcel.retries_s):
            await asyncio.sleep((after_s - began_s) * self._pace)
            began_s = after_s
            status = await self._attempt(parcel)
            self.attempts.append(Attempt(event_id=parcel.event_id, kind=parcel.kind, status=status))
            if status is not None and 200 <= status < 300:
                return
        log.warning("sandbox_webhook_given_up", kind=parcel.kind, event_id=parcel.event_id)

    async def _attempt(self, parcel: Parcel) -> int | None:
        assert self._session
        try:
            async with self._session.post(
                self.url, data=parcel.body, headers=parcel.headers(), allow_redirects=False
            ) as answer:
                return answer.status
        except (aiohttp.ClientError, TimeoutError):
            return None
