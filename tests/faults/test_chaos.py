"""Every fault alone and a drawn sample of pairs, while orders move: nobody loses an event, hears one twice, or in
another order. And the harness that says so can say the opposite."""

from __future__ import annotations

import datetime as dt
import random
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.faults.chaos import Outcome, Plan, every_case, plan, play, watchers_of
from tests.faults.faults import FAULTS
from tests.faults.model import difference
from tests.faults.proxy import Jumbler
from tests.faults.test_delivery import metric
from tests.faults.watchers import SocketWatcher
from tests.faults.watchers import Watcher as AnyWatcher
from tests.faults.world import SHOP, World, world
from tests.flows.official import Node
from tests.harness import ORDER, SOON_S, Watcher

SEED = secrets.randbelow(1_000_000)
PAIRS = random.Random(SEED).sample(every_case(alone=False), 6)


@pytest.fixture(scope="module")
async def here(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """One small production for all runs of this file."""
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(Node()) if shutil.which("node") else None
        yield await stack.enter_async_context(world(tmp_path_factory.mktemp("chaos"), 2, node))


Show = Callable[[Outcome], None]


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    """Prints the seed and the plan of a run, also of one that is well."""

    def show(outcome: Outcome) -> None:
        with capsys.disabled():
            print(f"\n{outcome}")

    return show


@pytest.mark.parametrize("name", FAULTS)
async def test_nobody_loses_an_event_or_hears_one_twice_under(here: World, show: Show, name: str) -> None:
    outcome = await play(here, plan(SEED, [name]))
    show(outcome)
    assert not outcome.problems, f"scripts/chaos --brief --instances 2 {outcome}"
    assert outcome.struck[name], "the fault did not strike"


@pytest.mark.parametrize("draw", range(len(PAIRS)))
async def test_nobody_loses_an_event_or_hears_one_twice_under_two(here: World, show: Show, draw: int) -> None:
    outcome = await play(here, plan(SEED, PAIRS[draw]))
    show(outcome)
    assert not outcome.problems, f"scripts/chaos --brief --instances 2 {outcome}"


# the harness itself


class _Deaf(SocketWatcher):
    """What it hears is tampered with, once, before it is written down."""

    def __init__(self, how: str, *args: Any) -> None:
        super().__init__(*args)
        self._how = how
        self._kept: tuple[Any, ...] | None = None
        self._done = False

    def _event(self, name: str, data: Any = None, *more: Any) -> None:
        if data.get("orderId") != next(iter(self.heard)) or "seq" not in data or self._done:
            return super()._event(name, data, *more)
        if self._how == "swapped" and self._kept is None:
            self._kept = name, data, *more
            return None
        self._done = True
        if self._how == "lost":
            return None
        super()._event(name, data, *more)
        super()._event(*(self._kept or (name, data, *more)))
        return None


@pytest.mark.parametrize("how", ["lost", "repeated", "swapped"])
async def test_a_watcher_that_was_tampered_with_is_found_out(here: World, how: str) -> None:
    def watching(of: World, orders: Sequence[str], rng: random.Random) -> list[AnyWatcher]:
        tampered = _Deaf(how, "tampered", of.urls[:1], watchers_of(of, orders, rng)[0]._token, orders, rng)
        return [watchers_of(of, orders, rng)[0], tampered]

    outcome = await play(here, Plan(SEED, (), moves_go_on=True), watching)
    assert len(outcome.problems) == 1, outcome
    assert outcome.problems[0].startswith("'tampered': at place "), outcome


async def test_a_clock_that_jumps_is_the_one_the_instance_looks_at(here: World) -> None:
    place = here.places[0]
    assert place.instance is not None
    for wrong_s in (86_400.0, -86_400.0):
        place.jump(wrong_s)
        made = await place.instance.post("/orders", ORDER, by=SHOP)
        made_at = dt.datetime.fromisoformat(made.body["createdAt"])
        place.jump(0.0)
        assert abs((made_at - dt.datetime.now(dt.UTC)).total_seconds() - wrong_s) < SOON_S


async def test_a_redis_that_drops_its_subscribers_is_lost_for_the_instances(here: World) -> None:
    order_id = await here.place(random.Random(SEED))
    place = here.places[0]
    assert place.instance is not None
    async with Watcher(place.instance, SHOP) as watcher:
        await watcher.watch(order_id)
        before = await metric(place.instance, "waybill_bus_losses_total ")
        await FAULTS["redis_drops_subscribers"].inject(here, random.Random(SEED), 0.5)
        assert await metric(place.instance, "waybill_bus_losses_total ") > before
    await here.well()


@pytest.mark.parametrize(
    ("heard", "said"),
    [
        ([1, 2, 3], None),
        ([1, 2], "lost 1 at the end: after 2 events wanted 3 e"),
        ([1, 3], "at place 2 wanted 2 e, heard 3 e"),
        ([1, 1, 2, 3], "at place 2 wanted 2 e, heard 1 e"),
        ([2, 1, 3], "at place 1 wanted 1 e, heard 2 e"),
        ([1, 2, 3, 3], "heard 1 more than there are: 3 e"),
        ([], "lost 3 at the end: after 0 events wanted 1 e"),
    ],
)
def test_the_first_difference_is_named(heard: list[int], said: str | None) -> None:
    wanted = [("e", {"seq": seq}) for seq in (1, 2, 3)]
    assert difference(wanted, [("e", {"seq": seq}) for seq in heard]) == said


def test_a_seed_makes_the_same_plan_again() -> None:
    names = list(FAULTS)[:2]
    assert plan(7, names) == plan(7, names)
    assert len({str(plan(seed, names)) for seed in range(20)}) == 20


def test_a_jumbled_bus_repeats_reorders_and_breaks_no_other_byte() -> None:
    def message(number: int, channel: str = "waybill:order:{1}") -> bytes:
        payload = f"e{number}".encode()
        return b"*3\r\n$7\r\nmessage\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n" % (
            len(channel),
            channel.encode(),
            len(payload),
            payload,
        )

    jumbler = Jumbler(random.Random(3))
    passed = b"".join(jumbler(b"+PONG\r\n" + message(number) + b":1\r\n") for number in range(50))
    got = [int(part.split(b"\r\n")[0]) for part in passed.split(b"\r\ne")[1:]]
    assert passed.count(b"+PONG\r\n") == passed.count(b":1\r\n") == 50
    assert set(range(49)) <= set(got)
    assert len(got) > len(set(got))
    assert got != sorted(got)
    assert Jumbler(random.Random(3))(message(1, "waybill:control") + message(2)[:-4]) == (
        message(1, "waybill:control") + message(2)[:-4]
    )
