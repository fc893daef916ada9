"""Engine.IO v4 over both transports: what the official suite asks, in our words, and what it leaves out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest

from models.user import Actor, Role
from server import metrics
from server.realtime.connections import Connection, Frame
from server.realtime.transports import EngineServer
from tests.conformance.serve import CONNECT_TIMEOUT_S, LIMITS, engine_io
from tests.conformance.wire import Door, serving
from tests.harness import SOON_S, until

POLLING = "EIO=4&transport=polling"
WEBSOCKET = "EIO=4&transport=websocket"
PERIOD_S = LIMITS["ping_interval_s"] + LIMITS["ping_timeout_s"]


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with serving(engine_io(), "/engine.io/") as door:
        yield door


# handshake


async def test_the_greeting_of_each_transport(door: Door) -> None:
    polled = (await door.poller()).greeting
    async with door.websocket() as socket:
        greeted = json.loads((await socket.text())[1:])
    for greeting, upgrades in ((polled, ["websocket"]), (greeted, [])):
        assert len(greeting.pop("sid")) >= 20
        assert greeting == {"upgrades": upgrades, "pingInterval": 300, "pingTimeout": 200, "maxPayload": 1_000_000}
    assert polled["upgrades"] != greeted["upgrades"]


async def test_a_ping_interval_need_not_be_whole_seconds() -> None:
    server = EngineServer(**{**LIMITS, "ping_interval_s": 2.5}, upgrade_timeout_s=1.0)
    async with serving(server) as door:
        assert (await door.poller()).greeting["pingInterval"] == 2500


@pytest.mark.parametrize(
    ("method", "query", "code"),
    [
        ("GET", "EIO=4", 0),
        ("GET", "EIO=4&transport=pigeon", 0),
        ("GET", "EIO=4&transport=polling&sid=unknown", 1),
        ("POST", "EIO=4&transport=polling&sid=unknown", 1),
        ("POST", POLLING, 2),
        ("PUT", POLLING, 2),
        ("DELETE", POLLING, 2),
        ("GET", f"{POLLING}&j=0", 3),
        ("POST", f"{WEBSOCKET}&sid=unknown", 3),
        ("GET", "transport=polling", 5),
        ("GET", "EIO=3&transport=polling", 5),
        ("GET", "EIO=abc&transport=polling", 5),
        ("GET", "EIO=4&EIO=3&transport=polling", 5),
    ],
)
async def test_a_wrong_handshake_is_refused_in_the_protocols_own_form(
    door: Door, method: str, query: str, code: int
) -> None:
    status, text = await door.send(method, query)
    refusal = json.loads(text)
    assert (status, refusal["code"]) == (400, code)
    assert refusal.keys() == {"code", "message"}


@pytest.mark.parametrize(
    "query", ["transport=websocket", "EIO=abc&transport=websocket", "EIO=4", "EIO=4&transport=pigeon", POLLING]
)
async def test_a_wrong_handshake_opens_no_websocket(door: Door, query: str) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        async with door.websocket(query):
            pass
    assert refused.value.status == 400


async def test_a_session_of_another_instance_is_told_what_to_do(door: Door) -> None:
    for query in (f"{POLLING}&sid=elsewhere", f"{WEBSOCKET}&sid=elsewhere"):
        if "websocket" in query:
            with pytest.raises(aiohttp.WSServerHandshakeError, match="400"):
                async with door.websocket(query):
                    pass
            continue
        _, text = await door.get(query)
        assert "sticky sessions" in text
        assert "websocket" in text


# messages


@pytest.mark.parametrize("payload", ["4hello", "4a\x1e4b\x1e4c", "4hello\x1ebAQIDBA==", "4é☃", "4" + "x" * 70_000])
async def test_a_payload_comes_back_packet_by_packet(door: Door, payload: str) -> None:
    client = await door.poller()
    assert await client.post(payload.encode()) == (200, "ok")
    assert await client.poll() == (200, payload)


@pytest.mark.parametrize("message", ["4hello", "4", "4é☃", "4" + "x" * 70_000, b"\x01\x02\x03\x04", b""])
async def test_a_message_comes_back_on_a_websocket(door: Door, message: str | bytes) -> None:
    async with door.session() as socket:
        await socket.send(message)
        assert await socket.text() == message


@pytest.mark.parametrize(
    "payload",
    ["", "abc", "x", "\x1e", "4a\x1e", "0", "2", "5", "6", "7", "d=4a", "bA", "b!!!!", "4a\x1ex"],
)
async def test_a_payload_that_is_none_ends_the_session(door: Door, payload: str) -> None:
    client = await door.poller()
    status, text = await client.post(payload.encode())
    assert (status, json.loads(text)["code"]) == (400, "malformed")
    assert (await client.poll())[0] == 400


async def test_a_payload_that_is_no_text_ends_the_session(door: Door) -> None:
    client = await door.poller()
    assert (await client.post(b"4\xff"))[0] == 400
    assert (await client.poll())[0] == 400


async def test_a_payload_may_not_be_too_large(door: Door) -> None:
    client = await door.poller()
    assert (await client.post("4" * 1_000_001))[0] == 413


@pytest.mark.parametrize("message", ["abc", "", "0", "7", "b"])
async def test_what_is_no_packet_ends_a_websocket(door: Door, message: str) -> None:
    async with door.session() as socket:
        await socket.send(message)
        assert await socket.rest() == []


async def test_two_polls_at_once_end_the_session(door: Door) -> None:
    client = await door.poller()
    first = client.waiting_poll()
    await asyncio.sleep(0)
    second = client.waiting_poll()
    answers = {await first, await second}
    assert (200, "1") in answers
    assert {status for status, _ in answers} == {200, 400}
    assert (await client.poll())[0] == 400


@pytest.mark.parametrize("told", [[], ["bye"]])
async def test_a_client_that_is_sent_away_by_polling_is_told_no_goodbye(told: list[str]) -> None:
    """The Python client would stay away for good, and the JavaScript client drop what comes with it."""
    server = engine_io()
    async with serving(server, "/engine.io/") as door:
        client = await door.poller()
        session = server.sockets[client.greeting["sid"]]
        for text in told:
            session.send_frame(Frame(text))
        session.hang_up()
        assert await client.poll() == (200, "".join(f"4{text}" for text in told) or "6")
        assert (await client.poll())[0] == 400


async def test_two_posts_at_once_end_the_session(door: Door) -> None:
    client = await door.poller()
    more = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"4a"
        await more.wait()

    async with asyncio.timeout(SOON_S):
        first = asyncio.create_task(door.http.post(f"{door.url}?{client.query}", data=slow()))
        answered = client.waiting_poll()
        while not answered.done():  # until the server has met the first: the second ends the session
            status, _ = await client.post("3")
            if status == 400:
                break
        assert await answered == (200, "1")
        more.set()
        assert (await first).status == 400


async def test_a_poll_that_was_given_up_ends_the_session(door: Door) -> None:
    client = await door.poller()
    given_up = client.waiting_poll()
    await asyncio.sleep(0.05)
    given_up.cancel()
    assert (await client.poll())[0] == 400


# heartbeat


async def test_pings_of_a_poller_that_answers(door: Door) -> None:
    client = await door.poller()
    for _ in range(3):
        assert await client.poll() == (200, "2")
        assert await client.post("3") == (200, "ok")


async def test_a_poller_that_answers_no_ping_is_gone(door: Door) -> None:
    client = await door.poller()
    await asyncio.sleep(PERIOD_S)
    assert (await client.poll())[0] == 400


async def test_a_poll_waits_for_no_ping_that_is_lost(door: Door) -> None:
    client = await door.poller()
    assert await client.poll() == (200, "2")
    assert await client.poll() == (200, "6"), "the end of the session ends its poll"
    assert (await client.poll())[0] == 400


async def test_pings_of_a_websocket(door: Door) -> None:
    async with door.session() as socket:
        for _ in range(3):
            assert await socket.receive() == "2"
            await socket.send("3")
        assert await socket.receive() == "2"
        assert await socket.receive() is None, "no answer, no connection"


# the end


async def test_a_poller_that_says_goodbye(door: Door) -> None:
    client = await door.poller()
    poll = client.waiting_poll()
    await asyncio.sleep(0.02)
    assert await client.post("1") == (200, "ok")
    assert await poll == (200, "6")
    assert (await client.poll())[0] == 400


async def test_a_websocket_that_says_goodbye(door: Door) -> None:
    async with door.session() as socket:
        await socket.send("1")
        assert await socket.rest() == []


# the upgrade


async def test_a_poller_changes_to_a_websocket(door: Door) -> None:
    """Everything that was sent before comes first, in its order; the WebSocket sees no NOOP; polling is over."""
    client = await door.poller()
    poll = client.waiting_poll()
    async with door.websocket(client.probe) as socket:
        await socket.send("2probe")
        assert await socket.text() == "3probe"
        assert await poll == (200, "6")
        assert await client.poll() == (200, "6"), "none waits while the client changes"
        assert await client.post("4one\x1e4two") == (200, "ok")
        await socket.send("5", "4three", b"four")
        assert [await socket.text() for _ in range(4)] == ["4one", "4two", "4three", b"four"]
        assert "6" not in socket.heard
        assert (await client.poll())[0] == 400
        assert (await client.post("4x"))[0] == 400
        await socket.send("4still there")
        assert await socket.text() == "4still there"


async def test_packets_behind_the_upgrade_in_one_read_are_the_sessions(door: Door) -> None:
    client = await door.poller()
    async with door.websocket(client.probe) as socket:
        await socket.send("2probe", "5", "4one", "4two")
        assert [await socket.text() for _ in range(3)] == ["3probe", "4one", "4two"]


async def test_a_second_websocket_of_a_session_is_closed(door: Door) -> None:
    client = await door.poller()
    async with door.websocket(client.probe) as socket, door.websocket(client.probe) as early:
        assert await early.rest() == [], "while the first one is trying"
        await client.upgrade(socket)
        async with door.websocket(client.probe) as late:
            assert await late.rest() == []
        await socket.send("4hello")
        assert await socket.text() == "4hello"


@pytest.mark.parametrize(
    "said", [["5"], ["4x"], ["2probe", "2probe"], ["2probe", "6"], [b"x"], ["2probe", b"x"], ["2"]]
)
async def test_an_upgrade_that_goes_wrong_leaves_the_session_polling(door: Door, said: list[str | bytes]) -> None:
    client = await door.poller()
    async with door.websocket(client.probe) as socket:
        await socket.send(*said)
        assert (await socket.rest())[1:] == []
    assert await client.post("4hello") == (200, "ok")
    assert await client.poll() == (200, "4hello")
    async with door.websocket(client.probe) as socket:
        await client.upgrade(socket)
        await socket.send("4and now")
        assert await socket.text() == "4and now"


async def test_an_upgrade_that_is_not_finished_in_time_is_cut(door: Door) -> None:
    def cut() -> float:
        return float(metrics.connections_cut.labels("upgrade")._value.get())

    before = cut()
    client = await door.poller()
    async with asyncio.TaskGroup() as group:
        polls = group.create_task(client.packets(1))
        async with door.websocket(client.probe) as socket:
            began = asyncio.get_running_loop().time()
            assert await socket.rest() == []
            assert asyncio.get_running_loop().time() - began > CONNECT_TIMEOUT_S * 0.9
        assert await client.post("4still here") == (200, "ok")
        assert await polls == ["4still here"]
    assert cut() == before + 1


async def test_the_end_of_a_session_ends_its_upgrade(door: Door) -> None:
    client = await door.poller()
    async with door.websocket(client.probe) as socket:
        assert await client.post("1") == (200, "ok")
        assert await socket.rest() == []


async def test_where_connections_cannot_be_taken_over_everybody_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.realtime.transports.can_take_over", lambda request: False)
    async with serving(engine_io()) as door:
        client = await door.poller()
        assert client.greeting["upgrades"] == []
        assert await client.post("4hello") == (200, "ok")
        assert await client.poll() == (200, "4hello")
        for query in (WEBSOCKET, client.probe):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                async with door.websocket(query):
                    pass
            assert refused.value.status == 400
        assert await client.post("4hello") == (200, "ok"), "the session is as it was"


# bounds


async def test_a_poller_that_takes_nothing_is_cut_by_bytes() -> None:
    server = EngineServer(
        **{**LIMITS, "ping_interval_s": 25, "slow_bytes": 10_000, "queue_max_bytes": 50_000}, upgrade_timeout_s=1
    )
    server.on("message", server.send)
    async with serving(server) as door:
        client = await door.poller()
        (session,) = server.sockets.values()
        message = Frame("x" * 1000)
        sent = 0
        while not session.closing:
            session.send_frame(message)
            session.send_latest("place", message)
            sent += 1
            assert sent < 100
        assert sent > 40
        await until(lambda: not server.sockets, "nothing is left of it")
        assert (await client.poll())[0] == 400


async def test_a_poller_that_is_slow_is_coalesced_and_read_no_further_until_it_polls() -> None:
    server = EngineServer(**{**LIMITS, "ping_interval_s": 25, "slow_bytes": 10_000}, upgrade_timeout_s=1)
    heard: list[object] = []

    async def listen(sid: str, message: object) -> None:
        heard.append(message)

    server.on("message", listen)
    async with serving(server) as door:
        client = await door.poller()
        (session,) = server.sockets.values()
        session.send_frame(Frame("x" * 20_000))
        for number in range(5):
            session.send_latest("place", Frame(str(number)))
        post = asyncio.create_task(client.post("4one\x1e4two"))
        assert await client.poll() == (200, "4" + "x" * 20_000)
        assert await client.poll() == (200, "44"), "the newest place, once"
        assert await post == (200, "ok")
        await until(lambda: heard == ["one", "two"], "what it had sent")


async def test_a_poller_that_stays_slow_is_cut_by_age() -> None:
    server = EngineServer(
        **{**LIMITS, "ping_interval_s": 25, "slow_bytes": 10_000, "slow_max_s": 0.2}, upgrade_timeout_s=1
    )
    async with serving(server) as door:
        client = await door.poller()
        (session,) = server.sockets.values()
        session.send_frame(Frame("x" * 20_000))
        held = asyncio.create_task(client.post("4one"))
        await until(lambda: not server.sockets, "it is cut")
        await held
        assert (await client.poll())[0] == 400


async def test_a_slow_poller_is_as_slow_on_its_websocket() -> None:
    """The backlog of polling is the backlog of the WebSocket; what is coalesced stays behind it."""
    server = EngineServer(**{**LIMITS, "ping_interval_s": 25, "slow_bytes": 10_000}, upgrade_timeout_s=1)
    async with serving(server) as door:
        client = await door.poller()
        (session,) = server.sockets.values()
        async with door.websocket(client.probe) as socket:
            await socket.send("2probe")
            assert await socket.text() == "3probe"
            session.send_frame(Frame("x" * 20_000))
            session.send_latest("place", Frame("old"))
            session.send_latest("place", Frame("new"))
            await socket.send("5")
            assert await socket.text() == "4" + "x" * 20_000
            assert await socket.text() == "4new"
            session.send_latest("place", Frame("later"))
            assert await socket.text() == "4later"


# receipts


async def test_receipts_of_a_websocket() -> None:
    server = engine_io()
    async with serving(server) as door, door.session() as socket:
        (session,) = server.sockets.values()
        received: list[str] = []
        session.send_frame(Frame("one"))
        session.when_received(lambda: received.append("one"))
        session.send_frame(Frame("two"))
        session.when_received(lambda: received.append("two"))
        assert received == []
        assert [await socket.text(), await socket.text()] == ["4one", "4two"]
        await socket.send("4x")  # aiohttp answers a PING when it reads on
        assert await socket.text() == "4x"
        assert received == ["one", "two"]
        session.abort()
        session.when_received(lambda: received.append("never"))
        await until(lambda: not server.sockets, "the session is over")
        assert received == ["one", "two"]


async def test_receipts_of_a_poller_come_with_the_poll_after() -> None:
    server = engine_io()
    async with serving(server) as door:
        client = await door.poller()
        (session,) = server.sockets.values()
        received: list[str] = []
        session.send_frame(Frame("one"))
        session.when_received(lambda: received.append("one"))
        assert await client.poll() == (200, "4one")
        assert received == [], "it was sent, but did it arrive?"
        session.send_frame(Frame("two"))
        session.when_received(lambda: received.append("two"))
        assert await client.poll() == (200, "4two")
        assert received == ["one"]
        async with door.websocket(client.probe) as socket:
            session.send_frame(Frame("three"))
            session.when_received(lambda: received.append("three"))
            await client.upgrade(socket)
            assert await socket.text() == "4three"
            assert received[:2] == ["one", "two"]
            await socket.send("4x")
            assert await socket.text() == "4x"
            assert received == ["one", "two", "three"]


async def test_a_pong_that_nobody_asked_for_proves_nothing() -> None:
    server = engine_io()
    async with serving(server) as door, door.session() as socket:
        (session,) = server.sockets.values()
        received: list[int] = []
        await socket.socket.pong(b"99999999999")
        await socket.send("4x")
        assert await socket.text() == "4x"
        session.when_received(lambda: received.append(1))
        for junk in (b"", b"x", b"0", b"\xff", b"9" * 100):
            await socket.socket.pong(junk)
        await socket.send("4y")
        assert await socket.text() == "4y"
        assert received == [1], "only its own answer, which came with the last read"


@pytest.mark.parametrize("end", ["close", "abort", "peer"])
async def test_the_short_way_is_open_while_the_client_keeps_up_and_never_after_the_end(end: str) -> None:
    server = engine_io()
    async with serving(server, "/engine.io/") as door, door.websocket() as socket:
        sid = json.loads((await socket.text())[1:])["sid"]
        session = server.sockets[sid]
        connection = session.connection = Connection("c", session, Actor(sub="c1", role=Role.CUSTOMER, exp=2e9))
        told: list[bool] = []
        connection.on_rewire = lambda one: told.append(one.write is not None)
        connection.rewire()
        session.pause_writing()
        session.resume_writing()
        assert told == [True, False, True]
        if end == "close":
            session.hang_up()
        elif end == "abort":
            session.abort()
        else:
            await socket.socket.close()
            await until(lambda: session.closing, "the server has noticed")
        assert connection.write is None
        assert told[3] is False
        session.connection = None  # as the engine does before it lets go of a session


async def test_the_short_way_follows_an_upgrade() -> None:
    server = engine_io()
    async with serving(server, "/engine.io/") as door:
        client = await door.poller()
        session = server.sockets[client.greeting["sid"]]
        connection = session.connection = Connection("c", session, Actor(sub="c1", role=Role.CUSTOMER, exp=2e9))
        connection.rewire()
        async with door.websocket(client.probe) as socket:
            await client.upgrade(socket)
            await until(lambda: session.upgraded, "the session is on the WebSocket")
            assert connection.write is not None
            connection.write(Frame("over the WebSocket").wire)
            assert await socket.text() == "4over the WebSocket"
        session.connection = None
