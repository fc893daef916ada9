"""One limit for all instances: 429 with when to come back, `rate_limited` on sockets, and floods that cost only their
sender. Addresses are made up by a proxy that the instances trust, so that no test meets the count of another."""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from typing import Any

import aiohttp
import psutil
import pytest

from tests.harness import SERVICE, Fleet, Instance, Reply, Watcher, token, until

RATES: dict[str, Any] = {
    "RATE_USER_REQUESTS_PER_MIN": "60",
    "RATE_USER_EVENTS_PER_MIN": "60",
    "RATE_USER_BURST_MAX": "10",
}
ADDRESS: dict[str, Any] = {
    "RATE_ADDRESS_REQUESTS_PER_MIN": "60",
    "RATE_ADDRESS_BURST_MAX": "5",
    "TRUSTED_PROXIES": "127.0.0.1",
}
HANDSHAKES: dict[str, Any] = {"RATE_ADDRESS_HANDSHAKES_PER_MIN": "60", "RATE_ADDRESS_HANDSHAKES_BURST_MAX": "5"}
POLLING = "/socket.io/?EIO=4&transport=polling"
WEBSOCKET = "/socket.io/?EIO=4&transport=websocket"
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "MDEyMzQ1Njc4OWFiY2RlZg==",
}

GROWTH_MAX_MIB = 24
"""What a flood may leave behind: Python keeps some of the memory that it once needed."""


def customer(**claims: Any) -> str:
    return token("customer", uuid.uuid4().hex, **claims)


def somewhere() -> dict[str, str]:
    """The header of a client with an address of its own."""
    return {"X-Forwarded-For": f"2001:db8:{random.randrange(0xFFFF):x}:{random.randrange(0xFFFF):x}::1"}


def rss_mib(instance: Instance) -> float:
    return float(psutil.Process(instance.process.pid).memory_info().rss / 2**20)


def told_to_wait(reply: Reply) -> int:
    """The refusal is complete; returns how many milliseconds it asks for."""
    assert (reply.status, reply.code) == (429, "rate_limited"), reply
    wait_ms: int = reply.body["retryAfterMs"]
    assert 0 < wait_ms <= 60_000
    assert int(reply.headers["Retry-After"]) * 1000 >= wait_ms
    assert int(reply.headers["Retry-After"]) * 1000 < wait_ms + 1000
    assert ";r=0;t=" in reply.headers["RateLimit"]
    assert reply.headers["X-Request-Id"] == reply.body["requestId"]
    return wait_ms


async def metric(instance: Instance, name: str) -> float:
    text = (await instance.get("/metrics", by=None)).body.decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


# REST


async def test_two_instances_share_one_limit_of_a_user(fleet: Fleet) -> None:
    a, b = await fleet.pair(**RATES)
    by, other = customer(), customer()
    replies = [await (a, b)[number % 2].get("/orders", by=by) for number in range(16)]
    good = [reply for reply in replies if reply.status == 200]
    assert 10 <= len(good) <= 12, "ten at once, and one a second while this runs"
    assert good[0].headers["RateLimit-Policy"] == '"user";q=10;w=10'
    assert good[0].headers["RateLimit"] == '"user";r=9;t=1'
    assert good[1].headers["RateLimit"] == '"user";r=8;t=2'
    wait_ms = told_to_wait(replies[-1])
    assert (await a.get("/orders", by=other)).status == 200, "somebody else is not limited"
    assert (await a.get("/orders", by=SERVICE)).status == 200
    await asyncio.sleep(wait_ms / 1000)
    assert (await b.get("/orders", by=by)).status == 200


async def test_who_shows_no_good_token_is_counted_by_address(fleet: Fleet) -> None:
    a, b = await fleet.pair(**ADDRESS)
    for tries in (
        {"path": "/orders", "by": None},
        {"path": "/orders", "by": "no-token"},
        {"path": "/orders", "by": customer(exp=1)},
        {"path": "/links/follow", "by": None, "body": {"secret": "guess"}},
        {"path": "/links/follow", "by": SERVICE, "body": {"secret": "guess"}},
    ):
        path, by, body = str(tries["path"]), tries["by"], tries.get("body")
        headers, method = somewhere(), "POST" if body else "GET"
        replies = [
            await (a, b)[n % 2].request(method, path, body, by=by, headers=headers)  # type: ignore[arg-type]
            for n in range(8)
        ]
        assert {reply.status for reply in replies[:5]} <= {401, 404}
        told_to_wait(replies[-1])
        assert (await a.request(method, path, body, by=by, headers=somewhere())).status in (401, 404)  # type: ignore[arg-type]
        if method == "GET":
            # the address is not what counts for who shows a good token
            assert (await a.get("/orders", by=customer(), headers=headers)).status == 200


async def test_a_forged_address_of_somebody_who_is_no_proxy_changes_nothing(fleet: Fleet) -> None:
    instance = await fleet.start(**{**ADDRESS, "TRUSTED_PROXIES": "", "RATE_ADDRESS_REQUESTS_PER_MIN": "600"})
    replies = [await instance.get("/orders", by=None, headers=somewhere()) for _ in range(8)]
    told_to_wait(replies[-1])


async def test_off_lifts_everything(fleet: Fleet) -> None:
    instance = await fleet.start(**RATES, **ADDRESS, **HANDSHAKES, RATE_LIMITS="off", SUBSCRIPTIONS_PER_SOCKET_MAX="1")
    by = customer()
    for _ in range(30):
        reply = await instance.get("/orders", by=by)
        assert (reply.status, reply.headers.get("RateLimit")) == (200, None)
        assert (await instance.get("/orders", by=None)).status == 401
    async with Watcher(instance, by) as watcher:
        answers = [await watcher.call("subscribeToOrder", {"orderId": str(uuid.uuid4())}) for _ in range(30)]
        assert {answer["error"]["code"] for answer in answers} == {"not_found"}


async def test_while_redis_is_away_everybody_is_let_through_at_once(fleet: Fleet) -> None:
    instance = await fleet.start(
        "web", ready=False, **RATES, REDIS_URL="redis://127.0.0.1:1"
    )  # nobody listens there: never ready, but it serves
    by = customer()

    async def serves() -> bool:
        try:
            return (await instance.get("/orders", by=by)).status == 200
        except aiohttp.ClientError:
            return False

    await until(serves, "the instance serves without Redis", 30)
    for _ in range(30):
        began = time.monotonic()
        reply = await instance.get("/orders", by=by)
        assert (reply.status, reply.headers.get("RateLimit")) == (200, None)
        assert time.monotonic() - began < 1
    assert await metric(instance, "waybill_rates_not_counted_total") >= 30


# sockets


async def test_events_are_counted_but_positions_are_not(fleet: Fleet) -> None:
    a, b = await fleet.pair(**RATES)
    order = await a.place()
    rider = uuid.uuid4().hex
    await a.assign(order["id"], rider)
    await a.move(order["id"], "confirmed", "preparing", "ready", "out_for_delivery")
    async with Watcher(a, token("agent", rider)) as one, Watcher(b, token("agent", rider)) as two:
        answers = [
            await (one, two)[number % 2].call("subscribeToOrder", {"orderId": order["id"]}) for number in range(16)
        ]
        assert 10 <= sum(answer["ok"] for answer in answers) <= 12
        error = answers[-1]["error"]
        assert error["code"] == "rate_limited"
        assert 0 < error["retryAfterMs"] <= 1000
        for number in range(40):
            told = {"orderId": order["id"], "lat": 12.97, "lng": 77.59, "ts": time.time() * 1000 + number}
            assert (await one.call("updateLocation", told))["ok"]
        assert one.client.connected, "nobody is thrown out for asking too often"
        await asyncio.sleep(error["retryAfterMs"] / 1000)
        assert (await one.call("unsubscribeFromOrder", {"orderId": order["id"]}))["ok"]


async def test_handshakes_over_the_limit_are_refused_for_now(fleet: Fleet) -> None:
    instance = await fleet.start(**ADDRESS, **HANDSHAKES)
    headers = somewhere()
    async with aiohttp.ClientSession(headers=headers) as session:
        statuses = []
        for _ in range(8):
            async with session.get(instance.url + POLLING) as reply:
                statuses.append(reply.status)
                body, waits = await reply.read(), reply.headers.get("Retry-After")
        assert statuses[:5] == [200] * 5
        assert statuses[-1] == 503
        assert waits == "1"
        assert json.loads(body)["code"] == "unavailable"
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await session.ws_connect(f"{instance.url}/socket.io/?EIO=4&transport=websocket")
        assert refused.value.status == 503
    async with aiohttp.ClientSession(headers=somewhere()) as session, session.get(instance.url + POLLING) as reply:
        assert reply.status == 200


async def test_a_process_takes_so_many_sockets_a_second_whoever_asks(fleet: Fleet) -> None:
    how: dict[str, Any] = {"HANDSHAKES_PER_S_MAX": "1", "HANDSHAKES_BURST_MAX": "5", "TRUSTED_PROXIES": "127.0.0.1"}
    instance, lifted = await fleet.start(**how), await fleet.start(**how, RATE_LIMITS="off")
    async with aiohttp.ClientSession() as session:
        statuses = []
        for _ in range(8):
            async with session.get(instance.url + POLLING, headers=somewhere()) as reply:
                statuses.append(reply.status)
                body, waits = await reply.read(), reply.headers.get("Retry-After")
        assert statuses[:5] == [200] * 5
        assert (statuses[-1], waits, json.loads(body)["code"]) == (503, "1", "unavailable")
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await session.ws_connect(instance.url + WEBSOCKET, headers=somewhere())
        assert refused.value.status == 503
        assert await metric(instance, 'waybill_rate_limited_total{rate="handshakes-all"}') >= 2
        for _ in range(8):
            async with session.get(lifted.url + POLLING, headers=somewhere()) as reply:
                assert reply.status == 200


async def test_sockets_that_say_nothing_fill_their_own_room_only(fleet: Fleet) -> None:
    instance = await fleet.start(HANDSHAKES_OPEN_MAX="3")
    async with aiohttp.ClientSession() as session, Watcher(instance, SERVICE):
        silent = [await session.ws_connect(instance.url + WEBSOCKET) for _ in range(3)]
        for path in (WEBSOCKET, POLLING):
            async with session.get(instance.url + path, headers=UPGRADE if path == WEBSOCKET else {}) as reply:
                assert (reply.status, reply.headers["Retry-After"]) == (503, "1")
        assert await metric(instance, 'waybill_rate_limited_total{rate="handshakes-open"}') == 2
        await silent[0].receive()
        await silent[0].send_str(f'40{{"token":"{SERVICE}"}}')
        assert (await silent[0].receive_str()).startswith("40")
        async with Watcher(instance, SERVICE):
            pass
        for socket in silent:
            await socket.close()


async def test_guessing_tokens_on_sockets_ends_in_a_closed_transport(fleet: Fleet) -> None:
    instance = await fleet.start(**ADDRESS)
    async with aiohttp.ClientSession(headers=somewhere()) as session:
        codes = []
        for _ in range(8):
            async with session.ws_connect(f"{instance.url}/socket.io/?EIO=4&transport=websocket") as socket:
                await socket.receive()
                await socket.send_str('40{"token":"guess"}')
                told = await socket.receive()
                if told.type is aiohttp.WSMsgType.TEXT:
                    assert told.data.startswith("44{")
                    codes.append(json.loads(told.data[2:])["data"]["code"])
                else:
                    assert told.type is aiohttp.WSMsgType.CLOSE
                    codes.append("closed")
        assert codes[:5] == ["unauthenticated"] * 5
        assert codes[-1] == "closed", "refused for now: a CONNECT_ERROR would end the client's trying"


# floods


async def flood(instance: Instance, by: str, frames: list[str], answers: int) -> list[Any]:
    """Send frames on one socket as fast as they are taken, and read as many answers."""
    heard: list[Any] = []
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{instance.url}/socket.io/?EIO=4&transport=websocket", max_msg_size=0) as socket,
    ):
        await socket.receive()
        await socket.send_str(f'40{{"token":"{by}"}}')
        assert (await socket.receive_str()).startswith("40")

        async def read() -> None:
            async for message in socket:
                if message.data == "2":
                    await socket.send_str("3")
                elif message.data.startswith("43"):
                    heard.append(json.loads(message.data[message.data.index("[") :])[0])
                    if len(heard) == answers:
                        return

        reading = asyncio.create_task(read())
        for frame in frames:
            await socket.send_str(frame)
        async with asyncio.timeout(120):
            await reading
    return heard


PACE: dict[str, Any] = {"SOCKET_EVENTS_PER_S_MAX": "50", "SOCKET_EVENTS_BURST_MAX": "10"}


async def an_agents_order(instance: Instance) -> tuple[str, str]:
    """An order and the token of its agent."""
    order_id, rider = (await instance.place())["id"], uuid.uuid4().hex
    await instance.assign(order_id, rider)
    return order_id, token("agent", rider)


def pushes(order_id: str, count: int) -> list[str]:
    now = time.time() * 1000
    return [
        f'42{n}["updateLocation",{{"orderId":"{order_id}","lat":12.97,"lng":77.59,"ts":{now + n}}}]'
        for n in range(count)
    ]


async def test_a_socket_that_sends_too_fast_is_read_more_slowly_and_refused_nothing(fleet: Fleet) -> None:
    instance = await fleet.start(**PACE)
    order_id, by = await an_agents_order(instance)
    async with Watcher(instance, by) as calm:
        began = time.monotonic()
        flooding = asyncio.create_task(flood(instance, by, pushes(order_id, 110), 110))
        await until(lambda: paced(instance), "the flood is held")
        asked = time.monotonic()
        assert (await calm.call("unsubscribeFromOrder", {"orderId": order_id}))["ok"]
        assert time.monotonic() - asked < 0.5, "another socket of the same agent waits for nothing"
        answers = await flooding
    assert all(answer["ok"] for answer in answers), "positions are never punished"
    assert time.monotonic() - began >= 2.0, "110 at 50 a second, ten at once"


async def paced(instance: Instance) -> bool:
    return await metric(instance, 'waybill_rate_limited_total{rate="socket"}') > 0


@pytest.mark.parametrize("transports", [("polling",), ("polling", "websocket")], ids=["polling", "upgraded"])
async def test_a_session_that_polls_is_read_more_slowly_too(fleet: Fleet, transports: tuple[str, ...]) -> None:
    instance = await fleet.start(**PACE)
    order_id, by = await an_agents_order(instance)
    async with Watcher(instance, by, transports=transports) as watcher:
        began = time.monotonic()
        for _ in range(11):
            calls = [watcher.call("unsubscribeFromOrder", {"orderId": order_id}) for _ in range(10)]
            assert all(answer["ok"] for answer in await asyncio.gather(*calls))
        assert time.monotonic() - began >= 1.5, "a hundred at fifty a second"
    assert await paced(instance)


async def test_off_lets_a_socket_send_as_fast_as_it_can(fleet: Fleet) -> None:
    instance = await fleet.start(**PACE, RATE_LIMITS="off")
    order_id, by = await an_agents_order(instance)
    assert all(answer["ok"] for answer in await flood(instance, by, pushes(order_id, 500), 500))
    assert not await paced(instance)


async def probe(instance: Instance, stop: asyncio.Event) -> float:
    """The slowest answer that somebody else gets meanwhile, in seconds."""
    slowest = 0.0
    while not stop.is_set():
        began = time.monotonic()
        assert (await instance.get("/orders?limit=1")).status == 200
        slowest = max(slowest, time.monotonic() - began)
        await asyncio.sleep(0.05)
    return slowest


async def test_ten_thousand_subscriptions_on_one_socket(fleet: Fleet) -> None:
    instance = await fleet.start(
        RATE_SERVICE_BURST_MAX="400", RATE_SERVICE_EVENTS_PER_MIN="60", SUBSCRIPTIONS_PER_SOCKET_MAX="50"
    )
    orders = [(await instance.place())["id"] for _ in range(60)]
    by = token("staff", uuid.uuid4().hex)
    frames = [f'42{n}["subscribeToOrder",{{"orderId":"{orders[n % 60]}"}}]' for n in range(10_000)]
    await flood(instance, token("staff", uuid.uuid4().hex), frames[:1000], 1000)
    before = rss_mib(instance)
    stop = asyncio.Event()
    probing = asyncio.create_task(probe(instance, stop))
    heard = await flood(instance, by, frames, len(frames))
    stop.set()
    assert await probing < 1, "the flood was felt by others"
    refused = [answer["error"] for answer in heard if not answer["ok"]]
    assert {error["code"] for error in refused} == {"rate_limited"}
    assert all(error["retryAfterMs"] > 0 for error in refused)
    watches = [error["message"] for error in refused if "watches 50" in error["message"]]
    assert watches, f"the count of subscriptions: {len(heard)} {len(refused)} {heard[:3]} {refused[:3]} {refused[-3:]}"
    assert any("a minute" in error["message"] for error in refused), "the rate of events"
    assert len(heard) - len(refused) <= 410
    assert rss_mib(instance) - before < GROWTH_MAX_MIB
    await until(lambda: nothing_watched(instance), "its rooms are left when it goes")


async def nothing_watched(instance: Instance) -> bool:
    return await metric(instance, "waybill_watched_orders") == 0


async def test_fifty_thousand_junk_events_on_one_socket(fleet: Fleet) -> None:
    instance = await fleet.start(RATE_USER_EVENTS_PER_MIN="1200", RATE_USER_BURST_MAX="400")
    by = customer()
    junk = [
        '["noSuchEvent",{"a":1}]',
        '["subscribeToOrder",{"orderId":1}]',
        '["subscribeToOrder"]',
        '["updateLocation",{"lat":"x"}]',
        '["",[[[[]]]]]',
        '["refreshToken",{"token":"no"}]',
        '["subscribeToOrder",NaN]',
    ]
    frames = [f"42{n}{junk[n % len(junk)]}" for n in range(50_000)]
    await flood(instance, customer(), frames[:5000], 5000)
    before = rss_mib(instance)
    stop = asyncio.Event()
    probing = asyncio.create_task(probe(instance, stop))
    heard = await flood(instance, by, frames, len(frames))
    stop.set()
    assert await probing < 1, "the flood was felt by others"
    codes = [answer["error"]["code"] for answer in heard]
    assert set(codes) <= {"not_found", "invalid", "malformed", "rate_limited", "unauthenticated"}
    assert codes.count("rate_limited") > 20_000
    assert rss_mib(instance) - before < GROWTH_MAX_MIB


async def test_a_socket_that_asks_and_never_reads_is_read_no_further(fleet: Fleet) -> None:
    instance = await fleet.start(SLOW_MAX_S="2")
    before = rss_mib(instance)
    reader, writer = await asyncio.open_connection("127.0.0.1", instance.port, limit=2**16)
    writer.write(
        b"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
    )
    await reader.readuntil(b"\r\n\r\n")
    writer.write(masked(f'40{{"token":"{customer()}"}}'))
    await asyncio.sleep(0.2)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    sent, began = 0, time.monotonic()
    name = "x" * 90
    with pytest.raises((ConnectionError, TimeoutError)):  # noqa: PT012  # whichever write meets it
        async with asyncio.timeout(30):
            while True:
                writer.write(b"".join(masked(f'42{sent + n}["{name}"]') for n in range(500)))
                sent += 500
                await writer.drain()
    assert time.monotonic() - began < 25, "it was cut off"
    assert rss_mib(instance) - before < GROWTH_MAX_MIB
    assert await metric(instance, 'waybill_connections_cut_total{why="slow') == 1


def masked(text: str) -> bytes:
    """A client's WebSocket text frame, masked with zeros."""
    body = text.encode()
    head = b"\x81" + (bytes([0x80 | len(body)]) if len(body) < 126 else b"\xfe" + len(body).to_bytes(2))
    return head + bytes(4) + body
