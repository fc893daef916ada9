"""Connection state recovery: what Redis and the client's offset say together is exactly what the client has, or the
session counts as lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from models.user import Actor, Role
from server.realtime.bus import Bus
from server.realtime.connections import Connection, frame
from server.realtime.link import BusAway
from server.realtime.recovery import Lost, Recoverable, Sessions, Unsaved

WHO = "customer:c1"
ORDERS = ("a", "b", "c")


class Redis:
    """The hashes of Redis, reached as through the bus. `away`: nothing arrives, and nobody is answered."""

    def __init__(self) -> None:
        self.hashes: dict[str, dict[bytes, bytes]] = {}
        self.away = False

    @property
    def up(self) -> bool:
        return not self.away

    def send(self, args: tuple[Any, ...], answer: Callable[[object], None] | None = None) -> None:
        reply = BusAway("away") if self.away else self._do(*args)
        if answer is not None:
            answer(reply)

    async def call(self, *args: Any) -> object:
        if self.away:
            raise BusAway("away")
        return self._do(*args)

    def _do(self, command: str, key: str, *rest: Any) -> object:
        told = [part if isinstance(part, bytes) else str(part).encode() for part in rest]
        if command == "HSET":
            assert told, "Redis refuses that"
            self.hashes.setdefault(key, {}).update(zip(told[::2], told[1::2], strict=True))
        elif command == "HDEL":
            self.hashes.get(key, {}).pop(told[0], None)
        elif command == "HGETALL":
            return [part for pair in self.hashes.get(key, {}).items() for part in pair]
        elif command == "DEL":
            self.hashes.pop(key, None)
        else:
            assert command == "EXPIRE"
        return 1


class World:
    """One client that knows its `pid` and offset, the server's side of its connection, and the wire between them."""

    def __init__(self, offset_max_bytes: int = 1000) -> None:
        self.redis = Redis()
        self.sessions = Sessions(cast(Bus, self.redis), keep_s=60, offset_max_bytes=offset_max_bytes)
        self.tops = dict.fromkeys(ORDERS, 3)
        self.recovered = 0
        # the client
        self.pid: str | None = None
        self.offset: object = None
        self.has: dict[str, int] = {}
        """What it watches, as it knows, with the last number of each."""
        self.leaving: set[str] = set()
        self.pongs: list[Callable[[], None]] = []
        """Proofs that have reached it, and not yet the server again."""
        self._begin()

    # the server

    def _open(self) -> Connection:
        self.wire: list[tuple[Any, ...]] = []
        self.pongs.clear()
        self.leaving.clear()
        wire = cast(Any, SimpleNamespace(when_received=lambda proof: self.wire.append(("proof", proof))))
        wire.send_frame = wire.send_latest = None
        wire.hang_up = self._hang_up
        self.hung_up = False
        return Connection("sid", wire, Actor(sub="c1", role=Role.CUSTOMER, exp=2e9))

    def _begin(self) -> None:
        self.connection = self._open()
        self.connection.recoverable = self.sessions.begin(self.connection, WHO)
        self.pid = self.connection.recoverable.pid if self.connection.recoverable else None
        self.members: set[str] = set()
        self.has.clear()

    def _hang_up(self) -> None:
        self.hung_up = True

    def _tell(self, order: str, seq: int) -> None:
        message = frame("event", json.dumps({"order": order, "seq": seq}).encode())
        if self.connection.recoverable is not None:
            message = self.connection.recoverable.stamp(order, seq, message)
        if not self.hung_up:
            self.wire.append(("event", message))

    async def subscribe(self, order: str) -> None:
        recoverable = self.connection.recoverable
        if recoverable is not None:
            try:
                await recoverable.joining(order)
            except Unsaved:
                await self.drop()
                return
        self.wire.append(("answer", order, self.tops[order]))
        self.members.add(order)
        if recoverable is not None:
            recoverable.joined(order, self.tops[order])

    async def unsubscribe(self, order: str) -> None:
        self.leaving.add(order)
        if self.connection.recoverable is not None:
            try:
                await self.connection.recoverable.leaving(order)
            except Unsaved:
                await self.drop()
                return
        self.members.discard(order)
        self.wire.append(("left", order))

    async def end(self, order: str) -> None:
        """The server ends a subscription by itself, and says so."""
        if order in self.members:
            self.members.remove(order)
            self.wire.append(("left", order))
            self.leaving.add(order)
            if self.connection.recoverable is not None:
                self.connection.recoverable.left(order)

    async def happen(self, order: str) -> None:
        self.tops[order] += 1
        if order in self.members:
            self._tell(order, self.tops[order])

    # the way to the client and back

    async def receive(self, order: str = "", most: int = 2) -> None:
        for kind, *rest in self.wire[:most]:
            if kind == "proof":
                self.pongs.append(rest[0])
            elif kind == "answer":
                self.has[rest[0]] = rest[1]
                self.leaving.discard(rest[0])
            elif kind == "left":
                self.has.pop(rest[0], None)
            else:
                _, payload, *offset = json.loads(rest[0].text[1:])
                assert payload["seq"] == self.has[payload["order"]] + 1, "lost, repeated or out of order"
                self.has[payload["order"]] = payload["seq"]
                if offset:
                    (self.offset,) = offset
        del self.wire[:most]

    async def receive_all(self, order: str = "") -> None:
        await self.receive(most=len(self.wire))

    async def prove(self, order: str = "") -> None:
        pongs, self.pongs = self.pongs, []
        for proof in pongs:
            proof()

    async def drop(self, order: str = "") -> None:
        """The connection is lost with all that is on the way, and the client comes back with what it has."""
        wanted = {order: seq for order, seq in self.has.items() if order not in self.leaving}
        left = set(self.leaving)
        try:
            if self.pid is None:
                raise Lost("unknown")
            marks = await self.sessions.find(self.pid, self.offset, WHO)
        except Lost:
            self._begin()
            return
        assert {order: seq for order, seq in marks.items() if order not in left} == wanted
        self.recovered += 1
        self.connection = self._open()
        self.connection.recoverable = Recoverable(self.sessions, self.connection, self.pid)
        self.members = set(marks)
        self.has = dict(marks)
        for order, mark in marks.items():
            for seq in range(mark + 1, self.tops[order] + 1):
                self._tell(order, seq)

    # Redis

    async def redis_goes(self, order: str = "") -> None:
        self.redis.away = True

    async def redis_returns(self, order: str = "") -> None:
        self.redis.away = False

    async def redis_forgets(self, order: str = "") -> None:
        self.redis.hashes.clear()


STEPS = (
    World.subscribe,
    World.happen,
    World.happen,
    World.happen,
    World.happen,
    World.receive_all,
    World.receive_all,
    World.receive,
    World.prove,
    World.prove,
    World.drop,
    World.unsubscribe,
    World.end,
    World.redis_goes,
    World.redis_returns,
    World.redis_forgets,
)


async def settle(world: World) -> None:
    """Nothing is on the way any more."""
    await world.redis_returns()
    await world.receive_all()
    await world.prove()


@effort(max_examples=1000, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(STEPS), st.sampled_from(ORDERS)), max_size=60),
    longest=st.sampled_from([12, 12, 24, 1000]),
)
def test_what_is_recovered_is_what_the_client_has(
    steps: list[tuple[Callable[[World, str], Any], str]], longest: int
) -> None:
    async def live() -> None:
        world = World(longest)
        for order in ORDERS:
            await world.subscribe(order)
        await settle(world)
        for step, order in steps:
            await step(world, order)
        await settle(world)
        await world.drop()
        await settle(world)
        assert all(world.has[order] == world.tops[order] for order in world.has)

    asyncio.run(live())


async def test_a_client_without_any_event_is_recovered() -> None:
    world = World()
    await world.subscribe("a")
    await settle(world)
    await world.happen("a")
    await world.drop()
    await settle(world)
    assert (world.recovered, world.has) == (1, {"a": 4})


async def test_an_answer_that_may_not_have_arrived_is_not_recovered() -> None:
    world = World()
    await world.subscribe("a")
    await world.drop()
    assert (world.recovered, world.has) == (0, {})


async def test_an_old_offset_is_valid_under_a_new_pid() -> None:
    world = World()
    await world.subscribe("a")
    await world.happen("a")
    await settle(world)
    await world.redis_forgets()
    await world.drop()
    assert world.recovered == 0
    assert world.offset == "a:4"
    await world.happen("a")
    await world.subscribe("a")
    await settle(world)
    await world.drop()
    assert (world.recovered, world.has) == (1, {"a": 5})


@pytest.mark.parametrize(
    "offset", [None, 7, "", "a", "a:", ":4", "a:x", "a:-4", "a:99999999999", "b:9", "a:2", "x" * 10_000]
)
async def test_an_offset_that_says_nothing_changes_nothing(offset: object) -> None:
    world = World()
    await world.subscribe("a")
    await settle(world)
    assert world.pid is not None
    assert await world.sessions.find(world.pid, offset, WHO) == {"a": 3}


@pytest.mark.parametrize("pid", ["", "short", "waybill:control", "x" * 24])
async def test_a_foreign_pid_is_lost(pid: str) -> None:
    with pytest.raises(Lost, match="unknown"):
        await World().sessions.find(pid, None, WHO)


async def test_a_session_belongs_to_one_person() -> None:
    world = World()
    assert world.pid is not None
    with pytest.raises(Lost, match="unknown"):
        await world.sessions.find(world.pid, None, "customer:c2")


async def test_an_offset_grows_no_longer_than_a_frame_allows() -> None:
    """What the client has proven goes to Redis. A client that proves nothing is sent away, with what it has."""
    world = World(offset_max_bytes=8)
    for order in ORDERS:
        await world.subscribe(order)
    await settle(world)
    for order in ORDERS * 3:
        await world.happen(order)
        await settle(world)
        assert len(str(world.offset)) <= 8
    await world.drop()
    assert world.recovered == 1, "nobody was sent away"

    for order in ORDERS:
        await world.happen(order)
    assert world.hung_up
    await settle(world)
    await world.drop()
    await settle(world)
    assert (world.recovered, world.has) == (2, world.tops)


async def shortening(*orders: str) -> World:
    """A world whose next proof moves the numbers of these orders from the offset to Redis."""
    world = World(offset_max_bytes=12)
    for order in ORDERS:
        await world.subscribe(order)
    await settle(world)
    for order in orders:
        await world.happen(order)
    await world.receive_all()
    assert world.pongs
    return world


async def recovers(world: World) -> None:
    await world.drop()
    await settle(world)
    assert (world.recovered, world.has) == (1, world.tops)


async def test_numbers_that_redis_did_not_take_stay_in_the_offset() -> None:
    world = await shortening("a", "b")
    await world.redis_goes()
    await world.prove()
    await world.redis_returns()
    await world.happen("c")
    await world.receive_all()
    await recovers(world)


async def test_a_number_that_grew_while_an_older_one_went_to_redis_stays_in_the_offset() -> None:
    world = await shortening("a", "b")
    await world.happen("a")
    await world.receive_all()
    await world.prove()
    await world.happen("c")
    await world.receive_all()
    await recovers(world)


async def test_a_room_that_is_joined_anew_takes_no_number_from_before() -> None:
    world = await shortening("a", "b")
    pongs, world.pongs = world.pongs, []
    await world.happen("a")
    await world.subscribe("a")
    await settle(world)
    await world.happen("c")
    await settle(world)
    for proof in pongs:
        proof()
    await recovers(world)


async def test_rooms_that_were_all_left_meanwhile_leave_nothing_to_move() -> None:
    world = await shortening("a", "b")
    pongs, world.pongs = world.pongs, []
    await world.unsubscribe("a")
    await world.unsubscribe("b")
    await settle(world)
    for proof in pongs:
        proof()
    await world.subscribe("a")
    await world.subscribe("b")
    await settle(world)
    for order in ORDERS * 2:
        await world.happen(order)
        await settle(world)
    assert not world.hung_up, "the offset was never shortened again"
    await recovers(world)


async def test_an_offset_tells_nothing_of_rooms_that_were_left() -> None:
    world = World()
    for order in ORDERS:
        await world.subscribe(order)
        await world.happen(order)
        await settle(world)
        if order != "c":
            await world.unsubscribe(order)
    assert world.offset == "c:4"
