"""Durable events through faults: whatever happens to links, servers and instances, whoever stays hears each event of an
order once and in order, exactly as the table lists them."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from server.embedded import DataServers
from server.outbox import order_channel
from tests.faults.proxy import Dropper, Proxy, proxied
from tests.harness import SERVICE, SOON_S, Fleet, Instance, Watcher, token, until
from tests.redis_servers import PrivateRedis
from tests.shared import shared_fleet

CUSTOMER = token("customer", "c1")

POLL_MS, PING_MS, REDIS_TIMEOUT_MS, DB_TIMEOUT_MS = 300, 300, 800, 1000
QUICK: dict[str, Any] = {
    "BUS_FALLBACK_POLL_MS": str(POLL_MS),
    "BUS_PING_INTERVAL_MS": str(PING_MS),
    "REDIS_TIMEOUT_MS": str(REDIS_TIMEOUT_MS),
    "DB_TIMEOUT_MS": str(DB_TIMEOUT_MS),
    "RELAY_GRACE_MS": "300",
    "GAP_CHECK_INTERVAL_S": "3600",
}
"""Faults are noticed soon. Nobody looks for gaps by the clock, so that what is found was found by other means."""

ANSWER_S = 4.0
"""Whatever is away: everybody is answered within this."""
USUALLY_S = 2.0
"""And most are within this."""
SLACK_S = 1.5
"""What a busy machine may add to an interval of ours."""
FROZEN_S = 3.0
"""How long a half-open link lasts: longer than it takes to notice it."""
PACE_S = 0.02
"""Pause between two things that one somebody does again and again."""


class Two:
    """Two instances that behave as one, and what stands between them and their servers."""

    def __init__(self, fleet: Fleet, a: Instance, b: Instance, links: Sequence[Proxy]) -> None:
        self.fleet, self.a, self.b = fleet, a, b
        self.redis_of_a, self.redis_of_b, self.postgres_of_b = links

    async def well(self) -> None:
        for instance in (self.a, self.b):
            await until(lambda i=instance: says(i, "ok"), "all is well")


@pytest.fixture(scope="module")
async def started(data: DataServers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Two]:
    async with shared_fleet(data, tmp_path_factory.mktemp("delivery")) as fleet, AsyncExitStack() as links:
        urls = (data.redis_url, data.redis_url, fleet.database_url)
        proxies = [await links.enter_async_context(proxied(url)) for url in urls]
        a = fleet.start(REDIS_URL=proxies[0].url, **QUICK)
        b = fleet.start(REDIS_URL=proxies[1].url, DATABASE_URL=proxies[2].url, **QUICK)
        try:
            yield Two(fleet, *await asyncio.gather(a, b), proxies)
        finally:
            await fleet.stop()  # before its links go


@pytest.fixture
async def two(started: Two) -> AsyncIterator[Two]:
    """The shared pair, well before and after."""
    await started.well()
    yield started
    for link in (started.redis_of_a, started.redis_of_b, started.postgres_of_b):
        await link.heal()
    await started.well()


class Listener(Watcher):
    """A watcher that knows an order from its first event on."""

    told: list[tuple[str, dict[str, Any]]]

    async def __aenter__(self) -> Listener:
        await super().__aenter__()
        return self

    async def begin(self, order_id: str, after: int = 0) -> None:
        answer = await self.watch(order_id, after)
        self.told = [(event["type"], event["data"]) for event in answer["events"]]

    def all(self, order_id: str) -> list[tuple[str, dict[str, Any]]]:
        return self.told + self.events(order_id)


@asynccontextmanager
async def listening(order_id: str, *instances: Instance) -> AsyncIterator[list[Listener]]:
    """A customer and a merchant on each instance, each of whom follows the order from its beginning."""
    async with AsyncExitStack() as stack:
        found = []
        for instance in instances:
            for by in (CUSTOMER, SERVICE):
                listener = Listener(instance, by)
                await stack.enter_async_context(listener)
                await listener.begin(order_id)
                found.append(listener)
        yield found


async def listed(instance: Instance, order_id: str) -> list[tuple[str, dict[str, Any]]]:
    """What the table holds."""
    reply = await instance.get(f"/orders/{order_id}/events")
    assert reply.status == 200, reply
    return [(event["type"], event["data"]) for event in reply.body["events"]]


async def complete(instance: Instance, order_id: str, listeners: Sequence[Listener], within_s: float = SOON_S) -> None:
    """Every listener ends with exactly what the table holds. One more event shows that nothing trails behind."""
    top = len(await listed(instance, order_id))
    for listener in listeners:
        await until(
            lambda one=listener: len(one.all(order_id)) >= top,
            f"all {top} events at {listener._instance.log.name}: {listener.seqs(order_id)}",
            within_s,
        )
    await stir(instance, order_id, 1)
    wanted = await listed(instance, order_id)
    assert [data["seq"] for _, data in wanted] == list(range(1, top + 2))
    for listener in listeners:
        await listener.hears("deliveryAgentAssigned", orderId=order_id, seq=top + 1)
        assert listener.all(order_id) == wanted
        assert not listener.disconnected.is_set()


_agents = (f"somebody-{n}" for n in itertools.count())


async def stir(instance: Instance, order_id: str, events: int) -> None:
    """Make so many events, one after the other: somebody else is assigned each time."""
    for _ in range(events):
        await instance.assign(order_id, next(_agents))


@asynccontextmanager
async def again_and_again(act: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Somebody who does something all the time meanwhile, once at least."""
    enough = asyncio.Event()

    async def go_on() -> None:
        while True:
            await act()
            if enough.is_set():
                return
            await asyncio.sleep(PACE_S)

    task = asyncio.create_task(go_on())
    try:
        yield
    finally:
        enough.set()
        await task


async def says(instance: Instance, redis: str) -> bool:
    """Whether the instance is ready and its Redis is in this state."""
    reply = await instance.get("/health/ready", by=None)
    return reply.status == 200 and bool(reply.body["redis"] == redis)


async def metric(instance: Instance, name: str) -> float:
    text = (await instance.get("/metrics", by=None)).body.decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


async def placed(instance: Instance) -> str:
    order_id: str = (await instance.place(paymentMethod="later"))["id"]
    return order_id


async def timed(asking: Awaitable[Any]) -> tuple[float, Any]:
    """(seconds, the answer)."""
    began = time.monotonic()
    answer = await asking
    return time.monotonic() - began, answer


_later = itertools.count()


def position(lat: float = 12.97) -> dict[str, Any]:
    """Where somebody stands; each is newer than the one before."""
    return {"lat": lat, "lng": 77.59, "ts": int(time.time() * 1000) + next(_later)}


# Redis


async def test_what_an_instance_committed_before_it_died_is_published_by_the_others(two: Two) -> None:
    """Its Redis is frozen when it commits: what it said there is never heard."""
    async with proxied(two.fleet.redis_url) as redis_of_c:
        c = await two.fleet.start(REDIS_URL=redis_of_c.url, **QUICK)
        order_id = await placed(c)
        async with listening(order_id, two.a, two.b) as listeners:
            redis_of_c.freeze()
            await c.move(order_id, "confirmed", "preparing")
            c.kill()
            for listener in listeners:
                await listener.hears("orderStatusUpdate", orderId=order_id, status="preparing")
            await until(lambda: _relayed(two.a, two.b) >= 2, "a relay says that it was it")
            await complete(two.b, order_id, listeners)


def _relayed(*instances: Instance) -> int:
    records = [record for instance in instances for record in instance.log_records()]
    return sum(record["events"] for record in records if record["event"] == "relayed")


async def test_a_redis_link_that_is_cut_and_comes_back_loses_nothing(two: Two) -> None:
    order_id = await placed(two.a)
    async with listening(order_id, two.a, two.b) as listeners:
        async with again_and_again(lambda: stir(two.a, order_id, 1)):
            for _ in range(2):
                two.redis_of_b.refuse()
                two.redis_of_b.cut()
                await until(lambda: says(two.b, "degraded"), "the loss is noticed")
                await two.redis_of_b.heal()
                await until(lambda: says(two.b, "ok"), "it is back")
            for _ in range(6):
                losses = await metric(two.b, "waybill_bus_losses_total ")
                two.redis_of_b.cut()
                await until(lambda n=losses: _more(two.b, n), "the loss is counted")
                await until(lambda: says(two.b, "ok"), "it is back")
        # the last ones come while it is away: none after them reveals what is missing
        two.redis_of_b.refuse()
        two.redis_of_b.cut()
        await until(lambda: says(two.b, "degraded"), "the loss is noticed")
        await stir(two.a, order_id, 2)
        await two.redis_of_b.heal()
        await complete(two.b, order_id, listeners)


async def _more(instance: Instance, losses: float) -> bool:
    return await metric(instance, "waybill_bus_losses_total ") > losses


async def test_a_half_open_redis_link_loses_nothing(two: Two) -> None:
    order_id = await placed(two.a)
    turns = itertools.cycle((two.a, two.b))
    async with listening(order_id, two.a, two.b) as listeners:
        async with again_and_again(lambda: stir(next(turns), order_id, 1)):
            freezing = asyncio.create_task(two.redis_of_b.freeze_for(FROZEN_S))
            noticed_s, _ = await timed(until(lambda: says(two.b, "degraded"), "the silence is noticed"))
            assert noticed_s < (PING_MS + REDIS_TIMEOUT_MS) / 1000 + SLACK_S
            await freezing
            await until(lambda: says(two.b, "ok"), "it is back")
            # what it says arrives, what it is told does not; and the other way round
            for way in (two.redis_of_b.down, two.redis_of_b.up):
                way.freeze()
                await until(lambda: says(two.b, "degraded"), "the silence is noticed")
                way.move()
                await until(lambda: says(two.b, "ok"), "it is back")
        await complete(two.b, order_id, listeners)


async def test_a_redis_that_comes_back_empty_takes_nothing_with_it(fleet: Fleet, tmp_path: Path) -> None:
    redis = PrivateRedis(tmp_path)
    await redis.start()
    try:
        fleet.redis_url = redis.url
        a, b = await asyncio.gather(fleet.start(**QUICK), fleet.start(**QUICK))
        order_id, other_id = await placed(a), await placed(a)
        await a.assign(order_id, "first")
        async with (
            listening(order_id, a, b) as listeners,
            Watcher(b, token("agent", "first")) as first,
            Watcher(a, token("agent", "second")) as second,
        ):
            assert (await first.call("updateLocation", {"orderId": order_id, **position()}))["ok"]
            async with again_and_again(lambda: stir(a, other_id, 1)):
                redis.kill()
                for instance in (a, b):
                    await until(lambda i=instance: says(i, "degraded"), "the loss is noticed")
                await b.assign(order_id, "second")
                await a.move(order_id, "confirmed")
                await redis.start()
            for instance in (a, b):
                await until(lambda i=instance: says(i, "ok"), "it is back")
            answer = await first.call("updateLocation", {"orderId": order_id, **position()})
            assert answer["error"]["code"] == "not_found", "the new Redis does not know it, the table does"
            shown = {"orderId": order_id, **position()}
            assert (await second.call("updateLocation", shown))["ok"]
            for listener in listeners:
                await listener.hears("orderLocationUpdate", **shown)
            await complete(a, order_id, listeners)
    finally:
        await fleet.stop()
        redis.kill()


async def test_messages_that_redis_never_delivered_are_read_from_the_table(two: Two) -> None:
    order_id = await placed(two.a)
    async with listening(order_id, two.a, two.b) as listeners:
        # some are lost: the next one reveals it
        lost = Dropper(order_channel(order_id))
        two.redis_of_b.down.edit(lost)
        await stir(two.a, order_id, 5)
        await until(lambda: len(lost.dropped) == 5, "the messages are lost")
        assert [listener.seqs(order_id) for listener in listeners[2:]] == [[], []]
        await two.redis_of_b.heal()
        await stir(two.a, order_id, 1)
        await complete(two.a, order_id, listeners)
        # all are lost, with whatever else Redis said: coming back reveals it
        two.redis_of_b.down.swallow()
        await stir(two.a, order_id, 5)
        two.redis_of_b.cut()
        await two.redis_of_b.heal()
        await complete(two.a, order_id, listeners)


async def test_the_last_lost_message_is_found_by_looking(two: Two) -> None:
    """It has no successor that would reveal it, and the link stays healthy."""
    async with proxied(two.fleet.redis_url) as redis_of_c:
        own = {"REDIS_URL": redis_of_c.url, "GAP_CHECK_INTERVAL_S": "1", "REDIS_TIMEOUT_MS": "2000"}
        c = await two.fleet.start(**{**QUICK, **own})
        order_id = await placed(two.a)
        lost = Dropper(order_channel(order_id))
        async with listening(order_id, two.a, c) as listeners:
            for _ in range(2):
                await stir(two.a, order_id, 1)
                top = len(await listed(two.a, order_id))
                await until(lambda n=top: all(len(one.all(order_id)) == n for one in listeners), "all heard it")
                redis_of_c.down.edit(lost)
                lost.dropped.clear()
                await two.a.assign(order_id, next(_agents))
                await until(lambda: lost.dropped, "the message is lost")
                await redis_of_c.heal()
                found = until(lambda n=top: all(len(one.all(order_id)) == n + 1 for one in listeners), "all found it")
                found_s, _ = await timed(found)
                assert found_s < 1 + SLACK_S
            assert await metric(c, "waybill_gap_events_total ") >= 2
            assert await metric(c, "waybill_bus_losses_total ") == 0
            await complete(two.a, order_id, listeners)
        assert await c.stop() == 0


@pytest.mark.parametrize("how", ["cut", "frozen"])
async def test_while_redis_is_away_all_but_positions_goes_on(two: Two, how: str) -> None:
    """From the first moment on, in which nobody has noticed yet."""
    order_id = await placed(two.a)
    await two.a.assign(order_id, "rider")
    took: list[float] = []

    async def within(asking: Awaitable[Any]) -> Any:
        seconds, answer = await timed(asking)
        assert seconds < ANSWER_S, answer
        took.append(seconds)
        return answer

    async with (
        listening(order_id, two.a, two.b) as listeners,
        Watcher(two.b, token("agent", "rider")) as rider,
        Watcher(two.b, SERVICE) as watcher,
    ):
        here = {"orderId": order_id, **position()}
        assert (await rider.call("updateLocation", here))["ok"]
        for listener in listeners:
            await listener.hears("orderLocationUpdate", **here)
        if how == "frozen":
            two.redis_of_b.freeze()
        else:
            two.redis_of_b.refuse()
            two.redis_of_b.cut()
        for noticed in (False, True):
            if noticed:
                await until(lambda: says(two.b, "degraded"), "the loss is noticed")
            new_id = (await within(two.b.place(paymentMethod="later")))["id"]
            move = {"orderId": new_id, "status": "confirmed"}
            pushing = within(rider.call("updateLocation", {"orderId": order_id, **position()}))
            watching = within(watcher.call("subscribeToOrder", {"orderId": new_id}))
            moving = within(watcher.call("updateOrderStatus", move))
            pushed, watched, moved = await asyncio.gather(pushing, watching, moving)
            assert (watched["ok"], moved["ok"]) == (True, True)
            assert pushed["error"]["code"] == "unavailable"
            await within(two.b.move(new_id, "preparing"))
            await watcher.hears("orderStatusUpdate", orderId=new_id, status="preparing")
            assert (await within(two.b.get(f"/orders/{new_id}"))).body["status"] == "preparing"
        assert statistics.median(took) < USUALLY_S
        for where in (two.a, two.b):
            agent_id = next(_agents)
            await where.assign(order_id, agent_id)
            heard = (one.hears("deliveryAgentAssigned", agent={"id": agent_id}) for one in listeners[2:])
            heard_s, _ = await timed(asyncio.gather(*heard))
            assert heard_s < POLL_MS / 1000 + SLACK_S
        await two.b.assign(order_id, "rider")
        await two.redis_of_b.heal()
        await until(lambda: says(two.b, "ok"), "it is back")
        here = {"orderId": order_id, **position()}
        assert (await rider.call("updateLocation", here))["ok"]
        for listener in listeners:
            await listener.hears("orderLocationUpdate", **here)
        await complete(two.b, order_id, listeners)


@pytest.mark.parametrize("through", ["the same instance", "the other one"])
async def test_who_was_replaced_while_redis_was_frozen_is_shown_no_more(two: Two, through: str) -> None:
    """His positions are in the frozen link, and come out of it when it thaws."""
    order_id = await placed(two.a)
    await two.a.assign(order_id, "old")
    at = two.b if through == "the same instance" else two.a
    async with (
        listening(order_id, two.a, two.b) as listeners,
        Watcher(two.b, token("agent", "old")) as old,
        Watcher(two.a, token("agent", "new")) as new,
    ):

        async def push() -> None:
            await old.client.emit("updateLocation", {"orderId": order_id, **position(lat=12.97)})

        async with again_and_again(push):
            for listener in listeners:
                await listener.hears("orderLocationUpdate", orderId=order_id, lat=12.97)
            two.redis_of_b.freeze()
            pushed = await metric(two.b, "waybill_positions_total")
            await until(lambda: _reaches(two.b, "waybill_positions_total", pushed + 3), "some are in the frozen link")
            await at.assign(order_id, "new")
            for listener in listeners:
                await listener.hears("deliveryAgentAssigned", orderId=order_id, agent={"id": "new"})
            await two.redis_of_b.heal()
            await until(lambda: says(two.b, "ok"), "it is back")
            there = {"orderId": order_id, **position(lat=48.1)}

            async def taken() -> bool:
                return bool((await new.call("updateLocation", {**there, **position(lat=48.1)}))["ok"])

            await until(taken, "the new one is shown")
            for listener in listeners:
                await listener.hears("orderLocationUpdate", orderId=order_id, lat=48.1)
        await complete(two.b, order_id, listeners)
        for listener in listeners:
            names = [(name, data.get("agent")) for name, data in listener.heard]
            after = listener.heard[names.index(("deliveryAgentAssigned", {"id": "new"})) :]
            assert {data["lat"] for name, data in after if name == "orderLocationUpdate"} == {48.1}


async def _reaches(instance: Instance, name: str, least: float) -> bool:
    return await metric(instance, name) >= least


# Postgres


@pytest.mark.parametrize("how", ["cut", "frozen"])
async def test_while_postgres_is_away_watchers_stay_and_are_complete_afterwards(two: Two, how: str) -> None:
    order_id, other_id = await placed(two.a), await placed(two.a)
    async with listening(order_id, two.a, two.b) as listeners, Watcher(two.b, SERVICE) as watcher:
        async with again_and_again(lambda: stir(two.a, order_id, 1)):
            if how == "frozen":
                two.postgres_of_b.freeze()
            else:
                two.postgres_of_b.refuse()
                two.postgres_of_b.cut()
            # a hole that cannot be filled now
            lost = Dropper(order_channel(order_id))
            two.redis_of_b.down.edit(lost)
            await until(lambda: lost.dropped, "a message is lost")
            await two.redis_of_b.heal()
            for _ in range(2):
                refused_s, answer = await timed(watcher.call("subscribeToOrder", {"orderId": other_id}))
                assert answer["error"]["code"] == "unavailable"
                assert refused_s < ANSWER_S
            await two.postgres_of_b.heal()

            async def works() -> bool:
                return bool((await watcher.call("subscribeToOrder", {"orderId": other_id}))["ok"])

            await until(works, "subscribing works again")
        await complete(two.a, order_id, listeners)
        await two.b.move(other_id, "confirmed")
        await watcher.hears("orderStatusUpdate", orderId=other_id, status="confirmed")


# instances


async def test_whoever_is_sent_away_by_a_rolling_deploy_misses_nothing(two: Two) -> None:
    c = await two.fleet.start(**QUICK)
    order_id = await placed(c)
    async with (
        listening(order_id, two.a, two.b) as listeners,
        Listener(c, CUSTOMER) as before,
        Listener(two.b, CUSTOMER) as after,
    ):
        await before.begin(order_id)
        async with again_and_again(lambda: stir(two.a, order_id, 1)):
            await before.hears("deliveryAgentAssigned", orderId=order_id)
            await c.move(order_id, "confirmed")
            stopping = asyncio.create_task(c.stop())
            await before.hears("serverDraining")
            await asyncio.wait_for(before.disconnected.wait(), SOON_S)
            known = before.all(order_id)
            await after.begin(order_id, after=known[-1][1]["seq"])
            after.told = known + after.told
            assert await stopping == 0
        await complete(two.b, order_id, [*listeners, after])


async def test_a_subscriber_is_told_the_position_that_was_lost_with_the_link(two: Two) -> None:
    """What the room remembers is no answer any more once the bus was away."""
    order_id = await placed(two.a)
    await two.a.assign(order_id, "rider")
    async with Watcher(two.a, token("agent", "rider")) as rider, listening(order_id, two.b) as (watching, _):
        first, second = ({"orderId": order_id, **position()} for _ in range(2))
        assert (await rider.call("updateLocation", first))["ok"]
        await watching.hears("orderLocationUpdate", **first)
        assert (await watching.watch(order_id))["location"] == first
        two.redis_of_b.refuse()
        two.redis_of_b.cut()
        await until(lambda: says(two.b, "degraded"), "the loss is noticed")
        assert (await rider.call("updateLocation", second))["ok"]
        await two.redis_of_b.heal()
        await until(lambda: says(two.b, "ok"), "it is back")
        assert (await watching.watch(order_id))["location"] == second
