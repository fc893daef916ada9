"""What verbs need of the world outside Postgres. Adapters in ring 3 fulfil these protocols."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, Protocol

import msgspec

from handlers.context import Tx
from models.payment import Capture, Failure, News, Provider, RefundNews

Transactions = Callable[[], AbstractAsyncContextManager[Tx]]
"""Opens a transaction of several statements. It commits when the block ends, and then hands on what it told: for verbs
that are two short transactions around one gateway call."""


class Once(Protocol):
    """The caller's Idempotency-Key, for a verb that waits for a gateway between two transactions."""

    async def begun(self, tx: Tx) -> Sequence[str]:
        """The ids of what an earlier request with this key has begun, payments or refunds, so that it is carried on;
        nothing: this is the first one. The first statement of the verb's first transaction, which then holds the key.

        Raises:
            models.errors.Conflict: a request with this key is in its first transaction. IdempotencyMismatch: the key
            was used for another command.
        """
        ...

    async def begin(self, tx: Tx, *subjects: str) -> None:
        """Keep with the key, in the verb's first transaction, what is begun under it."""
        ...


class Done(NamedTuple):
    """What a verb that waited for a gateway came to."""

    status: int
    """201 begun, 200 changed or the same again, 202 the outcome is open."""
    result: Any
    secret: str | None = None
    """What the answer shows and nobody stores: Stripe's client secret, where it is known already."""
    anew: bool = False
    """The result holds a secret that only the verb can make again (the address of a bank's page): a repeat runs it, and
    nothing is stored."""


class Closing(NamedTuple):
    """Of this order, the positions of this assignment and of earlier ones are not to be shown any more."""

    order_id: str
    assignment: int


class Positions(Protocol):
    """The positions lane of the bus."""

    async def close(self, order_id: str, assignment: int) -> None:
        """Let no position of this assignment, or of an earlier one, be shown from now on.

        Returns within `REDIS_TIMEOUT_MS` whether or not Redis answers: while Redis is away no position is shown at all.
        """
        ...


class Reservations(Protocol):
    """Stock and price of an order."""

    async def retake(self, tx: Tx, order_id: str) -> bool:
        """Take again, in this transaction, what an expired order had given back; False: it cannot be had as it was."""
        ...


# gateways


class GatewayFailed(Exception):
    """A call to a gateway did not do what it was asked."""

    def __init__(self, provider: Provider, code: str, message: str) -> None:
        super().__init__(f"{provider}: {code}: {message}")
        self.provider, self.code, self.message = provider, code, message


PASSING = frozenset({401, 403, 409, 429})
"""HTTP statuses that say nothing of the payment: our key was refused (401, 403), the same request is still being
carried out (409), or we asked too often (429)."""


class GatewayRefused(GatewayFailed):
    """The gateway said no: surely nothing happened. `code` and `message` are its own words; `status` is its HTTP status
    (400, 401, 402, 404, 409, 429 …)."""

    def __init__(
        self,
        provider: Provider,
        status: int,
        code: str,
        message: str,
        *,
        retryable: bool = False,
        news: News | None = None,
    ) -> None:
        super().__init__(provider, code, message)
        self.status = status
        self.failure = Failure(code=code, message=message, retryable=retryable or status in PASSING)
        self.news = news
        """What the refusal says of the payment, if it does (a declined card)."""

    @property
    def may_pass(self) -> bool:
        """Whether the same request may be accepted later, so that this refusal decides nothing."""
        return self.failure.retryable


class GatewayAway(GatewayFailed):
    """The gateway was not reached, or is not asked because its breaker is open: surely nothing happened."""


class GatewayNotAsked(GatewayAway):
    """Its breaker is open, or half open and somebody else is trying it."""


class GatewayUnknown(GatewayFailed):
    """No answer, or none that makes sense (a time-out, a 5xx, HTML): it may have happened."""


class NewPayment(msgspec.Struct, frozen=True, kw_only=True):
    """A payment as a gateway is asked to create it. `reference` is the receipt or idempotency key: the same again gives
    the same gateway order. `amount`: minor units."""

    payment_id: str
    order_id: str
    reference: str
    amount: int
    currency: str
    capture: Capture
    description: str | None = None


class Created(msgspec.Struct, frozen=True, kw_only=True):
    """What the gateway made of it. `client_secret`: Stripe's, never stored."""

    gateway_order_id: str
    client_secret: str | None = None


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """A payment as its gateway knows it."""

    payment_id: str
    gateway_order_id: str
    gateway_payment_id: str | None
    reference: str
    amount: int
    currency: str
    capture: Capture


class Confirmed(msgspec.Struct, frozen=True, kw_only=True):
    """How a confirmation by the server ended: the news, and where the payer must go next, if anywhere."""

    news: News
    redirect_url: str | None = None


class NewRefund(msgspec.Struct, frozen=True, kw_only=True):
    """A refund that a gateway is asked for. `refund_id` is ours and comes back in its news; `attempt` counts how often
    it was begun anew after it had failed."""

    refund_id: str
    attempt: int = 0
    payment: Known
    capture_key: str
    """Which money: key of the row of `captures` (Razorpay's payment, Stripe's intent)."""
    amount: int
    currency: str
    reason: str

    @property
    def key(self) -> str:
        """The idempotency key: the same again is the same refund. Letters, digits and `-` only."""
        return f"{self.refund_id}-{self.attempt}"


class Movement(msgspec.Struct, frozen=True, kw_only=True):
    """A line of a gateway's own books, for the daily report: what it says it captured of one payment."""

    gateway_order_id: str
    gateway_payment_id: str
    amount: int
    currency: str
    captured_at: dt.datetime


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """A webhook whose signature is right. `event_id` is the gateway's, the same for every repeat; `kind` its event
    type; `refs` the gateway ids that it speaks of, so that it is found again when one of them becomes known."""

    event_id: str
    kind: str
    refs: tuple[str, ...]


class Gateway(Protocol):
    """One payment gateway. Every call is bounded in time; all of them raise GatewayRefused, GatewayAway and
    GatewayUnknown, and nothing else."""

    provider: Provider

    @property
    def offered(self) -> bool:
        """False while the breaker is open."""
        ...

    @property
    def simulated(self) -> bool:
        """A simulator of ours: no money moves."""
        ...

    def check_amount(self, amount: int, currency: str) -> None:
        """Raises models.errors.AmountTooSmall, or Invalid: the gateway does not take this amount of this currency."""
        ...

    async def create(self, new: NewPayment) -> Created: ...

    async def fetch(self, known: Known) -> Sequence[News]:
        """Fresh news of a payment: one for each attempt that matters (every captured one, else the newest), or one with
        report PENDING when nobody has tried. Asked by the gateway order, never by a list that lags."""
        ...

    async def capture(self, known: Known, amount: int, currency: str) -> News: ...

    async def cancel(self, known: Known) -> Sequence[News]:
        """Let nobody pay it any more, where the gateway can do that; the fresh news either way. Razorpay cannot: its
        news is CANCELLED, unless money is moving."""
        ...

    async def confirm(self, known: Known, payment_method_id: str, return_url: str) -> Confirmed:
        """Stripe only; a declined card raises GatewayRefused with status 402."""
        ...

    async def refund(self, new: NewRefund) -> RefundNews: ...

    async def fetch_refund(self, new: NewRefund, gateway_refund_id: str | None) -> RefundNews | None:
        """What became of a refund; None: the gateway has none of ours."""
        ...

    def movements(self, start: dt.datetime, end: dt.datetime) -> AsyncIterator[Movement]:
        """The captures of a half-open range of time, from the gateway's own books."""
        ...

    def checkout(self, known: Known, client_secret: str | None, prefill: Mapping[str, str]) -> dict[str, Any]:
        """What the payer's browser needs: Razorpay `{keyId, gatewayOrderId, amount, currency, prefill}`, Stripe
        `{publishableKey, clientSecret}`, a simulator also `url`."""
        ...

    async def client_secret(self, known: Known) -> str | None:
        """Stripe's secret of an intent that exists; None for gateways that have none."""
        ...

    def proves_checkout(self, gateway_order_id: str, gateway_payment_id: str, signature: str) -> bool:
        """Razorpay's signature of a checkout, in constant time. Always False where there is none."""
        ...

    def receive(self, body: bytes, headers: Mapping[str, str]) -> Delivery:
        """Check a webhook's signature over its raw bytes against all secrets.

        Raises:
            models.errors.BadSignature: not signed by the gateway, or signed too long ago.
        """
        ...

    def read(self, kind: str, body: bytes) -> Sequence[News]:
        """What a stored webhook says; nothing when it is irrelevant to us."""
        ...


Gateways = Mapping[Provider, Gateway]
"""Those that are set up."""
