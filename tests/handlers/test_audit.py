"""The audit log: who reads it, how it is narrowed, and pages that stay where they are."""

from __future__ import annotations

import datetime as dt
import operator
import uuid
from functools import partial
from typing import Any

import pytest

from handlers import audit
from models.errors import Forbidden, Invalid
from models.user import Actor, Role, Scope
from tests.handlers.desk import ADMIN, AGENT, CUSTOMER, SERVICE, STAFF, Desk, command, guest
from tests.handlers.test_place import pointer
from tests.models.making import actor

START = dt.datetime(2026, 11, 21, 9, 30, tzinfo=dt.UTC)


async def page(desk: Desk, **asked: Any) -> audit.AuditPage:
    found: audit.AuditPage = await desk.do(audit.list_audit, ADMIN, command(audit.ListAudit, **asked))
    return found


async def many(desk: Desk, count: int = 12) -> list[str]:
    """Things that were done, one a minute; their actions, newest first."""
    for number in range(count):
        desk.database.clock = partial(operator.add, START, dt.timedelta(minutes=number))
        by = STAFF if number % 2 else SERVICE
        await desk.do(audit.record, by, f"a{number}", f"payment:{number % 3}", None, {"number": number})
    return [f"a{number}" for number in reversed(range(count))]


async def test_a_row_says_who_did_what_to_what(desk: Desk) -> None:
    (nothing,) = [await page(desk)]
    assert nothing == audit.AuditPage([], None)
    async with desk.database.statement() as tx:
        tx.request_id = "request-7"
        desk.database.clock = lambda: START
        await audit.record(tx, STAFF, "payment.capture", "payment:x", {"status": "authorized"}, {"amount": 5})
    await desk.do(audit.record, SERVICE, "webhook.retry", "webhook:y")
    newest, first = (await page(desk)).items
    assert first == audit.AuditRow(
        at="2026-11-21T09:30:00.000Z",
        actor="staff:s1",
        action="payment.capture",
        subject="payment:x",
        before={"status": "authorized"},
        after={"amount": 5},
        request_id="request-7",
    )
    assert (newest.actor, newest.before, newest.after, newest.request_id) == ("service:shop", None, None, None)


async def test_filters_narrow_and_combine(desk: Desk) -> None:
    await many(desk)
    assert [one.action for one in (await page(desk, subject="payment:1")).items] == ["a10", "a7", "a4", "a1"]
    assert [one.action for one in (await page(desk, actor="service:shop", subject="payment:1")).items] == ["a10", "a4"]
    assert [one.action for one in (await page(desk, **{"from": "2026-11-21T09:40:00Z"})).items] == ["a11", "a10"]
    assert (await page(desk, subject="payment:")).items == []


@pytest.mark.parametrize("limit", [1, 5, 11, 12, 200])
async def test_pages_make_the_whole_list_while_rows_are_added(desk: Desk, limit: int) -> None:
    wanted, found = await many(desk), []
    cursor: dict[str, Any] = {}
    while True:
        one = await page(desk, limit=limit, **cursor)
        found += [row.action for row in one.items]
        if one.next_cursor is None:
            break
        assert len(one.items) == limit
        cursor = {"cursor": one.next_cursor}
        await desk.do(audit.record, STAFF, "later", "payment:1")
    assert found == wanted


@pytest.mark.parametrize(
    "by",
    [
        STAFF,
        SERVICE,
        AGENT,
        CUSTOMER,
        guest(str(uuid.uuid4()), Scope.PAY),
        actor(Role.ADMIN, "x1", orders=frozenset({str(uuid.uuid4())})),
    ],
)
async def test_only_admins_read_it(desk: Desk, by: Actor) -> None:
    assert isinstance(await desk.refused(audit.list_audit, by, command(audit.ListAudit)), Forbidden)


async def test_a_time_outside_the_calendar_is_invalid(desk: Desk) -> None:
    late = command(audit.ListAudit, **{"from": "9999-12-31T23:59:59-14:00"})
    refusal = await desk.refused(audit.list_audit, ADMIN, late)
    assert (type(refusal), pointer(refusal)) == (Invalid, "/from")
