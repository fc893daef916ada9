"""How clients leave an instance that stops: who is told when, and how many go at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from models.user import Actor, Role
from server.drain import BATCH_PAUSE_MS, plan, send_away
from server.realtime.connections import Connection, Frame


@given(st.integers(0, 20_000), st.integers(1, 500), st.integers(1, 20_000))
def test_a_plan_is_for_all_within_its_time_and_no_hastier_than_it_must(count: int, most: int, spread_ms: int) -> None:
    batches = plan(count, most, spread_ms)
    assert sum(batch.size for batch in batches) == count
    assert [batch.after_ms for batch in batches] == [number * BATCH_PAUSE_MS for number in range(len(batches))]
    assert all(batch.size > 0 for batch in batches)
    if batches:
        assert batches[-1].after_ms <= spread_ms
        assert max(batch.size for batch in batches) - min(batch.size for batch in batches) <= 1
    if count <= most:
        assert len(batches) <= 1
    elif len(batches) * BATCH_PAUSE_MS <= spread_ms:
        assert all(batch.size <= most for batch in batches)


class Client:
    """A wire that writes down what happened to it, in a story that all of a test share."""

    def __init__(self, name: str, story: list[tuple[str, str, Any]]) -> None:
        self._name, self._story = name, story
        self.gone = False

    def send_frame(self, message: Frame) -> None:
        name, payload = json.loads(message.text[1:])
        assert name == "serverDraining"
        self._story.append(("told", self._name, payload["retryInMs"]))

    def send_latest(self, key: str, message: Frame) -> None: ...

    def hold(self, why: int = 1) -> None: ...

    def resume(self, why: int = 1) -> None: ...

    def when_received(self, callback: Callable[[], None]) -> None: ...

    @property
    def direct(self) -> None:
        return None

    def hang_up(self) -> None:
        self._story.append(("left", self._name, None))


async def test_all_are_told_before_the_first_one_leaves_and_none_leaves_in_the_order_of_its_coming() -> None:
    story: list[tuple[str, str, Any]] = []
    clients = [Client(f"s{number}", story) for number in range(200)]
    connections = [Connection(client._name, client, Actor(sub="c1", role=Role.CUSTOMER, exp=2e9)) for client in clients]

    clients[0].gone = True  # left by itself
    await send_away(connections, 50, 5000)
    kinds = [kind for kind, *_ in story]
    assert kinds[:200] == ["told"] * 200
    left = [name for kind, name, _ in story if kind == "left"]
    names = [client._name for client in clients]
    assert sorted(left) == sorted(names[1:])
    assert left != names[1:]
    retries = {name: retry_ms for kind, name, retry_ms in story if kind == "told"}
    assert sorted(retries.values()) == [1000] * 50 + [1100] * 50 + [1200] * 50 + [1300] * 50
    assert [retries[name] for name in left] == sorted(retries[name] for name in left), "the later, the longer"
