"""What a hostile client may send to the REST door: each gets its refusal, changes nothing, and leaves no traceback."""

from __future__ import annotations

import asyncio
import base64
import copy
import gzip
import json
import os
import random
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

import aiohttp
import asyncpg
import psutil
import pytest
from yarl import URL

from server.embedded import DataServers
from server.settings import Settings
from tests.harness import ORDER, SERVICE, SOON_S, Fleet, Instance, Reply, token
from tests.shared import REFUSALS, LogReader, everything, refusal, shared_fleet

GROWTH_MAX_BYTES = 16 * 1024 * 1024
"""What the second half of the made-up bodies may add to the server's memory."""

FUZZ_S = 15.0
"""How long bodies are made up; FUZZ_SEED in the environment repeats a run."""

BODY_MAX_BYTES = Settings().body_max_bytes
DEEP = 100_000
AGENT = token("agent", "a1")


class Door(NamedTuple):
    instance: Instance
    order_id: str
    tables: Any
    log: LogReader

    def path(self, route: str) -> str:
        return route.format(id=self.order_id)


@pytest.fixture(scope="module")
async def fleet(data: DataServers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    async with shared_fleet(data, tmp_path_factory.mktemp("bad_input")) as fleet:
        yield fleet


@pytest.fixture(scope="module")
async def target(fleet: Fleet) -> AsyncIterator[Door]:
    """An instance with one order, given to agent a1."""
    instance = await fleet.start(RATE_LIMITS="off")
    order = await instance.place()
    await instance.move(order["id"], "confirmed")
    await instance.assign(order["id"], "a1", agentName="Ravi")
    tables = await asyncpg.connect(fleet.database_url)
    yield Door(instance, order["id"], tables, LogReader(instance))
    await tables.close()


@pytest.fixture
async def door(target: Door) -> AsyncIterator[Door]:
    """The target; afterwards nothing has changed, nothing bad was logged, and it serves on."""
    before = await everything(target.tables)
    yield target
    assert await everything(target.tables) == before
    target.log.check_quiet()
    ready = await target.instance.get("/health/ready", by=None)
    assert ready.status == 200, ready
    assert (await target.instance.get(f"/orders/{target.order_id}")).status == 200


class Post(NamedTuple):
    """A route that takes a body, one member of it, and whose token may call it."""

    route: str
    member: str
    by: str | None = SERVICE


PLACE = Post("/orders", "notes")
POSTS = [
    PLACE,
    Post("/orders/quote", "notes"),
    Post("/orders/{id}/status", "status"),
    Post("/orders/{id}/assign", "agentId"),
    Post("/orders/{id}/cancel", "reason"),
    Post("/orders/{id}/location", "lat", AGENT),
    Post("/orders/{id}/tracking-link", "ttlS"),
    Post("/links/follow", "secret", None),
    Post("/tokens/revoke", "jti"),
]
each_post = pytest.mark.parametrize("post", POSTS, ids=lambda post: post.route.strip("/").replace("/", "-"))

NOT_JSON = [
    b"{",
    b"[",
    b"nul",
    b"{'%s':1}",
    b'{"%s":"x",}',
    b'{"%s" 1}',
    b'{"%s":}',
    b'{"%s":01}',
    b'{"%s":.5}',
    b'{"%s":1.}',
    b'{"%s":+1}',
    b'{"%s":0x10}',
    b'{"%s":NaN}',
    b'{"%s":Infinity}',
    b'{"%s":-Infinity}',
    b'{"%s":"\x01"}',
    b'{"%s":"\\x41"}',
    b'{"%s":"\\ud800"}',
    b'{"%s":"\\ud800\\ud800"}',
    b'{"%s":"\\udc00"}',
    b'{"%s":"\xed\xa0\x80"}',
    b'{"%s":"\xff"}',
    b'{"%s":"\xc0\x80"}',
    b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf{}",
    b"\x00",
    b"{} {}",
    b"{}x",
    b"<order/>",
    b"[" * DEEP,
    b"[" * DEEP + b"]" * DEEP,
    b'{"%s":' * (DEEP // 8),
    b'{"%s":' + b"[" * DEEP + b"]" * DEEP + b"}",
]


@each_post
async def test_what_is_not_json_is_malformed(door: Door, post: Post) -> None:
    for raw in NOT_JSON:
        sent = raw.replace(b"%s", post.member.encode())
        reply = await door.instance.post(door.path(post.route), raw=sent, by=post.by)
        # what is wrong with the value may be noticed before what is wrong behind it
        assert (reply.status, reply.code) in [(400, "malformed"), (422, "invalid")], (sent[:80], reply)
        if raw in (b"{", b"nul", b"\x00", b'{"%s":}', b'{"%s" 1}'):
            refusal(reply, 400, "malformed")


async def test_good_json_with_more_behind_it_is_malformed(door: Door) -> None:
    for post, body in [
        (PLACE, ORDER),
        (Post("/orders/{id}/status", "status"), {"status": "preparing"}),
        (Post("/orders/{id}/assign", "agentId"), {"agentId": None}),
        (Post("/orders/{id}/cancel", "reason"), {"reason": "x"}),
        (Post("/orders/{id}/tracking-link", "ttlS"), {}),
        (Post("/tokens/revoke", "jti"), {"jti": "x"}),
    ]:
        for more in (b"x", b"{}", b"\0", b",", b"]", b"\x1e"):
            raw = json.dumps(body).encode() + more
            refusal(await door.instance.post(door.path(post.route), raw=raw), 400, "malformed")


@each_post
async def test_json_that_is_no_object_is_invalid(door: Door, post: Post) -> None:
    for raw in (b"[]", b'"text"', b"5", b"-0.0", b"1e999", b"true", b"null", b"[{}]", b"1" * 5000):
        reply = await door.instance.post(door.path(post.route), raw=raw, by=post.by)
        assert (reply.status, reply.code) in [(422, "invalid"), (400, "malformed")], (raw[:40], reply)
        if raw in (b"[]", b'"text"', b"5", b"true", b"null"):
            refusal(reply, 422, "invalid", "")


@each_post
async def test_wrong_types_are_invalid_and_pointed_at(door: Door, post: Post) -> None:
    for value in ([], {}, True, [None], {"a": 1}, 10**30, -(10**400)):
        reply = await door.instance.post(door.path(post.route), {post.member: value}, by=post.by)
        refusal(reply, 422, "invalid")
        # -1 is a latitude; what is missing beside it is told then
        assert reply.body["errors"][0]["pointer"] == f"/{post.member}", (value, reply)


@each_post
async def test_unknown_members_are_refused(door: Door, post: Post) -> None:
    if post.by == AGENT:
        reply = await door.instance.post(door.path(post.route), {"bogus": 1}, by=post.by)
        refusal(reply, 422, "invalid", "/lat")  # phones send more than we need: what is missing counts
        return
    for name in ("bogus", "__proto__", "constructor", "", "status ", "ᴺᴼᵀ", "a" * 5000):
        reply = await door.instance.post(door.path(post.route), {name: 1}, by=post.by)
        refusal(reply, 422, "invalid")
    reply = await door.instance.post(door.path(post.route), {"bogus": 1}, by=post.by)
    refusal(reply, 422, "invalid", "/bogus")


class Case(NamedTuple):
    """A body that is refused as `invalid`, with a pointer at the culprit."""

    pointer: str
    body: dict[str, Any]


def placing(**changes: Any) -> dict[str, Any]:
    return {**ORDER, **changes}


def item(**changes: Any) -> dict[str, Any]:
    free = {"name": "Idli", "quantity": 1, "unitPrice": 100, **changes}
    return placing(items=[free])


def address(**changes: Any) -> dict[str, Any]:
    return placing(deliveryAddress={"line1": "1 A", "city": "B", "country": "IN", **changes})


NULLABLE_MEMBERS = (
    *("customerId", "reference", "fulfilment", "currency", "items", "deliveryAddress", "contact", "billing"),
    *("paymentMethod", "table", "notes", "cartId", "addressId", "couponCode", "prescriptionUploadId", "expectedTotal"),
)
BAD_ORDERS = [
    *[Case(f"/{name}", placing(**{name: None})) for name in NULLABLE_MEMBERS],
    *[Case(f"/{name}", placing(**{name: "x"})) for name in ("cartId", "addressId", "couponCode")],
    Case("/prescriptionUploadId", placing(prescriptionUploadId="x")),
    Case("/expectedTotal", placing(expectedTotal=25200)),
    Case("/items", {key: value for key, value in ORDER.items() if key != "items"}),
    Case("/items", placing(items=[])),
    Case("/items", placing(items=[{"name": "x", "quantity": 1, "unitPrice": 1}] * 201)),
    Case("/items", placing(items={"0": {}})),
    Case("/items/0", placing(items=["x"])),
    Case("/items/0", placing(items=[None])),
    Case("/items/0/quantity", placing(items=[{"name": "x", "unitPrice": 1}])),
    Case("/items/0/name", placing(items=[{"quantity": 1, "unitPrice": 1}])),
    Case("/items/0/unitPrice", placing(items=[{"quantity": 1, "name": "x"}])),
    Case("/items/0/sku", placing(items=[{"quantity": 1, "sku": "x"}])),
    Case("/items/0/bogus", item(bogus=1)),
    Case("/items/1/quantity", placing(items=[ORDER["items"][0], {"name": "x", "quantity": 0, "unitPrice": 1}])),  # type: ignore[index]
    *[Case("/items/0/quantity", item(quantity=value)) for value in (0, -1, 1.5, "1", True, None, 10**6 + 1, 10**400)],
    *[
        Case("/items/0/unitPrice", item(unitPrice=value))
        for value in (-1, 0.5, "100", None, 2**53, 2**63, 2**64, 1e300)
    ],
    *[Case("/items/0/taxRateBp", item(taxRateBp=value)) for value in (-1, 10_001, "18%", None)],
    *[Case("/items/0/name", item(name=value)) for value in ("", "x" * 201, "nul \0", 5, ["x"])],
    Case("/items", item(unitPrice=2**53 - 1, quantity=2)),
    *[Case("/currency", placing(currency=value)) for value in ("", "inr", "XXX", "IN", "INRR", "₹₹₹", "IN\0", 356)],
    *[Case("/fulfilment", placing(fulfilment=value)) for value in ("", "teleport", "DELIVERY", "delivery\n", 1)],
    *[Case("/paymentMethod", placing(paymentMethod=value)) for value in ("", "shells", 1, ["later"])],
    *[Case("/customerId", placing(customerId=value)) for value in ("", "x" * 201, "a\0b", 5)],
    *[Case("/reference", placing(reference=value)) for value in ("", "x" * 65, "\0")],
    *[Case("/notes", placing(notes=value)) for value in ("x" * 1001, "\0", {"text": "x"})],
    *[Case("/table", placing(table=value)) for value in ("", "x" * 201, 12)],
    Case("/contact/bogus", placing(contact={"bogus": 1})),
    Case("/contact/email", placing(contact={"email": None})),
    Case("/contact/phone", placing(contact={"phone": "9" * 201})),
    Case("/billing/gstin", placing(billing={"gstin": 27})),
    Case("/deliveryAddress", placing(deliveryAddress="12 MG Road")),
    *[Case("/deliveryAddress/country", address(country=value)) for value in ("in", "IND", "I1", "IN\n", "", None)],
    *[Case("/deliveryAddress/lat", address(lat=value)) for value in (90.000001, -91, "12.9", None, 1e308)],
    *[Case("/deliveryAddress/lng", address(lng=value)) for value in (180.5, -181, True)],
    *[Case("/deliveryAddress/line1", address(line1=value)) for value in ("", "x" * 201, "\0")],
    Case("/deliveryAddress/pincode", address(pincode="560001")),
    Case("/deliveryAddress/city", placing(deliveryAddress={"line1": "x", "country": "IN"})),
]


async def test_bad_orders_are_pointed_at(door: Door) -> None:
    for case in BAD_ORDERS:
        for route in ("/orders", "/orders/quote"):
            reply = await door.instance.post(route, case.body)
            assert reply.status == 422, (case, reply)
            refusal(reply, 422, "invalid", case.pointer)


POSITION = {"lat": 12.97, "lng": 77.59, "ts": 1_700_000_000_000}
BAD_COMMANDS = {
    "/orders/{id}/status": [
        Case("/status", {}),
        *[Case("/status", {"status": value}) for value in ("", "teleported", "CONFIRMED", None, 3, "preparing\0")],
        *[Case("/note", {"status": "preparing", "note": value}) for value in ("", "x" * 501, "\0", None, 5)],
        *[Case("/override", {"status": "preparing", "override": value}) for value in (True, None, "because", [1])],
        Case("/override/reason", {"status": "preparing", "override": {}}),
        Case("/override/reason", {"status": "preparing", "override": {"reason": ""}}),
        Case("/override/bogus", {"status": "preparing", "override": {"reason": "x", "bogus": 1}}),
    ],
    "/orders/{id}/assign": [
        Case("/agentId", {}),
        *[Case("/agentId", {"agentId": value}) for value in ("", "x" * 201, "\0", 7, [1], False)],
        Case("/agentName", {"agentId": "a2", "agentName": None}),
        Case("/agentName", {"agentId": "a2", "agentName": "x" * 201}),
        Case("/vehicle", {"agentId": "a2", "vehicle": ""}),
    ],
    "/orders/{id}/cancel": [
        Case("/reason", {}),
        *[Case("/reason", {"reason": value}) for value in ("", "x" * 501, "\0", None, 1)],
    ],
    "/orders/{id}/tracking-link": [
        Case("/ttlS", {"ttlS": value}) for value in (0, -1, 1.5, "60", None, True, 90 * 24 * 3600 + 1, 2**63, 10**400)
    ],
    "/links/follow": [
        Case("/secret", {}),
        *[Case("/secret", {"secret": value}) for value in ("", "x" * 201, None, 5)],
    ],
    "/tokens/revoke": [
        Case("/jti", {}),
        Case("/jti", {"jti": "a", "sub": "b"}),
        *[Case("/jti", {"jti": value}) for value in ("", "x" * 201, "\0", None, 5)],
        *[Case("/sub", {"sub": value}) for value in ("", "x" * 201, "\0", None, {"a": 1})],
    ],
    "/orders/{id}/location": [
        *[Case(f"/{name}", {**POSITION, name: None}) for name in ("lat", "lng", "ts")],
        Case("/lng", {"lat": 1, "ts": 1}),
        *[Case("/lat", {**POSITION, "lat": value}) for value in (90.01, -90.01, "12", True, [1], 1e308)],
        *[Case("/lng", {**POSITION, "lng": value}) for value in (180.01, -1e9, "E77")],
        *[Case("/ts", {**POSITION, "ts": value}) for value in (-1, 9e15, 1e300, 10**40, "now", True)],
        Case("/accuracy", {**POSITION, "accuracy": -1}),
        Case("/accuracy", {**POSITION, "accuracy": "good"}),
        Case("/heading", {**POSITION, "heading": 361}),
        Case("/speed", {**POSITION, "speed": -0.1}),
        Case("/battery", {**POSITION, "battery": 101}),
        Case("/positions", {"positions": []}),
        Case("/positions/1/lat", {"positions": [POSITION, {**POSITION, "lat": 91}]}),
        Case("/positions/0", {"positions": ["x"]}),
        Case("/positions/0/ts", {"positions": [{"lat": 1, "lng": 1}]}),
    ],
}


@pytest.mark.parametrize("route", BAD_COMMANDS)
async def test_bad_commands_are_pointed_at(door: Door, route: str) -> None:
    by = AGENT if route.endswith("location") else SERVICE
    for case in BAD_COMMANDS[route]:
        reply = await door.instance.post(door.path(route), case.body, by=by)
        assert reply.status == 422, (case, reply)
        refusal(reply, 422, "invalid", case.pointer)


async def test_too_many_positions_are_too_large(door: Door) -> None:
    reply = await door.instance.post(f"/orders/{door.order_id}/location", {"positions": [POSITION] * 101}, by=AGENT)
    refusal(reply, 413, "too_large")


# bodies that are too large, or not what they say


@each_post
async def test_too_large_a_body_is_refused(door: Door, post: Post) -> None:
    large = b'{"%s":"%s"}' % (post.member.encode(), b"x" * BODY_MAX_BYTES)
    refusal(await door.instance.post(door.path(post.route), raw=large, by=post.by), 413, "too_large")


async def test_a_body_of_unknown_length_is_bounded_too(door: Door) -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield b'{"notes":"'
        while True:  # until the server hangs up
            yield b"x" * 16_384

    async with aiohttp.ClientSession() as session:
        headers = {"Authorization": f"Bearer {SERVICE}", "Content-Type": "application/json"}
        try:
            async with session.post(f"{door.instance.url}/api/v1/orders", data=endless(), headers=headers) as response:
                assert response.status == 413
                assert (await response.json(content_type="application/problem+json"))["code"] == "too_large"
        except aiohttp.ClientOSError:
            pass  # it hung up while we were still sending, as it may
    head = (
        f"POST /api/v1/orders HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SERVICE}\r\n"
        "Content-Type: application/json\r\n"
    )
    chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    answer = await exchange(door, head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 66)
    assert answer.startswith(b"HTTP/1.1 413 "), answer
    answer = await exchange(door, head.encode() + b"Content-Length: 1000000000000\r\n\r\n" + b"x" * BODY_MAX_BYTES * 2)
    assert answer.startswith(b"HTTP/1.1 413 "), answer


async def test_the_largest_body_is_read(door: Door) -> None:
    body = b'{"notes":5' + b" " * (BODY_MAX_BYTES - 11) + b"}"
    assert len(body) == BODY_MAX_BYTES
    refusal(await door.instance.post("/orders", raw=body), 422, "invalid", "/notes")


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "text/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/vnd.api+json",
        "application/json-seq",
        "application/octet-stream",
        "application/json; charset=utf-16",
        "application/json; charset=latin-1",
        "application/json; charset=nonsense",
        "nonsense",
        "",
    ],
)
async def test_other_media_are_not_supported(door: Door, content_type: str) -> None:
    for post in POSTS:
        reply = await door.instance.post(
            door.path(post.route), raw=b"{}", by=post.by, headers={"Content-Type": content_type}
        )
        refusal(reply, 415, "unsupported_media")


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"'])
async def test_utf8_may_be_named(door: Door, content_type: str) -> None:
    reply = await door.instance.post("/orders/quote", ORDER, headers={"Content-Type": content_type})
    assert reply.status == 200, reply


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip", "nonsense"])
async def test_encoded_bodies_are_not_supported(door: Door, encoding: str) -> None:
    packed = gzip.compress(json.dumps(ORDER).encode())
    bomb = gzip.compress(b" " * 20_000_000)
    for body in (packed, packed[:20], bomb, b"\x00\x01nothing packed", json.dumps(ORDER).encode()):
        reply = await door.instance.post("/orders", raw=body, headers={"Content-Encoding": encoding})
        refusal(reply, 415, "unsupported_media")


async def test_no_body_is_an_empty_object(door: Door) -> None:
    refusal(await door.instance.post(f"/orders/{door.order_id}/cancel", raw=b""), 422, "invalid", "/reason")
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"{door.instance.url}/api/v1/orders/{door.order_id}/cancel", headers={"Authorization": f"Bearer {SERVICE}"}
        ) as response,
    ):
        assert response.status == 422


# queries and paths


def cursor(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode() + b"|" + uuid.uuid4().bytes).decode()


BAD_QUERIES = [
    *[("limit", value) for value in ("0", "-1", "201", "abc", "", "1.5", "0x10", "9" * 400, "%00", "NaN")],
    *[("status", value) for value in ("bogus", "", "PENDING", "%00", "%ff")],
    *[("customerId", value) for value in ("", "%00", "x" * 201)],
    *[("agentId", value) for value in ("", "a%00")],
    *[("reference", value) for value in ("", "%00", "x" * 201)],
    *[("from", value) for value in ("yesterday", "", "2026-13-01T00:00:00Z", "2026-01-01T25:00:00Z", "%00")],
    ("from", "2026-01-01T00:00:00"),
    ("from", "0001-01-01T00:00:00%2B14:00"),
    ("to", "2026-01-01T00:00:00"),
    ("to", "tomorrow"),
    ("to", "9999-12-31T23:59:59-14:00"),
    *[("cursor", value) for value in ("x", "%00", "AAAA", "====", "☃", "a" * 201, cursor("yesterday"))],
    ("cursor", cursor("2026-01-01T00:00:00")),
    ("cursor", cursor("0001-01-01T00:00:00+14:00")),
    ("cursor", cursor("9999-12-31T23:59:59-14:00")),
    ("cursor", base64.urlsafe_b64encode(b"2026-01-01T00:00:00+00:00|short").decode()),
    ("bogus", "1"),
    ("Limit", "1"),
]


@pytest.mark.parametrize(("name", "value"), BAD_QUERIES, ids=lambda text: text[:12])
async def test_bad_list_queries_are_pointed_at(door: Door, name: str, value: str) -> None:
    refusal(await fetch(door, "GET", f"/api/v1/orders?{name}={value}"), 422, "invalid", f"/{name}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("after", value) for value in ("-1", "abc", "", "1.5", str(2**31), "9" * 400, "1000")],
        *[("wait", value) for value in ("-1", "abc", "", "1.5", "Infinity")],
        ("limit", "1"),
    ],
)
async def test_bad_event_queries_are_pointed_at(door: Door, name: str, value: str) -> None:
    reply = await fetch(door, "GET", f"/api/v1/orders/{door.order_id}/events?{name}={value}")
    refusal(reply, 422, "invalid", f"/{name}")


@pytest.mark.parametrize("query", ["limit=1&limit=1", "limit=1&limit=2", "status=pending&status=ready"])
async def test_a_parameter_given_twice_is_malformed(door: Door, query: str) -> None:
    refusal(await fetch(door, "GET", f"/api/v1/orders?{query}"), 400, "malformed")
    reply = await fetch(door, "GET", f"/api/v1/orders/{door.order_id}/events?after=0&after=0")
    refusal(reply, 400, "malformed")


BAD_IDS = [
    *("x", "%00", "%20", "null", "-1", "1001", "%ff%fe", "☃", "..%2F..", "'%20or%201=1--", "x" * 4000),
    "{upper}",
    "{braced}",
    "{hex}",
    "{urn}",
    "{id}%20",
    "{id}%0A",
    "{id}%00",
    "00000000-0000-0000-0000-000000000000",
    "٠" * 8 + "-0000-0000-0000-000000000000",
]


@pytest.mark.parametrize("bad", BAD_IDS, ids=lambda text: text[:20])
async def test_a_malformed_id_names_nothing(door: Door, bad: str) -> None:
    hex_ = door.order_id.replace("-", "")
    forms = {"upper": door.order_id.upper(), "braced": f"%7B{door.order_id}%7D", "urn": f"urn:uuid:{door.order_id}"}
    there = bad.format(id=door.order_id, hex=hex_, **forms)
    for method, rest, body, by in [
        ("GET", "", None, SERVICE),
        ("GET", "/events", None, SERVICE),
        ("POST", "/status", {"status": "preparing"}, SERVICE),
        ("POST", "/assign", {"agentId": "a2"}, SERVICE),
        ("POST", "/cancel", {"reason": "x"}, SERVICE),
        ("POST", "/location", POSITION, AGENT),
        ("POST", "/tracking-link", {}, SERVICE),
        ("DELETE", f"/links/{uuid.uuid4()}", None, SERVICE),
    ]:
        refusal(await fetch(door, method, f"/api/v1/orders/{there}{rest}", body, by=by), 404, "not_found")
    refusal(await fetch(door, "DELETE", f"/api/v1/orders/{door.order_id}/links/{there}"), 404, "not_found")


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/api/v1",
            "/api/v1/",
            "/api/v1/bogus",
            "/api/v2/orders",
            "/api/v1/orders/",
            "//api/v1/orders",
            "/API/V1/orders",
        ),
        *("/api/v1/orders/x/y/z", "/api/v1/orders/%2e%2e/%2e%2e/etc/passwd", "/%00", "/%ff", "/favicon.ico", "/.env"),
        "/" + "x" * 7000,
    ],
    ids=lambda path: path[:30],
)
async def test_there_is_nothing_at_unknown_paths(door: Door, path: str) -> None:
    refusal(await fetch(door, "GET", path), 404, "not_found")
    refusal(await fetch(door, "POST", path, ORDER), 404, "not_found")


async def test_unknown_methods_are_named(door: Door) -> None:
    for method, path in [
        *[(method, "/api/v1/orders") for method in ("PUT", "PATCH", "DELETE", "TRACE", "PROPFIND", "HEAD", "OPTIONS")],
        ("DELETE", f"/api/v1/orders/{door.order_id}"),
        ("POST", f"/api/v1/orders/{door.order_id}"),
        ("POST", f"/api/v1/orders/{door.order_id}/events"),
        ("GET", f"/api/v1/orders/{door.order_id}/status"),
        ("GET", "/api/v1/tokens/revoke"),
        ("POST", "/health/ready"),
    ]:
        reply = await fetch(door, method, path)
        assert reply.status == 405, (method, path, reply)
        assert reply.headers["Allow"]
        if method != "HEAD":
            assert reply.headers["Content-Type"].startswith("application/problem+json")
            assert reply.body["status"] == 405
            assert reply.body["requestId"] == reply.headers["X-Request-Id"]


# headers


async def test_a_request_id_is_taken_made_and_returned(door: Door) -> None:
    mine = "Upload-7/retry:2+x=._-"
    for reply in (
        await door.instance.get("/orders", headers={"X-Request-Id": mine}),
        await door.instance.get("/orders/x", headers={"X-Request-Id": mine}),
        await door.instance.get("/nothing", headers={"X-Request-Id": mine}),
        await door.instance.get("/orders", by=None, headers={"X-Request-Id": mine}),
        await door.instance.get("/health/live", by=None, headers={"X-Request-Id": mine}),
    ):
        assert reply.headers["X-Request-Id"] == mine
        if reply.status >= 400:
            assert reply.body["requestId"] == mine
    made = {(await door.instance.get("/orders")).headers["X-Request-Id"] for _ in range(3)}
    assert len(made) == 3
    assert mine in door.log.news()


@pytest.mark.parametrize("given", ["", " ", "x" * 129, "a b", "ünïcode", 'quo"te', "a\tb", "{}", "<script>"])
async def test_a_request_id_that_is_none_is_replaced(door: Door, given: str) -> None:
    reply = await door.instance.get("/orders/x", headers={"X-Request-Id": given})
    refusal(reply, 404, "not_found")
    assert str(uuid.UUID(reply.headers["X-Request-Id"])) == reply.headers["X-Request-Id"]


@pytest.mark.parametrize("key", ["", " ", "x" * 256, "ünï", "tab\there"])
async def test_an_idempotency_key_that_is_none_is_invalid(door: Door, key: str) -> None:
    refusal(await door.instance.post("/orders", ORDER, headers={"Idempotency-Key": key}), 422, "invalid")


GARBAGE = [
    b"GARBAGE\r\n\r\n",
    b"\r\n\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET\r\n\r\n",
    b"BREW /api/v1/orders HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nA: \x00\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 100_000 + b"\r\n\r\n",
    b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"A%d: x\r\n" % n for n in range(5000)) + b"\r\n",
    b"POST /api/v1/orders HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /api/v1/orders HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n{}",
    b"POST /api/v1/orders HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    b"POST /api/v1/orders HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /api/v1/orders HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    b"POST /api/v1/orders HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: nonsense\r\n\r\n{}",
    b"GET http://[::1/ HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /api/v1/orders?\xff\xfe=1 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
]


@pytest.mark.parametrize("sent", GARBAGE, ids=lambda sent: repr(sent[:40]))
async def test_what_is_no_http_is_refused_or_dropped(door: Door, sent: bytes) -> None:
    answer = await exchange(door, sent)
    assert answer == b"" or answer.startswith(b"HTTP/1."), answer
    if answer:
        assert 400 <= int(answer.split()[1]) < 500, answer


async def test_a_bad_body_behind_good_headers_is_refused(door: Door) -> None:
    """What the headers promise and the body does not keep: the request is refused or dropped, never carried out."""
    head = (
        f"POST /api/v1/orders HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SERVICE}\r\n"
        "Content-Type: application/json\r\n"
    ).encode()
    body = json.dumps(ORDER).encode()
    for rest in (
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + body + b"\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % (len(body) + 5) + body + b"\r\n0\r\n\r\n",
        b"Content-Length: %d\r\n\r\n" % (len(body) + 5) + body,
    ):
        answer = await exchange(door, head + rest)
        assert answer == b"" or 400 <= int(answer.split()[1]) < 500, answer


# made up


JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1, 0.5, -0.0, 1e308, -1e308, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *("", " ", "\0", "x" * 300, "x" * 5000, "\U0001f600" * 50, "NaN", "null", "confirmed", "2026-01-01T00:00:00Z"),
    *([], {}, [[]], [{}], {"": {}}, [None] * 300, {"a": {"b": {"c": []}}}, {"__proto__": 1}, ["confirmed"]),
]
TEMPLATES: list[tuple[str, Any, str | None]] = [
    ("/orders", placing(paymentMethod="later", table="4", billing={"name": "A", "gstin": "29"}), SERVICE),
    ("/orders/quote", ORDER, SERVICE),
    ("/orders/{id}/status", {"status": "preparing", "note": "x", "override": {"reason": "y"}}, token("staff")),
    ("/orders/{id}/assign", {"agentId": "a1", "agentName": "R", "vehicle": "V"}, SERVICE),
    ("/orders/{id}/cancel", {"reason": "x"}, SERVICE),
    ("/orders/{id}/location", {**POSITION, "accuracy": 5, "heading": 10, "speed": 2, "battery": 50}, AGENT),
    ("/orders/{id}/location", {"positions": [POSITION, POSITION]}, AGENT),
    ("/orders/{id}/tracking-link", {"ttlS": 60}, SERVICE),
    ("/links/follow", {"secret": "x" * 43}, None),
    ("/tokens/revoke", {"jti": "fuzz"}, SERVICE),
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def made_up(chance: random.Random, template: Any) -> bytes:
    """A body like the template, with something wrong."""
    value = json.loads(json.dumps(template))
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        found = list(places(value))
        if not found:
            break
        container, key = chance.choice(found)
        match chance.randrange(4):
            case 0 | 1:
                container[key] = copy.deepcopy(chance.choice(JUNK))
            case 2 if isinstance(container, dict):
                container[chance.choice(["bogus", "", "status", "items", key + "x"])] = copy.deepcopy(
                    chance.choice(JUNK)
                )
            case _:
                del container[key]
    raw = json.dumps(value, ensure_ascii=chance.random() < 0.5).encode()
    if chance.random() < 0.4:
        broken = bytearray(raw)
        for _ in range(chance.choice((1, 2, 8))):
            at = chance.randrange(len(broken) + 1)
            match chance.randrange(4):
                case 0:
                    broken[at : at + 1] = bytes([chance.randrange(256)])
                case 1:
                    del broken[at : at + chance.randrange(1, 8)]
                case 2:
                    broken[at:at] = chance.choice(
                        [b"\\ud800", b"NaN", b"1e999", b'"', b"\\", b"[" * 500, b"\xed\xa0\x80", b"\0", b",", b"-"]
                    )
                case _:
                    del broken[at:]
        raw = bytes(broken)
    return raw


async def test_made_up_bodies(target: Door) -> None:
    """Whatever is sent, the answer is one of the contract's, every order's events stay numbered without a hole, and the
    server does not grow."""
    seed = int(os.environ.get("FUZZ_SEED") or random.SystemRandom().randrange(2**32))
    print(f"FUZZ_SEED={seed}")  # noqa: T201  # shown when the test fails
    instance, sent, deadline = target.instance, 0, time.monotonic() + FUZZ_S

    async def fuzz(chance: random.Random, session: aiohttp.ClientSession) -> None:
        nonlocal sent
        order_id = (await instance.place())["id"]
        while time.monotonic() < deadline:
            route, template, by = chance.choice(TEMPLATES)
            raw = made_up(chance, template)
            headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {by}"} if by else {})}
            if chance.random() < 0.2:
                headers["Idempotency-Key"] = f"fuzz-{chance.randrange(50)}"
            url = f"{instance.url}/api/v1{route.format(id=order_id)}"
            async with session.post(url, data=raw, headers=headers) as response:
                text = await response.read()
                assert response.status < 500, (seed, route, raw[:2000], text)
                body: Any = json.loads(text) if text else None
                if response.status >= 400:
                    assert response.content_type == "application/problem+json", (seed, route, raw[:2000], text)
                    assert body["code"] in REFUSALS[response.status], (seed, route, raw[:2000], text)
                elif route == "/orders/{id}/cancel":
                    order_id = (await instance.place())["id"]
            sent += 1

    async def warm_rss_bytes() -> int:
        await asyncio.sleep(FUZZ_S / 2)
        return rss_bytes()

    def rss_bytes() -> int:
        return int(psutil.Process(instance.process.pid).memory_info().rss)

    async with aiohttp.ClientSession() as session:
        warm = asyncio.create_task(warm_rss_bytes())
        await asyncio.gather(*(fuzz(random.Random(f"{seed}/{number}"), session) for number in range(6)))
    assert sent > 100
    assert rss_bytes() - await warm < GROWTH_MAX_BYTES, seed
    target.log.check_quiet()
    holes = await target.tables.fetch(
        "select o.id from orders o where o.seq <> (select count(*) from order_events e where e.order_id = o.id)"
        " or o.seq <> (select max(e.seq) from order_events e where e.order_id = o.id)"
    )
    assert holes == []
    assert (await instance.get(f"/orders/{target.order_id}")).status == 200


# helpers


async def fetch(door: Door, method: str, path: str, body: Any = None, *, by: str = SERVICE) -> Reply:
    """A request whose path and query go out exactly as they are written here."""
    url = URL(door.instance.url + path.encode("ascii", "ignore").decode(), encoded=True)
    if not path.isascii():
        url = URL(door.instance.url + path)
    headers = {"Authorization": f"Bearer {by}"}
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, url, json=body, headers=headers, allow_redirects=False) as response,
    ):
        text = await response.read()
        is_json = "json" in response.headers.get("Content-Type", "")
        return Reply(response.status, json.loads(text) if is_json and text else text, response.headers)


async def exchange(door: Door, sent: bytes) -> bytes:
    """Send these bytes, say that this was all, and return what comes back until the server hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", door.instance.port)
    received = b""
    try:
        async with asyncio.timeout(SOON_S):
            writer.write(sent)
            await writer.drain()
            writer.write_eof()
            while more := await reader.read(65_536):
                received += more
    except ConnectionError:
        pass  # hung up before it had read everything, as it may
    finally:
        writer.close()
    return received
