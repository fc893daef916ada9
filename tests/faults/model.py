"""The model that knows the right answer: what an order's moves must have written, and a watcher must have heard."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from models.event import Type
from models.order import Status

Heard = dict[str, list[tuple[str, dict[str, Any]]]]
"""(type, payload) of the events of each order, as they came."""

WAY = [Status.CONFIRMED, Status.PREPARING, Status.READY, Status.OUT_FOR_DELIVERY]
"""From `pending`; from there on the courier fails and sets out again, without end."""
AGENTS = ["asha", "bela", "chen", None]


class Move(NamedTuple):
    """One request of the shop's backend: below /orders/{id}."""

    path: str
    body: dict[str, Any]


class Story:
    """What happens to one order. `written` is what the table must hold: (type, the status or the agent)."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._moves = 0
        self._agent: str | None = None
        self.written: list[tuple[str, str | None]] = [(Type.STATUS, Status.PENDING)]

    def next_move(self) -> Move:
        """A legal move; it counts as made."""
        if self._rng.random() < 0.5:
            self._agent = self._rng.choice([agent for agent in AGENTS if agent != self._agent])
            self.written.append((Type.ASSIGNED, self._agent))
            return Move("assign", {"agentId": self._agent})
        turns = self._moves - len(WAY)
        status = WAY[self._moves] if turns < 0 else (Status.DELIVERY_FAILED, Status.OUT_FOR_DELIVERY)[turns % 2]
        self._moves += 1
        self.written.append((Type.STATUS, status))
        if status is Status.OUT_FOR_DELIVERY:
            self.written.append((Type.OUT_FOR_DELIVERY, None))
        return Move("status", {"status": status})


def told(name: str, data: dict[str, Any]) -> tuple[str, str | None]:
    """An event as the story writes it."""
    return name, data["status"] if name == Type.STATUS else (data.get("agent") or {}).get("id")


def difference(wanted: Sequence[tuple[str, Any]], heard: Sequence[tuple[str, Any]]) -> str | None:
    """The first place where what was heard is not what was wanted, for a person; None: they are the same.

    Both are (type, payload); only payloads have a number.
    """
    for place, (want, got) in enumerate(zip(wanted, heard, strict=False)):
        if want != got:
            return f"at place {place + 1} wanted {_shown(want)}, heard {_shown(got)}"
    if len(heard) < len(wanted):
        return (
            f"lost {len(wanted) - len(heard)} at the end: after {len(heard)} events wanted {_shown(wanted[len(heard)])}"
        )
    if len(heard) > len(wanted):
        return f"heard {len(heard) - len(wanted)} more than there are: {_shown(heard[len(wanted)])}"
    return None


def _shown(event: tuple[str, Any]) -> str:
    name, data = event
    return f"{data['seq']} {name}" if isinstance(data, dict) and "seq" in data else f"{name} {data}"
