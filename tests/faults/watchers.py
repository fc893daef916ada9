"""Who watches orders while things go wrong: each kind is a way in which real clients stay, leave and come back.

What a watcher is told it writes down as it comes, in `heard`; nobody sorts it or drops a repeat from it. The verdict
(tests/faults/model.py) compares it with the table.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Protocol, cast

import aiohttp

from tests.faults.model import Heard
from tests.faults.proxy import Proxy
from tests.flows.official import Node, OfficialSocket
from tests.harness import POLL_S, Instance

COME_BACK_S = (0.05, 0.3)
"""Pause before a client comes back, drawn: less than real clients take, so that faults and returns meet more often."""
ANSWER_S = 6.0
"""How long a client waits for a handshake, or for an answer: longer than any that the server promises."""
LONG_POLL_S = 2


class Gone(Exception):
    """The connection has ended."""


class Watcher:
    """What all kinds have in common. `urls` are the instances; `heard` is by order."""

    stays = False
    """It does not come back: whatever it hears is heard on one connection."""

    def __init__(self, name: str, urls: Sequence[str], by: str, orders: Sequence[str], rng: random.Random) -> None:
        self.name, self._urls, self._token, self._rng = name, urls, by, rng
        self.heard: Heard = {order_id: [] for order_id in orders}
        self.wrong: list[str] = []
        """What no list of events shows: answers and frames against the contract."""
        self.ended = False
        self.connections = 0
        self.recoveries = 0
        self.recoverable = False
        """Whether the server has ever given it a `pid`."""
        self._moving = asyncio.Event()
        self._moving.set()

    def top(self, order_id: str) -> int:
        """The highest number that it has of this order."""
        return max((data["seq"] for _, data in self.heard[order_id]), default=0)

    @property
    def watching(self) -> bool:
        """Whether it has begun with every order."""
        return all(self.heard.values())

    async def run(self) -> None:
        """Watch until cancelled."""
        raise NotImplementedError

    async def flap(self, how: str, seconds: float) -> None:
        """Lose the network: `close` (both sides see it), `half-open` (the server does not) or `tunnel`, for so long."""

    async def _pause(self) -> None:
        await asyncio.sleep(self._rng.uniform(*COME_BACK_S))

    def _take(self, order_id: str, asked: int, seq: int, events: Sequence[dict[str, Any]]) -> None:
        """Events of an answer to "what is after `asked`": whole, up to exactly `seq`."""
        got = [event["seq"] for event in events]
        if got != list(range(asked + 1, seq + 1)):
            self.wrong.append(f"asked for what is after {asked} up to {seq}, and was given {got}")
        known = self.top(order_id)
        self.heard[order_id] += [(event["type"], event["data"]) for event in events if event["seq"] > known]


# over Socket.IO


class _Link(Protocol):
    """One Engine.IO session."""

    async def send(self, packet: str) -> None: ...

    async def receive(self) -> list[str]: ...

    def abort(self) -> None: ...


class _WebSocket:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket

    @classmethod
    async def open(cls, session: aiohttp.ClientSession, url: str) -> _WebSocket:
        return cls(await session.ws_connect(f"{url}/socket.io/?EIO=4&transport=websocket", max_msg_size=0))

    async def send(self, packet: str) -> None:
        await self._socket.send_str(packet)

    async def receive(self) -> list[str]:
        message = await self._socket.receive()
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise Gone
        return [message.data]

    def abort(self) -> None:
        response = self._socket._response
        if response.connection is not None and response.connection.transport is not None:
            response.connection.transport.abort()
        response.close()


class _Polling:
    def __init__(self, session: aiohttp.ClientSession, url: str, opening: list[str]) -> None:
        self._session, self._opening = session, opening
        self._url = f"{url}&sid={json.loads(opening[0][1:])['sid']}"

    @classmethod
    async def open(cls, session: aiohttp.ClientSession, url: str) -> _Polling:
        url = f"{url}/socket.io/?EIO=4&transport=polling"
        async with session.get(url) as response:
            if response.status != 200:
                raise Gone
            return cls(session, url, (await response.text()).split("\x1e"))

    async def send(self, packet: str) -> None:
        async with self._session.post(self._url, data=packet) as response:
            if response.status != 200:
                raise Gone

    async def receive(self) -> list[str]:
        if self._opening:
            packets, self._opening = self._opening, []
            return packets
        async with self._session.get(self._url) as response:
            if response.status != 200:
                raise Gone
            return (await response.text()).split("\x1e")

    def abort(self) -> None:
        """Never asking again is how a polling client goes."""


class SocketWatcher(Watcher):
    """A Socket.IO client that comes back by itself and subscribes with `afterSeq`.

    With `recovery` it does as the JavaScript client with connection state recovery: it comes back with the `pid` and
    the last trailing string that it was given, and subscribes again only when the server does not say the same `pid`.
    """

    def __init__(self, *args: Any, polls: bool = False, recovery: bool = False, stays: bool = False) -> None:
        super().__init__(*args)
        self.stays = stays
        self._recovery = recovery
        self._open = _Polling.open if polls else _WebSocket.open
        self._pid: str | None = None
        self._offset: str | None = None
        self._joined: set[str] = set()
        """Orders whose subscription was answered."""
        self._recovered = False
        self._numbers = itertools.count(1)
        self._asked: dict[int, tuple[str, int]] = {}
        self._link: _Link | None = None
        self._connection: asyncio.Task[None] | None = None
        self._left_open: list[_Link] = []
        self._later: set[asyncio.Task[None]] = set()
        self._patience_s = ANSWER_S

    @property
    def watching(self) -> bool:
        return set(self.heard) == self._joined

    async def run(self) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            try:
                while not self.ended:
                    await self._moving.wait()
                    self._connection = asyncio.create_task(self._connect(session))
                    await asyncio.wait((self._connection,))
                    if not self._connection.cancelled() and (error := self._connection.exception()) is not None:
                        if not isinstance(error, (Gone, aiohttp.ClientError, OSError, TimeoutError)):
                            raise error
                    self.ended = self.stays and self.watching
                    await self._pause()
            finally:
                if self._connection is not None:
                    self._connection.cancel()
                    await asyncio.wait((self._connection,))
                for task in self._later:
                    task.cancel()
                for link in self._left_open:
                    link.abort()

    async def flap(self, how: str, seconds: float) -> None:
        link, connection = self._link, self._connection
        if how == "tunnel":
            self._moving.clear()
            await asyncio.sleep(seconds)
            self._moving.set()
        elif link is not None and connection is not None:
            if how == "half-open":
                self._left_open.append(link)
            connection.cancel()

    async def _connect(self, session: aiohttp.ClientSession) -> None:
        async with asyncio.timeout(ANSWER_S):
            self._link = link = await self._open(session, self._rng.choice(self._urls))
        try:
            self._asked.clear()
            self._patience_s = ANSWER_S
            while True:
                async with asyncio.timeout(self._patience_s):
                    packets = await link.receive()
                await self._moving.wait()  # in a tunnel nothing is heard: what arrives waits in the socket
                for packet in packets:
                    await self._hear(link, packet)
        finally:
            if link not in self._left_open:
                link.abort()

    async def _hear(self, link: _Link, packet: str) -> None:
        if packet.startswith("0"):
            opening = json.loads(packet[1:])
            self._patience_s = (opening["pingInterval"] + opening["pingTimeout"]) / 1000
            known = {"pid": self._pid, "offset": self._offset} if self._pid is not None else {}
            recovery = {"recovery": True, **known} if self._recovery else {}
            await link.send("40" + json.dumps({"token": self._token, **recovery}))
        elif packet == "2":
            await link.send("3")
        elif packet.startswith("40"):
            await self._connected(link, json.loads(packet[2:]))
        elif packet.startswith("42"):
            self._event(*json.loads(packet[2:]))
        elif packet.startswith("43"):
            number, _, answer = packet[2:].partition("[")
            self._answered(link, *self._asked.pop(int(number)), *json.loads("[" + answer))
        elif packet == "1":
            raise Gone
        elif packet != "6":
            self.wrong.append(f"was sent away for good: {packet}")
            raise Gone

    async def _connected(self, link: _Link, greeting: dict[str, Any]) -> None:
        self.connections += 1
        pid = greeting.get("pid")
        if pid is not None and not self._recovery:
            self.wrong.append("was given a pid, and had not asked for recovery")
        self._recovered = pid is not None and pid == self._pid
        self._pid, self.recoverable = pid, pid is not None
        if self._recovered:
            self.recoveries += 1
        else:
            self._joined.clear()
        for order_id in self.heard.keys() - self._joined:
            await self._subscribe(link, order_id)

    async def _subscribe(self, link: _Link, order_id: str, after_s: float = 0.0) -> None:
        await asyncio.sleep(after_s)
        number, asked = next(self._numbers), self.top(order_id)
        self._asked[number] = order_id, asked
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, Gone):  # the reader finds it out, too
            await link.send(f"42{number}" + json.dumps(["subscribeToOrder", {"orderId": order_id, "afterSeq": asked}]))

    def _answered(self, link: _Link, order_id: str, asked: int, answer: dict[str, Any]) -> None:
        if answer["ok"]:
            self._take(order_id, asked, answer["seq"], answer["events"])
            self._joined.add(order_id)
            return
        if answer["error"]["code"] != "unavailable":
            self.wrong.append(f"was refused: {answer}")
        again = asyncio.create_task(self._subscribe(link, order_id, COME_BACK_S[1]))
        self._later.add(again)
        again.add_done_callback(self._later.discard)

    def _event(self, name: str, data: Any = None, *more: Any) -> None:
        if name == "disconnected":
            self.wrong.append(f"was sent away for good: {data}")
        if "seq" not in data:
            return
        order_id = data["orderId"]
        if self._pid is None:
            if more:
                self.wrong.append(f"{name} came with {more}")
        elif len(more) == 1 and isinstance(more[0], str):
            self._offset = more[0]
        else:
            self.wrong.append(f"{name} came with {more} in place of an offset")
        if order_id in self._joined:
            self.heard[order_id].append((name, data))
        elif not self._recovered:  # else it was joined, and the answer that said so was lost
            self.wrong.append(f"{name} {data['seq']} came before the snapshot")


class OfficialWatcher(Watcher):
    """The official JavaScript client, at one instance, through a proxy that is its network."""

    def __init__(self, *args: Any, node: Node, recovery: bool = False) -> None:
        super().__init__(*args)
        self._node = node
        self._recovery = recovery
        self._asked: dict[int, tuple[str, int]] = {}
        self._joined: set[str] = set()
        self._road = Proxy(self._rng.choice(self._urls))

    @property
    def watching(self) -> bool:
        return set(self.heard) == self._joined

    async def run(self) -> None:
        await self._road.heal()
        options = {
            "transports": ["websocket"],
            "reconnectionDelay": COME_BACK_S[0] * 1000,
            "reconnectionDelayMax": COME_BACK_S[1] * 1000,
            "auth": {"token": self._token, **({"recovery": True} if self._recovery else {})},
        }
        socket = self._node.socket(cast(Instance, SimpleNamespace(url=self._road.url)), None, **options)
        try:
            read = 0
            while True:
                for record in socket.seen[read:]:
                    read += 1
                    self._see(socket, **record)
                await asyncio.sleep(POLL_S)
        finally:
            socket.tell("close")
            await self._road.close()

    def _see(self, socket: OfficialSocket, what: str, **more: Any) -> None:
        if what == "connect":
            self.connections += 1
            self.recoveries += more["recovered"]
            if not more["recovered"]:
                self._joined.clear()
            for order_id in self.heard.keys() - self._joined:
                self._subscribe(socket, order_id)
        elif what == "ack":
            order_id, asked = self._asked.pop(more["call"])
            (answer,) = more["args"]
            if answer["ok"]:
                self._take(order_id, asked, answer["seq"], answer["events"])
                self._joined.add(order_id)
            elif answer["error"]["code"] == "unavailable":
                asyncio.get_running_loop().call_later(COME_BACK_S[1], self._subscribe, socket, order_id)
            else:
                self.wrong.append(f"was refused: {answer}")
        elif what == "event":
            data, *offset = more["args"]
            if offset and not self._recovery:
                self.wrong.append(f"{more['name']} came with {offset}")
            self.recoverable = self.recoverable or bool(offset)
            if "seq" in data and data["orderId"] in self._joined:
                self.heard[data["orderId"]].append((more["name"], data))
        elif what in ("connect_error", "disconnect") and not more["active"]:
            self.wrong.append(f"was sent away for good: {what} {more}")

    def _subscribe(self, socket: OfficialSocket, order_id: str) -> None:
        asked = self.top(order_id)
        self._asked[socket.start("subscribeToOrder", {"orderId": order_id, "afterSeq": asked})] = order_id, asked

    async def flap(self, how: str, seconds: float) -> None:
        if how == "close":
            self._road.cut()
        else:
            await self._road.freeze_for(seconds)


# over REST


class RestWatcher(Watcher):
    """Cannot hold a socket: it reads what is after its last number, and waits for it."""

    async def run(self) -> None:
        headers = {"Authorization": f"Bearer {self._token}"}
        async with aiohttp.ClientSession(headers=headers) as session, asyncio.TaskGroup() as orders:
            for order_id in self.heard:
                orders.create_task(self._follow(session, order_id))

    async def _follow(self, session: aiohttp.ClientSession, order_id: str) -> None:
        while True:
            await self._moving.wait()
            asked = self.top(order_id)
            url = f"{self._rng.choice(self._urls)}/api/v1/orders/{order_id}/events?after={asked}&wait={LONG_POLL_S}"
            try:
                async with session.get(url, timeout=aiohttp.ClientTimeout(LONG_POLL_S + ANSWER_S)) as response:
                    answer = await response.json(content_type=None)
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
                await self._pause()
                continue
            if response.status == 200:
                self._take(order_id, asked, answer["seq"], answer["events"])
            elif response.status == 503:
                await self._pause()
            else:
                self.wrong.append(f"was refused: {answer}")
                await self._pause()

    async def flap(self, how: str, seconds: float) -> None:
        self._moving.clear()
        await asyncio.sleep(seconds)
        self._moving.set()
