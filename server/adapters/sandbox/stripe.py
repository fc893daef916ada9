"""A simulator of Stripe on 127.0.0.1: what of its API, its webhooks and its checkout the adapter and a buyer meet.

It keeps to what is documented and recorded. What it cannot show: real limits, real settlement, a bank's time-outs,
Stripe.js. What its objects do is in stripe_books.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import msgspec
import structlog
from aiohttp import web

from server.adapters.sandbox import checkout
from server.adapters.sandbox.courier import Courier, Parcel
from server.adapters.sandbox.mischief import Fault, Mischief, meet_fault, mischief_routes
from server.adapters.sandbox.stripe_books import SETTLES_S, Books, Object, Refusal, State, Stored, new_id

log = structlog.get_logger()

API_VERSION = "2026-10-28.endive"
RETRIES_S = (3600.0, 4 * 3600.0, 12 * 3600.0)
"""Stripe tries three times more in a sandbox, over hours."""
ANSWER_LIMIT_S = 10.0
UNHEARD = frozenset({"payment_intent.created"})
"""Events that the account's endpoint has not enabled: they say nothing that we need."""
KEYS_KEPT_S = 24 * 3600
"""How long an idempotency key is remembered."""
PAGE = Path(__file__).with_name("stripe_checkout.html")
SAVE_AFTER_S = 0.2
"""Changes are written to the file together."""
EVENTS_KEPT = 10_000

THROTTLED = {"error": {"type": "invalid_request_error", "code": "rate_limit", "message": "Too many requests."}}
BROKEN = {"error": {"type": "api_error", "message": "An error occurred on our end."}}


class StripeSandbox:
    """One account in test mode.

    `webhook_url`: where events go, empty: nowhere until it is set. `pace`: Stripe's seconds (retries, processing) are
    multiplied by it. `file`: where the state is kept over a restart; None: nowhere.

    Raises:
        ValueError: a key is a live one.
    """

    def __init__(
        self,
        secret_key: str,
        publishable_key: str,
        webhook_secret: str,
        webhook_url: str = "",
        *,
        clock: Callable[[], float] = time.time,
        pace: float = 1,
        file: Path | None = None,
        seed: int = 0,
    ) -> None:
        if not secret_key.startswith("sk_test_") or not publishable_key.startswith("pk_test_"):
            raise ValueError("The simulator of Stripe takes keys that begin with sk_test_ and pk_test_ only.")
        self._secret_key = secret_key
        self.webhook_secrets = [webhook_secret]
        """Newest first. Several while one is rolled: events are signed with each."""
        self.mischief = Mischief()
        self.courier = Courier(webhook_url, self.mischief, pace=pace, answer_limit_s=ANSWER_LIMIT_S, seed=seed)
        self.events: deque[Object] = deque(maxlen=EVENTS_KEPT)
        """The newest events, oldest first."""
        self._clock, self._pace, self._file = clock, pace, file
        self._port = 0
        self._runner: web.AppRunner | None = None
        self._stopping = asyncio.Event()
        self._later: set[asyncio.Task[None]] = set()
        self._saving: asyncio.TimerHandle | None = None
        state = State()
        if file is not None and file.is_file():
            state = msgspec.json.decode(file.read_bytes(), type=State)
            # calls that were under way when the simulator ended
            state.keys = {key: stored for key, stored in state.keys.items() if stored.status}
        self.books = Books(
            state,
            self.mischief,
            clock,
            tell=self._tell,
            after=self._after,
            page=lambda intent_id: f"{self.url}/checkout/{intent_id}",
        )

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        return f"http://127.0.0.1:{self._port}"

    async def start(self) -> None:
        """Listen on a free port, or after `stop` on the same one."""
        self._stopping.clear()
        app = web.Application()
        app.add_routes(
            [
                web.route("*", "/v1/{tail:.*}", self._serve),
                web.get("/checkout/{intent}", self._page),
                web.post("/sandbox/intents/{intent}/{action}", self._act),
                web.post("/sandbox/refunds/{refund}/{status}", self._act_on_refund),
                web.post("/sandbox/disputes/{dispute}/{status}", self._act_on_dispute),
                web.post("/sandbox/webhook-secret", self._roll),
                *mischief_routes(self.mischief),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self._port = self._runner.addresses[0][1]
        await self.courier.start()
        log.info("sandbox_listening", provider="stripe", url=self.url, note="a simulator: no money moves")

    async def stop(self) -> None:
        """Stop listening and delivering."""
        self._stopping.set()
        for task in self._later:
            task.cancel()
        await asyncio.gather(*self._later, return_exceptions=True)
        if self._runner is not None:
            await self._runner.cleanup()
        await self.courier.stop()
        if self._file is not None and self._saving is not None:
            self._saving.cancel()
            self._save(self._file)

    def roll_secret(self, secret: str) -> None:
        """Sign with a new secret of the endpoint too; until `end_roll` with both."""
        self.webhook_secrets.insert(0, secret)

    def end_roll(self) -> None:
        """The old secrets end."""
        del self.webhook_secrets[1:]

    # the API

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        key = request.headers.get("Idempotency-Key", "")
        fault = self.mischief.take_fault(request.method)
        if fault in (Fault.ERROR, Fault.ERROR_AFTER):
            return await self._answer(request, key, fault)

        async def answer(_: web.Request) -> web.StreamResponse:
            return await self._answer(request, key, None)

        return await meet_fault(fault, request, answer, json.dumps(THROTTLED).encode(), self._stopping)

    async def _answer(self, request: web.Request, key: str, fault: Fault | None) -> web.StreamResponse:
        try:
            self._let_in(request)
            params = nested(await request.text() if request.method == "POST" else request.query_string)
            verb, subject = self._route(request)
            stored = self._begin(key, request.path, params) if key and request.method == "POST" else None
        except Refusal as refusal:
            return _respond(refusal.status, {"error": refusal.error})
        if stored is not None and stored.status:
            return _respond(stored.status, stored.body, replayed=True)
        keep = False
        try:
            if fault is not Fault.ERROR:
                if verb is Books.refund:
                    await asyncio.sleep(self.mischief.refund_takes_s)
                body = verb(self.books, params, subject)
            status, keep = 200, True
            if fault is not None:
                status, body = 500, BROKEN
        except Refusal as refusal:
            status, body, keep = refusal.status, {"error": refusal.error}, refusal.stored
        finally:
            if stored is not None and not keep:
                del self.books.state.keys[key]
        if stored is not None and keep:
            stored.status, stored.body = status, json.loads(json.dumps(body))
        self._keep()
        return _respond(status, body)

    def _let_in(self, request: web.Request) -> None:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if given.startswith(("sk_live_", "rk_live_")):
            raise Refusal(403, "invalid_request_error", "This is a simulator. It takes no live keys.")
        if scheme != "Bearer" or given != self._secret_key:
            raise Refusal(401, "invalid_request_error", f"Invalid API Key provided: {given[:8]}****")

    def _begin(self, key: str, path: str, params: Object) -> Stored:
        keys, now = self.books.state.keys, self._clock()
        stored = keys.get(key)
        if stored is None or stored.at + KEYS_KEPT_S < now:
            stored = keys[key] = Stored(path, params, now)
            return stored
        if stored.path != path or stored.params != params:
            message = (
                "Keys for idempotent requests can only be used with the same parameters they were first used with."
            )
            raise Refusal(400, "idempotency_error", message)
        if not stored.status:
            message = "There is currently another in-progress request using this Stripe-Idempotency-Key."
            raise Refusal(409, "idempotency_error", message, code="idempotency_key_in_use")
        return stored

    def _route(self, request: web.Request) -> tuple[Verb, str]:
        for method, pattern, verb in ROUTES:
            found = re.fullmatch(pattern, request.path)
            if found and method == request.method:
                return verb, found.group(1) if found.groups() else ""
        raise Refusal(404, "invalid_request_error", f"Unrecognized request URL ({request.method}: {request.path}).")

    # events

    def _tell(self, kind: str, thing: Object, before: Object | None = None) -> None:
        data: Object = {"object": json.loads(json.dumps(thing))}
        if before is not None:
            data["previous_attributes"] = before
        event: Object = {
            "id": new_id("evt"),
            "object": "event",
            "api_version": API_VERSION,
            "created": self._time(),
            "data": data,
            "livemode": False,
            "pending_webhooks": 1,
            "request": {"id": None, "idempotency_key": None},
            "type": kind,
        }
        self.events.append(event)
        if kind not in UNHEARD:
            self.deliver(event)

    def deliver(self, event: Object) -> None:
        """Send an event, again if it was sent before."""
        body = json.dumps(event, indent=2).encode()
        self.courier.send(
            Parcel(
                event_id=event["id"],
                kind=event["type"],
                body=body,
                headers=lambda: {"Content-Type": "application/json", "Stripe-Signature": self.signature(body)},
                retries_s=RETRIES_S,
            )
        )

    def signature(self, body: bytes) -> str:
        """The Stripe-Signature header of this moment."""
        stamp = str(self._time())
        signed = stamp.encode() + b"." + body
        digests = [hmac.new(one.encode(), signed, hashlib.sha256).hexdigest() for one in self.webhook_secrets]
        return ",".join([f"t={stamp}", *(f"v1={digest}" for digest in digests)])

    # the checkout page, and the same by hand

    async def _page(self, request: web.Request) -> web.Response:
        """A page for one buyer: it needs the intent's client secret, as Stripe.js does."""
        intent = self.books.state.intents.get(request.match_info["intent"])
        given = request.query.get("client_secret", "")
        if intent is None or not hmac.compare_digest(given.encode(), intent["client_secret"].encode()):
            raise web.HTTPNotFound
        shown = {name: intent[name] for name in ("id", "amount", "currency", "status", "description")}
        return checkout.show(PAGE, shown, request.query.get("returnUrl", ""))

    async def _act(self, request: web.Request) -> web.Response:
        intent_id = request.match_info["intent"]
        return_url = request.query.get("returnUrl", "")
        books = self.books
        acts: dict[str, Callable[[], Object]] = {
            "pay": lambda: books.pay(intent_id),
            "fail": lambda: books.pay(intent_id, "pm_card_chargeDeclined"),
            "pay_late": lambda: self._pay_late(intent_id),
            "secure": lambda: books.pay(intent_id, "pm_card_authenticationRequired", return_url),
            "approve": lambda: books.authenticate(intent_id, approve=True),
            "refuse": lambda: books.authenticate(intent_id, approve=False),
            "cancel": lambda: books.retrieve({}, intent_id),  # the buyer goes away; the intent stays payable
            "lapse": lambda: books.lapse(intent_id),
            "dispute": lambda: books.dispute(intent_id),
        }
        action = acts.get(request.match_info["action"])
        if action is None:
            raise web.HTTPNotFound
        return self._acted(lambda: {**action(), "return_to": _return_to(return_url, books.retrieve({}, intent_id))})

    async def _act_on_refund(self, request: web.Request) -> web.Response:
        return self._acted(lambda: self.books.settle_refund(request.match_info["refund"], request.match_info["status"]))

    async def _act_on_dispute(self, request: web.Request) -> web.Response:
        named = request.match_info
        return self._acted(lambda: self.books.close_dispute(named["dispute"], named["status"]))

    async def _roll(self, request: web.Request) -> web.Response:
        """Sign with another secret too: the one of the body, `{secret}`, or one that the answer shows. The empty secret
        ends the old ones."""
        given = await request.json() if request.can_read_body else {}
        secret = str(given.get("secret", f"whsec_{secrets.token_hex(16)}"))
        if secret:
            self.roll_secret(secret)
        else:
            self.end_roll()
        return web.json_response({"secret": secret})

    def _acted(self, act: Callable[[], Object]) -> web.Response:
        try:
            answer = act()
        except Refusal as refusal:
            return _respond(refusal.status, {"error": refusal.error})
        self._keep()
        return _respond(200, answer)

    def _pay_late(self, intent_id: str) -> Object:
        self._after(SETTLES_S, lambda: self.books.finish(intent_id))
        return self.books.pay(intent_id, "pm_usBankAccount_success")

    # helpers

    def _after(self, seconds: float, do: Callable[[], object]) -> None:
        async def later() -> None:
            await asyncio.sleep(seconds * self._pace)
            do()
            self._keep()

        task = asyncio.create_task(later())
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    def _time(self) -> int:
        return int(self._clock())

    def _keep(self) -> None:
        if self._file is not None and self._saving is None:
            self._saving = asyncio.get_running_loop().call_later(SAVE_AFTER_S, self._save, self._file)

    def _save(self, file: Path) -> None:
        self._saving = None
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(self.books.state))
        fresh.replace(file)


Verb = Callable[[Books, Object, str], Object]
_INTENT = r"/v1/payment_intents/(pi_\w+)"
ROUTES: tuple[tuple[str, str, Verb], ...] = (
    ("POST", r"/v1/payment_intents", Books.create),
    ("GET", _INTENT, Books.retrieve),
    ("POST", rf"{_INTENT}/confirm", Books.confirm),
    ("POST", rf"{_INTENT}/capture", Books.capture),
    ("POST", rf"{_INTENT}/cancel", Books.cancel),
    ("POST", r"/v1/refunds", Books.refund),
    ("GET", r"/v1/refunds", Books.refunds),
    ("GET", r"/v1/refunds/(re_\w+)", Books.find_refund),
    ("GET", r"/v1/disputes", Books.disputes),
    ("GET", r"/v1/charges", Books.charges),
    ("GET", r"/v1/balance_transactions", Books.balance),
)


def nested(text: str) -> Object:
    """A form body or a query as Stripe reads it: `a[b]=c` is an object, `a[]=c` and `a[0]=c` are lists."""
    root: Object = {}
    for name, value in parse_qsl(text, keep_blank_values=True):
        first, *rest = re.findall(r"[^\[\]]+|(?<=\[)(?=\])", name)
        place, key = root, first
        for part in rest:
            place, key = place.setdefault(key, {}), part or str(len(place.get(key, {})))
        place[key] = value
    return {key: _lists(value) for key, value in root.items()}


def _lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {key: _lists(one) for key, one in value.items()}
    return list(inner.values()) if inner and all(key.isdigit() for key in inner) else inner


def _return_to(return_url: str, intent: Object) -> str:
    """Where Stripe sends the buyer, with what it adds to the address."""
    status = {"succeeded": "succeeded", "requires_capture": "succeeded", "processing": "processing"}
    query = {
        "payment_intent": intent["id"],
        "payment_intent_client_secret": intent["client_secret"],
        "redirect_status": status.get(intent["status"], "failed"),
    }
    return f"{return_url}{'&' if '?' in return_url else '?'}{urlencode(query)}"


def _respond(status: int, body: Mapping[str, Any], *, replayed: bool = False) -> web.Response:
    headers = {"Request-Id": new_id("req")} | ({"Idempotent-Replayed": "true"} if replayed else {})
    return web.json_response(body, status=status, headers=headers)
