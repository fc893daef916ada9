"""The REST functions of the cash desk, the reports desk and the audit desk."""

from __future__ import annotations

from aiohttp import web

from handlers import audit, cash, reports
from server.calls import Call, answer, written
from server.context import Rest
from server.doors import Verb

HAND_OVER = Verb("hand_over", cash.hand_over, status=201)


async def take_cash(rest: Rest, call: Call) -> web.Response:
    given = await rest.books.take_cash(call.actor, call.command, call.request.headers.get("Idempotency-Key"))
    return written(given)


async def agent_cash(rest: Rest, call: Call) -> web.Response:
    agent_id = call.request.match_info["agent_id"]
    async with rest.books.doors.database.statement() as tx:
        return answer(await cash.read_agent_cash(tx, call.actor, agent_id, call.command))


async def daily_stats(rest: Rest, call: Call) -> web.Response:
    async with rest.books.doors.database.statement() as tx:
        return answer(await reports.daily_stats(tx, call.actor, call.command, rest.books.calendar))


async def analytics(rest: Rest, call: Call) -> web.Response:
    async with rest.books.doors.database.statement() as tx:
        return answer(await reports.analytics(tx, call.actor, call.command, rest.books.calendar))


async def trial_balance(rest: Rest, call: Call) -> web.Response:
    async with rest.books.doors.database.statement() as tx:
        return answer(await reports.trial_balance(tx, call.actor, call.command))


async def list_audit(rest: Rest, call: Call) -> web.Response:
    async with rest.books.doors.database.statement() as tx:
        return answer(await audit.list_audit(tx, call.actor, call.command))
