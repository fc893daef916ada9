"""Verbs that wait for a gateway: the key is kept before it is asked, the answer after, nothing is held meanwhile."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterable
from typing import cast

import pytest

from handlers.context import Told, Tx
from handlers.ports import Done, Once
from models.errors import Conflict, GatewayError, IdempotencyMismatch, Invalid, NotFound, Unavailable
from models.event import event
from models.user import Actor, Role
from server.db import Database
from server.doors import Answer, Doors, Steps, _hold
from server.outbox import Outbox

SHOP = Actor(sub="shop", role=Role.SERVICE, exp=2e9)
ORDER_ID = str(uuid.uuid4())


class Published:
    def __init__(self) -> None:
        self.told: list[Told] = []

    def publish(self, told: Iterable[Told]) -> None:
        self.told += told


class Shop:
    """A verb that begins something and asks a gateway, which answers what the test says."""

    def __init__(self, database: Database) -> None:
        self.database, self.published = database, Published()
        self.doors = Doors(database, cast(Outbox, self.published), positions=None)  # type: ignore[arg-type]
        self.asked: list[str] = []
        """Under which id the gateway was asked, each time."""
        self.answers: list[int | Exception] = []
        self.entered, self.go = asyncio.Event(), asyncio.Event()
        self.go.set()
        self.permitted = True
        self.verb = Steps("buy", self.buy, self.permit)

    async def permit(self, tx: Tx, actor: Actor, what: dict[str, int]) -> None:
        if not self.permitted:
            raise NotFound("There is no such order.")

    async def buy(self, once: Once, actor: Actor, what: dict[str, int]) -> Done:
        async with self.doors.transaction() as tx:
            begun = await once.begun(tx)
            subject = begun[0] if begun else tx.new_id()
            if not begun:
                await once.begin(tx, subject)
                tx.tell(ORDER_ID, [event(ORDER_ID, 1, "paymentUpdate", tx.now(), "{}")])
        assert self.database.connections()["busy"] == 0, "a connection waits for the gateway"
        self.asked.append(subject)
        self.entered.set()
        await self.go.wait()
        answer = self.answers.pop(0) if self.answers else 201
        if isinstance(answer, Exception):
            raise answer
        return Done(answer, {"id": subject, "asked": len(self.asked)}, secret="s3cret")

    async def ask(self, key: str | None = "k1", **what: int) -> Answer:
        return await self.doors.perform_in_steps(self.verb, SHOP, what or {"a": 1, "b": 2}, key=key)

    async def rows(self) -> list[tuple[object, ...]]:
        async with self.database.statement() as tx:
            return [tuple(row) for row in await tx.all("select key, status, answer, subjects from idempotency_keys")]


@pytest.fixture
def shop(database: Database) -> Shop:
    return Shop(database)


async def test_a_final_answer_is_stored_without_its_secret_and_replayed(shop: Shop) -> None:
    first = await shop.ask()
    assert (first.status, first.secret) == (201, "s3cret")
    ((key, status, stored, subjects),) = await shop.rows()
    assert (key, status, stored) == ("k1", 201, first.body.decode())
    assert subjects == [uuid.UUID(shop.asked[0])]
    again = await shop.ask()
    assert again == Answer(201, first.body, None)
    assert len(shop.asked) == 1
    assert len(shop.published.told) == 1


async def test_members_in_another_order_are_the_same_command(shop: Shop) -> None:
    first = await shop.ask(a=1, b=2)
    assert (await shop.ask(b=2, a=1)).body == first.body


@pytest.mark.parametrize("outcome", [202, GatewayError("No."), Unavailable("Away."), ZeroDivisionError()])
async def test_what_is_not_final_is_carried_on_under_the_same_id(shop: Shop, outcome: int | Exception) -> None:
    shop.answers = [outcome]
    if isinstance(outcome, Exception):
        with pytest.raises(type(outcome)):
            await shop.ask()
    else:
        assert (await shop.ask()).status == outcome
    ((_, status, stored, _),) = await shop.rows()
    assert (status, stored) == (None, None)
    done = await shop.ask()
    assert done.status == 201
    assert len(set(shop.asked)) == 1
    assert len(shop.asked) == 2
    assert await shop.ask() == Answer(201, done.body, None)
    assert len(shop.published.told) == 1, "it was begun once"


async def test_another_command_is_refused_before_and_after_the_answer(shop: Shop) -> None:
    shop.answers = [202]
    for _ in range(2):
        await shop.ask()
        with pytest.raises(IdempotencyMismatch):
            await shop.ask(a=2)
    assert len(set(shop.asked)) == 1


async def test_a_repeat_during_the_call_carries_it_on_and_one_answer_is_kept(shop: Shop) -> None:
    shop.go.clear()
    first = asyncio.create_task(shop.ask())
    await shop.entered.wait()
    shop.entered.clear()
    second = asyncio.create_task(shop.ask())
    await shop.entered.wait()
    with pytest.raises(IdempotencyMismatch):
        await shop.ask(a=2)
    shop.go.set()
    one, other = await first, await second
    assert (one.status, one.body) == (other.status, other.body)
    assert len(shop.asked) == 2
    assert len(set(shop.asked)) == 1


async def test_a_first_transaction_that_runs_is_a_conflict(shop: Shop, database: Database) -> None:
    async with database.transaction() as tx:
        await _hold(tx, (SHOP.who, "buy", "k1"))
        with pytest.raises(Conflict):
            await shop.ask()
    assert (await shop.ask()).status == 201


async def test_who_may_not_ask_hears_nothing_of_a_stored_answer(shop: Shop) -> None:
    await shop.ask()
    shop.permitted = False
    for key in ("k1", "k2", None):
        with pytest.raises(NotFound):
            await shop.ask(key)
    assert len(shop.asked) == 1


async def test_without_a_key_each_is_a_new_one(shop: Shop) -> None:
    bodies = [json.loads((await shop.ask(key=None)).body)["id"] for _ in range(2)]
    assert len(set(bodies)) == 2
    assert await shop.rows() == []


async def test_no_key_is_no_key(shop: Shop) -> None:
    for key in ("", " a", "ü", "a" * 256):
        with pytest.raises(Invalid):
            await shop.ask(key)
    assert shop.asked == []
