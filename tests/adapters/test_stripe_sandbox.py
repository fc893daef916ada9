"""The simulator of Stripe by itself: raw HTTP as Stripe's documents describe it, its page, and its memory."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlencode, urlsplit

import aiohttp
import pytest

from server.adapters.sandbox.mischief import Fault
from server.adapters.sandbox.stripe import StripeSandbox, nested
from server.adapters.stripe_webhooks import verified
from tests.adapters.stripe_world import NEW_SECRET, OLD_SECRET, PACE, PUBLISHABLE_KEY, SECRET_KEY
from tests.adapters.worlds import Hooks

NEW = {"amount": "49900", "currency": "inr", "metadata[order_id]": "o1", "automatic_payment_methods[enabled]": "true"}


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: Any


class Caller:
    """Calls the API as curl would."""

    def __init__(self, sandbox: StripeSandbox, session: aiohttp.ClientSession) -> None:
        self.sandbox, self._session = sandbox, session

    async def post(self, path: str, form: dict[str, str] | None = None, key: str = "", secret: str = "") -> Answer:
        headers = {"Authorization": f"Bearer {secret or SECRET_KEY}"} | ({"Idempotency-Key": key} if key else {})
        async with self._session.post(f"{self.sandbox.url}{path}", data=form or {}, headers=headers) as answer:
            return Answer(answer.status, dict(answer.headers), await answer.json())

    async def get(self, path: str) -> Answer:
        headers = {"Authorization": f"Bearer {SECRET_KEY}"}
        async with self._session.get(f"{self.sandbox.url}{path}", headers=headers) as answer:
            text = await answer.text()
            return Answer(answer.status, dict(answer.headers), json.loads(text) if text.startswith("{") else text)

    async def intent(self, **more: str) -> dict[str, Any]:
        made: dict[str, Any] = (await self.post("/v1/payment_intents", {**NEW, **more})).body
        return made


@pytest.fixture
async def hooks() -> AsyncIterator[Hooks]:
    opened = Hooks()
    await opened.start()
    yield opened
    await opened.stop()


@pytest.fixture
async def caller(hooks: Hooks) -> AsyncIterator[Caller]:
    sandbox = StripeSandbox(SECRET_KEY, PUBLISHABLE_KEY, OLD_SECRET, hooks.url, pace=PACE)
    await sandbox.start()
    async with aiohttp.ClientSession() as session:
        yield Caller(sandbox, session)
    await sandbox.stop()


def test_forms_nest() -> None:
    form = urlencode({"amount": "5", "metadata[a]": "b", "metadata[c]": "d=", "expand[0]": "x.y", "expand[1]": "z"})
    assert nested(form) == {"amount": "5", "metadata": {"a": "b", "c": "d="}, "expand": ["x.y", "z"]}
    assert nested("expand[]=x&expand[]=y&a[b][c]=1") == {"expand": ["x", "y"], "a": {"b": {"c": "1"}}}
    assert nested("") == {}


@pytest.mark.parametrize("keys", [("sk_live_1", "pk_test_1"), ("sk_test_1", "pk_live_1"), ("", "")])
def test_live_keys_are_refused(keys: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="simulator"):
        StripeSandbox(*keys, OLD_SECRET)


async def test_a_live_key_of_a_caller_is_refused(caller: Caller) -> None:
    assert (await caller.post("/v1/payment_intents", NEW, secret="sk_live_real")).status == 403
    assert (await caller.post("/v1/payment_intents", NEW, secret="sk_test_other")).status == 401


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"amount": "1.5"}, "parameter_invalid_integer"),
        ({"amount": "-5"}, "parameter_invalid_integer"),
        ({"amount": ""}, "parameter_missing"),
        ({"amount": "49"}, "amount_too_small"),
        ({"colour": "red"}, "parameter_unknown"),
        ({"amount": "99991", "currency": "kwd"}, "parameter_invalid_integer"),
        ({"amount": "50", "currency": "ugx"}, "parameter_invalid_integer"),
    ],
)
async def test_bad_parameters_are_refused_and_not_stored(caller: Caller, more: dict[str, str], code: str) -> None:
    answer = await caller.post("/v1/payment_intents", {**NEW, **more}, key="k")
    assert (answer.status, answer.body["error"]["code"]) == (400, code)
    assert (await caller.post("/v1/payment_intents", NEW, key="k")).status == 200


async def test_a_key_replays_its_first_answer(caller: Caller) -> None:
    first = await caller.post("/v1/payment_intents", NEW, key="k")
    again = await caller.post("/v1/payment_intents", NEW, key="k")
    assert again.body == first.body
    assert ("Idempotent-Replayed" in first.headers, again.headers["Idempotent-Replayed"]) == (False, "true")
    other = await caller.post("/v1/payment_intents", {**NEW, "amount": "50000"}, key="k")
    assert (other.status, other.body["error"]["type"]) == (400, "idempotency_error")


@pytest.mark.parametrize(("fault", "made"), [(Fault.ERROR, 0), (Fault.ERROR_AFTER, 1)])
async def test_a_key_replays_even_an_error(caller: Caller, fault: Fault, made: int) -> None:
    caller.sandbox.mischief.fault = fault
    first = await caller.post("/v1/payment_intents", NEW, key="k")
    again = await caller.post("/v1/payment_intents", NEW, key="k")
    assert (first.status, again.status, again.headers["Idempotent-Replayed"]) == (500, 500, "true")
    assert len(caller.sandbox.books.state.intents) == made


async def test_a_key_in_use_is_a_conflict(caller: Caller) -> None:
    intent = await caller.intent()
    caller.sandbox.books.pay(intent["id"])
    caller.sandbox.mischief.refund_takes_s = 0.1
    both = await asyncio.gather(*(caller.post("/v1/refunds", {"payment_intent": intent["id"]}, key="k") for _ in "12"))
    assert sorted(answer.status for answer in both) == [200, 409]


async def test_a_key_is_forgotten_after_a_day(caller: Caller) -> None:
    first = await caller.post("/v1/payment_intents", NEW, key="k")
    caller.sandbox.books.state.keys["k"].at -= 25 * 3600
    assert (await caller.post("/v1/payment_intents", NEW, key="k")).body["id"] != first.body["id"]


async def test_a_declined_card_leaves_the_intent_payable(caller: Caller) -> None:
    intent = await caller.intent()
    confirm = f"/v1/payment_intents/{intent['id']}/confirm"
    form = {"payment_method": "pm_card_chargeDeclined", "return_url": "https://shop.example/"}
    declined = await caller.post(confirm, form)
    error = declined.body["error"]
    assert (declined.status, error["type"], error["decline_code"]) == (402, "card_error", "generic_decline")
    assert error["payment_intent"]["status"] == "requires_payment_method"
    assert error["payment_intent"]["last_payment_error"]["code"] == "card_declined"
    paid = await caller.post(confirm, {**form, "payment_method": "pm_card_visa"})
    assert (paid.body["status"], paid.body["amount_received"], paid.body["last_payment_error"]) == (
        "succeeded",
        49900,
        None,
    )
    again = await caller.post(confirm, form)
    assert again.body["error"]["code"] == "payment_intent_unexpected_state"


async def test_a_charge_is_an_id_until_it_is_asked_for(caller: Caller) -> None:
    intent = await caller.intent()
    caller.sandbox.books.pay(intent["id"])
    plain = (await caller.get(f"/v1/payment_intents/{intent['id']}")).body
    assert re.fullmatch(r"ch_\w+", plain["latest_charge"])
    assert "charges" not in plain
    shown = (await caller.get(f"/v1/payment_intents/{intent['id']}?expand[]=latest_charge.refunds")).body
    assert shown["latest_charge"]["refunds"]["data"] == []


async def test_more_than_is_left_is_not_refunded(caller: Caller) -> None:
    intent = await caller.intent()
    caller.sandbox.books.pay(intent["id"])
    form = {"payment_intent": intent["id"], "amount": "49900"}
    assert (await caller.post("/v1/refunds", form)).body["status"] == "succeeded"
    assert (await caller.post("/v1/refunds", form)).body["error"]["code"] == "charge_already_refunded"


@pytest.mark.parametrize(("method", "ends"), [("pm_card_refundFail", "failed"), ("pm_card_pendingRefund", "succeeded")])
async def test_some_refunds_change_their_mind(caller: Caller, hooks: Hooks, method: str, ends: str) -> None:
    intent = await caller.intent()
    caller.sandbox.books.pay(intent["id"], method)
    refund = (await caller.post("/v1/refunds", {"payment_intent": intent["id"]})).body
    assert refund["status"] != ends

    def ended(came: list[Any]) -> bool:
        events = [json.loads(hook.body) for hook in came]
        return any(e["type"] == "refund.updated" and e["data"]["object"]["status"] == ends for e in events)

    await hooks.until(ended)
    assert (await caller.get(f"/v1/refunds/{refund['id']}")).body["status"] == ends


# webhooks


async def test_while_a_secret_is_rolled_events_carry_two_signatures(caller: Caller, hooks: Hooks) -> None:
    caller.sandbox.roll_secret(NEW_SECRET)
    caller.sandbox.books.pay((await caller.intent())["id"])
    hook = (await hooks.until(bool))[0]
    header = hook.headers["Stripe-Signature"]
    assert header.count("v1=") == 2
    for secret in (NEW_SECRET, OLD_SECRET):
        verified(hook.body, header, [secret], time.time(), 300)
    caller.sandbox.end_roll()
    assert caller.sandbox.signature(b"").count("v1=") == 1


async def test_each_try_is_signed_anew(hooks: Hooks) -> None:
    ticks = iter(range(1_790_000_000, 1_790_001_000))
    sandbox = StripeSandbox(SECRET_KEY, PUBLISHABLE_KEY, OLD_SECRET, hooks.url, clock=lambda: next(ticks), pace=PACE)
    await sandbox.start()
    hooks.statuses = [500]
    sandbox.deliver({"id": "evt_1", "type": "charge.succeeded"})
    first, second = await hooks.until(lambda came: len(came) == 2)
    assert first.body == second.body
    assert first.headers["Stripe-Signature"] != second.headers["Stripe-Signature"]
    await sandbox.stop()


async def test_four_tries_then_no_more(caller: Caller, hooks: Hooks) -> None:
    hooks.statuses = [500] * 10
    caller.sandbox.deliver({"id": "evt_1", "type": "charge.succeeded"})
    await caller.sandbox.courier.idle()
    assert len(hooks.came) == 4


# the page


async def test_the_page_is_for_who_has_the_secret(caller: Caller) -> None:
    intent = await caller.intent()
    page = await caller.get(f"/checkout/{intent['id']}?client_secret={intent['client_secret']}")
    assert page.status == 200
    assert "Simulator" in page.body
    assert not re.search(
        r"""(src|href)=(?!["']?data:)|https?://|@import""", page.body.split("<script")[0]
    )  # all in one
    assert (await caller.get(f"/checkout/{intent['id']}?client_secret=guess")).status == 404
    assert (await caller.get("/checkout/pi_0")).status == 404


@pytest.mark.parametrize(
    ("actions", "status", "redirect"),
    [
        (["pay"], "succeeded", "succeeded"),
        (["fail"], "requires_payment_method", "failed"),
        (["fail", "pay"], "succeeded", "succeeded"),
        (["secure", "approve"], "succeeded", "succeeded"),
        (["secure", "refuse"], "requires_payment_method", "failed"),
        (["cancel"], "requires_payment_method", "failed"),
        (["pay_late"], "processing", "processing"),
    ],
)
async def test_what_the_buttons_do(caller: Caller, actions: list[str], status: str, redirect: str) -> None:
    intent = await caller.intent()
    caller.sandbox._pace = 1e6  # what is late stays late
    for action in actions:
        answer = await caller.post(f"/sandbox/intents/{intent['id']}/{action}?returnUrl=https://shop.example/back?o=7")
    assert (answer.status, answer.body["status"]) == (200, status)
    back = parse_qs(urlsplit(answer.body["return_to"]).query)
    assert back == {
        "o": ["7"],
        "payment_intent": [intent["id"]],
        "payment_intent_client_secret": [intent["client_secret"]],
        "redirect_status": [redirect],
    }


async def test_who_pays_late_pays(caller: Caller, hooks: Hooks) -> None:
    intent = await caller.intent()
    await caller.post(f"/sandbox/intents/{intent['id']}/pay_late")
    await hooks.until(lambda came: any(b"payment_intent.succeeded" in hook.body for hook in came))


async def test_a_button_that_does_not_fit_says_so(caller: Caller) -> None:
    intent = await caller.intent()
    assert (await caller.post(f"/sandbox/intents/{intent['id']}/approve")).status == 400
    assert (await caller.post("/sandbox/intents/pi_0/pay")).status == 404


# its memory


async def test_what_it_knew_is_there_after_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "sandbox-stripe.json"
    first = StripeSandbox(SECRET_KEY, PUBLISHABLE_KEY, OLD_SECRET, file=file)
    await first.start()
    async with aiohttp.ClientSession() as session:
        caller = Caller(first, session)
        made = await caller.post("/v1/payment_intents", NEW, key="k")
        await caller.post(f"/sandbox/intents/{made.body['id']}/pay")
        await first.stop()
        second = StripeSandbox(SECRET_KEY, PUBLISHABLE_KEY, OLD_SECRET, file=file)
        await second.start()
        caller = Caller(second, session)
        assert (await caller.post("/v1/payment_intents", NEW, key="k")).body == made.body
        assert (await caller.get(f"/v1/payment_intents/{made.body['id']}")).body["status"] == "succeeded"
        await second.stop()
