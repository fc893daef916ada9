"""Positions: which are accepted from outside, and what watchers see of them."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.position import Position, shown
from tests.models.making import ORDER_ID

FIX: dict[str, Any] = {"lat": 12.97, "lng": 77.59, "ts": 1_790_000_000_000}
RANGES: dict[str, tuple[float, float]] = {
    "lat": (-90, 90),
    "lng": (-180, 180),
    "ts": (0, 8_640_000_000_000_000),
    "accuracy": (0, 1_000_000),
    "heading": (0, 360),
    "speed": (0, 10_000),
    "battery": (0, 100),
}
OPTIONAL = ["accuracy", "heading", "speed", "battery"]


def read(value: object) -> Position:
    """As both doors read it: decoded JSON, converted."""
    return msgspec.convert(value, Position)


def accepts(**changes: object) -> bool:
    try:
        read({**FIX, **changes})
    except msgspec.ValidationError:
        return False
    return True


@pytest.mark.parametrize("member", RANGES)
def test_a_number_is_accepted_in_its_range(member: str) -> None:
    low, high = RANGES[member]
    for right in (low, high, int(low), int(high), (low + high) / 2):
        assert accepts(**{member: right}), right
    for wrong in (math.nextafter(low, -math.inf), math.nextafter(high, math.inf), -math.inf, math.inf, math.nan):
        assert not accepts(**{member: wrong}), wrong
    assert not accepts(**{member: 10**400})


@pytest.mark.parametrize("member", RANGES)
@pytest.mark.parametrize("wrong", [True, False, "1", "", [], {}, [1.0]])
def test_nothing_but_a_number_is_accepted(member: str, wrong: object) -> None:
    assert not accepts(**{member: wrong})


@pytest.mark.parametrize("member", ["lat", "lng", "ts"])
def test_the_place_and_the_time_are_needed(member: str) -> None:
    assert not accepts(**{member: None})
    with pytest.raises(msgspec.ValidationError):
        read({name: value for name, value in FIX.items() if name != member})


@pytest.mark.parametrize("member", OPTIONAL)
def test_null_is_absent(member: str) -> None:
    assert read({**FIX, member: None}) == read(FIX)
    assert member not in json.loads(shown(ORDER_ID, read({**FIX, member: None})))


def test_members_that_we_do_not_know_are_ignored() -> None:
    more = {"altitude": 920.5, "coords": {"lat": None}, "": [], "orderId": "o1", "mocked": False}
    assert read({**FIX, **more}) == read(FIX)


@given(
    st.fixed_dictionaries(
        {
            "lat": st.floats(-90, 90),
            "lng": st.floats(-180, 180),
            "ts": st.integers(0, 8_640_000_000_000_000) | st.floats(0, 8_640_000_000_000_000),
        },
        optional={name: st.none() | st.floats(*RANGES[name]) for name in OPTIONAL},
    )
)
def test_watchers_see_what_was_sent_but_the_battery(sent: dict[str, Any]) -> None:
    seen = json.loads(shown(ORDER_ID, read(json.loads(json.dumps(sent)))))
    visible = {name: value for name, value in sent.items() if value is not None and name != "battery"}
    assert seen == {"orderId": ORDER_ID, **visible}
    assert type(seen["ts"]) is type(sent["ts"]), "the time is echoed as it was sent"
