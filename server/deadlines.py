"""When each of many things is due: one heap for all, instead of a timer or a task for each."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)

SPARE = 64
"""How many entries without effect are always put up with, so that a small heap is not made anew all the time."""


class Deadlines(Generic[KeyT]):
    """One time for each key. Setting it again moves it; dropping it leaves nothing behind.

    A moved or dropped entry stays in the heap until its time comes, or until half of the heap is of that kind: so each
    change costs the logarithm of the size, and the memory stays within twice that of the keys.
    """

    def __init__(self) -> None:
        self._at: dict[KeyT, float] = {}
        self._heap: list[tuple[float, int, KeyT]] = []
        self._count = itertools.count()

    def __len__(self) -> int:
        return len(self._at)

    @property
    def entries(self) -> int:
        """How many entries the heap holds, those without effect included."""
        return len(self._heap)

    def set(self, key: KeyT, at: float) -> None:
        """Let the key be due at this time, and at no other."""
        self._at[key] = at
        heapq.heappush(self._heap, (at, next(self._count), key))
        self._shrink()

    def drop(self, key: KeyT) -> None:
        """Let the key never be due. Nothing happens when it has no deadline."""
        self._at.pop(key, None)
        self._shrink()

    def take_due(self, now: float) -> list[KeyT]:
        """The keys whose time has come, the earliest first. They have no deadline any more."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            at, _, key = heapq.heappop(self._heap)
            if self._at.get(key) == at:
                del self._at[key]
                due.append(key)
        return due

    def _shrink(self) -> None:
        if len(self._heap) > 2 * len(self._at) + SPARE:
            self._heap = [(at, next(self._count), key) for key, at in self._at.items()]
            heapq.heapify(self._heap)
