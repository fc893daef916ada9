"""Connections of clients that opted into recovery: new ones, and those that carry on where an earlier one was lost.

What is kept, and why it is enough, is in server/realtime/recovery.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from models.errors import Refused, Unavailable
from models.event import Event
from server import metrics
from server.auth import Authenticator
from server.entering import Entered, Entrance
from server.realtime.connections import NOTHING_MORE, Connection, Opening, frame
from server.realtime.recovery import Lost, Recoverable, Sessions
from server.realtime.rooms import Rooms
from server.snapshots import Snapshots


class Recoveries:
    """`after(seconds, act)` calls `act` later; `timeout_s` bounds how long one recovery may take."""

    def __init__(
        self,
        sessions: Sessions,
        authenticator: Authenticator,
        entrance: Entrance,
        rooms: Rooms[Event],
        snapshots: Snapshots,
        *,
        after: Callable[[float, Callable[[], None]], None],
        timeout_s: float,
    ) -> None:
        self._sessions = sessions
        self._authenticator = authenticator
        self._entrance = entrance
        self._rooms = rooms
        self._snapshots = snapshots
        self._after = after
        self._timeout_s = timeout_s

    async def open(self, connection: Connection, auth: Mapping[str, Any]) -> Opening:
        """Carry on where the client's earlier connection was lost, or begin a session for it."""
        return await self._recover(connection, auth) or self._begin(connection)

    def _begin(self, connection: Connection) -> Opening:
        connection.recoverable = self._sessions.begin(connection, connection.actor.who)
        if connection.recoverable is None:
            return NOTHING_MORE
        return self._keep(connection, connection.recoverable, NOTHING_MORE.then)

    def _keep(self, connection: Connection, recoverable: Recoverable, then: Callable[[], None]) -> Opening:
        """Keep the session in Redis for as long as the connection lasts, and RECOVERY_KEEP_S longer."""

        def keep() -> None:
            if not connection.gone:
                self._sessions.keep(recoverable.pid)
                self._after(self._sessions.keep_s / 3, keep)

        keep()
        return Opening({"pid": recoverable.pid}, then)

    async def _recover(self, connection: Connection, auth: Mapping[str, Any]) -> Opening | None:
        """Enter all rooms of the session that the client comes back to; None: that cannot be proven to lose nothing."""
        pid = auth.get("pid")
        if not isinstance(pid, str):
            return None
        try:
            marks = await self._sessions.find(pid, auth.get("offset"), connection.actor.who)
            entered = await self._enter_all(connection, marks)
            self._authenticator.check(connection.actor)  # it may have been revoked while we read
        except Lost as lost:
            metrics.recoveries.labels(str(lost)).inc()
            self._rooms.leave_all(connection)
            return None
        except BaseException:
            self._rooms.leave_all(connection)
            raise
        metrics.recoveries.labels("recovered").inc()
        connection.recoverable = Recoverable(self._sessions, connection, pid)

        def resume() -> None:
            for key, (_, room, member, picture) in entered.items():
                member.mark = marks[key]
                self._rooms.settle(room, member, picture.seq, picture.epoch, picture.read)
                self._snapshots.keep(room, picture)
                location = self._snapshots.location(room, picture)
                if location is not None:
                    connection.send_latest(key, frame("orderLocationUpdate", location))

        return self._keep(connection, connection.recoverable, resume)

    async def _enter_all(self, connection: Connection, marks: Mapping[str, int]) -> dict[str, Entered]:
        """Enter all rooms of a session, each with what it missed. Raises Lost: one of them cannot be entered."""
        entered: dict[str, Entered] = {}
        missing = list(marks)
        try:
            async with asyncio.timeout(self._timeout_s):
                while missing:
                    entering = (self._entrance.enter(connection, key, marks[key]) for key in missing)
                    for key, one in zip(missing, await asyncio.gather(*entering, return_exceptions=True), strict=True):
                        if isinstance(one, BaseException):
                            raise one
                        entered[key] = one
                    missing = [key for key, one in entered.items() if not one.holds(connection)]
        except (Unavailable, TimeoutError):
            raise Lost("unavailable") from None
        except Refused:
            raise Lost("refused") from None
        return entered
