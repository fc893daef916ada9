"""Who lost the right to hear, on every instance: before anything that was written after it is delivered.

While the bus works, a revocation is a message on it. The bus may lose one, and says nothing while it is away. So what
is read from the table instead of heard is followed by a look at the revocations before anybody gets it, and after an
outage the bus is not believed until they were read. docs/decisions/0016-lifecycle.md.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import msgspec
import structlog

from handlers import users
from models.errors import Unavailable
from server import metrics
from server.auth import Revocations
from server.db import Database
from server.outbox import CONTROL
from server.realtime.bus import Bus
from server.settings import Settings

log = structlog.get_logger()


class RevocationWatch:
    """Keeps `Revocations` as the table has them.

    `end_revoked()` is called when one was added, and shuts the revoked out at once. `on_current()` is called when what
    the bus brings may be delivered again. `known` is set once they were read for the first time.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        bus: Bus,
        revocations: Revocations,
        *,
        known: asyncio.Event,
        end_revoked: Callable[[], None],
        on_current: Callable[[], None],
    ) -> None:
        self._poll_s = settings.revocation_poll_s
        self._outage_poll_s = settings.bus_fallback_poll_ms / 1000
        self._hold_max_s = settings.revocation_hold_max_s
        self._database = database
        self._bus = bus
        self._revocations = revocations
        self._known = known
        self._end_revoked = end_revoked
        self._on_current = on_current
        self._reading = asyncio.Lock()
        self._news: list[users.Revoked] = []
        self._outages = 0
        self._changed = asyncio.Event()
        self._behind_since = asyncio.get_running_loop().time()
        self.current = False
        """Whether all revocations are known that were made before what the bus brings now."""

    def bus_changed(self) -> None:
        """The bus has come or gone: what it said meanwhile was not heard."""
        self.current = False
        self._outages += 1
        self._behind_since = asyncio.get_running_loop().time()
        self._changed.set()

    def tell(self, revoked: users.Revoked) -> None:
        """A revocation that was made here: tell all instances. This one does not wait for the bus: it may be away."""
        self._bus.publish(CONTROL, msgspec.json.encode(revoked))
        self._add(revoked)

    def hear(self, message: bytes) -> None:
        """A revocation from the bus. Raises msgspec.MsgspecError, ValueError."""
        self._add(msgspec.json.decode(message, type=users.Revoked))

    def _add(self, revoked: users.Revoked) -> None:
        self._news.append(revoked)
        self._revocations.add(revoked.kind, revoked.value, revoked.at)
        self._end_revoked()

    async def read(self) -> None:
        """Read all revocations, and shut out whoever is revoked: all that were committed before this was called.

        Raises:
            Unavailable: Postgres is away; what is known stays known.
        """
        async with self._reading:
            outages, heard = self._outages, self._bus.up
            self._news.clear()
            async with self._database.statement() as tx:
                found = await users.revocations(tx)
            self._revocations.load((one.kind, one.value, one.at) for one in found)
            for one in self._news:  # came while we were reading
                self._revocations.add(one.kind, one.value, one.at)
        self._known.set()
        self._end_revoked()
        if heard and outages == self._outages:
            self._believe_the_bus()

    async def run(self) -> None:
        """Read them every now and then, and as soon as the bus has come or gone, until cancelled."""
        while True:
            self._changed.clear()
            wait_s = self._poll_s if self._bus.up else self._outage_poll_s
            try:
                await self.read()
            except Unavailable:
                log.warning("revocations_not_read")
                wait_s = self._outage_poll_s
                if self._bus.up and asyncio.get_running_loop().time() - self._behind_since >= self._hold_max_s:
                    self._give_up_waiting()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()

    def _give_up_waiting(self) -> None:
        """An instance that cannot read the table is not to stay deaf for ever to what the others tell it."""
        if not self.current:
            metrics.revocations_overdue.inc()
            log.warning("bus_believed_without_revocations")
            self._believe_the_bus()

    def _believe_the_bus(self) -> None:
        if not self.current:
            self.current = True
            self._on_current()
