"""The pages that people open in a browser, and their static files: read once at start, named by their content."""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from aiohttp import hdrs, web

from models.payment import Provider

WEB = Path(__file__).parent / "web"

CONTENT_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

_REFERENCE = re.compile(r'(?<="\.\./web/)[a-z.-]+(?=")')
"""How a page names a static file: relative, so that it works behind a path prefix too."""

_NAMED = re.compile(r"([a-z.-]+)\.([0-9a-f]{16})(\.[a-z]+)")
_HOST = re.compile(r"[A-Za-z0-9.-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")
"""What may stand in a policy as our own host; a `Host` header is the client's word."""

_EVERYWHERE = {
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_ON_PAGES = {
    **_EVERYWHERE,
    # the secret is in the address: nobody may keep the page, index it, or learn where somebody came from
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Robots-Tag": "noindex, nofollow",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "X-Frame-Options": "DENY",
}


_CHECKOUTS = {
    Provider.RAZORPAY: {
        "script-src": "https://checkout.razorpay.com",
        "frame-src": "https://api.razorpay.com https://checkout.razorpay.com",
        "connect-src": "https://api.razorpay.com https://lumberjack.razorpay.com",
        "img-src": "https://cdn.razorpay.com",
        "style-src": "'unsafe-inline'",
    },
    Provider.STRIPE: {
        "script-src": "https://js.stripe.com",
        "frame-src": "https://js.stripe.com https://*.js.stripe.com https://hooks.stripe.com",
        "connect-src": "https://api.stripe.com",
        "img-src": "https://*.stripe.com",
    },
}
"""What a gateway's own checkout needs on the page that opens it. A simulator's checkout is a page of its own."""

_WITH_CHECKOUTS = {
    # a bank's page may open in a window of its own and must find its way back
    "Cross-Origin-Opener-Policy": "same-origin-allow-popups",
    # gateways compare where they are opened with the sites that they know; they get the host, never the secret
    "Referrer-Policy": "strict-origin",
}


class _File(NamedTuple):
    body: bytes
    small: bytes
    """The same, gzipped."""
    content_type: str
    digest: str

    @classmethod
    def of(cls, body: bytes, content_type: str) -> _File:
        return cls(body, gzip.compress(body, 9, mtime=0), content_type, hashlib.sha256(body).hexdigest()[:16])

    def response(self, request: web.Request, headers: Mapping[str, str]) -> web.Response:
        zipped = _takes_gzip(request)
        response = web.Response(
            body=self.small if zipped else self.body,
            content_type=self.content_type,
            charset="utf-8",
            headers={**headers, "Vary": "Accept-Encoding"},
        )
        if zipped:
            response.headers["Content-Encoding"] = "gzip"
        return response


class Pages:
    """The tracking page and the payment page, and the files that they name.

    `checkouts`: the gateways whose own checkout opens inside the payment page.
    """

    def __init__(self, checkouts: Collection[Provider] = (), folder: Path = WEB) -> None:
        self._files: dict[str, _File] = {}
        self._checkouts = checkouts
        self._track = self._page(folder, "track.html")
        self._pay = self._page(folder, "pay.html")

    def _page(self, folder: Path, name: str) -> _File:
        html = (folder / name).read_text()
        self._files |= {file: _read(folder / file) for file in _REFERENCE.findall(html)}
        return _File.of(_REFERENCE.sub(lambda file: self._named(file[0]), html).encode(), "text/html")

    def add_routes(self, app: web.Application) -> None:
        app.router.add_get("/track/{key}", self.track)
        app.router.add_get("/pay/{key}", self.pay)
        app.router.add_get("/web/{name}", self.file)

    async def track(self, request: web.Request) -> web.Response:
        """The same page for every order and every link: what its address means, its script finds out."""
        return self._track.response(request, {**_ON_PAGES, "Content-Security-Policy": policy(request.host)})

    async def pay(self, request: web.Request) -> web.Response:
        """The same page for every order and every payment link."""
        headers = {**_ON_PAGES, **(_WITH_CHECKOUTS if self._checkouts else {})}
        rules = policy(request.host, self._checkouts)
        return self._pay.response(request, {**headers, "Content-Security-Policy": rules})

    async def file(self, request: web.Request) -> web.Response:
        """A static file under a name that carries its digest.

        During a rolling deployment a page of one version may ask an instance of another: it gets the file that is
        there, but may not keep it under that name.
        """
        asked = _NAMED.fullmatch(request.match_info["name"])
        found = self._files.get(asked[1] + asked[3]) if asked else None
        if asked is None or found is None:
            raise web.HTTPNotFound
        etag = f'"{found.digest}{"-gzip" if _takes_gzip(request) else ""}"'
        keep = "public, max-age=31536000, immutable" if asked[2] == found.digest else "no-cache"
        headers = {**_EVERYWHERE, "ETag": etag, "Cache-Control": keep}
        if any(f'"{known.value}"' == etag or known.value == "*" for known in request.if_none_match or ()):
            return web.Response(status=304, headers={**headers, "Vary": "Accept-Encoding"})
        return found.response(request, headers)

    def _named(self, name: str) -> str:
        stem, dot, extension = name.rpartition(".")
        return f"{stem}.{self._files[name].digest}{dot}{extension}"


def policy(host: str, checkouts: Collection[Provider] = ()) -> str:
    """A page's Content-Security-Policy: its own files and its own server, nothing else, nothing inline, but for what
    the gateways' checkouts need.

    Browsers differ in whether 'self' covers the WebSocket of the same host, so that is named, when `host` is a name.
    """
    sockets = f" ws://{host} wss://{host}" if _HOST.fullmatch(host) else ""
    rules = {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' data:",
        "connect-src": f"'self'{sockets}",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    for provider in sorted(checkouts):
        for rule, sources in _CHECKOUTS[provider].items():
            rules[rule] = f"{rules[rule]} {sources}" if rule in rules else sources
    if not checkouts:  # their scripts make elements out of text
        rules |= {"require-trusted-types-for": "'script'", "trusted-types": "'none'"}
    return "; ".join(f"{rule} {sources}" for rule, sources in rules.items())


def _read(path: Path) -> _File:
    return _File.of(path.read_bytes(), CONTENT_TYPES[path.suffix])


def _takes_gzip(request: web.Request) -> bool:
    offered = request.headers.get(hdrs.ACCEPT_ENCODING, "").lower().replace(" ", "").split(",")
    return any(one == "gzip" or (one.startswith("gzip;q=") and one[7:].strip("0.") != "") for one in offered)
