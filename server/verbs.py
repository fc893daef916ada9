"""The verbs that need a setting, a key or a gateway, as the doors perform them."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from handlers import cash, checkout, links, orders, payments, refund_calls, refunds, reports
from handlers.context import Tx
from handlers.payments import Desk
from handlers.ports import Done, Once
from models.cash import read_units
from models.errors import Refused
from models.payment import Payment
from models.user import Actor, Scope
from server.auth import Authenticator, secret_digest
from server.doors import Answer, Doors, Steps, Verb
from server.settings import Settings


class OrderVerbs:
    """Placing an order, and changing how it is paid: both say until when it must be paid."""

    def __init__(self, settings: Settings) -> None:
        self.place = Verb("place", partial(orders.place, expiry_s=settings.payment_expiry_s), status=201)
        self.change_payment_method = Verb(
            "change_payment_method",
            partial(orders.change_payment_method, expiry_s=settings.payment_expiry_s, hold_max_s=settings.hold_max_s),
        )


class LinkVerbs:
    """Creating a link of each scope."""

    def __init__(self, settings: Settings, authenticator: Authenticator) -> None:
        self._settings = settings
        self._authenticator = authenticator
        self.create = {
            scope: Verb(name, partial(self._new_link, scope), status=201)
            for scope, name in ((Scope.TRACK, "create_tracking_link"), (Scope.PAY, "create_payment_link"))
        }

    async def _new_link(
        self, scope: Scope, tx: Tx, actor: Actor, order_id: str, command: links.CreateLink
    ) -> links.Link:
        return await links.create_link(
            tx,
            actor,
            order_id,
            command,
            scope=scope,
            digest=lambda link_id: secret_digest(self._authenticator.link_secret(link_id)),
            ttl_s=self._settings.link_ttl_s,
            ttl_max_s=self._settings.link_ttl_max_s,
        )


def _steps(
    desk: Any, name: str, run: Callable[..., Awaitable[Done]], permit: Callable[..., Awaitable[object]]
) -> Steps:
    async def bound(once: Once, actor: Actor, *args: Any) -> Done:
        return await run(desk, once, actor, *args)

    return Steps(name, bound, permit)


class PaymentVerbs:
    """The verbs of the payments desk."""

    def __init__(self, doors: Doors, desk: Desk) -> None:
        self.doors, self.desk = doors, desk
        steps = partial(_steps, desk)
        self.start = steps("start_payment", checkout.start, checkout.permit_start)
        self.verify = steps("verify_payment", payments.verify, payments.permit_payer)
        self.confirm = steps("confirm_payment", payments.confirm, payments.permit_payer)
        self.capture = steps("capture_payment", payments.capture, payments.permit_back_office)
        self.cancel = steps("cancel_payment", payments.cancel, payments.permit_all)
        self.reconcile = steps("reconcile_payment", payments.reconcile, payments.permit_staff)
        self.void = steps("void_payment", payments.void, payments.permit_admin)
        self.annotate = Verb("annotate_payment", payments.annotate)


class RefundVerbs:
    """The verbs of the refunds desk."""

    def __init__(self, doors: Doors, desk: refund_calls.Desk) -> None:
        self.doors, self.desk = doors, desk
        steps = partial(_steps, desk)
        self.refund_payment = steps("refund_payment", refunds.refund_payment, refunds.permit_payment)
        self.refund_order = steps("refund_order", refunds.refund_order, refunds.permit_order)
        self.retry = steps("retry_refund", refunds.retry, refunds.permit_retry)


class Books:
    """The desks of cash and reports, with the rules that the settings make."""

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
