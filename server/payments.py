"""The REST functions of the payments desk: what a route gives to its verb, and what it adds to the answer.

Secrets that a payer's browser needs are added each time an answer is given, and stored nowhere.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import Meta

from handlers import checkout, payment_lists
from models.payment import OPEN, Payment, PaymentStatus
from server import csv_export
from server.calls import Call, answer, written
from server.context import Rest
from server.doors import Answer, Steps

WAITED_FOR = frozenset({PaymentStatus.PENDING, PaymentStatus.PROCESSING})
"""A long poll returns when the payment is none of these any more."""


class ReadPayment(msgspec.Struct, forbid_unknown_fields=True):
    wait: Annotated[
        int, Meta(ge=0, le=86_400, description="seconds to wait until it is settled; cut to LONG_POLL_MAX_S")
    ] = 0


async def _perform(rest: Rest, call: Call, verb: Steps, *args: object) -> Answer:
    key = call.request.headers.get("Idempotency-Key")
    return await rest.payments.doors.perform_in_steps(verb, call.actor, *args, key=key)


def _payment_id(call: Call) -> str:
    return call.request.match_info["payment_id"]


async def start_payment(rest: Rest, call: Call) -> web.Response:
    given = await _perform(rest, call, rest.payments.start, call.command)
    shown = msgspec.json.decode(given.body, type=Payment)
    if shown.status in OPEN:
        shown.checkout = await checkout.checkout(rest.payments.desk, shown.id, given.secret)
    return written(given._replace(body=msgspec.json.encode(shown)))


async def verify_payment(rest: Rest, call: Call) -> web.Response:
    return written(await _perform(rest, call, rest.payments.verify, _payment_id(call), call.command))


async def confirm_payment(rest: Rest, call: Call) -> web.Response:
    return written(await _perform(rest, call, rest.payments.confirm, _payment_id(call), call.command))


async def capture_payment(rest: Rest, call: Call) -> web.Response:
    return written(await _perform(rest, call, rest.payments.capture, _payment_id(call), call.command))


async def cancel_payment(rest: Rest, call: Call) -> web.Response:
    return written(await _perform(rest, call, rest.payments.cancel, _payment_id(call), call.command))


async def reconcile_payment(rest: Rest, call: Call) -> web.Response:
    return written(await _perform(rest, call, rest.payments.reconcile, _payment_id(call), call.command))


async def void_payment(rest: Rest, call: Call) -> web.Response:
    given = await rest.payments.doors.perform_in_steps(rest.payments.void, call.actor, _payment_id(call))
    return web.Response(status=given.status)


async def annotate_payment(rest: Rest, call: Call) -> web.Response:
    verbs = rest.payments
    return written(await verbs.doors.perform(verbs.annotate, call.actor, _payment_id(call), call.command))


# reads


async def payment_providers(rest: Rest, call: Call) -> web.Response:
    return answer(checkout.offers(call.actor, rest.payments.desk.gateways))


async def list_payments(rest: Rest, call: Call) -> web.Response:
    async with rest.payments.doors.database.statement() as tx:
        return answer(await payment_lists.list_payments(tx, call.actor, call.command))


async def export_payments(rest: Rest, call: Call) -> web.Response:
    pages = payment_lists.export_payments(rest.payments.doors.database.statement, call.actor, call.command)
    return await csv_export.answer("payments.csv", Payment, pages)


async def read_payment(rest: Rest, call: Call) -> web.Response:
    """One payment. `wait` holds the request, but no database connection, until it is neither pending nor processing."""
    asked: ReadPayment = call.command
    found = await rest.wait_for(
        call,
        partial(_look, rest, call),
        lambda seen: seen.payment.status not in WAITED_FOR,
        asked.wait,
    )
    return answer(found.payment)


async def _look(rest: Rest, call: Call) -> payment_lists.Seen:
    async with rest.payments.doors.database.statement() as tx:
        return await payment_lists.read(tx, call.actor, _payment_id(call))


async def payment_history(rest: Rest, call: Call) -> web.Response:
    async with rest.payments.doors.database.statement() as tx:
        return answer(await payment_lists.history(tx, call.actor, _payment_id(call), call.command))
