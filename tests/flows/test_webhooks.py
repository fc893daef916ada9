"""The door of gateways: what they sign is stored and applied, whatever else comes is refused, and nothing is lost."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import aiohttp
import asyncpg
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from models.payment import Provider
from server.embedded import DataServers
from tests.flows.gateways import SECRETS, NamingGateway, naming_gateway, signed
from tests.harness import ROOT, Fleet, Instance, Reply, token, until
from tests.shared import everything, refusal, shared_fleet

STAFF = token("staff", "s1")
RAZORPAY, STRIPE = Provider.RAZORPAY, Provider.STRIPE
CAPTURED = (ROOT / "tests" / "fixtures" / "razorpay" / "live-netbanking-payment.captured.json").read_bytes()
SUCCEEDED = (ROOT / "tests" / "fixtures" / "stripe" / "live-payment_intent.succeeded.json").read_bytes()
OLD_SECRET = "what-razorpay-signed-with-before"
WEBHOOK_MAX_BYTES = 20_000


@pytest.fixture(scope="module")
async def fleet(data: DataServers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    async with shared_fleet(data, tmp_path_factory.mktemp("webhooks")) as fleet:
        yield fleet


@pytest.fixture(scope="module")
async def gateway() -> AsyncIterator[NamingGateway]:
    async with naming_gateway() as gateway:
        yield gateway


class Door(NamedTuple):
    instance: Instance
    gateway: NamingGateway
    tables: Any

    async def begin(self, amount: int = 100) -> tuple[str, str]:
        """(payment id, gateway order) of a new Razorpay payment."""
        name = f"order_{uuid.uuid4().hex[:14]}"
        self.gateway.next_id = name
        order = await self.instance.place(
            paymentMethod="online", items=[{"name": "Masala dosa", "quantity": 1, "unitPrice": amount}]
        )
        reply = await self.instance.post("/payments", {"orderId": order["id"], "provider": "razorpay"})
        assert reply.status == 201, reply
        return reply.body["id"], name

    async def send(self, body: bytes, provider: Provider = RAZORPAY, *, headers: dict[str, str] | None = None) -> Reply:
        """A webhook, signed as it should be unless `headers` say otherwise."""
        given = signed(provider, body, uuid.uuid4().hex[:14]) if headers is None else headers
        return await self.instance.request("POST", f"/webhooks/{provider}", raw=body, headers=given, by=None)

    async def payment(self, payment_id: str) -> dict[str, Any]:
        found: dict[str, Any] = (await self.instance.get(f"/payments/{payment_id}")).body
        return found

    async def becomes(self, payment_id: str, status: str) -> dict[str, Any]:
        async def holds() -> dict[str, Any] | None:
            found = await self.payment(payment_id)
            return found if found["status"] == status else None

        found: dict[str, Any] = await until(holds, f"the payment is {status}")
        return found

    async def stored(self) -> int:
        count: int = await self.tables.fetchval("select count(*) from webhooks")
        return count

    async def settled(self) -> None:
        """Wait until everything was tried."""

        async def holds() -> bool:
            untried = "select count(*) from webhooks where status = 'received' and error is null"
            return bool(await self.tables.fetchval(untried) == 0)

        await until(holds, "everything was tried")


@pytest.fixture(scope="module")
async def door(fleet: Fleet, gateway: NamingGateway) -> AsyncIterator[Door]:
    given = {**gateway.settings, "RAZORPAY_WEBHOOK_SECRET": f"{SECRETS[RAZORPAY]},{OLD_SECRET}"}
    instance = await fleet.start(WEBHOOK_MAX_BYTES=str(WEBHOOK_MAX_BYTES), **given)
    instance.may_log_errors = True  # a webhook that is given up is an error
    tables = await asyncpg.connect(fleet.database_url)
    yield Door(instance, gateway, tables)
    await tables.close()


def captured(name: str, **changes: Any) -> bytes:
    """A captured payment of the gateway order `name`, as Razorpay told of one; `changes` are of the payment."""
    body = json.loads(CAPTURED)
    body["payload"]["payment"]["entity"] |= {"order_id": name, "id": f"pay_{name[6:]}", **changes}
    return json.dumps(body, separators=(",", ":")).encode()


async def test_what_a_gateway_signs_is_stored_and_booked(door: Door) -> None:
    payment_id, name = await door.begin()
    reply = await door.send(captured(name))
    assert (reply.status, reply.body) == (200, {})
    assert (await door.becomes(payment_id, "completed"))["captured"] == 100
    history = (await door.instance.get(f"/payments/{payment_id}/history")).body
    assert "webhook" in [one["source"] for one in history["items"]]


async def test_news_that_comes_before_its_payment_waits_for_it(door: Door) -> None:
    name = f"order_{uuid.uuid4().hex[:14]}"
    await door.send(captured(name))

    async def is_parked() -> Any:
        page = (await door.instance.get("/webhooks?status=parked", by=STAFF)).body
        return [one for one in page["items"] if name in one["refs"]]

    (parked,) = await until(is_parked, "it is parked")
    assert name in parked["error"]
    door.gateway.next_id = name
    order = await door.instance.place(
        paymentMethod="online", items=[{"name": "Masala dosa", "quantity": 1, "unitPrice": 100}]
    )
    door.gateway.next_id = name
    reply = await door.instance.post("/payments", {"orderId": order["id"], "provider": "razorpay"})
    await door.becomes(reply.body["id"], "completed")


# whom the door believes


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-Razorpay-Signature": ""},
        {"X-Razorpay-Signature": "0" * 64},
        {"X-Razorpay-Signature": "Grüße"},
        signed(RAZORPAY, CAPTURED, secret="somebody else's"),
        signed(RAZORPAY, CAPTURED, secret=""),
        signed(RAZORPAY, CAPTURED + b" "),
        {"X-Razorpay-Signature": signed(RAZORPAY, CAPTURED)["X-Razorpay-Signature"].upper()},
        signed(STRIPE, CAPTURED),
    ],
    ids=["none", "empty", "zeros", "no ascii", "other secret", "empty secret", "other body", "capitals", "Stripe's"],
)
async def test_what_razorpay_has_not_signed_is_refused(door: Door, headers: dict[str, str]) -> None:
    before = await everything(door.tables)
    refusal(await door.send(CAPTURED, headers=headers), 400, "bad_signature")
    assert await everything(door.tables) == before


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Stripe-Signature": "t=,v1="},
        {"Stripe-Signature": "t=1,v1=" + "0" * 64},
        {"Stripe-Signature": "," * 5000},
        signed(STRIPE, SUCCEEDED, secret="somebody else's"),
        signed(RAZORPAY, SUCCEEDED),
    ],
    ids=["none", "empty", "zeros", "commas", "other secret", "Razorpay's"],
)
async def test_what_stripe_has_not_signed_is_refused(door: Door, headers: dict[str, str]) -> None:
    before = await everything(door.tables)
    refusal(await door.send(SUCCEEDED, STRIPE, headers=headers), 400, "bad_signature")
    assert await everything(door.tables) == before


async def test_a_secret_that_was_replaced_is_still_believed(door: Door) -> None:
    """Razorpay repeats older events under the old secret."""
    payment_id, name = await door.begin()
    body = captured(name)
    assert (await door.send(body, headers=signed(RAZORPAY, body, "event", OLD_SECRET))).status == 200
    await door.becomes(payment_id, "completed")


async def test_bytes_count_not_what_they_mean(door: Door) -> None:
    """The body is written in the gateway's own way, and sent in the middle of nowhere: no content type says JSON."""
    payment_id, name = await door.begin()
    body = json.dumps(json.loads(captured(name)), indent=3, ensure_ascii=False).encode() + b"\r\n"
    headers = {**signed(RAZORPAY, body, "odd-event"), "Content-Type": "text/plain; charset=latin-1"}
    assert (await door.send(body, headers=headers)).status == 200
    await door.becomes(payment_id, "completed")


# what is signed, and still wrong


async def test_a_replayed_body_changes_nothing(door: Door) -> None:
    """Razorpay signs no time, and not the event's id: whoever has seen a webhook can send it again for ever."""
    payment_id, name = await door.begin()
    body = captured(name)
    await door.send(body)
    before, stored = await door.becomes(payment_id, "completed"), await door.stored()
    for number in range(20):
        assert (await door.send(body, headers=signed(RAZORPAY, body, f"replayed-{number}"))).status == 200
    await door.settled()
    assert await door.stored() == stored
    assert await door.payment(payment_id) == before


@pytest.mark.parametrize(
    "changes",
    [{"amount": 99}, {"amount": 101}, {"amount": 1}, {"currency": "USD"}, {"currency": "JPY", "amount": 1}],
    ids=str,
)
async def test_another_amount_or_currency_never_completes(door: Door, changes: dict[str, Any]) -> None:
    payment_id, name = await door.begin()
    await door.send(captured(name, **changes))
    await door.settled()
    payment = await door.payment(payment_id)
    assert (payment["status"], payment["attention"]) == ("processing", "mismatch")
    order = (await door.instance.get(f"/orders/{payment['orderId']}")).body
    assert (order["status"], order["payment"]["paid"]) == ("pending", 0)


@pytest.mark.parametrize("amount", [0, -100, 2**70, 1.5, "100", None, True], ids=str)
async def test_an_amount_that_is_none_changes_no_balance(door: Door, amount: object) -> None:
    payment_id, name = await door.begin()
    ledger = await door.tables.fetch("select * from ledger_rows")
    assert (await door.send(captured(name, amount=amount))).status == 200
    await door.settled()
    assert (await door.payment(payment_id))["captured"] == 0
    assert await door.tables.fetch("select * from ledger_rows") == ledger


async def test_somebody_elses_payment_is_not_this_one(door: Door) -> None:
    """The attempt of one payment under the order of another: nothing is booked twice."""
    (one, first), (other, second) = await door.begin(), await door.begin()
    await door.send(captured(first))
    await door.becomes(one, "completed")
    await door.send(captured(second, id=f"pay_{first[6:]}"))
    await door.settled()
    captures = await door.tables.fetch("select payment_id::text from captures where key = $1", f"pay_{first[6:]}")
    assert [row["payment_id"] for row in captures] == [one]
    assert (await door.payment(other))["captured"] == 0


async def test_a_gateway_that_is_not_there(door: Door, fleet: Fleet) -> None:
    for path in ("/webhooks/paypal", "/webhooks/cash", "/webhooks/manual"):
        reply = await door.instance.request("POST", path, raw=CAPTURED, headers=signed(RAZORPAY, CAPTURED), by=None)
        assert reply.status == 404, path
    refusal(await door.instance.get("/webhooks/razorpay", by=STAFF), 405, "not_found")
    without = await fleet.start("web")
    reply = await without.request(
        "POST", "/webhooks/razorpay", raw=CAPTURED, headers=signed(RAZORPAY, CAPTURED), by=None
    )
    refusal(reply, 404, "not_found")


async def test_a_webhook_that_is_too_large(door: Door) -> None:
    stored = await door.stored()
    fits, large = b" " * WEBHOOK_MAX_BYTES, b" " * (WEBHOOK_MAX_BYTES + 1)
    assert (await door.send(fits)).status == 200
    refusal(await door.send(large), 413, "too_large")

    async def in_pieces() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b" " * (WEBHOOK_MAX_BYTES // 2)

    url = f"{door.instance.url}/api/v1/webhooks/razorpay"
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, data=in_pieces(), headers=signed(RAZORPAY, large)) as response,
    ):
        assert response.status == 413
    assert await door.stored() == stored + 1


DEEP = 20_000 // 2 - 100
ODD = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"\xff\xfe",
    b"not json",
    b'"\\ud800"',
    b"[" * DEEP + b"]" * DEEP,
    b'{"event":"payment.captured","payload":' + b'{"a":' * 2000 + b"1" + b"}" * 2000 + b"}",
    b'{"event":"\xff\xfe"}',
    b'{"id":"evt_\xff","type":"charge.refunded"}',
    b'{"event":"payment.captured"}',
    b'{"event":"payment.captured","payload":[]}',
    b'{"event":"payment.captured","payload":{"payment":[]}}',
    b'{"event":"payment.captured","payload":{"payment":{"entity":null}}}',
    b'{"event":"payment.captured\\u0000","payload":{}}',
    b'{"event":"' + b"x" * 5000 + b'"}',
    b'{"id":"evt_1","type":"payment_intent.succeeded"}',
    b'{"id":"evt_2","type":"payment_intent.succeeded","data":{"object":[]}}',
    b'{"id":"evt_3","type":"payment_intent.succeeded","data":{"object":{"id":"pi_\\u0000"}}}',
    b'{"id":"evt_4\\u0000","type":"\\ud800","data":null}',
    b'{"id":"evt_5","type":"charge.refunded","data":{"object":{"id":1,"refunds":{"data":[null]}}}}',
]


@pytest.mark.parametrize("provider", [RAZORPAY, STRIPE])
@pytest.mark.parametrize("body", ODD, ids=lambda body: body[:40].decode(errors="replace"))
async def test_a_signed_body_of_any_shape_is_never_our_failure(door: Door, provider: Provider, body: bytes) -> None:
    ledger = await door.tables.fetch("select * from ledger_rows")
    reply = await door.send(body, provider)
    assert reply.status == 200 or (reply.status, reply.code) == (400, "bad_signature"), reply
    await door.settled()
    assert await door.tables.fetch("select * from ledger_rows") == ledger


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)


@effort(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(
        st.sampled_from(["id", "amount", "currency", "status", "order_id", "fee", "method"]), json_values
    )
)
async def test_a_signed_payment_with_anything_in_it_is_never_our_failure(door: Door, changes: dict[str, Any]) -> None:
    body = json.loads(CAPTURED)
    body["payload"]["payment"]["entity"] |= changes
    assert (await door.send(json.dumps(body).encode())).status == 200


async def test_after_all_that_it_serves_on(door: Door) -> None:
    await test_what_a_gateway_signs_is_stored_and_booked(door)
    assert (await door.instance.get("/health/ready", by=None)).status == 200
    text = door.instance.log.read_text()
    assert "request_failed" not in text
    assert "inbox_failed" not in text


# rates


async def test_a_gateways_burst_passes_and_strangers_are_limited(fleet: Fleet, gateway: NamingGateway) -> None:
    limits = {"RATE_ADDRESS_REQUESTS_PER_MIN": "1", "RATE_ADDRESS_BURST_MAX": "3", "TRUSTED_PROXIES": "127.0.0.1"}
    door = Door(await fleet.start(**gateway.settings, **limits), gateway, None)  # type: ignore[arg-type]
    # an address of their own: the count is shared by all tests
    same_address = {"X-Forwarded-For": "203.0.113.9"}
    unsigned = [(await door.send(CAPTURED, headers=same_address)).status for _ in range(6)]
    assert unsigned == [400, 400, 400, 429, 429, 429]
    bodies = [captured(f"order_burst{number:09}") for number in range(50)]
    sent = [
        door.send(body, headers=signed(RAZORPAY, body, f"burst-{n}") | same_address) for n, body in enumerate(bodies)
    ]
    assert {reply.status for reply in await asyncio.gather(*sent)} == {200}


# staff


async def test_staff_lists_retries_and_dismisses(door: Door) -> None:
    name = f"order_{uuid.uuid4().hex[:14]}"
    await door.send(captured(name))
    await door.settled()

    async def mine(status: str) -> list[dict[str, Any]]:
        page = (await door.instance.get(f"/webhooks?status={status}&limit=200", by=STAFF)).body
        return [one for one in page["items"] if name in one["refs"]]

    (parked,) = await until(lambda: mine("parked"), "it is parked")
    assert (parked["provider"], parked["kind"]) == ("razorpay", "payment.captured")
    again = {"Idempotency-Key": str(uuid.uuid4())}
    for _ in range(2):
        reply = await door.instance.post(f"/webhooks/{parked['id']}/retry", {}, by=STAFF, headers=again)
        assert (reply.status, reply.body["status"]) == (200, "received")
    await until(lambda: mine("parked"), "it is parked again")
    dismissal = {"reason": "It is another shop's on the same account."}
    reply = await door.instance.post(f"/webhooks/{parked['id']}/dismiss", dismissal, by=STAFF)
    assert (reply.status, reply.body["reason"]) == (200, dismissal["reason"])
    assert [one["id"] for one in await mine("dismissed")] == [parked["id"]]
    refusal(await door.instance.post(f"/webhooks/{parked['id']}/dismiss", dismissal, by=STAFF), 409, "conflict")
    refusal(await door.instance.post(f"/webhooks/{uuid.uuid4()}/retry", {}, by=STAFF), 404, "not_found")
    refusal(await door.instance.post(f"/webhooks/{parked['id']}/dismiss", {}, by=STAFF), 422, "invalid")
    refusal(await door.instance.get("/webhooks?status=lost", by=STAFF), 422, "invalid")
    refusal(await door.instance.get("/webhooks", by=None), 401, "unauthenticated")
    for role in ("customer", "agent", "service"):
        refusal(await door.instance.get("/webhooks", by=token(role, "c1")), 403, "forbidden")


# who works


async def test_what_a_process_that_only_serves_stores_another_applies(fleet: Fleet, gateway: NamingGateway) -> None:
    web = await fleet.start("web", **gateway.settings)
    worker = await fleet.start("worker", **gateway.settings)
    door = Door(web, gateway, None)
    payment_id, name = await door.begin()
    assert (await door.send(captured(name))).status == 200
    await door.becomes(payment_id, "completed")
    assert await worker.stop() == 0
