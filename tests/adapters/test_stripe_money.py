"""Amounts between ISO 4217 and Stripe, against a table of Stripe's own digits."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import AmountTooSmall, Invalid
from models.money import EXPONENTS
from server.adapters.stripe_money import check, from_stripe, step, to_stripe

STRIPE_DIGITS = {
    **EXPONENTS,
    **dict.fromkeys(("BIF", "CLP", "DJF", "GNF", "JPY", "KMF", "KRW", "MGA", "PYG"), 0),
    **dict.fromkeys(("RWF", "VND", "VUV", "XAF", "XOF", "XPF"), 0),
    **dict.fromkeys(["BHD", "JOD", "KWD", "OMR", "TND"], 3),
    "ISK": 2,
    "UGX": 2,
}
"""Digits of the amounts that Stripe takes: https://docs.stripe.com/currencies."""


@given(st.sampled_from(sorted(EXPONENTS)), st.integers(1, 10**9))
def test_the_money_is_the_same_on_both_sides(currency: str, steps: int) -> None:
    amount = steps * step(currency)
    sent = to_stripe(amount, currency)
    assert Fraction(sent, 10 ** STRIPE_DIGITS[currency]) == Fraction(amount, 10 ** EXPONENTS[currency])
    assert from_stripe(sent, currency) == amount


@given(st.sampled_from(sorted(EXPONENTS)), st.integers(1, 10**9))
def test_what_stripe_cannot_say_is_refused_before_it_is_asked(currency: str, amount: int) -> None:
    exact = Fraction(amount, 10 ** EXPONENTS[currency]) * 10 ** STRIPE_DIGITS[currency]
    card_networks_carry_two_digits = STRIPE_DIGITS[currency] != 3 or currency in ("IQD", "LYD") or amount % 10 == 0
    if exact.denominator == 1 and card_networks_carry_two_digits:
        to_stripe(amount, currency)
    else:
        with pytest.raises(Invalid):
            to_stripe(amount, currency)


@given(st.sampled_from(sorted(EXPONENTS)), st.integers(0, 10**12))
def test_no_more_is_credited_than_came(currency: str, reported: int) -> None:
    came = Fraction(reported, 10 ** STRIPE_DIGITS[currency])
    assert Fraction(from_stripe(reported, currency), 10 ** EXPONENTS[currency]) <= came


@pytest.mark.parametrize(
    ("amount", "currency", "sent"),
    [
        (49_900, "INR", 49_900),
        (500, "JPY", 500),
        (500, "ISK", 50_000),
        (500, "UGX", 50_000),
        (50_000, "MGA", 500),
        (99_990, "KWD", 99_990),
        (100, "HTG", 100),
        (17_500, "HUF", 17_500),
    ],
)
def test_examples(amount: int, currency: str, sent: int) -> None:
    assert to_stripe(amount, currency) == sent
    check(amount, currency)


@pytest.mark.parametrize(
    ("amount", "currency"), [(49, "USD"), (29, "GBP"), (17_499, "HUF"), (49, "INR"), (1499, "CZK")]
)
def test_less_than_stripes_minimum_is_too_small(amount: int, currency: str) -> None:
    with pytest.raises(AmountTooSmall):
        check(amount, currency)
    check(amount + 1, currency)


@pytest.mark.parametrize(("amount", "currency"), [(99_991, "KWD"), (150, "MGA")])
def test_no_step_of_stripes(amount: int, currency: str) -> None:
    with pytest.raises(Invalid):
        check(amount, currency)
