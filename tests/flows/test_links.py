"""Tracking links: made by who owns the order, followed by who has them, ended everywhere at once."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import jwt
import pytest

from server.embedded import DataServers
from tests.harness import SERVICE, Instance, Reply, Watcher, token, until
from tests.shared import refusal, shared_fleet

Pair = tuple[Instance, Instance]

PUBLIC_URL = "https://track.example"
TTL_MAX_S = 86_400
EVERYWHERE_S = 1.0
"""The contract's: an ended link works nowhere after this."""

CUSTOMER, OTHER = token("customer", "c1"), token("customer", "c2")
STAFF, ADMIN = token("staff", "s1"), token("admin", "x1")


@pytest.fixture(scope="module")
async def pair(data: DataServers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    async with shared_fleet(data, tmp_path_factory.mktemp("links")) as fleet:
        yield await fleet.pair(PUBLIC_URL=PUBLIC_URL, LINK_TTL_MAX_S=str(TTL_MAX_S), LINK_TTL_S="7200")


async def link(instance: Instance, order_id: str, body: Any = None, by: str = SERVICE) -> dict[str, Any]:
    reply = await instance.post(f"/orders/{order_id}/tracking-link", body, by=by)
    assert reply.status == 201, reply
    made: dict[str, Any] = reply.body
    return made


def secret_of(made: dict[str, Any]) -> str:
    url: str = made["url"]
    assert url.startswith(f"{PUBLIC_URL}/track/")
    return url.removeprefix(f"{PUBLIC_URL}/track/")


async def follow(instance: Instance, secret: str) -> Reply:
    return await instance.post("/links/follow", {"secret": secret}, by=None)


async def under_way(instance: Instance) -> dict[str, Any]:
    """An order with everything that a guest may not see."""
    order = await instance.place()
    await instance.post(f"/orders/{order['id']}/status", {"status": "confirmed", "note": "For the neighbour"})
    await instance.assign(order["id"], "a1", agentName="Ravi Kumar", vehicle="KA 01 AB 1234")
    return order


def lives_until(made: dict[str, Any]) -> float:
    return dt.datetime.fromisoformat(made["expiresAt"]).timestamp()


# making and following


@pytest.mark.parametrize("by", [CUSTOMER, STAFF, ADMIN, SERVICE], ids=["customer", "staff", "admin", "service"])
async def test_a_link_has_this_shape(pair: Pair, by: str) -> None:
    order = await pair[0].place()
    made = await link(pair[0], order["id"], by=by)
    assert made.keys() == {"id", "url", "token", "scope", "expiresAt"}
    assert made["scope"] == "track"
    assert len(secret_of(made)) >= 43, "256 bits"
    assert 7200 - 30 < lives_until(made) - time.time() <= 7200 + 1
    claims = jwt.decode(made["token"], options={"verify_signature": False})
    assert (claims["role"], claims["scope"], claims["orders"]) == ("guest", "track", [order["id"]])
    assert claims["jti"] == made["id"]
    assert claims["exp"] == pytest.approx(lives_until(made), abs=1)
    other = await link(pair[0], order["id"], by=by)
    assert other["id"] != made["id"]
    assert secret_of(other) != secret_of(made)


@pytest.mark.parametrize("followed", [False, True], ids=["the token of the link", "the token of its url"])
async def test_a_guest_sees_the_redacted_order_on_both_doors(pair: Pair, followed: bool) -> None:
    a, b = pair
    order = await under_way(a)
    made = await link(a, order["id"])
    by = made["token"]
    if followed:
        reply = await follow(b, secret_of(made))
        assert reply.status == 200
        assert reply.body.keys() == {"token", "orderId", "scope", "expiresAt"}
        assert (reply.body["orderId"], reply.body["scope"]) == (order["id"], "track")
        assert lives_until(reply.body) <= time.time() + 3600 + 1, "GUEST_TOKEN_TTL_S, not the link's life"
        by = reply.body["token"]
    seen = await b.get(f"/orders/{order['id']}", by=by)
    assert seen.status == 200
    listed = await a.get(f"/orders/{order['id']}/events", by=by)
    async with Watcher(a, by) as one, Watcher(b, by) as other:
        answers = [await watcher.watch(order["id"], after=0) for watcher in (one, other)]
        await a.post(f"/orders/{order['id']}/status", {"status": "preparing", "note": "Two bells"})
        await a.assign(order["id"], "a2", agentName="Asha Rao", vehicle="KA 02")
        heard = []
        for watcher in (one, other):
            await watcher.hears("deliveryAgentAssigned", orderId=order["id"], seq=5)
            assert watcher.seqs(order["id"]) == [4, 5], "every number"
            heard.append(watcher.events(order["id"]))
    assert heard[0] == heard[1]
    assert answers[0] == answers[1]
    assert answers[0]["order"] == seen.body
    assert answers[0]["events"] == listed.body["events"]
    assert [event["seq"] for event in listed.body["events"]] == [1, 2, 3]
    whole = f"{seen.body} {listed.body} {answers} {heard}"
    hidden = ["Meera", "+919000090000", "MG Road", "Ring twice", "neighbour", "bells", "Kumar", "Rao", "'shop'", "'c1'"]
    assert [text for text in (*hidden, "actor", "note", "12000", "'a1'", "'a2'") if text in whole] == []
    assert seen.body["agent"]["name"] == "Ravi"
    assert seen.body.keys().isdisjoint({"contact", "deliveryAddress", "notes", "totals", "customerId"})


async def test_a_guest_of_a_link_may_only_look(pair: Pair) -> None:
    a, b = pair
    order, other = await a.place(), await a.place()
    by = (await link(a, order["id"]))["token"]
    path = f"/orders/{order['id']}"
    for where, body in (
        (f"{path}/status", {"status": "confirmed"}),
        (f"{path}/cancel", {"reason": "No"}),
        (f"{path}/assign", {"agentId": "a1"}),
        (f"{path}/tracking-link", {}),
    ):
        refusal(await b.post(where, body, by=by), 403, "forbidden")
    refusal(await b.get(f"/orders/{other['id']}", by=by), 404, "not_found")
    async with Watcher(b, by) as watcher:
        answer = await watcher.call("subscribeToOrder", {"orderId": other["id"]})
        assert answer["error"]["code"] == "not_found"
    assert (await a.get(path)).body["seq"] == 1


async def test_an_unknown_secret_is_not_found(pair: Pair) -> None:
    order = await pair[0].place()
    made = await link(pair[0], order["id"])
    for unknown in ("x", made["id"], secret_of(made)[:-1], secret_of(made) + "A", made["token"][:200]):
        refusal(await follow(pair[0], unknown), 404, "not_found")
    refusal(await follow(pair[0], ""), 422, "invalid", "/secret")


# the end of its life


async def test_a_link_ends_with_its_time(pair: Pair) -> None:
    a, b = pair
    order = await a.place()
    made = await link(a, order["id"], {"ttlS": 2})
    assert lives_until(made) - time.time() <= 2
    async with Watcher(b, made["token"]) as watcher:
        await watcher.watch(order["id"])

        async def ended() -> bool:
            return (await follow(b, secret_of(made))).status == 410

        await until(ended, "the link has expired")
        assert time.time() >= lives_until(made) - 0.001, "not before its time"
        refusal(await follow(a, secret_of(made)), 410, "link_expired")
        refusal(await a.get(f"/orders/{order['id']}", by=made["token"]), 401, "unauthenticated")
        await watcher.hears("subscriptionClosed", orderId=order["id"], code="expired")
        await watcher.hears("disconnected", code="expired")
        await until(watcher.disconnected.is_set, "the socket ends")


async def test_a_followed_token_lives_no_longer_than_its_link(pair: Pair) -> None:
    order = await pair[0].place()
    made = await link(pair[0], order["id"], {"ttlS": 60})
    reply = await follow(pair[1], secret_of(made))
    assert lives_until(reply.body) == pytest.approx(lives_until(made), abs=0.002)


@pytest.mark.parametrize("ttl_s", [TTL_MAX_S + 1, 10**9, 0, -1, 1.5, "60", None])
async def test_a_life_that_cannot_be_is_invalid(pair: Pair, ttl_s: Any) -> None:
    order = await pair[0].place()
    refusal(await pair[0].post(f"/orders/{order['id']}/tracking-link", {"ttlS": ttl_s}), 422, "invalid", "/ttlS")


async def test_the_longest_life_is_given(pair: Pair) -> None:
    order = await pair[0].place()
    made = await link(pair[0], order["id"], {"ttlS": TTL_MAX_S})
    assert TTL_MAX_S - 30 < lives_until(made) - time.time() <= TTL_MAX_S


@pytest.mark.parametrize("by", [CUSTOMER, STAFF, ADMIN, SERVICE], ids=["customer", "staff", "admin", "service"])
async def test_an_ended_link_works_nowhere_within_a_second(pair: Pair, by: str) -> None:
    a, b = pair
    order = await a.place()
    made, stays = await link(a, order["id"]), await link(a, order["id"])
    followed = (await follow(b, secret_of(made))).body["token"]
    path = f"/orders/{order['id']}"
    async with (
        Watcher(a, made["token"]) as here,
        Watcher(b, followed) as there,
        Watcher(b, stays["token"]) as other,
    ):
        for watcher in (here, there, other):
            await watcher.watch(order["id"])
        ended = await a.request("DELETE", f"{path}/links/{made['id']}", by=by)
        assert (ended.status, ended.body) == (204, b"")
        deadline = time.monotonic() + EVERYWHERE_S

        async def refused(instance: Instance, bearer: str) -> bool:
            return (await instance.get(path, by=bearer)).status == 401

        for instance in (b, a):
            for bearer in (made["token"], followed):
                left_s = max(deadline - time.monotonic(), 0)
                await until(lambda i=instance, t=bearer: refused(i, t), "the token is refused", left_s)
        for watcher in (here, there):
            left_s = max(deadline - time.monotonic(), 0)
            await until(watcher.disconnected.is_set, f"a live socket ends; it heard {watcher.heard}", left_s)
            assert [heard for heard in watcher.heard if heard[0] in ("subscriptionClosed", "disconnected")] == [
                ("subscriptionClosed", {"orderId": order["id"], "code": "revoked"}),
                ("disconnected", {"code": "revoked"}),
            ]
        for instance in pair:
            refusal(await follow(instance, secret_of(made)), 410, "link_expired")
        # the other link of the order lives on
        await a.move(order["id"], "confirmed")
        await other.hears("orderStatusUpdate", orderId=order["id"], seq=2)
        assert not other.disconnected.is_set()
        assert all(name != "orderStatusUpdate" for name, _ in here.heard + there.heard)
    assert (await follow(b, secret_of(stays))).status == 200
    again = await b.request("DELETE", f"{path}/links/{made['id']}", by=by)
    assert again.status == 204, "ended is ended"


# who may


async def test_who_may_make_and_end_links(pair: Pair) -> None:
    a, b = pair
    order = await a.place()
    await a.assign(order["id"], "a1")
    made = await link(a, order["id"])
    expected = {
        OTHER: (404, "not_found"),
        token("customer", "c1", orders=[str(uuid.uuid4())]): (404, "not_found"),
        token("service", "shop", orders=[str(uuid.uuid4())]): (404, "not_found"),
        token("agent", "a1"): (403, "forbidden"),
        token("agent", "a2"): (403, "forbidden"),
        token("guest", "g1", orders=[order["id"]]): (403, "forbidden"),
        token("guest", "g1", orders=[order["id"]], scope="pay"): (403, "forbidden"),
        made["token"]: (403, "forbidden"),
    }
    for by, (status, code) in expected.items():
        refusal(await b.post(f"/orders/{order['id']}/tracking-link", {}, by=by), status, code)
        refusal(await b.request("DELETE", f"/orders/{order['id']}/links/{made['id']}", by=by), status, code)
    assert (await follow(b, secret_of(made))).status == 200


async def test_a_link_is_ended_through_its_own_order_only(pair: Pair) -> None:
    a, b = pair
    order, other = await a.place(), await a.place(customerId="c2")
    made = await link(a, order["id"])
    for where, by in ((other["id"], SERVICE), (other["id"], OTHER), (str(uuid.uuid4()), SERVICE)):
        refusal(await b.request("DELETE", f"/orders/{where}/links/{made['id']}", by=by), 404, "not_found")
    refusal(await b.request("DELETE", f"/orders/{order['id']}/links/{uuid.uuid4()}"), 404, "not_found")
    refusal(await b.post(f"/orders/{uuid.uuid4()}/tracking-link", {}), 404, "not_found")
    assert (await follow(b, secret_of(made))).status == 200
    assert (await b.get(f"/orders/{order['id']}", by=made["token"])).status == 200


async def test_many_follow_at_once(pair: Pair) -> None:
    order = await pair[0].place()
    made = await link(pair[0], order["id"])
    replies = await asyncio.gather(*(follow(pair[n % 2], secret_of(made)) for n in range(20)))
    assert {reply.status for reply in replies} == {200}
