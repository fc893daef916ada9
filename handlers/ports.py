"""What verbs need of the world outside Postgres. Adapters in ring 3 fulfil these protocols."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Closing(NamedTuple):
    """Of this order, the positions of this assignment and of earlier ones are not to be shown any more."""

    order_id: str
    assignment: int


class Positions(Protocol):
    """The positions lane of the bus."""

    async def close(self, order_id: str, assignment: int) -> None:
        """Let no position of this assignment, or of an earlier one, be shown from now on.

        Returns within `REDIS_TIMEOUT_MS` whether or not Redis answers: while Redis is away no position is shown at all.
        """
        ...
