"""/docs: both API documents as one page that people read, without scripts and without anything from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from functools import cache
from html import escape
from typing import Any

import msgspec
from aiohttp import web

from models import errors
from models.errors import Refused
from server import asyncapi, openapi
from server.shapes import JsonSchema, component_of

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2430;--soft:#596377;--line:#dfe3ea;--paper:#fff;--tint:#f3f5f9;--link:#0b57d0}
@media(prefers-color-scheme:dark){:root{--ink:#dde3ec;--soft:#98a3b5;--line:#2b3340;--paper:#12161d;--tint:#1b212b;
--link:#8ab4f8}}
*{box-sizing:border-box}html{scroll-padding-top:1rem}
body{font:16px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:62rem;margin:0 auto;
padding:1.5rem 1rem 4rem;overflow-wrap:break-word}
h1{margin:0;font-size:1.9rem}h2{margin:3rem 0 .5rem;padding-top:1rem;border-top:1px solid var(--line)}
h3{margin:2.2rem 0 .3rem;font-size:1.05rem}p{margin:.4rem 0 .8rem;max-width:46rem}
a{color:var(--link);text-decoration:none}a:hover{text-decoration:underline}
code,pre{font:.86em/1.5 ui-monospace,Menlo,Consolas,monospace}code{background:var(--tint);padding:.1em .35em;
border-radius:4px}pre{background:var(--tint);padding:.8rem;border-radius:6px;overflow-x:auto;margin:.4rem 0}
h3 code{background:none;padding:0;font-size:1rem}b.verb{display:inline-block;min-width:4.4rem;font-size:.8rem;
letter-spacing:.04em;color:var(--soft)}
table{border-collapse:collapse;width:100%;margin:.5rem 0;font-size:.93rem}
td,th{text-align:left;vertical-align:top;padding:.35rem .9rem .35rem 0;border-bottom:1px solid var(--line)}
th{font-weight:600;color:var(--soft);white-space:nowrap;width:7rem}td:first-child{white-space:nowrap}
td:last-child{width:60%}nav a{margin-right:1rem;white-space:nowrap}small,.soft{color:var(--soft)}
summary{cursor:pointer;color:var(--soft);font-size:.9rem}:target{background:var(--tint)}
@media(max-width:40rem){td,th{display:block;width:auto!important;border:0;padding:.1rem 0}
td:first-child{white-space:normal}tr{display:block;border-bottom:1px solid var(--line);padding:.35rem 0}}
"""

_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
}


@cache
def page() -> str:
    rest, live = openapi.document(), asyncapi.document()
    shapes = {**rest["components"]["schemas"], **live["components"]["schemas"]}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Refused)]
    kinds = sorted((kind for kind in kinds if kind is not Refused), key=lambda kind: (kind.status, kind.code))
    told_elsewhere = {f"{kind.__name__}{end}" for kind in kinds for end in ("Problem", "Error")}
    told_elsewhere.add("MethodNotAllowedProblem")
    operations = [
        (method.upper(), path, operation)
        for path, methods in rest["paths"].items()
        for method, operation in methods.items()
    ]
    return "".join(
        (
            "<!doctype html><html lang=en><head><meta charset=utf-8><title>Waybill: the API</title>"
            "<meta name=viewport content='width=device-width,initial-scale=1'>"
            f"<style>{_STYLE}</style></head><body>",
            "<h1>Waybill</h1><p>Where an order is, what was paid, what is left. For programs:"
            " <a href=/openapi.json>/openapi.json</a> (OpenAPI 3.1) and <a href=/asyncapi.json>/asyncapi.json</a>"
            " (AsyncAPI 3.0); this page shows the two.</p>",
            "<nav><a href=#rest>REST</a><a href=#socket>Socket.IO</a><a href=#shapes>Shapes</a>"
            "<a href=#errors>Errors</a><a href=#health>Health</a></nav>",
            "<h2 id=rest>REST</h2>",
            _prose(rest["info"]["description"]),
            "<p>Send a token: <code>Authorization: Bearer …</code> "
            f"{_inline(rest['components']['securitySchemes']['token']['description'])}</p>",
            _table(
                (
                    f"<a href=#{operation['operationId']}><b class=verb>{method}</b>{escape(path)}</a>",
                    escape(operation["summary"]),
                )
                for method, path, operation in operations
            ),
            *(_operation(rest, *one) for one in operations),
            "<h2 id=socket>Socket.IO</h2>",
            _prose(live["info"]["description"]),
            *(_prose(channel["description"]) for channel in live["channels"].values()),
            "<h3>What clients send</h3>",
            *(_received(live, name) for name, one in live["operations"].items() if one["action"] == "receive"),
            "<h3>What clients hear</h3>",
            _table(
                (f"<code>{name}</code>", _type(live["components"]["messages"][name]["payload"]), _told(live, name))
                for name, one in live["operations"].items()
                if one["action"] == "send"
            ),
            "<h2 id=shapes>Shapes</h2><p>A member with <code>?</code> may be absent.</p>",
            *(_shape(name, shapes[name]) for name in sorted(shapes) if name not in told_elsewhere),
            "<h2 id=errors>Errors</h2><p>REST answers <code>application/problem+json</code> (RFC 9457):"
            " <code>{type, title, status, code, detail, requestId, …}</code>. A socket's acknowledgement is"
            " <code>{ok: false, error: {code, message, …}}</code>. Some carry further members.</p><table>",
            *(_error(kind, shapes) for kind in kinds),
            "</table><h2 id=health>Health</h2><p><a href=/health/live>/health/live</a> · "
            "<a href=/health/ready>/health/ready</a> · <a href=/metrics>/metrics</a></p></body></html>",
        )
    )


def _operation(rest: JsonSchema, method: str, path: str, operation: JsonSchema) -> str:
    rows: list[tuple[str, str]] = []
    body = operation.get("requestBody")
    if body is not None:
        rows.append(("takes", _type(body["content"]["application/json"]["schema"])))
    rows += [
        (
            f"{_code(one['name'])}{'' if one.get('required') else '?'} <small>{one['in']}</small>",
            f"{_type(one['schema'])} <span class=soft>{_inline(one.get('description', ''))}</span>",
        )
        for one in operation["parameters"]
        if one["name"] != "X-Request-Id"
    ]
    refused: list[str] = []
    for status, response in operation["responses"].items():
        if "$ref" in response:
            refused += _refused(rest["components"]["responses"][component_of(response)]["content"].values())
            continue
        content = [
            f"{_type(media['schema'])}{'' if kind == 'application/json' else f' <small>{escape(kind)}</small>'}"
            for kind, media in response.get("content", {}).items()
        ]
        rows.append(("gives", f"{_code(status)} {' '.join(content) or escape(response['description'])}"))
    rows.append(("refuses", ", ".join(refused)))
    examples = body["content"]["application/json"]["examples"].values() if body is not None else ()
    return (
        f"<h3 id={operation['operationId']}><b class=verb>{method}</b><code>{escape(path)}</code></h3>"
        f"<p>{escape(operation['summary'])}{'' if operation.get('security') != [] else ' · public'}</p>"
        f"{_table(rows, head=True)}{_examples(one['value'] for one in examples)}"
    )


def _refused(contents: Iterable[JsonSchema]) -> list[str]:
    found = []
    for media in contents:
        schema = media["schema"]
        for one in schema.get("oneOf", [schema]):
            kind = getattr(errors, component_of(one).removesuffix("Problem"))
            found.append(_error_link(kind))
    return found


def _received(live: JsonSchema, name: str) -> str:
    messages = live["components"]["messages"]
    refused = messages[f"{name}.refused"]["payload"]["properties"]["error"]["anyOf"]
    links = [_error_link(getattr(errors, component_of(one).removesuffix("Error"))) for one in refused]
    rows = [
        ("takes", _type(messages[name]["payload"])),
        ("answer", _type(messages[f"{name}.ok"]["payload"])),
        ("refuses", ", ".join(links)),
    ]
    examples = [one["payload"] for one in messages[name].get("examples", ())]
    return (
        f"<h3 id=emit-{name}><code>{name}</code></h3><p>{escape(messages[name]['summary'])}</p>"
        f"{_table(rows, head=True)}{_examples(examples)}"
    )


def _told(live: JsonSchema, name: str) -> str:
    return _inline(live["components"]["messages"][name]["summary"])


def _shape(name: str, schema: JsonSchema) -> str:
    required = schema.get("required", ())
    rows = (
        (
            f"{_code(member)}{'' if member in required else '?'}",
            f"{_type(one)} <span class=soft>{_inline(one.get('description', ''))}</span>",
        )
        for member, one in schema.get("properties", {}).items()
    )
    text = " ".join(schema.get("description", "").split())
    members = _table(rows) if "properties" in schema else f"<p>{_type(schema)}</p>"
    return f"<h3 id=shape-{name}>{name}</h3>{f'<p>{_inline(text)}</p>' if text else ''}{members}"


def _error(kind: type[Refused], shapes: JsonSchema) -> str:
    more = shapes.get(f"{kind.__name__}Problem") or shapes.get(f"{kind.__name__}Error") or {"properties": {}}
    # a code of the contract that nothing refuses with yet has no shape
    members = [
        f"{_code(name)}: {_type(more['properties'][name])}" for name in kind.members if name in more["properties"]
    ]
    return (
        f'<tr id="error-{kind.code}"><td>{kind.status} {_code(kind.code)}</td><td>{escape(kind.title)}'
        f"{' · ' if members else ''}{', '.join(members)}</td></tr>"
    )


def _error_link(kind: type[Refused]) -> str:
    return f"<a href=#error-{kind.code}>{kind.code}</a>"


def _type(schema: JsonSchema) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        name = component_of(schema)
        return f"<a href=#shape-{name}>{name}</a>"
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            return " or ".join(_type(one) for one in schema[choice])
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        shown = [_code(json.dumps(value)) for value in values]
        return " ".join(shown) if len(shown) < 20 else f"one of {len(shown)}: {' '.join(shown[:3])} …"
    if schema.get("type") == "array":
        bounds = _bounds(schema, ("minItems", "≥ {}"), ("maxItems", "≤ {}"))
        return f"list of {_type(schema['items'])}{bounds}"
    text = str(schema.get("format") or schema.get("type", "anything"))
    return text + _bounds(
        schema,
        ("minimum", "≥ {}"),
        ("maximum", "≤ {}"),
        ("minLength", "≥ {} characters"),
        ("maxLength", "≤ {} characters"),
        ("default", "default {}"),
    )


def _bounds(schema: JsonSchema, *words: tuple[str, str]) -> str:
    found = [text.format(schema[name]) for name, text in words if name in schema and (name, schema[name]) != _NOT_EMPTY]
    return f" <small>{escape(', '.join(found))}</small>" if found else ""


_NOT_EMPTY = ("minLength", 1)


def _table(rows: Iterable[tuple[str, ...]], *, head: bool = False) -> str:
    lines = []
    for first, *rest in rows:
        cell = "th" if head else "td"
        lines.append(f"<tr><{cell}>{first}</{cell}>{''.join(f'<td>{one}</td>' for one in rest)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _examples(values: Iterable[Any]) -> str:
    shown = "".join(
        f"<pre>{escape(json.dumps(one, indent=2, ensure_ascii=False), quote=False)}</pre>" for one in values
    )
    return f"<details><summary>Example</summary>{shown}</details>" if shown else ""


def _prose(text: str) -> str:
    return "".join(f"<p>{_inline(paragraph)}</p>" for paragraph in text.strip().split("\n\n"))


def _inline(text: str) -> str:
    """The little Markdown that the documents use: code and bold."""
    for mark, tag in (("`", "code"), ("**", "b")):
        parts = (escape(text, quote=False) if mark == "`" else text).split(mark)
        text = "".join(f"<{tag}>{part}</{tag}>" if number % 2 else part for number, part in enumerate(parts))
    return text


def _code(text: str) -> str:
    return f"<code>{escape(text, quote=False)}</code>"


async def show_docs(request: web.Request) -> web.Response:
    return web.Response(text=page(), content_type="text/html", headers=HEADERS)


def add_routes(app: web.Application) -> None:
    """/docs and the two documents. All are made here, once."""
    page()
    for path, document in (("/openapi.json", openapi.document()), ("/asyncapi.json", asyncapi.document())):
        app.router.add_get(path, _shower(msgspec.json.encode(document)))
    app.router.add_get("/docs", show_docs)


def _shower(body: bytes) -> Any:
    async def show(request: web.Request) -> web.Response:
        return web.Response(body=body, content_type="application/json")

    return show
