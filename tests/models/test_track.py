"""Which positions are believed: on recorded traces, on invented ones, and on every rule by itself."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import Future, Inaccurate, Jump, Refused, Stale
from models.position import Limits, Position, Track, distance_m
from server.settings import Settings

TRACE_FOLDER = Path(__file__).parent.parent / "fixtures" / "traces"
TRACES = ("munich-car.csv", "visnjan-car.csv", "liverpool-buses.csv")
HONEST_REFUSED_MAX = 0.01
"""At most this share of honest positions may be refused."""

DEFAULTS = Settings()
LIMITS = Limits(
    accuracy_max_m=DEFAULTS.location_accuracy_max_m,
    age_max_ms=DEFAULTS.location_max_age_ms,
    future_max_ms=DEFAULTS.location_future_max_ms,
    speed_max_mps=DEFAULTS.location_speed_max_mps,
    jump_slack_m=DEFAULTS.location_jump_slack_m,
    jump_confirm_ms=DEFAULTS.location_jump_confirm_ms,
)
NOW_MS = 1_795_000_000_000.0
HERE = Position(lat=12.9716, lng=77.5946, ts=NOW_MS)
METRE_LAT = 1 / 111_195
"""Degrees of latitude in a metre."""


def moved(position: Position, *, metres: float = 0.0, ms: float = 0.0, **changes: float) -> Position:
    """Later and further north."""
    return msgspec.structs.replace(position, lat=position.lat + metres * METRE_LAT, ts=position.ts + ms, **changes)


def rides(name: str) -> dict[str, list[Position]]:
    """The trace's positions by vehicle and trip, in the order of the file."""
    found: dict[str, list[Position]] = {}
    with (TRACE_FOLDER / name).open() as file:
        for row in csv.DictReader(file):
            ride = f"{row.get('vehicle')}/{row.get('trip')}"
            fix = Position(lat=float(row["lat"]), lng=float(row["lng"]), ts=int(row["time_ms"]))
            found.setdefault(ride, []).append(fix)
    return found


@pytest.mark.parametrize("name", TRACES)
def test_honest_positions_are_believed(name: str) -> None:
    refused = total = 0
    for ride in rides(name).values():
        track = Track()
        for position in ride:
            total += 1
            try:
                track.judge(position, position.ts + 200, LIMITS)
            except Refused:
                refused += 1
    assert total > 100
    assert refused <= total * HONEST_REFUSED_MAX, f"{refused} of {total}"


@pytest.mark.parametrize("name", TRACES)
def test_a_burst_after_a_tunnel_is_judged_by_its_own_times(name: str) -> None:
    """Everything arrives at once, newest first: only the newest is shown, nothing within the age is refused."""
    ride = max(rides(name).values(), key=len)[:100]
    arrival_ms = ride[-1].ts + 1000
    track = Track()
    shown = [
        track.judge(position, arrival_ms, LIMITS) for position in reversed(ride) if arrival_ms - position.ts < 600_000
    ]
    assert shown[0] is True
    assert not any(shown[1:])


def test_distance_is_that_of_a_sphere() -> None:
    a, b = Position(lat=0, lng=0, ts=0), Position(lat=0, lng=1, ts=0)
    assert distance_m(a, b) == pytest.approx(math.pi * 6_371_000 / 180)
    assert distance_m(Position(lat=90, lng=0, ts=0), Position(lat=-90, lng=0, ts=0)) == pytest.approx(
        math.pi * 6_371_000
    )
    assert distance_m(Position(lat=10, lng=179.999, ts=0), Position(lat=10, lng=-179.999, ts=0)) < 250


@pytest.mark.parametrize(
    ("position", "refusal"),
    [
        (moved(HERE, accuracy=LIMITS.accuracy_max_m + 1), Inaccurate),
        (moved(HERE, ms=LIMITS.future_max_ms + 1), Future),
        (moved(HERE, ms=-LIMITS.age_max_ms - 1), Stale),
    ],
)
def test_each_refusal_changes_nothing(position: Position, refusal: type[Refused]) -> None:
    track = Track()
    assert track.judge(HERE, NOW_MS, LIMITS)
    with pytest.raises(refusal):
        track.judge(position, NOW_MS, LIMITS)
    assert track == Track(HERE)


@pytest.mark.parametrize(
    "position",
    [
        moved(HERE, accuracy=LIMITS.accuracy_max_m),
        moved(HERE, ms=LIMITS.future_max_ms),
        moved(HERE, ms=-LIMITS.age_max_ms),
    ],
)
def test_the_limits_themselves_are_within(position: Position) -> None:
    Track().judge(position, NOW_MS, LIMITS)


def test_jumps_that_agree_for_long_enough_are_believed() -> None:
    """Then it was the anchor that was wrong; one honest position in between starts the count again."""
    track = Track()
    track.judge(HERE, NOW_MS, LIMITS)
    far = moved(HERE, metres=5_000, ms=1000)
    confirm_ms = LIMITS.jump_confirm_ms
    for ms in (0, 1000, confirm_ms - 1):
        with pytest.raises(Jump):
            track.judge(moved(far, ms=ms), NOW_MS, LIMITS)
    assert track.judge(moved(HERE, metres=10, ms=confirm_ms + 500), NOW_MS, LIMITS)
    again = moved(far, ms=confirm_ms)
    with pytest.raises(Jump):
        track.judge(again, NOW_MS, LIMITS)
    assert track.judge(moved(again, metres=20, ms=confirm_ms), NOW_MS, LIMITS)


def test_jumps_all_over_the_place_are_all_refused() -> None:
    track = Track()
    track.judge(HERE, NOW_MS, LIMITS)
    for n in range(1, 20):
        with pytest.raises(Jump):
            track.judge(moved(HERE, metres=50_000 * n * (-1) ** n, ms=n * 100), NOW_MS, LIMITS)
    assert track.newest == HERE


def test_an_unmoved_position_is_a_sign_of_life() -> None:
    track = Track()
    assert track.judge(HERE, NOW_MS, LIMITS)
    assert track.judge(moved(HERE, ms=1), NOW_MS, LIMITS)
    assert not track.judge(moved(HERE, ms=1), NOW_MS, LIMITS), "the same time again is no news"


@given(
    st.lists(st.tuples(st.floats(0, 60_000), st.floats(0, LIMITS.speed_max_mps)), min_size=1, max_size=30),
    st.randoms(use_true_random=False),
)
def test_no_possible_ride_is_ever_refused(steps: list[tuple[float, float]], random: object) -> None:
    """Any ride within the speed limit, delivered in any order, is accepted; what is shown only ever gets newer."""
    ride = [HERE]
    for pause_ms, speed in steps:
        ride.append(moved(ride[-1], metres=speed * pause_ms / 1000, ms=pause_ms))
    arrival_ms = ride[-1].ts
    recent = [position for position in ride if arrival_ms - position.ts <= LIMITS.age_max_ms]
    random.shuffle(recent)  # type: ignore[attr-defined]
    track, last = Track(), -1.0
    for position in recent:
        if track.judge(position, arrival_ms, LIMITS):
            assert position.ts > last
            last = position.ts
    assert last == max(position.ts for position in recent)
