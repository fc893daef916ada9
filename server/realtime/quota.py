"""Rates that one process counts in its own memory."""

from __future__ import annotations

ROUNDING_S = 1e-6
"""What floating point may be off by."""


class Quota:
    """A GCRA: `burst` at once, then `per_s`."""

    __slots__ = ("_empty_s", "_interval_s", "_whole_at")

    def __init__(self, per_s: int, burst: int) -> None:
        self._interval_s = 1 / per_s
        self._empty_s = burst / per_s
        self._whole_at = 0.0

    def wait_s(self, now: float) -> float:
        """Time until one more is there; 0: it is."""
        wait_s = self._whole_at + self._interval_s - now - self._empty_s
        return wait_s if wait_s > ROUNDING_S else 0.0

    def take(self, now: float) -> None:
        """Take one, whether it is there or not."""
        self._whole_at = max(self._whole_at, now) + self._interval_s
