"""An order event: its payload, what a tracking guest sees of it, and what it does to a client's copy of the order."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.base import rfc3339
from models.event import Event, Type, event
from models.order import Agent, Fulfilment, Order, PaymentMethod, Status
from models.user import Role, Scope
from tests.models.making import AT, ORDER_ID, actor, order

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
times = st.integers(946_684_800_000_000, 4_102_444_800_000_000).map(
    lambda microseconds: dt.datetime.fromtimestamp(0, dt.UTC) + dt.timedelta(microseconds=microseconds)
)
people = st.fixed_dictionaries({"role": st.sampled_from(Role).map(str)}, optional={"id": words})
given_agents = st.fixed_dictionaries({"id": words}, optional={"name": words, "vehicle": words})
bodies = st.fixed_dictionaries(
    {},
    optional={
        "status": st.sampled_from(Status).map(str),
        "previousStatus": st.sampled_from(Status).map(str),
        "note": words,
        "actor": people,
        "agent": st.none() | given_agents,
        "override": st.fixed_dictionaries({"reason": words}),
        "amount": st.integers(0),
        "refunded": st.integers(0),
        "currency": st.just("INR"),
        "provider": st.just("razorpay"),
    },
)
types = st.sampled_from(["orderStatusUpdate", "deliveryAgentAssigned", "paymentUpdate", "somethingNew"])
FIELDS = {f: getattr(Type, f) for f in vars(Type) if f.isupper()}


def compact(body: dict[str, Any]) -> str:
    return msgspec.json.encode(body).decode()


def test_the_types_have_the_contracts_names() -> None:
    assert set(FIELDS.values()) == {
        "orderStatusUpdate",
        "deliveryAgentAssigned",
        "orderOutForDelivery",
        "orderDelivered",
        "paymentUpdate",
        "paymentMethodUpdate",
    }


@given(st.integers(1, 2**31 - 1), types, times, bodies)
def test_the_payload_starts_with_the_order_the_number_and_the_time(
    seq: int, type_: str, at: dt.datetime, body: dict[str, Any]
) -> None:
    made = event(ORDER_ID, seq, type_, at, compact(body))
    told = json.loads(made.payload)
    assert list(told)[:3] == ["orderId", "seq", "at"]
    assert told == {"orderId": ORDER_ID, "seq": seq, "at": made.at, **body}
    assert (made.seq, made.type, made.data) == (seq, type_, told)
    assert dt.datetime.fromisoformat(made.at) == at.replace(microsecond=at.microsecond // 1000 * 1000)
    assert made.at.endswith("Z")


@pytest.mark.parametrize(
    ("at", "written"),
    [
        (dt.datetime(2026, 11, 21, 9, 30, tzinfo=dt.UTC), "2026-11-21T09:30:00.000Z"),
        (dt.datetime(2026, 11, 21, 9, 30, 0, 125_999, tzinfo=dt.UTC), "2026-11-21T09:30:00.125Z"),
    ],
)
def test_times_are_rfc_3339_in_utc(at: dt.datetime, written: str) -> None:
    assert rfc3339(at) == written


@given(st.integers(1, 1000), types, bodies)
def test_a_tracking_guest_sees_every_number_and_no_people_notes_or_amounts(
    seq: int, type_: str, body: dict[str, Any]
) -> None:
    whole = event(ORDER_ID, seq, type_, dt.datetime(2026, 11, 21, tzinfo=dt.UTC), compact(body))
    shown = whole.for_tracking()
    assert (shown.seq, shown.type, shown.at) == (whole.seq, whole.type, whole.at)
    told = json.loads(shown.payload)
    assert list(told)[:3] == ["orderId", "seq", "at"]
    assert not told.keys() & {"note", "actor", "amount", "refunded", "override"}
    if body.get("agent"):
        first = body["agent"].get("name", "").split()[:1]
        assert told["agent"] == ({"name": first[0]} if first else {})
    elif "agent" in body:
        assert told["agent"] is None
    kept = {"status", "previousStatus", "currency", "provider"}
    assert {name: told[name] for name in kept & told.keys()} == {name: body[name] for name in kept & body.keys()}


@pytest.mark.parametrize("type_", ["orderOutForDelivery", "orderDelivered"])
def test_the_short_events_have_nothing_to_hide(type_: str) -> None:
    made = event(ORDER_ID, 5, type_, dt.datetime(2026, 11, 21, tzinfo=dt.UTC), "{}")
    assert json.loads(made.payload) == {"orderId": ORDER_ID, "seq": 5, "at": made.at}
    assert made.for_tracking() == made


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (None, {}),
        ("Asha", {"name": "Asha"}),
        ("Asha Rao", {"name": "Asha"}),
        ("  Asha\tRao ", {"name": "Asha"}),
        (" ", {}),
    ],
)
def test_a_tracking_guest_sees_the_agents_first_name_only(name: str | None, shown: dict[str, str]) -> None:
    full = order(
        agent=Agent(id="a1", name=name, vehicle="KA-01 1234"),
        customer_id="c1",
        status_reason="Customer was rude",
        notes="Ring twice",
        table="7",
        reference="shop-7",
    )
    tracked = json.loads(msgspec.json.encode(full.for_tracking()))
    assert tracked.pop("agent") == shown
    assert tracked == {
        "id": ORDER_ID,
        "number": "1001",
        "fulfilment": "delivery",
        "status": "pending",
        "seq": 1,
        "currency": "INR",
        "items": [{"lineId": "1", "name": "Masala dosa", "quantity": 1, "returned": 0}],
        "payment": {"method": "later", "status": "unpaid"},
        "createdAt": AT,
        "updatedAt": AT,
        "reference": "shop-7",
    }


def test_only_a_guest_that_does_not_pay_sees_the_order_redacted() -> None:
    whole = order()
    for role in Role:
        if role is not Role.GUEST:
            assert whole.view(actor(role)) is whole
    assert whole.view(actor(Role.GUEST, scope=Scope.PAY)) is whole
    assert whole.view(actor(Role.GUEST, scope=Scope.TRACK)) == whole.for_tracking()
    assert whole.view(actor(Role.GUEST)) == whole.for_tracking()


def told(seq: int, type_: str, **body: Any) -> Event:
    return event(ORDER_ID, seq, type_, dt.datetime(2026, 11, 22, tzinfo=dt.UTC), compact(body))


def test_a_copy_of_the_order_follows_its_events() -> None:
    at = order(method=PaymentMethod.CASH, total=500, fulfilment=Fulfilment.DELIVERY)
    at = at.apply(told(2, Type.STATUS, status="confirmed", note="Kitchen knows"))
    assert (at.seq, at.status, at.status_reason, at.payment.due) == (2, Status.CONFIRMED, "Kitchen knows", 500)
    at = at.apply(told(3, Type.ASSIGNED, agent={"id": "a1", "name": "Asha"}))
    assert (at.seq, at.agent) == (3, Agent(id="a1", name="Asha"))
    at = at.apply(told(4, Type.OUT_FOR_DELIVERY))
    assert (at.seq, at.status) == (4, Status.CONFIRMED)
    at = at.apply(told(5, Type.ASSIGNED, agent=None))
    assert at.agent is None
    at = at.apply(told(6, Type.STATUS, status="cancelled"))
    assert (at.status, at.status_reason, at.payment.due) == (Status.CANCELLED, None, 0)
    assert at.updated_at == "2026-11-22T00:00:00.000Z"


@given(st.integers(0, 20))
def test_only_the_next_event_applies(seq: int) -> None:
    at: Order = order(seq=7)
    if seq == 8:
        assert at.apply(told(seq, Type.DELIVERED)).seq == 8
    else:
        with pytest.raises(ValueError, match="does not follow"):
            at.apply(told(seq, Type.DELIVERED))
