"""Query parameters mean what their schema says, and nothing that a reader in a hurry would make of them."""

from __future__ import annotations

import datetime as dt

import pytest
from aiohttp.test_utils import make_mocked_request

from handlers.orders import ListOrders
from models.errors import Invalid, Malformed, Refused
from server.calls import query
from server.orders import ReadEvents
from tests.harness import Fleet


def test_integers_and_times_are_read() -> None:
    read = query(make_mocked_request("GET", "/?limit=7&from=2026-11-21T09:30:00Z"), ListOrders)
    assert (read.limit, read.from_) == (7, dt.datetime(2026, 11, 21, 9, 30, tzinfo=dt.UTC))
    assert query(make_mocked_request("GET", "/?after=3&wait=0"), ReadEvents) == ReadEvents(after=3, wait=0)


def test_digits_stay_text_where_text_is_meant() -> None:
    assert query(make_mocked_request("GET", "/?reference=1042&customerId=7"), ListOrders).reference == "1042"


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        ("limit=1e1", Invalid),
        ("limit=7.0", Invalid),
        ("limit=+7", Invalid),
        ("limit=٧", Invalid),
        ("limit=true", Invalid),
        ("limit=", Invalid),
        ("limit=999999999999999999999999", Invalid),
        ("from=0", Invalid),
        ("from=0.5", Invalid),
        ("to=1795253400", Invalid),
        ("to=null", Invalid),
        ("status=null", Invalid),
        ("limit=7&limit=8", Malformed),
    ],
)
def test_other_spellings_are_refused(asked: str, kind: type[Refused]) -> None:
    with pytest.raises(kind):
        query(make_mocked_request("GET", f"/?{asked}"), ListOrders)


async def test_a_word_that_is_no_id_leads_to_no_order(fleet: Fleet) -> None:
    instance = await fleet.start()
    reply = await instance.get("/orders/quote")
    assert (reply.status, reply.headers["Allow"]) == (405, "POST")
    for order_id in ("1042", "9E2C8D3C-4A8A-4BB5-8C06-9F4F6F0F5D11", "-" * 36):
        assert (await instance.get(f"/orders/{order_id}")).code == "not_found"
