"""Links and revocations: what a link grants, how long, and how it ends."""

from __future__ import annotations

import datetime as dt
import hashlib
import itertools
import uuid
from typing import Any

import pytest

from handlers import links, orders, users
from models.order import Order
from models.user import Actor, Role, Scope
from tests.handlers.desk import ADMIN, CUSTOMER, SERVICE, STAFF, Desk, command, guest
from tests.handlers.test_place import pointer
from tests.models.making import actor

NOW = dt.datetime(2026, 11, 21, 9, 30, tzinfo=dt.UTC)
TTL_S, TTL_MAX_S = 60, 600


def digest(link_id: str) -> bytes:
    return hashlib.sha256(link_id.encode()).digest()


async def link(desk: Desk, order: Order, by: Actor = CUSTOMER, scope: Scope = Scope.TRACK, **asked: Any) -> links.Link:
    created: links.Link = await desk.do(
        links.create_link,
        by,
        order.id,
        command(links.CreateLink, **asked),
        scope=scope,
        digest=digest,
        ttl_s=TTL_S,
        ttl_max_s=TTL_MAX_S,
    )
    return created


def at(desk: Desk, seconds: float) -> None:
    desk.database.clock = lambda: NOW + dt.timedelta(seconds=seconds)


async def follow(desk: Desk, link_id: str) -> Any:
    return await desk.do(links.follow_link, digest(link_id))


async def test_a_link_grants_tracking_of_one_order_until_it_ends(desk: Desk) -> None:
    at(desk, 0)
    order = await desk.place()
    created = await link(desk, order)
    assert (created.order_id, created.scope, created.expires_at) == (order.id, "track", "2026-11-21T09:31:00.000Z")
    at(desk, 59.999)
    grant = await follow(desk, created.id)
    assert (grant.link_id, grant.order_id, grant.scope) == (created.id, order.id, Scope.TRACK)
    assert grant.expires_at == NOW + dt.timedelta(seconds=TTL_S)
    at(desk, 60)
    assert (await desk.refused(links.follow_link, digest(created.id))).code == "link_expired"


async def test_a_payment_link_grants_paying(desk: Desk) -> None:
    order = await desk.place()
    created = await link(desk, order, STAFF, scope=Scope.PAY)
    assert created.scope == "pay"
    assert (await follow(desk, created.id)).scope is Scope.PAY
    # its customer may not ask for money, but may end whatever opens the order
    assert await desk.do(links.end_link, CUSTOMER, order.id, created.id) == created.id
    assert (await desk.refused(links.follow_link, digest(created.id))).code == "link_expired"


async def test_the_table_holds_no_secret(desk: Desk) -> None:
    created = await link(desk, await desk.place())
    ((stored,),) = await desk.fetch("select secret_digest from links")
    assert stored == digest(created.id)


async def test_an_unknown_secret_is_not_found(desk: Desk) -> None:
    await link(desk, await desk.place())
    for unknown in (b"", b"\0" * 32, digest(str(uuid.uuid4()))):
        assert (await desk.refused(links.follow_link, unknown)).code == "not_found"


@pytest.mark.parametrize(("asked", "lives"), [({}, TTL_S), ({"ttlS": 1}, 1), ({"ttlS": TTL_MAX_S}, TTL_MAX_S)])
async def test_the_caller_may_ask_for_a_life(desk: Desk, asked: dict[str, Any], lives: int) -> None:
    at(desk, 0)
    created = await link(desk, await desk.place(), **asked)
    assert dt.datetime.fromisoformat(created.expires_at) == NOW + dt.timedelta(seconds=lives)


async def test_a_life_beyond_the_limit_is_invalid(desk: Desk) -> None:
    order = await desk.place()
    cmd = command(links.CreateLink, ttlS=TTL_MAX_S + 1)
    refusal = await desk.refused(
        links.create_link, SERVICE, order.id, cmd, scope=Scope.PAY, digest=digest, ttl_s=TTL_S, ttl_max_s=TTL_MAX_S
    )
    assert pointer(refusal) == "/ttlS"
    assert (await desk.tables())["links"] == []


async def test_ending_a_link_revokes_what_it_was_exchanged_for(desk: Desk) -> None:
    at(desk, 0)
    order = await desk.place()
    ended, kept = await link(desk, order), await link(desk, order)
    assert await desk.do(links.end_link, CUSTOMER, order.id, ended.id) == ended.id
    assert (await desk.refused(links.follow_link, digest(ended.id))).code == "link_expired"
    assert (await follow(desk, kept.id)).link_id == kept.id
    revoked = await desk.do(users.revocations)
    assert revoked == [users.Revoked("jti", ended.id, NOW.timestamp())]
    at(desk, 30)
    assert await desk.do(links.end_link, STAFF, order.id, ended.id) == ended.id, "ended again: the same"
    assert await desk.do(users.revocations) == revoked


async def test_a_link_is_ended_through_its_own_order_only(desk: Desk) -> None:
    mine, others = await desk.place(), await desk.place(customerId="c2")
    created = await link(desk, others, SERVICE)
    before = await desk.tables()
    for by, order_id, link_id in (
        (CUSTOMER, mine.id, created.id),
        (CUSTOMER, others.id, created.id),
        (SERVICE, mine.id, created.id),
        (SERVICE, others.id, str(uuid.uuid4())),
        (SERVICE, others.id, "no-link"),
        (SERVICE, others.id, created.id.upper()),
    ):
        assert (await desk.refused(links.end_link, by, order_id, link_id)).code == "not_found"
    assert await desk.tables() == before


async def test_a_guest_gets_no_further_links(desk: Desk) -> None:
    order = await desk.place()
    for scope, asked in itertools.product(Scope, Scope):
        refusal = await desk.refused(
            links.create_link,
            guest(order.id, scope),
            order.id,
            links.CreateLink(),
            scope=asked,
            digest=digest,
            ttl_s=1,
            ttl_max_s=1,
        )
        assert refusal.code == "forbidden"


async def test_revoking_names_a_token_or_a_person(desk: Desk) -> None:
    at(desk, 0)
    assert await desk.do(users.revoke, ADMIN, command(users.Revoke, jti="j1")) == users.Revoked(
        "jti", "j1", NOW.timestamp()
    )
    for asked in (dict[str, str](), {"jti": "j1", "sub": "c1"}):
        assert pointer(await desk.refused(users.revoke, SERVICE, command(users.Revoke, **asked))) == "/jti"
    for by in (STAFF, CUSTOMER, actor(Role.AGENT), actor(Role.GUEST, scope=Scope.PAY)):
        assert (await desk.refused(users.revoke, by, command(users.Revoke, sub="c1"))).code == "forbidden"
    assert len(await desk.do(users.revocations)) == 1


async def test_a_later_revocation_of_a_person_counts_and_an_earlier_one_never_takes_back(desk: Desk) -> None:
    for seconds, stands in ((10, 10), (50, 50), (20, 50)):
        at(desk, seconds)
        await desk.do(users.revoke, ADMIN, command(users.Revoke, sub="c1"))
        (revoked,) = await desk.do(users.revocations)
        assert revoked.at == NOW.timestamp() + stands


async def test_orders_are_read_and_ended_by_links_in_no_other_way(desk: Desk) -> None:
    """A guest's claim is the grant: an order that the claim does not name is not there."""
    mine, others = await desk.place(), await desk.place()
    watcher = guest(mine.id, Scope.TRACK)
    assert (await desk.do(orders.read, watcher, mine.id)).id == mine.id
    assert (await desk.refused(orders.read, watcher, others.id)).code == "not_found"
