"""The shapes that come from outside: lengths, characters, ranges, unknown and missing members."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import base
from models.address import Address, Billing, Contact
from models.order import AskedItem

ADDRESS: dict[str, Any] = {"line1": "12 MG Road", "city": "Bengaluru", "country": "IN"}
OPTIONAL = ["line2", "name", "phone", "landmark", "state", "postalCode"]
TEXTS: list[tuple[Any, int, int]] = [
    (base.Id, 1, 200),
    (base.ShortText, 1, 200),
    (base.Reference, 1, 64),
    (base.LongText, 0, 1000),
    (base.Reason, 1, 500),
]


def accepts(value: object, type_: Any) -> bool:
    try:
        msgspec.json.decode(json.dumps(value), type=type_)
    except msgspec.ValidationError:
        return False
    return True


@pytest.mark.parametrize(("type_", "least", "most"), TEXTS)
def test_a_text_has_a_least_and_a_greatest_length(type_: Any, least: int, most: int) -> None:
    assert [length for length in (0, 1, most, most + 1) if accepts("न" * length, type_)] == [
        length for length in (0, 1, most) if length >= least
    ]


@pytest.mark.parametrize(("type_", "least", "most"), TEXTS)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=64))
def test_a_text_holds_anything_but_nul(type_: Any, least: int, most: int, text: str) -> None:
    assert accepts(text, type_) == ("\0" not in text)


@pytest.mark.parametrize(("type_", "least", "most"), TEXTS)
@pytest.mark.parametrize("text", ["\0", "a\0", "\0a", "a\nb\0", "line\n"])
def test_nul_is_found_wherever_it_stands(type_: Any, least: int, most: int, text: str) -> None:
    assert accepts(text, type_) == ("\0" not in text)


@pytest.mark.parametrize("value", [1, 1.5, True, None, [], {}])
@pytest.mark.parametrize(("type_", "least", "most"), TEXTS)
def test_a_text_is_nothing_else(type_: Any, least: int, most: int, value: object) -> None:
    assert not accepts(value, type_)


@pytest.mark.parametrize("missing", ADDRESS)
def test_an_address_needs_line1_city_and_country(missing: str) -> None:
    assert accepts(ADDRESS, Address)
    assert not accepts({name: value for name, value in ADDRESS.items() if name != missing}, Address)
    assert not accepts({**ADDRESS, missing: None}, Address)
    assert not accepts({**ADDRESS, missing: ""}, Address)


@pytest.mark.parametrize("country", ["in", "IND", "I", "I1", "ÅX", "IN\n", " IN", "I\0"])
def test_a_country_is_two_capital_letters(country: str) -> None:
    assert not accepts({**ADDRESS, "country": country}, Address)


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_members_of_an_address_are_texts_or_absent(name: str) -> None:
    assert accepts({**ADDRESS, name: "x" * 200}, Address)
    for wrong in ("", "x" * 201, "a\0b", None, 7, ["x"]):
        assert not accepts({**ADDRESS, name: wrong}, Address)


@pytest.mark.parametrize(("name", "most"), [("lat", 90), ("lng", 180)])
def test_degrees_have_their_range(name: str, most: int) -> None:
    for right in (-most, 0, most, most - 0.0001, -0.0):
        assert accepts({**ADDRESS, name: right}, Address)
    for wrong in (-most - 0.0001, most + 0.0001, "12", True, None, 10**400):
        assert not accepts({**ADDRESS, name: wrong}, Address)


@pytest.mark.parametrize("shape", [Address, Contact, Billing, AskedItem])
def test_unknown_members_are_refused(shape: Any) -> None:
    needed: dict[Any, dict[str, Any]] = {Address: ADDRESS, AskedItem: {"quantity": 1}}
    whole = needed.get(shape, {})
    assert accepts(whole, shape)
    assert not accepts({**whole, "postal_code": "560001"}, shape)
    assert not accepts({**whole, "": ""}, shape)


@pytest.mark.parametrize(
    ("member", "right", "wrong"),
    [
        ("quantity", [1, 1_000_000], [0, -1, 1_000_001, 1.5, "1", True, None, 10**30]),
        ("unitPrice", [0, 2**53 - 1], [-1, 2**53, 0.5, "1", False, None, 10**400]),
        ("taxRateBp", [0, 10_000], [-1, 10_001, 18.5, "1800", None]),
    ],
)
def test_numbers_of_a_line_are_whole_and_bounded(member: str, right: list[object], wrong: list[object]) -> None:
    line = {"name": "Dosa", "quantity": 1, "unitPrice": 1}
    assert all(accepts({**line, member: value}, AskedItem) for value in right)
    assert not any(accepts({**line, member: value}, AskedItem) for value in wrong)


@given(
    st.fixed_dictionaries(
        {"line1": st.text("aß न\n", min_size=1), "city": st.just("Köln"), "country": st.just("DE")},
        optional={name: st.text("xyz", min_size=1) for name in OPTIONAL}
        | {"lat": st.floats(-90, 90), "lng": st.floats(-180, 180)},
    )
)
def test_an_address_is_kept_as_it_was_sent(sent: dict[str, Any]) -> None:
    read = msgspec.json.decode(json.dumps(sent), type=Address)
    assert json.loads(msgspec.json.encode(read)) == sent
