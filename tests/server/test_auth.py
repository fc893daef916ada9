"""Tokens: what is accepted, what is refused and in which words, keys from a key server, links, revocations."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import logging
import re
import socket
import traceback
from collections.abc import AsyncIterator, Callable
from typing import Any

import jwt
import pytest
import structlog
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from models.errors import Refused, Unauthenticated, Unavailable
from models.user import Actor, Role, Scope
from server import auth as auth_module
from server.auth import JWKS_MAX_BYTES, Authenticator, Revocations, bearer, mint, secret_digest
from server.settings import CannotStart, Settings
from server.tokens import EXPIRED, NOT_ACCEPTED, LinkKeys

NOW = 1_790_000_000.5
SECRET = "a-secret-of-forty-characters-for-the-tests"
CLAIMS: dict[str, Any] = {"sub": "u1", "role": "customer", "exp": NOW + 60}

RSA_KEY = rsa.generate_private_key(65537, 2048)
OTHER_RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
OTHER_EC_KEY = ec.generate_private_key(ec.SECP256R1())


def pem(key: Any) -> str:
    return str(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode())


def jwk(key: Any, **members: object) -> dict[str, object]:
    kind = jwt.get_algorithm_by_name("RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256")
    data: dict[str, object] = dict(kind.to_jwk(key.public_key(), as_dict=True))
    data.pop("key_ops", None)
    return data | members


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def settings(**given: Any) -> Settings:
    return Settings(**({"jwt_secret": SECRET} | given))


def authenticator(**given: Any) -> Authenticator:
    return Authenticator(settings(**given), Clock())


def local(auth: Authenticator, token: Any) -> Actor:
    """The answer to a token that needs no key server: it must come without waiting for anything."""
    asking = auth.actor(token)
    try:
        asking.send(None)
    except StopIteration as answer:
        actor: Actor = answer.value
        return actor
    asking.close()
    raise AssertionError("verifying waited for something")


def signed(key: Any = SECRET, algorithm: str = "HS256", kid: str | None = None, **claims: Any) -> str:
    """A token of the usual claims with `claims` changed; the value `...` leaves one out."""
    body = {name: value for name, value in (CLAIMS | claims).items() if value is not ...}
    headers = {"kid": kid} if kid is not None else None
    return jwt.PyJWS().encode(json.dumps(body).encode(), key, algorithm, headers)


def part(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def raw(header: bytes, payload: bytes, key: bytes = SECRET.encode()) -> str:
    """A token of these very bytes, correctly signed with HS256."""
    signing = f"{part(header)}.{part(payload)}"
    return f"{signing}.{part(hmac.digest(key, signing.encode(), 'sha256'))}"


HS256 = b'{"alg":"HS256"}'


# --- accepted ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", list(Role))
def test_every_role_is_read(role: Role) -> None:
    actor = local(authenticator(), signed(role=role.value, orders=["o1", "o2"], jti="t1", iat=NOW - 5))
    assert (actor.sub, actor.role, actor.exp) == ("u1", role, NOW + 60)
    assert (actor.orders, actor.jti, actor.iat) == (frozenset({"o1", "o2"}), "t1", NOW - 5)


def test_a_token_without_orders_is_not_narrowed_but_a_guest_has_no_grant() -> None:
    assert local(authenticator(), signed()).orders is None
    assert local(authenticator(), signed(role="guest")).orders == frozenset()


@pytest.mark.parametrize(
    ("claims", "scope"),
    [
        ({"role": "guest"}, Scope.TRACK),
        ({"role": "guest", "scope": "track"}, Scope.TRACK),
        ({"role": "guest", "scope": "pay"}, Scope.PAY),
        ({"role": "customer", "scope": "pay"}, None),
        ({"role": "staff", "scope": "openid profile"}, None),
        ({"role": "service", "scope": ["anything"]}, None),
    ],
)
def test_scope_is_for_guests_only(claims: dict[str, Any], scope: Scope | None) -> None:
    assert local(authenticator(), signed(**claims)).scope is scope


def test_unknown_claims_are_ignored_and_so_are_aud_and_iss_when_not_set() -> None:
    token = signed(name="Asha", nested={"a": [1, None]}, aud=["x"], iss="https://elsewhere")
    assert local(authenticator(), token).sub == "u1"


def test_an_iat_ahead_of_our_clock_is_tolerated() -> None:
    assert local(authenticator(), signed(iat=NOW + 30)).iat == NOW + 30


def test_an_iat_far_ahead_tells_nothing() -> None:
    assert local(authenticator(), signed(iat=NOW * 1000)).iat is None


@pytest.mark.parametrize("aud", ["waybill", ["other", "waybill"]])
def test_audience_and_issuer_that_fit(aud: object) -> None:
    auth = authenticator(jwt_audience="waybill", jwt_issuer="https://id.example")
    assert local(auth, signed(aud=aud, iss="https://id.example")).sub == "u1"


def test_exp_has_no_leeway() -> None:
    assert local(authenticator(), signed(exp=NOW + 0.001)).exp == NOW + 0.001
    with pytest.raises(Unauthenticated, match="expired"):
        local(authenticator(), signed(exp=NOW))


@pytest.mark.parametrize("newline", ["\n", "\\n"])
@pytest.mark.parametrize(("key", "algorithm"), [(RSA_KEY, "RS256"), (EC_KEY, "ES256")])
def test_the_public_key_names_its_algorithm(key: Any, algorithm: str, newline: str) -> None:
    auth = authenticator(jwt_public_key=pem(key).replace("\n", newline))
    assert local(auth, signed(key, algorithm)).sub == "u1"
    assert local(auth, signed(key, algorithm, kid="any")).sub == "u1"


def test_our_own_secret_counts_beside_a_public_key_only_when_it_was_set() -> None:
    assert local(authenticator(jwt_public_key=pem(EC_KEY)), signed()).sub == "u1"
    unset = Settings(jwt_public_key=pem(EC_KEY))
    with pytest.raises(Unauthenticated):
        local(Authenticator(unset, Clock()), signed(unset.jwt_secret))
    assert local(Authenticator(Settings(), Clock()), signed(Settings().jwt_secret)).sub == "u1"


# --- refused ----------------------------------------------------------------------------------------------------------

ADDRESSED = {"aud": "waybill", "iss": "https://id.example"}
BAD_CLAIMS: dict[str, dict[str, Any]] = {
    "no audience": {"aud": ...},
    "wrong audience": {"aud": "other"},
    "audience that only begins right": {"aud": "waybill-2"},
    "wrong audiences": {"aud": ["other", "more"]},
    "audience of a wrong type": {"aud": {"waybill": 1}},
    "no issuer": {"iss": ...},
    "wrong issuer": {"iss": "https://id.example.net"},
    "issuers": {"iss": ["https://id.example"]},
    "no exp": {"exp": ...},
    "exp as text": {"exp": str(int(NOW + 60))},
    "exp null": {"exp": None},
    "exp true": {"exp": True},
    "exp NaN": {"exp": float("nan")},
    "exp infinite": {"exp": float("inf")},
    "exp in milliseconds": {"exp": (NOW + 60) * 1000},
    "exp beyond any number": {"exp": 10**400},
    "nbf in the future": {"nbf": NOW + 1},
    "nbf as text": {"nbf": "0"},
    "iat as text": {"iat": "0"},
    "no sub": {"sub": ...},
    "sub empty": {"sub": ""},
    "sub a number": {"sub": 7},
    "sub too long": {"sub": "x" * 201},
    "sub with NUL": {"sub": "a\x00b"},
    "sub with a lone surrogate": {"sub": "\ud800"},
    "no role": {"role": ...},
    "unknown role": {"role": "root"},
    "role in capitals": {"role": "Admin"},
    "roles": {"role": ["admin"]},
    "orders a text": {"orders": "o1"},
    "orders null": {"orders": None},
    "orders of numbers": {"orders": [1]},
    "orders with NUL": {"orders": ["\x00"]},
    "jti a number": {"jti": 1},
    "unknown scope": {"role": "guest", "scope": "all"},
    "scope null": {"role": "guest", "scope": None},
    "scopes": {"role": "guest", "scope": ["pay"]},
}
GOOD = signed(**ADDRESSED)
HEAD, BODY, SIGNATURE = GOOD.split(".")
GOOD_BODY = json.dumps(CLAIMS | ADDRESSED).encode()
BAD_TOKENS: dict[str, Any] = {
    "alg none": signed("", "none", **ADDRESSED),
    "alg None with a signature": raw(b'{"alg":"None"}', GOOD_BODY),
    "alg missing": raw(b"{}", GOOD_BODY),
    "alg a list": raw(b'{"alg":["HS256"]}', GOOD_BODY),
    "alg HS512": jwt.encode(CLAIMS | ADDRESSED, SECRET * 2, "HS512"),
    "wrong secret": signed(SECRET + "x", **ADDRESSED),
    "a key that we have no way to check": signed(RSA_KEY, "RS256", **ADDRESSED),
    "no signature": f"{HEAD}.{BODY}.",
    "cut": GOOD[:-1],
    "changed": f"{HEAD}.{part(GOOD_BODY.replace(b'customer', b'admin'))}.{SIGNATURE}",
    "two parts": f"{HEAD}.{BODY}",
    "four parts": GOOD + ".x",
    "five parts": "a.b.c.d.e",
    "dots": "..",
    "no token at all": "hello",
    "with a space": GOOD + " ",
    "with the scheme": "Bearer " + GOOD,
    "letters of elsewhere": "é" + GOOD,
    "lone surrogate": "\ud800" + GOOD,
    "a number": 7,
    "bytes": GOOD.encode(),
    "a list": [GOOD],
    "oversized": signed(**ADDRESSED, pad="x" * 8192),
    "oversized rubbish": "x" * 1_000_000,
    "header no JSON": raw(b"hello", GOOD_BODY),
    "header a list": raw(b"[]", GOOD_BODY),
    "header too deep": raw(b'{"alg":"HS256","x":' + b"[" * 2900 + b"]" * 2900 + b"}", GOOD_BODY),
    "kid a number": raw(b'{"alg":"HS256","kid":1}', GOOD_BODY),
    "unknown crit": raw(b'{"alg":"HS256","crit":["x"],"x":1}', GOOD_BODY),
    "detached payload": raw(b'{"alg":"HS256","crit":["b64"],"b64":false}', b""),
    "claims no JSON": raw(HS256, b"hello"),
    "claims no UTF-8": raw(HS256, GOOD_BODY.replace(b"u1", b"\xff\xfe")),
    "claims a list": raw(HS256, b"[]"),
    "claims twice": raw(HS256, GOOD_BODY * 2),
    "claims empty": raw(HS256, b""),
    "claims too deep": raw(HS256, b'{"x":' + b"[" * 2900 + b"]" * 2900 + b"}"),
}


@pytest.mark.parametrize("claims", BAD_CLAIMS.values(), ids=BAD_CLAIMS)
def test_bad_claims_are_refused_in_one_way(claims: dict[str, Any]) -> None:
    auth = authenticator(jwt_audience="waybill", jwt_issuer="https://id.example")
    assert local(auth, GOOD).sub == "u1"
    with pytest.raises(Unauthenticated) as refusal:
        local(auth, signed(**(ADDRESSED | claims)))
    assert (refusal.value.detail, refusal.value.fields) == (NOT_ACCEPTED, {})


@pytest.mark.parametrize("token", BAD_TOKENS.values(), ids=BAD_TOKENS)
def test_bad_tokens_are_refused_in_one_way(token: Any) -> None:
    auth = authenticator(jwt_audience="waybill", jwt_issuer="https://id.example")
    with pytest.raises(Unauthenticated) as refusal:
        local(auth, token)
    assert (refusal.value.detail, refusal.value.fields) == (NOT_ACCEPTED, {})


@pytest.mark.parametrize("token", [None, ""])
def test_a_missing_token_is_told_so(token: str | None) -> None:
    with pytest.raises(Unauthenticated, match="Send a token"):
        local(authenticator(), token)


def test_only_a_token_that_is_otherwise_good_is_told_that_it_expired() -> None:
    with pytest.raises(Unauthenticated) as refusal:
        local(authenticator(), signed(exp=NOW - 1))
    assert refusal.value.detail == EXPIRED
    with pytest.raises(Unauthenticated) as refusal:
        local(authenticator(), signed("other" * 8, exp=NOW - 1))
    assert refusal.value.detail == NOT_ACCEPTED


@pytest.mark.parametrize("key", [RSA_KEY, EC_KEY])
@pytest.mark.parametrize("given", [{}, {"jwt_secret": SECRET}])
def test_the_public_key_is_no_secret(key: Any, given: dict[str, str]) -> None:
    """Key confusion: whoever knows the public key must not sign with its text as an HS256 secret."""
    auth = Authenticator(Settings(jwt_public_key=pem(key), **given), Clock())  # type: ignore[arg-type]
    for text in (pem(key), pem(key).strip(), pem(key).replace("\n", "\\n")):
        token = raw(HS256, json.dumps(CLAIMS).encode(), text.encode())
        with pytest.raises(Unauthenticated):
            local(auth, token)


@pytest.mark.parametrize(
    ("key", "token"),
    [
        (RSA_KEY, signed(OTHER_RSA_KEY, "RS256")),
        (RSA_KEY, signed(EC_KEY, "ES256")),
        (RSA_KEY, signed(RSA_KEY, "PS256")),
        (RSA_KEY, signed(RSA_KEY, "RS512")),
        (EC_KEY, signed(OTHER_EC_KEY, "ES256")),
        (EC_KEY, signed(RSA_KEY, "RS256")),
        (EC_KEY, signed("", "none")),
    ],
)
def test_a_public_key_verifies_its_own_signatures_in_its_own_algorithm_only(key: Any, token: str) -> None:
    with pytest.raises(Unauthenticated):
        local(authenticator(jwt_public_key=pem(key)), token)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"jwt_public_key": "hello"}, "JWT_PUBLIC_KEY is wrong"),
        ({"jwt_public_key": pem(RSA_KEY)[:100]}, "JWT_PUBLIC_KEY is wrong"),
        ({"jwt_public_key": pem(rsa.generate_private_key(65537, 1024))}, "2048 bits"),
        ({"jwt_public_key": pem(ec.generate_private_key(ec.SECP384R1()))}, "P-256"),
        ({"jwt_public_key": pem(ed25519.Ed25519PrivateKey.generate())}, "P-256"),
        ({"jwt_secret": pem(RSA_KEY)}, "JWT_PUBLIC_KEY"),
        ({"jwt_jwks_url": "file:///etc/keys"}, "JWT_JWKS_URL"),
    ],
)
def test_a_key_that_cannot_be_one_is_found_at_start(given: dict[str, str], sentence: str) -> None:
    with pytest.raises(CannotStart, match=sentence):
        authenticator(**given)


# --- properties -------------------------------------------------------------------------------------------------------

AUTH = authenticator(jwt_public_key=pem(EC_KEY))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
CLAIM_NAMES = st.sampled_from(["sub", "role", "exp", "nbf", "iat", "jti", "orders", "scope", "aud", "iss", "x"])


def refused_or_read(token: Any) -> None:
    with contextlib.suppress(Unauthenticated):
        local(AUTH, token)


@effort(deadline=None)
@given(st.text() | st.binary() | st.binary().map(lambda data: data.decode("latin-1")) | JSON)
def test_rubbish_is_refused_and_breaks_nothing(token: Any) -> None:
    with pytest.raises(Unauthenticated):
        local(AUTH, token)


@effort(deadline=None)
@given(st.binary(), st.binary(), st.binary())
def test_three_parts_of_rubbish_are_refused(header: bytes, payload: bytes, signature: bytes) -> None:
    with pytest.raises(Unauthenticated):
        local(AUTH, f"{part(header)}.{part(payload)}.{part(signature)}")


@effort(deadline=None)
@given(st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "b64", "jwk", "x5c"]), JSON), st.binary())
def test_any_header_over_a_good_signature_breaks_nothing(header: dict[str, Any], payload: bytes) -> None:
    refused_or_read(raw(json.dumps(header).encode(), payload))
    refused_or_read(raw(json.dumps({"alg": "HS256"} | header).encode(), payload))


@effort(deadline=None)
@given(st.dictionaries(CLAIM_NAMES, JSON) | JSON)
def test_any_claims_over_a_good_signature_break_nothing(claims: Any) -> None:
    refused_or_read(raw(HS256, json.dumps(claims).encode()))
    if isinstance(claims, dict):
        refused_or_read(raw(HS256, json.dumps(CLAIMS | claims).encode()))


@effort(deadline=None)
@given(st.data())
def test_one_changed_character_is_refused(data: st.DataObject) -> None:
    good = data.draw(st.sampled_from([signed(), signed(EC_KEY, "ES256")]))
    at = data.draw(st.integers(0, len(good) - 1))
    new = data.draw(st.characters(codec="ascii").filter(lambda c: c != good[at]))
    with pytest.raises(Unauthenticated):
        local(AUTH, good[:at] + new + good[at + 1 :])


# --- links and minting ------------------------------------------------------------------------------------------------


def test_the_token_of_a_link_reaches_one_order_until_the_link_ends() -> None:
    auth = authenticator(jwt_audience="waybill", jwt_issuer="https://id.example")
    token = auth.guest_token(link_id="l1", order_id="o1", scope=Scope.PAY, expires_at=NOW + 9)
    actor = local(auth, token)
    assert (actor.sub, actor.role, actor.scope) == ("link:l1", Role.GUEST, Scope.PAY)
    assert (actor.orders, actor.jti, actor.exp, actor.iat) == (frozenset({"o1"}), "l1", NOW + 9, int(NOW))
    auth.revocations.add("jti", "l1", NOW)
    with pytest.raises(Unauthenticated) as refusal:
        local(auth, token)
    assert refusal.value.detail == NOT_ACCEPTED


def test_links_work_beside_the_keys_of_others() -> None:
    auth = Authenticator(Settings(jwt_public_key=pem(RSA_KEY)), Clock())
    token = auth.guest_token(link_id="l1", order_id="o1", scope=Scope.TRACK, expires_at=NOW + 9)
    assert local(auth, token).tracks_only


def test_the_key_of_links_signs_guests_only_and_links_have_no_other_key() -> None:
    auth = authenticator(jwt_public_key=pem(RSA_KEY))
    key = LinkKeys(settings()).token_key
    assert local(auth, signed(key, kid="waybill-link", role="guest")).role is Role.GUEST
    forged = [
        signed(key, kid="waybill-link", role="admin"),
        signed(key, role="guest"),
        signed(SECRET, kid="waybill-link", role="guest"),
        signed(RSA_KEY, "RS256", kid="waybill-link", role="guest"),
        signed("", "none", kid="waybill-link", role="guest"),
    ]
    for token in forged:
        with pytest.raises(Unauthenticated):
            local(auth, token)


def test_the_secret_of_a_link_can_be_made_again_by_this_secret_only() -> None:
    secret = authenticator().link_secret("l1")
    assert secret == authenticator().link_secret("l1")
    assert len(secret) == 43
    assert re.fullmatch(r"[A-Za-z0-9_-]+", secret)
    others = {authenticator().link_secret("l2"), authenticator(jwt_secret=SECRET + "x").link_secret("l1")}
    assert secret not in others
    assert len(others) == 2
    assert secret_digest(secret) == hashlib.sha256(secret.encode()).digest()


def test_a_minted_token_is_accepted() -> None:
    ours = settings(jwt_audience="waybill", jwt_issuer="https://id.example")
    auth = Authenticator(ours, Clock())
    actor = local(auth, mint(ours, sub="a1", role=Role.AGENT, orders=["o1"], ttl_s=60, now=NOW))
    assert (actor.sub, actor.role, actor.orders) == ("a1", Role.AGENT, frozenset({"o1"}))
    assert (actor.iat, actor.exp) == (int(NOW), int(NOW + 60))
    actor = local(auth, mint(ours, sub="g", role=Role.GUEST, orders=["o1"], scope=Scope.PAY, jti="t", now=NOW))
    assert (actor.scope, actor.jti) == (Scope.PAY, "t")


@pytest.mark.parametrize(
    ("ours", "given"),
    [
        (settings(), {"sub": ""}),
        (settings(), {"sub": "x" * 201}),
        (settings(), {"sub": "\x00"}),
        (settings(), {"sub": "u", "ttl_s": 0}),
        (Settings(jwt_public_key=pem(RSA_KEY)), {"sub": "u"}),
    ],
)
def test_a_token_that_would_be_refused_is_not_minted(ours: Settings, given: dict[str, Any]) -> None:
    with pytest.raises(CannotStart):
        mint(ours, role=Role.CUSTOMER, **given)


# --- revocations ------------------------------------------------------------------------------------------------------


def actor(sub: str = "u1", iat: float | None = None, jti: str | None = None) -> Actor:
    return Actor(sub=sub, role=Role.CUSTOMER, exp=NOW, iat=iat, jti=jti)


def test_a_revoked_jti_ends_that_token_only() -> None:
    revocations = Revocations()
    revocations.add("jti", "t1", NOW)
    assert revocations.revoked(actor(jti="t1", iat=NOW + 5))
    assert not revocations.revoked(actor(jti="t2"))
    assert not revocations.revoked(actor(sub="t1"))


@pytest.mark.parametrize(
    ("iat", "revoked"),
    [(None, True), (100.0, True), (200.0, True), (200.4, True), (200.5, False), (201.0, False)],
)
def test_a_revoked_sub_ends_the_tokens_issued_until_then(iat: float | None, revoked: bool) -> None:
    revocations = Revocations()
    revocations.add("sub", "u1", 200.4)
    revocations.add("sub", "u1", 50.0)
    assert revocations.revoked(actor(iat=iat)) is revoked
    assert not revocations.revoked(actor(sub="u2", iat=iat))


def test_loading_replaces_everything_or_nothing() -> None:
    revocations = Revocations()
    revocations.add("jti", "old", NOW)
    revocations.add("sub", "old", NOW)
    with pytest.raises(ValueError, match="other"):
        revocations.load([("jti", "new", NOW), ("other", "x", NOW)])
    assert revocations.revoked(actor(jti="old"))
    assert not revocations.revoked(actor(jti="new"))
    revocations.load(iter([("jti", "new", NOW), ("sub", "u1", 10.0), ("sub", "u1", 5.0)]))
    assert revocations.revoked(actor(sub="x", jti="new"))
    assert revocations.revoked(actor(iat=10.0))
    assert not revocations.revoked(actor(sub="old", jti="old"))


def test_a_revoked_token_is_refused_like_a_bad_one() -> None:
    auth = authenticator()
    auth.revocations.load([("sub", "u1", NOW)])
    with pytest.raises(Unauthenticated) as refusal:
        local(auth, signed(iat=int(NOW)))
    assert refusal.value.detail == NOT_ACCEPTED
    assert local(auth, signed(iat=int(NOW) + 1)).sub == "u1"
    with pytest.raises(Unauthenticated):
        local(auth, signed(iat=NOW * 1000))


# --- signatures that are remembered -----------------------------------------------------------------------------------


def test_a_token_that_was_accepted_is_judged_again_each_time() -> None:
    clock = Clock()
    auth = Authenticator(settings(), clock)
    token, other = signed(iat=NOW), signed(iat=NOW, jti="j1", sub="u2")
    for one in (token, other, token, other):
        assert local(auth, one).exp == NOW + 60
    auth.revocations.add("jti", "j1", NOW)
    with pytest.raises(Unauthenticated, match=NOT_ACCEPTED):
        local(auth, other)
    clock.now = NOW + 60
    with pytest.raises(Unauthenticated, match="expired"):
        local(auth, token)
    clock.now = NOW
    assert local(auth, token).sub == "u1"
    auth.revocations.add("sub", "u1", NOW)
    with pytest.raises(Unauthenticated, match=NOT_ACCEPTED):
        local(auth, token)


def test_a_signature_is_verified_once_and_a_refused_one_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    verified: list[str] = []
    verify = auth_module._signed

    def noted(token: str, *args: Any, **more: Any) -> Any:
        verified.append(token)
        return verify(token, *args, **more)

    monkeypatch.setattr(auth_module, "_signed", noted)
    auth = authenticator(token_cache_max=2)
    good, bad = [signed(sub=f"u{n}") for n in range(3)], jwt.encode(CLAIMS, SECRET[::-1], "HS256")
    for token in (good[0], good[0], good[1], good[0], good[1]):
        local(auth, token)
    assert verified == good[:2]
    for _ in range(2):
        with pytest.raises(Unauthenticated):
            local(auth, bad)
    assert verified == [*good[:2], bad, bad]
    local(auth, good[2])  # one too many: the oldest is forgotten
    verified.clear()
    for token in (good[1], good[2], good[0]):
        local(auth, token)
    assert verified == [good[0]]


# --- the Authorization header -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("Bearer a.b.c", "a.b.c"),
        ("bearer a.b.c", "a.b.c"),
        ("  BEARER   a.b.c ", "a.b.c"),
        ("Bearer", None),
        ("Bearer ", None),
        ("Basic dTpw", None),
        ("a.b.c", None),
        ("Bearera.b.c", None),
        ("", None),
        (None, None),
    ],
)
def test_bearer(header: str | None, token: str | None) -> None:
    assert bearer(header) == token


# --- the key server ---------------------------------------------------------------------------------------------------


class KeyServer:
    """A real HTTP server on loopback that answers with `keys`, or as `answer` says."""

    def __init__(self) -> None:
        self.keys: list[object] = []
        self.hits = 0
        self.asked = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()
        self.answer: Callable[[], web.StreamResponse] = lambda: web.json_response({"keys": self.keys})
        app = web.Application()
        app.router.add_get("/keys", self._handle)
        self.server = TestServer(app)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.hits += 1
        self.asked.set()
        await self.go.wait()
        return self.answer()

    @property
    def url(self) -> str:
        return str(self.server.make_url("/keys"))


@pytest.fixture
async def key_server() -> AsyncIterator[KeyServer]:
    server = KeyServer()
    await server.server.start_server()
    yield server
    server.go.set()
    await server.server.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


Started = Callable[..., Any]


@pytest.fixture
async def start(clock: Clock) -> AsyncIterator[Started]:
    running: list[Authenticator] = []

    async def start_one(url: str, **given: Any) -> Authenticator:
        auth = Authenticator(Settings(jwt_jwks_url=url, jwks_retry_s=5, jwks_refresh_s=300, **given), clock)
        await auth.start()
        running.append(auth)
        return auth

    yield start_one
    for auth in running:
        await auth.stop()


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    capture = structlog.testing.LogCapture()
    logger = structlog.wrap_logger(structlog.testing.ReturnLogger(), processors=[capture])
    monkeypatch.setattr(auth_module, "log", logger)
    return capture.entries


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def refused(auth: Authenticator, token: str) -> str:
    with pytest.raises(Unauthenticated) as refusal:
        await auth.actor(token)
    return refusal.value.detail


async def test_the_key_set_is_fetched_at_start_and_both_algorithms_count(key_server: KeyServer, start: Started) -> None:
    key_server.keys = [jwk(RSA_KEY, kid="r", use="sig", alg="RS256"), jwk(EC_KEY, kid="e")]
    auth = await start(key_server.url)
    await key_server.asked.wait()
    for token in (signed(RSA_KEY, "RS256", "r"), signed(EC_KEY, "ES256", "e")):
        assert (await auth.actor(token)).sub == "u1"
    assert (await auth.actor(signed(RSA_KEY, "RS256"))).sub == "u1", "without kid: the only key of its type"
    assert await refused(auth, signed(OTHER_RSA_KEY, "RS256", "r")) == NOT_ACCEPTED
    assert await refused(auth, signed(EC_KEY, "ES256", "r")) == NOT_ACCEPTED
    assert key_server.hits == 1


async def test_without_kid_two_keys_of_a_type_are_ambiguous(key_server: KeyServer, start: Started) -> None:
    key_server.keys = [jwk(EC_KEY, kid="1"), jwk(OTHER_EC_KEY, kid="2")]
    auth = await start(key_server.url)
    assert (await auth.actor(signed(OTHER_EC_KEY, "ES256", "2"))).sub == "u1"
    assert await refused(auth, signed(EC_KEY, "ES256")) == NOT_ACCEPTED


async def test_a_key_set_may_name_its_only_key_nothing(key_server: KeyServer, start: Started) -> None:
    key_server.keys = [jwk(EC_KEY)]
    auth = await start(key_server.url)
    assert (await auth.actor(signed(EC_KEY, "ES256"))).sub == "u1"
    assert await refused(auth, signed(EC_KEY, "ES256", "e")) == NOT_ACCEPTED


async def test_keys_for_other_uses_are_passed_over(key_server: KeyServer, start: Started) -> None:
    key_server.keys = [
        "rubbish",
        {},
        {"kty": "oct", "kid": "oct", "k": part(SECRET.encode())},
        {"kty": ["RSA"], "kid": "list"},
        {"kty": "RSA", "kid": "no-n"},
        {"kty": "EC", "kid": "off-curve", "crv": "P-256", "x": part(b"1" * 32), "y": part(b"2" * 32)},
        jwk(RSA_KEY, kid="enc", use="enc"),
        jwk(RSA_KEY, kid="oaep", alg="RSA-OAEP"),
        jwk(RSA_KEY, kid="512", alg="RS512"),
        jwk(RSA_KEY, kid=7),
        jwk(rsa.generate_private_key(65537, 1024), kid="short"),
        jwk(EC_KEY, kid="good"),
    ]
    auth = await start(key_server.url)
    assert (await auth.actor(signed(EC_KEY, "ES256", "good"))).sub == "u1"
    for kid in ("enc", "oaep", "512", "short"):
        assert await refused(auth, signed(RSA_KEY, "RS256", kid)) == NOT_ACCEPTED
    assert await refused(auth, signed(SECRET, "HS256", "oct")) == NOT_ACCEPTED


async def test_a_private_key_in_the_set_is_taken_as_its_public_half(key_server: KeyServer, start: Started) -> None:
    whole = dict(jwt.get_algorithm_by_name("ES256").to_jwk(EC_KEY, as_dict=True)) | {"kid": "e"}
    assert "d" in whole
    key_server.keys = [whole]
    auth = await start(key_server.url)
    assert (await auth.actor(signed(EC_KEY, "ES256", "e"))).sub == "u1"


async def test_rotation(key_server: KeyServer, start: Started, clock: Clock) -> None:
    key_server.keys = [jwk(RSA_KEY, kid="old")]
    auth = await start(key_server.url)
    old = signed(RSA_KEY, "RS256", "old", exp=NOW + 9000)
    new = signed(OTHER_RSA_KEY, "RS256", "new", exp=NOW + 9000)
    assert (await auth.actor(old)).sub == "u1"
    key_server.keys.append(jwk(OTHER_RSA_KEY, kid="new"))
    assert await refused(auth, new) == NOT_ACCEPTED, "the last fetch is too young"
    clock.now += 5
    assert (await auth.actor(new)).sub == "u1"
    assert (await auth.actor(old)).sub == "u1"
    assert key_server.hits == 2
    del key_server.keys[0]
    clock.now += 299
    assert (await auth.actor(old)).sub == "u1"
    clock.now += 1
    assert await refused(auth, old) == NOT_ACCEPTED, "removed, and the set was old enough to ask again"
    assert (await auth.actor(new)).sub == "u1"
    assert key_server.hits == 3


async def test_a_storm_of_unknown_kids_is_one_fetch(key_server: KeyServer, start: Started, clock: Clock) -> None:
    key_server.keys = [jwk(EC_KEY, kid="e")]
    auth = await start(key_server.url)
    assert (await auth.actor(signed(EC_KEY, "ES256", "e"))).sub == "u1"
    clock.now += 5
    key_server.keys.append(jwk(OTHER_EC_KEY, kid="new"))
    key_server.asked.clear()
    key_server.go.clear()
    storm = [asyncio.create_task(refused(auth, signed(EC_KEY, "ES256", f"k{n}"))) for n in range(50)]
    good = asyncio.create_task(auth.actor(signed(OTHER_EC_KEY, "ES256", "new")))
    await key_server.asked.wait()
    storm[0].cancel()
    assert (await auth.actor(signed(EC_KEY, "ES256", "e"))).sub == "u1", "known keys do not wait"
    key_server.go.set()
    assert (await good).sub == "u1"
    assert set(await asyncio.gather(*storm[1:])) == {NOT_ACCEPTED}
    for n in range(20):
        assert await refused(auth, signed(EC_KEY, "ES256", f"l{n}")) == NOT_ACCEPTED
    assert key_server.hits == 2


async def test_an_unreachable_key_server_refuses_for_now_only(start: Started, clock: Clock, log: list[Any]) -> None:
    auth = await start(f"http://user:pass-word@127.0.0.1:{closed_port()}/keys", jwt_secret=SECRET)
    token = signed(EC_KEY, "ES256", "e")
    for _ in range(2):
        with pytest.raises(Unavailable):
            await auth.actor(token)
        clock.now += 5
    assert [entry["event"] for entry in log] == ["jwks_not_fetched"] * 2
    assert "pass-word" not in repr(log)
    assert (await auth.actor(signed())).sub == "u1", "tokens of our own secret need no key server"
    assert await refused(auth, signed("", "none")) == NOT_ACCEPTED
    link = auth.guest_token(link_id="l", order_id="o", scope=Scope.TRACK, expires_at=NOW + 99)
    assert (await auth.actor(link)).role is Role.GUEST


async def test_a_public_key_counts_while_the_key_server_is_away(start: Started) -> None:
    auth = await start(f"http://127.0.0.1:{closed_port()}/keys", jwt_public_key=pem(EC_KEY))
    assert (await auth.actor(signed(EC_KEY, "ES256", "e"))).sub == "u1"
    with pytest.raises(Unavailable):
        await auth.actor(signed(OTHER_EC_KEY, "ES256", "e"))


async def test_a_slow_key_server_is_waited_for_only_so_long(key_server: KeyServer, start: Started) -> None:
    key_server.go.clear()
    auth = await start(key_server.url, jwks_timeout_ms=30)
    async with asyncio.timeout(5):
        with pytest.raises(Unavailable):
            await auth.actor(signed(EC_KEY, "ES256", "e"))


async def test_old_keys_serve_on_without_waiting_while_the_key_server_is_away(
    key_server: KeyServer, start: Started, clock: Clock, log: list[Any]
) -> None:
    key_server.keys = [jwk(EC_KEY, kid="e")]
    auth = await start(key_server.url)
    token = signed(EC_KEY, "ES256", "e", exp=NOW + 90_000)
    assert (await auth.actor(token)).sub == "u1"
    key_server.answer = lambda: web.Response(status=500)
    clock.now += 300
    assert (await auth.actor(token)).sub == "u1"
    assert [(entry["reason"], entry["keys_kept"]) for entry in log] == [("status 500", 1)]
    key_server.go.clear()
    key_server.asked.clear()
    clock.now += 5
    assert local(auth, token).sub == "u1", "one caller waited for a failure, the next ones do not"
    await key_server.asked.wait()
    assert local(auth, token).sub == "u1"
    assert key_server.hits == 3
    key_server.keys = [jwk(OTHER_EC_KEY, kid="f")]
    key_server.answer = lambda: web.json_response({"keys": key_server.keys})
    key_server.go.set()
    new = signed(OTHER_EC_KEY, "ES256", "f", exp=NOW + 90_000)
    assert (await auth.actor(new)).sub == "u1"
    assert await refused(auth, token) == NOT_ACCEPTED


BAD_ANSWERS: dict[str, Callable[[], web.StreamResponse]] = {
    "no JSON": lambda: web.Response(text="<html>"),
    "no set": lambda: web.json_response({"error": "x"}),
    "a list": lambda: web.json_response([]),
    "keys no list": lambda: web.json_response({"keys": {"a": 1}}),
    "too deep": lambda: web.Response(text='{"keys":' + "[" * 100_000),
    "too large": lambda: web.json_response({"keys": [], "pad": "x" * JWKS_MAX_BYTES}),
    "elsewhere": lambda: web.Response(status=302, headers={"Location": "/keys"}),
    "no content": lambda: web.Response(status=204),
    "encoded in no way we know": lambda: web.Response(body=b"x", headers={"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("answer", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
async def test_what_is_no_key_set_takes_no_keys_away(
    answer: Callable[[], web.StreamResponse], key_server: KeyServer, start: Started, clock: Clock, log: list[Any]
) -> None:
    key_server.answer = answer
    auth = await start(key_server.url)
    token = signed(EC_KEY, "ES256", "e", exp=NOW + 9000)
    with pytest.raises(Unavailable):
        await auth.actor(token)
    clock.now += 5
    key_server.keys = [jwk(EC_KEY, kid="e")]
    key_server.answer = lambda: web.json_response({"keys": key_server.keys})
    assert (await auth.actor(token)).sub == "u1"
    clock.now += 300
    key_server.answer = answer
    assert (await auth.actor(token)).sub == "u1"
    assert [entry["event"] for entry in log] == ["jwks_not_fetched"] * 2
    assert key_server.hits == 3


async def test_an_empty_key_set_is_a_key_set(
    key_server: KeyServer, start: Started, clock: Clock, log: list[Any]
) -> None:
    auth = await start(key_server.url)
    token = signed(EC_KEY, "ES256", "e")
    assert await refused(auth, token) == NOT_ACCEPTED
    assert [entry["event"] for entry in log] == ["jwks_without_usable_key"]
    key_server.keys = [jwk(EC_KEY, kid="e")]
    clock.now += 5
    assert (await auth.actor(token)).sub == "u1"


async def test_a_clock_that_was_set_back_does_not_stop_the_refresh(
    key_server: KeyServer, start: Started, clock: Clock
) -> None:
    key_server.keys = [jwk(EC_KEY, kid="e")]
    auth = await start(key_server.url)
    assert (await auth.actor(signed(EC_KEY, "ES256", "e"))).sub == "u1"
    clock.now -= 86_400
    key_server.keys = []
    assert await refused(auth, signed(EC_KEY, "ES256", "e")) == NOT_ACCEPTED


async def test_stopping_ends_a_running_fetch_and_answers_who_waits(key_server: KeyServer, start: Started) -> None:
    key_server.go.clear()
    auth = await start(key_server.url)
    waiting = asyncio.create_task(auth.actor(signed(EC_KEY, "ES256", "e")))
    await key_server.asked.wait()
    await auth.stop()
    with pytest.raises(Unavailable):
        await waiting


# --- nothing secret gets out ------------------------------------------------------------------------------------------


async def test_no_token_and_no_key_is_in_an_error_or_a_log_record(
    key_server: KeyServer, start: Started, clock: Clock, log: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret_part = part(b"password-in-a-key-set")
    key_server.answer = lambda: web.json_response({"keys": secret_part})
    auth = await start(key_server.url, jwt_secret=SECRET)
    told: list[str] = []
    bad = [token for token in BAD_TOKENS.values() if isinstance(token, str)]
    for token in [*bad, GOOD, signed(exp=1), signed(RSA_KEY, "RS256", "r")]:
        try:
            await auth.actor(token)
        except Refused as refusal:
            text = "".join(traceback.format_exception(refusal)) + repr(refusal.fields)
            assert not any(len(piece) > 8 and piece in text for piece in token.split("."))
            told.append(text)
        clock.now += 5
    told += [repr(log), caplog.text]
    assert len(told) > 30
    assert log
    for secret in (SECRET, secret_part, GOOD, SIGNATURE, LinkKeys(settings()).secret("l1")):
        assert not any(secret in text for text in told)
