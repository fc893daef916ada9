"""The REST function of the reconciliation desk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from handlers import reconciliation

if TYPE_CHECKING:
    from server.rest import Call, Rest


async def read_reconciliation(rest: Rest, call: Call) -> web.Response:
    """The report of a day; one that is not made yet is made now."""
    date = call.request.match_info["date"]
    desk, zone = rest.payments.desk, rest.seller_zone
    report = await reconciliation.read_reconciliation(desk, call.actor, date, call.command, zone)
    return web.Response(body=msgspec.json.encode(report), content_type="application/json")
