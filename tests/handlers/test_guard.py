"""The guards inside the statements say what the rules of `Order` say, for every kind of order and caller."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from handlers import orders
from handlers.orders import _move
from models.errors import Refused
from models.order import Fulfilment, Order, PaymentMethod, Status
from models.user import Actor, Role, Scope
from tests.handlers.desk import AGENT, CUSTOMER, SERVICE, STAFF, Desk, command
from tests.models.making import actor

SUMS = ((0, 0), (500, 0), (500, 499), (500, 500))
"""(total, paid): free, unpaid, nearly paid, paid."""

PLACE_ONE_OF_EACH = """
with kinds as (
    select gen_random_uuid() as id, f as fulfilment, s as status, m as method, sums.total, sums.paid
    from unnest($1::text[]) f, unnest($2::text[]) s, unnest($3::text[]) m,
        unnest($4::bigint[], $5::bigint[]) as sums(total, paid)
), placed as (
    insert into orders (id, customer_id, agent_id, fulfilment, status, seq, currency, payment_method, items_total, tax,
        total, paid, created_at, updated_at)
    select id, 'c1', 'a1', fulfilment, status, 1, 'INR', method, total, 0, total, paid, now(), now() from kinds
    returning id
)
insert into order_lines (order_id, position, name, quantity, unit_price, tax_rate_bp, tax, total)
select id, 1, 'Dosa', 1, 0, 0, 0, 0 from placed"""


class _Undone(Exception):
    """Ends a transaction that only tried something."""


def requests() -> Iterator[tuple[Actor, Status, bool]]:
    """(caller, target, override). Staff, services and admins share one guard: tests/models/test_moves.py."""
    guests = [actor(Role.GUEST, "link:1", scope=scope) for scope in Scope]
    for by, target in itertools.product((STAFF, AGENT, CUSTOMER, *guests), Status):
        yield by, target, False
        if target is Status.DELIVERED:
            yield by, target, True


def said(refusal: Refused) -> str:
    return f"{refusal.code} {sorted(refusal.fields.items())}"


async def one_of_each(desk: Desk) -> list[Order]:
    sums = [[total for total, _ in SUMS], [paid for _, paid in SUMS]]
    await desk.fetch(PLACE_ONE_OF_EACH, list(Fulfilment), list(Status), list(PaymentMethod), *sums)
    return list((await desk.orders()).values())


def is_plain(kind: Order) -> bool:
    """One order of each fulfilment and status: the others differ in their money only."""
    return kind.payment.method is PaymentMethod.LATER and kind.totals.total == 0


async def test_the_guard_of_an_assignment_is_the_rule(desk: Desk) -> None:
    cmd = command(orders.Assign, agentId="a2")
    for kind in filter(is_plain, await one_of_each(desk)):
        try:
            kind.check_assignable()
            rule = "assigns"
        except Refused as refusal:
            rule = said(refusal)
        try:
            after = await desk.do(orders.assign, SERVICE, kind.id, cmd)
            assert after.seq == kind.seq + 1
            guard = "assigns"
        except Refused as refusal:
            guard = said(refusal)
        assert guard == rule, kind


async def test_the_guard_of_a_payment_method_is_the_rule(desk: Desk) -> None:
    kinds = [kind for kind in await one_of_each(desk) if kind.fulfilment is Fulfilment.DELIVERY]
    passed = 0
    for by, method in itertools.product((STAFF, SERVICE, CUSTOMER, actor(Role.GUEST, scope=Scope.PAY)), PaymentMethod):
        cmd = command(orders.ChangePaymentMethod, paymentMethod=method)
        try:
            async with desk.database.transaction() as tx:
                for kind in kinds:
                    caller = by if by.role is not Role.GUEST else narrowed(by, kind)
                    try:
                        kind.check_payment_method(caller, method)
                        rule = "changes" if kind.payment.method is not method else "stays"
                    except Refused as refusal:
                        rule = said(refusal)
                    try:
                        after = await orders.change_payment_method(tx, caller, kind.id, cmd)
                        guard = "changes" if after.seq == kind.seq + 1 else "stays"
                        passed += guard == "changes"
                    except Refused as refusal:
                        guard = said(refusal)
                    assert guard == rule, (by.role, kind, method)
                raise _Undone
        except _Undone:
            pass
    assert passed > 40


async def test_the_guard_of_a_move_is_the_rule(desk: Desk) -> None:
    kinds = await one_of_each(desk)
    assert len(kinds) == len(Fulfilment) * len(Status) * len(PaymentMethod) * len(SUMS)
    one_sum_each = [kind for kind in kinds if is_plain(kind)]
    disagreements: list[object] = []
    passed = 0
    for by, target, override in requests():
        # only these two moves look at the money
        asked = kinds if target in (Status.CONFIRMED, Status.DELIVERED) else one_sum_each
        try:
            async with desk.database.transaction() as tx:
                for kind in asked:
                    caller = by if by.role is not Role.GUEST else narrowed(by, kind)
                    try:
                        kind.check_move(caller, target, override)
                        rule = "moves"
                    except Refused as refusal:
                        rule = said(refusal)
                    try:
                        after = await _move(tx, caller, kind.id, target, None, override)
                        assert after.status is target
                        guard = "moves"
                        passed += 1
                    except Refused as refusal:
                        guard = said(refusal)
                    if guard != rule:
                        disagreements.append((by.role, by.scope, kind, target, override, rule, guard))
                raise _Undone
        except _Undone:
            pass
    assert disagreements == []
    assert passed > 250


def narrowed(guest: Actor, order: Order) -> Actor:
    return actor(Role.GUEST, guest.sub, scope=guest.scope, orders=frozenset({order.id}))
