"""Servers that start in a tenth of a second and kill themselves at a named moment: run as a program, it has imported
everything once, and forks a server for each line of JSON on its standard input: `{"env", "log", "points", "at"}`.

A moment is right before or after a commit that wrote something, or a call to a gateway. `points` is a file to which
each moment that is passed is written by name, `at` the name at which the process is killed with SIGKILL. The process id
of the server is printed.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from server import migrate
from server.__main__ import main
from server.adapters.razorpay import Razorpay
from server.adapters.stripe import Stripe
from server.db import Transaction

PRELOADED = ("server.app", "server.demo", "server.embedded", "alembic.command", "uvloop")
"""What a server imports when it starts."""
WRITES = re.compile(r"\b(insert into|delete from|update) ")
CALLS = ("create", "fetch", "capture", "cancel", "confirm", "refund", "fetch_refund")
OURS = re.compile(r"/(handlers|server)/(?!db\.py|doors\.py|app\.py|__main__\.py)")


def where(frame: FrameType | None) -> str:
    """The innermost two of our functions that wait for what happens now."""
    names: list[str] = []
    while frame is not None and len(names) < 2:
        file = frame.f_code.co_filename
        if OURS.search(file):
            names.append(f"{Path(file).stem}.{frame.f_code.co_qualname}")
        frame = frame.f_back
    return " < ".join(names)


class Moments:
    """Writes the moments down, and kills at one of them."""

    def __init__(self, points: Path, at: str | None) -> None:
        self._file = points.open("a")
        self._at = at

    def pass_(self, name: str) -> None:
        self._file.write(name + "\n")
        self._file.flush()
        if name == self._at:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        one, all_, finish = Transaction.one, Transaction.all, Transaction.finish

        def noted(real: Any) -> Any:
            @functools.wraps(real)
            async def run(tx: Any, statement: str, *args: object) -> Any:
                if WRITES.search(statement) and not hasattr(tx, "wrote"):
                    tx.wrote = where(sys._getframe(1))
                return await real(tx, statement, *args)

            return run

        async def finished(tx: Any, failed: bool) -> None:
            wrote = getattr(tx, "wrote", None)
            # outside a transaction block every statement has committed itself
            if wrote is None or failed or tx._block is None:
                await finish(tx, failed)
                return
            self.pass_(f"before the commit of {wrote}")
            await finish(tx, failed)
            self.pass_(f"after the commit of {wrote}")

        Transaction.one, Transaction.all = noted(one), noted(all_)  # type: ignore[method-assign]
        Transaction.finish = finished  # type: ignore[method-assign,assignment]
        for gateway in (Razorpay, Stripe):
            for name in CALLS:
                setattr(gateway, name, self._around(getattr(gateway, name), f"{gateway.__name__}.{name}"))

    def _around(self, real: Any, name: str) -> Any:
        @functools.wraps(real)
        async def call(*args: Any, **more: Any) -> Any:
            self.pass_(f"before {name}")
            try:
                return await real(*args, **more)
            finally:
                self.pass_(f"after {name}")

        return call


def serve(env: dict[str, str], log: str, points: str, at: str | None) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    os.environ.update(env)
    migrate.migrate = _migrated
    Moments(Path(points), at).install()
    os._exit(main(["all"]))


async def _migrated(database_url: str) -> None:
    """The test's database was migrated before; looking again takes half of a start."""


def run() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            sys.stdin.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            serve(**asked)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    run()
