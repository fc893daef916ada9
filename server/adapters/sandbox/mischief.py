"""How a simulator misbehaves on command, as gateways do: from Python in tests, over HTTP in a running demo.

curl -X POST URL/sandbox/mischief -d '{"fault": "drop", "faultCalls": 2, "webhookCopies": 3}'
"""

from __future__ import annotations

import asyncio
from enum import StrEnum
from typing import Literal

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler


class Fault(StrEnum):
    """What happens to a call of the API."""

    THROTTLE = "throttle"
    """429 with the gateway's own body; nothing is done."""
    HTML = "html"
    """502 with a proxy's HTML page; nothing is done."""
    HTML_AFTER = "html_after"
    """The same page, but the work is done."""
    HANG = "hang"
    """Nothing is done, and no answer comes."""
    HANG_AFTER = "hang_after"
    """The work is done, and no answer comes."""
    DROP = "drop"
    """The connection is cut before the work is done."""
    DROP_AFTER = "drop_after"
    """The work is done, then the connection is cut."""
    ERROR = "error"
    """500 with a body of the gateway's kind; nothing is done. Stripe keeps it under the idempotency key."""
    ERROR_AFTER = "error_after"
    """The same, but the work is done."""


class Mischief(msgspec.Struct, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """What goes wrong from now on. Everything is off at first; tests set the attributes."""

    fault: Fault | None = None
    fault_calls: int = 1
    """How many of the next calls meet the fault; it counts down and then `fault` is None."""
    fault_method: str = ""
    """Only calls of this HTTP method meet it; empty: all."""
    webhook_delay_s: float = 0
    """Webhooks are sent this much later."""
    webhook_shuffle_s: float = 0
    """And each by up to so much later again, so that they arrive in any order."""
    webhook_copies: int = 1
    """How often each is delivered, successfully or not."""
    webhooks_lost: int = 0
    """How many of the next events are never delivered; it counts down."""
    list_lag_s: float = 0
    """Age at which a payment appears in lists of all payments."""
    refunds: Literal["processed", "pending", "failed"] = "processed"
    """What becomes of a refund at once: `processed`, `pending` or `failed`."""
    refund_takes_s: float = 0
    """How long a refund is carried out, during which its key is in use."""
    duplicates_refunded: bool = True
    """Whether the gateway gives back a second payment of an order by itself."""

    def take_fault(self, method: str) -> Fault | None:
        """The fault of this call, if one is left."""
        if self.fault is None or self.fault_calls < 1 or self.fault_method not in ("", method):
            return None
        fault, self.fault_calls = self.fault, self.fault_calls - 1
        if not self.fault_calls:
            self.fault, self.fault_calls = None, 1
        return fault

    def take_loss(self) -> bool:
        """Whether this event is lost."""
        if self.webhooks_lost < 1:
            return False
        self.webhooks_lost -= 1
        return True


async def meet_fault(
    fault: Fault | None, request: web.Request, handler: Handler, throttled: bytes, stopping: asyncio.Event
) -> web.StreamResponse:
    """Carry out a call of the API as the fault wants it. `throttled`: the gateway's body of a 429."""
    if fault is Fault.THROTTLE:
        return web.Response(status=429, body=throttled, content_type="application/json")
    work = fault in (None, Fault.HTML_AFTER, Fault.HANG_AFTER, Fault.DROP_AFTER, Fault.ERROR_AFTER)
    answer: web.StreamResponse = await handler(request) if work else web.Response(status=500)
    if fault in (Fault.HTML, Fault.HTML_AFTER):
        page = "<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>"
        return web.Response(status=502, text=page, content_type="text/html")
    if fault in (Fault.ERROR, Fault.ERROR_AFTER):
        error = {"code": "SERVER_ERROR", "type": "api_error", "description": "We are facing some trouble."}
        return web.json_response({"error": error}, status=500)
    if fault in (Fault.HANG, Fault.HANG_AFTER):
        await stopping.wait()
    if fault in (Fault.HANG, Fault.HANG_AFTER, Fault.DROP, Fault.DROP_AFTER) and request.transport is not None:
        request.transport.abort()
    return answer


def mischief_routes(mischief: Mischief) -> list[web.RouteDef]:
    """`/sandbox/mischief`: GET shows it, POST changes the members that it names."""

    async def show(request: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(mischief), content_type="application/json")

    async def change(request: web.Request) -> web.Response:
        try:
            wanted = msgspec.json.decode(await request.read())
            changed = msgspec.convert({**msgspec.to_builtins(mischief), **wanted}, Mischief)
        except (msgspec.MsgspecError, TypeError) as error:
            return web.json_response({"error": str(error)}, status=400)
        for name in Mischief.__struct_fields__:
            setattr(mischief, name, getattr(changed, name))
        return await show(request)

    return [web.get("/sandbox/mischief", show), web.post("/sandbox/mischief", change)]
