"""schemathesis sends what /openapi.json allows, and what it does not, with every role's token, and finds nothing.

SCHEMATHESIS_SEED in the environment repeats a run.
"""

from __future__ import annotations

import asyncio
import copy
import os
import random
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest
import schemathesis
from schemathesis.engine import Status, events, from_schema

from server import openapi
from server.embedded import DataServers
from tests.harness import Fleet, Instance, token
from tests.shared import shared_fleet

ROLES = {
    "customer": 5,
    "agent": 14,
    "staff": 5,
    "service": 16,
    "guest who tracks": 5,
    "guest who pays": 5,
    "nobody": 5,
    "admin": 5,  # last: it may revoke the tokens of the others
}
"""How many seconds each shoots: a minute in all."""

THOROUGH = ("agent", "service")
"""Who goes through every rule of the schemas one by one (2,000 requests); the others draw requests at random. What a
body may hold does not depend on the role, and these two get past the roles of all routes but one."""

REQUEST_TIMEOUT_S = 10.0

ACCEPTED = ["2xx", "401", "403", "404", "409", "410"]
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
    "dailyStats": "which names are time zones, and REPORT_DAYS_MAX, a setting",
    "analytics": "the same",
}
"""Operations with a rule that no schema can tell, so that what fits the schema may still be refused with 422 or 413."""


class Target(NamedTuple):
    instance: Instance
    tokens: dict[str, str | None]
    order_ids: list[str]
    link_ids: list[str]
    secrets: list[str]


@pytest.fixture(scope="module")
async def fleet(data: DataServers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    async with shared_fleet(data, tmp_path_factory.mktemp("schemathesis")) as fleet:
        yield fleet


@pytest.fixture(scope="module")
async def target(fleet: Fleet) -> Target:
    """Orders in several statuses, of the people who will shoot at them."""
    instance = await fleet.start(RATE_LIMITS="off", LONG_POLL_MAX_S="1")
    order_ids, link_ids, secrets = [], [], []
    for statuses in ((), ("confirmed",), ("confirmed", "preparing", "ready"), ("confirmed", "cancelled")):
        order = await instance.place(customerId="c1", paymentMethod="later")
        await instance.assign(order["id"], "rider-7", agentName="Ravi Kumar")
        if statuses:
            await instance.move(order["id"], *statuses)
        link = await instance.post(f"/orders/{order['id']}/tracking-link", {})
        order_ids.append(order["id"])
        link_ids.append(link.body["id"])
        secrets.append(link.body["url"].rsplit("/", 1)[1])
    tokens = {
        "customer": token("customer", "c1"),
        "agent": token("agent", "rider-7"),
        "staff": token("staff", "s1"),
        "admin": token("admin", "a1"),
        "service": token("service", "shop"),
        "guest who tracks": token("guest", "g1", orders=order_ids, scope="track"),
        "guest who pays": token("guest", "g2", orders=order_ids, scope="pay"),
        "nobody": None,
    }
    return Target(instance, tokens, order_ids, link_ids, secrets)


def aimed(target: Target) -> dict[str, Any]:
    """The document, with path parameters that hit orders and links that exist, and one that does not."""
    document = copy.deepcopy(openapi.document())
    nothing = "00000000-0000-4000-8000-000000000000"
    known = {
        "orderId": [*target.order_ids, nothing],
        "linkId": [*target.link_ids, nothing],
        "agentId": ["rider-7", "nobody"],
        "webhookId": [nothing],
    }
    for methods in document["paths"].values():
        for operation in methods.values():
            for parameter in operation["parameters"]:
                if parameter["in"] == "path":
                    parameter["schema"] = {**parameter["schema"], "enum": known[parameter["name"]]}
    follow = document["components"]["schemas"]["FollowLink"]
    follow["examples"] = [{"secret": secret} for secret in target.secrets]
    return document


def shoot(target: Target, role: str, seed: int) -> tuple[int, list[str]]:
    """How many requests were sent, and what was found."""
    bearer = target.tokens[role]
    lenient = {"checks": {"positive_data_acceptance": {"expected-statuses": [*ACCEPTED, "413", "422"]}}}
    unsigned = {"checks": {"positive_data_acceptance": {"expected-statuses": ["400"]}}}
    config = schemathesis.Config.from_dict(
        {
            "seed": seed,
            "base-url": target.instance.url,
            "request-timeout": REQUEST_TIMEOUT_S,
            "continue-on-failure": True,
            "headers": {"Authorization": f"Bearer {bearer}"} if bearer else {},
            "checks": CHECKS,
            # few at a time: the phase goes round until the time is over
            "generation": {
                "database": "none",
                "with-security-parameters": False,
                "max-examples": 10,
                "no-shrink": True,
            },
            "phases": {
                "coverage": {"enabled": role in THOROUGH, "generate-duplicate-query-parameters": True},
                "stateful": {"enabled": False},
            },
            "operations": [
                *({"include-operation-id": name, **lenient} for name in UNTOLD),
                *({"include-operation-id": name, **unsigned} for name in UNSIGNED),
            ],
        }
    )
    config.max_time = ROLES[role]
    schema = schemathesis.openapi.from_dict(aimed(target), config=config)
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
                        answer = told.response.content[:500] if told and told.response else b""
                        what = f"{event.phase}: {failure.title}: {failure.message}"
                        found.append(f"{what}\n{check.failure_info.code_sample}\n{answer!r}")
    return sent, found


@pytest.mark.parametrize("role", ROLES)
async def test_nothing_is_found(target: Target, role: str) -> None:
    seed = int(os.environ.get("SCHEMATHESIS_SEED") or random.SystemRandom().randrange(2**32))
    print(f"SCHEMATHESIS_SEED={seed}")  # noqa: T201  # shown when the test fails
    sent, found = await asyncio.to_thread(shoot, target, role, seed)
    assert not found, f"{len(found)} of {sent}\n\n" + "\n\n".join(dict.fromkeys(found))
    assert sent > 50
    ready = await target.instance.get("/health/ready", by=None)
    assert ready.status == 200
