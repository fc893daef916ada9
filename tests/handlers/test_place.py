"""Placing and quoting: what is refused and where, what it costs, and that a refusal changes nothing."""

from __future__ import annotations

import itertools
import json
from typing import Any

import msgspec
import pytest

from handlers import orders
from models.errors import Refused
from models.user import Actor
from tests.handlers.desk import ADMIN, CUSTOMER, SERVICE, STAFF, Desk, command, placing, replay

DOSA = {"name": "Masala dosa", "quantity": 2, "unitPrice": 12_000, "taxRateBp": 500}
LARGEST = 2**53 - 1


def pointer(refusal: Refused) -> str:
    """Where an `invalid` points."""
    assert refusal.code == "invalid"
    errors: Any = refusal.fields["errors"]
    (error,) = errors
    assert error["code"] == "invalid"
    assert error["message"] == refusal.detail
    where: str = error["pointer"]
    return where


REFUSED: list[tuple[Actor, dict[str, Any], str]] = [
    (SERVICE, {"cartId": "cart-1"}, "/cartId"),
    (SERVICE, {"cartId": "cart-1", "items": None}, "/cartId"),
    (SERVICE, {"addressId": "home"}, "/addressId"),
    (SERVICE, {"couponCode": "FREE"}, "/couponCode"),
    (SERVICE, {"prescriptionUploadId": "u1"}, "/prescriptionUploadId"),
    (SERVICE, {"expectedTotal": 25_200}, "/expectedTotal"),
    (SERVICE, {"items": None}, "/items"),
    (SERVICE, {"items": [{"sku": "DOSA", "quantity": 1}]}, "/items/0/sku"),
    (SERVICE, {"items": [DOSA, {"sku": "DOSA", "quantity": 1}]}, "/items/1/sku"),
    (SERVICE, {"items": [{**DOSA, "sku": "DOSA"}]}, "/items/0/sku"),
    (SERVICE, {"items": [DOSA, {"quantity": 1, "unitPrice": 1}]}, "/items/1/name"),
    (SERVICE, {"items": [DOSA, {"quantity": 1, "name": "Chai"}]}, "/items/1/unitPrice"),
    (CUSTOMER, {}, "/items/0"),
    (CUSTOMER, {"items": [{"sku": "DOSA", "quantity": 1}]}, "/items/0/sku"),
    (SERVICE, {"currency": "XXX"}, "/currency"),
    (SERVICE, {"currency": "inr"}, "/currency"),
    (SERVICE, {"items": [{"name": "Gold", "quantity": 2, "unitPrice": LARGEST}]}, "/items"),
    (SERVICE, {"items": [{"name": "Gold", "quantity": 1_000_000, "unitPrice": LARGEST}] * 200}, "/items"),
    (SERVICE, {"items": [{"name": "Gold", "quantity": 1, "unitPrice": LARGEST, "taxRateBp": 1}]}, "/items"),
]
"""(by, changes of ORDER, pointer of the refusal)"""


async def test_what_cannot_be_placed_is_pointed_at(desk: Desk) -> None:
    before = await desk.tables()
    for (by, changes, where), verb in itertools.product(REFUSED, (orders.place, orders.quote)):
        refusal = await desk.refused(verb, by, placing(**changes))
        assert pointer(refusal) == where, (changes, verb.__name__)
    assert await desk.tables() == before


@pytest.mark.parametrize("by", [SERVICE, STAFF, ADMIN], ids=lambda by: by.role)
async def test_the_answer_is_the_order_as_it_stands(desk: Desk, by: Actor) -> None:
    order = await desk.place(by, reference="shop-1", table="7", fulfilment="dine_in")
    assert order == (await desk.orders())[order.id]
    shown = json.loads(msgspec.json.encode(order))
    # the contract's Order, absent members left out
    assert shown == {
        "id": order.id,
        "number": "1001",
        "reference": "shop-1",
        "customerId": "c1",
        "fulfilment": "dine_in",
        "status": "pending",
        "seq": 1,
        "currency": "INR",
        "items": [
            {
                "lineId": "1",
                "name": "Masala dosa",
                "quantity": 2,
                "unitPrice": 12_000,
                "discount": 0,
                "taxRateBp": 500,
                "tax": 1_200,
                "total": 25_200,
                "returned": 0,
                "refunded": 0,
            }
        ],
        "totals": {"items": 24_000, "discount": 0, "delivery": 0, "tax": 1_200, "rounding": 0, "total": 25_200},
        "payment": {"method": "later", "status": "unpaid", "due": 25_200, "paid": 0, "refunded": 0},
        "deliveryAddress": {"line1": "12 MG Road", "city": "Bengaluru", "country": "IN", "postalCode": "560001"},
        "contact": {"name": "Meera", "phone": "+919000090000"},
        "table": "7",
        "notes": "Ring twice",
        "createdAt": order.created_at,
        "updatedAt": order.created_at,
    }


async def test_an_order_needs_little(desk: Desk) -> None:
    bare = await desk.place(customerId=None, deliveryAddress=None, contact=None, notes=None, fulfilment="pickup")
    shown = json.loads(msgspec.json.encode(bare))
    assert not shown.keys() & {"reference", "customerId", "deliveryAddress", "contact", "notes", "table", "agent"}
    assert "sku" not in shown["items"][0]
    assert bare == (await desk.orders())[bare.id]


@pytest.mark.parametrize(
    ("method", "shown"), [(None, "later"), ("later", "later"), ("cash", "cash"), ("online", "online")]
)
async def test_a_payment_method_leaves_the_order_pending(desk: Desk, method: str | None, shown: str) -> None:
    order = await desk.place(paymentMethod=method)
    assert (order.payment.method, order.status, order.seq) == (shown, "pending", 1)


@pytest.mark.parametrize(("method", "status", "seq"), [("online", "confirmed", 2), ("cash", "pending", 1)])
async def test_only_an_online_order_without_a_price_is_confirmed_at_placing(
    desk: Desk, method: str, status: str, seq: int
) -> None:
    async with replay(desk) as told:
        order = await desk.place(paymentMethod=method, items=[{"name": "Sample", "quantity": 3, "unitPrice": 0}])
    assert (order.status, order.seq, order.payment.status, order.payment.due) == (status, seq, "paid", 0)
    assert [one.seq for one in told[order.id]] == list(range(1, seq + 1))


async def test_online_waits_for_its_money(desk: Desk) -> None:
    order = await desk.place(paymentMethod="online")
    plain = command(orders.ChangeStatus, status="confirmed")
    forced = command(orders.ChangeStatus, status="confirmed", override={"reason": "Please"})
    for by, cmd in ((SERVICE, plain), (STAFF, plain), (STAFF, forced), (ADMIN, forced)):
        refusal = await desk.refused(orders.change_status, by, order.id, cmd)
        assert (refusal.code, refusal.fields) == ("payment_required", {"due": 25_200})


async def test_a_reference_is_given_once(desk: Desk) -> None:
    await desk.place(reference="shop-1")
    before = await desk.tables()
    for changes in ({}, {"customerId": "c2", "items": [{"name": "Other", "quantity": 1, "unitPrice": 1}]}):
        refusal = await desk.refused(orders.place, STAFF, placing(reference="shop-1", **changes))
        assert refusal.code == "conflict"
    assert await desk.tables() == before
    assert (await desk.place(reference="shop-2")).reference == "shop-2"
    assert (await desk.place()).reference is None
    assert (await desk.place()).reference is None


async def test_many_lines_and_the_largest_total_are_kept_as_they_are(desk: Desk) -> None:
    lines = [{"name": f"Line {n}", "quantity": n, "unitPrice": n * 7, "taxRateBp": n % 3 * 900} for n in range(1, 201)]
    many = await desk.place(items=lines)
    assert many == (await desk.orders())[many.id]
    assert [line.line_id for line in many.items] == [str(number) for number in range(1, 201)]
    largest = await desk.place(items=[{"name": "Gold", "quantity": 1, "unitPrice": LARGEST}])
    assert largest.totals.total == LARGEST
    assert largest == (await desk.orders())[largest.id]


async def test_text_is_kept_as_it_was_sent(desk: Desk) -> None:
    text = 'ü न 🙂 "quoted" \\ \u2028 \x01 {"a":1} %s $1 \'; drop table orders; --'
    order = await desk.place(notes=text, reference="ü 🙂", contact={"name": text}, items=[{**DOSA, "name": text}])
    assert (order.notes, order.items[0].name) == (text, text)
    assert order == (await desk.orders())[order.id]


async def test_a_quote_is_what_placing_costs(desk: Desk) -> None:
    cmd = placing(items=[DOSA, {"name": "Chai", "quantity": 3, "unitPrice": 1_999, "taxRateBp": 1_800}])
    quote = await desk.do(orders.quote, STAFF, cmd)
    order = await desk.do(orders.place, STAFF, cmd)
    assert (quote.items, quote.totals, quote.currency) == (order.items, order.totals, order.currency)
    shown = json.loads(msgspec.json.encode(quote))
    assert (shown["changes"], shown["availability"]) == ([], [])
