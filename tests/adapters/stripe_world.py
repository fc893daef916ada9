"""The world of Stripe: its adapter against its simulator."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from handlers.ports import Gateway, Known
from models.payment import Provider
from server.adapters.breaker import Breaker
from server.adapters.sandbox.stripe import StripeSandbox
from server.adapters.stripe import Stripe
from tests.adapters.worlds import BREAKER_FAILURES, BREAKER_OPEN_S, TIMEOUT_MS, Hooks

SECRET_KEY, PUBLISHABLE_KEY = "sk_test_contract", "pk_test_contract"
NEW_SECRET, OLD_SECRET = "whsec_newer", "whsec_older"
TOLERANCE_S = 300
PACE = 1e-6
"""Stripe's hours in milliseconds."""


class StripeWorld:
    """See `tests.adapters.worlds.World`."""

    provider = Provider.STRIPE
    success_kinds = frozenset({"charge.succeeded", "payment_intent.succeeded"})

    def __init__(self, gateway: Stripe, sandbox: StripeSandbox, hooks: Hooks, clock: list[float]) -> None:
        self.gateway: Gateway = gateway
        self.sandbox, self.hooks, self._clock = sandbox, hooks, clock
        self.mischief = sandbox.mischief

    async def pay(self, known: Known) -> None:
        self.sandbox.books.pay(known.gateway_order_id)

    async def fail(self, known: Known) -> None:
        self.sandbox.books.pay(known.gateway_order_id, "pm_card_chargeDeclined")

    async def pay_late(self, known: Known) -> None:
        await self.fail(known)
        await self.pay(known)

    async def begin(self, known: Known) -> None:
        self.sandbox.books.pay(known.gateway_order_id, "pm_usBankAccount_success")

    async def settle_refund(self, gateway_refund_id: str, succeeded: bool) -> None:
        self.sandbox.books.settle_refund(gateway_refund_id, "succeeded" if succeeded else "failed")

    def rotate_secret(self) -> None:
        self.sandbox.roll_secret(NEW_SECRET)
        self.sandbox.end_roll()

    def pass_time(self, seconds: float) -> None:
        self._clock[0] += seconds

    async def go_away(self) -> None:
        await self.sandbox.stop()

    async def come_back(self) -> None:
        await self.sandbox.start()


PATIENT_S = 10.0
"""Longest question of an adapter whose gateway always answers: longer than anything a busy machine does."""


def gateway_at(url: str, clock: list[float] | None = None, timeout_s: float = PATIENT_S) -> Stripe:
    """An adapter that talks to `url`."""
    seconds = clock or [0.0]
    return Stripe(
        secret_key=SECRET_KEY,
        publishable_key=PUBLISHABLE_KEY,
        webhook_secrets=(NEW_SECRET, OLD_SECRET),
        breaker=Breaker(
            Provider.STRIPE, failures_max=BREAKER_FAILURES, open_s=BREAKER_OPEN_S, clock=lambda: seconds[0]
        ),
        timeout_s=timeout_s,
        tolerance_s=TOLERANCE_S,
        api_url=url,
        sandbox_url=url,
    )


@asynccontextmanager
async def open_world(timeout_s: float = TIMEOUT_MS / 1000) -> AsyncIterator[StripeWorld]:
    hooks = Hooks()
    await hooks.start()
    sandbox = StripeSandbox(SECRET_KEY, PUBLISHABLE_KEY, OLD_SECRET, hooks.url, pace=PACE)
    await sandbox.start()
    clock = [0.0]
    gateway = gateway_at(sandbox.url, clock, timeout_s)
    yield StripeWorld(gateway, sandbox, hooks, clock)
    await gateway.close()
    await sandbox.stop()
    await hooks.stop()
