"""/asyncapi.json is valid AsyncAPI 3.0, and names every event of both directions and nothing else."""

from __future__ import annotations

import json
import os
from typing import Any

import jsonschema_rs
import msgspec
import pytest

from models.errors import IllegalMove, PaymentRequired
from models.message import HEARD
from server import asyncapi
from server.sockets import EVENTS
from tests import documents
from tests.harness import ROOT

DOCUMENT = asyncapi.document()
MESSAGES = DOCUMENT["components"]["messages"]
META_SCHEMA = ROOT / "tests/clients/node_modules/@asyncapi/specs/schemas/3.0.0-without-$id.json"
ORDER_ID = "9e2c8d3c-4a8a-4bb5-8c06-9f4f6f0f5d11"


def resolve(ref: str) -> Any:
    found: Any = DOCUMENT
    for step in ref.removeprefix("#/").split("/"):
        found = found[step]
    return found


def refs(value: Any) -> set[str]:
    if isinstance(value, list):
        return {ref for one in value for ref in refs(one)}
    if not isinstance(value, dict):
        return set()
    own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
    return own | {ref for one in value.values() for ref in refs(one)}


def test_it_is_valid() -> None:
    if not META_SCHEMA.exists() and os.environ.get("CI") != "true":
        pytest.skip("run scripts/test with Node.js: it installs the official schema of AsyncAPI from npm")
    validator = jsonschema_rs.validator_for(json.loads(META_SCHEMA.read_text()))
    found = [f"{error.message[:200]} at {error.instance_path}" for error in validator.iter_errors(DOCUMENT)]
    assert not found


def test_every_reference_leads_somewhere() -> None:
    for ref in refs(DOCUMENT):
        assert resolve(ref) is not None, ref


def test_everything_it_declares_is_used() -> None:
    used = refs(DOCUMENT)
    for kind in ("messages", "schemas"):
        assert {f"#/components/{kind}/{name}" for name in DOCUMENT["components"][kind]} <= used


def test_every_payload_is_a_schema() -> None:
    payloads = [message["payload"] for message in MESSAGES.values()]
    for schema in (*payloads, *DOCUMENT["components"]["schemas"].values()):
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})


def test_it_names_every_event_and_nothing_else() -> None:
    received = {name for name, one in DOCUMENT["operations"].items() if one["action"] == "receive"}
    sent = {name for name, one in DOCUMENT["operations"].items() if one["action"] == "send"}
    assert received == set(EVENTS)
    assert sent == set(HEARD)
    assert set(DOCUMENT["channels"]["namespace"]["messages"]) == received | sent


@pytest.mark.parametrize("name", EVENTS)
def test_every_event_of_clients_tells_its_answer(name: str) -> None:
    operation = DOCUMENT["operations"][name]
    (message,) = operation["messages"]
    assert resolve(resolve(message["$ref"])["$ref"])["name"] == name
    assert operation["reply"]["channel"] == {"$ref": "#/channels/acknowledgements"}
    done, refused = (resolve(resolve(one["$ref"])["$ref"])["payload"] for one in operation["reply"]["messages"])
    assert resolve(done["$ref"])["properties"]["ok"]["const"] is True
    assert refused["properties"]["ok"]["const"] is False
    kinds = {resolve(one["$ref"])["properties"]["code"]["enum"][0] for one in refused["properties"]["error"]["anyOf"]}
    assert kinds == {kind.code for kind in asyncapi.refusals(name)}
    assert {"malformed", "invalid", "rate_limited", "unavailable"} <= kinds


def test_refusals_tell_their_members() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    assert schemas[f"{IllegalMove.__name__}Error"]["required"] == ["code", "message", "allowed"]
    assert schemas[f"{PaymentRequired.__name__}Error"]["properties"]["due"] == {"type": "integer"}


@pytest.mark.parametrize("name", EVENTS)
def test_examples_are_what_the_event_takes(name: str) -> None:
    judge = documents.Judge(DOCUMENT)
    for example in MESSAGES[name].get("examples", ()):
        msgspec.convert(example["payload"], EVENTS[name].payload)
        assert not list(judge.complaints(name, MESSAGES[name]["payload"], example["payload"]))


# the judge of the other tests


HEAD = {"orderId": ORDER_ID, "seq": 3, "at": "2026-11-21T09:30:00.125Z"}


@pytest.mark.parametrize(
    ("event", "payload"),
    [
        ("orderSplit", HEAD),
        ("subscribeToOrder", {"orderId": ORDER_ID}),
        ("orderDelivered", {**HEAD, "by": "drone"}),
        ("orderDelivered", {**HEAD, "seq": "3"}),
        ("orderDelivered", {**HEAD, "at": "yesterday"}),
        ("orderDelivered", {"orderId": ORDER_ID, "seq": 3}),
        ("orderStatusUpdate", {**HEAD, "status": "teleported"}),
        ("orderStatusUpdate", {**HEAD, "status": "ready", "note": None}),
        ("orderStatusUpdate", {**HEAD, "status": "ready", "actor": {"role": "staff", "name": "Asha"}}),
        ("deliveryAgentAssigned", HEAD),
        ("deliveryAgentAssigned", {**HEAD, "agent": {"id": "rider-7", "phone": "1"}}),
        ("orderLocationUpdate", {"orderId": ORDER_ID, "lat": 1, "lng": 1, "ts": 1, "battery": 5}),
    ],
)
def test_the_judge_hears_what_is_not_documented(event: str, payload: Any) -> None:
    assert documents.heard_wrongly(event, payload)


@pytest.mark.parametrize(
    ("event", "payload"),
    [
        ("orderDelivered", HEAD),
        ("orderStatusUpdate", {**HEAD, "status": "ready", "previousStatus": "preparing", "note": "x"}),
        ("deliveryAgentAssigned", {**HEAD, "agent": None}),
        ("deliveryAgentAssigned", {**HEAD, "agent": {"name": "Ravi"}}),
        ("orderLocationUpdate", {"orderId": ORDER_ID, "lat": 1, "lng": 1, "ts": 1.5, "speed": 2}),
    ],
)
def test_the_judge_lets_pass_what_is_documented(event: str, payload: Any) -> None:
    assert not documents.heard_wrongly(event, payload)


@pytest.mark.parametrize(
    ("event", "answer", "right"),
    [
        ("unsubscribeFromOrder", {"ok": True}, True),
        ("unsubscribeFromOrder", {"ok": True, "seq": 1}, False),
        ("unsubscribeFromOrder", None, False),
        ("unsubscribeFromOrder", {"ok": False, "error": {"code": "jump", "message": "x"}}, False),
        ("updateLocation", {"ok": False, "error": {"code": "jump", "message": "x"}}, True),
        ("updateLocation", {"ok": False, "error": {"code": "jump"}}, False),
        ("updateLocation", {"ok": False, "error": {"code": "jump", "message": "x"}, "more": 1}, False),
        ("updateOrderStatus", {"ok": False, "error": {"code": "illegal_move", "message": "x"}}, False),
        ("fly", {"ok": False, "error": {"code": "not_found", "message": "x"}}, True),
        ("fly", {"ok": True}, False),
    ],
)
def test_the_judge_reads_acknowledgements(event: str, answer: Any, right: bool) -> None:
    assert (not documents.answered_wrongly(event, answer)) == right
