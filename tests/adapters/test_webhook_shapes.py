"""Whatever a gateway signs: its adapter takes it or refuses it, and then reads it or says that it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handlers.ports import Gateway, GatewayFailed
from models.errors import BadSignature, Malformed
from models.payment import Provider
from server.adapters.breaker import Breaker
from server.adapters.razorpay import Razorpay
from server.adapters.stripe import Stripe
from tests.flows.gateways import SECRETS, signed
from tests.harness import ROOT

FIXTURES = ROOT / "tests" / "fixtures"
KINDS = {Provider.RAZORPAY: "event", Provider.STRIPE: "type"}


def recorded(provider: Provider) -> list[bytes]:
    """The bodies of all its recorded webhooks."""
    bodies = [path.read_bytes() for path in sorted((FIXTURES / provider).glob("*.json"))]
    return [body for body in bodies if isinstance(found := json.loads(body), dict) and KINDS[provider] in found]


def razorpay(breaker: Breaker) -> Any:
    return Razorpay(
        key_id="rzp_test_x",
        key_secret="a secret",
        webhook_secrets=[SECRETS[Provider.RAZORPAY]],
        breaker=breaker,
        timeout_s=1,
        threads_max=1,
    )


def stripe(breaker: Breaker) -> Any:
    return Stripe(
        secret_key="sk_test_x",
        publishable_key="pk_test_x",
        webhook_secrets=[SECRETS[Provider.STRIPE]],
        breaker=breaker,
        timeout_s=1,
        tolerance_s=300,
    )


@pytest.fixture(params=[razorpay, stripe], ids=["razorpay", "stripe"])
async def gateway(request: pytest.FixtureRequest) -> Any:
    make: Callable[[Breaker], Any] = request.param
    made = make(Breaker(Provider(make.__name__), failures_max=5, open_s=5))
    yield made
    await made.close()


def told(gateway: Gateway, body: bytes) -> bool:
    """Whether it is news. It must be that, or a refusal of a kind that the door and the inbox know."""
    try:
        delivery = gateway.receive(body, signed(gateway.provider, body, "an-event"))
    except BadSignature:
        return False
    assert all(isinstance(text, str) for text in (delivery.event_id, delivery.kind, *delivery.refs))
    try:
        news = gateway.read(delivery.kind, body)
    except (Malformed, GatewayFailed):
        return False
    assert all(one.provider is gateway.provider for one in news)
    msgspec.json.encode(news)
    return True


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=16,
)
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_what_was_recorded_is_news(gateway: Gateway) -> None:
    bodies = recorded(gateway.provider)
    assert len(bodies) > 10
    assert all(told(gateway, body) for body in bodies)


@unhurried
@given(body=st.binary(max_size=200))
def test_bytes_of_any_kind(gateway: Gateway, body: bytes) -> None:
    told(gateway, body)


@unhurried
@given(value=any_json)
def test_json_of_any_shape(gateway: Gateway, value: object) -> None:
    told(gateway, json.dumps(value).encode(errors="replace"))


@unhurried
@given(data=st.data())
def test_a_recorded_one_with_anything_in_it(gateway: Gateway, data: st.DataObject) -> None:
    """One member, at any depth, is replaced."""
    body = json.loads(data.draw(st.sampled_from(recorded(gateway.provider))))
    place = body
    while True:
        members = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        member = data.draw(st.sampled_from(members))
        inner = place[member]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            place[member] = data.draw(any_json)
            break
        place = inner
    told(gateway, json.dumps(body).encode(errors="replace"))


@unhurried
@given(data=st.data())
def test_a_recorded_one_with_broken_bytes(gateway: Gateway, data: st.DataObject) -> None:
    body = bytearray(data.draw(st.sampled_from(recorded(gateway.provider))))
    for _ in range(data.draw(st.integers(1, 5))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    told(gateway, bytes(body[: data.draw(st.integers(0, len(body)))] if data.draw(st.booleans()) else body))
