"""Which payment gateways this process talks to: those whose keys are set, else simulators of ours in development.

A provider with keys is called at its `*_API_URL` and nowhere else. Without any, a development process that both serves
and works runs the provider's simulator on a free loopback port; simulators live in the folder `sandbox` of `DATA_DIR`,
and the processes that share that folder share them: the first one runs them, the others only use them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from pathlib import Path
from typing import IO

import msgspec
import structlog

from handlers.ports import Gateway
from models.payment import Provider
from server.adapters.breaker import Breaker
from server.adapters.razorpay import API_URL as RAZORPAY_URL
from server.adapters.razorpay import Razorpay
from server.adapters.sandbox.razorpay import RazorpaySandbox
from server.adapters.sandbox.stripe import StripeSandbox
from server.adapters.stripe import API_URL as STRIPE_URL
from server.adapters.stripe import Stripe
from server.settings import CannotStart, Settings, secrets_of

log = structlog.get_logger()

SHARED_WAIT_S = 5.0
"""How long a process waits for another one to say where the simulators are."""
SHARED_POLL_S = 0.05


class Access(msgspec.Struct, frozen=True):
    """One account at one provider. `public_key`: Razorpay's key id, Stripe's publishable key. `webhook_secrets`: newest
    first."""

    url: str
    public_key: str
    secret_key: str
    webhook_secrets: tuple[str, ...]
    simulated: bool = False


def set_up(settings: Settings) -> dict[Provider, Access]:
    """The accounts whose keys are set."""
    found = {}
    if settings.razorpay_key_id:
        found[Provider.RAZORPAY] = Access(
            settings.razorpay_api_url or RAZORPAY_URL,
            settings.razorpay_key_id,
            settings.razorpay_key_secret,
            secrets_of(settings.razorpay_webhook_secret),
        )
    if settings.stripe_secret_key:
        found[Provider.STRIPE] = Access(
            settings.stripe_api_url or STRIPE_URL,
            settings.stripe_publishable_key,
            settings.stripe_secret_key,
            secrets_of(settings.stripe_webhook_secret),
        )
    return found


class GatewayRoom:
    """The gateways of one process. `simulates`: whether it runs simulators for providers without keys. `gateways` is
    filled by `start`, inside the running loop."""

    def __init__(self, settings: Settings, *, simulates: bool) -> None:
        self.gateways: dict[Provider, Gateway] = {}
        self._settings = settings
        self._simulates = simulates and not settings.production
        self._adapters: list[Razorpay | Stripe] = []
        self._simulators: Simulators | None = None

    async def start(self, webhooks_url: str) -> None:
        """`webhooks_url`: where simulators of this process send their webhooks; the provider's name follows it.

        Raises:
            CannotStart: the simulators' folder cannot be used.
        """
        accounts = set_up(self._settings)
        missing = [provider for provider in (Provider.RAZORPAY, Provider.STRIPE) if provider not in accounts]
        if missing and self._simulates:
            self._simulators = Simulators(Path(self._settings.data_dir) / "sandbox")
            try:
                accounts |= await self._simulators.open(missing, webhooks_url)
            except OSError as error:
                raise CannotStart(f"The simulators of payment gateways cannot use their folder: {error}.") from error
        for provider, access in accounts.items():
            adapter = self._adapter(provider, access)
            self._adapters.append(adapter)
            self.gateways[provider] = adapter

    def _adapter(self, provider: Provider, access: Access) -> Razorpay | Stripe:
        settings = self._settings
        breaker = Breaker(provider, failures_max=settings.breaker_failures_max, open_s=settings.breaker_open_s)
        if provider is Provider.RAZORPAY:
            return Razorpay(
                key_id=access.public_key,
                key_secret=access.secret_key,
                webhook_secrets=access.webhook_secrets,
                breaker=breaker,
                timeout_s=settings.gateway_timeout_ms / 1000,
                threads_max=settings.gateway_threads_max,
                api_url=access.url,
                sandbox_url=access.url if access.simulated else None,
            )
        return Stripe(
            secret_key=access.secret_key,
            publishable_key=access.public_key,
            webhook_secrets=access.webhook_secrets,
            breaker=breaker,
            timeout_s=settings.gateway_timeout_ms / 1000,
            tolerance_s=settings.stripe_signature_max_age_s,
            api_url=access.url,
            sandbox_url=access.url if access.simulated else None,
        )

    async def stop(self) -> None:
        """Let the calls under way end, then the simulators."""
        for adapter in self._adapters:
            await adapter.close()
        if self._simulators is not None:
            await self._simulators.close()


class Simulators:
    """The simulators of a folder: run by whoever holds its lock, used by everybody who reads where they are."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._where = folder / "accounts.json"
        self._lock: IO[str] | None = None
        self._running: list[RazorpaySandbox | StripeSandbox] = []

    async def open(self, providers: list[Provider], webhooks_url: str) -> dict[Provider, Access]:
        """The accounts at the simulators of these providers; started here, unless another process has done so."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (self._folder / "lock").open("a")
        if not _taken(lock):
            lock.close()
            return await self._shared(providers)
        self._lock = lock
        self._where.unlink(missing_ok=True)
        accounts = {provider: await self._run(provider, webhooks_url) for provider in providers}
        fresh = self._where.with_suffix(".new")
        fresh.write_bytes(b"")
        fresh.chmod(0o600)
        fresh.write_bytes(msgspec.json.encode(accounts))
        fresh.replace(self._where)
        return accounts

    async def _shared(self, providers: list[Provider]) -> dict[Provider, Access]:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHARED_WAIT_S):
                while not self._where.exists():  # noqa: ASYNC110  # another process writes it: nothing here can tell
                    await asyncio.sleep(SHARED_POLL_S)
        try:
            found = msgspec.json.decode(self._where.read_bytes(), type=dict[Provider, Access])
        except (FileNotFoundError, msgspec.MsgspecError) as error:
            log.warning("sandbox_not_shared", folder=str(self._folder), error=type(error).__name__)
            return {}
        return {provider: access for provider, access in found.items() if provider in providers}

    async def _run(self, provider: Provider, webhooks_url: str) -> Access:
        url, file = f"{webhooks_url}/{provider}", self._folder / f"{provider}.json"
        secret, webhook_secret = secrets.token_hex(16), secrets.token_hex(16)
        simulator: RazorpaySandbox | StripeSandbox
        if provider is Provider.RAZORPAY:
            public = "rzp_test_simulator"
            simulator = RazorpaySandbox(public, secret, webhook_secret, url, file=file)
        else:
            public, secret = "pk_test_simulator", f"sk_test_{secret}"
            simulator = StripeSandbox(secret, public, webhook_secret, url, file=file)
        await simulator.start()
        self._running.append(simulator)
        return Access(simulator.url, public, secret, (webhook_secret,), simulated=True)

    async def close(self) -> None:
        for simulator in self._running:
            await simulator.stop()
        if self._lock is not None:
            self._where.unlink(missing_ok=True)
            self._lock.close()


def _taken(lock: IO[str]) -> bool:
    """Take the lock, if nobody has it. It dies with its holder."""
    if os.name == "nt":
        return True  # no flock there; two processes then have two simulators
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
