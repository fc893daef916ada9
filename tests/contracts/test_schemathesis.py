"""schemathesis sends what /openapi.json allows, and what it does not, with every role's token, and finds nothing.

SCHEMATHESIS_SEED in the environment repeats a run.
"""

from __future__ import annotations

import asyncio
import copy
import datetime as dt
import os
import random
import uuid
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import asyncpg
import pytest
import schemathesis
from schemathesis.engine import Status, events, from_schema

from models.payment import Provider
from server import openapi
from server.embedded import DataServers
from tests.flows.gateways import signed
from tests.harness import ROOT, Fleet, Instance, token, until
from tests.shared import ask_simulator, shared_fleet

STAFF = token("staff", "s1")
CAPTURED = (ROOT / "tests" / "fixtures" / "razorpay" / "live-netbanking-payment.captured.json").read_bytes()

ROLES = {
    "customer": 8,
    "agent": 6,
    "staff": 8,
    "service": 8,
    "guest who tracks": 5,
    "guest who pays": 8,
    "nobody": 5,
    "admin": 25,
}
"""How many seconds each shoots."""

SAMPLE = 20
"""How many operations whoever is not the admin shoots at, drawn anew in each run: to begin with one takes long."""

THOROUGH = {"customer": ("verifyPayment", "confirmPayment"), "agent": ("locate",), "admin": ()}
"""Who goes through every rule of the schemas one by one, and of which operations; the admin of all that no other does.
Everybody draws requests at random besides. What a body may hold does not depend on the role, and these get past it."""

REQUEST_TIMEOUT_S = 10.0

ACCEPTED = ["2xx", "401", "403", "404", "409", "410"]
TOO_LONG = 431
"""A request line that no route ever sees, because the server reads no further: drawn texts are that long at times."""
UNSIGNED = ("razorpayWebhook", "stripeWebhook")
"""Operations that take only what a gateway has signed: everything else is answered with 400."""

CHECKS = {
    "enabled": False,
    "not_a_server_error": {"enabled": True},
    "status_code_conformance": {"enabled": True},
    "content_type_conformance": {"enabled": True},
    "response_schema_conformance": {"enabled": True},
    "response_headers_conformance": {"enabled": True},
    "negative_data_rejection": {"enabled": True},
    "unsupported_method": {"enabled": True},
    "allow_header_conformance": {"enabled": True},
    "ignored_auth": {"enabled": True},
    # A request that fits the schema may meet an order that is not there, not theirs or not in that state, or a link
    # that has ended (410). 422 is let pass only where UNTOLD says which rule no schema can tell.
    "positive_data_acceptance": {"enabled": True, "expected-statuses": ACCEPTED},
    # Left out: use_after_free and ensure_resource_availability follow a resource through several requests, which
    # tests/flows does knowing what should happen; missing_required_header: none is required but Authorization, and
    # ignored_auth takes that one away; max_response_time: tests/faults holds requests to their limits.
}

UNTOLD = {
    "place": "the total may not be above the largest amount, an Idempotency-Key may be used once",
    "quote": "the total may not be above the largest amount",
    "listOrders": "a cursor is one of ours",
    "events": "`after` may not be above the order's top",
    "changeStatus": "an Idempotency-Key may be used once",
    "assign": "the same",
    "cancel": "the same",
    "changePaymentMethod": "the same, and an order without a price is not paid online",
    "createTrackingLink": "a life of LINK_TTL_MAX_S at most, a setting",
    "createPaymentLink": "the same",
    "locate": "LOCATION_BATCH_MAX positions at most, a setting",
    "revoke": "an Idempotency-Key may be used once",
    "takeCash": "the amount is what is due in coins that exist, the currency is the order's",
    "handOver": "which codes are currencies, an Idempotency-Key may be used once",
    "agentCash": "which codes are currencies",
    "trialBalance": "which codes are currencies",
    "refundPayment": "which lines the order has, the currency is the payment's, an Idempotency-Key may be used once",
    "refundOrder": "the same",
    "retryRefund": "`manual` needs a reference, an Idempotency-Key may be used once",
    "listRefunds": "a cursor is one of ours",
    "refundsOfPayment": "the same",
    "listWebhooks": "a cursor is one of ours",
    "retryWebhook": "an Idempotency-Key may be used once",
    "dismissWebhook": "the same",
    "startPayment": "which currency the order has, what is due, and which addresses are of the web",
    "listPayments": "a cursor is one of ours",
    "verifyPayment": "what Razorpay has signed, and that others sign nothing",
    "confirmPayment": "only Stripe's payments are confirmed",
    "capturePayment": "what was authorized, and the order's currency",
    "cancelPayment": "an Idempotency-Key may be used once",
    "reconcilePayment": "the same",
    "readReconciliation": "which days are over",
    "listJobs": "a cursor is one of ours",
    "retryJob": "an Idempotency-Key may be used once",
    "dismissJob": "the same",
    "dailyStats": "which names are time zones, and REPORT_DAYS_MAX, a setting",
    "analytics": "the same",
}
"""Operations with a rule that no schema can tell, so that what fits the schema may still be refused with 422 or 413."""


ASKING = (
    "startPayment",
    "verifyPayment",
    "confirmPayment",
    "capturePayment",
    "cancelPayment",
    "voidPayment",
    "reconcilePayment",
    "refundPayment",
    "refundOrder",
    "retryRefund",
    "readReconciliation",
)
"""Operations that ask a gateway: a few drawn requests are enough, and the gateway may say no (402, 502)."""

ASKING_EXAMPLES = 3
NOTHING = "00000000-0000-4000-8000-000000000000"


class Target(NamedTuple):
    """What one role shoots at."""

    instance: Instance
    bearer: str | None
    known: dict[str, list[str]]
    """What path parameters, and `orderId` in bodies, can name."""
    secrets: list[str]


class Shop(NamedTuple):
    fleet: Fleet
    instance: Instance
    sql: asyncpg.Connection


@pytest.fixture(scope="module")
async def shop(data: DataServers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    async with shared_fleet(data, tmp_path_factory.mktemp("schemathesis")) as fleet:
        instance = await fleet.start(RATE_LIMITS="off", LONG_POLL_MAX_S="1", GATEWAY_TIMEOUT_MS="2000")
        sql = await asyncpg.connect(fleet.database_url)
        yield Shop(fleet, instance, sql)
        await sql.close()


async def target(shop: Shop, role: str) -> Target:
    """Orders and payments in several statuses, and what staff decides about, for this role alone."""
    instance, customer = shop.instance, f"customer of the {role}"
    order_ids, link_ids, secrets = [], [], []
    for statuses in ((), ("confirmed",), ("confirmed", "preparing", "ready"), ("confirmed", "cancelled")):
        order = await instance.place(customerId=customer, paymentMethod="later")
        await instance.assign(order["id"], "rider-7", agentName="Ravi Kumar")
        if statuses:
            await instance.move(order["id"], *statuses)
        link = await instance.post(f"/orders/{order['id']}/tracking-link", {})
        order_ids.append(order["id"])
        link_ids.append(link.body["id"])
        secrets.append(link.body["url"].rsplit("/", 1)[1])
    payments = [await payment(shop, customer, *kind) for kind in PAYMENTS]
    order_ids += [one["orderId"] for one in payments]
    paid = payments[-1]
    known = {
        "orderId": order_ids,
        "linkId": link_ids,
        "paymentId": [one["id"] for one in payments],
        "refundId": [await refund(shop, paid, outcome) for outcome in ("processed", "failed")],
        "webhookId": [await parked(shop) for _ in range(3)],
        "jobId": [await dead_job(shop) for _ in range(3)],
        "agentId": ["rider-7", "nobody"],
        "date": [f"{dt.datetime.now(dt.UTC) - dt.timedelta(days=1):%Y-%m-%d}", "2999-01-01"],
    }
    for name, ids in known.items():
        ids += {"jobId": ["0"], "agentId": [], "date": []}.get(name, [NOTHING])
    tokens = {
        "customer": token("customer", customer),
        "agent": token("agent", "rider-7"),
        "staff": token("staff", "s1"),
        "admin": token("admin", "a1"),
        "service": token("service", "shop"),
        "guest who tracks": token("guest", "g1", orders=order_ids, scope="track"),
        "guest who pays": token("guest", "g2", orders=order_ids, scope="pay"),
        "nobody": None,
    }
    return Target(instance, tokens[role], known, secrets)


PAYMENTS = (
    ("razorpay", "automatic", False),
    ("stripe", "automatic", False),
    ("razorpay", "manual", True),
    ("stripe", "manual", True),
    ("stripe", "automatic", True),
    ("razorpay", "automatic", True),
)
"""By whom, how it is captured, and whether its payer has paid."""


async def payment(shop: Shop, customer: str, provider: str, capture: str, is_paid: bool) -> dict[str, Any]:
    order = await shop.instance.place(customerId=customer, paymentMethod="online")
    body = {"orderId": order["id"], "provider": provider, "capture": capture}
    begun = await shop.instance.post("/payments", body)
    assert begun.status == 201, begun
    if is_paid:
        kind = "orders" if provider == "razorpay" else "intents"
        await simulate(shop, provider, f"/{kind}/{begun.body['gatewayOrderId']}/pay", {})
        asked = await shop.instance.post(f"/payments/{begun.body['id']}/reconcile", {}, by=STAFF)
        assert asked.body["status"] == ("authorized" if capture == "manual" else "completed"), asked
    found: dict[str, Any] = begun.body
    return found


async def refund(shop: Shop, paid: dict[str, Any], outcome: str) -> str:
    await simulate(shop, "razorpay", "/mischief", {"refunds": outcome})
    body = {"reason": "Cold", "amount": 100, "currency": "INR"}
    asked = await shop.instance.post(f"/payments/{paid['id']}/refunds", body)
    await simulate(shop, "razorpay", "/mischief", {"refunds": "processed"})
    assert asked.body["status"] == {"processed": "succeeded", "failed": "failed"}[outcome], asked
    return str(asked.body["id"])


async def parked(shop: Shop) -> str:
    """A webhook about a payment that we do not know."""
    event = uuid.uuid4().hex[:14]
    (secret,) = shop.fleet.accounts()["razorpay"]["webhook_secrets"]
    body = CAPTURED.replace(b"TUorOYH8gErbbD", event.encode())  # its order; the same body again is no other webhook
    headers = signed(Provider.RAZORPAY, body, event, secret)
    reply = await shop.instance.request("POST", "/webhooks/razorpay", raw=body, headers=headers, by=None)
    assert reply.status == 200, reply

    async def waits() -> str | None:
        query = "select id from webhooks where event_id = $1 and status = 'parked'"
        found = await shop.sql.fetchval(query, event)
        return str(found) if found else None

    found: str = await until(waits, "the webhook is parked")
    return found


async def dead_job(shop: Shop) -> str:
    row = await shop.sql.fetchval(
        "insert into jobs.pgqueuer (priority, entrypoint, payload, status, attempts)"
        " values (0, 'nobody_runs_this', $1, 'failed', 7) returning id",
        uuid.uuid4().hex.encode(),
    )
    await shop.sql.execute("insert into jobs.notes (job_id, error, held) values ($1, 'OSError: no way', 'dead')", row)
    return str(row)


async def simulate(shop: Shop, provider: str, path: str, body: dict[str, Any]) -> None:
    await ask_simulator(shop.fleet.accounts()[provider]["url"], path, body)


def aimed(target: Target) -> dict[str, Any]:
    """The document, with path parameters that hit orders and links that exist, and one that does not."""
    document = copy.deepcopy(openapi.document())
    schemas = document["components"]["schemas"]
    for methods in document["paths"].values():
        for operation in methods.values():
            for parameter in operation["parameters"]:
                # any text may be the name of an agent: to whom it says nothing, it is one who carries nothing
                if parameter["in"] == "path" and parameter["name"] != "agentId":
                    parameter["schema"] = {**parameter["schema"], "enum": target.known[parameter["name"]]}
    for name in ("StartPayment", "TakeCash"):
        schemas[name]["properties"]["orderId"]["enum"] = target.known["orderId"]
        for example in schemas[name]["examples"]:
            example["orderId"] = target.known["orderId"][0]
    schemas["FollowLink"]["examples"] = [{"secret": secret} for secret in target.secrets]
    return document


def shoot(target: Target, role: str, seed: int) -> tuple[int, list[str]]:
    """How many requests were sent, and what was found."""
    lenient = {"checks": {"positive_data_acceptance": {"expected-statuses": [*ACCEPTED, "413", "422"]}}}
    paths = openapi.document()["paths"].values()
    every = sorted(operation["operationId"] for methods in paths for operation in methods.values())
    if role == "admin":
        shot_at, thorough = set(every), set(every).difference(*THOROUGH.values())
    else:
        thorough = set(THOROUGH.get(role, ()))
        shot_at = {*random.Random(seed).sample(every, SAMPLE), *thorough}
    asking = {
        "generation": {"max-examples": ASKING_EXAMPLES},
        "checks": {
            "not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", "502"]},
            "positive_data_acceptance": {"expected-statuses": [*ACCEPTED, "402", "422", "502"]},
        },
    }
    drawn = {"phases": {"coverage": {"enabled": False}}}
    unsigned = {"checks": {"positive_data_acceptance": {"expected-statuses": ["400"]}}}
    config = schemathesis.Config.from_dict(
        {
            "seed": seed,
            "base-url": target.instance.url,
            "request-timeout": REQUEST_TIMEOUT_S,
            "continue-on-failure": True,
            "headers": {"Authorization": f"Bearer {target.bearer}"} if target.bearer else {},
            "checks": CHECKS,
            # few at a time: the phase goes round until the time is over
            "generation": {
                "database": "none",
                "with-security-parameters": False,
                "max-examples": 10,
                "no-shrink": True,
            },
            "phases": {
                "coverage": {"enabled": bool(thorough), "generate-duplicate-query-parameters": True},
                "stateful": {"enabled": False},
            },
            "operations": [
                *({"include-operation-id": name, **asking} for name in ASKING),
                *({"include-operation-id": name, **lenient} for name in UNTOLD if name not in ASKING),
                *({"include-operation-id": name, **unsigned} for name in UNSIGNED),
                *({"include-operation-id": name, **drawn} for name in every if name not in thorough),
            ],
        }
    )
    config.max_time = ROLES[role]
    schema = schemathesis.openapi.from_dict(aimed(target), config=config).include(operation_id=sorted(shot_at))
    sent, found = 0, []
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            found.append(str(event.value if isinstance(event, events.NonFatalError) else event.exception))
        elif isinstance(event, events.ScenarioFinished):
            sent += len(event.recorder.interactions)
            for case_id, checks in event.recorder.checks.items():
                for check in checks:
                    if check.status is Status.FAILURE and check.failure_info is not None:
                        failure, told = check.failure_info.failure, event.recorder.interactions.get(case_id)
                        if told and told.response and told.response.status_code == TOO_LONG:
                            continue
                        answer = told.response.content[:500] if told and told.response else b""
                        what = f"{event.phase}: {failure.title}: {failure.message}"
                        found.append(f"{what}\n{check.failure_info.code_sample}\n{answer!r}")
    return sent, found


@pytest.mark.parametrize("role", ROLES)
async def test_nothing_is_found(shop: Shop, role: str) -> None:
    seed = int(os.environ.get("SCHEMATHESIS_SEED") or random.SystemRandom().randrange(2**32))
    print(f"SCHEMATHESIS_SEED={seed}")  # noqa: T201  # shown when the test fails
    sent, found = await asyncio.to_thread(shoot, await target(shop, role), role, seed)
    assert not found, f"{len(found)} of {sent}\n\n" + "\n\n".join(dict.fromkeys(found))
    assert sent > SAMPLE
    ready = await shop.instance.get("/health/ready", by=None)
    assert ready.status == 200
