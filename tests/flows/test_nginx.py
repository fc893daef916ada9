"""Two instances behind the nginx of docs/deploy/nginx.conf: they look like one, and one of them may go at any time."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import socketio

from tests.flows.official import Node
from tests.harness import ORDER, ROOT, SERVICE, Fleet, Instance, free_port, token, until

SAMPLE = ROOT / "docs" / "deploy" / "nginx.conf"
CUSTOMER = token("customer", "c1")
TRANSPORTS = [["websocket"], ["polling"], ["polling", "websocket"]]
"""What clients use: one of the two alone, or polling that upgrades."""
ADDRESSES = [f"127.0.0.{n}" for n in range(2, 10)]
"""Where clients come from: enough of them that each instance gets some."""
PASSED_OVER_S = 1.5
"""How long nginx passes over an instance that was gone: `fail_timeout` of the sample, and a little."""
RELOADED_S = 1.0
"""How long nginx takes to work by a new configuration. It says so nowhere but in its log."""
REPLACED_S = 30.0
"""Longest time until everybody has come back from an instance that went."""


class Front(Instance):
    """nginx, addressed as if it were an instance."""

    def __init__(self, port: int, config: Path) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self._config = config
        self._whole = config.read_text()

    async def take_out(self, instance: Instance | None) -> None:
        """Send nothing to this instance any more, and wait until that counts; None: to every one again."""
        server = f"server 127.0.0.1:{instance.port}" if instance else ""
        self._config.write_text(self._whole.replace(server, f"{server} down") if server else self._whole)
        self.process.send_signal(signal.SIGHUP)
        await asyncio.sleep(RELOADED_S)


@contextmanager
def nginx(folder: Path, *backends: Instance) -> Iterator[Front]:
    """The sample, with free ports in the place of its own, until the block ends."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        assert os.environ.get("CI") != "true", "CI needs nginx (Debian: nginx-light)"
        pytest.skip("nginx is not installed (Debian: nginx-light)")
    port = free_port()
    paths = "".join(f"    {kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy"))
    unused = "".join(f"    {kind}_temp_path {folder}/{kind};\n" for kind in ("fastcgi", "uwsgi", "scgi"))
    text = SAMPLE.read_text()
    for old, new in [
        ("listen 80;", f"listen 127.0.0.1:{port};"),
        ("127.0.0.1:8081", f"127.0.0.1:{backends[0].port}"),
        ("127.0.0.1:8082", f"127.0.0.1:{backends[1].port}"),
        ("http {\n", f"http {{\n    access_log {folder}/access.log;\n{paths}{unused}"),
    ]:
        assert old in text, f"the sample has no {old!r} any more"
        text = text.replace(old, new)
    if os.geteuid() == 0:
        text = "user root;\n" + text  # its workers must reach the test's folder
    config = folder / "nginx.conf"
    config.write_text(f"daemon off;\npid {folder}/nginx.pid;\n{text}")
    front = Front(port, config)
    front.process = subprocess.Popen(
        [program, "-p", str(folder), "-c", str(config), "-e", str(folder / "error.log")], start_new_session=True
    )
    try:
        yield front
    finally:
        front.process.terminate()
        front.process.wait(10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "nginx"
    made.mkdir()
    return made


async def answers(front: Front) -> None:
    async def alive() -> bool:
        try:
            return (await front.get("/health/live", by=None)).status == 200
        except aiohttp.ClientError:
            return False

    await until(alive, "nginx answers")


class Follower:
    """A client as apps write it: it comes back by itself, and says up to where it has seen the order."""

    def __init__(self, front: Front, order_id: str, address: str, transports: list[str]) -> None:
        self._front, self._order_id, self._transports = front, order_id, transports
        self._address = address
        self.seqs: list[int] = []
        self.answers = 0
        self.drained = 0

    async def __aenter__(self) -> Follower:
        connector = aiohttp.TCPConnector(local_addr=(self._address, 0), force_close=True)
        self._session = aiohttp.ClientSession(connector=connector)
        self.client = socketio.AsyncClient(
            http_session=self._session, reconnection_delay=0.1, reconnection_delay_max=1, randomization_factor=0.5
        )
        self.client.on("connect", self._subscribe)
        self.client.on("*", self._hear)
        await self.client.connect(self._front.url, transports=self._transports, auth={"token": CUSTOMER})
        await until(lambda: self.answers, "the first subscribe is answered")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.shutdown()
        await self._session.close()

    async def _subscribe(self) -> None:
        asked = {"orderId": self._order_id, "afterSeq": self.seqs[-1] if self.seqs else 0}
        await self.client.emit("subscribeToOrder", asked, callback=self._subscribed)

    def _subscribed(self, answer: dict[str, Any]) -> None:
        assert answer["ok"], answer
        self.seqs += [one["seq"] for one in answer["events"]]
        self.answers += 1

    def _hear(self, event: str, payload: Any = None) -> None:
        if event == "serverDraining":
            self.drained += 1
        elif isinstance(payload, dict) and payload.get("orderId") == self._order_id and "seq" in payload:
            self.seqs.append(payload["seq"])


@pytest.fixture
async def pair(fleet: Fleet) -> tuple[Instance, Instance]:
    return await fleet.pair(TRUSTED_PROXIES="127.0.0.1")


async def test_rest_goes_through_to_both_and_says_where_it_came_from(
    pair: tuple[Instance, Instance], folder: Path
) -> None:
    with nginx(folder, *pair) as front:
        await answers(front)
        order = await front.place()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(local_addr=("127.0.0.7", 0))) as session:
            address = f"{front.url}/api/v1/orders/{order['id']}"
            for _ in range(8):
                async with session.get(address, headers={"Authorization": f"Bearer {CUSTOMER}"}) as response:
                    assert (response.status, (await response.json())["id"]) == (200, order["id"])
        waited = await front.get(f"/orders/{order['id']}/events?after=1&wait=1")
        assert waited.body == {"events": [], "seq": 1}
        assert b"\r\n" in (await front.get("/orders.csv")).body
        refused = await front.get(f"/orders/{uuid.uuid4()}")
        assert (refused.status, refused.code) == (404, "not_found")
        assert (await front.get("/metrics", by=None)).status == 404
    for instance in pair:
        clients = {record.get("client") for record in instance.log_records() if record.get("event") == "request"}
        assert "127.0.0.7" in clients, "each instance was asked, and knows who did"


async def test_sockets_of_every_kind_work_through_it(pair: tuple[Instance, Instance], folder: Path) -> None:
    with nginx(folder, *pair) as front:
        await answers(front)
        order = await front.place()
        async with AsyncExitStack() as opened, Node() as node:
            official = [
                await node.connected(front, CUSTOMER),
                await node.connected(front, CUSTOMER, transports=["polling"]),
            ]
            for one in official:
                await one.watch(order["id"], 0)
            followers = [
                await opened.enter_async_context(Follower(front, order["id"], address, transports))
                for address in ADDRESSES[:4]
                for transports in TRANSPORTS
            ]
            await front.move(order["id"], "confirmed", "preparing", "ready")
            await until(lambda: all(one.seqs == [1, 2, 3, 4] for one in followers), "everybody has seen everything")
            for one in official:
                await one.reaches(order["id"], 4)
                assert one.seqs(order["id"]) == [1, 2, 3, 4]
            sockets = [await connected(instance) for instance in pair]
            assert all(sockets), f"both instances have some: {sockets}"
            assert sum(sockets) == len(followers) + len(official)


async def connected(instance: Instance) -> int:
    text = (await instance.get("/metrics", by=None)).body.decode()
    return next(int(float(line.split()[1])) for line in text.splitlines() if line.startswith("waybill_connections "))


async def persist(front: Front, path: str, body: dict[str, Any], attempts: int) -> dict[str, Any]:
    """What a careful backend does: the same request with the same key until it is answered."""
    key = str(uuid.uuid4())
    for _ in range(attempts):
        try:
            reply = await front.post(path, body, headers={"Idempotency-Key": key})
            if reply.status in (200, 201):
                done: dict[str, Any] = reply.body
                return done
            assert reply.code in ("unavailable", "conflict"), reply
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.05)
    raise AssertionError(f"{path} was not answered in {attempts} attempts")


@pytest.mark.parametrize(("announced", "attempts"), [(True, 1), (False, 100)])
async def test_a_rolling_deploy_loses_nothing(fleet: Fleet, folder: Path, announced: bool, attempts: int) -> None:
    """Each instance is stopped and started again, one after the other, while orders are placed and watched. When nginx
    is told before, no request has to be sent twice."""
    # a client that hears nothing at all of the end of its session finds out by the pings
    settings: dict[str, Any] = {"TRUSTED_PROXIES": "127.0.0.1", "PING_INTERVAL_S": "3", "PING_TIMEOUT_S": "3"}
    instances = list(await fleet.pair(**settings))
    async with AsyncExitStack() as opened:
        front = opened.enter_context(nginx(folder, *instances))
        await answers(front)
        order = await front.place()
        stop = asyncio.Event()
        opened.callback(stop.set)
        placed: list[str] = []

        async def keep_assigning() -> int:
            number = 0
            while not stop.is_set():
                number += 1
                done = await persist(front, f"/orders/{order['id']}/assign", {"agentId": f"a{number}"}, attempts)
                assert done["agent"]["id"] == f"a{number}"
                await asyncio.sleep(0.02)
            return number

        async def keep_placing() -> None:
            while not stop.is_set():
                placed.append((await persist(front, "/orders", {**ORDER, "customerId": "c9"}, attempts))["id"])

        followers = [
            await opened.enter_async_context(Follower(front, order["id"], address, transports))
            for address, transports in zip(ADDRESSES, TRANSPORTS * 3, strict=False)
        ]
        work = asyncio.gather(keep_assigning(), keep_placing())
        for number, instance in enumerate(instances):
            await asyncio.sleep(PASSED_OVER_S)  # the one that started last is asked again
            if announced:
                await front.take_out(instance)
            assert await instance.stop() == 0
            await until(lambda: all(one.client.connected for one in followers), "everybody has come back", REPLACED_S)
            instances[number] = await fleet.start("all", PORT=str(instance.port), **settings)
            if announced:
                await front.take_out(None)
        stop.set()
        last, _ = await work
        wanted = list(range(1, last + 2))
        await until(lambda: all(one.seqs[-1:] == wanted[-1:] for one in followers), "all have caught up", REPLACED_S)
        for follower in followers:
            assert follower.seqs == wanted, "each event once, in order"
            assert follower.answers > 1, "it had to come back"
        listed = await front.get("/orders?customerId=c9&limit=200", by=SERVICE)
        found = [one["id"] for one in listed.body["items"]]
        assert len(placed) == len(set(placed))
        assert set(found) <= set(placed)
        assert listed.body["nextCursor"] is not None or set(found) == set(placed), "each order once"
