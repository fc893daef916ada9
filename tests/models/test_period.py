"""Days, weeks and months of a time zone: every instant is in the period that its local date names."""

from __future__ import annotations

import datetime as dt
from bisect import bisect_right
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import Invalid
from models.period import Group, midnight, periods, time_zone

ODD_ZONES = [
    "UTC",
    "Asia/Kolkata",
    "Europe/Berlin",
    "America/New_York",
    "America/Havana",  # the clocks jump over midnight, and at its end an hour from midnight comes twice
    "America/Sao_Paulo",  # until 2018 midnight fell back to 23:00
    "America/Nuuk",
    "Atlantic/Azores",
    "Africa/Cairo",
    "Asia/Beirut",
    "Australia/Lord_Howe",  # half an hour
    "Pacific/Apia",  # had no 2011-12-30
    "Antarctica/Troll",
]
BEGAN = dt.datetime(2011, 1, 1, tzinfo=dt.UTC)
instants = st.timedeltas(dt.timedelta(0), dt.timedelta(days=7000)).map(lambda age: BEGAN + age)


def local(at: dt.datetime, zone: ZoneInfo, group: Group) -> str:
    day = at.astimezone(zone)
    return day.strftime({Group.DAY: "%Y-%m-%d", Group.WEEK: "%G-W%V", Group.MONTH: "%Y-%m"}[group])


@given(
    st.sampled_from(ODD_ZONES),
    st.sampled_from(Group),
    instants,
    st.timedeltas(dt.timedelta(0), dt.timedelta(days=400)),
    st.data(),
)
def test_every_instant_is_in_the_period_of_its_local_date(
    name: str, group: Group, start: dt.datetime, length: dt.timedelta, data: st.DataObject
) -> None:
    zone, end = time_zone(name), start + length
    found = periods(start, end, zone, group)
    if start == end:
        assert found == []
        return
    starts = [period.start for period in found]
    assert starts[0] == start
    assert starts[-1] < end
    assert all(earlier < later for earlier, later in pairwise(starts))
    for at in [*starts, *(one - dt.timedelta(microseconds=1) for one in starts[1:])]:
        assert found[bisect_right(starts, at) - 1].name == local(at, zone, group)
    for _ in range(5):
        at = start + data.draw(st.timedeltas(dt.timedelta(0), length))
        if at < end:
            assert found[bisect_right(starts, at) - 1].name == local(at, zone, group)


@pytest.mark.parametrize(
    ("zone", "day", "hours"),
    [
        ("Europe/Berlin", dt.date(2026, 3, 29), 23),
        ("Europe/Berlin", dt.date(2026, 10, 25), 25),
        ("Europe/Berlin", dt.date(2026, 11, 21), 24),
        ("America/Havana", dt.date(2026, 3, 8), 23),
        ("America/Havana", dt.date(2026, 11, 1), 25),
        ("America/Sao_Paulo", dt.date(2018, 2, 17), 25),
        ("Australia/Lord_Howe", dt.date(2026, 4, 5), 24.5),
        ("Pacific/Apia", dt.date(2011, 12, 30), 0),
    ],
)
def test_a_day_is_as_long_as_the_clocks_make_it(zone: str, day: dt.date, hours: float) -> None:
    there = time_zone(zone)
    assert midnight(day + dt.timedelta(days=1), there) - midnight(day, there) == dt.timedelta(hours=hours)


def test_a_day_that_a_zone_left_out_is_no_period() -> None:
    zone = time_zone("Pacific/Apia")
    found = periods(midnight(dt.date(2011, 12, 29), zone), midnight(dt.date(2012, 1, 1), zone), zone, Group.DAY)
    assert [period.name for period in found] == ["2011-12-29", "2011-12-31"]


def test_weeks_begin_on_monday_and_belong_to_the_year_of_their_thursday() -> None:
    zone = time_zone("Asia/Kolkata")
    found = periods(midnight(dt.date(2026, 12, 26), zone), midnight(dt.date(2027, 1, 5), zone), zone, Group.WEEK)
    assert found == [
        ("2026-W52", midnight(dt.date(2026, 12, 26), zone)),
        ("2026-W53", midnight(dt.date(2026, 12, 28), zone)),
        ("2027-W01", midnight(dt.date(2027, 1, 4), zone)),
    ]


@pytest.mark.parametrize(
    "name",
    ["", "IST", "localtime", "Factory", "Mars/Olympus", "+05:30", "../../etc/passwd", "asia/kolkata", "\0", "x" * 300],
)
def test_only_names_of_the_iana_are_zones(name: str) -> None:
    with pytest.raises(Invalid) as refusal:
        time_zone(name)
    assert refusal.value.fields["errors"][0]["pointer"] == "/tz"  # type: ignore[index]
