"""The REST functions of positions: where an order is, and how many look."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
from aiohttp import web
from msgspec import Meta

from handlers import tracking
from models.errors import TooLarge
from models.position import Position
from server.calls import Call, answer
from server.context import Rest
from server.doors import convert
from server.sockets import NextInterval


class PositionBatch(msgspec.Struct):
    """Positions that were kept while there was no network, each judged by itself."""

    SCHEMA: ClassVar[dict[str, Any]] = {"examples": [{"positions": [*Position.SCHEMA["examples"]]}]}

    positions: Annotated[list[Position], Meta(min_length=1)]


class RefusedPosition(msgspec.Struct):
    index: Annotated[int, Meta(description="place in the batch, from 0")]
    code: Annotated[str, Meta(description="stale, future, inaccurate or jump")]


class Located(msgspec.Struct, rename="camel"):
    accepted: int
    refused: list[RefusedPosition]
    next_interval_ms: NextInterval


class Watchers(msgspec.Struct):
    watchers: Annotated[int, Meta(description="sockets that watch the order, on all instances; a second old at most")]


async def locate(rest: Rest, call: Call) -> web.Response:
    """One position, or a batch of them; each is judged by itself."""
    body: dict[str, Any] = call.command
    # all are read before one is shown: a request that is refused changes nothing
    found = convert(body, PositionBatch).positions if "positions" in body else [convert(body, Position)]
    if len(found) > rest.settings.location_batch_max:
        raise TooLarge(f"One request takes {rest.settings.location_batch_max} positions at most.")
    judged = await rest.locations.accept(call.actor, call.order_id, found, "-")
    refused = [RefusedPosition(index, refusal.code) for index, refusal in enumerate(judged) if refusal is not None]
    pause_ms = rest.locations.next_interval_ms(call.actor.sub, call.order_id)
    return answer(Located(len(found) - len(refused), refused, pause_ms))


async def watchers(rest: Rest, call: Call) -> web.Response:
    async with rest.doors.database.statement() as tx:
        await tracking.permit_count(tx, call.actor, call.order_id)
    return answer(Watchers(await rest.presence.watchers(call.order_id)))
