"""Stripe's world: the adapter, the simulator over HTTP, and what a payer does at its checkout."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from handlers.ports import Known
from models.payment import Provider
from server.adapters.breaker import Breaker
from server.adapters.sandbox.mischief import Mischief
from server.adapters.sandbox.stripe import StripeSimulator
from server.adapters.stripe import Account, Stripe
from server.app import utc_now
from tests.adapters.worlds import BREAKER_FAILURES, BREAKER_OPEN_S, TIMEOUT_MS, Hooks

PACE = 1e-6
"""Stripe's hours in milliseconds."""


class StripeWorld:
    """Fulfils tests.adapters.worlds.World."""

    provider = Provider.STRIPE
    success_kinds = frozenset({"charge.succeeded", "payment_intent.succeeded"})

    def __init__(self, hooks: Hooks) -> None:
        self.hooks = hooks
        self._seconds = 0.0
        self.simulator = StripeSimulator(utc_now, webhook_url=hooks.url, pace=PACE)
        self._next_secret = ""
        self.gateway: Stripe

    async def open(self) -> None:
        await self.simulator.start()
        self.gateway = self.adapter()

    def adapter(self, api_url: str = "") -> Stripe:
        """An adapter for this world's simulator, or for another address."""
        breaker = Breaker(
            Provider.STRIPE, failures_max=BREAKER_FAILURES, open_s=BREAKER_OPEN_S, clock=lambda: self._seconds
        )
        simulator = self.simulator
        account = Account(
            secret_key=simulator.secret_key,
            publishable_key=simulator.publishable_key,
            webhook_secrets=(simulator.next_webhook_secret, *simulator.webhook_secrets),
            api_url=api_url or simulator.url,
            checkout_url=f"{simulator.url}/checkout",
        )
        return Stripe(account, breaker, timeout_ms=TIMEOUT_MS, tolerance_s=300, now=utc_now)

    @property
    def mischief(self) -> Mischief:
        return self.simulator.mischief

    async def pay(self, known: Known) -> None:
        self.simulator.pay(known.gateway_order_id)

    async def fail(self, known: Known) -> None:
        self.simulator.pay(known.gateway_order_id, "pm_card_chargeDeclined")

    async def pay_late(self, known: Known) -> None:
        await self.fail(known)
        await self.pay(known)

    async def begin(self, known: Known) -> None:
        self.simulator.pay(known.gateway_order_id, "pm_usBankAccount_success")

    async def settle_refund(self, gateway_refund_id: str, succeeded: bool) -> None:
        self.simulator.settle_refund(gateway_refund_id, "succeeded" if succeeded else "failed")

    def rotate_secret(self) -> None:
        self.simulator.roll_secret()
        self.simulator.end_roll()

    def pass_time(self, seconds: float) -> None:
        self._seconds += seconds

    async def go_away(self) -> None:
        await self.simulator.stop()

    async def come_back(self) -> None:
        await self.simulator.start(self.simulator.port)


@asynccontextmanager
async def open_world() -> AsyncIterator[StripeWorld]:
    hooks = Hooks()
    await hooks.start()
    world = StripeWorld(hooks)
    await world.open()
    yield world
    await world.gateway.close()
    await world.simulator.stop()
    await hooks.stop()
