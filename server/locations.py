"""What agents push: permitted once per (agent, order) by the database, judged against the last one, then to the bus.

What is known of an (agent, order) is remembered: until Redis says that the assignment has ended, until the agent is
told of a new one, or until the bus was lost. A refusal is also forgotten after `ASSIGNMENT_REFUSAL_S`, for agents
that have no socket here.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import msgspec

from handlers import tracking
from models.errors import Refused, Unavailable
from models.position import Limits, Pace, Place, Position, Track, distance_m, shown
from models.user import Actor, Role
from server import metrics
from server.db import Database
from server.realtime.bus import Bus
from server.realtime.link import BusAway
from server.realtime.positions import CLOSED, PositionLane
from server.settings import Settings
from server.workers.trail import Trail

Key = tuple[str, str]
"""(agent, order)."""

_decode_position = msgspec.json.Decoder(Position).decode


class _Assignment:
    """An agent's current assignment to an order, and the positions that it was judged by here."""

    __slots__ = ("destination", "number", "track", "watched")

    def __init__(self, number: int, destination: Place | None, newest: Position | None) -> None:
        self.number = number
        self.destination = destination
        self.track = Track(newest)
        self.watched: bool | None = None
        """Whether somebody heard the last position that was shown; None: not known yet."""

    def learn(self, reply: object) -> None:
        """From the reply of SHOW: how many instances listened, which costs nobody a question."""
        if isinstance(reply, int) and reply >= 0:
            self.watched = reply > 0

    def left_m(self) -> float | None:
        """Distance to the destination."""
        newest = self.track.newest
        return distance_m(newest, self.destination) if newest is not None and self.destination is not None else None


class _Refusal:
    __slots__ = ("refusal", "until")

    def __init__(self, refusal: Refused, until: float) -> None:
        self.refusal = refusal
        self.until = until
        """Monotonic time."""


class Locations:
    """The agents' side of the positions lane."""

    def __init__(self, settings: Settings, database: Database, bus: Bus, lane: PositionLane, trail: Trail) -> None:
        self._database = database
        self._bus = bus
        self._lane = lane
        self._trail = trail
        self._timeout_s = settings.redis_timeout_ms / 1000
        self._remembered_max = settings.assignment_cache_max
        self._refusal_s = settings.assignment_refusal_s
        self._limits = Limits(
            accuracy_max_m=settings.location_accuracy_max_m,
            age_max_ms=settings.location_max_age_ms,
            future_max_ms=settings.location_future_max_ms,
            speed_max_mps=settings.location_speed_max_mps,
            jump_slack_m=settings.location_jump_slack_m,
            jump_confirm_ms=settings.location_jump_confirm_ms,
        )
        self._pace = Pace(
            normal_ms=settings.location_next_interval_ms,
            near_ms=settings.location_next_interval_near_ms,
            unwatched_ms=settings.location_next_interval_unwatched_ms,
            near_m=settings.location_near_m,
        )
        self._known: OrderedDict[Key, _Assignment | _Refusal] = OrderedDict()

    def accept_at_once(self, actor: Actor, order_id: str, position: Position, origin: str) -> bool:
        """Show the position if this agent's assignment is remembered, and wait for nothing. False: ask `accept`.

        Raises:
            What is refused; Unavailable: Redis is away, so positions pause.
        """
        assignment = self._remembered(actor, order_id)
        if assignment is None:
            return False
        if self._judge(assignment, order_id, position):

            def answer(reply: object) -> None:
                if reply == CLOSED:
                    self.forget(actor.sub, order_id)

            self._show(order_id, assignment, position, origin, answer)
        return True

    async def accept(
        self, actor: Actor, order_id: str, positions: Sequence[Position], origin: str
    ) -> list[Refused | None]:
        """Take positions of the order's agent; the newest is shown to its watchers, but not to the connection `origin`.

        Returns when Redis has taken it: for each position None, or why it was refused.

        Raises:
            Forbidden, NotFound, OrderClosed; Unavailable: Postgres or Redis is away.
        """
        assignment = self._remembered(actor, order_id) or await self._find(actor, order_id)
        refused: list[Refused | None] = [None] * len(positions)
        newest: Position | None = None
        now_ms = time.time() * 1000
        for index in sorted(range(len(positions)), key=lambda index: positions[index].ts):
            try:
                if self._judge(assignment, order_id, positions[index], now_ms):
                    newest = positions[index]
            except Refused as refusal:
                refused[index] = refusal
        if newest is not None:
            if await self._shown(order_id, assignment, newest, origin) == CLOSED:
                self.forget(actor.sub, order_id)
                assignment = await self._find(actor, order_id)
                await self._shown(order_id, assignment, newest, origin)
        return refused

    def next_interval_ms(self, agent_id: str, order_id: str) -> int:
        """The pause that this agent is asked to keep before its next position of the order."""
        known = self._known.get((agent_id, order_id))
        if not isinstance(known, _Assignment):
            return self._pace.normal_ms
        return self._pace.next_interval_ms(known.watched, known.left_m())

    def forget(self, agent_id: str, order_id: str) -> None:
        self._known.pop((agent_id, order_id), None)

    def forget_all(self) -> None:
        """The bus was away: what it said meanwhile was not heard."""
        self._known.clear()

    def _remembered(self, actor: Actor, order_id: str) -> _Assignment | None:
        known = self._known.get((actor.sub, order_id))
        if known is None or actor.role is not Role.AGENT or not actor.reaches(order_id):
            return None
        if isinstance(known, _Assignment):
            return known
        if time.monotonic() >= known.until:
            return None
        metrics.positions.labels(known.refusal.code).inc()
        raise type(known.refusal)(known.refusal.detail)

    async def _find(self, actor: Actor, order_id: str) -> _Assignment:
        """Ask the database who is assigned, and Redis where the agent was last."""
        try:
            async with self._database.statement() as tx:
                number, destination = await tracking.assignment(tx, actor, order_id)
        except Unavailable:
            raise
        except Refused as refusal:
            metrics.positions.labels(refusal.code).inc()
            if actor.role is Role.AGENT and actor.reaches(order_id):
                self._remember((actor.sub, order_id), _Refusal(refusal, time.monotonic() + self._refusal_s))
            raise
        try:
            last = await self._lane.known(order_id)
        except BusAway:
            last = None
        newest = _decode_position(last.payload) if last is not None and last.assignment == number else None
        assignment = _Assignment(number, destination, newest)
        self._remember((actor.sub, order_id), assignment)
        return assignment

    def _judge(self, assignment: _Assignment, order_id: str, position: Position, now_ms: float | None = None) -> bool:
        """Whether the position is to be shown. What is not refused goes to the trail."""
        try:
            newest = assignment.track.judge(position, now_ms or time.time() * 1000, self._limits)
        except Refused as refusal:
            metrics.positions.labels(refusal.code).inc()
            raise
        self._trail.add(order_id, assignment.number, position)
        metrics.positions.labels("newest" if newest else "history").inc()
        return newest

    async def _shown(self, order_id: str, assignment: _Assignment, position: Position, origin: str) -> object:
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()

        def answer(reply: object) -> None:
            if not future.done():
                future.set_result(reply)

        self._show(order_id, assignment, position, origin, answer)
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await future
        except TimeoutError:
            raise Unavailable("Positions pause while Redis is away.") from None
        if isinstance(reply, Exception):
            raise Unavailable("Positions pause while Redis is away.")
        return reply

    def _show(
        self,
        order_id: str,
        assignment: _Assignment,
        position: Position,
        origin: str,
        answer: Callable[[object], None],
    ) -> None:
        if not self._bus.up:
            metrics.positions.labels("unavailable").inc()
            raise Unavailable("Positions pause while Redis is away.")

        def learn(reply: object) -> None:
            assignment.learn(reply)
            answer(reply)

        self._lane.show(order_id, assignment.number, position.ts, shown(order_id, position), origin, learn)

    def _remember(self, key: Key, known: _Assignment | _Refusal) -> None:
        self._known[key] = known
        if len(self._known) > self._remembered_max:
            self._known.popitem(last=False)
