"""A simulator of Razorpay, over real HTTP on this machine only: its API, its webhooks, and a page on which to pay.

It takes test keys only, moves no money, and says so. What it cannot show: real rate limits, settlements and banks.
A payer's actions are methods here, buttons on `/checkout/{order_id}`, and `POST /sandbox/orders/{order_id}/{action}`.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import random
import secrets
import string
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from server.adapters.sandbox import checkout
from server.adapters.sandbox.courier import Courier, Parcel
from server.adapters.sandbox.mischief import Mischief, meet_fault, mischief_routes
from server.adapters.sandbox.razorpay_books import (
    ACCOUNT,
    CANCELLED,
    DECLINED,
    ApiError,
    Books,
    SimPayment,
    SimRefund,
    State,
    refund_body,
)

log = structlog.get_logger()

LATER_S = (6, 19, 39.5, 82, 164, 326, 650, 1293, 2577, 5140, 10_267, 20_508, 40_989, 81_953)
"""Seconds from the first attempt to deliver a webhook to each later one, as measured on real ones."""
SOON_S = (0.23, *LATER_S)
"""The same for the kinds that are repeated at once."""
SOON = frozenset({"payment.authorized", "payment.captured", "order.paid"})

ANSWER_LIMIT_S = 5
"""A webhook that is answered later counts as not delivered."""

SAVE_AFTER_S = 0.2
"""How long after a change the file is written, in one go with what changes meanwhile."""

PAGE_HTML = Path(__file__).with_name("razorpay_checkout.html")

LIST_DEFAULT, LIST_MAX = 10, 100


class RazorpaySandbox:
    """`courier.url` is where webhooks go; while it is empty, none are sent. `pace`: Razorpay's pauses between
    deliveries are multiplied by it. `file`: where orders and payments are kept over a restart; None: nowhere.

    Raises:
        ValueError: the key is a live one.
    """

    def __init__(
        self,
        key_id: str,
        key_secret: str,
        webhook_secret: str,
        webhook_url: str = "",
        *,
        clock: Callable[[], float] = time.time,
        pace: float = 1,
        file: Path | None = None,
        seed: int | None = None,
    ) -> None:
        if not key_id.startswith("rzp_test_"):
            raise ValueError("The simulator of Razorpay takes keys that begin with rzp_test_ only.")
        self._key_id, self._key_secret = key_id, key_secret
        self.webhook_secret = webhook_secret
        """What signs events from now on; those that are under way keep theirs."""
        self._clock, self._file = clock, file
        self._random = random.Random(seed)
        self.mischief = Mischief()
        self.courier = Courier(
            webhook_url,
            self.mischief,
            pace=pace,
            answer_limit_s=ANSWER_LIMIT_S,
            seed=self._random.getrandbits(64),
        )
        state = msgspec.json.decode(file.read_bytes(), type=State) if file and file.exists() else State()
        self.books = Books(state, self.mischief, clock, self._emit, self._random.getrandbits(64))
        self._runner: web.AppRunner | None = None
        self._port = 0
        self._stopping = asyncio.Event()
        self._saving: asyncio.TimerHandle | None = None
        self._later: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        return f"http://127.0.0.1:{self._port}"

    async def start(self) -> None:
        """Listen on a free port, or after `stop` on the same one."""
        self._stopping.clear()
        self._runner = web.AppRunner(self._application(), access_log=None, shutdown_timeout=0.5)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self._port = self._runner.addresses[0][1]
        await self.courier.start()
        log.info("sandbox_listening", provider="razorpay", url=self.url, note="a simulator: no money moves")

    async def stop(self) -> None:
        """Stop listening and delivering."""
        self._stopping.set()
        for task in self._later:
            task.cancel()
        await asyncio.gather(*self._later, return_exceptions=True)
        if self._runner:
            await self._runner.cleanup()
        await self.courier.stop()
        if self._saving:
            self._saving.cancel()
            self._save()

    # what payers and banks do

    def pay(self, order_id: str, method: str = "upi") -> dict[str, str]:
        """Pay with success. Returns what the checkout hands to the merchant's page."""
        return self._signed(self.books.succeed(self._begin(order_id, method).id))

    def begin(self, order_id: str, method: str = "upi") -> SimPayment:
        """Begin to pay; `finish` or `fail_attempt` tells how it ends."""
        return self._begin(order_id, method)

    def fail(self, order_id: str, method: str = "card") -> SimPayment:
        """Be declined. `finish` with this payment is the late authorization."""
        return self._changed(self.books.fail(self._begin(order_id, method).id, dict(DECLINED)))

    def cancel(self, order_id: str, method: str = "upi") -> SimPayment:
        """Go back at the bank's page."""
        return self._changed(self.books.fail(self._begin(order_id, method).id, dict(CANCELLED)))

    def finish(self, payment_id: str) -> SimPayment:
        """The bank says yes to an attempt that is open, or that it had declined."""
        return self._changed(self.books.succeed(payment_id))

    def fail_attempt(self, payment_id: str) -> SimPayment:
        """The bank says no to an attempt that is open."""
        return self._changed(self.books.fail(payment_id, dict(DECLINED)))

    def lapse(self, payment_id: str) -> SimPayment:
        """Days later nobody has captured an authorized payment."""
        return self._changed(self.books.lapse(payment_id))

    def pay_late(self, order_id: str, method: str = "upi", after_s: float = 0) -> SimPayment:
        """Be declined, and after so many seconds pay all the same."""
        payment = self.fail(order_id, method)

        async def later() -> None:
            await asyncio.sleep(after_s)
            self.finish(payment.id)

        task = asyncio.create_task(later())
        self._later.add(task)
        task.add_done_callback(self._later.discard)
        return payment

    def settle_refund(self, refund_id: str, succeeded: bool) -> SimRefund:
        """Decide a pending refund, or let one that succeeded fail."""
        refund = self.books.settle_refund(refund_id, succeeded)
        self._save_soon()
        return refund

    # inside

    def _begin(self, order_id: str, method: str) -> SimPayment:
        return self._changed(self.books.begin(order_id, method))

    def _changed(self, payment: SimPayment) -> SimPayment:
        self._save_soon()
        return payment

    def _signed(self, payment: SimPayment) -> dict[str, str]:
        self._save_soon()
        text = f"{payment.order_id}|{payment.id}".encode()
        return {
            "razorpay_payment_id": payment.id,
            "razorpay_order_id": payment.order_id,
            "razorpay_signature": hmac.digest(self._key_secret.encode(), text, hashlib.sha256).hex(),
        }

    def _emit(self, kind: str, entities: dict[str, dict[str, Any]]) -> None:
        event = {
            "entity": "event",
            "account_id": ACCOUNT,
            "event": kind,
            "contains": list(entities),
            "payload": {name: {"entity": entity} for name, entity in entities.items()},
            "created_at": int(self._clock()),
        }
        # compact; one of Razorpay's services writes members as they come, another sorts them
        body = msgspec.json.encode(event, order="sorted" if kind.startswith("refund.") else None)
        event_id = "".join(self._random.choices(string.ascii_letters + string.digits, k=14))
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "Razorpay-Webhook/v1",
            "X-Razorpay-Event-Id": event_id,
            "Request-Id": event_id,
            "X-Razorpay-Signature": hmac.digest(self.webhook_secret.encode(), body, hashlib.sha256).hex(),
        }
        retries_s = SOON_S if kind in SOON else LATER_S
        self.courier.send(Parcel(event_id=event_id, kind=kind, body=body, headers=lambda: headers, retries_s=retries_s))

    def _save_soon(self) -> None:
        if self._file and not self._saving:
            self._saving = asyncio.get_running_loop().call_later(SAVE_AFTER_S, self._save)

    def _save(self) -> None:
        assert self._file
        self._saving = None
        self._file.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._file.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(self.books.state))
        fresh.replace(self._file)

    # its doors

    def _application(self) -> web.Application:
        app = web.Application(middlewares=[self._door])
        app.add_routes(
            [
                web.post("/v1/orders", self._create_order),
                web.get("/v1/orders/{id}", self._of(self.books.order)),
                web.get("/v1/orders/{id}/payments", self._list_of(self.books.payments_of)),
                web.get("/v1/payments", self._payments),
                web.get("/v1/payments/{id}", self._of(self.books.payment)),
                web.post("/v1/payments/{id}/capture", self._capture),
                web.post("/v1/payments/{id}/refund", self._refund),
                web.get("/v1/payments/{id}/refunds", self._list_of(self.books.refunds_of)),
                web.get("/v1/refunds/{id}", self._of(self.books.refund)),
                web.get("/checkout/{id}", self._checkout),
                web.post("/sandbox/orders/{id}/{action}", self._act),
                web.post("/sandbox/payments/{id}/{action}", self._act_on_payment),
                web.post("/sandbox/refunds/{id}/{outcome}", self._act_on_refund),
                web.post("/sandbox/disputes/{id}/{outcome}", self._act_on_dispute),
                web.post("/sandbox/webhook-secret", self._rotate),
                web.get("/sandbox/deliveries", self._deliveries),
                *mischief_routes(self.mischief),
            ]
        )
        return app

    @web.middleware
    async def _door(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if not request.path.startswith("/v1/"):
                return await handler(request)
            wanted = base64.b64encode(f"{self._key_id}:{self._key_secret}".encode()).decode()
            if request.headers.get("Authorization") != f"Basic {wanted}":
                raise ApiError("Authentication failed", status=401, na=True)
            throttled = ApiError("Request failed. Please try after sometime.", na=True)
            return await meet_fault(
                self.mischief.take_fault(request.method), request, self._answer(handler), throttled.body, self._stopping
            )
        except ApiError as error:
            return _refused(error)
        except web.HTTPNotFound:
            return _refused(ApiError("The requested URL was not found on the server.", status=404, na=True))

    @staticmethod
    def _answer(handler: Handler) -> Handler:
        """The handler with its refusals as answers, so that a fault may still befall them."""

        async def answered(request: web.Request) -> web.StreamResponse:
            try:
                return await handler(request)
            except ApiError as error:
                return _refused(error)

        return answered

    def _of(self, read: Callable[[str], dict[str, Any]]) -> Handler:
        async def one(request: web.Request) -> web.Response:
            return _json(read(request.match_info["id"]))

        return one

    def _list_of(self, read: Callable[[str], list[dict[str, Any]]]) -> Handler:
        async def some(request: web.Request) -> web.Response:
            return _collection(_cut(request, read(request.match_info["id"])))

        return some

    async def _create_order(self, request: web.Request) -> web.Response:
        order = self.books.create_order(await _object(request))
        self._save_soon()
        return _json(order)

    async def _payments(self, request: web.Request) -> web.Response:
        found = self.books.all_payments(_number(request, "from", 0), _number(request, "to", 2**40))
        return _collection(_cut(request, found))

    async def _capture(self, request: web.Request) -> web.Response:
        captured = self.books.capture(request.match_info["id"], await _object(request))
        self._save_soon()
        return _json(captured)

    async def _refund(self, request: web.Request) -> web.Response:
        wanted, key = await _object(request), request.headers.get("X-Refund-Idempotency")
        payment_id = request.match_info["id"]
        refund = self.books.begin_refund(payment_id, wanted, key, await request.read())
        if refund is None:
            await asyncio.sleep(self.mischief.refund_takes_s)
            refund = self.books.end_refund(payment_id, wanted, key)
            self._save_soon()
        return _json(refund_body(refund))

    async def _checkout(self, request: web.Request) -> web.Response:
        order = self.books.find_order(request.match_info["id"])
        shown = {"orderId": order.id, "amount": order.amount, "currency": order.currency, "status": order.status}
        return checkout.show(PAGE_HTML, shown, request.query.get("returnUrl", ""))

    async def _act(self, request: web.Request) -> web.Response:
        """pay, fail, cancel, begin or pay_late; body `{method?, afterS?}`."""
        order_id, wanted = request.match_info["id"], await _object(request)
        method, after_s = str(wanted.get("method", "upi")), float(wanted.get("afterS", 30))
        actions: dict[str, Callable[[], SimPayment | dict[str, str]]] = {
            "pay": lambda: self.pay(order_id, method),
            "fail": lambda: self.fail(order_id, method),
            "cancel": lambda: self.cancel(order_id, method),
            "begin": lambda: self.begin(order_id, method),
            "pay_late": lambda: self.pay_late(order_id, method, after_s),
        }
        done = _chosen(actions, request.match_info["action"])()
        return _json(self.books.payment(done.id) if isinstance(done, SimPayment) else done)

    async def _act_on_payment(self, request: web.Request) -> web.Response:
        """finish, fail, lapse, or dispute with `{amount}`."""
        payment_id, wanted = request.match_info["id"], await _object(request)
        action = request.match_info["action"]
        if action == "dispute":
            return _json(msgspec.to_builtins(self.books.dispute(payment_id, int(wanted["amount"]))))
        _chosen({"finish": self.finish, "fail": self.fail_attempt, "lapse": self.lapse}, action)(payment_id)
        return _json(self.books.payment(payment_id))

    async def _act_on_refund(self, request: web.Request) -> web.Response:
        succeeded = _chosen({"succeed": True, "fail": False}, request.match_info["outcome"])
        return _json(refund_body(self.settle_refund(request.match_info["id"], succeeded)))

    async def _act_on_dispute(self, request: web.Request) -> web.Response:
        closed = self.books.close_dispute(request.match_info["id"], request.match_info["outcome"])
        return _json(msgspec.to_builtins(closed))

    async def _rotate(self, request: web.Request) -> web.Response:
        """Sign with another secret from now on: the one of the body, `{secret}`, or one that the answer shows."""
        given = await _object(request) if request.can_read_body else {}
        self.webhook_secret = str(given.get("secret") or secrets.token_hex(16))
        return _json({"secret": self.webhook_secret})

    async def _deliveries(self, request: web.Request) -> web.Response:
        return _json([msgspec.to_builtins(one) for one in self.courier.attempts])


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


def _refused(error: ApiError) -> web.Response:
    return web.Response(status=error.status, body=error.body, content_type="application/json")


def _collection(items: list[dict[str, Any]]) -> web.Response:
    return _json({"entity": "collection", "count": len(items), "items": items})


def _cut(request: web.Request, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    skip, count = _number(request, "skip", 0), _number(request, "count", LIST_DEFAULT)
    if not 1 <= count <= LIST_MAX:
        raise ApiError(f"The count must be between 1 and {LIST_MAX}.", field="count")
    return found[skip : skip + count]


def _number(request: web.Request, name: str, default: int) -> int:
    text = request.query.get(name, str(default))
    if not text.isdecimal():
        raise ApiError(f"The {name} must be an integer.", field=name)
    return int(text)


async def _object(request: web.Request) -> dict[str, Any]:
    try:
        return msgspec.json.decode(await request.read() or b"{}", type=dict[str, Any])
    except msgspec.MsgspecError:
        raise ApiError("Invalid JSON in the request body.", na=True) from None


def _chosen(choices: dict[str, Any], name: str) -> Any:
    if name not in choices:
        raise ApiError("The requested URL was not found on the server.", status=404, na=True)
    return choices[name]
