"""/openapi.json: the REST door as OpenAPI 3.1, made once at start from ROUTES and from the types that validate."""

from __future__ import annotations

import inspect
import re
from functools import cache
from http import HTTPStatus
from typing import Any, Literal

import msgspec

from models.errors import (
    Conflict,
    IdempotencyMismatch,
    Invalid,
    Malformed,
    RateLimited,
    Refused,
    TooLarge,
    Unauthenticated,
    Unavailable,
    UnsupportedMedia,
)
from server.calls import MethodNotAllowed, error_page
from server.doors import KEY_PATTERN, Verb
from server.rest import API, ROUTES, Route
from server.shapes import JsonSchema, Shapes, component_of

VERSION = "1"
"""Of the API: the `v1` of its addresses. What is added within it is compatible."""

ABOUT = """\
Waybill keeps orders: where each one is, what was paid, what is left. The socket door is described by `/asyncapi.json`.

Times are RFC 3339 in UTC, positions' `ts` Unix milliseconds. Amounts are integer minor units of the `currency` beside
them. A member without a value is left out, never null, unless its schema says so; new members may appear in answers.

**Refusals** are RFC 9457 problems; `code` says which one it is. Somebody else's thing is `not_found`. An address that
does not exist answers 404 `not_found`, a method that an address does not have 405 with `Allow`.

**Repeats**: a POST with an `Idempotency-Key` is carried out once; the same request again gets the same answer.
"""

PARAMETERS: dict[str, JsonSchema] = {
    "order_id": {"description": "`id` of an order", "schema": {"type": "string", "format": "uuid"}},
    "agent_id": {"description": "`sub` of an agent", "schema": {"type": "string", "pattern": "^[^/]{1,200}$"}},
    "link_id": {"description": "`id` of a link", "schema": {"type": "string", "format": "uuid"}},
    "date": {"description": "a day in SELLER_TIME_ZONE", "schema": {"type": "string", "format": "date"}},
    "refund_id": {"description": "`id` of a refund", "schema": {"type": "string", "format": "uuid"}},
    "job_id": {"description": "`id` of a background job", "schema": {"type": "string", "pattern": "^[0-9]{1,19}$"}},
    "payment_id": {"description": "`id` of a payment", "schema": {"type": "string", "format": "uuid"}},
    "webhook_id": {"description": "`id` of a webhook", "schema": {"type": "string", "format": "uuid"}},
}
"""What stands in the braces of a path."""

HEADERS: dict[str, JsonSchema] = {
    "X-Request-Id": {
        "description": "The id of this request, in its log lines too: the caller's own, or a new one.",
        "required": True,
        "schema": {"type": "string", "minLength": 1, "maxLength": 128},
    },
    "RateLimit": {
        "description": 'What is left of the caller\'s quota: `"user";r=58;t=2`, whole again in `t` seconds.',
        "schema": {"type": "string"},
    },
    "RateLimit-Policy": {"description": 'The quota: `"user";q=60;w=60`.', "schema": {"type": "string"}},
    "Retry-After": {
        "description": "Seconds to wait.",
        "required": True,
        "schema": {"type": "integer", "minimum": 0},
    },
    "WWW-Authenticate": {"description": "`Bearer`", "required": True, "schema": {"type": "string"}},
    "Allow": {"description": "The methods of this address.", "required": True, "schema": {"type": "string"}},
    "Content-Disposition": {
        "description": "The name of the file.",
        "required": True,
        "schema": {"type": "string"},
    },
}
ALWAYS: tuple[type[Refused], ...] = (Malformed, RateLimited, Unavailable)
"""How every route may refuse: what is no HTTP, too much of it, or a part that is away."""

EVERYWHERE = ("X-Request-Id", "RateLimit", "RateLimit-Policy")
REFUSAL_HEADERS = {401: ("WWW-Authenticate",), 405: ("Allow",), 429: ("Retry-After",), 503: ("Retry-After",)}

REQUEST_ID: JsonSchema = {
    "name": "X-Request-Id",
    "in": "header",
    "description": "An id of the caller's choice: 1 to 128 of `A-Z a-z 0-9 . _ : + / = -`. Any other is replaced.",
    "schema": {"type": "string"},
}
IDEMPOTENCY_KEY: JsonSchema = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "A key of the caller's choice: the same request with the same key is carried out once.",
    "schema": {"type": "string", "pattern": KEY_PATTERN},
}


def address(route: Route) -> str:
    """The route's path as the documents write it: its parameters in camel case."""
    return API + re.sub(r"\{(\w+)\}", lambda found: "{" + _camel(found[1]) + "}", route.path)


def operation_id(route: Route) -> str:
    return _camel(route.run.name if isinstance(route.run, Verb) else route.run.__name__)


def refusals(route: Route) -> list[type[Refused]]:
    """Every way in which the route may refuse."""
    found: set[type[Refused]] = {*route.refuses, *ALWAYS}
    if not route.public:
        found.add(Unauthenticated)
    if route.takes is not None:
        found.add(Invalid)
        if route.method != "GET":
            found |= {TooLarge, UnsupportedMedia}
    if takes_key(route):
        found |= {Invalid, Conflict, IdempotencyMismatch}
    return sorted(found, key=lambda kind: (kind.status, kind.code))


def takes_key(route: Route) -> bool:
    return route.method == "POST" and not route.keyless


def problem_shape(kind: type[Refused]) -> type[msgspec.Struct]:
    """A refusal as its answer's body. server.calls.problem writes it."""
    return msgspec.defstruct(
        f"{kind.__name__}Problem",
        [
            ("type", Literal[error_page(kind)]),
            ("title", str),
            ("status", Literal[kind.status]),
            ("detail", str),
            ("code", Literal[kind.code]),
            ("requestId", str),
            *kind.members.items(),
        ],
        namespace={"__doc__": inspect.cleandoc(kind.__doc__) if kind.__doc__ else f"{kind.title}."},
    )


@cache
def document() -> dict[str, Any]:
    """The whole document. Do not change what you get: it is made once."""
    shapes = Shapes()
    numbers: dict[tuple[str, str], int] = {}
    for route in ROUTES:
        takes = route.body or route.takes
        for what, type_ in (("takes", takes), ("gives", route.gives)):
            if type_ is not None:
                numbers[operation_id(route), what] = shapes.add(type_)
    kinds = {kind: problem_shape(kind) for route in ROUTES for kind in refusals(route)}
    kinds[MethodNotAllowed] = problem_shape(MethodNotAllowed)
    for shape in kinds.values():
        shapes.add(shape)
    shapes.make()
    queries = {
        shapes.component(numbers[operation_id(route), "takes"])
        for route in ROUTES
        if route.method == "GET" and route.takes is not None
    }
    paths: dict[str, dict[str, Any]] = {}
    responses = {"MethodNotAllowed": _refusal(405, [MethodNotAllowed])}
    for route in ROUTES:
        schemas = {
            what: shapes.schema(numbers[operation_id(route), what])
            for what in ("takes", "gives")
            if (operation_id(route), what) in numbers
        }
        paths.setdefault(address(route), {})[route.method.lower()] = _operation(route, schemas, shapes, responses)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Waybill", "version": VERSION, "description": ABOUT},
        "jsonSchemaDialect": "https://json-schema.org/draft/2020-12/schema",
        "servers": [{"url": "/", "description": "this server"}],
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "JWT",
                    "description": "Claims `sub`, `role` (customer, agent, staff, admin, service, guest), `exp`, and "
                    "optionally `orders`, `scope`, `jti`. Guests get theirs from `POST /api/v1/links/follow`.",
                }
            },
            "headers": HEADERS,
            "responses": dict(sorted(responses.items())),
            "schemas": {name: schema for name, schema in shapes.components.items() if name not in queries},
        },
    }


def _operation(
    route: Route, schemas: dict[str, JsonSchema], shapes: Shapes, responses: dict[str, JsonSchema]
) -> dict[str, Any]:
    parameters: list[JsonSchema] = [
        {"name": _camel(name), "in": "path", "required": True, **PARAMETERS[name]}
        for name in re.findall(r"\{(\w+)\}", route.path)
    ]
    operation: dict[str, Any] = {
        "operationId": operation_id(route),
        "tags": [re.split(r"[/.]", route.path)[1]],
        "summary": route.doing,
    }
    if route.public:
        operation["security"] = []
    if route.takes is not None and route.method == "GET":
        query = shapes.components[component_of(schemas["takes"])]
        for name, schema in query["properties"].items():
            schema = dict(schema)
            told = {"description": schema.pop("description")} if "description" in schema else {}
            parameters.append({"name": name, "in": "query", "required": name in query.get("required", ()), **told})
            parameters[-1]["schema"] = schema
    if takes_key(route):
        parameters.append(IDEMPOTENCY_KEY)
    operation["parameters"] = [*parameters, REQUEST_ID]
    if route.takes is not None and route.method != "GET":
        body = schemas["takes"]
        choice = [shapes.components[component_of(one)] for one in body.get("anyOf", [body])]
        # a body that is left out is an empty object
        operation["requestBody"] = {
            "required": all(one.get("required") or one.get("oneOf") for one in choice),
            "content": {
                "application/json": {
                    "schema": {"oneOf": body["anyOf"]} if "anyOf" in body else body,
                    "examples": {
                        f"{one['title']}{number or ''}": {"value": value}
                        for one in choice
                        for number, value in enumerate(one.get("examples", ()))
                    },
                }
            },
        }
    if route.signed:
        operation["requestBody"] = {
            "description": "The event, byte for byte as the gateway signed it.",
            "required": True,
            "content": {"application/json": {"schema": {"type": "object"}, "examples": {}}},
        }
    good: dict[str, Any] = {"description": HTTPStatus(route.status).phrase, "headers": _headers()}
    if route.media != "application/json":
        good["headers"] |= _headers("Content-Disposition")
        good["content"] = {route.media: {"schema": {"type": "string"}}}
    elif "gives" in schemas:
        good["content"] = {"application/json": {"schema": schemas["gives"]}}
    by_status: dict[int, list[type[Refused]]] = {}
    for kind in refusals(route):
        by_status.setdefault(kind.status, []).append(kind)
    operation["responses"] = {str(route.status): good}
    for other in route.also:
        operation["responses"][str(other)] = {**good, "description": HTTPStatus(other).phrase}
    for status, kinds in by_status.items():
        name = "Or".join(kind.__name__ for kind in kinds)
        responses[name] = _refusal(status, kinds)
        operation["responses"][str(status)] = {"$ref": f"#/components/responses/{name}"}
    return operation


def _refusal(status: int, kinds: list[type[Refused]]) -> dict[str, Any]:
    refs = {kind.code: f"#/components/schemas/{kind.__name__}Problem" for kind in kinds}
    schema: JsonSchema = {"$ref": next(iter(refs.values()))}
    if len(kinds) > 1:
        schema = {
            "oneOf": [{"$ref": ref} for ref in refs.values()],
            "discriminator": {"propertyName": "code", "mapping": refs},
        }
    return {
        "description": " · ".join(f"`{kind.code}`: {kind.title}" for kind in kinds),
        "headers": _headers(*REFUSAL_HEADERS.get(status, ())),
        "content": {"application/problem+json": {"schema": schema}},
    }


def _headers(*names: str) -> dict[str, JsonSchema]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in (*EVERYWHERE, *names)}


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)
