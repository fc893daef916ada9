"""python-socketio's public API, and nothing else, on our engine: what its users wrote for AsyncServer goes on working,
with clients on a WebSocket, clients that poll, and clients that change from the one to the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import socketio

from tests.conformance.serve import EchoEngine
from tests.conformance.wire import serving
from tests.harness import until

TRANSPORTS = [["websocket"], ["polling"], ["polling", "websocket"]]


class Chat(socketio.AsyncNamespace):  # type: ignore[misc]  # the library is not typed
    """A namespace as its users write one."""

    left: list[tuple[str, str]]

    async def on_connect(self, sid: str, environ: dict[str, Any], auth: Any = None) -> None:
        if auth == {"name": "nobody"}:
            raise socketio.exceptions.ConnectionRefusedError("not you", {"why": "name"})
        assert "EIO=4" in environ["QUERY_STRING"]
        async with self.session(sid) as session:
            session["name"] = (auth or {}).get("name")

    async def on_join(self, sid: str, room: str) -> list[str]:
        await self.enter_room(sid, room)
        return sorted(str(each) for each in self.rooms(sid) if each != sid)

    async def on_leave(self, sid: str, room: str) -> None:
        await self.leave_room(sid, room)

    async def on_whoami(self, sid: str) -> tuple[str, bytes]:
        return (await self.get_session(sid))["name"], b"\x00\xff"

    async def on_say(self, sid: str, room: str, *what: Any) -> None:
        await self.emit("said", what, room=room, skip_sid=sid)

    async def on_disconnect(self, sid: str, reason: str) -> None:
        self.left.append(((await self.get_session(sid))["name"] if reason != "transport close" else "", reason))


class Person:
    """A client of python-socketio, and what it heard."""

    def __init__(self, name: str, transports: list[str]) -> None:
        self.name, self.transports = name, transports
        self.client = socketio.AsyncClient(reconnection=False)
        self.heard: list[tuple[str, Any]] = []
        for namespace in ("/chat", "/news", "/"):
            self.client.on("*", self._hear, namespace=namespace)

    async def _hear(self, event: str, *args: Any) -> Any:
        if event != "auth":
            self.heard.append((event, args))
        return args

    async def enter(self, url: str) -> None:
        await self.client.connect(
            url, auth={"name": self.name}, transports=self.transports, namespaces=["/", "/chat", "/news"]
        )

    def sid(self, namespace: str) -> str:
        return str(self.client.get_sid(namespace))

    async def hears(self, event: str, *args: Any) -> None:
        await until(lambda: (event, args) in self.heard, f"{self.name} hears {event} {args}; heard {self.heard}")


class Town:
    def __init__(self, server: EchoEngine, chat: Chat, people: list[Person]) -> None:
        self.server, self.chat, self.people = server, chat, people


@pytest.fixture
async def town() -> AsyncIterator[Town]:
    """Three clients, one on each kind of transport, in two namespaces and the default one."""
    server, chat = EchoEngine(), Chat("/chat")
    chat.left = []
    server.register_namespace(chat)

    @server.on("connect", namespace="/news")  # type: ignore[untyped-decorator]
    async def welcome(sid: str, environ: dict[str, Any], auth: Any) -> None:
        await server.enter_room(sid, "readers", namespace="/news")

    @server.on("sum", namespace="/news")  # type: ignore[untyped-decorator]
    async def add(sid: str, *numbers: int) -> int:
        return sum(numbers)

    async with serving(server) as door:
        people = [Person("+".join(transports), transports) for transports in TRANSPORTS]
        for person in people:
            await person.enter(door.url.removesuffix("/socket.io/"))
        yield Town(server, chat, people)
        for person in people:
            await person.client.disconnect()
        await until(lambda: not server.eio.sockets, "every session is over")
        assert server.environ == {}
        assert list(server.manager.get_namespaces()) == []
        assert server.manager.callbacks == {}
        assert server.manager._rooms_of == {}


async def test_each_client_is_on_the_transport_that_it_wanted(town: Town) -> None:
    found = [town.server.transport(person.sid("/chat"), namespace="/chat") for person in town.people]
    assert found == ["websocket", "polling", "websocket"]


async def test_emit_to_one_to_a_room_to_all_and_past_somebody(town: Town) -> None:
    a, b, c = town.people
    for person in (a, b):
        assert await person.client.call("join", "den", namespace="/chat") == ["den"]
    await town.server.emit("one", 1, to=b.sid("/chat"), namespace="/chat")
    await town.server.emit("room", {"x": [1]}, room="den", namespace="/chat")
    await town.server.emit("rooms", "y", room=["den", c.sid("/chat")], namespace="/chat")
    await town.server.emit("all", (1, "two", None), namespace="/chat", skip_sid=a.sid("/chat"))
    await town.server.emit("nobody", namespace="/chat", room="empty")
    await town.server.send("words", namespace="/news", room="readers")
    await town.server.emit("own", "z", to=c.sid("/"))
    for person in town.people:
        await person.hears("message", "words")
    assert a.heard == [("room", ({"x": [1]},)), ("rooms", ("y",)), ("message", ("words",))]
    assert b.heard == [
        *[("one", (1,)), ("room", ({"x": [1]},)), ("rooms", ("y",)), ("all", (1, "two", None)), ("message", ("words",))]
    ]
    await c.hears("own", "z")
    assert c.heard == [("rooms", ("y",)), ("all", (1, "two", None)), ("message", ("words",)), ("own", ("z",))]


async def test_rooms_are_entered_left_and_closed(town: Town) -> None:
    a, b, c = town.people
    for person in town.people:
        await person.client.call("join", "den", namespace="/chat")
        await person.client.call("join", "hall", namespace="/chat")
    await b.client.call("leave", "den", namespace="/chat")
    assert sorted(map(str, town.server.rooms(b.sid("/chat"), namespace="/chat"))) == sorted([b.sid("/chat"), "hall"])
    await a.client.emit("say", ("den", "only c"), namespace="/chat")
    await c.hears("said", "only c")
    await town.server.close_room("hall", namespace="/chat")
    assert town.server.rooms(b.sid("/chat"), namespace="/chat") == [b.sid("/chat")]
    await town.server.emit("after", room="hall", namespace="/chat")
    await town.server.emit("last", namespace="/chat")
    for person in town.people:
        await person.hears("last")
        assert "after" not in [event for event, _ in person.heard]
    assert [event for event, _ in b.heard] == ["last"]
    with pytest.raises(ValueError, match="sid room"):
        await town.server.enter_room(a.sid("/chat"), b.sid("/chat"), namespace="/chat")
    with pytest.raises(ValueError, match="not connected"):
        await town.server.enter_room("nobody", "den", namespace="/chat")


async def test_calls_both_ways_with_binary(town: Town) -> None:
    for person in town.people:
        assert await person.client.call("sum", (1, 2, 3), namespace="/news") == 6
        assert tuple(await person.client.call("whoami", namespace="/chat")) == (person.name, b"\x00\xff")
        answer = await town.server.call(
            "ask", ({"bytes": b"\x01\x02"}, "x"), to=person.sid("/chat"), namespace="/chat", timeout=5
        )
        assert list(answer) == [{"bytes": b"\x01\x02"}, "x"]
        assert await town.server.call("ask", b"\x03", to=person.sid("/"), timeout=5) == b"\x03"
        with pytest.raises(socketio.exceptions.TimeoutError):
            await town.server.call("ask", to="nobody", namespace="/chat", timeout=0.05)
    town.server.manager.callbacks.clear()


async def test_a_callback_may_be_a_coroutine_and_is_called_once(town: Town) -> None:
    answered: list[Any] = []
    done = asyncio.Event()

    async def answer(*args: Any) -> None:
        answered.append(args)
        done.set()

    await town.server.emit("ask", "x", to=town.people[1].sid("/chat"), namespace="/chat", callback=answer)
    await asyncio.wait_for(done.wait(), 5)
    assert answered == [("x",)]


async def test_binary_reaches_every_kind_of_client(town: Town) -> None:
    picture = bytes(range(256)) * 300
    await town.server.emit("picture", {"of": "door", "data": picture}, namespace="/chat")
    for person in town.people:
        await person.hears("picture", {"of": "door", "data": picture})
        await person.client.emit("message", {"back": picture})
        await person.hears("message-back", {"back": picture})


async def test_sessions_keep_what_was_saved(town: Town) -> None:
    sid = town.people[0].sid("/news")
    await town.server.save_session(sid, {"seen": 3}, namespace="/news")
    assert await town.server.get_session(sid, namespace="/news") == {"seen": 3}
    assert (await town.server.get_session(town.people[0].sid("/chat"), namespace="/chat"))["name"] == "websocket"
    await town.server.save_session(town.people[0].sid("/"), {"own": 1})
    async with town.server.session(town.people[0].sid("/")) as session:
        assert session == {"own": 1}


async def test_the_server_disconnects_one_namespace(town: Town) -> None:
    for person in town.people:
        await town.server.disconnect(person.sid("/chat"), namespace="/chat")
        await until(lambda person=person: "/chat" not in person.client.namespaces, "the client has heard of it")
        assert await person.client.call("sum", (1, 1), namespace="/news") == 2
    assert town.chat.left == [(person.name, "server disconnect") for person in town.people]
    await town.server.disconnect(town.people[0].sid("/"))
    await until(lambda: len(town.server.connections) == 2, "it is gone from the default namespace")


async def test_a_client_that_is_refused_hears_why(town: Town) -> None:
    client, told = socketio.AsyncClient(reconnection=False), asyncio.get_running_loop().create_future()
    client.on("connect_error", told.set_result, namespace="/chat")
    url = town.people[0].client.connection_url
    with pytest.raises(socketio.exceptions.ConnectionError):
        await client.connect(url, auth={"name": "nobody"}, namespaces=["/chat"], wait_timeout=5)
    assert await told == {"message": "not you", "data": {"why": "name"}}
    await client.disconnect()


async def test_a_client_that_is_lost_is_told_to_every_namespace(town: Town) -> None:
    a = town.people[0]
    eio_sid = town.server.manager.eio_sid_from_sid(a.sid("/chat"), "/chat")
    town.server.eio.sockets[eio_sid].abort()
    await until(lambda: town.chat.left == [("", "transport close")], "its namespace hears of it")


async def test_one_emit_makes_one_frame_and_no_task(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    frames: list[Any] = []
    for session in town.server.eio.sockets.values():
        monkeypatch.setattr(type(session), "send_frame", lambda self, message: frames.append(message))
    before = asyncio.all_tasks()
    await town.server.emit("all", {"a": 1}, namespace="/chat")
    assert asyncio.all_tasks() == before
    assert len(frames) == 3
    assert len({id(each) for each in frames}) == 1
    monkeypatch.undo()
