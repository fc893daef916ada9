"""A small production of its own: instances as users run them, a private Postgres and a private Redis, and what stands
between them. Faults (tests/faults/faults.py) break it; a run (tests/faults/chaos.py) moves orders in it meanwhile."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import struct
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import redis.asyncio

from server.migrate import migrate
from tests.faults.model import Story
from tests.faults.proxy import Proxy, proxied
from tests.faults.test_outages import RestartablePostgres
from tests.faults.watchers import Watcher
from tests.flows.official import Node
from tests.harness import ORDER, READY_S, ROOT, Fleet, Instance, free_port, token, until
from tests.redis_servers import PrivateRedis

GAP_CHECK_S, POLL_MS, REDIS_TIMEOUT_MS, DB_TIMEOUT_MS, RELAY_GRACE_MS = 1, 300, 800, 1000, 300
SETTINGS = {
    "GAP_CHECK_INTERVAL_S": str(GAP_CHECK_S),
    "BUS_FALLBACK_POLL_MS": str(POLL_MS),
    "BUS_PING_INTERVAL_MS": "300",
    "REDIS_TIMEOUT_MS": str(REDIS_TIMEOUT_MS),
    "DB_TIMEOUT_MS": str(DB_TIMEOUT_MS),
    "RELAY_GRACE_MS": str(RELAY_GRACE_MS),
    "PING_INTERVAL_S": "3",
    "PING_TIMEOUT_S": "3",
}
"""Waits that are shorter than users have, so that a run meets each of them several times."""

LONG_S = 30 * 24 * 3600
"""Life of the tokens: longer than any jump of a clock."""
SHOP = token("service", "shop", ttl_s=LONG_S)
CUSTOMER = token("customer", "c1", ttl_s=LONG_S)

PACE_S = (0.01, 0.08)
"""Pause between two moves of an order, drawn."""
MOVE_S = 4.0
"""How long the mover waits for one answer."""
STUCK_S = 60.0
"""After so long a move that is not made is a fault of its own."""


class Place:
    """Where an instance runs: when it dies or is replaced, the next one is found at the same address."""

    def __init__(self, fleet: Fleet, redis: Proxy, clock: Path) -> None:
        self.redis = redis
        self.taken = asyncio.Lock()
        """Held by the fault that does something to the instance here."""
        self.served = 0
        """How many moves were made through it."""
        self.ends = 0
        """How often an instance here has ended."""
        self._fleet, self._clock = fleet, clock
        self._settings: dict[str, Any] = {
            **SETTINGS,
            "REDIS_URL": redis.url,
            "PORT": str(free_port()),
            "PYTHONPATH": str(ROOT / "tests" / "faults" / "clock"),
            "WALL_CLOCK": str(clock),
        }
        self.url = f"http://127.0.0.1:{self._settings['PORT']}"
        self.instance: Instance | None = None
        self.jump(0.0)

    def jump(self, wrong_s: float) -> None:
        """Let the wall clock of the instance be wrong by so much from now on."""
        with self._clock.open("r+b" if self._clock.exists() else "wb") as opened:
            opened.write(struct.pack("d", wrong_s))

    async def start(self, **env: str) -> None:
        self._settings |= env
        self.instance = await self._fleet.start(**self._settings)

    async def kill(self) -> None:
        assert self.instance is not None
        self.ends += 1
        await asyncio.to_thread(self.instance.kill)

    async def drain(self) -> int:
        """The exit code."""
        assert self.instance is not None
        self.ends += 1
        return await self.instance.stop()

    async def heal(self) -> None:
        self.jump(0.0)
        await self.redis.heal()
        if self.instance is None or self.instance.process.poll() is not None:
            await self.start()


class World:
    """The production, its orders, and who watches them."""

    def __init__(self, postgres: RestartablePostgres, redis_server: PrivateRedis, places: Sequence[Place]) -> None:
        self.postgres, self.redis, self.places = postgres, redis_server, places
        self.urls = [place.url for place in places]
        self.node: Node | None = None
        """Runs the official client, where there is a Node.js."""
        self.stories: dict[str, Story] = {}
        self.watchers: list[Watcher] = []
        self.complaints: list[str] = []
        """What the production did against its promises, besides what watchers heard."""
        self.refusals: Counter[str] = Counter()
        """How often the mover was told what, instead of being answered."""
        self.moved_at = 0.0
        """Monotonic time of the last move that was answered."""
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {SHOP}"},
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(MOVE_S),
        )

    # orders

    async def place(self, rng: random.Random) -> str:
        """A new order; the story of it begins."""
        order: dict[str, Any] = await self._insist(rng, "/orders", {**ORDER, "paymentMethod": "later"})
        self.stories[order["id"]] = Story(rng)
        return str(order["id"])

    async def move(self, order_id: str, rng: random.Random) -> None:
        """The next move of an order's story, made exactly once."""
        path, body = self.stories[order_id].next_move()
        await self._insist(rng, f"/orders/{order_id}/{path}", body)

    async def move_on(self, order_id: str, rng: random.Random, enough: asyncio.Event) -> None:
        """One move after the other, until it is enough."""
        while not enough.is_set():
            await self.move(order_id, rng)
            await asyncio.sleep(rng.uniform(*PACE_S))

    async def _insist(self, rng: random.Random, path: str, body: dict[str, Any]) -> Any:
        """As a merchant's backend does it: under one key, again and again, on any instance, until it is done."""
        key = {"Idempotency-Key": str(uuid.uuid4())}
        deadline = time.monotonic() + STUCK_S
        while True:
            place = rng.choice(self.places)
            try:
                async with self._session.post(f"{place.url}/api/v1{path}", json=body, headers=key) as response:
                    answer = await response.json(content_type=None)
                if response.status in (200, 201):
                    place.served += 1
                    self.moved_at = time.monotonic()
                    return answer
                self.refusals[f"{response.status} {answer.get('code')}"] += 1
                if (response.status, answer.get("code")) not in ((503, "unavailable"), (409, "conflict")):
                    raise AssertionError(f"{path} {body} was refused: {answer}")
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                self.refusals[type(error).__name__] += 1
            assert time.monotonic() < deadline, f"{path} {body} could not be done: {self.refusals}"
            await asyncio.sleep(rng.uniform(*PACE_S))

    async def listed(self, order_id: str) -> list[tuple[str, dict[str, Any]]]:
        """(type, payload) of the order's events, as the REST door lists them."""
        async with self._session.get(f"{self.urls[0]}/api/v1/orders/{order_id}/events") as response:
            assert response.status == 200, await response.text()
            return [(event["type"], event["data"]) for event in (await response.json())["events"]]

    async def table(self, order_id: str) -> list[tuple[int, str]]:
        """(seq, type) of the order's rows, straight from Postgres."""
        rows = await self._query("select seq, type from order_events where order_id = $1 order by seq", order_id)
        return [(row["seq"], row["type"]) for row in rows]

    async def unsent(self) -> int:
        ((count,),) = await self._query("select count(*) from order_events where not sent")
        return int(count)

    async def _query(self, statement: str, *args: object) -> Sequence[Any]:
        connection = await asyncpg.connect(self.postgres.url)
        try:
            return list(await connection.fetch(statement, *args))
        finally:
            await connection.close()

    # faults

    def signal_redis(self, number: signal.Signals) -> None:
        """Nothing happens while it is dead: another fault has killed it."""
        if self.redis.running:
            self.redis.signal(number)

    async def tell_redis(self, *command: str | int) -> None:
        """A command of an operator; a Redis that is away hears nothing."""
        client: Any = redis.asyncio.Redis.from_url(
            self.redis.url, socket_timeout=1, socket_connect_timeout=1, retry=None
        )
        try:
            await client.execute_command(*command)
        except (redis.exceptions.RedisError, OSError):
            pass
        finally:
            await client.aclose()

    async def well(self) -> None:
        """Wait until every instance is ready and has its Redis."""

        async def is_well(place: Place) -> bool:
            try:
                async with self._session.get(f"{place.url}/health/ready") as response:
                    return response.status == 200 and json.loads(await response.text())["redis"] == "ok"
            except (aiohttp.ClientError, OSError, TimeoutError):
                return False

        for place in self.places:
            await until(lambda where=place: is_well(where), f"{place.url} is well", READY_S)

    async def heal(self) -> None:
        """Repair whatever a run that failed has left broken."""
        self.signal_redis(signal.SIGCONT)
        if not self.redis.running:
            await self.redis.start()
        if not self.postgres.running:
            await self.postgres.start()
        await asyncio.gather(*(place.heal() for place in self.places))
        await self.well()

    async def close(self) -> None:
        await self._session.close()


@asynccontextmanager
async def world(folder: Path, places: int, node: Node | None = None, **env: str) -> AsyncIterator[World]:
    """A world with so many instances; `env` changes their settings. At the end their logs are looked through."""
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)  # Postgres refuses to run as root and must reach its folder as somebody else
    redis_server = PrivateRedis(folder)
    async with AsyncExitStack() as stack:
        await redis_server.start()
        stack.callback(redis_server.kill)
        postgres = RestartablePostgres(folder / "postgres")
        stack.push_async_callback(postgres.stop)
        await postgres.start()
        await migrate(postgres.url)
        fleet = Fleet(postgres.url, redis_server.url, folder)
        links = [await stack.enter_async_context(proxied(redis_server.url)) for _ in range(places)]
        stack.push_async_callback(fleet.stop)
        clocks = (folder / f"clock-{number}" for number in range(places))
        made = World(postgres, redis_server, [Place(fleet, *both) for both in zip(links, clocks, strict=True)])
        made.node = node
        stack.push_async_callback(made.close)
        await asyncio.gather(*(place.start(**env) for place in made.places))
        await made.well()
        yield made
    fleet.check_logs()
