"""The REST functions of orders: what a route gives to its verb, and what it adds to the answer."""

from __future__ import annotations

from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import Meta

from handlers import orders
from models.order import Order
from server import csv_export
from server.calls import Call, answer, written
from server.context import Rest
from server.doors import Verb
from server.snapshots import ToldEvent, listed

QUOTE = Verb("quote", orders.quote)
CANCEL = Verb("cancel", orders.cancel)
ASSIGN = Verb("assign", orders.assign, before=orders.before_assign)


class ReadEvents(msgspec.Struct, forbid_unknown_fields=True):
    after: Annotated[int, Meta(ge=0, le=2**31 - 1, description="events after this number")] = 0
    wait: Annotated[int, Meta(ge=0, le=86_400, description="seconds to wait for one; cut to LONG_POLL_MAX_S")] = 0


class EventList(msgspec.Struct):
    """Whole, oldest first."""

    events: list[ToldEvent]
    seq: Annotated[int, Meta(description="number of the order's last event")]


async def place(rest: Rest, call: Call) -> web.Response:
    return written(await rest.perform(call, rest.orders.place))


async def change_payment_method(rest: Rest, call: Call) -> web.Response:
    return written(await rest.perform(call, rest.orders.change_payment_method))


# reads


async def list_orders(rest: Rest, call: Call) -> web.Response:
    async with rest.doors.database.statement() as tx:
        return answer(await orders.list_orders(tx, call.actor, call.command))


async def export_orders(rest: Rest, call: Call) -> web.Response:
    pages = orders.export_orders(rest.doors.database.statement, call.actor, call.command)
    return await csv_export.answer("orders.csv", Order, pages)


async def read(rest: Rest, call: Call) -> web.Response:
    async with rest.doors.database.statement() as tx:
        return answer(await orders.read(tx, call.actor, call.order_id))


async def events(rest: Rest, call: Call) -> web.Response:
    """The order's events. `wait` holds the request, but no database connection, until there are some."""
    asked: ReadEvents = call.command
    found: list[orders.Timeline] = []

    async def look() -> tuple[bool, int]:
        rest.authenticator.check(call.actor)  # whoever has waited may have lost the right to hear
        async with rest.doors.database.statement() as tx:
            found.append(await orders.events(tx, call.actor, call.order_id, asked.after))
        return bool(found[-1].events), found[-1].seq

    await look()
    wait_s = min(asked.wait, rest.settings.long_poll_max_s)
    if wait_s and not found[-1].events:
        await rest.sockets.rooms.wait(call.order_id, look, wait_s)
    return answer(EventList(listed(found[-1].events), found[-1].seq))
