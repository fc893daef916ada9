"""Servers that die with SIGKILL at every moment between two steps of money, before and after every commit that writes
and every call to a gateway, enumerated by the test itself: whoever comes after them makes whole what was begun. And a
storm of payments with gateways that misbehave.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest

from server.adapters.sandbox.mischief import Fault
from server.adapters.sandbox.razorpay import RazorpaySandbox
from server.adapters.sandbox.stripe import StripeSandbox
from server.embedded import DataServers
from tests.books import CHECK
from tests.harness import ORDER, ROOT, SECRET, SERVICE, UNHURRIED, clean_environment, free_port, token, until

CUSTOMER, STAFF = token("customer", "c1"), token("staff", "s1")
QUIET_S = 60.0
"""Longest time in which everything that was begun must have ended."""

OPEN = {
    "webhooks": "select kind, error from webhooks where status in ('received', 'parked')",
    "jobs": "select entrypoint from jobs.pgqueuer where entrypoint in ('reconcile', 'refund', 'cancel_payment') "
    "and execute_after <= now()",
    "refunds": "select id from refunds where status in ('pending', 'processing')",
    "payments": "select id from payments where status in ('processing', 'unknown') "
    "or (status = 'authorized' and capture = 'automatic')",
}
"""What has not ended yet."""


class Died(Exception):
    """The server died while it was asked."""


class Shop:
    """A server that dies, the gateways that do not, and those who buy."""

    def __init__(self, folder: Path, data: DataServers, database_url: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        doors = f"{self.url}/api/v1/webhooks"
        self.razorpay = RazorpaySandbox("rzp_test_k", "key-secret", "hook", f"{doors}/razorpay", pace=0.05, seed=1)
        self.stripe = StripeSandbox("sk_test_k", "pk_test_k", "whsec_k", f"{doors}/stripe", pace=0.05)
        self.points = folder / "points"
        self.log = folder / "server.log"
        self._env = {
            "DATABASE_URL": database_url,
            "REDIS_URL": data.redis_url,
            "DATA_DIR": str(folder / "data"),
            "JWT_SECRET": SECRET,
            "PORT": str(self.port),
            "DB_TIMEOUT_MS": "500",
            "JOB_TAKEOVER_S": "2",
            "JOB_POLL_MS": "50",
            "JOB_RETRY_BASE_S": "1",
            "INBOX_POLL_MS": "50",
            "RECONCILE_AFTER_S": "1",
            "SWEEP_INTERVAL_S": "1",
            "GATEWAY_TIMEOUT_MS": "1500",
            "BREAKER_OPEN_S": "1",
            **UNHURRIED,
        }
        self._database_url = database_url
        self._zygote: asyncio.subprocess.Process | None = None
        self._pid = 0
        self.unfinished: list[Callable[[], Awaitable[None]]] = []

    async def open(self) -> None:
        await self.razorpay.start()
        await self.stripe.start()
        self._env |= {
            "RAZORPAY_KEY_ID": "rzp_test_k",
            "RAZORPAY_KEY_SECRET": "key-secret",
            "RAZORPAY_WEBHOOK_SECRET": "hook",
            "RAZORPAY_API_URL": self.razorpay.url,
            "STRIPE_SECRET_KEY": "sk_test_k",
            "STRIPE_PUBLISHABLE_KEY": "pk_test_k",
            "STRIPE_WEBHOOK_SECRET": "whsec_k",
            "STRIPE_API_URL": self.stripe.url,
        }
        self._zygote = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.faults.mortal",
            cwd=ROOT,
            env=clean_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    async def close(self) -> None:
        if self.alive:
            os.kill(self._pid, signal.SIGKILL)
        if self._zygote is not None:
            self._zygote.kill()
            await self._zygote.wait()
        await self.razorpay.stop()
        await self.stripe.stop()

    # the server

    @property
    def alive(self) -> bool:
        """Whether the server lives."""
        try:
            os.kill(self._pid, 0)
        except ProcessLookupError:
            return False
        return self._pid > 0

    async def bear(self, at: str | None) -> None:
        """Start a server that dies `at` this moment, and wait until it serves."""
        assert self._zygote is not None
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        asked = {"env": self._env, "log": str(self.log), "points": str(self.points), "at": at}
        self._zygote.stdin.write(json.dumps(asked).encode() + b"\n")
        self._pid = int(await self._zygote.stdout.readline())

        async def serves() -> bool:
            if not self.alive:
                return True  # it found what the one before had left, and died of that
            try:
                async with aiohttp.ClientSession() as session, session.get(f"{self.url}/health/ready") as answer:
                    return answer.status == 200
            except aiohttp.ClientError:
                return False

        await until(serves, "the server is ready", 30)

    async def dead(self) -> None:
        await until(lambda: not self.alive, f"it has died; {self.log.read_text()[-2000:]}")

    async def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        await self.dead()

    def moments(self) -> list[str]:
        """Every moment that was passed so far, by name."""
        return sorted(set(self.points.read_text().splitlines()))

    # those who buy

    async def post(self, path: str, body: Any, by: str, key: str | None = None) -> Any:
        """A request that is carried out. Raises Died."""
        headers = {"Authorization": f"Bearer {by}"} | ({"Idempotency-Key": key} if key else {})
        address = f"{self.url}/api/v1{path}"
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.post(address, json=body, headers=headers) as response,
            ):
                found = await response.json()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Died from error
        if response.status >= 300:
            raise Refused(response.status, found)
        return found

    async def get(self, path: str, by: str) -> Any:
        headers = {"Authorization": f"Bearer {by}"}
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{self.url}/api/v1{path}", headers=headers) as found,
        ):
            assert found.status == 200
            return await found.json()

    async def fetch(self, statement: str) -> list[Any]:
        connection = await asyncpg.connect(self._database_url)
        try:
            return list(await connection.fetch(statement))
        finally:
            await connection.close()

    async def retry_what_was_parked(self) -> None:
        """A job that took three servers with it waits for staff, who has read in the list that it was not its fault."""
        await until(
            lambda: self.nothing("select from jobs.pgqueuer where status = 'picked'"), "all were taken over", 30
        )
        for job in (await self.get("/jobs?status=parked&limit=200", STAFF))["items"]:
            await self.post(f"/jobs/{job['id']}/retry", {}, STAFF)

    async def nothing(self, query: str) -> bool:
        """Whether a query finds nothing."""
        return not await self.fetch(query)

    async def quiet(self) -> None:
        """Wait until everything that was begun has ended."""

        async def nothing_open() -> bool:
            return not any([await self.fetch(query) for query in OPEN.values()])

        try:
            await until(nothing_open, "quiet", QUIET_S)
        except AssertionError:
            left = {name: await self.fetch(query) for name, query in OPEN.items()}
            raise AssertionError(f"this never ends: {left}\n{self.log.read_text()[-6000:]}") from None

    async def check(self) -> None:
        """The books add up, and are those of the gateways."""
        for rule, query in CHECK.items():
            assert await self.fetch(query) == [], rule
        ours = {
            (row["provider"], row["key"]): (row["amount"], row["back"])
            for row in await self.fetch(
                "select c.provider, c.key, c.amount, "
                "coalesce(sum(r.amount) filter (where r.status = 'succeeded'), 0)::int as back from captures c "
                "left join refunds r on r.provider = c.provider and r.capture_key = c.key "
                "where c.provider <> 'cash' group by 1, 2, 3"
            )
        }
        assert ours == dict(self._theirs())

    def _theirs(self) -> Iterator[tuple[tuple[str, str], tuple[int, int]]]:
        for one in self.razorpay.books.state.payments.values():
            if one.status in ("captured", "refunded"):
                yield ("razorpay", one.id), (one.amount, one.amount_refunded)
        for charge in self.stripe.books.state.charges.values():
            if charge["captured"]:
                yield ("stripe", charge["payment_intent"]), (charge["amount_captured"], charge["amount_refunded"])


class Refused(Exception):
    """The server said no."""


@asynccontextmanager
async def opened(folder: Path, data: DataServers, database_url: str) -> AsyncIterator[Shop]:
    shop = Shop(folder, data, database_url)
    try:
        await shop.open()
        yield shop
    finally:
        await shop.close()


# what people do; each of these can be begun again from its start with the same keys, as clients do


class Buyer:
    """One order, bought step by step. `key` is the beginning of all its idempotency keys, so that a repeat is one."""

    def __init__(self, shop: Shop, provider: str, *, capture: str = "automatic") -> None:
        self.shop, self.provider, self.capture = shop, provider, capture
        self.key = uuid.uuid4().hex
        self.payment_id = ""
        self.refusal = ""

    async def place(self) -> str:
        order = await self.shop.post("/orders", {**ORDER, "paymentMethod": "online"}, SERVICE, f"{self.key}-place")
        found: str = order["id"]
        return found

    async def start(self, order_id: str) -> Any:
        asked = {"orderId": order_id, "provider": self.provider, "capture": self.capture}
        payment = await self.shop.post("/payments", asked, SERVICE, f"{self.key}-start")
        self.payment_id = payment["id"]
        if payment["status"] == "unknown":
            raise Refused(503, {"code": "unknown"})
        return payment

    def pay(self, payment: Any) -> dict[str, str]:
        """In the browser, once; what the checkout hands over."""
        name = payment["gatewayOrderId"]
        if self.provider == "stripe":
            if self.shop.stripe.books.retrieve({}, name)["status"] == "requires_payment_method":
                self.shop.stripe.books.pay(name)
            return {}
        handed = {} if self.shop.razorpay.books.payments_of(name) else self.shop.razorpay.pay(name)
        return {
            "".join(part if n == 0 else part.title() for n, part in enumerate(name.split("_"))): value
            for name, value in handed.items()
        }

    async def verify(self, payment: Any, handed: dict[str, str]) -> None:
        if handed or self.provider == "stripe":
            await self.shop.post(f"/payments/{payment['id']}/verify", handed, CUSTOMER)


async def pays_and_gets_some_back(shop: Shop, buyer: Buyer) -> None:
    order = await buyer.place()
    payment = await buyer.start(order)
    await buyer.verify(payment, buyer.pay(payment))
    await shop.post(
        f"/payments/{payment['id']}/refunds",
        {"amount": 5_200, "currency": "INR", "reason": "Cold"},
        SERVICE,
        f"{buyer.key}-refund",
    )


async def pays_and_is_cancelled(shop: Shop, buyer: Buyer) -> None:
    order = await buyer.place()
    payment = await buyer.start(order)
    await buyer.verify(payment, buyer.pay(payment))
    await shop.post(f"/orders/{order}/cancel", {"reason": "Sold out"}, SERVICE, f"{buyer.key}-cancel")


async def pays_too_late(shop: Shop, buyer: Buyer) -> None:
    order = await buyer.place()
    payment = await buyer.start(order)
    await shop.post(f"/orders/{order}/cancel", {"reason": "Sold out"}, SERVICE, f"{buyer.key}-cancel")
    if buyer.provider == "razorpay":
        buyer.pay(payment)


async def pays_what_staff_captures(shop: Shop, buyer: Buyer) -> None:
    buyer.capture = "manual"
    order = await buyer.place()
    payment = await buyer.start(order)
    await buyer.verify(payment, buyer.pay(payment))
    await shop.post(
        f"/payments/{payment['id']}/capture", {"amount": 25_200, "currency": "INR"}, STAFF, f"{buyer.key}-capture"
    )


async def pays_in_cash_what_was_begun_online(shop: Shop, buyer: Buyer) -> None:
    order = await buyer.place()
    await buyer.start(order)
    cash = {"orderId": order, "amount": 25_200, "currency": "INR", "tendered": 30_000}
    await shop.post("/payments/cash", cash, STAFF, f"{buyer.key}-cash")


STORIES = [
    (story, provider)
    for provider in ("razorpay", "stripe")
    for story in (
        pays_and_gets_some_back,
        pays_and_is_cancelled,
        pays_too_late,
        pays_what_staff_captures,
        pays_in_cash_what_was_begun_online,
    )
]


async def everybody_buys(shop: Shop) -> None:
    """Every story at once. Who is cut off tries again later, from the start."""

    async def live(story: Callable[[Shop, Buyer], Awaitable[None]], buyer: Buyer) -> None:
        try:
            await story(shop, buyer)
        except Died:
            shop.unfinished.append(lambda: story(shop, buyer))

    await asyncio.gather(*(live(story, Buyer(shop, provider)) for story, provider in STORIES))


@pytest.fixture
async def shop(tmp_path: Path, data: DataServers, database_url: str) -> AsyncIterator[Shop]:
    async with opened(tmp_path, data, database_url) as shop:
        yield shop


async def test_nothing_is_lost_whenever_a_server_dies(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    await shop.bear(None)
    await everybody_buys(shop)
    await shop.quiet()
    assert not shop.unfinished
    await shop.check()
    await shop.kill()
    moments = shop.moments()
    # the least that there must be: both ends of a commit and of a call, for both gateways
    for part in ("before the commit of", "after the commit of", "Razorpay.create", "Stripe.refund", "Razorpay.fetch"):
        assert any(part in moment for moment in moments), part
    for moment in moments:
        await shop.bear(moment)
        if shop.alive:
            await everybody_buys(shop)
        await shop.dead()
    await shop.bear(None)
    for story in shop.unfinished:
        await story()
    await shop.retry_what_was_parked()
    await shop.quiet()
    await shop.check()
    with capsys.disabled():
        print(f"\ndied at {len(moments)} moments, {len(shop.unfinished)} buyers tried again")


# everything at once, with gateways that misbehave

SEED = secrets.randbelow(1_000_000)
PAYMENTS = int(os.environ.get("STORM_PAYMENTS", "120"))
AT_ONCE = 16
TRIES_MAX = 60


async def misbehave(shop: Shop, luck: random.Random) -> None:
    """Something else goes wrong with the gateways every moment, until cancelled."""
    try:
        while True:
            for mischief in (shop.razorpay.mischief, shop.stripe.mischief):
                mischief.fault = luck.choice([None, None, *Fault])
                mischief.fault_calls = luck.randint(1, 2)
                mischief.webhook_copies = luck.choice([1, 1, 2, 3])
                mischief.webhook_shuffle_s = luck.choice([0, 0.2, 0.5])
                mischief.webhooks_lost = luck.choice([0, 0, 0, 3])
                mischief.refunds = luck.choice(["processed", "processed", "pending"])
            await asyncio.sleep(luck.uniform(0.05, 0.3))
    finally:
        for mischief in (shop.razorpay.mischief, shop.stripe.mischief):
            mischief.fault, mischief.webhooks_lost, mischief.refunds = None, 0, "processed"


async def nags(shop: Shop, luck: random.Random, payment_id: str) -> None:
    """Staff and customers who cannot wait: they ask again, and refund twice at once."""
    asked: list[Awaitable[Any]] = [shop.post(f"/payments/{payment_id}/reconcile", {}, STAFF) for _ in range(2)]
    asked += [shop.post(f"/payments/{payment_id}/verify", {}, CUSTOMER)]
    everything = {"reason": "Never came"}
    asked += [shop.post(f"/payments/{payment_id}/refunds", everything, SERVICE) for _ in range(luck.choice([0, 2]))]
    luck.shuffle(asked)
    await asyncio.gather(*asked, return_exceptions=True)


async def test_a_storm_of_payments_adds_up(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    """`STORM_PAYMENTS=5000 scripts/test tests/faults/test_money.py -k storm` makes it a long one."""
    luck = random.Random(SEED)
    with capsys.disabled():
        print(f"\nseed {SEED}, {PAYMENTS} payments")
    await shop.bear(None)
    room = asyncio.Semaphore(AT_ONCE)

    async def live(number: int) -> None:
        story, provider = STORIES[number % len(STORIES)]
        buyer = Buyer(shop, provider)
        async with room:
            for _ in range(TRIES_MAX):
                try:
                    await story(shop, buyer)
                    break
                except Died:
                    await asyncio.sleep(luck.uniform(0.1, 0.5))
                except Refused as refusal:
                    status, problem = refusal.args
                    if status < 500:
                        buyer.refusal = problem["code"]
                        break
                    await asyncio.sleep(luck.uniform(0.1, 0.5))
            else:
                raise AssertionError(f"{story.__name__} never ended")
            if buyer.payment_id and luck.random() < 0.3:
                await nags(shop, luck, buyer.payment_id)

    trouble = asyncio.create_task(misbehave(shop, luck))
    buyers = [asyncio.create_task(live(number)) for number in range(PAYMENTS)]
    while not all(task.done() for task in buyers):
        await asyncio.wait(buyers, timeout=luck.uniform(3, 5))
        if not all(task.done() for task in buyers):
            await shop.kill()
            await shop.bear(None)
    for task in buyers:
        task.result()
    trouble.cancel()
    await asyncio.wait((trouble,))
    for refund_id, refund in shop.razorpay.books.state.refunds.items():
        if refund.status == "pending":
            shop.razorpay.settle_refund(refund_id, succeeded=True)
    for refund_id, found in shop.stripe.books.state.refunds.items():
        if found["status"] == "pending":
            shop.stripe.books.settle_refund(refund_id, "succeeded")
    await shop.quiet()
    await shop.check()
    (row,) = await shop.fetch("select count(*) as n from payments where completed_at is not null")
    assert row["n"] > PAYMENTS / 3, "most of them have paid"
