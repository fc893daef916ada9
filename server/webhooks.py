"""The door of gateways: a signed webhook is stored and answered at once; the inbox worker applies it later.

The answer decides whether the gateway sends it again: 200 says that it is stored, 400 only that its signature is wrong,
5xx that it is not stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import structlog
from aiohttp import web

from handlers import webhooks
from handlers.ports import Gateways
from models.errors import BadSignature, Malformed, NotFound, TooLarge, Unavailable
from models.payment import Provider
from server import metrics
from server.db import Database
from server.limits import Limits
from server.settings import Settings

log = structlog.get_logger()

TELL_UNSIGNED_S = 60.0
"""How often the log tells of webhooks that are not signed, for each gateway."""


class Stored(msgspec.Struct):
    """The webhook is stored; what it says is applied later."""


class WebhookDoor:
    """`wake` is called when one was stored, so that a worker of this process applies it at once."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        gateways: Gateways,
        limits: Limits,
        wake: Callable[[], None],
    ) -> None:
        self._database = database
        self._gateways = gateways
        self._limits = limits
        self._bytes_max = settings.webhook_max_bytes
        self.wake = wake
        self._told_at: dict[Provider, float] = {}

    async def receive(self, request: web.Request, provider: Provider) -> web.Response:
        """Store a webhook.

        Raises:
            NotFound: this gateway is not set up. TooLarge, BadSignature; RateLimited: too many bad signatures from this
            address. Unavailable: not stored.
        """
        gateway = self._gateways.get(provider)
        if gateway is None:
            raise NotFound(f"{provider} is not set up here.")
        body = await self._read(request)
        try:
            delivery = gateway.receive(body, request.headers)
        except BadSignature:
            metrics.webhooks_received.labels(provider, "unsigned").inc()
            self._tell_unsigned(provider)
            # gateways send bursts from few addresses, so what they sign is not counted; what others send is
            await self._limits.stranger(request)
            raise
        try:
            async with self._database.statement() as tx:
                stored = await webhooks.store(tx, provider, delivery, body)
        except Unavailable:
            metrics.webhooks_received.labels(provider, "not_stored").inc()
            raise
        metrics.webhooks_received.labels(provider, "stored" if stored else "repeated").inc()
        self.wake()
        return web.Response(body=b"{}", content_type="application/json")

    def _tell_unsigned(self, provider: Provider) -> None:
        """A secret that is not the gateway's stops every webhook, so somebody must hear of it; a minute apart."""
        now = time.monotonic()
        if now - self._told_at.get(provider, -TELL_UNSIGNED_S) >= TELL_UNSIGNED_S:
            self._told_at[provider] = now
            log.warning("webhook_unsigned", provider=provider, remedy="is the webhook secret the gateway's?")

    async def _read(self, request: web.Request) -> bytes:
        """The body, byte for byte: it is what is signed.

        Raises:
            TooLarge: above `WEBHOOK_MAX_BYTES`. Malformed: cut off.
        """
        if (request.content_length or 0) > self._bytes_max:
            raise TooLarge("The webhook is larger than this server takes.")
        body = bytearray()
        try:
            async for part in request.content.iter_any():
                body += part
                if len(body) > self._bytes_max:
                    raise TooLarge("The webhook is larger than this server takes.")
        except web.RequestPayloadError:
            raise Malformed("The body is cut off, or is not what its headers say.") from None
        return bytes(body)
