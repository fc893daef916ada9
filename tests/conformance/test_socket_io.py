"""Socket.IO v5 over both transports: what the official suite asks, in our words, and what it leaves out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from tests.conformance.serve import ATTACHMENTS_MAX, CONNECT_TIMEOUT_S, EchoEngine
from tests.conformance.wire import Door, serving
from tests.harness import until

TWO_PLACES = '{"_placeholder":true,"num":0},{"_placeholder":true,"num":1}'


@pytest.fixture
async def server() -> EchoEngine:
    return EchoEngine()


@pytest.fixture
async def door(server: EchoEngine) -> AsyncIterator[Door]:
    async with serving(server) as door:
        yield door
        await until(lambda: not server.connections, "nobody is left")


@pytest.mark.parametrize("namespace", ["", "/custom,"])
@pytest.mark.parametrize("auth", ["", '{"token":"123"}', "{}"])
async def test_connect(door: Door, namespace: str, auth: str) -> None:
    async with door.session() as socket:
        await socket.send(f"40{namespace}{auth}")
        answer = await socket.text()
        assert answer.startswith(f"40{namespace}" + "{")
        assert json.loads(answer[answer.index("{") :]).keys() == {"sid"}
        assert await socket.text() == f'42{namespace}["auth",{auth or "{}"}]'


async def test_connect_by_polling(door: Door) -> None:
    client = await door.poller()
    assert await client.post('40{"token":"123"}\x1e40/custom,') == (200, "ok")
    first, second, *auths = await client.packets(4)
    assert first.startswith('40{"sid":')
    assert second.startswith('40/custom,{"sid":')
    assert sorted(auths) == ['42/custom,["auth",{}]', '42["auth",{"token":"123"}]']


async def test_a_session_has_many_namespaces_and_none_of_their_ids_is_its_own(door: Door) -> None:
    async with door.session() as socket:
        ids = {json.loads(socket.heard[0][1:])["sid"]}
        ids.add((await socket.connect("40"))["sid"])
        await socket.text()
        ids.add((await socket.connect("40/custom,"))["sid"])
        assert len(ids) == 3


@pytest.mark.parametrize("packet", ["40/random", "40/random,", '40/random,{"token":"1"}', "40/random?x=1,"])
async def test_a_namespace_that_is_none_is_refused_with_a_message(door: Door, packet: str) -> None:
    async with door.session() as socket:
        await socket.send(packet)
        assert await socket.text() == '44/random,{"message":"Invalid namespace"}'
        await socket.connect()


@pytest.mark.parametrize("namespace", ["", "/custom,"])
async def test_a_second_connect_is_refused(door: Door, namespace: str) -> None:
    async with door.session() as socket:
        await socket.connect(f"40{namespace}")
        await socket.text()
        await socket.send(f"40{namespace}")
        assert await socket.text() == f'44{namespace}{{"message":"Connected already"}}'
        await socket.send(f'42{namespace}["message"]')
        assert await socket.text() == f'42{namespace}["message-back"]'


async def test_who_connects_nowhere_is_cut(door: Door) -> None:
    async with door.session() as socket:
        began = asyncio.get_running_loop().time()
        assert await socket.rest() == []
        assert CONNECT_TIMEOUT_S * 0.9 < asyncio.get_running_loop().time() - began < CONNECT_TIMEOUT_S + 1


async def test_one_namespace_is_enough(door: Door) -> None:
    async with door.session() as socket:
        await socket.connect("40/custom,")
        await socket.text()
        until_then = asyncio.get_running_loop().time() + CONNECT_TIMEOUT_S * 1.5
        while asyncio.get_running_loop().time() < until_then:  # pings go on
            assert await socket.receive() == "2"
            await socket.send("3")


async def test_disconnect_ends_the_namespace_and_not_the_session(door: Door, server: EchoEngine) -> None:
    async with door.session() as socket:
        await socket.connect()
        await socket.text()
        await socket.connect("40/custom,")
        await socket.text()
        await socket.send("41/custom", "41/custom,", '42["message","one"]')
        assert await socket.text() == '42["message-back","one"]'
        await socket.connect("40/custom,")
        await socket.text()
        await socket.send("41")
        await socket.send('42/custom,["message","two"]')
        assert await socket.text() == '42/custom,["message-back","two"]'
        assert not server.connections
        await socket.connect()


@pytest.mark.parametrize("namespace", ["", "/custom,"])
async def test_disconnect_and_connect_in_one_breath(door: Door, namespace: str) -> None:
    """What `socket.disconnect().connect()` of the JavaScript client sends."""
    async with door.session() as socket:
        first = await socket.connect(f"40{namespace}")
        await socket.text()
        await socket.send(f"41{namespace}", f"40{namespace}")
        answer = await socket.text()
        assert answer.startswith(f"40{namespace}" + '{"sid"')
        assert first["sid"] not in answer
        await socket.text()
        await socket.send(f'42{namespace}["message","x"]')
        assert await socket.text() == f'42{namespace}["message-back","x"]'


@pytest.mark.parametrize("namespace", ["", "/custom,"])
@pytest.mark.parametrize("arguments", ["", ',1,"2",{"3":[true]}', ",null", ',"☃"'])
async def test_events_and_their_acknowledgements(door: Door, namespace: str, arguments: str) -> None:
    async with door.session() as socket:
        await socket.connect(f"40{namespace}")
        await socket.text()
        await socket.send(f'42{namespace}["message"{arguments}]')
        assert await socket.text() == f'42{namespace}["message-back"{arguments}]'
        await socket.send(f'42{namespace}456["message-with-ack"{arguments}]')
        assert await socket.text() == f"43{namespace}456[{arguments[1:]}]"


@pytest.mark.parametrize("namespace", ["", "/custom,"])
async def test_binary_both_ways(door: Door, namespace: str) -> None:
    async with door.session() as socket:
        await socket.connect(f"40{namespace}")
        await socket.text()
        await socket.send(f'452-{namespace}["message",{TWO_PLACES}]', b"\x01\x02\x03", b"")
        back = [await socket.text() for _ in range(3)]
        assert back == [f'452-{namespace}["message-back",{TWO_PLACES}]', b"\x01\x02\x03", b""]
        await socket.send(f'452-{namespace}789["message-with-ack",{TWO_PLACES}]', b"\x01", b"\x02" * 70_000)
        back = [await socket.text() for _ in range(3)]
        assert back == [f"462-{namespace}789[{TWO_PLACES}]", b"\x01", b"\x02" * 70_000]


async def test_binary_by_polling(door: Door) -> None:
    client = await door.poller()
    assert await client.post("40") == (200, "ok")
    await client.packets(2)
    assert await client.post(f'452-["message",{TWO_PLACES}]\x1ebAQID\x1ebBAUG') == (200, "ok")
    assert await client.packets(3) == [f'452-["message-back",{TWO_PLACES}]', "bAQID", "bBAUG"]


@pytest.mark.parametrize(
    "said",
    [
        ["4abc"],
        ["4"],
        ["42{}"],
        ['42abc["message-with-ack",1]'],
        ["47"],
        ['44{"message":"x"}'],
        ["42/random,[1]"],
        ['42/random,["x"]'],
        [b"\x01"],
        ['451-["message",{"_placeholder":true,"num":0}]', '42["message"'],
        ['451-["message",{"_placeholder":true,"num":0}]', "4x"],
        ['451-["message",{"_placeholder":true,"num":1}]', b"\x01"],
        ['451-["message",{"_placeholder":true,"num":"x"}]', b"\x01"],
        ['451-["message"]', b"\x01", b"\x02"],
        ['450-["message"]'],
        ['45["message"]'],
        ['421-["message"]'],
        [f'45{ATTACHMENTS_MAX + 1}-["message"]'],
        ['4599999999999-["message"]'],
    ],
    ids=str,
)
async def test_what_is_no_packet_ends_the_session(door: Door, said: list[str | bytes]) -> None:
    async with door.session() as socket:
        await socket.connect()
        await socket.text()
        await socket.send(*said)
        assert "disconnected" in (await socket.rest())[-1]
    async with door.session() as socket:
        await socket.send(*said)
        assert (await socket.rest())[-1].startswith("44{")


async def test_as_many_attachments_as_are_allowed(door: Door) -> None:
    async with door.session() as socket:
        await socket.connect()
        await socket.text()
        places = ",".join(f'{{"_placeholder":true,"num":{each}}}' for each in range(ATTACHMENTS_MAX))
        parts = [bytes([each]) for each in range(ATTACHMENTS_MAX)]
        await socket.send(f'45{ATTACHMENTS_MAX}-["message",{places}]', *parts)
        assert (await socket.text()).endswith(f'["message-back",{places}]')
        assert [await socket.text() for _ in parts] == parts
