"""Days, weeks and months of a time zone: what statistics are counted by.

A day begins at its local midnight, or where the clocks jump over that, at the jump: days of 23 and 25 hours are as long
as they are. The zones are the IANA's, as Python ships them, so that no other table of them has a say.
"""

from __future__ import annotations

import datetime as dt
from enum import StrEnum
from functools import cache
from typing import NamedTuple
from zoneinfo import ZoneInfo, available_timezones

from models.errors import Invalid


class Group(StrEnum):
    DAY = "day"
    WEEK = "week"
    """ISO 8601: from Monday."""
    MONTH = "month"


class Period(NamedTuple):
    name: str
    """2026-11-21, 2026-W47 or 2026-11."""
    start: dt.datetime
    """UTC; it ends where the next one starts."""


@cache
def _zones() -> frozenset[str]:
    return frozenset(available_timezones()) - {"Factory", "localtime"}  # which are no places


def is_time_zone(name: str) -> bool:
    """Whether the IANA has a time zone of this name."""
    return name in _zones()


def time_zone(name: str) -> ZoneInfo:
    """Raises Invalid: the IANA has no time zone of this name."""
    if not is_time_zone(name):
        raise Invalid(f"{name!r} is not the name of a time zone, as Asia/Kolkata is.", "/tz")
    return ZoneInfo(name)


def midnight(day: dt.date, zone: ZoneInfo) -> dt.datetime:
    """When the day begins there, in UTC; of two midnights the first.

    Raises:
        OverflowError: at the very ends of the calendar.
    """
    return dt.datetime.combine(day, dt.time.min, zone).astimezone(dt.UTC)


def periods(start: dt.datetime, end: dt.datetime, zone: ZoneInfo, group: Group) -> list[Period]:
    """The periods of the half-open range from `start` to `end` (aware), oldest first. The first one starts with it."""
    found: list[Period] = []
    day = start.astimezone(zone).date()
    began = start.astimezone(dt.UTC)
    while began < end:
        name = _name(day, group)
        if not found or found[-1].name != name:
            if found and found[-1].start == began:
                found.pop()  # a day that this zone left out
            found.append(Period(name, began))
        day += dt.timedelta(days=1)
        began = midnight(day, zone)
    return found


def _name(day: dt.date, group: Group) -> str:
    if group is Group.WEEK:
        year, week, _ = day.isocalendar()
        return f"{year}-W{week:02}"
    return day.isoformat()[: 7 if group is Group.MONTH else 10]
