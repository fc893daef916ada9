"""What a spreadsheet and a program read from an export."""

from __future__ import annotations

import csv
import io
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, UnsetType

from models.address import Address, Contact
from models.order import Agent, Order
from server.csv_export import RISKY, columns, header, rows


class Shape(msgspec.Struct, kw_only=True, rename="camel", omit_defaults=True):
    order_id: str
    delta: int
    at_lat: float
    paid: bool
    contact: Contact | UnsetType = UNSET
    agent: Agent | None = None
    item_lines: list[Agent] = []


def written(*items: Shape) -> list[list[str]]:
    found = columns(Shape)
    text = (header(found) + rows(found, items)).decode()
    assert text.count("\n") == text.count("\r\n") or any("\n" in str(item) for item in items)
    return list(csv.reader(io.StringIO(text, newline="")))


def one(text: str) -> tuple[str, str]:
    """How a text cell reads for a program, and how it stands in the file."""
    raw = rows(columns(Agent), [Agent(id=text)]).decode()
    return next(csv.reader(io.StringIO(raw, newline="")))[0], raw.removesuffix(",,\r\n")


def test_nested_members_become_columns_with_dotted_names() -> None:
    assert written()[0] == [
        "orderId",
        "delta",
        "atLat",
        "paid",
        "contact.name",
        "contact.phone",
        "contact.email",
        "agent.id",
        "agent.name",
        "agent.vehicle",
        "itemLines",
    ]


def test_an_order_has_its_totals_flat_and_its_currency_beside_them() -> None:
    names = [column.name for column in columns(Order)]
    assert len(names) == len(set(names))
    for name in ("id", "number", "status", "currency", "totals.total", "payment.due", "agent.name", "createdAt"):
        assert name in names
    assert {f"deliveryAddress.{field.encode_name}" for field in msgspec.structs.fields(Address)} <= set(names)


def test_absent_members_are_empty_cells_and_lists_are_json() -> None:
    shape = Shape(order_id="o", delta=-3, at_lat=-33.8, paid=True, item_lines=[Agent(id='a"b')])
    assert written(shape)[1] == ["o", "-3", "-33.8", "true", "", "", "", "", "", "", '[{"id":"a\\"b"}]']


def test_members_of_a_member_stand_in_their_columns() -> None:
    shape = Shape(
        order_id="o", delta=0, at_lat=1.0, paid=False, contact=Contact(email="m@x.in"), agent=Agent(id="a", name="R")
    )
    assert written(shape)[1] == ["o", "0", "1.0", "false", "", "", "m@x.in", "a", "R", "", ""]


@pytest.mark.parametrize("first", RISKY)
def test_text_that_a_spreadsheet_would_run_is_disarmed_and_quoted(first: str) -> None:
    text = f"{first}1+1"
    assert one(text) == (f"'{text}", f'"\'{text}"')


@pytest.mark.parametrize("text", ["a=1", "1-1", "meera@example.org", " =1", "'=1", "9=", "₹ 12", "नमस्ते"])
def test_other_text_is_as_it_was(text: str) -> None:
    assert one(text) == (text, text)


@pytest.mark.parametrize("text", ["a,b", 'say "hi"', "two\nlines", "two\r\nlines", "a\rb"])
def test_text_with_separators_is_quoted_as_rfc_4180_says(text: str) -> None:
    assert one(text) == (text, '"' + text.replace('"', '""') + '"')


def test_numbers_stay_numbers_in_quotes_when_they_are_negative() -> None:
    raw = rows(columns(Shape), [Shape(order_id="o", delta=-3, at_lat=-1.5, paid=True)]).decode()
    assert raw.startswith('o,"-3","-1.5",true,')


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=3, max_size=3))
def test_every_text_comes_back_and_none_can_run(texts: list[str]) -> None:
    raw = rows(columns(Agent), [Agent(id=texts[0], name=texts[1], vehicle=texts[2])]).decode()
    cells: list[Any] = next(csv.reader(io.StringIO(raw, newline="")))
    for cell, text in zip(cells, texts, strict=True):
        assert cell == (f"'{text}" if text[0] in RISKY else text)
        assert cell[0] not in RISKY
