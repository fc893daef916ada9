"""How much of a line goes back, from which payment, and where a refund goes from where it is."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from math import floor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import NotRefundable
from models.money import MINOR_UNITS_MAX
from models.payment import RefundReport
from models.refund import Money, RefundLine, RefundStatus, after, allot, line_share, spread

amounts = st.integers(0, MINOR_UNITS_MAX)


@st.composite
def partial_refunds(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    """A line's total and quantity, and how many units go back each time, until all are back."""
    quantity = draw(st.integers(1, 60))
    cuts = sorted(draw(st.sets(st.integers(1, quantity))) | {0, quantity})
    return draw(amounts), quantity, [later - earlier for earlier, later in pairwise(cuts)]


# a line's share


@given(partial_refunds())
def test_any_sequence_of_partial_refunds_gives_back_the_whole_line_and_never_more(
    line: tuple[int, int, list[int]],
) -> None:
    total, quantity, steps = line
    units = refunded = 0
    for step in steps:
        share = line_share(total, quantity, units, refunded, step)
        units, refunded = units + step, refunded + share
        assert share >= 0
        assert refunded == floor(Fraction(total * units, quantity)) <= total
    assert refunded == total


@given(amounts, st.integers(1, 60), st.data())
def test_a_line_of_which_more_went_back_than_its_share_gives_back_no_more_than_its_rest(
    total: int, quantity: int, data: st.DataObject
) -> None:
    before = data.draw(st.integers(0, quantity - 1))
    units = data.draw(st.integers(1, quantity - before))
    refunded = data.draw(st.integers(0, total))
    assert 0 <= line_share(total, quantity, before, refunded, units) <= total - refunded


@pytest.mark.parametrize(
    ("total", "quantity", "before", "refunded", "units", "share"),
    [
        (1000, 3, 0, 0, 1, 333),
        (1000, 3, 1, 333, 1, 333),
        (1000, 3, 2, 666, 1, 334),
        (1000, 3, 0, 0, 3, 1000),
        (25_200, 2, 0, 0, 1, 12_600),
        (1, 3, 0, 0, 2, 0),
        (1, 3, 2, 0, 1, 1),
        (0, 4, 0, 0, 4, 0),
    ],
)
def test_the_last_unit_takes_the_rest(
    total: int, quantity: int, before: int, refunded: int, units: int, share: int
) -> None:
    assert line_share(total, quantity, before, refunded, units) == share


@pytest.mark.parametrize(("before", "units"), [(0, 4), (2, 2), (3, 1), (0, 0), (0, -1)])
def test_no_more_units_go_back_than_were_sold(before: int, units: int) -> None:
    with pytest.raises(ValueError, match="units"):
        line_share(900, 3, before, 300 * before, units)


# over several payments


@given(st.lists(amounts, max_size=6), st.data())
def test_a_refund_is_spread_without_loss_and_the_first_are_emptied_first(
    refundable: list[int], data: st.DataObject
) -> None:
    amount = data.draw(st.integers(0, sum(refundable)))
    parts = spread(amount, refundable)
    assert sum(parts) == amount
    assert len(parts) == len(refundable)
    assert all(0 <= part <= holds for part, holds in zip(parts, refundable, strict=True))
    for number, part in enumerate(parts):
        if part < refundable[number]:
            assert not any(parts[number + 1 :])


@given(st.lists(amounts, max_size=6), st.integers(1, MINOR_UNITS_MAX))
def test_more_than_all_of_them_hold_is_refused_with_what_they_hold(refundable: list[int], more: int) -> None:
    with pytest.raises(NotRefundable) as refusal:
        spread(sum(refundable) + more, refundable)
    assert refusal.value.fields == {"refundable": sum(refundable)}


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 50)), max_size=5), st.data())
def test_lines_follow_the_money_and_every_unit_is_counted_once(
    wanted: list[tuple[int, int]], data: st.DataObject
) -> None:
    lines = [RefundLine(line_id=str(n), quantity=units, amount=a) for n, (units, a) in enumerate(wanted, 1)]
    total = sum(line.amount for line in lines)
    cuts = sorted({0, total, *data.draw(st.sets(st.integers(0, total), max_size=3))})
    amounts = [later - earlier for earlier, later in pairwise(cuts)] or [0]
    found = allot(lines, amounts)
    assert [sum(line.amount for line in mine) for mine in found] == amounts
    for line in lines:
        shares = [one for mine in found for one in mine if one.line_id == line.line_id]
        assert sum(one.quantity for one in shares) == line.quantity
        assert sum(one.amount for one in shares) == line.amount


def test_what_the_money_does_not_reach_is_left_out() -> None:
    lines = [RefundLine(line_id=str(n), quantity=1, amount=100) for n in (1, 2, 3)]
    assert allot(lines, [150]) == [[lines[0], RefundLine(line_id="2", quantity=1, amount=50)]]


def test_what_is_left_of_the_money_after_the_lines_is_for_delivery() -> None:
    line = RefundLine(line_id="1", quantity=2, amount=700)
    first, second = allot([line], [500, 400])
    assert (first, second) == (
        [RefundLine(line_id="1", quantity=2, amount=500)],
        [RefundLine(line_id="1", quantity=0, amount=200)],
    )


# what may go back at all


@given(amounts, amounts, amounts, amounts)
def test_refundable_is_what_came_less_what_is_back_on_its_way_or_in_dispute(
    captured: int, refunded: int, reserved: int, disputed: int
) -> None:
    left = captured - refunded - reserved - disputed
    assert Money(captured, refunded, reserved, disputed).refundable == (left if left > 0 else 0)


# its states

R, N = RefundStatus, RefundReport


@pytest.mark.parametrize(
    ("status", "report", "then"),
    [
        (R.PENDING, N.PROCESSING, R.PROCESSING),
        (R.PENDING, N.SUCCEEDED, R.SUCCEEDED),
        (R.PENDING, N.FAILED, R.FAILED),
        (R.PROCESSING, N.PROCESSING, R.PROCESSING),
        (R.PROCESSING, N.SUCCEEDED, R.SUCCEEDED),
        (R.PROCESSING, N.FAILED, R.FAILED),
        # late news of what is settled
        (R.SUCCEEDED, N.PROCESSING, R.SUCCEEDED),
        (R.SUCCEEDED, N.SUCCEEDED, R.SUCCEEDED),
        (R.FAILED, N.PROCESSING, R.FAILED),
        (R.FAILED, N.SUCCEEDED, R.FAILED),
        (R.FAILED, N.FAILED, R.FAILED),
        # a bank that sends the money back
        (R.SUCCEEDED, N.FAILED, R.FAILED),
    ],
)
def test_where_news_takes_a_refund(status: RefundStatus, report: RefundReport, then: RefundStatus) -> None:
    assert after(status, report) is then
