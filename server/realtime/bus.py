"""The bus: Redis pub/sub between instances, over connections of our own.

Why our own: all commands of one tick of the event loop leave in one write and their answers are matched by order, which
costs a tenth of an awaited command (docs/realtime.md); a half-open or frozen Redis is noticed by a ping that stays
unanswered; and who publishes learns at once that it failed. The bus wakes, the table decides: nothing durable is lost
here.

Redis may be a cluster: it says so itself when it is reached. Then there are two links to each primary, and commands and
channels go to the primary of their slot. docs/decisions/0017-redis-cluster.md.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import ssl
from collections.abc import Callable, Coroutine, Iterable, Sequence

import hiredis
import structlog

from server.realtime.cluster import first_key, greeting, key_slot, read_owners, redirected_to
from server.realtime.link import Address, Answer, Arg, BusAway, Dialer, Link, replied
from server.realtime.shard import Shard

log = structlog.get_logger()

RECONNECT_MIN_S, RECONNECT_MAX_S = 0.05, 1.0
"""Pause before Redis is tried again: doubled after every failure, half of it random."""

REARRANGE_PAUSE_S = 0.2
"""Least time between two looks at who serves which slot, while slots are being moved."""

TRY_AGAIN_S = 0.02
"""Pause before a command is repeated whose keys are half on one shard and half on another."""

REDIRECTS_MAX = 16
"""How often a command is sent again, to another shard or after a pause, before its error is the answer."""


class Script:
    """A Lua script, called by its digest."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.digest = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


class Bus:
    """Publishing, subscribing and small calls, with one word on whether Redis is there: `up`.

    A cluster is there when every one of its shards is: while one is away all links are closed, and everything that is
    watched is read from the table.

    `on_message(channel, payload)` is called for every message of a subscribed channel, in the order of arrival.
    `on_change()` is called when `up` changes, and when channels have moved between shards: something may have been
    missed. Nothing here waits longer than `timeout_s`.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        ping_interval_s: float,
        scripts: Iterable[Script],
        on_message: Callable[[str, bytes], None],
        on_change: Callable[[], None],
    ) -> None:
        self._dialer = Dialer(url, timeout_s)
        self._timeout_s = timeout_s
        self._ping_interval_s = ping_interval_s
        self._scripts = list(scripts)
        self._on_message = on_message
        self._on_change = on_change
        self._known: list[Address] = [self._dialer.address]
        """Whom to ask where the shards are: the URL's node, and the primaries of last time."""
        self._failures = 0
        self._shards: dict[Address, Shard] = {}
        self._slots: list[Shard] = []
        """The shard of each slot; a Redis that is no cluster has one slot. Empty while Redis is away."""
        self._sharded = False
        self._moved: asyncio.Future[Shard] = asyncio.get_running_loop().create_future()
        """Done with the shard that knows better who serves some slot."""
        self._guests: set[Address] = set()
        """Nodes that a command was sent on to, and that serve no slot yet."""
        self._deferred: list[tuple[Sequence[Arg], Answer | None, int]] = []
        """Commands for a shard that is not linked yet."""
        self._wanted: dict[str, int] = {}
        """Channels that shall be subscribed, in the order of asking, and their slots."""
        self._waiters: dict[str, list[asyncio.Future[bool]]] = {}
        self.up = False
        self.reached = asyncio.Event()
        """Set once Redis was reached for the first time."""

    async def run(self) -> None:
        """Keep the connections alive until cancelled."""
        pause_s = RECONNECT_MIN_S
        while True:
            try:
                await self._connect()
                pause_s = RECONNECT_MIN_S
                await self._watch()
            except (OSError, TimeoutError, BusAway, ssl.SSLError) as error:
                self._failures += 1
                log.debug("bus_not_reached", error=str(error))
            except asyncio.CancelledError:
                self.up = False  # we leave it, it does not leave us
                self._drop()
                raise
            self._drop()
            await asyncio.sleep(pause_s * (0.5 + random.random() / 2))
            pause_s = min(pause_s * 2, RECONNECT_MAX_S)

    async def _connect(self) -> None:
        address = self._known[self._failures % len(self._known)]
        link = await self._dialer.open(address)
        try:
            found = await greeting(link, self._timeout_s)
            self._sharded = found.sharded
            if found.cluster:
                await self._arrange(await read_owners(link, self._timeout_s))
                link.abort()
            else:
                await self._arrange([address], link)
        except BaseException:
            link.abort()
            raise
        self.up = True
        self.reached.set()
        log.info("bus_up", channels=len(self._wanted), shards=len(self._shards))
        self._on_change()

    async def _arrange(self, owners: Sequence[Address], only: Link | None = None) -> None:
        """Link every primary and no other, and subscribe every channel at the primary of its slot. Returns when all are
        confirmed. `only`: a link to a Redis that is no cluster."""
        needed, self._guests = {*owners, *self._guests}, set()
        fresh = [self._shard(address, only) for address in needed - self._shards.keys()]
        try:
            await _all(shard.open(self._dialer, [one.source for one in self._scripts], only) for shard in fresh)
        except BaseException:
            for shard in fresh:
                shard.close()
            raise
        for address in self._shards.keys() - needed:
            self._shards.pop(address).close()
        self._shards.update((shard.address, shard) for shard in fresh)
        is_first = not self._slots
        self._slots = [self._shards[address] for address in owners]
        self._known = list(dict.fromkeys((self._dialer.address, *self._shards)))
        if is_first:
            self._wanted = {channel: self._slot_of(channel) for channel in self._wanted}
        for channel, slot in self._wanted.items():
            if channel not in self._slots[slot].told:
                self._slots[slot].want(channel, slot)
        for shard in self._shards.values():
            for channel in shard.told:
                if channel not in self._wanted or self._slots[self._wanted[channel]] is not shard:
                    shard.drop(channel, self._slot_of(channel))
        deferred, self._deferred = self._deferred, []
        for args, answer, tries in deferred:
            self._route(args, answer, tries)
        await _all(shard.synced(self._timeout_s) for shard in self._shards.values())

    def _shard(self, address: Address, only: Link | None) -> Shard:
        return Shard(
            address,
            cluster=only is None,
            sharded=self._sharded,
            on_message=self._on_message,
            on_confirmed=self._confirmed,
            on_moved=self._has_moved,
        )

    async def _watch(self) -> None:
        """Ping all links, and follow the slots where they go; return when a link is closed. Raises TimeoutError: one
        stays silent."""
        while True:
            links = [link for shard in self._shards.values() for link in shard.links]
            if any(link.closed.done() for link in links):
                return
            for link in links:
                link.heard.clear()
                link.send(["PING"])
            async with asyncio.timeout(self._timeout_s):
                for link in links:
                    await link.heard.wait()
            await asyncio.wait(
                (self._moved, *(link.closed for link in links)),
                timeout=self._ping_interval_s,
                return_when="FIRST_COMPLETED",
            )
            if self._moved.done():
                await self._follow()

    async def _follow(self) -> None:
        """Slots have moved: ask who told us where they are."""
        teller = self._moved.result()
        self._moved = asyncio.get_running_loop().create_future()  # before asking, or what moves meanwhile is slept over
        await self._arrange(await read_owners(teller.commands, self._timeout_s))
        log.info("bus_slots_moved", shards=len(self._shards))
        self._on_change()
        await asyncio.sleep(REARRANGE_PAUSE_S)

    def _has_moved(self, teller: Shard) -> None:
        if not self._moved.done():
            self._moved.set_result(teller)

    def _drop(self) -> None:
        shards, self._shards, self._slots = self._shards, {}, []
        for shard in shards.values():
            shard.close()
        self._moved = asyncio.get_running_loop().create_future()
        self._guests.clear()
        deferred, self._deferred = self._deferred, []
        for _, answer, _ in deferred:
            if answer is not None:
                answer(BusAway("the connection to Redis was lost"))
        self._release_waiters()
        if self.up:
            self.up = False
            log.warning("bus_away")
            self._on_change()

    # publishing and calling

    @property
    def publish_command(self) -> str:
        """What publishes here: in a cluster of Redis 7 a channel belongs to the shard of its slot."""
        return "SPUBLISH" if self._sharded else "PUBLISH"

    def publish(self, channel: str, payload: bytes, answer: Answer | None = None) -> None:
        """Publish without waiting. `answer` gets the number of subscribers that Redis knows, or an error."""
        self.send((self.publish_command, channel, payload), answer)

    def send(self, args: Sequence[Arg], answer: Answer | None = None) -> None:
        """Send a command without waiting. It goes to the shard of its first key: its first argument, or the first key
        of EVALSHA."""
        slots = self._slots
        if len(slots) == 1:
            slots[0].commands.send(args, answer)
        else:
            self._route(args, answer, 0)

    async def call(self, *args: Arg) -> object:
        """The reply to a command, which goes where `send` sends it. Raises BusAway."""
        if not self._slots:
            raise BusAway("Redis is away")
        shard = self._slots[self._slot_of(first_key(args)) if len(self._slots) > 1 else 0]
        return await replied(lambda answer: self.send(args, answer), self._timeout_s, shard.commands.abort)

    async def answered(self) -> None:
        """Returns when everything that was sent so far has been answered. Raises BusAway."""
        if not self._slots:
            raise BusAway("Redis is away")
        await _all(shard.commands.call("PING", timeout_s=self._timeout_s) for shard in self._shards.values())

    def load_scripts(self) -> None:
        """Give Redis the scripts again: somebody has flushed them."""
        for shard in self._shards.values():
            for script in self._scripts:
                shard.commands.send(("SCRIPT", "LOAD", script.source))

    def _slot_of(self, name: Arg) -> int:
        return key_slot(name) if len(self._slots) > 1 else 0

    def _route(self, args: Sequence[Arg], answer: Answer | None, tries: int) -> None:
        """Send a command to the shard of its slot; `tries`: how often it was sent before."""
        if self._slots:
            self._send_to(self._slots[self._slot_of(first_key(args))], args, answer, tries)
        elif answer is not None:
            answer(BusAway("Redis is away"))

    def _send_to(self, shard: Shard, args: Sequence[Arg], answer: Answer | None, tries: int) -> None:
        def take(reply: object) -> None:
            if isinstance(reply, hiredis.ReplyError) and self._again(shard, str(reply), args, answer, tries + 1):
                return
            if answer is not None:
                answer(reply)

        shard.commands.send(args, take)

    def _again(self, shard: Shard, error: str, args: Sequence[Arg], answer: Answer | None, tries: int) -> bool:
        """Send a command again that this shard refused because its slot has moved, or is moving; whether it was."""
        kind = error.partition(" ")[0]
        if kind == "CLUSTERDOWN":
            shard.close()  # as any other loss
            return False
        if kind not in ("MOVED", "ASK", "TRYAGAIN") or tries > REDIRECTS_MAX:
            return False
        if kind == "TRYAGAIN":
            asyncio.get_running_loop().call_later(TRY_AGAIN_S, self._route, args, answer, tries)
            return True
        slot, address = redirected_to(error, shard.address)
        target = self._shards.get(address)
        if kind == "MOVED" or target is None:
            self._has_moved(shard)
        if target is None:
            self._guests.add(address)
            self._deferred.append((args, answer, tries))
        elif kind == "ASK":
            target.commands.send(("ASKING",))
            self._send_to(target, args, answer, tries)
        else:
            self._slots[slot] = target
            self._route(args, answer, tries)
        return True

    # subscribing

    def subscribe(self, channel: str) -> asyncio.Future[bool]:
        """Subscribe; the answer is True once Redis confirmed it, False while Redis is away (it will be subscribed when
        Redis is back). All channels of one tick are asked for together."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if not self._slots:
            self._wanted[channel] = 0
            future.set_result(False)
            return future
        slot = self._wanted.get(channel)
        if slot is None:
            slot = self._wanted[channel] = self._slot_of(channel)
        shard = self._slots[slot]
        shard.want(channel, slot)
        if shard.hears(channel):
            future.set_result(True)
        else:
            self._waiters.setdefault(channel, []).append(future)
        return future

    def unsubscribe(self, channel: str) -> None:
        """Unsubscribe. All channels of one tick are let go together."""
        slot = self._wanted.pop(channel, None)
        if slot is not None and self._slots:
            self._slots[slot].drop(channel, slot)
        self._tell(channel, False)

    def _confirmed(self, channel: str) -> None:
        self._tell(channel, True)

    def _tell(self, channel: str, confirmed: bool) -> None:
        for future in self._waiters.pop(channel, ()):
            if not future.done():
                future.set_result(confirmed)

    def _release_waiters(self) -> None:
        for channel in list(self._waiters):
            self._tell(channel, False)


async def _all(awaitables: Iterable[Coroutine[object, object, object]]) -> None:
    """Await all at once and to their ends; raise the first error."""
    for outcome in await asyncio.gather(*awaitables, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
