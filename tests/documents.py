"""Holds what the server says to its own documents: every reply, every frame and every acknowledgement of the tests.

Clients may meet new members in answers, so the documents leave answers open. Here they are closed: an event, a status,
a header or a member that is not documented fails the test that met it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import jsonschema_rs

from server import asyncapi, openapi
from server.rest import UUID

JsonSchema = dict[str, Any]

API = "/api/v1/"

IN_PATH = {"agentId": "[^/]+", "jobId": "[0-9]{1,19}", "date": "[0-9-]{10}"}
"""What stands in the braces of a path, where it is no UUID."""


def closed(schema: Any) -> Any:
    """The schema without room for members that it does not name."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict):
        found.setdefault("additionalProperties", False)
    return found


class Judge:
    """Validates against one document's components. Each schema is compiled once."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._components = {"schemas": closed(document["components"]["schemas"])}
        self._validators: dict[Any, jsonschema_rs.Draft202012Validator] = {}

    def complaints(self, key: Any, schema: JsonSchema, value: Any) -> Iterator[str]:
        """What is wrong with the value; `key` stands for the schema."""
        validator = self._validators.get(key)
        if validator is None:
            whole = {"allOf": [closed(schema)], "components": self._components}
            validator = self._validators[key] = jsonschema_rs.Draft202012Validator(whole, validate_formats=True)
        for error in validator.iter_errors(value):
            yield f"{error.message} at {'/'.join(map(str, error.instance_path)) or 'the top'}"


@cache
def _rest() -> tuple[Judge, list[tuple[re.Pattern[str], str, Mapping[str, Any]]]]:
    document = openapi.document()
    paths = [
        (re.compile(re.sub(r"\\{(\w+)\\}", lambda name: IN_PATH.get(name[1], UUID), re.escape(path))), path, operations)
        for path, operations in sorted(document["paths"].items(), key=lambda one: one[0].count("{"))
    ]
    return Judge(document), paths


def _response(method: str, path: str, status: int) -> tuple[str, Mapping[str, Any] | None]:
    """The documented response, and the path template that it is of."""
    components = openapi.document()["components"]["responses"]
    known = False
    for pattern, template, operations in _rest()[1]:
        if not pattern.fullmatch(path):
            continue
        known = True
        if method.lower() in operations:
            response = operations[method.lower()]["responses"].get(str(status))
            if response is not None and "$ref" in response:
                response = components[response["$ref"].rsplit("/", 1)[1]]
            return template, response
    if known:
        name = {400: "Malformed", 405: "MethodNotAllowed"}.get(status, "")
        return "a method that is not there", components.get(name)
    return "no route", components.get({400: "Malformed", 404: "NotFound"}.get(status, ""))


def check_reply(method: str, address: str, status: int, headers: Mapping[str, str], body: Any) -> None:
    """A reply of the REST door is as /openapi.json says. `body`: decoded JSON, or bytes."""
    path = urlsplit(address).path
    if not path.startswith(API) or method == "OPTIONS":
        return
    template, response = _response(method, path, status)
    told = f"{method} {path} answered {status} {body!r}"
    assert response is not None, f"{told}: {status} is not documented for {template}"
    for name, header in response["headers"].items():
        header = openapi.HEADERS[header["$ref"].rsplit("/", 1)[1]]
        assert name in headers or not header.get("required"), f"{told}: without {name}"
        if name in headers and header["schema"]["type"] == "integer":
            assert headers[name].isdigit(), f"{told}: {name}: {headers[name]}"
    content = response.get("content", {})
    if not content:
        assert body == b"", f"{told}: a body that is not documented"
        return
    media = headers["Content-Type"].split(";")[0]
    assert media in content, f"{told}: {media} is not documented"
    if media.endswith("json"):
        schema = content[media]["schema"]
        found = list(_rest()[0].complaints((template, method, status), schema, body))
        assert not found, f"{told}: {found}"


@cache
def _live() -> tuple[Judge, Mapping[str, Any]]:
    document = asyncapi.document()
    return Judge(document), document["components"]["messages"]


def heard_wrongly(event: str, payload: Any) -> list[str]:
    """Where an event of the server is not as /asyncapi.json says."""
    judge, messages = _live()
    operation = asyncapi.document()["operations"].get(event)
    if operation is None or operation["action"] != "send":
        return [f"{event} {payload!r} is not documented"]
    return [f"{event} {payload!r}: {one}" for one in judge.complaints(event, messages[event]["payload"], payload)]


def answered_wrongly(event: str, answer: Any) -> list[str]:
    """Where an acknowledgement of an event is not as /asyncapi.json says."""
    judge, messages = _live()
    name = event if f"{event}.ok" in messages else "unknown"
    kind = "ok" if isinstance(answer, dict) and answer.get("ok") is True else "refused"
    if f"{name}.{kind}" not in messages:
        return [f"{event} was answered {answer!r}: there is no such event"]
    schema = messages[f"{name}.{kind}"]["payload"]
    return [f"{event} was answered {answer!r}: {one}" for one in judge.complaints(f"{name}.{kind}", schema, answer)]
