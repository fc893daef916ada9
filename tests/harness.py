"""What flow tests drive the product with: real processes, real HTTP, real Socket.IO clients."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import jwt
import socketio

from tests import documents

ROOT = Path(__file__).parent.parent
SECRET = "the-tests-own-secret-0123456789abcdef"
READY_S = 30.0
"""Longest wait for a process to be ready."""
SOON_S = 10.0
"""Longest wait for something that should happen at once, on a busy machine."""
POLL_S = 0.01
"""Pause between two looks at a condition that nobody signals."""

UNHURRIED = {
    f"RATE_{who}_{what}": "1000000"
    for who, whats in {
        "USER": ("REQUESTS_PER_MIN", "EVENTS_PER_MIN", "BURST_MAX"),
        "SERVICE": ("REQUESTS_PER_MIN", "EVENTS_PER_MIN", "BURST_MAX"),
        "ADDRESS": ("REQUESTS_PER_MIN", "BURST_MAX", "HANDSHAKES_PER_MIN", "HANDSHAKES_BURST_MAX"),
    }.items()
    for what in whats
} | dict.fromkeys(
    (
        "HANDSHAKES_PER_S_MAX",
        "HANDSHAKES_BURST_MAX",
        "HANDSHAKES_OPEN_MAX",
        "SOCKET_EVENTS_PER_S_MAX",
        "SOCKET_EVENTS_BURST_MAX",
    ),
    "1000000",
)
"""All tests come from one address, share a few users and one Redis: their rates are on, but out of each other's way."""

ORDER = {
    "customerId": "c1",
    "fulfilment": "delivery",
    "currency": "INR",
    "items": [{"name": "Masala dosa", "quantity": 2, "unitPrice": 12000, "taxRateBp": 500}],
    "deliveryAddress": {"line1": "12 MG Road", "city": "Bengaluru", "postalCode": "560001", "country": "IN"},
    "contact": {"name": "Meera", "phone": "+919000090000"},
    "notes": "Ring twice",
}


def with_database(url: str, name: str) -> str:
    """The URL of another database of the same server."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def token(role: str, sub: str = "somebody", *, ttl_s: float = 3600, **claims: Any) -> str:
    """A token as a merchant's backend signs it. Claims that are None are left out."""
    now = int(time.time())
    body = {"sub": sub, "role": role, "iat": now, "exp": now + ttl_s, **claims}
    return jwt.encode({k: v for k, v in body.items() if v is not None}, SECRET, "HS256")


SERVICE = token("service", "shop")


async def until(holds: Callable[[], Any] | Callable[[], Awaitable[Any]], what: str, within_s: float = SOON_S) -> Any:
    """Look until `holds()` is true, and return what it gave; fail with `what` was awaited."""
    deadline = time.monotonic() + within_s
    while True:
        found = holds()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < deadline, f"did not happen within {within_s} s: {what}"
        await asyncio.sleep(POLL_S)


class Reply(NamedTuple):
    status: int
    body: Any
    headers: Any

    @property
    def code(self) -> str:
        """The refusal's code."""
        assert self.headers["Content-Type"].startswith("application/problem+json"), self
        code: str = self.body["code"]
        return code


class Instance:
    """One server process."""

    def __init__(self, mode: str, env: dict[str, str], log: Path) -> None:
        self.port = int(env["PORT"])
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.may_log_errors = False
        """Set by tests that make a fault which deserves an error in the log."""
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server", mode],
                cwd=ROOT,
                env={**clean_environment(), **env},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    async def ready(self) -> None:
        async with aiohttp.ClientSession() as session:

            async def answers() -> bool:
                assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()}"
                try:
                    async with session.get(f"{self.url}/health/ready") as response:
                        return response.status == 200
                except aiohttp.ClientError:
                    return False

            await until(answers, "the server is ready", READY_S)

    async def stop(self, within_s: float = 20.0) -> int:
        """SIGTERM, as an orchestrator does; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.process.wait, within_s)

    def kill(self) -> None:
        """SIGKILL: nothing is said to anybody."""
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def log_records(self) -> list[dict[str, Any]]:
        records = []
        for line in self.log.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                records.append({"event": line, "level": "plain"})
        return records

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        by: str | None = SERVICE,
        headers: dict[str, str] | None = None,
        raw: bytes | None = None,
    ) -> Reply:
        """One request. `body` goes as JSON, `raw` as it is; `by` is the bearer token."""
        sent = {"Authorization": f"Bearer {by}"} if by else {}
        if body is not None or raw is not None:
            sent["Content-Type"] = "application/json"
        data = raw if raw is not None else json.dumps(body).encode() if body is not None else None
        address = self.url + (
            path if path.startswith(("/health", "/metrics", "/docs", "/openapi", "/asyncapi")) else f"/api/v1{path}"
        )
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, address, data=data, headers={**sent, **(headers or {})}) as response,
        ):
            text = await response.read()
            is_json = "json" in response.headers.get("Content-Type", "")
            reply = Reply(response.status, json.loads(text) if is_json else text, response.headers)
        documents.check_reply(method, address, reply.status, reply.headers, reply.body)
        return reply

    async def post(self, path: str, body: Any = None, **how: Any) -> Reply:
        return await self.request("POST", path, body, **how)

    async def get(self, path: str, **how: Any) -> Reply:
        return await self.request("GET", path, **how)

    async def place(self, **changes: Any) -> dict[str, Any]:
        """A placed order; `changes` replace members of ORDER, None removes one."""
        body = {key: value for key, value in {**ORDER, **changes}.items() if value is not None}
        reply = await self.post("/orders", body)
        assert reply.status == 201, reply
        order: dict[str, Any] = reply.body
        return order

    async def move(self, order_id: str, *statuses: str, by: str = SERVICE) -> dict[str, Any]:
        """Move an order through statuses; returns it after the last one."""
        for status in statuses:
            reply = await self.post(f"/orders/{order_id}/status", {"status": status}, by=by)
            assert reply.status == 200, reply
        order: dict[str, Any] = reply.body
        return order

    async def assign(self, order_id: str, agent_id: str | None, **more: str) -> dict[str, Any]:
        reply = await self.post(f"/orders/{order_id}/assign", {"agentId": agent_id, **more})
        assert reply.status == 200, reply
        order: dict[str, Any] = reply.body
        return order


class Fleet:
    """The instances of one test, on one database and one Redis."""

    def __init__(self, database_url: str, redis_url: str, folder: Path) -> None:
        self.database_url, self.redis_url = database_url, redis_url
        self._folder = folder
        self.instances: list[Instance] = []

    async def start(self, mode: str = "all", *, ready: bool = True, **env: str) -> Instance:
        """Start an instance; `env` adds to or replaces its settings."""
        settings = {
            "DATABASE_URL": self.database_url,
            "REDIS_URL": self.redis_url,
            "DATA_DIR": str(self._folder / "data"),
            "JWT_SECRET": SECRET,
            "PORT": str(free_port()),
            **UNHURRIED,
            **env,
        }
        log = self._folder / f"{mode}-{len(self.instances)}.log"
        instance = Instance(mode, settings, log)
        self.instances.append(instance)
        if ready:
            await instance.ready()
        return instance

    async def pair(self, **env: str) -> tuple[Instance, Instance]:
        """Two instances that behave as one."""
        return await self.start("all", ready=True, **env), await self.start("all", ready=True, **env)

    def accounts(self) -> dict[str, Any]:
        """The accounts at the gateways' simulators that its instances run, by provider."""
        found: dict[str, Any] = json.loads((self._folder / "data" / "sandbox" / "accounts.json").read_text())
        return found

    async def stop(self) -> None:
        for instance in self.instances:
            if instance.process.poll() is None:
                instance.thaw()
                instance.process.send_signal(signal.SIGTERM)
        for instance in self.instances:
            try:
                await asyncio.to_thread(instance.process.wait, 20)
            except subprocess.TimeoutExpired:
                instance.kill()
                raise

    def check_logs(self) -> None:
        """No traceback, no error and no secret in any log."""
        for instance in self.instances:
            text = instance.log.read_text()
            assert SECRET not in text
            assert "eyJ" not in text, "a token was logged"
            if instance.may_log_errors:
                continue
            assert "Traceback" not in text, text
            assert not [r for r in instance.log_records() if r.get("level") in ("error", "critical")], text


class Watcher:
    """A Python Socket.IO client that writes down what it hears."""

    def __init__(self, instance: Instance, by: str | None, *, transports: Sequence[str] = ("websocket",)) -> None:
        self._instance, self._token, self._transports = instance, by, list(transports)
        self.client = socketio.AsyncClient(reconnection=False)
        self.heard: list[tuple[str, Any]] = []
        self.undocumented: list[str] = []
        """Where what it heard is not as /asyncapi.json says."""
        self.disconnected = asyncio.Event()
        self.client.on("*", self._hear)
        self.client.on("disconnect", self._gone)

    async def _hear(self, event: str, payload: Any = None) -> None:
        self.heard.append((event, payload))
        self.undocumented += documents.heard_wrongly(event, payload)

    async def _gone(self, reason: str | None = None) -> None:
        self.disconnected.set()

    async def __aenter__(self) -> Watcher:
        auth = {"token": self._token} if self._token is not None else None
        await self.client.connect(self._instance.url, transports=self._transports, auth=auth)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.disconnect()
        assert not self.undocumented

    async def call(self, event: str, payload: Any = None) -> Any:
        """Send an event and return its acknowledgement."""
        answer = await self.client.call(event, payload, timeout=SOON_S)
        self.undocumented += documents.answered_wrongly(event, answer)
        return answer

    async def watch(self, order_id: str, after: int | None = None) -> dict[str, Any]:
        """Subscribe, and insist that it works."""
        answer = await self.call(
            "subscribeToOrder", {"orderId": order_id} if after is None else {"orderId": order_id, "afterSeq": after}
        )
        assert answer["ok"], answer
        found: dict[str, Any] = answer
        return found

    def events(self, order_id: str) -> list[tuple[str, dict[str, Any]]]:
        """The durable events of an order, as they came."""
        return [(name, data) for name, data in self.heard if "seq" in data and data["orderId"] == order_id]

    def seqs(self, order_id: str) -> list[int]:
        return [data["seq"] for _, data in self.events(order_id)]

    def positions(self, order_id: str) -> list[dict[str, Any]]:
        return [data for name, data in self.heard if name == "orderLocationUpdate" and data["orderId"] == order_id]

    async def hears(self, name: str, **members: Any) -> dict[str, Any]:
        """Wait for an event with these members."""

        def found() -> dict[str, Any] | None:
            for event, data in self.heard:
                if event == name and all(data.get(key) == value for key, value in members.items()):
                    return dict(data)
            return None

        heard: dict[str, Any] = await until(found, f"{name} {members}; heard {self.heard}")
        return heard


def clean_environment() -> dict[str, str]:
    """The environment without settings of ours, so that a developer's own do not reach the tests."""
    from server.settings import Settings

    ours = {name.upper() for name in Settings.__struct_fields__}
    return {name: value for name, value in os.environ.items() if name not in ours}
