"""Every setting and every limit, read once from the environment.

The name of a setting is its environment variable in lower case; a limit carries its unit in its name.
`python -m server settings` prints this page as a table, `docs/operations.md` holds the same table.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from models.cash import read_units
from models.money import MINOR_UNITS_MAX
from models.order import HOLD_MAX_S, PAYMENT_EXPIRY_S
from models.period import is_time_zone

DEFAULT_JWT_SECRET = "waybill-development-secret-never-use-in-production"
"""What signs tokens on a developer's machine when `JWT_SECRET` is not set. Production refuses it."""

SECRET_BYTES_MIN = 32
"""RFC 7518 section 3.2: an HS256 key is at least as long as its hash."""

SECRETS = frozenset(
    {"jwt_secret", "database_url", "redis_url", "metrics_token", "razorpay_key_secret", "razorpay_webhook_secret"}
    | {"stripe_secret_key", "stripe_webhook_secret"}
)
"""Settings whose value is never printed or logged."""

Bytes = Annotated[int, Meta(ge=256, le=64 * 1024 * 1024)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Milliseconds = Annotated[int, Meta(ge=1, le=3_600_000)]
Seconds = Annotated[int, Meta(ge=1, le=400 * 24 * 3600)]


class CannotStart(Exception):
    """The process cannot start. The message is for the person who started it: what is wrong, and what to do."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The typed page. Field order is the order of the printed table."""

    environment: Annotated[Literal["development", "production"], Meta(description="which checks apply at start")] = (
        "development"
    )
    host: Annotated[
        str, Meta(description="address to listen on; empty: 127.0.0.1 in development, 0.0.0.0 in production")
    ] = ""
    port: Annotated[
        Annotated[int, Meta(ge=0, le=65535)], Meta(description="port to listen on; 0: 8080 or the next free one")
    ] = 0
    public_url: Annotated[str, Meta(description="what links start with; empty: http://localhost:PORT")] = ""
    data_dir: Annotated[str, Meta(description="where the embedded Postgres and Redis keep their data")] = ".data"
    database_url: Annotated[str, Meta(description="postgresql://…; empty: the embedded Postgres")] = ""
    redis_url: Annotated[
        str,
        Meta(
            description="redis:// or rediss://…: one Redis (6.2+) or any node of a cluster; empty: the embedded Redis"
        ),
    ] = ""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="least severity that is logged, any case")
    ] = "info"
    metrics_token: Annotated[str, Meta(description="bearer token for /metrics; production answers 404 without it")] = ""

    jwt_secret: Annotated[
        str, Meta(description="HS256 key, 32 bytes or more; it also signs the guest tokens of links")
    ] = DEFAULT_JWT_SECRET
    jwt_public_key: Annotated[str, Meta(description="PEM of the RS256 or ES256 key that signs your tokens")] = ""
    jwt_jwks_url: Annotated[str, Meta(description="URL of the JSON Web Key Set that signs your tokens")] = ""
    jwt_audience: Annotated[str, Meta(description="required `aud` of every token; empty: not checked")] = ""
    jwt_issuer: Annotated[str, Meta(description="required `iss` of every token; empty: not checked")] = ""
    jwks_refresh_s: Annotated[Seconds, Meta(description="age at which the key set is fetched again")] = 300
    jwks_retry_s: Annotated[Seconds, Meta(description="least pause between two fetches of the key set")] = 5
    jwks_timeout_ms: Annotated[Milliseconds, Meta(description="time limit of one fetch of the key set")] = 2000
    token_max_bytes: Annotated[Bytes, Meta(description="longest token that is looked at")] = 8192
    token_cache_max: Annotated[Count, Meta(description="most tokens whose signature a process remembers as good")] = (
        20_000
    )
    revocation_poll_s: Annotated[Seconds, Meta(description="how often revocations are read again without news")] = 5
    revocation_hold_max_s: Annotated[
        Seconds,
        Meta(description="how long the bus is not believed after an outage because revocations cannot be read"),
    ] = 10
    link_ttl_s: Annotated[Seconds, Meta(description="life of a link when the request names none")] = 7 * 24 * 3600
    link_ttl_max_s: Annotated[Seconds, Meta(description="longest life that a request may ask for")] = 90 * 24 * 3600
    guest_token_ttl_s: Annotated[Seconds, Meta(description="life of the token that a link is exchanged for")] = 3600

    db_pool_size: Annotated[
        Count, Meta(description="connections to Postgres per process; one that works has one more, to hear of jobs")
    ] = 10
    db_timeout_ms: Annotated[
        Milliseconds, Meta(description="time limit of one statement, and of waiting for a connection")
    ] = 2000
    ready_db_grace_s: Annotated[
        Seconds, Meta(description="how long Postgres may be gone before /health/ready says 503")
    ] = 10
    redis_timeout_ms: Annotated[Milliseconds, Meta(description="time limit of one Redis command")] = 1000
    bus_ping_interval_ms: Annotated[
        Milliseconds, Meta(description="how often the bus connection is asked whether it lives")
    ] = 1000
    relay_grace_ms: Annotated[
        Milliseconds, Meta(description="age at which an unsent event is published by the relay")
    ] = 500
    relay_batch_max: Annotated[Count, Meta(description="most events that the relay takes at once")] = 500
    bus_fallback_poll_ms: Annotated[
        Milliseconds, Meta(description="how often watched orders are read while the bus is away")
    ] = 1000
    gap_check_interval_s: Annotated[Seconds, Meta(description="how often the tops of watched orders are compared")] = 5
    drain_timeout_s: Annotated[Seconds, Meta(description="time between SIGTERM and exit")] = 15
    drain_batch_max: Annotated[
        Count, Meta(description="sockets that leave a draining instance at once, ten times a second")
    ] = 50
    drain_spread_ms: Annotated[
        Milliseconds, Meta(description="longest time over which they leave; when they are many, more leave at once")
    ] = 5000
    idempotency_keep_s: Annotated[Seconds, Meta(description="life of an Idempotency-Key")] = 7 * 24 * 3600

    jobs_at_once_max: Annotated[
        Annotated[int, Meta(ge=2, le=1000)], Meta(description="background jobs that one process runs at once")
    ] = 20
    job_poll_ms: Annotated[
        Milliseconds,
        Meta(description="how often jobs are looked for without news of one; behind a pooler there is no news"),
    ] = 1000
    job_timeout_s: Annotated[Seconds, Meta(description="longest run of a job; beyond, it has failed")] = 120
    job_takeover_s: Annotated[Seconds, Meta(description="silence of a worker after which its jobs are another's")] = 15
    job_attempts_max: Annotated[
        Count, Meta(description="failures in a row after which a job is dead: held until staff decides")
    ] = 15
    job_retry_base_s: Annotated[
        Seconds, Meta(description="pause after a job's first failure; it doubles with each further one")
    ] = 2
    job_retry_max_s: Annotated[Seconds, Meta(description="longest pause after a job's failure")] = 600
    job_log_keep_s: Annotated[Seconds, Meta(description="how long the job library's log is kept")] = 24 * 3600
    razorpay_key_id: Annotated[
        str, Meta(description="rzp_test_… or rzp_live_…; with none of Razorpay's keys, development runs its simulator")
    ] = ""
    razorpay_key_secret: Annotated[str, Meta(description="what belongs to it")] = ""
    razorpay_webhook_secret: Annotated[
        str,
        Meta(
            description="what Razorpay signs webhooks with; while it is changed several, comma-separated, newest first"
        ),
    ] = ""
    razorpay_api_url: Annotated[str, Meta(description="empty: https://api.razorpay.com")] = ""
    stripe_secret_key: Annotated[
        str, Meta(description="sk_test_… or sk_live_…; with none of Stripe's keys, development runs its simulator")
    ] = ""
    stripe_publishable_key: Annotated[str, Meta(description="pk_…, what browsers get to know")] = ""
    stripe_webhook_secret: Annotated[
        str,
        Meta(description="what Stripe signs webhooks with; several while it is rolled, comma-separated, newest first"),
    ] = ""
    stripe_api_url: Annotated[str, Meta(description="empty: https://api.stripe.com")] = ""
    stripe_signature_max_age_s: Annotated[
        Seconds, Meta(description="a webhook of Stripe that was signed longer ago is refused")
    ] = 300
    gateway_timeout_ms: Annotated[
        Milliseconds, Meta(description="time limit of one question to a payment gateway, all its requests together")
    ] = 10_000
    gateway_threads_max: Annotated[Count, Meta(description="most questions to Razorpay at once, per process")] = 8
    breaker_failures_max: Annotated[
        Count, Meta(description="unanswered questions in a row after which a gateway is not offered any more")
    ] = 5
    breaker_open_s: Annotated[
        Seconds, Meta(description="how long it is left alone; then one question goes through")
    ] = 5
    webhook_max_bytes: Annotated[Bytes, Meta(description="largest webhook of a gateway")] = 256 * 1024
    inbox_poll_ms: Annotated[
        Milliseconds, Meta(description="how often a worker looks for webhooks that another process stored")
    ] = 200
    inbox_concurrency_max: Annotated[Count, Meta(description="most webhooks that a worker applies at once")] = 4
    webhook_retry_base_s: Annotated[
        Seconds, Meta(description="pause before a failed webhook is tried again; it doubles with each try")
    ] = 1
    webhook_retry_max_s: Annotated[Seconds, Meta(description="longest such pause")] = 600
    webhook_attempts_max: Annotated[Count, Meta(description="failed tries after which a webhook is dead")] = 12
    webhook_park_s: Annotated[
        Seconds, Meta(description="time after which a webhook about something that we never got to know is dead")
    ] = 72 * 3600

    cors_origins: Annotated[
        str, Meta(description="origins whose pages may call this server, comma-separated, or *; empty: its own only")
    ] = ""
    trusted_proxies: Annotated[
        str, Meta(description="addresses or CIDRs whose X-Forwarded-For, -Proto and -Host count; empty: nobody's")
    ] = ""

    connections_max: Annotated[Count, Meta(description="most open connections of one process")] = 20_000
    headers_timeout_ms: Annotated[
        Milliseconds, Meta(description="time from the first byte of a request, or from connecting, to its last header")
    ] = 10_000
    body_timeout_ms: Annotated[
        Milliseconds, Meta(description="time from the headers of a request to its last byte")
    ] = 15_000
    keep_alive_timeout_s: Annotated[Seconds, Meta(description="idle time after which a connection is closed")] = 75
    request_timeout_ms: Annotated[
        Milliseconds, Meta(description="time from the headers of a request to its answer; `wait` comes on top")
    ] = 20_000
    write_timeout_ms: Annotated[
        Milliseconds, Meta(description="how long a client may take nothing of what it is sent")
    ] = 20_000
    connect_timeout_ms: Annotated[
        Milliseconds, Meta(description="time from opening a socket to an accepted CONNECT")
    ] = 10_000
    body_max_bytes: Annotated[Bytes, Meta(description="largest request body")] = 256 * 1024
    frame_max_bytes: Annotated[Bytes, Meta(description="largest message on a socket")] = 16 * 1024
    subscribe_timeout_ms: Annotated[Milliseconds, Meta(description="a subscribe is answered within this")] = 4000
    subscribe_batch_max: Annotated[
        Count, Meta(description="most subscribes, or first positions of agents, that one statement looks up")
    ] = 200
    subscriptions_per_socket_max: Annotated[Count, Meta(description="most orders that one socket may watch")] = 1000
    calls_in_flight_per_socket_max: Annotated[
        Count, Meta(description="most unanswered events of one socket; further ones wait")
    ] = 16
    slow_bytes: Annotated[
        Bytes,
        Meta(description="unread bytes from which on a socket is slow: it is read no further"),
    ] = 64 * 1024
    queue_max_bytes: Annotated[Bytes, Meta(description="unread bytes at which a slow socket is cut")] = 1024 * 1024
    slow_max_s: Annotated[Seconds, Meta(description="time after which a slow socket is cut")] = 15
    recovery_keep_s: Annotated[
        Seconds, Meta(description="how long a client with `recovery: true` may be away and still be recovered")
    ] = 300
    recovery_offset_max_bytes: Annotated[Bytes, Meta(description="longest offset of such a client")] = 6144
    long_poll_max_s: Annotated[Seconds, Meta(description="longest `wait` of a read")] = 30
    room_events_max: Annotated[Count, Meta(description="newest events that a watched order keeps in memory")] = 64
    ping_interval_s: Annotated[Seconds, Meta(description="how often a socket is asked whether it lives")] = 25
    ping_timeout_s: Annotated[Seconds, Meta(description="silence after which a socket is closed")] = 20
    token_expiry_notice_s: Annotated[Seconds, Meta(description="`tokenExpiring` is sent this long before `exp`")] = 60
    token_expiry_grace_s: Annotated[
        Seconds, Meta(description="a socket hears on for this long after `exp`, but may only refresh; then it is ended")
    ] = 5

    payment_expiry_s: Annotated[
        Seconds, Meta(description="an online order that nobody tries to pay is cancelled this long after placing")
    ] = PAYMENT_EXPIRY_S
    payment_window_s: Annotated[
        Seconds, Meta(description="starting a payment holds its order for at least so long")
    ] = 600
    hold_max_s: Annotated[
        Seconds, Meta(description="while money is moving an order is held until this long after placing")
    ] = HOLD_MAX_S
    revive_window_s: Annotated[
        Seconds, Meta(description="late money revives an order that expired no longer ago; else it goes back")
    ] = 24 * 3600
    mismatch_hold_s: Annotated[
        Seconds, Meta(description="money of another amount or currency goes back after this, unless staff is faster")
    ] = 3600
    reconcile_after_s: Annotated[
        Seconds, Meta(description="a payment that is moving for so long is asked about at its gateway")
    ] = 15
    reconcile_retry_max_s: Annotated[
        Seconds, Meta(description="longest pause between two questions about the same payment")
    ] = 3600
    sweep_interval_s: Annotated[Seconds, Meta(description="how often expired orders are looked for")] = 5
    seller_time_zone: Annotated[str, Meta(description="IANA name of the zone in which days begin and end")] = "UTC"
    staff_refund_max_minor: Annotated[
        Annotated[int, Meta(ge=0, le=MINOR_UNITS_MAX)],
        Meta(description="largest refund that staff may make alone, minor units; above, admin or service"),
    ] = 100_000
    refund_ask_after_s: Annotated[
        Seconds,
        Meta(
            description="a refund that is not settled so long after it was asked for is asked about at its gateway; the"
            " pause doubles with each time"
        ),
    ] = 30
    report_days_max: Annotated[Count, Meta(description="longest range of days of one report of statistics")] = 1100
    cash_partial: Annotated[Literal["on", "off"], Meta(description="on: cash may also pay a part of what is due")] = (
        "off"
    )
    cash_rounding_minor: Annotated[
        str, Meta(description="smallest coin by currency, minor units, as INR=100,CHF=5: cash due is rounded to it")
    ] = "INR=100"

    location_min_interval_ms: Annotated[
        Annotated[int, Meta(ge=0, le=3_600_000)],
        Meta(description="least pause between two shown positions of an order; 0: no thinning"),
    ] = 0
    location_max_age_ms: Annotated[Milliseconds, Meta(description="a position that is older is refused as `stale`")] = (
        600_000
    )
    location_future_max_ms: Annotated[
        Milliseconds, Meta(description="a position further ahead of our clock is refused as `future`")
    ] = 30_000
    location_accuracy_max_m: Annotated[
        Annotated[int, Meta(ge=1, le=1_000_000)], Meta(description="a position further off is refused as `inaccurate`")
    ] = 500
    location_speed_max_mps: Annotated[
        Annotated[int, Meta(ge=1, le=10_000)],
        Meta(description="a position that would need a higher speed, in metres per second, is refused as `jump`"),
    ] = 70
    location_jump_slack_m: Annotated[
        Annotated[int, Meta(ge=0, le=100_000)], Meta(description="distance that is no jump at any speed: GPS wanders")
    ] = 100
    location_jump_confirm_ms: Annotated[
        Milliseconds, Meta(description="refused jumps that agree with each other for this long are believed")
    ] = 10_000
    location_trail_interval_ms: Annotated[
        Milliseconds, Meta(description="the trail keeps one position of each such interval")
    ] = 5000
    location_trail_flush_ms: Annotated[
        Milliseconds, Meta(description="how often the trail is written, in one batch")
    ] = 1000
    location_trail_buffer_max: Annotated[
        Count, Meta(description="most positions that wait to be written; beyond, the oldest are dropped")
    ] = 20_000
    location_trail_keep_s: Annotated[Seconds, Meta(description="how long the trail is kept")] = 30 * 24 * 3600
    location_next_interval_ms: Annotated[
        Milliseconds, Meta(description="pause that agents are asked to keep between positions")
    ] = 5000
    location_next_interval_near_ms: Annotated[
        Milliseconds, Meta(description="the same while somebody watches and the destination is near")
    ] = 2000
    location_next_interval_unwatched_ms: Annotated[
        Milliseconds, Meta(description="the same while nobody watches; whoever comes waits for so long at most")
    ] = 15_000
    location_near_m: Annotated[
        Annotated[int, Meta(ge=1, le=1_000_000)], Meta(description="distance from which on a destination is near")
    ] = 500
    location_keep_s: Annotated[Seconds, Meta(description="how long the last known position is kept")] = 24 * 3600
    location_batch_max: Annotated[Count, Meta(description="most positions of one request")] = 100
    presence_flush_ms: Annotated[
        Milliseconds, Meta(description="how often changed counts of watchers are written, in one batch")
    ] = 1000
    presence_alive_s: Annotated[
        Seconds, Meta(description="how long the counts of an instance that says nothing more are believed")
    ] = 15
    assignment_cache_max: Annotated[Count, Meta(description="most (agent, order) answers that a process remembers")] = (
        50_000
    )
    assignment_refusal_s: Annotated[Seconds, Meta(description="how long a refused (agent, order) is remembered")] = 5
    rate_limits: Annotated[
        Literal["on", "off"], Meta(description="off lifts every rate and every count; byte bounds stay")
    ] = "on"
    rate_user_requests_per_min: Annotated[
        Count, Meta(description="requests of one customer, agent or guest, on all instances together")
    ] = 1200
    rate_user_events_per_min: Annotated[
        Count, Meta(description="socket events of one customer, agent or guest; positions are not counted")
    ] = 1200
    rate_user_burst_max: Annotated[Count, Meta(description="how many of each may come at once")] = 400
    rate_service_requests_per_min: Annotated[Count, Meta(description="requests of one service, staff or admin")] = (
        60_000
    )
    rate_service_events_per_min: Annotated[Count, Meta(description="socket events of one service, staff or admin")] = (
        60_000
    )
    rate_service_burst_max: Annotated[Count, Meta(description="how many of each may come at once")] = 10_000
    rate_address_requests_per_min: Annotated[
        Count, Meta(description="requests and CONNECTs of one address without an accepted token; IPv6: of one /64")
    ] = 1200
    rate_address_burst_max: Annotated[Count, Meta(description="how many of them may come at once")] = 400
    rate_address_handshakes_per_min: Annotated[
        Count, Meta(description="sockets that one address may open; whole offices and mobile networks share one")
    ] = 6000
    rate_address_handshakes_burst_max: Annotated[Count, Meta(description="how many of them may come at once")] = 3000
    handshakes_per_s_max: Annotated[
        Count, Meta(description="sockets that a process opens, whoever asks; a core manages about as many")
    ] = 1000
    handshakes_burst_max: Annotated[Count, Meta(description="how many of them may come at once")] = 5000
    handshakes_open_max: Annotated[
        Count, Meta(description="most open sockets of a process that have not sent CONNECT yet")
    ] = 5000
    socket_events_per_s_max: Annotated[
        Count, Meta(description="messages of any kind, pings too, read from one socket; further ones wait, unread")
    ] = 1000
    socket_events_burst_max: Annotated[Count, Meta(description="how many of them may come at once")] = 2000
    rate_limit_wait_ms: Annotated[
        Milliseconds, Meta(description="longest wait for Redis to count; then the request is let through")
    ] = 100

    def __repr__(self) -> str:
        return f"Settings(environment={self.environment!r})"  # the rest holds secrets

    @property
    def production(self) -> bool:
        return self.environment == "production"

    @property
    def bind_host(self) -> str:
        return self.host or ("0.0.0.0" if self.production else "127.0.0.1")

    @property
    def asymmetric(self) -> bool:
        """Whether tokens are signed by somebody else's private key."""
        return bool(self.jwt_public_key or self.jwt_jwks_url)


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def networks(text: str) -> tuple[Network, ...]:
    """The networks of `TRUSTED_PROXIES`.

    Raises:
        CannotStart: one of them is none.
    """
    found: list[Network] = []
    for part in filter(None, map(str.strip, text.split(","))):
        try:
            found.append(ipaddress.ip_network(part))
        except ValueError as error:
            raise CannotStart(
                f"TRUSTED_PROXIES holds {part!r} ({error}): write addresses such as 10.0.0.7 or networks such as "
                "10.0.0.0/8, with commas between."
            ) from None
    return tuple(found)


def origins(text: str) -> frozenset[str]:
    """The origins of `CORS_ORIGINS`.

    Raises:
        CannotStart: one of them is none.
    """
    found = frozenset(filter(None, map(str.strip, text.split(","))))
    for one in found - {"*"}:
        parts = urlsplit(one)
        if not parts.scheme or not parts.hostname or f"{parts.scheme}://{parts.netloc}".lower() != one.lower():
            raise CannotStart(
                f"CORS_ORIGINS holds {one!r}: write origins such as https://shop.example, without a path, with commas "
                "between; or * for all."
            )
    return frozenset(one.lower() for one in found)


def secrets_of(text: str) -> tuple[str, ...]:
    """The secrets of a `*_WEBHOOK_SECRET`, in its order: newest first."""
    return tuple(filter(None, map(str.strip, text.split(","))))


def load(environ: Mapping[str, str], dotenv: Path | None = None) -> Settings:
    """Read the settings from `environ`, and in development from a `.env` file for names that `environ` lacks.

    Raises:
        CannotStart: a value is wrong, a name is nearly but not quite one of ours, or two values contradict each other.
    """
    values = dict(environ)
    if dotenv is not None and values.get("ENVIRONMENT", "development") == "development" and dotenv.is_file():
        for name, value in _read_dotenv(dotenv).items():
            values.setdefault(name, value)
    _refuse_misspelt_names(values)
    given: dict[str, object] = {}
    for field, type_ in get_type_hints(Settings, include_extras=True).items():
        raw = values.get(field.upper(), "").strip()
        if raw:
            given[field] = _convert(
                field, type_, raw.lower() if field in ("log_level", "rate_limits", "cash_partial") else raw
            )
    for field, check in (("trusted_proxies", networks), ("cors_origins", origins)):
        check(str(given.get(field, "")))
    settings = Settings(**given)  # type: ignore[arg-type]  # each value was converted to its field's type above
    _check_relations(settings)
    if settings.production:
        _check_production(settings)
    return settings


def table() -> list[tuple[str, str, str]]:
    """(variable, default, meaning) of every setting, in the order of the page."""
    rows = []
    for field in msgspec.structs.fields(Settings):
        hint = get_type_hints(Settings, include_extras=True)[field.name]
        meaning = next(m.description for m in hint.__metadata__ if isinstance(m, Meta) and m.description)
        default = "(development only)" if field.name == "jwt_secret" else str(field.default)
        rows.append((field.name.upper(), default, meaning))
    return rows


def _read_dotenv(path: Path) -> dict[str, str]:
    found = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, sep, value = line.removeprefix("export ").partition("=")
        if not sep:
            raise CannotStart(f"{path} line {number}: write NAME=value, not {line!r}.")
        found[name.strip()] = value.strip().strip("\"'")
    return found


def _refuse_misspelt_names(values: Mapping[str, str]) -> None:
    known = [field.upper() for field in Settings.__struct_fields__]
    for name in values:
        if name in known or "_" not in name:
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.93)
        if near:
            raise CannotStart(f"{name} is not a setting; did you mean {near[0]}?")


def _convert(field: str, type_: Any, raw: str) -> object:
    try:
        return msgspec.convert(raw, type_, strict=False)
    except msgspec.ValidationError as error:
        raise CannotStart(f"{field.upper()}={_shown(field, raw)} is wrong: write {_wanted(type_)}.") from error


def _shown(field: str, raw: str) -> str:
    return "(hidden)" if field in SECRETS else repr(raw)


def _wanted(type_: Any) -> str:
    bounds = [m for m in getattr(type_, "__metadata__", ()) if isinstance(m, Meta)]
    inner = type_.__origin__ if hasattr(type_, "__metadata__") else type_
    if get_origin(inner) is Literal:
        *first, last = get_args(inner)
        return f"{', '.join(first)} or {last}"
    low = next((m.ge for m in bounds if m.ge is not None), None)
    high = next((m.le for m in bounds if m.le is not None), None)
    return f"a whole number from {low} to {high}" if low is not None else "a text"


def _check_relations(s: Settings) -> None:
    """Limits lean on each other; a pair that contradicts itself is refused at start, not found out in production."""
    relations = [
        (
            s.db_timeout_ms < s.subscribe_timeout_ms,
            "DB_TIMEOUT_MS must be less than SUBSCRIBE_TIMEOUT_MS: a subscribe reads twice",
        ),
        (s.redis_timeout_ms < s.subscribe_timeout_ms, "REDIS_TIMEOUT_MS must be less than SUBSCRIBE_TIMEOUT_MS"),
        (
            s.redis_timeout_ms + s.db_timeout_ms < s.subscribe_timeout_ms,
            "REDIS_TIMEOUT_MS + DB_TIMEOUT_MS must be less than SUBSCRIBE_TIMEOUT_MS",
        ),
        (s.relay_grace_ms < s.gap_check_interval_s * 1000, "RELAY_GRACE_MS must be less than GAP_CHECK_INTERVAL_S"),
        (
            s.db_timeout_ms < s.drain_timeout_s * 1000,
            "DB_TIMEOUT_MS must be less than DRAIN_TIMEOUT_S, or a drain cuts running requests",
        ),
        (
            s.drain_spread_ms + s.db_timeout_ms < s.drain_timeout_s * 1000,
            "DRAIN_SPREAD_MS + DB_TIMEOUT_MS must be less than DRAIN_TIMEOUT_S, or a drain ends before the last client",
        ),
        (
            s.redis_timeout_ms + 2 * s.db_timeout_ms < s.request_timeout_ms,
            "REDIS_TIMEOUT_MS + twice DB_TIMEOUT_MS must be less than REQUEST_TIMEOUT_MS: requests read, then write",
        ),
        (
            s.body_timeout_ms < s.request_timeout_ms,
            "BODY_TIMEOUT_MS must be less than REQUEST_TIMEOUT_MS, or a slow body leaves no time for its answer",
        ),
        (
            s.rate_limit_wait_ms < s.subscribe_timeout_ms,
            "RATE_LIMIT_WAIT_MS must be less than SUBSCRIBE_TIMEOUT_MS",
        ),
        (
            s.location_next_interval_near_ms <= s.location_next_interval_ms <= s.location_next_interval_unwatched_ms,
            "LOCATION_NEXT_INTERVAL_MS must be between LOCATION_NEXT_INTERVAL_NEAR_MS and "
            "LOCATION_NEXT_INTERVAL_UNWATCHED_MS",
        ),
        (
            3 * s.presence_flush_ms <= s.presence_alive_s * 1000,
            "PRESENCE_ALIVE_S must be three times PRESENCE_FLUSH_MS or more, or the counts of a living instance vanish",
        ),
        (s.payment_window_s <= s.hold_max_s, "PAYMENT_WINDOW_S must not be more than HOLD_MAX_S"),
        (
            s.gateway_timeout_ms + 2 * s.db_timeout_ms < s.request_timeout_ms,
            "GATEWAY_TIMEOUT_MS + twice DB_TIMEOUT_MS must be less than REQUEST_TIMEOUT_MS: a payment is written, "
            "asked for, and written again",
        ),
        (
            len({bool(v) for v in (s.razorpay_key_id, s.razorpay_key_secret, s.razorpay_webhook_secret)}) == 1,
            "RAZORPAY_KEY_ID, RAZORPAY_KEY_SECRET and RAZORPAY_WEBHOOK_SECRET belong together: set all of them or none",
        ),
        (
            not s.razorpay_webhook_secret or bool(secrets_of(s.razorpay_webhook_secret)),
            "RAZORPAY_WEBHOOK_SECRET must hold a secret: without one nobody can tell who sends webhooks",
        ),
        (
            not s.razorpay_api_url or urlsplit(s.razorpay_api_url).scheme in ("http", "https"),
            "RAZORPAY_API_URL must start with http:// or https://",
        ),
        (
            len({bool(v) for v in (s.stripe_secret_key, s.stripe_publishable_key, s.stripe_webhook_secret)}) == 1,
            "STRIPE_SECRET_KEY, STRIPE_PUBLISHABLE_KEY and STRIPE_WEBHOOK_SECRET belong together: set all of "
            "them or none",
        ),
        (
            not s.stripe_webhook_secret or bool(secrets_of(s.stripe_webhook_secret)),
            "STRIPE_WEBHOOK_SECRET must hold a secret: without one nobody can tell who sends webhooks",
        ),
        (
            not s.stripe_api_url or urlsplit(s.stripe_api_url).scheme in ("http", "https"),
            "STRIPE_API_URL must start with http:// or https://",
        ),
        (s.slow_bytes < s.queue_max_bytes, "SLOW_BYTES must be less than QUEUE_MAX_BYTES"),
        (
            s.token_max_bytes + s.recovery_offset_max_bytes < s.frame_max_bytes,
            "TOKEN_MAX_BYTES and RECOVERY_OFFSET_MAX_BYTES together must be less than FRAME_MAX_BYTES",
        ),
        (s.frame_max_bytes <= s.body_max_bytes, "FRAME_MAX_BYTES must not be more than BODY_MAX_BYTES"),
        (
            s.idempotency_keep_s >= 7 * 24 * 3600,
            "IDEMPOTENCY_KEEP_S must be 604800 (7 days) or more: clients retry for days",
        ),
        (s.job_retry_base_s <= s.job_retry_max_s, "JOB_RETRY_BASE_S must not be more than JOB_RETRY_MAX_S"),
        (
            4 * s.db_timeout_ms <= s.job_takeover_s * 1000,
            "JOB_TAKEOVER_S must be four times DB_TIMEOUT_MS or more, or a living worker's jobs are taken over",
        ),
        (
            s.webhook_retry_base_s <= s.webhook_retry_max_s,
            "WEBHOOK_RETRY_BASE_S must not be more than WEBHOOK_RETRY_MAX_S",
        ),
        (
            is_time_zone(s.seller_time_zone),
            "SELLER_TIME_ZONE must be the IANA name of a time zone, such as Asia/Kolkata",
        ),
        (
            _are_coins(s.cash_rounding_minor),
            "CASH_ROUNDING_MINOR must name currencies and their smallest coins in minor units, such as INR=100,CHF=5",
        ),
        (s.link_ttl_s <= s.link_ttl_max_s, "LINK_TTL_S must not be more than LINK_TTL_MAX_S"),
        (
            urlsplit(s.database_url).scheme in ("", "postgres", "postgresql"),
            "DATABASE_URL must start with postgres:// or postgresql://",
        ),
        (
            urlsplit(s.redis_url).scheme in ("", "redis", "rediss", "unix"),
            "REDIS_URL must start with redis:// or rediss://",
        ),
        (
            not s.public_url or urlsplit(s.public_url).scheme in ("http", "https"),
            "PUBLIC_URL must start with http:// or https://",
        ),
    ]
    for holds, sentence in relations:
        if not holds:
            raise CannotStart(sentence + ".")


def _are_coins(text: str) -> bool:
    try:
        read_units(text)
    except ValueError:
        return False
    return True


def _check_production(s: Settings) -> None:
    missing = [
        (s.jwt_secret == DEFAULT_JWT_SECRET, "set JWT_SECRET (make one with: openssl rand -hex 32)"),
        (len(s.jwt_secret.encode()) < SECRET_BYTES_MIN, f"make JWT_SECRET {SECRET_BYTES_MIN} bytes or longer"),
        (not s.database_url, "set DATABASE_URL: the embedded Postgres is for development"),
        (not s.redis_url, "set REDIS_URL: the embedded Redis is for development"),
        (s.rate_limits == "off", "unset RATE_LIMITS: off is for measuring"),
        (
            any(urlsplit(url).scheme == "http" for url in (s.razorpay_api_url, s.stripe_api_url)),
            "let RAZORPAY_API_URL and STRIPE_API_URL start with https://: the keys are sent there",
        ),
    ]
    wrong = [sentence for holds, sentence in missing if holds]
    if wrong:
        raise CannotStart("ENVIRONMENT=production refuses to start: " + "; ".join(wrong) + ".")


def from_process() -> Settings:
    """The settings of this process."""
    return load(os.environ, Path(".env"))
