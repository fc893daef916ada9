"""A gateway whose webhooks say plainly what they mean: their body is the news itself, as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import msgspec

from handlers.ports import Delivery, Gateway
from models.errors import BadSignature, Malformed
from models.payment import News, Provider


class PlainGateway:
    """`on_read` is called with each body that is read: for tests that need something to happen or to go wrong then."""

    def __init__(self, provider: Provider = Provider.RAZORPAY, on_read: Callable[[bytes], None] | None = None) -> None:
        self.provider = provider
        self.on_read = on_read

    def receive(self, body: bytes, headers: Mapping[str, str]) -> Delivery:
        if headers.get("X-Signature") != "right":
            raise BadSignature("The X-Signature is not the right one.")
        return Delivery(event_id=headers["X-Event"], kind="news", refs=())

    def read(self, kind: str, body: bytes) -> Sequence[News]:
        if self.on_read is not None:
            self.on_read(body)
        try:
            return msgspec.json.decode(body, type=tuple[News, ...])
        except msgspec.MsgspecError as error:
            raise Malformed(f"This is no news: {error}") from error


def as_gateway(gateway: Any) -> Gateway:
    """For the type checker: of a gateway, webhooks need these two methods only."""
    return cast(Gateway, gateway)


def said(*news: News) -> bytes:
    return msgspec.json.encode(news)
