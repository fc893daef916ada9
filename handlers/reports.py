"""The reports desk: what payments did per day, week or month, and whether the ledger balances.

Everything is summed in SQL and nothing is ever added across currencies. A number belongs to the period in which its
thing happened: a payment is started when it is created, completed and failed when it got there; gross is what came that
day, refunded is what went back that day, whichever day its payment is of.
"""

from __future__ import annotations

import datetime as dt
import re
from enum import StrEnum
from typing import Annotated, NamedTuple
from zoneinfo import ZoneInfo

import msgspec
from msgspec import UNSET, Meta, UnsetType

from handlers.context import Tx
from handlers.cursors import instant
from models.base import ShortText, Strict, View
from models.errors import Invalid
from models.order import check_currency, require_all_orders, require_role
from models.period import Group, midnight, periods, time_zone
from models.user import BACK_OFFICE, Actor, Role

DAYS_DEFAULT = 30
"""Days that a report covers when it is not told where to begin."""

DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


class By(StrEnum):
    """What rows are split by, besides period and currency."""

    PROVIDER = "provider"
    METHOD = "method"
    STATUS = "status"
    """The payment's present one."""


ALL = "all"
"""The key of rows that are not split."""

NO_METHOD = "none"
"""The key of payments that nobody has tried to pay."""

Bound = Annotated[
    str,
    Meta(
        max_length=40,
        description="an RFC 3339 instant, or a date: its midnight in `tz`",
        extra_json_schema={"anyOf": [{"format": "date-time"}, {"format": "date"}]},
    ),
]


class DailyStats(Strict):
    """A half-open range of time, REPORT_DAYS_MAX days at most; without `to` up to the end of today, without `from` 30
    days."""

    from_: Bound | UnsetType = msgspec.field(default=UNSET, name="from")
    to: Bound | UnsetType = UNSET
    tz: Annotated[ShortText, Meta(description="IANA name of the time zone; else SELLER_TIME_ZONE")] | UnsetType = UNSET


class Analytics(DailyStats):
    group_by: Group = Group.DAY
    by: By | UnsetType = UNSET


class StatsRow(View):
    """Amounts: minor units of `currency`."""

    period: Annotated[str, Meta(description="2026-11-21, 2026-W47 or 2026-11")]
    currency: str
    key: Annotated[str, Meta(description="the provider, method (`none`: nobody tried) or status; else `all`")]
    started: Annotated[int, Meta(description="payments created")]
    completed: Annotated[int, Meta(description="payments completed")]
    failed: Annotated[int, Meta(description="payments that failed, and were not paid later")]
    gross: Annotated[int, Meta(description="what came")]
    refunded: Annotated[int, Meta(description="what went back")]
    net: Annotated[int, Meta(description="gross - refunded")]
    success_rate: Annotated[
        float | None, Meta(description="completed / (completed + failed), 0 to 1; absent when there were neither")
    ] = None


class Stats(msgspec.Struct, frozen=True, rename="camel"):
    """Oldest first; where nothing happened there is no row."""

    tz: str
    rows: list[StatsRow]


class Calendar(NamedTuple):
    """How a deployment counts days."""

    tz: str
    days_max: int


# $1, $2: the range; $3: where its periods start. Each thing is found by its own time, then all are summed.
_STATS = """
with happened as (
    select p.created_at as at, p.currency, {payment} as key, 1 as started, 0 as completed, 0 as failed,
        0::bigint as gross, 0::bigint as refunded
    from payments p where p.created_at >= $1 and p.created_at < $2
    union all
    select p.completed_at, p.currency, {payment}, 0, 1, 0, 0, 0
    from payments p where p.completed_at >= $1 and p.completed_at < $2
    union all
    select p.status_at, p.currency, {payment}, 0, 0, 1, 0, 0
    from payments p where p.status = 'failed' and p.completed_at is null and p.status_at >= $1 and p.status_at < $2
    union all
    select c.at, c.currency, {capture}, 0, 0, 0, c.amount, 0
    from captures c {of_capture} where c.at >= $1 and c.at < $2
    union all
    select r.settled_at, r.currency, {refund}, 0, 0, 0, 0, r.amount
    from refunds r {of_refund}
    where r.status = 'succeeded' and r.settled_at >= $1 and r.settled_at < $2
)
select width_bucket(at, $3::timestamptz[]) as period, currency, key, sum(started) as started,
    sum(completed) as completed, sum(failed) as failed, sum(gross) as gross, sum(refunded) as refunded
from happened group by 1, 2, 3 order by 1, 2, 3"""


def _of_payment(key: str) -> str:
    """The statement for what only the payment itself knows."""
    joined = {
        "of_capture": "join payments p on p.id = c.payment_id",
        "of_refund": "join payments p on p.id = r.payment_id",
    }
    return _STATS.format(payment=key, capture=key, refund=key, **joined)


_UNJOINED = {"of_capture": "", "of_refund": ""}
STATS = {
    None: _STATS.format(payment=f"'{ALL}'", capture=f"'{ALL}'", refund=f"'{ALL}'", **_UNJOINED),
    By.PROVIDER: _STATS.format(payment="p.provider", capture="c.provider", refund="r.provider", **_UNJOINED),
    By.METHOD: _of_payment(f"coalesce(p.method, '{NO_METHOD}')"),
    By.STATUS: _of_payment("p.status"),
}


async def daily_stats(tx: Tx, actor: Actor, cmd: DailyStats, calendar: Calendar) -> Stats:
    """What payments did, per day.

    Raises:
        Forbidden, Invalid.
    """
    return await _stats(tx, actor, cmd, calendar, Group.DAY, None)


async def analytics(tx: Tx, actor: Actor, cmd: Analytics, calendar: Calendar) -> Stats:
    """What payments did, per day, week or month, split as asked.

    Raises:
        Forbidden, Invalid.
    """
    return await _stats(tx, actor, cmd, calendar, cmd.group_by, None if isinstance(cmd.by, UnsetType) else cmd.by)


async def _stats(tx: Tx, actor: Actor, cmd: DailyStats, calendar: Calendar, group: Group, by: By | None) -> Stats:
    require_role(actor, BACK_OFFICE, "read statistics")
    require_all_orders(actor, "read statistics")
    zone = time_zone(calendar.tz if isinstance(cmd.tz, UnsetType) else cmd.tz)
    start, end = _range(cmd, zone, tx.now(), calendar.days_max)
    found = periods(start, end, zone, group)
    if not found:
        return Stats(zone.key, [])
    rows = await tx.all(STATS[by], start, end, [period.start for period in found])
    return Stats(
        zone.key,
        [
            StatsRow(
                period=found[row["period"] - 1].name,
                currency=row["currency"],
                key=row["key"],
                started=row["started"],
                completed=row["completed"],
                failed=row["failed"],
                gross=int(row["gross"]),
                refunded=int(row["refunded"]),
                net=int(row["gross"] - row["refunded"]),
                success_rate=_rate(row["completed"], row["failed"]),
            )
            for row in rows
        ],
    )


def _rate(completed: int, failed: int) -> float | None:
    ended = completed + failed
    return round(completed / ended, 4) if ended else None


def _range(cmd: DailyStats, zone: ZoneInfo, now: dt.datetime, days_max: int) -> tuple[dt.datetime, dt.datetime]:
    try:
        if isinstance(cmd.to, str):
            end = _bound(cmd.to, zone, "/to")
        else:
            end = midnight(now.astimezone(zone).date() + dt.timedelta(days=1), zone)
        if isinstance(cmd.from_, str):
            start = _bound(cmd.from_, zone, "/from")
        else:
            start = midnight(end.astimezone(zone).date() - dt.timedelta(days=DAYS_DEFAULT), zone)
        midnight(end.astimezone(zone).date() + dt.timedelta(days=1), zone)  # the last that is looked at
    except OverflowError:
        raise Invalid("This time is out of range.", "/from") from None
    if end - start > dt.timedelta(days=days_max):
        raise Invalid(f"A report covers {days_max} days at most.", "/from")
    return start, end


def _bound(text: str, zone: ZoneInfo, pointer: str) -> dt.datetime:
    """A date's midnight, or an instant, in UTC. Raises Invalid; OverflowError at the very ends of the calendar."""
    try:
        if DATE.fullmatch(text):
            return midnight(dt.date.fromisoformat(text), zone)
        at = msgspec.convert(text, dt.datetime)
    except ValueError:
        raise Invalid("Write an instant such as 2026-11-21T00:00:00Z, or a date such as 2026-11-21.", pointer) from None
    return instant(at, pointer)


# the ledger


class ReadTrialBalance(Strict):
    currency: Annotated[str, Meta(min_length=3, max_length=3, description="ISO 4217; else all")] | UnsetType = UNSET


class AccountBalance(View):
    account: str
    currency: str
    balance: Annotated[int, Meta(description="minor units of the currency; positive: more of it is there")]


class TrialBalance(msgspec.Struct, frozen=True):
    """Every account that was ever written to, by currency and name."""

    accounts: list[AccountBalance]
    sum: Annotated[int, Meta(description="0: each currency balances; else by how much the worst one does not")]


TRIAL_BALANCE = """
select account, currency, sum(amount) as balance from ledger_rows
where $1::text is null or currency = $1 group by account, currency order by currency, account"""


async def trial_balance(tx: Tx, actor: Actor, cmd: ReadTrialBalance) -> TrialBalance:
    """The balance of every account, from the rows themselves: no running balance is kept anywhere.

    Raises:
        Forbidden; Invalid: no such currency.
    """
    require_role(actor, {Role.ADMIN}, "read the ledger")
    require_all_orders(actor, "read the ledger")
    currency = None if isinstance(cmd.currency, UnsetType) else check_currency(cmd.currency)
    rows = await tx.all(TRIAL_BALANCE, currency)
    accounts = [
        AccountBalance(account=row["account"], currency=row["currency"], balance=int(row["balance"])) for row in rows
    ]
    sums: dict[str, int] = {}
    for one in accounts:
        sums[one.currency] = sums.get(one.currency, 0) + one.balance
    return TrialBalance(accounts, max(sums.values(), key=abs, default=0))
