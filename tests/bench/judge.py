"""Did every watcher get exactly what the table says? Each event once, in the order of its numbers, none missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Event(NamedTuple):
    """What an event is known by, in the table and at a watcher."""

    seq: int
    type: str
    status: str
    """Empty for events that carry none."""


def heard_in(text: str) -> list[tuple[str, list[Event]]]:
    """Order and events of each watcher, from what the load generator wrote down."""
    watchers = []
    for line in text.splitlines():
        order, *events = line.split(" ")
        parts = (event.split(":") for event in events)
        watchers.append((order, [Event(int(seq), type_, status) for seq, type_, status in parts]))
    return watchers


def faults(table: Mapping[str, Sequence[Event]], watchers: Sequence[tuple[str, Sequence[Event]]]) -> list[str]:
    """One sentence for each watcher whose list is not the one of the table."""
    return [
        f"watcher {number} of order {order}: {_difference(table[order], heard)}"
        for number, (order, heard) in enumerate(watchers)
        if list(heard) != list(table[order])
    ]


def _difference(wanted: Sequence[Event], heard: Sequence[Event]) -> str:
    wanted_seqs, heard_seqs = [one.seq for one in wanted], [one.seq for one in heard]
    if lost := sorted(set(wanted_seqs) - set(heard_seqs)):
        return f"lost {_few(lost)}"
    if repeated := sorted({seq for seq in heard_seqs if heard_seqs.count(seq) > 1}):
        return f"repeated {_few(repeated)}"
    if invented := sorted(set(heard_seqs) - set(wanted_seqs)):
        return f"not in the table: {_few(invented)}"
    if heard_seqs != wanted_seqs:
        return f"out of order: {_few(heard_seqs)}"
    return "other events under the same numbers"


def _few(seqs: Sequence[int]) -> str:
    return ", ".join(map(str, seqs[:10])) + (" …" if len(seqs) > 10 else "")
