"""What a hostile client may send to the Socket.IO door, by WebSocket and by polling: each gets its refusal or loses its
connection, changes nothing, and leaves no traceback; everybody else is served on.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import aiohttp
import asyncpg
import psutil
import pytest

from server.embedded import DataServers
from server.settings import Settings
from tests.harness import SERVICE, SOON_S, Fleet, Instance, Watcher, token, until
from tests.shared import REFUSALS, LogReader, everything, shared_fleet

FUZZ_S = 15.0
GROWTH_MAX_BYTES = 16 * 1024 * 1024
"""How much memory the server may take in the second half of the fuzz: what is warm does not grow."""
"""How long packets are made up; FUZZ_SEED in the environment repeats a run."""

FRAME_MAX_BYTES = Settings().frame_max_bytes
AGENT = token("agent", "a1")
CODES = {code for codes in REFUSALS.values() for code in codes}


class Door(NamedTuple):
    instance: Instance
    order_id: str
    tables: Any
    log: LogReader


@pytest.fixture(scope="module")
async def fleet(data: DataServers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    async with shared_fleet(data, tmp_path_factory.mktemp("bad_packets")) as fleet:
        yield fleet


@pytest.fixture(scope="module")
async def target(fleet: Fleet) -> AsyncIterator[Door]:
    """An instance with one order, given to agent a1."""
    instance = await fleet.start(RATE_LIMITS="off")
    order = await instance.place()
    await instance.move(order["id"], "confirmed")
    await instance.assign(order["id"], "a1", agentName="Ravi")
    tables = await asyncpg.connect(fleet.database_url)
    yield Door(instance, order["id"], tables, LogReader(instance))
    await tables.close()


@pytest.fixture
async def door(target: Door) -> AsyncIterator[Door]:
    """The target, watched by somebody; afterwards nothing has changed or was heard, nothing bad was logged, and that
    somebody is still served."""
    before = await everything(target.tables)
    async with Watcher(target.instance, SERVICE) as watcher:
        await watcher.watch(target.order_id)
        yield target
        assert await everything(target.tables) == before
        assert (await watcher.watch(target.order_id, after=0))["seq"] == 3
        assert watcher.heard == []
    target.log.check_quiet()
    ready = await target.instance.get("/health/ready", by=None)
    assert ready.status == 200, ready


class Raw:
    """A WebSocket on which Engine.IO and Socket.IO are spoken by hand."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket

    async def receive(self) -> str | None:
        """The next message but for pings; None when the server has hung up."""
        while True:
            message = await self.socket.receive(timeout=SOON_S)
            if message.type is aiohttp.WSMsgType.TEXT:
                if message.data == "2":
                    await self.socket.send_str("3")
                    continue
                return str(message.data)
            assert message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR), message
            return None

    async def rest(self) -> list[str]:
        """Everything until the server hangs up; fails if it does not."""
        found = []
        while (message := await self.receive()) is not None:
            found.append(message)
        return found

    async def send(self, packet: str | bytes) -> None:
        """Send, if the server has not hung up already."""
        with contextlib.suppress(ConnectionError):
            await (self.socket.send_str(packet) if isinstance(packet, str) else self.socket.send_bytes(packet))

    async def greet(self, by: str = SERVICE) -> None:
        await self.send("40" + json.dumps({"token": by}))
        assert (await self.receive() or "").startswith('40{"sid":'), "not connected"

    async def call(self, packet: str, number: int) -> Any:
        """Send this packet; the answer to the event that carried this number."""
        await self.send(packet)
        head = f"43{number}"
        while True:
            message = await self.receive()
            assert message is not None, f"hung up instead of answering {packet[:100]}"
            if message.startswith(head):
                (answer,) = json.loads(message[len(head) :])
                return answer


@asynccontextmanager
async def raw(door: Door, *, by: str | None = SERVICE) -> AsyncIterator[Raw]:
    """An open Engine.IO session; with `by`, CONNECTed."""
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{door.instance.url}/socket.io/?EIO=4&transport=websocket", max_msg_size=0) as socket,
    ):
        client = Raw(socket)
        assert (await client.receive() or "").startswith("0{"), "no Engine.IO handshake"
        if by is not None:
            await client.greet(by)
        yield client


def watching(head: int, order_id: str) -> str:
    """A subscribe; `head` is 42 and the acknowledgement number."""
    return f'{head}["subscribeToOrder",{json.dumps({"orderId": order_id})}]'


def check_refused(answer: Any, code: str, pointer: str | None = None) -> None:
    assert answer["ok"] is False, answer
    error = answer["error"]
    assert error["code"] == code, answer
    assert isinstance(error["message"], str)
    assert error["message"]
    if pointer is not None:
        assert [each["pointer"] for each in error["errors"]] == [pointer], answer


# events whose packet can be read


class Case(NamedTuple):
    code: str
    argument: str
    """The event's arguments as JSON text, behind the name."""
    pointer: str | None = None


def subscribing(**members: Any) -> str:
    return json.dumps({"orderId": "{id}", **members})


def moving(**members: Any) -> str:
    return json.dumps({"orderId": "{id}", "status": "preparing", **members})


def locating(**members: Any) -> str:
    return json.dumps({"orderId": "{id}", "lat": 12.9, "lng": 77.6, "ts": 1_700_000_000_000, **members})


NOT_IDS: list[Any] = [None, 5, True, [], {}, "", "x" * 201, "\0"]
ANYTHING_BUT_OBJECTS = ["null", "5", "true", '"text"', "[]", "[{}]", "-0.5"]
NOT_JSON = ['{"orderId":NaN}', "NaN", "Infinity", "-Infinity", '{"orderId":"\\ud800"}', '"\\udfff"', "1e999"]

EVENTS: dict[str, list[Case]] = {
    "subscribeToOrder": [
        *[Case("invalid", subscribing(orderId=value), "/orderId") for value in NOT_IDS],
        *[Case("not_found", subscribing(orderId=value)) for value in ("x", "{ID}", "{{id}}", "..", "\ud83d\ude00")],
        *[
            Case("invalid", subscribing(afterSeq=value), "/afterSeq")
            for value in (-1, 1.5, "1", None, True, [1], 2**31)
        ],
        *[Case("invalid", subscribing(afterSeq=value), "/afterSeq") for value in (4, 2**31 - 1, 10**30, 1e300)],
        Case("invalid", subscribing(after=1), "/after"),
        Case("invalid", "{}", "/orderId"),
    ],
    "unsubscribeFromOrder": [
        *[Case("invalid", subscribing(orderId=value), "/orderId") for value in NOT_IDS],
        Case("invalid", subscribing(bogus=1), "/bogus"),
    ],
    "updateLocation": [
        *[Case("invalid", locating(orderId=value), "/orderId") for value in NOT_IDS],
        *[Case("invalid", locating(lat=value), "/lat") for value in (91, -90.5, "12", None, True, 1e308, 10**400)],
        *[Case("invalid", locating(lng=value), "/lng") for value in (181, "x", None)],
        *[Case("invalid", locating(ts=value), "/ts") for value in (-1, 9e15, 10**40, "now", None, True)],
        Case("invalid", locating(accuracy=-1), "/accuracy"),
        Case("invalid", locating(heading=361), "/heading"),
        Case("invalid", locating(battery="full"), "/battery"),
        Case("invalid", '{"orderId":"{id}"}', "/lat"),
    ],
    "updateOrderStatus": [
        *[Case("invalid", moving(orderId=value), "/orderId") for value in NOT_IDS],
        *[Case("invalid", moving(status=value), "/status") for value in ("", "bogus", None, 1, "preparing\0")],
        *[Case("invalid", moving(note=value), "/note") for value in ("", None, 5, "x" * 501, "\0")],
        *[Case("invalid", moving(idempotencyKey=value)) for value in ("", "x" * 256, "\n", "ünï", None, 5)],
        Case("invalid", moving(override={"reason": "x"}), "/override"),
        Case("invalid", moving(bogus=1), "/bogus"),
        Case("illegal_move", moving(status="delivered")),
        Case("not_found", moving(orderId="x")),
    ],
    "refreshToken": [
        Case("invalid", "{}", "/token"),
        *[Case("invalid", json.dumps({"token": value}), "/token") for value in (None, 5, ["x"], {"a": 1})],
        *[Case("unauthenticated", json.dumps({"token": value})) for value in ("", "x", "a.b.c", "\0", "☃", "x" * 9000)],
        Case("invalid", '{"token":"x","bogus":1}', "/bogus"),
    ],
}


@pytest.mark.parametrize("name", EVENTS)
async def test_bad_arguments_are_refused_and_pointed_at(door: Door, name: str) -> None:
    cases = [
        *EVENTS[name],
        *[Case("invalid", text, "") for text in ANYTHING_BUT_OBJECTS],
        *[Case("malformed", text) for text in NOT_JSON],
        Case("malformed", '{"a":' * 900 + "1" + "}" * 900),
    ]
    async with raw(door, by=AGENT if name == "updateLocation" else SERVICE) as client:
        for number, case in enumerate(cases):
            argument = case.argument.replace("{id}", door.order_id).replace("{ID}", door.order_id.upper())
            answer = await client.call(f'42{number}["{name}",{argument}]', number)
            if case.argument.startswith('{"a":{"a":'):  # deeper than some readers go
                assert answer["error"]["code"] in ("malformed", "invalid")
                continue
            check_refused(answer, case.code, case.pointer)
        assert (await client.call(f'42999["{name}"]', 999))["error"]["code"] == "invalid"
        answer = await client.call(f'421000["subscribeToOrder",{{"orderId":"{door.order_id}"}}]', 1000)
        assert answer["ok"], "served on after every refusal"


@pytest.mark.parametrize(
    "name", ["bogus", "", "__proto__", "connect", "disconnect", "message", "*", "subscribetoorder", "x" * 5000, "☃\\n"]
)
async def test_unknown_events_are_not_found(door: Door, name: str) -> None:
    async with raw(door) as client:
        check_refused(await client.call(f'421["{name}",{{}}]', 1), "not_found")
        await client.send(f'42["{name}",{{}}]')  # without a number there is nobody to tell
        await client.send(f'42["{name}"]')
        check_refused(await client.call(f'422["{name}"]', 2), "not_found")


async def test_bad_events_without_a_number_are_passed_over(door: Door) -> None:
    async with raw(door) as client:
        for name, cases in EVENTS.items():
            for case in cases:
                await client.send(f'42["{name}",{case.argument.replace("{id}", "x")}]')
        check_refused(await client.call('421["bogus"]', 1), "not_found")


async def test_more_arguments_than_one_are_no_way_around(door: Door) -> None:
    async with raw(door) as client:
        answer = await client.call(f'421["updateOrderStatus",{{"orderId":"x"}},{moving(orderId=door.order_id)}]', 1)
        check_refused(answer, "invalid", "/status")


# packets that cannot be read


BAD_PACKETS: list[str | bytes] = [
    *("4", "4abc", "4 2", "4-1", "42", "42{}", "42[", "42[]", "420[]", "421[]", "42null", '42"x"', "42[1]", "42[null]"),
    *('42[{"a":1}]', '42[["x"]]', "42{", '42["x"', '42["x",', '42["x"]]', '42["x"]["y"]', "42\x00", '42["\x01"]'),
    *("42[NaN]", "42[Infinity,1]", "42[1e999]", "421", "42999", '42-1["x"]', '42 1["x"]', '42²["x"]'),
    "42" + "9" * 16 + '["subscribeToOrder",{}]',
    "42" + "9" * 99 + '["subscribeToOrder",{}]',
    "42" + "9" * 5000 + '["subscribeToOrder",{}]',
    "42" + "[" * 16_000,
    '42["x",' + "[" * 16_000,
    "42" + "[" * 8_000 + "]" * 8_000,
    *("43", "43{}", "431", "43x", '431{"a":1}', "43" + "9" * 20 + "[]"),
    *(
        '44{"message":"x"}',
        "45",
        '451-["x",{"_placeholder":true,"num":0}]',
        "461-[]",
        "4500000000000-[]",
        "47",
        "48",
        "49",
    ),
    '459999999999-["x",{"_placeholder":true,"num":0}]',
    *(b"", b"\x00", b"\xff\xfe", b'2["subscribeToOrder",{}]', b"x" * 1000),
]


@pytest.mark.parametrize("packet", BAD_PACKETS, ids=lambda packet: repr(packet)[:40])
async def test_what_is_no_packet_ends_the_connection(door: Door, packet: str | bytes) -> None:
    async with raw(door) as client:
        await client.send(packet)
        assert await client.rest() == ['42["disconnected",{"code":"malformed"}]']
    async with raw(door, by=None) as client:
        await client.send(packet)
        check_turned_away(await client.rest(), "malformed", "unauthenticated")


def check_turned_away(messages: list[str], *codes: str) -> None:
    """A CONNECT_ERROR with one of these codes, and nothing else."""
    assert [message[:3] for message in messages] == ["44{"], messages
    told = json.loads(messages[0][2:])
    assert told["data"]["code"] in codes, messages
    assert told["message"] == told["data"]["message"]
    assert told["message"]


@pytest.mark.parametrize(
    "frame", ["", "0", '0{"sid":"x"}', "7", "9", "b", "bAAAA", "x", "☃", " ", "\x00", "\x1e", "{}", "GET / HTTP/1.1"]
)
async def test_what_is_no_engineio_ends_the_connection(door: Door, frame: str) -> None:
    async with raw(door) as client:
        await client.send(frame)
        assert await client.rest() == []


@pytest.mark.parametrize("frame", ["2", "2probe", "2x", "3", "3probe", "5", "5x", "6", "6x"])
async def test_engineio_out_of_turn_harms_nobody(door: Door, frame: str) -> None:
    async with raw(door) as client:
        await client.send(frame)
        await client.send(frame)
        await client.send('421["bogus"]')
        while (message := await client.receive()) is not None:
            if message.startswith("431["):
                break


async def test_a_close_is_taken_at_its_word(target: Door) -> None:
    async with raw(target) as client:
        await client.send("1")
        await client.send("40" + json.dumps({"token": SERVICE}))
        assert await client.rest() == []
        await until(lambda: nobody_is_left(target), "the session is over")


async def nobody_is_left(door: Door) -> bool:
    page = (await door.instance.get("/metrics", by=None)).body.decode()
    return "waybill_connections 0.0" in page and "waybill_watched_orders 0.0" in page


async def test_a_frame_may_not_be_too_large(door: Door) -> None:
    body = json.dumps({"orderId": door.order_id})
    fits = f'421["subscribeToOrder",{body}{" " * (FRAME_MAX_BYTES - len(body) - 25)}]'
    async with raw(door) as client:
        assert (await client.call(fits, 1))["ok"], len(fits)
    for frame in (fits + " " * 100, "4" + "2" * FRAME_MAX_BYTES, b"x" * (FRAME_MAX_BYTES + 1), "4" * 10_000_000):
        async with raw(door) as client:
            await client.send(frame)
            assert await client.rest() == []


async def test_text_that_is_no_unicode_ends_the_connection(door: Door) -> None:
    async with raw(door) as client:
        writer = client.socket._writer
        await writer.send_frame(b'421["subscribeToOrder","\xed\xa0\x80\xff"]', aiohttp.WSMsgType.TEXT)
        assert await client.rest() == []


# CONNECT


@pytest.mark.parametrize(
    ("packet", "code"),
    [
        *[(packet, "unauthenticated") for packet in ("40", "40{}", "40null", '40{"token":null}', '40{"token":""}')],
        *[
            (f'40{{"token":{value}}}', "unauthenticated")
            for value in ("5", "true", "[]", "{}", '"x"', '"☃"', '"\\u0000"')
        ],
        ('40{"token":{"a":["b"]}}', "unauthenticated"),
        ('40{"bogus":"x"}', "unauthenticated"),
        ('40{"token":"' + "x" * 10_000 + '"}', "unauthenticated"),
        *[(packet, "malformed") for packet in ("40[]", '40["x"]', '40"x"', "40true", "40{", '40{"token"}')],
        *[(f'40{{"token":{value}}}', "malformed") for value in ("NaN", '"\\ud800"', "1e999", "[" * 5000)],
        ("40\x00", "malformed"),
    ],
    ids=lambda text: repr(text)[:40],
)
async def test_connect_without_a_good_token_is_refused(door: Door, packet: str, code: str) -> None:
    async with raw(door, by=None) as client:
        await client.send(packet)
        check_turned_away([await client.receive() or ""], code)
        if code == "unauthenticated":
            await client.send(watching(421, door.order_id))
            first, *rest = await client.rest()
            check_refused(json.loads(first.removeprefix("431"))[0], "unauthenticated")
            check_turned_away(rest, "unauthenticated")


@pytest.mark.parametrize(
    "event",
    ["subscribeToOrder", "updateLocation", "updateOrderStatus", "refreshToken", "unsubscribeFromOrder", "bogus"],
)
async def test_events_before_connect_are_refused(door: Door, event: str) -> None:
    argument = json.dumps({"orderId": door.order_id, "status": "preparing", "token": SERVICE})
    async with raw(door, by=None) as client:
        await client.send(f'42["{event}",{argument}]')
        check_turned_away(await client.rest(), "unauthenticated")
    async with raw(door, by=None) as client:
        await client.send(f'427["{event}",{argument}]')
        first, *rest = await client.rest()
        check_refused(json.loads(first.removeprefix("437"))[0], "unauthenticated")
        check_turned_away(rest, "unauthenticated")


@pytest.mark.parametrize("packet", ["41", "41/admin,", "43[]", "431[]", "43/admin,1[]"])
async def test_the_end_before_the_start_harms_nobody(door: Door, packet: str) -> None:
    async with raw(door, by=None) as client:
        await client.send(packet)
        await client.send("40" + json.dumps({"token": SERVICE}))
        messages = [await client.receive()]
        assert messages[0] is None or messages[0].startswith(('40{"sid"', "44{")), messages


@pytest.mark.parametrize("namespace", ["/admin", "/x?token=1", "//", "/☃", "/" + "x" * 5000])
async def test_there_is_one_namespace(door: Door, namespace: str) -> None:
    async with raw(door) as client:
        await client.send(f"40{namespace},{json.dumps({'token': SERVICE})}")
        name = namespace.partition("?")[0]
        assert await client.receive() == f'44{name},{{"message":"Invalid namespace"}}'
        assert (await client.call('421["bogus"]', 1))["error"]["code"] == "not_found", "the session is as it was"


@pytest.mark.parametrize("packet", ['42/admin,["x"]', '42/admin,1["subscribeToOrder",{}]', "42/,[]", "42/admin"])
async def test_events_in_other_namespaces_end_the_connection(door: Door, packet: str) -> None:
    async with raw(door) as client:
        await client.send(packet)
        *_, last = await client.rest()
        assert last in [f'42["disconnected",{{"code":"{code}"}}]' for code in ("unauthenticated", "malformed")]


async def test_a_second_connect_is_not_a_second_session(target: Door) -> None:
    """However it is answered, nobody gets an event twice on one connection, and nothing is left when it ends."""
    order_id = (await target.instance.place())["id"]
    async with raw(target) as client:
        await client.send(watching(421, order_id))
        assert '"ok":true' in (await client.receive() or "")
        await client.send("40" + json.dumps({"token": SERVICE}))
        await client.send(watching(422, order_id))
        await client.send('423["bogus"]')
        messages = []
        while (message := await client.receive()) is not None:
            messages.append(message)
            if message.startswith("433["):
                break
        await target.instance.move(order_id, "confirmed")
        await target.instance.move(order_id, "preparing")
        while message is not None and '"preparing"' not in message:
            message = await client.receive()
            messages.append(message or "")
        seqs = [json.loads(text[2:])[1]["seq"] for text in messages if text.startswith('42["orderStatusUpdate"')]
        assert seqs in ([], [2, 3]), messages

    await until(lambda: nobody_is_left(target), "nothing is left of the session")
    target.log.check_quiet()


async def test_who_left_the_namespace_is_out(target: Door) -> None:
    async with raw(target) as client:
        await client.send("41")
        await until(lambda: nobody_is_left(target), "the session is over")
        await client.send(watching(421, target.order_id))
        first, *rest = await client.rest()
        check_refused(json.loads(first.removeprefix("431"))[0], "unauthenticated")
        check_turned_away(rest, "unauthenticated")


async def test_who_leaves_while_subscribing_leaves_nothing_behind(target: Door) -> None:
    """The session ends while its subscribe is reading: it must not join a room that nobody would ever empty."""
    async with raw(target) as client:
        for number in range(20):
            await client.send(watching(42 * 10**3 + number, target.order_id))
        await client.send("41")
        await until(lambda: nobody_is_left(target), "the session is over")
        await client.send("42")
        await client.rest()
    await until(lambda: nobody_is_left(target), "no room is left")
    target.log.check_quiet()


async def test_crumbs_of_a_message_cost_nobody_else_anything(target: Door) -> None:
    """A message in very many empty fragments: the frames are small, what they cost the server must be so too."""
    fragment, start = bytes([0x00, 0x80]) + bytes(4), bytes([0x01, 0x80]) + bytes(4)
    async with raw(target) as client:
        transport: Any = client.socket._response.connection.transport  # type: ignore[union-attr]
        transport.write(start + fragment * 200_000)
        began = time.monotonic()
        for _ in range(5):
            assert (await target.instance.get("/health/live", by=None)).status == 200
        assert time.monotonic() - began < 2
        transport.abort()


# polling


class Poller:
    """A polling session by hand."""

    def __init__(self, door: Door, session: aiohttp.ClientSession, sid: str) -> None:
        self._session = session
        self.url = f"{door.instance.url}/socket.io/?EIO=4&transport=polling&sid={sid}"

    async def post(self, body: Any, **how: Any) -> tuple[int, bytes]:
        async with self._session.post(self.url, data=body, **how) as response:
            return response.status, await response.read()

    async def get(self) -> tuple[int, str]:
        async with asyncio.timeout(SOON_S), self._session.get(self.url) as response:
            return response.status, await response.text()


@asynccontextmanager
async def polling(door: Door, *, by: str | None = SERVICE) -> AsyncIterator[Poller]:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{door.instance.url}/socket.io/?EIO=4&transport=polling") as response:
            sid = json.loads((await response.text())[1:])["sid"]
        client = Poller(door, session, sid)
        if by is not None:
            assert (await client.post("40" + json.dumps({"token": by})))[0] == 200
            assert (await client.get())[1].startswith('40{"sid"')
        yield client


@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xfe",
        b'421["subscribeToOrder","\xed\xa0\x80"]',
        b"\x1e",
        b"\x1e\x1e\x1e",
        b'421["bogus"]\x1e',
        b"\x1e".join([b"2"] * 17),
        b"d=",
        b"d",
        b"d=%ff",
        b"x",
        b"7",
        b"bAA=A",
        b"0",
        b"2",
        b"6",
        b"1\x1e0",
        b"x" * 5000,
    ],
    ids=lambda body: repr(body[:30]),
)
async def test_a_polled_payload_that_is_none_is_refused(door: Door, body: bytes) -> None:
    async with polling(door) as client:
        status, text = await client.post(body)
        assert (status, json.loads(text)["code"]) == (400, "malformed")


@pytest.mark.parametrize("packet", [each for each in BAD_PACKETS if isinstance(each, str) and "\x1e" not in each])
async def test_a_polled_packet_that_is_none_ends_the_session(door: Door, packet: str) -> None:
    async with polling(door) as client:
        status, _ = await client.post(packet.encode())
        assert status in (200, 400)
        told = ""
        while status == 200:
            status, text = await client.get()
            told += text if status == 200 else ""
        assert status == 400
        assert told in ("", '42["disconnected",{"code":"malformed"}]', '42["disconnected",{"code":"malformed"}]\x1e1')


async def test_a_polled_body_may_not_be_too_large(door: Door) -> None:
    for size in (FRAME_MAX_BYTES + 1, 300_000, 5_000_000):
        async with polling(door) as client:
            try:
                status, text = await client.post(io.BytesIO(b"4" * size))
            except aiohttp.ClientOSError:
                continue  # hung up before it was all sent
            assert (status, json.loads(text)["code"]) == (413, "too_large")

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"4" * 16_384

    async with polling(door) as client:
        try:
            status, text = await client.post(chunks())
        except aiohttp.ClientOSError:
            return
        assert (status, json.loads(text)["code"]) == (413, "too_large")


async def test_a_polled_body_of_unknown_length_is_read(door: Door) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b'421["bo'
        yield b'gus"]'

    async with polling(door) as client:
        assert (await client.post(chunks()))[0] == 200
        assert '"not_found"' in (await client.get())[1]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br"])
async def test_a_polled_body_that_is_encoded_is_refused(door: Door, encoding: str) -> None:
    async with polling(door) as client:
        status, text = await client.post(b"\x1f\x8b nothing packed", headers={"Content-Encoding": encoding})
        assert (status, json.loads(text)["code"]) == (400, "malformed")


@pytest.mark.parametrize(
    "query",
    [
        *(
            "",
            "EIO=3&transport=polling",
            "EIO=4&transport=pigeon",
            "EIO=4&transport=websocket",
            "EIO=abc",
            "transport=",
        ),
        *("EIO=4&transport=polling&sid=bogus", "EIO=4&transport=websocket&sid=bogus", "EIO=4&transport=polling&j=abc"),
        *("EIO=4&EIO=3&transport=polling", "EIO=4&transport=polling&sid=%00", "EIO=4&transport=polling&sid=%ff%fe"),
        "EIO=4&transport=polling&sid=" + "x" * 4000,
    ],
    ids=lambda text: text[:50],
)
async def test_a_handshake_that_is_none_is_refused(door: Door, query: str) -> None:
    async with aiohttp.ClientSession() as session:
        for method in ("GET", "POST"):
            async with session.request(method, f"{door.instance.url}/socket.io/?{query}", data=b"") as response:
                assert response.status == 400, (method, response.status, await response.text())
        for method in ("PUT", "DELETE", "PATCH"):
            async with session.request(method, f"{door.instance.url}/socket.io/?{query}") as response:
                assert response.status == 405
                assert response.content_type == "application/problem+json"
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket"}
        async with session.get(f"{door.instance.url}/socket.io/?{query}", headers=upgrade) as response:
            assert response.status == 400, await response.text()


HANDSHAKE = (
    "GET /socket.io/?{query} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("Connection: Upgrade\r\n", ""),
        ("Connection: Upgrade", "Connection: keep-alive"),
        ("Upgrade: websocket\r\n", ""),
        ("Upgrade: websocket", "Upgrade: h2c"),
        ("Version: 13", "Version: 8"),
        ("Version: 13", "Version: ☃"),
        ("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", ""),
        ("dGhlIHNhbXBsZSBub25jZQ==", ""),
        ("dGhlIHNhbXBsZSBub25jZQ==", "too-short"),
        ("dGhlIHNhbXBsZSBub25jZQ==", "☃" * 8),
        ("dGhlIHNhbXBsZSBub25jZQ==", "!" * 24),
    ],
)
async def test_half_a_websocket_handshake_is_refused(door: Door, right: str, wrong: str) -> None:
    async with polling(door) as client:
        sid = client.url.rsplit("=", 1)[1]
        for query in ("EIO=4&transport=websocket", f"EIO=4&transport=websocket&sid={sid}"):
            reader, writer = await asyncio.open_connection("127.0.0.1", door.instance.port)
            writer.write(HANDSHAKE.format(query=query).replace(right, wrong, 1).encode())
            async with asyncio.timeout(SOON_S):
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = int(head.lower().partition("content-length: ")[2].partition("\r")[0])
                body = await reader.readexactly(length)
            writer.close()
            assert head.startswith("HTTP/1.1 400 "), head
            assert json.loads(body)["code"] == "malformed"
        assert (await client.post('421["bogus"]'))[0] == 200


async def test_a_session_of_somewhere_else_is_told_what_to_do(door: Door) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{door.instance.url}/socket.io/?EIO=4&transport=polling&sid=elsewhere") as response,
    ):
        assert response.status == 400
        told = await response.json()
        assert told["code"] == 1
        assert "sticky" in told["message"]
        assert "websocket" in told["message"]


@pytest.mark.parametrize("frames", [["x"], ["2probe", "x"], ["5"], ["2probe", "40"], [b"\x00"], ["2probe", b"x"], []])
async def test_an_upgrade_that_goes_wrong_leaves_the_polling_session(door: Door, frames: list[str | bytes]) -> None:
    async with polling(door) as client:
        url = client.url.replace("transport=polling", "transport=websocket")
        async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
            for frame in frames:
                await (socket.send_str(frame) if isinstance(frame, str) else socket.send_bytes(frame))
            await socket.close()
        status, _ = await client.post('421["bogus"]')
        assert status == 200
        told = ""
        while '"not_found"' not in told:
            status, text = await client.get()
            assert status == 200, text
            told += text


# made up


PACKETS = [
    '42{n}["subscribeToOrder",{"orderId":"{id}","afterSeq":0}]',
    '42{n}["subscribeToOrder",{"orderId":"{id}"}]',
    '42{n}["unsubscribeFromOrder",{"orderId":"{id}"}]',
    '42{n}["updateLocation",{"orderId":"{id}","lat":12.5,"lng":77.5,"ts":1700000000000,"accuracy":5}]',
    '42["updateLocation",{"orderId":"{id}","lat":12.5,"lng":77.5,"ts":1700000000000}]',
    '42{n}["updateOrderStatus",{"orderId":"{id}","status":"confirmed","note":"x","idempotencyKey":"k"}]',
    '42{n}["refreshToken",{"token":"a.b.c"}]',
    '42{n}["bogus",1,2,3]',
    "43{n}[]",
    "41",
    '40{"token":"x"}',
    '40/admin,{"token":"x"}',
    "2probe",
    "3",
    "5",
]
PIECES = [
    *("NaN", "1e999", "\\ud800", '"', "\\", "[" * 300, "{", "}", "]", ",", ":", "-", "/admin,", "451-", "\x00", "\x1e"),
    *("null", "true", "9" * 400, "☃", "-1", '{"_placeholder":true,"num":0}', '"__proto__":', "4", "2", "0"),
]


def made_up(chance: random.Random, order_id: str) -> str | bytes:
    packet = chance.choice(PACKETS).replace("{n}", str(chance.randrange(1000))).replace("{id}", order_id)
    text = list(packet)
    for _ in range(chance.choice((0, 1, 1, 2, 4))):
        at = chance.randrange(len(text) + 1)
        match chance.randrange(4):
            case 0:
                text[at:at] = list(chance.choice(PIECES))
            case 1:
                text[at : at + chance.randrange(1, 6)] = []
            case 2:
                text[at : at + 1] = [chr(chance.choice([chance.randrange(128), chance.randrange(0x800, 0xD800)]))]
            case _:
                text[at : at + chance.randrange(1, 20)] = list(chance.choice(PIECES))
    made = "".join(text)
    return made.encode() if chance.random() < 0.02 else made


async def test_made_up_packets(target: Door) -> None:
    """Whatever is sent: answers are of the contract, and a well-behaved watcher is served all the time."""
    seed = int(os.environ.get("FUZZ_SEED") or random.SystemRandom().randrange(2**32))
    print(f"FUZZ_SEED={seed}")  # noqa: T201  # shown when the test fails
    instance, sent, deadline = target.instance, 0, time.monotonic() + FUZZ_S
    watched = (await instance.place())["id"]
    warm_bytes = 0

    def rss_bytes() -> int:
        return int(psutil.Process(instance.process.pid).memory_info().rss)

    async def fuzz(chance: random.Random) -> None:
        nonlocal sent
        while time.monotonic() < deadline:
            order_id = (await instance.place())["id"]
            async with raw(target, by=chance.choice([None, SERVICE, AGENT])) as client:
                trail: list[str | bytes] = []
                for _ in range(30):
                    packet = made_up(chance, order_id)
                    trail.append(packet)
                    sent += 1
                    await client.send(packet)
                await client.send("7")  # ends it, if nothing did
                for message in await client.rest():
                    if message.startswith("43") and '"ok":false' in message:
                        (answer,) = json.loads(message[message.index("[") :])
                        assert answer["error"]["code"] in CODES, (seed, trail, message)

    async def behave() -> None:
        nonlocal warm_bytes
        rounds = 0
        async with Watcher(instance, SERVICE) as watcher:
            await watcher.watch(watched)
            while time.monotonic() < deadline:
                rounds += 1
                if not warm_bytes and time.monotonic() > deadline - FUZZ_S / 2:
                    warm_bytes = rss_bytes()
                order = await instance.assign(watched, "a1", agentName=f"Ravi {rounds}")
                await watcher.hears("deliveryAgentAssigned", seq=order["seq"])
            assert watcher.seqs(watched) == list(range(2, rounds + 2))
        assert rounds > 10

    await asyncio.gather(*(fuzz(random.Random(f"{seed}/{number}")) for number in range(4)), behave())
    assert sent > 1000
    assert warm_bytes
    assert rss_bytes() - warm_bytes < GROWTH_MAX_BYTES, seed
    target.log.check_quiet()
    assert (await instance.get("/health/ready", by=None)).status == 200
