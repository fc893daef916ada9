"""A position of an agent: what is accepted from outside, and what watchers see of it."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta
from sqlalchemy import BigInteger, Column, Double, Index, Integer, Table, Uuid, func

from models.base import UtcTime, metadata
from models.errors import Future, Inaccurate, Jump, Stale
from models.message import OrderLocationUpdate

positions = Table(
    "positions",
    metadata,
    Column("order_id", Uuid, primary_key=True),
    Column("assignment", Integer, primary_key=True),
    # ts divided by LOCATION_TRAIL_INTERVAL_MS: the trail keeps one position of each interval
    Column("slot", BigInteger, primary_key=True),
    Column("ts", Double, nullable=False),
    Column("lat", Double, nullable=False),
    Column("lng", Double, nullable=False),
    Column("accuracy", Double),
    Column("heading", Double),
    Column("speed", Double),
    Column("recorded_at", UtcTime, nullable=False, server_default=func.now()),
    Index("ix_positions_recorded_at", "recorded_at"),
)

Latitude = Annotated[float, Meta(ge=-90, le=90)]
Longitude = Annotated[float, Meta(ge=-180, le=180)]
UnixMilliseconds = Annotated[int, Meta(ge=0, le=8_640_000_000_000_000)]
"""Upper bound: the largest time that JavaScript's Date holds."""
UnixMillisecondsFraction = Annotated[float, Meta(ge=0, le=8_640_000_000_000_000)]


class Position(msgspec.Struct, kw_only=True):
    """One fix. Degrees, metres, metres per second, percent; `ts` is Unix milliseconds, echoed as sent.

    Unknown members are ignored and null is absent: phones and browsers send more than we need.
    """

    SCHEMA: ClassVar[dict[str, Any]] = {
        "not": {"required": ["positions"]},  # that is a batch
        "examples": [{"lat": 12.9716, "lng": 77.5946, "ts": 1795253400000, "accuracy": 8, "speed": 6.4}],
    }

    lat: Latitude
    lng: Longitude
    ts: UnixMilliseconds | UnixMillisecondsFraction
    accuracy: Annotated[float, Meta(ge=0, le=1_000_000)] | None = None
    heading: Annotated[float, Meta(ge=0, le=360)] | None = None
    speed: Annotated[float, Meta(ge=0, le=10_000)] | None = None
    battery: Annotated[float, Meta(ge=0, le=100)] | None = None


class Place(msgspec.Struct, frozen=True):
    """Where something is, in degrees."""

    lat: float
    lng: float


EARTH_RADIUS_M = 6_371_000.0


def distance_m(a: Position | Place, b: Position | Place) -> float:
    """Metres between two places on a sphere (haversine); half a percent off at worst, which no rule here minds."""
    lat_a, lat_b = math.radians(a.lat), math.radians(b.lat)
    half_lat, half_lng = (lat_b - lat_a) / 2, math.radians(b.lng - a.lng) / 2
    chord = math.sin(half_lat) ** 2 + math.cos(lat_a) * math.cos(lat_b) * math.sin(half_lng) ** 2
    return 2 * EARTH_RADIUS_M * math.asin(min(1.0, math.sqrt(chord)))


class Limits(msgspec.Struct, frozen=True):
    """What a position may look like. The defaults are in the settings, their reasons in docs/positions.md."""

    accuracy_max_m: float
    age_max_ms: float
    future_max_ms: float
    speed_max_mps: float
    jump_slack_m: float
    jump_confirm_ms: float


class Pace(msgspec.Struct, frozen=True):
    """How often an agent is asked for its position: where it pays, and not where nobody looks."""

    normal_ms: int
    near_ms: int
    unwatched_ms: int
    near_m: float
    """Distance to the destination from which on those who wait look at every metre."""

    def next_interval_ms(self, watched: bool | None, left_m: float | None) -> int:
        """The pause before the next position. `watched`: whether somebody does; None: not known. `left_m`: distance to
        the destination; None: not known."""
        if watched is False:
            return self.unwatched_ms
        if watched and left_m is not None and left_m <= self.near_m:
            return self.near_ms
        return self.normal_ms


class Track(msgspec.Struct):
    """What is known of one agent on one order: enough to judge the next position."""

    newest: Position | None = None
    suspects: tuple[Position, Position] | None = None
    """First and last of the positions that were refused as jumps and agree with each other. When they have agreed for
    `jump_confirm_ms`, it was the newest one that was wrong."""

    def judge(self, position: Position, received_ms: float, limits: Limits) -> bool:
        """Whether the position is the newest, so that it is shown; False: it is history, for the trail only.

        Speed is judged by `ts`, not by arrival: what was buffered in a tunnel arrives all at once.

        Raises:
            Inaccurate, Future, Stale; Jump: nobody gets there from the last position in that time.
        """
        if position.accuracy is not None and position.accuracy > limits.accuracy_max_m:
            raise Inaccurate(f"A position may be {limits.accuracy_max_m:g} metres off at most.")
        if position.ts > received_ms + limits.future_max_ms:
            raise Future("The position is from the future; check the clock of the device.")
        if position.ts < received_ms - limits.age_max_ms:
            raise Stale(f"The position is older than {limits.age_max_ms / 1000:g} seconds.")
        if self.newest is not None and position.ts <= self.newest.ts:
            return False
        if self.newest is not None and _impossible(self.newest, position, limits):
            agrees = self.suspects is not None and not _impossible(self.suspects[1], position, limits)
            first = self.suspects[0] if self.suspects is not None and agrees else position
            self.suspects = (first, position)
            if position.ts - first.ts < limits.jump_confirm_ms:
                raise Jump("Nobody gets there from the last position in that time.")
        self.newest, self.suspects = position, None
        return True


def _impossible(a: Position, b: Position, limits: Limits) -> bool:
    reach_m = limits.jump_slack_m + limits.speed_max_mps * abs(b.ts - a.ts) / 1000
    return distance_m(a, b) > reach_m


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
