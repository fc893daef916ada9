"""Sending the clients of an instance elsewhere: all are told first, then they leave in batches, in no order.

Clients whose transports all end in one instant come back in one instant, and what is left of the fleet has to take them
all at once. Few clients leave at once: there is nothing to spread.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import NamedTuple

from models.message import ServerDraining
from server import metrics
from server.realtime.connections import Connection

BATCH_PAUSE_MS = 100
"""Pause between two batches."""

RETRY_IN_MS = 1000
"""What a client is asked to wait after its transport has ended."""


class Batch(NamedTuple):
    """How many leave, and when, counted from the beginning."""

    size: int
    after_ms: int


def plan(count: int, batch_max: int, spread_ms: int) -> list[Batch]:
    """Batches of `batch_max` at a steady pace; when that would take longer than `spread_ms`, larger ones."""
    if count == 0:
        return []
    most = spread_ms // BATCH_PAUSE_MS + 1
    batches = min(-(-count // batch_max), most)
    ends = [count * (number + 1) // batches for number in range(batches)]
    return [
        Batch(end - start, number * BATCH_PAUSE_MS)
        for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]


async def send_away(connections: Sequence[Connection], batch_max: int, spread_ms: int) -> None:
    """Tell all these clients that the instance stops, then end their transports; returns when the last one was asked to
    go. Each is told to come back when its batch has left, so those that obey are spread too."""
    shuffled = random.sample(connections, len(connections))
    batches: list[tuple[int, list[Connection]]] = []
    for size, after_ms in plan(len(shuffled), batch_max, spread_ms):
        batches.append((after_ms, shuffled[:size]))
        del shuffled[:size]
    for after_ms, batch in batches:
        for connection in batch:
            connection.emit("serverDraining", ServerDraining(retry_in_ms=after_ms + RETRY_IN_MS))
        await asyncio.sleep(0)
    began = asyncio.get_running_loop().time()
    for after_ms, batch in batches:
        staying = [connection for connection in batch if not connection.gone]
        if staying:
            await asyncio.sleep(max(began + after_ms / 1000 - asyncio.get_running_loop().time(), 0))
        for connection in staying:
            metrics.drained.inc()
            connection.hang_up()
