"""Who gets what answer: every role, on an order of its own and on somebody else's, through every verb."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import pytest

from handlers import links, orders, tracking, users
from models.errors import Refused
from models.order import Order
from models.user import Actor, Role, Scope
from tests.handlers.desk import AGENT, CUSTOMER, SERVICE, Desk, Verb, command, guest, placing
from tests.handlers.test_replay import verbs
from tests.models.making import actor

OK, FORBIDDEN, NOT_FOUND = "ok", "forbidden", "not_found"


class Call(NamedTuple):
    """One verb on one order, and the roles that the contract lets ask for it."""

    verb: Verb
    run: Callable[[Desk, Actor, str], Awaitable[Any]]
    roles: str
    """C owning customer, A assigned agent, Gt and Gp guests, S staff, X admin, V service."""


async def _end_link(desk: Desk, by: Actor, order_id: str) -> Any:
    # the link of this very order, so that only the caller decides
    ids = {str(row["order_id"]): str(row["id"]) for row in await desk.fetch("select id, order_id from links")}
    link_id = ids.get(order_id, str(uuid.uuid4()))
    return await desk.do(links.end_link, by, order_id, link_id)


async def create_link(desk: Desk, by: Actor, order_id: str, scope: Scope = Scope.TRACK) -> Any:
    return await desk.do(
        links.create_link,
        by,
        order_id,
        command(links.CreateLink),
        scope=scope,
        digest=lambda link_id: link_id.encode(),
        ttl_s=60,
        ttl_max_s=600,
    )


ON_AN_ORDER = [
    Call(orders.read, lambda desk, by, key: desk.do(orders.read, by, key), "C A Gt Gp S X V"),
    Call(orders.events, lambda desk, by, key: desk.do(orders.events, by, key), "C A Gt Gp S X V"),
    Call(tracking.permit, lambda desk, by, key: desk.ask(tracking.permit, by, key, None), "C A Gt Gp S X V"),
    Call(tracking.permit_count, lambda desk, by, key: desk.do(tracking.permit_count, by, key), "A S X V"),
    Call(tracking.snapshot, lambda desk, by, key: desk.ask(tracking.snapshot, by, key, 0), "C A Gt Gp S X V"),
    Call(tracking.assignment, lambda desk, by, key: desk.do(tracking.assignment, by, key), "A"),
    Call(
        orders.change_status,
        lambda desk, by, key: desk.do(
            orders.change_status, by, key, command(orders.ChangeStatus, status="out_for_delivery")
        ),
        "A S X V",
    ),
    Call(
        orders.cancel,
        lambda desk, by, key: desk.do(orders.cancel, by, key, command(orders.Cancel, reason="No")),
        "C Gp S X V",
    ),
    Call(
        orders.change_payment_method,
        lambda desk, by, key: desk.do(
            orders.change_payment_method, by, key, command(orders.ChangePaymentMethod, paymentMethod="cash")
        ),
        "C Gp S X V",
    ),
    Call(
        orders.before_assign,
        lambda desk, by, key: desk.do(orders.before_assign, by, key, command(orders.Assign, agentId="a9")),
        "S X V",
    ),
    Call(
        orders.assign,
        lambda desk, by, key: desk.do(orders.assign, by, key, command(orders.Assign, agentId="a9")),
        "S X V",
    ),
    Call(links.create_link, create_link, "C S X V"),
    Call(links.create_link, lambda desk, by, key: create_link(desk, by, key, Scope.PAY), "S X V"),
    Call(links.end_link, _end_link, "C S X V"),
]


class Person(NamedTuple):
    role: str
    actor: Callable[[str], Actor]
    sees: bool
    """Whether the order is this person's."""


def plain(role: Role, sub: str, *, sees: bool, letter: str) -> list[Person]:
    """Somebody as they are, with a token that is narrowed to this order, and with one narrowed to another."""
    away = frozenset({str(uuid.uuid4())})
    return [
        Person(letter, lambda key: actor(role, sub), sees),
        Person(letter, lambda key: actor(role, sub, orders=frozenset({key})), sees),
        Person(letter, lambda key: actor(role, sub, orders=away), sees=False),
        Person(letter, lambda key: actor(role, sub, orders=frozenset()), sees=False),
    ]


PEOPLE = [
    *plain(Role.CUSTOMER, "c1", sees=True, letter="C"),
    *plain(Role.CUSTOMER, "c2", sees=False, letter="C"),
    *plain(Role.CUSTOMER, "a1", sees=False, letter="C"),
    *plain(Role.AGENT, "a1", sees=True, letter="A"),
    *plain(Role.AGENT, "a2", sees=False, letter="A"),
    *plain(Role.AGENT, "c1", sees=False, letter="A"),
    *plain(Role.STAFF, "s1", sees=True, letter="S"),
    *plain(Role.ADMIN, "x1", sees=True, letter="X"),
    *plain(Role.SERVICE, "v1", sees=True, letter="V"),
    Person("Gt", lambda key: guest(key, Scope.TRACK), sees=True),
    Person("Gp", lambda key: guest(key, Scope.PAY), sees=True),
    Person("Gt", lambda key: guest(str(uuid.uuid4()), Scope.TRACK), sees=False),
    Person("Gp", lambda key: guest(str(uuid.uuid4()), Scope.PAY), sees=False),
    Person("Gt", lambda key: actor(Role.GUEST, "c1", scope=Scope.TRACK), sees=False),
    Person("Gp", lambda key: actor(Role.GUEST, "c1", scope=Scope.PAY), sees=False),
]


async def answer(call: Call, desk: Desk, by: Actor, order_id: str) -> str:
    try:
        await call.run(desk, by, order_id)
    except Refused as refusal:
        return refusal.code
    return OK


async def ready(desk: Desk) -> Order:
    """Customer c1's order, ready, in the hands of agent a1, with a link."""
    order = await desk.place()
    await desk.move(order.id, "confirmed", "preparing", "ready")
    await create_link(desk, SERVICE, order.id)
    return await desk.assign(order.id, "a1")


@pytest.mark.parametrize("call", ON_AN_ORDER, ids=lambda call: call.verb.__name__)
async def test_every_role_on_its_own_order_and_on_anothers(desk: Desk, call: Call) -> None:
    untouched = (await ready(desk)).id
    for number, person in enumerate(PEOPLE):
        by = person.actor(untouched)
        if person.role not in call.roles.split():
            wanted = FORBIDDEN
        elif not person.sees:
            wanted = NOT_FOUND
        else:
            continue
        before = await desk.tables()
        assert await answer(call, desk, by, untouched) == wanted, (number, by)
        assert await desk.tables() == before, (number, by)
    for number, person in enumerate(PEOPLE):
        if person.role in call.roles.split() and person.sees:
            order = await ready(desk)
            got = await answer(call, desk, person.actor(order.id), order.id)
            # what customers and paying guests come too late for with a ready order is no secret
            late = {orders.cancel: "illegal_move", orders.change_payment_method: "order_closed"}
            wanted = late.get(call.verb, OK) if person.role in ("C", "Gp") else OK
            assert got == wanted, (number, person.actor(order.id))


@pytest.mark.parametrize("call", ON_AN_ORDER, ids=lambda call: call.verb.__name__)
async def test_what_does_not_exist_is_not_found(desk: Desk, call: Call) -> None:
    nowhere = str(uuid.uuid4())
    everyone = {
        "C": CUSTOMER,
        "A": AGENT,
        "V": SERVICE,
        "Gp": actor(Role.GUEST, "link:1", scope=Scope.PAY, orders=frozenset({nowhere, "", "order-7"})),
    }
    shout, braces = nowhere.upper(), "{" + nowhere + "}"
    for role, by in everyone.items():
        if role in call.roles.split():
            for name in (nowhere, shout, braces, nowhere.replace("-", ""), "order-7", "", "\0", "ü", "1' or '1'='1"):
                assert await answer(call, desk, by, name) == NOT_FOUND, (by, name)


async def test_an_order_has_one_name(desk: Desk) -> None:
    order = await desk.place()
    for name in (
        order.id.upper(),
        f"urn:uuid:{order.id}",
        f"{{{order.id}}}",
        order.id.replace("-", ""),
        f" {order.id}",
    ):
        if name != order.id:
            assert (await desk.refused(orders.read, SERVICE, name)).code == NOT_FOUND


@pytest.mark.parametrize(
    ("verb", "cmd", "allowed"),
    [
        (orders.place, placing(), "S X V"),
        (orders.quote, placing(), "S X V"),
        (orders.list_orders, command(orders.ListOrders), "C A S X V"),
        (users.revoke, command(users.Revoke, jti="j1"), "X V"),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
async def test_verbs_without_an_order_go_by_role(desk: Desk, verb: Verb, cmd: Any, allowed: str) -> None:
    letters = {
        Role.CUSTOMER: "C",
        Role.AGENT: "A",
        Role.STAFF: "S",
        Role.ADMIN: "X",
        Role.SERVICE: "V",
        Role.GUEST: "G",
    }
    for role, letter in letters.items():
        by = actor(role, "somebody", scope=Scope.PAY if role is Role.GUEST else None)
        if letter in allowed.split():
            await desk.do(verb, by, cmd)
            continue
        refusal = await desk.refused(verb, by, cmd)
        # customers may place, but nothing that can be placed yet is for them
        placing_customer = letter == "C" and verb in (orders.place, orders.quote)
        assert refusal.code == ("invalid" if placing_customer else FORBIDDEN), role


def test_every_verb_with_an_actor_is_asked() -> None:
    asked = {call.verb for call in ON_AN_ORDER} | {orders.place, orders.quote, orders.list_orders, users.revoke}
    # these have no caller: they serve the rooms, the links' secrets and the list of revocations
    assert verbs() - asked == {tracking.missed, links.follow_link, users.revocations}


async def test_only_staff_override_what_is_due(desk: Desk) -> None:
    order = await desk.place(fulfilment="pickup", paymentMethod="cash")
    await desk.move(order.id, "confirmed", "preparing", "ready")
    await desk.assign(order.id, "a1")
    handed = command(orders.ChangeStatus, status="delivered")
    forced = command(orders.ChangeStatus, status="delivered", override={"reason": "Regular"})
    for by in (AGENT, SERVICE):
        assert (await desk.refused(orders.change_status, by, order.id, forced)).code == FORBIDDEN
    refusal = await desk.refused(orders.change_status, SERVICE, order.id, handed)
    assert (refusal.code, refusal.fields) == ("payment_required", {"due": 25_200})
    after = await desk.do(orders.change_status, actor(Role.STAFF), order.id, forced)
    assert (after.status, after.status_reason) == ("delivered", "Regular")


async def test_an_agent_loses_the_order_with_the_assignment(desk: Desk) -> None:
    order = await ready(desk)
    assert (await desk.do(orders.read, AGENT, order.id)).id == order.id
    await desk.assign(order.id, "a2")
    for call in ON_AN_ORDER:
        if "A" in call.roles.split():
            assert await answer(call, desk, AGENT, order.id) == NOT_FOUND, call.verb
    await desk.assign(order.id, None)
    assert (await desk.refused(orders.read, actor(Role.AGENT, "a2"), order.id)).code == NOT_FOUND


async def test_positions_flow_from_assignment_until_a_final_status(desk: Desk) -> None:
    order = await desk.place()
    assert (await desk.refused(tracking.assignment, AGENT, order.id)).code == NOT_FOUND
    at = await desk.assign(order.id, "a1")
    for status in ("confirmed", "preparing", "ready", "out_for_delivery", "delivery_failed", "out_for_delivery"):
        assert (await desk.do(tracking.assignment, AGENT, order.id)).number == at.seq
        assert (await desk.ask(tracking.snapshot, CUSTOMER, order.id, None)).assignment == at.seq
        await desk.move(order.id, status)
    for status in ("delivered", "return_requested", "returned"):
        await desk.move(order.id, status)
        assert (await desk.refused(tracking.assignment, AGENT, order.id)).code == "order_closed"
        assert (await desk.ask(tracking.snapshot, CUSTOMER, order.id, None)).assignment == 0


async def test_a_tracking_guest_reads_the_redacted_order_only(desk: Desk) -> None:
    order = await ready(desk)
    watcher, payer = guest(order.id, Scope.TRACK), guest(order.id, Scope.PAY)
    whole = (await desk.orders())[order.id]
    assert await desk.do(orders.read, watcher, order.id) == whole.for_tracking()
    assert (await desk.ask(tracking.snapshot, watcher, order.id, 0)).order == whole.for_tracking()
    assert await desk.do(orders.read, payer, order.id) == whole
    log = await desk.log(order.id)
    for events in (
        await desk.timeline(order.id, by=watcher),
        (await desk.ask(tracking.snapshot, watcher, order.id, 0)).events,
    ):
        assert list(events) == [one.for_tracking() for one in log]
        assert b"s1" not in b"".join(one.payload for one in events)
