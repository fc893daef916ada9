"""Rooms: which connections of this instance watch which key, how far each has got, and what it gets next.

A room delivers numbered entries in order, each once per connection, and only entries that are committed: from the bus
when they come in time, from the table when one is missing. The bus wakes, the table decides. A connection that is
joining is `pending`: it is skipped until its snapshot is on the wire, then it gets what came in between.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import structlog

from models.errors import Unavailable
from server.realtime.bus import Bus
from server.realtime.connections import Connection, Frame

log = structlog.get_logger()

TOPS_MAX = 5_000
"""Most rooms in one look at the table."""


class Numbered(Protocol):
    @property
    def seq(self) -> int: ...


EntryT = TypeVar("EntryT", bound=Numbered)


class Kept(Generic[EntryT]):
    """An entry with its wire forms: one for each view, made when the first member needs it and shared by the others."""

    __slots__ = ("entry", "frames", "listed", "seq")

    def __init__(self, entry: EntryT) -> None:
        self.entry = entry
        self.seq = entry.seq
        self.frames: dict[str, Frame] = {}
        self.listed: dict[str, bytes] | None = None
        """As an item of a list, once a snapshot needed it."""


class Image:
    """What the key looks like right after entry number `seq`, as JSON, in each view that somebody asked for."""

    __slots__ = ("epoch", "seq", "views")

    def __init__(self, seq: int, epoch: int) -> None:
        self.seq = seq
        self.epoch = epoch
        self.views: dict[str, bytes] = {}


class Member:
    """One connection in one room."""

    __slots__ = ("connection", "mark", "owed", "pending", "view")

    def __init__(self, connection: Connection, view: str) -> None:
        self.connection = connection
        self.view = view
        self.pending = True
        self.mark = 0
        """Highest number that this connection was given."""
        self.owed: tuple[int, Frame] | None = None
        """What the connection hears even if it never gets into the room, and its number."""


class Room(Generic[EntryT]):
    """What this instance knows of one key."""

    __slots__ = (
        "early",
        "epoch",
        "heard",
        "image",
        "key",
        "known_at",
        "members",
        "position",
        "position_since",
        "readers",
        "recent",
        "subscribed",
        "top",
        "waiters",
    )

    def __init__(self, key: str, recent_max: int, subscribed: asyncio.Future[bool]) -> None:
        self.key = key
        self.members: dict[str, Member] = {}
        self.waiters: set[asyncio.Future[None]] = set()
        self.subscribed = subscribed
        self.top: int | None = None
        """Number of the last entry that was delivered; None until the first snapshot was read."""
        self.heard = 0
        """Highest number that anybody spoke of. Above `top`: something is missing."""
        self.recent: deque[Kept[EntryT]] = deque(maxlen=recent_max)
        self.epoch = 0
        """Positions of any other epoch are not shown; 0: none are."""
        self.known_at = 0
        """Number of the entry, or of the snapshot, that `epoch` was learnt from."""
        self.position: tuple[float, bytes] | None = None
        """ts and payload of the newest position of this epoch."""
        self.position_since = -1
        """`Rooms.bus_changes` when `position` was known to be the newest there is. It is as long as that number stays:
        the bus has told of every newer one."""
        self.readers: tuple[list[Callable[[bytes], object]], list[Connection]] | None = None
        """Who gets a position: the writes of those that keep up, and the others. None: to be made again. Walking
        through members, connections and sessions costs more than it seems, because the kernel's work for each
        write has driven them out of the processor's caches."""
        self.image: Image | None = None
        """Made by a snapshot that ended at `top`; the next entry ends it."""
        self.early: tuple[int, float, str, bytes] | None = None
        """A position whose epoch has not begun here yet."""

    def learn_epoch(self, epoch: int, known_at: int) -> None:
        if known_at < self.known_at:
            return
        self.known_at = known_at
        if epoch != self.epoch:
            self.epoch, self.position = epoch, None

    def find_readers(self) -> tuple[list[Callable[[bytes], object]], list[Connection]]:
        """Make `readers`."""
        connections = [member.connection for member in self.members.values() if not member.pending]
        self.readers = (
            [connection.write for connection in connections if connection.write is not None],
            [connection for connection in connections if connection.write is None],
        )
        return self.readers

    def recall(self, entries: Sequence[EntryT]) -> None:
        """Entries up to the top were read: keep them, or the newest of them, if that is more than is in memory."""
        assert self.recent.maxlen is not None
        if min(len(entries), self.recent.maxlen) > len(self.recent):
            self.recent.clear()
            self.recent.extend(map(Kept, entries))

    def covers(self, seq: int) -> bool:
        """Whether all entries between `seq` and the top are still in memory."""
        return self.top is None or self.top <= seq or (bool(self.recent) and self.recent[0].seq <= seq + 1)


class Rooms(Generic[EntryT]):
    """All rooms of this instance.

    `frame_of(entry, view)` makes the wire form that members of a view share. `on_entry(room, entry)` is called before
    an entry is delivered and may close memberships. `read_missed(tops)` reads the table: for each key, what is above
    its top.
    """

    def __init__(
        self,
        bus: Bus,
        *,
        channel_of: Callable[[str], str],
        frame_of: Callable[[EntryT, str], Frame],
        position_frame_of: Callable[[bytes], Frame],
        on_entry: Callable[[Room[EntryT], EntryT], None],
        read_missed: Callable[[Mapping[str, int]], Awaitable[Mapping[str, Sequence[EntryT]]]],
        recent_max: int,
        gap_check_s: float,
        fallback_poll_s: float,
    ) -> None:
        self._bus = bus
        self._channel_of = channel_of
        self._frame_of = frame_of
        self._position_frame_of = position_frame_of
        self._on_entry = on_entry
        self._read_missed = read_missed
        self._recent_max = recent_max
        self._gap_check_s = gap_check_s
        self._fallback_poll_s = fallback_poll_s
        self._rooms: dict[str, Room[EntryT]] = {}
        self._holes: set[str] = set()
        self._wake = asyncio.Event()
        self._check_all = False
        self.bus_changes = 0
        """How often the bus was lost or came back."""
        self.closing = False
        self.on_members: Callable[[str], None] | None = None
        """Called with the key of a room whose members have come or gone."""

    def __len__(self) -> int:
        return len(self._rooms)

    def get(self, key: str) -> Room[EntryT] | None:
        return self._rooms.get(key)

    def members(self, key: str) -> int:
        """How many connections are in this room."""
        room = self._rooms.get(key)
        return len(room.members) if room is not None else 0

    def watched(self) -> list[str]:
        """The keys of all rooms with a member."""
        return [key for key, room in self._rooms.items() if room.members]

    # joining and leaving

    def join(self, connection: Connection, key: str, view: str) -> tuple[Room[EntryT], Member]:
        """Add the connection, pending. A member that joins again is pending until its new snapshot is on the wire."""
        room = self._open(key)
        member = room.members.get(connection.id)
        if member is None:
            member = room.members[connection.id] = Member(connection, view)
            connection.keys.add(key)
            connection.on_rewire = self._forget_readers
            self._members_changed(key)
        member.pending = True
        room.readers = None
        return room, member

    def _forget_readers(self, connection: Connection) -> None:
        for key in connection.keys:
            room = self._rooms.get(key)
            if room is not None:
                room.readers = None

    async def listening(self, room: Room[EntryT], timeout_s: float) -> bool:
        """Wait until the bus confirmed the room's channel, or until it is clear that the table must be read instead;
        whether it did."""
        if room.subscribed.done() and not room.subscribed.result():
            room.subscribed = self._subscribe(room.key)  # Redis was away when the room was opened
        if not room.subscribed.done():
            await asyncio.wait((room.subscribed,), timeout=timeout_s)
        return room.subscribed.done() and room.subscribed.result()

    def settle(self, room: Room[EntryT], member: Member, seq: int, epoch: int, missed: Iterable[EntryT] = ()) -> None:
        """The member's snapshot, which ends at `seq`, has just been put on the wire: give it what came since. A member
        that is recovered gets no snapshot, but what it `missed` up to `seq`.
        """
        if room.top is None:
            room.top = seq
        room.learn_epoch(epoch, seq)
        member.pending = False
        room.readers = None
        member.owed = None  # it is in the snapshot, or the room has it
        for entry in missed:
            self._give(room, member, Kept(entry))
        member.mark = max(member.mark, seq)
        for kept in room.recent:
            self._give(room, member, kept)
        self._show_early(room)
        if room.heard > room.top:
            self._missing(room.key)

    def leave(self, connection: Connection, key: str) -> None:
        connection.keys.discard(key)
        room = self._rooms.get(key)
        member = room.members.pop(connection.id, None) if room is not None else None
        if room is None or member is None:
            return
        room.readers = None
        if member.owed is not None and member.mark < member.owed[0]:
            connection.send(member.owed[1])
        self._members_changed(key)
        self._close_if_empty(room)

    def _members_changed(self, key: str) -> None:
        if self.on_members is not None:
            self.on_members(key)

    def member(self, connection: Connection, key: str) -> Member | None:
        room = self._rooms.get(key)
        return room.members.get(connection.id) if room is not None else None

    def leave_all(self, connection: Connection) -> None:
        for key in list(connection.keys):
            self.leave(connection, key)

    async def wait(self, key: str, look: Callable[[], Awaitable[tuple[bool, int]]], timeout_s: float) -> None:
        """Look, and look again whenever something happens to `key`, until `look` says that it has seen enough, or
        until `timeout_s` is over or the instance drains. `look` returns (enough, top).
        """
        room = self._open(key)
        here = asyncio.get_running_loop().create_future()
        room.waiters.add(here)  # or the room ends when its members leave before the first look
        try:
            async with asyncio.timeout(timeout_s):
                await self.listening(room, timeout_s)
                while not self.closing:
                    something = asyncio.get_running_loop().create_future()
                    room.waiters.add(something)
                    try:
                        enough, top = await look()
                        if room.top is None:
                            room.top = top
                        if enough or self.closing:
                            return
                        await something
                    finally:
                        room.waiters.discard(something)
        except TimeoutError:
            return
        finally:
            room.waiters.discard(here)
            self._close_if_empty(room)

    def close(self) -> None:
        """Drain: whoever waits for something gets what there is."""
        self.closing = True
        for room in self._rooms.values():
            _wake_all(room)

    def _open(self, key: str) -> Room[EntryT]:
        room = self._rooms.get(key)
        if room is None:
            room = self._rooms[key] = Room(key, self._recent_max, self._subscribe(key))
        return room

    def _subscribe(self, key: str) -> asyncio.Future[bool]:
        return asyncio.ensure_future(self._bus.subscribe(self._channel_of(key)))

    def _close_if_empty(self, room: Room[EntryT]) -> None:
        if not room.members and not room.waiters and self._rooms.get(room.key) is room:
            del self._rooms[room.key]
            self._holes.discard(room.key)
            self._bus.unsubscribe(self._channel_of(room.key))

    # delivering

    def hear(self, key: str, entries: Iterable[EntryT]) -> None:
        """Committed entries of `key` have arrived, oldest first; they may be repeats, or come after a hole."""
        room = self._rooms.get(key)
        if room is None:
            return
        for entry in entries:
            room.heard = max(room.heard, entry.seq)
            if room.top is not None and entry.seq == room.top + 1:
                self._deliver(room, entry)
        if room.top is None:
            _wake_all(room)
        elif room.heard > room.top:
            self._missing(key)

    def hear_position(self, key: str, epoch: int, ts: float, origin: str, payload: bytes) -> None:
        """A position has arrived; `origin` is the connection that it came from."""
        room = self._rooms.get(key)
        if room is None:
            return
        if epoch != room.epoch:
            if epoch > room.known_at and (room.early is None or (epoch, ts) > room.early[:2]):
                room.early = (epoch, ts, origin, payload)
            return
        if room.position is not None and room.position[0] >= ts:
            return
        room.position = (ts, payload)
        frame = self._position_frame_of(payload)
        if origin in room.members:
            for member in room.members.values():
                if not member.pending and member.connection.id != origin:
                    member.connection.send_latest(key, frame)
            return
        writes, others = room.readers or room.find_readers()
        wire = frame.wire
        for write in writes:
            write(wire)
        for connection in others:
            connection.send_latest(key, frame)

    def _deliver(self, room: Room[EntryT], entry: EntryT) -> None:
        room.top = entry.seq
        room.image = None
        kept = Kept(entry)
        room.recent.append(kept)
        self._on_entry(room, entry)
        for member in room.members.values():
            self._give(room, member, kept)
        _wake_all(room)
        self._show_early(room)

    def _show_early(self, room: Room[EntryT]) -> None:
        if room.early is not None and room.early[0] == room.epoch:
            early, room.early = room.early, None
            self.hear_position(room.key, *early)

    def _give(self, room: Room[EntryT], member: Member, kept: Kept[EntryT]) -> None:
        if member.pending or member.mark >= kept.seq:
            return
        member.mark = kept.seq
        message = kept.frames.get(member.view)
        if message is None:
            message = kept.frames[member.view] = self._frame_of(kept.entry, member.view)
        connection = member.connection
        if connection.recoverable is not None:
            message = connection.recoverable.stamp(room.key, kept.seq, message)
        connection.send(message)

    # finding what is missing

    def _missing(self, key: str) -> None:
        self._holes.add(key)
        self._wake.set()

    def check_all(self) -> None:
        """Compare every room with the table now: the bus was away, or is."""
        self.bus_changes += 1
        self._check_all = True
        self._wake.set()

    async def run(self) -> None:
        """Fill holes as they are noticed, and look at the tops of all rooms every now and then, until cancelled.

        The last lost message has no successor to reveal it: only looking finds it.
        """
        while True:
            # `_check_all` still stands when the last look failed: a hole does not wait for the clock then
            well = self._bus.up and not self._check_all
            interval_s = self._gap_check_s if well else self._fallback_poll_s
            try:
                async with asyncio.timeout(interval_s):
                    await self._wake.wait()
            except TimeoutError:
                self._check_all = True
            self._wake.clear()  # before looking, or what comes while we look is slept over
            keys = list(self._rooms) if self._check_all else list(self._holes)
            self._check_all = False
            self._holes.clear()
            try:
                for start in range(0, len(keys), TOPS_MAX):
                    await self._catch_up(keys[start : start + TOPS_MAX])
            except Unavailable:
                self._check_all = True  # Postgres is away
            except Exception:
                log.exception("catch_up_failed")
                self._check_all = True

    async def _catch_up(self, keys: Sequence[str]) -> None:
        tops = {key: room.top for key in keys if (room := self._rooms.get(key)) and room.top is not None}
        if not tops:
            return
        for key, entries in (await self._read_missed(tops)).items():
            self.hear(key, entries)


def _wake_all(room: Room[EntryT]) -> None:
    for waiter in room.waiters:
        if not waiter.done():
            waiter.set_result(None)
