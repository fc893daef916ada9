"""Deadlines against the plain way to keep them, and what is left of those that are gone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.deadlines import SPARE, Deadlines

steps = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 9), st.integers(0, 50)),
        st.tuples(st.just("drop"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("take"), st.just(0), st.integers(0, 60)),
    ),
    max_size=300,
)


@given(steps)
def test_each_key_is_due_at_the_time_that_was_set_last(play: list[tuple[str, int, int]]) -> None:
    deadlines: Deadlines[int] = Deadlines()
    plain: dict[int, float] = {}
    for do, key, at in play:
        if do == "set":
            deadlines.set(key, at)
            plain[key] = at
        elif do == "drop":
            deadlines.drop(key)
            plain.pop(key, None)
        else:
            taken = deadlines.take_due(at)
            times = [plain.pop(key) for key in taken]
            assert times == sorted(times)
            assert all(time <= at for time in times)
            assert all(time > at for time in plain.values())
        assert len(deadlines) == len(plain)
        assert deadlines.entries <= 2 * len(plain) + SPARE


def test_who_is_gone_leaves_nothing_behind() -> None:
    deadlines: Deadlines[int] = Deadlines()
    for key in range(10_000):
        deadlines.set(key, 1e9 + key)
        deadlines.set(key, 2e9 + key)
    for key in range(10_000):
        deadlines.drop(key)
    assert len(deadlines) == 0
    assert deadlines.entries <= SPARE
