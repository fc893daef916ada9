"""How a connection gets into the room of an order: permit, join, read, in that order, or an event is lost or leaked."""

from __future__ import annotations

from typing import NamedTuple

from models.errors import RateLimited
from models.event import Event
from models.user import Actor
from server.realtime.connections import Connection
from server.realtime.rooms import Member, Room, Rooms
from server.settings import Settings
from server.snapshots import Picture, Snapshots, view_of


class Entered(NamedTuple):
    """A room that a connection has joined, and what it looked like after that."""

    actor: Actor
    room: Room[Event]
    member: Member
    picture: Picture

    def holds(self, connection: Connection) -> bool:
        """Whether the connection is still in the room as it was permitted to, and the room has all that came since."""
        return (
            self.room.members.get(connection.id) is self.member
            and connection.actor is self.actor
            and self.room.covers(self.picture.seq)
        )


class Entrance:
    """The way into the rooms of one instance."""

    def __init__(self, settings: Settings, rooms: Rooms[Event], snapshots: Snapshots) -> None:
        self._settings = settings
        self._rooms = rooms
        self._snapshots = snapshots

    async def enter(self, connection: Connection, key: str, after: int | None, *, asked: bool = False) -> Entered:
        """Permit, join, then read, in that order. `asked`: by the client, which will be told.

        Raises:
            What permitting refuses; Unsaved: the client is recoverable, and Redis could not be told.
        """
        while True:
            actor = connection.actor
            permitted = await self._snapshots.permit(actor, key, after)
            if asked:
                self.check_subscriptions(connection, key)  # again: others of its calls have joined meanwhile
            room, member = self._rooms.join(connection, key, view_of(actor))
            if asked and connection.recoverable is not None:
                await connection.recoverable.joining(key)
            listening = await self._rooms.listening(room, self._settings.redis_timeout_ms / 1000)
            picture = await self._snapshots.take(room, actor, after, permitted, listening=listening)
            entered = Entered(actor, room, member, picture)
            # else it missed too much, was shut out, or got another token while we read: from the beginning
            if entered.holds(connection):
                return entered

    def check_subscriptions(self, connection: Connection, key: str) -> None:
        """Raises RateLimited: the socket may watch no order besides those that it does."""
        most = self._settings.subscriptions_per_socket_max
        if self._settings.rate_limits == "on" and key not in connection.keys and len(connection.keys) >= most:
            raise RateLimited(f"One socket watches {most} orders at most.", retry_after_ms=1000)
