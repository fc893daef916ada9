"""Several writers on one order: the changes line up, everybody gets a truthful answer, and no number is skipped."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest

from handlers import orders
from models.errors import Refused
from models.event import Event, Type
from models.order import MOVES, Order, Status
from models.user import Actor
from server.db import Database
from tests.handlers.desk import ADMIN, AGENT, CUSTOMER, SERVICE, STAFF, Desk, Verb, command, placing, replay, unplaced

WRITERS = 8
SEEDS = range(8)

Asked = tuple[Verb, Actor, Any]


def to(status: str) -> orders.ChangeStatus:
    return command(orders.ChangeStatus, status=status)


async def together(desk: Desk, order_id: str, asked: Sequence[Asked]) -> list[Order | Refused]:
    """Carry out all of it at once; what each caller was answered. Anything but an order or a refusal fails."""

    async def one(verb: Verb, by: Actor, cmd: Any) -> Order | Refused:
        try:
            done: Order = await desk.do(verb, by, order_id, cmd)
        except Refused as refusal:
            return refusal
        return done

    return await asyncio.gather(*(one(*each) for each in asked))


def check_chain(log: Sequence[Event]) -> None:
    """Numbers without a hole; every status follows the one before it; the short events follow theirs."""
    assert [one.seq for one in log] == list(range(1, len(log) + 1))
    moves = [one for one in log if one.type == Type.STATUS]
    for before, after in itertools.pairwise(moves):
        assert after.data["previousStatus"] == before.data["status"]
    named = {Type.OUT_FOR_DELIVERY: "out_for_delivery", Type.DELIVERED: "delivered"}
    for before, after in itertools.pairwise(log):
        if after.type in named:
            assert before.data.get("status") == named[after.type]


async def check_answers(desk: Desk, order_id: str, answers: Sequence[Order | Refused]) -> None:
    """Whoever was told that the change is made was shown the order as it stood right after that change."""
    log = await desk.log(order_id)
    check_chain(log)
    copy = unplaced((await desk.orders())[order_id])
    stages = {0: copy}
    for one in log:
        copy = stages[one.seq] = copy.apply(one)
    for answer in answers:
        if isinstance(answer, Order):
            assert answer == stages[answer.seq]


async def test_of_many_who_confirm_one_wins_and_the_others_learn_why(desk: Desk) -> None:
    order = await desk.place()
    async with replay(desk) as told:
        answers = await together(desk, order.id, [(orders.change_status, STAFF, to("confirmed"))] * WRITERS)
    won = [answer for answer in answers if isinstance(answer, Order)]
    lost = [answer for answer in answers if isinstance(answer, Refused)]
    assert [(one.status, one.seq) for one in won] == [("confirmed", 2)]
    assert {(one.code, tuple(one.fields["allowed"])) for one in lost} == {  # type: ignore[arg-type]
        ("illegal_move", ("preparing", "cancelled"))
    }
    assert len(told[order.id]) == 1
    await check_answers(desk, order.id, answers)


async def test_confirm_and_cancel_end_in_one_of_the_two_orders_of_events(desk: Desk) -> None:
    for _ in range(10):
        order = await desk.place()
        async with replay(desk):
            confirmed, cancelled = await together(
                desk,
                order.id,
                [
                    (orders.change_status, STAFF, to("confirmed")),
                    (orders.cancel, CUSTOMER, command(orders.Cancel, reason="No")),
                ],
            )
        assert isinstance(cancelled, Order), "legal before and after the confirmation"
        if isinstance(confirmed, Order):
            assert (confirmed.seq, cancelled.seq) == (2, 3)
        else:
            assert (confirmed.code, confirmed.fields, cancelled.seq) == ("illegal_move", {"allowed": []}, 2)
        await check_answers(desk, order.id, [confirmed, cancelled])


async def test_the_last_of_many_assignments_stands_and_each_has_its_number(desk: Desk) -> None:
    order = await desk.place()
    async with replay(desk) as told:
        asked: list[Asked] = [
            (orders.assign, SERVICE, command(orders.Assign, agentId=f"a{number}")) for number in range(WRITERS)
        ]
        answers = await together(desk, order.id, asked)
    assert all(isinstance(answer, Order) for answer in answers)
    assert [one.seq for one in told[order.id]] == list(range(2, WRITERS + 2))
    (row,) = await desk.fetch("select agent_id, assignment from orders")
    assert (row["agent_id"], row["assignment"]) == (told[order.id][-1].data["agent"]["id"], WRITERS + 1)
    await check_answers(desk, order.id, answers)


async def test_the_same_assignment_from_many_is_told_once(desk: Desk) -> None:
    order = await desk.place()
    async with replay(desk) as told:
        answers = await together(
            desk, order.id, [(orders.assign, SERVICE, command(orders.Assign, agentId="a1"))] * WRITERS
        )
    assert [one.seq for one in told[order.id]] == [2]
    assert {answer.seq for answer in answers if isinstance(answer, Order)} == {2}
    await check_answers(desk, order.id, answers)


def storm(dice: random.Random) -> list[Asked]:
    """A burst of requests that mostly make sense somewhere."""
    burst: list[Asked] = []
    for _ in range(dice.randint(2, 12)):
        by = dice.choice([STAFF, ADMIN, SERVICE])
        status = dice.choice([status for status in Status if status not in ("pending", "in_progress")])
        kinds: list[Asked] = [
            (orders.change_status, by, to(status)),
            (orders.change_status, by, to(status)),
            (orders.change_status, AGENT, to(dice.choice(["out_for_delivery", "delivered", "delivery_failed"]))),
            (orders.assign, by, command(orders.Assign, agentId=dice.choice(["a1", "a2", None]))),
        ]
        if dice.random() < 0.1:
            kinds.append((orders.cancel, dice.choice([by, CUSTOMER]), command(orders.Cancel, reason="No")))
        burst.append(dice.choice(kinds))
    return burst


@pytest.mark.parametrize("seed", SEEDS)
async def test_a_storm_leaves_the_log_dense_and_the_answers_true(desk: Desk, seed: int) -> None:
    dice = random.Random(seed)
    fulfilment = dice.choice(list(MOVES))
    placed = [await desk.place(fulfilment=fulfilment) for _ in range(2)]
    answers: dict[str, list[Order | Refused]] = {order.id: [] for order in placed}
    async with replay(desk):
        for _ in range(12):
            # a nudge along the way, so that storms do not all end in the first statuses
            now = await desk.orders()
            bursts = {order.id: storm(dice) for order in placed}
            for order_id, burst in bursts.items():
                onward = [s for s in MOVES[fulfilment].get(now[order_id].status, ()) if s is not Status.CANCELLED]
                burst += [(orders.change_status, SERVICE, to(status)) for status in onward[:1]] * 2
            for order_id, result in zip(
                bursts, await asyncio.gather(*(together(desk, *each) for each in bursts.items())), strict=True
            ):
                answers[order_id] += result
    for order_id, given in answers.items():
        await check_answers(desk, order_id, given)
        codes = {answer.code for answer in given if isinstance(answer, Refused)}
        assert codes <= {"illegal_move", "order_closed", "not_found", "conflict"}
        assert [answer for answer in given if isinstance(answer, Order)]


@pytest.mark.parametrize("seed", SEEDS)
async def test_callers_who_hang_up_leave_no_half_change(desk: Desk, seed: int) -> None:
    """A caller that goes away while its command runs: either all of the change is there, or nothing of it."""
    dice = random.Random(seed)
    order = await desk.place()
    for _ in range(6):
        tasks = [asyncio.create_task(together(desk, order.id, [one])) for one in storm(dice)]
        for task in tasks:
            for _ in range(dice.randint(0, 3)):
                await asyncio.sleep(0)  # let them get a step further
            if dice.random() < 0.5:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    # what was told to nobody is in the table all the same: the relay tells it
    log = await desk.log(order.id)
    check_chain(log)
    after = (await desk.orders())[order.id]
    copy = unplaced(after)
    for one in log:
        copy = copy.apply(one)
    assert copy == after


async def test_a_reference_is_given_once_however_many_ask(desk: Desk) -> None:
    async def place() -> Order | Refused:
        try:
            return await desk.place(reference="shop-1")
        except Refused as refusal:
            return refusal

    async with replay(desk):
        answers = await asyncio.gather(*(place() for _ in range(WRITERS)))
    (won,) = [answer for answer in answers if isinstance(answer, Order)]
    assert {answer.code for answer in answers if isinstance(answer, Refused)} == {"conflict"}
    assert list(await desk.orders()) == [won.id]


async def test_numbers_of_orders_are_unique(desk: Desk) -> None:
    placed = await asyncio.gather(*(desk.place() for _ in range(3 * WRITERS)))
    assert len({order.number for order in placed}) == len({order.id for order in placed}) == 3 * WRITERS


async def test_a_writer_waits_for_the_one_before_and_sees_what_it_left(desk: Desk, database: Database) -> None:
    """The second statement starts while the first transaction is open, and judges what that one committed."""
    order = await desk.place()
    async with database.transaction() as first:
        await orders.change_status(first, STAFF, order.id, to("confirmed"))
        late = asyncio.create_task(together(desk, order.id, [(orders.change_status, STAFF, to("preparing"))]))
        cancelling = asyncio.create_task(
            together(desk, order.id, [(orders.cancel, SERVICE, command(orders.Cancel, reason="No"))])
        )
        await _until_blocked(desk, 2)
    ((prepared,), (cancelled,)) = await asyncio.gather(late, cancelling)
    assert isinstance(cancelled, Order)
    assert isinstance(prepared, Order) or prepared.code == "illegal_move"
    check_chain(await desk.log(order.id))


class _GivenUp(Exception):
    pass


async def test_a_writer_whose_predecessor_gave_up_judges_the_old_order(desk: Desk, database: Database) -> None:
    order = await desk.place()
    confirm: Asked = (orders.change_status, STAFF, to("confirmed"))
    try:
        async with database.transaction() as first:
            await orders.change_status(first, STAFF, order.id, to("confirmed"))
            late = asyncio.create_task(together(desk, order.id, [confirm]))
            await _until_blocked(desk, 1)
            raise _GivenUp
    except _GivenUp:
        pass
    (answer,) = await late
    assert isinstance(answer, Order)
    assert (answer.status, answer.seq) == ("confirmed", 2)
    check_chain(await desk.log(order.id))


async def _until_blocked(desk: Desk, count: int) -> None:
    """Returns when so many statements wait for a lock."""
    waiting = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    async with asyncio.timeout(10):
        while (await desk.fetch(waiting))[0]["count"] < count:
            pass


async def test_placing_twice_is_two_orders(desk: Desk) -> None:
    first, second = await desk.do(orders.place, SERVICE, placing()), await desk.do(orders.place, SERVICE, placing())
    assert first.id != second.id
