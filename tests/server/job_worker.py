"""A worker as a process of its own, to be killed: `python -m tests.server.job_worker DATABASE_URL`.

It says `begun SUBJECT` and hangs in `hang`, says `done SUBJECT` after `quick`, and kills itself in `poison`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from server import logs
from server.app import utc_now
from server.db import Database
from server.settings import Settings
from server.workers.jobs import Job, Jobs

TAKEOVER_S = 1


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def hang(subject: str) -> None:
    say(f"begun {subject}")
    await asyncio.Event().wait()


async def quick(subject: str) -> None:
    say(f"done {subject}")


async def poison(subject: str) -> None:
    say(f"begun {subject}")
    os.kill(os.getpid(), signal.SIGKILL)


async def main(url: str) -> None:
    settings = Settings(job_takeover_s=TAKEOVER_S, job_poll_ms=100)
    database = Database(url, settings, utc_now)
    reaching = asyncio.create_task(database.run())
    await database.reached.wait()
    await Jobs(database, settings, [Job("hang", hang), Job("quick", quick), Job("poison", poison)]).run()
    reaching.cancel()


if __name__ == "__main__":
    logs.configure("error")  # to standard error
    asyncio.run(main(sys.argv[1]))
