"""Gateways as far as webhooks need them: one that creates what a test names, and the signatures of both."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from models.payment import Provider

SECRETS = {Provider.RAZORPAY: "razorpay-webhooks-of-the-tests", Provider.STRIPE: "whsec_stripe_of_the_tests"}


class NamingGateway:
    """Both gateways' creation over real HTTP. What is created next gets the id `next_id`; all else is 404."""

    def __init__(self) -> None:
        self.next_id = ""
        self.url = ""

    async def _order(self, request: web.Request) -> web.Response:
        asked = await request.json()
        made = {"entity": "order", "status": "created", "attempts": 0, "amount_paid": 0, "notes": []}
        told = {name: asked[name] for name in ("amount", "currency", "receipt")}
        return web.json_response({"id": self.next_id, **made, **told, "amount_due": asked["amount"]})

    async def _intent(self, request: web.Request) -> web.Response:
        asked = await request.post()
        made: dict[str, Any] = {"object": "payment_intent", "status": "requires_payment_method"}
        told = {"amount": int(str(asked["amount"])), "currency": asked["currency"]}
        return web.json_response({"id": self.next_id, **made, **told, "client_secret": f"{self.next_id}_secret_x"})

    @property
    def settings(self) -> dict[str, Any]:
        """What an instance needs to talk to this."""
        return {
            "RAZORPAY_KEY_ID": "rzp_test_flows",
            "RAZORPAY_KEY_SECRET": "razorpay-key-of-the-tests",
            "RAZORPAY_WEBHOOK_SECRET": SECRETS[Provider.RAZORPAY],
            "RAZORPAY_API_URL": self.url,
            "STRIPE_SECRET_KEY": "sk_test_flows",
            "STRIPE_PUBLISHABLE_KEY": "pk_test_flows",
            "STRIPE_WEBHOOK_SECRET": SECRETS[Provider.STRIPE],
            "STRIPE_API_URL": self.url,
        }


@asynccontextmanager
async def naming_gateway() -> AsyncIterator[NamingGateway]:
    gateway = NamingGateway()
    app = web.Application()
    app.router.add_post("/v1/orders", gateway._order)
    app.router.add_post("/v1/payment_intents", gateway._intent)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    gateway.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield gateway
    finally:
        await runner.cleanup()


def signed(provider: Provider, body: bytes, event_id: str = "", secret: str | None = None) -> dict[str, str]:
    """The headers with which the gateway sends this body."""
    key = (SECRETS[provider] if secret is None else secret).encode()
    if provider is Provider.RAZORPAY:
        named = {"X-Razorpay-Event-Id": event_id} if event_id else {}
        return {"X-Razorpay-Signature": hmac.digest(key, body, hashlib.sha256).hex(), **named}
    now = str(int(time.time()))
    digest = hmac.digest(key, now.encode() + b"." + body, hashlib.sha256).hex()
    return {"Stripe-Signature": f"t={now},v1={digest}"}
