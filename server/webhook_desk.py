"""The REST functions of webhooks: those of gateways go to their door, staff list, retry and dismiss them."""

from __future__ import annotations

from aiohttp import web

from handlers import webhooks
from models.payment import Provider
from server.calls import Call, answer, written
from server.context import Rest
from server.doors import Verb

RETRY_WEBHOOK = Verb("retry_webhook", webhooks.retry_webhook)
DISMISS_WEBHOOK = Verb("dismiss_webhook", webhooks.dismiss_webhook)


async def razorpay_webhook(rest: Rest, call: Call) -> web.Response:
    return await rest.webhook_door.receive(call.request, Provider.RAZORPAY)


async def stripe_webhook(rest: Rest, call: Call) -> web.Response:
    return await rest.webhook_door.receive(call.request, Provider.STRIPE)


async def list_webhooks(rest: Rest, call: Call) -> web.Response:
    async with rest.doors.database.statement() as tx:
        return answer(await webhooks.list_webhooks(tx, call.actor, call.command))


async def retry_webhook(rest: Rest, call: Call) -> web.Response:
    response = await _decide_webhook(rest, call, RETRY_WEBHOOK)
    rest.webhook_door.wake()
    return response


async def dismiss_webhook(rest: Rest, call: Call) -> web.Response:
    return await _decide_webhook(rest, call, DISMISS_WEBHOOK)


async def _decide_webhook(rest: Rest, call: Call, verb: Verb) -> web.Response:
    webhook_id, key = call.request.match_info["webhook_id"], call.request.headers.get("Idempotency-Key")
    return written(await rest.doors.perform(verb, call.actor, webhook_id, call.command, key=key))
