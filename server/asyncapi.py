"""/asyncapi.json: the Socket.IO door as AsyncAPI 3.0, made once at start from EVENTS and from what clients hear."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, Literal

import msgspec

from models.errors import Invalid, Malformed, NotFound, RateLimited, Refused, Unauthenticated, Unavailable
from models.message import HEARD
from server.openapi import VERSION
from server.shapes import REF, JsonSchema, Shapes
from server.sockets import EVENTS

ABOUT = """\
Watch orders and agents live over Socket.IO (protocol 5, Engine.IO 4): every client library speaks it. What is done by
single requests is described by `/openapi.json`; both doors lead to the same verbs and refuse with the same codes.

Every event has one argument, a JSON object. The operations are told from the server's side: it receives what clients
emit and sends what they hear.
"""

NAMESPACE = """\
The default namespace. CONNECT carries `auth: {token}`. A token that is not accepted is answered by CONNECT_ERROR
`{message, data: {code, message}}` and the client stays away; refused for now is HTTP 503 or a closed transport, and the
client comes back by itself.

Events with a `seq` are rows of the order's log: on one connection each number comes once, in order, without a hole.
After a reconnect, subscribe again with `afterSeq`: the answer holds everything in between.

With `auth: {token, recovery: true}` the JavaScript client does that by itself (connection state recovery): CONNECT is
answered with a `pid` too, and events of watched orders with a `seq` have a second argument, a string that the client
keeps as its offset. When `socket.recovered` is true after a reconnect, all subscriptions live on and what was missed
follows; otherwise subscribe again.
"""

ACKNOWLEDGEMENTS = """\
What the server hands to the acknowledgement callback of an emit. It is matched by the packet's number, which client
libraries choose; an event that is emitted without a callback is carried out and not answered.
"""

ALWAYS: tuple[type[Refused], ...] = (Malformed, Invalid, Unauthenticated, RateLimited, Unavailable)
"""How every event may be refused."""


def refusals(name: str) -> list[type[Refused]]:
    """Every way in which the event may be refused."""
    return sorted({*ALWAYS, *EVENTS[name].refuses}, key=lambda kind: (kind.status, kind.code))


def error_shape(kind: type[Refused]) -> type[msgspec.Struct]:
    """A refusal as an acknowledgement tells it. server.sockets.Sockets writes it."""
    return msgspec.defstruct(
        f"{kind.__name__}Error",
        [("code", Literal[kind.code]), ("message", str), *kind.members.items()],
        namespace={"__doc__": inspect.cleandoc(kind.__doc__) if kind.__doc__ else f"{kind.title}."},
    )


@cache
def document() -> dict[str, Any]:
    """The whole document. Do not change what you get: it is made once."""
    shapes = Shapes()
    kinds = {kind: error_shape(kind) for name in EVENTS for kind in refusals(name)}
    kinds.setdefault(NotFound, error_shape(NotFound))
    for shape in kinds.values():
        shapes.add(shape)
    taken = {name: shapes.add(event.payload) for name, event in EVENTS.items()}
    done = {name: shapes.add(event.answer) for name, event in EVENTS.items()}
    heard = {name: shapes.add(shape) for name, shape in HEARD.items()}
    shapes.make()

    messages: dict[str, JsonSchema] = {}
    operations: dict[str, JsonSchema] = {}
    acknowledgements: list[str] = []
    for name, event in EVENTS.items():
        messages[name] = _message(name, event.doing, shapes.schema(taken[name]), shapes)
        messages[f"{name}.ok"] = _message(name, "It is done", shapes.schema(done[name]), shapes)
        messages[f"{name}.refused"] = _message(name, "It is not done", _refused(refusals(name)), shapes)
        acknowledgements += [f"{name}.ok", f"{name}.refused"]
        operations[name] = {
            "action": "receive",
            "summary": event.doing,
            **_in_channel("namespace", name),
            "reply": _in_channel("acknowledgements", f"{name}.ok", f"{name}.refused"),
        }
    messages["unknown.refused"] = _message("any other event", "There is no such event", _refused([NotFound]), shapes)
    acknowledgements.append("unknown.refused")
    for name in HEARD:
        schema = shapes.schema(heard[name])
        messages[name] = _message(name, shapes.told(schema), schema, shapes)
        operations[name] = {"action": "send", **_in_channel("namespace", name)}
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "Waybill", "version": VERSION, "description": ABOUT},
        "defaultContentType": "application/json",
        "servers": {
            "this": {
                "host": "{host}",
                "pathname": "/socket.io/",
                "protocol": "wss",
                "protocolVersion": "13",
                "description": "Socket.IO over WebSocket or HTTP long-polling; `ws` where the server has no TLS.",
                "variables": {"host": {"default": "localhost:8080", "description": "where this document is from"}},
                "security": [{"$ref": "#/components/securitySchemes/token"}],
            }
        },
        "channels": {
            "namespace": {
                "address": "/",
                "title": "Namespace /",
                "description": NAMESPACE,
                "messages": {name: _ref("messages", name) for name in (*EVENTS, *HEARD)},
            },
            "acknowledgements": {
                "address": None,
                "title": "Acknowledgements",
                "description": ACKNOWLEDGEMENTS,
                "messages": {name: _ref("messages", name) for name in acknowledgements},
            },
        },
        "operations": operations,
        "components": {
            "messages": messages,
            "schemas": shapes.components,
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "JWT",
                    "description": "The same tokens as of REST, in the payload of CONNECT: `auth: {token}`.",
                }
            },
        },
    }


def _message(name: str, summary: str, payload: JsonSchema, shapes: Shapes) -> JsonSchema:
    message: JsonSchema = {"name": name, "summary": summary, "payload": payload}
    examples = shapes.examples(payload)
    if examples:
        message["examples"] = [{"payload": one} for one in examples]
    return message


def _refused(kinds: list[type[Refused]]) -> JsonSchema:
    """`{ok: false, error}` with one of these refusals."""
    return {
        "type": "object",
        "required": ["ok", "error"],
        "properties": {
            "ok": {"const": False},
            "error": {"anyOf": [{"$ref": REF.format(name=f"{kind.__name__}Error")} for kind in kinds]},
        },
    }


def _in_channel(channel: str, *names: str) -> JsonSchema:
    return {
        "channel": {"$ref": f"#/channels/{channel}"},
        "messages": [{"$ref": f"#/channels/{channel}/messages/{name}"} for name in names],
    }


def _ref(kind: str, name: str) -> JsonSchema:
    return {"$ref": f"#/components/{kind}/{name}"}
