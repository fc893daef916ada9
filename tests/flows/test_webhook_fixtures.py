"""Every webhook that the gateways are known to have sent, through the door, in any order and repeated, before and after
their payment is known: each payment ends as it should.

WEBHOOK_SEED in the environment repeats a run. What the fixtures are: tests/fixtures/*/SOURCES.md.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

import asyncpg
import pytest

from models.payment import Provider
from server.app import utc_now
from server.db import Database
from server.settings import Settings
from tests.flows.gateways import NamingGateway, naming_gateway, signed
from tests.handlers.desk import Desk
from tests.handlers.money import check_books
from tests.harness import ROOT, Fleet, Instance, token, until

FIXTURES = ROOT / "tests" / "fixtures"
STAFF = token("staff", "s1")
COPIES = 3
"""How often each webhook is delivered."""


class Hook(NamedTuple):
    """A webhook. `name`: its fixture."""

    name: str
    body: bytes


class Story(NamedTuple):
    """The webhooks of one payment, and how it ends whatever their order."""

    gateway_order: str
    amount: int
    currency: str
    hooks: tuple[Hook, ...]
    ends: dict[str, Any]

    @property
    def provider(self) -> Provider:
        return Provider.STRIPE if self.gateway_order.startswith("pi_") else Provider.RAZORPAY


def fixture(provider: Provider, name: str) -> bytes:
    return (FIXTURES / provider / f"{name}.json").read_bytes()


# Razorpay: the bodies as they are, byte for byte


def razorpay(gateway_order: str, amount: int, *names: str, made: Sequence[Hook] = (), **ends: Any) -> Story:
    hooks = tuple(Hook(name, fixture(Provider.RAZORPAY, name)) for name in names)
    return Story(gateway_order, amount, "INR", (*hooks, *made), ends)


def of_the_dispute_that_was_won() -> Hook:
    """That dispute's payment has no order in the fixture. This is the capture that names both."""
    body = json.loads(fixture(Provider.RAZORPAY, "doc-payment.captured-netbanking"))
    names = {"id": "pay_EsIStomuIwFQ6U", "order_id": "order_EsIRmadeup0000", "amount": 1_000_000}
    body["payload"]["payment"]["entity"] |= names
    return Hook("made: captured", json.dumps(body).encode())


RAZORPAY = [
    razorpay(
        "order_TUorOYH8gErbbD",
        100,
        "live-netbanking-payment.authorized",
        "live-netbanking-payment.captured",
        "live-netbanking-order.paid",
        status="completed",
        captured=100,
        gatewayPaymentId="pay_TUouivTMBk4OY6",
        method="netbanking",
    ),
    razorpay(
        "order_TVCpvdEADkAoMJ",
        100,
        "live-netbanking-payment.captured-empty-notes",
        "live-netbanking-refund.created",
        status="refunded",
        captured=100,
        refunded=100,
    ),
    razorpay("order_S1hYcAZ4wd0LdR", 2000, "live-upi-payment.captured", status="completed", captured=2000),
    razorpay(
        "order_RkHjzngEtKeKV3",
        49_900,
        "live-upi2-payment.captured",
        "live-upi2-order.paid",
        "live-upi2-payment_link.paid",
        status="completed",
        captured=49_900,
    ),
    razorpay("order_QUg5vtkywCanxg", 5500, "live-wallet-order.paid-attempts2", status="completed", captured=5500),
    razorpay("order_S1ip8hIHqsJGO3", 1000, "live-card-payment.failed", status="failed", captured=0),
    *(
        razorpay(
            order,
            100,
            *(f"doc-{kind}-{method}" for kind in kinds),
            status="completed",
            captured=100,
        )
        for order, method, kinds in (
            (
                "order_DESoU0U4ikYA19",
                "card",
                ("payment.authorized", "payment.failed", "payment.captured", "order.paid"),
            ),
            ("order_DESlLckIVRkHWj", "netbanking", ("payment.authorized", "payment.captured", "order.paid")),
            ("order_DESxiijbl9xjDB", "upi", ("payment.authorized", "payment.failed", "payment.captured", "order.paid")),
        )
    ),
    razorpay("order_DEATVTRRctwEGb", 50_000, "doc-payment.failed-netbanking", status="failed", captured=0),
    razorpay("order_Epitst92Bya4gC", 10_000, "doc-payment.failed-wallets", status="failed", captured=0),
    razorpay(
        "order_FPoIeimWki9j8A",
        500_000,
        "doc-refund.created",
        "doc-refund.processed",
        "doc-refund.speed_changed",
        status="partially_refunded",
        captured=500_000,
        refunded=50_000,
    ),
    razorpay(
        "order_EFtkA6f5jdkfud",
        5_297_600,
        "doc-payment.dispute.created",
        "doc-payment.dispute.lost",
        status="completed",
        captured=5_297_600,
        disputed=39_000,
        attention=None,
    ),
    razorpay(
        "order_EsIRmadeup0000",
        1_000_000,
        "doc-payment.dispute.won",
        made=[of_the_dispute_that_was_won()],
        status="completed",
        captured=1_000_000,
        disputed=0,
        attention=None,
    ),
    razorpay("order_100000000order", 1_000_000, "sdk-payment.authorized", status="completed", captured=1_000_000),
]


# Stripe: the recorder has put zeros for all ids, so each story gets ids of its own


def stripe(story: str, amount: int, currency: str, *names: str, made: Sequence[Hook] = (), **ends: Any) -> Story:
    def own(name: str) -> Hook:
        text = fixture(Provider.STRIPE, name).decode()
        text = re.sub(r"\bevt_0+\b", "evt_" + hashlib.sha256(f"{story} {name}".encode()).hexdigest()[:24], text)
        return Hook(name, re.sub(r"\b(pi|ch|re|dp)_0+\b", rf"\1_{story}", text).encode())

    return Story(f"pi_{story}", amount, currency, (*map(own, names), *made), ends)


REFUND_FAILED = "live-inr-charge.refund.updated-failed"


def before_the_refund_failed() -> list[Hook]:
    """The payment and the refund of that fixture as they were before: the payment from a live one, the refund's event
    from Stripe's present-day object, since no recording of a refund.created was found."""
    failed = json.loads(fixture(Provider.STRIPE, REFUND_FAILED))["data"]["object"]
    paid = json.loads(fixture(Provider.STRIPE, "live-payment_intent.succeeded"))
    paid["id"] = "evt_paidbeforeitfailed"
    amount = {"amount": failed["amount"], "amount_received": failed["amount"], "currency": "inr"}
    paid["data"]["object"] |= {"id": failed["payment_intent"], "latest_charge": failed["charge"], **amount}
    refund = json.loads(fixture(Provider.STRIPE, "openapi-object-refund"))
    refund |= {name: failed[name] for name in ("id", "amount", "currency", "charge", "payment_intent")}
    refund["balance_transaction"] = "txn_refundbeforeitfailed"
    created = {**paid, "id": "evt_refundbeforeitfailed", "type": "refund.created", "data": {"object": refund}}
    return [Hook(f"made: {one['type']}", json.dumps(one).encode()) for one in (paid, created)]


STRIPE = [
    stripe(
        "paysatthesecondattempt",
        2000,
        "USD",
        "cli-payment_intent.created",
        "cli-payment_intent.payment_failed",
        "cli-payment_intent.requires_action",
        "cli-charge.failed",
        "cli-charge.succeeded",
        "cli-payment_intent.succeeded",
        status="completed",
        captured=2000,
    ),
    stripe("isonlyauthorized", 2000, "USD", "cli-payment_intent.amount_capturable_updated", status="authorized"),
    stripe("iscancelled", 2000, "USD", "cli-payment_intent.created", "cli-payment_intent.canceled", status="cancelled"),
    stripe("isprocessing", 900, "EUR", "cli-payment_intent.processing", status="processing"),
    stripe("wantsaction", 2000, "USD", "cli-payment_intent.requires_action", status="processing"),
    stripe("isdeclined", 2000, "USD", "cli-payment_intent.payment_failed", status="failed"),
    stripe(
        "isrefundedinpart",
        2000,
        "USD",
        "cli-payment_intent.succeeded",
        "cli-charge.captured",
        "cli-charge.refunded",
        "cli-charge.refund.updated",
        status="partially_refunded",
        captured=2000,
        refunded=100,
    ),
    stripe(
        "isdisputed",
        2000,
        "USD",
        "cli-payment_intent.succeeded",
        "cli-charge.dispute.created",
        status="completed",
        captured=2000,
        disputed=100,
        attention="dispute",
    ),
    stripe(
        "3N0LoOB9kJ5FDFAy1yipaNO3",
        150_000,
        "LKR",
        "live-payment_intent.created",
        "live-payment_intent.succeeded",
        status="completed",
        captured=150_000,
        gatewayPaymentId="ch_3N0LoOB9kJ5FDFAy1ePq8RIv",
    ),
    stripe(
        "1Gib60HLwdCOCoR7KJbTO3U7",
        30_000_000,
        "INR",
        REFUND_FAILED,
        made=before_the_refund_failed(),
        status="completed",
        captured=30_000_000,
        refunded=0,
    ),
]

FAILED_REFUND = razorpay(
    "order_FPoIeimWki9j8A",
    500_000,
    "doc-refund.created",
    "doc-refund.processed",
    "doc-refund.failed",
    status="completed",
    captured=500_000,
    refunded=0,
)
"""The refund of the documents fails after all. It has the ids of the one that succeeds, so it is told by itself."""


def test_no_fixture_is_left_out() -> None:
    told = {hook.name for story in (*RAZORPAY, *STRIPE, FAILED_REFUND) for hook in story.hooks}
    for folder, kind in (("razorpay", "event"), ("stripe", "type")):
        bodies = {path.stem: json.loads(path.read_bytes()) for path in (FIXTURES / folder).glob("*.json")}
        hooks = {name for name, body in bodies.items() if isinstance(body, dict) and kind in body}
        assert len(hooks) > 10
        assert hooks <= told


@pytest.fixture
async def gateway() -> AsyncIterator[NamingGateway]:
    async with naming_gateway() as gateway:
        yield gateway


class Teller:
    """Carries out stories at a pair of instances."""

    def __init__(self, instances: Sequence[Instance], gateway: NamingGateway, luck: random.Random) -> None:
        self._instances, self._gateway, self._luck = instances, gateway, luck
        self.payments: dict[str, str] = {}
        """Payment ids by gateway order."""

    def _somewhere(self) -> Instance:
        return self._luck.choice(list(self._instances))

    async def begin(self, story: Story) -> None:
        """An order, and a payment which the gateway calls as the fixtures do."""
        order = await self._somewhere().place(
            currency=story.currency,
            paymentMethod="online",
            items=[{"name": "Masala dosa", "quantity": 1, "unitPrice": story.amount}],
        )
        self._gateway.next_id = story.gateway_order
        asked = {"orderId": order["id"], "provider": story.provider}
        reply = await self._somewhere().post("/payments", asked)
        assert reply.status == 201, reply
        assert reply.body["gatewayOrderId"] == story.gateway_order
        self.payments[story.gateway_order] = reply.body["id"]

    async def deliver(self, story: Story, hook: Hook) -> None:
        event_id = hashlib.sha256(f"{story.gateway_order} {hook.name}".encode()).hexdigest()[:14]
        headers = signed(story.provider, hook.body, event_id)
        reply = await self._somewhere().request(
            "POST", f"/webhooks/{story.provider}", raw=hook.body, headers=headers, by=None
        )
        assert (reply.status, reply.body) == (200, {}), (hook.name, reply)

    async def tell(self, stories: Sequence[Story]) -> None:
        """Everything that happens in these stories, each webhook several times, in one shuffled row."""
        happenings: list[tuple[Story, Hook | None]] = []
        for story in stories:
            happenings += [(story, None), *((story, hook) for hook in story.hooks * COPIES)]
        self._luck.shuffle(happenings)
        for story, hook in happenings:
            await (self.begin(story) if hook is None else self.deliver(story, hook))

    async def all_applied(self) -> None:
        async def holds() -> bool:
            page = (await self._instances[0].get("/webhooks?limit=200", by=STAFF)).body
            assert page["nextCursor"] is None
            assert {one["status"] for one in page["items"]} <= {"received", "parked", "applied"}, page
            return all(one["status"] == "applied" for one in page["items"])

        await until(holds, "every webhook is applied", 30)

    async def check(self, story: Story) -> None:
        """The payment has ended as the story says."""
        payment = (await self._instances[0].get(f"/payments/{self.payments[story.gateway_order]}")).body
        assert {name: payment.get(name) for name in story.ends} == story.ends, (story.gateway_order, payment)


async def check_money(fleet: Fleet) -> None:
    database = Database(fleet.database_url, Settings(), utc_now)
    running = asyncio.create_task(database.run())
    await database.reached.wait()
    try:
        await check_books(Desk(database))
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await database.close()


@pytest.mark.parametrize("stories", [[*RAZORPAY, *STRIPE], [FAILED_REFUND]], ids=["all", "failed refund"])
async def test_every_recorded_webhook_is_booked_in_any_order(
    fleet: Fleet, gateway: NamingGateway, stories: list[Story]
) -> None:
    seed = int(os.environ.get("WEBHOOK_SEED") or random.SystemRandom().randrange(2**32))
    print(f"WEBHOOK_SEED={seed}")  # noqa: T201  # shown when the test fails
    teller = Teller(await fleet.pair(**gateway.settings), gateway, random.Random(seed))
    await teller.tell(stories)
    await teller.all_applied()
    for story in stories:
        await teller.check(story)
    connection = await asyncpg.connect(fleet.database_url)
    stored = await connection.fetchval("select count(*) from webhooks")
    await connection.close()
    assert stored == sum(len(story.hooks) for story in stories), "each was stored once"
    await check_money(fleet)
