"""What a token says: reading the claims of one whose signature was verified, and making our own.

No network and no key set here; whose signature counts is decided in `server/auth.py`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterable
from typing import Annotated, Any

import jwt
import msgspec
from msgspec import UNSET, Meta, UnsetType

from models.errors import Unauthenticated
from models.user import Actor, Role, Scope
from server.settings import DEFAULT_JWT_SECRET, CannotStart, Settings

LINK_KID = "waybill-link"
SUB_MAX_CHARS = 200
EXP_MAX = 253_402_300_799
"""The last second that RFC 3339 can write. An `exp` beyond it is an issuer that counts milliseconds."""
ISSUER_SKEW_MAX_S = 300
"""An `iat` further ahead of our clock than this does not tell when the token was issued."""

EXPIRED = "The token has expired."
NOT_ACCEPTED = "The token is not accepted."

Text = Annotated[str, Meta(pattern=r"^[^\x00]*$")]
"""Claims may become parameters of a query, and Postgres cannot hold a NUL."""


class Claims(msgspec.Struct):
    """The claims that are read. Others are ignored; `scope` too, unless the bearer is a guest."""

    sub: Annotated[str, Meta(min_length=1, max_length=SUB_MAX_CHARS, pattern=r"^[^\x00]*$")]
    role: Role
    exp: Annotated[float, Meta(le=EXP_MAX)]
    nbf: float | UnsetType = UNSET
    iat: float | UnsetType = UNSET
    jti: Text | UnsetType = UNSET
    orders: list[Text] | UnsetType = UNSET
    scope: object = "track"
    aud: object = UNSET
    iss: object = UNSET


_decoder = msgspec.json.Decoder(Claims)


def read(payload: bytes, settings: Settings, now: float) -> Actor:
    """The actor that a verified payload names.

    Raises:
        Unauthenticated: a claim is missing, of the wrong type or not for us, or the token is not valid now.
    """
    try:
        claims = _decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise Unauthenticated(NOT_ACCEPTED) from None
    audiences = claims.aud if isinstance(claims.aud, list) else [claims.aud]
    if settings.jwt_audience and settings.jwt_audience not in audiences:
        raise Unauthenticated(NOT_ACCEPTED)
    if settings.jwt_issuer and claims.iss != settings.jwt_issuer:
        raise Unauthenticated(NOT_ACCEPTED)
    if claims.exp <= now:
        raise Unauthenticated(EXPIRED)
    if claims.nbf is not UNSET and claims.nbf > now:
        raise Unauthenticated(NOT_ACCEPTED)
    guest = claims.role is Role.GUEST
    if guest and claims.scope not in ("track", "pay"):
        raise Unauthenticated(NOT_ACCEPTED)
    orders = None if claims.orders is UNSET else frozenset(claims.orders)
    return Actor(
        sub=claims.sub,
        role=claims.role,
        exp=claims.exp,
        iat=None if claims.iat is UNSET or claims.iat > now + ISSUER_SKEW_MAX_S else claims.iat,
        jti=None if claims.jti is UNSET else claims.jti,
        orders=frozenset() if guest and orders is None else orders,
        scope=Scope(str(claims.scope)) if guest else None,
    )


def hs256_key(settings: Settings) -> bytes | None:
    """The key of ordinary HS256 tokens. None: others sign our tokens, and the well-known default key counts no more."""
    if settings.asymmetric and settings.jwt_secret == DEFAULT_JWT_SECRET:
        return None
    return settings.jwt_secret.encode()


def mint(
    settings: Settings,
    *,
    sub: str,
    role: Role,
    orders: Iterable[str] | None = None,
    scope: Scope | None = None,
    jti: str | None = None,
    ttl_s: float = 3600,
    now: float | None = None,
) -> str:
    """One HS256 token, for `python -m server token`.

    Raises:
        CannotStart: this server would refuse the token.
    """
    key = hs256_key(settings)
    if key is None:
        raise CannotStart("Tokens are signed by JWT_PUBLIC_KEY or JWT_JWKS_URL here: set JWT_SECRET to make your own.")
    if not 1 <= len(sub) <= SUB_MAX_CHARS or "\x00" in sub:
        raise CannotStart(f"The subject of a token must have 1 to {SUB_MAX_CHARS} characters.")
    issued_at = time.time() if now is None else now
    if not 0 < ttl_s <= EXP_MAX - issued_at:
        raise CannotStart("The life of a token must be more than 0 seconds, and end before the year 10000.")
    claims: dict[str, Any] = {"sub": sub, "role": role.value, "exp": int(issued_at + ttl_s), "iat": int(issued_at)}
    if orders is not None:
        claims["orders"] = list(orders)
    if scope is not None:
        claims["scope"] = scope.value
    if jti is not None:
        claims["jti"] = jti
    claims |= _addressed(settings)
    try:
        read(json.dumps(claims).encode(), settings, issued_at)
    except Unauthenticated:
        raise CannotStart("A token like this would not be accepted: write subject and orders as plain text.") from None
    return jwt.encode(claims, key, "HS256")


class LinkKeys:
    """What tracking and payment links are made of, derived from `JWT_SECRET` so that nothing secret is stored."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        root = settings.jwt_secret.encode()
        self.token_key = hmac.digest(root, b"waybill: guest tokens of links, 1", "sha256")
        self._secret_key = hmac.digest(root, b"waybill: secrets of links, 1", "sha256")

    def token(self, *, link_id: str, order_id: str, scope: Scope, now: float, expires_at: float) -> str:
        """A guest's token for one order. Its `jti` is the link, so ending the link ends the token."""
        claims: dict[str, Any] = {
            "sub": f"link:{link_id}",
            "role": Role.GUEST.value,
            "orders": [order_id],
            "scope": scope.value,
            "jti": link_id,
            "iat": int(now),
            "exp": expires_at,
        }
        return jwt.encode(claims | _addressed(self._settings), self.token_key, "HS256", headers={"kid": LINK_KID})

    def secret(self, link_id: str) -> str:
        """What stands in the link's URL: 43 characters that fit there as they are."""
        digest = hmac.digest(self._secret_key, link_id.encode(), "sha256")
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def secret_digest(secret: str) -> bytes:
    """What is stored of a link's secret: 256 random bits need no salt and no slow hash."""
    return hashlib.sha256(secret.encode()).digest()


def _addressed(settings: Settings) -> dict[str, str]:
    both = {"aud": settings.jwt_audience, "iss": settings.jwt_issuer}
    return {name: value for name, value in both.items() if value}
