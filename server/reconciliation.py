"""The REST function of the reconciliation desk."""

from __future__ import annotations

from aiohttp import web

from handlers import reconciliation
from server.calls import Call, answer
from server.context import Rest


async def read_reconciliation(rest: Rest, call: Call) -> web.Response:
    """The report of a day; one that is not made yet is made now."""
    date = call.request.match_info["date"]
    desk, zone = rest.payments.desk, rest.seller_zone
    report = await reconciliation.read_reconciliation(desk, call.actor, date, call.command, zone)
    return answer(report)
