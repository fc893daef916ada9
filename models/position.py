"""A position of an agent: what is accepted from outside, and what watchers see of it."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from models.message import OrderLocationUpdate

Latitude = Annotated[float, Meta(ge=-90, le=90)]
Longitude = Annotated[float, Meta(ge=-180, le=180)]
UnixMilliseconds = Annotated[int, Meta(ge=0, le=8_640_000_000_000_000)]
"""Upper bound: the largest time that JavaScript's Date holds."""
UnixMillisecondsFraction = Annotated[float, Meta(ge=0, le=8_640_000_000_000_000)]


class Position(msgspec.Struct, kw_only=True):
    """One fix. Degrees, metres, metres per second, percent; `ts` is Unix milliseconds, echoed as sent.

    Unknown members are ignored and null is absent: phones and browsers send more than we need.
    """

    lat: Latitude
    lng: Longitude
    ts: UnixMilliseconds | UnixMillisecondsFraction
    accuracy: Annotated[float, Meta(ge=0, le=1_000_000)] | None = None
    heading: Annotated[float, Meta(ge=0, le=360)] | None = None
    speed: Annotated[float, Meta(ge=0, le=10_000)] | None = None
    battery: Annotated[float, Meta(ge=0, le=100)] | None = None


def shown(order_id: str, position: Position) -> bytes:
    """The payload that watchers of the order get, as JSON. The battery is the agent's own business."""
    return msgspec.json.encode(
        OrderLocationUpdate(
            order_id=order_id,
            lat=position.lat,
            lng=position.lng,
            ts=position.ts,
            accuracy=position.accuracy,
            heading=position.heading,
            speed=position.speed,
        )
    )
