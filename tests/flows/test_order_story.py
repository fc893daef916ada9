"""One whole order across two instances, with the official client: whoever may watch it ends with the same list."""

from __future__ import annotations

import csv
import time
from typing import Any

from tests.flows.official import Node, OfficialSocket
from tests.harness import ROOT, SERVICE, Fleet, Instance, token

TRACE = ROOT / "tests" / "fixtures" / "traces" / "munich-car.csv"
POSITIONS = 100

CUSTOMER, STAFF, AGENT = token("customer", "c1"), token("staff", "s1"), token("agent", "rider-7")
OUTSIDERS = [token("customer", "c2"), token("agent", "rider-8")]
TRANSPORTS: list[dict[str, Any]] = [{}, {"transports": ["websocket"]}, {"transports": ["polling"]}]
"""What clients start with: polling that upgrades (the default), or one of the two alone."""

STORY: list[tuple[str, dict[str, Any]]] = [
    ("orderStatusUpdate", {"status": "pending"}),
    ("orderStatusUpdate", {"status": "confirmed", "previousStatus": "pending", "note": "Call before ringing"}),
    ("orderStatusUpdate", {"status": "preparing", "previousStatus": "confirmed"}),
    ("orderStatusUpdate", {"status": "ready", "previousStatus": "preparing"}),
    ("deliveryAgentAssigned", {"agent": {"id": "rider-7", "name": "Ravi Kumar", "vehicle": "KA 01 AB 1234"}}),
    ("orderStatusUpdate", {"status": "out_for_delivery", "previousStatus": "ready"}),
    ("orderOutForDelivery", {}),
    ("orderStatusUpdate", {"status": "delivered", "previousStatus": "out_for_delivery", "note": "Left with Meera"}),
    ("orderDelivered", {}),
]


def trace() -> list[dict[str, Any]]:
    """The recorded drive, a fix a second, moved to end now."""
    with TRACE.open(newline="") as file:
        fixes = list(csv.DictReader(file))[:POSITIONS]
    later = int(time.time() * 1000) - int(fixes[-1]["time_ms"])
    return [{"lat": float(fix["lat"]), "lng": float(fix["lng"]), "ts": int(fix["time_ms"]) + later} for fix in fixes]


def for_guests(events: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """What contract 5 leaves of the events for a guest that tracks."""
    redacted = []
    for name, data in events:
        kept = {key: value for key, value in data.items() if key not in ("note", "actor")}
        if "agent" in kept:
            kept["agent"] = {"name": kept["agent"]["name"].split()[0]}
        redacted.append((name, kept))
    return redacted


async def timeline(instance: Instance, order_id: str, by: str) -> list[tuple[str, dict[str, Any]]]:
    reply = await instance.get(f"/orders/{order_id}/events", by=by)
    assert reply.status == 200, reply
    assert [one["seq"] for one in reply.body["events"]] == list(range(1, reply.body["seq"] + 1))
    return [(one["type"], one["data"]) for one in reply.body["events"]]


async def guest_of(instance: Instance, order_id: str) -> str:
    """The token of somebody who follows a new tracking link of the order."""
    link = await instance.post(f"/orders/{order_id}/tracking-link", {}, by=CUSTOMER)
    assert link.status == 201, link
    given = await instance.post("/links/follow", {"secret": link.body["url"].rsplit("/", 1)[1]}, by=None)
    assert given.status == 200, given
    found: str = given.body["token"]
    return found


async def test_a_whole_order_is_the_same_story_for_everybody_who_may_watch_it(fleet: Fleet) -> None:
    a, b = await fleet.pair(LOCATION_MIN_INTERVAL_MS="0")
    fixes = trace()
    assert len(fixes) == POSITIONS

    order = await a.place(customerId="c1", paymentMethod="later")
    order_id = order["id"]
    elsewhere = await b.place(customerId="c1")
    guest, stranger = await guest_of(b, order_id), await guest_of(a, elsewhere["id"])

    async with Node() as node:
        full = [await node.connected(at, by, **how) for at in (a, b) for by in (CUSTOMER, STAFF) for how in TRANSPORTS]
        guests = [await node.connected(at, guest, **how) for at in (a, b) for how in TRANSPORTS]
        outside = [await node.connected(at, by) for at in (a, b) for by in (*OUTSIDERS, stranger)]
        agent, agents_other = await node.connected(a, AGENT), await node.connected(b, AGENT)
        for socket in full + guests:
            answer = await socket.watch(order_id, after=0)
            assert (answer["seq"], answer["location"]) == (1, None)
        for socket in outside:
            refused = await socket.call("subscribeToOrder", {"orderId": order_id, "afterSeq": 0})
            assert (refused["ok"], refused["error"]["code"]) == (False, "not_found")

        # the shop's backend and its staff, each at another instance
        confirmed = {"status": "confirmed", "note": "Call before ringing"}
        assert (await b.post(f"/orders/{order_id}/status", confirmed, by=SERVICE)).status == 200
        await a.move(order_id, "preparing", by=STAFF)
        await b.move(order_id, "ready", by=SERVICE)
        await a.assign(order_id, "rider-7", agentName="Ravi Kumar", vehicle="KA 01 AB 1234")

        # the agent: hears of it unasked, rides, and pushes as fast as the socket takes it
        for socket in (agent, agents_other):
            await socket.hears("deliveryAgentAssigned", orderId=order_id, seq=5)
            await socket.watch(order_id, after=0)
        assert await agent.call("updateOrderStatus", {"orderId": order_id, "status": "out_for_delivery"}) == {
            "ok": True,
            "seq": 7,
        }
        for answering in [agent.start("updateLocation", {"orderId": order_id, **fix}) for fix in fixes]:
            answer = await agent.answer(answering)
            assert answer["ok"], answer
        late = await node.connected(b, CUSTOMER)  # opens the page when the ride is nearly over
        assert (await late.watch(order_id, after=0))["location"] == {"orderId": order_id, **fixes[-1]}
        delivered = {"orderId": order_id, "status": "delivered", "note": "Left with Meera"}
        assert await agent.call("updateOrderStatus", delivered) == {"ok": True, "seq": 9}

        # everybody ends with the same list, which is the one of the table
        for socket in [*full, *guests, agent, agents_other, late]:
            await socket.reaches(order_id, 9)
        told = await timeline(b, order_id, SERVICE)
        assert [
            (name, {key: data.get(key) for key in said}) for (name, data), (_, said) in zip(told, STORY, strict=True)
        ] == STORY
        for socket in [*full, late]:
            assert socket.events(order_id) == told
        for socket in (agent, agents_other):
            # the assignment came twice by two ways: unasked, then in the answer, which holds what the client asked for
            assert socket.events(order_id) == [told[4], *told]
        redacted = await timeline(a, order_id, guest)
        assert redacted == for_guests(told)
        for socket in guests:
            assert socket.events(order_id) == redacted

        # all positions, in order, to all but the socket that pushed them
        shown = [{"orderId": order_id, **fix} for fix in fixes]
        for socket in [*full, *guests, agents_other]:
            assert socket.positions(order_id) == shown
        for socket in (agent, late):
            assert socket.positions(order_id) == []

        # outsiders: their sockets live, and have heard nothing
        await b.move(elsewhere["id"], "confirmed")
        for socket in outside:
            await _still_there(socket)
            assert socket.heard() == []
        for by in (*OUTSIDERS, stranger):
            for path in (f"/orders/{order_id}", f"/orders/{order_id}/events"):
                assert (await a.get(path, by=by)).code == "not_found"


async def _still_there(socket: OfficialSocket) -> None:
    answer = await socket.call("unsubscribeFromOrder", {"orderId": "none"})
    assert answer == {"ok": True}
