"""Which gateways a process has: from its keys, else simulators that the processes of a folder share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from handlers.ports import GatewayAway, Known, NewPayment
from models.payment import Capture, Provider
from server.gateways import GatewayRoom, set_up
from server.settings import CannotStart, Settings, load

RAZORPAY = {"RAZORPAY_KEY_ID": "rzp_test_1", "RAZORPAY_KEY_SECRET": "s1", "RAZORPAY_WEBHOOK_SECRET": "new, old"}
STRIPE = {"STRIPE_SECRET_KEY": "sk_test_1", "STRIPE_PUBLISHABLE_KEY": "pk_test_1", "STRIPE_WEBHOOK_SECRET": "whsec_1"}
PRODUCTION = {
    "ENVIRONMENT": "production",
    "JWT_SECRET": "x" * 32,
    "DATABASE_URL": "postgresql://db/waybill",
    "REDIS_URL": "redis://redis",
}
HOOKS = "http://127.0.0.1:1/api/v1/webhooks"


@asynccontextmanager
async def room(
    folder: Path, env: dict[str, str] | None = None, *, simulates: bool = True
) -> AsyncIterator[GatewayRoom]:
    opened = GatewayRoom(load({"DATA_DIR": str(folder), **(env or {})}), simulates=simulates)
    await opened.start(HOOKS)
    try:
        yield opened
    finally:
        await opened.stop()


def payment(reference: str = "a-reference") -> NewPayment:
    return NewPayment(
        payment_id="p1", order_id="o1", reference=reference, amount=25_200, currency="INR", capture=Capture.AUTOMATIC
    )


def test_keys_say_where_to_call() -> None:
    assert set_up(Settings()) == {}
    found = set_up(load({**RAZORPAY, **STRIPE}))
    assert found[Provider.RAZORPAY].url == "https://api.razorpay.com"
    assert found[Provider.RAZORPAY].webhook_secrets == ("new", "old")
    assert found[Provider.STRIPE].url == "https://api.stripe.com"
    assert not any(access.simulated for access in found.values())
    found = set_up(load({**RAZORPAY, **STRIPE, "RAZORPAY_API_URL": "http://a:1", "STRIPE_API_URL": "http://b:2"}))
    assert [access.url for access in found.values()] == ["http://a:1", "http://b:2"]


@pytest.mark.parametrize("whole", [RAZORPAY, STRIPE])
def test_keys_that_are_half_set_are_refused(whole: dict[str, str]) -> None:
    (webhooks,) = (name for name in whole if name.endswith("WEBHOOK_SECRET"))
    for wrong in (*({**whole, name: ""} for name in whole), {**whole, webhooks: " , "}):
        with pytest.raises(CannotStart, match=webhooks):
            load(wrong)


async def test_simulators_are_only_for_what_has_no_keys(tmp_path: Path) -> None:
    async with room(tmp_path, STRIPE) as opened:
        created = await opened.gateways[Provider.RAZORPAY].create(payment())
        assert created.gateway_order_id.startswith("order_")
        url = opened.gateways[Provider.RAZORPAY].checkout(known(created.gateway_order_id), None, {})["url"]
        assert url.startswith("http://127.0.0.1:")
        assert "url" not in opened.gateways[Provider.STRIPE].checkout(known("pi_1"), "secret", {})


def known(name: str) -> Known:
    return Known(
        payment_id="p1",
        gateway_order_id=name,
        gateway_payment_id=None,
        reference="a-reference",
        amount=25_200,
        currency="INR",
        capture=Capture.AUTOMATIC,
    )


async def test_neither_web_nor_worker_nor_production_runs_one(tmp_path: Path) -> None:
    async with room(tmp_path, simulates=False) as opened:
        assert opened.gateways == {}
    async with room(tmp_path, PRODUCTION) as opened:
        assert opened.gateways == {}
    assert list(tmp_path.iterdir()) == []


async def test_processes_of_one_folder_share_them(tmp_path: Path) -> None:
    async with room(tmp_path) as first, room(tmp_path) as second:
        for provider in (Provider.RAZORPAY, Provider.STRIPE):
            one = await first.gateways[provider].create(payment())
            other = await second.gateways[provider].create(payment())
            assert one.gateway_order_id == other.gateway_order_id
        accounts = tmp_path / "sandbox" / "accounts.json"
        assert accounts.stat().st_mode & 0o077 == 0, "it holds their keys"


async def test_a_process_that_was_killed_bars_nobody(tmp_path: Path) -> None:
    """What it wrote is there, its lock is not."""
    (tmp_path / "sandbox").mkdir()
    (tmp_path / "sandbox" / "accounts.json").write_text("{}")
    async with room(tmp_path) as opened:
        assert set(opened.gateways) == {Provider.RAZORPAY, Provider.STRIPE}


async def test_they_remember_over_a_restart(tmp_path: Path) -> None:
    names = []
    for _ in range(2):
        async with room(tmp_path) as opened:
            names.append((await opened.gateways[Provider.RAZORPAY].create(payment())).gateway_order_id)
    assert len(set(names)) == 1


async def test_after_the_end_nothing_answers(tmp_path: Path) -> None:
    async with room(tmp_path) as opened:
        gateway = opened.gateways[Provider.STRIPE]
        url = gateway.checkout(known("pi_1"), "secret", {})["url"]
    env = {**STRIPE, "STRIPE_API_URL": url.partition("/checkout")[0]}
    async with room(tmp_path, env, simulates=False) as late:
        with pytest.raises(GatewayAway):
            await late.gateways[Provider.STRIPE].create(payment())


async def test_a_folder_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "sandbox").write_text("a file")
    with pytest.raises(CannotStart, match="simulators"):
        async with room(tmp_path):
            pass
