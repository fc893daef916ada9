"""Rates against a real Redis, whom requests come from behind proxies, and the sentences of settings that are wrong."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from models.errors import RateLimited, Unavailable
from models.user import Actor, Role
from server.edges import Edges, _plain, protect
from server.embedded import DataServers
from server.limits import SPEND, STANDING, Limits
from server.realtime import websocket
from server.realtime.bus import Bus
from server.realtime.quota import Quota
from server.settings import CannotStart, Settings, load

SLACK_MS = 5
"""Redis' clock and ours are read at different moments."""


def request_from(peer: str, **headers: str) -> web.Request:
    class Transport:
        def get_extra_info(self, name: str, default: object = None) -> object:
            return (peer, 4711) if name == "peername" else default

    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return make_mocked_request("GET", "/api/v1/orders", headers=sent, transport=Transport())


def somebody(role: Role = Role.CUSTOMER) -> Actor:
    return Actor(sub=uuid.uuid4().hex, role=role, exp=2e9)


@asynccontextmanager
async def limits(redis_url: str, **changes: Any) -> AsyncIterator[Limits]:
    settings = Settings(**changes)
    bus = Bus(
        redis_url,
        timeout_s=1,
        ping_interval_s=1,
        scripts=[SPEND],
        on_message=lambda channel, payload: None,
        on_change=lambda: None,
    )
    running = asyncio.create_task(bus.run())
    await bus.reached.wait()
    yield Limits(settings, bus, Edges(settings))
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


# rates


async def test_a_burst_is_let_through_and_the_next_one_told_when_to_come_back(data: DataServers) -> None:
    async with limits(data.redis_url, rate_user_requests_per_min=60, rate_user_burst_max=5) as some:
        actor, seen = somebody(), []
        for _ in range(5):
            request = request_from("192.0.2.1")
            await some.user(request, actor)
            seen.append(request[STANDING].left)
        assert seen == [4, 3, 2, 1, 0]
        assert request[STANDING].headers() == {"RateLimit-Policy": '"user";q=5;w=5', "RateLimit": '"user";r=0;t=5'}
        with pytest.raises(RateLimited) as refused:
            await some.user(request, actor)
        wait_ms = refused.value.fields["retryAfterMs"]
        assert isinstance(wait_ms, int)
        assert 500 < wait_ms <= 1000
        await asyncio.sleep((wait_ms + SLACK_MS) / 1000)
        await some.user(request, actor)
        await some.user(request, somebody())  # somebody else has a quota of his own


def test_a_quota_in_memory_is_a_burst_and_then_a_rate() -> None:
    quota, now = Quota(per_s=10, burst=3), 1000.0
    for _ in range(3):
        assert quota.wait_s(now) == 0
        quota.take(now)
    assert quota.wait_s(now) == pytest.approx(0.1)
    assert quota.wait_s(now + 0.05) == pytest.approx(0.05)
    assert quota.wait_s(now + 0.1001) == 0
    quota.take(now + 0.1001)
    assert quota.wait_s(now + 0.1001) == pytest.approx(0.1, abs=0.001)
    quota.take(now + 0.1001)  # it was not there: it is owed
    assert quota.wait_s(now + 0.1001) == pytest.approx(0.2, abs=0.001)
    assert quota.wait_s(now + 60) == 0
    for _ in range(3):
        assert quota.wait_s(now + 60) == 0
        quota.take(now + 60)
    assert quota.wait_s(now + 60) > 0, "rest saves up no more than a burst"


async def test_two_instances_share_one_limit(data: DataServers) -> None:
    how: dict[str, Any] = {"rate_user_requests_per_min": 60, "rate_user_burst_max": 6}
    async with limits(data.redis_url, **how) as a, limits(data.redis_url, **how) as b:
        actor, passed = somebody(), 0
        for number in range(20):
            try:
                await (a, b)[number % 2].user(request_from("192.0.2.1"), actor)
                passed += 1
            except RateLimited:
                pass
        assert passed == 6


async def test_many_at_once_do_not_slip_through(data: DataServers) -> None:
    async with limits(data.redis_url, rate_user_requests_per_min=1, rate_user_burst_max=10) as some:
        actor = somebody()
        asked = (some.user(request_from("192.0.2.1"), actor) for _ in range(200))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [answer for answer in answers if answer is None] == [None] * 10
        assert all(isinstance(answer, RateLimited) for answer in answers if answer is not None)


async def test_who_was_counted_by_stricter_settings_does_not_wait_for_them(data: DataServers) -> None:
    actor = somebody()
    async with limits(data.redis_url, rate_user_requests_per_min=1, rate_user_burst_max=10) as strict:
        for _ in range(10):
            await strict.user(request_from("192.0.2.1"), actor)
    async with limits(data.redis_url, rate_user_requests_per_min=6000, rate_user_burst_max=10) as lax:
        with pytest.raises(RateLimited) as refused:
            await lax.user(request_from("192.0.2.1"), actor)
        wait_ms = refused.value.fields["retryAfterMs"]
        assert isinstance(wait_ms, int)
        assert wait_ms <= 10
        await asyncio.sleep((wait_ms + SLACK_MS) / 1000)
        await lax.user(request_from("192.0.2.1"), actor)


async def test_backends_and_staff_have_a_rate_of_their_own(data: DataServers) -> None:
    async with limits(data.redis_url, rate_user_burst_max=1, rate_user_requests_per_min=1) as some:
        for role in (Role.SERVICE, Role.STAFF, Role.ADMIN):
            actor = somebody(role)
            for _ in range(50):
                await some.user(request_from("192.0.2.1"), actor)


async def test_events_that_are_refused_anyway_are_counted_too(data: DataServers) -> None:
    async with limits(data.redis_url, rate_user_burst_max=3, rate_user_events_per_min=1) as some:
        actor = somebody()
        for _ in range(4):
            some.check_event(actor)
            some.count_event(actor)
        await some._bus.call("PING")  # behind this one, all counts have been answered
        with pytest.raises(RateLimited):
            some.check_event(actor)
        with pytest.raises(RateLimited):
            await some.event(actor)


async def test_addresses_are_counted_by_themselves_and_ipv6_by_its_network(data: DataServers) -> None:
    async with limits(data.redis_url, rate_address_burst_max=1, rate_address_requests_per_min=1) as some:
        network = uuid.uuid4().hex[:4]
        await some.stranger(request_from(f"2001:db8:{network}:1::1"))
        with pytest.raises(RateLimited):
            await some.stranger(request_from(f"2001:db8:{network}:1:ffff::2"))
        await some.stranger(request_from(f"2001:db8:{network}:2::1"))


async def test_a_handshake_over_the_limit_is_refused_for_now(data: DataServers) -> None:
    how: dict[str, Any] = {"rate_address_handshakes_burst_max": 1, "rate_address_handshakes_per_min": 1}
    async with limits(data.redis_url, **how) as some:
        request = request_from(f"2001:db8:{uuid.uuid4().hex[:4]}::1")
        await some.handshake(request)
        with pytest.raises(Unavailable) as refused:
            await some.handshake(request)
        assert refused.value.fields["retryAfterMs"]


async def test_off_asks_redis_for_nothing() -> None:
    class NoBus:
        def __getattr__(self, name: str) -> object:
            raise AssertionError(f"Redis was asked: {name}")

    settings = Settings(rate_limits="off")
    some = Limits(settings, NoBus(), Edges(settings))  # type: ignore[arg-type]
    request, actor = request_from("192.0.2.1"), somebody()
    await some.user(request, actor)
    await some.stranger(request)
    await some.handshake(request)
    await some.event(actor)
    some.check_event(actor)
    some.count_event(actor)
    for _ in range(100_000):
        some.admit(10**6)
    assert some.socket_quota() is None
    assert STANDING not in request


async def test_a_script_that_redis_forgot_is_loaded_again(data: DataServers) -> None:
    async with limits(data.redis_url, rate_user_burst_max=1, rate_user_requests_per_min=1) as some:
        actor = somebody()
        await some._bus.call("SCRIPT", "FLUSH")
        await some.user(request_from("192.0.2.1"), actor)  # let through, uncounted
        await some.user(request_from("192.0.2.1"), actor)
        with pytest.raises(RateLimited):
            await some.user(request_from("192.0.2.1"), actor)


# whom requests come from

NEAR, FAR = "10.0.0.7", "10.1.2.3"
CLIENT = "203.0.113.9"


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded", "found"),
    [
        ("", CLIENT, None, CLIENT),
        ("", CLIENT, "198.51.100.1", CLIENT),
        (NEAR, CLIENT, "198.51.100.1", CLIENT),
        (NEAR, NEAR, None, NEAR),
        (NEAR, NEAR, CLIENT, CLIENT),
        (NEAR, NEAR, f"198.51.100.1, {CLIENT}", CLIENT),
        (NEAR, NEAR, f"{CLIENT}, {FAR}", FAR),
        ("10.0.0.0/8", NEAR, f"198.51.100.1, {CLIENT}, {FAR}", CLIENT),
        ("10.0.0.0/8", NEAR, FAR, FAR),
        ("10.0.0.0/8", NEAR, f"{CLIENT}, nonsense", NEAR),
        ("10.0.0.0/8", NEAR, "", NEAR),
        ("10.0.0.0/8", f"::ffff:{NEAR}", f"{CLIENT}:4711", CLIENT),
        ("2001:db8::/32", "2001:db8::1", "[2001:dead::1]:80", "2001:dead::1"),
    ],
)
def test_the_rightmost_hop_that_is_not_trusted_is_the_client(
    trusted: str, peer: str, forwarded: str | None, found: str
) -> None:
    headers = {} if forwarded is None else {"X_Forwarded_For": forwarded}
    assert Edges(Settings(trusted_proxies=trusted)).caller(request_from(peer, **headers)).address == found


@pytest.mark.parametrize(("trusted", "secure", "host"), [("", False, "waybill"), (NEAR, True, "shop.example")])
def test_scheme_and_host_are_believed_from_trusted_proxies_only(trusted: str, secure: bool, host: str) -> None:
    request = request_from(NEAR, Host="waybill", X_Forwarded_Proto="https", X_Forwarded_Host="shop.example")
    caller = Edges(Settings(trusted_proxies=trusted)).caller(request)
    assert (caller.secure, caller.host) == (secure, host)


@pytest.mark.parametrize(
    ("hop", "found"),
    [
        ("unknown", ""),
        ("_hidden", ""),
        ("", ""),
        ("fe80::1%eth0", "fe80::1"),
        ("999.1.1.1", ""),
        ("1.2.3.4:x", "1.2.3.4"),
    ],
)
def test_what_stands_in_a_hop(hop: str, found: str) -> None:
    assert _plain(hop) == found


@pytest.mark.parametrize(
    ("origins", "origin", "host", "welcome"),
    [
        ("", None, "waybill", True),
        ("", "https://waybill", "waybill", True),
        ("", "http://WAYBILL:8080", "waybill:8080", True),
        ("", "https://evil.example", "waybill", False),
        ("", "https://waybill.evil.example", "waybill", False),
        ("", "null", "waybill", False),
        ("https://shop.example", "https://shop.example", "waybill", True),
        ("https://shop.example", "http://shop.example", "waybill", False),
        ("https://shop.example, capacitor://localhost", "capacitor://localhost", "waybill", True),
        ("*", "null", "waybill", True),
    ],
)
def test_pages_that_may_connect(origins: str, origin: str | None, host: str, welcome: bool) -> None:
    headers = {} if origin is None else {"Origin": origin}
    assert Edges(Settings(cors_origins=origins)).welcomes(request_from(CLIENT, Host=host, **headers)) is welcome


def test_a_page_keeps_its_own_policy_and_is_framed_by_nobody() -> None:
    headers = {"Content-Security-Policy": "default-src 'self'", "Server": "Python/3.11 aiohttp/3.14"}
    protect(headers)
    assert headers["Content-Security-Policy"] == "default-src 'self'; frame-ancestors 'none'"
    assert "Server" not in headers
    own = {"Content-Security-Policy": "frame-ancestors https://shop.example", "X-Frame-Options": "ALLOWALL"}
    protect(own)
    assert own["Content-Security-Policy"] == "frame-ancestors https://shop.example"
    assert own["X-Frame-Options"] == "ALLOWALL"


# settings that are wrong


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("TRUSTED_PROXIES", "10.0.0.0/8, 10.0.0.300", "TRUSTED_PROXIES holds '10.0.0.300'"),
        ("TRUSTED_PROXIES", "10.0.0.1/8", "write addresses such as"),
        ("TRUSTED_PROXIES", "proxy.internal", "'proxy.internal'"),
        ("CORS_ORIGINS", "https://shop.example/", "without a path"),
        ("CORS_ORIGINS", "shop.example", "CORS_ORIGINS holds 'shop.example'"),
        ("BODY_TIMEOUT_MS", "30000", "BODY_TIMEOUT_MS must be less than REQUEST_TIMEOUT_MS"),
        ("REQUEST_TIMEOUT_MS", "4000", "must be less than REQUEST_TIMEOUT_MS"),
    ],
)
def test_a_wrong_setting_is_a_sentence_at_start(name: str, value: str, words: str) -> None:
    with pytest.raises(CannotStart, match=words):
        load({name: value})


# sockets that end


async def test_a_broken_socket_whose_client_reads_nothing_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "CLOSE_TIMEOUT_S", 0.05)
    aborted = asyncio.Event()

    class Unread(asyncio.Transport):
        """What was written never leaves, so closing it never ends."""

        def write(self, data: object) -> None: ...

        def close(self) -> None: ...

        def abort(self) -> None:
            aborted.set()

    for frame in (b"\x88\x80\0\0\0\0", b"\xff\x80\0\0\0\0"):  # goodbye, and what is no frame
        aborted.clear()
        socket = websocket.WebSocket(1000)
        socket._transport = Unread()
        socket.data_received(frame)
        async with asyncio.timeout(1):
            await aborted.wait()
