"""Is a webhook Stripe's? Its signature over the raw bytes, and what stands on its envelope.

https://docs.stripe.com/webhooks#verify-manually: `Stripe-Signature: t=<unix>,v1=<hex>[,v1=…]`, each v1 an HMAC-SHA256
of `<t>.<body>` under one secret. While a secret is rolled there are several, and every retry is signed anew.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from handlers.ports import Delivery
from models.errors import BadSignature

_TIME = re.compile(r"[0-9]{1,12}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_ID = re.compile(r"[A-Za-z0-9_]{1,255}", re.ASCII)
_KIND = re.compile(r"[a-z0-9_.]{1,100}", re.ASCII)
PARTS_MAX = 16
"""Most parts of the header that are looked at: two secrets, two schemes and a time are five."""


def verified(body: bytes, header: str, secrets: Sequence[str], now: float, tolerance_s: int) -> None:
    """Whether one of `secrets` signed `body` within `tolerance_s` of `now` (Unix seconds), past or future.

    Raises:
        BadSignature: none did, or too long ago, or in the future.
    """
    stamp, digests = "", []
    for part in header.split(",")[:PARTS_MAX]:
        name, _, value = part.strip().partition("=")
        if name == "t" and not stamp and _TIME.fullmatch(value):
            stamp = value
        elif name == "v1" and _DIGEST.fullmatch(value):
            digests.append(value)
    if not stamp or not digests:
        raise BadSignature("the Stripe-Signature header holds no time or no v1 signature")
    signed = stamp.encode() + b"." + body
    wanted = [hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest() for secret in secrets if secret]
    # a list, so that every pair is compared and the time taken tells nothing
    if not any([hmac.compare_digest(digest, right) for digest in digests for right in wanted]):
        raise BadSignature("no v1 signature belongs to this body and our secrets")
    if abs(now - int(stamp)) > tolerance_s:
        raise BadSignature("the signature is too old, or from the future")


def envelope_of(body: bytes) -> Delivery:
    """Id, kind and the objects that an event names.

    Raises:
        BadSignature: the body is no event of Stripe's, whoever signed it.
    """
    try:
        event = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadSignature("the body is no JSON") from error
    found = event if isinstance(event, dict) else {}
    event_id, kind = found.get("id"), found.get("type")
    if not (isinstance(event_id, str) and _ID.fullmatch(event_id) and isinstance(kind, str) and _KIND.fullmatch(kind)):
        raise BadSignature("the body is no event")
    data = found.get("data")
    thing = data.get("object") if isinstance(data, dict) else None
    refs = dict.fromkeys(_names(thing)) if isinstance(thing, dict) else {}
    return Delivery(event_id=event_id, kind=kind, refs=tuple(refs))


def _names(thing: dict[str, Any]) -> Iterator[str]:
    for member in ("id", "payment_intent", "charge", "latest_charge"):
        value = thing.get(member)
        if isinstance(value, dict):
            value = value.get("id")
        if isinstance(value, str) and _ID.fullmatch(value):
            yield value
