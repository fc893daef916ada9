"""Work that comes in thousands at once, and deadlines that do."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import structlog

log = structlog.get_logger()

SLICE_S = 0.005
"""How long the loop is kept from everything else."""

LATE_S = 0.1
"""A turn that is later than this was kept waiting: what it starts has its full time from now."""


class Backlog:
    """Small jobs, done in their order, in slices between which everything else has its turn."""

    def __init__(self) -> None:
        self._jobs: deque[Callable[[], None]] = deque()
        self._working = False

    def add(self, job: Callable[[], None]) -> None:
        self._jobs.append(job)
        if not self._working:
            self._working = True
            asyncio.get_running_loop().call_soon(self._work)

    def _work(self) -> None:
        end = time.perf_counter() + SLICE_S  # the loop's own clock may stand still meanwhile
        while self._jobs:
            try:
                self._jobs.popleft()()
            except Exception:
                log.exception("backlog_job_failed")
            if time.perf_counter() >= end:
                asyncio.get_running_loop().call_soon(self._work)
                return
        self._working = False


class Wheel:
    """Deadlines of all sessions, one timer for all that fall into the same slot of time: a second is precise enough,
    and an entry in a list cheaper than a timer."""

    def __init__(self, backlog: Backlog, slot_s: float = 1.0) -> None:
        self._backlog = backlog
        self._slot_s = slot_s
        self._slots: dict[int, list[Callable[[], None]]] = {}
        self._due = -math.inf

    def now(self) -> float:
        """The loop's time; in a turn that came only a little late, when it was due, so that what repeats stays in
        step."""
        now = asyncio.get_running_loop().time()
        return self._due if now - self._due < LATE_S else now

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        """Call `act` when `seconds` from `now()`, or up to a slot more, have passed."""
        slot = math.ceil(round((self.now() + seconds) / self._slot_s, 3))
        acts = self._slots.get(slot)
        if acts is None:
            acts = self._slots[slot] = []
            asyncio.get_running_loop().call_at(slot * self._slot_s, self._turn, slot)
        acts.append(act)

    def _turn(self, slot: int) -> None:
        for act in self._slots.pop(slot):
            self._backlog.add(partial(self._act, slot * self._slot_s, act))

    def _act(self, due: float, act: Callable[[], None]) -> None:
        self._due = due
        try:
            act()
        finally:
            self._due = -math.inf
