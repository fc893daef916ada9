"""`python -m server all|web|worker|migrate|token|settings|demo`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from models.user import Role
from server import logs
from server import settings as settings_page
from server.settings import CannotStart, Settings

MODES = {
    "all": "web and worker in one process; migrates before it serves",
    "web": "serve REST and Socket.IO",
    "worker": "carry on what was left: the relay and the sweeps",
    "migrate": "bring the database to this version, and exit",
    "demo": "`all`, with an order that moves and sample tokens",
}

GC_THRESHOLDS = (20_000, 20, 20)
"""Net new objects, then collections of each age, after which the garbage collector looks for cycles."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m server", description="Waybill, a real-time order tracking server.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_ in MODES.items():
        commands.add_parser(name, help=help_)
    commands.add_parser("settings", help="print every setting, its default and its meaning")
    token = commands.add_parser("token", help="print one token")
    token.add_argument("--sub", required=True)
    token.add_argument("--role", required=True, choices=[role.value for role in Role])
    token.add_argument("--order", action="append", help="narrow it to this order; may be repeated")
    token.add_argument("--ttl", type=int, default=3600, metavar="SECONDS")
    args = parser.parse_args(argv)
    try:
        settings = settings_page.from_process()
        if args.command == "settings":
            print(_settings_table())
        elif args.command == "token":
            from server.auth import mint

            if args.role == Role.GUEST and not args.order:
                raise CannotStart("A guest token reaches only the orders that it names: add --order ID.")
            print(mint(settings, sub=args.sub, role=Role(args.role), orders=args.order, ttl_s=args.ttl))
        else:
            logs.configure(settings.log_level)
            _run(_serve(settings, args.command))
    except CannotStart as problem:
        print(f"waybill: {problem}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 0
    return 0


def _settings_table() -> str:
    rows = settings_page.table()
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{name:{widths[0]}}  {default:{widths[1]}}  {meaning}" for name, default, meaning in rows)


def _run(coroutine: Coroutine[Any, Any, None]) -> None:
    if sys.platform == "win32":
        asyncio.run(coroutine)
        return
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(coroutine)


async def _serve(settings: Settings, command: str) -> None:
    from server.embedded import data_servers

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    listener = None
    if command != "migrate":
        from server.app import Process, bind

        listener = bind(settings)
    async with data_servers(
        Path(settings.data_dir), settings.database_url or None, settings.redis_url or None, _say
    ) as data:
        if listener is None:
            await _until(stop, _migrate(data.database_url))
            return
        process = Process(
            settings,
            listener,
            data.database_url,
            data.redis_url,
            serves=command != "worker",
            works=command != "web",
            migrates=command in ("all", "demo"),
        )
        try:
            await process.start()
            _collect_seldom()
            if command == "demo":
                from server.demo import run_demo

                await _until(stop, run_demo(process, _say))
            await stop.wait()
            if sys.stderr.isatty():
                _say("Stopping …")
        finally:
            await process.stop()


def _collect_seldom() -> None:
    """A server makes thousands of objects that live as long as a connection, and hardly any cycle. With Python's own
    thresholds a fourth of what a reconnecting fleet costs is looking through them for garbage."""
    gc.collect()
    gc.freeze()  # what is there now stays
    gc.set_threshold(*GC_THRESHOLDS)


async def _migrate(database_url: str) -> None:
    """Migrate, as soon as Postgres answers."""
    import asyncpg

    from models.errors import Unavailable
    from server.db import CONNECT_RETRY_S
    from server.migrate import migrate

    waiting = False
    while True:
        try:
            await migrate(database_url)
            return
        except (OSError, Unavailable, asyncpg.CannotConnectNowError) as error:
            if not waiting:
                _say(f"Postgres does not answer yet ({type(error).__name__}); waiting for it …")
            waiting = True
            await asyncio.sleep(CONNECT_RETRY_S)
        except asyncpg.PostgresError as error:
            raise CannotStart(f"Postgres lets nobody in with this DATABASE_URL: {error}.") from error


async def _until(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`, unless the process is asked to stop first."""
    task, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait((task, stopped), return_when="FIRST_COMPLETED")
    stopped.cancel()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
