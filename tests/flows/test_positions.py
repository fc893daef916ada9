"""Positions: the newest wins, they end with their assignment, and only the assigned agent has any."""

from __future__ import annotations

import asyncio
import itertools
import time
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.flows.wire import Wire
from tests.harness import SERVICE, Fleet, Instance, Watcher, token, until

Pair = tuple[Instance, Instance]

AGENT, COLLEAGUE, CUSTOMER = token("agent", "rider-7"), token("agent", "rider-8"), token("customer", "c1")
NOW = int(time.time() * 1000)
"""Unix milliseconds. Positions of a test are of the minute before or of the seconds after."""


def fix(step: int, *, ts: float | None = None, **more: Any) -> dict[str, Any]:
    """The `step`th position of a slow ride, a second and about a metre after the one before."""
    return {"lat": 12.97 + step / 100_000, "lng": 77.59, "ts": NOW + 1000 * (step - 60) if ts is None else ts, **more}


async def riding(instance: Instance, agent_id: str = "rider-7") -> str:
    """An order that the agent carries."""
    order_id: str = (await instance.place())["id"]
    await instance.assign(order_id, agent_id)
    return order_id


async def push(agent: Watcher, order_id: str, position: dict[str, Any]) -> str:
    """Push over the socket; "ok" or the code of the refusal."""
    answer = await agent.call("updateLocation", {"orderId": order_id, **position})
    if answer["ok"]:
        assert answer.keys() == {"ok", "nextIntervalMs"}
        assert isinstance(answer["nextIntervalMs"], int)
        return "ok"
    code: str = answer["error"]["code"]
    return code


async def post(instance: Instance, order_id: str, body: Any, by: str = AGENT) -> str:
    """Push by REST; "ok" or the code of the refusal."""
    reply = await instance.post(f"/orders/{order_id}/location", body, by=by)
    return "ok" if reply.status == 200 else reply.code


async def shown(watcher: Watcher, order_id: str, last: dict[str, Any]) -> list[float]:
    """The ts of all positions that the watcher was shown, when `last` has come."""
    await watcher.hears("orderLocationUpdate", orderId=order_id, ts=last["ts"])
    return [position["ts"] for position in watcher.positions(order_id)]


# who is shown what


async def test_watchers_on_every_instance_are_shown_what_the_agent_sent(pair: Pair) -> None:
    a, _ = pair
    order_id = await riding(a)
    guest = token("guest", "visitor", orders=[order_id])
    async with AsyncExitStack() as open_sockets:
        pushing = await open_sockets.enter_async_context(Watcher(a, AGENT))
        watchers = [
            await open_sockets.enter_async_context(Watcher(at, by))
            for at in pair
            for by in (CUSTOMER, guest, SERVICE, AGENT)
        ]
        for watcher in (pushing, *watchers):
            await watcher.watch(order_id)
        sent = [
            fix(0),
            fix(1, ts=NOW - 58_500.25),
            fix(2, accuracy=8.5, heading=0, speed=6.4),
            fix(3, accuracy=0, heading=359.9, speed=0, battery=17, isMocked=False, altitude=None),
            fix(4, heading=None),
        ]
        for position in sent:
            assert await push(pushing, order_id, position) == "ok"
        known = ("lat", "lng", "ts", "accuracy", "heading", "speed")
        wanted = [
            {"orderId": order_id} | {name: one[name] for name in known if one.get(name) is not None} for one in sent
        ]
        for watcher in watchers:
            await shown(watcher, order_id, sent[-1])
            assert watcher.positions(order_id) == wanted
            assert [type(position["ts"]) for position in watcher.positions(order_id)] == [int, float, int, int, int]
        # not to the socket that pushed them
        assert pushing.heard == []


async def test_a_push_that_wants_no_answer_is_shown_too(pair: Pair) -> None:
    a, b = pair
    order_id = await riding(a)
    async with Watcher(a, AGENT) as agent, Watcher(b, CUSTOMER) as watcher:
        await watcher.watch(order_id)
        for step in range(20):
            await agent.client.emit("updateLocation", {"orderId": order_id, **fix(step)})
        assert await shown(watcher, order_id, fix(19)) == [fix(step)["ts"] for step in range(20)]


async def test_positions_flow_in_every_status_from_assignment_to_the_end(pair: Pair) -> None:
    a, b = pair
    order_id = await riding(a)
    steps = itertools.count()
    async with Watcher(a, AGENT) as agent, Watcher(b, CUSTOMER) as watcher:
        await watcher.watch(order_id)
        for status in (
            None,
            "confirmed",
            "preparing",
            "ready",
            "out_for_delivery",
            "delivery_failed",
            "out_for_delivery",
        ):
            if status is not None:
                await b.move(order_id, status)
            position = fix(next(steps))
            assert await push(agent, order_id, position) == "ok", status
            await shown(watcher, order_id, position)
        await b.move(order_id, "delivered")
        await watcher.hears("orderDelivered", orderId=order_id)  # the other instance's word is on its way until then
        assert await push(agent, order_id, fix(next(steps))) == "order_closed"


# the newest wins


async def test_an_older_position_is_taken_and_not_shown(pair: Pair) -> None:
    order_id = await riding(pair[0])
    async with AsyncExitStack() as open_sockets:
        agents = [await open_sockets.enter_async_context(Watcher(at, AGENT)) for at in pair]
        watchers = [await open_sockets.enter_async_context(Watcher(at, CUSTOMER)) for at in pair]
        for watcher in watchers:
            await watcher.watch(order_id)
        elsewhere = fix(10, lat=12.9705)
        for agent, position in (
            (agents[0], fix(10)),
            (agents[1], fix(8)),  # older, by the other instance
            (agents[0], fix(9)),
            (agents[1], elsewhere),  # as old: the first one stays
            (agents[1], fix(12)),
            (agents[0], fix(11)),  # newer than all that this instance took itself
            (agents[1], fix(12, ts=fix(12)["ts"] + 1)),  # unmoved, a sign of life
            (agents[0], fix(13)),
        ):
            assert await push(agent, order_id, position) == "ok"
        for watcher in watchers:
            stamps = [fix(10)["ts"], fix(12)["ts"], fix(12)["ts"] + 1, fix(13)["ts"]]
            assert await shown(watcher, order_id, fix(13)) == stamps
            assert watcher.positions(order_id)[0]["lat"] == fix(10)["lat"]


async def test_a_subscriber_is_told_the_last_known_position(pair: Pair) -> None:
    a, b = pair
    order_id = await riding(a)
    guest = token("guest", "visitor", orders=[order_id])

    async def location(at: Instance, by: str = CUSTOMER) -> Any:
        async with Watcher(at, by) as watcher:
            return (await watcher.watch(order_id))["location"]

    async with Watcher(a, AGENT) as agent, Watcher(b, AGENT) as elsewhere:
        assert [await location(at) for at in pair] == [None, None]
        assert await push(elsewhere, order_id, fix(2)) == "ok"
        assert await push(agent, order_id, fix(5, speed=3, battery=50)) == "ok"
        for older, at in ((fix(4), agent), (fix(3), elsewhere)):
            assert await push(at, order_id, older) == "ok"
        last = {"orderId": order_id, **fix(5, speed=3)}
        assert [await location(at, by) for at in pair for by in (CUSTOMER, guest, SERVICE, AGENT)] == [last] * 8
        assert await push(agent, order_id, fix(6)) == "ok"
        assert [await location(at) for at in pair] == [{"orderId": order_id, **fix(6)}] * 2
        await b.assign(order_id, "rider-7", vehicle="bicycle")
        assert [await location(at) for at in pair] == [None, None], "it belongs to the assignment that was replaced"
        assert await push(agent, order_id, fix(7)) == "ok"
        assert [await location(at) for at in pair] == [{"orderId": order_id, **fix(7)}] * 2
        await b.assign(order_id, "rider-8")
        assert [await location(at) for at in pair] == [None, None]
        await b.assign(order_id, None)
        assert [await location(at) for at in pair] == [None, None]
        await b.assign(order_id, "rider-7")
        assert [await location(at) for at in pair] == [None, None], "from before, though it is the same agent"
        assert await push(agent, order_id, fix(8)) == "ok"
        assert [await location(at) for at in pair] == [{"orderId": order_id, **fix(8)}] * 2
        await b.move(order_id, "confirmed", "preparing", "ready", "out_for_delivery", "delivered")
        assert [await location(at) for at in pair] == [None, None]


# who is refused


async def test_whoever_is_not_the_assigned_agent_is_refused_and_shows_nothing(pair: Pair) -> None:
    a, b = pair
    order_id = await riding(a)
    unassigned: str = (await a.place())["id"]
    nowhere = "3f2b0c1e-0000-4000-8000-000000000000"
    intruders = [
        (COLLEAGUE, order_id, "not_found"),
        (AGENT, unassigned, "not_found"),
        (AGENT, nowhere, "not_found"),
        (AGENT, "no such order", "not_found"),
        (token("agent", "rider-7", orders=[unassigned]), order_id, "not_found"),
        (CUSTOMER, order_id, "forbidden"),
        (token("customer", "rider-7"), order_id, "forbidden"),
        (token("staff", "s1"), order_id, "forbidden"),
        (token("admin", "x1"), order_id, "forbidden"),
        (SERVICE, order_id, "forbidden"),
        (token("guest", "visitor", orders=[order_id]), order_id, "forbidden"),
    ]
    async with Watcher(a, CUSTOMER) as here, Watcher(b, CUSTOMER) as there, Watcher(a, AGENT) as agent:
        for watcher in (here, there):
            await watcher.watch(order_id)
        for by, at_order, code in intruders:
            for at in pair:
                async with Watcher(at, by) as intruder:
                    for _ in range(2):  # the second one is answered from memory
                        assert await push(intruder, at_order, fix(50)) == code, (by, at_order)
                assert await post(at, at_order, fix(51), by) == code
        assert await push(agent, order_id, fix(0)) == "ok"
        for watcher in (here, there):
            assert await shown(watcher, order_id, fix(0)) == [fix(0)["ts"]]


WRONG: dict[str, dict[str, Any]] = {
    "no latitude": {"lng": 77.59, "ts": NOW},
    "no time": {"lat": 12.97, "lng": 77.59},
    "beyond the pole": {"lat": 90.1, "lng": 0, "ts": NOW},
    "around the world": {"lat": 0, "lng": -180.5, "ts": NOW},
    "a text": {"lat": "12.97", "lng": 77.59, "ts": NOW},
    "a null": {"lat": None, "lng": 77.59, "ts": NOW},
    "a truth": {"lat": True, "lng": 77.59, "ts": NOW},
    "before 1970": {"lat": 12.97, "lng": 77.59, "ts": -1},
    "a time as text": {"lat": 12.97, "lng": 77.59, "ts": "2026-11-21T00:00:00Z"},
    "backwards": {"lat": 12.97, "lng": 77.59, "ts": NOW, "speed": -1},
    "off the compass": {"lat": 12.97, "lng": 77.59, "ts": NOW, "heading": 360.5},
}


async def test_what_is_no_position_is_invalid_and_shows_nothing(pair: Pair) -> None:
    a, b = pair
    order_id = await riding(a)
    async with Watcher(a, AGENT) as agent, Watcher(b, CUSTOMER) as watcher:
        await watcher.watch(order_id)
        for what, position in WRONG.items():
            assert await push(agent, order_id, position) == "invalid", what
            assert await post(b, order_id, position) == "invalid", what
            assert await post(b, order_id, {"positions": [fix(30), position]}) == "invalid", what
        for batch in ([], "x", None, [7]):
            assert await post(b, order_id, {"positions": batch}) == "invalid", batch
        assert await push(agent, order_id, fix(0)) == "ok"
        assert await shown(watcher, order_id, fix(0)) == [fix(0)["ts"]]


@pytest.mark.parametrize("ending", [("out_for_delivery", "delivered"), ("cancelled",)], ids=lambda to: to[-1])
async def test_a_finished_order_takes_no_position_by_any_door(pair: Pair, ending: tuple[str, ...]) -> None:
    a, b = pair
    order_id = await riding(a)
    await a.move(order_id, "confirmed", "preparing", "ready")
    async with Watcher(a, AGENT) as here, Watcher(b, AGENT) as there, Watcher(b, CUSTOMER) as watcher:
        await watcher.watch(order_id)
        for agent in (here, there):
            assert await push(agent, order_id, fix(0)) == "ok"
        await a.move(order_id, *ending)
        for step, agent in enumerate((here, there, here, there), 1):
            assert await push(agent, order_id, fix(step)) == "order_closed"
        for at in pair:
            assert await post(at, order_id, fix(9)) == "order_closed"
            assert await post(at, order_id, {"positions": [fix(10), fix(11)]}) == "order_closed"
        await watcher.hears("orderStatusUpdate", orderId=order_id, status=ending[-1])
        assert (await watcher.watch(order_id))["location"] is None
        assert [position["ts"] for position in watcher.positions(order_id)] == [fix(0)["ts"]]


async def test_an_agent_that_was_refused_is_let_in_when_it_is_told_of_its_assignment(pair: Pair) -> None:
    a, b = pair
    order_id = (await a.place())["id"]
    async with Watcher(a, AGENT) as here, Watcher(b, AGENT) as there, Watcher(b, CUSTOMER) as watcher:
        await watcher.watch(order_id)
        for agent in (here, there):
            assert await push(agent, order_id, fix(0)) == "not_found"
        await b.assign(order_id, "rider-7")
        for step, agent in enumerate((here, there), 1):
            await agent.hears("deliveryAgentAssigned", orderId=order_id)
            assert await push(agent, order_id, fix(step)) == "ok"
        assert await shown(watcher, order_id, fix(2)) == [fix(1)["ts"], fix(2)["ts"]]


# when the assignment ends


async def test_a_replaced_agent_is_refused_at_once_and_the_new_one_is_shown(pair: Pair) -> None:
    a, b = pair
    order_id = await riding(a)
    async with AsyncExitStack() as open_sockets:
        old = [await open_sockets.enter_async_context(Watcher(at, AGENT)) for at in pair]
        new = [await open_sockets.enter_async_context(Watcher(at, COLLEAGUE)) for at in pair]
        watchers = [await open_sockets.enter_async_context(Watcher(at, CUSTOMER)) for at in pair]
        for watcher in watchers:
            await watcher.watch(order_id)
        for step, agent in enumerate(old):
            assert await push(agent, order_id, fix(step)) == "ok"
        await a.assign(order_id, "rider-8")
        for agent in old:
            assert await push(agent, order_id, fix(20)) == "not_found"
            assert await post(a, order_id, fix(21)) == "not_found"
        # its clock is behind that of the old one: a new assignment begins anew
        for step, agent in enumerate(new):
            assert await push(agent, order_id, fix(step - 10)) == "ok"
        for watcher in watchers:
            assert await shown(watcher, order_id, fix(-9)) == [fix(step)["ts"] for step in (0, 1, -10, -9)]
        await b.assign(order_id, None)
        for agent in (*old, *new):
            assert await push(agent, order_id, fix(30)) == "not_found"


async def test_no_position_of_the_old_agent_is_shown_after_its_successor_was_named(fleet: Fleet) -> None:
    """Both push without pause at both instances, over sockets and by REST, while the order goes to and fro."""
    a, b = await fleet.pair(RATE_LIMITS="off")
    order_id = (await a.place())["id"]
    heading = {"rider-7": 7, "rider-8": 8}
    done = False

    async def keep_pushing(at: Instance, agent_id: str, stack: AsyncExitStack) -> None:
        agent = await stack.enter_async_context(Watcher(at, token("agent", agent_id)))
        ts = NOW
        while not done:
            ts += 1
            position = fix(0, ts=ts, heading=heading[agent_id])
            await agent.client.emit("updateLocation", {"orderId": order_id, **position})
            assert await push(agent, order_id, {**position, "ts": ts + 0.5}) in ("ok", "not_found")

    async def keep_posting(at: Instance, agent_id: str) -> None:
        ts = NOW
        while not done:
            ts += 1
            position = fix(0, ts=ts + 0.25, heading=heading[agent_id])
            assert await post(at, order_id, position, token("agent", agent_id)) in ("ok", "not_found")

    async with AsyncExitStack() as open_sockets:
        wires = [
            await open_sockets.enter_async_context(Wire(at, by))
            for at in (a, b)
            for by in (CUSTOMER, token("guest", "visitor", orders=[order_id]))
        ]
        for wire in wires:
            assert (await wire.call("subscribeToOrder", {"orderId": order_id}))["ok"]
        pushing = [
            asyncio.create_task(work)
            for at in (a, b)
            for agent_id in heading
            for work in (keep_pushing(at, agent_id, open_sockets), keep_posting(at, agent_id))
        ]
        for number in range(12):
            at, agent_id = (a, b)[number % 2], list(heading)[number // 2 % 2]
            await at.assign(order_id, agent_id if number % 5 else None, agentName=agent_id)
            if number % 5:
                seen = [len(wire.frames) for wire in wires]
                for wire, frames in zip(wires, seen, strict=True):
                    await until(
                        lambda: any(  # the new agent is shown on every instance
                            what == "orderLocationUpdate" and data["heading"] == heading[agent_id]  # noqa: B023
                            for _, what, data in wire.frames[frames:]  # noqa: B023
                        ),
                        f"a position of {agent_id}",
                    )
        await b.assign(order_id, None)
        top = (await a.get(f"/orders/{order_id}")).body["seq"]
        for wire in wires:
            await until(lambda: wire.seqs(order_id)[-1:] == [top], "the last event")  # noqa: B023
        done = True
        await asyncio.gather(*pushing)
        for wire in wires:
            await wire.call("unsubscribeFromOrder", {"orderId": order_id})

    for wire in wires:
        allowed = None
        for what, data in wire.heard(order_id):
            if what == "deliveryAgentAssigned":
                allowed = heading[data["agent"]["name"]] if data["agent"] else None
            else:
                assert data["heading"] == allowed, f"a position of {data['heading']} while {allowed} is assigned"


# by REST


async def test_rest_takes_one_position_or_a_batch(pair: Pair) -> None:
    a, b = pair
    order_id = await riding(a)
    async with Watcher(a, CUSTOMER) as here, Watcher(b, CUSTOMER) as there, Watcher(a, AGENT) as agent:
        for watcher in (here, there, agent):
            await watcher.watch(order_id)
        reply = await a.post(f"/orders/{order_id}/location", fix(0, accuracy=5), by=AGENT)
        assert reply.status == 200
        assert reply.body.keys() == {"accepted", "refused", "nextIntervalMs"}
        assert (reply.body["accepted"], reply.body["refused"]) == (1, [])
        assert isinstance(reply.body["nextIntervalMs"], int)
        # out of a buffer, and in no order
        reply = await b.post(f"/orders/{order_id}/location", {"positions": [fix(3), fix(1), fix(5), fix(4)]}, by=AGENT)
        assert (reply.status, reply.body["accepted"], reply.body["refused"]) == (200, 4, [])
        reply = await a.post(f"/orders/{order_id}/location", {"positions": [fix(2)]}, by=AGENT)
        assert (reply.status, reply.body["accepted"], reply.body["refused"]) == (200, 1, [])
        for watcher in (here, there, agent):  # the agent's sockets too: none of them pushed it
            stamps = await shown(watcher, order_id, fix(5))
            assert stamps == sorted(stamps), "an older one was shown after a newer one"
            assert stamps[0] == fix(0)["ts"]
            assert watcher.positions(order_id)[-1] == {"orderId": order_id, **fix(5)}
        most = {"positions": [fix(6, ts=fix(6)["ts"] + n) for n in range(100)]}
        assert (await a.post(f"/orders/{order_id}/location", most, by=AGENT)).body["accepted"] == 100
        assert await post(a, order_id, {"positions": [*most["positions"], fix(8)]}) == "too_large"
        assert (await a.post(f"/orders/{order_id}/location", fix(9), by=None)).code == "unauthenticated"


# thinned


INTERVAL_S = 0.5


async def test_thinning_shows_the_first_at_once_and_the_last_in_the_end(fleet: Fleet) -> None:
    a, b = await fleet.pair(LOCATION_MIN_INTERVAL_MS=str(int(INTERVAL_S * 1000)))
    order_ids = [await riding(a), await riding(a)]
    async with Watcher(a, AGENT) as agent, Watcher(a, CUSTOMER) as here, Watcher(b, CUSTOMER) as there:
        for order_id in order_ids:
            for watcher in (here, there):
                await watcher.watch(order_id)
        for order_id in order_ids:  # each order is thinned by itself
            began = time.monotonic()
            assert await push(agent, order_id, fix(0)) == "ok"
            for watcher in (here, there):
                await shown(watcher, order_id, fix(0))
            at_once = time.monotonic() - began < INTERVAL_S
            for step in range(1, 40):
                assert await push(agent, order_id, fix(step)) == "ok"
            pushed_s = time.monotonic() - began
            for watcher in (here, there):
                stamps = await shown(watcher, order_id, fix(39))
                assert stamps == sorted(stamps)
                assert len(stamps) <= pushed_s / INTERVAL_S + 2, "more than one an interval"
            assert at_once
            async with Watcher(b, CUSTOMER) as late:
                assert (await late.watch(order_id))["location"] == {"orderId": order_id, **fix(39)}
        # when it is quiet again, the next one is the first
        began = time.monotonic()
        for step in (40, 41):
            assert await push(agent, order_ids[0], fix(step)) == "ok"
        await shown(here, order_ids[0], fix(41))


async def test_a_position_that_waits_for_its_turn_ends_with_its_assignment(fleet: Fleet) -> None:
    a, b = await fleet.pair(LOCATION_MIN_INTERVAL_MS="1000")
    delivered, reassigned = await riding(a), await riding(a)
    clock = await riding(a)
    await a.move(delivered, "confirmed", "preparing", "ready", "out_for_delivery")
    async with Watcher(a, AGENT) as agent, Watcher(b, CUSTOMER) as watcher:
        for order_id in (delivered, reassigned, clock):
            await watcher.watch(order_id)
        for order_id in (delivered, reassigned):
            for step in (0, 1):  # the second one waits
                assert await push(agent, order_id, fix(step)) == "ok"
        await b.move(delivered, "delivered")
        await b.assign(reassigned, "rider-8")
        for step in (0, 1):
            assert await push(agent, clock, fix(step)) == "ok"
        await shown(watcher, clock, fix(1))  # whose turn is after that of the others
        for order_id in (delivered, reassigned):
            assert [position["ts"] for position in watcher.positions(order_id)] == [fix(0)["ts"]]


async def test_a_position_that_waits_does_not_keep_the_next_agent_from_being_shown(fleet: Fleet) -> None:
    """The old agent's clock is ahead of the new one's: newest wins within an assignment only."""
    a, b = await fleet.pair(LOCATION_MIN_INTERVAL_MS="1000")
    order_id = await riding(a)
    async with Watcher(a, AGENT) as old, Watcher(a, COLLEAGUE) as new, Watcher(b, CUSTOMER) as watcher:
        await watcher.watch(order_id)
        for step in (20, 21):  # the second one waits
            assert await push(old, order_id, fix(step)) == "ok"
        await a.assign(order_id, "rider-8")
        assert await push(new, order_id, fix(10)) == "ok"
        assert await shown(watcher, order_id, fix(10)) == [fix(20)["ts"], fix(10)["ts"]]


async def test_thinning_does_not_hide_that_the_order_is_closed(fleet: Fleet) -> None:
    a, b = await fleet.pair(LOCATION_MIN_INTERVAL_MS="60000")
    order_id = await riding(a)
    await a.move(order_id, "confirmed", "preparing", "ready", "out_for_delivery")
    async with Watcher(a, AGENT) as agent, Watcher(b, CUSTOMER) as watcher:
        await watcher.watch(order_id)
        for step in (0, 1):
            assert await push(agent, order_id, fix(step)) == "ok"
        await b.move(order_id, "delivered")
        await watcher.hears("orderDelivered", orderId=order_id)
        assert await push(agent, order_id, fix(2)) == "order_closed"
