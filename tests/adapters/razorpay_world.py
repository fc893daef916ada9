"""The world of Razorpay: its adapter against its simulator."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from handlers.ports import Known
from models.payment import Provider
from server.adapters.breaker import Breaker
from server.adapters.razorpay import Razorpay
from server.adapters.sandbox.mischief import Mischief
from server.adapters.sandbox.razorpay import RazorpaySandbox
from tests.adapters.worlds import BREAKER_FAILURES, BREAKER_OPEN_S, TIMEOUT_MS, Hooks, World

KEY_ID, KEY_SECRET = "rzp_test_contract00001", "the secret of that key"
NEW_SECRET, OLD_SECRET = "newer webhook secret", "older webhook secret"


class RazorpayWorld:
    """See `tests.adapters.worlds.World`."""

    provider = Provider.RAZORPAY
    success_kinds = frozenset({"payment.authorized", "payment.captured", "order.paid"})

    def __init__(self, gateway: Razorpay, sandbox: RazorpaySandbox, hooks: Hooks, clock: list[float]) -> None:
        self.gateway, self.sandbox, self.hooks = gateway, sandbox, hooks
        self._clock = clock

    @property
    def mischief(self) -> Mischief:
        return self.sandbox.mischief

    async def pay(self, known: Known) -> None:
        self.sandbox.pay(known.gateway_order_id)

    async def fail(self, known: Known) -> None:
        self.sandbox.fail(known.gateway_order_id)

    async def pay_late(self, known: Known) -> None:
        self.sandbox.finish(self.sandbox.fail(known.gateway_order_id).id)

    async def begin(self, known: Known) -> None:
        self.sandbox.begin(known.gateway_order_id)

    async def settle_refund(self, gateway_refund_id: str, succeeded: bool) -> None:
        self.sandbox.settle_refund(gateway_refund_id, succeeded)

    def rotate_secret(self) -> None:
        self.sandbox.webhook_secret = NEW_SECRET

    def pass_time(self, seconds: float) -> None:
        self._clock[0] += seconds

    async def go_away(self) -> None:
        await self.sandbox.stop()

    async def come_back(self) -> None:
        await self.sandbox.start()


@asynccontextmanager
async def open_razorpay() -> AsyncIterator[RazorpayWorld]:
    hooks = Hooks()
    await hooks.start()
    sandbox = RazorpaySandbox(KEY_ID, KEY_SECRET, OLD_SECRET, hooks.url, pace=0.01)
    await sandbox.start()
    clock = [0.0]
    breaker = Breaker(Provider.RAZORPAY, failures_max=BREAKER_FAILURES, open_s=BREAKER_OPEN_S, clock=lambda: clock[0])
    gateway = Razorpay(
        key_id=KEY_ID,
        key_secret=KEY_SECRET,
        webhook_secrets=[NEW_SECRET, OLD_SECRET],
        breaker=breaker,
        timeout_s=TIMEOUT_MS / 1000,
        threads_max=4,
        api_url=sandbox.url,
        sandbox_url=sandbox.url,
    )
    try:
        yield RazorpayWorld(gateway, sandbox, hooks, clock)
    finally:
        await gateway.close()
        await sandbox.stop()
        await hooks.stop()


@asynccontextmanager
async def open_world() -> AsyncIterator[World]:
    async with open_razorpay() as world:
        yield world
