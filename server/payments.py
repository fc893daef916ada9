"""The REST functions of the payments desk: what a route gives to its verb, and what it adds to the answer.

Secrets that a payer's browser needs are added each time an answer is given, and stored nowhere.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from aiohttp import web
from msgspec import Meta

from handlers import checkout, payment_lists, payments
from handlers.payments import Desk
from handlers.ports import Done, Once
from models.payment import OPEN, Payment, PaymentStatus
from models.user import Actor
from server import csv_export
from server.doors import Answer, Doors, Steps, Verb

if TYPE_CHECKING:
    from server.rest import Call, Rest

WAITED_FOR = frozenset({PaymentStatus.PENDING, PaymentStatus.PROCESSING})
"""A long poll returns when the payment is none of these any more."""


class ReadPayment(msgspec.Struct, forbid_unknown_fields=True):
    wait: Annotated[
        int, Meta(ge=0, le=86_400, description="seconds to wait until it is settled; cut to LONG_POLL_MAX_S")
    ] = 0


class PaymentVerbs:
    """The verbs of the desk as the doors perform them."""

    def __init__(self, doors: Doors, desk: Desk) -> None:
        self.doors, self.desk = doors, desk
        self.start = self._steps("start_payment", checkout.start, checkout.permit_start)
        self.verify = self._steps("verify_payment", payments.verify, payments.permit_payer)
        self.confirm = self._steps("confirm_payment", payments.confirm, payments.permit_payer)
        self.capture = self._steps("capture_payment", payments.capture, payments.permit_back_office)
        self.cancel = self._steps("cancel_payment", payments.cancel, payments.permit_all)
        self.reconcile = self._steps("reconcile_payment", payments.reconcile, payments.permit_staff)
        self.void = self._steps("void_payment", payments.void, payments.permit_admin)
        self.annotate = Verb("annotate_payment", payments.annotate)

    def _steps(self, name: str, run: Callable[..., Awaitable[Done]], permit: Callable[..., Awaitable[object]]) -> Steps:
        async def bound(once: Once, actor: Actor, *args: Any) -> Done:
            return await run(self.desk, once, actor, *args)

        return Steps(name, bound, permit)


async def _perform(rest: Rest, call: Call, verb: Steps, *args: object) -> Answer:
    key = call.request.headers.get("Idempotency-Key")
    return await rest.payments.doors.perform_in_steps(verb, call.actor, *args, key=key)


def _written(given: Answer) -> web.Response:
    return web.Response(status=given.status, body=given.body, content_type="application/json")


def _payment_id(call: Call) -> str:
    return call.request.match_info["payment_id"]


async def start_payment(rest: Rest, call: Call) -> web.Response:
    given = await _perform(rest, call, rest.payments.start, call.command)
    shown = msgspec.json.decode(given.body, type=Payment)
    if shown.status in OPEN:
        shown.checkout = await checkout.checkout(rest.payments.desk, shown.id, given.secret)
    return _written(given._replace(body=msgspec.json.encode(shown)))


async def verify_payment(rest: Rest, call: Call) -> web.Response:
    return _written(await _perform(rest, call, rest.payments.verify, _payment_id(call), call.command))


async def confirm_payment(rest: Rest, call: Call) -> web.Response:
    return _written(await _perform(rest, call, rest.payments.confirm, _payment_id(call), call.command))


async def capture_payment(rest: Rest, call: Call) -> web.Response:
    return _written(await _perform(rest, call, rest.payments.capture, _payment_id(call), call.command))


async def cancel_payment(rest: Rest, call: Call) -> web.Response:
    return _written(await _perform(rest, call, rest.payments.cancel, _payment_id(call), call.command))


async def reconcile_payment(rest: Rest, call: Call) -> web.Response:
    return _written(await _perform(rest, call, rest.payments.reconcile, _payment_id(call), call.command))


async def void_payment(rest: Rest, call: Call) -> web.Response:
    given = await rest.payments.doors.perform_in_steps(rest.payments.void, call.actor, _payment_id(call))
    return web.Response(status=given.status)


async def annotate_payment(rest: Rest, call: Call) -> web.Response:
    verbs = rest.payments
    return _written(await verbs.doors.perform(verbs.annotate, call.actor, _payment_id(call), call.command))


# reads


async def payment_providers(rest: Rest, call: Call) -> web.Response:
    return _json(checkout.offers(call.actor, rest.payments.desk.gateways))


async def list_payments(rest: Rest, call: Call) -> web.Response:
    async with rest.payments.doors.database.statement() as tx:
        return _json(await payment_lists.list_payments(tx, call.actor, call.command))


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
    return _json(found.payment)


async def _look(rest: Rest, call: Call) -> payment_lists.Seen:
    async with rest.payments.doors.database.statement() as tx:
        return await payment_lists.read(tx, call.actor, _payment_id(call))


async def payment_history(rest: Rest, call: Call) -> web.Response:
    async with rest.payments.doors.database.statement() as tx:
        return _json(await payment_lists.history(tx, call.actor, _payment_id(call), call.command))


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
