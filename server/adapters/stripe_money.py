"""Amounts as Stripe counts them.

Ours are minor units of ISO 4217 (`models/money.py`). Stripe's are the same but for the currencies of this page
(https://docs.stripe.com/currencies). Each row was checked against that page in November 2026.
"""

from __future__ import annotations

from models.errors import AmountTooSmall, Invalid

_HUNDREDFOLD = frozenset({"ISK", "UGX"})
"""Whole units with us, hundredths at Stripe, always ending in 00."""
_HUNDREDTH = frozenset({"MGA"})
"""Hundredths with us, whole units at Stripe."""
_TENS = frozenset({"BHD", "JOD", "KWD", "OMR", "TND"})
"""Three digits on both sides, but card networks carry two: the last one is 0."""

_MINIMUMS = {
    **dict.fromkeys(["AUD", "BRL", "CAD", "CHF", "EUR", "INR", "NZD", "SGD", "USD", "ZAR"], 50),
    **dict.fromkeys(["AED", "MYR", "PLN", "RON"], 200),
    **dict.fromkeys(["NOK", "SEK"], 300),
    **dict.fromkeys(["MXN", "THB"], 1000),
    "CZK": 1500,
    "DKK": 250,
    "GBP": 30,
    "HKD": 400,
    "HUF": 17_500,
    "JPY": 50,
}
"""Least charge in our minor units, where Stripe names one. For other currencies it converts to the currency of the
account and refuses by that (`amount_too_small`)."""


def step(currency: str) -> int:
    """Amounts of this currency, in our minor units, are multiples of this at Stripe."""
    return 100 if currency in _HUNDREDTH else 10 if currency in _TENS else 1


def to_stripe(amount: int, currency: str) -> int:
    """Our minor units as Stripe's.

    Raises:
        Invalid: Stripe has no such amount of this currency.
    """
    if amount % step(currency):
        raise Invalid(f"Stripe takes {currency} in steps of {step(currency)} minor units", "/amount")
    if currency in _HUNDREDFOLD:
        return amount * 100
    return amount // 100 if currency in _HUNDREDTH else amount


def from_stripe(amount: int, currency: str) -> int:
    """Stripe's minor units as ours; `currency` upper case. A part of our smallest unit, which Stripe should never
    report, is cut: money is not credited that did not come."""
    if currency in _HUNDREDFOLD:
        return amount // 100
    return amount * 100 if currency in _HUNDREDTH else amount


def check(amount: int, currency: str) -> None:
    """Raises AmountTooSmall, or Invalid: Stripe does not take this amount of this currency."""
    to_stripe(amount, currency)
    least = _MINIMUMS.get(currency, 1)
    if amount < least:
        raise AmountTooSmall(f"Stripe takes no less than {least} minor units of {currency}")
