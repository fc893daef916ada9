"""One Redis of the bus, alone or one primary of a cluster: a link for commands and a link that listens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import hiredis
import structlog

from server.realtime.cluster import check_state, key_slot
from server.realtime.link import Address, BusAway, Dialer, Link

log = structlog.get_logger()

SUBSCRIBE_BATCH_MAX = 500
"""Most channels in one SUBSCRIBE or UNSUBSCRIBE."""

SYNCED = b"synced"
"""Echoed by Redis after the confirmations of all channels that were asked for before it."""


class Shard:
    """Both links, and the channels that are subscribed here.

    `on_message(channel, payload)` is called for every message, `on_confirmed(channel)` when Redis has taken a
    subscription, `on_moved(self)` when it refuses or ends one because the channel's slot is another shard's now.
    """

    def __init__(
        self,
        address: Address,
        *,
        cluster: bool,
        sharded: bool,
        on_message: Callable[[str, bytes], None],
        on_confirmed: Callable[[str], None],
        on_moved: Callable[[Shard], None],
    ) -> None:
        self.address = address
        self._cluster = cluster
        self._sharded = sharded
        self._on_message = on_message
        self._on_confirmed = on_confirmed
        self._on_moved = on_moved
        self.commands: Link
        self._listener: Link
        self._opened: list[Link] = []
        self._wanted: set[str] = set()
        self.told: set[str] = set()
        """Channels of which Redis was last told that we want them."""
        self._asked: dict[str, int] = {}
        """SUBSCRIBEs of a channel that Redis has not answered yet."""
        self._touched: dict[str, int] = {}
        """Channels of this tick that were wanted or dropped, with their slots."""
        self._synced: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def open(self, dialer: Dialer, scripts: Iterable[str], commands: Link | None = None) -> None:
        """Open both links, or the second one. Raises what `Dialer.open` raises."""
        try:
            self.commands = commands or await dialer.open(self.address)
            self._opened.append(self.commands)
            if self._cluster:
                await check_state(self.commands, dialer.timeout_s)
            for source in scripts:
                await self.commands.call("SCRIPT", "LOAD", source, timeout_s=dialer.timeout_s)
            self._listener = await dialer.open(self.address, self._push)
            self._opened.append(self._listener)
        except BaseException:
            self.close()
            raise

    @property
    def links(self) -> tuple[Link, Link]:
        return self.commands, self._listener

    def close(self) -> None:
        for link in self._opened:
            link.abort()

    # channels

    def hears(self, channel: str) -> bool:
        """Whether Redis has confirmed the channel."""
        return channel in self.told and channel in self._wanted and channel not in self._asked

    def want(self, channel: str, slot: int) -> None:
        """Subscribe, together with all channels of this tick."""
        self._wanted.add(channel)
        self._touch(channel, slot)

    def drop(self, channel: str, slot: int) -> None:
        """Unsubscribe, together with all channels of this tick."""
        self._wanted.discard(channel)
        self._touch(channel, slot)

    def _touch(self, channel: str, slot: int) -> None:
        if not self._touched:
            asyncio.get_running_loop().call_soon(self._flush)
        self._touched[channel] = slot

    def _flush(self) -> None:
        """Tell Redis what this tick has changed. Sharded channels of different slots cannot stand in one command."""
        touched, self._touched = self._touched, {}
        joined: dict[int, list[str]] = {}
        left: dict[int, list[str]] = {}
        for channel, slot in touched.items():
            group = slot if self._sharded else 0
            wanted = channel in self._wanted
            if wanted and channel not in self.told:
                self.told.add(channel)
                self._asked[channel] = self._asked.get(channel, 0) + 1
                joined.setdefault(group, []).append(channel)
            elif not wanted and channel in self.told:
                self.told.discard(channel)
                left.setdefault(group, []).append(channel)
        for verb, groups in (("UNSUBSCRIBE", left), ("SUBSCRIBE", joined)):
            for channels in groups.values():
                for start in range(0, len(channels), SUBSCRIBE_BATCH_MAX):
                    batch = channels[start : start + SUBSCRIBE_BATCH_MAX]
                    self._listener.send(("S" + verb if self._sharded else verb, *batch))

    async def synced(self, timeout_s: float) -> None:
        """Returns when Redis has confirmed every channel that was wanted so far: what is published from now on arrives,
        so whoever looks for gaps next misses nothing. Raises TimeoutError, BusAway."""
        self._synced = asyncio.get_running_loop().create_future()
        self._flush()
        self._listener.send(("PING", SYNCED))
        async with asyncio.timeout(timeout_s):
            await asyncio.wait((self._synced, self._listener.closed), return_when="FIRST_COMPLETED")
        if not self._synced.done():
            raise BusAway("the connection to Redis was lost")

    # what comes in

    def _push(self, reply: Any) -> None:
        if not isinstance(reply, list):  # an answer to PING has this form while no channel is subscribed
            if isinstance(reply, hiredis.ReplyError):
                self._refused(str(reply))
            elif reply == SYNCED and not self._synced.done():
                self._synced.set_result(None)
            return
        kind = reply[0]
        if kind in (b"message", b"smessage"):
            self._on_message(reply[1].decode(), reply[2])
        elif kind == b"pong":
            self._push(reply[1])
        elif kind in (b"subscribe", b"ssubscribe"):
            channel = reply[1].decode()
            self._asked[channel] = unanswered = self._asked.get(channel, 1) - 1
            if unanswered:
                return  # left and joined again meanwhile: only the last confirmation counts
            del self._asked[channel]
            if self.hears(channel):
                self._on_confirmed(channel)
        elif kind == b"sunsubscribe":
            channel = reply[1].decode()
            if channel in self.told and channel not in self._asked:  # not by our wish
                self.told.discard(channel)
                self._on_moved(self)

    def _refused(self, error: str) -> None:
        """A subscription was refused."""
        kind, _, rest = error.partition(" ")
        if kind == "MOVED":
            slot = int(rest.split(" ")[0])
            for channel in [one for one in self._asked if key_slot(one) == slot]:
                del self._asked[channel]
                self.told.discard(channel)
            self._on_moved(self)
            return
        log.warning("subscription_refused", error=error)
        if kind == "CLUSTERDOWN":
            self.close()  # as any other loss
