"""`scripts/bench --quick`: every job runs and has its figures."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from server.embedded import DataServers
from tests.bench.report import ROWS, Bound, table
from tests.bench.scenarios import SCENARIOS
from tests.bench.stands import NODE, PEERS, STOCK, WAYBILL
from tests.harness import ROOT

MAY_BE_ZERO = ("kernel_kib", "resident_kib", "changes_refused")


async def bench(*arguments: str, data: DataServers, **env: str) -> tuple[int, str, str]:
    """Exit code, the table, and what was said meanwhile."""
    pipe = asyncio.subprocess.PIPE
    urls = {"TEST_DATABASE_URL": data.database_url, "TEST_REDIS_URL": data.redis_url}
    command = [sys.executable, "-m", "tests.bench", "--quick", *arguments]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env={**os.environ, **urls, **env}, stdout=pipe, stderr=pipe
    )
    shown, said = await process.communicate()
    assert process.returncode is not None
    return process.returncode, shown.decode(), said.decode()


@pytest.fixture
def compiler() -> None:
    if shutil.which("cc") is None:
        assert os.environ.get("CI") != "true", "CI needs a C compiler for the load generator"
        pytest.skip("there is no C compiler (Debian: apt install gcc)")


@pytest.mark.usefixtures("compiler")
async def test_every_job_has_its_figures(data: DataServers, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    code, shown, said = await bench("--no-peers", "--seconds", "0.3", "--json", str(file), data=data)
    assert code == 0, said
    written: dict[str, Any] = json.loads(file.read_text())
    assert written["failures"] == []
    assert list(written["rounds"]) == list(SCENARIOS)
    for row in ROWS:
        figures = written["rounds"][row.scenario][WAYBILL]
        assert len(figures) == 1
        assert figures[0][row.figure] > 0 or row.figure in MAY_BE_ZERO, (row, figures)
        assert f"| {row.scenario} | {row.what} |" in shown
    assert written["rounds"]["hot"][WAYBILL][0]["shown_percent"] == 100
    assert written["rounds"]["fleet"][WAYBILL][0]["shown_percent"] == 100
    # every watcher has all events of its order: two of placing and assigning at least
    assert written["rounds"]["reconnect"][WAYBILL][0]["events_checked"] > 2 * 40
    assert written["rounds"]["status"][WAYBILL][0]["events_checked"] > 2 * 8 * 3
    # placed, pending, completed, confirmed: 20 of the full inbox, and those that came at 50 a second
    assert written["rounds"]["settle"][WAYBILL][0]["events_checked"] >= 4 * (20 + 0.3 * 50)


@pytest.mark.usefixtures("compiler")
async def test_peers_are_measured_in_the_same_run(data: DataServers) -> None:
    code, shown, said = await bench("hot", "connect", "--seconds", "0.3", "--rounds", "2", data=data)
    assert code == 0, said
    on_node = (PEERS / "node_modules").exists()
    assert ("columns stay empty" in said) != on_node
    turns = [line.split(" (")[0] for line in said.splitlines() if line[:1].isdigit()]
    who = [WAYBILL, NODE, STOCK] if on_node else [WAYBILL, STOCK]
    assert turns == [f"{turn}/2 {job}, {one}" for turn in (1, 2) for job in ("hot", "connect") for one in who]
    hot = shown.splitlines()[5].split(" | ")
    assert hot[:2] == ["| hot", "server CPU per delivery, µs"]
    assert float(hot[6]) > 0, "ours ÷ python-socketio"


async def test_without_a_compiler_it_says_what_is_missing(data: DataServers, tmp_path: Path) -> None:
    code, shown, said = await bench("hot", data=data, PATH=str(tmp_path))
    assert (code, shown) == (2, "")
    assert "no compiler `cc`" in said
    assert "Traceback" not in said


async def test_too_few_open_files_are_named_before_anything_starts() -> None:
    pipe = asyncio.subprocess.PIPE
    command = f"ulimit -n 300 && exec {sys.executable} -m tests.bench --quick"
    process = await asyncio.create_subprocess_exec("bash", "-c", command, cwd=ROOT, stdout=pipe, stderr=pipe)
    shown, said = await process.communicate()
    assert (process.returncode, shown) == (2, b"")
    assert said.decode().splitlines() == [
        "bench: one process may open 300 files here, and 600 are needed: raise the hard limit (ulimit -Hn)"
    ]


def test_the_table_shows_medians_ratios_and_what_missed_its_bound() -> None:
    ours = [{"cpu_us_per_delivery": cpu, "shown_percent": 97.0, "p99_ms": 1.0} for cpu in (12.0, 10.0, 11.0)]
    node = [{"cpu_us_per_delivery": cpu, "shown_percent": 100.0, "p99_ms": 2.0} for cpu in (20.0, 22.0, 24.0)]
    lines = table({"hot": {WAYBILL: ours, NODE: node}}).splitlines()
    assert lines[2:] == [
        "| hot | server CPU per delivery, µs | 11 (10 to 12) | 22 (20 to 24) |  | 0.50 |  | ≤ 0.55 × Node, kept |",
        "| hot | positions shown, % | 97.0 (97.0 to 97.0) | 100.0 (100.0 to 100.0) |  | 0.97 |  | ≥ 98, **missed** |",
        "| hot | p99 from push to watcher, ms | 1 (1 to 1) | 2 (2 to 2) |  | 0.50 |  |  |",
    ]


def test_a_bound_beside_node_says_nothing_without_node() -> None:
    bound = Bound(0.55, of_node=True)
    assert [bound.kept(11, node) for node in (20, 19, None)] == [True, False, None]
