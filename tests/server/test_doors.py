"""The doors: commands are read with pointers at what is wrong, and carried out once per Idempotency-Key."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
from collections.abc import Callable, Iterable
from typing import Annotated, Any, cast

import asyncpg
import msgspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from handlers import links, orders, users
from handlers.context import Told, Tx
from models.address import Contact
from models.errors import Conflict, Invalid, Malformed, NotFound, Refused, Unavailable
from models.order import Status
from models.position import Position
from models.user import Actor, Role, Scope
from server.db import Database
from server.doors import FORGET, Answer, Doors, Verb, convert, decode
from server.outbox import Outbox
from tests.harness import ORDER

PLACE = Verb("place", orders.place, status=201)
CHANGE_STATUS = Verb("change_status", orders.change_status)
ASSIGN = Verb("assign", orders.assign, before=orders.before_assign)

WHOLE = json.dumps(ORDER).encode()


def actor(role: Role = Role.SERVICE, sub: str = "shop") -> Actor:
    return Actor(sub=sub, role=role, exp=2e9, scope=Scope.PAY if role is Role.GUEST else None)


SHOP = actor()


class Published:
    """The outbox, as far as the doors need it: what was handed to the bus."""

    def __init__(self) -> None:
        self.told: list[Told] = []

    def publish(self, told: Iterable[Told]) -> None:
        self.told += told


class Positions:
    def __init__(self, database: Database) -> None:
        self.closed: list[tuple[str, int]] = []
        self._database = database

    async def close(self, order_id: str, assignment: int) -> None:
        assert self._database.connections()["busy"] == 0, "a connection waits for Redis"
        self.closed.append((order_id, assignment))


class House:
    """The doors of one instance, and the rows behind them."""

    def __init__(self, database: Database) -> None:
        self.database, self.published, self.positions = database, Published(), Positions(database)
        self.doors = Doors(database, cast(Outbox, self.published), self.positions)

    async def perform(self, verb: Verb, *args: object, key: str | None = None, by: Actor = SHOP) -> Answer:
        return await self.doors.perform(verb, by, *args, key=key)

    async def refused(self, verb: Verb, *args: object, key: str | None = None, by: Actor = SHOP) -> str:
        with pytest.raises(Refused) as refusal:
            await self.perform(verb, *args, key=key, by=by)
        return refusal.value.code

    async def place(self, key: str | None = None, by: Actor = SHOP, **changes: Any) -> Answer:
        return await self.perform(
            PLACE, decode(json.dumps({**ORDER, **changes}).encode(), orders.Place), key=key, by=by
        )

    async def placed(self) -> str:
        order_id: str = json.loads((await self.place()).body)["id"]
        return order_id

    async def fetch(self, statement: str, *args: object) -> list[Any]:
        async with self.database.statement() as tx:
            return list(await tx.all(statement, *args))

    async def count(self, table: str) -> int:
        ((found,),) = await self.fetch(f"select count(*) from {table}")
        return int(found)


@pytest.fixture
def house(database: Database) -> House:
    return House(database)


def to(status: str, **more: Any) -> orders.ChangeStatus:
    return msgspec.convert({"status": status, **more}, orders.ChangeStatus)


# once per key


async def test_the_same_again_gets_the_same_answer_and_has_one_effect(house: House) -> None:
    first = await house.place(key="k1")
    assert first.status == 201
    assert [await house.place(key="k1") for _ in range(3)] == [first] * 3
    assert await house.count("orders") == await house.count("order_events") == 1
    assert len(house.published.told) == 1, "a repeat tells nobody anything"


async def test_the_answer_is_the_one_of_then_whatever_happened_since(house: House) -> None:
    order_id = await house.placed()
    first = await house.perform(CHANGE_STATUS, order_id, to("confirmed"), key="k1")
    await house.perform(CHANGE_STATUS, order_id, to("cancelled"))
    assert await house.perform(CHANGE_STATUS, order_id, to("confirmed"), key="k1") == first
    assert json.loads(first.body)["status"] == "confirmed"


async def test_without_a_key_or_with_another_one_it_is_done_again(house: House) -> None:
    answers = [await house.place(), await house.place(), await house.place(key="k1"), await house.place(key="k2")]
    assert len({json.loads(answer.body)["id"] for answer in answers}) == 4
    assert await house.count("idempotency_keys") == 2


async def test_an_answer_without_a_body_is_kept_with_its_status(house: House) -> None:
    ran: list[object] = []

    async def nothing(tx: Tx, by: Actor) -> None:
        ran.append(await tx.one("select 1"))

    verb = Verb("nothing", nothing, status=204)
    assert await house.perform(verb, key="k1") == Answer(204, b"")
    assert await house.perform(verb, key="k1") == Answer(204, b"")
    assert len(ran) == 1


async def test_another_command_under_the_key_is_refused_and_does_nothing(house: House) -> None:
    first = await house.place(key="k1")
    others: list[dict[str, Any]] = [{"notes": "Ring once"}, {"reference": "shop-1"}, {"customerId": "c2"}]
    for changes in others:
        with pytest.raises(Refused) as refusal:
            await house.place(key="k1", **changes)
        assert (refusal.value.code, refusal.value.status) == ("idempotency_mismatch", 422)
    assert await house.count("orders") == 1
    assert await house.place(key="k1") == first


async def test_the_order_is_part_of_the_command(house: House) -> None:
    one, other = await house.placed(), await house.placed()
    await house.perform(CHANGE_STATUS, one, to("confirmed"), key="k1")
    assert await house.refused(CHANGE_STATUS, other, to("confirmed"), key="k1") == "idempotency_mismatch"


async def test_a_key_belongs_to_its_caller_and_its_verb(house: House) -> None:
    order_id = await house.placed()
    await house.place(key="k1")
    await house.place(key="k1", by=actor(Role.SERVICE, "another shop"))
    await house.place(key="k1", by=actor(Role.STAFF, "shop"))
    await house.perform(CHANGE_STATUS, order_id, to("confirmed"), key="k1")
    await house.perform(Verb("quote", orders.quote), decode(WHOLE, orders.Place), key="k1")
    assert await house.count("idempotency_keys") == 5
    assert await house.count("orders") == 4
    # names that run into each other when they are put together
    pairs = [(Role.STAFF, "a:b", "place"), (Role.STAFF, "a", "b:place"), (Role.STAFF, "a\x1f", "place")]
    for role, sub, name in pairs:
        await house.perform(
            Verb(name, orders.place, status=201), decode(WHOLE, orders.Place), key="k1", by=actor(role, sub)
        )
    assert await house.count("orders") == 4 + len(pairs)


async def test_both_doors_share_the_key_because_they_share_the_command(house: House) -> None:
    """The fingerprint is taken of the parsed command: how its JSON was written makes no difference."""
    order_id = await house.placed()
    by_rest = decode(b'{ "note" : "On \\u0074ime",\n"status":"confirmed" }', orders.ChangeStatus)
    by_socket = orders.ChangeStatus(status=Status.CONFIRMED, note="On time")
    first = await house.perform(CHANGE_STATUS, order_id, by_rest, key="k1")
    assert await house.perform(CHANGE_STATUS, order_id, by_socket, key="k1") == first
    assert await house.count("order_events") == 2


async def test_white_space_the_order_of_members_and_the_form_of_a_number_do_not_matter(house: House) -> None:
    address = {"line1": "1 Road", "city": "Pune", "country": "IN", "lat": 18, "lng": 73}
    first = await house.place(key="k1", deliveryAddress=address)
    backwards = dict(reversed({**ORDER, "deliveryAddress": {**dict(reversed(address.items())), "lat": 18.0}}.items()))
    again = decode(json.dumps(backwards, indent=3).encode(), orders.Place)
    assert await house.perform(PLACE, again, key="k1") == first
    assert await house.count("orders") == 1


async def test_refusals_are_judged_anew(house: House) -> None:
    order_id = await house.placed()
    assert await house.refused(CHANGE_STATUS, order_id, to("preparing"), key="k1") == "illegal_move"
    assert await house.count("idempotency_keys") == 0
    await house.perform(CHANGE_STATUS, order_id, to("confirmed"))
    answer = await house.perform(CHANGE_STATUS, order_id, to("preparing"), key="k1")
    assert json.loads(answer.body)["status"] == "preparing"
    await house.place(reference="shop-1")
    assert (
        await house.refused(PLACE, decode(WHOLE[:-1] + b',"reference":"shop-1"}', orders.Place), key="k2") == "conflict"
    )
    await house.fetch("update orders set reference = null")
    assert (await house.place(key="k2", reference="shop-1")).status == 201


async def test_what_a_verb_prepares_outside_is_prepared_once_for_each_carrying_out(house: House) -> None:
    order_id = await house.placed()
    for agent in ("a1", "a2"):
        cmd = msgspec.convert({"agentId": agent}, orders.Assign)
        first = await house.perform(ASSIGN, order_id, cmd, key=agent)
        assert await house.perform(ASSIGN, order_id, cmd, key=agent) == first
    assert [closed for closed, _ in house.positions.closed] == [order_id]
    closed_order = await house.placed()
    await house.perform(CHANGE_STATUS, closed_order, to("cancelled"))
    refused = msgspec.convert({"agentId": "a1"}, orders.Assign)
    assert await house.refused(ASSIGN, closed_order, refused, key="k1") == "order_closed"


# while it runs


class Paused:
    """A verb that stops after its effect, inside its transaction, until it is let go."""

    def __init__(self) -> None:
        self.inside, self.go = asyncio.Event(), asyncio.Event()
        self.pid = 0
        self.verb = Verb("place", self._run, status=201)

    async def _run(self, tx: Tx, by: Actor, cmd: orders.Place) -> Any:
        order = await orders.place(tx, by, cmd)
        row = await tx.one("select pg_backend_pid() as pid")
        assert row is not None
        self.pid = row["pid"]
        self.inside.set()
        await self.go.wait()
        await tx.one("select 1")
        return order


async def paused(house: House, key: str) -> tuple[Paused, asyncio.Task[Answer]]:
    running = Paused()
    task = asyncio.create_task(house.perform(running.verb, decode(WHOLE, orders.Place), key=key))
    await running.inside.wait()
    return running, task


async def test_while_it_runs_the_same_is_a_conflict_and_afterwards_the_answer(house: House) -> None:
    running, task = await paused(house, "k1")
    for _ in range(2):
        with pytest.raises(Conflict) as refusal:
            await house.place(key="k1")
        assert refusal.value.status == 409
    with pytest.raises(Conflict):
        await house.place(key="k1", notes="Another command")
    other = await house.place(key="k2")
    somebody = await house.place(key="k1", by=actor(Role.STAFF, "shop"))
    running.go.set()
    first = await task
    assert await house.place(key="k1") == first
    assert await house.refused(PLACE, decode(WHOLE[:-1] + b',"table":"7"}', orders.Place), key="k1") == (
        "idempotency_mismatch"
    )
    assert len({first.body, other.body, somebody.body}) == await house.count("orders") == 3


async def test_the_lock_dies_with_its_holder(house: House, database_url: str) -> None:
    running, task = await paused(house, "k1")
    with pytest.raises(Conflict):
        await house.place(key="k1")
    killer = await asyncpg.connect(database_url)
    assert await killer.fetchval("select pg_terminate_backend($1, 5000)", running.pid)
    await killer.close()
    again = await house.place(key="k1")
    running.go.set()
    with pytest.raises(Unavailable):
        await task
    assert await house.place(key="k1") == again
    assert await house.count("orders") == 1, "what the killed one had done is undone"
    assert len(house.published.told) == 1


async def test_the_lock_goes_with_a_caller_that_goes(house: House) -> None:
    _, task = await paused(house, "k1")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await house.place(key="k1")).status == 201
    assert await house.count("orders") == 1


async def test_of_many_at_once_one_is_carried_out(house: House) -> None:
    async def one() -> Answer | str:
        try:
            return await house.place(key="k1")
        except Conflict as refusal:
            return refusal.code

    answers = [answer for answer in await asyncio.gather(*(one() for _ in range(8))) if isinstance(answer, Answer)]
    assert answers
    assert len(set(answers)) == 1
    assert await house.count("orders") == 1
    assert len(house.published.told) == 1


# one transaction


async def test_without_its_key_there_is_no_effect(house: House) -> None:
    await house.fetch("alter table idempotency_keys add constraint broken check (key <> 'k1')")
    with pytest.raises(asyncpg.CheckViolationError):
        await house.place(key="k1")
    for table in ("orders", "order_lines", "order_events", "idempotency_keys"):
        assert await house.count(table) == 0
    assert house.published.told == [], "nobody hears of what was not committed"
    assert (await house.place(key="k2")).status == 201


async def test_without_its_effect_there_is_no_key(house: House) -> None:
    async def breaks(tx: Tx, by: Actor) -> None:
        await orders.place(tx, by, decode(WHOLE, orders.Place))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await house.perform(Verb("breaks", breaks), key="k1")
    assert await house.count("orders") == await house.count("idempotency_keys") == 0
    assert house.published.told == []


async def test_events_are_handed_on_after_the_commit(house: House) -> None:
    seen: list[int] = []
    publish = house.published.publish

    def look(told: Iterable[Told]) -> None:
        seen.append(len(house.published.told))
        publish(told)

    house.published.publish = look  # type: ignore[method-assign]
    running, task = await paused(house, "k1")
    assert seen == []
    running.go.set()
    order_id = json.loads((await task).body)["id"]
    assert [(one.order_id, [event.seq for event in one.events]) for one in house.published.told] == [(order_id, [1])]


async def test_no_answer_keeps_a_secret(house: House) -> None:
    order_id = await house.placed()

    async def create(tx: Tx, by: Actor, order_id: str, cmd: links.CreateLink) -> links.Link:
        return await links.create_link(
            tx, by, order_id, cmd, scope=Scope.PAY, digest=lambda link_id: b"digest of a secret", ttl_s=60, ttl_max_s=60
        )

    answer = await house.perform(Verb("link", create, status=201), order_id, links.CreateLink(), key="k1")
    assert json.loads(answer.body).keys() == {"id", "orderId", "scope", "expiresAt"}


async def test_keys_older_than_they_are_kept_are_forgotten(house: House) -> None:
    now = dt.datetime(2026, 11, 21, tzinfo=dt.UTC)
    for days, key in ((8, "old"), (6, "young")):
        house.database.clock = lambda days=days: now - dt.timedelta(days=days)  # type: ignore[misc]
        await house.place(key=key)
    await house.fetch(FORGET, now - dt.timedelta(days=7))
    assert [row["key"] for row in await house.fetch("select key from idempotency_keys")] == ["young"]


# keys


@pytest.mark.parametrize("key", ["", " ", " k1", "k\n1", "k1\n", "k\t", "ключ", "k\x7f", "\x00", "x" * 256])
async def test_a_key_that_is_no_key_is_invalid(house: House, key: str) -> None:
    assert await house.refused(PLACE, decode(WHOLE, orders.Place), key=key) == "invalid"
    assert await house.count("orders") == 0


async def test_any_printable_key_is_a_key(house: House) -> None:
    keys = ["x" * 255, "!", "a b", '"quoted"', "8e03978e-40d5-43dd-bc93-6894a57f9324", "~"]
    for key in keys:
        first = await house.place(key=key)
        assert await house.place(key=key) == first
    assert await house.count("orders") == len(keys)


# reading commands


def pointers(read: Callable[[], object]) -> list[str]:
    with pytest.raises(Invalid) as refusal:
        read()
    errors: Any = refusal.value.fields["errors"]
    assert all(error["code"] == "invalid" and error["message"] for error in errors)
    return [error["pointer"] for error in errors]


def changed(**changes: object) -> bytes:
    return json.dumps({**ORDER, **changes}).encode()


LINE: dict[str, Any] = ORDER["items"][0]  # type: ignore[index]
ADDRESS: dict[str, Any] = ORDER["deliveryAddress"]  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (b"[]", ""),
        (b'"order"', ""),
        (b"null", ""),
        (b"{}", "/fulfilment"),
        (b'{"fulfilment":"drone"}', "/fulfilment"),
        (changed(currency="RUPEES"), "/currency"),
        (changed(items=[]), "/items"),
        (changed(items={}), "/items"),
        (changed(items=[LINE, 7]), "/items/1"),
        (changed(items=[LINE, {**LINE, "quantity": 0}]), "/items/1/quantity"),
        (changed(items=[LINE] * 10 + [{**LINE, "unitPrice": -1}]), "/items/10/unitPrice"),
        (changed(items=[{"name": "Dosa", "unitPrice": 1}]), "/items/0/quantity"),
        (changed(items=[{**LINE, "unit_price": 1}]), "/items/0/unit_price"),
        (changed(items=[LINE] * 201), "/items"),
        (changed(deliveryAddress={**ADDRESS, "country": "India"}), "/deliveryAddress/country"),
        (changed(deliveryAddress={"line1": "1 Road", "country": "IN"}), "/deliveryAddress/city"),
        (changed(deliveryAddress=None), "/deliveryAddress"),
        (changed(notes="x" * 1001), "/notes"),
        (changed(notes="a\0b"), "/notes"),
        (changed(colour="red"), "/colour"),
        (changed(**{"a/b": 1}), "/a~1b"),
        (changed(**{"m~n": 1}), "/m~0n"),
        (changed(**{"": 1}), "/"),
        (changed(**{"`": 1}), "/`"),
        (changed(**{"a b.c[0]": 1}), "/a b.c[0]"),
        (changed(**{"ключ\n": 1}), "/ключ\n"),
        (changed(deliveryAddress={**ADDRESS, "a/b~c": 1}), "/deliveryAddress/a~1b~0c"),
        (changed(contact={"e-mail": "a@b"}), "/contact/e-mail"),
    ],
)
def test_what_is_wrong_is_pointed_at(body: bytes, where: str) -> None:
    assert pointers(lambda: decode(body, orders.Place)) == [where]
    assert pointers(lambda: convert(json.loads(body), orders.Place)) == [where]


def resolve(document: object, pointer: str) -> object:
    """RFC 6901, evaluated on a document."""
    for step in pointer.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        document = document[int(name)] if isinstance(document, list) else cast(dict[str, object], document)[name]
    return document


@given(name=st.text(st.characters(exclude_categories=["Cs"]), max_size=20), nested=st.booleans())
def test_an_unknown_member_is_found_by_its_pointer(name: str, nested: bool) -> None:
    if name in (field.encode_name for type_ in (orders.Place, Contact) for field in msgspec.structs.fields(type_)):
        return
    marker = {"found": True}
    document = {**ORDER, "contact": {name: marker}} if nested else {**ORDER, name: marker}
    (where,) = pointers(lambda: decode(json.dumps(document).encode(), orders.Place))
    assert resolve(document, where) == marker


class Batch(msgspec.Struct, frozen=True):
    positions: Annotated[list[Position], msgspec.Meta(min_length=1)]


@pytest.mark.parametrize(
    ("positions", "where"),
    [
        ([], "/positions"),
        ([{"lat": 1, "lng": 1, "ts": 1}, {"lat": 91, "lng": 1, "ts": 1}], "/positions/1/lat"),
        ([{"lat": 1, "lng": 1}], "/positions/0/ts"),
        ([{"lat": 1, "lng": 1, "ts": "now"}], "/positions/0/ts"),
        ([None], "/positions/0"),
    ],
)
def test_a_batch_of_positions_is_pointed_into(positions: list[object], where: str) -> None:
    assert pointers(lambda: convert({"positions": positions}, Batch)) == [where]


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"{]",
        b'{"notes": NaN}',
        b'{"notes": Infinity}',
        b"{'notes': 1}",
        b'{"notes": "x",}',
        b"\xff\xfe",
        b'{"notes": "\xff"}',
        b'{"notes": "\\ud800"}',
        b'{"\\ud800": 1}',
        WHOLE + b"x",
        WHOLE[:-1],
        b'{"notes": 01}',
        b"\xef\xbb\xbf{}",
    ],
)
def test_what_is_not_json_is_malformed(body: bytes) -> None:
    with pytest.raises(Malformed) as refusal:
        decode(body, orders.Place)
    assert refusal.value.status == 400


@pytest.mark.parametrize("deep", [b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000])
def test_what_is_nested_too_deep_is_refused(deep: bytes) -> None:
    for body in (deep, WHOLE[:-1] + b',"notes":' + deep + b"}", WHOLE[:-1] + b',"unknown":' + deep + b"}"):
        with pytest.raises(Refused) as refusal:
            decode(body, orders.Place)
        assert refusal.value.code in ("malformed", "invalid")


def test_no_body_is_an_empty_object() -> None:
    assert decode(b"", links.CreateLink) == links.CreateLink()
    assert pointers(lambda: decode(b"", orders.Cancel)) == ["/reason"]


@effort(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode) | st.just(WHOLE).map(bytes))
def test_no_body_is_answered_with_anything_but_a_command_or_a_refusal(body: bytes) -> None:
    for type_ in (orders.Place, orders.ChangeStatus, orders.Assign, users.Revoke, dict[str, Any]):
        try:
            decode(body, type_)
        except (Malformed, Invalid):
            continue


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=10,
)


@effort(deadline=None)
@given(st.sampled_from(sorted([*ORDER, "table", "billing", "reference", "colour"])), json_values)
def test_whatever_stands_in_a_member_its_pointer_leads_there(member: str, value: object) -> None:
    document = {**ORDER, member: value}
    try:
        convert(document, orders.Place)
    except Invalid as refusal:
        errors: Any = refusal.fields["errors"]
        where: str = errors[0]["pointer"]
        assert where.split("/")[1] == member


async def test_strangers_orders_are_not_found_through_a_key_either(house: House) -> None:
    order_id = await house.placed()
    first = await house.perform(CHANGE_STATUS, order_id, to("confirmed"), key="k1")
    assert first.status == 200
    stranger = actor(Role.AGENT, "a9")
    with pytest.raises(NotFound):
        await house.perform(CHANGE_STATUS, order_id, to("confirmed"), key="k1", by=stranger)
