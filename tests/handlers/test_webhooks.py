"""The webhooks desk: stored once, tried with patience, never lost, and in the hands of staff when given up."""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from typing import Any

import msgspec
import pytest

from handlers import webhooks
from handlers.book import UnknownPayment, open_book
from handlers.context import Tx
from handlers.ports import Delivery, GatewayUnknown
from handlers.webhooks import Dismiss, ListWebhooks, Patience, Retry, Taken, Unreadable, WorkersDied
from models.errors import Conflict, Forbidden, Invalid, Malformed, NotFound, Unavailable
from models.inbox import WebhookStatus
from models.payment import News, Provider, Report, Source
from models.user import Role
from tests.handlers.desk import ADMIN, AGENT, CUSTOMER, SERVICE, STAFF, Desk, command
from tests.handlers.gateway import PlainGateway, as_gateway, said
from tests.handlers.money import Till, check_books, news
from tests.models.making import ORDER_ID, PAY_GUEST, TRACK_GUEST, actor

W = WebhookStatus
PATIENCE = Patience(attempts_max=3, retry_base_s=1, retry_max_s=600, park_s=72 * 3600, lock_wait_ms=1000)
GATEWAYS = {Provider.RAZORPAY: as_gateway(PlainGateway())}


class Clock:
    """The desk's clock, which stands still unless a test moves it."""

    def __init__(self) -> None:
        self.now = dt.datetime(2026, 11, 21, 9, 30, tzinfo=dt.UTC)

    def __call__(self) -> dt.datetime:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += dt.timedelta(seconds=seconds)


@pytest.fixture
def clock(desk: Desk) -> Clock:
    clock = desk.database.clock = Clock()
    return clock


@pytest.fixture
def till(desk: Desk) -> Till:
    return Till(desk)


class Inbox:
    """Webhooks of one desk."""

    def __init__(self, till: Till) -> None:
        self.till, self.desk = till, till.desk
        self._events = 0

    async def store(
        self,
        body: bytes,
        *,
        event_id: str | None = None,
        kind: str = "news",
        refs: tuple[str, ...] = (),
        provider: Provider = Provider.RAZORPAY,
    ) -> bool:
        self._events += 1
        delivery = Delivery(event_id=event_id or f"event-{self._events}", kind=kind, refs=refs)
        stored: bool = await self.desk.do(webhooks.store, provider, delivery, body)
        return stored

    async def about(self, name: str, report: Report = Report.CAPTURED) -> None:
        """Store news of the gateway order `name`."""
        assert await self.store(said(news(name, report)), refs=(name,))

    async def take(self, limit: int = 100) -> list[Taken]:
        taken: list[Taken] = await self.desk.do(webhooks.take, GATEWAYS, PATIENCE, limit)
        return taken

    async def attempt(self, taken: Taken, error: Exception | None = None) -> str:
        """Try one, as a worker does; with `error`, that goes wrong. What became of it."""
        try:
            webhooks.check_attempts(taken, PATIENCE)
            if error is not None:
                raise error
            applied = await self.desk.do(webhooks.apply, GATEWAYS, self.till.house, PATIENCE, taken)
        except Exception as wrong:
            outcome: str = (await self.desk.do(webhooks.put_off, taken, wrong, PATIENCE)).outcome
            return outcome
        return "applied" if applied else "taken"

    async def work(self, error: Exception | None = None) -> list[str]:
        """Try everything that is due, once."""
        return [await self.attempt(taken, error) for taken in await self.take()]

    async def rows(self) -> list[Any]:
        return list(await self.desk.fetch("select * from webhooks order by received_at, event_id"))

    async def row(self) -> Any:
        (row,) = await self.rows()
        return row


@pytest.fixture
def inbox(till: Till, clock: Clock) -> Inbox:
    return Inbox(till)


# storing


async def test_an_event_is_stored_once(inbox: Inbox) -> None:
    assert await inbox.store(b"[]", event_id="a")
    assert not await inbox.store(b"[ ]", event_id="a")
    assert await inbox.store(b"[ ]", event_id="a", provider=Provider.STRIPE), "another gateway's ids are its own"
    assert len(await inbox.rows()) == 2


async def test_a_body_is_stored_once_whatever_its_event_id(inbox: Inbox) -> None:
    """Razorpay does not sign the event's id, so somebody who has seen a webhook could fill the table with it."""
    assert await inbox.store(b"[]", event_id="a")
    assert not await inbox.store(b"[]", event_id="b")
    assert len(await inbox.rows()) == 1


async def test_an_event_that_comes_many_times_at_once_is_stored_once(inbox: Inbox) -> None:
    stored = await asyncio.gather(*(inbox.store(b"[]", event_id="a") for _ in range(20)))
    assert sorted(stored) == [False] * 19 + [True]


async def test_names_that_no_table_holds_are_stored_as_far_as_possible(inbox: Inbox) -> None:
    odd = "a\0\ud800" + "x" * 10_000
    assert await inbox.store(b"[]", event_id=odd, kind=odd, refs=(odd,) * 1000)
    row = await inbox.row()
    assert row["kind"].startswith("a?xxx")
    assert {len(row["event_id"]), len(row["kind"]), *map(len, row["refs"])} == {webhooks.TEXT_MAX}
    assert len(row["refs"]) == webhooks.REFS_MAX


# applying


async def test_what_it_says_is_booked_with_its_mark(inbox: Inbox) -> None:
    name = await inbox.till.begin(await inbox.till.order())
    await inbox.about(name)
    assert await inbox.work() == ["applied"]
    row = await inbox.row()
    assert (row["status"], row["attempts"], row["error"]) == ("applied", 1, None)
    assert row["settled_at"] == row["received_at"]
    assert (await inbox.till.payment(name))["status"] == "completed"
    (source,) = {
        one["source"] for one in await inbox.desk.fetch("select source from payment_inputs where kind <> 'start'")
    }
    assert source == "webhook"
    assert await inbox.work() == [], "it is done"
    await check_books(inbox.desk)


async def test_what_says_nothing_to_us_is_applied(inbox: Inbox) -> None:
    await inbox.store(said())
    assert await inbox.work() == ["applied"]


async def test_all_of_it_is_booked_or_nothing(inbox: Inbox) -> None:
    name = await inbox.till.begin(await inbox.till.order())
    await inbox.store(said(news(name, Report.CAPTURED), news("order_stranger", Report.CAPTURED)))
    assert await inbox.work() == ["parked"]
    assert (await inbox.till.payment(name))["status"] == "pending"
    assert await inbox.till.balances() == {}


async def test_two_workers_never_try_the_same(inbox: Inbox) -> None:
    for number in range(40):
        await inbox.store(said() + b" " * number)
    takes = await asyncio.gather(*(inbox.take(5) for _ in range(8)))
    ids = [taken.id for take in takes for taken in take]
    assert len(ids) == len(set(ids)) == 40


async def test_the_oldest_is_taken_first(inbox: Inbox, clock: Clock) -> None:
    for number in range(6):
        await inbox.store(said() + b" " * number)
        clock.pass_s(0.1)
    order = [taken.received_at for _ in range(6) for taken in await inbox.take(1)]
    assert order == sorted(order)
    assert len(order) == 6


async def test_what_only_others_can_read_is_left_to_them(inbox: Inbox) -> None:
    """A worker without the keys of a gateway does not give up what another worker could apply."""
    await inbox.store(said(), provider=Provider.STRIPE)
    assert await inbox.take() == []
    assert (await inbox.row())["attempts"] == 0


# what goes wrong


async def test_what_fails_is_tried_again_with_doubling_pauses_and_then_given_up(inbox: Inbox, clock: Clock) -> None:
    await inbox.store(said())
    pauses = []
    outcomes = []
    for _ in range(PATIENCE.attempts_max):
        began = clock.now
        outcomes += await inbox.work(ValueError("the books do not like it"))
        row = await inbox.row()
        pauses.append((row["next_at"] - began).total_seconds())
        assert row["error"] == "ValueError: the books do not like it"
        clock.now = row["next_at"] - dt.timedelta(milliseconds=1)
        assert await inbox.take() == [], "its time has not come"
        clock.now = row["next_at"]
    assert outcomes == ["failed", "failed", "dead"]
    assert all(0.5 * 2**n <= pause <= 2**n for n, pause in enumerate(pauses)), pauses
    assert (await inbox.row())["status"] == W.DEAD
    assert await inbox.take() == []


async def test_pauses_are_bounded_and_not_all_the_same(inbox: Inbox, clock: Clock) -> None:
    for number in range(20):
        await inbox.store(said() + b" " * number)
    await inbox.desk.fetch("update webhooks set attempts = 1000")
    await inbox.take()
    pauses = {(row["next_at"] - clock.now).total_seconds() for row in await inbox.rows()}
    assert len(pauses) > 10
    assert 300 <= min(pauses) <= max(pauses) <= 600


@pytest.mark.parametrize("wrong", [Malformed("This is no news"), GatewayUnknown(Provider.STRIPE, "unreadable", "x")])
async def test_what_cannot_be_read_is_given_up_at_once(
    inbox: Inbox, monkeypatch: pytest.MonkeyPatch, wrong: Exception
) -> None:
    def read(kind: str, body: bytes) -> None:
        raise wrong

    monkeypatch.setattr(GATEWAYS[Provider.RAZORPAY], "read", read)
    await inbox.store(b"[]")
    assert await inbox.work() == ["dead"]
    row = await inbox.row()
    assert row["error"] == f"Unreadable: {wrong}"
    assert row["settled_at"] is not None


async def test_a_database_that_is_away_costs_no_attempt(inbox: Inbox, clock: Clock) -> None:
    await inbox.store(said())
    for _ in range(PATIENCE.attempts_max * 2):
        assert await inbox.work(Unavailable("The database does not answer.")) == ["away"]
        assert (await inbox.row())["attempts"] == 0
        clock.pass_s(600)
    assert await inbox.work() == ["applied"]


async def test_a_worker_that_dies_in_the_middle_leaves_it_to_the_next(inbox: Inbox, clock: Clock) -> None:
    name = await inbox.till.begin(await inbox.till.order())
    await inbox.about(name)
    assert len(await inbox.take()) == 1  # and then nobody says anything
    clock.pass_s(1)
    assert await inbox.work() == ["applied"]
    assert (await inbox.till.payment(name))["status"] == "completed"


async def test_what_kills_workers_is_given_up(inbox: Inbox, clock: Clock) -> None:
    await inbox.store(said())
    for _ in range(PATIENCE.attempts_max):
        assert len(await inbox.take()) == 1
        clock.pass_s(600)
    assert await inbox.work() == ["dead"]
    assert (await inbox.row())["error"].startswith(WorkersDied.__name__)


async def test_a_worker_that_was_too_slow_changes_nothing(inbox: Inbox, clock: Clock) -> None:
    """Another has taken it meanwhile, or staff has decided: neither a late success nor a late failure counts."""
    name = await inbox.till.begin(await inbox.till.order())
    await inbox.about(name)
    (slow,) = await inbox.take()
    clock.pass_s(600)
    assert await inbox.work(ValueError("again, please")) == ["failed"]
    before = await inbox.row()
    assert await inbox.attempt(slow) == "taken"
    for error in (ValueError(), UnknownPayment(), Unreadable(), Unavailable("gone")):
        assert await inbox.attempt(slow, error) == "taken"
    assert await inbox.row() == before
    assert (await inbox.till.payment(name))["status"] == "pending"


# parking


async def test_news_of_something_unknown_waits_and_is_woken_when_it_appears(inbox: Inbox, clock: Clock) -> None:
    name = "order_notyetknown0"
    await inbox.about(name)
    await inbox.about("order_neverknown00")
    assert await inbox.work() == ["parked", "parked"]
    row = (await inbox.rows())[0]
    assert (row["status"], row["attempts"]) == ("parked", 0)
    assert name in row["error"]
    clock.pass_s(600)
    assert await inbox.work() == ["parked", "parked"]
    assert await inbox.take() == []
    await inbox.till.begin(await inbox.till.order(), name="order_temporary000")
    await inbox.desk.fetch("update payments set gateway_order_id = null")
    (payment,) = await inbox.desk.fetch("select id from payments")
    created = News(provider=Provider.RAZORPAY, gateway_order_id=name)
    await inbox.desk.do(learn, str(payment["id"]), created)
    assert await inbox.work() == ["applied"]
    assert (await inbox.till.payment(name))["status"] == "completed"


async def learn(tx: Tx, payment_id: str, told: News) -> None:
    """As the desk does when the gateway has created it."""
    tx.atomically()
    book = await open_book(tx, payment_id)
    await book.learn(told)
    await book.close(Source.CLIENT, "created", {})


async def test_what_stays_unknown_is_tried_ever_more_rarely_and_dead_after_three_days(
    inbox: Inbox, clock: Clock
) -> None:
    await inbox.about("order_neverknown00")
    began, tries = clock.now, 0
    while (await inbox.row())["status"] != W.DEAD:
        clock.now = max(clock.now, (await inbox.row())["next_at"])
        tries += len(await inbox.work())
        assert tries < 30
    assert clock.now - began == dt.timedelta(seconds=PATIENCE.park_s)
    assert tries >= 18, "1, 2, 4 … seconds after it came"
    assert "order_neverknown00" in (await inbox.row())["error"]


# staff


async def filled(inbox: Inbox, clock: Clock) -> dict[str, str]:
    """One webhook of each status; its id by status."""
    for number, status in enumerate(W):
        await inbox.store(b"[" + b" " * number + b"]", event_id=status)
        await inbox.desk.fetch("update webhooks set status = $1 where event_id = $1", status)
        clock.pass_s(1)
    return {row["event_id"]: str(row["id"]) for row in await inbox.rows()}


async def listed(desk: Desk, **members: Any) -> webhooks.WebhookPage:
    page: webhooks.WebhookPage = await desk.do(webhooks.list_webhooks, STAFF, command(ListWebhooks, **members))
    return page


async def test_staff_sees_them_newest_first_and_by_status(inbox: Inbox, clock: Clock) -> None:
    ids = await filled(inbox, clock)
    everything = await listed(inbox.desk)
    assert [one.status for one in everything.items] == list(W)[::-1]
    assert everything.next_cursor is None
    for status in W:
        (one,) = (await listed(inbox.desk, status=status)).items
        assert one.id == ids[status]
        assert (one.next_at is not None) == (status in (W.RECEIVED, W.PARKED))


async def test_a_list_shows_nothing_that_speaks_of_people(inbox: Inbox) -> None:
    await inbox.store(b'{"email": "meera@example.com"}', kind="payment.failed", refs=("order_1",))
    await inbox.work()
    (one,) = (await listed(inbox.desk)).items
    shown = msgspec.json.decode(msgspec.json.encode(one))
    assert shown.keys() == {"id", "provider", "kind", "status", "attempts", "refs", "receivedAt", "settledAt", "error"}
    assert "meera" not in str(shown)


async def test_pages_hold_every_webhook_once_while_others_come(inbox: Inbox, clock: Clock) -> None:
    for number in range(7):
        await inbox.store(b"[" + b" " * number + b"]", event_id=f"old-{number}")
        clock.pass_s(number % 2)  # some of one instant
    old = {str(row["id"]) for row in await inbox.rows()}
    found: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        page = await listed(inbox.desk, limit=2, **cursor)
        found += [one.id for one in page.items]
        clock.pass_s(1)
        await inbox.store(b"[]" + b" " * (10 + len(found)))
        if page.next_cursor is None:
            break
        cursor = {"cursor": page.next_cursor}
    assert len(found) == 7
    assert set(found) == old


async def test_a_cursor_of_somebody_else_is_refused(inbox: Inbox) -> None:
    refusal = await inbox.desk.refused(webhooks.list_webhooks, STAFF, command(ListWebhooks, cursor="nonsense"))
    assert isinstance(refusal, Invalid)


NOT_STAFF = [CUSTOMER, AGENT, SERVICE, PAY_GUEST, TRACK_GUEST, actor(Role.STAFF, orders=frozenset({ORDER_ID}))]


@pytest.mark.parametrize("somebody", NOT_STAFF, ids=lambda one: f"{one.role} {one.scope or ''}")
async def test_only_staff_sees_and_decides(inbox: Inbox, clock: Clock, somebody: Any) -> None:
    ids = await filled(inbox, clock)
    before = await inbox.rows()
    for verb, *args in (
        (webhooks.list_webhooks, ListWebhooks()),
        (webhooks.retry_webhook, ids[W.DEAD], Retry()),
        (webhooks.dismiss_webhook, ids[W.DEAD], Dismiss(reason="It is another shop's.")),
    ):
        assert isinstance(await inbox.desk.refused(verb, somebody, *args), Forbidden)
    assert await inbox.rows() == before


@pytest.mark.parametrize("status", W)
async def test_only_what_waits_for_somebody_is_retried_or_dismissed(inbox: Inbox, clock: Clock, status: W) -> None:
    ids = await filled(inbox, clock)
    retry = (webhooks.retry_webhook, STAFF, ids[status], Retry())
    dismiss = (webhooks.dismiss_webhook, ADMIN, ids[status], Dismiss(reason="It is another shop's."))
    if status not in (W.DEAD, W.PARKED):
        for verb in (retry, dismiss):
            assert isinstance(await inbox.desk.refused(*verb), Conflict)
        assert await inbox.desk.fetch("select 1 from audit") == []
        return
    retried = await inbox.desk.do(*retry)
    assert (retried.status, retried.attempts, retried.next_at is not None) == (W.RECEIVED, 0, True)
    await inbox.desk.fetch("update webhooks set status = $2 where id = $1::text::uuid", ids[status], status)
    dismissed = await inbox.desk.do(*dismiss)
    assert (dismissed.status, dismissed.reason) == (W.DISMISSED, "It is another shop's.")
    audit = await inbox.desk.fetch("select actor, action, subject, before, after from audit order by id")
    assert [tuple(row) for row in audit] == [
        ("staff:s1", "webhook.retry", f"webhook:{ids[status]}", f'{{"status":"{status}"}}', '{"status":"received"}'),
        (
            "admin:x1",
            "webhook.dismiss",
            f"webhook:{ids[status]}",
            f'{{"status":"{status}"}}',
            '{"status":"dismissed","reason":"It is another shop\'s."}',
        ),
    ]


async def test_there_is_no_such_webhook(inbox: Inbox) -> None:
    for verb, cmd in ((webhooks.retry_webhook, Retry()), (webhooks.dismiss_webhook, Dismiss(reason="Why not."))):
        assert isinstance(await inbox.desk.refused(verb, STAFF, str(uuid.uuid4()), cmd), NotFound)


async def test_what_was_dead_is_applied_when_the_cause_is_mended(inbox: Inbox, clock: Clock) -> None:
    name = await inbox.till.begin(await inbox.till.order())
    await inbox.about(name)
    for _ in range(PATIENCE.attempts_max):
        await inbox.work(ValueError("a bug"))
        clock.pass_s(600)
    row = await inbox.row()
    assert row["status"] == W.DEAD
    await inbox.desk.do(webhooks.retry_webhook, STAFF, str(row["id"]), Retry())
    assert await inbox.work() == ["applied"]
    row = await inbox.row()
    assert (row["status"], row["error"]) == ("applied", None)
    assert (await inbox.till.payment(name))["status"] == "completed"


async def test_what_is_dismissed_is_never_tried(inbox: Inbox, clock: Clock) -> None:
    await inbox.about("order_ofanothershop")
    await inbox.work()
    row = await inbox.row()
    await inbox.desk.do(webhooks.dismiss_webhook, STAFF, str(row["id"]), Dismiss(reason="Another shop's."))
    clock.pass_s(PATIENCE.park_s)
    assert await inbox.take() == []
    assert not await inbox.store(bytes(row["body"]), event_id="again"), "it is known"


async def test_the_backlog_counts_what_is_left(inbox: Inbox, clock: Clock) -> None:
    assert await inbox.desk.do(webhooks.backlog) == (0, 0, 0.0)
    await filled(inbox, clock)
    left = await inbox.desk.do(webhooks.backlog)
    assert (left.dead, left.parked) == (1, 1)
    assert left.late_s == 5.0, "the received one was the first of the five"
