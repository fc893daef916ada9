"""Where an order goes and whom it concerns."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, UnsetType

from models.base import ShortText, Strict


class Address(Strict, omit_defaults=True):
    """`lat` and `lng` in degrees, `country` ISO 3166-1 alpha-2."""

    line1: ShortText
    city: ShortText
    country: Annotated[str, Meta(pattern="^[A-Z]{2}\\Z")]
    line2: ShortText | UnsetType = UNSET
    name: ShortText | UnsetType = UNSET
    phone: ShortText | UnsetType = UNSET
    landmark: ShortText | UnsetType = UNSET
    state: ShortText | UnsetType = UNSET
    postal_code: ShortText | UnsetType = UNSET
    lat: Annotated[float, Meta(ge=-90, le=90)] | UnsetType = UNSET
    lng: Annotated[float, Meta(ge=-180, le=180)] | UnsetType = UNSET


class Contact(Strict, omit_defaults=True):
    name: ShortText | UnsetType = UNSET
    phone: ShortText | UnsetType = UNSET
    email: ShortText | UnsetType = UNSET


class Billing(Strict, omit_defaults=True):
    name: ShortText | UnsetType = UNSET
    gstin: ShortText | UnsetType = UNSET
