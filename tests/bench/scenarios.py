"""The jobs that are measured. Each gives its figures by name, or raises `RunFailed`: lost events make no figures."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from handlers.webhooks import STORE
from server.adapters import razorpay_news
from tests.bench import judge, kernel
from tests.bench.generator import Program, RunFailed, State
from tests.bench.stands import (
    CONNECTED_WITHIN_S,
    CONNECTING_AT_ONCE,
    FASTIFY,
    NODE,
    RAZORPAY,
    STOCK,
    WAYBILL,
    Ground,
    Server,
    Stand,
    order_body,
    stand,
)
from tests.bench.webhooks import Webhook, captured, of_nobody, write
from tests.harness import SECRET

Figures = dict[str, float]

SETTLE_S = 5.0
"""Longest wait for what is still under way when the load has stopped."""
POSTING_CONNECTIONS = 16
REJOINED_WITHIN_S = 90.0
DELIVERED_WITHIN_S = 120.0
"""Longest wait until all webhooks are answered, or applied."""
LOOK_S = 0.05
"""Pause between two looks at the inbox."""
LOAD_BUSY_MAX = 0.9
"""Above this share of its core it may be the load generator that was measured."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How big the jobs are."""

    seconds: float
    """How long each is measured."""
    warm_up_s: float = 1.0
    """How long the load is on before."""
    rest_s: float = 2.0
    """How long a server is left alone before its memory is read."""
    hot_watchers: int = 1000
    hot_pushes_per_s: float = 20
    fleet_orders: int = 500
    fleet_watchers: int = 3
    fleet_pushes_per_s: float = 4
    idle_watchers: int = 4000
    storm_sockets: int = 5000
    storm_moves_per_s: float = 50
    crowd_sockets: int = 10_000
    moves_per_s: float = 200
    webhooks: int = 20_000
    captures_per_s: float = 50
    full_inbox: int = 1000


def smoke(seconds: float) -> Scale:
    """Just enough to see that everything works."""
    return Scale(
        seconds=seconds,
        warm_up_s=0.2,
        rest_s=0.2,
        hot_watchers=20,
        fleet_orders=8,
        idle_watchers=80,
        storm_sockets=40,
        crowd_sockets=100,
        moves_per_s=40,
        webhooks=200,
        full_inbox=20,
    )


async def hot(ground: Ground, who: str, scale: Scale) -> Figures:
    """One order that everybody watches."""
    async with stand(ground, who, orders=1) as on, on.load(watchers=scale.hot_watchers, agents=True) as load:
        return await _fan_out(on, load, scale.hot_pushes_per_s, scale)


async def fleet(ground: Ground, who: str, scale: Scale) -> Figures:
    """Many orders with a few watchers each."""
    watchers = scale.fleet_orders * scale.fleet_watchers
    async with stand(ground, who, orders=scale.fleet_orders) as on, on.load(watchers=watchers, agents=True) as load:
        return await _fan_out(on, load, scale.fleet_pushes_per_s, scale)


async def bystander(ground: Ground, who: str, scale: Scale) -> Figures:
    """What `fleet` on one instance costs the other one, where nobody watches."""
    watchers = scale.fleet_orders * scale.fleet_watchers
    async with (
        stand(ground, who, orders=scale.fleet_orders, instances=2) as on,
        on.load(watchers=watchers, agents=True) as load,
    ):
        await connect_all(load)
        await load.tell(f"push {scale.fleet_pushes_per_s}")
        await asyncio.sleep(scale.warm_up_s)
        shown = (await load.tell())["shown"]
        cpu_s, since = on.servers[1].cpu_s(), time.monotonic()
        await asyncio.sleep(scale.seconds)
        share = (on.servers[1].cpu_s() - cpu_s) / (time.monotonic() - since)
        if (await load.tell("push 0"))["shown"] == shown:
            raise RunFailed("no position was shown while the other instance was looked at")
        return {"core_percent": 100 * share}


async def connect(ground: Ground, who: str, scale: Scale) -> Figures:
    """Connect and subscribe, then only stay."""
    async with stand(ground, who, orders=scale.fleet_orders) as on, on.load(watchers=scale.idle_watchers) as load:
        server = on.servers[0]
        cpu_s, resident = server.cpu_s(), server.resident_bytes()
        state = await connect_all(load)
        cpu_us = (server.cpu_s() - cpu_s) * 1e6
        await asyncio.sleep(scale.rest_s)
        count = state["sockets"]
        return {
            "connect_cpu_us": cpu_us / count,
            "connect_p99_ms": state["connecting"]["p99_ms"],
            "resident_kib": (server.resident_bytes() - resident) / 1024 / count,
            "kernel_kib": sum(kernel.connections(server.port)) / 1024 / count,
        }


async def reconnect(ground: Ground, who: str, scale: Scale) -> Figures:
    """One of two instances is killed; all its clients come back at once, to the one that is left."""
    ours = who == WAYBILL
    async with (
        stand(ground, who, orders=scale.fleet_orders, instances=2) as on,
        on.load(watchers=scale.storm_sockets) as load,
    ):
        killed, left = on.servers
        await connect_all(load, "replay" if ours else "")
        await load.tell(f"rejoin {left.port}")
        if ours:  # the peers have no events that could be lost
            await load.tell(f"move {left.port} {scale.storm_moves_per_s} {POSTING_CONNECTIONS}")
            await asyncio.sleep(scale.warm_up_s)
        cpu_s = left.cpu_s()
        since = time.monotonic()
        killed.kill()
        state = await load.until(lambda now: now["lost"] == now["sockets"] == now["ready"], within_s=REJOINED_WITHIN_S)
        if state["ready"] < state["sockets"]:
            raise RunFailed(f"{state['sockets'] - state['ready']} sockets did not come back in {REJOINED_WITHIN_S} s")
        figures = {
            "rejoin_s": state["last_ready_at_s"] - since,
            "rejoin_p50_s": state["rejoining"]["p50_ms"] / 1000,
            "rejoin_cpu_us": (left.cpu_s() - cpu_s) * 1e6 / state["sockets"],
            "refused_at_first": state["retries"],
        }
        if ours:
            await asyncio.sleep(scale.warm_up_s)
            # A change may be refused in the rush, and is asked for again: what counts is that none is lost.
            figures["events_checked"] = await check_events(on, load, may_refuse=True)
            figures["changes_refused"] = (await load.tell())["refused"]
        return figures


async def disconnect(ground: Ground, who: str, scale: Scale) -> Figures:
    """Everybody is gone at once, without a word."""
    async with stand(ground, who, orders=scale.fleet_orders) as on, on.load(watchers=scale.crowd_sockets) as load:
        server = on.servers[0]
        await connect_all(load)
        await asyncio.sleep(scale.rest_s)
        async with on.probe() as probe:
            before = await _waited(probe, scale.warm_up_s)
            since, cpu_s = time.monotonic(), server.cpu_s()
            await load.kill()
            while len(kernel.connections(server.port)) > 1:  # the one that is left is the probe's
                if time.monotonic() - since > REJOINED_WITHIN_S:
                    raise RunFailed(f"{who} still holds connections after {REJOINED_WITHIN_S} s")
                await asyncio.sleep(0.1)
            took_s = time.monotonic() - since
            during = await _waited(probe, scale.warm_up_s)
            return {
                "blocked_ms": during["max_ms"],
                "blocked_before_ms": before["max_ms"],
                "released_s": took_s,
                "release_cpu_us": (server.cpu_s() - cpu_s) * 1e6 / scale.crowd_sockets,
            }


async def status(ground: Ground, who: str, scale: Scale) -> Figures:
    """`POST status` at a steady rate, until the watchers have the event."""
    watchers = scale.fleet_orders * scale.fleet_watchers
    async with stand(ground, who, orders=scale.fleet_orders) as on, on.load(watchers=watchers) as load:
        server = on.servers[0]
        await connect_all(load, "replay")
        await load.tell(f"move {server.port} {scale.moves_per_s} {POSTING_CONNECTIONS}")
        await asyncio.sleep(scale.warm_up_s)
        await load.tell("reset")
        cpu_s = server.cpu_s()
        await asyncio.sleep(scale.seconds)
        state = await load.tell()
        cpu_us = (server.cpu_s() - cpu_s) * 1e6
        checked = await check_events(on, load)
        return {
            "event_p50_ms": state["telling"]["p50_ms"],
            "event_p99_ms": state["telling"]["p99_ms"],
            "answer_p99_ms": state["answering"]["p99_ms"],
            "cpu_us_per_change": cpu_us / _some(state["answered"], "status changes"),
            "changes_per_s": state["answered"] / scale.seconds,
            "events_checked": checked,
        }


async def place(ground: Ground, who: str, scale: Scale) -> Figures:
    """`POST /orders`, each connection again as soon as it is answered."""
    async with stand(ground, who, orders=0) as on, on.load(watchers=0) as load:
        server = on.servers[0]
        body = on.folder / "order.json"
        body.write_text(json.dumps(order_body(1)))
        await load.tell(f"place {server.port} {POSTING_CONNECTIONS} {body}")
        await asyncio.sleep(scale.warm_up_s)
        await load.tell("reset")
        cpu_s = server.cpu_s()
        await asyncio.sleep(scale.seconds)
        state = await load.tell()
        cpu_us = (server.cpu_s() - cpu_s) * 1e6
        await load.tell("rest")
        _whole(await load.until(lambda now: now["posts_open"] == 0, SETTLE_S))
        answered = _some(state["answered"], "orders")
        return {
            "cpu_us_per_order": cpu_us / answered,
            "orders_per_cpu_ms": answered * 1000 / cpu_us,
            "orders_per_s": answered / scale.seconds,
            "answer_p99_ms": state["answering"]["p99_ms"],
        }


async def webhooks(ground: Ground, who: str, scale: Scale) -> Figures:
    """Signed webhooks, each connection again as soon as it is answered: they are stored, and nobody applies them."""
    async with stand(ground, who, orders=0, mode="web", settings=RAZORPAY) as on, on.load(watchers=0) as load:
        server = on.servers[0]
        warm_up, measured = on.folder / "warm-up", on.folder / "webhooks"
        write(warm_up, of_nobody(scale.webhooks // 10), SECRET)
        write(measured, of_nobody(scale.webhooks), SECRET)
        await _deliver(load, server, 0, warm_up, scale.webhooks // 10)
        before, cpu_s, since = await load.tell("reset"), server.cpu_s(), time.monotonic()
        state = await _deliver(load, server, 0, measured, scale.webhooks)
        took_s, cpu_us = time.monotonic() - since, (server.cpu_s() - cpu_s) * 1e6
        async with on.tables() as tables:
            stored = await tables.fetchval("select count(*) from webhooks")
        if stored != scale.webhooks // 10 + scale.webhooks:
            raise RunFailed(f"{stored} webhooks are stored, which is not how many were sent")
        return {
            "cpu_us_per_webhook": cpu_us / scale.webhooks,
            "webhooks_per_s": scale.webhooks / took_s,
            "answer_p99_ms": state["answering"]["p99_ms"],
            "load_busy_percent": 100 * (state["cpu_s"] - before["cpu_s"]) / took_s,
        }


async def settle(ground: Ground, who: str, scale: Scale) -> Figures:
    """Captures at a steady rate, until the watchers of their orders know; then an inbox that is full at once."""
    early, steady = (round(scale.captures_per_s * seconds) for seconds in (scale.warm_up_s, scale.seconds))
    async with stand(ground, who, orders=0) as on:
        server = on.servers[0]
        begun, secret = await on.begin_payments(early + steady + scale.full_inbox)
        sent = [captured(number, name, amount) for number, (name, amount) in enumerate(begun)]
        warm_up, measured = on.folder / "warm-up", on.folder / "webhooks"
        write(warm_up, sent[:early], secret)
        write(measured, sent[early : early + steady], secret)
        async with on.load(watchers=len(sent)) as load, on.tables() as tables:
            await connect_all(load, "replay")
            await _deliver(load, server, scale.captures_per_s, warm_up, early)
            await _told(load, early)
            await load.tell("reset")
            cpu_s = server.cpu_s()
            await _deliver(load, server, scale.captures_per_s, measured, steady)
            state = await _told(load, steady)
            cpu_us = (server.cpu_s() - cpu_s) * 1e6
            await _fill_inbox(tables, sent[early + steady :])
            cpu_s, since = server.cpu_s(), time.monotonic()
            while await tables.fetchval("select exists(select from webhooks where status <> 'applied')"):
                if time.monotonic() - since > DELIVERED_WITHIN_S:
                    raise RunFailed(f"the inbox was not empty after {DELIVERED_WITHIN_S} s")
                await asyncio.sleep(LOOK_S)
            took_s, full_cpu_us = time.monotonic() - since, (server.cpu_s() - cpu_s) * 1e6
            paid = await tables.fetchval("select count(*) from payments where status = 'completed'")
            if paid != len(sent):
                raise RunFailed(f"{paid} payments of {len(sent)} are completed")
            return {
                "event_p50_ms": state["telling"]["p50_ms"],
                "event_p99_ms": state["telling"]["p99_ms"],
                "cpu_us_per_capture": cpu_us / steady,
                "settles_per_s": scale.full_inbox / took_s,
                "cpu_us_per_settle": full_cpu_us / scale.full_inbox,
                "events_checked": await check_events(on, load),
            }


async def _deliver(load: Program, server: Server, rate: float, file: Path, count: int) -> State:
    """POST the webhooks of a file, `rate` a second or as fast as they are answered, and wait for the last answer."""
    since = await load.tell(f"deliver {server.port} {rate} {POSTING_CONNECTIONS} {file}")
    answered = since["answered"] + count

    def done(now: State) -> bool:
        return bool(now["answered"] == answered or now["refused"])

    state = await load.until(done, DELIVERED_WITHIN_S)
    _whole(state)
    if state["answered"] != answered:
        raise RunFailed(f"{answered - state['answered']} webhooks were not answered in {DELIVERED_WITHIN_S} s")
    return state


async def _told(load: Program, count: int) -> State:
    """Wait until the watchers of so many orders know of their payment."""
    state = await load.until(lambda now: now["telling"]["count"] == count, SETTLE_S)
    if state["telling"]["count"] != count:
        raise RunFailed(f"{state['telling']['count']} watchers of {count} know of their payment after {SETTLE_S} s")
    return state


async def _fill_inbox(tables: asyncpg.Connection, sent: Sequence[Webhook]) -> None:
    """Store them all in one moment, as the door does."""
    rows = []
    for webhook in sent:
        delivery = razorpay_news.delivery_of(webhook.body, webhook.event_id)
        row = (uuid.uuid4(), "razorpay", delivery.event_id, delivery.kind, delivery.refs, webhook.body)
        rows.append((*row, dt.datetime.now(dt.UTC)))
    await tables.executemany(STORE, rows)


@dataclass(frozen=True)
class Scenario:
    run: Callable[[Ground, str, Scale], Awaitable[Figures]]
    who: tuple[str, ...]
    """Who can do it, in the order of their turns."""
    sockets: Callable[[Scale], int] = lambda scale: scale.fleet_orders * (scale.fleet_watchers + 1)
    """About how many are open at once."""


ROOMS = (WAYBILL, NODE, STOCK)
SCENARIOS = {
    "hot": Scenario(hot, ROOMS, lambda scale: scale.hot_watchers),
    "fleet": Scenario(fleet, ROOMS),
    "connect": Scenario(connect, ROOMS, lambda scale: scale.idle_watchers),
    # not stock python-socketio: under this load it publishes a fraction only, so that the other instance has no work
    "bystander": Scenario(bystander, (WAYBILL, NODE)),
    "reconnect": Scenario(reconnect, ROOMS, lambda scale: scale.storm_sockets),
    "disconnect": Scenario(disconnect, ROOMS, lambda scale: scale.crowd_sockets),
    "status": Scenario(status, (WAYBILL,)),
    "place": Scenario(place, (WAYBILL, FASTIFY)),
    "webhooks": Scenario(webhooks, (WAYBILL, FASTIFY), lambda scale: 0),
    "settle": Scenario(
        settle,
        (WAYBILL,),
        lambda scale: round((scale.warm_up_s + scale.seconds) * scale.captures_per_s) + scale.full_inbox,
    ),
}


async def connect_all(load: Program, how: str = "") -> State:
    """Connect and subscribe every client, some at once; with `replay` they want all events of their order."""
    await load.tell(f"connect {CONNECTING_AT_ONCE} {how}")
    state = await load.until(lambda now: now["ready"] + now["failed"] == now["sockets"], CONNECTED_WITHIN_S)
    if state["ready"] < state["sockets"]:
        raise RunFailed(f"{state['sockets'] - state['ready']} of {state['sockets']} did not connect: {state['why']}")
    return state


async def _fan_out(on: Stand, load: Program, pushes_per_s: float, scale: Scale) -> Figures:
    server = on.servers[0]
    await connect_all(load)
    await load.tell(f"push {pushes_per_s}")
    await asyncio.sleep(scale.warm_up_s)
    await load.tell("push 0")
    await load.until(_all_shown, SETTLE_S)
    before = await load.tell("reset")
    cpu_s = server.cpu_s()
    await load.tell(f"push {pushes_per_s}")
    await asyncio.sleep(scale.seconds)
    during = await load.tell("push 0")
    cpu_us = (server.cpu_s() - cpu_s) * 1e6
    after = await load.until(_all_shown, SETTLE_S)
    if after["lost"]:
        raise RunFailed(f"{after['lost']} sockets were lost: {after['why']}")
    if after["old_positions"] and on.who == WAYBILL:  # of a peer they only count as not shown
        raise RunFailed(f"{after['old_positions']} positions came twice or after a newer one")
    due = _some(after["due"], "positions") + after["blocked"] * after["due"] / max(after["pushed"], 1)
    return {
        "cpu_us_per_delivery": cpu_us / _some(during["shown"], "positions"),
        "shown_percent": 100 * after["shown"] / due,
        "p50_ms": after["showing"]["p50_ms"],
        "p99_ms": after["showing"]["p99_ms"],
        "deliveries_per_s": during["shown"] / scale.seconds,
        "load_busy_percent": 100 * (during["cpu_s"] - before["cpu_s"]) / scale.seconds,
    }


def _all_shown(state: State) -> bool:
    return bool(state["shown"] >= state["due"])


async def check_events(on: Stand, load: Program, *, may_refuse: bool = False) -> int:
    """Stop the moves, wait until the news is out, and compare what every watcher heard with the table.

    Returns how many events were compared. Raises `RunFailed` when any of them was lost, repeated or out of order.
    """
    await load.tell("rest")
    state = await load.until(lambda now: now["posts_open"] == 0, SETTLE_S)
    table = await on.table()
    watchers = state["sockets"]
    tops = sum(len(table[on.orders[number % len(on.orders)]]) for number in range(watchers))
    state = await load.until(lambda now: now["tops"] >= tops, SETTLE_S)
    file = on.folder / "heard"
    _whole(await load.tell(f"heard {file}"), may_refuse=may_refuse)
    heard = judge.heard_in(file.read_text())
    if found := judge.faults(table, heard):
        raise RunFailed(f"{len(found)} of {watchers} watchers have other events than the table: {'; '.join(found[:3])}")
    return sum(len(events) for _, events in heard)


def _whole(state: State, *, may_refuse: bool = False) -> None:
    """Nothing went wrong that the figures would not show."""
    for what in ("failed", "refused", "bad_answers", "not_understood", "posts_open"):
        if state[what] and not (what == "refused" and may_refuse):
            raise RunFailed(f"{what.replace('_', ' ')}: {state[what]} ({state['why']})")


def _some(count: int, of: str) -> int:
    if not count:
        raise RunFailed(f"there were no {of}")
    return count


async def _waited(probe: Program, seconds: float) -> dict[str, float]:
    """Look on a little longer; what the probe saw since the last time."""
    await asyncio.sleep(seconds)
    waiting: dict[str, float] = (await probe.tell())["waiting"]
    return waiting
