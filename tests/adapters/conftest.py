"""Opens each provider's world for the tests that ask for `world`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

import pytest

from models.payment import Provider
from tests.adapters import razorpay_world, stripe_world
from tests.adapters.worlds import World

WORLDS: dict[Provider, Callable[[], AbstractAsyncContextManager[World]]] = {
    Provider.RAZORPAY: razorpay_world.open_world,
    Provider.STRIPE: stripe_world.open_world,
}
"""A provider is under contract when it is named here."""


@pytest.fixture(params=sorted(WORLDS))
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async with WORLDS[request.param]() as opened:
        yield opened
