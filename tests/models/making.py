"""Plain orders and actors, and strategies that draw them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from models.order import Agent, Fulfilment, Line, Order, PaymentMethod, PaymentSummary, Status, Totals, payment_status
from models.user import Actor, Role, Scope

ORDER_ID = "11111111-2222-4333-8444-555555555555"
OTHER_ID = "99999999-2222-4333-8444-555555555555"
AT = "2026-11-21T09:30:00.125Z"


def actor(role: Role, sub: str = "somebody", **more: Any) -> Actor:
    return Actor(sub=sub, role=role, exp=2e9, **more)


PAY_GUEST = actor(Role.GUEST, "link:1", orders=frozenset({ORDER_ID}), scope=Scope.PAY)
TRACK_GUEST = actor(Role.GUEST, "link:2", orders=frozenset({ORDER_ID}), scope=Scope.TRACK)
ACTORS = [*(actor(role) for role in Role if role is not Role.GUEST), PAY_GUEST, TRACK_GUEST]
"""One of every kind, each of whom reaches ORDER_ID as far as its token goes."""


def order(
    *,
    fulfilment: Fulfilment = Fulfilment.DELIVERY,
    status: Status = Status.PENDING,
    method: PaymentMethod = PaymentMethod.LATER,
    total: int = 25_200,
    paid: int = 0,
    agent: Agent | None = None,
    **more: Any,
) -> Order:
    due = 0 if status is Status.CANCELLED else total - paid
    given: dict[str, Any] = {
        "id": ORDER_ID,
        "number": "1001",
        "fulfilment": fulfilment,
        "status": status,
        "seq": 1,
        "currency": "INR",
        "items": [
            Line(
                line_id="1",
                name="Masala dosa",
                quantity=1,
                unit_price=total,
                discount=0,
                tax_rate_bp=0,
                tax=0,
                total=total,
                returned=0,
                refunded=0,
            )
        ],
        "totals": Totals(items=total, discount=0, delivery=0, tax=0, rounding=0, total=total),
        "payment": PaymentSummary(method=method, status=payment_status(total, paid, 0), due=due, paid=paid, refunded=0),
        "created_at": AT,
        "updated_at": AT,
        "agent": agent,
        **more,
    }
    return Order(**given)


people = st.sampled_from(["c1", "c2", "a1", "a2"])
claims = st.none() | st.frozensets(st.sampled_from([ORDER_ID, OTHER_ID]))


@st.composite
def actors(draw: st.DrawFn) -> Actor:
    """Anybody whose token was accepted."""
    role = draw(st.sampled_from(Role))
    scope = draw(st.sampled_from(Scope)) if role is Role.GUEST else None
    return actor(role, draw(people), orders=draw(claims), scope=scope)
