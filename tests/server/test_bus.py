"""The bus against a real Redis: what it promises while Redis is there, is killed, is frozen, and comes back."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import itertools
import os
import random
import signal
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis.asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from server.binaries import redis_server
from server.children import LAUNCHER
from server.embedded import DataServers
from server.realtime.bus import SUBSCRIBE_BATCH_MAX, Bus, BusAway, Script
from tests.harness import SOON_S, free_port, until

TIMEOUT_S, PING_INTERVAL_S = 0.4, 0.1
"""Short, so that a fault is noticed soon; long enough for a busy machine."""

SLACK_S = 1.5
"""What a busy machine may add to a bound."""

PASSWORD = "p@ss:w/rd é"
ADD = Script("return tonumber(ARGV[1]) + tonumber(ARGV[2])")


class Ear:
    """A bus and what it told us."""

    def __init__(self, url: str, timeout_s: float, ping_interval_s: float, scripts: Sequence[Script]) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.changes: list[bool] = []
        self.on_change: Callable[[], None] = lambda: None
        self.bus = Bus(
            url,
            timeout_s=timeout_s,
            ping_interval_s=ping_interval_s,
            scripts=scripts,
            on_message=lambda channel, payload: self.messages.append((channel, payload)),
            on_change=self._changed,
        )

    def _changed(self) -> None:
        self.changes.append(self.bus.up)
        self.on_change()

    async def subscribe(self, channel: str) -> bool:
        """What subscribing says, soon."""
        return await asyncio.wait_for(self.bus.subscribe(channel), SOON_S)

    async def ask(self, *args: str | bytes | int | float) -> object:
        """The reply to `send`."""
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.bus.send(args, future.set_result)
        return await future

    async def reaches(self, channels: Sequence[str]) -> list[object]:
        """How many subscribers Redis knows for each channel."""
        return [await self.ask("PUBLISH", channel, "?") for channel in channels]

    async def up(self, is_up: bool = True) -> None:
        await until(lambda: self.bus.up is is_up, f"up is {is_up}")


@asynccontextmanager
async def bus(
    url: str,
    *,
    timeout_s: float = 5.0,
    ping_interval_s: float = PING_INTERVAL_S,
    scripts: Sequence[Script] = (),
    wait: bool = True,
) -> AsyncIterator[Ear]:
    """A running bus; `wait`: until it is up."""
    ear = Ear(url, timeout_s, ping_interval_s, scripts)
    task = asyncio.create_task(ear.bus.run())
    try:
        if wait:
            await ear.up()
        yield ear
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class PrivateRedis:
    """A Redis of this test's own, to be killed and frozen."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port, self.socket = free_port(), folder / "r.sock"
        self.url = f"redis://127.0.0.1:{self.port}"
        self._folder, self._options = folder, options
        self._process: subprocess.Popen[bytes] | None = None

    def _launch(self) -> None:
        options = ("--port", str(self.port), "--unixsocket", str(self.socket), "--dir", str(self._folder), "--save", "")
        # the launcher lets the kernel end it with us, even when we are killed
        launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, "0", "0", str(int(signal.SIGKILL)), str(os.getpid())]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*launcher, redis_server(), *options, *self._options], stdout=log, stderr=log
            )

    async def start(self) -> None:
        self._launch()

        async def listens() -> bool:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                return False
            writer.close()
            await writer.wait_closed()
            return True

        await until(listens, "Redis listens")

    @property
    def running(self) -> bool:
        return self._process is not None

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def client(url: str, **options: Any) -> Any:
    """Somebody else's way to the same Redis."""
    return redis.asyncio.Redis.from_url(url, **options)


@pytest.fixture
async def private(tmp_path: Path) -> AsyncIterator[PrivateRedis]:
    server = PrivateRedis(tmp_path)
    await server.start()
    yield server
    server.kill()


@pytest.fixture
def prefix() -> str:
    """The Redis of the whole run is shared: channels are this test's own."""
    return f"test:{uuid.uuid4().hex}:"


# publish and subscribe


async def test_what_is_published_arrives_in_order_where_it_is_subscribed(data: DataServers, prefix: str) -> None:
    async with bus(data.redis_url) as one, bus(data.redis_url) as other:
        assert await one.subscribe(prefix + "a")
        assert await other.subscribe(prefix + "a")
        assert await other.subscribe(prefix + "b")
        for n in range(300):
            one.bus.publish(prefix + "ab"[n % 2], b"%d \x00\xff\r\n" % n)
        await until(lambda: len(other.messages) == 300, "all have arrived")
        assert other.messages == [(prefix + "ab"[n % 2], b"%d \x00\xff\r\n" % n) for n in range(300)]
        await until(lambda: len(one.messages) == 150, "its own come back to the one who published")
        assert await one.reaches([prefix + "a", prefix + "b", prefix + "c"]) == [2, 1, 0]


async def test_after_unsubscribing_nothing_arrives(data: DataServers, prefix: str) -> None:
    async with bus(data.redis_url) as ear:
        for name in "ab":
            assert await ear.subscribe(prefix + name)
        ear.bus.unsubscribe(prefix + "a")
        await until(lambda: _is(ear.reaches([prefix + "a"]), [0]), "Redis has let it go")
        ear.messages.clear()
        ear.bus.publish(prefix + "a", b"1")
        ear.bus.publish(prefix + "b", b"2")
        await until(lambda: ear.messages, "the other one still listens")
        assert ear.messages == [(prefix + "b", b"2")]
        ear.bus.unsubscribe(prefix + "never subscribed")


async def _is(found: Any, wanted: object) -> bool:
    return bool(await found == wanted)


async def test_five_thousand_channels_are_confirmed_in_batches(private: PrivateRedis) -> None:
    channels = [f"order:{n}" for n in range(5_000)]
    async with bus(private.url) as ear:
        assert all(await asyncio.gather(*(ear.subscribe(channel) for channel in channels)))
        stats = str(await ear.bus.call("INFO", "commandstats"))
        assert f"cmdstat_subscribe:calls={5_000 // SUBSCRIBE_BATCH_MAX}," in stats
        assert await ear.reaches(channels[::500]) == [1] * 10
        for channel in channels:
            ear.bus.publish(channel, b"1")
        await until(lambda: sum(payload == b"1" for _, payload in ear.messages) == 5_000, "each is heard")
        assert all(await asyncio.gather(*(ear.subscribe(channel) for channel in channels))), "again: at once"


async def test_the_last_word_of_a_tick_counts(data: DataServers, prefix: str) -> None:
    async with bus(data.redis_url) as ear:
        ear.bus.subscribe(prefix + "on")
        ear.bus.unsubscribe(prefix + "on")
        last = ear.bus.subscribe(prefix + "on")
        ear.bus.subscribe(prefix + "off")
        ear.bus.unsubscribe(prefix + "off")
        assert await asyncio.wait_for(last, 5)
        assert await ear.reaches([prefix + "on", prefix + "off"]) == [1, 0]
        ear.bus.unsubscribe(prefix + "on")
        assert await asyncio.wait_for(ear.subscribe(prefix + "on"), 5)
        assert await ear.reaches([prefix + "on"]) == [1]


@pytest.mark.parametrize("seed", range(5))
async def test_joining_and_leaving_at_any_moment_ends_as_it_was_last_asked(
    data: DataServers, prefix: str, seed: int
) -> None:
    dice = random.Random(seed)
    channels = [f"{prefix}{n}" for n in range(6)]
    wanted: dict[str, bool] = dict.fromkeys(channels, False)
    async with bus(data.redis_url) as ear:
        asked: list[Any] = []
        for _ in range(300):
            channel = dice.choice(channels)
            wanted[channel] = dice.random() < 0.5
            if wanted[channel]:
                asked.append(ear.bus.subscribe(channel))
            else:
                ear.bus.unsubscribe(channel)
            if dice.random() < 0.3:
                await asyncio.sleep(0)  # the next tick
            if dice.random() < 0.05:
                await ear.bus.call("PING")  # time for an answer
        answers = await asyncio.wait_for(asyncio.gather(*asked), 10)
        assert set(answers) <= {True, False}
        assert all(await asyncio.gather(*(ear.subscribe(name) for name, on in wanted.items() if on)))
        await until(lambda: _is(ear.reaches(channels), [int(wanted[channel]) for channel in channels]), "Redis agrees")


async def test_who_leaves_before_the_confirmation_is_told_so(data: DataServers, prefix: str) -> None:
    async with bus(data.redis_url) as ear:
        first, second = ear.bus.subscribe(prefix + "a"), ear.bus.subscribe(prefix + "a")
        ear.bus.unsubscribe(prefix + "a")
        assert set(await asyncio.wait_for(asyncio.gather(first, second), SOON_S)) == {False}


# calls


async def test_calls_answer_errors_are_bus_away_and_scripts_are_there(data: DataServers, prefix: str) -> None:
    async with bus(data.redis_url, scripts=[ADD]) as ear:
        assert await ear.bus.call("SET", prefix + "k", "v", "PX", 10_000) == b"OK"
        assert await ear.bus.call("GET", prefix + "k") == b"v"
        assert await ear.bus.call("EVALSHA", ADD.digest, 0, 2, 3) == 5
        with pytest.raises(BusAway, match="WRONGTYPE"):
            await ear.bus.call("LPUSH", prefix + "k", "x")
        assert await ear.bus.call("GET", prefix + "k") == b"v", "an error answer costs nobody the connection"
        assert ear.changes == [True]
        replies = await asyncio.gather(*(ear.bus.call("ECHO", str(n)) for n in range(500)))
        assert replies == [str(n).encode() for n in range(500)]


async def test_before_redis_was_reached_nothing_waits() -> None:
    async with bus(f"redis://127.0.0.1:{free_port()}", wait=False) as ear:
        assert await asyncio.wait_for(ear.subscribe("a"), 1) is False
        assert isinstance(await asyncio.wait_for(ear.ask("PUBLISH", "a", "1"), 1), BusAway)
        with pytest.raises(BusAway):
            await asyncio.wait_for(ear.bus.call("PING"), 1)
        assert (ear.bus.up, ear.bus.reached.is_set(), ear.changes) == (False, False, [])


# Redis goes and comes back


async def test_after_a_restart_every_channel_is_there_before_anybody_is_told(private: PrivateRedis) -> None:
    channels = [f"order:{n}" for n in range(1_500)]
    published: list[object] = []
    async with bus(private.url, scripts=[ADD]) as ear:
        assert all(await asyncio.gather(*(ear.subscribe(channel) for channel in channels[:1_000])))
        ear.bus.unsubscribe(channels[0])

        def tell() -> None:
            if ear.bus.up:
                for channel in channels:
                    ear.bus.publish(channel, b"back", published.append)

        ear.on_change = tell
        private.kill()
        await ear.up(False)
        assert ear.changes == [True, False]
        assert await asyncio.gather(*(ear.subscribe(channel) for channel in channels[1_000:])) == [False] * 500
        ear.bus.unsubscribe(channels[1])
        await private.start()
        await until(lambda: len(published) == 1_500, "all is published")
        assert ear.changes == [True, False, True]
        assert published == [0, 0, *[1] * 1_498], "whoever is told that Redis is back hears everything from now on"
        await until(lambda: len(ear.messages) == 1_498, "and it is heard")
        assert {channel for channel, _ in ear.messages} == set(channels[2:])
        assert await ear.bus.call("EVALSHA", ADD.digest, 0, 2, 3) == 5, "the new Redis was given the scripts"


async def test_who_waits_for_a_confirmation_is_told_when_redis_goes(private: PrivateRedis) -> None:
    async with bus(private.url, timeout_s=TIMEOUT_S) as ear:
        private.signal(signal.SIGSTOP)
        asked = [ear.bus.subscribe("a"), ear.bus.subscribe("b")]
        assert await asyncio.wait_for(asyncio.gather(*asked), TIMEOUT_S + PING_INTERVAL_S + SLACK_S) == [False, False]
        private.signal(signal.SIGCONT)
        await ear.up()
        assert (await ear.subscribe("a"), await ear.subscribe("b")) == (True, True)
        assert await ear.reaches(["a", "b"]) == [1, 1]


async def test_a_call_without_an_answer_is_news_enough(private: PrivateRedis) -> None:
    async with bus(private.url, timeout_s=TIMEOUT_S, ping_interval_s=3600) as ear:
        private.signal(signal.SIGSTOP)
        with pytest.raises(BusAway):
            await ear.bus.call("GET", "k")
        await until(lambda: not ear.bus.up, "nobody has to wait for a ping")


async def test_a_frozen_redis_is_noticed_in_time_and_costs_nobody_more_than_a_time_out(private: PrivateRedis) -> None:
    async with bus(private.url, timeout_s=TIMEOUT_S) as ear:
        assert await ear.subscribe("a")
        for _ in range(2):
            private.signal(signal.SIGSTOP)
            frozen = time.monotonic()
            replies = [asyncio.ensure_future(ear.ask("PUBLISH", "a", "lost?")) for _ in range(3)]
            with pytest.raises(BusAway):
                await ear.bus.call("GET", "k")
            assert time.monotonic() - frozen < TIMEOUT_S + SLACK_S
            await ear.up(False)
            assert time.monotonic() - frozen < PING_INTERVAL_S + TIMEOUT_S + SLACK_S
            assert all(isinstance(reply, BusAway) for reply in await asyncio.gather(*replies))
            began = time.monotonic()
            for _ in range(50):
                with pytest.raises(BusAway):
                    await ear.bus.call("GET", "k")
            assert await ear.subscribe("b") is False
            assert time.monotonic() - began < TIMEOUT_S, "while it is away nobody waits at all"
            private.signal(signal.SIGCONT)
            await ear.up()
            assert await ear.reaches(["a", "b"]) == [1, 1]
        assert ear.changes == [True, False, True, False, True]


async def test_silence_alone_is_noticed_within_a_ping_and_a_time_out(private: PrivateRedis) -> None:
    """Nobody asks anything: only the pings tell. The interval is the one that was set, whatever the time-out."""
    interval_s, timeout_s = 0.2, 2.0
    async with bus(private.url, timeout_s=timeout_s, ping_interval_s=interval_s) as ear:
        stats = await ear.bus.call("INFO", "commandstats")
        await until(
            lambda: _pings(ear, 2 * 5 + _count(stats)), "five more pings on both links", 5 * interval_s + SLACK_S
        )
        private.signal(signal.SIGSTOP)
        frozen = time.monotonic()
        await ear.up(False)
        assert time.monotonic() - frozen < interval_s + timeout_s + 1.0


def _count(stats: object) -> int:
    found = [line for line in str(stats).split("\\r\\n") if "cmdstat_ping:" in line]
    return int(found[0].partition("calls=")[2].partition(",")[0]) if found else 0


async def _pings(ear: Ear, at_least: int) -> bool:
    return _count(await ear.bus.call("INFO", "commandstats")) >= at_least


async def test_a_redis_that_dies_again_and_again_is_found_again_and_again(private: PrivateRedis) -> None:
    async with bus(private.url) as ear:
        ear.bus.subscribe("a")
        for _ in range(3):
            private.kill()
            await ear.up(False)
            await private.start()
            await ear.up()
            assert await ear.reaches(["a"]) == [1]
        assert ear.changes == [True, *[False, True] * 3]


async def test_one_lost_connection_is_enough_to_be_away_and_both_are_made_again(private: PrivateRedis) -> None:
    async with bus(private.url) as ear:
        assert await ear.subscribe("a")
        for kind in ("pubsub", "normal"):
            told = len(ear.changes)
            async with client(private.url) as admin:
                await admin.execute_command("CLIENT", "KILL", "TYPE", kind)
            await until(lambda told=told: ear.changes[told:] == [False, True], f"it came back without its {kind} link")
            assert await ear.reaches(["a"]) == [1]
            assert len(str(await ear.bus.call("CLIENT", "LIST")).strip().split("\\n")) - 1 == 2, "nothing is left over"


async def test_what_is_subscribed_while_the_channels_are_confirmed_again_is_confirmed_too(
    private: PrivateRedis,
) -> None:
    """Redis has answered the greeting, but not yet the SUBSCRIBE of the known channels."""
    async with Proxy(private.port) as proxy, bus(proxy.url) as ear:
        assert await ear.subscribe("a")
        proxy.hold()
        proxy.cut()
        await ear.up(False)
        await asyncio.wait_for(proxy.holding.wait(), 10)
        late = ear.bus.subscribe("b")
        gone = ear.bus.subscribe("c")
        ear.bus.unsubscribe("c")
        assert ear.changes == [True, False], "not before every channel is confirmed"
        assert not ear.bus.up
        proxy.release()
        await ear.up()
        assert await asyncio.wait_for(gone, 5) is False
        await asyncio.wait_for(late, 5)
        assert await asyncio.wait_for(ear.subscribe("b"), 5)
        assert await ear.reaches(["a", "b", "c"]) == [1, 1, 0]


async def test_who_asks_while_the_channels_are_confirmed_again_is_told_when_redis_goes_again(
    private: PrivateRedis,
) -> None:
    async with Proxy(private.port) as proxy, bus(proxy.url) as ear:
        assert await ear.subscribe("a")
        proxy.hold()
        proxy.cut()
        await ear.up(False)
        await asyncio.wait_for(proxy.holding.wait(), 10)
        late = ear.bus.subscribe("b")
        proxy.cut()
        assert await asyncio.wait_for(late, 5) is False
        proxy.release()
        await ear.up()
        assert await ear.reaches(["a", "b"]) == [1, 1]


async def test_silence_while_the_channels_are_confirmed_again_is_tried_again(private: PrivateRedis) -> None:
    async with Proxy(private.port) as proxy, bus(proxy.url, timeout_s=TIMEOUT_S) as ear:
        assert await ear.subscribe("a")
        proxy.hold()
        proxy.cut()
        await ear.up(False)
        await asyncio.wait_for(proxy.holding.wait(), 10)
        tries = proxy.accepted
        await until(lambda: proxy.accepted >= tries + 2, "it has given up that connection and made new ones")
        proxy.release()
        await ear.up()
        assert await ear.reaches(["a"]) == [1]


class Proxy:
    """Stands between a bus and Redis: cuts connections, and holds back what Redis says from a SUBSCRIBE on."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._upstream, self._tls = port, tls
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self.holding = asyncio.Event()
        """Set while an answer to a SUBSCRIBE is held back."""
        self.accepted = 0

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        redis_reader, redis_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        pair = (writer, redis_writer)
        self._pairs.add(pair)
        ways = [
            asyncio.create_task(self._pump(reader, redis_writer, from_client=True)),
            asyncio.create_task(self._pump(redis_reader, writer, from_client=False)),
        ]
        self._tasks.update(ways)
        await asyncio.wait(ways, return_when="FIRST_COMPLETED")
        self._pairs.discard(pair)
        for one in pair:
            one.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, from_client: bool) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(65_536):
                if from_client and b"\r\nSUBSCRIBE\r\n" in chunk and not self._open.is_set():
                    self.holding.set()
                if not from_client and self.holding.is_set():
                    await self._open.wait()
                writer.write(chunk)
                await writer.drain()

    def hold(self) -> None:
        self._open.clear()

    def release(self) -> None:
        self.holding.clear()
        self._open.set()

    def cut(self) -> None:
        """End every connection, without a word."""
        for one in itertools.chain.from_iterable(self._pairs):
            one.transport.abort()


# addresses


async def test_a_password_and_a_database_number_are_used(tmp_path: Path) -> None:
    server = PrivateRedis(tmp_path, "--requirepass", PASSWORD)
    await server.start()
    secret = quote(PASSWORD, safe="")
    try:
        for url in (
            f"redis://:{secret}@127.0.0.1:{server.port}/3",
            f"redis://default:{secret}@127.0.0.1:{server.port}/3",
            f"redis://:{secret}@127.0.0.1:{server.port}/3?timeout=1",
            f"redis://:{secret}@localhost:{server.port}?db=3",
            f"unix://:{secret}@{server.socket}?db=3",
        ):
            async with bus(url) as ear:
                await ear.bus.call("SET", "url", url)
                assert await ear.subscribe("a")
                assert await ear.reaches(["a"]) == [1]
            async with client(f"{server.url}/3", password=PASSWORD) as admin:
                assert await admin.get("url") == url.encode()
        async with client(f"{server.url}/0", password=PASSWORD) as admin:
            assert await admin.keys() == []
    finally:
        server.kill()


async def test_a_user_of_the_access_list_is_used(private: PrivateRedis) -> None:
    async with client(private.url) as admin:
        rules = ("on", f">{PASSWORD}", "allkeys", "allchannels", "+@all")
        await admin.execute_command("ACL", "SETUSER", "way@bill", *rules)
    url = f"redis://way%40bill:{quote(PASSWORD, safe='')}@127.0.0.1:{private.port}"
    async with bus(url) as ear:
        assert await ear.bus.call("ACL", "WHOAMI") == b"way@bill"


@pytest.mark.parametrize("path", ["/0", "", "?db=0"])
async def test_a_unix_socket_is_an_address(private: PrivateRedis, path: str) -> None:
    url = f"unix://{private.socket}{path if path.startswith('?') else ''}"
    async with bus(url) as ear:
        assert await ear.subscribe("a")
        assert await ear.reaches(["a"]) == [1]


@pytest.mark.parametrize("tail", ["wrong@127.0.0.1:{port}/0", "@127.0.0.1:{port}/99"])
async def test_a_redis_that_refuses_us_is_asked_again_and_nothing_piles_up(private: PrivateRedis, tail: str) -> None:
    async with client(private.url) as admin:
        if "wrong" in tail:
            await admin.execute_command("ACL", "SETUSER", "waybill", "on", ">right", "allkeys", "allchannels", "+@all")
        user = "waybill:" if "wrong" in tail else ""
        before = (await admin.info("stats"))["total_connections_received"]
        async with bus(f"redis://{user}{tail.format(port=private.port)}", wait=False) as ear:

            async def tried(times: int) -> bool:
                return bool((await admin.info("stats"))["total_connections_received"] - before >= times)

            await until(lambda: tried(6), "it has tried six times")
            assert (await admin.info("clients"))["connected_clients"] <= 2, "attempts that failed are closed"
            assert (ear.bus.up, ear.bus.reached.is_set()) == (False, False)
    await until(lambda: _alone(private), "and nothing stays behind")


async def _alone(private: PrivateRedis) -> bool:
    async with client(private.url) as admin:
        return bool((await admin.info("clients"))["connected_clients"] == 1)


def certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate for localhost that signs itself: its file, and the server's side of it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    public, private_key = folder / "cert.pem", folder / "key.pem"
    public.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private_key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, private_key)
    return public, context


async def test_rediss_is_encrypted_and_trusts_only_whom_the_system_trusts(
    private: PrivateRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public, server_side = certificate(tmp_path)
    async with Proxy(private.port, server_side) as encrypted, Proxy(encrypted.port) as outside:
        url = f"rediss://localhost:{outside.port}"
        async with bus(url, wait=False) as ear:
            await until(lambda: outside.accepted >= 2, "it has tried, and tries again")
            assert (encrypted.accepted, ear.bus.reached.is_set()) == (0, False)
        monkeypatch.setenv("SSL_CERT_FILE", str(public))
        async with bus(url) as ear:
            assert await ear.subscribe("a")
            assert await ear.reaches(["a"]) == [1]
