"""How often an agent is asked for its position."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.position import Pace

PACE = Pace(normal_ms=5000, near_ms=2000, unwatched_ms=15_000, near_m=500)
distances = st.none() | st.floats(0, 20_000_000)


@pytest.mark.parametrize(
    ("watched", "left_m", "wanted_ms"),
    [
        (True, 10_000.0, 5000),
        (True, 500.1, 5000),
        (True, 500.0, 2000),
        (True, 0.0, 2000),
        (True, None, 5000),
        (False, 10_000.0, 15_000),
        (False, 0.0, 15_000),
        (False, None, 15_000),
        (None, 0.0, 5000),
        (None, None, 5000),
    ],
)
def test_the_rule(watched: bool | None, left_m: float | None, wanted_ms: int) -> None:
    assert PACE.next_interval_ms(watched, left_m) == wanted_ms


@given(distances)
def test_it_falls_when_somebody_watches(left_m: float | None) -> None:
    pauses = [PACE.next_interval_ms(watched, left_m) for watched in (False, None, True)]
    assert pauses == sorted(pauses, reverse=True)


@given(st.floats(0, 10_000), st.floats(0, 10_000))
def test_it_falls_on_the_way_to_who_watches(a: float, b: float) -> None:
    near, far = sorted((a, b))
    assert PACE.next_interval_ms(True, near) <= PACE.next_interval_ms(True, far)
