"""What both doors do with a command: read it, run its verb in a transaction, once per Idempotency-Key, tell the bus.

REST and Socket.IO differ in how a command arrives and how an answer leaves; everything between is here.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, TypeVar

import msgspec

from handlers.context import Tx
from handlers.ports import Closing, Done, Positions
from models.errors import Conflict, IdempotencyMismatch, Invalid, Malformed, NotFound
from models.inbox import KEY_CHARACTERS_MAX
from models.user import Actor
from server.db import Database
from server.outbox import Outbox

CommandT = TypeVar("CommandT")

KEY_PATTERN = rf"^[!-~][ -~]{{0,{KEY_CHARACTERS_MAX - 1}}}$"
_KEY = re.compile(KEY_PATTERN)
_PLACE = re.compile(r" - at `\$(?P<path>[^`]*)`$")
_FIELD = re.compile(r"Object (?:contains unknown|missing required) field `(.*)`", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]|\[(\.\.\.)\]")


class Verb(NamedTuple):
    """A verb of ring 2 as the doors call it: `run(tx, actor, *args)`.

    `before(tx, actor, *args)` says which positions are closed before the transaction begins; it may refuse.
    """

    name: str
    run: Callable[..., Awaitable[Any]]
    status: int = 200
    before: Callable[..., Awaitable[Closing | None]] | None = None


class Steps(NamedTuple):
    """A verb of ring 2 that waits for a gateway between its transactions: `run(once, actor, *args)`.

    `permit(tx, actor, *args)` refuses those who may not ask for it, also when the answer is already there.
    """

    name: str
    run: Callable[..., Awaitable[Done]]
    permit: Callable[..., Awaitable[object]]


class Answer(NamedTuple):
    status: int
    body: bytes
    """JSON."""
    secret: str | None = None
    """What was made with it and is not stored; a replay does not have it."""


def convert(value: object, type_: type[CommandT], *, strict: bool = True) -> CommandT:
    """`value`, decoded JSON or query parameters, as a command.

    Raises:
        Invalid, with a pointer at what is wrong; Malformed: text that is no Unicode.
    """
    try:
        return msgspec.convert(value, type_, strict=strict)
    except msgspec.ValidationError as error:
        raise invalid(error) from None
    except (UnicodeError, RecursionError):
        raise Malformed("The request holds text that is no Unicode, or is nested too deep.") from None


def decode(body: bytes, type_: type[CommandT]) -> CommandT:
    """A JSON body as a command.

    Raises:
        Malformed: no JSON (RFC 8259). Invalid: JSON, but not this command.
    """
    try:
        return msgspec.json.decode(body or b"{}", type=type_)
    except msgspec.ValidationError as error:
        raise invalid(error) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise Malformed("The body is not JSON.") from None


def invalid(error: msgspec.ValidationError) -> Invalid:
    """msgspec's sentence as a refusal, its path as a JSON pointer (RFC 6901)."""
    text = str(error)
    place = _PLACE.search(text)
    message = text[: place.start()] if place else text
    steps = [next(part for part in step if part) for step in _STEP.findall(place["path"])] if place else []
    field = _FIELD.fullmatch(message)
    if field:
        steps.append(field[1])
    pointer = "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in steps)
    return Invalid(message + ".", pointer)


class Doors:
    """Runs verbs for both doors."""

    def __init__(self, database: Database, outbox: Outbox, positions: Positions) -> None:
        self.database = database
        self._outbox = outbox
        self._positions = positions

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Tx]:
        """A transaction of several statements whose events are handed to the bus after its commit."""
        async with self.database.transaction() as tx:
            yield tx
        self._outbox.publish(tx.told)

    async def perform(self, verb: Verb, actor: Actor, *args: object, key: str | None = None) -> Answer:
        """Carry out `verb(tx, actor, *args)` and hand its events to the bus after its commit.

        With `key`, the answer is stored in the verb's own transaction and replayed for the same command.

        Raises:
            What the verb refuses; Conflict: a command with this key is running; IdempotencyMismatch: the key was used
            for another command; Invalid: the key is no key.
        """
        if key is not None:
            return await self._perform_once(verb, actor, key, *args)
        await self._before(verb, actor, *args)
        async with self.database.statement() as tx:
            result = await verb.run(tx, actor, *args)
        self._outbox.publish(tx.told)
        return Answer(verb.status, msgspec.json.encode(result) if result is not None else b"")

    async def perform_in_steps(self, verb: Steps, actor: Actor, *args: object, key: str | None = None) -> Answer:
        """Carry out `verb(once, actor, *args)`, which opens its own transactions.

        With `key`, the first of them keeps it, so that a repeat carries on what was begun; nothing is held while a
        gateway is asked. An answer that is final (200, 201, 204) is stored when it is known, and replayed.

        Raises:
            As `perform`.
        """
        if key is None:
            async with self.database.statement() as tx:
                await verb.permit(tx, actor, *args)
            return _answer(await verb.run(_NoKey(), actor, *args))
        once = _Key(actor, verb.name, key, args)
        async with self.database.statement() as tx:
            await verb.permit(tx, actor, *args)
            stored = await once.stored(tx)
        if stored is not None:
            return stored
        done = await verb.run(once, actor, *args)
        answer = _answer(done)
        if answer.status in FINAL and not done.anew:
            async with self.database.statement() as tx:
                # a repeat that ran beside this one may have ended first: then its answer is the answer
                answer = await once.store(tx, answer) or answer
        return answer

    async def _before(self, verb: Verb, actor: Actor, *args: object) -> None:
        if verb.before is None:
            return
        async with self.database.statement() as tx:
            closing = await verb.before(tx, actor, *args)
        if closing is not None:  # the connection was given back: nobody else waits while Redis does not answer
            await self._positions.close(*closing)

    async def _perform_once(self, verb: Verb, actor: Actor, key: str, *args: object) -> Answer:
        _check_key(key)
        slot = (actor.who, verb.name, key)
        fingerprint = _fingerprint(args)
        async with self.database.statement() as tx:
            stored = await _stored(tx, slot, fingerprint)
        if stored is not None:
            _check_reach(actor, *args)
            return stored
        await self._before(verb, actor, *args)
        async with self.database.transaction() as tx:
            await _hold(tx, slot)
            stored = await _stored(tx, slot, fingerprint)
            if stored is not None:
                _check_reach(actor, *args)
                return stored
            result = await verb.run(tx, actor, *args)
            answer = Answer(verb.status, msgspec.json.encode(result) if result is not None else b"")
            await tx.one(KEEP, *slot, fingerprint, answer.status, answer.body.decode(), tx.now())
        self._outbox.publish(tx.told)
        return answer


class _NoKey:
    async def begun(self, tx: Tx) -> Sequence[str]:
        return ()

    async def begin(self, tx: Tx, *subjects: str) -> None:
        pass


class _Key:
    """handlers.ports.Once over the table of keys."""

    def __init__(self, actor: Actor, verb: str, key: str, args: tuple[object, ...]) -> None:
        _check_key(key)
        self._slot = (actor.who, verb, key)
        self._fingerprint = _fingerprint(args)

    async def stored(self, tx: Tx) -> Answer | None:
        return await _stored(tx, self._slot, self._fingerprint)

    async def begun(self, tx: Tx) -> Sequence[str]:
        await _hold(tx, self._slot)
        row = await tx.one(BEGUN, *self._slot)
        if row is None:
            return ()
        _check_same(row["fingerprint"], self._fingerprint)
        return [str(subject) for subject in row["subjects"]]

    async def begin(self, tx: Tx, *subjects: str) -> None:
        await tx.one(BEGIN, *self._slot, self._fingerprint, [uuid.UUID(subject) for subject in subjects], tx.now())

    async def store(self, tx: Tx, answer: Answer) -> Answer | None:
        """Keep the answer. Gives the one that was kept before, if there is one."""
        if await tx.one(STORE, *self._slot, answer.status, answer.body.decode()) is not None:
            return None
        return await self.stored(tx)


FINAL = frozenset({200, 201, 204})
"""Answers that are stored and replayed: refusals and 202 are judged anew."""

BEGUN = "select fingerprint, subjects from idempotency_keys where caller = $1 and verb = $2 and key = $3"
# what was begun before has come to nothing when something else is begun under the same key
BEGIN = """
insert into idempotency_keys (caller, verb, key, fingerprint, subjects, created_at) values ($1, $2, $3, $4, $5, $6)
on conflict (caller, verb, key) do update set subjects = excluded.subjects where idempotency_keys.status is null"""
STORE = """
update idempotency_keys set status = $4, answer = $5
where caller = $1 and verb = $2 and key = $3 and status is null returning status"""

STORED = "select fingerprint, status, answer from idempotency_keys where caller = $1 and verb = $2 and key = $3"
KEEP = """
insert into idempotency_keys (caller, verb, key, fingerprint, status, answer, created_at)
values ($1, $2, $3, $4, $5, $6, $7)"""
FORGET = "delete from idempotency_keys where created_at < $1"


def _check_reach(actor: Actor, *args: object) -> None:
    """An answer is kept per caller, but two tokens of one caller may reach different orders, and a guest that may only
    look is given nobody's whole answer.

    Raises:
        NotFound.
    """
    if args and isinstance(args[0], str) and (actor.tracks_only or not actor.reaches(args[0])):
        raise NotFound("There is no such order.")


def _answer(done: Done) -> Answer:
    return Answer(done.status, msgspec.json.encode(done.result) if done.result is not None else b"", done.secret)


def _check_key(key: str) -> None:
    if not _KEY.fullmatch(key):
        raise Invalid(f"An Idempotency-Key is 1 to {KEY_CHARACTERS_MAX} printable ASCII characters.")


def _fingerprint(args: tuple[object, ...]) -> bytes:
    return hashlib.sha256(msgspec.json.encode(args, order="deterministic")).digest()


def _check_same(kept: bytes, fingerprint: bytes) -> None:
    if kept != fingerprint:
        raise IdempotencyMismatch("This Idempotency-Key was used for another request; take a new one.")


async def _hold(tx: Tx, slot: tuple[str, str, str]) -> None:
    """Hold the key until the transaction ends: the lock dies with its holder."""
    lock = int.from_bytes(hashlib.sha256("\0".join(slot).encode()).digest()[:8], signed=True)
    locked = await tx.one("select pg_try_advisory_xact_lock($1) as held", lock)
    if locked is None or not locked["held"]:
        raise Conflict("A request with this Idempotency-Key is running.")


async def _stored(tx: Tx, slot: tuple[str, str, str], fingerprint: bytes) -> Answer | None:
    """The answer that is kept under the key; None: no such key, or its verb is on its way."""
    row = await tx.one(STORED, *slot)
    if row is None:
        return None
    _check_same(row["fingerprint"], fingerprint)
    return Answer(row["status"], row["answer"].encode()) if row["status"] is not None else None
