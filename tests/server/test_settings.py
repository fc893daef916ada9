"""The settings page: wrong values are found at start, by a sentence that says what to write."""

from __future__ import annotations

from pathlib import Path
from typing import get_type_hints

import msgspec
import pytest

from server import settings as page
from server.settings import DEFAULT_JWT_SECRET, SECRETS, CannotStart, Settings, load, table

PRODUCTION = {
    "ENVIRONMENT": "production",
    "JWT_SECRET": "s" * 32,
    "DATABASE_URL": "postgresql://db/waybill",
    "REDIS_URL": "rediss://cache/0",
}
RAZORPAY = {
    "RAZORPAY_KEY_ID": "rzp_test_1",
    "RAZORPAY_KEY_SECRET": "hidden-value",
    "RAZORPAY_WEBHOOK_SECRET": "newer,older",
}
UNITS = ("_minor", "_bytes", "_s", "_ms", "_max", "_size", "_m", "_mps", "_per_min")


def sentence(environ: dict[str, str], dotenv: Path | None = None) -> str:
    with pytest.raises(CannotStart) as refusal:
        load(environ, dotenv)
    return str(refusal.value)


def test_without_any_variable_everything_has_its_default() -> None:
    assert load({}) == Settings()
    assert load({"PORT": "", "JWT_SECRET": "  ", "HOME": "/root", "PATH": "/bin"}) == Settings()


def test_values_are_read_with_their_types() -> None:
    given = load({"PORT": " 9000 ", "LOG_LEVEL": "WARNING", "RATE_LIMITS": "Off", "LOCATION_MIN_INTERVAL_MS": "0"})
    assert (given.port, given.location_min_interval_ms) == (9000, 0)
    assert (given.log_level, given.rate_limits) == ("warning", "off")


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("PORT", "http", "a whole number from 0 to 65535"),
        ("PORT", "70000", "a whole number from 0 to 65535"),
        ("PORT", "-1", "a whole number from 0 to 65535"),
        ("DB_TIMEOUT_MS", "1.5", "a whole number from 1 to"),
        ("DB_TIMEOUT_MS", "2s", "a whole number from 1 to"),
        ("DB_POOL_SIZE", "0", "a whole number from 1 to"),
        ("BODY_MAX_BYTES", "1", "a whole number from 256 to"),
        ("ENVIRONMENT", "prod", "development or production"),
        ("LOG_LEVEL", "verbose", "debug, info, warning or error"),
        ("RATE_LIMITS", "false", "on or off"),
    ],
)
def test_a_wrong_value_is_answered_with_what_to_write(name: str, value: str, wanted: str) -> None:
    told = sentence({name: value})
    assert told.startswith(f"{name}={value!r} is wrong: write ")
    assert wanted in told


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("DATABSE_URL", "DATABASE_URL"),
        ("JWT_PUBLIC_KEYS", "JWT_PUBLIC_KEY"),
        ("JWT_AUDIENCES", "JWT_AUDIENCE"),
        ("LOCATION_MIN_INTERVALL_MS", "LOCATION_MIN_INTERVAL_MS"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_right_one(wrong: str, right: str) -> None:
    assert sentence({wrong: "hidden-value"}) == f"{wrong} is not a setting; did you mean {right}?"


def test_names_of_other_programs_are_left_alone() -> None:
    load({"PGHOST": "db", "POSTGRES_URL": "x", "REDIS_HOST": "x", "AWS_REGION": "x", "HTTP_PROXY": "x"})


def test_dotenv_fills_what_the_environment_lacks(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text("# ours\n\nexport PORT=9001\nLOG_LEVEL='debug'\nJWT_AUDIENCE = \"waybill\"\nJWT_ISSUER=a=b\n")
    given = load({"PORT": "9002"}, dotenv)
    assert (given.port, given.log_level, given.jwt_audience, given.jwt_issuer) == (9002, "debug", "waybill", "a=b")


def test_dotenv_is_for_development_only(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text("PORT=9001\n")
    assert load(PRODUCTION, dotenv).port == 0
    assert load({}, tmp_path / "absent") == Settings()


def test_a_line_of_dotenv_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text("PORT=9001\nhello\n")
    assert "line 2: write NAME=value" in sentence({}, dotenv)


def test_production_starts_when_all_is_set() -> None:
    given = load(PRODUCTION)
    assert given.production
    assert given.bind_host == "0.0.0.0"
    assert not Settings().production
    assert Settings().bind_host == "127.0.0.1"
    assert Settings(host="::1").bind_host == "::1"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"JWT_SECRET": ""}, "set JWT_SECRET"),
        ({"JWT_SECRET": DEFAULT_JWT_SECRET}, "set JWT_SECRET"),
        ({"JWT_SECRET": "s" * 31}, "32 bytes or longer"),
        ({"DATABASE_URL": ""}, "set DATABASE_URL"),
        ({"REDIS_URL": ""}, "set REDIS_URL"),
        ({"RATE_LIMITS": "off"}, "unset RATE_LIMITS"),
        ({"RAZORPAY_API_URL": "http://127.0.0.1:9000"}, "start with https://"),
        ({"STRIPE_API_URL": "http://127.0.0.1:9000"}, "start with https://"),
    ],
)
def test_production_refuses_what_is_for_development(change: dict[str, str], told: str) -> None:
    assert told in sentence(PRODUCTION | change)


def test_a_list_of_webhook_secrets_keeps_its_order() -> None:
    assert load(RAZORPAY).razorpay_webhook_secret == "newer,older"
    assert page.secrets_of(" newer, ,older ,") == ("newer", "older")
    assert {"razorpay_key_secret", "razorpay_webhook_secret"} <= SECRETS


def test_production_says_everything_that_is_missing_at_once() -> None:
    told = sentence({"ENVIRONMENT": "production"})
    assert all(name in told for name in ("JWT_SECRET", "DATABASE_URL", "REDIS_URL"))


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"GATEWAY_TIMEOUT_MS": "16000"}, "GATEWAY_TIMEOUT_MS + twice DB_TIMEOUT_MS"),
        ({"RAZORPAY_KEY_ID": "rzp_test_1"}, "set all of them or none"),
        (RAZORPAY | {"RAZORPAY_KEY_SECRET": ""}, "set all of them or none"),
        (RAZORPAY | {"RAZORPAY_WEBHOOK_SECRET": ""}, "set all of them or none"),
        (RAZORPAY | {"RAZORPAY_WEBHOOK_SECRET": " , "}, "must hold a secret"),
        ({"RAZORPAY_API_URL": "api.razorpay.com"}, "must start with http"),
        ({"SUBSCRIBE_TIMEOUT_MS": "2000"}, "DB_TIMEOUT_MS must be less than SUBSCRIBE_TIMEOUT_MS"),
        ({"REDIS_TIMEOUT_MS": "4000"}, "REDIS_TIMEOUT_MS must be less than SUBSCRIBE_TIMEOUT_MS"),
        ({"SUBSCRIBE_TIMEOUT_MS": "2500"}, "REDIS_TIMEOUT_MS + DB_TIMEOUT_MS must be less than SUBSCRIBE_TIMEOUT_MS"),
        ({"RELAY_GRACE_MS": "5000"}, "RELAY_GRACE_MS must be less than GAP_CHECK_INTERVAL_S"),
        ({"DRAIN_TIMEOUT_S": "2"}, "DB_TIMEOUT_MS must be less than DRAIN_TIMEOUT_S"),
        ({"DRAIN_SPREAD_MS": "13000"}, "DRAIN_SPREAD_MS + DB_TIMEOUT_MS must be less than DRAIN_TIMEOUT_S"),
        (
            {"LOCATION_NEXT_INTERVAL_MS": "1000"},
            "LOCATION_NEXT_INTERVAL_MS must be between LOCATION_NEXT_INTERVAL_NEAR_MS",
        ),
        ({"LOCATION_NEXT_INTERVAL_UNWATCHED_MS": "4000"}, "LOCATION_NEXT_INTERVAL_MS must be between"),
        ({"PRESENCE_ALIVE_S": "2"}, "PRESENCE_ALIVE_S must be three times PRESENCE_FLUSH_MS"),
        ({"FRAME_MAX_BYTES": "262145"}, "FRAME_MAX_BYTES must not be more than BODY_MAX_BYTES"),
        ({"IDEMPOTENCY_KEEP_S": "604799"}, "IDEMPOTENCY_KEEP_S must be 604800"),
        ({"LINK_TTL_MAX_S": "60"}, "LINK_TTL_S must not be more than LINK_TTL_MAX_S"),
        ({"DATABASE_URL": "mysql://u:pass-word@db/x"}, "DATABASE_URL must start with"),
        ({"REDIS_URL": "http://u:pass-word@cache"}, "REDIS_URL must start with"),
        ({"PUBLIC_URL": "ftp://track.example"}, "PUBLIC_URL must start with"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(environ: dict[str, str], told: str) -> None:
    refusal = sentence(environ)
    assert told in refusal
    assert "pass-word" not in refusal


@pytest.mark.parametrize("scheme", ["postgres", "postgresql"])
def test_urls_of_data_servers(scheme: str) -> None:
    url = f"{scheme}:///waybill?host=/run/postgresql&sslmode=disable"
    assert load({"DATABASE_URL": url, "REDIS_URL": "redis://cache"}).database_url == url


def test_the_table_has_a_meaning_for_every_setting() -> None:
    rows = table()
    assert [name for name, _, _ in rows] == [name.upper() for name in Settings.__struct_fields__]
    assert all(meaning for _, _, meaning in rows)


def test_every_number_carries_its_unit_in_its_name() -> None:
    fields = {field.name: field for field in msgspec.structs.fields(Settings)}
    numbers = [name for name, field in fields.items() if isinstance(field.default, int) and name != "port"]
    assert len(numbers) > 20
    assert [name for name in numbers if not name.endswith(UNITS)] == []


def test_every_default_keeps_its_own_bounds() -> None:
    hints = get_type_hints(Settings, include_extras=True)
    for field in msgspec.structs.fields(Settings):
        assert msgspec.convert(field.default, hints[field.name]) == field.default


def test_secrets_are_never_shown() -> None:
    assert set(Settings.__struct_fields__) >= SECRETS
    assert {name for name in Settings.__struct_fields__ if "secret" in name or name.endswith("_token")} <= SECRETS
    assert DEFAULT_JWT_SECRET not in repr(table())
    for name in SECRETS:
        assert page._shown(name, "pass-word") == "(hidden)"
