"""Everything that Razorpay is known to have sent, through `receive` and `read`."""

from __future__ import annotations

import hashlib
import hmac
import json
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from models.errors import BadSignature, Malformed
from models.money import MINOR_UNITS_MAX
from models.payment import DisputeReport, News, Provider, RefundNews, RefundReport, Report
from server.adapters import razorpay_news
from server.adapters.breaker import Breaker
from server.adapters.razorpay import Razorpay
from tests.harness import ROOT

FIXTURES = ROOT / "tests" / "fixtures" / "razorpay"
VECTORS = {one["kind"]: one for one in json.loads((FIXTURES / "signature-vectors.json").read_text())}
EVENTS = sorted(
    path.stem
    for path in FIXTURES.glob("*.json")
    if not path.stem.startswith(("doc-api-", "sdk-api-", "signature-vectors"))
)
SECRET = "a webhook secret"


@pytest.fixture
async def gateway() -> Any:
    breaker = Breaker(Provider.RAZORPAY, failures_max=5, open_s=5)
    opened = Razorpay(
        key_id="rzp_test_x",
        key_secret=VECTORS["checkout"]["secret"],
        webhook_secrets=["the newest", SECRET, VECTORS["webhook"]["secret"]],
        breaker=breaker,
        timeout_s=1,
        threads_max=1,
    )
    yield opened
    await opened.close()


def body_of(name: str) -> bytes:
    return (FIXTURES / f"{name}.json").read_bytes()


def headers_of(body: bytes, secret: str = SECRET, event_id: str | None = "TUovMdVh5QUwGy") -> dict[str, str]:
    headers = {"X-Razorpay-Signature": hmac.digest(secret.encode(), body, hashlib.sha256).hex()}
    return headers | ({"X-Razorpay-Event-Id": event_id} if event_id else {})


def received(gateway: Razorpay, name: str) -> list[News]:
    body = body_of(name)
    delivery = gateway.receive(body, headers_of(body))
    assert delivery.event_id == "TUovMdVh5QUwGy"
    assert delivery.kind == json.loads(body)["event"]
    return list(gateway.read(delivery.kind, body))


# (report, amount, method, fee, order, payment) of the payment in each
CAPTURED, AUTHORIZED, FAILED = Report.CAPTURED, Report.AUTHORIZED, Report.FAILED
PAYMENTS: dict[str, tuple[Report, int, str, int | None, str, str]] = {
    "live-netbanking-payment.authorized": (
        *(AUTHORIZED, 100, "netbanking", None),
        *("order_TUorOYH8gErbbD", "pay_TUouivTMBk4OY6"),
    ),
    "live-netbanking-payment.captured": (CAPTURED, 100, "netbanking", 3, "order_TUorOYH8gErbbD", "pay_TUouivTMBk4OY6"),
    "live-netbanking-order.paid": (CAPTURED, 100, "netbanking", 3, "order_TUorOYH8gErbbD", "pay_TUouivTMBk4OY6"),
    "live-netbanking-payment.captured-empty-notes": (
        *(CAPTURED, 100, "netbanking", 3),
        *("order_TVCpvdEADkAoMJ", "pay_TVCsKe6a4pkI5j"),
    ),
    "live-upi-payment.captured": (CAPTURED, 2000, "upi", 48, "order_S1hYcAZ4wd0LdR", "pay_S1hatPnKSKLoTg"),
    "live-upi2-payment.captured": (CAPTURED, 49900, "upi", 1178, "order_RkHjzngEtKeKV3", "pay_RkHk8MA9kbrU5t"),
    "live-upi2-order.paid": (CAPTURED, 49900, "upi", 1178, "order_RkHjzngEtKeKV3", "pay_RkHk8MA9kbrU5t"),
    "live-wallet-order.paid-attempts2": (CAPTURED, 5500, "wallet", 130, "order_QUg5vtkywCanxg", "pay_QUg6V5UmtqzQKE"),
    "live-card-payment.failed": (FAILED, 1000, "card", None, "order_S1ip8hIHqsJGO3", "pay_S1izmG29kkRLWp"),
    # says captured:true, and error_code "" : its status counts
    "doc-payment.authorized-card": (AUTHORIZED, 100, "card", None, "order_DESoU0U4ikYA19", "pay_DESp9bgForNoUd"),
    "doc-payment.authorized-netbanking": (
        *(AUTHORIZED, 100, "netbanking", None),
        *("order_DESlLckIVRkHWj", "pay_DESlfW9H8K9uqM"),
    ),
    "doc-payment.authorized-upi": (AUTHORIZED, 100, "upi", None, "order_DESxiijbl9xjDB", "pay_DESyzxuld02Zul"),
    "doc-payment.captured-card": (CAPTURED, 100, "card", None, "order_DESoU0U4ikYA19", "pay_DESp9bgForNoUd"),
    "doc-payment.captured-netbanking": (CAPTURED, 100, "netbanking", 2, "order_DESlLckIVRkHWj", "pay_DESlfW9H8K9uqM"),
    "doc-payment.captured-upi": (CAPTURED, 100, "upi", 2, "order_DESxiijbl9xjDB", "pay_DESyzxuld02Zul"),
    "doc-payment.failed-card": (FAILED, 100, "card", None, "order_DESoU0U4ikYA19", "pay_DESp9bgForNoUd"),
    "doc-payment.failed-netbanking": (
        *(FAILED, 50000, "netbanking", None),
        *("order_DEATVTRRctwEGb", "pay_DEAU825sJlCbGa"),
    ),
    "doc-payment.failed-upi": (FAILED, 100, "upi", None, "order_DESxiijbl9xjDB", "pay_DESyzxuld02Zul"),
    "doc-payment.failed-wallets": (FAILED, 10000, "wallet", None, "order_Epitst92Bya4gC", "pay_Epiu9wz2hXBGsJ"),
    "doc-order.paid-card": (CAPTURED, 100, "card", 2, "order_DESoU0U4ikYA19", "pay_DESp9bgForNoUd"),
    "doc-order.paid-netbanking": (CAPTURED, 100, "netbanking", 2, "order_DESlLckIVRkHWj", "pay_DESlfW9H8K9uqM"),
    "doc-order.paid-upi": (CAPTURED, 100, "upi", 2, "order_DESxiijbl9xjDB", "pay_DESyzxuld02Zul"),
    # is called authorized, and holds a captured one
    "sdk-payment.authorized": (CAPTURED, 1000000, "card", 23000, "order_100000000order", "pay_6koWN7bvxujzxM"),
}

# (report, amount, refund) beside the captured payment (order, payment, amount)
REFUNDS: dict[str, tuple[RefundReport, int, str, str, str, int]] = {
    "live-netbanking-refund.created": (
        *(RefundReport.SUCCEEDED, 100, "rfnd_TVCtCeHGHVUVuT"),
        *("order_TVCpvdEADkAoMJ", "pay_TVCsKe6a4pkI5j", 100),
    ),
    **{
        f"doc-refund.{last}": (
            report,
            50000,
            "rfnd_FS8TWyPrCsa0OB",
            "order_FPoIeimWki9j8A",
            "pay_FPoJKWQQ8lK13n",
            500000,
        )
        for last, report in (
            ("created", RefundReport.SUCCEEDED),
            ("processed", RefundReport.SUCCEEDED),
            ("failed", RefundReport.FAILED),
        )
    },
}

DISPUTES: dict[str, tuple[DisputeReport, int, str, str | None, str, Report | None]] = {
    "doc-payment.dispute.created": (
        *(DisputeReport.OPEN, 39000, "disp_EsIAlDcoUr8CaQ"),
        *("order_EFtkA6f5jdkfud", "pay_EFtmUsbwpXwBHI", CAPTURED),
    ),
    "doc-payment.dispute.lost": (
        *(DisputeReport.LOST, 39000, "disp_EsIAlDcoUr8CaQ"),
        *("order_EFtkA6f5jdkfud", "pay_EFtmUsbwpXwBHI", CAPTURED),
    ),
    # of a payment without an order, in a snapshot from before its capture
    "doc-payment.dispute.won": (DisputeReport.WON, 130000, "disp_EsIUyp8XlaZOUt", None, "pay_EsIStomuIwFQ6U", None),
}

NOTHING = ["live-upi2-payment_link.paid", "doc-refund.speed_changed"]


def test_every_recorded_event_is_expected_here() -> None:
    assert sorted([*PAYMENTS, *REFUNDS, *DISPUTES, *NOTHING]) == EVENTS


@pytest.mark.parametrize("name", PAYMENTS)
def test_what_is_told_of_a_payment(gateway: Razorpay, name: str) -> None:
    (news,) = received(gateway, name)
    said = (news.report, news.amount, news.method, news.fee, news.gateway_order_id, news.gateway_payment_id)
    assert said == PAYMENTS[name]
    assert (news.provider, news.currency, news.fresh) == (Provider.RAZORPAY, "INR", False)
    assert (news.refunds, news.disputes) == ((), ())
    if news.report is FAILED:
        assert news.failure
        assert news.failure.code
        assert news.failure.message
    else:
        assert news.failure is None


def test_why_a_payment_failed_is_told_in_the_gateways_words(gateway: Razorpay) -> None:
    (news,) = received(gateway, "live-card-payment.failed")
    assert news.failure
    assert (news.failure.code, news.failure.message) == ("payment_failed", "Payment failed")


@pytest.mark.parametrize("name", REFUNDS)
def test_what_is_told_of_a_refund(gateway: Razorpay, name: str) -> None:
    (news,) = received(gateway, name)
    report, amount, refund_id, order_id, payment_id, captured = REFUNDS[name]
    # the payment beside it was captured, whatever of it went back since
    assert (news.report, news.amount) == (Report.CAPTURED, captured)
    assert (news.gateway_order_id, news.gateway_payment_id) == (order_id, payment_id)
    (refund,) = news.refunds
    assert (refund.report, refund.amount, refund.gateway_refund_id) == (report, amount, refund_id)
    assert refund.refund_id is None  # somebody else's
    assert (refund.failure is not None) is (report is RefundReport.FAILED)


@pytest.mark.parametrize("name", DISPUTES)
def test_what_is_told_of_a_dispute(gateway: Razorpay, name: str) -> None:
    (news,) = received(gateway, name)
    report, amount, dispute_id, order_id, payment_id, of_payment = DISPUTES[name]
    assert (news.report, news.gateway_order_id, news.gateway_payment_id) == (of_payment, order_id, payment_id)
    (dispute,) = news.disputes
    assert (dispute.report, dispute.amount, dispute.currency) == (report, amount, "INR")
    assert dispute.gateway_dispute_id == dispute_id


@pytest.mark.parametrize(
    ("last", "report"),
    [
        ("created", DisputeReport.OPEN),
        ("action_required", DisputeReport.OPEN),
        ("under_review", DisputeReport.OPEN),
        ("closed", DisputeReport.WON),
        ("won", DisputeReport.WON),
        ("lost", DisputeReport.LOST),
    ],
)
def test_every_turn_of_a_dispute(gateway: Razorpay, last: str, report: DisputeReport) -> None:
    (news,) = gateway.read(f"payment.dispute.{last}", body_of("doc-payment.dispute.created"))
    assert [one.report for one in news.disputes] == [report]


@pytest.mark.parametrize("name", NOTHING)
def test_the_rest_says_nothing(gateway: Razorpay, name: str) -> None:
    assert received(gateway, name) == []


@pytest.mark.parametrize("name", EVENTS)
def test_a_delivery_names_the_ids_it_speaks_of(gateway: Razorpay, name: str) -> None:
    body = body_of(name)
    refs = gateway.receive(body, headers_of(body)).refs
    entities = [part["entity"] for part in json.loads(body)["payload"].values() if isinstance(part, dict)]
    ids = {str(entity.get(key)) for entity in entities for key in ("id", "order_id", "payment_id")}
    assert set(refs) == {one for one in ids if one.startswith(("order_", "pay_", "rfnd_"))}
    assert refs


# refunds of ours


def refund_event(notes: object, receipt: str | None) -> bytes:
    event = json.loads(body_of("doc-refund.processed"))
    event["payload"]["refund"]["entity"] |= {"notes": notes, "receipt": receipt}
    return json.dumps(event).encode()


DEEP = b'{"event":"order.paid","payload":{"payment":' + b"[" * 10_000 + b"]" * 10_000 + b"}}"
OURS = str(uuid.UUID(int=7))


@pytest.mark.parametrize(
    ("notes", "receipt", "ours"),
    [
        ({"refund_id": OURS}, None, OURS),
        ([], f"{OURS}-0", OURS),
        ({}, OURS, OURS),
        ([], None, None),
        ({"refund_id": 7}, "Receipt No. 31", None),
        ({"refund_id": "not an id"}, None, None),
        ("text", None, None),
    ],
)
def test_our_refund_is_known_by_its_notes_or_its_receipt(
    gateway: Razorpay, notes: object, receipt: str | None, ours: str | None
) -> None:
    (news,) = gateway.read("refund.processed", refund_event(notes, receipt))
    assert [one.refund_id for one in news.refunds] == [ours]


# what may not be believed


def test_the_signatures_that_razorpay_publishes_are_made_and_checked_alike(gateway: Razorpay) -> None:
    webhook, checkout = VECTORS["webhook"], VECTORS["checkout"]
    delivery = gateway.receive(webhook["signed_text"].encode(), {"x-razorpay-signature": webhook["hex"]})
    assert delivery.kind == "payment.authorized"
    order_id, payment_id = checkout["signed_text"].split("|")
    assert gateway.proves_checkout(order_id, payment_id, checkout["hex"])
    assert not gateway.proves_checkout(order_id, payment_id + "x", checkout["hex"])
    assert not gateway.proves_checkout("order_of_another", payment_id, checkout["hex"])
    for wrong in ("", checkout["hex"].upper(), checkout["hex"][:-1], checkout["hex"] + "0", "é" * 64, " " * 64):
        assert not gateway.proves_checkout(order_id, payment_id, wrong)


def test_every_secret_of_the_list_is_accepted_and_no_other(gateway: Razorpay) -> None:
    body = body_of("live-netbanking-payment.captured")
    for secret in ("the newest", SECRET):
        assert gateway.receive(body, headers_of(body, secret)).kind == "payment.captured"
    for secret in ("", "the next", VECTORS["checkout"]["secret"]):
        with pytest.raises(BadSignature):
            gateway.receive(body, headers_of(body, secret))


def test_a_body_that_was_parsed_and_written_again_is_not_signed(gateway: Razorpay) -> None:
    body = body_of("live-netbanking-payment.captured")
    with pytest.raises(BadSignature):
        gateway.receive(json.dumps(json.loads(body)).encode(), headers_of(body))


@pytest.mark.parametrize("event_id", [None, "", "x" * 65, "a b", "a\nb"])
def test_without_a_usable_event_id_the_same_body_is_the_same_event(gateway: Razorpay, event_id: str | None) -> None:
    body = body_of("live-netbanking-payment.captured")
    delivery = gateway.receive(body, headers_of(body, event_id=event_id))
    assert delivery.event_id == "sha256:" + hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"\xff", b"{", b'{"event": 3}', DEEP])
def test_a_signed_body_that_is_no_event_is_stored_and_cannot_be_applied(gateway: Razorpay, body: bytes) -> None:
    delivery = gateway.receive(body, headers_of(body))
    assert (delivery.kind, delivery.refs) == ("", ())
    with pytest.raises(Malformed):
        gateway.read(delivery.kind, body)


WRONG: list[Any] = [None, 1.5, "text", "\0", [], {}, True, -1, 2**70]


def broken(value: Any) -> Iterator[Any]:
    """The value with one member, at any depth, missing or of another type."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield {key: one for key, one in value.items() if key != name}
            for wrong in WRONG:
                yield {**value, name: wrong}
            yield from ({**value, name: other} for other in broken(inner))


@pytest.mark.parametrize("name", ["live-netbanking-order.paid", "doc-refund.failed", "doc-payment.dispute.lost"])
def test_a_body_of_any_shape_is_news_or_malformed_and_nothing_else(gateway: Razorpay, name: str) -> None:
    event = json.loads(body_of(name))
    refused = 0
    for changed in broken(event):
        body = json.dumps(changed).encode()
        gateway.receive(body, headers_of(body))
        try:
            for news in gateway.read(event["event"], body):
                assert 0 <= news.amount <= MINOR_UNITS_MAX
                assert b"\\u0000" not in msgspec.json.encode(news)
                assert msgspec.convert(msgspec.to_builtins(news), News) == news
        except Malformed:
            refused += 1
    assert refused


def test_what_payments_of_an_order_come_to() -> None:
    order = razorpay_news.Order(id="order_1", amount=100, currency="INR", status="attempted", attempts=3)

    def attempt(number: int, status: str) -> razorpay_news.Payment:
        return razorpay_news.Payment(
            id=f"pay_{number}", amount=100, currency="INR", status=status, order_id="order_1", created_at=number
        )

    def came_to(*statuses: str, of: razorpay_news.Order = order) -> list[tuple[str | None, Report | None]]:
        attempts = [attempt(number, status) for number, status in enumerate(statuses)]
        return [(one.gateway_payment_id, one.report) for one in razorpay_news.of_order(of, attempts[::-1], {})]

    assert came_to("failed", "failed") == [("pay_1", Report.FAILED)]
    assert came_to("authorized", "failed") == [("pay_0", Report.AUTHORIZED)]
    assert came_to("created", "failed") == [("pay_0", Report.PROCESSING)]
    assert came_to("failed", "captured", "failed") == [("pay_1", Report.CAPTURED)]
    assert came_to("captured", "refunded") == [("pay_0", Report.CAPTURED), ("pay_1", Report.CAPTURED)]
    assert came_to("something new") == [("pay_0", Report.UNKNOWN)]
    # the list of attempts is behind the order
    assert came_to() == [(None, Report.PROCESSING)]
    paid_order = msgspec.structs.replace(order, status="paid")
    assert came_to("created", of=paid_order) == [(None, Report.PROCESSING)]
    assert came_to(of=msgspec.structs.replace(order, attempts=0)) == [(None, Report.PENDING)]


def test_money_that_went_back_without_a_refund_is_no_refund() -> None:
    gone = razorpay_news.Payment(
        id="pay_1", amount=100, currency="INR", status="refunded", order_id="order_1", amount_refunded=100
    )
    news = razorpay_news.of_payment(gone)
    assert (news.report, news.amount, news.refunds) == (Report.CAPTURED, 100, ())
    made = razorpay_news.Refund(id="rfnd_1", payment_id="pay_1", amount=100, currency="INR", status="pending")
    assert razorpay_news.of_refund(made) == RefundNews(
        gateway_refund_id="rfnd_1", report=RefundReport.PROCESSING, amount=100, currency="INR"
    )
