"""Whether a provider is asked at all: after several calls in a row without an answer it is left alone for a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from handlers.ports import GatewayAway, GatewayNotAsked, GatewayRefused, GatewayUnknown
from models.payment import Provider
from server import metrics

log = structlog.get_logger()


class Breaker:
    """One per provider and process. Closed: every call goes through. Open: none does, the provider is not offered.
    After `open_s` it is half open: one call is let through, and its outcome closes or opens it again.

    Only calls that nobody answered count (GatewayAway, GatewayUnknown): whoever refuses is there. `clock`: seconds that
    never jump.
    """

    def __init__(
        self, provider: Provider, *, failures_max: int, open_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._provider = provider
        self._failures_max, self._open_s, self._clock = failures_max, open_s, clock
        self._failures = 0
        self._opened_at: float | None = None
        self._probing = False
        metrics.gateway_open.labels(provider).set(0)

    @property
    def offered(self) -> bool:
        """Whether a call would be let through now."""
        if self._opened_at is None:
            return True
        return not self._probing and self._clock() - self._opened_at >= self._open_s

    @contextmanager
    def call(self, operation: str) -> Iterator[None]:
        """Around one call. `operation`: its name in the metrics.

        Raises:
            GatewayNotAsked: the breaker is open. Whatever the call raises goes on.
        """
        if not self.offered:
            metrics.gateway_calls.labels(self._provider, operation, "not_asked").inc()
            raise GatewayNotAsked(self._provider, "breaker_open", "the gateway did not answer lately and is left alone")
        probe = self._probing = self._opened_at is not None
        began = self._clock()
        outcome = "bug"
        try:
            yield
            outcome = "ok"
        except GatewayRefused:
            outcome = "refused"
            raise
        except GatewayAway:
            outcome = "away"
            raise
        except GatewayUnknown:
            outcome = "unknown"
            raise
        except asyncio.CancelledError:
            outcome = "given_up"  # by the caller: nothing is learnt about the gateway
            raise
        finally:
            metrics.gateway_calls.labels(self._provider, operation, outcome).inc()
            metrics.gateway_call_seconds.labels(self._provider, operation).observe(self._clock() - began)
            self._ended(outcome, probe)

    def _ended(self, outcome: str, probe: bool) -> None:
        if probe:
            self._probing = False
        elif self._opened_at is not None:
            return  # it began before the breaker opened; the probe decides
        if outcome in ("ok", "refused"):
            self._failures = 0
            if self._opened_at is not None:
                self._opened_at = None
                metrics.gateway_open.labels(self._provider).set(0)
                log.info("gateway_back", provider=self._provider)
        elif outcome in ("away", "unknown"):
            self._failures += 1
            if probe or self._failures >= self._failures_max:
                if self._opened_at is None:
                    log.warning("gateway_not_offered", provider=self._provider, failures=self._failures)
                self._opened_at = self._clock()
                metrics.gateway_open.labels(self._provider).set(1)
