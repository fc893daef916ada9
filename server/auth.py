"""Who is asking: the one place that decides whether a token counts, for both doors.

Every kind of bad token is refused in the same words, so that a refusal teaches nothing; only a missing and an expired
token say so. Tokens need no record; what ends one before its `exp` is `Revocations`.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import jwt
import msgspec
import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from models.errors import Unauthenticated, Unavailable
from models.user import Actor, Role, Scope
from server import tokens
from server.settings import CannotStart, Settings
from server.tokens import LINK_KID, NOT_ACCEPTED, mint, secret_digest

__all__ = ["Authenticator", "Revocations", "bearer", "mint", "secret_digest"]

JWKS_MAX_BYTES = 256 * 1024
RSA_MIN_BITS = 2048
MISSING = "Send a token: `Authorization: Bearer …`, or `auth.token` on a socket."

UNREADABLE = (jwt.PyJWTError, RecursionError)

PublicAlgorithm = Literal["RS256", "ES256"]

log = structlog.get_logger(__name__)
_jws = jwt.PyJWS()


def bearer(header: str | None) -> str | None:
    """The token of an `Authorization` header; None when there is none, or one of another scheme."""
    scheme, _, token = (header or "").strip().partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


class Revocations:
    """The revoked `jti`s and `sub`s, in memory. Who reads the table calls `load`, who hears the news calls `add`."""

    def __init__(self) -> None:
        self._jtis: set[str] = set()
        self._subs: dict[str, float] = {}

    def load(self, rows: Iterable[tuple[str, str, float]]) -> None:
        """Take these (kind, value, revoked_at in Unix seconds) in place of everything known."""
        fresh = Revocations()
        for kind, value, revoked_at in rows:
            fresh.add(kind, value, revoked_at)
        self._jtis, self._subs = fresh._jtis, fresh._subs

    def add(self, kind: str, value: str, revoked_at: float) -> None:
        """Take one more. Of two revocations of a subject the later one counts, in whatever order they come."""
        if kind == "jti":
            self._jtis.add(value)
        elif kind == "sub":
            self._subs[value] = max(revoked_at, self._subs.get(value, revoked_at))
        else:
            raise ValueError(f"a revocation is of a jti or a sub, not of a {kind!r}")

    def revoked(self, actor: Actor) -> bool:
        """A subject's revocation ends the tokens issued until then, and any token that does not say when it was."""
        if actor.jti is not None and actor.jti in self._jtis:
            return True
        revoked_at = self._subs.get(actor.sub)
        return revoked_at is not None and (actor.iat is None or actor.iat <= revoked_at)


class PublicKey(NamedTuple):
    """A key and the one algorithm that it may be used with."""

    algorithm: PublicAlgorithm
    key: RSAPublicKey | EllipticCurvePublicKey


class _NoKeySet(Exception):
    """What the key server sent is not a key set. The message says why and quotes nothing of it."""


class KeySet:
    """The keys behind `JWT_JWKS_URL`. Once a set was fetched, no failure of the key server takes it away."""

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        if urlsplit(settings.jwt_jwks_url).scheme not in ("http", "https"):
            raise CannotStart("JWT_JWKS_URL must start with https:// or http://.")
        self._settings = settings
        self._clock = clock
        self._keys: dict[tuple[str, str | None], PublicKey] | None = None
        self._fetched_at = self._tried_at = float("-inf")
        self._failing = False
        self._fetching: asyncio.Task[None] | None = None
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Begin the first fetch."""
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self._settings.jwks_timeout_ms / 1000),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )
        self._refresh()

    async def stop(self) -> None:
        """End a running fetch."""
        session, self._session = self._session, None
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait([self._fetching])
        if session is not None:
            await session.close()

    async def find(self, algorithm: str, kid: str | None) -> PublicKey | None:
        """The key of this `kid`; without a `kid` the only key of the algorithm.

        Raises:
            Unavailable: no key set was ever fetched, so nobody can tell whether the token is good.
        """
        if not self._recent(self._fetched_at, self._settings.jwks_refresh_s):
            fetching = self._refresh()
            # Old keys serve on while the key server is away: only the first caller who finds it so has to wait.
            if fetching is not None and not (self._failing and self._keys is not None):
                await asyncio.wait([fetching])
        if self._keys is not None and self._pick(algorithm, kid) is None and (fetching := self._refresh()) is not None:
            await asyncio.wait([fetching])
        if self._keys is None:
            raise Unavailable("The server that holds the keys of tokens does not answer now.")
        return self._pick(algorithm, kid)

    def _pick(self, algorithm: str, kid: str | None) -> PublicKey | None:
        keys = self._keys or {}
        if kid is not None:
            return keys.get((algorithm, kid))
        fitting = [key for key in keys.values() if key.algorithm == algorithm]
        return fitting[0] if len(fitting) == 1 else None

    def _recent(self, at: float, limit_s: float) -> bool:
        return 0 <= self._clock() - at < limit_s  # a clock that was set back makes nothing recent for ever

    def _refresh(self) -> asyncio.Task[None] | None:
        """The fetch that all callers share. None: the last one began less than `JWKS_RETRY_S` ago."""
        if self._fetching is not None and not self._fetching.done():
            return self._fetching
        if self._session is None or self._recent(self._tried_at, self._settings.jwks_retry_s):
            return None
        self._tried_at = self._clock()
        self._fetching = asyncio.create_task(self._fetch(self._session))
        return self._fetching

    async def _fetch(self, session: aiohttp.ClientSession) -> None:
        try:
            async with session.get(self._settings.jwt_jwks_url, allow_redirects=False) as response:
                if response.status != 200:
                    raise _NoKeySet(f"status {response.status}")
                body = bytearray()
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > JWKS_MAX_BYTES:
                        raise _NoKeySet(f"longer than {JWKS_MAX_BYTES} bytes")
            self._keys = _keys_of(bytes(body))
        except Exception as error:  # whatever a key server does, it must not take the known keys away
            self._failing = True
            # The URL may carry a password and an error may quote the body: neither is logged.
            why = str(error) if isinstance(error, _NoKeySet) else type(error).__name__
            log.warning("jwks_not_fetched", reason=why, keys_kept=len(self._keys or {}))
            return
        self._failing = False
        self._fetched_at = self._clock()
        if not self._keys:
            log.warning("jwks_without_usable_key")


def _keys_of(body: bytes) -> dict[tuple[str, str | None], PublicKey]:
    """The usable keys of a key set by (algorithm, kid): RSA and P-256 for signatures; others are passed over."""
    entries = msgspec.json.decode(body, type=dict[str, object]).get("keys")
    if not isinstance(entries, list):
        raise _NoKeySet("no list of keys")
    found: dict[tuple[str, str | None], PublicKey] = {}
    for entry in entries:
        if not isinstance(entry, dict) or entry.get("use", "sig") != "sig":
            continue
        kid = entry.get("kid")
        public = {name: entry[name] for name in ("kty", "crv", "n", "e", "x", "y") if name in entry}
        algorithm = {"RSA": "RS256", "EC": "ES256"}.get(str(public.get("kty")))
        if algorithm is None or entry.get("alg", algorithm) != algorithm or not isinstance(kid, str | None):
            continue
        try:
            key = _public_key(jwt.PyJWK(public, algorithm).key)
        except (jwt.PyJWTError, ValueError, TypeError):
            continue
        if key is not None:
            found[key.algorithm, kid] = key
    return found


def _public_key(key: object) -> PublicKey | None:
    """`key` with the algorithm of its type; None for a type, curve or length that is not taken."""
    if isinstance(key, RSAPublicKey) and key.key_size >= RSA_MIN_BITS:
        return PublicKey("RS256", key)
    if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        return PublicKey("ES256", key)
    return None


def _key_of_pem(pem: str) -> PublicKey:
    try:
        loaded = load_pem_public_key(pem.replace("\\n", "\n").encode())
    except (ValueError, UnsupportedAlgorithm):
        raise CannotStart("JWT_PUBLIC_KEY is wrong: write a PEM, from -----BEGIN PUBLIC KEY----- to the end.") from None
    if (key := _public_key(loaded)) is None:
        raise CannotStart(f"JWT_PUBLIC_KEY must be RSA of {RSA_MIN_BITS} bits or more (RS256) or P-256 (ES256).")
    return key


class _Signed(NamedTuple):
    """What a token says, whose signature is good. `lasting`: its key is ours for the life of this process, and not one
    that a key server may withdraw."""

    payload: bytes
    of_link: bool
    lasting: bool


class Authenticator:
    """Verifies tokens, and makes the guest tokens of links.

    Raises:
        CannotStart: a key in the settings cannot be one.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        if "-----BEGIN" in settings.jwt_secret:
            raise CannotStart("JWT_SECRET holds a PEM key: put a public key into JWT_PUBLIC_KEY.")
        self.revocations = Revocations()
        self._settings = settings
        self._clock = clock
        self._secret = tokens.hs256_key(settings)
        self._links = tokens.LinkKeys(settings)
        self._public = _key_of_pem(settings.jwt_public_key) if settings.jwt_public_key else None
        self._key_set = KeySet(settings, clock) if settings.jwt_jwks_url else None
        self._signed: dict[bytes, _Signed] = {}
        """By the SHA-256 of the token: signatures that were found good, so that clients who come back cost little."""

    async def start(self) -> None:
        """Begin to fetch the key set; nobody waits for it here."""
        if self._key_set is not None:
            await self._key_set.start()

    async def stop(self) -> None:
        """End a running fetch; who waits for it is refused for now."""
        if self._key_set is not None:
            await self._key_set.stop()

    async def actor(self, token: object) -> Actor:
        """The bearer of this token; on a socket it may be any JSON value.

        Raises:
            Unauthenticated: the token is missing, expired, revoked or not good.
            Unavailable: only the key server could tell, and it never answered. Refused for now, not for good.
        """
        if not token:
            raise Unauthenticated(MISSING)
        if not isinstance(token, str) or len(token) > self._settings.token_max_bytes or not token.isascii():
            raise Unauthenticated(NOT_ACCEPTED)
        digest = hashlib.sha256(token.encode()).digest()
        signed = self._signed.get(digest)
        if signed is None:
            signed = await self._verify(token)
            if signed.lasting:
                self._signed[digest] = signed
                if len(self._signed) > self._settings.token_cache_max:
                    del self._signed[next(iter(self._signed))]
        # what time and revocations make of it is judged at every use
        actor = tokens.read(signed.payload, self._settings, self._clock())
        if signed.of_link and actor.role is not Role.GUEST:
            raise Unauthenticated(NOT_ACCEPTED)
        self.check(actor)
        return actor

    async def _verify(self, token: str) -> _Signed:
        try:
            header = _jws.get_unverified_header(token)
        except UNREADABLE:
            raise Unauthenticated(NOT_ACCEPTED) from None
        signed = await self._verified(token, header.get("alg"), header.get("kid"))
        if signed is None:
            raise Unauthenticated(NOT_ACCEPTED)
        return signed

    def check(self, actor: Actor) -> None:
        """Raises Unauthenticated: the actor's token has expired, or was revoked, since it was accepted."""
        if actor.exp <= self._clock():
            raise Unauthenticated(tokens.EXPIRED)
        if self.revocations.revoked(actor):
            raise Unauthenticated(NOT_ACCEPTED)

    async def _verified(self, token: str, algorithm: object, kid: str | None) -> _Signed | None:
        """What the token says, if a key that is pinned to its algorithm signed it."""
        if kid == LINK_KID:
            return _signed(token, self._links.token_key, "HS256", of_link=True)
        if algorithm == "HS256":
            return _signed(token, self._secret, "HS256") if self._secret is not None else None
        if self._public is not None and (signed := _signed(token, self._public.key, self._public.algorithm)):
            return signed
        if self._key_set is None or algorithm not in ("RS256", "ES256"):
            return None
        key = await self._key_set.find(str(algorithm), kid)
        return _signed(token, key.key, key.algorithm, lasting=False) if key is not None else None

    def guest_token(self, *, link_id: str, order_id: str, scope: Scope, expires_at: float) -> str:
        """The token that a link is exchanged for: it reaches one order and ends with the link (`jti`)."""
        now = self._clock()
        return self._links.token(link_id=link_id, order_id=order_id, scope=scope, now=now, expires_at=expires_at)

    def link_secret(self, link_id: str) -> str:
        """The secret of a link: the same each time, so a repeated request gets it again though it is not stored."""
        return self._links.secret(link_id)


def _signed(
    token: str,
    key: bytes | RSAPublicKey | EllipticCurvePublicKey,
    algorithm: str,
    *,
    of_link: bool = False,
    lasting: bool = True,
) -> _Signed | None:
    try:
        payload: bytes = _jws.decode(token, key, algorithms=[algorithm])
    except UNREADABLE:
        return None
    return _Signed(payload, of_link, lasting)
