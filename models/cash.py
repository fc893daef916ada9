"""Cash: what is taken for what is due where the smallest coins do not exist any more, and what is given back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from models.errors import AlreadyPaid, AmountMismatch
from models.money import EXPONENTS

Units = Mapping[str, int]
"""Minor units of the smallest coin of a currency: `{"INR": 100}`. Where none is named, it is 1."""


def read_units(text: str) -> dict[str, int]:
    """`INR=100,CHF=5` as units.

    Raises:
        ValueError: with the part that is wrong.
    """
    found: dict[str, int] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        currency, sign, unit = part.partition("=")
        if not sign or currency not in EXPONENTS or not (unit.isascii() and unit.isdigit()) or int(unit) < 1:
            raise ValueError(part)
        found[currency] = int(unit)
    return found


def rounded(due: int, currency: str, units: Units) -> int:
    """What is taken in cash for `due` minor units: the nearest multiple of the smallest coin, half of one up.

    Something that is due is never rounded to nothing: then it is one coin.
    """
    unit = units.get(currency, 1)
    return max((2 * due + unit) // (2 * unit) * unit, unit) if due > 0 else 0


class Taken(NamedTuple):
    """Minor units of one currency: `amount` came into the hand, and settles `applied` of what was due."""

    amount: int
    applied: int
    change: int | None = None
    """What was given back of what was handed over; None: nobody said what was."""

    @property
    def rounding(self) -> int:
        """For the account `rounding`: positive is lost, negative is gained."""
        return self.applied - self.amount


def take(due: int, currency: str, amount: int, tendered: int | None, units: Units, *, partial: bool) -> Taken:
    """Judge `amount` taken for `due`; `partial`: less may be taken, and less is not rounded.

    Raises:
        AlreadyPaid: nothing is due.
        AmountMismatch: not what is due after rounding, or less was handed over.
    """
    if due <= 0:
        raise AlreadyPaid("Nothing is due.")
    asked = rounded(due, currency, units)
    if amount != asked and not (partial and 0 < amount < min(asked, due)):
        raise AmountMismatch(f"In cash {asked} minor units of {currency} are due, not {amount}.")
    if tendered is not None and tendered < amount:
        raise AmountMismatch(f"{tendered} was handed over for {amount}.")
    change = None if tendered is None else tendered - amount
    return Taken(amount, due if amount == asked else amount, change)
