"""Rooms: every settled member gets each number above its mark once and in order, whatever the bus does."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from models.errors import Unavailable
from models.event import Event, Type, event
from models.user import Actor, Role
from server.auth import Revocations
from server.realtime.bus import Bus
from server.realtime.connections import Connection, Frame, frame
from server.realtime.rooms import Room, Rooms
from server.settings import Settings
from server.sockets import Sockets
from tests.harness import until

KEY = "order-1"
SOMEBODY = Actor(sub="c1", role=Role.CUSTOMER, exp=2e9)
NEVER_S = 3600.0


class Entry(NamedTuple):
    """One row of the table. `epoch`: of the positions that begin with it, 0 for none; None: it changes nothing."""

    seq: int
    epoch: int | None = None


class Wire:
    """The way to a client: what was put on the wire and not yet read."""

    gone = False

    def __init__(self) -> None:
        self.sent: deque[Frame] = deque()
        self.written: list[bytes] = []
        """What was put on the transport past `send_latest`."""
        self.keeps_up = False

    @property
    def direct(self) -> Callable[[bytes], object] | None:
        return self.written.append if self.keeps_up else None

    def send_frame(self, message: Frame) -> None:
        self.sent.append(message)

    def send_latest(self, key: str, message: Frame) -> None:
        self.sent.append(message)

    def hold(self, why: int = 1) -> None: ...

    def resume(self, why: int = 1) -> None: ...

    def when_received(self, callback: Any) -> None: ...

    def hang_up(self) -> None: ...


class Client:
    """A connection of this instance, and what it reads."""

    def __init__(self, name: str, view: str = "full") -> None:
        self.name, self.view, self.wire = name, view, Wire()
        self.connection = Connection(name, self.wire, SOMEBODY)

    def frames(self) -> list[Frame]:
        found = list(self.wire.sent)
        self.wire.sent.clear()
        return found

    def read(self) -> list[tuple[str, Any]]:
        """(event, payload) of everything new."""
        return [tuple(json.loads(one.text.lstrip("0123456789"))) for one in self.frames()]

    def seqs(self) -> list[int]:
        read = self.read()
        assert all(name == "entry" and payload["view"] == self.view for name, payload in read), read
        return [payload["seq"] for _, payload in read]

    def positions(self) -> list[int]:
        return [payload["ts"] for name, payload in self.read() if name == "position"]


class FakeBus:
    """Redis as rooms see it: it confirms at once, unless it is told to let them wait."""

    def __init__(self) -> None:
        self.up = True
        self.channels: list[str] = []
        self.confirmation: asyncio.Future[bool] | None = None

    def subscribe(self, channel: str) -> asyncio.Future[bool]:
        self.channels.append(channel)
        if self.confirmation is not None:
            return self.confirmation
        confirmed = asyncio.get_running_loop().create_future()
        confirmed.set_result(self.up)
        return confirmed

    def unsubscribe(self, channel: str) -> None:
        self.channels.remove(channel)


class House:
    """Rooms on a bus and a table of plain objects."""

    def __init__(self, recent_max: int = 64, gap_check_s: float = NEVER_S, poll_s: float = NEVER_S) -> None:
        self.table: dict[str, list[Entry]] = {KEY: []}
        self.bus = FakeBus()
        self.looks: list[set[str]] = []
        self.gate: asyncio.Future[None] | None = None
        """What the next look at the table waits for, after it has read and before it answers."""
        self.fault: Exception | None = None
        self.expelled: dict[int, Client] = {}
        """Whose membership an entry ends."""
        self.rooms: Rooms[Entry] = Rooms(
            cast(Bus, self.bus),
            channel_of=lambda key: f"channel:{key}",
            frame_of=lambda entry, view: frame("entry", json.dumps({"seq": entry.seq, "view": view}).encode()),
            position_frame_of=lambda payload: frame("position", payload),
            on_entry=self._on_entry,
            read_missed=self._read_missed,
            recent_max=recent_max,
            gap_check_s=gap_check_s,
            fallback_poll_s=poll_s,
        )

    def _on_entry(self, room: Room[Entry], entry: Entry) -> None:
        if entry.epoch is not None:
            room.learn_epoch(entry.epoch, entry.seq)
        if entry.seq in self.expelled:
            self.rooms.leave(self.expelled[entry.seq].connection, room.key)

    async def _read_missed(self, tops: Mapping[str, int]) -> Mapping[str, Sequence[Entry]]:
        self.looks.append(set(tops))
        if self.fault is not None:
            raise self.fault
        found = {key: self.table[key][top:] for key, top in tops.items() if len(self.table[key]) > top}
        if self.gate is not None:
            await self.gate
        return found

    def commit(self, count: int = 1, epoch: int | None = None, key: str = KEY) -> list[Entry]:
        """The next entries of a key, as one commit writes them; the epoch begins with the last of them."""
        rows = self.table.setdefault(key, [])
        first = len(rows) + 1
        new = [Entry(first + n, epoch if n == count - 1 else None) for n in range(count)]
        rows += new
        return new

    def top(self, key: str = KEY) -> int:
        return len(self.table[key])

    def epoch(self, key: str = KEY) -> int:
        return next((entry.epoch for entry in reversed(self.table[key]) if entry.epoch is not None), 0)

    def subscribe(self, client: Client, key: str = KEY) -> None:
        """Join, read and settle, all at once."""
        room, member = self.rooms.join(client.connection, key, client.view)
        self.rooms.settle(room, member, self.top(key), self.epoch(key))

    def position(self, epoch: int, ts: int, origin: str = "-", key: str = KEY) -> None:
        self.rooms.hear_position(key, epoch, float(ts), origin, json.dumps({"ts": ts}).encode())

    async def catch_up(self) -> None:
        """One look at the table for all rooms, as `run` takes it."""
        await self.rooms._catch_up([KEY])

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.rooms.run())
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# the model


class Known:
    """What a client should have got: the model of one membership."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.joined: Any = None
        self.snapshot: tuple[int, int] | None = None
        self.settled = False
        self.mark = 0

    def check(self) -> None:
        for seq in self.client.seqs():
            assert self.settled, f"{self.client.name} got {seq} before its snapshot, or after it left"
            assert seq == self.mark + 1, f"{self.client.name} got {seq} after {self.mark}"
            self.mark = seq


class Play:
    """Carries out one interleaving and checks every frame against the model."""

    def __init__(self, recent_max: int) -> None:
        self.house = House(recent_max)
        self.clients = [Known(Client(f"s{n}", "tracked" if n % 2 else "full")) for n in range(4)]
        self.air: list[list[Entry]] = []
        """Messages of the bus that have not arrived yet."""
        self.look: asyncio.Task[None] | None = None

    async def step(self, name: str, a: int, b: int) -> None:
        await getattr(self, f"_{name}")(self.clients[a % len(self.clients)], a, b)
        for known in self.clients:
            known.check()

    async def _commit(self, known: Known, a: int, b: int) -> None:
        self.air.append(self.house.commit(1 + b % 3))

    async def _arrive(self, known: Known, a: int, b: int) -> None:
        """A message arrives: late, out of order, and now and then once more later."""
        if self.air:
            at = a % len(self.air)
            self.house.rooms.hear(KEY, self.air[at])
            if b % 3:
                del self.air[at]

    async def _lose(self, known: Known, a: int, b: int) -> None:
        if self.air:
            del self.air[a % len(self.air)]

    async def _join(self, known: Known, a: int, b: int) -> None:
        known.joined = self.house.rooms.join(known.client.connection, KEY, known.client.view)
        known.snapshot, known.settled = None, False

    async def _read(self, known: Known, a: int, b: int) -> None:
        if known.joined:
            known.snapshot = (self.house.top(), self.house.epoch())

    async def _settle(self, known: Known, a: int, b: int) -> None:
        if known.joined and known.snapshot and not known.settled:
            room, member = known.joined
            if not room.covers(known.snapshot[0]):
                known.snapshot = (self.house.top(), self.house.epoch())
            known.settled, known.mark = True, max(known.mark, known.snapshot[0])
            self.house.rooms.settle(room, member, *known.snapshot)

    async def _leave(self, known: Known, a: int, b: int) -> None:
        self.house.rooms.leave(known.client.connection, KEY)
        known.joined, known.snapshot, known.settled, known.mark = None, None, False, 0

    async def _look(self, known: Known, a: int, b: int) -> None:
        """The table is read now; the answer comes later."""
        if self.look is None:
            self.house.gate = asyncio.get_running_loop().create_future()
            self.look = asyncio.create_task(self.house.catch_up())
            await asyncio.sleep(0)

    async def _looked(self, known: Known, a: int, b: int) -> None:
        if self.look is not None:
            assert self.house.gate is not None
            if not self.house.gate.done():
                self.house.gate.set_result(None)
            await self.look
            self.look = self.house.gate = None

    async def end(self) -> None:
        """Nothing more is heard from the bus: the table alone completes everybody."""
        await self.step("looked", 0, 0)
        for n in range(len(self.clients)):
            await self.step("read", n, 0)
            await self.step("settle", n, 0)
        await self.house.catch_up()
        for known in self.clients:
            known.check()
            if known.settled:
                assert known.mark == self.house.top()
        settled = [known.client.name for known in self.clients if known.settled]
        room = self.house.rooms.get(KEY)
        assert sorted(room.members if room else []) == settled
        assert self.house.bus.channels == (["channel:order-1"] if settled else [])


OFTEN = ["commit", "arrive", "arrive", "join", "read", "settle"]
steps = st.tuples(
    st.sampled_from([*OFTEN, *OFTEN, "lose", "leave", "look", "looked"]), st.integers(0, 11), st.integers(0, 11)
)


@effort(deadline=None, max_examples=400)
@given(st.lists(steps, max_size=80), st.sampled_from([1, 2, 64]))
async def test_whatever_the_bus_does_every_member_gets_every_number_once_and_in_order(
    play: list[tuple[str, int, int]], recent_max: int
) -> None:
    game = Play(recent_max)
    for name, a, b in play:
        await game.step(name, a, b)
    await game.end()


# numbers


async def test_what_comes_between_the_snapshot_and_its_answer_follows_it() -> None:
    house, client = House(), Client("s1")
    house.commit(2)
    room, member = house.rooms.join(client.connection, KEY, "full")
    house.rooms.hear(KEY, house.commit())
    assert client.seqs() == [], "nothing overtakes the snapshot"
    house.rooms.settle(room, member, 2, 0)
    await house.catch_up()
    assert client.seqs() == [3]


async def test_a_member_that_joins_again_is_silent_until_its_new_snapshot() -> None:
    house, again, other = House(), Client("s1"), Client("s2")
    house.subscribe(again)
    house.subscribe(other)
    room, member = house.rooms.join(again.connection, KEY, "full")
    house.rooms.hear(KEY, house.commit(3))
    assert (again.seqs(), other.seqs()) == ([], [1, 2, 3])
    house.rooms.settle(room, member, 2, 0)
    assert again.seqs() == [3], "1 and 2 are in the snapshot, 3 is not"


async def test_a_snapshot_that_missed_too_much_must_be_read_again() -> None:
    """While it joined, more came than the room keeps: `covers` says which snapshots can still be completed."""
    house, other, client = House(recent_max=2), Client("s1"), Client("s2")
    house.subscribe(other)
    room, member = house.rooms.join(client.connection, KEY, "full")
    house.rooms.hear(KEY, house.commit(5))
    assert [seq for seq in range(8) if room.covers(seq)] == [3, 4, 5, 6, 7]
    house.rooms.settle(room, member, 3, 0)
    assert client.seqs() == [4, 5]
    fresh, _ = House().rooms.join(Client("s3").connection, KEY, "full")
    assert fresh.covers(0), "a room that knows nothing yet has missed nothing"


async def test_what_was_heard_before_the_first_snapshot_is_looked_for_at_once() -> None:
    house, client = House(), Client("s1")
    async with house.running():
        room, member = house.rooms.join(client.connection, KEY, "full")
        house.rooms.hear(KEY, house.commit(2))
        house.rooms.settle(room, member, 1, 0)
        await until(lambda: client.wire.sent, "the table is read without waiting for the interval")
    assert client.seqs() == [2]


async def test_a_hole_holds_back_what_is_newer_until_it_is_filled() -> None:
    house, client = House(), Client("s1")
    house.subscribe(client)
    house.commit()
    house.rooms.hear(KEY, house.commit(2))
    assert client.seqs() == []
    await house.catch_up()
    assert client.seqs() == [1, 2, 3]
    house.rooms.hear(KEY, house.table[KEY])
    assert client.seqs() == [], "a repeat is dropped"


async def test_members_of_one_view_share_one_frame() -> None:
    house = House()
    full, also_full, tracked = Client("s1"), Client("s2"), Client("s3", "tracked")
    for client in (full, also_full, tracked):
        house.subscribe(client)
    house.rooms.hear(KEY, house.commit())
    ((one,), (same,), (other,)) = full.frames(), also_full.frames(), tracked.frames()
    assert one is same
    assert one is not other


async def test_an_entry_that_ends_a_membership_is_not_given_to_that_member() -> None:
    house, leaving, staying = House(), Client("s1"), Client("s2")
    house.subscribe(leaving)
    house.subscribe(staying)
    house.expelled[2] = leaving
    house.rooms.hear(KEY, house.commit(3))
    assert (leaving.seqs(), staying.seqs()) == ([1], [1, 2, 3])
    assert KEY not in leaving.connection.keys


async def test_rooms_do_not_hear_each_other_and_end_with_their_last_member() -> None:
    house, first, second = House(), Client("s1"), Client("s2")
    house.table["order-2"] = []
    house.subscribe(first)
    house.subscribe(second, "order-2")
    house.subscribe(first, "order-2")
    house.rooms.hear("order-2", house.commit(key="order-2"))
    house.rooms.hear("order-3", [Entry(1)])
    assert (first.seqs(), second.seqs()) == ([1], [1])
    assert house.bus.channels == ["channel:order-1", "channel:order-2"]
    house.rooms.leave(second.connection, "order-2")
    assert len(house.rooms) == 2
    house.rooms.leave_all(first.connection)
    assert len(house.rooms) == 0
    assert house.bus.channels == []
    house.rooms.leave(first.connection, KEY)
    house.rooms.hear(KEY, house.commit())
    assert first.seqs() == []


# looking


async def test_a_hole_is_filled_at_once_and_alone() -> None:
    house, client, other = House(), Client("s1"), Client("s2")
    house.table["order-2"] = []
    house.subscribe(client)
    house.subscribe(other, "order-2")
    async with house.running():
        house.commit()
        house.rooms.hear(KEY, house.commit())
        await until(lambda: client.wire.sent, "the hole is filled")
    assert client.seqs() == [1, 2]
    assert house.looks == [{KEY}], "only what has a hole is read"


async def test_the_last_lost_message_is_found_by_looking() -> None:
    house, client = House(gap_check_s=0.01), Client("s1")
    house.subscribe(client)
    async with house.running():
        house.commit(2)
        await until(lambda: client.wire.sent, "the interval finds what nobody announced")
    assert client.seqs() == [1, 2]


async def test_while_the_bus_is_away_the_table_is_read_at_the_other_interval() -> None:
    house, client = House(poll_s=0.01), Client("s1")
    house.bus.up = False
    house.subscribe(client)
    async with house.running():
        house.commit(2)
        await until(lambda: client.wire.sent, "the poll finds it")
    assert client.seqs() == [1, 2]


async def test_all_rooms_are_looked_at_when_the_bus_came_back() -> None:
    house, client, other = House(), Client("s1"), Client("s2")
    house.table["order-2"] = []
    house.subscribe(client)
    house.subscribe(other, "order-2")
    async with house.running():
        house.commit()
        house.commit(key="order-2")
        house.rooms.check_all()
        await until(lambda: client.wire.sent and other.wire.sent, "both rooms caught up")
    assert house.looks == [{KEY, "order-2"}], "in one query"


@pytest.mark.parametrize("fault", [Unavailable("away"), ZeroDivisionError()], ids=lambda fault: type(fault).__name__)
async def test_a_look_that_fails_is_taken_again(fault: Exception) -> None:
    """Soon, not at the next gap check: the bus is well."""
    house, client, other = House(poll_s=0.01), Client("s1"), Client("s2")
    house.subscribe(client)
    house.fault = fault
    async with house.running():
        house.commit()
        house.rooms.hear(KEY, house.commit())
        await until(lambda: len(house.looks) >= 2, "it looked again")
        assert client.seqs() == []
        house.fault = None
        await until(lambda: client.wire.sent, "Postgres is back")
    assert client.seqs() == [1, 2]

    house = House()
    house.table["order-2"] = []
    house.subscribe(client)
    house.subscribe(other, "order-2")
    house.fault = fault
    async with house.running():
        house.commit()
        house.rooms.hear(KEY, house.commit())
        await until(lambda: house.looks, "it looked")
        house.fault = None
        house.commit(key="order-2")
        house.rooms.hear("order-2", house.commit(key="order-2"))
        await until(lambda: client.wire.sent and other.wire.sent, "the next look is for what failed, too")


async def test_what_comes_while_the_table_is_read_is_not_slept_over() -> None:
    house, client = House(), Client("s1")
    house.subscribe(client)
    house.gate = asyncio.get_running_loop().create_future()
    async with house.running():
        house.commit()
        house.rooms.hear(KEY, house.commit())
        await until(lambda: house.looks, "the first look has begun")
        house.commit()
        house.rooms.hear(KEY, house.commit())
        house.gate.set_result(None)
        await until(lambda: len(client.wire.sent) == 4, "the second hole is filled too")
    assert client.seqs() == [1, 2, 3, 4]


# waiting for something to happen


class Look:
    """A long poll's reader: enough is a top above what its client knows."""

    def __init__(self, house: House, known: int) -> None:
        self.house, self.known, self.count = house, known, 0

    async def __call__(self) -> tuple[bool, int]:
        self.count += 1
        return self.house.top() > self.known, self.house.top()


async def begun(house: House, look: Look, timeout_s: float = NEVER_S) -> asyncio.Task[None]:
    """A wait that has looked once and found nothing."""
    task = asyncio.create_task(house.rooms.wait(KEY, look, timeout_s))
    await until(lambda: look.count, "it has looked")
    return task


async def test_a_wait_ends_when_something_happens() -> None:
    house = House()
    look = Look(house, 0)
    task = await begun(house, look)
    house.rooms.hear(KEY, house.commit())
    await asyncio.wait_for(task, 5)
    assert look.count == 2
    assert len(house.rooms) == 0
    assert house.bus.channels == []


async def test_a_wait_that_finds_something_at_once_does_not_wait() -> None:
    house = House()
    house.commit()
    await asyncio.wait_for(house.rooms.wait(KEY, Look(house, 0), NEVER_S), 5)
    assert len(house.rooms) == 0


async def test_a_wait_ends_with_its_time() -> None:
    house = House()
    await asyncio.wait_for(house.rooms.wait(KEY, Look(house, 0), 0.01), 5)
    assert len(house.rooms) == 0


async def test_a_wait_ends_when_the_instance_drains() -> None:
    house = House()
    task = await begun(house, Look(house, 0))
    house.rooms.close()
    await asyncio.wait_for(task, 5)
    await asyncio.wait_for(house.rooms.wait(KEY, Look(house, 0), NEVER_S), 5)
    assert len(house.rooms) == 0


async def test_a_wait_is_found_by_the_table_when_its_message_was_lost() -> None:
    house = House(gap_check_s=0.01)
    async with house.running():
        task = await begun(house, Look(house, 0))
        house.commit()
        await asyncio.wait_for(task, 5)


async def test_a_wait_keeps_its_room_when_others_leave_it() -> None:
    """A member comes and goes while the wait's channel is being confirmed: the wait must still be told."""
    house, passing = House(), Client("s1")
    house.bus.confirmation = asyncio.get_running_loop().create_future()
    look = Look(house, 0)
    task = asyncio.create_task(house.rooms.wait(KEY, look, NEVER_S))
    await until(lambda: house.bus.channels, "it has asked for its channel")
    house.subscribe(passing)
    house.rooms.leave_all(passing.connection)
    house.bus.confirmation.set_result(True)
    await until(lambda: look.count, "it has looked")
    house.rooms.hear(KEY, house.commit())
    await asyncio.wait_for(task, 5)
    assert len(house.rooms) == 0


# positions


async def watched(*clients: Client, epoch: int = 1) -> House:
    """A room of settled clients whose order has an assignment, number `epoch`."""
    house = House()
    house.commit(epoch, epoch=epoch)
    for client in clients:
        house.subscribe(client)
    return house


async def test_a_position_goes_to_everybody_but_where_it_came_from() -> None:
    agent, watcher, pending = Client("a"), Client("s1"), Client("s2")
    house = await watched(agent, watcher)
    house.rooms.join(pending.connection, KEY, "full")
    house.position(1, 100, origin="a")
    assert (agent.positions(), watcher.positions(), pending.positions()) == ([], [100], [])


async def test_the_newest_position_wins() -> None:
    client = Client("s1")
    house = await watched(client)
    for ts in (100, 300, 200, 300, 301):
        house.position(1, ts)
    assert client.positions() == [100, 300, 301]


async def test_positions_of_an_older_assignment_are_dropped() -> None:
    client = Client("s1")
    house = await watched(client)
    house.position(1, 100)
    house.rooms.hear(KEY, house.commit(epoch=2))
    house.position(1, 200)
    house.position(2, 50)
    assert client.positions() == [100, 50], "a new agent's clock owes nothing to the old one's"


@pytest.mark.parametrize("arrived", [[100, 200], [200, 100]])
async def test_a_position_of_an_assignment_that_is_not_known_yet_waits_for_it(arrived: list[int]) -> None:
    client = Client("s1")
    house = await watched(client)
    house.position(1, 10)
    for ts in arrived:
        house.position(2, ts)
    assert client.positions() == [10]
    house.rooms.hear(KEY, house.commit(epoch=2))
    read = client.read()
    assert [name for name, _ in read] == ["entry", "position"], "never before its assignment"
    assert read[1][1] == {"ts": 200}, "the newest one"


async def test_a_position_that_waits_is_not_shown_to_where_it_came_from() -> None:
    agent, watcher = Client("a"), Client("s1")
    house = await watched(agent, watcher)
    house.position(2, 100, origin="a")
    house.rooms.hear(KEY, house.commit(epoch=2))
    assert (agent.positions(), watcher.positions()) == ([], [100])


async def test_a_position_that_waits_for_an_assignment_that_never_comes_is_dropped() -> None:
    client = Client("s1")
    house = await watched(client)
    house.position(3, 100)
    house.rooms.hear(KEY, house.commit(epoch=2))
    house.rooms.hear(KEY, house.commit(epoch=0))
    house.position(3, 200)
    assert client.positions() == []


async def test_no_position_is_shown_once_the_assignment_has_ended() -> None:
    client = Client("s1")
    house = await watched(client)
    house.rooms.hear(KEY, house.commit(epoch=0))
    house.position(1, 100)
    house.position(2, 200)
    assert client.positions() == []


async def test_a_position_that_came_while_the_first_member_was_joining_is_shown_after_its_snapshot() -> None:
    """The room did not know the assignment yet; the snapshot brings it."""
    house, client = House(), Client("s1")
    house.commit(epoch=1)
    room, member = house.rooms.join(client.connection, KEY, "full")
    house.position(1, 100)
    assert client.positions() == []
    house.rooms.settle(room, member, 1, 1)
    assert client.positions() == [100]


async def test_an_old_snapshot_does_not_bring_an_ended_assignment_back() -> None:
    late, watcher = Client("s1"), Client("s2")
    house = await watched(watcher)
    room, member = house.rooms.join(late.connection, KEY, "full")
    snapshot = (house.top(), house.epoch())
    house.rooms.hear(KEY, house.commit(epoch=2))
    house.rooms.settle(room, member, *snapshot)
    house.position(1, 100)
    house.position(2, 200)
    assert (late.positions(), watcher.positions()) == ([200], [200])


# whom an assignment shuts out


def assigned(seq: int, agent: str | None) -> Event:
    body = json.dumps({"agent": {"id": agent} if agent else None}, separators=(",", ":"))
    return event(KEY, seq, Type.ASSIGNED, dt.datetime(2026, 11, 21, tzinfo=dt.UTC), body)


class Watch:
    """The rooms of a real Socket.IO door, which no server serves."""

    def __init__(self) -> None:
        nothing: Any = SimpleNamespace(network_of=None, socket_quota=None)
        self.revocations = Revocations()
        authenticator: Any = SimpleNamespace(revocations=self.revocations)
        bus = cast(Bus, FakeBus())
        self.sockets = Sockets(Settings(), nothing, authenticator, bus, nothing, nothing, nothing, nothing)

    def agent(self, sub: str, seq: int) -> Client:
        """A socket of this agent, whose snapshot of the order ends at `seq`."""
        client = Client(f"socket of {sub}")
        client.connection.actor = Actor(sub=sub, role=Role.AGENT, exp=2e9)
        room, member = self.sockets.rooms.join(client.connection, KEY, "full")
        self.sockets.rooms.settle(room, member, seq, seq)
        return client


async def test_an_agent_who_lost_the_order_is_shut_out_before_the_news() -> None:
    watch = Watch()
    client = watch.agent("a1", 2)
    watch.sockets.rooms.hear(KEY, [assigned(3, "a2")])
    assert client.read() == [("subscriptionClosed", {"orderId": KEY, "code": "reassigned"})]
    assert client.connection.keys == set()


async def test_an_agent_is_not_shut_out_by_what_was_before_its_snapshot() -> None:
    """The room lags behind, because the bus is away: what arrives late is history to this agent."""
    watch = Watch()
    old = watch.agent("a0", 1)
    new = watch.agent("a2", 3)
    watch.sockets.rooms.hear(KEY, [assigned(2, "a1"), assigned(3, "a2"), assigned(4, "a2")])
    assert [name for name, _ in old.read()] == ["subscriptionClosed"]
    assert [(name, payload["seq"]) for name, payload in new.read()] == [("deliveryAgentAssigned", 4)]


async def test_who_is_revoked_hears_nothing_from_that_step_on() -> None:
    """Not even what came in the same piece from Redis, before the session could be ended."""
    watch = Watch()
    goes, stays = watch.agent("a1", 2), watch.agent("c1", 2)
    stays.connection.actor = Actor(sub="c1", role=Role.CUSTOMER, exp=2e9)
    for client in (goes, stays):
        watch.sockets.engine.connections[client.name] = client.connection
    goes.connection.actor = Actor(sub="a1", role=Role.AGENT, exp=2e9, jti="lost")
    watch.revocations.add("jti", "lost", 1e9)
    watch.sockets.end_revoked()
    watch.sockets.rooms.hear(KEY, [assigned(3, "a1")])
    assert goes.read() == [("subscriptionClosed", {"orderId": KEY, "code": "revoked"})]
    assert [name for name, _ in stays.read()] == ["deliveryAgentAssigned"]
    watch.sockets.end_revoked()
    await asyncio.gather(*watch.sockets._goodbyes)
    assert goes.read() == [("disconnected", {"code": "revoked"})], "once"


events = st.lists(
    st.one_of(
        st.tuples(st.just("assign"), st.booleans()),
        st.tuples(st.just("arrive"), st.integers(0, 3)),
        st.tuples(st.just("push"), st.integers(0, 50)),
        st.tuples(st.just("flow"), st.integers(0, 5)),
        st.tuples(st.just("join"), st.integers(0, 2)),
    ),
    max_size=60,
)


@effort(deadline=None, max_examples=300)
@given(events)
async def test_a_member_never_sees_a_position_outside_its_assignment(play: list[tuple[str, int]]) -> None:
    """Entries arrive in order and late, positions arrive whenever they like."""
    house = House()
    clients = [Client(f"s{n}") for n in range(3)]
    seen: dict[str, int] = {}
    air: list[Entry] = []
    pushed: list[tuple[int, int]] = []
    shown: dict[tuple[str, int], int] = {}
    for name, n in play:
        if name == "assign":
            air += house.commit(epoch=house.top() + 1 if n else 0)
        elif name == "arrive" and air:
            house.rooms.hear(KEY, [air.pop(0)])
        elif name == "push" and house.epoch():
            pushed.append((house.epoch(), n))
        elif name == "flow" and pushed:
            epoch, ts = pushed.pop(n % len(pushed))
            house.rooms.hear_position(KEY, epoch, float(ts), "-", json.dumps({"epoch": epoch, "ts": ts}).encode())
        elif name == "join":
            house.subscribe(clients[n])
            seen[clients[n].name] = max(seen.get(clients[n].name, 0), house.top())
        for client in clients:
            for kind, payload in client.read():
                if kind == "entry":
                    seen[client.name] = payload["seq"]
                    continue
                epoch, ts = payload["epoch"], payload["ts"]
                row = next(entry for entry in house.table[KEY] if entry.seq == epoch)
                assert row.epoch == epoch
                later = [e for e in house.table[KEY] if e.epoch is not None and epoch < e.seq <= seen[client.name]]
                assert not later, "its assignment had ended, and this client had been told"
                assert shown.get((client.name, epoch), -1) < ts, "newest wins"
                shown[client.name, epoch] = ts


async def test_what_a_member_is_owed_it_gets_when_it_never_gets_in() -> None:
    """And only then: who gets in hears it from its snapshot or from the room."""
    house = House()
    told = frame("entry", b'{"seq":5,"view":"full"}')
    for name, gets_in in (("s1", False), ("s2", True)):
        client = Client(name)
        room, member = house.rooms.join(client.connection, KEY, client.view)
        member.owed = (5, told)
        if gets_in:
            house.rooms.settle(room, member, 5, 0)
        house.rooms.leave(client.connection, KEY)
        assert (told in client.frames()) is not gets_in


# the short way of positions


@effort(max_examples=300, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["show", "show", "join", "settle", "leave", "turn", "push"]), st.integers(0, 3)),
        max_size=40,
    )
)
def test_a_position_reaches_whoever_is_settled_by_the_way_that_is_open(steps: list[tuple[str, int]]) -> None:
    """By its transport's own write while it keeps up, else by `send_latest`; never twice, never to its own pusher, to
    one that is still joining, or to one that has left."""

    async def live() -> None:
        house = House()
        house.commit(epoch=1)
        anchor = Client("anchor")
        house.subscribe(anchor)
        clients = [Client(f"client {number}") for number in range(4)]
        joining: dict[int, Any] = {}
        settled: set[int] = set()
        for ts, (step, number) in enumerate(steps, start=1):
            client = clients[number]
            if step == "join":
                joining[number] = house.rooms.join(client.connection, KEY, client.view)
                settled.discard(number)
            elif step == "settle" and number in joining:
                room, member = joining.pop(number)
                house.rooms.settle(room, member, house.top(), house.epoch())
                settled.add(number)
            elif step == "leave":
                house.rooms.leave(client.connection, KEY)
                joining.pop(number, None)
                settled.discard(number)
            elif step == "turn":
                client.wire.keeps_up = not client.wire.keeps_up
                client.connection.rewire()
            elif step in ("show", "push"):
                house.position(1, ts, origin=client.connection.id if step == "push" else "-")
                for n, each in enumerate(clients):
                    found = len(each.wire.written), len(each.wire.sent)
                    hears = n in settled and not (step == "push" and n == number)
                    directly = each.wire.keeps_up and not (step == "push" and number in settled | set(joining))
                    assert found == ((1, 0) if hears and directly else (0, 1) if hears else (0, 0)), (step, n, number)
                    each.wire.written.clear()
                    each.wire.sent.clear()

    asyncio.run(live())
