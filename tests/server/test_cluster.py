"""The bus on a real Redis Cluster: three primaries of Redis 7, whose channels belong to slots, and of Redis 6.2."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from server.realtime.bus import Script
from server.realtime.cluster import SLOTS, first_key, key_slot, redirected_to
from server.realtime.link import Address, BusAway
from server.realtime.positions import SHOW, PositionLane
from tests.harness import until
from tests.redis_servers import RedisCluster, killed_at_the_end, redis_of_major
from tests.server.test_bus import PASSWORD, PING_INTERVAL_S, SLACK_S, TIMEOUT_S, Ear, bus, certificate

BOTH = pytest.mark.parametrize("cluster", [6, 7], indirect=True)
ONLY_7 = pytest.mark.parametrize("cluster", [7], indirect=True)

WHERE = Script("return {KEYS[1], redis.call('INCR', KEYS[1]), ARGV[1]}")


@pytest.fixture(scope="module")
async def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Any]:
    """Three primaries and one node without slots, shared by the tests of one version."""
    made = RedisCluster(tmp_path_factory.mktemp("cluster"), redis_of_major(request.param), primaries=3, others=1)
    with killed_at_the_end(made):
        await made.start()
        yield made


_names = itertools.count()


def names(count: int) -> list[str]:
    """Channels or keys that no other test has."""
    return [f"test:{{{next(_names)}}}" for _ in range(count)]


def all_slots(count: int = 60) -> list[str]:
    """The same, of which every shard has many."""
    return names(count)


# slots


def test_slots_are_those_of_the_specification() -> None:
    assert key_slot("123456789") == 0x31C3 % SLOTS
    assert key_slot("{user1000}.following") == key_slot(b"{user1000}.followers") == key_slot("user1000")
    assert key_slot("foo{}{bar}") != key_slot("bar"), "empty braces do not count"
    assert key_slot("foo{{bar}}zap") == key_slot("{bar")
    assert key_slot("foo{bar}{zap}") == key_slot("bar")


@BOTH
async def test_slots_are_those_that_redis_says(cluster: RedisCluster) -> None:
    odd = ["", "{", "}", "{}", "a{", "a}b{c}", "{a}{b}", "waybill:order:{9e2c}", "waybill:user:ünï", "{é}x", "x{y"]
    for name in [*odd, *(f"waybill:rate:user:customer:c{n}" for n in range(40))]:
        assert key_slot(name) == await cluster.ask(cluster.nodes[0], "CLUSTER", "KEYSLOT", name), name


def test_a_redirect_names_a_node_or_the_one_that_was_asked() -> None:
    asked = Address("10.0.0.1", 6379)
    assert redirected_to("MOVED 3999 127.0.0.1:6381", asked) == (3999, Address("127.0.0.1", 6381))
    assert redirected_to("ASK 5 redis-2.example:7000", asked) == (5, Address("redis-2.example", 7000))
    assert redirected_to("MOVED 1 :6381", asked) == (1, Address("10.0.0.1", 6381))
    assert redirected_to("MOVED 1 ?:6381", asked) == (1, Address("10.0.0.1", 6381))
    assert redirected_to("MOVED 1 ::1:6381", asked) == (1, Address("::1", 6381))
    assert redirected_to("MOVED 1 :6381", Address("/run/redis.sock", 0)) == (1, Address("127.0.0.1", 6381))


def test_the_first_key_decides() -> None:
    assert first_key(("HSET", "k", "f", "v")) == "k"
    assert first_key(("EVALSHA", "digest", 2, "k", "l", "x")) == "k"


# as one Redis


@BOTH
async def test_any_node_leads_to_all_of_them(cluster: RedisCluster) -> None:
    for node in cluster.nodes:
        async with bus(node.url, scripts=[WHERE]) as ear:
            version = (await cluster.ask(node, "INFO", "server")).split(b"redis_version:")[1][:1]
            assert ear.bus.publish_command == ("SPUBLISH" if version == b"7" else "PUBLISH")
            for key in all_slots(20):
                assert await ear.bus.call("SET", key, "v") == b"OK"
                assert await ear.bus.call("GET", key) == b"v"
                assert await ear.bus.call("HSET", key + "h", "f", "v") == 1
                assert await ear.bus.call("HGETALL", key + "h") == [b"f", b"v"]
                assert await ear.bus.call("EXPIRE", key + "h", 9) == 1
                assert await ear.bus.call("HDEL", key + "h", "f") == 1
                assert await ear.bus.call("DEL", key) == 1
                assert await ear.bus.call("EVALSHA", WHERE.digest, 1, key, "x") == [key.encode(), 1, b"x"]
            with pytest.raises(BusAway, match="WRONGTYPE"):
                await ear.bus.call("LPUSH", key, "x")
            await ear.bus.answered()
            assert ear.changes == [True]

            async def two_links_each() -> bool:
                lists = [await cluster.ask(each, "CLIENT", "LIST", "TYPE", "NORMAL") for each in cluster.nodes]
                return [clients.count(b"\n") for clients in lists] == [3, 3, 3, 1]

            await until(two_links_each, "two links to each primary, besides the one that asks")


@BOTH
async def test_what_is_published_arrives_in_order_where_it_is_subscribed(cluster: RedisCluster) -> None:
    channels = all_slots()
    async with bus(cluster.nodes[0].url) as one, bus(cluster.nodes[2].url) as other:
        for channel in channels:
            one.bus.subscribe(channel)
        assert all(await asyncio.gather(*map(one.subscribe, channels)))
        assert all(await asyncio.gather(*map(other.subscribe, channels[::2])))
        for n in range(10):
            for channel in channels:
                other.bus.publish(channel, b"%d" % n)
        await until(lambda: len(one.messages) == 600, "all have arrived")
        for channel in channels:
            assert [payload for name, payload in one.messages if name == channel] == [b"%d" % n for n in range(10)]
        await until(lambda: len(other.messages) == 300, "its own come back to the one who published")
        assert await reaches(one, channels) == [2, 1] * 30, "the count is that of the whole cluster"
        for channel in channels:
            one.bus.unsubscribe(channel)
        await one.bus.answered()
        await until(lambda: _is(reaches(other, channels), [1, 0] * 30), "and they are let go")
        assert one.changes == other.changes == [True]


async def reaches(ear: Ear, channels: list[str]) -> list[object]:
    replies: list[asyncio.Future[object]] = [asyncio.get_running_loop().create_future() for _ in channels]
    for channel, reply in zip(channels, replies, strict=True):
        ear.bus.publish(channel, b"?", reply.set_result)
    return list(await asyncio.gather(*replies))


async def _is(found: Any, wanted: object) -> bool:
    return bool(await found == wanted)


@ONLY_7
async def test_channels_of_one_slot_are_subscribed_and_let_go_together(cluster: RedisCluster) -> None:
    channels = [f"{name}:{n}" for name in names(5) for n in range(200)]
    before = await calls(cluster)
    async with bus(cluster.url) as ear:
        assert all(await asyncio.gather(*map(ear.subscribe, channels)))
        for channel in channels:
            ear.bus.unsubscribe(channel)
        await until(lambda: _is(reaches(ear, channels[::100]), [0] * 10), "all are let go")
    after = await calls(cluster)
    assert [b - a for a, b in zip(before, after, strict=True)] == [5, 5]


async def calls(cluster: RedisCluster) -> list[int]:
    """How many SSUBSCRIBEs and SUNSUBSCRIBEs the cluster has seen."""
    counts = [0, 0]
    for node in cluster.nodes:
        for line in (await cluster.ask(node, "INFO", "commandstats")).split(b"\r\n"):
            for number, name in enumerate((b"cmdstat_ssubscribe:", b"cmdstat_sunsubscribe:")):
                if line.startswith(name):
                    counts[number] += int(line.partition(b"calls=")[2].partition(b",")[0])
    return counts


@BOTH
async def test_a_position_is_decided_and_shown_by_the_shard_of_its_order(cluster: RedisCluster) -> None:
    orders = [str(next(_names)) for _ in range(30)]
    async with bus(cluster.url, scripts=[SHOW]) as one, bus(cluster.url, scripts=[SHOW]) as other:
        lane = PositionLane(one.bus, "waybill:order:{{{}}}".format, min_interval_s=0, keep_s=60)
        assert all(await asyncio.gather(*(other.subscribe(f"waybill:order:{{{order}}}") for order in orders)))
        heard: list[object] = []
        for order in orders:
            lane.show(order, 3, 1.0, b"{}", "me", heard.append)
        await until(lambda: len(heard) == 30, "all are answered")
        assert heard == [1] * 30, "each was heard by one instance"
        await until(lambda: len(other.messages) == 30, "and has arrived")
        assert await lane.known(orders[0]) == (3, 1.0, b"{}")


# slots that move


@asynccontextmanager
async def chatter(ear: Ear, channels: list[str]) -> AsyncIterator[None]:
    """Something is published on all channels all the time meanwhile."""
    enough = asyncio.Event()

    async def talk() -> None:
        while not enough.is_set():
            await reaches(ear, channels)

    task = asyncio.create_task(talk())
    try:
        yield
    finally:
        enough.set()
        await task


@BOTH
async def test_a_slot_that_moves_is_followed_and_told(cluster: RedisCluster) -> None:
    channels = all_slots(30)
    async with bus(cluster.url) as one, bus(cluster.url) as other:
        assert all(await asyncio.gather(*map(one.subscribe, channels)))
        for round_ in range(2):
            told = len(one.changes)
            async with chatter(other, channels):
                for channel in channels[::6]:
                    slot = key_slot(channel)
                    source = await cluster.owner(slot)
                    target = cluster.nodes[(cluster.nodes.index(source) + 1) % 4]  # once the one without slots
                    await cluster.move(slot, source, target)
                    if one.bus.publish_command == "PUBLISH":  # then nobody is told, but everybody hears everything
                        await asyncio.gather(one.bus.call("GET", channel), other.bus.call("GET", channel))
                await until(lambda told=told: len(one.changes) > told or not one.bus.up, "it has noticed")
            await until(lambda: _is(reaches(other, channels), [1] * 30), f"all are heard again, round {round_}")
            one.messages.clear()
            for channel in channels:
                other.bus.publish(channel, b"after")
            await until(lambda: len([1 for _, payload in one.messages if payload == b"after"]) == 30, "all arrive")
            assert set(one.changes) == set(other.changes) == {True}, "the bus was never away"
            one.bus.unsubscribe(channels[0])
            await until(lambda: _is(reaches(other, channels[:1]), [0]), "a channel that has moved can be left")
            assert await one.subscribe(channels[0])


@ONLY_7
async def test_who_subscribes_where_a_slot_was_is_led_to_where_it_is(cluster: RedisCluster) -> None:
    async with bus(cluster.url) as ear:
        channel = names(1)[0]
        source = await cluster.owner(key_slot(channel))
        target = next(node for node in cluster.nodes[:3] if node is not source)
        await cluster.move(key_slot(channel), source, target)
        assert await ear.subscribe(channel)
        assert await reaches(ear, [channel]) == [1]
        await until(lambda: len(ear.changes) > 1, "told to look for gaps, once everything is subscribed again")
        assert all(ear.changes), "never away"


@BOTH
async def test_keys_are_found_on_either_side_while_their_slot_moves(cluster: RedisCluster) -> None:
    tag = names(1)[0]
    slot = key_slot(tag)
    source = await cluster.owner(slot)
    target = next(node for node in cluster.nodes[:3] if node is not source)
    async with bus(cluster.url, scripts=[WHERE]) as ear:
        for n in range(3):
            await ear.bus.call("SET", f"{tag}{n}", n)
        await cluster.begin_move(slot, source, target)
        assert await ear.bus.call("GET", tag + "0") == b"0", "still here"
        assert await ear.bus.call("SET", tag + "new", "n") == b"OK", "already there"
        assert await ear.bus.call("EVALSHA", WHERE.digest, 1, tag + "count", "x") == [(tag + "count").encode(), 1, b"x"]
        assert await cluster.ask(source, "CLUSTER", "COUNTKEYSINSLOT", slot) == 3
        both = [tag + "0", tag + "never"]
        split = asyncio.ensure_future(ear.ask("EVALSHA", WHERE.digest, 2, *both, "x"))
        await cluster.move_keys(slot, source, target)
        await cluster.ask(target, "CLUSTER", "SETSLOT", slot, "NODE", await cluster.id_of(target))
        await cluster.end_move(slot, source, target)
        assert [await ear.bus.call("GET", f"{tag}{n}") for n in range(3)][1:] == [b"1", b"2"]
        assert await asyncio.wait_for(split, 5) == [both[0].encode(), 1, b"x"], "tried again until it was possible"
        assert await ear.bus.call("GET", tag + "new") == b"n"
        assert set(ear.changes) == {True}


async def test_keys_are_found_on_a_node_that_serves_nothing_yet(tmp_path: Path) -> None:
    made = RedisCluster(tmp_path, redis_of_major(7), primaries=1, others=1)
    with killed_at_the_end(made):
        await made.start()
        tag = names(1)[0]
        async with bus(made.url) as ear:
            await made.begin_move(key_slot(tag), *made.nodes)
            assert await ear.bus.call("SET", tag, "v") == b"OK"
            assert await made.ask(made.nodes[0], "CLUSTER", "COUNTKEYSINSLOT", key_slot(tag)) == 0
            assert set(ear.changes) == {True}


# shards that go


@asynccontextmanager
async def own_cluster(folder: Path, *options: str, **more: Any) -> AsyncIterator[RedisCluster]:
    """A cluster of Redis 7 for one test."""
    made = RedisCluster(folder, redis_of_major(7), *options, **more)
    with killed_at_the_end(made):
        await made.start()
        yield made


@ONLY_7
async def test_one_frozen_shard_of_three_is_noticed_in_time_and_everything_is_heard_afterwards(
    cluster: RedisCluster,
) -> None:
    channels = all_slots(30)
    async with bus(cluster.url, timeout_s=TIMEOUT_S) as ear:
        assert all(await asyncio.gather(*map(ear.subscribe, channels)))
        frozen = cluster.nodes[1]
        frozen.signal(signal.SIGSTOP)
        began = time.monotonic()
        await ear.up(False)
        assert time.monotonic() - began < PING_INTERVAL_S + TIMEOUT_S + SLACK_S
        began = time.monotonic()
        for key in channels:
            with pytest.raises(BusAway):
                await ear.bus.call("GET", key)
        assert await ear.subscribe(late := names(1)[0]) is False
        assert time.monotonic() - began < TIMEOUT_S, "meanwhile nobody waits at all, for no shard"
        frozen.signal(signal.SIGCONT)
        await ear.up()
        assert await reaches(ear, [*channels, late]) == [1] * 31
        assert ear.changes == [True, False, True]
    await cluster.whole(cluster.nodes)


async def test_a_dead_primary_is_replaced_by_its_replica(tmp_path: Path) -> None:
    channels = all_slots(30)
    async with own_cluster(tmp_path, primaries=3, others=1) as cluster:
        replica = cluster.nodes[3]
        await cluster.replicate(replica, cluster.nodes[0])
        async with bus(cluster.url, scripts=[WHERE]) as ear, bus(cluster.nodes[1].url) as other:
            for each in (ear, other):
                assert all(await asyncio.gather(*map(each.subscribe, channels)))
            cluster.nodes[0].kill()  # the one that the URL names
            await ear.up(False)
            await ear.up()
            await other.up()
            assert await reaches(ear, channels) == [2] * 30
            moved = [channel for channel in channels if key_slot(channel) < SLOTS // 3]
            assert await cluster.owner(0, replica) is replica
            assert await ear.bus.call("EVALSHA", WHERE.digest, 1, moved[0], "x") == [moved[0].encode(), 1, b"x"]
            assert ear.changes == [True, False, True]
            # the old one comes back as its replica, and is asked for its place again: nobody is away meanwhile
            await cluster.nodes[0].start()
            await cluster.follows(cluster.nodes[0], replica)
            told = len(ear.changes)
            await cluster.ask(cluster.nodes[0], "CLUSTER", "FAILOVER")
            await until(lambda: len(ear.changes) > told, "it has noticed the change of roles")
            await until(lambda: _is(reaches(ear, channels), [2] * 30), "and is heard where it is")
            assert set(ear.changes[told:]) == {True}


async def test_a_cluster_that_misses_a_slot_is_away(tmp_path: Path) -> None:
    async with own_cluster(tmp_path, primaries=1) as cluster, bus(cluster.url) as ear:
        assert await ear.subscribe("a")
        await cluster.ask(cluster.nodes[0], "CLUSTER", "DELSLOTS", key_slot("k"))
        assert isinstance(await ear.ask("GET", "k"), Exception)
        await ear.up(False)
        await cluster.ask(cluster.nodes[0], "CLUSTER", "ADDSLOTS", key_slot("k"))
        await ear.up()
        assert await ear.bus.call("GET", "k") is None
        assert await reaches(ear, ["a"]) == [1]


# addresses


async def test_password_and_encryption_hold_for_every_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    public, _ = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(public))
    tls = ("--tls-cert-file", str(public), "--tls-key-file", str(tmp_path / "key.pem"), "--tls-auth-clients", "no")
    names_ = ("--cluster-announce-hostname", "localhost", "--cluster-preferred-endpoint-type", "hostname")
    options = ("--requirepass", PASSWORD, *tls, "--tls-ca-cert-file", str(public), *names_)
    async with own_cluster(tmp_path, *options, primaries=2, password=PASSWORD, encrypted=True) as cluster:
        url = f"rediss://:{quote(PASSWORD, safe='')}@localhost:{cluster.ports[0]}"

        async def announced() -> bool:
            slots = await cluster.ask(cluster.nodes[0], "CLUSTER", "SLOTS")
            return all(primary[0] == b"localhost" for _, _, primary, *_ in slots)

        await until(announced, "the nodes know their names")
        async with bus(url) as ear:
            channels = all_slots(20)
            assert all(await asyncio.gather(*map(ear.subscribe, channels)))
            assert await reaches(ear, channels) == [1] * 20
            assert await ear.bus.call("SET", channels[0], "v") == b"OK"
        with pytest.raises(AssertionError, match="did not happen"):
            async with bus(f"rediss://localhost:{cluster.ports[0]}", wait=False) as ear:
                await until(lambda: ear.bus.up, "up without a password", 0.5)
