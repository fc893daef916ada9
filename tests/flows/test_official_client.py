"""Connecting, staying and coming back with the official client from npm, and with the Python client."""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import json
import time
from typing import Any

import aiohttp
import pytest
import socketio

from tests.flows.official import Node, OfficialSocket
from tests.harness import READY_S, SOON_S, Fleet, Instance, Watcher, free_port, token, until

CUSTOMER = token("customer", "c1")
TRANSPORTS: dict[str, dict[str, Any]] = {
    "websocket": {"transports": ["websocket"]},
    "polling start": {},
    "polling": {"transports": ["polling"]},
}
every_transport = pytest.mark.parametrize("how", TRANSPORTS.values(), ids=TRANSPORTS.keys())

BRISK = {"reconnectionDelay": 50, "reconnectionDelayMax": 200}
"""Options of a client that does not spread its attempts over seconds."""


def unsigned(claims: dict[str, Any]) -> str:
    parts = [json.dumps(part).encode() for part in ({"alg": "none", "typ": "JWT"}, claims)]
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts) + "."


async def alive(socket: OfficialSocket) -> None:
    assert await socket.call("unsubscribeFromOrder", {"orderId": "none"}) == {"ok": True}


# connecting


@every_transport
async def test_events_and_answers_come_over_every_transport(
    pair: tuple[Instance, Instance], how: dict[str, Any]
) -> None:
    a, b = pair
    order = await a.place()
    async with Node() as node:
        socket = await node.connected(a, CUSTOMER, **how)
        answer = await socket.watch(order["id"], after=0)
        assert [event["seq"] for event in answer["events"]] == [1]
        await b.move(order["id"], "confirmed", "preparing")
        await socket.reaches(order["id"], 3)
        assert socket.seqs(order["id"]) == [1, 2, 3]
    assert [record["what"] for record in socket.seen].count("connect") == 1


async def test_an_upgrade_in_the_middle_of_a_busy_order_costs_no_event(pair: tuple[Instance, Instance]) -> None:
    """Clients that start with polling subscribe at once, and change the transport while events pour in."""
    a, b = pair
    order = await a.place()
    upgraded = asyncio.Event()

    async def keep_changing() -> int:
        number = 0
        while not upgraded.is_set():
            number += 1
            changed = await (a, b)[number % 2].assign(order["id"], f"rider-{number}")
        seq: int = changed["seq"]
        return seq

    async with Node() as node:
        changing = asyncio.create_task(keep_changing())
        sockets = [node.socket(at, CUSTOMER) for at in (a, b) * 10]
        calls = [socket.start("subscribeToOrder", {"orderId": order["id"], "afterSeq": 0}) for socket in sockets]
        for socket, call in zip(sockets, calls, strict=True):
            assert (await socket.answer(call))["ok"]
            await socket.sees("open", transport="polling")
            await socket.sees("upgrade", transport="websocket")
        upgraded.set()
        top = await changing
        for socket in sockets:
            await socket.reaches(order["id"], top)
            assert socket.seqs(order["id"]) == list(range(1, top + 1))


async def test_a_polling_client_that_leaves_is_let_go_at_once(pair: tuple[Instance, Instance]) -> None:
    """Its poll is answered: else it hangs until the ping times out, and a drain waits for it."""
    url = f"{pair[0].url}/socket.io/?EIO=4&transport=polling"
    async with aiohttp.ClientSession() as session:

        async def post(packet: str) -> None:
            async with session.post(f"{url}&sid={sid}", data=packet) as response:
                assert response.status == 200

        async def poll() -> str:
            async with session.get(f"{url}&sid={sid}") as response:
                return await response.text()

        async with session.get(url) as response:
            sid = json.loads((await response.text())[1:])["sid"]
        await post("40" + json.dumps({"token": CUSTOMER}))
        assert (await poll()).startswith("40")
        waiting = asyncio.create_task(poll())
        await post('421["unsubscribeFromOrder",{"orderId":"none"}]')
        assert await waiting == '431[{"ok":true}]'
        waiting = asyncio.create_task(poll())
        await post("1")
        async with asyncio.timeout(SOON_S):
            await waiting


EXPIRED = token("customer", "c1", ttl_s=-10)
REFUSED: dict[str, dict[str, Any]] = {
    "missing": {"auth": {}},
    "no auth at all": {},
    "null": {"auth": {"token": None}},
    "expired": {"auth": {"token": EXPIRED}},
    "garbage": {"auth": {"token": "garbage"}},
    "a number": {"auth": {"token": 7}},
    "other key": {"auth": {"token": CUSTOMER[:-6] + "AAAAAA"}},
    "unsigned": {"auth": {"token": unsigned({"sub": "c1", "role": "admin", "exp": int(time.time()) + 60})}},
}


async def test_a_bad_token_is_refused_for_good_with_its_code(pair: tuple[Instance, Instance]) -> None:
    async with Node() as node:
        sockets = {
            (why, name): node.socket(pair[0], None, **given, **how)
            for why, given in REFUSED.items()
            for name, how in TRANSPORTS.items()
        }
        for which, socket in sockets.items():
            refusal = await socket.sees("connect_error")
            assert refusal["data"] == {"code": "unauthenticated", "message": refusal["message"]}, which
            assert refusal["message"], which
            assert not refusal["active"], f"{which}: the client would try again"
        # the same socket with a good token is let in
        socket = sockets["expired", "websocket"]
        socket.tell("auth", auth={"token": CUSTOMER})
        socket.tell("connect")
        await socket.sees("connect")


# coming back


async def test_a_killed_instance_comes_back_and_its_clients_miss_nothing(fleet: Fleet) -> None:
    port = str(free_port())
    a, b = await fleet.start(PORT=port), await fleet.start()
    order_id = (await a.place())["id"]
    async with Node() as node:
        sockets = [await node.connected(a, CUSTOMER, **how, **BRISK) for how in TRANSPORTS.values()]
        for socket in sockets:
            await socket.watch(order_id, after=0)
        await b.move(order_id, "confirmed")
        for socket in sockets:
            await socket.reaches(order_id, 2)

        a.kill()
        for socket in sockets:
            assert (await socket.sees("disconnect"))["active"], "the client must come back by itself"
        await b.move(order_id, "preparing", "ready")
        await b.assign(order_id, "rider-7")
        seen = {socket: len(socket.seen) for socket in sockets}
        await fleet.start(PORT=port)
        for socket in sockets:
            await socket.sees("connect", after=seen[socket])
            answer = await socket.watch(order_id, after=max(socket.seqs(order_id)))
            assert [event["seq"] for event in answer["events"]] == [3, 4, 5]
        await b.move(order_id, "out_for_delivery")
        for socket in sockets:
            await socket.reaches(order_id, 7)
            assert socket.seqs(order_id) == [1, 2, 3, 4, 5, 6, 7]


async def test_a_drained_instance_says_so_and_its_clients_come_back_by_themselves(fleet: Fleet) -> None:
    port = str(free_port())
    a, b = await fleet.start(PORT=port), await fleet.start()
    order_id = (await a.place())["id"]
    async with Node() as node:
        sockets = {name: await node.connected(a, CUSTOMER, **how, **BRISK) for name, how in TRANSPORTS.items()}
        for socket in sockets.values():
            await socket.watch(order_id, after=0)

        began = time.monotonic()
        assert await a.stop() == 0
        assert time.monotonic() - began < 4, "nothing was running that a drain has to wait for"
        seen = {}
        for name, socket in sockets.items():
            gone = await socket.sees("disconnect")
            assert gone["active"], "the client must come back by itself"
            assert gone["reason"] == "transport close" or (name, gone["reason"]) == ("polling", "transport error")
            assert socket.heard() == [("serverDraining", {"retryInMs": 1000})]
            seen[name] = len(socket.seen)
        await b.move(order_id, "confirmed", "preparing")
        fresh = await fleet.start(PORT=port)
        for name, socket in sockets.items():
            await socket.sees("connect", after=seen[name])
            await socket.watch(order_id, after=max(socket.seqs(order_id)))
        await fresh.move(order_id, "ready")
        for socket in sockets.values():
            await socket.reaches(order_id, 4)
            assert socket.seqs(order_id) == [1, 2, 3, 4]


# tokens that end


def short(seconds: float, sub: str = "c1", **claims: Any) -> str:
    return token("customer", sub, ttl_s=seconds, **claims)


async def test_an_expired_session_is_ended_and_a_refreshed_one_is_not(fleet: Fleet) -> None:
    a, b = await fleet.pair(TOKEN_EXPIRY_GRACE_S="1")
    order_id = (await a.place())["id"]
    async with Node() as node:
        ending = int(time.time()) + 6
        brief, longer = short(ending - int(time.time())), short(600)
        kept = [await node.connected(a, brief, **how, **BRISK) for how in TRANSPORTS.values()]
        lost = [await node.connected(a, brief, **how, **BRISK) for how in TRANSPORTS.values()]
        for socket in (*kept, *lost):
            await socket.watch(order_id, after=0)
            told = await socket.hears("tokenExpiring")
            assert 0 <= _seconds(told["expiresAt"]) - ending <= 1
        for socket in kept:
            answer = await socket.call("refreshToken", {"token": longer})
            assert answer.keys() == {"ok", "expiresAt"}
            assert answer["ok"] is True
            assert 590 < _seconds(answer["expiresAt"]) - time.time() <= 600

        for socket in lost:
            gone = await socket.sees("disconnect")
            assert time.time() >= ending
            assert (gone["reason"], gone["active"]) == ("io server disconnect", False)
            assert socket.heard()[-2:] == [
                ("subscriptionClosed", {"orderId": order_id, "code": "expired"}),
                ("disconnected", {"code": "expired"}),
            ]
        await b.move(order_id, "confirmed")
        for socket in kept:
            await socket.reaches(order_id, 2)
            assert [name for name, _ in socket.heard()] == ["tokenExpiring", "orderStatusUpdate"]
            assert socket.find("disconnect") is None
        for socket in lost:
            assert socket.seqs(order_id) == [1]
            # who was sent away comes back with a new token
            socket.tell("auth", auth={"token": longer})
            socket.tell("connect")
            await socket.watch(order_id, after=1)
            assert socket.seqs(order_id) == [1, 2]


def _seconds(rfc3339: str) -> float:
    return dt.datetime.fromisoformat(rfc3339).timestamp()


async def test_a_refresh_that_is_refused_extends_nothing(fleet: Fleet) -> None:
    a = await fleet.start(TOKEN_EXPIRY_GRACE_S="1")
    order = await a.place()
    async with Node() as node:
        socket = await node.connected(a, short(4), transports=["websocket"])
        await socket.watch(order["id"])
        for given, code in (
            ({"token": "garbage"}, "unauthenticated"),
            ({"token": EXPIRED}, "unauthenticated"),
            ({"token": short(600, sub="c2")}, "forbidden"),
            ({"token": token("staff", "c1")}, "forbidden"),
            ({}, "invalid"),
            ({"token": 7}, "invalid"),
        ):
            refused = await socket.call("refreshToken", given)
            assert (refused["ok"], refused["error"]["code"]) == (False, code), given
        await alive(socket)
        assert (await socket.sees("disconnect"))["reason"] == "io server disconnect"
        assert socket.heard()[-1] == ("disconnected", {"code": "expired"})


async def test_a_session_about_to_expire_is_told_so_once_until_a_refresh_buys_time(fleet: Fleet) -> None:
    a = await fleet.start(TOKEN_EXPIRY_NOTICE_S="10")
    async with Node() as node:
        socket = await node.connected(a, short(9), transports=["websocket"])
        first = await socket.hears("tokenExpiring")
        assert (await socket.call("refreshToken", {"token": short(9.5)}))["ok"]  # no reason to say it again
        again = await socket.call("refreshToken", {"token": short(12)})
        second = await socket.hears("tokenExpiring", expiresAt=again["expiresAt"])
        # later clients are told in later sweeps: by then a repeat would have come
        for _ in range(2):
            later = await node.connected(a, short(9), transports=["websocket"])
            await later.hears("tokenExpiring")
        await alive(socket)
        assert socket.heard() == [("tokenExpiring", first), ("tokenExpiring", second)]


async def test_a_narrower_token_closes_what_it_does_not_reach(pair: tuple[Instance, Instance]) -> None:
    a, b = pair
    kept, dropped = await a.place(), await a.place()
    async with Node() as node:
        socket = await node.connected(a, CUSTOMER, transports=["websocket"])
        for order in (kept, dropped):
            await socket.watch(order["id"])
        assert (await socket.call("refreshToken", {"token": short(600, orders=[kept["id"]])}))["ok"]
        await socket.hears("subscriptionClosed", orderId=dropped["id"], code="revoked")
        await b.move(dropped["id"], "confirmed")
        await b.move(kept["id"], "confirmed")
        await socket.hears("orderStatusUpdate", orderId=kept["id"])
        assert (socket.seqs(kept["id"]), socket.seqs(dropped["id"])) == ([2], [])
        refused = await socket.call("subscribeToOrder", {"orderId": dropped["id"]})
        assert refused["error"]["code"] == "not_found"


# several sockets of one user


async def test_sockets_of_one_user_do_not_disturb_each_other(pair: tuple[Instance, Instance]) -> None:
    a, b = pair
    order = await a.place()
    async with Node() as node:
        sockets = [await node.connected(at, CUSTOMER, **how) for at in pair for how in TRANSPORTS.values()]
        assert len({record["id"] for socket in sockets for record in socket.seen if record["what"] == "connect"}) == 6
        for socket in sockets:
            await socket.watch(order["id"], after=0)
        leaving, silent, *staying = sockets
        leaving.tell("close")
        assert (await leaving.sees("disconnect"))["reason"] == "io client disconnect"
        assert await silent.call("unsubscribeFromOrder", {"orderId": order["id"]}) == {"ok": True}
        await b.move(order["id"], "confirmed", "preparing")
        for socket in staying:
            await socket.reaches(order["id"], 3)
            assert socket.seqs(order["id"]) == [1, 2, 3]
        await alive(silent)
        assert silent.seqs(order["id"]) == [1]


# the Python client


@pytest.mark.parametrize("transports", [["websocket"], ["polling", "websocket"], ["polling"]], ids="+".join)
async def test_the_python_client_works_over_every_transport(
    pair: tuple[Instance, Instance], transports: list[str]
) -> None:
    a, b = pair
    order = await a.place()
    async with Watcher(a, CUSTOMER, transports=transports) as watcher:
        assert (await watcher.watch(order["id"], after=0))["seq"] == 1
        await b.move(order["id"], "confirmed", "preparing")
        await watcher.hears("orderStatusUpdate", orderId=order["id"], seq=3)
        assert watcher.seqs(order["id"]) == [2, 3]
        assert watcher.client.transport() == transports[-1]


async def test_the_python_client_learns_why_it_is_refused(pair: tuple[Instance, Instance]) -> None:
    for bad in (None, "garbage", EXPIRED):
        watcher = Watcher(pair[0], bad)
        refusals: list[Any] = []
        watcher.client.on("connect_error", refusals.append)
        with pytest.raises(socketio.exceptions.ConnectionError):
            async with watcher:
                pass
        (refusal,) = refusals
        assert refusal["data"] == {"code": "unauthenticated", "message": refusal["message"]}


async def test_the_python_client_comes_back_to_a_restarted_instance(fleet: Fleet) -> None:
    port = str(free_port())
    a, b = await fleet.start(PORT=port), await fleet.start()
    order = await a.place()
    client = socketio.AsyncClient(reconnection_delay=0.05, reconnection_delay_max=0.2)
    seqs: list[int] = []
    connected = asyncio.Queue[None]()

    @client.on("connect")  # type: ignore[untyped-decorator]  # the client has no types
    async def _connected() -> None:
        connected.put_nowait(None)

    @client.on("orderStatusUpdate")  # type: ignore[untyped-decorator]
    async def _heard(payload: dict[str, Any]) -> None:
        seqs.append(payload["seq"])

    async def subscribe() -> None:
        async with asyncio.timeout(READY_S):
            await connected.get()
        answer = await client.call("subscribeToOrder", {"orderId": order["id"], "afterSeq": max(seqs, default=0)})
        assert answer["ok"], answer
        seqs.extend(event["seq"] for event in answer["events"])

    await client.connect(a.url, transports=["websocket"], auth={"token": CUSTOMER})
    try:
        await subscribe()
        await b.move(order["id"], "confirmed")
        await until(lambda: 2 in seqs, "event 2")
        a.kill()
        await b.move(order["id"], "preparing")
        await fleet.start(PORT=port)
        await subscribe()
        await b.move(order["id"], "ready")
        await until(lambda: 4 in seqs, "event 4")
        assert seqs == [1, 2, 3, 4]
    finally:
        await client.disconnect()
