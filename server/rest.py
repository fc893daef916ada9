"""The REST door: ROUTES is every URL, one line each; the functions below read requests and write answers."""

from __future__ import annotations

import datetime as dt
import math
import re
import time
import uuid
import zoneinfo
from collections.abc import Awaitable, Callable, Hashable
from functools import cache, partial
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol, TypeVar

import msgspec
import structlog
from aiohttp import hdrs, web
from msgspec import Meta
from msgspec import inspect as info

from handlers import audit, cash, jobs, links, orders, reports, tracking, users, webhooks
from handlers.checkout import Offers, StartPayment
from handlers.context import Tx
from handlers.payment_lists import ListPayments, PaymentFilters, PaymentHistory, PaymentPage, ReadHistory
from handlers.payments import AnnotatePayment, CapturePayment, ConfirmPayment, Nothing, VerifyPayment
from handlers.reconciliation import ReadReconciliation
from handlers.refund_lists import ListRefunds, PageOfRefunds, RefundPage
from handlers.refunds import CreateRefund, RefundList, RetryRefund
from models.base import Time, UuidText, rfc3339
from models.errors import (
    AlreadyPaid,
    AmountMismatch,
    AmountTooSmall,
    ApprovalRequired,
    BadSignature,
    Conflict,
    CurrencyMismatch,
    Forbidden,
    GatewayError,
    IllegalMove,
    InvalidSignature,
    LinkExpired,
    Malformed,
    MoneyMoved,
    NotFound,
    NotRefundable,
    OrderClosed,
    PaymentDeclined,
    PaymentInProgress,
    PaymentRequired,
    Refused,
    TooLarge,
    Unauthenticated,
    Unavailable,
    UnsupportedMedia,
)
from models.order import Order, TrackedOrder
from models.payment import Payment, Provider
from models.position import Position
from models.reconciliation import Reconciliation
from models.refund import Refund
from models.user import Actor, Role, Scope
from server import csv_export, metrics
from server.auth import Authenticator, bearer, secret_digest
from server.books import (
    HAND_OVER,
    Books,
    agent_cash,
    analytics,
    daily_stats,
    list_audit,
    take_cash,
    trial_balance,
)
from server.doors import Answer, Doors, Verb, convert, decode
from server.edges import CALLER
from server.limits import Limits
from server.locations import Locations
from server.payments import (
    PaymentVerbs,
    ReadPayment,
    annotate_payment,
    cancel_payment,
    capture_payment,
    confirm_payment,
    export_payments,
    list_payments,
    payment_history,
    payment_providers,
    read_payment,
    reconcile_payment,
    start_payment,
    verify_payment,
    void_payment,
)
from server.presence import Presence
from server.reconciliation import read_reconciliation
from server.refunds import (
    ReadRefund,
    RefundVerbs,
    list_refunds,
    read_refund,
    refund_order,
    refund_payment,
    refunds_of_payment,
    retry_refund,
)
from server.settings import Settings
from server.snapshots import ToldEvent, listed
from server.sockets import CHANGE_STATUS, NextInterval, Sockets
from server.webhooks import Stored, WebhookDoor

log = structlog.get_logger()

API = "/api/v1"
RETRY_AFTER_MS = 1000
"""When to come back after a refusal that does not know it better."""

UUID = "[0-9a-f-]{36}"
"""How ids look in a path. /orders/quote is no order: it has another method, and says so."""

IN_PATH = {"agent_id": "[^{}/]+", "job_id": "[0-9]{1,19}", "date": "[0-9-]{10}"}
"""How those look that are no UUIDs."""

INTEGER = re.compile(r"-?[0-9]{1,20}")
REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Seen(Protocol):
    """Something of an order, and the number of the order's last event before it was read."""

    @property
    def order_id(self) -> str: ...

    @property
    def seq(self) -> int: ...


SeenT = TypeVar("SeenT", bound=Seen)


class Rest:
    """The functions behind the routes, and what they need."""

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
        self._settings = settings
        self._doors = doors
        self._authenticator = authenticator
        self._sockets = sockets
        self._locations = locations
        self._limits = limits
        self._presence = presence
        self._webhook_door = webhook_door
        self.payments = payments
        self.refunds = refunds
        self.seller_zone = zoneinfo.ZoneInfo(settings.seller_time_zone)
        self._on_revoked = on_revoked
        self.books = Books(settings, doors, payments.desk)
        self._takes_requests = takes_requests
        self.public_url = settings.public_url
        """What links start with; the process fills it in when it knows its port."""
        self._place = Verb("place", partial(orders.place, expiry_s=settings.payment_expiry_s), status=201)
        self._change_payment_method = Verb(
            "change_payment_method", partial(orders.change_payment_method, expiry_s=settings.payment_expiry_s)
        )
        self._create_link = {
            scope: Verb(name, partial(self._new_link, scope), status=201)
            for scope, name in ((Scope.TRACK, "create_tracking_link"), (Scope.PAY, "create_payment_link"))
        }

    async def _new_link(
        self, scope: Scope, tx: Tx, actor: Actor, order_id: str, command: links.CreateLink
    ) -> links.Link:
        return await links.create_link(
            tx,
            actor,
            order_id,
            command,
            scope=scope,
            digest=lambda link_id: secret_digest(self._authenticator.link_secret(link_id)),
            ttl_s=self._settings.link_ttl_s,
            ttl_max_s=self._settings.link_ttl_max_s,
        )

    # what needs a setting

    async def place(self, call: Call) -> web.Response:
        return written(await self.perform(call, self._place))

    async def change_payment_method(self, call: Call) -> web.Response:
        return written(await self.perform(call, self._change_payment_method))

    # reads

    async def list_orders(self, call: Call) -> web.Response:
        async with self._doors.database.statement() as tx:
            return answer(await orders.list_orders(tx, call.actor, call.command))

    async def export_orders(self, call: Call) -> web.Response:
        pages = orders.export_orders(self._doors.database.statement, call.actor, call.command)
        return await csv_export.answer("orders.csv", Order, pages)

    async def read(self, call: Call) -> web.Response:
        async with self._doors.database.statement() as tx:
            return answer(await orders.read(tx, call.actor, call.order_id))

    async def wait_for(
        self, call: Call, look: Callable[[], Awaitable[SeenT]], enough: Callable[[SeenT], bool], wait_s: int
    ) -> SeenT:
        """What `look` sees, once it is `enough`, or when `wait_s` (cut to `LONG_POLL_MAX_S`) is over or the instance
        drains. It looks whenever something happens to the order, and holds nothing meanwhile."""
        found = await look()

        async def again() -> tuple[bool, int]:
            nonlocal found
            self._authenticator.check(call.actor)  # whoever has waited may have lost the right to see
            found = await look()
            return enough(found), found.seq

        if wait_s and not enough(found):
            wait_s = min(wait_s, self._settings.long_poll_max_s)
            await self._sockets.rooms.wait(found.order_id, again, wait_s)
        return found

    async def events(self, call: Call) -> web.Response:
        """The order's events. `wait` holds the request, but no database connection, until there are some."""
        asked: ReadEvents = call.command
        found: list[orders.Timeline] = []

        async def look() -> tuple[bool, int]:
            self._authenticator.check(call.actor)  # whoever has waited may have lost the right to hear
            async with self._doors.database.statement() as tx:
                found.append(await orders.events(tx, call.actor, call.order_id, asked.after))
            return bool(found[-1].events), found[-1].seq

        await look()
        wait_s = min(asked.wait, self._settings.long_poll_max_s)
        if wait_s and not found[-1].events:
            await self._sockets.rooms.wait(call.order_id, look, wait_s)
        return answer(EventList(listed(found[-1].events), found[-1].seq))

    # positions

    async def locate(self, call: Call) -> web.Response:
        """One position, or a batch of them; each is judged by itself."""
        body: dict[str, Any] = call.command
        # all are read before one is shown: a request that is refused changes nothing
        found = convert(body, PositionBatch).positions if "positions" in body else [convert(body, Position)]
        if len(found) > self._settings.location_batch_max:
            raise TooLarge(f"One request takes {self._settings.location_batch_max} positions at most.")
        judged = await self._locations.accept(call.actor, call.order_id, found, "-")
        refused = [RefusedPosition(index, refusal.code) for index, refusal in enumerate(judged) if refusal is not None]
        pause_ms = self._locations.next_interval_ms(call.actor.sub, call.order_id)
        return answer(Located(len(found) - len(refused), refused, pause_ms))

    async def watchers(self, call: Call) -> web.Response:
        async with self._doors.database.statement() as tx:
            await tracking.permit_count(tx, call.actor, call.order_id)
        return answer(Watchers(await self._presence.watchers(call.order_id)))

    # links and tokens

    async def create_tracking_link(self, call: Call) -> web.Response:
        return await self._answer_link(call, Scope.TRACK, "track")

    async def create_payment_link(self, call: Call) -> web.Response:
        return await self._answer_link(call, Scope.PAY, "pay")

    async def _answer_link(self, call: Call, scope: Scope, page: str) -> web.Response:
        """A link. Its secrets are made from its id each time the answer is given, and kept nowhere."""
        given = await self.perform(call, self._create_link[scope])
        link = msgspec.json.decode(given.body, type=links.Link)
        token = self._authenticator.guest_token(
            link_id=link.id,
            order_id=link.order_id,
            scope=link.scope,
            expires_at=dt.datetime.fromisoformat(link.expires_at).timestamp(),
        )
        url = f"{self.public_url}/{page}/{self._authenticator.link_secret(link.id)}"
        return answer(CreatedLink(link.id, url, token, link.scope, link.expires_at), status=given.status)

    async def end_link(self, call: Call) -> web.Response:
        async with self._doors.database.statement() as tx:
            link_id = await links.end_link(tx, call.actor, call.order_id, call.request.match_info["link_id"])
        self._on_revoked(users.Revoked("jti", link_id, time.time()))
        return web.Response(status=204)

    async def follow_link(self, call: Call) -> web.Response:
        """Exchange a link's secret for a short guest token."""
        command: FollowLink = call.command
        async with self._doors.database.statement() as tx:
            grant = await links.follow_link(tx, secret_digest(command.secret))
        expires_at = min(grant.expires_at.timestamp(), time.time() + self._settings.guest_token_ttl_s)
        token = self._authenticator.guest_token(
            link_id=grant.link_id, order_id=grant.order_id, scope=grant.scope, expires_at=expires_at
        )
        at = rfc3339(dt.datetime.fromtimestamp(expires_at, dt.UTC))
        return answer(FollowedLink(token, grant.order_id, grant.scope, at))

    async def revoke(self, call: Call) -> web.Response:
        given = await self.perform(call, REVOKE)
        self._on_revoked(msgspec.json.decode(given.body, type=users.Revoked))
        return web.Response(status=204)

    # webhooks

    async def razorpay_webhook(self, call: Call) -> web.Response:
        return await self._webhook_door.receive(call.request, Provider.RAZORPAY)

    async def stripe_webhook(self, call: Call) -> web.Response:
        return await self._webhook_door.receive(call.request, Provider.STRIPE)

    async def list_webhooks(self, call: Call) -> web.Response:
        async with self._doors.database.statement() as tx:
            return answer(await webhooks.list_webhooks(tx, call.actor, call.command))

    async def retry_webhook(self, call: Call) -> web.Response:
        response = await self._decide_webhook(call, RETRY_WEBHOOK)
        self._webhook_door.wake()
        return response

    async def dismiss_webhook(self, call: Call) -> web.Response:
        return await self._decide_webhook(call, DISMISS_WEBHOOK)

    async def _decide_webhook(self, call: Call, verb: Verb) -> web.Response:
        webhook_id, key = call.request.match_info["webhook_id"], call.request.headers.get("Idempotency-Key")
        given = await self._doors.perform(verb, call.actor, webhook_id, call.command, key=key)
        return web.Response(status=given.status, body=given.body, content_type="application/json")

    # background jobs

    async def list_jobs(self, call: Call) -> web.Response:
        async with self._doors.database.statement() as tx:
            return answer(await jobs.list_jobs(tx, call.actor, call.command))

    async def retry_job(self, call: Call) -> web.Response:
        return await self._decide_job(call, RETRY_JOB)

    async def dismiss_job(self, call: Call) -> web.Response:
        return await self._decide_job(call, DISMISS_JOB)

    async def _decide_job(self, call: Call, verb: Verb) -> web.Response:
        job_id, key = call.request.match_info["job_id"], call.request.headers.get("Idempotency-Key")
        return written(await self._doors.perform(verb, call.actor, job_id, call.command, key=key))

    # every route

    async def handle(self, route: Route, request: web.Request) -> web.StreamResponse:
        """Who asks, what is asked, then the route's verb or function."""
        if not self._takes_requests():
            raise Unavailable("This instance is starting; try again.")
        if route.signed:
            return await route.run(self, Call(request, NOBODY, "", None))  # type: ignore[operator]  # never a Verb
        actor = NOBODY
        if route.public:
            await self._limits.stranger(request)
        else:
            actor = await self._actor(request)
        command: Any = None
        if route.method == "GET":
            command = query(request, route.takes) if route.takes is not None else None
        elif route.takes is not None:
            command = decode(await read_json(request), route.takes)
        call = Call(request, actor, request.match_info.get("order_id", ""), command)
        if isinstance(route.run, Verb):
            return written(await self.perform(call, route.run))
        return await route.run(self, call)

    async def _actor(self, request: web.Request) -> Actor:
        try:
            actor = await self._authenticator.actor(bearer(request.headers.get(hdrs.AUTHORIZATION)))
        except Unauthenticated:
            await self._limits.stranger(request)
            raise
        await self._limits.user(request, actor)
        return actor

    async def perform(self, call: Call, verb: Verb) -> Answer:
        args = (call.order_id, call.command) if call.order_id else (call.command,)
        return await self._doors.perform(verb, call.actor, *args, key=call.request.headers.get("Idempotency-Key"))


NOBODY = Actor(sub="", role=Role.GUEST, exp=0, orders=frozenset())
"""Who calls a public route."""


class Call(NamedTuple):
    """A request that was read: by whom, on which order ("" for none), with which command."""

    request: web.Request
    actor: Actor
    order_id: str
    command: Any


class ReadEvents(msgspec.Struct, forbid_unknown_fields=True):
    after: Annotated[int, Meta(ge=0, le=2**31 - 1, description="events after this number")] = 0
    wait: Annotated[int, Meta(ge=0, le=86_400, description="seconds to wait for one; cut to LONG_POLL_MAX_S")] = 0


class EventList(msgspec.Struct):
    """Whole, oldest first."""

    events: list[ToldEvent]
    seq: Annotated[int, Meta(description="number of the order's last event")]


class FollowLink(msgspec.Struct, forbid_unknown_fields=True):
    secret: Annotated[
        str, Meta(min_length=1, max_length=200, description="what follows /track/ or /pay/ in the link's url")
    ]


class FollowedLink(msgspec.Struct, rename="camel"):
    token: Annotated[str, Meta(description="a bearer token, a JWT")]
    order_id: UuidText
    scope: Scope
    expires_at: Time


class CreatedLink(msgspec.Struct, rename="camel"):
    id: UuidText
    url: Annotated[str, Meta(description="for people: opens the page")]
    token: Annotated[str, Meta(description="for programs: a bearer token, a JWT")]
    scope: Scope
    expires_at: Time


class PositionBatch(msgspec.Struct):
    """Positions that were kept while there was no network, each judged by itself."""

    SCHEMA: ClassVar[dict[str, Any]] = {"examples": [{"positions": [*Position.SCHEMA["examples"]]}]}

    positions: Annotated[list[Position], Meta(min_length=1)]


class Watchers(msgspec.Struct):
    watchers: Annotated[int, Meta(description="sockets that watch the order, on all instances; a second old at most")]


class RefusedPosition(msgspec.Struct):
    index: Annotated[int, Meta(description="place in the batch, from 0")]
    code: Annotated[str, Meta(description="stale, future, inaccurate or jump")]


class Located(msgspec.Struct, rename="camel"):
    accepted: int
    refused: list[RefusedPosition]
    next_interval_ms: NextInterval


class Route(NamedTuple):
    """One URL below /api/v1: what it takes (a body, or query parameters for GET), what it gives, and how it may refuse
    besides what every route may."""

    method: str
    path: str
    run: Verb | Callable[[Rest, Call], Awaitable[web.Response]]
    doing: str
    takes: Any = None
    gives: Any = None
    status: int = 200
    refuses: tuple[type[Refused], ...] = ()
    public: bool = False
    also: tuple[int, ...] = ()
    """Other good statuses of the same answer: 200 for what is there already, 202 while the outcome is open."""
    body: Any = None
    """The body for the documents, where the route reads it itself and `takes` is wider."""
    keyless: bool = False
    """An Idempotency-Key changes nothing here."""
    signed: bool = False
    """Public, and signed by whoever sends it: the route reads the raw body, and counts only what is not signed."""
    media: str = "application/json"
    """What the answer is written in; as text/csv, `gives` is what one row shows."""


QUOTE = Verb("quote", orders.quote)
CANCEL = Verb("cancel", orders.cancel)
ASSIGN = Verb("assign", orders.assign, before=orders.before_assign)
REVOKE = Verb("revoke", users.revoke)
RETRY_JOB = Verb("retry_job", jobs.retry_job)
DISMISS_JOB = Verb("dismiss_job", jobs.dismiss_job)
RETRY_WEBHOOK = Verb("retry_webhook", webhooks.retry_webhook)
DISMISS_WEBHOOK = Verb("dismiss_webhook", webhooks.dismiss_webhook)

ROUTES = [
    Route("POST", "/orders", Rest.place, "Place an order", orders.Place, Order, 201, (Forbidden, Conflict)),
    Route(
        "POST",
        "/orders/quote",
        QUOTE,
        "What placing it would cost; changes nothing",
        orders.Place,
        orders.Quote,
        200,
        (Forbidden,),
    ),
    Route(
        "GET",
        "/orders",
        Rest.list_orders,
        "The orders you see, newest first",
        orders.ListOrders,
        orders.OrderPage,
        200,
        (Forbidden,),
    ),
    Route(
        "GET",
        "/orders.csv",
        Rest.export_orders,
        "The same orders as a file for spreadsheets",
        orders.OrderFilters,
        Order,
        200,
        (Forbidden,),
        media=csv_export.MEDIA,
    ),
    Route("GET", "/orders/{order_id}", Rest.read, "One order", None, Order | TrackedOrder, 200, (NotFound,)),
    Route("GET", "/orders/{order_id}/events", Rest.events, "Its events", ReadEvents, EventList, 200, (NotFound,)),
    Route(
        "POST",
        "/orders/{order_id}/status",
        CHANGE_STATUS,
        "Move it to another status",
        orders.ChangeStatus,
        Order,
        200,
        (Forbidden, NotFound, IllegalMove, PaymentRequired, Conflict),
    ),
    Route(
        "POST",
        "/orders/{order_id}/assign",
        ASSIGN,
        "Give it to an agent, or to nobody",
        orders.Assign,
        Order,
        200,
        (Forbidden, NotFound, OrderClosed, Conflict),
    ),
    Route(
        "POST",
        "/orders/{order_id}/cancel",
        CANCEL,
        "Cancel it",
        orders.Cancel,
        Order,
        200,
        (Forbidden, NotFound, IllegalMove, Conflict),
    ),
    Route(
        "POST",
        "/orders/{order_id}/payment-method",
        Rest.change_payment_method,
        "Let it be paid in another way",
        orders.ChangePaymentMethod,
        Order,
        200,
        (Forbidden, NotFound, OrderClosed, PaymentInProgress, Conflict),
    ),
    Route(
        "POST",
        "/orders/{order_id}/location",
        Rest.locate,
        "The agent's position, or a batch of them",
        dict[str, Any],
        Located,
        200,
        (Forbidden, NotFound, OrderClosed),
        body=Position | PositionBatch,
        keyless=True,
    ),
    Route(
        "GET",
        "/orders/{order_id}/watchers",
        Rest.watchers,
        "How many sockets watch it now",
        None,
        Watchers,
        200,
        (Forbidden, NotFound),
    ),
    Route(
        "POST",
        "/orders/{order_id}/tracking-link",
        Rest.create_tracking_link,
        "A link to follow it without an account",
        links.CreateLink,
        CreatedLink,
        201,
        (Forbidden, NotFound, Conflict),
    ),
    Route(
        "POST",
        "/orders/{order_id}/payment-link",
        Rest.create_payment_link,
        "A link to pay it without an account",
        links.CreateLink,
        CreatedLink,
        201,
        (Forbidden, NotFound, Conflict),
    ),
    Route(
        "DELETE",
        "/orders/{order_id}/links/{link_id}",
        Rest.end_link,
        "End a link, and with it every token that it was exchanged for",
        None,
        None,
        204,
        (Forbidden, NotFound),
    ),
    Route(
        "POST",
        "/links/follow",
        Rest.follow_link,
        "Exchange a link's secret for a guest token",
        FollowLink,
        FollowedLink,
        200,
        (NotFound, LinkExpired),
        public=True,
        keyless=True,
    ),
    Route(
        "POST",
        "/tokens/revoke",
        Rest.revoke,
        "End a token, or all tokens of somebody",
        users.Revoke,
        None,
        204,
        (Forbidden,),
    ),
    Route(
        "POST",
        "/webhooks/razorpay",
        Rest.razorpay_webhook,
        "For Razorpay: store a webhook, signed by `X-Razorpay-Signature`",
        None,
        Stored,
        200,
        (BadSignature, NotFound, TooLarge),
        public=True,
        keyless=True,
        signed=True,
    ),
    Route(
        "POST",
        "/webhooks/stripe",
        Rest.stripe_webhook,
        "For Stripe: store a webhook, signed by `Stripe-Signature`",
        None,
        Stored,
        200,
        (BadSignature, NotFound, TooLarge),
        public=True,
        keyless=True,
        signed=True,
    ),
    Route(
        "GET",
        "/webhooks",
        Rest.list_webhooks,
        "The webhooks that gateways sent, newest first",
        webhooks.ListWebhooks,
        webhooks.WebhookPage,
        200,
        (Forbidden,),
    ),
    Route(
        "POST",
        "/webhooks/{webhook_id}/retry",
        Rest.retry_webhook,
        "Try a dead or parked one again at once",
        webhooks.Retry,
        webhooks.Webhook,
        200,
        (Forbidden, NotFound, Conflict),
    ),
    Route(
        "POST",
        "/webhooks/{webhook_id}/dismiss",
        Rest.dismiss_webhook,
        "Never try a dead or parked one again",
        webhooks.Dismiss,
        webhooks.Webhook,
        200,
        (Forbidden, NotFound, Conflict),
    ),
    Route(
        "GET",
        "/reconciliation/{date}",
        read_reconciliation,
        "A gateway's books of a day beside ours",
        ReadReconciliation,
        Reconciliation,
        200,
        (Forbidden, NotFound, GatewayError),
    ),
    Route(
        "GET",
        "/jobs",
        Rest.list_jobs,
        "Background jobs that are not done, newest first",
        jobs.ListJobs,
        jobs.JobPage,
        200,
        (Forbidden,),
    ),
    Route(
        "POST",
        "/jobs/{job_id}/retry",
        Rest.retry_job,
        "Run a dead or parked job again",
        jobs.RetryJob,
        jobs.BackgroundJob,
        200,
        (Forbidden, NotFound, Conflict),
    ),
    Route(
        "POST",
        "/jobs/{job_id}/dismiss",
        Rest.dismiss_job,
        "Leave a dead or parked job undone",
        jobs.DismissJob,
        jobs.BackgroundJob,
        200,
        (Forbidden, NotFound, Conflict),
    ),
    Route(
        "POST",
        "/payments/cash",
        take_cash,
        "Confirm cash that was taken for an order",
        cash.TakeCash,
        Payment,
        201,
        (Forbidden, NotFound, OrderClosed, AlreadyPaid, AmountMismatch, CurrencyMismatch),
    ),
    Route(
        "GET",
        "/payments/stats/daily",
        daily_stats,
        "What payments did, per day",
        reports.DailyStats,
        reports.Stats,
        200,
        (Forbidden,),
    ),
    Route(
        "GET",
        "/payments/analytics",
        analytics,
        "What payments did, per day, week or month, by provider, method or status",
        reports.Analytics,
        reports.Stats,
        200,
        (Forbidden,),
    ),
    Route(
        "GET",
        "/cash/agents/{agent_id}",
        agent_cash,
        "The cash that an agent carries",
        cash.ReadAgentCash,
        cash.AgentCash,
        200,
        (Forbidden, NotFound),
    ),
    Route(
        "POST",
        "/cash/handovers",
        HAND_OVER,
        "Take an agent's cash into the till",
        cash.HandOver,
        cash.Handover,
        201,
        (Forbidden,),
    ),
    Route(
        "GET",
        "/ledger/trial-balance",
        trial_balance,
        "The balance of every account of the ledger",
        reports.ReadTrialBalance,
        reports.TrialBalance,
        200,
        (Forbidden,),
    ),
    Route(
        "GET",
        "/audit",
        list_audit,
        "What staff and services did, newest first",
        audit.ListAudit,
        audit.AuditPage,
        200,
        (Forbidden,),
    ),
]

_START = (NotFound, Forbidden, OrderClosed, AlreadyPaid, PaymentInProgress, Conflict)
_WRONG = (AmountMismatch, CurrencyMismatch)

PAYMENT_ROUTES = [
    Route(
        "POST",
        "/payments",
        start_payment,
        "Begin to pay for an order, or go on with what is open",
        StartPayment,
        Payment,
        201,
        (*_START, *_WRONG, AmountTooSmall, GatewayError),
        also=(200, 202),
    ),
    Route(
        "GET",
        "/payments",
        list_payments,
        "The payments you see, newest first",
        ListPayments,
        PaymentPage,
        200,
        (Forbidden,),
    ),
    Route(
        "GET",
        "/payments.csv",
        export_payments,
        "The same payments as a file for spreadsheets",
        PaymentFilters,
        Payment,
        200,
        (Forbidden,),
        media=csv_export.MEDIA,
    ),
    Route("GET", "/payments/providers", payment_providers, "What takes payments now", None, Offers, 200, (Forbidden,)),
    Route(
        "GET", "/payments/{payment_id}", read_payment, "One payment", ReadPayment, Payment, 200, (NotFound, Forbidden)
    ),
    Route(
        "GET",
        "/payments/{payment_id}/history",
        payment_history,
        "Everything that reached it, newest first",
        ReadHistory,
        PaymentHistory,
        200,
        (NotFound, Forbidden),
    ),
    Route(
        "POST",
        "/payments/{payment_id}/verify",
        verify_payment,
        "The browser says that the payer has paid: the gateway is asked",
        VerifyPayment,
        Payment,
        200,
        (NotFound, Forbidden, InvalidSignature, GatewayError),
        also=(202,),
    ),
    Route(
        "POST",
        "/payments/{payment_id}/confirm",
        confirm_payment,
        "Charge a payment method that the browser has collected (Stripe)",
        ConfirmPayment,
        Payment,
        200,
        (NotFound, Forbidden, PaymentDeclined, OrderClosed, AlreadyPaid, Conflict, GatewayError),
        also=(202,),
    ),
    Route(
        "POST",
        "/payments/{payment_id}/capture",
        capture_payment,
        "Take what was authorized",
        CapturePayment,
        Payment,
        200,
        (NotFound, Forbidden, MoneyMoved, Conflict, PaymentInProgress, OrderClosed, AlreadyPaid, *_WRONG, GatewayError),
        also=(202,),
    ),
    Route(
        "POST",
        "/payments/{payment_id}/cancel",
        cancel_payment,
        "Let nobody pay it any more",
        Nothing,
        Payment,
        200,
        (NotFound, Forbidden, MoneyMoved, PaymentInProgress, GatewayError),
        also=(202,),
    ),
    Route(
        "POST",
        "/payments/{payment_id}/reconcile",
        reconcile_payment,
        "Ask its gateway now what became of it",
        Nothing,
        Payment,
        200,
        (NotFound, Forbidden, GatewayError),
        also=(202,),
    ),
    Route(
        "PATCH",
        "/payments/{payment_id}",
        annotate_payment,
        "Change what the merchant remembers with it",
        AnnotatePayment,
        Payment,
        200,
        (NotFound, Forbidden),
    ),
    Route(
        "DELETE",
        "/payments/{payment_id}",
        void_payment,
        "Void a payment that nobody ever tried to pay; it stays in the books as cancelled",
        None,
        None,
        204,
        (NotFound, Forbidden, MoneyMoved, PaymentInProgress, GatewayError),
        also=(202,),
    ),
]
ROUTES += PAYMENT_ROUTES

_REFUND = (NotFound, Forbidden, ApprovalRequired, NotRefundable, CurrencyMismatch, IllegalMove)

REFUND_ROUTES = [
    Route(
        "POST",
        "/payments/{payment_id}/refunds",
        refund_payment,
        "Give back money of a payment",
        CreateRefund,
        Refund,
        201,
        _REFUND,
        also=(202,),
    ),
    Route(
        "POST",
        "/orders/{order_id}/refunds",
        refund_order,
        "Give back money of an order, from its newest payment on",
        CreateRefund,
        RefundList,
        201,
        _REFUND,
        also=(202,),
    ),
    Route(
        "GET",
        "/payments/{payment_id}/refunds",
        refunds_of_payment,
        "Its refunds, newest first",
        PageOfRefunds,
        RefundPage,
        200,
        (NotFound, Forbidden),
    ),
    Route(
        "GET",
        "/refunds",
        list_refunds,
        "All refunds, newest first; by `status`, those that are still due",
        ListRefunds,
        RefundPage,
        200,
        (Forbidden,),
    ),
    Route("GET", "/refunds/{refund_id}", read_refund, "One refund", ReadRefund, Refund, 200, (NotFound, Forbidden)),
    Route(
        "POST",
        "/refunds/{refund_id}/retry",
        retry_refund,
        "Ask for one that failed again, or note that it was paid back by hand",
        RetryRefund,
        Refund,
        200,
        (NotFound, Forbidden, MoneyMoved, Conflict),
        also=(202,),
    ),
]
ROUTES += REFUND_ROUTES


def add_routes(app: web.Application, rest: Rest) -> None:
    for route in ROUTES:
        path = API + re.sub(r"\{(\w+)\}", lambda name: f"{{{name[1]}:{IN_PATH.get(name[1], UUID)}}}", route.path)
        app.router.add_route(route.method, path, _bound(route, rest))


def _bound(route: Route, rest: Rest) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await rest.handle(route, request)

    return handler


def written(given: Answer) -> web.Response:
    return web.Response(status=given.status, body=given.body, content_type="application/json")


def answer(value: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")


async def read_json(request: web.Request) -> bytes:
    """The body of a request that may carry JSON; empty when there is none.

    Raises:
        UnsupportedMedia: it says that it carries something else. TooLarge: above `BODY_MAX_BYTES`.
    """
    if not request.can_read_body:
        return b""
    if request.content_type != "application/json" or (request.charset or "utf-8").lower() not in ("utf-8", "utf8"):
        raise UnsupportedMedia("Send application/json in UTF-8.")
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise UnsupportedMedia("Send the body as it is, without Content-Encoding.")
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise TooLarge("The body is larger than this server takes.") from None
    except web.RequestPayloadError:
        raise Malformed("The body is cut off, or is not what its headers say.") from None


def query(request: web.Request, type_: Any) -> Any:
    """The query parameters as a command. A repeated parameter is malformed."""
    given = request.query
    if len(set(given)) != len(given):
        raise Malformed("A query parameter is given twice.")
    # only what is an integer by its type is read as one: msgspec's lax mode also takes `1e1`, and 0 for a time
    integers = _integers(type_)
    read = {
        name: int(value) if name in integers and INTEGER.fullmatch(value) else value for name, value in given.items()
    }
    return convert(read, type_)


@cache
def _integers(type_: Hashable) -> frozenset[str]:
    """The members of a command that are integers."""
    command = info.type_info(type_)
    assert isinstance(command, info.StructType)
    return frozenset(field.encode_name for field in command.fields if _is_integer(field.type))


def _is_integer(type_: info.Type) -> bool:
    if isinstance(type_, info.Metadata):
        return _is_integer(type_.type)
    if isinstance(type_, info.UnionType):
        return any(_is_integer(one) for one in type_.types)
    return isinstance(type_, info.IntType)


def error_page(kind: type[Refused]) -> str:
    """Where the refusal is explained: the `type` of its problem."""
    return f"/docs#error-{kind.code}"


def problem(refusal: Refused, request_id: str) -> web.Response:
    """A refusal as RFC 9457 says it."""
    body = {
        "type": error_page(type(refusal)),
        "title": refusal.title,
        "status": refusal.status,
        "detail": refusal.detail,
        "code": refusal.code,
        "requestId": request_id,
        **refusal.fields,
    }
    response = web.Response(
        status=refusal.status, body=msgspec.json.encode(body), content_type="application/problem+json"
    )
    if refusal.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if refusal.status in (429, 503):
        wait_ms = refusal.fields.get("retryAfterMs", RETRY_AFTER_MS)
        assert isinstance(wait_ms, int)
        response.headers["Retry-After"] = str(math.ceil(wait_ms / 1000))
    return response


class _Broken(Refused):
    code, status, title = "internal", 500, "This failed on our side"


class MethodNotAllowed(Refused):
    code, status, title = "not_found", 405, "The method is not supported here"


@web.middleware
async def edge(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Around every request: its id, its refusal as an answer, its log line and its measurements."""
    began = time.perf_counter()
    given = request.headers.get("X-Request-Id", "")
    request_id = given if REQUEST_ID.fullmatch(given) else str(uuid.uuid4())
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(request_id=request_id)
    if "order_id" in request.match_info:
        structlog.contextvars.bind_contextvars(order_id=request.match_info["order_id"][:64])
    try:
        response = await handler(request)
    except Refused as refusal:
        response = problem(refusal, request_id)
    except web.HTTPMethodNotAllowed as error:
        response = problem(MethodNotAllowed(f"Use {', '.join(sorted(error.allowed_methods))}."), request_id)
        response.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
    except web.HTTPNotFound:
        response = problem(NotFound("There is nothing at this address; GET /docs lists the routes."), request_id)
    except web.HTTPException:
        raise
    except ConnectionResetError:
        raise
    except Exception:
        log.exception("request_failed", method=request.method, route=_route_of(request))
        response = problem(_Broken("The request failed; nothing is known of its outcome. Try again."), request_id)
    if not response.prepared:
        response.headers["X-Request-Id"] = request_id
    route = _route_of(request)
    seconds = time.perf_counter() - began
    metrics.requests.labels(request.method, route, response.status).inc()
    if response.status == 101:
        return response  # a socket's life is no request's time
    metrics.request_seconds.labels(request.method, route).observe(seconds)
    client, ms = request[CALLER].address if CALLER in request else None, round(seconds * 1000, 1)
    log.info("request", method=request.method, route=route, status=response.status, ms=ms, client=client)
    return response


def _route_of(request: web.Request) -> str:
    """The route as it is declared: an address may hold a secret."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "none"
