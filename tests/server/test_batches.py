"""Questions asked together: nobody waits without need, and what befalls one batch or one caller befalls nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from models.errors import NotFound, Refused, Unavailable
from server.batches import WAIT_S, Batches
from tests.harness import until


class Table:
    """Answers each question with its double, refuses odd ones, and writes down what was asked together."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.gate: asyncio.Event | None = None
        """What the next statements wait for."""
        self.fault: Exception | None = None
        """How the next statement fails."""

    async def ask(self, questions: Sequence[int]) -> list[int | Refused]:
        self.asked.append(list(questions))
        fault, self.fault = self.fault, None
        if self.gate is not None:
            await self.gate.wait()
        if fault is not None:
            raise fault
        return [NotFound(f"no {one}") if one % 2 else one * 2 for one in questions]


async def test_a_lone_question_waits_for_nobody() -> None:
    table = Table()
    batches = Batches("test", table.ask, 10)
    for number in (2, 4):
        assert await batches.ask(number) == number * 2
    assert table.asked == [[2], [4]]


async def test_the_questions_of_one_tick_leave_together_and_each_gets_its_own_answer() -> None:
    table = Table()
    batches = Batches("test", table.ask, 10)
    answers = await asyncio.gather(*(batches.ask(number) for number in range(6)), return_exceptions=True)
    assert table.asked == [[0, 1, 2, 3, 4, 5]]
    assert answers[::2] == [0, 4, 8]
    assert [(type(one), str(one)) for one in answers[1::2]] == [(NotFound, f"no {one}") for one in (1, 3, 5)]


async def test_no_batch_is_larger_than_its_bound() -> None:
    table = Table()
    batches = Batches("test", table.ask, 4)
    assert await asyncio.gather(*(batches.ask(number) for number in range(0, 20, 2))) == list(range(0, 40, 4))
    assert table.asked == [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18]]


async def test_what_is_asked_while_a_statement_is_under_way_leaves_with_its_answer() -> None:
    table = Table()
    batches = Batches("test", table.ask, 10)
    table.gate = gate = asyncio.Event()
    first = asyncio.create_task(batches.ask(2))
    await until(lambda: table.asked, "the first is under way")
    later = []
    for number in (4, 6, 8):
        later.append(asyncio.create_task(batches.ask(number)))
        await asyncio.sleep(0)
    gate.set()
    assert await asyncio.gather(first, *later) == [4, 8, 12, 16]
    assert table.asked == [[2], [4, 6, 8]]


async def test_a_statement_that_hangs_holds_nobody_else_up() -> None:
    table = Table()
    batches = Batches("test", table.ask, 10)
    table.gate = asyncio.Event()
    stuck = asyncio.create_task(batches.ask(2))
    await until(lambda: table.asked, "the first is under way")
    table.gate = None
    async with asyncio.timeout(WAIT_S * 50):
        assert await batches.ask(4) == 8
    assert not stuck.done()
    stuck.cancel()


async def test_who_hangs_up_harms_nobody() -> None:
    table = Table()
    batches = Batches("test", table.ask, 10)
    early, staying = (asyncio.create_task(batches.ask(number)) for number in (2, 4))
    await asyncio.sleep(0)
    early.cancel()  # before the batch has left: it is not asked
    assert await staying == 8
    assert table.asked == [[4]]
    table.gate = gate = asyncio.Event()
    late, staying = (asyncio.create_task(batches.ask(number)) for number in (6, 8))
    await until(lambda: len(table.asked) == 2, "both are under way")
    late.cancel()
    gate.set()
    assert await staying == 16
    assert late.cancelled() or await asyncio.gather(late, return_exceptions=True)


@pytest.mark.parametrize("fault", [Unavailable("away"), RuntimeError("a bug")], ids=repr)
async def test_a_statement_that_fails_fails_exactly_those_in_it(fault: Exception) -> None:
    table = Table()
    batches = Batches("test", table.ask, 3)
    table.fault = fault
    answers = await asyncio.gather(*(batches.ask(number) for number in range(0, 12, 2)), return_exceptions=True)
    assert [(type(one), str(one)) for one in answers[:3]] == [(type(fault), str(fault))] * 3
    assert answers[3:] == [12, 16, 20]
    assert len({id(one) for one in answers[:3]}) == (3 if isinstance(fault, Unavailable) else 1)
    assert await batches.ask(2) == 4
