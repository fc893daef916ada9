"""Subscribing: one answer that is a snapshot, and after it every event once, in order, with none missing."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.flows.wire import Wire
from tests.harness import SERVICE, Fleet, Instance, Watcher, token, until

Pair = tuple[Instance, Instance]

CUSTOMER, STAFF = token("customer", "c1"), token("staff", "s1")


def guest(order_id: str) -> str:
    return token("guest", "visitor", orders=[order_id])


async def timeline(instance: Instance, order_id: str, by: str = SERVICE) -> list[dict[str, Any]]:
    reply = await instance.get(f"/orders/{order_id}/events", by=by)
    assert reply.status == 200, reply
    found: list[dict[str, Any]] = reply.body["events"]
    return found


async def settled(*watchers: Watcher) -> None:
    """What was on its way to these sockets before has arrived: answers queue behind it."""
    for watcher in watchers:
        assert await watcher.call("unsubscribeFromOrder", {"orderId": "none"}) == {"ok": True}


# the answer


async def test_the_answer_is_one_snapshot_and_has_this_shape(pair: Pair) -> None:
    a, b = pair
    order = await a.place()
    await a.move(order["id"], "confirmed", "preparing")
    await b.assign(order["id"], "rider-7", agentName="Ravi Kumar", vehicle="KA 01")
    for by in (SERVICE, STAFF, CUSTOMER, token("agent", "rider-7"), guest(order["id"])):
        for instance in pair:
            async with Watcher(instance, by) as watcher:
                answer = await watcher.call("subscribeToOrder", {"orderId": order["id"], "afterSeq": 0})
            read = await b.get(f"/orders/{order['id']}", by=by)
            assert answer == {
                "ok": True,
                "seq": 4,
                "order": read.body,
                "location": None,
                "events": await timeline(b, order["id"], by),
            }
            assert [event.keys() for event in answer["events"]] == [{"type", "seq", "at", "data"}] * 4
            assert answer["order"]["seq"] == answer["events"][-1]["seq"] == 4
            for event in answer["events"]:
                said = {"orderId": order["id"], "seq": event["seq"], "at": event["at"]}
                assert {name: event["data"][name] for name in said} == said


async def test_after_seq_says_which_events_the_answer_holds(pair: Pair) -> None:
    a, b = pair
    order = await a.place()
    await a.move(order["id"], "confirmed", "preparing", "ready", "out_for_delivery")
    events = await timeline(a, order["id"])
    assert len(events) == 6
    async with Watcher(b, CUSTOMER) as watcher:
        assert (await watcher.watch(order["id"]))["events"] == []
        for after in range(7):
            answer = await watcher.watch(order["id"], after=after)
            assert (answer["seq"], answer["events"]) == (6, events[after:])


@pytest.mark.parametrize("wrong", [2, 2**31, -1, 1.5, "1", True, None, [1]], ids=repr)
async def test_an_after_seq_that_cannot_be_is_invalid_and_subscribes_to_nothing(pair: Pair, wrong: Any) -> None:
    a, b = pair
    order = await a.place()
    async with Watcher(a, CUSTOMER) as asking, Watcher(a, CUSTOMER) as witness:
        refused = await asking.call("subscribeToOrder", {"orderId": order["id"], "afterSeq": wrong})
        assert (refused["ok"], refused["error"]["code"]) == (False, "invalid"), refused
        assert [error["pointer"] for error in refused["error"]["errors"]] == ["/afterSeq"]
        assert refused.keys() == {"ok", "error"}
        await witness.watch(order["id"])
        await b.move(order["id"], "confirmed")
        await witness.hears("orderStatusUpdate", seq=2)
        await settled(asking)
        assert asking.seqs(order["id"]) == []


async def test_an_invalid_resubscribe_leaves_the_subscription_as_it_was(pair: Pair) -> None:
    a, b = pair
    order = await a.place()
    async with Watcher(a, CUSTOMER) as watcher:
        await watcher.watch(order["id"])
        refused = await watcher.call("subscribeToOrder", {"orderId": order["id"], "afterSeq": 99})
        assert refused["error"]["code"] == "invalid"
        await b.move(order["id"], "confirmed")
        await watcher.hears("orderStatusUpdate", orderId=order["id"], seq=2)


async def test_who_may_not_see_the_order_gets_not_found_and_hears_nothing(pair: Pair) -> None:
    a, b = pair
    order, other = await a.place(), await a.place()
    await a.assign(order["id"], "rider-7")
    outsiders = [
        token("customer", "c2"),
        token("agent", "rider-8"),
        guest(other["id"]),
        token("guest", "visitor"),
        token("customer", "c1", orders=[other["id"]]),
        token("staff", "s1", orders=[other["id"]]),
    ]
    async with AsyncExitStack() as open_sockets:
        watchers = [(at, await open_sockets.enter_async_context(Watcher(at, by))) for at in pair for by in outsiders]
        witnesses = [await open_sockets.enter_async_context(Watcher(at, CUSTOMER)) for at in pair]
        for _, watcher in watchers:
            refused = await watcher.call("subscribeToOrder", {"orderId": order["id"], "afterSeq": 0})
            assert refused == {"ok": False, "error": {"code": "not_found", "message": refused["error"]["message"]}}
        for witness in witnesses:
            await witness.watch(order["id"])
        await b.move(order["id"], "confirmed", "preparing", "ready", "out_for_delivery", "delivered")
        for witness in witnesses:
            await witness.hears("orderDelivered", orderId=order["id"])
        for _, watcher in watchers:
            await settled(watcher)
            assert watcher.heard == []


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"orderId": "3f2b0c1e-0000-4000-8000-000000000000"}, "not_found"),
        ({"orderId": "no such order"}, "not_found"),
        ({"orderId": ""}, "invalid"),
        ({"orderId": 7}, "invalid"),
        ({}, "invalid"),
        ({"orderId": "x", "extra": 1}, "invalid"),
        (None, "invalid"),
        ("x", "invalid"),
    ],
    ids=repr,
)
async def test_an_order_that_is_none_is_refused(pair: Pair, asked: Any, code: str) -> None:
    async with Watcher(pair[0], CUSTOMER) as watcher:
        refused = await watcher.call("subscribeToOrder", asked)
        assert (refused["ok"], refused["error"]["code"]) == (False, code), refused


# live events


async def test_live_events_are_the_rows_of_the_table(pair: Pair) -> None:
    a, b = pair
    order = await a.place()
    async with AsyncExitStack() as open_sockets:
        watchers = {
            (at, by): await open_sockets.enter_async_context(Watcher(at, by))
            for at in pair
            for by in (SERVICE, CUSTOMER, guest(order["id"]))
        }
        for watcher in watchers.values():
            await watcher.watch(order["id"])
        await a.post(f"/orders/{order['id']}/status", {"status": "confirmed", "note": "Soon"}, by=STAFF)
        await b.assign(order["id"], "rider-7", agentName="Ravi Kumar", vehicle="KA 01")
        await a.move(order["id"], "preparing", "ready", "out_for_delivery", by=STAFF)
        await b.assign(order["id"], None)
        await b.move(order["id"], "delivered")
        for (_, by), watcher in watchers.items():
            await watcher.hears("orderDelivered", orderId=order["id"])
            told = await timeline(a, order["id"], by)
            assert watcher.events(order["id"]) == [(event["type"], event["data"]) for event in told[1:]]
        told = await timeline(a, order["id"])
        shorter = [
            (event["type"], {k: v for k, v in event["data"].items() if k not in ("orderId", "at")}) for event in told
        ]
        staff, service = {"role": "staff", "id": "s1"}, {"role": "service", "id": "shop"}
        assert shorter == [
            ("orderStatusUpdate", {"seq": 1, "status": "pending", "actor": service}),
            (
                "orderStatusUpdate",
                {"seq": 2, "status": "confirmed", "previousStatus": "pending", "note": "Soon", "actor": staff},
            ),
            ("deliveryAgentAssigned", {"seq": 3, "agent": {"id": "rider-7", "name": "Ravi Kumar", "vehicle": "KA 01"}}),
            ("orderStatusUpdate", {"seq": 4, "status": "preparing", "previousStatus": "confirmed", "actor": staff}),
            ("orderStatusUpdate", {"seq": 5, "status": "ready", "previousStatus": "preparing", "actor": staff}),
            ("orderStatusUpdate", {"seq": 6, "status": "out_for_delivery", "previousStatus": "ready", "actor": staff}),
            ("orderOutForDelivery", {"seq": 7}),
            ("deliveryAgentAssigned", {"seq": 8, "agent": None}),
            (
                "orderStatusUpdate",
                {"seq": 9, "status": "delivered", "previousStatus": "out_for_delivery", "actor": service},
            ),
            ("orderDelivered", {"seq": 10}),
        ]


async def test_resubscribing_on_the_same_connection_answers_anew_and_repeats_nothing_live(pair: Pair) -> None:
    a, b = pair
    order = await a.place()
    async with Wire(a, CUSTOMER) as wire:
        assert (await wire.call("subscribeToOrder", {"orderId": order["id"]}))["seq"] == 1
        await b.move(order["id"], "confirmed", "preparing")
        await until(lambda: wire.seqs(order["id"]) == [2, 3], "events 2 and 3")
        answer = await wire.call("subscribeToOrder", {"orderId": order["id"], "afterSeq": 1})
        assert [event["seq"] for event in answer["events"]] == [2, 3]  # though this connection has them already
        await b.move(order["id"], "ready")
        await until(lambda: wire.seqs(order["id"])[-1] == 4, "event 4")
        assert wire.seqs(order["id"]) == [2, 3, 4]


async def test_unsubscribing_stops_the_events_of_this_order_on_this_socket(pair: Pair) -> None:
    a, b = pair
    order, other = await a.place(), await a.place()
    async with Watcher(a, CUSTOMER) as leaving, Watcher(a, CUSTOMER) as staying:
        for watcher in (leaving, staying):
            await watcher.watch(order["id"])
        await leaving.watch(other["id"])
        await b.move(order["id"], "confirmed")
        await leaving.hears("orderStatusUpdate", orderId=order["id"], seq=2)
        assert await leaving.call("unsubscribeFromOrder", {"orderId": order["id"]}) == {"ok": True}
        await b.move(order["id"], "preparing")
        await b.move(other["id"], "confirmed")  # after the other event, by the same way
        await leaving.hears("orderStatusUpdate", orderId=other["id"], seq=2)
        await staying.hears("orderStatusUpdate", orderId=order["id"], seq=3)
        assert leaving.seqs(order["id"]) == [2]
        # again, and of an order that nobody watches: the same answer
        for order_id in (order["id"], "none"):
            assert await leaving.call("unsubscribeFromOrder", {"orderId": order_id}) == {"ok": True}
        answer = await leaving.watch(order["id"], after=2)
        assert [event["seq"] for event in answer["events"]] == [3]
        await b.move(order["id"], "ready")
        await leaving.hears("orderStatusUpdate", orderId=order["id"], seq=4)
        assert leaving.seqs(order["id"]) == [2, 4]


# many changes, many subscribes


class Follower:
    """A client that subscribes, subscribes again and leaves at random, while an order changes."""

    def __init__(self, wire: Wire, order_id: str, seed: int) -> None:
        self.wire, self.order_id = wire, order_id
        self._random = random.Random(seed)

    async def wander(self, calls: int) -> None:
        """End subscribed."""
        unanswered: list[int] = []
        for _ in range(calls):
            if self._random.random() < 0.3:
                unanswered.append(await self.wire.ask("unsubscribeFromOrder", {"orderId": self.order_id}))
            else:
                unanswered.append(await self.wire.ask("subscribeToOrder", self._subscribe()))
            if len(unanswered) > self._random.randrange(4):
                await self.wire.answer(unanswered.pop())
        await self.wire.call("subscribeToOrder", {"orderId": self.order_id})

    def _subscribe(self) -> dict[str, Any]:
        known = max(self.wire.seqs(self.order_id), default=1)
        after = self._random.choice([None, 0, known, max(0, known - 3)])
        return {"orderId": self.order_id} | ({} if after is None else {"afterSeq": after})

    def check(self, told: list[dict[str, Any]]) -> int | None:
        """Read the wire from its beginning. `told` is the table as this client may see it. Returns the number of the
        last event if the client ends subscribed.

        On the wire an answer that holds the order up to `seq` is followed by the events `seq` + 1, `seq` + 2, …, each
        once, until the next answer says something else.
        """
        rows = {event["seq"]: (event["type"], event["data"]) for event in told}
        at: int | None = None
        for kind, what, payload in self.wire.frames:
            if kind == "event":
                assert at is not None, f"event {payload} came though nothing is subscribed"
                assert payload["seq"] == at + 1, f"event {payload} came after {at}"
                assert (what, payload) == rows[payload["seq"]]
                at = payload["seq"]
            elif self.wire.asked[what][0] == "unsubscribeFromOrder":
                assert payload == {"ok": True}
                at = None
            else:
                assert payload["ok"], payload
                assert at is None or payload["seq"] >= at, f"the answer ends at {payload['seq']}, before {at}"
                at = payload["seq"]
                after = self.wire.asked[what][1].get("afterSeq")
                expected = [] if after is None else list(range(after + 1, payload["seq"] + 1))
                assert [event["seq"] for event in payload["events"]] == expected
                assert payload["order"]["seq"] == payload["seq"]
                for event in payload["events"]:
                    assert (event["type"], event["data"]) == rows[event["seq"]]
        return at


@pytest.mark.parametrize("seed", range(3))
async def test_nothing_overtakes_an_answer_and_nothing_comes_twice_however_wild_it_gets(
    fleet: Fleet, seed: int
) -> None:
    """Two instances change two orders without pause. Many sockets watch one of them; the other has one watcher on each
    instance, whose coming and going opens and closes the room."""
    # no look at the tops: what is missing must be noticed when it is missing
    a, b = await fleet.pair(RATE_LIMITS="off", GAP_CHECK_INTERVAL_S="600")
    crowded, lonely = (await a.place())["id"], (await a.place())["id"]
    for order_id in (crowded, lonely):
        await a.move(order_id, "confirmed", "preparing", "ready")
    done = False

    async def keep_assigning(order_id: str) -> None:
        number = 0
        while not done:
            number += 1
            await a.assign(order_id, f"rider-{number % 3}", agentName="Ravi Kumar")

    async def keep_moving(order_id: str) -> None:
        while not done:
            await b.move(order_id, "out_for_delivery", "delivery_failed")

    roles = [(crowded, by) for by in (SERVICE, CUSTOMER, guest(crowded))] + [(lonely, CUSTOMER)]
    async with AsyncExitStack() as open_sockets:
        followers = []
        for number, (at, (order_id, by)) in enumerate((at, role) for at in (a, b) for role in roles):
            wire = await open_sockets.enter_async_context(Wire(at, by))
            followers.append((Follower(wire, order_id, 1000 * seed + number), by))
        writing = [asyncio.create_task(write(x)) for write in (keep_assigning, keep_moving) for x in (crowded, lonely)]
        await asyncio.gather(*(follower.wander(60) for follower, _ in followers))
        done = True
        await asyncio.gather(*writing)
        for order_id in (crowded, lonely):
            await a.assign(order_id, None)
        for follower, by in followers:
            told = await timeline(a, follower.order_id, by)
            assert [event["seq"] for event in told] == list(range(1, len(told) + 1))
            assert len(told) > 50, "the order changed too seldom to prove anything"
            await until(lambda: follower.wire.seqs(follower.order_id)[-1:] == [len(told)], "the last event")  # noqa: B023
            assert follower.check(told) == len(told)


# agents


async def test_a_new_agent_hears_of_it_on_every_socket_once_subscribed_or_not(pair: Pair) -> None:
    a, b = pair
    order = await a.place()
    agent = token("agent", "rider-7")
    async with Watcher(a, agent) as first, Watcher(a, agent) as second, Watcher(b, agent) as third:
        everywhere = (first, second, third)
        await b.assign(order["id"], "rider-7", vehicle="bicycle")
        for socket in everywhere:
            await socket.hears("deliveryAgentAssigned", orderId=order["id"], seq=2)
        for socket in (first, third):
            await socket.watch(order["id"])
        await a.assign(order["id"], "rider-7", vehicle="scooter")
        for socket in everywhere:
            heard = await socket.hears("deliveryAgentAssigned", orderId=order["id"], seq=3)
            assert heard["agent"] == {"id": "rider-7", "vehicle": "scooter"}
        later = await a.place()
        await a.assign(later["id"], "rider-7")  # goes out behind whatever went out twice
        for socket in everywhere:
            await socket.hears("deliveryAgentAssigned", orderId=later["id"])
            assert socket.seqs(order["id"]) == [2, 3]


async def test_an_instance_that_dies_before_it_marks_what_it_sent_makes_nobody_hear_it_twice(fleet: Fleet) -> None:
    """The relay of the other instance finds unmarked rows and sends them again: it cannot know better."""
    a, b = await fleet.pair()
    order = await a.place()
    agent = token("agent", "rider-7")
    async with Watcher(a, agent) as idle, Watcher(a, agent) as riding, Watcher(a, CUSTOMER) as customer:
        await customer.watch(order["id"])
        await a.assign(order["id"], "rider-7")
        await riding.watch(order["id"])
        await b.assign(order["id"], "rider-7", vehicle="bicycle")
        b.kill()
        for watcher in (idle, riding, customer):
            await watcher.hears("deliveryAgentAssigned", orderId=order["id"], seq=3)

        async def sent_again() -> bool:
            return 'waybill_events_published_total{by="relay"}' in (await a.get("/metrics")).body.decode()

        await until(sent_again, "the relay sends it again")
        await a.assign(order["id"], "rider-7", vehicle="scooter")
        for watcher in (idle, riding, customer):
            await watcher.hears("deliveryAgentAssigned", orderId=order["id"], seq=4)
        assert (idle.seqs(order["id"]), riding.seqs(order["id"])) == ([2, 3, 4], [2, 3, 4])
        assert customer.seqs(order["id"]) == [2, 3, 4]


async def test_other_agents_and_narrowed_sockets_do_not_hear_of_an_assignment(pair: Pair) -> None:
    a, b = pair
    order, other = await a.place(), await a.place()
    async with (
        Watcher(a, token("agent", "rider-7")) as assigned,
        Watcher(a, token("agent", "rider-7", orders=[other["id"]])) as narrowed,
        Watcher(a, token("agent", "rider-8")) as colleague,
        Watcher(a, token("customer", "rider-7")) as namesake,
    ):
        await b.assign(order["id"], "rider-7")
        await assigned.hears("deliveryAgentAssigned", orderId=order["id"])
        for socket in (narrowed, colleague, namesake):
            await settled(socket)
            assert socket.heard == []


@pytest.mark.parametrize("successor", ["rider-8", None])
async def test_a_replaced_agent_is_shut_out_on_every_socket(pair: Pair, successor: str | None) -> None:
    a, b = pair
    order = await a.place()
    await a.assign(order["id"], "rider-7")
    agent = token("agent", "rider-7")
    async with (
        Wire(a, agent) as first,
        Wire(a, agent) as second,
        Wire(b, agent) as third,
        Watcher(b, CUSTOMER) as customer,
    ):
        for wire in (first, second, third):
            assert (await wire.call("subscribeToOrder", {"orderId": order["id"]}))["ok"]
        await customer.watch(order["id"])
        await b.assign(order["id"], successor)
        closed = ("event", "subscriptionClosed", {"orderId": order["id"], "code": "reassigned"})
        for wire in (first, second, third):
            await until(lambda: closed in wire.frames, f"subscriptionClosed; {wire.frames}")  # noqa: B023
        await a.move(order["id"], "confirmed")
        await customer.hears("orderStatusUpdate", orderId=order["id"], seq=4)
        assert customer.seqs(order["id"]) == [3, 4]
        for wire in (first, second, third):
            refused = await wire.call("subscribeToOrder", {"orderId": order["id"], "afterSeq": 0})
            assert refused["error"]["code"] == "not_found"
            # not even the event that names the successor
            assert wire.heard(order["id"]) == [closed[1:]]
        assert (await a.get(f"/orders/{order['id']}", by=agent)).code == "not_found"


async def test_an_agent_that_comes_and_goes_never_hears_what_is_not_its_own(fleet: Fleet) -> None:
    """Its sockets subscribe without pause while the order goes to and fro between it and another."""
    a, b = await fleet.pair(RATE_LIMITS="off")
    order_id = (await a.place())["id"]
    done = False

    async def keep_assigning() -> int:
        number = 0
        while not done:
            number += 1
            changed = await (a, b)[number % 2].assign(order_id, f"rider-{7 + number % 2}")
        seq: int = changed["seq"]
        return seq

    async def keep_subscribing(wire: Wire) -> None:
        for number in range(80):
            await wire.call("subscribeToOrder", {"orderId": order_id} | ({"afterSeq": 0} if number % 2 else {}))

    async with AsyncExitStack() as open_sockets:
        wires = [
            await open_sockets.enter_async_context(Wire(at, token("agent", "rider-7")))
            for at in (a, b)
            for _ in range(3)
        ]
        assigning = asyncio.create_task(keep_assigning())
        await asyncio.gather(*(keep_subscribing(wire) for wire in wires))
        done = True
        await assigning
        # the end is settled: assigned, subscribed, and told of the next thing that happens
        await a.assign(order_id, "rider-7", vehicle="on foot")
        for wire in wires:
            assert (await wire.call("subscribeToOrder", {"orderId": order_id}))["ok"]
        top = (await b.move(order_id, "confirmed"))["seq"]
        for wire in wires:
            await until(lambda: wire.seqs(order_id)[-1:] == [top], "the last event")  # noqa: B023

    told = await timeline(a, order_id)
    rows = {event["seq"]: event["data"] for event in told}
    for wire in wires:
        check_agent(wire, "rider-7", rows)


def check_agent(wire: Wire, agent_id: str, rows: dict[int, Any]) -> None:
    """Read an agent's wire from its beginning: subscribed, it hears every event until it is told that this is over;
    otherwise nothing but its own assignments."""
    at: int | None = None
    known = 0
    for kind, what, payload in wire.frames:
        if kind == "answer":
            assert payload["ok"] or payload["error"]["code"] == "not_found", payload
            at = payload["seq"] if payload["ok"] else None
            if payload["ok"]:
                assert payload["order"]["agent"]["id"] == agent_id
                known = max(known, payload["seq"])
        elif what == "subscriptionClosed":
            assert payload["code"] == "reassigned"
            at = None
        else:
            seq = payload["seq"]
            assert seq > known, f"{what} {seq} came after {known}"
            assert at is None or seq == at + 1, f"{what} {seq} came after {at}"
            assert payload == rows[seq]
            if what == "deliveryAgentAssigned":
                assert payload["agent"]["id"] == agent_id, "the old agent heard who came after it"
            else:
                assert at is not None, f"{what} {seq} came though nothing is subscribed"
            at = at if at is None else seq
            known = seq


# the long poll


async def watched(instance: Instance) -> int:
    """How many orders somebody watches on this instance; a waiting read counts."""
    text = (await instance.get("/metrics")).body.decode()
    return int(float(next(line.split()[1] for line in text.splitlines() if line.startswith("waybill_watched_orders "))))


async def test_a_waiting_read_ends_with_an_event_from_either_instance(pair: Pair) -> None:
    a, b = pair
    for reading, changing in ((a, b), (a, a)):
        order = await b.place()
        before = await watched(reading)
        waiting = [
            asyncio.create_task(reading.get(f"/orders/{order['id']}/events?after=1&wait=30", by=by))
            for by in (SERVICE, CUSTOMER, guest(order["id"]))
        ]

        async def all_wait(reading: Instance = reading, before: int = before) -> bool:
            return await watched(reading) > before

        await until(all_wait, "the reads wait")
        assert not any(task.done() for task in waiting)
        await changing.post(f"/orders/{order['id']}/status", {"status": "confirmed", "note": "Soon"})
        for task, by in zip(waiting, (SERVICE, CUSTOMER, guest(order["id"])), strict=True):
            async with asyncio.timeout(5):
                reply = await task
            assert reply.status == 200
            assert reply.body == {"events": (await timeline(b, order["id"], by))[1:], "seq": 2}


async def test_a_read_that_has_something_does_not_wait(pair: Pair) -> None:
    a, b = pair
    order = await a.place()
    await b.move(order["id"], "confirmed")
    async with asyncio.timeout(5):
        reply = await a.get(f"/orders/{order['id']}/events?after=0&wait=30")
    assert [event["seq"] for event in reply.body["events"]] == [1, 2]
    for query, code in (
        ("after=3&wait=30", "invalid"),
        ("after=-1", "invalid"),
        ("after=1.5", "invalid"),
        ("wait=soon", "invalid"),
        ("wait=-1", "invalid"),
    ):
        async with asyncio.timeout(5):
            assert (await a.get(f"/orders/{order['id']}/events?{query}")).code == code, query
    async with asyncio.timeout(5):
        refused = await a.get(f"/orders/{order['id']}/events?after=2&wait=30", by=token("customer", "c2"))
    assert refused.code == "not_found"


async def test_a_waiting_read_ends_empty_when_its_time_is_over(fleet: Fleet) -> None:
    a = await fleet.start(LONG_POLL_MAX_S="2")
    order = await a.place()
    for wait, seconds in ((1, 1), (600, 2)):
        began = time.monotonic()
        reply = await a.get(f"/orders/{order['id']}/events?after=1&wait={wait}")
        assert (reply.status, reply.body) == (200, {"events": [], "seq": 1})
        assert seconds - 0.05 <= time.monotonic() - began < seconds + 2
    assert await watched(a) == 0


async def test_waiting_reads_hold_no_connection_to_the_database_and_end_at_once_on_drain(fleet: Fleet) -> None:
    a = await fleet.start(DB_POOL_SIZE="2")
    orders = [await a.place() for _ in range(8)]
    waiting = [asyncio.create_task(a.get(f"/orders/{order['id']}/events?after=1&wait=30")) for order in orders]

    async def all_wait() -> bool:
        return await watched(a) == len(orders)

    await until(all_wait, "the reads wait")
    await a.place()  # there is a connection for this
    stopping = asyncio.create_task(a.stop())
    async with asyncio.timeout(5):
        replies = await asyncio.gather(*waiting)
    assert [(reply.status, reply.body) for reply in replies] == [(200, {"events": [], "seq": 1})] * len(orders)
    assert await stopping == 0


async def test_a_guest_whose_new_token_only_tracks_hears_no_more_than_that(pair: Pair) -> None:
    one, two = pair
    order_id = (await one.place())["id"]
    pays, tracks = (token("guest", "g1", orders=[order_id], scope=scope) for scope in ("pay", "track"))
    async with Watcher(two, pays) as guest:
        await guest.watch(order_id)
        await one.post(f"/orders/{order_id}/status", {"status": "confirmed", "note": "before"})
        assert (await guest.hears("orderStatusUpdate", status="confirmed"))["note"] == "before"
        assert (await guest.call("refreshToken", {"token": tracks}))["ok"]
        await one.post(f"/orders/{order_id}/status", {"status": "preparing", "note": "after"})
        heard = await guest.hears("orderStatusUpdate", status="preparing")
        assert "note" not in heard
        assert "actor" not in heard
