"""Where an order may go and who may move it, against the contract's rows written out a second time."""

from __future__ import annotations

import datetime as dt
import itertools
import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import IllegalMove, OrderClosed, PaymentRequired, Refused
from models.event import Type, event
from models.order import FINAL, LOCATABLE, MOVES, Fulfilment, Order, PaymentMethod, Status, sources
from models.user import Actor, Role
from tests.models.making import ACTORS, ORDER_ID, PAY_GUEST, TRACK_GUEST, actor, actors, order

CONTRACT = """
delivery         pending → confirmed → preparing → ready → out_for_delivery → delivered
delivery         out_for_delivery → delivery_failed → out_for_delivery
delivery         delivery_failed → cancelled
pickup dine_in   pending → confirmed → preparing → ready → delivered
service          pending → confirmed → in_progress → delivered
delivery pickup dine_in           preparing → cancelled
delivery pickup dine_in           ready → cancelled
delivery pickup dine_in service   pending → cancelled
delivery pickup dine_in service   confirmed → cancelled
delivery pickup dine_in service   delivered → return_requested → delivered
delivery pickup dine_in service   return_requested → returned
"""
"""The rows of the contract's table of moves; the settle path's `cancelled → confirmed` is nobody's to ask for."""

AGENTS = """
ready → out_for_delivery → delivered
out_for_delivery → delivery_failed
"""
OWNERS = """
pending → cancelled
confirmed → cancelled
"""


def steps(chain: str) -> set[tuple[str, str]]:
    return set(itertools.pairwise(chain.split(" → ")))


def rows() -> Iterator[tuple[str, str, str]]:
    for line in CONTRACT.strip().splitlines():
        names, chain = line.split("   ", 1) if "   " in line else line.split(" ", 1)
        for fulfilment in names.split():
            for source, target in steps(chain.strip()):
                yield fulfilment, source, target


TABLE = set(rows())
AGENT_STEPS = set().union(*map(steps, AGENTS.strip().splitlines()))
OWNER_STEPS = set().union(*map(steps, OWNERS.strip().splitlines()))


def answer(asked: Order, by: Actor, target: Status, override: bool) -> str:
    """What the contract says to this request."""
    if (asked.fulfilment, asked.status, target) not in TABLE:
        return "illegal_move"
    if target == "confirmed" and asked.payment.method == "online":
        return "payment_required"  # whoever asks
    step = (asked.status, target)
    if by.role is Role.AGENT and step not in AGENT_STEPS:
        return "illegal_move"
    if (by.role is Role.CUSTOMER or by is PAY_GUEST) and step not in OWNER_STEPS:
        return "illegal_move"
    if by is TRACK_GUEST:
        return "illegal_move"
    handed_over = target == "delivered" and asked.status != "return_requested"
    if handed_over and asked.payment.method == "cash" and asked.payment.due > 0 and not override:
        return "payment_required"
    return "ok"


def check(asked: Order, by: Actor, target: Status, override: bool) -> str:
    try:
        asked.check_move(by, target, override)
    except Refused as refusal:
        return refusal.code
    return "ok"


def every_order() -> Iterator[Order]:
    for fulfilment, status, method in itertools.product(Fulfilment, Status, PaymentMethod):
        for total, paid in ((0, 0), (500, 0), (500, 200), (500, 500)):
            yield order(fulfilment=fulfilment, status=status, method=method, total=total, paid=paid)


def test_the_table_has_the_contracts_rows_and_no_others() -> None:
    ours = {
        (fulfilment, source, target)
        for fulfilment, moves in MOVES.items()
        for source, targets in moves.items()
        for target in targets
    }
    assert ours == TABLE
    assert set(MOVES) == set(Fulfilment)


def test_every_request_gets_the_contracts_answer() -> None:
    for asked in every_order():
        for by, target, override in itertools.product(ACTORS, Status, (False, True)):
            got = check(asked, by, target, override)
            assert got == answer(asked, by, target, override), (asked, by, target, override)


def test_allowed_is_what_the_caller_may_ask_for_now() -> None:
    for asked in every_order():
        for by in ACTORS:
            legal = {target for target in Status if check(asked, by, target, by.is_staff) == "ok"}
            allowed = asked.allowed(by)
            assert set(allowed) == legal, (asked, by)
            assert len(allowed) == len(legal)


def test_a_refusal_names_what_is_allowed_and_what_is_due() -> None:
    with pytest.raises(IllegalMove) as illegal:
        order(status=Status.CONFIRMED).check_move(actor(Role.STAFF), Status.DELIVERED, False)
    assert illegal.value.fields == {"allowed": ["preparing", "cancelled"]}
    with pytest.raises(PaymentRequired) as unpaid:
        order(method=PaymentMethod.ONLINE, total=500, paid=200).check_move(actor(Role.SERVICE), Status.CONFIRMED, False)
    assert unpaid.value.fields == {"due": 300}
    assert order(method=PaymentMethod.ONLINE).allowed(actor(Role.STAFF)) == ["cancelled"]


def test_the_guard_of_the_statement_lists_the_table_for_its_caller() -> None:
    for by, target in itertools.product(ACTORS, Status):
        listed = sources(by, target)
        wanted = {
            f"{fulfilment}:{source}"
            for fulfilment, source, end in TABLE
            if end == target and check_role(by, source, target)
        }
        assert set(listed) == wanted, (by, target)
        assert len(listed) == len(wanted)


def check_role(by: Actor, source: str, target: str) -> bool:
    if by.role in (Role.STAFF, Role.ADMIN, Role.SERVICE):
        return True
    if by.role is Role.AGENT:
        return (source, target) in AGENT_STEPS
    return by is not TRACK_GUEST and (source, target) in OWNER_STEPS


def test_nobody_revives_a_cancelled_order_or_moves_a_returned_one() -> None:
    for by, fulfilment, status in itertools.product(ACTORS, Fulfilment, (Status.CANCELLED, Status.RETURNED)):
        assert order(fulfilment=fulfilment, status=status).allowed(by) == []


@given(
    st.sampled_from(Fulfilment), st.sampled_from(PaymentMethod), st.lists(st.tuples(actors(), st.sampled_from(Status)))
)
def test_no_walk_leaves_the_table(
    fulfilment: Fulfilment, method: PaymentMethod, asked: list[tuple[Actor, Status]]
) -> None:
    at = order(fulfilment=fulfilment, method=method, total=0)
    walked: list[Status] = [at.status]
    for by, target in asked:
        if check(at, by, target, override=False) != "ok":
            continue
        body = json.dumps({"status": target, "previousStatus": at.status})
        at = at.apply(event(ORDER_ID, at.seq + 1, Type.STATUS, dt.datetime(2026, 11, 21, tzinfo=dt.UTC), body))
        walked.append(at.status)
    assert {(fulfilment, *step) for step in itertools.pairwise(walked)} <= TABLE
    ended = [position for position, status in enumerate(walked) if status in FINAL]
    if ended:
        assert not LOCATABLE.intersection(walked[ended[0] :]), "positions flow again after a final status"


def test_positions_flow_until_a_final_status_and_never_again() -> None:
    assert {str(status) for status in FINAL} == {"delivered", "cancelled", "returned"}
    after, reached = set(FINAL), set[Status]()
    while after:
        reached |= after
        after = {target for moves in MOVES.values() for source in after for target in moves.get(source, ())} - reached
    assert set(Status) - reached == LOCATABLE


@pytest.mark.parametrize("status", Status)
def test_an_agent_is_assigned_in_every_status_that_is_not_final(status: Status) -> None:
    if status in ("delivered", "cancelled", "returned"):
        with pytest.raises(OrderClosed):
            order(status=status).check_assignable()
    else:
        order(status=status).check_assignable()
