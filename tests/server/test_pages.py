"""How the pages' files are served: named by content, kept as long as that is safe, and nothing beside them."""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from server.pages import WEB, Pages, policy

Client = TestClient[web.Request, web.Application]
OWN_BYTES_MAX = 40 * 1024
"""Page, style and script together, uncompressed; phones on the road load them."""


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    app = web.Application()
    Pages().add_routes(app)
    async with TestClient(TestServer(app), auto_decompress=False) as opened:
        yield opened


async def names(client: Client) -> list[str]:
    """The static files that the page names."""
    answer = await client.get("/track/x", headers={"Accept-Encoding": "identity"})
    return re.findall(r'"\.\.(/web/[^"]+)"', await answer.text())


async def test_page_is_kept_by_nobody(client: Client) -> None:
    answer = await client.get("/track/a-secret", headers={"Accept-Encoding": "identity"})
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
    assert text == await (await client.get("/track/another", headers={"Accept-Encoding": "identity"})).text()
    assert not re.search(r"<style|style=|\son[a-z]+=|<script(?! src=)|https?:", text)


async def test_policy_of_the_page(client: Client) -> None:
    host = f"127.0.0.1:{client.port}"
    given = (await client.get("/track/x")).headers["Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in given.split(";"))
    assert rules == {
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


@pytest.mark.parametrize("host", ["", "a b", "a;script-src *", "evil.example *", "a\nb", "a'b", "[::1", "a:b"])
def test_host_that_is_none_stays_out_of_the_policy(host: str) -> None:
    assert "connect-src 'self'; " in policy(host)


@pytest.mark.parametrize("host", ["shop.example", "shop.example:8080", "[::1]:80", "127.0.0.1:1"])
def test_host_is_named_in_the_policy(host: str) -> None:
    assert f"connect-src 'self' ws://{host} wss://{host}; " in policy(host)


async def test_files_are_kept_for_good(client: Client) -> None:
    found = await names(client)
    assert len(found) == 4
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


def test_page_is_small() -> None:
    assert sum((WEB / f"track.{kind}").stat().st_size for kind in ("html", "css", "js")) < OWN_BYTES_MAX


def test_socket_io_client_is_the_official_one() -> None:
    """The file is what the page's README says it is, and the flow tests drive the same version."""
    body = (WEB / "socket.io.min.js").read_bytes()
    readme = (WEB / "README.md").read_text()
    version = re.search(rb"Socket\.IO v([\d.]+)", body)
    assert version is not None
    assert f"`socket.io-client` {version[1].decode()}" in readme
    assert hashlib.sha256(body).hexdigest() in readme
    assert f'"socket.io-client": "{version[1].decode()}"' in (WEB / "../../tests/clients/package.json").read_text()
