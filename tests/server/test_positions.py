"""Positions leave for Redis in gathers: the first at once, those of the next moment together, in their order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest

from server.realtime import positions
from server.realtime.positions import GATHER_S, HELD, SHOW, PositionLane
from tests.harness import SOON_S, until


class RecordedBus:
    """Notes when each command was sent, in turns of the loop."""

    publish_command = "PUBLISH"

    def __init__(self) -> None:
        self.sent: list[tuple[int, str]] = []
        """(turn of the loop, order)."""
        self.turn = 0

    def send(self, args: Sequence[Any], answer: Callable[[object], None]) -> None:
        assert args[:2] == ("EVALSHA", SHOW.digest)
        self.sent.append((self.turn, args[9]))
        answer(1)

    async def count_turns(self) -> None:
        while True:
            self.turn += 1
            await asyncio.sleep(0)

    @property
    def orders(self) -> list[str]:
        return [order for _, order in self.sent]


class Shown:
    """A lane without thinning over a bus that writes down. `answered`: orders whose agent was answered, in order."""

    def __init__(self) -> None:
        self.bus = RecordedBus()
        self.lane = PositionLane(self.bus, lambda key: key, min_interval_s=0, keep_s=60)  # type: ignore[arg-type]
        self.answered: list[str] = []
        self.heard = asyncio.Event()
        """Set at each answer."""

    def show(self, *orders: str) -> None:
        for order in orders:
            self.lane.show(order, 1, 1.0, b"{}", "origin", partial(self._answer, order))

    def _answer(self, order: str, reply: object) -> None:
        self.answered.append(order)
        self.heard.set()

    async def quiet(self) -> None:
        """Until the lane gathers no more."""
        await until(lambda: self.lane._gathered is None, "quiet")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gather longer than anything that a busy machine puts between two lines of a test."""
    monkeypatch.setattr(positions, "GATHER_S", 0.3)


async def test_the_first_goes_at_once_and_those_of_the_next_moment_together_in_order() -> None:
    shown = Shown()
    counting = asyncio.create_task(shown.bus.count_turns())
    shown.show("a")
    assert shown.bus.orders == ["a"], "at once: not even a turn later"
    shown.show("c", "b")
    await asyncio.sleep(0)
    shown.show("a", "d")
    assert shown.bus.orders == ["a"], "they are gathered"
    await until(lambda: len(shown.bus.sent) > 1, "they leave")
    assert shown.bus.orders == ["a", "c", "b", "a", "d"]
    assert len({turn for turn, _ in shown.bus.sent[1:]}) == 1, "in one turn, so in one write"
    assert shown.answered == shown.bus.orders
    counting.cancel()


async def test_what_comes_after_a_gather_is_gathered_again() -> None:
    shown = Shown()
    shown.show("a", "b")
    shown.heard.clear()
    await asyncio.wait_for(shown.heard.wait(), SOON_S)
    assert shown.bus.orders == ["a", "b"]
    shown.show("c")
    assert shown.bus.orders == ["a", "b"], "no write for a single one while positions stream"
    await until(lambda: len(shown.bus.sent) == 3, "the next gather leaves")


async def test_after_a_quiet_time_the_next_goes_at_once() -> None:
    shown = Shown()
    shown.show("a", "b")
    await shown.quiet()
    assert shown.bus.orders == ["a", "b"]
    shown.show("c")
    assert shown.bus.orders == ["a", "b", "c"]


async def test_nothing_stays_behind() -> None:
    """A stream, however it falls between the gathers: all leave, each once, in order, and soon."""
    shown, loop = Shown(), asyncio.get_running_loop()
    orders = [str(number) for number in range(200)]
    for order in orders:
        shown.show(order)
        if int(order) % 7 == 0:
            await asyncio.sleep(GATHER_S * (int(order) % 3) / 2)
    began = loop.time()
    await shown.quiet()
    assert loop.time() - began < 1
    assert shown.bus.orders == orders
    assert shown.answered == orders


async def test_who_waits_for_its_turn_learns_of_watchers_when_it_was_shown() -> None:
    """First that it waits, then what Redis says; else an agent that pushes fast never learns that somebody came."""
    replies: list[object] = []
    bus = ThinnedBus()
    lane = PositionLane(bus, lambda key: key, min_interval_s=0.01, keep_s=60)  # type: ignore[arg-type]
    lane.show("order", 1, 1.0, b"{}", "origin", replies.append)
    lane.show("order", 1, 2.0, b"{}", "origin", replies.append)
    assert replies == [2, HELD]
    await until(lambda: len(replies) == 3, "its turn")
    assert replies[2] == 2


class ThinnedBus:
    """Two instances listen, and no assignment has ended."""

    publish_command = "PUBLISH"

    def send(self, args: Sequence[Any], answer: Callable[[object], None]) -> None:
        answer(2 if args[0] == "EVALSHA" else None)
