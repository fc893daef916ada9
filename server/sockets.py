"""The Socket.IO door: EVENTS lists what clients may send; rooms and the bus send the rest.

Subscribing permits, joins, then reads, in that order; the answer is put on the wire in the same step in which the
connection becomes a full member of the room, so that nothing live overtakes it and nothing in it comes twice.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import msgspec
import structlog
from msgspec import UNSET, Meta, UnsetType

from handlers import orders, tracking
from models.base import Id, Reason, Time, rfc3339
from models.errors import (
    Conflict,
    Forbidden,
    Future,
    IdempotencyMismatch,
    IllegalMove,
    Inaccurate,
    Invalid,
    Jump,
    Malformed,
    NotFound,
    OrderClosed,
    PaymentRequired,
    RateLimited,
    Refused,
    Stale,
    Unauthenticated,
    Unavailable,
)
from models.event import Event, Type
from models.message import (
    SubscriptionClosed,
    TokenExpiring,
)
from models.order import FINAL, Status
from models.position import Position
from models.user import Actor, Role
from server import metrics
from server.auth import Authenticator
from server.deadlines import Deadlines
from server.doors import KEY_PATTERN, Doors, Verb, convert
from server.drain import send_away
from server.entering import Entrance
from server.limits import Limits
from server.locations import Locations
from server.outbox import ORDER_PREFIX, USER_PREFIX, order_channel, unpack, user_channel
from server.realtime.bus import Bus
from server.realtime.connections import NOTHING_MORE, Connection, Frame, Opening, acknowledgement, frame
from server.realtime.engine import Engine, Unreadable
from server.realtime.positions import PositionLane, parse
from server.realtime.recovery import Sessions, Unsaved
from server.realtime.rooms import Room, Rooms
from server.recoveries import Recoveries
from server.settings import Settings
from server.snapshots import FULL, TRACKED, Snapshots, Subscribed, view_of

log = structlog.get_logger()

ASSIGNMENTS_TOLD_MAX = 100
"""Of how many orders, the latest ones, it is kept that their agent was told."""

ATTACHMENTS_MAX = 0
"""Most binary attachments of one packet: no event of this server takes any."""

EXPIRY_LOOK_S = 0.5
"""How often it is looked whose token has come to its time."""

AT_ONCE_MAX = 50
"""Of how many sockets the tokens are seen to before others get a turn: a whole fleet may have tokens of one second."""


EXAMPLE_ID = "9e2c8d3c-4a8a-4bb5-8c06-9f4f6f0f5d11"


class _Payload(msgspec.Struct, kw_only=True, rename="camel", forbid_unknown_fields=True):
    pass


class Subscribe(_Payload):
    SCHEMA: ClassVar[dict[str, Any]] = {"examples": [{"orderId": EXAMPLE_ID, "afterSeq": 4}]}

    order_id: Id
    after_seq: (
        Annotated[int, Meta(ge=0, le=2**31 - 1, description="the last event known: the answer holds all after it")]
        | UnsetType
    ) = UNSET


class Unsubscribe(_Payload):
    SCHEMA: ClassVar[dict[str, Any]] = {"examples": [{"orderId": EXAMPLE_ID}]}

    order_id: Id


class UpdateOrderStatus(_Payload):
    SCHEMA: ClassVar[dict[str, Any]] = {"examples": [{"orderId": EXAMPLE_ID, "status": "out_for_delivery"}]}

    order_id: Id
    status: Status
    note: Reason | UnsetType = UNSET
    idempotency_key: (
        Annotated[str, Meta(description="as the header of REST", extra_json_schema={"pattern": KEY_PATTERN})]
        | UnsetType
    ) = UNSET


class RefreshToken(_Payload):
    token: str


class UpdateLocation(Position, kw_only=True, rename="camel"):
    """One fix of the assigned agent. Works without acknowledgement too."""

    SCHEMA: ClassVar[dict[str, Any]] = {"examples": [{"orderId": EXAMPLE_ID, **Position.SCHEMA["examples"][0]}]}

    order_id: Id


NextInterval = Annotated[int, Meta(description="milliseconds after which the next position is wanted")]


class Done(msgspec.Struct, frozen=True):
    ok: Literal[True]


class LocationTaken(msgspec.Struct, frozen=True, rename="camel"):
    ok: Literal[True]
    next_interval_ms: NextInterval


class StatusChanged(msgspec.Struct, frozen=True):
    """`seq`: the number of the last event that the change wrote."""

    ok: Literal[True]
    seq: int


class TokenRefreshed(msgspec.Struct, frozen=True, rename="camel"):
    ok: Literal[True]
    expires_at: Time


class _Top(msgspec.Struct, frozen=True):
    seq: int


class Sockets:
    """One instance's side of the Socket.IO door."""

    def __init__(
        self,
        settings: Settings,
        doors: Doors,
        authenticator: Authenticator,
        bus: Bus,
        lane: PositionLane,
        locations: Locations,
        limits: Limits,
        read_revocations: Callable[[], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._read_revocations = read_revocations
        self._doors = doors
        self._authenticator = authenticator
        self._limits = limits
        self._bus = bus
        self._locations = locations
        self._agents: dict[str, dict[str, Connection]] = {}
        """Connections of each agent: an assignment reaches all of them, subscribed or not."""
        self._assigned: dict[str, dict[str, int]] = {}
        """For each of them its latest orders with the number of the assignment that its sockets were told of."""
        self._token_deadlines: Deadlines[Connection] = Deadlines()
        """When the token of each connection is seen to next: its bearer is told of the end, then it ends."""
        self._goodbyes: set[asyncio.Task[None]] = set()
        self._draining = False
        self.engine = Engine(
            authenticate=self._authenticate,
            caller_of=self._limits.network_of,
            new_quota=self._limits.socket_quota,
            on_event=self._on_event,
            open_connection=self._open_connection,
            on_close=self._on_close,
            connect_timeout_s=settings.connect_timeout_ms / 1000,
            frame_max_bytes=settings.frame_max_bytes,
            ping_interval_s=settings.ping_interval_s,
            ping_timeout_s=settings.ping_timeout_s,
            slow_bytes=settings.slow_bytes,
            queue_max_bytes=settings.queue_max_bytes,
            slow_max_s=settings.slow_max_s,
            attachments_max=ATTACHMENTS_MAX,
        )
        self.rooms: Rooms[Event] = Rooms(
            bus,
            channel_of=order_channel,
            frame_of=_frame_of,
            position_frame_of=lambda payload: frame("orderLocationUpdate", payload),
            on_entry=self._on_entry,
            read_missed=self._read_missed,
            recent_max=settings.room_events_max,
            gap_check_s=settings.gap_check_interval_s,
            fallback_poll_s=settings.bus_fallback_poll_ms / 1000,
        )
        self._snapshots = Snapshots(doors, lane, self.rooms, settings.subscribe_batch_max)
        self._entrance = Entrance(settings, self.rooms, self._snapshots)
        self._recoveries = Recoveries(
            Sessions(bus, keep_s=settings.recovery_keep_s, offset_max_bytes=settings.recovery_offset_max_bytes),
            authenticator,
            self._entrance,
            self.rooms,
            self._snapshots,
            after=self.engine.eio.wheel.after,
            timeout_s=settings.subscribe_timeout_ms / 1000,
        )

    # a connection's life

    async def _authenticate(self, auth: object, caller: str) -> Actor:
        token = auth.get("token") if isinstance(auth, dict) else None
        try:
            actor = await self._authenticator.actor(token)
            if self._draining:
                raise Unavailable("This instance stops.")
            return actor
        except Unauthenticated:
            try:
                await self._limits.stranger_network(caller)
            except RateLimited as refusal:  # refused for now, not for good
                raise Unavailable(refusal.detail, **refusal.fields) from None
            raise

    async def _open_connection(self, connection: Connection, auth: object) -> Opening:
        opening = NOTHING_MORE
        if isinstance(auth, dict) and auth.get("recovery") is True:
            opening = await self._recoveries.open(connection, auth)
        self._register(connection)
        return opening

    def _register(self, connection: Connection) -> None:
        metrics.connections.inc()
        actor = connection.actor
        if actor.role is Role.AGENT:
            if actor.sub not in self._agents:
                self._bus.subscribe(user_channel(actor.sub))
            self._agents.setdefault(actor.sub, {})[connection.id] = connection
        self._token_deadlines.set(connection, actor.exp - self._settings.token_expiry_notice_s)
        log.debug("socket_opened", connection_id=connection.id, role=actor.role)

    def _on_close(self, connection: Connection) -> None:
        metrics.connections.dec()
        self._token_deadlines.drop(connection)
        self.rooms.leave_all(connection)
        agent = connection.actor.sub
        if connection.actor.role is Role.AGENT:
            del self._agents[agent][connection.id]
            if not self._agents[agent]:
                del self._agents[agent]
                self._assigned.pop(agent, None)
                self._bus.unsubscribe(user_channel(agent))
        log.debug("socket_closed", connection_id=connection.id)

    async def watch_tokens(self) -> None:
        """Tell clients that their token is about to expire, and end the sessions whose token has expired and was not
        refreshed within the grace, until cancelled."""
        while True:
            await asyncio.sleep(EXPIRY_LOOK_S)
            now = time.time()
            for count, connection in enumerate(self._token_deadlines.take_due(now), 1):
                exp = connection.actor.exp
                if exp + self._settings.token_expiry_grace_s <= now:
                    self._end(connection, "expired")
                elif not connection.left:
                    self._token_deadlines.set(connection, exp + self._settings.token_expiry_grace_s)
                    connection.emit("tokenExpiring", TokenExpiring(expires_at=_unix_rfc3339(exp)))
                if count % AT_ONCE_MAX == 0:
                    await asyncio.sleep(0)

    def end_revoked(self) -> None:
        """End the sessions whose token was revoked. They hear nothing more, from this step on."""
        revocations = self._authenticator.revocations
        for connection in list(self.engine.connections.values()):
            if revocations.revoked(connection.actor):
                self._end(connection, "revoked")

    def _end(self, connection: Connection, code: str) -> None:
        """Shut the connection out at once; the protocol's goodbye follows."""
        if connection.left:
            return
        connection.left = True
        metrics.expelled.labels(code).inc()
        for key in list(connection.keys):
            self._close_subscription(connection, key, code)
        goodbye = asyncio.create_task(self.engine.expel(connection, code), name="expel")
        self._goodbyes.add(goodbye)
        goodbye.add_done_callback(self._said_goodbye)

    def _said_goodbye(self, goodbye: asyncio.Task[None]) -> None:
        self._goodbyes.discard(goodbye)
        if not goodbye.cancelled() and goodbye.exception() is not None:
            log.error("expel_failed", exc_info=goodbye.exception())

    def _close_subscription(self, connection: Connection, order_id: str, code: str) -> None:
        self._leave(connection, order_id)
        connection.emit("subscriptionClosed", SubscriptionClosed(order_id=order_id, code=code))

    async def drain(self) -> None:
        """Tell every client to come back elsewhere, and end the transports, in batches. Those that are not closed yet
        go on as before."""
        self._draining = True
        self.engine.end_unconnected()
        while connections := [one for one in self.engine.connections.values() if not one.gone]:
            # more than once: some were just being connected
            await send_away(connections, self._settings.drain_batch_max, self._settings.drain_spread_ms)

    # what clients send

    def _on_event(self, connection: Connection, name: str, args: list[Any], number: int | None) -> None:
        """Read one event and start its work. Positions of a known agent are done at once, the rest in tasks; a client
        that asks faster than it is answered is read no further until an answer is out."""
        handler = EVENTS.get(name)
        counts = handler is None or handler.run is not Sockets.update_location  # positions are thinned, never refused
        try:
            if counts:
                self._limits.check_event(connection.actor)
            if handler is None:
                raise NotFound(f"There is no event {name[:100]!r}.")
            argument = args[0] if args else {}
            if isinstance(argument, Unreadable):
                raise Malformed("The arguments are not JSON.")
            payload = convert(argument, handler.payload)
            if handler.run is not Sockets.refresh_token:
                self._authenticator.check(connection.actor)  # in the grace nothing new is begun with an old token
            if handler.run is Sockets.update_location and number is None:
                # the hot path: an agent that wants no answer is worth no task; but it overtakes none
                if payload.order_id not in connection.last_calls and self._locations.accept_at_once(
                    connection.actor, payload.order_id, payload, connection.id
                ):
                    return
        except Refused as refusal:
            if counts and not isinstance(refusal, RateLimited):
                self._limits.count_event(connection.actor)
            self._refuse(connection, number, name, refusal)
            return
        order_id = getattr(payload, "order_id", "")
        call = self._call(handler, connection, name, payload, number, connection.last_calls.get(order_id))
        connection.last_calls[order_id] = task = asyncio.create_task(call)
        connection.calls.add(task)
        calls_max = self._settings.calls_in_flight_per_socket_max
        if len(connection.calls) >= calls_max:
            connection.wire.hold()

        def done(task: asyncio.Task[None]) -> None:
            connection.calls.discard(task)
            if len(connection.calls) == calls_max - 1:
                connection.wire.resume()
            if connection.last_calls.get(order_id) is task:
                del connection.last_calls[order_id]

        task.add_done_callback(done)

    async def _call(
        self,
        handler: _Event,
        connection: Connection,
        name: str,
        payload: Any,
        number: int | None,
        before: asyncio.Task[None] | None,
    ) -> None:
        structlog.contextvars.bind_contextvars(connection_id=connection.id)
        if before is not None:
            await asyncio.wait((before,))
        try:
            if handler.run is not Sockets.update_location:
                await self._limits.event(connection.actor)
            await handler.run(self, connection, payload, number)
        except Refused as refusal:
            self._refuse(connection, number, name, refusal)
        except Exception:
            log.exception("socket_event_failed", socket_event=name)
            self._refuse(connection, number, name, Unavailable("This failed on our side; try again."))

    def _acknowledge(self, connection: Connection, number: int | None, name: str, outcome: str, body: bytes) -> None:
        metrics.socket_events.labels(name, outcome).inc()
        if number is not None:
            connection.send(acknowledgement(number, body))

    def _refuse(self, connection: Connection, number: int | None, name: str, refusal: Refused) -> None:
        error = {"code": refusal.code, "message": refusal.detail, **refusal.fields}
        body = msgspec.json.encode({"ok": False, "error": error})
        self._acknowledge(connection, number, name if name in EVENTS else "unknown", refusal.code, body)

    async def subscribe(self, connection: Connection, payload: Subscribe, number: int | None) -> None:
        key = payload.order_id
        after = None if isinstance(payload.after_seq, UnsetType) else payload.after_seq
        self._entrance.check_subscriptions(connection, key)
        try:
            async with asyncio.timeout(self._settings.subscribe_timeout_ms / 1000):
                one = await self._entrance.enter(connection, key, after, asked=True)
        except Invalid:
            raise  # of what the client asked, nothing was done: an earlier subscription stays
        except Unsaved:
            self._send_away(connection)
            return
        except TimeoutError:
            self._leave(connection, key)
            raise Unavailable("Subscribing took too long; try again.") from None
        except BaseException:
            self._leave(connection, key)
            raise
        if connection.gone:
            self.rooms.leave(connection, key)
            return
        # from here to the end nothing may wait: the answer and the membership are one step
        room, picture = one.room, one.picture
        self._acknowledge(connection, number, "subscribeToOrder", "ok", self._snapshots.answer(room, picture))
        if connection.recoverable is not None:
            connection.recoverable.joined(key, picture.seq)
        self.rooms.settle(room, one.member, picture.seq, picture.epoch)
        self._snapshots.keep(room, picture)

    def _leave(self, connection: Connection, key: str) -> None:
        self.rooms.leave(connection, key)
        if connection.recoverable is not None:
            connection.recoverable.left(key)

    def _send_away(self, connection: Connection) -> None:
        """Redis cannot keep the session of a recoverable client: what it asked for stays unanswered, and it comes back
        without a session."""
        metrics.connections_cut.labels("recovery_unsaved").inc()
        connection.hang_up()

    async def unsubscribe(self, connection: Connection, payload: Unsubscribe, number: int | None) -> None:
        self.rooms.leave(connection, payload.order_id)
        if connection.recoverable is not None:
            try:
                await connection.recoverable.leaving(payload.order_id)
            except Unsaved:
                self._send_away(connection)
                return
        self._acknowledge(connection, number, "unsubscribeFromOrder", "ok", msgspec.json.encode(Done(True)))

    async def update_location(self, connection: Connection, payload: UpdateLocation, number: int | None) -> None:
        (refusal,) = await self._locations.accept(connection.actor, payload.order_id, [payload], connection.id)
        if refusal is not None:
            raise refusal
        pause_ms = self._locations.next_interval_ms(connection.actor.sub, payload.order_id)
        answer = msgspec.json.encode(LocationTaken(True, pause_ms))
        self._acknowledge(connection, number, "updateLocation", "ok", answer)

    async def update_status(self, connection: Connection, payload: UpdateOrderStatus, number: int | None) -> None:
        key = None if isinstance(payload.idempotency_key, UnsetType) else payload.idempotency_key
        command = orders.ChangeStatus(status=payload.status, note=payload.note)
        answer = await self._doors.perform(CHANGE_STATUS, connection.actor, payload.order_id, command, key=key)
        top = msgspec.json.decode(answer.body, type=_Top).seq
        self._acknowledge(connection, number, "updateOrderStatus", "ok", msgspec.json.encode(StatusChanged(True, top)))

    async def refresh_token(self, connection: Connection, payload: RefreshToken, number: int | None) -> None:
        actor = await self._authenticator.actor(payload.token)
        if (actor.sub, actor.role) != (connection.actor.sub, connection.actor.role):
            raise Forbidden("The new token belongs to somebody else.")
        if connection.left:
            return  # while the key server was asked
        connection.actor = actor
        told_at = actor.exp - self._settings.token_expiry_notice_s
        # a token that is about to expire, too: the notice that was given still stands
        due_at = told_at if told_at > time.time() else actor.exp + self._settings.token_expiry_grace_s
        self._token_deadlines.set(connection, due_at)
        for key in list(connection.keys):
            member = self.rooms.member(connection, key)
            if not actor.reaches(key):
                self._close_subscription(connection, key, "revoked")
            elif member is not None:
                member.view = view_of(actor)
        answer = TokenRefreshed(True, _unix_rfc3339(actor.exp))
        self._acknowledge(connection, number, "refreshToken", "ok", msgspec.json.encode(answer))

    # what the bus brings

    def on_message(self, channel: str, message: bytes) -> None:
        """A message of a channel that this instance subscribed to."""
        if channel.startswith(ORDER_PREFIX):
            if message[:1] == b"p":
                epoch, ts, origin, payload = parse(message[1:])
                self.rooms.hear_position(channel[len(ORDER_PREFIX) + 1 : -1], epoch, ts, origin, payload)
            else:
                order_id, events = unpack(message[1:])
                self.rooms.hear(order_id, events)
        elif channel.startswith(USER_PREFIX):
            order_id, events = unpack(message[1:])
            for event in events:
                self._tell_agent(channel[len(USER_PREFIX) :], order_id, event)

    def _tell_agent(self, agent_id: str, order_id: str, event: Event) -> None:
        """An assignment for the sockets of an agent that do not watch the order; those that do hear it in its room."""
        self._locations.forget(agent_id, order_id)
        if agent_id not in self._agents:
            return
        told = self._assigned.setdefault(agent_id, {})
        if told.get(order_id, 0) >= event.seq:
            return  # the relay did not know that it was sent
        told.pop(order_id, None)  # to the end: the latest ones are kept
        told[order_id] = event.seq
        if len(told) > ASSIGNMENTS_TOLD_MAX:
            del told[next(iter(told))]
        message = _frame_of(event, FULL)
        for connection in self._agents[agent_id].values():
            if connection.left or not connection.actor.reaches(order_id):
                continue
            member = self.rooms.member(connection, order_id)
            if member is None:
                connection.send(message)
            elif member.pending:
                member.owed = (event.seq, message)  # it may be refused yet

    def _on_entry(self, room: Room[Event], event: Event) -> None:
        """An event is about to be delivered: close what it ends."""
        metrics.event_delivery_seconds.observe(time.time() - dt.datetime.fromisoformat(event.at).timestamp())
        if event.type == Type.ASSIGNED:
            agent = event.data["agent"]
            room.learn_epoch(event.seq if agent else 0, event.seq)
            for member in list(room.members.values()):
                actor = member.connection.actor
                if member.mark >= event.seq:
                    continue  # its snapshot is newer, and was permitted
                if actor.role is Role.AGENT and (agent is None or agent["id"] != actor.sub):
                    self._close_subscription(member.connection, room.key, "reassigned")
        elif event.type == Type.STATUS and Status(event.data["status"]) in FINAL:
            room.learn_epoch(0, event.seq)

    async def _read_missed(self, tops: Mapping[str, int]) -> Mapping[str, Sequence[Event]]:
        async with self._doors.database.statement() as tx:
            found = await tracking.missed(tx, dict(tops))
        if found:
            await self._read_revocations()  # after the events: whoever was revoked before one of them does not hear it
        metrics.gaps_filled.inc(sum(len(events) for events in found.values()))
        return found


class _Event(NamedTuple):
    """One event of clients: what it carries, how it is answered, and how it may be refused besides what all may."""

    payload: type[Any]
    run: Callable[[Sockets, Connection, Any, int | None], Awaitable[None]]
    answer: type[Any]
    doing: str
    refuses: tuple[type[Refused], ...] = ()


CHANGE_STATUS = Verb("change_status", orders.change_status)

EVENTS: dict[str, _Event] = {
    "subscribeToOrder": _Event(
        Subscribe,
        Sockets.subscribe,
        Subscribed,
        "Watch an order: the answer is a snapshot, what follows comes live",
        (NotFound,),
    ),
    "unsubscribeFromOrder": _Event(Unsubscribe, Sockets.unsubscribe, Done, "Watch it no more"),
    "updateLocation": _Event(
        UpdateLocation,
        Sockets.update_location,
        LocationTaken,
        "The assigned agent's position",
        (Forbidden, NotFound, OrderClosed, Stale, Future, Inaccurate, Jump),
    ),
    "updateOrderStatus": _Event(
        UpdateOrderStatus,
        Sockets.update_status,
        StatusChanged,
        "Move an order to another status",
        (Forbidden, NotFound, IllegalMove, PaymentRequired, Conflict, IdempotencyMismatch),
    ),
    "refreshToken": _Event(
        RefreshToken,
        Sockets.refresh_token,
        TokenRefreshed,
        "Extend this connection with a newer token of the same person",
        (Forbidden,),
    ),
}


def _frame_of(event: Event, view: str) -> Frame:
    return frame(event.type, (event.for_tracking() if view == TRACKED else event).payload)


def _unix_rfc3339(seconds: float) -> str:
    return rfc3339(dt.datetime.fromtimestamp(min(seconds, 253_402_300_799), dt.UTC))
