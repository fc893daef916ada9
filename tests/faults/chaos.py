"""One run: orders move, faults strike as the seed says, everything is repaired, and every watcher is compared with the
table. `scripts/chaos` makes many; tests/faults/test_chaos.py makes a few in CI.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import secrets
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.faults.faults import FAULTS
from tests.faults.model import difference, told
from tests.faults.watchers import OfficialWatcher, RestWatcher, SocketWatcher, Watcher
from tests.faults.world import (
    CUSTOMER,
    DB_TIMEOUT_MS,
    GAP_CHECK_S,
    POLL_MS,
    REDIS_TIMEOUT_MS,
    RELAY_GRACE_MS,
    SHOP,
    World,
    world,
)
from tests.flows.official import Node
from tests.harness import until

ORDERS = 2
"""Orders of one run; each watcher watches all of them."""
FORERUN_S = 0.2
"""The orders move for so long before the first fault, and after the last one in the runs where they go on."""
SLACK_S = 5.0
"""What clients that come back, and a busy machine, may add to the server's own waits."""
CATCH_UP_S = GAP_CHECK_S + (POLL_MS + REDIS_TIMEOUT_MS + DB_TIMEOUT_MS + RELAY_GRACE_MS) / 1000 + SLACK_S
"""After the last repair, and the last move, everybody has everything within this."""
LAST_MOVES = 2
"""Moves of each order when all is well again: they show that nobody is left behind, and nothing trails."""
ENDS_STAYERS = {"instance_killed", "instance_drained", "killed_before_publish", "clients_in_tunnel"}
"""Faults that may end the connection of somebody who does not come back."""
ONLY_CLIENTS = {"clients_close", "clients_half_open", "clients_in_tunnel"}


class Strike(NamedTuple):
    """One fault of a run. Times are seconds after the first move."""

    fault: str
    at_s: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.fault} at {self.at_s:.1f} s for {self.seconds:.1f} s"


class Plan(NamedTuple):
    """What a seed decides before a run begins."""

    seed: int
    strikes: tuple[Strike, ...]
    moves_go_on: bool
    """Orders move until after the last repair; else they stop in the middle of it all, and nothing reveals what was
    lost last."""

    def __str__(self) -> str:
        faults = ",".join(strike.fault for strike in self.strikes)
        until_when = "after the repair" if self.moves_go_on else "before the repair"
        return f"--seed {self.seed} --faults {faults}: {'; '.join(map(str, self.strikes))}; moves stop {until_when}"


def plan(seed: int, faults: Sequence[str], long: bool = False) -> Plan:
    """The plan of this seed for these faults."""
    rng = random.Random(f"{seed} {' '.join(faults)}")
    strikes = []
    for name in faults:
        spans = FAULTS[name]
        strikes.append(Strike(name, rng.uniform(0, 0.8), rng.uniform(*(spans.long if long else spans.brief))))
    return Plan(seed, tuple(strikes), rng.random() < 0.5)


@dataclass
class Outcome:
    """How a run ended."""

    plan: Plan
    catch_up_s: float = 0.0
    """From the last repair, or the last move if that was later, until everybody had everything."""
    events: int = 0
    struck: dict[str, int] = field(default_factory=dict)
    recoveries: int = 0
    returns: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        said = (
            f"{'FAILED' if self.problems else 'ok'} {self.plan}\n  {self.events} events, {self.returns} returns, "
            f"{self.recoveries} recovered, caught up in {self.catch_up_s:.2f} s, struck {self.struck}"
        )
        return "\n".join([said, *(f"  - {problem}" for problem in self.problems)])


def watchers_of(here: World, orders: Sequence[str], rng: random.Random) -> list[Watcher]:
    """One of each kind, and one that stays at each instance."""

    def ours(
        name: str, by: str, urls: Sequence[str] = here.urls
    ) -> tuple[str, Sequence[str], str, Sequence[str], random.Random]:
        return name, urls, by, orders, random.Random(rng.random())

    found: list[Watcher] = [
        SocketWatcher(*ours(f"stays at {number}", CUSTOMER, [url]), stays=True) for number, url in enumerate(here.urls)
    ]
    found += [
        SocketWatcher(*ours("comes back", CUSTOMER)),
        SocketWatcher(*ours("comes back by polling", SHOP), polls=True),
        SocketWatcher(*ours("recovers", CUSTOMER), recovery=True),
        SocketWatcher(*ours("recovers by polling", SHOP), polls=True, recovery=True),
        RestWatcher(*ours("reads", SHOP)),
    ]
    if here.node is not None:
        found.append(OfficialWatcher(*ours("JavaScript comes back", SHOP), node=here.node))
        found.append(OfficialWatcher(*ours("JavaScript recovers", CUSTOMER), node=here.node, recovery=True))
    return found


async def play(
    here: World, planned: Plan, watching: Callable[[World, Sequence[str], random.Random], list[Watcher]] = watchers_of
) -> Outcome:
    """Carry out a plan. Whatever goes wrong is a problem of the outcome, not an exception."""
    outcome = Outcome(planned)
    rng = random.Random(f"{planned.seed}")
    here.stories.clear()
    here.complaints.clear()
    here.refusals.clear()
    running: list[asyncio.Task[None]] = []
    try:
        orders = [await here.place(random.Random(rng.random())) for _ in range(ORDERS)]
        here.watchers = watching(here, orders, rng)
        running = [asyncio.create_task(watcher.run(), name=watcher.name) for watcher in here.watchers]
        await until(lambda: all(watcher.watching for watcher in here.watchers), "everybody watches")
        healed_at = await _strike(here, planned, orders, rng, outcome)
        tops = {order_id: len(await here.table(order_id)) for order_id in orders}
        await _caught_up(here, tops)
        outcome.catch_up_s = time.monotonic() - healed_at
        await here.well()

        async def all_sent() -> bool:
            return await here.unsent() == 0

        await until(all_sent, "every event is marked as sent")
        for order_id in orders:
            for _ in range(LAST_MOVES):
                await here.move(order_id, rng)
        await _caught_up(here, {order_id: len(await here.table(order_id)) for order_id in orders})
    except AssertionError as error:
        outcome.problems.append(str(error))
    except Exception as error:  # of a move, or of a fault that could not do its work
        outcome.problems.append("".join(traceback.format_exception(error)))
    for task in running:
        if task.done() and task.exception() is not None:
            outcome.problems.append(f"{task.get_name()!r} broke: {task.exception()!r}")
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    if outcome.problems:
        await here.heal()
    outcome.problems += here.complaints
    for order_id, story in here.stories.items():
        await _judge(here, order_id, story.written, outcome)
    _judge_ways(here, planned, outcome)
    return outcome


async def _strike(here: World, planned: Plan, orders: Sequence[str], rng: random.Random, outcome: Outcome) -> float:
    """The orders move and the faults strike; returns when the last was repaired, or the last move was made."""

    async def strike(one: Strike) -> None:
        await asyncio.sleep(FORERUN_S + one.at_s)
        dice = random.Random(f"{planned.seed} {one.fault}")
        outcome.struck[one.fault] = await FAULTS[one.fault].inject(here, dice, one.seconds)

    enough = asyncio.Event()
    if not planned.moves_go_on:
        stop_s = FORERUN_S + max((one.at_s + one.seconds * 0.8 for one in planned.strikes), default=0)
        asyncio.get_running_loop().call_later(stop_s, enough.set)
    async with asyncio.TaskGroup() as moves:
        for order_id in orders:
            moves.create_task(here.move_on(order_id, random.Random(rng.random()), enough))
        await asyncio.gather(*(strike(one) for one in planned.strikes))
        if planned.moves_go_on:
            await asyncio.sleep(FORERUN_S)
            enough.set()
        repaired_at = time.monotonic()
    return max(repaired_at, here.moved_at)


async def _caught_up(here: World, tops: dict[str, int]) -> None:
    """Everybody who is still there has everything up to these numbers."""

    def behind() -> list[str]:
        return [
            f"{watcher.name!r} has {watcher.top(order_id)} of {top}"
            for watcher in here.watchers
            if not watcher.ended
            for order_id, top in tops.items()
            if watcher.top(order_id) < top
        ]

    try:
        await until(lambda: not behind(), "everybody has everything", CATCH_UP_S)
    except AssertionError:
        raise AssertionError(f"not caught up within {CATCH_UP_S:.1f} s: {'; '.join(behind())}") from None


async def _judge(here: World, order_id: str, written: Sequence[tuple[str, str | None]], outcome: Outcome) -> None:
    listed, rows = await here.listed(order_id), await here.table(order_id)
    outcome.events += len(rows)
    if wrong := difference(written, [told(*event) for event in listed]):
        outcome.problems.append(f"the table against the moves that were made: {wrong}")
    if [(data["seq"], name) for name, data in listed] != rows or [seq for seq, _ in rows] != list(
        range(1, len(rows) + 1)
    ):
        outcome.problems.append(f"the list is not the table, or has a hole: {rows}")
    for watcher in here.watchers:
        heard = watcher.heard[order_id]
        # somebody who does not come back has the events up to the end of the connection
        wanted = listed[: len(heard)] if watcher.ended else listed
        if wrong := difference(wanted, heard):
            outcome.problems.append(f"{watcher.name!r}: {wrong}")


def _judge_ways(here: World, planned: Plan, outcome: Outcome) -> None:
    faults = {strike.fault for strike in planned.strikes}
    for watcher in here.watchers:
        outcome.problems += [f"{watcher.name!r} {wrong}" for wrong in watcher.wrong[:3]]
        outcome.returns += max(0, watcher.connections - 1)
        outcome.recoveries += watcher.recoveries
        if watcher.ended and not faults & ENDS_STAYERS:
            outcome.problems.append(f"{watcher.name!r} lost its connection")
        if watcher.recoverable and faults <= ONLY_CLIENTS and watcher.recoveries < watcher.connections - 1:
            outcome.problems.append(
                f"{watcher.name!r} recovered {watcher.recoveries} times of {watcher.connections - 1}, with Redis well"
            )


# many runs


def every_case(alone: bool) -> list[tuple[str, ...]]:
    """Every fault alone, or every pair."""
    return [*itertools.combinations(FAULTS, 1 if alone else 2)]


async def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/chaos", description="Breaks a small production in every way we know, and looks for lost events."
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each case")
    parser.add_argument("--pairs", default="all", metavar="all|N", help="every pair of faults, or N that are drawn")
    parser.add_argument("--alone", action="store_true", help="every fault alone instead of pairs")
    parser.add_argument("--faults", metavar="A,B", help=f"only these together: {', '.join(FAULTS)}")
    parser.add_argument("--seed", type=int, help="the first seed; default: drawn")
    parser.add_argument("--brief", action="store_true", help="faults as short as in CI")
    parser.add_argument("--instances", type=int, default=3)
    asked = parser.parse_args(arguments)
    first = asked.seed if asked.seed is not None else secrets.randbelow(1_000_000)
    cases = [tuple(asked.faults.split(","))] if asked.faults else every_case(asked.alone)
    if unknown := {name for case in cases for name in case} - FAULTS.keys():
        parser.error(f"no such fault: {', '.join(unknown)}")
    if asked.pairs != "all":
        cases = random.Random(first).sample(cases, min(int(asked.pairs), len(cases)))
    plans = [plan(seed, case, not asked.brief) for seed in range(first, first + asked.seeds) for case in cases]
    outcomes: list[Outcome] = []
    folder = Path(tempfile.mkdtemp(prefix="waybill-chaos-"))
    try:
        async with AsyncExitStack() as stack:
            node = await stack.enter_async_context(Node()) if shutil.which("node") else None
            here = await stack.enter_async_context(world(folder, asked.instances, node))
            for number, planned in enumerate(plans, 1):
                outcomes.append(await play(here, planned))
                print(f"{number}/{len(plans)} {outcomes[-1]}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    failed = [outcome for outcome in outcomes if outcome.problems]
    worst = max(outcomes, key=lambda outcome: outcome.catch_up_s)
    print(f"{len(outcomes)} runs, {sum(outcome.events for outcome in outcomes)} events, {len(failed)} runs failed.")
    print(f"Worst catch-up: {worst.catch_up_s:.2f} s of at most {CATCH_UP_S:.1f}, in {worst.plan}")
    for outcome in failed:
        which = str(outcome.plan).partition(":")[0]
        print(f"Replay: scripts/chaos {which} --instances {asked.instances}{' --brief' * asked.brief}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
