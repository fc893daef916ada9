"""Names of aiohttp, python-engineio and python-socketio that are not promised to us. A new version that drops one, or
calls it otherwise, fails here with its name, and not somewhere in a connection.
"""

from __future__ import annotations

import inspect
from typing import Any

import engineio
import pytest
import socketio
from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from engineio.async_drivers.aiohttp import translate_request
from socketio.packet import Packet

from server.realtime.registry import Registry
from server.realtime.transports import EngineServer

CALLED: list[tuple[Any, str, list[str]]] = [
    (socketio.AsyncServer, "_engineio_server_class", ["self"]),
    (socketio.AsyncServer, "_handle_connect", ["self", "eio_sid", "namespace", "data"]),
    (socketio.AsyncServer, "_handle_disconnect", ["self", "eio_sid", "namespace", "reason"]),
    (socketio.AsyncServer, "_handle_event", ["self", "eio_sid", "namespace", "id", "data"]),
    (socketio.AsyncServer, "_handle_ack", ["self", "eio_sid", "namespace", "id", "data"]),
    (socketio.AsyncServer, "_send_packet", ["self", "eio_sid", "pkt"]),
    (engineio.AsyncServer, "_get_socket", ["self", "sid"]),
    (engineio.AsyncServer, "_trigger_event", ["self", "event", "args", "kwargs"]),
    (Packet, "add_attachment", ["self", "attachment"]),
    (web.RequestHandler, "connection_lost", ["self", "exc"]),
]


@pytest.mark.parametrize(("owner", "name", "parameters"), CALLED, ids=lambda each: getattr(each, "__name__", str(each)))
def test_a_method_is_there_and_takes_what_we_give_it(owner: Any, name: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(owner, name)).parameters) == parameters


def test_what_the_server_keeps() -> None:
    server = socketio.AsyncServer(async_mode="aiohttp", client_manager=Registry())
    assert server._binary_packet == server.environ == server.handlers == server.namespace_handlers == {}
    assert server.eio.sockets == {}
    assert server.manager.callbacks == {}
    assert callable(translate_request)


def test_aiohttp_keeps_its_transport_where_it_can_be_taken() -> None:
    assert issubclass(web.RequestHandler, BaseProtocol)
    assert "transport" in BaseProtocol.__slots__
    assert {"protocol", "transport"} <= vars(web.BaseRequest).keys()


@pytest.mark.parametrize(("ours", "theirs"), [(Registry, socketio.AsyncManager), (EngineServer, engineio.AsyncServer)])
def test_what_we_replace_is_what_the_library_calls(ours: type, theirs: type) -> None:
    """A method of ours that the library has too may take more, never less; and is a coroutine exactly if theirs is."""
    for name, method in vars(ours).items():
        replaced = getattr(theirs, name, None)
        if not inspect.isfunction(method) or replaced is None or name == "__init__":
            continue
        assert inspect.iscoroutinefunction(method) == inspect.iscoroutinefunction(replaced), name
        wanted = [
            each.name for each in inspect.signature(replaced).parameters.values() if each.kind is not each.VAR_KEYWORD
        ]
        given = list(inspect.signature(method).parameters)
        flexible = any(each.kind is each.VAR_KEYWORD for each in inspect.signature(method).parameters.values())
        missing = [each for each in wanted if each not in given]
        assert flexible or not missing or name == "handle_request", (name, missing)


@pytest.mark.parametrize(
    "name",
    [
        *("get_namespaces", "get_participants", "pre_connect", "connect", "is_pre_connected", "is_connected"),
        *("sid_from_eio_sid", "eio_sid_from_sid", "pre_disconnect", "basic_disconnect", "is_sid_room"),
        *("basic_enter_room", "basic_leave_room", "basic_close_room", "get_rooms", "_generate_ack_id"),
        *("emit", "trigger_callback"),
    ],
)
def test_the_client_manager_has_no_method_that_would_go_past_ours(name: str) -> None:
    assert hasattr(socketio.AsyncManager, name), "the library no longer asks its manager this"
    assert name in vars(Registry)


def test_nothing_else_of_the_manager_reads_the_rooms_that_we_keep_elsewhere() -> None:
    """`BaseManager.rooms` stays empty: each method of the library that reads it must be one that we replaced."""
    for owner in (socketio.AsyncManager, socketio.AsyncManager.__mro__[1]):
        for name, method in vars(owner).items():
            if inspect.isfunction(method) and "self.rooms" in inspect.getsource(method) and name != "__init__":
                assert name in vars(Registry), name
