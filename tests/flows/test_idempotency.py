"""The same Idempotency-Key twice is one effect and one answer, whatever the door and whatever the instance."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import aiohttp
import asyncpg
import jwt
import pytest

from server.embedded import DataServers
from tests.harness import ORDER, SERVICE, Fleet, Instance, Reply, Watcher, token, until
from tests.shared import everything, refusal, shared_fleet

STORM = 12
"""How many ask at once."""


class Shop(NamedTuple):
    """Two instances, and their database."""

    a: Instance
    b: Instance
    sql: asyncpg.Connection


@pytest.fixture(scope="module")
async def shop(data: DataServers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    async with shared_fleet(data, tmp_path_factory.mktemp("shop")) as fleet:
        a, b = await fleet.pair(PUBLIC_URL="https://track.example")
        sql = await asyncpg.connect(fleet.database_url)
        yield Shop(a, b, sql)
        await sql.close()


def fresh() -> str:
    return str(uuid.uuid4())


def order_of(customer: str) -> dict[str, Any]:
    return {**ORDER, "customerId": customer}


async def post(instance: Instance, path: str, body: Any, key: str, by: str = SERVICE) -> Reply:
    return await instance.post(path, body, by=by, headers={"Idempotency-Key": key})


async def count(shop: Shop, customer: str) -> int:
    found: int = await shop.sql.fetchval("select count(*) from orders where customer_id = $1", customer)
    return found


def same(one: Reply, other: Reply) -> bool:
    return (one.status, one.body) == (other.status, other.body)


# one effect, one answer


async def test_the_same_again_is_the_same_answer_and_one_effect(shop: Shop) -> None:
    key, body = fresh(), order_of(fresh())
    first = await post(shop.a, "/orders", body, key)
    assert first.status == 201
    await shop.a.move(first.body["id"], "confirmed", "preparing")
    before = await everything(shop.sql)
    again = [await post(instance, "/orders", body, key) for instance in (shop.b, shop.a)]
    assert all(same(first, one) for one in again), "the answer of then, whatever happened since"
    assert await everything(shop.sql) == before
    assert await count(shop, body["customerId"]) == 1


async def test_every_verb_keeps_its_answer(shop: Shop) -> None:
    order = await shop.a.place()
    path = f"/orders/{order['id']}"
    calls: list[tuple[str, Any, int]] = [
        ("/orders/quote", ORDER, 200),
        (f"{path}/assign", {"agentId": "a1", "agentName": "Ravi"}, 200),
        (f"{path}/status", {"status": "confirmed"}, 200),
        (f"{path}/tracking-link", {}, 201),
        (f"{path}/cancel", {"reason": "Ordered twice"}, 200),
        ("/tokens/revoke", {"jti": fresh()}, 204),
    ]
    for where, body, status in calls:
        key = fresh()
        first = await post(shop.a, where, body, key)
        assert first.status == status, first
        before = await everything(shop.sql)
        again = await post(shop.b, where, body, key)
        assert again.status == status
        if "link" not in where:
            assert again.body == first.body
        assert await everything(shop.sql) == before, where


async def test_the_key_is_for_this_command_only(shop: Shop) -> None:
    key, body = fresh(), order_of(fresh())
    await post(shop.a, "/orders", body, key)
    refusal(await post(shop.b, "/orders", {**body, "notes": "Ring once"}, key), 422, "idempotency_mismatch")
    one, other = await shop.a.place(), await shop.a.place()
    key = fresh()
    assert (await post(shop.a, f"/orders/{one['id']}/status", {"status": "confirmed"}, key)).status == 200
    before = await everything(shop.sql)
    refusal(
        await post(shop.b, f"/orders/{one['id']}/status", {"status": "cancelled"}, key), 422, "idempotency_mismatch"
    )
    refusal(
        await post(shop.b, f"/orders/{other['id']}/status", {"status": "confirmed"}, key), 422, "idempotency_mismatch"
    )
    assert await everything(shop.sql) == before


async def test_how_it_is_written_does_not_matter(shop: Shop) -> None:
    key, customer = fresh(), fresh()
    body = order_of(customer)
    first = await post(shop.a, "/orders", body, key)
    backwards = dict(reversed([(name, value) for name, value in body.items()]))
    written = [
        json.dumps(body, indent=4),
        json.dumps(body, separators=(",", ":")),
        json.dumps(backwards),
        json.dumps(body).replace("Meera", "\\u004deera"),
    ]
    for text in written:
        again = await shop.b.post("/orders", raw=text.encode(), headers={"Idempotency-Key": key})
        assert same(first, again), text
    assert await count(shop, customer) == 1


async def test_refusals_are_judged_anew(shop: Shop) -> None:
    order = await shop.a.place()
    key, path = fresh(), f"/orders/{order['id']}/status"
    refusal(await post(shop.a, path, {"status": "preparing"}, key), 409, "illegal_move")
    await shop.a.move(order["id"], "confirmed")
    now = await post(shop.b, path, {"status": "preparing"}, key)
    assert (now.status, now.body["status"]) == (200, "preparing")
    assert same(now, await post(shop.a, path, {"status": "preparing"}, key))
    # a refusal binds the key to nothing: another body may have it
    order, key = await shop.a.place(), fresh()
    refusal(await post(shop.a, f"/orders/{order['id']}/status", {"status": "ready"}, key), 409, "illegal_move")
    assert (await post(shop.a, f"/orders/{order['id']}/status", {"status": "confirmed"}, key)).status == 200


# scope


async def test_the_key_is_the_callers_own(shop: Shop) -> None:
    key, customer = fresh(), fresh()
    callers = [token("service", "shop"), token("service", "other"), token("staff", "shop"), token("admin", "shop")]
    placed = [await post(shop.a, "/orders", order_of(customer), key, by) for by in callers]
    assert [reply.status for reply in placed] == [201] * len(callers)
    assert len({reply.body["id"] for reply in placed}) == len(callers)
    # another token of the same caller is the same caller
    again = await post(shop.b, "/orders", order_of(customer), key, token("staff", "shop", jti=fresh()))
    assert same(placed[2], again)
    assert await count(shop, customer) == len(callers)


async def test_the_key_is_the_verbs_own(shop: Shop) -> None:
    key, body = fresh(), order_of(fresh())
    assert (await post(shop.a, "/orders/quote", body, key)).status == 200
    placed = await post(shop.a, "/orders", body, key)
    assert placed.status == 201
    path = f"/orders/{placed.body['id']}"
    assert (await post(shop.a, f"{path}/assign", {"agentId": "a1"}, key)).status == 200
    assert (await post(shop.a, f"{path}/status", {"status": "confirmed"}, key)).status == 200
    assert (await post(shop.a, f"{path}/cancel", {"reason": "No"}, key)).status == 200
    assert (await shop.a.get(path)).body["seq"] == 4


async def test_a_replay_shows_nothing_to_a_token_that_does_not_reach_the_order(shop: Shop) -> None:
    """A caller is a role and a subject; shops give all their guests one subject, and narrow each token to one order."""
    order, other = await shop.a.place(), await shop.a.place()
    key, path = fresh(), f"/orders/{order['id']}/cancel"
    mine, another = (token("guest", "guest", orders=[one["id"]], scope="pay") for one in (order, other))
    done = await post(shop.a, path, {"reason": "No"}, key, mine)
    assert done.status == 200
    refusal(await post(shop.b, path, {"reason": "No"}, key, another), 404, "not_found")
    looking = token("guest", "guest", orders=[order["id"]], scope="track")
    refusal(await post(shop.b, path, {"reason": "No"}, key, looking), 404, "not_found")
    assert same(done, await post(shop.b, path, {"reason": "No"}, key, mine))

    order, key = await shop.a.place(), fresh()
    path = f"/orders/{order['id']}/status"
    assert (await post(shop.a, path, {"status": "confirmed"}, key)).status == 200
    narrowed = token("service", "shop", orders=[other["id"]])
    refusal(await post(shop.b, path, {"status": "confirmed"}, key, narrowed), 404, "not_found")
    async with Watcher(shop.b, narrowed) as watcher:
        asked = {"orderId": order["id"], "status": "confirmed", "idempotencyKey": key}
        assert (await watcher.call("updateOrderStatus", asked))["error"]["code"] == "not_found"


async def test_both_doors_share_the_key(shop: Shop) -> None:
    order = await shop.a.place()
    path = f"/orders/{order['id']}/status"
    async with Watcher(shop.a, SERVICE) as one, Watcher(shop.b, SERVICE) as other:
        asked = {
            "orderId": order["id"],
            "status": "confirmed",
            "note": "Soon",
            "idempotencyKey": "by socket " + fresh(),
        }
        key = asked["idempotencyKey"]
        assert await one.call("updateOrderStatus", asked) == {"ok": True, "seq": 2}
        assert await other.call("updateOrderStatus", asked) == {"ok": True, "seq": 2}
        replay = await post(shop.b, path, {"note": "Soon", "status": "confirmed"}, key)
        assert (replay.status, replay.body["seq"], replay.body["status"]) == (200, 2, "confirmed")
        refusal(await post(shop.b, path, {"status": "confirmed"}, key), 422, "idempotency_mismatch")
        wrong = await other.call("updateOrderStatus", {**asked, "note": "Later"})
        assert (wrong["ok"], wrong["error"]["code"]) == (False, "idempotency_mismatch")

        key = "by request " + fresh()
        done = await post(shop.a, path, {"status": "preparing"}, key)
        assert done.status == 200
        asked = {"orderId": order["id"], "status": "preparing", "idempotencyKey": key}
        assert await other.call("updateOrderStatus", asked) == {"ok": True, "seq": done.body["seq"]}

        # refused on the one door, judged anew on the other
        key = fresh()
        asked = {"orderId": order["id"], "status": "delivered", "idempotencyKey": key}
        assert (await one.call("updateOrderStatus", asked))["error"]["code"] == "illegal_move"
        await shop.a.move(order["id"], "ready", "out_for_delivery")
        assert (await post(shop.b, path, {"status": "delivered"}, key)).status == 200
        assert await one.call("updateOrderStatus", asked) == {"ok": True, "seq": 8}
    events = (await shop.a.get(f"/orders/{order['id']}/events")).body
    assert [event["seq"] for event in events["events"]] == list(range(1, 9))


async def test_a_replay_tells_nobody_anything(shop: Shop) -> None:
    order = await shop.a.place()
    key, path = fresh(), f"/orders/{order['id']}/status"
    async with Watcher(shop.b, SERVICE) as watcher:
        await watcher.watch(order["id"])
        for instance in (shop.a, shop.b, shop.a):
            assert (await post(instance, path, {"status": "confirmed"}, key)).status == 200
        await shop.a.move(order["id"], "preparing")
        await watcher.hears("orderStatusUpdate", orderId=order["id"], seq=3)
        assert watcher.seqs(order["id"]) == [2, 3]


# many at once


async def test_a_storm_of_one_key_is_one_effect(shop: Shop) -> None:
    key, body = fresh(), order_of(fresh())
    replies = await asyncio.gather(*(post((shop.a, shop.b)[n % 2], "/orders", body, key) for n in range(STORM)))
    done = [reply for reply in replies if reply.status == 201]
    assert done
    assert all(same(done[0], reply) for reply in done)
    for reply in replies:
        if reply.status != 201:
            refusal(reply, 409, "conflict")
    assert await count(shop, body["customerId"]) == 1
    assert same(done[0], await post(shop.b, "/orders", body, key))


async def test_a_storm_over_both_doors_is_one_effect(shop: Shop) -> None:
    order = await shop.a.place()
    key, path = fresh(), f"/orders/{order['id']}/status"
    asked = {"orderId": order["id"], "status": "confirmed", "idempotencyKey": key}
    async with Watcher(shop.a, SERVICE) as one, Watcher(shop.b, SERVICE) as other:
        answers, replies = await asyncio.gather(
            asyncio.gather(*((one, other)[n % 2].call("updateOrderStatus", asked) for n in range(STORM))),
            asyncio.gather(*(post((shop.a, shop.b)[n % 2], path, {"status": "confirmed"}, key) for n in range(STORM))),
        )
    for answer in answers:
        assert answer == {"ok": True, "seq": 2} or answer["error"]["code"] == "conflict", answer
    done = [reply for reply in replies if reply.status == 200]
    assert done or {"ok": True, "seq": 2} in answers
    assert all(reply.body["seq"] == 2 for reply in done)
    assert all(reply.code == "conflict" for reply in replies if reply.status != 200)
    assert (await shop.a.get(f"/orders/{order['id']}")).body["seq"] == 2


async def test_a_key_is_free_again_when_its_holder_dies(fleet: Fleet) -> None:
    """The lock is the transaction's: a killed instance leaves no key that is running for ever."""
    a, b = await fleet.pair()
    order = await a.place()
    key, path = fresh(), f"/orders/{order['id']}/status"
    sql = await asyncpg.connect(fleet.database_url)
    async with sql.transaction():
        await sql.execute("select from orders where id = $1::text::uuid for update", order["id"])  # so that it waits
        running = asyncio.create_task(post(a, path, {"status": "confirmed"}, key))

        async def waits() -> bool:
            return bool(await sql.fetchval("select exists (select from pg_locks where not granted)"))

        await until(waits, "the first one holds the key, and waits for the order")
        refusal(await post(b, path, {"status": "confirmed"}, key), 409, "conflict")
        a.kill()
        with pytest.raises(aiohttp.ClientError):
            await running
    await sql.close()

    async def done() -> Reply | None:
        reply = await post(b, path, {"status": "confirmed"}, key)
        return reply if reply.status == 200 else None

    reply: Reply = await until(done, "the key is free")
    assert reply.body["seq"] == 2


# secrets in answers


async def test_a_link_is_given_again_though_its_secret_is_stored_nowhere(shop: Shop) -> None:
    order = await shop.a.place()
    key, path = fresh(), f"/orders/{order['id']}/tracking-link"
    first = await post(shop.a, path, {"ttlS": 600}, key)
    again = await post(shop.b, path, {"ttlS": 600}, key)
    assert (first.status, again.status) == (201, 201)
    assert {**again.body, "token": ""} == {**first.body, "token": ""}
    secret = first.body["url"].removeprefix("https://track.example/track/")
    claims = [
        jwt.decode(reply.body["token"], options={"verify_signature": False}) | {"iat": 0} for reply in (first, again)
    ]
    assert claims[0] == claims[1]
    for reply in (first, again):
        assert (await shop.a.get(f"/orders/{order['id']}", by=reply.body["token"])).status == 200
    assert await shop.sql.fetchval("select count(*) from links where order_id = $1::text::uuid", order["id"]) == 1
    stored = "\n".join((await everything(shop.sql)).values())
    assert first.body["id"] in stored, "this look sees what is there"
    assert hashlib.sha256(secret.encode()).hexdigest() in stored
    raw = base64.urlsafe_b64decode(secret + "=")
    for hidden in (secret, secret.encode().hex(), raw.hex(), base64.b64encode(raw).decode().rstrip("=")):
        assert hidden not in stored
    assert "eyJ" not in stored
