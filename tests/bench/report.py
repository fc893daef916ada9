"""The figures of a run as a table: every row beside its peers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from tests.bench.scenarios import LOAD_BUSY_MAX, SCENARIOS, Figures
from tests.bench.stands import FASTIFY, NODE, STOCK, WAYBILL

Rounds = Mapping[str, Mapping[str, Sequence[Figures]]]
"""Scenario, who, and the figures of each round."""


@dataclass(frozen=True)
class Bound:
    """What the figure must keep: a limit of its own, or one times that of Node."""

    limit: float
    of_node: bool = False
    at_least: bool = False

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}{' × Node' if self.of_node else ''}"

    def kept(self, ours: float, node: float | None) -> bool | None:
        """None when it cannot be said, because Node was not measured."""
        if self.of_node and node is None:
            return None
        limit = self.limit * (node if self.of_node and node is not None else 1)
        return ours >= limit if self.at_least else ours <= limit


@dataclass(frozen=True)
class Row:
    scenario: str
    figure: str
    what: str
    bound: Bound | None = None


ROWS = (
    Row("hot", "cpu_us_per_delivery", "server CPU per delivery, µs", Bound(0.55, of_node=True)),
    Row("hot", "shown_percent", "positions shown, %", Bound(98, at_least=True)),
    Row("hot", "p99_ms", "p99 from push to watcher, ms"),
    Row("fleet", "cpu_us_per_delivery", "server CPU per delivery, µs", Bound(0.55, of_node=True)),
    Row("fleet", "shown_percent", "positions shown, %", Bound(99.8, at_least=True)),
    Row("fleet", "p99_ms", "p99 from push to watcher, ms", Bound(25)),
    Row("connect", "connect_cpu_us", "server CPU per connection, µs", Bound(0.8, of_node=True)),
    Row("connect", "resident_kib", "memory per idle connection, KiB", Bound(20)),
    Row("connect", "kernel_kib", "buffers in the kernel per idle connection, KiB"),
    Row("bystander", "core_percent", "CPU of the instance where nobody watches, % of a core", Bound(2)),
    Row("reconnect", "rejoin_s", "until the last socket is back and caught up, s", Bound(20)),
    Row("reconnect", "rejoin_p50_s", "until half of them are, s"),
    Row("reconnect", "rejoin_cpu_us", "server CPU per socket, µs"),
    Row("reconnect", "changes_refused", "status changes refused meanwhile, and asked for again"),
    Row("disconnect", "blocked_ms", "longest that the server answered nobody, ms", Bound(50)),
    Row("disconnect", "release_cpu_us", "server CPU per socket, µs"),
    Row("status", "event_p50_ms", "p50 from POST to watcher, ms"),
    Row("status", "event_p99_ms", "p99 from POST to watcher, ms", Bound(50)),
    Row("status", "cpu_us_per_change", "server CPU per change, µs"),
    Row("place", "cpu_us_per_order", "server CPU per order, µs"),
    Row("place", "orders_per_cpu_ms", "orders per millisecond of CPU"),
    Row("webhooks", "cpu_us_per_webhook", "server CPU per webhook stored, µs"),
    Row("webhooks", "webhooks_per_s", "webhooks stored per second"),
    Row("settle", "event_p50_ms", "p50 from webhook to watcher, ms"),
    Row("settle", "event_p99_ms", "p99 from webhook to watcher, ms"),
    Row("settle", "cpu_us_per_capture", "server CPU per webhook stored, applied and told, µs"),
    Row("settle", "settles_per_s", "captures applied per second, when the inbox is full"),
    Row("settle", "cpu_us_per_settle", "server CPU per capture applied and told then, µs"),
)

COLUMNS = (NODE, STOCK)
"""Peers with a column; Fastify stands in the one of Node, in the rows that have no Socket.IO in them."""


def table(rounds: Rounds) -> str:
    """Markdown: the median of the rounds, with the lowest and the highest where there are several."""
    head = ["job", "measured", WAYBILL, *COLUMNS, *(f"ours ÷ {peer}" for peer in COLUMNS), "bound"]
    lines = [head, ["---"] * len(head)]
    for row in ROWS:
        if row.scenario not in rounds:
            continue
        by = rounds[row.scenario]
        ours = _values(by.get(WAYBILL), row)
        peers = [_values(by.get(FASTIFY if peer == NODE and FASTIFY in by else peer), row) for peer in COLUMNS]
        lines.append(
            [
                row.scenario,
                row.what,
                _shown(ours),
                *(_shown(theirs) + (f" ({FASTIFY})" if theirs and FASTIFY in by else "") for theirs in peers),
                *(_ratio(ours, theirs) for theirs in peers),
                _judged(row, ours, peers[0]),
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def doubts(rounds: Rounds) -> Iterator[str]:
    """Figures that should not be believed."""
    for scenario, by in rounds.items():
        for who, figures in by.items():
            busy = max((one.get("load_busy_percent", 0) for one in figures), default=0)
            if busy > 100 * LOAD_BUSY_MAX:
                yield f"{scenario}, {who}: the load generator had its core busy for {busy:.0f} % of the time."


def known(names: Sequence[str]) -> list[str]:
    """Scenarios in the order of the table; all of them when none is named."""
    return [name for name in SCENARIOS if not names or name in names]


def _values(figures: Sequence[Figures] | None, row: Row) -> list[float]:
    return [one[row.figure] for one in figures or () if row.figure in one]


def _shown(values: Sequence[float]) -> str:
    if not values:
        return ""
    middle = _number(median(values))
    return middle if len(values) == 1 else f"{middle} ({_number(min(values))} to {_number(max(values))})"


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    return f"{median(ours) / median(theirs):.2f}" if ours and theirs and median(theirs) else ""


def _judged(row: Row, ours: Sequence[float], node: Sequence[float]) -> str:
    if row.bound is None:
        return ""
    kept = row.bound.kept(median(ours), median(node) if node else None) if ours else None
    return f"{row.bound}{'' if kept is None else ', kept' if kept else ', **missed**'}"


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 90 else f"{value:.1f}"
