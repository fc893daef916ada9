"""Stripe's webhooks: signatures, and what every recorded body says in our words."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import stripe
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.ports import GatewayUnknown
from models.errors import BadSignature
from models.payment import DisputeReport, News, RefundReport, Report
from server.adapters.bounds import WORDS_CHARS_MAX
from server.adapters.stripe import Stripe
from server.adapters.stripe_webhooks import envelope_of, verified
from tests.adapters.stripe_world import NEW_SECRET, OLD_SECRET, TOLERANCE_S, gateway_at

FIXTURES = Path(__file__).parent.parent / "fixtures" / "stripe"
BODY = b'{"id": "evt_1", "object": "event", "type": "charge.refunded", "data": {"object": {"id": "ch_1"}}}'
NOW = 1_790_000_000


def signed(body: bytes, *secrets: str, at: float | None = None) -> dict[str, str]:
    stamp = str(int(time.time() if at is None else at))
    digests = [hmac.new(one.encode(), stamp.encode() + b"." + body, hashlib.sha256).hexdigest() for one in secrets]
    return {"Stripe-Signature": ",".join([f"t={stamp}", *(f"v1={digest}" for digest in digests)])}


def fixture(name: str) -> bytes:
    return (FIXTURES / f"{name}.json").read_bytes()


def thing(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(fixture(f"openapi-object-{name}"))
    return loaded


def envelope(kind: str, held: dict[str, Any]) -> bytes:
    """An event of today around an object; no such body was ever published."""
    return json.dumps({"id": "evt_2", "object": "event", "type": kind, "data": {"object": held}}).encode()


@pytest.fixture
async def gateway() -> AsyncIterator[Stripe]:
    adapter = gateway_at("http://127.0.0.1:9")
    yield adapter
    await adapter.close()


def told(gateway: Stripe, body: bytes) -> list[News]:
    """Through the door, and read."""
    delivery = gateway.receive(body, signed(body, OLD_SECRET))
    said = list(gateway.read(delivery.kind, body))
    for news in said:
        assert (news.gateway_order_id or news.gateway_payment_id) in delivery.refs  # it is found again by that
        assert not news.fresh
    return said


# signatures


def test_the_vendors_own_header_is_taken() -> None:
    header = stripe.WebhookSignature.generate_signature_header(BODY.decode(), NEW_SECRET, NOW)
    verified(BODY, header, [NEW_SECRET], NOW, TOLERANCE_S)


@pytest.mark.parametrize("secrets", [(NEW_SECRET,), (OLD_SECRET,), ("whsec_unknown", OLD_SECRET)])
def test_any_of_our_secrets_is_enough(secrets: tuple[str, ...]) -> None:
    header = signed(BODY, *secrets, at=NOW)["Stripe-Signature"]
    verified(BODY, header, [NEW_SECRET, OLD_SECRET], NOW, TOLERANCE_S)
    verified(BODY, header + ",v0=abc,v2=def", [NEW_SECRET, OLD_SECRET], NOW, TOLERANCE_S)


@pytest.mark.parametrize("off_s", [-301, 301, -(10**6), 10**6])
def test_a_time_too_far_off_is_refused_either_way(off_s: int) -> None:
    header = signed(BODY, NEW_SECRET, at=NOW + off_s)["Stripe-Signature"]
    with pytest.raises(BadSignature):
        verified(BODY, header, [NEW_SECRET], NOW, TOLERANCE_S)
    verified(BODY, header, [NEW_SECRET], NOW + off_s, TOLERANCE_S)


RIGHT = signed(BODY, NEW_SECRET, at=NOW)["Stripe-Signature"]


@pytest.mark.parametrize(
    ("body", "header"),
    [
        (BODY + b" ", RIGHT),
        (BODY.replace(b"evt_1", b"evt_9"), RIGHT),
        (BODY, ""),
        (BODY, RIGHT.split(",")[1]),  # no time
        (BODY, RIGHT.split(",")[0]),  # no signature
        (BODY, RIGHT.replace("v1=", "v0=")),
        (BODY, RIGHT.replace(f"t={NOW}", f"t={NOW + 1}")),
        (BODY, RIGHT.upper()),
        (BODY, RIGHT[:-1]),
        (BODY, RIGHT.replace(f"t={NOW}", "t=²")),
        (BODY, f"t={NOW},v1=" + "é" * 64),
        (BODY, signed(BODY, "", at=NOW)["Stripe-Signature"]),
        (BODY, signed(BODY, "whsec_somebody", at=NOW)["Stripe-Signature"]),
    ],
)
def test_everything_else_is_refused(body: bytes, header: str) -> None:
    with pytest.raises(BadSignature):
        verified(body, header, [NEW_SECRET, ""], NOW, TOLERANCE_S)


@given(st.text(max_size=200) | st.sampled_from([RIGHT[i:] for i in range(1, 40)]))
def test_no_header_breaks_the_door(header: str) -> None:
    with pytest.raises(BadSignature):
        verified(BODY, header, [NEW_SECRET], NOW, TOLERANCE_S)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe",
        b"not json",
        b"[]",
        b"null",
        b"{}",
        b'{"id": "evt_1"}',
        b'{"id": 7, "type": "a"}',
        b'{"id": "evt\\u0000", "type": "a"}',
        b'{"id": "evt_1", "type": ["a"]}',
        b"[" * 100_000,
    ],
)
def test_a_signed_body_that_is_no_event_is_refused(body: bytes) -> None:
    with pytest.raises(BadSignature):
        envelope_of(body)


def test_the_same_event_keeps_its_id_under_another_signature(gateway: Stripe) -> None:
    first = gateway.receive(BODY, signed(BODY, OLD_SECRET))
    again = gateway.receive(
        BODY, {"stripe-signature": signed(BODY, NEW_SECRET, at=time.time() + 5)["Stripe-Signature"]}
    )
    assert first == again
    assert (first.event_id, first.kind, first.refs) == ("evt_1", "charge.refunded", ("ch_1",))


# the recorded bodies

INTENT, CHARGE = "pi_000000000000000000000000", "ch_000000000000000000000000"
SAID: dict[str, Report] = {
    "cli-payment_intent.succeeded": Report.CAPTURED,
    "cli-payment_intent.payment_failed": Report.FAILED,
    "cli-payment_intent.processing": Report.PROCESSING,
    "cli-payment_intent.canceled": Report.CANCELLED,
    "cli-payment_intent.requires_action": Report.PROCESSING,
    "cli-payment_intent.amount_capturable_updated": Report.AUTHORIZED,
    "live-payment_intent.succeeded": Report.CAPTURED,
}
SILENT = {
    # the intent says the same, or nothing has happened
    "cli-payment_intent.created",
    "live-payment_intent.created",
    "cli-charge.succeeded",
    "cli-charge.captured",
    "cli-charge.failed",
}
ASIDE = {
    "cli-charge.refunded",
    "cli-charge.refund.updated",
    "cli-charge.dispute.created",
    "live-inr-charge.refund.updated-failed",
}


def test_every_recorded_body_is_accounted_for() -> None:
    recorded = {path.stem for path in FIXTURES.glob("*.json") if not path.stem.startswith("openapi-")}
    assert recorded == set(SAID) | SILENT | ASIDE


@pytest.mark.parametrize(("name", "report"), SAID.items())
def test_a_recorded_intent(gateway: Stripe, name: str, report: Report) -> None:
    (news,) = told(gateway, fixture(name))
    held = json.loads(fixture(name))["data"]["object"]
    assert (news.report, news.gateway_order_id, news.amount) == (report, held["id"], held["amount"])
    assert news.currency == held["currency"].upper()
    assert (news.failure is not None) is (report is Report.FAILED)


@pytest.mark.parametrize("name", sorted(SILENT))
def test_a_recorded_body_that_says_nothing_new(gateway: Stripe, name: str) -> None:
    assert told(gateway, fixture(name)) == []


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("id", "pi_\0"),
        ("id", "pi_" + "x" * 300),
        ("id", "pi_1/cancel"),
        ("currency", "in\0"),
        ("currency", "rupee"),
        ("amount", -1),
        ("amount_received", 2**63),
        ("latest_charge", "ch_\0"),
        ("latest_charge", {"id": "ch_\0"}),
    ],
)
def test_an_intent_that_could_not_be_stored_is_unreadable(gateway: Stripe, member: str, value: object) -> None:
    held = json.loads(fixture("cli-payment_intent.succeeded"))["data"]["object"] | {member: value}
    with pytest.raises(GatewayUnknown):
        gateway.read("payment_intent.succeeded", envelope("payment_intent.succeeded", held))


def test_texts_are_kept_as_far_as_they_can_be_stored(gateway: Stripe) -> None:
    long = "a\0" + "b" * 10_000
    held = json.loads(fixture("cli-payment_intent.payment_failed"))["data"]["object"]
    held["last_payment_error"] |= {"decline_code": long, "message": long}
    held["latest_charge"] = {"id": CHARGE, "payment_method_details": {"type": long}}
    (news,) = gateway.read("payment_intent.payment_failed", envelope("payment_intent.payment_failed", held))
    assert news.failure
    for text in (news.failure.code, news.failure.message, news.method):
        assert text == "a" + "b" * (WORDS_CHARS_MAX - 1)


def test_a_recorded_failure_says_why(gateway: Stripe) -> None:
    (news,) = told(gateway, fixture("cli-payment_intent.payment_failed"))
    assert news.failure
    assert (news.failure.code, news.failure.message) == ("generic_decline", "Your card was declined.")
    assert (news.gateway_payment_id, news.method) == (CHARGE, "card")


def test_an_intent_of_the_newer_shape_names_its_charge(gateway: Stripe) -> None:
    (news,) = told(gateway, fixture("live-payment_intent.succeeded"))
    assert news.gateway_payment_id == "ch_3N0LoOB9kJ5FDFAy1ePq8RIv"
    assert (news.amount, news.currency) == (150_000, "LKR")


def test_a_refunded_charge_of_the_old_shape_brings_its_refunds(gateway: Stripe) -> None:
    (news,) = told(gateway, fixture("cli-charge.refunded"))
    (refund,) = news.refunds
    assert (news.report, news.gateway_order_id, news.gateway_payment_id) == (None, None, CHARGE)
    assert (refund.report, refund.amount, refund.currency) == (RefundReport.SUCCEEDED, 100, "USD")
    assert refund.refund_id is None


def test_a_refunded_charge_of_the_new_shape_says_nothing(gateway: Stripe) -> None:
    event = json.loads(fixture("cli-charge.refunded"))
    del event["data"]["object"]["refunds"]
    assert told(gateway, json.dumps(event).encode()) == []


def test_a_refund_that_had_succeeded_fails(gateway: Stripe) -> None:
    (news,) = told(gateway, fixture("live-inr-charge.refund.updated-failed"))
    (refund,) = news.refunds
    assert news.gateway_order_id == "pi_1Gib60HLwdCOCoR7KJbTO3U7"
    assert (refund.report, refund.amount, refund.currency) == (RefundReport.FAILED, 30_000_000, "INR")
    assert refund.failure
    assert refund.failure.code == "expired_or_canceled_card"


def test_a_refund_of_somebody_else_is_told_without_our_id(gateway: Stripe) -> None:
    (news,) = told(gateway, fixture("cli-charge.refund.updated"))
    assert [one.refund_id for one in news.refunds] == [None]


@pytest.mark.parametrize("kind", ["refund.created", "refund.updated", "refund.failed"])
@pytest.mark.parametrize(
    ("status", "report"),
    [
        ("pending", RefundReport.PROCESSING),
        ("requires_action", RefundReport.PROCESSING),
        ("succeeded", RefundReport.SUCCEEDED),
        ("failed", RefundReport.FAILED),
        ("canceled", RefundReport.FAILED),
    ],
)
def test_refund_events_of_today(gateway: Stripe, kind: str, status: str, report: RefundReport) -> None:
    """Built from Stripe's sample of the object: no such event is published."""
    held = thing("refund") | {"status": status, "payment_intent": INTENT, "metadata": {"refund_id": "ours"}}
    (news,) = told(gateway, envelope(kind, held))
    (refund,) = news.refunds
    assert (news.gateway_order_id, refund.report, refund.refund_id) == (INTENT, report, "ours")
    assert (refund.failure is not None) is (report is RefundReport.FAILED)


def test_the_release_of_an_authorization_is_no_refund(gateway: Stripe) -> None:
    held = thing("refund") | {"status": "succeeded", "payment_intent": INTENT, "balance_transaction": None}
    assert told(gateway, envelope("refund.created", held)) == []
    held["balance_transaction"] = "txn_1"
    assert len(told(gateway, envelope("refund.created", held))) == 1


def test_a_recorded_dispute(gateway: Stripe) -> None:
    (news,) = told(gateway, fixture("cli-charge.dispute.created"))
    (dispute,) = news.disputes
    assert (news.gateway_payment_id, dispute.report, dispute.amount) == (CHARGE, DisputeReport.OPEN, 100)


@pytest.mark.parametrize("kind", ["created", "updated", "closed", "funds_withdrawn", "funds_reinstated"])
@pytest.mark.parametrize(
    ("status", "report"),
    [
        ("needs_response", DisputeReport.OPEN),
        ("under_review", DisputeReport.OPEN),
        ("warning_needs_response", DisputeReport.OPEN),
        ("won", DisputeReport.WON),
        ("warning_closed", DisputeReport.WON),
        ("lost", DisputeReport.LOST),
    ],
)
def test_disputes_of_today(gateway: Stripe, kind: str, status: str, report: DisputeReport) -> None:
    held = thing("dispute") | {"status": status, "payment_intent": {"id": INTENT, "object": "payment_intent"}}
    (news,) = told(gateway, envelope(f"charge.dispute.{kind}", held))
    assert (news.gateway_order_id, [one.report for one in news.disputes]) == (INTENT, [report])


@pytest.mark.parametrize(
    ("currency", "amount", "ours"),
    [("ugx", 50_000, 500), ("isk", 50_000, 500), ("mga", 500, 50_000), ("jpy", 500, 500)],
)
def test_amounts_come_back_in_our_units(gateway: Stripe, currency: str, amount: int, ours: int) -> None:
    held = thing("payment_intent") | {
        "status": "succeeded",
        "currency": currency,
        "amount": amount,
        "amount_received": amount,
    }
    (news,) = told(gateway, envelope("payment_intent.succeeded", held))
    assert (news.amount, news.currency) == (ours, currency.upper())


@pytest.mark.parametrize("held", [{}, {"id": "pi_1"}, {**thing("payment_intent"), "amount": 1.5}])
def test_a_known_kind_in_an_unknown_shape_is_for_a_person(gateway: Stripe, held: dict[str, Any]) -> None:
    with pytest.raises(GatewayUnknown):
        gateway.read("payment_intent.succeeded", envelope("payment_intent.succeeded", held))


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KINDS = ["payment_intent.succeeded", "refund.updated", "charge.refunded", "charge.dispute.closed", "something.new"]


@settings(deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(["intent", "refund", "charge", "dispute"]), st.data())
def test_no_member_of_an_object_breaks_the_reader(kind: str, name: str, data: st.DataObject) -> None:
    held = thing({"intent": "payment_intent"}.get(name, name))
    held[data.draw(st.sampled_from(sorted(held)))] = data.draw(JSON)
    body = envelope(kind, held)
    envelope_of(body)
    try:
        Stripe.read(Stripe.__new__(Stripe), kind, body)
    except GatewayUnknown:
        assert kind != "something.new"
