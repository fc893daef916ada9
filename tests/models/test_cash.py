"""Cash: rounding to coins that exist, exact sums, change, and a balanced entry whatever is taken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.cash import read_units, rounded, take
from models.errors import AlreadyPaid, AmountMismatch
from models.ledger import ORDER_RECEIVABLE, ROUNDING, TILL, Post, balanced

RUPEES = {"INR": 100, "CHF": 5}
dues = st.integers(1, 10**12)
units = st.integers(1, 1000)


@pytest.mark.parametrize(
    ("due", "currency", "taken"),
    [
        (25_200, "INR", 25_200),
        (25_249, "INR", 25_200),
        (25_250, "INR", 25_300),
        (25_251, "INR", 25_300),
        (1, "INR", 100),
        (50, "INR", 100),
        (1_002, "CHF", 1_000),
        (1_003, "CHF", 1_005),
        (2, "CHF", 5),
        (1_003, "USD", 1_003),
        (0, "INR", 0),
        (-5, "INR", 0),
    ],
)
def test_cash_is_rounded_to_the_smallest_coin(due: int, currency: str, taken: int) -> None:
    assert rounded(due, currency, RUPEES) == taken


@given(dues, units)
def test_rounding_is_to_the_nearest_coin_and_half_of_one_goes_up(due: int, unit: int) -> None:
    taken = rounded(due, "INR", {"INR": unit})
    assert taken % unit == 0
    assert taken > 0
    off = taken - due
    assert 2 * abs(off) <= unit or taken == unit, "another coin is nearer"
    assert 2 * off != -unit or taken == unit, "a half went down"
    assert rounded(taken, "INR", {"INR": unit}) == taken


@given(dues, units)
def test_what_is_due_is_settled_whole_and_the_difference_balances(due: int, unit: int) -> None:
    coins = {"INR": unit}
    taken = take(due, "INR", rounded(due, "INR", coins), None, coins, partial=False)
    assert (taken.applied, taken.change) == (due, None)
    assert balanced(Post(TILL, taken.amount), Post(ORDER_RECEIVABLE, -taken.applied), Post(ROUNDING, taken.rounding))


@given(dues, st.integers(-5, 10**12), units)
def test_nothing_but_the_exact_sum_is_taken(due: int, amount: int, unit: int) -> None:
    coins = {"INR": unit}
    if amount == rounded(due, "INR", coins):
        assert take(due, "INR", amount, None, coins, partial=False).amount == amount
    else:
        with pytest.raises(AmountMismatch):
            take(due, "INR", amount, None, coins, partial=False)


@given(dues, st.integers(-5, 10**12), units)
def test_a_part_is_taken_only_when_it_is_less_than_what_is_due(due: int, amount: int, unit: int) -> None:
    coins = {"INR": unit}
    asked = rounded(due, "INR", coins)
    if amount == asked:
        assert take(due, "INR", amount, None, coins, partial=True).applied == due
    elif 0 < amount < min(asked, due):
        assert take(due, "INR", amount, None, coins, partial=True) == (amount, amount, None)
    else:
        with pytest.raises(AmountMismatch):
            take(due, "INR", amount, None, coins, partial=True)


@given(dues, st.integers(0, 2 * 10**12))
def test_the_change_is_what_was_handed_over_above_the_sum(due: int, tendered: int) -> None:
    amount = rounded(due, "INR", RUPEES)
    if tendered < amount:
        with pytest.raises(AmountMismatch):
            take(due, "INR", amount, tendered, RUPEES, partial=False)
    else:
        assert take(due, "INR", amount, tendered, RUPEES, partial=False).change == tendered - amount


@pytest.mark.parametrize("due", [0, -1])
def test_nothing_is_taken_when_nothing_is_due(due: int) -> None:
    with pytest.raises(AlreadyPaid):
        take(due, "INR", 100, None, RUPEES, partial=True)


@pytest.mark.parametrize(("due", "amount"), [(150, 170), (150, 150), (40, 60)])
def test_what_rounding_up_asks_is_not_taken_in_part(due: int, amount: int) -> None:
    with pytest.raises(AmountMismatch):
        take(due, "INR", amount, None, RUPEES, partial=True)


def test_units_are_read() -> None:
    assert read_units("") == {}
    assert read_units(" INR=100 , CHF=5,") == {"INR": 100, "CHF": 5}


@pytest.mark.parametrize("text", ["INR", "INR=", "INR=0", "INR=-5", "INR=1.5", "inr=100", "XXX=5", "INR=٥", "=100"])
def test_units_that_are_none_are_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        read_units(f"CHF=5,{text}")
