"""The REST functions of the refunds desk: what a route gives to its verb."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import Meta

from handlers import refund_lists
from models.refund import SETTLED
from server.calls import Call, answer, written
from server.context import Rest
from server.doors import Steps


class ReadRefund(msgspec.Struct, forbid_unknown_fields=True):
    wait: Annotated[
        int,
        Meta(ge=0, le=86_400, description="seconds to wait until it has succeeded or failed; cut to LONG_POLL_MAX_S"),
    ] = 0


async def _perform(rest: Rest, call: Call, verb: Steps, subject: str) -> web.Response:
    key = call.request.headers.get("Idempotency-Key")
    given = await rest.refunds.doors.perform_in_steps(verb, call.actor, subject, call.command, key=key)
    return written(given)


async def refund_payment(rest: Rest, call: Call) -> web.Response:
    return await _perform(rest, call, rest.refunds.refund_payment, call.request.match_info["payment_id"])


async def refund_order(rest: Rest, call: Call) -> web.Response:
    return await _perform(rest, call, rest.refunds.refund_order, call.order_id)


async def retry_refund(rest: Rest, call: Call) -> web.Response:
    return await _perform(rest, call, rest.refunds.retry, call.request.match_info["refund_id"])


# reads


async def list_refunds(rest: Rest, call: Call) -> web.Response:
    async with rest.refunds.doors.database.statement() as tx:
        return answer(await refund_lists.list_refunds(tx, call.actor, call.command))


async def refunds_of_payment(rest: Rest, call: Call) -> web.Response:
    payment_id = call.request.match_info["payment_id"]
    async with rest.refunds.doors.database.statement() as tx:
        return answer(await refund_lists.list_of_payment(tx, call.actor, payment_id, call.command))


async def read_refund(rest: Rest, call: Call) -> web.Response:
    """One refund. `wait` holds the request, but no database connection, until it has succeeded or failed."""
    asked: ReadRefund = call.command
    look = partial(_look, rest, call)
    found = await rest.wait_for(call, look, lambda seen: seen.refund.status in SETTLED, asked.wait)
    return answer(found.refund)


async def _look(rest: Rest, call: Call) -> refund_lists.Seen:
    async with rest.refunds.doors.database.statement() as tx:
        return await refund_lists.read(tx, call.actor, call.request.match_info["refund_id"])
