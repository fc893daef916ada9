"""The REST functions of the cash desk, the reports desk and the audit desk."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from handlers import audit, cash, reports
from handlers.context import Tx
from handlers.payments import Desk
from models.cash import read_units
from models.errors import Refused
from models.payment import Payment
from models.user import Actor
from server.doors import Answer, Doors, Verb
from server.settings import Settings

if TYPE_CHECKING:
    from server.rest import Call, Rest

HAND_OVER = Verb("hand_over", cash.hand_over, status=201)


class Books:
    """The desks with the rules that the settings make."""

    def __init__(self, settings: Settings, doors: Doors, desk: Desk) -> None:
        self.doors = doors
        self.calendar = reports.Calendar(settings.seller_time_zone, settings.report_days_max)
        self._desk = desk
        self._rules = cash.Rules(read_units(settings.cash_rounding_minor), settings.cash_partial == "on")
        self._verb = Verb("take_cash", self._take_cash, status=201)

    async def take_cash(self, actor: Actor, command: cash.TakeCash, key: str | None) -> Answer:
        """Cancel what is open at gateways, then book the cash."""
        with contextlib.suppress(Refused):  # the verb says so itself, or its answer is there already
            await cash.make_room(self._desk, actor, command, self._rules)
        return await self.doors.perform(self._verb, actor, command, key=key)

    async def _take_cash(self, tx: Tx, actor: Actor, command: cash.TakeCash) -> Payment:
        return await cash.take_cash(tx, actor, command, self._rules, self._desk.house.terms)


async def take_cash(rest: Rest, call: Call) -> web.Response:
    given = await rest.books.take_cash(call.actor, call.command, call.request.headers.get("Idempotency-Key"))
    return web.Response(status=given.status, body=given.body, content_type="application/json")


async def agent_cash(rest: Rest, call: Call) -> web.Response:
    agent_id = call.request.match_info["agent_id"]
    async with rest.books.doors.database.statement() as tx:
        return _json(await cash.read_agent_cash(tx, call.actor, agent_id, call.command))


async def daily_stats(rest: Rest, call: Call) -> web.Response:
    async with rest.books.doors.database.statement() as tx:
        return _json(await reports.daily_stats(tx, call.actor, call.command, rest.books.calendar))


async def analytics(rest: Rest, call: Call) -> web.Response:
    async with rest.books.doors.database.statement() as tx:
        return _json(await reports.analytics(tx, call.actor, call.command, rest.books.calendar))


async def trial_balance(rest: Rest, call: Call) -> web.Response:
    async with rest.books.doors.database.statement() as tx:
        return _json(await reports.trial_balance(tx, call.actor, call.command))


async def list_audit(rest: Rest, call: Call) -> web.Response:
    async with rest.books.doors.database.statement() as tx:
        return _json(await audit.list_audit(tx, call.actor, call.command))


def _json(value: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
