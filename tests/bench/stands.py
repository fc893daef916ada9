"""Puts up what is measured: a server of ours or of a peer, its data servers, and orders to watch."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import asyncpg

from server.embedded import DataServers, data_servers
from server.migrate import migrate
from tests.bench import generator, kernel
from tests.bench.generator import Program, RunFailed
from tests.bench.judge import Event
from tests.harness import ORDER, READY_S, SECRET, SERVICE, Fleet, free_port, token, with_database

WAYBILL, NODE, STOCK, FASTIFY = "Waybill", "Socket.IO on Node", "python-socketio", "Fastify with pg"
PEERS = Path(__file__).parent / "peers"
PROGRAMS = {
    NODE: ["node", str(PEERS / "socketio_node.js")],
    STOCK: [sys.executable, str(PEERS / "python_socketio.py")],
    FASTIFY: ["node", str(PEERS / "fastify_pg.js")],
}
TEMPLATE = "waybill_bench"
SETTINGS = {"RATE_LIMITS": "off", "LOCATION_MIN_INTERVAL_MS": "0", "LOG_LEVEL": "warning"}
RAZORPAY = {
    "RAZORPAY_KEY_ID": "rzp_test_bench",
    "RAZORPAY_KEY_SECRET": SECRET,
    "RAZORPAY_WEBHOOK_SECRET": SECRET,
    "RAZORPAY_API_URL": "http://127.0.0.1:1",
}
"""A gateway that sends webhooks, and is never called."""
SEEDING_AT_ONCE = 8
CONNECTING_AT_ONCE = 200
CONNECTED_WITHIN_S = 180.0

Item = TypeVar("Item")
Result = TypeVar("Result")


class Server:
    """One process that serves, and what it has cost so far."""

    def __init__(self, port: int, pid: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.pids = kernel.tree(pid)

    def cpu_s(self) -> float:
        return kernel.cpu_s(self.pids)

    def resident_bytes(self) -> int:
        return kernel.resident_bytes(self.pids)

    def kill(self) -> None:
        """SIGKILL: nothing is said to anybody."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)


@dataclass
class Ground:
    """What all stands of one run share."""

    folder: Path
    data: DataServers
    programs: dict[str, Path]
    server_core: int | None
    load_core: int | None
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    def fresh_folder(self) -> Path:
        folder = self.folder / f"stand-{next(self.numbers)}"
        folder.mkdir()
        return folder


@asynccontextmanager
async def ground(folder: Path, say: Callable[[str], None]) -> AsyncIterator[Ground]:
    """Data servers and the programs that make the load; with two cores, one is for servers and one for the load."""
    programs = generator.build(folder)
    cores = sorted(os.sched_getaffinity(0))
    server_core, load_core = (cores[0], cores[1]) if len(cores) > 1 else (None, None)
    given = os.environ.get("TEST_DATABASE_URL"), os.environ.get("TEST_REDIS_URL")
    async with data_servers(folder / "data", *given, say) as data:
        async with _postgres(data) as connection:
            await connection.execute(f"drop database if exists {TEMPLATE}")
            await connection.execute(f"create database {TEMPLATE}")
        await migrate(with_database(data.database_url, TEMPLATE))
        yield Ground(folder, data, programs, server_core, load_core)


@asynccontextmanager
async def _postgres(data: DataServers) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(data.database_url)
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def _database(data: DataServers) -> AsyncIterator[str]:
    """A migrated database for one stand."""
    name = f"bench_{uuid.uuid4().hex}"
    async with _postgres(data) as connection:
        await connection.execute(f"create database {name} template {TEMPLATE} strategy file_copy")
        try:
            yield with_database(data.database_url, name)
        finally:
            await connection.execute(f"drop database {name} with (force)")


@dataclass
class Stand:
    """Servers of one kind on the same data, with the orders that their clients watch."""

    ground: Ground
    who: str
    servers: list[Server]
    orders: list[str]
    folder: Path
    database_url: str

    async def begin_payments(self, count: int) -> tuple[list[tuple[str, int]], str]:
        """Place so many orders, and begin to pay each at the simulator of Razorpay. Returns the gateway's order and
        the amount (minor units) of each, and the secret of its webhooks."""

        async def one(number: int) -> tuple[str, str, int]:
            order = (await _post(session, "/orders", {**order_body(number), "paymentMethod": "online"}))["id"]
            payment = await _post(session, "/payments", {"orderId": order, "provider": "razorpay"})
            return order, payment["gatewayOrderId"], payment["amount"]

        async with _session(self.servers[0]) as session:
            begun = await _each(range(count), one)
        self.orders = [order for order, _, _ in begun]
        accounts = json.loads((self.folder / "data" / "sandbox" / "accounts.json").read_text())
        return [(name, amount) for _, name, amount in begun], accounts["razorpay"]["webhook_secrets"][0]

    @asynccontextmanager
    async def tables(self) -> AsyncIterator[asyncpg.Connection]:
        """The database that its servers write."""
        connection = await asyncpg.connect(self.database_url)
        try:
            yield connection
        finally:
            await connection.close()

    @asynccontextmanager
    async def load(self, *, watchers: int, agents: bool = False) -> AsyncIterator[Program]:
        """Clients for the first server: so many watchers spread over the orders, and an agent for each."""
        tokens = itertools.count()

        def line(role: str, order: int) -> str:
            kind, sub = ("agent", f"a{order}") if role == "agent" else ("watcher", f"c{order}")
            # A token of its own for each socket, as each phone has: nobody may profit from having seen it before.
            by = token(role, sub, jti=f"bench-{next(tokens)}")
            return f"{kind} {order} {self.servers[0].port} {by}"

        count = len(self.orders)
        lines = [f"service {SERVICE}", *(f"order {one}" for one in self.orders)]
        lines += [line("agent", order) for order in range(count if agents else 0)]
        lines += [line("customer", number % count) for number in range(watchers)]
        plan = self.folder / "plan"
        plan.write_text("\n".join(lines) + "\n")
        async with generator.running(self.ground.programs["load"], [str(plan)], self.ground.load_core) as program:
            yield program

    def probe(self) -> contextlib.AbstractAsyncContextManager[Program]:
        """Asks the first server for its health every few milliseconds."""
        return generator.running(self.ground.programs["probe"], [str(self.servers[0].port)], self.ground.load_core)

    async def table(self) -> dict[str, list[Event]]:
        """The events of every order, as the last server's REST door lists them."""

        async def events(session: aiohttp.ClientSession, order: str) -> list[Event]:
            async with session.get(f"/api/v1/orders/{order}/events") as response:
                listed = (await response.json())["events"]
            return [Event(one["seq"], one["type"], one["data"].get("status", "")) for one in listed]

        async with _session(self.servers[-1]) as session:
            found = await _each(self.orders, lambda order: events(session, order))
        return dict(zip(self.orders, found, strict=True))


@asynccontextmanager
async def stand(
    ground: Ground, who: str, *, orders: int, instances: int = 1, mode: str = "all", settings: Mapping[str, str] = {}
) -> AsyncIterator[Stand]:
    """Start servers, with orders placed and assigned; peers take any order's id. `mode` and `settings` are of ours."""
    folder = ground.fresh_folder()
    async with AsyncExitStack() as stack:
        database_url = await stack.enter_async_context(_database(ground.data))
        if who == WAYBILL:
            fleet = Fleet(database_url, ground.data.redis_url, folder)
            stack.push_async_callback(fleet.stop)
            started = [await fleet.start(mode, ready=True, **SETTINGS, **settings) for _ in range(instances)]
            servers = [Server(one.port, one.process.pid) for one in started]
            seeded = await _seed(servers[0], orders)
        else:
            data_url = database_url if who == FASTIFY else ground.data.redis_url
            servers = [await stack.enter_async_context(_peer(who, data_url, folder)) for _ in range(instances)]
            seeded = [f"order-{number}" for number in range(orders)]
        for server in servers:
            kernel.pin(server.pids, ground.server_core)
        yield Stand(ground, who, servers, seeded, folder, database_url)


@asynccontextmanager
async def _peer(who: str, data_url: str, folder: Path) -> AsyncIterator[Server]:
    port = free_port()
    log = folder / f"{port}.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *PROGRAMS[who], str(port), data_url, SECRET, stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + READY_S
        async with aiohttp.ClientSession() as session:
            while True:
                if process.returncode is not None or time.monotonic() > deadline:
                    raise RunFailed(f"{who} did not start:\n{log.read_text()}")
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"http://127.0.0.1:{port}/health/live"):
                        break
                await asyncio.sleep(generator.POLL_S)
        yield Server(port, process.pid)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def order_body(customer: int) -> dict[str, Any]:
    """What one order is placed with."""
    lines = [*ORDER["items"], {"name": "Filter coffee", "quantity": 1, "unitPrice": 4000}]
    return {**ORDER, "customerId": f"c{customer}", "items": lines}


def _session(server: Server) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(server.url, headers={"Authorization": f"Bearer {SERVICE}"})


async def _each(items: Iterable[Item], work: Callable[[Item], Awaitable[Result]]) -> list[Result]:
    some = asyncio.Semaphore(SEEDING_AT_ONCE)

    async def one(item: Item) -> Result:
        async with some:
            return await work(item)

    return await asyncio.gather(*(one(item) for item in items))


async def _post(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with session.post(f"/api/v1{path}", json=body) as response:
        answer: dict[str, Any] = await response.json()
    if response.status >= 300:
        raise RunFailed(f"POST {path}: {response.status} {json.dumps(answer)}")
    return answer


async def _seed(server: Server, count: int) -> list[str]:
    async def one(number: int) -> str:
        order = str((await _post(session, "/orders", order_body(number)))["id"])
        await _post(session, f"/orders/{order}/assign", {"agentId": f"a{number}", "agentName": f"Agent {number}"})
        return order

    async with _session(server) as session:
        return await _each(range(count), one)
