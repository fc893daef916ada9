"""`scripts/bench`: measure Waybill beside its peers, in turns, in one run."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from server.settings import CannotStart
from tests.bench import kernel, report
from tests.bench.generator import RunFailed
from tests.bench.scenarios import SCENARIOS, Figures, Scale, smoke
from tests.bench.stands import PEERS, STOCK, WAYBILL, ground

FILES_BESIDE_SOCKETS = 500


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure Waybill beside its peers.",
        epilog="docs/benchmarks.md has the rules.",
    )
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"any of {', '.join(SCENARIOS)}; none: all")
    parser.add_argument("--seconds", type=float, help="how long each job is measured; 8, with --quick 1")
    parser.add_argument("--rounds", type=int, default=1, help="how often all take their turns; the median is shown")
    parser.add_argument("--no-peers", action="store_true", help="measure Waybill alone")
    parser.add_argument("--quick", action="store_true", help="tiny jobs: shows that everything works, measures nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every round to this file")
    args = parser.parse_args(argv)
    if unknown := set(args.scenarios) - set(SCENARIOS):
        parser.error(f"there is no scenario {', '.join(sorted(unknown))}; there are {', '.join(SCENARIOS)}")
    scale = smoke(args.seconds or 1) if args.quick else Scale(seconds=args.seconds or 8)
    names = report.known(args.scenarios)
    try:
        kernel.raise_file_limit(max(SCENARIOS[name].sockets(scale) for name in names) + FILES_BESIDE_SOCKETS)
        rounds, failures = asyncio.run(_measure(names, scale, args.rounds, peers=not args.no_peers))
    except (CannotStart, RunFailed, OSError) as problem:
        print(f"bench: {problem}", file=sys.stderr)
        return 2
    cores = len(os.sched_getaffinity(0))
    machine = f"{platform.machine()}, {cores} core{'s' if cores > 1 else ''}, Python {platform.python_version()}"
    print(f"\n{machine}, {scale.seconds:g} s a job, {args.rounds} round{'s' if args.rounds > 1 else ''}\n")
    print(report.table(rounds))
    for sentence in report.doubts(rounds):
        print(f"\nNot to be believed: {sentence}")
    for scenario, who, why in failures:
        print(f"\nFAILED: {scenario}, {who}: {why}")
    if args.json:
        failed = [{"scenario": scenario, "who": who, "why": why} for scenario, who, why in failures]
        args.json.write_text(json.dumps({"machine": machine, "rounds": rounds, "failures": failed}, indent=1))
    return int(any(who == WAYBILL for _, who, _ in failures))


Rounds = dict[str, dict[str, list[Figures]]]
Failures = list[tuple[str, str, str]]


async def _measure(names: Sequence[str], scale: Scale, rounds: int, *, peers: bool) -> tuple[Rounds, Failures]:
    """All jobs in turns, so that a slow minute of the machine meets everybody."""
    figures: Rounds = {name: {} for name in names}
    failures: Failures = []
    node = (PEERS / "node_modules").exists()
    if peers and not node:
        _say("The peers on Node are not installed (Node.js with npm is missing): their columns stay empty.")
    with tempfile.TemporaryDirectory(prefix="waybill-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # Postgres refuses to run as root and must reach its folder as somebody else
        async with ground(folder, _say) as on:
            if on.load_core is None:
                _say("There is one core only: servers and load share it, and latencies say little.")
            for turn in range(rounds):
                for name in names:
                    for who in SCENARIOS[name].who:
                        if who != WAYBILL and not (peers and (node or who == STOCK)):
                            continue
                        since = time.monotonic()
                        try:
                            found = await SCENARIOS[name].run(on, who, scale)
                        except RunFailed as failure:
                            failures.append((name, who, str(failure)))
                            outcome = f"FAILED: {failure}"
                        else:
                            figures[name].setdefault(who, []).append(found)
                            outcome = "  ".join(f"{key}={value:.4g}" for key, value in found.items())
                        took = f"{time.monotonic() - since:.0f} s"
                        _say(f"{turn + 1}/{rounds} {name}, {who} ({took}): {outcome}")
    return figures, failures


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
