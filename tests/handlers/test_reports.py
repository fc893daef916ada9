"""Statistics, held to an oracle that counts in Python where the clocks change; the trial balance."""

from __future__ import annotations

import datetime as dt
import uuid
from collections import Counter, defaultdict
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from handlers import reports
from models.errors import Forbidden, Invalid
from models.payment import Provider, Report
from models.user import Actor, Role, Scope
from tests.handlers.desk import ADMIN, AGENT, CUSTOMER, SERVICE, STAFF, Desk, command, guest
from tests.handlers.money import Till
from tests.handlers.test_place import pointer
from tests.models.making import actor

CALENDAR = reports.Calendar("UTC", days_max=1100)
NARROW = actor(Role.STAFF, "s1", orders=frozenset({str(uuid.uuid4())}))
NOBODY_ELSE = [AGENT, CUSTOMER, guest(str(uuid.uuid4()), Scope.PAY), NARROW]

CHANGES = {
    "Europe/Berlin": (dt.datetime(2026, 3, 29, 1, tzinfo=dt.UTC), dt.datetime(2026, 10, 25, 1, tzinfo=dt.UTC)),
    "America/Havana": (dt.datetime(2026, 3, 8, 5, tzinfo=dt.UTC), dt.datetime(2026, 11, 1, 5, tzinfo=dt.UTC)),
    "America/Nuuk": (dt.datetime(2026, 3, 29, 1, tzinfo=dt.UTC), dt.datetime(2026, 10, 25, 1, tzinfo=dt.UTC)),
    "Asia/Kolkata": (dt.datetime(2026, 11, 21, 18, 30, tzinfo=dt.UTC),),
}
"""When the clocks change there, or midnight of a zone that is half an hour off."""


class Paid(NamedTuple):
    """A payment as the tables have it. Ages are hours from the change of the clocks."""

    provider: str
    method: str | None
    status: str
    currency: str
    created: float
    completed: float | None
    status_at: float
    captures: list[tuple[str, int, float]]
    refunds: list[tuple[str, int, str, float]]


# quarters of an hour, and the moments around them
hours = st.integers(-300, 300).map(lambda quarter: quarter / 4) | st.floats(-75, 75, allow_nan=False)
currencies = st.sampled_from(["INR", "USD"])
amounts = st.integers(1, 10**7)
payments = st.builds(
    Paid,
    provider=st.sampled_from(["razorpay", "stripe", "cash"]),
    method=st.sampled_from([None, "upi", "card"]),
    status=st.sampled_from(["pending", "completed", "failed", "refunded"]),
    currency=currencies,
    created=hours,
    completed=st.none() | hours,
    status_at=hours,
    captures=st.lists(st.tuples(currencies, amounts, hours), max_size=2),
    refunds=st.lists(
        st.tuples(currencies, amounts, st.sampled_from(["succeeded", "failed", "pending"]), hours), max_size=2
    ),
)


def moment(change: dt.datetime, age: float) -> dt.datetime:
    return change + dt.timedelta(seconds=round(age * 3600, 3))


async def store(desk: Desk, change: dt.datetime, given: list[Paid]) -> None:
    """Let these be all payments that there are."""
    for table in ("refunds", "captures", "payments"):
        await desk.fetch(f"delete from {table}")
    if not await desk.orders():
        await desk.place()
    (order_id,) = map(uuid.UUID, await desk.orders())
    for one in given:
        payment_id, created = uuid.uuid4(), moment(change, one.created)
        await desk.fetch(
            "insert into payments (id, order_id, provider, method, status, amount, currency, expected, reference, "
            "created_at, updated_at, completed_at, status_at) "
            "values ($1, $2, $3, $4, $5, 1, $6, 1, $7, $8, $8, $9, $10)",
            payment_id,
            order_id,
            one.provider,
            one.method,
            one.status,
            one.currency,
            str(payment_id),
            created,
            moment(change, one.completed) if one.completed is not None else None,
            moment(change, one.status_at),
        )
        for currency, amount, age in one.captures:
            await desk.fetch(
                "insert into captures (provider, key, payment_id, amount, currency, applied, at) "
                "values ($1, $2, $3, $4, $5, 0, $6)",
                one.provider,
                str(uuid.uuid4()),
                payment_id,
                amount,
                currency,
                moment(change, age),
            )
        for currency, amount, status, age in one.refunds:
            await desk.fetch(
                "insert into refunds (id, order_id, payment_id, provider, capture_key, amount, currency, status, "
                "reason, applied, created_at, updated_at, settled_at) "
                "values ($1, $2, $3, $4, 'k', $5, $6, $7, 'x', 0, $8, $8, $9)",
                uuid.uuid4(),
                order_id,
                payment_id,
                one.provider,
                amount,
                currency,
                status,
                created,
                moment(change, age) if status == "succeeded" else None,
            )


def happened(change: dt.datetime, given: list[Paid]) -> list[tuple[dt.datetime, str, Paid, str, int]]:
    """(when, currency, payment, what, how much) of everything that statistics count."""
    found = []
    for one in given:
        found.append((one.created, one.currency, one, "started", 1))
        if one.completed is not None:
            found.append((one.completed, one.currency, one, "completed", 1))
        elif one.status == "failed":
            found.append((one.status_at, one.currency, one, "failed", 1))
        found += [(age, currency, one, "gross", amount) for currency, amount, age in one.captures]
        found += [
            (age, currency, one, "refunded", amount)
            for currency, amount, status, age in one.refunds
            if status == "succeeded"
        ]
    return [(moment(change, age), *rest) for age, *rest in found]  # type: ignore[misc]


NAMES = {"day": "%Y-%m-%d", "week": "%G-W%V", "month": "%Y-%m"}


@effort(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    zone=st.sampled_from(sorted(CHANGES)),
    season=st.integers(0, 1),
    given=st.lists(payments, max_size=6),
    group=st.sampled_from(sorted(NAMES)),
    by=st.sampled_from([None, "provider", "method", "status"]),
    days=st.tuples(st.integers(-4, 4), st.integers(-4, 4)).map(sorted),
)
async def test_statistics_are_what_one_counts_by_hand(
    desk: Desk, zone: str, season: int, given: list[Paid], group: str, by: str | None, days: list[int]
) -> None:
    there, change = ZoneInfo(zone), CHANGES[zone][season % len(CHANGES[zone])]
    await store(desk, change, given)
    first, last = ((change.astimezone(there) + dt.timedelta(days=number)).date() for number in days)
    asked = {"from": first.isoformat(), "to": last.isoformat(), "tz": zone, "groupBy": group}
    if by is not None:
        asked["by"] = by
    expected: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    for at, currency, one, what, amount in happened(change, given):
        if first <= at.astimezone(there).date() < last:
            key = "all" if by is None else str(getattr(one, by) or "none")
            expected[at.astimezone(there).strftime(NAMES[group]), currency, key][what] += amount
    found: reports.Stats = await desk.do(reports.analytics, STAFF, command(reports.Analytics, **asked), CALENDAR)
    assert found.tz == zone
    assert [(row.period, row.currency, row.key) for row in found.rows] == sorted(expected)
    for row in found.rows:
        counted = expected[row.period, row.currency, row.key]
        assert (row.started, row.completed, row.failed) == (counted["started"], counted["completed"], counted["failed"])
        assert (row.gross, row.refunded) == (counted["gross"], counted["refunded"])
        assert row.net == counted["gross"] - counted["refunded"]
        ended = counted["completed"] + counted["failed"]
        assert row.success_rate == (round(counted["completed"] / ended, 4) if ended else None)
    if group == "day" and by is None:
        daily = command(reports.DailyStats, **{name: asked[name] for name in ("from", "to", "tz")})
        assert await desk.do(reports.daily_stats, SERVICE, daily, CALENDAR) == found


Asked = dict[str, Any]


async def gross(desk: Desk, calendar: reports.Calendar = CALENDAR, **asked: Any) -> dict[str, int]:
    found: reports.Stats = await desk.do(reports.daily_stats, STAFF, command(reports.DailyStats, **asked), calendar)
    return {row.period: row.gross for row in found.rows if row.gross}


def captured(*ages: float) -> Paid:
    """A payment with captures of 1, 2, 4 … at these hours."""
    return Paid("cash", "cash", "completed", "INR", 0, 0, 0, [("INR", 2**n, age) for n, age in enumerate(ages)], [])


@pytest.mark.parametrize(
    ("zone", "midnight", "hours"),
    [
        ("Europe/Berlin", "2026-03-28T23:00:00Z", 23),
        ("Europe/Berlin", "2026-10-24T22:00:00Z", 25),
        ("America/Havana", "2026-03-08T05:00:00Z", 23),
        ("America/Havana", "2026-11-01T04:00:00Z", 25),
        ("Asia/Kolkata", "2026-11-20T18:30:00Z", 24),
    ],
)
async def test_a_day_is_as_long_as_the_clocks_make_it(desk: Desk, zone: str, midnight: str, hours: int) -> None:
    began = dt.datetime.fromisoformat(midnight)
    day = began.astimezone(ZoneInfo(zone)).date()
    tick = 0.001 / 3600
    await store(desk, began, [captured(-tick, 0, hours - tick, hours)])
    bounds: Asked = {"from": (day - dt.timedelta(days=1)).isoformat(), "to": (day + dt.timedelta(days=2)).isoformat()}
    by_day = await gross(desk, tz=zone, **bounds)
    assert by_day == {
        (day - dt.timedelta(days=1)).isoformat(): 1,
        day.isoformat(): 2 + 4,
        (day + dt.timedelta(days=1)).isoformat(): 8,
    }
    one_day: Asked = {"from": day.isoformat(), "to": (day + dt.timedelta(days=1)).isoformat()}
    assert await gross(desk, tz=zone, **one_day) == {day.isoformat(): 6}


async def test_bounds_are_instants_or_dates_and_half_open(desk: Desk) -> None:
    noon = dt.datetime(2026, 11, 21, 12, tzinfo=dt.UTC)
    await store(desk, noon, [captured(-1, 0, 1)])
    exact: Asked = {"from": "2026-11-21T12:00:00Z", "to": "2026-11-21T13:00:00Z"}
    assert await gross(desk, **exact) == {"2026-11-21": 2}
    mixed: Asked = {"from": "2026-11-21T17:30:00+05:30", "to": "2026-11-22"}
    assert await gross(desk, **mixed) == {"2026-11-21": 6}
    for start, end in (("2026-11-21", "2026-11-21"), ("2026-11-22", "2026-11-20")):
        empty: Asked = {"from": start, "to": end}
        assert await gross(desk, **empty) == {}


async def test_days_are_the_sellers_when_nobody_says(desk: Desk) -> None:
    await store(desk, dt.datetime(2026, 11, 21, 18, 30, tzinfo=dt.UTC), [captured(0)])
    days: Asked = {"from": "2026-11-20", "to": "2026-11-30"}
    assert await gross(desk, **days) == {"2026-11-21": 1}
    kolkata = CALENDAR._replace(tz="Asia/Kolkata")
    assert await gross(desk, kolkata, **days) == {"2026-11-22": 1}
    assert await gross(desk, kolkata, tz="UTC", **days) == {"2026-11-21": 1}


async def test_without_bounds_it_is_the_last_thirty_days_and_today(desk: Desk) -> None:
    now = dt.datetime(2026, 11, 21, 12, tzinfo=dt.UTC)
    desk.database.clock = lambda: now
    await store(desk, now, [captured(0, 11.5, 12, -29 * 24 - 12, -29 * 24 - 12.5)])
    assert await gross(desk) == {"2026-10-23": 8, "2026-11-21": 1 + 2}
    assert await gross(desk, to="2026-10-23") == {"2026-10-22": 16}


async def test_what_the_settle_path_books_is_what_is_counted(desk: Desk) -> None:
    till = Till(desk)
    paid, failed = (
        await till.begin(await till.order()),
        await till.begin(await till.order(), Provider.STRIPE, name="pi_1"),
    )
    await till.tell(paid, Report.CAPTURED, method="upi", fee=100)
    await till.tell(failed, Report.FAILED)
    found: reports.Stats = await desk.do(reports.analytics, STAFF, command(reports.Analytics, by="provider"), CALENDAR)
    assert [(row.key, row.started, row.completed, row.failed, row.gross, row.success_rate) for row in found.rows] == [
        ("razorpay", 1, 1, 0, 25_200, 1.0),
        ("stripe", 1, 0, 1, 0, 0.0),
    ]


@pytest.mark.parametrize(
    ("asked", "at"),
    [
        ({"tz": "IST"}, "/tz"),
        ({"tz": "Asia/Kolkatta"}, "/tz"),
        ({"from": "2026-11-21T00:00:00"}, "/from"),
        ({"from": "yesterday"}, "/from"),
        ({"from": "2026-02-30"}, "/from"),
        ({"from": "1795253400"}, "/from"),
        ({"to": "2026-11"}, "/to"),
        ({"to": ""}, "/to"),
        ({"from": "0001-01-01"}, "/from"),
        ({"from": "0001-01-01T00:00:00+14:00"}, "/from"),
        ({"from": "0001-01-01", "to": "0001-01-02", "tz": "Asia/Tokyo"}, "/from"),
        ({"to": "9999-12-31", "tz": "America/New_York"}, "/from"),
        ({"to": "9999-12-31T23:59:59Z", "from": "9999-12-31"}, "/from"),
        ({"to": "0001-01-05"}, "/from"),
        ({"from": "2020-01-01", "to": "2026-01-01"}, "/from"),
    ],
)
async def test_what_cannot_be_reported_is_invalid(desk: Desk, asked: dict[str, str], at: str) -> None:
    for verb, type_ in ((reports.daily_stats, reports.DailyStats), (reports.analytics, reports.Analytics)):
        refusal = await desk.refused(verb, STAFF, command(type_, **asked), CALENDAR)
        assert isinstance(refusal, Invalid)
        assert pointer(refusal) == at


@pytest.mark.parametrize("by", NOBODY_ELSE)
async def test_only_the_back_office_reads_statistics(desk: Desk, by: Actor) -> None:
    for verb, type_ in ((reports.daily_stats, reports.DailyStats), (reports.analytics, reports.Analytics)):
        assert isinstance(await desk.refused(verb, by, command(type_), CALENDAR), Forbidden)


# the ledger


async def balance(desk: Desk, **asked: str) -> reports.TrialBalance:
    found: reports.TrialBalance = await desk.do(
        reports.trial_balance, ADMIN, command(reports.ReadTrialBalance, **asked)
    )
    return found


async def test_the_trial_balance_sums_every_account_by_currency(desk: Desk) -> None:
    assert await balance(desk) == reports.TrialBalance([], 0)
    till = Till(desk)
    for currency in ("INR", "USD"):
        name = await till.begin(await till.order(currency=currency))
        await till.tell(name, Report.CAPTURED, currency=currency, fee=500)
    found = await balance(desk)
    assert [(one.currency, one.account, one.balance) for one in found.accounts] == [
        (currency, account, amount)
        for currency in ("INR", "USD")
        for account, amount in (("fees", 500), ("gateway:razorpay", 24_700), ("order_receivable", -25_200))
    ]
    assert found.sum == 0
    dollars = await balance(desk, currency="USD")
    assert dollars == reports.TrialBalance([one for one in found.accounts if one.currency == "USD"], 0)
    assert await balance(desk, currency="JPY") == reports.TrialBalance([], 0)


async def test_a_balance_that_is_off_is_not_hidden_by_another(desk: Desk) -> None:
    """What the database refuses is let in for once: two currencies that are off by the same amount are not even."""
    async with desk.database.transaction() as tx:
        await tx.one("alter table ledger_rows disable trigger ledger_rows_balance")
        await tx.one(
            "insert into ledger_rows (entry, at, kind, account, currency, amount) "
            "select gen_random_uuid(), now(), 'x', 'till', c, n from (values ('INR', 7), ('USD', -7)) as v(c, n)"
        )
        await tx.one("alter table ledger_rows enable trigger ledger_rows_balance")
    assert abs((await balance(desk)).sum) == 7
    assert (await balance(desk, currency="USD")).sum == -7


@pytest.mark.parametrize("by", [*NOBODY_ELSE, STAFF, SERVICE, msgspec.structs.replace(NARROW, role=Role.ADMIN)])
async def test_only_admins_read_the_ledger(desk: Desk, by: Actor) -> None:
    assert isinstance(await desk.refused(reports.trial_balance, by, command(reports.ReadTrialBalance)), Forbidden)


async def test_a_currency_that_is_none_is_invalid(desk: Desk) -> None:
    refusal: Any = await desk.refused(reports.trial_balance, ADMIN, command(reports.ReadTrialBalance, currency="XXX"))
    assert (type(refusal), pointer(refusal)) == (Invalid, "/currency")
