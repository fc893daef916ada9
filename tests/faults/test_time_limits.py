"""Nothing waits for ever: clients that dawdle are closed, and while Redis or Postgres stands still every request ends
within its limit."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import psutil
import pytest

from server.embedded import DataServers, data_servers
from server.migrate import migrate
from server.rest import ROUTES
from tests.harness import SERVICE, Fleet, Instance, Watcher, token, until
from tests.shared import shared_fleet

LIMITS: dict[str, Any] = {
    "HEADERS_TIMEOUT_MS": "700",
    "BODY_TIMEOUT_MS": "1000",
    "KEEP_ALIVE_TIMEOUT_S": "2",
    "CONNECT_TIMEOUT_MS": "1000",
    "WRITE_TIMEOUT_MS": "1000",
    "PING_INTERVAL_S": "1",
    "PING_TIMEOUT_S": "2",
}
FROZEN: dict[str, Any] = {
    "REDIS_TIMEOUT_MS": "500",
    "DB_TIMEOUT_MS": "800",
    "SUBSCRIBE_TIMEOUT_MS": "2000",
    "BODY_TIMEOUT_MS": "2000",
    "GATEWAY_TIMEOUT_MS": "2000",
    "REQUEST_TIMEOUT_MS": "4000",
    "LONG_POLL_MAX_S": "2",
}
SLACK_S = 1.0
"""What a busy machine may add to any limit."""

SLOW_CLIENTS = 300
GROWTH_MAX_MIB = 24
"""What a crowd may leave behind: Python keeps some of the memory that it once needed."""

WEBSOCKET = "/socket.io/?EIO=4&transport=websocket"
POLLING = "/socket.io/?EIO=4&transport=polling"


def rss_mib(instance: Instance) -> float:
    return float(psutil.Process(instance.process.pid).memory_info().rss / 2**20)


async def metric(instance: Instance, name: str) -> float:
    text = (await instance.get("/metrics", by=None)).body.decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


@pytest.fixture(scope="module")
async def instance(data: DataServers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Instance]:
    """One for all dawdlers: none of them may cost the next one anything."""
    async with shared_fleet(data, tmp_path_factory.mktemp("dawdlers")) as fleet:
        yield await fleet.start(**LIMITS)


# clients that dawdle


class Dawdler:
    """A TCP connection that sends what it is told and notes when it is closed."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.began = time.monotonic()

    @classmethod
    async def open(cls, instance: Instance, first: bytes = b"") -> Dawdler:
        self = cls(*await asyncio.open_connection("127.0.0.1", instance.port))
        self.writer.write(first)
        return self

    async def trickle(self, text: bytes, every_s: float) -> None:
        try:
            for byte in text:
                self.writer.write(bytes((byte,)))
                await self.writer.drain()
                await asyncio.sleep(every_s)
        except ConnectionError:
            return

    async def closed(self, within_s: float) -> tuple[float, bytes]:
        """(seconds from the beginning until the server closed, what it said)."""
        said = b""
        try:
            async with asyncio.timeout(within_s + SLACK_S):
                while piece := await self.reader.read(2**16):
                    said += piece
        except ConnectionError:
            pass
        finally:
            self.writer.close()
        return time.monotonic() - self.began, said


async def dawdle(instance: Instance, first: bytes, rest: bytes, within_s: float) -> tuple[float, bytes]:
    one = await Dawdler.open(instance, first)
    sending = asyncio.create_task(one.trickle(rest, 0.05))
    found = await one.closed(within_s)
    sending.cancel()
    return found


async def polling_session(session: aiohttp.ClientSession, instance: Instance) -> str:
    async with session.get(instance.url + POLLING) as reply:
        found: str = json.loads((await reply.text())[1:])["sid"]
        return found


async def test_headers_that_drip_are_cut_off(instance: Instance) -> None:
    took_s, said = await dawdle(instance, b"GET /health/live HT", b"TP/1.1\r\n" + b"X-A: b\r\n" * 100, 0.7)
    assert took_s > 0.6
    assert said.startswith(b"HTTP/1.1 408 ")


async def test_a_connection_that_says_nothing_is_closed(instance: Instance) -> None:
    one = await Dawdler.open(instance)
    took_s, said = await one.closed(0.7)
    assert took_s > 0.6
    assert said == b""


async def test_a_second_request_has_no_more_time_than_the_first(instance: Instance) -> None:
    request = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    one = await Dawdler.open(instance, request)
    assert await one.reader.readuntil(b'"alive"}')
    one.began = time.monotonic()
    one.writer.write(request[:20])
    took_s, said = await one.closed(0.7)
    assert took_s > 0.6
    assert said.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    ("path", "framing"),
    [
        ("/api/v1/orders", b"Content-Length: 1000"),
        ("/api/v1/orders", b"Transfer-Encoding: chunked"),
        (POLLING + "&sid=SID", b"Content-Length: 1000"),
        ("/health/live", b"Content-Length: 1000"),
    ],
    ids=["body", "chunks", "poll", "unwanted"],
)
async def test_a_body_that_drips_is_cut_off(instance: Instance, path: str, framing: bytes) -> None:
    async with aiohttp.ClientSession() as session:
        path = path.replace("SID", await polling_session(session, instance))
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SERVICE}\r\nContent-Type: application/json\r\n"
    ).encode()
    rest = b'1\r\n{\r\n1\r\n"\r\n' + b"1\r\nx\r\n" * 500 if b"chunked" in framing else b'{"' + b"x" * 900
    took_s, said = await dawdle(instance, head + framing + b"\r\n\r\n", rest, 1.0)
    if path.startswith("/health"):
        assert said.startswith(b"HTTP/1.1 405 ")
    else:
        assert took_s > 0.9
        assert said.startswith(b"HTTP/1.1 408 ")
        assert b'"status":408' in said


async def test_an_idle_connection_is_kept_for_a_while_and_then_closed(instance: Instance) -> None:
    one = await Dawdler.open(instance, b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
    assert await one.reader.readuntil(b'"alive"}')
    took_s, said = await one.closed(2.0)
    assert took_s > 1.5
    assert said == b""


async def test_hundreds_of_slow_clients_cost_nobody_else_anything(instance: Instance) -> None:
    before = rss_mib(instance)
    process = psutil.Process(instance.process.pid)
    open_before = process.num_fds()
    post = f"POST /api/v1/orders HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SERVICE}\r\n".encode()
    kinds = [
        (b"GET /health/live HTTP/1.1\r\n", b"X-Padding: " + b"x" * 500),
        (post + b"Content-Type: application/json\r\nContent-Length: 200000\r\n\r\n", b"{" + b" " * 500),
        (b"", b""),
        (b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n", b""),
    ]
    slow = [asyncio.create_task(dawdle(instance, *kinds[n % len(kinds)], 3.0)) for n in range(SLOW_CLIENTS)]
    slowest = 0.0
    while not all(one.done() for one in slow):
        began = time.monotonic()
        assert (await instance.get("/orders?limit=1")).status == 200
        slowest = max(slowest, time.monotonic() - began)
        await asyncio.sleep(0.05)
    await asyncio.gather(*slow)
    assert slowest < SLACK_S
    assert rss_mib(instance) - before < GROWTH_MAX_MIB
    await until(lambda: process.num_fds() <= open_before + 3, "their connections are gone")


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n", 431, "too_large"),
        (b"GET / HTTP/1.1\r\nX-Big: " + b"x" * 20_000 + b"\r\n\r\n", 431, "too_large"),
        (b"GET / HTTP/1.1\r\n" + b"X-Many: 1\r\n" * 5_000 + b"\r\n", 400, "malformed"),
        (b"GET / HTTP/1.1\r\nbad header\r\n\r\n", 400, "malformed"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "malformed"),
        (b"GET / HTTP/9.9\r\n\r\n", 400, "malformed"),
    ],
    ids=["long line", "long header", "many headers", "no header", "TLS", "version"],
)
async def test_what_is_no_request_is_refused_and_closed(
    instance: Instance, request_: bytes, status: int, code: str
) -> None:
    one = await Dawdler.open(instance, request_)
    took_s, said = await one.closed(0.5)
    assert took_s < 0.5 + SLACK_S
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.split(b" ")[1] == str(status).encode(), said[:500]
    assert json.loads(body)["code"] == code
    assert b"X-Content-Type-Options: nosniff" in head
    assert b"aiohttp" not in said


async def test_a_client_that_takes_no_answer_is_cut_off(instance: Instance) -> None:
    request = b"GET /docs HTTP/1.1\r\nHost: x\r\n\r\n"
    one = await Dawdler.open(instance)
    one.writer.transport.pause_reading()  # type: ignore[attr-defined]
    with pytest.raises(ConnectionError):  # noqa: PT012  # whichever write meets it
        async with asyncio.timeout(15):
            while True:
                one.writer.write(request * 200)
                await one.writer.drain()
                await asyncio.sleep(0.01)
    assert await metric(instance, 'waybill_connections_cut_total{why="unread"}') >= 1


async def test_connections_are_counted(fleet: Fleet) -> None:
    instance = await fleet.start(**LIMITS, CONNECTIONS_MAX="20")
    many = [await Dawdler.open(instance) for _ in range(40)]
    closed = [await one.closed(0.7) for one in many]
    assert len(closed) == 40
    await until(lambda: lives(instance), "there is room again")
    assert await metric(instance, 'waybill_connections_cut_total{why="full"}') >= 18


async def lives(instance: Instance) -> bool:
    try:
        return (await instance.get("/health/live", by=None)).status == 200
    except aiohttp.ClientError:
        return False


# sockets that are opened and not used


async def ends(socket: aiohttp.ClientWebSocketResponse, within_s: float) -> float:
    """Answer pings until the server ends the transport; returns the seconds."""
    began = time.monotonic()
    async with asyncio.timeout(within_s + 2 * SLACK_S):
        while (message := await socket.receive()).type is aiohttp.WSMsgType.TEXT:
            if message.data == "2":
                await socket.send_str("3")
    return time.monotonic() - began


async def test_a_websocket_that_never_sends_connect_is_closed(instance: Instance) -> None:
    async with aiohttp.ClientSession() as session, session.ws_connect(instance.url + WEBSOCKET) as socket:
        assert await ends(socket, 1.0) > 0.8


async def test_a_polling_session_that_never_sends_connect_is_closed(instance: Instance) -> None:
    async with aiohttp.ClientSession() as session:
        address = f"{instance.url}{POLLING}&sid={await polling_session(session, instance)}"
        began = time.monotonic()
        async with asyncio.timeout(1 + 2 * SLACK_S):
            while True:
                async with session.get(address) as reply:
                    if reply.status == 400:
                        break
                async with session.post(address, data="3"):
                    pass
        assert time.monotonic() - began > 0.5


async def test_a_refused_connect_does_not_keep_a_transport(instance: Instance) -> None:
    async with aiohttp.ClientSession() as session, session.ws_connect(instance.url + WEBSOCKET) as socket:
        await socket.receive()
        await socket.send_str('40{"token":"no"}')
        assert (await socket.receive_str()).startswith("44")
        await ends(socket, 1.0)


async def test_a_connected_socket_is_left_alone(instance: Instance) -> None:
    async with Watcher(instance, token("customer", "c1")) as watcher:
        await asyncio.sleep(2.5)
        assert watcher.client.connected


async def test_a_polling_session_that_nobody_polls_dies(instance: Instance) -> None:
    async with aiohttp.ClientSession() as session:
        address = f"{instance.url}{POLLING}&sid={await polling_session(session, instance)}"
        connect = f'40{{"token":"{token("customer", "c1")}"}}'
        async with session.post(address, data=connect) as reply:
            assert await reply.text() == "ok"

    async def connections() -> float:
        return await metric(instance, "waybill_connections ")

    assert await connections() == 1

    async def gone() -> bool:
        return await connections() == 0

    await until(gone, "the session is gone", 5 + 2 * SLACK_S)


@pytest.mark.parametrize("said", [[], ["2probe"], ["2nonsense"]], ids=["nothing", "half", "nonsense"])
async def test_an_upgrade_that_is_never_finished_ends(instance: Instance, said: list[str]) -> None:
    async with aiohttp.ClientSession() as session:
        sid = await polling_session(session, instance)
        async with session.ws_connect(f"{instance.url}{WEBSOCKET}&sid={sid}") as socket:
            for frame in said:
                await socket.send_str(frame)
            await ends(socket, 1.0)


async def test_sockets_that_never_send_connect_leave_nothing(instance: Instance) -> None:
    async def come_and_stay(session: aiohttp.ClientSession) -> None:
        async with session.ws_connect(instance.url + WEBSOCKET) as socket:
            await ends(socket, 10.0)

    async def wave() -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(come_and_stay(session) for _ in range(250)))
            await asyncio.gather(*(polling_session(session, instance) for _ in range(250)))

    await wave()
    before = rss_mib(instance)
    for _ in range(3):
        await wave()
    assert rss_mib(instance) - before < GROWTH_MAX_MIB
    assert (await instance.get("/orders?limit=1")).status == 200


@pytest.mark.parametrize(
    "frames",
    [
        ['451-["subscribeToOrder",{"_placeholder":true,"num":0}]', b"x" * 1000],
        ['459999999999-["x"]'],
        ['461-0[{"_placeholder":true,"num":0}]', b"x"],
        [b"x" * 1000],
        [b"\x04" + b"x" * 1000],
    ],
    ids=["attachment", "many announced", "in an acknowledgement", "bare", "with a type"],
)
async def test_binary_is_refused(instance: Instance, frames: Sequence[str | bytes]) -> None:
    async with aiohttp.ClientSession() as session, session.ws_connect(instance.url + WEBSOCKET) as socket:
        await socket.receive()
        await socket.send_str(f'40{{"token":"{token("customer", "c1")}"}}')
        assert (await socket.receive_str()).startswith("40")
        for frame in frames:
            await (socket.send_str(frame) if isinstance(frame, str) else socket.send_bytes(frame))
        await ends(socket, 0)


# data servers that stand still


class Frozen:
    """A private Postgres and Redis, and what stops and continues them."""

    def __init__(self, servers: DataServers, folder: Path) -> None:
        self.servers = servers
        self._folder = folder

    def _processes(self, name: str) -> list[psutil.Process]:
        file = {"redis": "redis/redis.pid", "postgres": "postgres/postmaster.pid"}[name]
        head = psutil.Process(int((self._folder / file).read_text().split()[0]))
        return [head, *head.children(recursive=True)]

    @contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        for process in self._processes(name):
            process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in self._processes(name):
                process.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
async def private(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Frozen]:
    folder = tmp_path_factory.mktemp("private")
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)  # Postgres refuses to run as root and must reach its folder as somebody else
    async with data_servers(folder, None, None, lambda sentence: None) as servers:
        await migrate(servers.database_url)
        yield Frozen(servers, folder)


@asynccontextmanager
async def started(private: Frozen, folder: Path) -> AsyncIterator[Instance]:
    fleet = Fleet(private.servers.database_url, private.servers.redis_url, folder)
    try:
        yield await fleet.start(**FROZEN)
    finally:
        await fleet.stop()
    fleet.check_logs()


class Stopwatch:
    """What was asked, how long it took, and what came of it."""

    def __init__(self) -> None:
        self.outcomes: list[tuple[str, float, Any]] = []

    async def time(self, what: str, limit_s: float, asking: Awaitable[Any]) -> None:
        began = time.monotonic()
        outcome = await asking
        took_s = time.monotonic() - began
        self.outcomes.append((what, took_s, outcome))
        assert took_s < limit_s + SLACK_S, f"{what} took {took_s:.1f} s, its limit is {limit_s} s: {outcome}"

    def of(self, start: str, but: str = "?") -> list[Any]:
        return [outcome for what, _, outcome in self.outcomes if what.startswith(start) and not what.endswith(but)]


BODIES: dict[str, Any] = {
    "/status": {"status": "confirmed"},
    "/assign": {"agentId": "r1"},
    "/cancel": {"reason": "no"},
    "/tracking-link": {},
    "/payment-method": {"paymentMethod": "cash"},
    "/refunds": {"reason": "no"},
    "/follow": {"secret": "x"},
    "/revoke": {"jti": "x"},
}


def body_for(path: str) -> Any:
    if path.endswith(("/orders", "/quote")):
        items = [{"name": "Tea", "quantity": 1, "unitPrice": 100}]
        return {"customerId": "c1", "fulfilment": "pickup", "currency": "INR", "items": items}
    if path.endswith("/location"):
        return {"lat": 12.9, "lng": 77.5, "ts": time.time() * 1000}
    return next((body for end, body in BODIES.items() if path.endswith(end)), {})


async def connects(instance: Instance) -> str:
    async with Watcher(instance, SERVICE):
        return "connected"


async def ask_everything(instance: Instance, order_id: str, watcher: Watcher, agent: Watcher) -> Stopwatch:
    """Every route, every event and every page, more at once than there are connections to Postgres."""
    watch, asked = Stopwatch(), []
    request_s, subscribe_s = (int(FROZEN[name]) / 1000 for name in ("REQUEST_TIMEOUT_MS", "SUBSCRIBE_TIMEOUT_MS"))
    names = {"order_id": order_id, "job_id": "0", "agent_id": "r1", "date": "2026-01-01"}
    for route in ROUTES:
        path = re.sub(r"\{(\w+)\}", lambda name: names.get(name[1], str(uuid.uuid4())), route.path)
        body = body_for(path) if route.method not in ("GET", "DELETE") else None
        by = token("agent", "r1") if path.endswith("/location") else SERVICE
        for n in range(3):
            key = {"Idempotency-Key": uuid.uuid4().hex} if n == 2 and body else {}
            asking = instance.request(route.method, path, body, by=by, headers=key)
            asked.append(watch.time(f"{route.method} {route.path}", request_s, asking))
    pages = ("/health/live", "/health/ready", "/metrics", "/docs")
    asked += [watch.time(path, 0, instance.get(path, by=None)) for path in pages]
    waiting = instance.get(f"/orders/{order_id}/events?after=1000&wait=30")
    asked.append(watch.time("long poll", int(FROZEN["LONG_POLL_MAX_S"]) + request_s, waiting))
    for n in range(3):
        subscribing = watcher.call("subscribeToOrder", {"orderId": order_id, "afterSeq": 0})
        asked.append(watch.time("subscribe", subscribe_s, subscribing))
        position = {"orderId": order_id, "lat": 12.9, "lng": 77.5, "ts": time.time() * 1000 + n}
        asked.append(watch.time("position", request_s, agent.call("updateLocation", position)))
    moving = watcher.call("updateOrderStatus", {"orderId": order_id, "status": "confirmed"})
    asked.append(watch.time("move", subscribe_s + request_s, moving))
    asked.append(watch.time("connect", request_s, connects(instance)))
    await asyncio.gather(*asked)
    return watch


async def order_of_r1(instance: Instance) -> str:
    order = await instance.place(paymentMethod="later")
    await instance.assign(order["id"], "r1")
    found: str = order["id"]
    return found


async def all_is_well(instance: Instance, watcher: Watcher) -> bool:
    """Requests, events, subscriptions and positions work."""
    if (await instance.get("/orders?limit=1")).status != 200:
        return False
    if (await instance.get("/health/ready", by=None)).body["redis"] != "ok":
        return False
    order_id = await order_of_r1(instance)
    await watcher.watch(order_id)
    await instance.move(order_id, "confirmed")
    await watcher.hears("orderStatusUpdate", orderId=order_id, status="confirmed")
    async with Watcher(instance, token("agent", "r1")) as agent:
        position = {"orderId": order_id, "lat": 12.9, "lng": 77.5, "ts": time.time() * 1000}
        assert (await agent.call("updateLocation", position))["ok"]
    await watcher.hears("orderLocationUpdate", orderId=order_id)
    return True


async def test_while_redis_stands_still_everything_ends_in_time(private: Frozen, tmp_path: Path) -> None:
    async with (
        started(private, tmp_path) as instance,
        Watcher(instance, SERVICE) as watcher,
        Watcher(instance, token("agent", "r1")) as agent,
    ):
        assert await all_is_well(instance, watcher)
        for round_ in ("unnoticed", "known"):
            order_id = await order_of_r1(instance)
            with private.frozen("redis"):
                if round_ == "known":
                    await until(lambda: says(instance, "degraded"), "the loss is noticed", 5)
                watch = await ask_everything(instance, order_id, watcher, agent)
            for what in ("GET /orders", "POST /orders"):
                found = {reply.status for reply in watch.of(what)} - {200, 201, 204}
                assert found <= {404, 409, 503}, (what, found, watch.of(what))
            assert {reply.status for reply in watch.of("GET /orders/{order_id}", but="/watchers")} == {200}
            located = {reply.status for reply in watch.of("POST /orders/{order_id}/location")}
            assert located <= {200, 409, 503}  # one that is not the newest is taken without Redis
            assert [reply.status for reply in watch.of("/health/live")] == [200]
            assert all(answer["ok"] for answer in watch.of("subscribe")), "subscribing works without Redis"
            assert watch.of("connect") == ["connected"]
            assert not all(answer["ok"] for answer in watch.of("position")), "positions pause"
            await until(lambda: all_is_well(instance, watcher), "all is well again", 15)


async def says(instance: Instance, state: str) -> bool:
    return bool((await instance.get("/health/ready", by=None)).body["redis"] == state)


async def test_while_postgres_stands_still_everything_ends_in_time(private: Frozen, tmp_path: Path) -> None:
    async with (
        started(private, tmp_path) as instance,
        Watcher(instance, SERVICE) as watcher,
        Watcher(instance, token("agent", "r1")) as agent,
    ):
        assert await all_is_well(instance, watcher)
        order_id = await order_of_r1(instance)
        with private.frozen("postgres"):
            for _ in range(2):
                watch = await ask_everything(instance, order_id, watcher, agent)
                reads = watch.of("GET /orders/{order_id}")
                assert {reply.code for reply in reads} == {"unavailable"}
                assert all(reply.headers["Retry-After"] == "1" for reply in reads)
                assert {reply.status for reply in watch.of("POST /orders/{order_id}/status")} == {503}
                assert [reply.status for reply in watch.of("/health/live")] == [200]
                assert {answer["error"]["code"] for answer in watch.of("subscribe")} == {"unavailable"}
                assert watch.of("connect") == ["connected"]
        await until(lambda: all_is_well(instance, watcher), "all is well again", 15)
    connection = await asyncpg.connect(private.servers.database_url)
    left = "select count(*) from pg_stat_activity where state like 'idle in transaction%'"
    assert await connection.fetchval(left) == 0, "a transaction was left open"
    await connection.close()


async def test_a_drain_does_not_wait_for_sockets_that_never_sent_connect(fleet: Fleet) -> None:
    instance = await fleet.start()
    async with aiohttp.ClientSession() as session, session.ws_connect(instance.url + WEBSOCKET) as socket:
        polling = f"{instance.url}{POLLING}&sid={await polling_session(session, instance)}"
        poll = asyncio.create_task(session.get(polling))
        await asyncio.sleep(0.2)
        began = time.monotonic()
        stopping = asyncio.create_task(instance.stop())
        await ends(socket, 1.0)
        (await poll).close()
        assert await stopping == 0
        assert time.monotonic() - began < 2 + SLACK_S
