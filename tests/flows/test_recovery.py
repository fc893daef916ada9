"""Connection state recovery with the official JavaScript client: who opted in comes back, asks for nothing, and has
every event once and in order."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from typing import Any

import aiohttp
import pytest

from server.embedded import DataServers
from tests.faults.proxy import proxied
from tests.flows.official import Node, OfficialSocket
from tests.flows.test_official_client import BRISK, CUSTOMER, every_transport
from tests.flows.test_rate_limits import metric
from tests.harness import Fleet, Instance, token, until
from tests.server.test_bus import Ear, bus

RECOVERY: dict[str, Any] = {"auth": {"recovery": True}, **BRISK}
FORGET = "for _, key in ipairs(redis.call('KEYS', 'waybill:session:*')) do redis.call('DEL', key) end return 1"
WEBSOCKET: dict[str, Any] = {"transports": ["websocket"]}


async def lose(socket: OfficialSocket, to: Instance) -> bool:
    """Lose the transport and come back to an instance; returns whether the client calls itself recovered."""
    before = len(socket.seen)
    socket.tell("lose", url=to.url)
    await socket.sees("disconnect", after=before)
    back = await socket.sees("connect", after=before)
    recovered: bool = back["recovered"]
    return recovered


async def proven(socket: OfficialSocket) -> None:
    """An answer that came after those to every subscribe: the proofs of those are with the server."""
    for _ in range(2):
        assert await socket.call("unsubscribeFromOrder", {"orderId": "none"}) == {"ok": True}


@every_transport
async def test_a_client_that_opted_in_is_recovered_on_another_instance(
    pair: tuple[Instance, Instance], how: dict[str, Any]
) -> None:
    a, b = pair
    one, two = await a.place(), await a.place()
    async with Node() as node:
        socket = await node.connected(a, CUSTOMER, **RECOVERY, **how)
        await socket.watch(one["id"], after=0)
        await socket.watch(two["id"], after=0)
        await a.move(one["id"], "confirmed", "preparing")
        await socket.reaches(one["id"], 3)
        for instance in (b, a, b):
            moved = asyncio.create_task(a.post(f"/orders/{two['id']}/assign", {"agentId": f"rider at {instance.port}"}))
            assert await lose(socket, instance)
            await moved
        await a.move(one["id"], "ready")
        await socket.reaches(one["id"], 4)
        await socket.reaches(two["id"], 4)
        assert socket.seqs(one["id"]) == [1, 2, 3, 4]
        assert socket.seqs(two["id"]) == [1, 2, 3, 4]


async def test_a_client_that_has_heard_nothing_yet_is_recovered(pair: tuple[Instance, Instance]) -> None:
    a, b = pair
    order = await a.place()
    async with Node() as node:
        socket = await node.connected(a, CUSTOMER, **RECOVERY, **WEBSOCKET)
        await socket.watch(order["id"])
        await proven(socket)
        assert await lose(socket, b)
        await a.move(order["id"], "confirmed")
        await socket.reaches(order["id"], 2)
        assert await lose(socket, a)
        await a.move(order["id"], "preparing")
        await socket.reaches(order["id"], 3)
        assert socket.seqs(order["id"]) == [2, 3]


async def test_a_client_without_subscriptions_is_recovered(pair: tuple[Instance, Instance]) -> None:
    async with Node() as node:
        socket = await node.connected(pair[0], CUSTOMER, **RECOVERY, **WEBSOCKET)
        await proven(socket)
        assert await lose(socket, pair[1])


async def test_handlers_of_everybody_else_see_one_argument(pair: tuple[Instance, Instance]) -> None:
    a, _ = pair
    order = await a.place()
    async with Node() as node:
        plain = await node.connected(a, CUSTOMER, **WEBSOCKET)
        other = await node.connected(a, CUSTOMER, auth={"recovery": False}, **WEBSOCKET)
        opted = await node.connected(a, CUSTOMER, **RECOVERY, **WEBSOCKET)
        for socket in (plain, other, opted):
            await socket.watch(order["id"])
        await a.move(order["id"], "confirmed", "preparing")
        for socket in (plain, other, opted):
            await socket.reaches(order["id"], 3)
        assert plain.offsets() == other.offsets() == []
        assert opted.offsets() == [f"{order['id']}:2", f"{order['id']}:3"]
        assert not await lose(plain, a)


async def test_what_was_left_stays_left(pair: tuple[Instance, Instance]) -> None:
    a, b = pair
    left, kept = await a.place(), await a.place()
    async with Node() as node:
        socket = await node.connected(a, CUSTOMER, **RECOVERY, **WEBSOCKET)
        await socket.watch(left["id"])
        await socket.watch(kept["id"])
        await socket.call("unsubscribeFromOrder", {"orderId": left["id"]})
        await proven(socket)
        assert await lose(socket, b)
        await a.move(left["id"], "confirmed")
        await a.move(kept["id"], "confirmed")
        await socket.reaches(kept["id"], 2)
        assert socket.seqs(left["id"]) == []


async def test_the_position_of_the_agent_comes_with_a_recovery(pair: tuple[Instance, Instance]) -> None:
    a, b = pair
    order = await a.place()
    await a.assign(order["id"], "rider")
    async with Node() as node:
        socket = await node.connected(a, CUSTOMER, **RECOVERY, **WEBSOCKET)
        await socket.watch(order["id"])
        await proven(socket)
        fix = {"lat": 12.97, "lng": 77.59, "ts": time.time() * 1000}
        reply = await a.post(f"/orders/{order['id']}/location", fix, by=token("agent", "rider"))
        assert reply.status == 200
        await socket.hears("orderLocationUpdate", orderId=order["id"])
        before = len(socket.positions(order["id"]))
        assert await lose(socket, b)
        await until(lambda: len(socket.positions(order["id"])) > before, "the last known position")


async def test_who_may_see_it_no_more_is_not_recovered(pair: tuple[Instance, Instance]) -> None:
    a, b = pair
    order = await a.place()
    await a.assign(order["id"], "rider")
    async with Node() as node:
        socket = await node.connected(a, token("agent", "rider"), **RECOVERY, **WEBSOCKET)
        await socket.watch(order["id"])
        await proven(socket)
        narrowed = token("agent", "rider", orders=["9e2c8d3c-4a8a-4bb5-8c06-9f4f6f0f5d11"])
        socket.tell("auth", auth={"token": narrowed, "recovery": True})
        assert not await lose(socket, b)
        await a.move(order["id"], "confirmed")
        assert (await socket.call("subscribeToOrder", {"orderId": order["id"]}))["error"]["code"] == "not_found"
        assert socket.seqs(order["id"]) == []


async def test_a_pid_is_of_no_use_to_somebody_else(pair: tuple[Instance, Instance]) -> None:
    a, b = pair
    order = await a.place()
    async with Node() as node:
        socket = await node.connected(a, CUSTOMER, **RECOVERY, **WEBSOCKET)
        await socket.watch(order["id"])
        await proven(socket)
        socket.tell("auth", auth={"token": token("customer", "c2"), "recovery": True})
        assert not await lose(socket, b)
        await a.move(order["id"], "confirmed")
        await proven(socket)
        assert socket.seqs(order["id"]) == []


async def test_after_a_redis_that_forgot_everything_the_client_asks_again(
    pair: tuple[Instance, Instance], data: DataServers
) -> None:
    """Not recovered, and the old offset harms nothing under the new pid."""
    a, b = pair
    order = await a.place()
    async with Node() as node:
        socket = await node.connected(a, CUSTOMER, **RECOVERY, **WEBSOCKET)
        await socket.watch(order["id"], after=0)
        await a.move(order["id"], "confirmed")
        await socket.reaches(order["id"], 2)
        async with bus(data.redis_url) as ear:
            await ear.bus.call("EVAL", FORGET, 0)
        await a.move(order["id"], "preparing")
        await socket.reaches(order["id"], 3)
        assert not await lose(socket, b)
        await socket.watch(order["id"], after=3)
        await proven(socket)
        assert await lose(socket, a)
        await a.move(order["id"], "ready")
        await socket.reaches(order["id"], 4)
        assert socket.seqs(order["id"]) == [1, 2, 3, 4]


async def test_a_subscribe_whose_answer_may_be_lost_is_not_recovered(pair: tuple[Instance, Instance]) -> None:
    """A client that answers no ping of its WebSocket has not shown that it got anything."""
    a, b = pair
    order = await a.place()
    async with aiohttp.ClientSession() as session:
        pid = await opened(session, a, order["id"], autoping=False)
        again, _ = await connect(session, b, {"pid": pid})
        assert again["pid"] != pid
        pid = await opened(session, a, order["id"], autoping=True)
        again, _ = await connect(session, b, {"pid": pid})
        assert again["pid"] == pid


async def test_who_cannot_be_told_to_redis_is_told_nothing_and_comes_back_without_a_session(fleet: Fleet) -> None:
    """Redis is silent when a client subscribes: its transport ends, and subscribing with afterSeq needs no Redis."""
    quick: dict[str, Any] = {"BUS_PING_INTERVAL_MS": "300", "REDIS_TIMEOUT_MS": "800", "BUS_FALLBACK_POLL_MS": "300"}
    async with proxied(fleet.redis_url) as link, Node() as node:
        instance = await fleet.start(REDIS_URL=link.url, **quick)
        try:
            order = await instance.place()
            socket = await node.connected(instance, CUSTOMER, **RECOVERY, **WEBSOCKET)
            link.freeze()
            before = len(socket.seen)
            unanswered = socket.start("subscribeToOrder", {"orderId": order["id"]})
            lost = await socket.sees("disconnect", after=before)
            assert lost["active"], "it comes back by itself"
            assert socket.find("ack", call=unanswered) is None
            back = await socket.sees("connect", after=before)
            assert not back["recovered"]
            await subscribed_at_last(socket, order["id"])
            await instance.move(order["id"], "confirmed")
            await socket.reaches(order["id"], 2)
            assert socket.offsets() == [], "it has no session, so nothing promises that it is recovered"
            assert await metric(instance, 'waybill_connections_cut_total{why="recovery_unsaved"}') >= 1
            await link.heal()
            await until(lambda: in_touch(instance), "Redis is back")
            assert not await lose(socket, instance)
            await socket.watch(order["id"], after=2)
            await proven(socket)
            assert await lose(socket, instance), "from now on there is a session again"
            await instance.move(order["id"], "preparing")
            await socket.reaches(order["id"], 3)
            assert socket.seqs(order["id"]) == [1, 2, 3]
        finally:
            await fleet.stop()  # before its link goes


async def subscribed_at_last(socket: OfficialSocket, order_id: str) -> None:
    """As an application does: subscribe after each connect. The first ones may come before the server knows that Redis
    is away."""
    while True:
        before = len(socket.seen)
        call = socket.start("subscribeToOrder", {"orderId": order_id, "afterSeq": 0})
        await until(
            lambda n=before, c=call: socket.find("ack", call=c) or socket.find("disconnect", after=n),
            "an answer or none",
        )
        if (answered := socket.find("ack", call=call)) is not None:
            assert answered["args"][0]["ok"], answered
            return
        await socket.sees("connect", after=before)


async def in_touch(instance: Instance) -> bool:
    return bool((await instance.get("/health/ready", by=None)).body["redis"] == "ok")


async def test_the_clients_of_a_killed_instance_are_recovered_on_the_other_while_events_move(fleet: Fleet) -> None:
    a, b = await fleet.pair()
    order = await b.place()
    async with Node() as node:
        sockets = [await node.connected(a, CUSTOMER, **RECOVERY, **WEBSOCKET) for _ in range(3)]
        for socket in sockets:
            await socket.watch(order["id"], after=0)
            await proven(socket)
        enough = asyncio.Event()
        moving = asyncio.create_task(stir(b, order["id"], enough))
        for socket in sockets:
            await socket.reaches(order["id"], 3)
        befores = [len(socket.seen) for socket in sockets]
        a.freeze()  # from here on it does nothing more, as if it were dead: not even its kernel tells the clients
        for socket in sockets:
            socket.tell("lose", url=b.url)
        a.kill()
        for socket, before in zip(sockets, befores, strict=True):
            assert (await socket.sees("connect", after=before))["recovered"]
        enough.set()
        await moving  # to its end: a request that is given up may still be carried out
        last = (await b.assign(order["id"], "last"))["seq"]
        for socket in sockets:
            await socket.reaches(order["id"], last)
            assert socket.seqs(order["id"]) == list(range(1, last + 1))


async def stir(instance: Instance, order_id: str, enough: asyncio.Event) -> None:
    """Events one after another until there are enough."""
    for rider in itertools.count():
        if enough.is_set():
            return
        await instance.assign(order_id, f"rider {rider}")


async def test_who_is_away_for_longer_than_sessions_are_kept_is_not_recovered(fleet: Fleet) -> None:
    """And who stays connected for longer than that is."""
    keep_s = 2
    instance = await fleet.start(RECOVERY_KEEP_S=str(keep_s))
    order = await instance.place()
    async with aiohttp.ClientSession() as session, bus(fleet.redis_url) as ear:
        answer, stays = await connect(session, instance, {})
        stayed = time.monotonic()
        gone = await opened(session, instance, order["id"], autoping=True)
        await until(lambda: forgotten(ear, gone), "its session is forgotten", 3 * keep_s)
        again, _ = await connect(session, instance, {"pid": gone})
        assert again["pid"] != gone
        await asyncio.sleep(max(stayed + keep_s + 0.5 - time.monotonic(), 0))
        await stays.close()
        again, _ = await connect(session, instance, {"pid": answer["pid"]})
        assert again["pid"] == answer["pid"]


async def forgotten(ear: Ear, pid: str) -> bool:
    return await ear.bus.call("EXISTS", f"waybill:session:{pid}") == 0


@pytest.mark.parametrize("pid", [None, 7, "", "x" * 24, "*", {"a": 1}])
async def test_a_pid_that_is_none_gets_a_new_one(pair: tuple[Instance, Instance], pid: Any) -> None:
    async with aiohttp.ClientSession() as session:
        answer, _ = await connect(session, pair[0], {"pid": pid, "offset": {"no": "offset"}})
        assert isinstance(answer["pid"], str)
        assert answer["pid"] != pid


async def connect(
    session: aiohttp.ClientSession, to: Instance, auth: dict[str, Any], **how: Any
) -> tuple[dict[str, Any], aiohttp.ClientWebSocketResponse]:
    """A bare socket that opts in; returns what CONNECT answered."""
    socket = await session.ws_connect(f"{to.url}/socket.io/?EIO=4&transport=websocket", **how)
    await socket.receive_str()
    await socket.send_str("40" + json.dumps({"token": CUSTOMER, "recovery": True, **auth}))
    answer = await socket.receive_str()
    assert answer.startswith("40"), answer
    return json.loads(answer[2:]), socket


async def opened(session: aiohttp.ClientSession, to: Instance, order_id: str, *, autoping: bool) -> str:
    """Subscribe on a bare socket and lose it; returns its pid."""
    answer, socket = await connect(session, to, {}, autoping=autoping)
    await socket.send_str('421["subscribeToOrder",' + json.dumps({"orderId": order_id}) + "]")
    assert (await socket.receive_str()).startswith("431")
    for number in (2, 3):  # with autoping, the pong to what came between goes out before this
        await socket.send_str(f'42{number}["unsubscribeFromOrder",{{"orderId":"none"}}]')
        while (message := await socket.receive()).type is not aiohttp.WSMsgType.TEXT:
            assert message.type is aiohttp.WSMsgType.PING
    await socket.close()
    pid: str = answer["pid"]
    return pid
