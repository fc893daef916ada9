"""The REST functions of the refunds desk: what a route gives to its verb."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from aiohttp import web
from msgspec import Meta

from handlers import refund_lists, refunds
from handlers.ports import Done, Once
from handlers.refund_calls import Desk
from models.refund import SETTLED
from models.user import Actor
from server.doors import Doors, Steps

if TYPE_CHECKING:
    from server.rest import Call, Rest


class ReadRefund(msgspec.Struct, forbid_unknown_fields=True):
    wait: Annotated[
        int,
        Meta(ge=0, le=86_400, description="seconds to wait until it has succeeded or failed; cut to LONG_POLL_MAX_S"),
    ] = 0


class RefundVerbs:
    """The verbs of the desk as the doors perform them."""

    def __init__(self, doors: Doors, desk: Desk) -> None:
        self.doors, self.desk = doors, desk
        self.refund_payment = self._steps("refund_payment", refunds.refund_payment, refunds.permit_payment)
        self.refund_order = self._steps("refund_order", refunds.refund_order, refunds.permit_order)
        self.retry = self._steps("retry_refund", refunds.retry, refunds.permit_retry)

    def _steps(self, name: str, run: Callable[..., Awaitable[Done]], permit: Callable[..., Awaitable[object]]) -> Steps:
        async def bound(once: Once, actor: Actor, *args: Any) -> Done:
            return await run(self.desk, once, actor, *args)

        return Steps(name, bound, permit)


async def _perform(rest: Rest, call: Call, verb: Steps, subject: str) -> web.Response:
    key = call.request.headers.get("Idempotency-Key")
    given = await rest.refunds.doors.perform_in_steps(verb, call.actor, subject, call.command, key=key)
    return web.Response(status=given.status, body=given.body, content_type="application/json")


async def refund_payment(rest: Rest, call: Call) -> web.Response:
    return await _perform(rest, call, rest.refunds.refund_payment, call.request.match_info["payment_id"])


async def refund_order(rest: Rest, call: Call) -> web.Response:
    return await _perform(rest, call, rest.refunds.refund_order, call.order_id)


async def retry_refund(rest: Rest, call: Call) -> web.Response:
    return await _perform(rest, call, rest.refunds.retry, call.request.match_info["refund_id"])


# reads


async def list_refunds(rest: Rest, call: Call) -> web.Response:
    async with rest.refunds.doors.database.statement() as tx:
        return _json(await refund_lists.list_refunds(tx, call.actor, call.command))


async def refunds_of_payment(rest: Rest, call: Call) -> web.Response:
    payment_id = call.request.match_info["payment_id"]
    async with rest.refunds.doors.database.statement() as tx:
        return _json(await refund_lists.list_of_payment(tx, call.actor, payment_id, call.command))


async def read_refund(rest: Rest, call: Call) -> web.Response:
    """One refund. `wait` holds the request, but no database connection, until it has succeeded or failed."""
    asked: ReadRefund = call.command
    look = partial(_look, rest, call)
    found = await rest.wait_for(call, look, lambda seen: seen.refund.status in SETTLED, asked.wait)
    return _json(found.refund)


async def _look(rest: Rest, call: Call) -> refund_lists.Seen:
    async with rest.refunds.doors.database.statement() as tx:
        return await refund_lists.read(tx, call.actor, call.request.match_info["refund_id"])


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
