"""Questions of many callers, asked of the table in one statement: a thousand sockets that come back at once cost a few
queries, not two thousand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from models.errors import Refused, Unavailable
from server import metrics

QuestionT = TypeVar("QuestionT")
AnswerT = TypeVar("AnswerT")

WAIT_S = 0.02
"""How long a question waits at most for a statement that is under way; a Postgres that hangs holds nobody else up."""


class Batches(Generic[QuestionT, AnswerT]):
    """One kind of question. `ask(questions)` answers each with a value or a refusal, `batch_max` at a time.

    A question leaves with all others of its tick of the event loop, or, while a statement is under way, when that is
    done. So nobody waits while there is little to do, and batches grow with the load.
    """

    def __init__(
        self, name: str, ask: Callable[[Sequence[QuestionT]], Awaitable[Sequence[AnswerT | Refused]]], batch_max: int
    ) -> None:
        self._ask = ask
        self._batch_max = batch_max
        self._size = metrics.batch_size.labels(name)
        self._waiting: list[tuple[QuestionT, asyncio.Future[AnswerT]]] = []
        self._due: asyncio.Handle | None = None
        self._under_way: set[asyncio.Task[None]] = set()

    async def ask(self, question: QuestionT) -> AnswerT:
        """The answer. Raises what the question is refused with, or what its batch failed with."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[AnswerT] = loop.create_future()
        self._waiting.append((question, future))
        if self._due is None:
            self._due = loop.call_later(WAIT_S, self._send) if self._under_way else loop.call_soon(self._send)
        return await future

    def _send(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
        waiting = [each for each in self._waiting if not each[1].done()]  # who hung up needs no answer
        self._waiting = []
        for start in range(0, len(waiting), self._batch_max):
            task = asyncio.create_task(self._answer(waiting[start : start + self._batch_max]))
            self._under_way.add(task)
            task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        if self._waiting and not self._under_way:
            self._send()

    async def _answer(self, batch: Sequence[tuple[QuestionT, asyncio.Future[AnswerT]]]) -> None:
        self._size.observe(len(batch))
        answers: Sequence[AnswerT | Refused]
        try:
            answers = await self._ask([question for question, _ in batch])
        except Unavailable as refusal:
            answers = [Unavailable(refusal.detail) for _ in batch]  # one that many raise would grow with each
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, Refused):
                future.set_exception(answer)
            else:
                future.set_result(answer)
