"""The page on which a person pays at a simulator: each has its own script, all have one look, and say what they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from aiohttp import web

STYLE = Path(__file__).with_name("checkout.css")


def show(page: Path, shown: Mapping[str, object], return_url: str) -> web.Response:
    """The page, with what its script is to know. It goes back to nothing but a web address."""
    back = return_url if urlsplit(return_url).scheme in ("http", "https") else ""
    data = msgspec.json.encode({**shown, "returnUrl": back}).decode().replace("<", "\\u003c")
    text = page.read_text().replace("__STYLE__", STYLE.read_text()).replace("__DATA__", data)
    return web.Response(text=text, content_type="text/html", headers={"Cache-Control": "no-store"})
