"""The REST door: ROUTES is every URL, with what it takes, what it gives and how it may refuse.

The functions that answer single routes stand with their subject: server/orders.py, server/payments.py and so on. They
get the `Rest` of server/context.py, which all routes share, and a `Call` of server/calls.py, the request as it was
read.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from aiohttp import web

from handlers import audit, cash, jobs, links, orders, reports, users, webhooks
from handlers.checkout import Offers, StartPayment
from handlers.payment_lists import ListPayments, PaymentFilters, PaymentHistory, PaymentPage, ReadHistory
from handlers.payments import AnnotatePayment, CapturePayment, ConfirmPayment, Nothing, VerifyPayment
from handlers.reconciliation import ReadReconciliation
from handlers.refund_lists import ListRefunds, PageOfRefunds, RefundPage
from handlers.refunds import CreateRefund, RefundList, RetryRefund
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
    MoneyMoved,
    NotFound,
    NotRefundable,
    OrderClosed,
    PaymentDeclined,
    PaymentInProgress,
    PaymentRequired,
    Refused,
    TooLarge,
    Unavailable,
)
from models.order import Order, TrackedOrder
from models.payment import Payment
from models.position import Position
from models.reconciliation import Reconciliation
from models.refund import Refund
from models.user import Actor, Role
from server import csv_export
from server.books import (
    HAND_OVER,
    agent_cash,
    analytics,
    daily_stats,
    list_audit,
    take_cash,
    trial_balance,
)
from server.calls import Call, Handler, query, read_json, written
from server.context import Rest
from server.doors import Verb, decode
from server.jobs import dismiss_job, list_jobs, retry_job
from server.links import (
    CreatedLink,
    FollowedLink,
    FollowLink,
    create_payment_link,
    create_tracking_link,
    end_link,
    follow_link,
    revoke,
)
from server.orders import (
    ASSIGN,
    CANCEL,
    QUOTE,
    EventList,
    ReadEvents,
    change_payment_method,
    events,
    export_orders,
    list_orders,
    place,
    read,
)
from server.payments import (
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
from server.positions import Located, PositionBatch, Watchers, locate, watchers
from server.reconciliation import read_reconciliation
from server.refunds import (
    ReadRefund,
    list_refunds,
    read_refund,
    refund_order,
    refund_payment,
    refunds_of_payment,
    retry_refund,
)
from server.sockets import CHANGE_STATUS
from server.webhook_desk import dismiss_webhook, list_webhooks, razorpay_webhook, retry_webhook, stripe_webhook
from server.webhooks import Stored

API = "/api/v1"
UUID = "[0-9a-f-]{36}"
"""How ids look in a path. /orders/quote is no order: it has another method, and says so."""

IN_PATH = {"agent_id": "[^{}/]+", "job_id": "[0-9]{1,19}", "date": "[0-9-]{10}"}
"""How those look that are no UUIDs."""


class Route(NamedTuple):
    """One URL below /api/v1: what it takes (a body, or query parameters for GET), what it gives, and how it may refuse
    besides what every route may."""

    method: str
    path: str
    run: Verb | Callable[[Rest, Call], Awaitable[web.Response]]
    takes: Any = None
    gives: Any = None
    status: int = 200
    doing: str = ""
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

    def does(self, doing: str) -> Route:
        """In a few words, for the documents."""
        return self._replace(doing=doing)

    def may_refuse(self, *kinds: type[Refused]) -> Route:
        return self._replace(refuses=kinds)


_START = (NotFound, Forbidden, OrderClosed, AlreadyPaid, PaymentInProgress, Conflict)
_WRONG = (AmountMismatch, CurrencyMismatch)
_REFUND = (NotFound, Forbidden, ApprovalRequired, NotRefundable, CurrencyMismatch, IllegalMove)

NOBODY = Actor(sub="", role=Role.GUEST, exp=0, orders=frozenset())
"""Who calls a public route."""

ROUTES = [
    Route("POST", "/orders", place, orders.Place, Order, status=201)
    .does("Place an order")
    .may_refuse(Forbidden, Conflict),
    Route("POST", "/orders/quote", QUOTE, orders.Place, orders.Quote)
    .does("What placing it would cost; changes nothing")
    .may_refuse(Forbidden),
    Route("GET", "/orders", list_orders, orders.ListOrders, orders.OrderPage)
    .does("The orders you see, newest first")
    .may_refuse(Forbidden),
    Route("GET", "/orders.csv", export_orders, orders.OrderFilters, Order, media=csv_export.MEDIA)
    .does("The same orders as a file for spreadsheets")
    .may_refuse(Forbidden),
    Route("GET", "/orders/{order_id}", read, gives=Order | TrackedOrder).does("One order").may_refuse(NotFound),
    Route("GET", "/orders/{order_id}/events", events, ReadEvents, EventList).does("Its events").may_refuse(NotFound),
    Route("POST", "/orders/{order_id}/status", CHANGE_STATUS, orders.ChangeStatus, Order)
    .does("Move it to another status")
    .may_refuse(Forbidden, NotFound, IllegalMove, PaymentRequired, Conflict),
    Route("POST", "/orders/{order_id}/assign", ASSIGN, orders.Assign, Order)
    .does("Give it to an agent, or to nobody")
    .may_refuse(Forbidden, NotFound, OrderClosed, Conflict),
    Route("POST", "/orders/{order_id}/cancel", CANCEL, orders.Cancel, Order)
    .does("Cancel it")
    .may_refuse(Forbidden, NotFound, IllegalMove, Conflict),
    Route("POST", "/orders/{order_id}/payment-method", change_payment_method, orders.ChangePaymentMethod, Order)
    .does("Let it be paid in another way")
    .may_refuse(Forbidden, NotFound, OrderClosed, PaymentInProgress, Conflict),
    Route(
        "POST",
        "/orders/{order_id}/location",
        locate,
        dict[str, Any],
        Located,
        body=Position | PositionBatch,
        keyless=True,
    )
    .does("The agent's position, or a batch of them")
    .may_refuse(Forbidden, NotFound, OrderClosed),
    Route("GET", "/orders/{order_id}/watchers", watchers, gives=Watchers)
    .does("How many sockets watch it now")
    .may_refuse(Forbidden, NotFound),
    Route("POST", "/orders/{order_id}/tracking-link", create_tracking_link, links.CreateLink, CreatedLink, status=201)
    .does("A link to follow it without an account")
    .may_refuse(Forbidden, NotFound, Conflict),
    Route("POST", "/orders/{order_id}/payment-link", create_payment_link, links.CreateLink, CreatedLink, status=201)
    .does("A link to pay it without an account")
    .may_refuse(Forbidden, NotFound, Conflict),
    Route("DELETE", "/orders/{order_id}/links/{link_id}", end_link, status=204)
    .does("End a link, and with it every token that it was exchanged for")
    .may_refuse(Forbidden, NotFound),
    Route("POST", "/links/follow", follow_link, FollowLink, FollowedLink, public=True, keyless=True)
    .does("Exchange a link's secret for a guest token")
    .may_refuse(NotFound, LinkExpired),
    Route("POST", "/tokens/revoke", revoke, users.Revoke, status=204)
    .does("End a token, or all tokens of somebody")
    .may_refuse(Forbidden),
    Route("POST", "/payments", start_payment, StartPayment, Payment, status=201, also=(200, 202))
    .does("Begin to pay for an order, or go on with what is open")
    .may_refuse(*_START, *_WRONG, AmountTooSmall, GatewayError),
    Route("GET", "/payments", list_payments, ListPayments, PaymentPage)
    .does("The payments you see, newest first")
    .may_refuse(Forbidden),
    Route("GET", "/payments.csv", export_payments, PaymentFilters, Payment, media=csv_export.MEDIA)
    .does("The same payments as a file for spreadsheets")
    .may_refuse(Forbidden),
    Route("GET", "/payments/providers", payment_providers, gives=Offers)
    .does("What takes payments now")
    .may_refuse(Forbidden),
    Route("GET", "/payments/{payment_id}", read_payment, ReadPayment, Payment)
    .does("One payment")
    .may_refuse(NotFound, Forbidden),
    Route("GET", "/payments/{payment_id}/history", payment_history, ReadHistory, PaymentHistory)
    .does("Everything that reached it, newest first")
    .may_refuse(NotFound, Forbidden),
    Route("POST", "/payments/{payment_id}/verify", verify_payment, VerifyPayment, Payment, also=(202,))
    .does("The browser says that the payer has paid: the gateway is asked")
    .may_refuse(NotFound, Forbidden, InvalidSignature, GatewayError),
    Route("POST", "/payments/{payment_id}/confirm", confirm_payment, ConfirmPayment, Payment, also=(202,))
    .does("Charge a payment method that the browser has collected (Stripe)")
    .may_refuse(NotFound, Forbidden, PaymentDeclined, OrderClosed, AlreadyPaid, Conflict, GatewayError),
    Route("POST", "/payments/{payment_id}/capture", capture_payment, CapturePayment, Payment, also=(202,))
    .does("Take what was authorized")
    .may_refuse(NotFound, Forbidden, MoneyMoved, Conflict, OrderClosed, AlreadyPaid, *_WRONG, GatewayError),
    Route("POST", "/payments/{payment_id}/cancel", cancel_payment, Nothing, Payment, also=(202,))
    .does("Let nobody pay it any more")
    .may_refuse(NotFound, Forbidden, MoneyMoved, PaymentInProgress, GatewayError),
    Route("POST", "/payments/{payment_id}/reconcile", reconcile_payment, Nothing, Payment, also=(202,))
    .does("Ask its gateway now what became of it")
    .may_refuse(NotFound, Forbidden, GatewayError),
    Route("PATCH", "/payments/{payment_id}", annotate_payment, AnnotatePayment, Payment)
    .does("Change what the merchant remembers with it")
    .may_refuse(NotFound, Forbidden),
    Route("DELETE", "/payments/{payment_id}", void_payment, status=204, also=(202,))
    .does("Void a payment that nobody ever tried to pay; it stays in the books as cancelled")
    .may_refuse(NotFound, Forbidden, MoneyMoved, PaymentInProgress, GatewayError),
    Route("POST", "/payments/{payment_id}/refunds", refund_payment, CreateRefund, Refund, status=201, also=(202,))
    .does("Give back money of a payment")
    .may_refuse(*_REFUND),
    Route("POST", "/orders/{order_id}/refunds", refund_order, CreateRefund, RefundList, status=201, also=(202,))
    .does("Give back money of an order, from its newest payment on")
    .may_refuse(*_REFUND),
    Route("GET", "/payments/{payment_id}/refunds", refunds_of_payment, PageOfRefunds, RefundPage)
    .does("Its refunds, newest first")
    .may_refuse(NotFound, Forbidden),
    Route("GET", "/refunds", list_refunds, ListRefunds, RefundPage)
    .does("All refunds, newest first; by `status`, those that are still due")
    .may_refuse(Forbidden),
    Route("GET", "/refunds/{refund_id}", read_refund, ReadRefund, Refund)
    .does("One refund")
    .may_refuse(NotFound, Forbidden),
    Route("POST", "/refunds/{refund_id}/retry", retry_refund, RetryRefund, Refund, also=(202,))
    .does("Ask for one that failed again, or note that it was paid back by hand")
    .may_refuse(NotFound, Forbidden, MoneyMoved, Conflict),
    Route("POST", "/payments/cash", take_cash, cash.TakeCash, Payment, status=201)
    .does("Confirm cash that was taken for an order")
    .may_refuse(Forbidden, NotFound, OrderClosed, AlreadyPaid, AmountMismatch, CurrencyMismatch),
    Route("GET", "/cash/agents/{agent_id}", agent_cash, cash.ReadAgentCash, cash.AgentCash)
    .does("The cash that an agent carries")
    .may_refuse(Forbidden, NotFound),
    Route("POST", "/cash/handovers", HAND_OVER, cash.HandOver, cash.Handover, status=201)
    .does("Take an agent's cash into the till")
    .may_refuse(Forbidden),
    Route("POST", "/webhooks/razorpay", razorpay_webhook, gives=Stored, public=True, keyless=True, signed=True)
    .does("For Razorpay: store a webhook, signed by `X-Razorpay-Signature`")
    .may_refuse(BadSignature, NotFound, TooLarge),
    Route("POST", "/webhooks/stripe", stripe_webhook, gives=Stored, public=True, keyless=True, signed=True)
    .does("For Stripe: store a webhook, signed by `Stripe-Signature`")
    .may_refuse(BadSignature, NotFound, TooLarge),
    Route("GET", "/webhooks", list_webhooks, webhooks.ListWebhooks, webhooks.WebhookPage)
    .does("The webhooks that gateways sent, newest first")
    .may_refuse(Forbidden),
    Route("POST", "/webhooks/{webhook_id}/retry", retry_webhook, webhooks.Retry, webhooks.Webhook)
    .does("Try a dead or parked one again at once")
    .may_refuse(Forbidden, NotFound, Conflict),
    Route("POST", "/webhooks/{webhook_id}/dismiss", dismiss_webhook, webhooks.Dismiss, webhooks.Webhook)
    .does("Never try a dead or parked one again")
    .may_refuse(Forbidden, NotFound, Conflict),
    Route("GET", "/jobs", list_jobs, jobs.ListJobs, jobs.JobPage)
    .does("Background jobs that are not done, newest first")
    .may_refuse(Forbidden),
    Route("POST", "/jobs/{job_id}/retry", retry_job, jobs.RetryJob, jobs.BackgroundJob)
    .does("Run a dead or parked job again")
    .may_refuse(Forbidden, NotFound, Conflict),
    Route("POST", "/jobs/{job_id}/dismiss", dismiss_job, jobs.DismissJob, jobs.BackgroundJob)
    .does("Leave a dead or parked job undone")
    .may_refuse(Forbidden, NotFound, Conflict),
    Route("GET", "/reconciliation/{date}", read_reconciliation, ReadReconciliation, Reconciliation)
    .does("A gateway's books of a day beside ours")
    .may_refuse(Forbidden, NotFound, GatewayError),
    Route("GET", "/payments/stats/daily", daily_stats, reports.DailyStats, reports.Stats)
    .does("What payments did, per day")
    .may_refuse(Forbidden),
    Route("GET", "/payments/analytics", analytics, reports.Analytics, reports.Stats)
    .does("What payments did, per day, week or month, by provider, method or status")
    .may_refuse(Forbidden),
    Route("GET", "/ledger/trial-balance", trial_balance, reports.ReadTrialBalance, reports.TrialBalance)
    .does("The balance of every account of the ledger")
    .may_refuse(Forbidden),
    Route("GET", "/audit", list_audit, audit.ListAudit, audit.AuditPage)
    .does("What staff and services did, newest first")
    .may_refuse(Forbidden),
]


def add_routes(app: web.Application, rest: Rest) -> None:
    for route in ROUTES:
        path = API + re.sub(r"\{(\w+)\}", lambda name: f"{{{name[1]}:{IN_PATH.get(name[1], UUID)}}}", route.path)
        app.router.add_route(route.method, path, _bound(route, rest))


def _bound(route: Route, rest: Rest) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await _handle(rest, route, request)

    return handler


async def _handle(rest: Rest, route: Route, request: web.Request) -> web.StreamResponse:
    """Who asks, what is asked, then the route's verb or function."""
    if not rest.takes_requests():
        raise Unavailable("This instance is starting; try again.")
    if route.signed:
        return await route.run(rest, Call(request, NOBODY, "", None))  # type: ignore[operator]  # never a Verb
    actor = NOBODY
    if route.public:
        await rest.limits.stranger(request)
    else:
        actor = await rest.actor(request)
    command: Any = None
    if route.method == "GET":
        command = query(request, route.takes) if route.takes is not None else None
    elif route.takes is not None:
        command = decode(await read_json(request), route.takes)
    call = Call(request, actor, request.match_info.get("order_id", ""), command)
    if isinstance(route.run, Verb):
        return written(await rest.perform(call, route.run))
    return await route.run(rest, call)
