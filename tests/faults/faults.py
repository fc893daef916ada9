"""The faults, one function each: it breaks something for so many seconds, repairs it, and returns how often it struck.

A new fault is a new function under `@fault`; the runs in tests/faults/chaos.py take it from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

from server.outbox import order_channel
from tests.faults.proxy import Jumbler
from tests.faults.watchers import Watcher
from tests.faults.world import Place, World
from tests.harness import until

Inject = Callable[[World, random.Random, float], Awaitable[int]]
Seconds = tuple[float, float]


class Fault(NamedTuple):
    """How to break it, and for how long at least and at most: in CI, and on demand."""

    inject: Inject
    brief: Seconds
    long: Seconds


FAULTS: dict[str, Fault] = {}

COMMIT_S = 3.0
"""How long an instance that is about to die is waited for to commit something."""


def fault(brief: Seconds = (0.8, 1.6), long: Seconds = (0.5, 6.0)) -> Callable[[Inject], Inject]:
    """Puts a function into the table, under its own name."""

    def put(inject: Inject) -> Inject:
        FAULTS[inject.__name__] = Fault(inject, brief, long)
        return inject

    return put


# clients


async def _flap_all(world: World, rng: random.Random, how: str, seconds: float) -> int:
    """Whoever comes back loses the network again and again, each at moments of its own."""
    ends = time.monotonic() + seconds

    async def flap(watcher: Watcher, pauses: random.Random) -> int:
        flaps = 0
        while time.monotonic() < ends:
            await asyncio.sleep(pauses.uniform(0, seconds / 2))
            await watcher.flap(how, pauses.uniform(0.2, 0.6))
            flaps += 1
        return flaps

    going = [one for one in world.watchers if not one.stays]
    return sum(await asyncio.gather(*(flap(one, random.Random(rng.random())) for one in going)))


@fault()
async def clients_close(world: World, rng: random.Random, seconds: float) -> int:
    return await _flap_all(world, rng, "close", seconds)


@fault()
async def clients_half_open(world: World, rng: random.Random, seconds: float) -> int:
    """They come back on a new connection, and the server still holds the old one, whose client reads no more."""
    return await _flap_all(world, rng, "half-open", seconds)


@fault(brief=(2, 4), long=(30, 30))
async def clients_in_tunnel(world: World, rng: random.Random, seconds: float) -> int:
    """All of them for a while: shorter than the server's patience they keep their connection, longer they lose it."""
    await asyncio.gather(*(one.flap("tunnel", seconds * rng.uniform(0.5, 1)) for one in world.watchers))
    return len(world.watchers)


# instances


@asynccontextmanager
async def _one_of(world: World, rng: random.Random) -> AsyncIterator[Place]:
    """An instance that runs, and that no other fault has in its hands."""
    place = rng.choice(world.places)
    async with place.taken:
        yield place


@fault()
async def instance_killed(world: World, rng: random.Random, seconds: float) -> int:
    async with _one_of(world, rng) as place:
        await place.kill()
        await asyncio.sleep(seconds)
        await place.start()
    return 1


@fault()
async def instance_drained(world: World, rng: random.Random, seconds: float) -> int:
    """As a rolling deploy does it."""
    async with _one_of(world, rng) as place:
        code = await place.drain()
        if code != 0:
            world.complaints.append(f"an instance that was drained ended with {code}")
        await place.start()
    return 1


@fault(brief=(0.3, 0.6), long=(0.2, 2.0))
async def killed_before_publish(world: World, rng: random.Random, seconds: float) -> int:
    """What it commits in its last moments, by a door, and what its relay finds then, never reaches Redis."""
    async with _one_of(world, rng) as place:
        place.redis.up.swallow()
        before = place.served
        await asyncio.sleep(seconds)
        with contextlib.suppress(AssertionError):  # nothing can be committed while Postgres is away, too
            await until(lambda: place.served > before, "it commits something", COMMIT_S)
        committed = place.served - before
        await place.kill()
        await place.redis.heal()
        await place.start()
    return committed


@fault()
async def clock_jumps(world: World, rng: random.Random, seconds: float) -> int:
    """Forwards and backwards, by seconds to a day, each instance by itself."""
    ends, jumps = time.monotonic() + seconds, 0
    while time.monotonic() < ends:
        rng.choice(world.places).jump(rng.choice((-1, 1)) * rng.choice((5.0, 600.0, 3600.0, 86_400.0)))
        jumps += 1
        await asyncio.sleep(rng.uniform(0.1, 0.4))
    for place in world.places:
        place.jump(0.0)
    return jumps


# Redis


@fault()
async def redis_restarted_empty(world: World, rng: random.Random, seconds: float) -> int:
    world.redis.kill()
    await asyncio.sleep(seconds)
    await world.redis.start()
    return 1


@fault(brief=(1.5, 3), long=(20, 20))
async def redis_paused(world: World, rng: random.Random, seconds: float) -> int:
    world.signal_redis(signal.SIGSTOP)
    await asyncio.sleep(seconds)
    world.signal_redis(signal.SIGCONT)
    return 1


@fault(brief=(1.5, 2.5), long=(2, 20))
async def redis_slow(world: World, rng: random.Random, seconds: float) -> int:
    """Each piece is late, for some instances so late that they take Redis for lost."""
    for place in world.places:
        place.redis.down.slow(rng.choice((0.05, 0.3, 1.0)))
    await asyncio.sleep(seconds)
    for place in world.places:
        place.redis.down.slow(0.0)
    return len(world.places)


@fault()
async def redis_drops_subscribers(world: World, rng: random.Random, seconds: float) -> int:
    """Their output buffers overflow, as with a subscriber that cannot follow: Redis closes the connection."""
    await world.tell_redis("CONFIG", "SET", "client-output-buffer-limit", "pubsub 1024 0 0")
    ends, floods = time.monotonic() + seconds, 0
    while time.monotonic() < ends:
        # a position of an assignment that never was: nobody is shown it
        for order_id in world.stories:
            await world.tell_redis("PUBLISH", order_channel(order_id), "p1 0.0 nobody " + "x" * 100_000)
        floods += 1
        await asyncio.sleep(rng.uniform(0.1, 0.5))
    await world.tell_redis("CONFIG", "SET", "client-output-buffer-limit", "pubsub 33554432 8388608 60")
    return floods


async def _jumble(world: World, rng: random.Random, seconds: float, lose: float) -> int:
    jumblers = [Jumbler(rng, lose) for _ in world.places]
    for place, jumbler in zip(world.places, jumblers, strict=True):
        place.redis.down.edit(jumbler)
    await asyncio.sleep(seconds)
    for place in world.places:
        place.redis.down.edit(bytes)
    return sum(jumbler.struck for jumbler in jumblers)


@fault()
async def bus_repeats_and_reorders(world: World, rng: random.Random, seconds: float) -> int:
    return await _jumble(world, rng, seconds, lose=0)


@fault()
async def bus_loses(world: World, rng: random.Random, seconds: float) -> int:
    """Without a word, while the link stays up: also the last message, which has no successor that would reveal it."""
    return await _jumble(world, rng, seconds, lose=0.5)


# Postgres


@fault()
async def postgres_restarted(world: World, rng: random.Random, seconds: float) -> int:
    await world.postgres.stop()
    await asyncio.sleep(seconds)
    await world.postgres.start()
    return 1
