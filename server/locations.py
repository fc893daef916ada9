"""What agents push: judged once per (agent, order) by the database, then straight to the bus.

The answer, yes or no, is remembered: until Redis says that the assignment has ended, until the agent is told of a new
one, or until the bus was lost. A no is also forgotten after `ASSIGNMENT_REFUSAL_S`, for agents that have no socket
here.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable

from handlers import tracking
from models.errors import Refused, Unavailable
from models.position import Position, shown
from models.user import Actor, Role
from server import metrics
from server.db import Database
from server.realtime.bus import Bus
from server.realtime.positions import CLOSED, PositionLane

Key = tuple[str, str]
"""(agent, order)."""


class Locations:
    """The agents' side of the positions lane."""

    def __init__(
        self,
        database: Database,
        bus: Bus,
        lane: PositionLane,
        *,
        timeout_s: float,
        remembered_max: int,
        refusal_s: float,
    ) -> None:
        self._database = database
        self._bus = bus
        self._lane = lane
        self._timeout_s = timeout_s
        self._remembered_max = remembered_max
        self._refusal_s = refusal_s
        self._answers: OrderedDict[Key, int | tuple[Refused, float]] = OrderedDict()

    def accept_at_once(self, actor: Actor, order_id: str, position: Position, origin: str) -> bool:
        """Show the position if this agent's assignment is remembered, and wait for nothing. False: ask `accept`.

        Raises:
            What was refused before; Unavailable: Redis is away, so positions pause.
        """
        number = self._remembered(actor, order_id)
        if number is None:
            return False

        def answer(reply: object) -> None:
            if reply == CLOSED:
                self.forget(actor.sub, order_id)

        self._show(order_id, number, position, origin, answer)
        return True

    async def accept(self, actor: Actor, order_id: str, position: Position, origin: str) -> None:
        """Show a position of the order's agent to its watchers, but not to the connection `origin`.

        Returns when Redis has taken it; one that is not the newest is taken, and not shown.

        Raises:
            Forbidden, NotFound, OrderClosed; Unavailable: Postgres or Redis is away.
        """
        number = self._remembered(actor, order_id)
        if number is not None and await self._shown(order_id, number, position, origin) != CLOSED:
            return
        key = (actor.sub, order_id)
        try:
            async with self._database.statement() as tx:
                number = await tracking.assignment(tx, actor, order_id)
        except Unavailable:
            raise
        except Refused as refusal:
            metrics.positions.labels(refusal.code).inc()
            if actor.reaches(order_id):
                self._remember(key, (refusal, time.monotonic() + self._refusal_s))
            raise
        self._remember(key, number)
        await self._shown(order_id, number, position, origin)

    def _remembered(self, actor: Actor, order_id: str) -> int | None:
        answer = self._answers.get((actor.sub, order_id))
        if answer is None or actor.role is not Role.AGENT or not actor.reaches(order_id):
            return None
        if isinstance(answer, int):
            return answer
        refusal, until = answer
        if time.monotonic() >= until:
            return None
        metrics.positions.labels(refusal.code).inc()
        raise type(refusal)(refusal.detail)

    async def _shown(self, order_id: str, number: int, position: Position, origin: str) -> object:
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()

        def answer(reply: object) -> None:
            if not future.done():
                future.set_result(reply)

        self._show(order_id, number, position, origin, answer)
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await future
        except TimeoutError:
            raise Unavailable("Positions pause while Redis is away.") from None
        if isinstance(reply, Exception):
            raise Unavailable("Positions pause while Redis is away.")
        return reply

    def forget(self, agent_id: str, order_id: str) -> None:
        self._answers.pop((agent_id, order_id), None)

    def forget_all(self) -> None:
        """The bus was away: what it said meanwhile was not heard."""
        self._answers.clear()

    def _show(
        self, order_id: str, number: int, position: Position, origin: str, answer: Callable[[object], None]
    ) -> None:
        if not self._bus.up:
            metrics.positions.labels("unavailable").inc()
            raise Unavailable("Positions pause while Redis is away.")
        metrics.positions.labels("accepted").inc()
        self._lane.show(order_id, number, position.ts, shown(order_id, position), origin, answer)

    def _remember(self, key: Key, answer: int | tuple[Refused, float]) -> None:
        self._answers[key] = answer
        if len(self._answers) > self._remembered_max:
            self._answers.popitem(last=False)
