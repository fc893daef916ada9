"""Connection state recovery with the official JavaScript client: who opted in comes back, asks for nothing, and has
every event once and in order."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import aiohttp
import pytest

from server.embedded import DataServers
from tests.flows.official import Node, OfficialSocket
from tests.flows.test_official_client import BRISK, CUSTOMER, every_transport
from tests.harness import Instance, token, until
from tests.server.test_bus import bus

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
