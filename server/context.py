"""What the functions of the REST door get besides their call."""

from __future__ import annotations

import zoneinfo
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from aiohttp import hdrs, web

from handlers import users
from models.errors import Unauthenticated
from models.user import Actor
from server.auth import Authenticator, bearer
from server.calls import Call
from server.doors import Answer, Doors, Verb
from server.limits import Limits
from server.locations import Locations
from server.presence import Presence
from server.settings import Settings
from server.sockets import Sockets
from server.verbs import Books, LinkVerbs, OrderVerbs, PaymentVerbs, RefundVerbs
from server.webhooks import WebhookDoor


class Seen(Protocol):
    """Something of an order, and the number of the order's last event before it was read."""

    @property
    def order_id(self) -> str: ...

    @property
    def seq(self) -> int: ...


SeenT = TypeVar("SeenT", bound=Seen)


class Rest:
    """The parts of the process that routes need, and what all routes do with them."""

    def __init__(
        self,
        settings: Settings,
        doors: Doors,
        authenticator: Authenticator,
        sockets: Sockets,
        locations: Locations,
        limits: Limits,
        presence: Presence,
        webhook_door: WebhookDoor,
        payments: PaymentVerbs,
        refunds: RefundVerbs,
        on_revoked: Callable[[users.Revoked], None],
        takes_requests: Callable[[], bool],
    ) -> None:
        self.settings = settings
        self.doors = doors
        self.authenticator = authenticator
        self.sockets = sockets
        self.locations = locations
        self.limits = limits
        self.presence = presence
        self.webhook_door = webhook_door
        self.payments = payments
        self.refunds = refunds
        self.seller_zone = zoneinfo.ZoneInfo(settings.seller_time_zone)
        self.on_revoked = on_revoked
        self.books = Books(settings, doors, payments.desk)
        self.orders = OrderVerbs(settings)
        self.links = LinkVerbs(settings, authenticator)
        self.takes_requests = takes_requests
        self.public_url = settings.public_url
        """What links start with; the process fills it in when it knows its port."""

    async def actor(self, request: web.Request) -> Actor:
        try:
            actor = await self.authenticator.actor(bearer(request.headers.get(hdrs.AUTHORIZATION)))
        except Unauthenticated:
            await self.limits.stranger(request)
            raise
        await self.limits.user(request, actor)
        return actor

    async def perform(self, call: Call, verb: Verb) -> Answer:
        args = (call.order_id, call.command) if call.order_id else (call.command,)
        return await self.doors.perform(verb, call.actor, *args, key=call.request.headers.get("Idempotency-Key"))

    async def wait_for(
        self, call: Call, look: Callable[[], Awaitable[SeenT]], enough: Callable[[SeenT], bool], wait_s: int
    ) -> SeenT:
        """What `look` sees, once it is `enough`, or when `wait_s` (cut to `LONG_POLL_MAX_S`) is over or the instance
        drains. It looks whenever something happens to the order, and holds nothing meanwhile."""
        found = await look()

        async def again() -> tuple[bool, int]:
            nonlocal found
            self.authenticator.check(call.actor)  # whoever has waited may have lost the right to see
            found = await look()
            return enough(found), found.seq

        if wait_s and not enough(found):
            wait_s = min(wait_s, self.settings.long_poll_max_s)
            await self.sockets.rooms.wait(found.order_id, again, wait_s)
        return found
