"""Snapshots from memory and in batches: what a subscriber is told is what the table holds, however it is found."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.flows.wire import Wire
from tests.harness import SERVICE, Fleet, Instance, Watcher, token, until

CUSTOMER, STAFF = token("customer", "c1"), token("staff", "s1")


async def counted(instance: Instance, metric: str) -> float:
    """The value of a metric with its labels, as /metrics writes it; 0 when it is not there yet."""
    text = (await instance.get("/metrics")).body.decode()
    return next((float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(metric + " ")), 0.0)


async def from_memory(instance: Instance) -> float:
    return await counted(instance, 'waybill_snapshots_total{source="memory"}')


async def from_table(instance: Instance) -> float:
    return await counted(instance, 'waybill_snapshots_total{source="table"}')


async def told(instance: Instance, order_id: str, by: str, after: int | None) -> dict[str, Any]:
    """What a subscriber must be told, as the REST door tells it."""
    order = (await instance.get(f"/orders/{order_id}", by=by)).body
    events = (await instance.get(f"/orders/{order_id}/events", by=by)).body["events"]
    return {
        "ok": True,
        "seq": order["seq"],
        "order": order,
        "location": None,
        "events": [] if after is None else events[after:],
    }


@pytest.fixture
async def alone(fleet: Fleet) -> Instance:
    return await fleet.start(RATE_LIMITS="off", GAP_CHECK_INTERVAL_S="600")


async def test_only_the_first_subscriber_of_a_state_is_read_for(alone: Instance) -> None:
    order = await alone.place()
    async with AsyncExitStack() as sockets:
        watchers = [await sockets.enter_async_context(Watcher(alone, CUSTOMER)) for _ in range(4)]
        await watchers[0].watch(order["id"], 0)
        assert (await from_table(alone), await from_memory(alone)) == (1, 0)
        for after in (None, 0, 1):
            for watcher in watchers:
                assert await watcher.watch(order["id"], after) == await told(alone, order["id"], CUSTOMER, after)
        assert (await from_table(alone), await from_memory(alone)) == (1, 12)
        await alone.move(order["id"], "confirmed", "preparing")
        for watcher in watchers:
            await watcher.hears("orderStatusUpdate", status="preparing")
        for number, watcher in enumerate(watchers):
            for after in (None, 0, 1, 2, 3):
                assert await watcher.watch(order["id"], after) == await told(alone, order["id"], CUSTOMER, after)
            assert await from_table(alone) == 2, f"watcher {number} was read for"


async def test_events_that_left_the_memory_are_read(fleet: Fleet) -> None:
    a = await fleet.start(ROOM_EVENTS_MAX="2", RATE_LIMITS="off")
    order = await a.place()
    await a.move(order["id"], "confirmed", "preparing", "ready")
    async with Watcher(a, CUSTOMER) as watcher:
        for after in (0, None, 4, 3, 2, 1, 0):
            assert await watcher.watch(order["id"], after) == await told(a, order["id"], CUSTOMER, after)
        assert (await from_table(a), await from_memory(a)) == (3, 4)


async def test_a_guest_is_never_given_what_was_kept_for_others(alone: Instance) -> None:
    order = await alone.place()
    order_id = order["id"]
    await alone.assign(order_id, "rider-7", agentName="Ravi Kumar", vehicle="KA 01")
    await alone.post(f"/orders/{order_id}/status", {"status": "confirmed", "note": "Ring twice"}, by=STAFF)
    tracks, pays = (token("guest", "g", orders=[order_id], scope=scope) for scope in ("track", "pay"))
    callers = [CUSTOMER, tracks, pays, STAFF, token("agent", "rider-7"), tracks, SERVICE, CUSTOMER]
    async with AsyncExitStack() as sockets:
        watchers = [(by, await sockets.enter_async_context(Watcher(alone, by))) for by in callers]
        for note in ("Soon", "Very soon"):
            for after in (0, None, 1):
                for by, watcher in watchers:
                    answer = await watcher.watch(order_id, after)
                    assert answer == await told(alone, order_id, by, after)
                    if by is tracks:
                        assert not {"Ring twice", "Kumar", "Meera", "MG Road", "rider-7"} & set(words(answer)), answer
            status = {"Soon": "preparing", "Very soon": "ready"}[note]
            await alone.post(f"/orders/{order_id}/status", {"status": status, "note": note}, by=STAFF)
            for _, watcher in watchers:
                await watcher.hears("orderStatusUpdate", status=status)
        assert await from_memory(alone) >= 30


def words(value: Any) -> list[str]:
    """Every text in a JSON value, whole and in its words."""
    if isinstance(value, dict):
        return [word for one in value.values() for word in words(one)]
    if isinstance(value, list):
        return [word for one in value for word in words(one)]
    return [value, *value.split()] if isinstance(value, str) else []


async def test_a_guest_whose_new_token_tells_less_is_told_less_at_once(alone: Instance) -> None:
    order_id = (await alone.place())["id"]
    pays, tracks = (token("guest", "g1", orders=[order_id], scope=scope) for scope in ("pay", "track"))
    async with Watcher(alone, CUSTOMER) as customer, Watcher(alone, pays) as guest:
        await customer.watch(order_id, 0)
        assert await guest.watch(order_id, 0) == await told(alone, order_id, pays, 0)
        assert (await guest.call("refreshToken", {"token": tracks}))["ok"]
        for _ in range(2):
            assert await guest.watch(order_id, 0) == await told(alone, order_id, tracks, 0)


async def test_an_agent_who_lost_the_order_is_told_nothing_though_it_is_in_memory(alone: Instance) -> None:
    order_id = (await alone.place())["id"]
    await alone.assign(order_id, "rider-7")
    async with Watcher(alone, CUSTOMER) as customer, Watcher(alone, token("agent", "rider-7")) as agent:
        for watcher in (customer, agent):
            await watcher.watch(order_id, 0)
        await alone.assign(order_id, "rider-8")
        await agent.hears("subscriptionClosed", code="reassigned")
        await customer.watch(order_id, 0)
        remembered = await from_memory(alone)
        await customer.watch(order_id, 0)
        assert await from_memory(alone) == remembered + 1
        for after in (0, 3, None):
            asked = {"orderId": order_id} | ({} if after is None else {"afterSeq": after})
            refused = await agent.call("subscribeToOrder", asked)
            assert refused["error"]["code"] == "not_found", refused


async def test_the_last_position_is_asked_once_and_then_heard(alone: Instance) -> None:
    order_id = (await alone.place())["id"]
    await alone.assign(order_id, "rider-7")
    agent = token("agent", "rider-7")
    now = int(time.time() * 1000)
    shown = [{"orderId": order_id, "lat": 12.97, "lng": 77.59, "ts": now + step} for step in range(3)]
    async with (
        Watcher(alone, agent) as rider,
        Watcher(alone, CUSTOMER) as early,
        Watcher(alone, CUSTOMER) as late,
    ):
        assert (await rider.call("updateLocation", shown[0]))["ok"]  # before anybody watches
        assert (await early.watch(order_id))["location"] == shown[0]
        assert (await late.watch(order_id))["location"] == shown[0]
        for position in shown[1:]:
            assert (await rider.call("updateLocation", position))["ok"]
            await early.hears("orderLocationUpdate", ts=position["ts"])
            assert (await late.watch(order_id))["location"] == position
        assert (await from_table(alone), await from_memory(alone)) == (1, 3)
        await alone.assign(order_id, "rider-8")
        await early.hears("deliveryAgentAssigned", seq=3)
        for _ in range(2):
            assert (await late.watch(order_id))["location"] is None
        # it is heard again from the first one of the next agent on
        assert (await early.watch(order_id))["location"] is None


async def test_many_that_come_at_once_share_few_statements(alone: Instance) -> None:
    orders = [(await alone.place())["id"] for _ in range(5)]
    async with AsyncExitStack() as sockets:
        wires = [await sockets.enter_async_context(Wire(alone, CUSTOMER)) for _ in range(40)]
        asked = [
            (wire, await wire.ask("subscribeToOrder", {"orderId": order_id, "afterSeq": 0}), order_id)
            for order_id in orders
            for wire in wires
        ]
        wanted = {order_id: await told(alone, order_id, CUSTOMER, 0) for order_id in orders}
        for wire, number, order_id in asked:
            assert await wire.answer(number) == wanted[order_id]
    questions = await counted(alone, 'waybill_batch_questions_sum{what="permits"}')
    statements = await counted(alone, 'waybill_batch_questions_count{what="permits"}')
    assert questions == len(asked)
    assert statements < questions / 2
    assert await from_memory(alone) + await from_table(alone) == len(asked)


class Caller:
    """A socket that subscribes again and again, with whatever `afterSeq`, and changes its token meanwhile."""

    def __init__(self, wire: Wire, order_id: str, tokens: list[str], seed: int) -> None:
        self.wire, self.order_id = wire, order_id
        self._tokens = tokens
        self._random = random.Random(seed)

    async def wander(self, calls: int) -> None:
        """End subscribed."""
        for _ in range(calls):
            dice = self._random.random()
            if dice < 0.1:
                await self.wire.call("unsubscribeFromOrder", {"orderId": self.order_id})
            elif dice < 0.25:
                assert (await self.wire.call("refreshToken", {"token": self._random.choice(self._tokens)}))["ok"]
            known = max([1, *self.wire.seqs(self.order_id)])
            after = self._random.choice([None, 0, known, known, max(0, known - 2)])
            asked = {"orderId": self.order_id} | ({} if after is None else {"afterSeq": after})
            await self.wire.call("subscribeToOrder", asked)

    def top(self) -> int:
        """The highest number on the wire."""
        return max(int(payload["seq"]) for _, _, payload in self.wire.frames if "seq" in payload)

    def check(self, rows: dict[str, dict[int, Any]]) -> int | None:
        """Read the wire from its beginning, beside the rows that each token may see. Returns the last number."""
        by, at = self._tokens[0], 0
        for kind, what, payload in self.wire.frames:
            if kind == "event":
                assert payload["seq"] == at + 1, f"event {payload['seq']} came after {at}"
                at = payload["seq"]
                assert {"type": what, "data": payload} == rows[by][at]
                continue
            name, asked = self.wire.asked[what]
            assert payload["ok"], payload
            if name == "refreshToken":
                by = asked["token"]
            elif name == "subscribeToOrder":
                assert payload["seq"] >= at
                at = payload["seq"]
                after = asked.get("afterSeq", at)
                assert payload["order"]["seq"] == at
                assert ("notes" in payload["order"]) == ("actor" in rows[by][1]["data"]), "it has the other view"
                assert [one["seq"] for one in payload["events"]] == list(range(after + 1, at + 1))
                for one in payload["events"]:
                    assert {"type": one["type"], "data": one["data"]} == rows[by][one["seq"]]
        return at


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_way_an_answer_is_found_it_and_what_follows_are_the_table(fleet: Fleet, seed: int) -> None:
    """An order changes on two instances without pause, while sockets subscribe, in both views and from one into the
    other. Nobody looks at the tops: what is missing must be noticed when it is missing."""
    a, b = await fleet.pair(RATE_LIMITS="off", GAP_CHECK_INTERVAL_S="600", SUBSCRIBE_BATCH_MAX="3")
    order_id = (await a.place())["id"]
    pays, tracks = (token("guest", "g1", orders=[order_id], scope=scope) for scope in ("pay", "track"))
    dice = random.Random(seed)
    done = False

    async def keep_assigning(instance: Instance, name: str) -> None:
        while not done:
            await instance.assign(order_id, name, agentName="Ravi Kumar")
            await asyncio.sleep(dice.random() / 50)  # else nothing stays long enough to be remembered

    async with AsyncExitStack() as sockets:
        callers = []
        for number, tokens in enumerate([[CUSTOMER], [pays, tracks], [tracks, pays], [SERVICE]] * 4):
            wire = await sockets.enter_async_context(Wire((a, b)[number % 3 == 0], tokens[0]))
            callers.append(Caller(wire, order_id, tokens, 100 * seed + number))
        writing = [asyncio.create_task(keep_assigning(at, name)) for at, name in ((a, "rider-1"), (b, "rider-2"))]
        await asyncio.gather(*(caller.wander(40) for caller in callers))
        done = True
        await asyncio.gather(*writing)
        top = (await b.assign(order_id, None))["seq"]
        for caller in callers:
            await until(lambda: caller.top() == top, "the last event")  # noqa: B023
        rows = {by: await listed(a, order_id, by) for by in (CUSTOMER, SERVICE, pays, tracks)}
        assert [caller.check(rows) for caller in callers] == [top] * len(callers)
    for instance in (a, b):
        assert await from_memory(instance) > 20, f"seed {seed}: memory was used too seldom to prove anything"
        assert await from_table(instance) > 20, f"seed {seed}: the table was read too seldom to prove anything"


async def listed(instance: Instance, order_id: str, by: str) -> dict[int, Any]:
    events = (await instance.get(f"/orders/{order_id}/events", by=by)).body["events"]
    return {event["seq"]: {"type": event["type"], "data": event["data"]} for event in events}
