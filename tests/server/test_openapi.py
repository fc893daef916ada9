"""/openapi.json is valid OpenAPI 3.1, names every route and nothing else, and is what the server serves."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from models.errors import Conflict, IdempotencyMismatch
from models.position import Position
from server import docs, openapi
from server.app import Process, bind
from server.positions import PositionBatch
from server.rest import ROUTES, Route
from server.settings import Settings
from tests import documents
from tests.harness import Fleet, free_port

DOCUMENT = openapi.document()
SCHEMAS = DOCUMENT["components"]["schemas"]


def operation(route: Route) -> dict[str, Any]:
    found: dict[str, Any] = DOCUMENT["paths"][openapi.address(route)][route.method.lower()]
    return found


def refs(value: Any) -> set[str]:
    if isinstance(value, list):
        return {ref for one in value for ref in refs(one)}
    if not isinstance(value, dict):
        return set()
    own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
    return own | {ref for one in value.values() for ref in refs(one)}


def test_it_is_valid() -> None:
    OpenAPIV31SpecValidator(DOCUMENT).validate()


def test_everything_it_declares_is_used() -> None:
    used = refs(DOCUMENT) | {"#/components/responses/MethodNotAllowed", "#/components/headers/Allow"}
    for kind in ("schemas", "responses", "headers"):
        assert {f"#/components/{kind}/{name}" for name in DOCUMENT["components"][kind]} <= used


def test_names_of_operations_are_unique() -> None:
    names = [one["operationId"] for methods in DOCUMENT["paths"].values() for one in methods.values()]
    assert len(set(names)) == len(names) == len(ROUTES)


async def test_it_names_every_route_below_the_api_and_nothing_else() -> None:
    settings = Settings(port=free_port())
    process = Process(
        settings, bind(settings), "postgresql://nowhere", "redis://nowhere", serves=True, works=False, migrates=False
    )
    await process._listen()
    assert process._runner is not None
    try:
        routes = {
            (route.method, re.sub(r"_(\w)", lambda found: found[1].upper(), route.resource.canonical))
            for route in process._runner.app.router.routes()
            if route.resource is not None and route.resource.canonical.startswith("/api/")
        }
    finally:
        await process._runner.cleanup()
    told = {(method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert routes == told


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_every_route_tells_what_it_takes_gives_and_refuses(route: Route) -> None:
    told = operation(route)
    assert told["summary"] == route.doing
    assert ("requestBody" in told) == (route.signed or (route.method != "GET" and route.takes is not None))
    assert ("content" in told["responses"][str(route.status)]) == (route.gives is not None)
    statuses = {str(kind.status) for kind in route.refuses}
    assert statuses | {"429", "503", str(route.status)} <= set(told["responses"])
    assert ("401" in told["responses"]) != route.public
    assert told.get("security", DOCUMENT["security"]) == ([] if route.public else [{"token": []}])
    headers = {one["name"] for one in told["parameters"] if one["in"] == "header"}
    assert ("Idempotency-Key" in headers) == openapi.takes_key(route)
    assert "X-Request-Id" in headers
    if openapi.takes_key(route):
        assert {Conflict, IdempotencyMismatch} <= set(openapi.refusals(route))
    in_path = [one["name"] for one in told["parameters"] if one["in"] == "path"]
    assert in_path == re.findall(r"\{(\w+)\}", openapi.address(route))
    assert all(
        {"format", "pattern", "maxLength"} & one["schema"].keys() for one in told["parameters"] if one["in"] == "path"
    )


@pytest.mark.parametrize(
    "route", [route for route in ROUTES if route.method == "POST" and route.takes], ids=lambda route: route.path
)
def test_examples_are_what_the_route_takes(route: Route) -> None:
    media = operation(route)["requestBody"]["content"]["application/json"]
    judge = documents.Judge(DOCUMENT)
    for name, example in media.get("examples", {}).items():
        assert not list(judge.complaints(name, media["schema"], example["value"]))
        types = (Position, PositionBatch) if route.body is not None else (route.takes,)
        assert [type_ for type_ in types if _converts(example["value"], type_)], example


def _converts(value: object, type_: type[Any]) -> bool:
    try:
        msgspec.convert(value, type_)
    except msgspec.ValidationError:
        return False
    return True


def test_a_body_of_positions_is_one_or_many() -> None:
    schema = DOCUMENT["paths"]["/api/v1/orders/{orderId}/location"]["post"]["requestBody"]["content"]
    assert schema["application/json"]["schema"] == {
        "oneOf": [{"$ref": "#/components/schemas/Position"}, {"$ref": "#/components/schemas/PositionBatch"}]
    }


def test_what_is_left_out_is_never_null() -> None:
    for name in ("Order", "Line", "Agent", "OrderStatusUpdate"):
        for member in SCHEMAS[name]["properties"].values():
            assert "null" not in str(member), (name, member)
            assert "default" not in member


def test_refusals_tell_their_members() -> None:
    assert SCHEMAS["IllegalMoveProblem"]["properties"]["allowed"] == {"type": "array", "items": {"type": "string"}}
    assert SCHEMAS["PaymentRequiredProblem"]["properties"]["due"] == {"type": "integer"}
    assert SCHEMAS["RateLimitedProblem"]["properties"]["retryAfterMs"] == {"type": "integer"}
    assert "errors" in SCHEMAS["InvalidProblem"]["required"]
    assert SCHEMAS["NotFoundProblem"]["properties"]["code"]["enum"] == ["not_found"]


def test_patterns_mean_the_same_everywhere() -> None:
    assert "\\\\Z" not in str(DOCUMENT)


def test_members_of_later_versions_are_not_told() -> None:
    assert not {"cartId", "couponCode", "expectedTotal"} & SCHEMAS["Place"]["properties"].keys()


@pytest.mark.parametrize("mode", ["all", "web"])
async def test_it_is_served(fleet: Fleet, mode: str) -> None:
    instance = await fleet.start("all")
    if mode == "web":
        instance = await fleet.start("web")
    served = await instance.get("/openapi.json", by=None)
    assert served.status == 200
    assert served.headers["Content-Type"] == "application/json"
    assert served.body == msgspec.json.decode(msgspec.json.encode(DOCUMENT))
    page = await instance.get("/docs", by=None)
    assert page.status == 200
    assert page.body.decode() == docs.page()
    assert page.headers["Content-Security-Policy"] == docs.HEADERS["Content-Security-Policy"]
    live = await instance.get("/asyncapi.json", by=None)
    assert (live.status, live.body["asyncapi"]) == (200, "3.0.0")


def test_the_page_needs_nothing_else() -> None:
    page = docs.page()
    assert len(page) < 200_000
    for part in ("<script", " src=", "<link", "@import", "url(", " style=", '="http', "='http"):
        assert part not in page, part
    anchors = set(re.findall(r' id="?([\w-]+)', page))
    assert set(re.findall(r"href=#([\w-]+)", page)) <= anchors
    for path in DOCUMENT["paths"]:
        assert path in page


# the judge of the other tests


REPLY = {"X-Request-Id": "1", "Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("method", "path", "status", "headers", "body"),
    [
        ("GET", "/api/v1/orders", 200, REPLY, {"items": [], "nextCursor": None, "more": 1}),
        ("GET", "/api/v1/orders", 200, REPLY, {"items": []}),
        ("GET", "/api/v1/orders", 201, REPLY, {"items": [], "nextCursor": None}),
        ("GET", "/api/v1/orders", 200, {"Content-Type": "application/json"}, {"items": [], "nextCursor": None}),
        ("GET", "/api/v1/orders", 200, {**REPLY, "Content-Type": "text/html"}, b""),
        ("GET", "/api/v1/orders", 500, REPLY, {}),
        ("GET", "/api/v1/nowhere", 200, REPLY, {}),
        ("DELETE", "/api/v1/orders", 204, REPLY, b""),
    ],
)
def test_the_judge_finds_what_is_not_documented(
    method: str, path: str, status: int, headers: dict[str, str], body: Any
) -> None:
    with pytest.raises(AssertionError, match=str(status)):
        documents.check_reply(method, path, status, headers, body)


def test_the_judge_lets_pass_what_is_documented() -> None:
    documents.check_reply("GET", "/api/v1/orders?limit=1", 200, REPLY, {"items": [], "nextCursor": None})
