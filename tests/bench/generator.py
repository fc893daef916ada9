"""The load generator and the probe: programs in C (tests/bench/load), built for each run, told by lines what to do."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.bench import kernel

SOURCES = Path(__file__).parent / "load"
PROGRAMS = {"load": ("load.c", "json.c"), "probe": ("probe.c",)}
ANSWER_TIMEOUT_S = 30.0
POLL_S = 0.02
"""Pause between two looks at what a program has done so far."""

State = dict[str, Any]


class RunFailed(Exception):
    """The figures of this run count for nothing. The message says what went wrong."""


def build(folder: Path) -> dict[str, Path]:
    """Compile the programs into a folder. Raises `RunFailed` when there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise RunFailed("The load generator is written in C and there is no compiler `cc` (Debian: apt install gcc).")
    built = {name: folder / name for name in PROGRAMS}
    for name, sources in PROGRAMS.items():
        command: list[str | Path] = [
            compiler,
            "-std=gnu11",
            "-O2",
            "-Wall",
            "-o",
            built[name],
            *(SOURCES / source for source in sources),
        ]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            raise RunFailed(f"{name} could not be compiled:\n{made.stderr}")
    return built


class Program:
    """One of the programs, running."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    async def tell(self, command: str = "state") -> State:
        """Send one line; what it has done so far comes back."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{command}\n".encode())
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            line = await self._process.stdout.readline()
        if not line:
            assert self._process.stderr
            raise RunFailed((await self._process.stderr.read()).decode().strip() or "the load generator ended")
        answer: State = json.loads(line)
        return answer

    async def until(self, holds: Callable[[State], bool], within_s: float) -> State:
        """Look until `holds`, or until the time is over; the last state either way."""
        deadline = time.monotonic() + within_s
        while True:
            state = await self.tell()
            if holds(state) or time.monotonic() > deadline:
                return state
            await asyncio.sleep(POLL_S)

    async def kill(self) -> None:
        """SIGKILL: the kernel closes all its sockets at once."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


@asynccontextmanager
async def running(program: Path, arguments: Sequence[str], core: int | None) -> AsyncIterator[Program]:
    """Start a program on a core, and end it."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(program, *arguments, stdin=pipe, stdout=pipe, stderr=pipe)
    kernel.pin([process.pid], core)
    started = Program(process)
    try:
        yield started
    finally:
        await started.kill()
