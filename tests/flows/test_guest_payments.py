"""Payment links, and that nothing but paying is reachable with one: every route and every event is tried."""

from __future__ import annotations

import re
import time
import uuid
from typing import Any, NamedTuple

import pytest

from server import openapi
from server.rest import ROUTES, Route
from server.sockets import EVENTS
from tests.harness import SERVICE, Instance, Watcher, token, until
from tests.shared import refusal

Pair = tuple[Instance, Instance]
JsonSchema = dict[str, Any]

STAFF, CUSTOMER = token("staff", "s1"), token("customer", "c1")

OF_ITS_ORDER = {
    "GET /orders/{order_id}": "ok",
    "GET /orders/{order_id}/events": "ok",
    "POST /orders/{order_id}/cancel": "ok",
    "POST /orders/{order_id}/payment-method": "ok",
    "POST /payments": "ok",
    "GET /payments/{payment_id}": "ok",
    "GET /payments/{payment_id}/history": "ok",
    "GET /payments/{payment_id}/refunds": "ok",
    "POST /payments/{payment_id}/cancel": "ok",
    "POST /payments/{payment_id}/verify": "invalid_signature",  # it may say so; only the gateway's word counts
    "POST /payments/{payment_id}/confirm": "invalid",  # of Stripe's payments only
    "GET /refunds/{refund_id}": "ok",
}
"""What a guest that pays may do with its one order, and with no other, and the answer that it gets here."""

OF_EVERY_ORDER = {"GET /payments/providers": "ok", "GET /payments": "ok"}
"""What names no order: a list holds what is the guest's own."""

EVENTS_OF_ITS_ORDER = {"subscribeToOrder"}
OF_NO_ORDER = {"unsubscribeFromOrder", "refreshToken"}
"""Events that name no order, or answer the same whatever they name."""


class Target(NamedTuple):
    """An order, and what path parameters stand for when they are its."""

    id: str
    secret: str
    token: str
    """Of a guest that pays, of this order alone."""
    names: dict[str, str]


async def target(instance: Instance, route: str = "") -> Target:
    """An order with a payment that was begun; for routes about refunds one that was paid in cash and refunded."""
    order = await instance.place(paymentMethod="online")
    link = (await instance.post(f"/orders/{order['id']}/payment-link", {})).body
    secret = link["url"].rsplit("/", 1)[1]
    names = {"order_id": order["id"], "link_id": link["id"], "agent_id": "a1", "date": "2026-11-21"}
    if "refund_id" in route:
        cash = {"orderId": order["id"], "amount": 25_200, "currency": "INR"}
        paid = await instance.post("/payments/cash", cash, by=STAFF)
        assert paid.status == 201, paid
        returned = {"reason": "No", "amount": 100, "currency": "INR", "channel": "manual"}
        refund = await instance.post(f"/payments/{paid.body['id']}/refunds", returned, by=STAFF)
        assert refund.status == 201, refund
        names |= {"payment_id": paid.body["id"], "refund_id": refund.body["id"]}
    else:
        begun = await instance.post("/payments", {"orderId": order["id"], "provider": "razorpay"})
        assert begun.status == 201, begun
        names |= {"payment_id": begun.body["id"]}
    return Target(order["id"], secret, (await follow(instance, secret))["token"], names)


async def follow(instance: Instance, secret: str) -> dict[str, Any]:
    reply = await instance.post("/links/follow", {"secret": secret}, by=None)
    assert reply.status == 200, reply
    grant: dict[str, Any] = reply.body
    return grant


# paths and bodies, out of the documents: so that routes that come later are tried too


def path_of(route: Route, to: Target) -> str:
    return re.sub(r"\{(\w+)\}", lambda name: to.names.get(name[1], str(uuid.uuid4())), route.path)


def operation_of(route: Route) -> JsonSchema:
    found: JsonSchema = openapi.document()["paths"][openapi.address(route)][route.method.lower()]
    return found


def body_of(route: Route, to: Target) -> Any:
    """A body that fits the route's schema and names the order wherever an order is named; None: it takes none."""
    body = operation_of(route).get("requestBody")
    return instance_of(body["content"]["application/json"]["schema"], to) if body else None


def query_of(route: Route, to: Target) -> str:
    parameters = [one for one in operation_of(route)["parameters"] if one["in"] == "query"]
    needed = {one["name"]: instance_of(one["schema"], to) for one in parameters if one["required"]}
    if any(one["name"] == "orderId" for one in parameters):
        needed["orderId"] = to.id
    return "?" + "&".join(f"{name}={value}" for name, value in needed.items()) if needed else ""


def instance_of(schema: JsonSchema, to: Target, name: str = "") -> Any:
    """Something small that fits the schema."""
    if "$ref" in schema:
        return instance_of(openapi.document()["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]], to, name)
    if name == "orderId":
        return to.id
    if name == "secret":
        return to.secret
    for choice in ("anyOf", "oneOf", "allOf"):
        if choice in schema:
            rest = {key: value for key, value in schema.items() if key != choice}
            return instance_of({**rest, **schema[choice][0]}, to, name)
    if schema.get("examples"):
        example = schema["examples"][0]
        return {**example, "orderId": to.id} if isinstance(example, dict) and "orderId" in example else example
    if "enum" in schema or "const" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    match schema.get("type"):
        case "object":
            members = schema.get("properties", {})
            return {one: instance_of(members[one], to, one) for one in schema.get("required", ())}
        case "array":
            return [instance_of(schema["items"], to)] * schema.get("minItems", 1)
        case "integer" | "number":
            return schema.get("minimum", 1)
        case "boolean":
            return True
        case "null":
            return None
    if schema.get("format") == "uuid":
        return str(uuid.uuid4())
    if schema.get("format") in ("date-time", "date"):
        return "2026-11-21T00:00:00Z"[: 10 if schema["format"] == "date" else None]
    return "x" * schema.get("minLength", 1)


async def answers(instance: Instance, route: Route, to: Target, by: str) -> tuple[int, str]:
    """Status and code of a request about `to` by the bearer."""
    path = path_of(route, to) + query_of(route, to)
    reply = await instance.request(route.method, path, body_of(route, to), by=by)
    return reply.status, reply.code if reply.status >= 400 else "ok"


def name_of(route: Route) -> str:
    return f"{route.method} {route.path}"


@pytest.mark.parametrize("route", [one for one in ROUTES if not one.public], ids=name_of)
async def test_a_route_answers_the_guest_that_pays_only_if_it_serves_paying(pair: Pair, route: Route) -> None:
    mine, others = await target(pair[0], route.path), await target(pair[0], route.path)
    to_others = await answers(pair[1], route, others, mine.token)
    to_mine = await answers(pair[1], route, mine, mine.token)
    if name_of(route) in OF_ITS_ORDER:
        assert to_others == (404, "not_found"), "another order is not there"
        assert to_mine[1] == OF_ITS_ORDER[name_of(route)]
    elif name_of(route) in OF_EVERY_ORDER:
        assert {to_others[1], to_mine[1]} == {OF_EVERY_ORDER[name_of(route)]}
    else:
        refusals = {(403, "forbidden"), (404, "not_found")}
        assert {to_others, to_mine} <= refusals, "it answers a guest that pays: if that is meant, name it in this file"


def payload_of(event: str, to: Target, by: str) -> dict[str, Any]:
    payloads: dict[str, dict[str, Any]] = {
        "updateLocation": {"lat": 12.97, "lng": 77.59, "ts": time.time() * 1000},
        "updateOrderStatus": {"status": "confirmed"},
    }
    return {"token": by} if event == "refreshToken" else {"orderId": to.id, **payloads.get(event, {})}


@pytest.mark.parametrize("event", EVENTS)
async def test_an_event_answers_the_guest_that_pays_only_if_it_serves_paying(pair: Pair, event: str) -> None:
    mine, others = await target(pair[0]), await target(pair[0])
    async with Watcher(pair[1], mine.token) as watcher:
        to_others = await watcher.call(event, payload_of(event, others, mine.token))
        to_mine = await watcher.call(event, payload_of(event, mine, mine.token))
    if event in OF_NO_ORDER:
        assert to_others["ok"]
        assert to_mine["ok"]
    elif event in EVENTS_OF_ITS_ORDER:
        assert to_others["error"]["code"] == "not_found"
        assert to_mine["ok"]
    else:
        assert to_others["error"]["code"] in ("forbidden", "not_found")
        assert to_mine["error"]["code"] in ("forbidden", "not_found")


def test_every_name_in_this_file_is_a_route_or_an_event() -> None:
    assert {name_of(route) for route in ROUTES} >= OF_ITS_ORDER.keys() | OF_EVERY_ORDER.keys()
    assert set(EVENTS) >= EVENTS_OF_ITS_ORDER | OF_NO_ORDER


async def test_a_list_holds_the_payments_of_its_one_order(pair: Pair) -> None:
    mine, others = await target(pair[0]), await target(pair[0])
    for asked in ("", f"?orderId={mine.id}"):
        listed = await pair[1].get(f"/payments{asked}", by=mine.token)
        assert [one["orderId"] for one in listed.body["items"]] == [mine.id]
    assert (await pair[1].get(f"/payments?orderId={others.id}", by=mine.token)).body["items"] == []
    assert (await pair[1].get("/payments?customerId=c1", by=mine.token)).body["items"][1:] == []


# payment links


async def test_a_payment_link_has_this_shape(pair: Pair) -> None:
    order = await pair[0].place(paymentMethod="online")
    for by in (SERVICE, STAFF):
        reply = await pair[0].post(f"/orders/{order['id']}/payment-link", {"ttlS": 600}, by=by)
        assert reply.status == 201
        assert reply.body.keys() == {"id", "url", "token", "scope", "expiresAt"}
        assert reply.body["scope"] == "pay"
        assert re.fullmatch(rf"http://localhost:{pair[0].port}/pay/[A-Za-z0-9_-]{{43}}", reply.body["url"])
        grant = await follow(pair[1], reply.body["url"].rsplit("/", 1)[1])
        assert (grant["scope"], grant["orderId"]) == ("pay", order["id"])
    refusal(await pair[0].post(f"/orders/{order['id']}/payment-link", {}, by=CUSTOMER), 403, "forbidden")


async def test_a_repeated_request_for_a_link_gets_the_same_one_and_links_of_both_kinds_differ(pair: Pair) -> None:
    order = await pair[0].place(paymentMethod="online")
    made = [
        (await pair[n].post(f"/orders/{order['id']}/{kind}-link", {}, headers={"Idempotency-Key": "k1"})).body
        for n, kind in enumerate(("payment", "payment", "tracking"))
        for n in (n % 2,)
    ]
    assert made[0]["id"] == made[1]["id"]
    assert made[0]["url"].rsplit("/", 1)[1] == made[1]["url"].rsplit("/", 1)[1]
    assert (made[2]["scope"], made[2]["id"] == made[0]["id"]) == ("track", False)


async def test_an_ended_payment_link_ends_its_guests(pair: Pair) -> None:
    a, b = pair
    mine = await target(a)
    assert (await b.get(f"/orders/{mine.id}", by=mine.token)).status == 200
    ended = await a.request("DELETE", f"/orders/{mine.id}/links/{mine.names['link_id']}", by=CUSTOMER)
    assert ended.status == 204

    async def out() -> bool:
        return (await b.get(f"/orders/{mine.id}", by=mine.token)).status == 401

    await until(out, "the guest's token has ended on the other instance", 1.0)
    refusal(await b.post("/links/follow", {"secret": mine.secret}, by=None), 410, "link_expired")


async def test_the_room_hears_how_the_order_is_to_be_paid(pair: Pair) -> None:
    a, b = pair
    mine = await target(a)
    tracking = (await a.post(f"/orders/{mine.id}/tracking-link", {})).body["token"]
    async with Watcher(b, mine.token) as payer, Watcher(b, tracking) as onlooker:
        await payer.watch(mine.id)
        await onlooker.watch(mine.id)
        changed = await a.post(f"/orders/{mine.id}/payment-method", {"paymentMethod": "cash"}, by=mine.token)
        assert (changed.status, changed.body["payment"]["method"]) == (200, "cash")
        assert not changed.body.keys() & {"expiresAt", "waitingFor"}
        whole = await payer.hears("paymentMethodUpdate", orderId=mine.id)
        assert whole["payment"] == changed.body["payment"]
        redacted = await onlooker.hears("paymentMethodUpdate", orderId=mine.id)
        assert redacted["payment"] == {"method": "cash", "status": "unpaid"}
        await a.move(mine.id, "confirmed")
        late = await a.post(f"/orders/{mine.id}/payment-method", {"paymentMethod": "online"}, by=mine.token)
        refusal(late, 409, "order_closed")
