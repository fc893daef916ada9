"""The webhooks desk: what gateways tell us is stored first, then applied, parked until we know what it speaks of, or
given up. Staff see what is left, and try it again or dismiss it.

A try is counted when the webhook is taken, in a statement of its own, and the time of the next try is set with it: a
worker that dies in the middle leaves nothing to clean up, and a webhook that kills workers is given up like any other.
"""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Annotated, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType
from sqlalchemy import literal_column, select, tuple_

from handlers import audit
from handlers.book import House, UnknownPayment
from handlers.context import Row, Tx
from handlers.cursors import decode_cursor, encode_cursor
from handlers.ports import Delivery, GatewayFailed, Gateways
from handlers.settlement import settle
from models.base import Reason, Strict, Time, UuidText, View, rfc3339
from models.errors import Conflict, Forbidden, NotFound, NotRefundable, Refused, Unavailable
from models.inbox import WebhookStatus, webhooks
from models.order import require_role
from models.payment import GATEWAYS, Provider, Source
from models.user import STAFF, Actor

S = WebhookStatus

TEXT_MAX = 255
"""Longest event id, kind or ref that is kept, in characters; the gateways' own are far shorter."""

REFS_MAX = 50
"""Most refs of one webhook; a payment with its refunds has a handful."""

ERROR_MAX = 500
"""How much of an error is kept, in characters."""


# storing

STORE = """
insert into webhooks (id, provider, event_id, kind, refs, body, status, received_at, next_at)
values ($1, $2, $3, $4, $5, $6, 'received', $7, $7) on conflict do nothing returning id"""


async def store(tx: Tx, provider: Provider, delivery: Delivery, body: bytes) -> bool:
    """Keep a webhook whose signature is right. False: we have it already, by its event id or by its body."""
    row = await tx.one(
        STORE,
        uuid.UUID(tx.new_id()),
        provider,
        _text(delivery.event_id),
        _text(delivery.kind),
        [_text(ref) for ref in delivery.refs[:REFS_MAX]],
        body,
        tx.now(),
    )
    return row is not None


def _text(given: str) -> str:
    """What Postgres can hold and index of a text from outside."""
    return given.encode(errors="replace").decode().replace("\0", "")[:TEXT_MAX]


# applying


class Patience(NamedTuple):
    """How often, and for how long, a webhook is tried."""

    attempts_max: int
    retry_base_s: int
    """Pause before the second try; it doubles, and up to half of it is left to chance."""
    retry_max_s: int
    park_s: int
    """How long we wait to get to know what a webhook speaks of."""
    lock_wait_ms: int
    """How long a try waits for an order that somebody else holds."""


class Taken(NamedTuple):
    """A webhook that is being tried; `attempts` counts this try."""

    id: uuid.UUID
    provider: Provider
    kind: str
    body: bytes
    attempts: int
    received_at: dt.datetime


TAKE = """
update webhooks set attempts = attempts + 1,
    next_at = $1 + least($3::float8, $2::float8 * 2 ^ least(attempts, 30)) * (0.5 + random() / 2) * interval '1 second'
where id = any (array(
    select id from webhooks
    where status in ('received', 'parked') and next_at <= $1 and provider = any ($4::text[])
    order by next_at limit $5 for update skip locked))
returning id, provider, kind, body, attempts, received_at"""


async def take(tx: Tx, gateways: Gateways, patience: Patience, limit: int) -> list[Taken]:
    """Webhooks that are due, of gateways that are set up here, oldest first; their tries are counted."""
    rows = await tx.all(TAKE, tx.now(), patience.retry_base_s, patience.retry_max_s, list(gateways), limit)
    return [Taken(row["id"], Provider(row["provider"]), *list(row)[2:]) for row in rows]


class Unreadable(Exception):
    """The gateway's adapter does not understand the webhook, and never will."""


# still ours: not taken by anybody else since, and not decided by staff
HELD = "id = $1 and attempts = $2 and status in ('received', 'parked')"

# A lock that is not got is given up by Postgres itself: had the client to give up, its session would live on there, and
# with it its hold on the webhook, until the lock is free.
HOLD = f"select set_config('lock_timeout', $3, true) from webhooks where {HELD} for update skip locked"

# What is parked about the same is tried again, as a refund that came before its capture. Running tries are skipped.
APPLIED = """
with applied as (
    update webhooks set status = 'applied', settled_at = $2, error = null where id = $1 returning refs)
update webhooks set next_at = $2 where id = any (array(
    select parked.id from webhooks parked, applied
    where parked.id <> $1 and parked.status = 'parked' and parked.refs && applied.refs
    for update of parked skip locked))"""


OF_NO_CONCERN = f"update webhooks set status = 'applied', settled_at = $3, error = null where {HELD} returning 1"


async def apply(tx: Tx, gateways: Gateways, house: House, patience: Patience, taken: Taken) -> bool:
    """Book what the webhook says, and wake what is parked about the same, in one transaction. False: it is not ours any
    more, because somebody else has taken it or staff has decided.

    Raises:
        UnknownPayment, Unreadable, and whatever else goes wrong: then nothing is booked, and `put_off` is called in
        another transaction.
    """
    try:
        news = gateways[taken.provider].read(taken.kind, taken.body)
    except (Refused, GatewayFailed) as error:
        raise Unreadable(str(error)) from error
    if not news:
        return await tx.one(OF_NO_CONCERN, taken.id, taken.attempts, tx.now()) is not None
    tx.atomically()
    if await tx.one(HOLD, taken.id, taken.attempts, str(patience.lock_wait_ms)) is None:
        return False
    for one in news:
        await settle(tx, one, Source.WEBHOOK, house)
    await tx.one(APPLIED, taken.id, tx.now())
    return True


PARK = f"update webhooks set status = 'parked', attempts = 0, next_at = $3, error = $4 where {HELD} returning 1"
GIVE_UP = f"update webhooks set status = 'dead', settled_at = $3, error = $4 where {HELD} returning 1"
AGAIN = f"update webhooks set error = $3 where {HELD} returning 1"
UNCOUNT = f"update webhooks set attempts = attempts - 1 where {HELD} returning 1"


NOT_KNOWN_YET = (UnknownPayment, NotRefundable)
"""It speaks of a payment, or gives back money, that we have not heard of."""


class PutOff(NamedTuple):
    """What became of a webhook that could not be applied."""

    outcome: str
    """parked, dead, failed (tried again), away (tried again, and not counted), or taken (it is not ours any more)"""
    error: str


async def put_off(tx: Tx, taken: Taken, error: Exception, patience: Patience) -> PutOff:
    """Write down that the try ended with `error`. When it is tried again was set when it was taken."""
    text = _text_of(error)
    held: tuple[object, ...] = (taken.id, taken.attempts)
    now = tx.now()
    age = now - taken.received_at
    if isinstance(error, Unavailable):
        outcome, row = "away", await tx.one(UNCOUNT, *held)
    elif isinstance(error, NOT_KNOWN_YET) and age < dt.timedelta(seconds=patience.park_s):
        # It is woken when something is learned about its names. Should that happen while it is being parked, it is
        # tried again soon: what is young is tried often, what has waited for a day hardly ever.
        pause = max(dt.timedelta(seconds=patience.retry_base_s), age)
        next_at = min(now + pause, taken.received_at + dt.timedelta(seconds=patience.park_s))
        outcome, row = "parked", await tx.one(PARK, *held, next_at, text)
    elif isinstance(error, (*NOT_KNOWN_YET, Unreadable)) or taken.attempts >= patience.attempts_max:
        outcome, row = "dead", await tx.one(GIVE_UP, *held, now, text)
    else:
        outcome, row = "failed", await tx.one(AGAIN, *held, text)
    return PutOff(outcome if row is not None else "taken", text)


class WorkersDied(Exception):
    """Every try so far ended with the death of its worker."""

    def __init__(self) -> None:
        super().__init__("the worker died each time this was tried")


def check_attempts(taken: Taken, patience: Patience) -> None:
    """Raises WorkersDied: the last try that it may have was counted, and nobody lived to say how it ended."""
    if taken.attempts > patience.attempts_max:
        raise WorkersDied


def _text_of(error: Exception) -> str:
    said = error.detail if isinstance(error, Refused) else str(error)
    return f"{type(error).__name__}: {said}".replace("\0", "")[:ERROR_MAX]


BACKLOG = """
select count(*) filter (where status = 'dead') as dead, count(*) filter (where status = 'parked') as parked,
    coalesce(extract(epoch from $1 - min(next_at) filter (where status <> 'dead' and next_at <= $1)), 0)::float8 as late
from webhooks where status in ('received', 'parked', 'dead')"""


class Backlog(NamedTuple):
    dead: int
    parked: int
    late_s: float
    """How long the one that waits longest is due; 0 when none is."""


async def backlog(tx: Tx) -> Backlog:
    row = await tx.one(BACKLOG, tx.now())
    assert row is not None
    return Backlog(*row)


# staff


class Webhook(View):
    """A webhook as staff see it: never its body, which speaks of people."""

    id: UuidText
    provider: Annotated[str, Meta(extra_json_schema={"enum": sorted(GATEWAYS)})]
    kind: Annotated[str, Meta(description="the gateway's event type")]
    status: WebhookStatus
    attempts: Annotated[int, Meta(description="tries that did not end well since it was received, parked or retried")]
    refs: Annotated[list[str], Meta(description="the gateway's ids that it speaks of")]
    received_at: Time
    next_at: Time | None = None
    settled_at: Time | None = None
    error: Annotated[str, Meta(description="how the last try ended")] | None = None
    reason: Annotated[str, Meta(description="why it was dismissed")] | None = None


COLUMNS = "id, provider, kind, status, attempts, refs, received_at, next_at, settled_at, error, reason"


def _view(row: Row) -> Webhook:
    status = WebhookStatus(row["status"])
    return Webhook(
        id=str(row["id"]),
        provider=row["provider"],
        kind=row["kind"],
        status=status,
        attempts=row["attempts"],
        refs=row["refs"],
        received_at=rfc3339(row["received_at"]),
        next_at=rfc3339(row["next_at"]) if status in (S.RECEIVED, S.PARKED) else None,
        settled_at=rfc3339(row["settled_at"]) if row["settled_at"] is not None else None,
        error=row["error"],
        reason=row["reason"],
    )


class ListWebhooks(Strict):
    status: WebhookStatus | UnsetType = UNSET
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: Annotated[str, Meta(max_length=200)] | UnsetType = UNSET


class WebhookPage(msgspec.Struct, frozen=True, rename="camel"):
    items: list[Webhook]
    next_cursor: Annotated[str | None, Meta(description="`cursor` of the next page; null on the last one")]


def _require_staff(actor: Actor) -> None:
    """Raises Forbidden: webhooks are about any order, so a token for some orders is not enough."""
    require_role(actor, STAFF, "see webhooks")
    if actor.orders is not None:
        raise Forbidden("This token is for some orders only; webhooks are about any.")


async def list_webhooks(tx: Tx, actor: Actor, cmd: ListWebhooks) -> WebhookPage:
    """A page of webhooks, newest first. Rows that are added meanwhile do not move it."""
    _require_staff(actor)
    w = webhooks.c
    query = select(*(webhooks.c[name] for name in COLUMNS.split(", ")))
    if isinstance(cmd.status, WebhookStatus):
        # written out, so that the index of what is not applied serves
        query = query.where(w.status == literal_column(f"'{cmd.status}'"))
    if isinstance(cmd.cursor, str):
        query = query.where(tuple_(w.received_at, w.id) < tuple_(*decode_cursor(cmd.cursor)))
    rows = await tx.select(query.order_by(w.received_at.desc(), w.id.desc()).limit(cmd.limit + 1))
    page = rows[: cmd.limit]
    more = len(rows) > cmd.limit
    return WebhookPage(
        [_view(row) for row in page], encode_cursor(page[-1]["received_at"], page[-1]["id"]) if more else None
    )


class Retry(Strict):
    """Nothing needs to be said."""


class Dismiss(Strict):
    """Why it does not matter."""

    reason: Reason


LOCK = "select status from webhooks where id = $1 for update"
RETRY = f"""
update webhooks set status = 'received', attempts = 0, next_at = $2, settled_at = null where id = $1
returning {COLUMNS}"""
DISMISS = f"""
update webhooks set status = 'dismissed', settled_at = $2, reason = $3 where id = $1
returning {COLUMNS}"""


async def retry_webhook(tx: Tx, actor: Actor, webhook_id: str, cmd: Retry) -> Webhook:
    """Try it again at once, as if it had just come.

    Raises:
        Forbidden, NotFound; Conflict: it is neither dead nor parked.
    """
    return await _decide(tx, actor, webhook_id, "webhook.retry", RETRY)


async def dismiss_webhook(tx: Tx, actor: Actor, webhook_id: str, cmd: Dismiss) -> Webhook:
    """Never try it again.

    Raises:
        Forbidden, NotFound; Conflict: it is neither dead nor parked.
    """
    return await _decide(tx, actor, webhook_id, "webhook.dismiss", DISMISS, cmd.reason)


async def _decide(tx: Tx, actor: Actor, webhook_id: str, action: str, statement: str, *reason: str) -> Webhook:
    _require_staff(actor)
    tx.atomically()
    row_id = uuid.UUID(webhook_id)
    row = await tx.one(LOCK, row_id)
    if row is None:
        raise NotFound("There is no such webhook.")
    if row["status"] not in (S.DEAD, S.PARKED):
        raise Conflict(f"Only a dead or parked webhook is retried or dismissed; this one is {row['status']}.")
    changed = await tx.one(statement, row_id, tx.now(), *reason)
    assert changed is not None
    decided = _view(changed)
    before: dict[str, object] = {"status": row["status"]}
    after: dict[str, object] = {"status": decided.status} | ({"reason": reason[0]} if reason else {})
    await audit.record(tx, actor, action, f"webhook:{webhook_id}", before, after)
    return decided
