"""What browsers and proxies meet: origins, preflights, security headers, and who a request is said to come from."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from server.embedded import DataServers
from tests.harness import SECRET, SERVICE, Fleet, Instance, token
from tests.shared import shared_fleet

SHOP, STRANGER = "https://shop.example", "https://evil.example"
POLLING = "/socket.io/?EIO=4&transport=polling"


@pytest.fixture(scope="module")
async def closed(data: DataServers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Instance]:
    """An instance that trusts nobody and invites no other origin: the defaults."""
    async with shared_fleet(data, tmp_path_factory.mktemp("closed")) as fleet:
        yield await fleet.start()


@pytest.fixture(scope="module")
async def opened(data: DataServers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Instance]:
    """An instance in production behind a proxy on this machine, with a shop of another origin."""
    async with shared_fleet(data, tmp_path_factory.mktemp("opened")) as fleet:
        yield await fleet.start(
            "web", ENVIRONMENT="production", CORS_ORIGINS=f"{SHOP},http://localhost:3000", TRUSTED_PROXIES="127.0.0.0/8"
        )


async def ask(instance: Instance, method: str, path: str, **headers: str) -> aiohttp.ClientResponse:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with aiohttp.ClientSession() as session, session.request(method, instance.url + path, headers=named) as reply:
        await reply.read()
        return reply


# CORS


async def test_by_default_no_other_origin_is_invited(closed: Instance) -> None:
    reply = await ask(closed, "GET", "/api/v1/orders", Origin=SHOP, Authorization=f"Bearer {SERVICE}")
    assert reply.status == 200
    assert "Access-Control-Allow-Origin" not in reply.headers
    preflight = await ask(closed, "OPTIONS", "/api/v1/orders", Origin=SHOP, Access_Control_Request_Method="POST")
    assert preflight.status == 405
    assert "Access-Control-Allow-Origin" not in preflight.headers


async def test_a_preflight_is_answered_for_an_invited_origin(opened: Instance) -> None:
    for path in ("/api/v1/orders", "/api/v1/orders/1/status", "/api/v1/nothing-here", "/socket.io/"):
        reply = await ask(
            opened,
            "OPTIONS",
            path,
            Origin=SHOP,
            Access_Control_Request_Method="POST",
            Access_Control_Request_Headers="authorization,content-type,idempotency-key",
        )
        assert reply.status == 204
        assert reply.headers["Access-Control-Allow-Origin"] == SHOP
        assert {"Authorization", "Content-Type", "Idempotency-Key"} <= set(
            reply.headers["Access-Control-Allow-Headers"].split(", ")
        )
        assert {"GET", "POST", "PUT", "PATCH", "DELETE"} == set(
            reply.headers["Access-Control-Allow-Methods"].split(", ")
        )
        assert "Access-Control-Allow-Credentials" not in reply.headers
        assert "Origin" in reply.headers["Vary"]
        refused = await ask(opened, "OPTIONS", path, Origin=STRANGER, Access_Control_Request_Method="POST")
        assert "Access-Control-Allow-Origin" not in refused.headers
        assert "Origin" in refused.headers["Vary"]


async def test_answers_and_refusals_are_readable_for_an_invited_origin(opened: Instance) -> None:
    for path, by, status in (
        ("/api/v1/orders", SERVICE, 200),
        ("/api/v1/orders", "", 401),
        (f"/api/v1/orders/{uuid.uuid4()}", SERVICE, 404),
        ("/api/v1/nothing-here", SERVICE, 404),
    ):
        reply = await ask(opened, "GET", path, Origin=SHOP, Authorization=f"Bearer {by}")
        assert reply.status == status
        assert reply.headers["Access-Control-Allow-Origin"] == SHOP
        exposed = set(reply.headers["Access-Control-Expose-Headers"].split(", "))
        assert {"X-Request-Id", "Retry-After", "RateLimit", "RateLimit-Policy", "ETag"} <= exposed
        assert "Access-Control-Allow-Credentials" not in reply.headers
        assert "Access-Control-Allow-Origin" not in (await ask(opened, "GET", path, Origin=STRANGER)).headers


async def test_a_star_invites_everybody(fleet: Fleet) -> None:
    instance = await fleet.start(CORS_ORIGINS="*")
    reply = await ask(instance, "GET", "/api/v1/orders", Origin=STRANGER, Authorization=f"Bearer {SERVICE}")
    assert reply.headers["Access-Control-Allow-Origin"] == "*"
    assert (await ask(instance, "GET", POLLING, Origin=STRANGER)).headers["Access-Control-Allow-Origin"] == "*"
    # pages for people and for operators are not part of it
    assert "Access-Control-Allow-Origin" not in (await ask(instance, "GET", "/metrics", Origin=STRANGER)).headers


async def upgrades(instance: Instance, **headers: str) -> int:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with aiohttp.ClientSession() as session:
        try:
            async with session.ws_connect(
                f"{instance.url}/socket.io/?EIO=4&transport=websocket", headers=named
            ) as socket:
                assert (await socket.receive_str()).startswith("0{")
                return 101
        except aiohttp.WSServerHandshakeError as refusal:
            return refusal.status


@pytest.mark.parametrize(("origin", "welcome"), [(None, True), ("own", True), (SHOP, False)])
async def test_sockets_are_for_pages_of_their_own_origin(closed: Instance, origin: str | None, welcome: bool) -> None:
    headers = {} if origin is None else {"Origin": closed.url if origin == "own" else origin}
    reply = await ask(closed, "GET", POLLING, **headers)
    assert reply.status == (200 if welcome else 403)
    assert await upgrades(closed, **headers) == (101 if welcome else 403)


async def test_sockets_are_for_invited_origins_too(opened: Instance) -> None:
    reply = await ask(opened, "GET", POLLING, Origin=SHOP)
    assert (reply.status, reply.headers["Access-Control-Allow-Origin"]) == (200, SHOP)
    assert await upgrades(opened, Origin=SHOP) == 101
    assert (await ask(opened, "GET", POLLING, Origin=STRANGER)).status == 403
    assert await upgrades(opened, Origin=STRANGER) == 403


async def test_behind_a_trusted_proxy_the_public_host_is_the_own_origin(opened: Instance, closed: Instance) -> None:
    public = {"Origin": "https://track.example", "X_Forwarded_Host": "track.example", "X_Forwarded_Proto": "https"}
    assert await upgrades(opened, **public) == 101
    assert await upgrades(closed, **public) == 403, "a header of somebody who is no proxy was believed"


# links


async def test_production_without_a_public_url_is_warned_of(opened: Instance, closed: Instance) -> None:
    told = [one["remedy"] for one in opened.log_records() if one["event"] == "public_url_missing"]
    assert told == ["set PUBLIC_URL: links start with http://localhost"]
    assert "public_url_missing" not in closed.log.read_text(), "on a machine of one's own it is right"


# what every answer carries


@pytest.mark.parametrize(
    "path", ["/health/live", "/health/ready", "/metrics", "/docs", "/", "/api/v1/orders", "/nothing", POLLING]
)
async def test_every_answer_is_protected(closed: Instance, path: str) -> None:
    reply = await ask(closed, "GET", path)
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert reply.headers["Referrer-Policy"] == "no-referrer"
    assert reply.headers["X-Frame-Options"] == "DENY"
    assert "frame-ancestors 'none'" in reply.headers["Content-Security-Policy"]
    assert "Server" not in reply.headers
    assert "Strict-Transport-Security" not in reply.headers
    if path.startswith(("/api", "/socket.io")):
        assert reply.headers["Cache-Control"] == "no-store"


async def test_browsers_are_told_to_stay_with_https_when_they_came_by_it(opened: Instance) -> None:
    by_https = await ask(opened, "GET", "/health/live", X_Forwarded_Proto="https")
    assert by_https.headers["Strict-Transport-Security"].startswith("max-age=31536000")
    assert "Strict-Transport-Security" not in (await ask(opened, "GET", "/health/live")).headers


# whom a request is said to come from


def clients(instance: Instance, request_id: str) -> list[Any]:
    return [one["client"] for one in instance.log_records() if one.get("request_id") == request_id and "status" in one]


async def test_the_log_names_the_client_behind_a_trusted_proxy_only(opened: Instance, closed: Instance) -> None:
    for instance, client in ((opened, "203.0.113.9"), (closed, "127.0.0.1")):
        request_id = uuid.uuid4().hex
        await ask(instance, "GET", "/health/live", X_Request_Id=request_id, X_Forwarded_For="6.6.6.6, 203.0.113.9")
        assert clients(instance, request_id) == [client]


async def test_a_misspelt_network_is_a_sentence_at_start(fleet: Fleet) -> None:
    instance = await fleet.start(ready=False, TRUSTED_PROXIES="10.0.0.0/33")
    assert instance.process.wait(30) == 1
    said = instance.log.read_text()
    assert said.startswith("waybill: TRUSTED_PROXIES holds '10.0.0.0/33'")
    assert "Traceback" not in said


async def test_a_poll_that_arrives_in_pieces_is_read_whole(closed: Instance) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(closed.url + POLLING) as reply:
            sid = json.loads((await reply.text())[1:])["sid"]
        connect = f'40{{"token":"{token("customer", "c1")}"}}'.encode()

        async def pieces() -> AsyncIterator[bytes]:
            for at in range(0, len(connect), 50):
                yield connect[at : at + 50]

        async with session.post(f"{closed.url}{POLLING}&sid={sid}", data=pieces()) as reply:
            assert await reply.text() == "ok"
        async with session.get(f"{closed.url}{POLLING}&sid={sid}") as reply:
            assert (await reply.text()).startswith('40{"sid"')
    assert SECRET not in closed.log.read_text()
