"""Who gets which answer: every role on every route and every event, and every token that must not count."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import asyncpg
import jwt
import pytest
import socketio
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from server.embedded import DataServers
from server.rest import ROUTES
from server.sockets import EVENTS
from tests.harness import ORDER, READY_S, SECRET, SERVICE, Fleet, Instance, Reply, Watcher, free_port, token, until
from tests.shared import ask_simulator, everything, refusal, shared_fleet

EVERYWHERE_S = 1.0
"""The contract's: a revoked token works nowhere after this."""


class Shop(NamedTuple):
    """Two instances, and their database. Nothing but requests changes it: nobody sends webhooks, or asks by itself."""

    a: Instance
    b: Instance
    sql: asyncpg.Connection


@pytest.fixture(scope="module")
async def shop(data: DataServers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    async with shared_fleet(data, tmp_path_factory.mktemp("access")) as fleet:
        a, b = await fleet.pair(RECONCILE_AFTER_S="3600")
        for account in fleet.accounts().values():
            await ask_simulator(account["url"], "/mischief", {"webhooksLost": 1_000_000})
        sql = await asyncpg.connect(fleet.database_url)
        yield Shop(a, b, sql)
        await sql.close()


# who may: the table

AWAY = [str(uuid.uuid4())]

PEOPLE: dict[str, Callable[[str], str | None]] = {
    # c1 owns the order, a1 is its agent; n: a token narrowed to this order, x: narrowed to another
    "C": lambda order: token("customer", "c1"),
    "Cn": lambda order: token("customer", "c1", orders=[order]),
    "Cx": lambda order: token("customer", "c1", orders=AWAY),
    "C2": lambda order: token("customer", "c2"),
    "C2n": lambda order: token("customer", "c2", orders=[order]),
    "A": lambda order: token("agent", "a1"),
    "An": lambda order: token("agent", "a1", orders=[order]),
    "Ax": lambda order: token("agent", "a1", orders=AWAY),
    "A2": lambda order: token("agent", "a2"),
    "A2n": lambda order: token("agent", "a2", orders=[order]),
    "S": lambda order: token("staff", "s1"),
    "Sx": lambda order: token("staff", "s1", orders=AWAY),
    "X": lambda order: token("admin", "x1"),
    "Xx": lambda order: token("admin", "x1", orders=AWAY),
    "V": lambda order: token("service", "v1"),
    "Vx": lambda order: token("service", "v1", orders=AWAY),
    "Gt": lambda order: token("guest", "g1", orders=[order]),
    "Gtx": lambda order: token("guest", "g1", orders=AWAY, scope="track"),
    "Gp": lambda order: token("guest", "g1", orders=[order], scope="pay"),
    "Gpx": lambda order: token("guest", "g1", orders=AWAY, scope="pay"),
    "Gp0": lambda order: token("guest", "c1", scope="pay"),
    "G0": lambda order: token("guest", "c1"),
    "-": lambda order: None,
}

CODES = {
    "o": "ok",
    "e": "empty",
    "f": "forbidden",
    "n": "not_found",
    "i": "invalid",
    "u": "unauthenticated",
    "s": "bad_signature",
}
"""`empty`: an answer without the order. `invalid`: until there is stock, customers have nothing that they may order."""

TABLE = """
                                              C  Cn Cx C2 C2n A  An Ax A2 A2n S  Sx X  Xx V  Vx Gt Gtx Gp Gpx Gp0 G0 -
POST /orders                                  i  i  i  i  i   f  f  f  f  f   o  o  o  o  o  o  f  f   f  f   f   f  u
POST /orders/quote                            i  i  i  i  i   f  f  f  f  f   o  o  o  o  o  o  f  f   f  f   f   f  u
GET /orders                                   o  o  e  e  e   o  o  e  e  e   o  e  o  e  o  e  f  f   f  f   f   f  u
GET /orders.csv                               o  o  e  e  e   o  o  e  e  e   o  e  o  e  o  e  f  f   f  f   f   f  u
GET /orders/{order_id}                        o  o  n  n  n   o  o  n  n  n   o  n  o  n  o  n  o  n   o  n   n   n  u
GET /orders/{order_id}/events                 o  o  n  n  n   o  o  n  n  n   o  n  o  n  o  n  o  n   o  n   n   n  u
POST /orders/{order_id}/status                f  f  f  f  f   o  o  n  n  n   o  n  o  n  o  n  f  f   f  f   f   f  u
POST /orders/{order_id}/assign                f  f  f  f  f   f  f  f  f  f   o  n  o  n  o  n  f  f   f  f   f   f  u
POST /orders/{order_id}/cancel                o  o  n  n  n   f  f  f  f  f   o  n  o  n  o  n  f  f   o  n   n   f  u
POST /orders/{order_id}/payment-method        o  o  n  n  n   f  f  f  f  f   o  n  o  n  o  n  f  f   o  n   n   f  u
POST /orders/{order_id}/location              f  f  f  f  f   o  o  n  n  n   f  f  f  f  f  f  f  f   f  f   f   f  u
GET /orders/{order_id}/watchers               f  f  f  f  f   o  o  n  n  n   o  n  o  n  o  n  f  f   f  f   f   f  u
POST /orders/{order_id}/tracking-link         o  o  n  n  n   f  f  f  f  f   o  n  o  n  o  n  f  f   f  f   f   f  u
POST /orders/{order_id}/payment-link          f  f  f  f  f   f  f  f  f  f   o  n  o  n  o  n  f  f   f  f   f   f  u
DELETE /orders/{order_id}/links/{link_id}     o  o  n  n  n   f  f  f  f  f   o  n  o  n  o  n  f  f   f  f   f   f  u
GET /payments/providers                       o  o  o  o  o   f  f  f  f  f   o  o  o  o  o  o  f  f   o  o   o   f  u
POST /payments                                o  o  n  n  n   f  f  f  f  f   o  n  o  n  o  n  f  f   o  n   n   f  u
GET /payments                                 o  o  e  e  e   f  f  f  f  f   o  e  o  e  o  e  f  f   o  e   e   f  u
GET /payments.csv                             f  f  f  f  f   f  f  f  f  f   o  e  o  e  f  f  f  f   f  f   f   f  u
GET /payments/{payment_id}                    o  o  n  n  n   f  f  f  f  f   o  n  o  n  o  n  f  f   o  n   n   f  u
GET /payments/{payment_id}/history            o  o  n  n  n   f  f  f  f  f   o  n  o  n  o  n  f  f   o  n   n   f  u
POST /payments/{payment_id}/verify            o  o  n  n  n   f  f  f  f  f   f  f  f  f  f  f  f  f   o  n   n   f  u
POST /payments/{payment_id}/confirm           o  o  n  n  n   f  f  f  f  f   f  f  f  f  f  f  f  f   o  n   n   f  u
POST /payments/{payment_id}/capture           f  f  f  f  f   f  f  f  f  f   o  n  o  n  o  n  f  f   f  f   f   f  u
POST /payments/{payment_id}/cancel            o  o  n  n  n   f  f  f  f  f   o  n  o  n  o  n  f  f   o  n   n   f  u
POST /payments/{payment_id}/reconcile         f  f  f  f  f   f  f  f  f  f   o  n  o  n  f  f  f  f   f  f   f   f  u
PATCH /payments/{payment_id}                  f  f  f  f  f   f  f  f  f  f   f  f  o  n  o  n  f  f   f  f   f   f  u
DELETE /payments/{payment_id}                 f  f  f  f  f   f  f  f  f  f   f  f  o  n  f  f  f  f   f  f   f   f  u
POST /links/follow                            o  o  o  o  o   o  o  o  o  o   o  o  o  o  o  o  o  o   o  o   o   o  o
POST /tokens/revoke                           f  f  f  f  f   f  f  f  f  f   f  f  o  o  o  o  f  f   f  f   f   f  u
GET /jobs                                     f  f  f  f  f   f  f  f  f  f   o  f  o  f  f  f  f  f   f  f   f   f  u
POST /jobs/{job_id}/retry                     f  f  f  f  f   f  f  f  f  f   n  f  n  f  f  f  f  f   f  f   f   f  u
POST /jobs/{job_id}/dismiss                   f  f  f  f  f   f  f  f  f  f   n  f  n  f  f  f  f  f   f  f   f   f  u
GET /webhooks                                 f  f  f  f  f   f  f  f  f  f   o  f  o  f  f  f  f  f   f  f   f   f  u
POST /webhooks/{webhook_id}/retry             f  f  f  f  f   f  f  f  f  f   n  f  n  f  f  f  f  f   f  f   f   f  u
POST /webhooks/{webhook_id}/dismiss           f  f  f  f  f   f  f  f  f  f   n  f  n  f  f  f  f  f   f  f   f   f  u
POST /webhooks/razorpay                       s  s  s  s  s   s  s  s  s  s   s  s  s  s  s  s  s  s   s  s   s   s  s
POST /webhooks/stripe                         s  s  s  s  s   s  s  s  s  s   s  s  s  s  s  s  s  s   s  s   s   s  s
POST /payments/cash                           f  f  f  f  f   o  o  n  n  n   o  n  o  n  f  f  f  f   f  f   f   f  u
GET /payments/stats/daily                     f  f  f  f  f   f  f  f  f  f   o  f  o  f  o  f  f  f   f  f   f   f  u
GET /payments/analytics                       f  f  f  f  f   f  f  f  f  f   o  f  o  f  o  f  f  f   f  f   f   f  u
GET /cash/agents/{agent_id}                   f  f  f  f  f   o  f  f  n  f   o  f  o  f  f  f  f  f   f  f   f   f  u
POST /cash/handovers                          f  f  f  f  f   f  f  f  f  f   o  f  o  f  f  f  f  f   f  f   f   f  u
GET /ledger/trial-balance                     f  f  f  f  f   f  f  f  f  f   f  f  o  f  f  f  f  f   f  f   f   f  u
GET /audit                                    f  f  f  f  f   f  f  f  f  f   f  f  o  f  f  f  f  f   f  f   f   f  u
GET /reconciliation/{date}                    f  f  f  f  f   f  f  f  f  f   f  f  n  f  f  f  f  f   f  f   f   f  u
POST /payments/{payment_id}/refunds           f  f  f  f  f   f  f  f  f  f   o  n  o  n  o  n  f  f   f  f   f   f  u
POST /orders/{order_id}/refunds               f  f  f  f  f   f  f  f  f  f   o  n  o  n  o  n  f  f   f  f   f   f  u
GET /payments/{payment_id}/refunds            o  o  n  n  n   f  f  f  f  f   o  n  o  n  o  n  f  f   o  n   n   f  u
GET /refunds                                  f  f  f  f  f   f  f  f  f  f   o  e  o  e  o  e  f  f   f  f   f   f  u
GET /refunds/{refund_id}                      o  o  n  n  n   f  f  f  f  f   o  n  o  n  o  n  f  f   o  n   n   f  u
POST /refunds/{refund_id}/retry               f  f  f  f  f   f  f  f  f  f   o  n  o  n  f  f  f  f   f  f   f   f  u
subscribeToOrder                              o  o  n  n  n   o  o  n  n  n   o  n  o  n  o  n  o  n   o  n   n   n  u
unsubscribeFromOrder                          o  o  o  o  o   o  o  o  o  o   o  o  o  o  o  o  o  o   o  o   o   o  u
updateLocation                                f  f  f  f  f   o  o  n  n  n   f  f  f  f  f  f  f  f   f  f   f   f  u
updateOrderStatus                             f  f  f  f  f   o  o  n  n  n   o  n  o  n  o  n  f  f   f  f   f   f  u
refreshToken                                  o  o  o  o  o   o  o  o  o  o   o  o  o  o  o  o  o  o   o  o   o   o  u
"""


def expected() -> dict[str, dict[str, str]]:
    """For each call and each person, the code."""
    head, *rows = TABLE.strip("\n").splitlines()
    people, found = head.split(), {}
    assert people == list(PEOPLE)
    for row in rows:
        words = row.split()
        name, letters = " ".join(words[: -len(people)]), words[-len(people) :]
        found[name] = {person: CODES[letter] for person, letter in zip(people, letters, strict=True)}
    return found


class Target(NamedTuple):
    """An order of c1 in the hands of a1, with a link."""

    id: str
    link_id: str
    secret: str
    payment_id: str = ""
    """Of calls about refunds: paid in cash. Of others: begun at a simulator, and `capture` can take it."""
    refund_id: str = ""
    """It is due: the order was cancelled."""


async def target(instance: Instance, call: str) -> Target:
    order = await instance.place()
    if call in ("POST /orders/{order_id}/status", "updateOrderStatus"):  # what its agent may move, and the shop too
        await instance.move(order["id"], "confirmed", "preparing", "ready")
    if call == "POST /payments/cash":  # an agent takes it at the door
        await instance.move(order["id"], "confirmed", "preparing", "ready", "out_for_delivery")
    await instance.assign(order["id"], "a1")
    link = (await instance.post(f"/orders/{order['id']}/tracking-link", {})).body
    found = Target(order["id"], link["id"], link["url"].rsplit("/", 1)[1])
    if "refund" in call:
        return await refunded(instance, found, call)
    if "{payment_id}" in call or call in ("GET /payments", "GET /payments.csv"):
        return await begun(instance, found, call)
    return found


async def begun(instance: Instance, to: Target, call: str) -> Target:
    manual, of_stripe = call.endswith("/capture"), call.endswith(("/verify", "/confirm", "/capture"))
    how = {"provider": "stripe" if of_stripe else "razorpay", "capture": "manual" if manual else "automatic"}
    reply = await instance.post("/payments", {"orderId": to.id, **how})
    assert reply.status == 201, reply
    payment = reply.body
    if manual:
        page = urlsplit(payment["checkout"]["url"])
        await ask_simulator(f"{page.scheme}://{page.netloc}", f"/intents/{payment['gatewayOrderId']}/pay", {})
        known = await instance.post(f"/payments/{payment['id']}/reconcile", {}, by=token("staff", "s1"))
        assert known.body["status"] == "authorized", known
    return to._replace(payment_id=payment["id"])


async def refunded(instance: Instance, to: Target, call: str) -> Target:
    cash = {"orderId": to.id, "amount": 25_200, "currency": "INR"}
    paid = await instance.post("/payments/cash", cash, by=token("staff", "s1"))
    to = to._replace(payment_id=paid.body["id"])
    if call in ("POST /payments/{payment_id}/refunds", "POST /orders/{order_id}/refunds"):
        return to
    await instance.post(f"/orders/{to.id}/cancel", {"reason": "No"})
    (due,) = (await instance.get(f"/payments/{to.payment_id}/refunds")).body["items"]
    return to._replace(refund_id=due["id"])


def fix() -> dict[str, Any]:
    return {"lat": 12.97, "lng": 77.59, "ts": time.time() * 1000}


def body_of(call: str, to: Target) -> Any:
    return {
        "POST /orders": {**ORDER, "customerId": "c2"},
        "POST /orders/quote": ORDER,
        "POST /orders/{order_id}/status": {"status": "out_for_delivery"},
        "POST /orders/{order_id}/assign": {"agentId": "a9"},
        "POST /orders/{order_id}/cancel": {"reason": "No"},
        "POST /orders/{order_id}/payment-method": {"paymentMethod": "cash"},
        "POST /orders/{order_id}/location": fix(),
        "POST /orders/{order_id}/tracking-link": {},
        "POST /orders/{order_id}/payment-link": {},
        "POST /links/follow": {"secret": to.secret},
        "POST /jobs/{job_id}/retry": {},
        "POST /jobs/{job_id}/dismiss": {"reason": "No"},
        "POST /webhooks/{webhook_id}/retry": {},
        "POST /webhooks/{webhook_id}/dismiss": {"reason": "No"},
        "POST /payments/{payment_id}/refunds": {"reason": "Cold", "amount": 100, "currency": "INR"},
        "POST /orders/{order_id}/refunds": {"reason": "Cold", "amount": 100, "currency": "INR"},
        "POST /refunds/{refund_id}/retry": {},
        "POST /payments": {"orderId": to.id},
        "POST /payments/{payment_id}/verify": {},
        "POST /payments/{payment_id}/confirm": {
            "paymentMethodId": "pm_card_visa",
            "returnUrl": "https://shop.example/thanks",
        },
        "POST /payments/{payment_id}/capture": {"amount": 25_200, "currency": "INR"},
        "POST /payments/{payment_id}/cancel": {},
        "POST /payments/{payment_id}/reconcile": {},
        "PATCH /payments/{payment_id}": {"description": "Table 7"},
        "POST /tokens/revoke": {"jti": str(uuid.uuid4())},
        "POST /payments/cash": {"orderId": to.id, "amount": 25200, "currency": "INR"},
        "POST /cash/handovers": {"agentId": "a1", "amount": 100, "currency": "INR"},
    }.get(call)


def payload_of(event: str, to: Target, by: str) -> dict[str, Any]:
    payloads: dict[str, dict[str, Any]] = {
        "updateLocation": fix(),
        "updateOrderStatus": {"status": "out_for_delivery"},
        "refreshToken": {"token": by},
    }
    named = {} if event == "refreshToken" else {"orderId": to.id}
    return {**named, **payloads.get(event, {})}


def path_of(call: str, to: Target) -> str:
    names = {
        "order_id": to.id,
        "link_id": to.link_id,
        "payment_id": to.payment_id,
        "refund_id": to.refund_id,
        "agent_id": "a1",
        "date": "2999-01-01",
        "job_id": "0",
        "webhook_id": str(uuid.uuid4()),
    }
    return call.split(" ")[1].format(**names)


async def answer(instance: Instance, call: str, to: Target, by: str | None) -> str:
    """The code that somebody gets; `ok` for what was done, `empty` for a list without the order."""
    if call in EVENTS:
        watcher = Watcher(instance, by)
        refusals: list[Any] = []
        watcher.client.on("connect_error", refusals.append)
        try:
            async with watcher:
                said = await watcher.call(call, payload_of(call, to, by or ""))
                return "ok" if said["ok"] else str(said["error"]["code"])
        except socketio.exceptions.ConnectionError:
            return str(refusals[0]["data"]["code"])
    method, path = call.split(" ")[0], path_of(call, to)
    reply = await instance.request(method, path, body_of(call, to), by=by)
    if reply.status >= 400:
        assert reply.body["status"] == reply.status
        return reply.code
    if path in ("/orders", "/orders.csv", "/payments", "/payments.csv", "/refunds") and method == "GET":
        text = reply.body.decode() if path.endswith(".csv") else json.dumps(reply.body)
        return "ok" if to.id in text else "empty"
    return "ok"


def test_the_table_names_every_route_and_every_event() -> None:
    assert set(expected()) == {f"{route.method} {route.path}" for route in ROUTES} | set(EVENTS)


@pytest.mark.parametrize("call", expected())
async def test_everybody_gets_the_answer_of_the_table(shop: Shop, call: str) -> None:
    wanted = expected()[call]
    done = ("ok", "empty")
    untouched = await target(shop.a, call)
    before = await everything(shop.sql)
    refused = {
        person: await answer(shop.b, call, untouched, PEOPLE[person](untouched.id))
        for person, code in wanted.items()
        if code not in done
    }
    assert refused == {person: code for person, code in wanted.items() if code not in done}
    assert await everything(shop.sql) == before, "whoever was refused changed nothing"
    got, to = {}, untouched
    changes = call.split(" ")[0] in ("POST", "DELETE") or call == "updateOrderStatus"
    for person, code in wanted.items():
        if code in done:
            got[person] = await answer(shop.b, call, to, PEOPLE[person](to.id))
            if changes:
                to = await target(shop.a, call)
    assert got == {person: code for person, code in wanted.items() if code in done}


async def test_somebody_elses_order_looks_like_none(shop: Shop) -> None:
    """Whoever may not see an order cannot tell it, its payments and its refunds from what does not exist."""
    nowhere = str(uuid.uuid4())
    named = ("{order_id}", "{payment_id}", "{refund_id}")
    calls = [call for call in expected() if any(name in call for name in named)] + [
        "POST /payments",
        "POST /payments/cash",
    ]
    for call in calls:
        to = await target(shop.a, call)
        none = to._replace(id=nowhere, payment_id=nowhere, refund_id=nowhere)
        for person in ("C2", "Cx", "A2", "Ax", "Sx", "Vx", "Gtx", "Gpx", "Gp0", "G0"):
            hidden, absent = [
                await shop.b.request(
                    call.split(" ")[0],
                    path_of(call, one),
                    body_of(call, one),
                    by=PEOPLE[person](to.id),
                    headers={"X-Request-Id": "same"},
                )
                for one in (to, none)
            ]
            assert hidden.status in (403, 404), (person, call)
            assert (hidden.status, hidden.body) == (absent.status, absent.body), (person, call)


# tokens that must not count


def unpadded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def unsigned(claims: dict[str, Any]) -> str:
    return ".".join(unpadded(json.dumps(part).encode()) for part in ({"alg": "none", "typ": "JWT"}, claims)) + "."


GOOD = {"sub": "x1", "role": "admin", "exp": int(time.time()) + 3600}
BAD: dict[str, str] = {
    "expired": token("admin", "x1", ttl_s=-1),
    "alg none": unsigned(GOOD),
    "alg none, signed": unsigned(GOOD) + jwt.encode(GOOD, SECRET, "HS256").rsplit(".", 1)[1],
    "wrong key": jwt.encode(GOOD, SECRET[::-1], "HS256"),
    "another algorithm": jwt.encode(GOOD, SECRET * 2, "HS512"),
    "a changed payload": ".".join(
        (lambda good, other: (good[0], other[1], good[2]))(
            token("customer", "c1").split("."), token("admin", "c1").split(".")
        )
    ),
    "no role": jwt.encode({"sub": "x1", "exp": GOOD["exp"]}, SECRET, "HS256"),
    "unknown role": token("root"),
    "no exp": jwt.encode({"sub": "x1", "role": "admin"}, SECRET, "HS256"),
    "not valid yet": token("admin", "x1", nbf=int(time.time()) + 3600),
    "malformed": "eyJ.not-a-token.at-all",
    "one word": "admin",
    "dots": "..",
    "oversized": token("admin", "x1", padding="x" * 9000),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
async def test_a_bad_token_is_unauthenticated_on_both_doors(shop: Shop, bad: str) -> None:
    order = await shop.a.place()
    reply = await shop.a.get(f"/orders/{order['id']}", by=bad)
    refusal(reply, 401, "unauthenticated")
    assert reply.headers["WWW-Authenticate"] == "Bearer"
    watcher, refusals = Watcher(shop.a, bad), list[Any]()
    watcher.client.on("connect_error", refusals.append)
    with pytest.raises(socketio.exceptions.ConnectionError):
        async with watcher:
            pass
    assert refusals[0]["data"] == {"code": "unauthenticated", "message": reply.body["detail"]}
    async with Watcher(shop.a, SERVICE) as good:
        refreshed = await good.call("refreshToken", {"token": bad})
        assert refreshed == {"ok": False, "error": {"code": "unauthenticated", "message": reply.body["detail"]}}
        await good.watch(order["id"])


@pytest.mark.parametrize("header", ["", "Basic YTpi", "Bearer", "Bearer  ", f"Token {SERVICE}", SERVICE])
async def test_another_scheme_is_no_token(shop: Shop, header: str) -> None:
    refusal(await shop.a.get("/orders", by=None, headers={"Authorization": header}), 401, "unauthenticated")


@pytest.mark.parametrize("auth", [None, {}, {"token": None}, {"token": 7}, {"token": ["a"]}, {"token": {"a": 1}}, []])
async def test_an_auth_that_holds_no_token_is_unauthenticated(shop: Shop, auth: Any) -> None:
    client = socketio.AsyncClient(reconnection=False)
    refusals: list[Any] = []
    client.on("connect_error", refusals.append)
    with pytest.raises(socketio.exceptions.ConnectionError):
        await client.connect(shop.a.url, transports=["websocket"], auth=auth)
    assert refusals[0]["data"]["code"] == "unauthenticated"


# revocation


@pytest.mark.parametrize("kind", ["jti", "sub"])
async def test_a_revoked_token_works_nowhere_within_a_second(shop: Shop, kind: str) -> None:
    a, b, _ = shop
    customer, jti = str(uuid.uuid4()), str(uuid.uuid4())
    order = await a.place(customerId=customer)
    path = f"/orders/{order['id']}"
    revoked, beside = token("customer", customer, jti=jti), token("customer", customer, jti=str(uuid.uuid4()))
    ends = [revoked] if kind == "jti" else [revoked, beside]
    stays = token("customer", customer) if kind == "jti" else SERVICE
    async with (
        Watcher(a, revoked) as here,
        Watcher(b, revoked) as there,
        Watcher(b, revoked, transports=("polling",)) as polling,
        Watcher(b, stays) as other,
    ):
        for watcher in (here, there, polling, other):
            await watcher.watch(order["id"])
        value = jti if kind == "jti" else customer
        assert (await a.post("/tokens/revoke", {kind: value})).status == 204
        deadline = time.monotonic() + EVERYWHERE_S

        async def refused(instance: Instance, by: str) -> bool:
            return (await instance.get(path, by=by)).status == 401

        for instance in (b, a):
            for by in ends:
                left_s = max(deadline - time.monotonic(), 0)
                await until(lambda i=instance, t=by: refused(i, t), "the token is refused", left_s)
        for watcher in (here, there, polling):
            left_s = max(deadline - time.monotonic(), 0)
            await until(watcher.disconnected.is_set, f"a live socket ends; it heard {watcher.heard}", left_s)
            assert watcher.heard == [
                ("subscriptionClosed", {"orderId": order["id"], "code": "revoked"}),
                ("disconnected", {"code": "revoked"}),
            ]
        await a.move(order["id"], "confirmed")
        await other.hears("orderStatusUpdate", orderId=order["id"], seq=2)
        assert not other.disconnected.is_set()
    watcher, refusals = Watcher(b, revoked), list[Any]()
    watcher.client.on("connect_error", refusals.append)
    with pytest.raises(socketio.exceptions.ConnectionError):
        async with watcher:
            pass
    assert refusals[0]["data"]["code"] == "unauthenticated"
    # who signs in again later is let in, and a token that was not meant lives on
    later = token("customer", customer, iat=int(time.time()) + 2)
    for by in (later, *([beside] if kind == "jti" else [])):
        for instance in (a, b):
            assert (await instance.get(path, by=by)).status == 200


async def test_an_instance_that_starts_knows_what_was_revoked(fleet: Fleet) -> None:
    first = await fleet.start()
    revoked = token("service", jti="gone")
    assert (await first.post("/tokens/revoke", {"jti": "gone"})).status == 204
    assert await first.stop() == 0
    second = await fleet.start("web", ready=False)
    answers = []

    async def refuses() -> bool:
        """From the first answer on: the token must not count even once."""
        with contextlib.suppress(aiohttp.ClientError):
            answers.append((await second.get("/orders", by=revoked)).status)
        return 401 in answers

    await until(refuses, "it serves", READY_S)
    assert set(answers) <= {401, 503}


# keys of others


RSA, OTHER_RSA = (rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2))


def signed(key: rsa.RSAPrivateKey, kid: str | None = None, **claims: Any) -> str:
    return jwt.encode({**GOOD, **claims}, key, "RS256", headers={"kid": kid} if kid else None)


def pem(key: rsa.RSAPrivateKey) -> str:
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return public.decode()


class KeyServer:
    """A JWKS endpoint; `keys` is what it serves."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/jwks.json"
        self.keys: dict[str, rsa.RSAPrivateKey] = {}
        self.asked = 0

    async def _serve(self, request: web.Request) -> web.Response:
        self.asked += 1
        entries = [
            {**jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid, "use": "sig"}
            for kid, key in self.keys.items()
        ]
        return web.json_response({"keys": entries})

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_get("/jwks.json", self._serve)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port).start()
        try:
            yield
        finally:
            await runner.cleanup()


async def on_both_doors(instance: Instance, by: str) -> tuple[int, str]:
    """The status of a request, and what became of a CONNECT: ok, the code of its refusal, or closed."""
    status = (await instance.get("/orders", by=by)).status
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{instance.url}/socket.io/?EIO=4&transport=websocket") as socket,
    ):
        assert (await socket.receive_str(timeout=10)).startswith("0")
        await socket.send_str("40" + json.dumps({"token": by}))
        while True:
            message = await socket.receive(timeout=10)
            if message.type is not aiohttp.WSMsgType.TEXT:
                return status, "closed"
            if message.data.startswith("40"):
                return status, "ok"
            if message.data.startswith("44"):
                return status, json.loads(message.data[2:])["data"]["code"]


async def connect_by_polling(instance: Instance, by: str) -> list[str]:
    """What comes back for a CONNECT by polling, until it is answered or the session has ended."""
    url, heard = f"{instance.url}/socket.io/?EIO=4&transport=polling", list[str]()
    async with aiohttp.ClientSession() as session:
        async with session.get(url) as response:
            url += "&sid=" + json.loads((await response.text())[1:])["sid"]
        async with session.post(url, data="40" + json.dumps({"token": by})) as response:
            assert response.status == 200
        while not any(message.startswith("4") for message in heard):
            async with session.get(url) as response:
                if response.status != 200:
                    break
                heard += (await response.text()).split("\x1e")
    return heard


async def test_a_polling_start_is_not_refused_for_good_either(fleet: Fleet) -> None:
    """Clients start by polling unless told otherwise, and give up at a CONNECT_ERROR."""
    keys = KeyServer()
    instance = await fleet.start("web", JWT_JWKS_URL=keys.url)
    heard = await connect_by_polling(instance, signed(RSA, "one"))
    assert not any(message.startswith("4") for message in heard), heard
    assert (await connect_by_polling(instance, SERVICE))[0].startswith('40{"sid"')


async def test_tokens_of_a_public_key(fleet: Fleet) -> None:
    instance = await fleet.start("web", JWT_PUBLIC_KEY=pem(RSA).replace("\n", "\\n"), JWT_SECRET="")
    assert await on_both_doors(instance, signed(RSA)) == (200, "ok")
    signing = jwt.encode(GOOD, SECRET, "HS256").rpartition(".")[0]
    confused = f"{signing}.{unpadded(hmac.digest(pem(RSA).encode(), signing.encode(), 'sha256'))}"
    for bad in (
        signed(OTHER_RSA),
        signed(RSA, exp=int(time.time()) - 1),
        jwt.encode(GOOD, "waybill-development-secret-never-use-in-production", "HS256"),
        SERVICE,
        confused,
    ):
        assert await on_both_doors(instance, bad) == (401, "unauthenticated")


async def test_tokens_of_a_key_server_that_comes_late_rotates_and_goes(fleet: Fleet) -> None:
    keys = KeyServer()
    keys.keys["one"] = RSA
    instance = await fleet.start("web", JWT_JWKS_URL=keys.url, JWKS_RETRY_S="1", JWKS_REFRESH_S="1")
    good = signed(RSA, "one")
    # nobody can tell whether it is good: refused for now, and clients come back
    assert await on_both_doors(instance, good) == (503, "closed")
    reply: Reply = await instance.get("/orders", by=good)
    refusal(reply, 503, "unavailable")
    assert reply.headers["Retry-After"]
    assert await on_both_doors(instance, BAD["malformed"]) == (401, "unauthenticated")
    assert await on_both_doors(instance, SERVICE) == (200, "ok"), "our own key needs no key server"

    async def both(by: str, wanted: tuple[int, str]) -> bool:
        return await on_both_doors(instance, by) == wanted

    async with keys.serving():
        await until(lambda: both(good, (200, "ok")), "the key server is there")
        assert await on_both_doors(instance, signed(OTHER_RSA, "one")) == (401, "unauthenticated")
        assert await on_both_doors(instance, signed(OTHER_RSA, "two")) == (401, "unauthenticated")
        keys.keys["two"] = OTHER_RSA
        await until(lambda: both(signed(OTHER_RSA, "two"), (200, "ok")), "a new key is found")
        del keys.keys["one"]
        await until(lambda: both(good, (401, "unauthenticated")), "a key that was withdrawn counts no more")
        asked = keys.asked
        await asyncio.gather(*(instance.get("/orders", by=signed(RSA, f"k{n}")) for n in range(30)))
        assert keys.asked <= asked + 2, "unknown keys are no way to shoot at the key server"
    assert await on_both_doors(instance, signed(OTHER_RSA, "two")) == (200, "ok"), "known keys survive its absence"
