"""The breaker alone, on a clock of the test's."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from handlers.ports import GatewayAway, GatewayFailed, GatewayNotAsked, GatewayRefused, GatewayUnknown
from models.payment import Provider
from server import metrics
from server.adapters.breaker import Breaker

AWAY = GatewayAway(Provider.RAZORPAY, "not_reached", "")
UNKNOWN = GatewayUnknown(Provider.RAZORPAY, "timeout", "")
REFUSED = GatewayRefused(Provider.RAZORPAY, 400, "BAD_REQUEST_ERROR", "")


def value_of(series: Any) -> float:
    return float(series._value.get())


class Bench:
    """A breaker that opens after three failures, for five seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.breaker = Breaker(Provider.RAZORPAY, failures_max=3, open_s=5, clock=lambda: self.now)

    def call(self, error: BaseException | None = None) -> None:
        with self.breaker.call("fetch"):
            if error:
                raise error

    def fail(self, times: int, error: GatewayFailed = AWAY) -> None:
        for _ in range(times):
            with pytest.raises(type(error)):
                self.call(error)

    @property
    def offered(self) -> bool:
        return self.breaker.offered

    @property
    def shown_open(self) -> float:
        return value_of(metrics.gateway_open.labels(Provider.RAZORPAY))


def asked(outcome: str) -> float:
    return value_of(metrics.gateway_calls.labels(Provider.RAZORPAY, "fetch", outcome))


@pytest.mark.parametrize("error", [AWAY, UNKNOWN])
def test_it_opens_after_so_many_failures_in_a_row(error: GatewayFailed) -> None:
    bench = Bench()
    bench.fail(2, error)
    bench.call()  # one answer, and it counts anew
    bench.fail(2, error)
    seen = [bench.offered]
    bench.fail(1, error)
    assert [*seen, bench.offered] == [True, False]
    assert bench.shown_open == 1


def test_while_it_is_open_nothing_is_asked() -> None:
    bench = Bench()
    bench.fail(3)
    before, bench.now = asked("not_asked"), 4.9
    with pytest.raises(GatewayAway) as refused, bench.breaker.call("fetch"):
        pytest.fail("it was asked")
    assert refused.value.code == "breaker_open"
    assert asked("not_asked") == before + 1


def test_who_refuses_is_there() -> None:
    bench = Bench()
    bench.fail(2)
    bench.fail(1, REFUSED)
    bench.fail(2)
    assert bench.offered


def test_one_probe_is_let_through_and_closes_it() -> None:
    bench = Bench()
    bench.fail(3)
    bench.now = 5
    seen = [bench.offered]
    with bench.breaker.call("fetch"):
        seen.append(bench.offered)
        with pytest.raises(GatewayNotAsked), bench.breaker.call("fetch"):
            pytest.fail("a second probe was let through")
    assert [*seen, bench.offered] == [True, False, True]
    assert bench.shown_open == 0
    bench.fail(2)
    assert bench.offered


def test_a_probe_that_is_refused_closes_it_too() -> None:
    bench = Bench()
    bench.fail(3)
    bench.now = 5
    bench.fail(1, REFUSED)
    bench.fail(2)
    assert bench.offered


def test_a_probe_that_fails_opens_it_for_another_while() -> None:
    bench = Bench()
    bench.fail(3)
    bench.now = 5
    bench.fail(1, UNKNOWN)
    seen = []
    for bench.now in (5, 9.9, 10):
        seen.append(bench.offered)
    assert seen == [False, False, True]


def test_a_probe_that_its_caller_gives_up_leaves_room_for_the_next() -> None:
    bench = Bench()
    bench.fail(3)
    bench.now = 5
    with pytest.raises(asyncio.CancelledError):
        bench.call(asyncio.CancelledError())
    assert bench.offered
    bench.call()
    bench.fail(2)
    assert bench.offered


def test_calls_from_before_it_opened_do_not_decide() -> None:
    bench = Bench()
    early, late = bench.breaker.call("fetch"), bench.breaker.call("fetch")
    early.__enter__()
    late.__enter__()
    bench.fail(3)
    early.__exit__(None, None, None)
    seen = [bench.offered]
    bench.now = 4
    late.__exit__(GatewayAway, AWAY, None)
    bench.now = 5
    assert [*seen, bench.offered] == [False, True]
