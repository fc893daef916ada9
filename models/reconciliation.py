"""Reconciliation: a day's captures in a gateway's books beside ours, payment by payment."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated

from msgspec import Meta
from sqlalchemy import Column, Date, Table, Text

from models.base import Amount, Time, UtcTime, UuidText, View, metadata
from models.payment import Provider

reconciliations = Table(
    "reconciliations",
    metadata,
    Column("provider", Text, primary_key=True),
    # in SELLER_TIME_ZONE
    Column("day", Date, primary_key=True),
    Column("made_at", UtcTime, nullable=False),
    # JSON: the report as it is shown
    Column("report", Text, nullable=False),
)


class Kind(StrEnum):
    MISSING = "missing"
    """The gateway has it, we do not."""
    EXTRA = "extra"
    """We have it, the gateway does not."""
    ALTERED = "altered"
    """Both have it, with another amount or currency, or of another payment."""


class Booked(View):
    """Money that came, as one of the two books says."""

    gateway_order_id: str
    amount: Amount
    currency: str


class Difference(View):
    """One capture of which the books do not say the same."""

    kind: Kind
    gateway_order_id: str
    gateway_payment_id: Annotated[str, Meta(description="which attempt; Stripe's intents succeed once")] | None = None
    payment_id: UuidText | None = None
    order_id: UuidText | None = None
    ours: Booked | None = None
    theirs: Booked | None = None


class Sum(View):
    currency: str
    count: Annotated[int, Meta(description="captures")]
    amount: Amount


class Reconciliation(View):
    """The captures of one day in both books. What both have counts on the gateway's day."""

    provider: Provider
    date: Annotated[str, Meta(description="a day in SELLER_TIME_ZONE", extra_json_schema={"format": "date"})]
    made_at: Time
    ours: list[Sum]
    theirs: list[Sum]
    differences: list[Difference]


def sums(booked: Iterable[Booked]) -> list[Sum]:
    """By currency: amounts of different currencies are never added."""
    amounts: dict[str, list[int]] = defaultdict(list)
    for one in booked:
        amounts[one.currency].append(one.amount)
    return [Sum(currency=name, count=len(found), amount=sum(found)) for name, found in sorted(amounts.items())]
