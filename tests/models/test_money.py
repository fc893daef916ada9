"""Lines, totals and tax against exact fractions; what an order's payment status says; the table of currencies."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import Invalid
from models.money import EXPONENTS, MINOR_UNITS_MAX, tax_of
from models.order import AskedItem, check_currency, payment_status, price

amounts = st.integers(0, MINOR_UNITS_MAX)
rates = st.integers(0, 10_000)
items = st.builds(
    AskedItem,
    quantity=st.integers(1, 1_000_000),
    name=st.just("Dosa"),
    unit_price=st.integers(0, 10**7),
    tax_rate_bp=rates | st.just(msgspec.UNSET),
)


def exact_tax(net: int, rate_bp: int) -> int:
    """The contract's sentence: half = round-half-up(net × bp / 20000), tax = 2 × half."""
    half = floor(Fraction(net * rate_bp, 20_000) + Fraction(1, 2))
    return 2 * half


@given(amounts, rates)
def test_tax_is_twice_its_rounded_half(net: int, rate_bp: int) -> None:
    assert tax_of(net, rate_bp) == exact_tax(net, rate_bp)


@pytest.mark.parametrize(
    ("net", "rate_bp", "tax"),
    [(24_000, 500, 1200), (10, 500, 0), (20, 500, 2), (59, 1800, 10), (50, 200, 2), (49, 200, 0), (0, 10_000, 0)],
)
def test_half_a_minor_unit_is_rounded_up(net: int, rate_bp: int, tax: int) -> None:
    assert tax_of(net, rate_bp) == tax


@given(amounts, st.integers(0, 9_999))
def test_a_higher_rate_never_taxes_less(net: int, rate_bp: int) -> None:
    assert tax_of(net, rate_bp) <= tax_of(net, rate_bp + 1)


@given(st.lists(items, min_size=1, max_size=20))
def test_lines_and_totals_add_up(asked: list[AskedItem]) -> None:
    lines, totals = price(asked)
    for number, (line, item) in enumerate(zip(lines, asked, strict=True), 1):
        rate = 0 if isinstance(item.tax_rate_bp, msgspec.UnsetType) else item.tax_rate_bp
        assert isinstance(item.unit_price, int)
        net = item.quantity * item.unit_price
        assert (line.line_id, line.name, line.quantity) == (str(number), item.name, item.quantity)
        assert (line.unit_price, line.tax_rate_bp, line.discount) == (item.unit_price, rate, 0)
        assert (line.tax, line.total) == (exact_tax(net, rate), net + exact_tax(net, rate))
        assert (line.returned, line.refunded) == (0, 0)
    assert totals.total == totals.items - totals.discount + totals.delivery + totals.tax + totals.rounding
    assert totals.total == sum(line.total for line in lines)
    assert totals.tax == sum(line.tax for line in lines)


@given(st.integers(1, 1_000_000), amounts, rates)
def test_no_total_is_larger_than_what_json_holds_exactly(quantity: int, unit_price: int, rate_bp: int) -> None:
    item = AskedItem(quantity=quantity, name="Gold", unit_price=unit_price, tax_rate_bp=rate_bp)
    net = quantity * unit_price
    if net + exact_tax(net, rate_bp) > 2**53 - 1:
        with pytest.raises(Invalid) as refusal:
            price([item])
        assert refusal.value.fields["errors"] == [
            {"pointer": "/items", "code": "invalid", "message": refusal.value.detail}
        ]
    else:
        assert price([item])[1].total == net + exact_tax(net, rate_bp)


def test_the_largest_total_is_accepted_and_one_more_is_not() -> None:
    largest = AskedItem(quantity=1, name="Gold", unit_price=2**53 - 1)
    assert price([largest])[1].total == 9_007_199_254_740_991
    with pytest.raises(Invalid):
        price([largest, AskedItem(quantity=1, name="Dust", unit_price=1)])


@pytest.mark.parametrize(
    ("total", "paid", "refunded", "status"),
    [
        (500, 0, 0, "unpaid"),
        (500, 1, 0, "partially_paid"),
        (500, 499, 0, "partially_paid"),
        (500, 500, 0, "paid"),
        (500, 501, 0, "paid"),
        (0, 0, 0, "paid"),
        (500, 500, 1, "partially_refunded"),
        (500, 500, 500, "refunded"),
        (500, 200, 200, "refunded"),
    ],
)
def test_the_payment_status_follows_from_the_sums(total: int, paid: int, refunded: int, status: str) -> None:
    assert payment_status(total, paid, refunded) == status


@given(amounts, amounts, st.data())
def test_the_payment_status_never_claims_money_that_is_not_there(total: int, paid: int, data: st.DataObject) -> None:
    refunded = data.draw(st.integers(0, paid))
    status = payment_status(total, paid, refunded)
    assert (status == "refunded") == (0 < refunded == paid)
    assert (status in ("refunded", "partially_refunded")) == (refunded > 0)
    if status == "paid":
        assert paid >= total
    if status == "unpaid":
        assert paid == 0 < total


@pytest.mark.parametrize(
    ("digits", "codes"),
    [
        (2, "INR USD EUR GBP CHF AED AUD BRL CAD CNY HUF IDR KES LKR MGA MRU MXN MYR NPR NZD SAR SGD THB TWD XCG ZAR"),
        (0, "JPY KRW VND CLP PYG ISK UGX XOF XAF XPF RWF VUV BIF DJF GNF KMF"),
        (3, "KWD BHD OMR JOD TND LYD IQD"),
    ],
)
def test_currencies_have_the_minor_digits_of_iso_4217(digits: int, codes: str) -> None:
    assert {code: EXPONENTS.get(code) for code in codes.split()} == dict.fromkeys(codes.split(), digits)


def test_the_table_of_currencies_is_sane() -> None:
    assert all(len(code) == 3 and code.isascii() and code.isupper() for code in EXPONENTS)
    assert set(EXPONENTS.values()) == {0, 2, 3}
    # testing, no currency, metals, units of account, withdrawn
    assert not EXPONENTS.keys() & {"XTS", "XXX", "XAU", "XAG", "XDR", "CLF", "UYI", "DEM", "FRF", "HRK", "LTL", "ZWL"}
    assert 150 <= len(EXPONENTS) <= 180


@pytest.mark.parametrize("code", ["inr", "RUPEE", "IN", "", "₹₹₹", "XXX", "IN "])
def test_an_unknown_currency_is_invalid(code: str) -> None:
    with pytest.raises(Invalid) as refusal:
        check_currency(code)
    assert refusal.value.fields["errors"] == [
        {"pointer": "/currency", "code": "invalid", "message": refusal.value.detail}
    ]
    assert check_currency("INR") == "INR"
