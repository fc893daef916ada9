"""When memory may answer for the table: the cases that are too narrow to be met from outside."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec
import pytest

from models.errors import NotFound
from models.event import Event
from models.user import Actor, Scope
from server.db import Database
from server.doors import Doors
from server.realtime.link import BusAway
from server.realtime.positions import Known, PositionLane
from server.realtime.rooms import Room, Rooms
from server.snapshots import Picture, Snapshots
from tests.handlers.desk import AGENT, CUSTOMER, Desk
from tests.handlers.desk import guest as guest_of
from tests.harness import until
from tests.server.test_rooms import FakeBus


class Lane:
    """The last known position of every order, as Redis tells it."""

    def __init__(self) -> None:
        self.last: Known | None = None
        self.away = False
        self.asked = 0
        self.answers = asyncio.Event()
        self.answers.set()

    async def known(self, key: str) -> Known | None:
        self.asked += 1
        await self.answers.wait()
        if self.away:
            raise BusAway("Redis is away")
        return self.last


class House:
    """One order in a real table, and a room of it."""

    def __init__(self, desk: Desk, order_id: str) -> None:
        self.desk, self.order_id, self.lane = desk, order_id, Lane()
        self.reads = 0
        nothing: Any = None
        self.rooms: Rooms[Event] = Rooms(
            cast(Any, FakeBus()),
            channel_of=str,
            frame_of=nothing,
            position_frame_of=nothing,
            on_entry=lambda room, entry: None,
            read_missed=nothing,
            recent_max=64,
            gap_check_s=3600,
            fallback_poll_s=3600,
        )
        self.snapshots = Snapshots(cast(Doors, self), cast(PositionLane, self.lane), self.rooms, 10)
        self.room: Room[Event] = self.rooms._open(order_id)

    @property
    def database(self) -> Any:
        return self

    @asynccontextmanager
    async def statement(self) -> AsyncIterator[Any]:
        self.reads += 1
        async with self.desk.database.statement() as tx:
            yield tx

    async def permit(self, by: Actor = CUSTOMER) -> int:
        return await self.snapshots.permit(by, self.order_id, None)

    async def take(self, permitted: int, by: Actor = CUSTOMER, after: int | None = None) -> Picture:
        return await self.snapshots.take(self.room, by, after, permitted, listening=True)

    def settle(self, picture: Picture) -> None:
        """As a subscriber does that got this picture."""
        if self.room.top is None:
            self.room.top = picture.seq
        self.room.learn_epoch(picture.epoch, picture.seq)
        self.snapshots.keep(self.room, picture)

    async def subscribe(self, by: Actor = CUSTOMER, after: int | None = None) -> dict[str, Any]:
        """The answer."""
        picture = await self.take(await self.permit(by), by, after)
        answer: dict[str, Any] = json.loads(self.snapshots.answer(self.room, picture))
        self.settle(picture)
        return answer

    async def hear(self) -> None:
        """The bus brings all that the room lacks."""
        self.rooms.hear(self.order_id, (await self.desk.log(self.order_id))[self.room.top or 0 :])


@pytest.fixture
async def house(database: Database) -> House:
    desk = Desk(database)
    return House(desk, (await desk.place()).id)


async def reads(house: House, subscribing: Any) -> int:
    """How many statements it takes; the permit is one."""
    before = house.reads
    await subscribing
    return house.reads - before


async def test_the_second_needs_its_permit_only(house: House) -> None:
    assert await reads(house, house.subscribe()) == 2
    assert await reads(house, house.subscribe()) == 1


async def test_what_the_bus_has_lost_is_found_by_the_next_permit(house: House) -> None:
    await house.subscribe()
    await house.desk.move(house.order_id, "confirmed")
    house.room.image = None
    answer = await house.subscribe(after=1)
    assert (answer["seq"], answer["order"]["status"], len(answer["events"])) == (2, "confirmed", 1)
    assert (house.room.top, house.room.image) == (1, None), "a picture that is ahead of the room is not kept"


async def test_a_permit_that_is_older_than_the_room_is_judged_again(house: House) -> None:
    await house.desk.assign(house.order_id, AGENT.sub)
    permitted = await house.permit(AGENT)
    await house.subscribe(CUSTOMER)
    await house.desk.assign(house.order_id, "a2")
    await house.hear()
    await house.subscribe(CUSTOMER)
    assert house.room.image is not None
    assert house.room.image.seq == house.room.top == permitted + 1, "all is in memory"
    with pytest.raises(NotFound):
        await house.take(permitted, AGENT)


async def test_an_event_ends_what_was_kept(house: House) -> None:
    await house.subscribe()
    await house.desk.move(house.order_id, "confirmed")
    await house.hear()
    assert house.room.image is None
    assert (await house.subscribe())["order"]["status"] == "confirmed"


async def test_each_view_is_kept_once_and_never_given_to_the_other(house: House) -> None:
    guest = guest_of(house.order_id, Scope.TRACK)
    for by in (CUSTOMER, guest):
        whole = [await house.subscribe(by, 0) for _ in range(2)]
        assert whole[0] == whole[1]
        assert ("notes" in whole[0]["order"]) == (by is CUSTOMER)
        assert ("actor" in whole[0]["events"][0]["data"]) == (by is CUSTOMER)
    assert house.room.image is not None
    assert set(house.room.image.views) == {"full", "tracked"}


async def test_a_guest_s_events_are_not_kept_for_the_others(house: House) -> None:
    await house.subscribe(guest_of(house.order_id, Scope.TRACK), 0)
    for _ in range(2):  # from the table, then from memory
        assert "actor" in (await house.subscribe(CUSTOMER, 0))["events"][0]["data"]


# the last position


def known(assignment: int, ts: int) -> Known:
    return Known(assignment, float(ts), msgspec.json.encode({"ts": ts}))


async def asked(house: House, subscribing: Any) -> tuple[int, Any]:
    """How often Redis was asked, and the location that was told."""
    before = house.lane.asked
    answer = await subscribing
    return house.lane.asked - before, answer["location"]


async def test_redis_is_asked_for_the_last_position_once(house: House) -> None:
    epoch = (await house.desk.assign(house.order_id, "a1")).seq
    house.lane.last = known(epoch, 1)
    assert await asked(house, house.subscribe()) == (1, {"ts": 1})
    assert await asked(house, house.subscribe()) == (0, {"ts": 1})
    house.room.position = (2.0, b'{"ts":2}')  # heard
    assert await asked(house, house.subscribe()) == (0, {"ts": 2})


async def test_after_a_change_of_the_bus_it_is_asked_again(house: House) -> None:
    epoch = (await house.desk.assign(house.order_id, "a1")).seq
    await house.subscribe()
    house.rooms.check_all()  # lost
    house.lane.away = True
    assert await asked(house, house.subscribe()) == (1, None)
    assert await asked(house, house.subscribe()) == (1, None), "it was not answered, so nothing is known"
    house.rooms.check_all()  # back
    house.lane.away, house.lane.last = False, known(epoch, 5)
    assert await asked(house, house.subscribe()) == (1, {"ts": 5})
    assert await asked(house, house.subscribe()) == (0, {"ts": 5})


async def test_a_bus_that_does_not_listen_yet_proves_nothing(house: House) -> None:
    epoch = (await house.desk.assign(house.order_id, "a1")).seq
    permitted = await house.permit()
    house.settle(await house.snapshots.take(house.room, CUSTOMER, None, permitted, listening=False))
    house.lane.last = known(epoch, 5)  # shown before the bus listened
    assert await asked(house, house.subscribe()) == (1, {"ts": 5})


async def test_a_position_of_an_earlier_assignment_is_not_told(house: House) -> None:
    epoch = (await house.desk.assign(house.order_id, "a1")).seq
    house.lane.last = known(epoch, 5)
    await house.subscribe()
    await house.desk.assign(house.order_id, "a2")
    assert (await house.subscribe())["location"] is None  # the room has not heard of it
    await house.hear()
    house.room.learn_epoch(epoch + 1, epoch + 1)
    assert (await house.subscribe())["location"] is None


async def test_those_who_come_at_once_ask_redis_once(house: House) -> None:
    epoch = (await house.desk.assign(house.order_id, "a1")).seq
    house.lane.last = known(epoch, 5)
    await house.subscribe()
    house.rooms.check_all()  # so that only the position is missing
    house.lane.asked = 0
    house.lane.answers.clear()
    gone, *staying = [asyncio.create_task(house.subscribe()) for _ in range(5)]
    await until(lambda: house.lane.asked, "Redis is asked")
    gone.cancel()
    house.lane.answers.set()
    assert [answer["location"] for answer in await asyncio.gather(*staying)] == [{"ts": 5}] * 4
    assert house.lane.asked == 1
    assert not house.snapshots._asking
