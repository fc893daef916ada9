"""A world: one gateway adapter, its simulator over real HTTP, a payer, and somebody who takes the webhooks.

Each provider brings one (`tests/adapters/razorpay_world.py`, …) and is named in `tests/adapters/conftest.py`; the suite
in `tests/adapters/test_contract.py` runs on all of them.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from aiohttp import web

from handlers.ports import Gateway, Known, NewPayment, NewRefund
from models.payment import Capture, News, Provider
from server.adapters.sandbox.mischief import Mischief


class Hook(NamedTuple):
    """A webhook as it came in."""

    headers: Mapping[str, str]
    body: bytes


class Hooks:
    """An endpoint that takes webhooks. `statuses`: what it answers to the next ones, then 200."""

    def __init__(self) -> None:
        self.came: list[Hook] = []
        self.statuses: list[int] = []
        self._changed = asyncio.Event()
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/hooks", self._take)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/hooks"

    async def stop(self) -> None:
        if self._runner:
            await self._runner.cleanup()

    async def until(self, enough: Callable[[list[Hook]], bool]) -> list[Hook]:
        """Everything that came, as soon as it is enough."""
        async with asyncio.timeout(10):
            while not enough(self.came):
                self._changed.clear()
                await self._changed.wait()
        return list(self.came)

    async def _take(self, request: web.Request) -> web.Response:
        self.came.append(Hook(dict(request.headers), await request.read()))
        self._changed.set()
        return web.json_response({}, status=self.statuses.pop(0) if self.statuses else 200)


class World(Protocol):
    """What the suite needs of a provider. A payer's actions take the payment as we know it."""

    @property
    def provider(self) -> Provider: ...

    @property
    def gateway(self) -> Gateway: ...

    @property
    def mischief(self) -> Mischief: ...

    @property
    def hooks(self) -> Hooks: ...

    @property
    def success_kinds(self) -> frozenset[str]:
        """Event types of one payment that succeeds with automatic capture."""
        ...

    async def pay(self, known: Known) -> None:
        """Pay with success: captured, or with manual capture authorized."""
        ...

    async def fail(self, known: Known) -> None:
        """Try to pay, and be declined."""
        ...

    async def pay_late(self, known: Known) -> None:
        """Be declined (or kept waiting), and then pay all the same."""
        ...

    async def begin(self, known: Known) -> None:
        """Begin to pay with a method whose answer takes its time."""
        ...

    async def settle_refund(self, gateway_refund_id: str, succeeded: bool) -> None:
        """The bank decides a refund that is pending, or changes its mind."""
        ...

    def rotate_secret(self) -> None:
        """From now on the gateway signs with a new webhook secret; the adapter knows both."""
        ...

    def pass_time(self, seconds: float) -> None:
        """Let so much time pass on the clock of the adapter's breaker."""
        ...

    async def go_away(self) -> None:
        """Stop the simulator: nobody listens on its port any more."""
        ...

    async def come_back(self) -> None:
        """Start it again on the same port, with what it knew."""
        ...


TIMEOUT_MS = 1000
"""GATEWAY_TIMEOUT_MS of the adapters under test, so that a gateway that hangs costs little time."""
BREAKER_FAILURES = 3
BREAKER_OPEN_S = 5


def new_payment(amount: int = 49_900, currency: str = "INR", capture: Capture = Capture.AUTOMATIC) -> NewPayment:
    payment_id = str(uuid.uuid4())
    return NewPayment(
        payment_id=payment_id,
        order_id=str(uuid.uuid4()),
        reference=f"wb-{payment_id}",
        amount=amount,
        currency=currency,
        capture=capture,
    )


def as_known(new: NewPayment, gateway_order_id: str, gateway_payment_id: str | None = None) -> Known:
    return Known(
        payment_id=new.payment_id,
        gateway_order_id=gateway_order_id,
        gateway_payment_id=gateway_payment_id,
        reference=new.reference,
        amount=new.amount,
        currency=new.currency,
        capture=new.capture,
    )


async def started(world: World, new: NewPayment | None = None) -> Known:
    """A payment that the gateway knows and nobody has paid."""
    new = new or new_payment()
    created = await world.gateway.create(new)
    return as_known(new, created.gateway_order_id)


async def paid(world: World, amount: int = 49_900) -> tuple[Known, News]:
    """A captured payment, and the gateway's news of it."""
    known = await started(world, new_payment(amount))
    await world.pay(known)
    (news,) = await world.gateway.fetch(known)
    return known, news


def capture_key(provider: Provider, news: News) -> str:
    """Under which money is booked and refunded."""
    key = news.gateway_payment_id if provider is Provider.RAZORPAY else news.gateway_order_id
    assert key
    return key


def new_refund(known: Known, key: str, amount: int, refund_id: str | None = None) -> NewRefund:
    return NewRefund(
        refund_id=refund_id or str(uuid.uuid4()),
        payment=known,
        capture_key=key,
        amount=amount,
        currency=known.currency,
        reason="damaged",
    )


def day() -> tuple[dt.datetime, dt.datetime]:
    """A range of time around now."""
    now = dt.datetime.now(dt.UTC)
    return now - dt.timedelta(hours=1), now + dt.timedelta(hours=1)
