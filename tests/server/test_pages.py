"""How the pages' files are served: named by content, kept as long as that is safe, and nothing beside them."""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.client import ClientResponse
from aiohttp.test_utils import TestClient, TestServer

from models.money import EXPONENTS
from models.payment import Provider
from server.pages import WEB, Pages, policy

Client = TestClient[web.Request, web.Application]
OWN_BYTES_MAX = 40 * 1024
"""Page, style and script together, uncompressed; phones on the road load them."""
PAGES = ("track", "pay")


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with serving(Pages()) as opened:
        yield opened


@asynccontextmanager
async def serving(pages: Pages) -> AsyncIterator[Client]:
    app = web.Application()
    pages.add_routes(app)
    async with TestClient(TestServer(app), auto_decompress=False) as opened:
        yield opened


async def names(client: Client) -> list[str]:
    """The static files that the pages name."""
    texts = [await (await client.get(f"/{page}/x", headers={"Accept-Encoding": "identity"})).text() for page in PAGES]
    return sorted(set(re.findall(r'"\.\.(/web/[^"]+)"', "".join(texts))))


@pytest.mark.parametrize("page", PAGES)
async def test_page_is_kept_by_nobody(client: Client, page: str) -> None:
    answer = await client.get(f"/{page}/a-secret", headers={"Accept-Encoding": "identity"})
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["X-Robots-Tag"] == "noindex, nofollow"
    assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert "ETag" not in answer.headers
    text = await answer.text()
    assert "a-secret" not in text
    assert text == await (await client.get(f"/{page}/another", headers={"Accept-Encoding": "identity"})).text()
    assert not re.search(r"<style|style=|\son[a-z]+=|<script(?! src=)|https?:", text)


def rules_of(answer: ClientResponse) -> dict[str, str]:
    given = answer.headers["Content-Security-Policy"]
    return dict(rule.strip().split(" ", 1) for rule in given.split(";"))


@pytest.mark.parametrize("page", PAGES)
async def test_policy_of_the_page(client: Client, page: str) -> None:
    host = f"127.0.0.1:{client.port}"
    assert rules_of(await client.get(f"/{page}/x")) == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' data:",
        "connect-src": f"'self' ws://{host} wss://{host}",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }


@pytest.mark.parametrize("checkouts", [(Provider.RAZORPAY,), (Provider.STRIPE,), (Provider.STRIPE, Provider.RAZORPAY)])
async def test_a_gateways_own_checkout_opens_on_the_payment_page_alone(checkouts: tuple[Provider, ...]) -> None:
    async with serving(Pages(checkouts)) as client:
        track, pay = await client.get("/track/x"), await client.get("/pay/x")
    plain, open_to = rules_of(track), rules_of(pay)
    assert "https:" not in str(plain)
    assert plain["require-trusted-types-for"] == "'script'"
    assert track.headers["Referrer-Policy"] == "no-referrer"
    added = {word for rule in open_to.values() for word in rule.split()} - {
        w for r in plain.values() for w in r.split()
    }
    hosts = {"razorpay": Provider.RAZORPAY in checkouts, "stripe": Provider.STRIPE in checkouts}
    for name, offered in hosts.items():
        assert any(f"{name}.com" in word for word in added) is offered
    assert all(re.fullmatch(r"https://[a-z*.-]+\.(razorpay|stripe)\.com|'unsafe-inline'", word) for word in added), (
        added
    )
    assert "'unsafe-inline'" not in open_to["script-src"]
    for rule in ("default-src", "base-uri", "form-action", "frame-ancestors"):
        assert open_to[rule] == "'none'"
    # the host is told, the secret in the path never is
    assert pay.headers["Referrer-Policy"] == "strict-origin"
    assert pay.headers["Cross-Origin-Opener-Policy"] == "same-origin-allow-popups"
    assert (pay.headers["Cache-Control"], pay.headers["X-Frame-Options"]) == ("no-store", "DENY")


def test_the_payment_page_knows_minor_units_as_we_do() -> None:
    script = (WEB / "pay.js").read_text()
    told = {
        code: int(digits)
        for digits, codes in re.findall(r'^    (\d): "([A-Z ]+)"', script, re.MULTILINE)
        for code in codes.split()
    }
    assert told == {code: digits for code, digits in EXPONENTS.items() if digits != 2}


@pytest.mark.parametrize("host", ["", "a b", "a;script-src *", "evil.example *", "a\nb", "a'b", "[::1", "a:b"])
def test_host_that_is_none_stays_out_of_the_policy(host: str) -> None:
    assert "connect-src 'self'; " in policy(host)


@pytest.mark.parametrize("host", ["shop.example", "shop.example:8080", "[::1]:80", "127.0.0.1:1"])
def test_host_is_named_in_the_policy(host: str) -> None:
    assert f"connect-src 'self' ws://{host} wss://{host}; " in policy(host)


async def test_files_are_kept_for_good(client: Client) -> None:
    found = await names(client)
    assert len(found) == 6
    for path in found:
        answer = await client.get(path, headers={"Accept-Encoding": "identity"})
        assert answer.status == 200
        assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
        body = await answer.read()
        assert hashlib.sha256(body).hexdigest()[:16] in path
        again = await client.get(path, headers={"Accept-Encoding": "identity", "If-None-Match": answer.headers["ETag"]})
        assert (again.status, await again.read()) == (304, b"")
        other = await client.get(path, headers={"Accept-Encoding": "identity", "If-None-Match": '"other"'})
        assert other.status == 200
        zipped = await client.get(path, headers={"Accept-Encoding": "br, gzip"})
        assert zipped.headers["Content-Encoding"] == "gzip"
        assert zipped.headers["ETag"] != answer.headers["ETag"]
        assert zipped.headers["Vary"] == "Accept-Encoding"
        assert gzip.decompress(await zipped.read()) == body


async def test_file_of_another_version_is_given_but_not_kept(client: Client) -> None:
    """A page of one version and an instance of another, as in a rolling deployment."""
    path = next(path for path in await names(client) if path.endswith(".js"))
    other = re.sub(r"\.[0-9a-f]{16}\.", ".0123456789abcdef.", path)
    answer = await client.get(other)
    assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-cache")


@pytest.mark.parametrize(
    "name",
    [
        "track.js",
        "track.html",
        "README.md",
        "socket.io.LICENSE",
        "..%2Fpages.py",
        "x.0123456789abcdef.js",
        "%00",
        "a/b",
    ],
)
async def test_nothing_else_is_served(client: Client, name: str) -> None:
    assert (await client.get(f"/web/{name}")).status == 404


@pytest.mark.parametrize(
    ("accepted", "zipped"),
    [("gzip", True), ("gzip;q=0.5", True), ("gzip;q=0", False), ("gzip; q=0.0", False), ("br", False), ("", False)],
)
async def test_compression_is_negotiated(client: Client, accepted: str, zipped: bool) -> None:
    answer = await client.get("/track/x", headers={"Accept-Encoding": accepted})
    assert ("Content-Encoding" in answer.headers) is zipped


@pytest.mark.parametrize("page", PAGES)
def test_page_is_small(page: str) -> None:
    files = {f"{page}.html", f"{page}.js", "track.css", f"{page}.css"}
    assert sum((WEB / name).stat().st_size for name in files) < OWN_BYTES_MAX


def test_socket_io_client_is_the_official_one() -> None:
    """The file is what the page's README says it is, and the flow tests drive the same version."""
    body = (WEB / "socket.io.min.js").read_bytes()
    readme = (WEB / "README.md").read_text()
    version = re.search(rb"Socket\.IO v([\d.]+)", body)
    assert version is not None
    assert f"`socket.io-client` {version[1].decode()}" in readme
    assert hashlib.sha256(body).hexdigest() in readme
    assert f'"socket.io-client": "{version[1].decode()}"' in (WEB / "../../tests/clients/package.json").read_text()
