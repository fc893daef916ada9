"""/docs: what this server answers, on one page."""

from __future__ import annotations

from html import escape

from aiohttp import web

from models.errors import Refused
from models.message import HEARD
from server.rest import API, ROUTES
from server.sockets import EVENTS

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;"
    "max-width:60rem;"
    "margin:2rem auto;padding:0 1rem;color:#222;background:#fff}"
    "code{background:#f3f3f3;padding:.1em .3em;border-radius:3px}td{padding:.2rem 1rem .2rem 0;vertical-align:top}"
    "@media(prefers-color-scheme:dark){body{color:#ddd;background:#111}code{background:#222}}"
)


def _page() -> str:
    routes = "".join(
        f"<tr><td><code>{route.method}</code></td><td><code>{escape(API + route.path)}</code></td>"
        f"<td>{escape(route.doing)}</td></tr>"
        for route in ROUTES
    )
    events = "".join(
        f"<tr><td><code>{name}</code></td><td><code>"
        f"{', '.join(event.payload.__struct_encode_fields__)}</code></td></tr>"
        for name, event in EVENTS.items()
    )
    errors = "".join(
        f'<tr id="error-{kind.code}"><td>{kind.status}</td><td><code>{kind.code}</code></td><td>{kind.title}</td></tr>'
        for kind in sorted(_refusals(Refused), key=lambda kind: (kind.status, kind.code))
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Waybill</title><style>{_STYLE}</style>"
        "<h1>Waybill</h1><p>Where an order is, what was paid, what is left.</p>"
        f"<h2>REST</h2><p>JSON, with <code>Authorization: Bearer</code> and a token.</p><table>{routes}</table>"
        "<h2>Socket.IO</h2><p>Namespace <code>/</code>, path <code>/socket.io/</code>, <code>auth: {token}</code>."
        f" Clients send:</p><table>{events}</table>"
        f"<p>and hear {', '.join(f'<code>{name}</code>' for name in HEARD)}.</p>"
        f"<h2>Errors</h2><table>{errors}</table>"
        "<h2>Health</h2><p><a href=/health/live>/health/live</a> · <a href=/health/ready>/health/ready</a> ·"
        " <a href=/metrics>/metrics</a></p></html>"
    )


def _refusals(kind: type[Refused]) -> list[type[Refused]]:
    found = []
    for sub in kind.__subclasses__():
        if not sub.__name__.startswith("_"):
            found.append(sub)
        found += _refusals(sub)
    return found


async def show_docs(request: web.Request) -> web.Response:
    return web.Response(
        text=_page(),
        content_type="text/html",
        headers={"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"},
    )
