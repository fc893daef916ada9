"""The official socket.io-client from npm, driven from Python: tests/clients/driver.js is the other end."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
from typing import Any

import pytest

from tests import documents
from tests.harness import ROOT, Instance, until

CLIENTS = ROOT / "tests" / "clients"

Record = dict[str, Any]
"""One thing that happened to a socket; `what` says which. The first lines of driver.js list them."""


class OfficialSocket:
    """One socket of the official client. `seen` is everything that happened to it, in the order of its callbacks."""

    def __init__(self, node: Node, name: str) -> None:
        self._node, self._name = node, name
        self._calls = itertools.count(1)
        self._asked: dict[int, str] = {}
        self.seen: list[Record] = []

    def tell(self, do: str, **more: Any) -> None:
        self._node.tell({"do": do, "socket": self._name, **more})

    def start(self, event: str, payload: Any = None) -> int:
        """Send an event whose answer is awaited later, with `answer`."""
        call = next(self._calls)
        self._asked[call] = event
        self.tell("emit", call=call, event=event, args=[payload])
        return call

    def send(self, event: str, payload: Any = None) -> None:
        """Send an event that nobody answers."""
        self.tell("send", event=event, args=[payload])

    def undocumented(self) -> list[str]:
        """What the server said otherwise than its documents."""
        wrong = [fault for name, payload in self.heard() for fault in documents.heard_wrongly(name, payload)]
        for record in self.seen:
            if record["what"] == "ack":
                wrong += documents.answered_wrongly(self._asked[record["call"]], *record["args"])
        return wrong

    async def answer(self, call: int) -> Any:
        found = await self.sees("ack", call=call)
        (answer,) = found["args"]
        return answer

    async def call(self, event: str, payload: Any = None) -> Any:
        """Send an event and return its acknowledgement."""
        return await self.answer(self.start(event, payload))

    async def watch(self, order_id: str, after: int | None = None) -> dict[str, Any]:
        """Subscribe, and insist that it works."""
        asked: dict[str, Any] = {"orderId": order_id}
        if after is not None:
            asked["afterSeq"] = after
        answer = await self.call("subscribeToOrder", asked)
        assert answer["ok"], answer
        found: dict[str, Any] = answer
        return found

    def find(self, what: str, after: int = 0, **members: Any) -> Record | None:
        for record in self.seen[after:]:
            if record["what"] == what and all(record.get(key) == value for key, value in members.items()):
                return record
        return None

    async def sees(self, what: str, *, after: int = 0, **members: Any) -> Record:
        """Wait for a record with these members; `after` skips the first ones of `seen`."""
        found: Record = await self._node.until(
            lambda: self.find(what, after, **members), f"{what} {members}; seen {self.seen}"
        )
        return found

    def heard(self) -> list[tuple[str, Any]]:
        """(name, payload) of every event of the server."""
        return [(one["name"], one["args"][0]) for one in self.seen if one["what"] == "event"]

    def offsets(self) -> list[str]:
        """What came behind the payload of events: nothing, but for those who opted into recovery."""
        return [extra for one in self.seen if one["what"] == "event" for extra in one["args"][1:]]

    async def hears(self, name: str, **members: Any) -> dict[str, Any]:
        """Wait for an event of the server whose payload has these members."""

        def found() -> dict[str, Any] | None:
            for event, payload in self.heard():
                if event == name and all(payload.get(key) == value for key, value in members.items()):
                    return dict(payload)
            return None

        payload: dict[str, Any] = await self._node.until(found, f"{name} {members}; seen {self.seen}")
        return payload

    def events(self, order_id: str) -> list[tuple[str, dict[str, Any]]]:
        """The durable events of an order, in the order in which a client learns of them: from the answers of its
        subscribes and live."""
        found: list[tuple[str, dict[str, Any]]] = []
        for record in self.seen:
            if record["what"] == "event":
                payload = record["args"][0]
                if isinstance(payload, dict) and "seq" in payload and payload["orderId"] == order_id:
                    found.append((record["name"], payload))
            elif record["what"] == "ack":
                (answer,) = record["args"]
                if answer.get("order", {}).get("id") == order_id:
                    found.extend((one["type"], one["data"]) for one in answer["events"])
        return found

    def seqs(self, order_id: str) -> list[int]:
        return [payload["seq"] for _, payload in self.events(order_id)]

    async def reaches(self, order_id: str, seq: int) -> None:
        """Wait until the client knows of this event."""
        await self._node.until(lambda: seq in self.seqs(order_id), f"event {seq} of {order_id}; seen {self.seen}")

    def positions(self, order_id: str) -> list[dict[str, Any]]:
        return [
            payload
            for name, payload in self.heard()
            if name == "orderLocationUpdate" and payload["orderId"] == order_id
        ]


class Node:
    """A Node.js process with any number of sockets. Skips where there is no Node.js, but never in CI."""

    def __init__(self) -> None:
        self._sockets: dict[str, OfficialSocket] = {}

    async def __aenter__(self) -> Node:
        node = shutil.which("node")
        if node is None and os.environ.get("CI") != "true":
            pytest.skip("Node.js is not installed: the official Socket.IO client cannot run")
        assert node is not None, "CI needs Node.js: the tests with the official Socket.IO client are the proof"
        assert (CLIENTS / "node_modules" / "socket.io-client").is_dir(), (
            "run scripts/test: it installs the npm packages"
        )
        self._process = await asyncio.create_subprocess_exec(
            node,
            str(CLIENTS / "driver.js"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=2**24,
        )
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stderr is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(10):
                complaints = (await self._process.stderr.read()).decode()
                await self._reading
                code = await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
            raise
        assert (code, complaints) == (0, ""), f"driver.js ended with {code}: {complaints}"
        for socket in self._sockets.values():
            assert not socket.undocumented(), socket.undocumented()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            record = json.loads(line)
            self._sockets[record.pop("socket")].seen.append(record)

    def tell(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")

    async def until(self, holds: Any, what: str) -> Any:
        def look() -> Any:
            assert not self._reading.done(), "driver.js has ended"
            return holds()

        return await until(look, what)

    def socket(self, instance: Instance, by: str | None, **options: Any) -> OfficialSocket:
        """A socket that is on its way. `options` are those of the client, by their own names."""
        name = f"socket {len(self._sockets)}"
        opened = self._sockets[name] = OfficialSocket(self, name)
        if by is not None:
            options["auth"] = {"token": by, **options.pop("auth", {})}
        opened.tell("open", url=instance.url, options=options)
        return opened

    async def connected(self, instance: Instance, by: str, **options: Any) -> OfficialSocket:
        """A socket that the server has accepted, over the transport that it ends with."""
        opened = self.socket(instance, by, **options)
        await opened.sees("connect")
        if "transports" not in options:
            await opened.sees("open", transport="polling")
            await opened.sees("upgrade", transport="websocket")
        return opened
