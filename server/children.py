"""Child processes that live exactly as long as we do, and what is left of those of a run that was killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from server.settings import CannotStart

START_TIMEOUT_S = 60
"""Long enough to replay the log of a killed run."""
STOP_TIMEOUT_S = 20
"""After it a server that does not stop is killed; its data survives that too."""
READY_POLL_MS = 20
LOG_TAIL_LINES = 5
DATA_SERVERS = frozenset({"postgres", "redis-server", "valkey-server"})

LAUNCHER = """
import os, sys
try:
    import ctypes
except ImportError:
    ctypes = None
uid, gid, death_signal, parent = map(int, sys.argv[1:5])
if uid:
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
if death_signal and ctypes:
    ctypes.CDLL(None).prctl(1, death_signal)
    if os.getppid() != parent:
        sys.exit("the parent died during the start")
try:
    os.execv(sys.argv[5], sys.argv[5:])
except OSError as error:
    sys.exit(f"{sys.argv[5]}: {error.strerror}")
"""
"""Runs in the child before its program: drops root, then asks the kernel for a stop signal when the parent dies (in
this order: a change of user clears that wish; but imports come before, since the new user may not read ours). An
interpreter of its own, because code between fork and exec may deadlock."""


@dataclass(frozen=True)
class User:
    """Whom a child runs as instead of root."""

    uid: int
    gid: int


@dataclass(frozen=True)
class Child:
    """A running child and the log it writes."""

    name: str
    process: asyncio.subprocess.Process
    log: Path
    stop_signal: signal.Signals

    def tail(self) -> str:
        """The end of its log, for the sentence that says why it failed."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return f"The end of {self.log}:\n  " + "\n  ".join(lines)

    async def until(self, ready: Callable[[], Awaitable[bool]]) -> None:
        """Wait until it answers; `CannotStart` when it ends instead, or never does."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + START_TIMEOUT_S
        while not await ready():
            if (code := self.process.returncode) is not None:
                raise CannotStart(f"{self.name} ended at its start (code {code}). {self.tail()}")
            if loop.time() > deadline:
                raise CannotStart(f"{self.name} did not answer within {START_TIMEOUT_S} s. {self.tail()}")
            await asyncio.sleep(READY_POLL_MS / 1000)

    async def stop(self) -> None:
        """Ask it to stop, and kill it only when it does not."""
        if self.process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(self.stop_signal)
            self.process.send_signal(signal.SIGCONT)  # a held one (SIGSTOP) would never see the first
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


@asynccontextmanager
async def running(
    name: str,
    command: Sequence[str | Path],
    log: Path,
    stop_signal: signal.Signals,
    user: User | None = None,
    fds: Sequence[int] = (),
) -> AsyncIterator[Child]:
    """Start a child and stop it at the end. `fds` stay open in it."""
    # The kernel's "parent" is the thread that forked; only the main one is sure to live as long as the process.
    bound = sys.platform == "linux" and threading.current_thread() is threading.main_thread()
    launch = (user.uid if user else 0, user.gid if user else 0, int(stop_signal) if bound else 0, os.getpid())
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-c", LAUNCHER, *map(str, launch), *map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd="/",
            # Nothing of ours: it holds secrets, and PG… variables would steer a Postgres.
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"},
            # Its own session: Ctrl-C in the terminal reaches us only, and we stop this one last.
            start_new_session=True,
            pass_fds=fds,
        )
    child = Child(name, process, log, stop_signal)
    try:
        yield child
    finally:
        await child.stop()


async def end_leftovers(folders: Sequence[Path], killed_pid: int | None, say: Callable[[str], None]) -> None:
    """Stop the data servers that still work in these folders although nobody holds them.

    On Linux they got their stop signal when the run was killed, so most often this only waits for them, or finds none.
    """
    run = f"a run that was killed (pid {killed_pid})" if killed_pid else "a run that was killed"
    left = _servers_in(folders)
    if not left:
        if killed_pid:
            say(f"Found the data of {run}; its data servers have stopped by themselves. Starting normally.")
        return
    names = " and ".join(sorted({name for name, _ in left.values()}))
    say(f"Stopping leftovers of {run}: {names} in {folders[0].parent} …")
    loop = asyncio.get_running_loop()
    # SIGINT: fast shutdown of Postgres, and Redis writes everything before it ends. Twice, since a program that is only
    # just starting may miss the first.
    for stop_signal in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):
        for pid, (_, parent) in left.items():
            # Only the heads: to the workers of Postgres a SIGINT means other things.
            if parent not in left or stop_signal == signal.SIGKILL:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, stop_signal)
                    os.kill(pid, signal.SIGCONT)
        deadline = loop.time() + STOP_TIMEOUT_S / 2
        while left and loop.time() < deadline:
            await asyncio.sleep(READY_POLL_MS / 1000)
            left = _servers_in(folders)
        if not left:
            return
    pids = ", ".join(map(str, left))
    raise CannotStart(f"Leftovers of {run} do not end: {names} (pids {pids}). End them by hand, then start again.")


def _servers_in(folders: Sequence[Path]) -> dict[int, tuple[str, int]]:
    """The data servers that work in one of the folders: pid to name and parent's pid."""
    if sys.platform != "linux":
        return _servers_by_pid_file(folders)
    places = {(found.st_dev, found.st_ino) for found in (folder.stat() for folder in folders if folder.exists())}
    servers: dict[int, tuple[str, int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        # Processes end while we look, and those of others are closed to us.
        with contextlib.suppress(OSError):
            name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
            if name not in DATA_SERVERS:
                continue
            state, parent = rest.split()[:2]
            place = (entry / "cwd").stat()
            # A zombie has ended; its parent has only not noticed yet.
            if (place.st_dev, place.st_ino) in places and state != "Z":
                servers[int(entry.name)] = (name, int(parent))
    return servers


def _servers_by_pid_file(folders: Sequence[Path]) -> dict[int, tuple[str, int]]:
    servers: dict[int, tuple[str, int]] = {}
    for file in (folder / name for folder in folders for name in ("postmaster.pid", "redis.pid")):
        with contextlib.suppress(OSError, ValueError, IndexError):
            pid = int(file.read_text().split()[0])
            shown = subprocess.run(["ps", "-o", "comm=", "-p", str(pid)], capture_output=True, text=True, check=False)
            # The pid of a server that ended may be another program's by now.
            if (name := Path(shown.stdout.strip()).name) in DATA_SERVERS:
                servers[pid] = (name, 0)
    return servers
