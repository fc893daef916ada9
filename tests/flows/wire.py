"""A bare WebSocket that speaks Socket.IO and writes down every frame, in the order of the wire."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import aiohttp

from tests import documents
from tests.harness import Instance, until


class Wire:
    """One session. `frames` is what came: ("event", name, payload) or ("answer", number of the call, payload)."""

    def __init__(self, instance: Instance, by: str) -> None:
        self._instance, self._token = instance, by
        self._numbers = itertools.count(1)
        self.asked: dict[int, tuple[str, Any]] = {}
        """Event and payload of every call."""
        self.frames: list[tuple[str, Any, Any]] = []
        self.sent_away = False
        """Whether the server said DISCONNECT, after which clients stay away."""
        self.closed = False

    async def __aenter__(self) -> Wire:
        self._session = aiohttp.ClientSession()
        url = f"{self._instance.url}/socket.io/?EIO=4&transport=websocket"
        self._socket = await self._session.ws_connect(url)
        opening = await self._socket.receive_str()
        assert opening.startswith("0"), opening
        await self._socket.send_str("40" + json.dumps({"token": self._token}))
        accepted = await self._socket.receive_str()
        assert accepted.startswith("40"), accepted
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._socket.close()
        await self._reading
        await self._session.close()
        undocumented = [
            wrong
            for kind, what, payload in self.frames
            for wrong in (
                documents.answered_wrongly(self.asked[what][0], payload)
                if kind == "answer"
                else documents.heard_wrongly(what, payload)
            )
        ]
        assert not undocumented, undocumented

    async def _read(self) -> None:
        async for message in self._socket:
            text: str = message.data
            if text == "2":
                await self._socket.send_str("3")
            elif text.startswith("42"):
                name, *args = json.loads(text[2:])
                self.frames.append(("event", name, *args))
            elif text.startswith("43"):
                number, _, answer = text[2:].partition("[")
                self.frames.append(("answer", int(number), *json.loads("[" + answer)))
            elif text == "41":
                self.sent_away = True
            else:
                self.frames.append(("other", text, None))
        self.closed = True

    async def ask(self, event: str, payload: Any) -> int:
        """Send an event; its answer comes later, under this number."""
        number = next(self._numbers)
        self.asked[number] = (event, payload)
        await self._socket.send_str(f"42{number}" + json.dumps([event, payload]))
        return number

    async def answer(self, number: int) -> Any:
        def found() -> Any:
            return next((frame[2] for frame in self.frames if frame[:2] == ("answer", number)), None)

        return await until(found, f"the answer to {self.asked[number]}")

    async def call(self, event: str, payload: Any) -> Any:
        return await self.answer(await self.ask(event, payload))

    def heard(self, order_id: str) -> list[tuple[str, Any]]:
        """(name, payload) of the order's live events and positions."""
        return [(name, data) for kind, name, data in self.frames if kind == "event" and data.get("orderId") == order_id]

    def seqs(self, order_id: str) -> list[int]:
        return [data["seq"] for _, data in self.heard(order_id) if "seq" in data]
