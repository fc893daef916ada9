"""Who sees which order: the rule, and the same rule as the parameters of a SQL guard."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import Forbidden, NotFound
from models.order import may_see, require_role, sight
from models.user import Actor, Role, Scope
from tests.models.making import ORDER_ID, OTHER_ID, actor, actors, people

NARROWED = frozenset({ORDER_ID})
AWAY = frozenset({OTHER_ID})


def guard(by: Actor, order_id: str, customer_id: str | None, agent_id: str | None) -> bool:
    """What Postgres makes of `$all or customer_id = $customer or agent_id = $agent`, where null equals nothing."""
    try:
        seen = sight(by, order_id)
    except NotFound:
        return False
    return (
        seen.all
        or (seen.customer is not None and seen.customer == customer_id)
        or (seen.agent is not None and seen.agent == agent_id)
    )


@given(actors(), st.sampled_from([ORDER_ID, OTHER_ID]), st.none() | people, st.none() | people)
def test_the_guard_is_the_rule(by: Actor, order_id: str, customer_id: str | None, agent_id: str | None) -> None:
    assert guard(by, order_id, customer_id, agent_id) == may_see(by, order_id, customer_id, agent_id)


@pytest.mark.parametrize(
    ("by", "sees"),
    [
        (actor(Role.STAFF), True),
        (actor(Role.ADMIN), True),
        (actor(Role.SERVICE), True),
        (actor(Role.SERVICE, orders=NARROWED), True),
        (actor(Role.SERVICE, orders=AWAY), False),
        (actor(Role.STAFF, orders=frozenset()), False),
        (actor(Role.CUSTOMER, "c1"), True),
        (actor(Role.CUSTOMER, "c1", orders=NARROWED), True),
        (actor(Role.CUSTOMER, "c1", orders=AWAY), False),
        (actor(Role.CUSTOMER, "c2"), False),
        (actor(Role.CUSTOMER, "c2", orders=NARROWED), False),
        (actor(Role.CUSTOMER, "a1"), False),
        (actor(Role.AGENT, "a1"), True),
        (actor(Role.AGENT, "a1", orders=AWAY), False),
        (actor(Role.AGENT, "a2"), False),
        (actor(Role.AGENT, "a2", orders=NARROWED), False),
        (actor(Role.AGENT, "c1"), False),
        (actor(Role.GUEST, "link:1", orders=NARROWED, scope=Scope.TRACK), True),
        (actor(Role.GUEST, "link:1", orders=NARROWED, scope=Scope.PAY), True),
        (actor(Role.GUEST, "link:1", orders=AWAY, scope=Scope.PAY), False),
        (actor(Role.GUEST, "link:1", scope=Scope.PAY), False),
        (actor(Role.GUEST, "c1", scope=Scope.PAY), False),
    ],
)
def test_who_sees_the_order_of_customer_c1_and_agent_a1(by: Actor, sees: bool) -> None:
    assert may_see(by, ORDER_ID, "c1", "a1") is sees
    assert guard(by, ORDER_ID, "c1", "a1") is sees


@given(actors(), st.none() | people, st.none() | people)
def test_a_claim_narrows_and_never_widens_but_for_guests(
    by: Actor, customer_id: str | None, agent_id: str | None
) -> None:
    free = actor(by.role, by.sub, scope=by.scope)
    if by.role is not Role.GUEST and may_see(by, ORDER_ID, customer_id, agent_id):
        assert may_see(free, ORDER_ID, customer_id, agent_id)
    if by.orders is not None and ORDER_ID not in by.orders:
        assert not may_see(by, ORDER_ID, customer_id, agent_id)


def test_a_role_that_never_may_is_forbidden() -> None:
    require_role(actor(Role.STAFF), {Role.STAFF}, "try")
    with pytest.raises(Forbidden):
        require_role(actor(Role.AGENT), {Role.STAFF, Role.ADMIN}, "try")


def test_admin_may_all_that_staff_may_and_only_a_guest_without_pay_tracks_only() -> None:
    assert [role for role in Role if actor(role).is_staff] == [Role.STAFF, Role.ADMIN]
    tracking = [(role, scope) for role in Role for scope in (None, *Scope) if actor(role, scope=scope).tracks_only]
    assert tracking == [(Role.GUEST, None), (Role.GUEST, Scope.TRACK)]
