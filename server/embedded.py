"""A private Postgres and a private Redis, started as child processes when no URL names one.

Both keep their data under one data folder, listen on Unix sockets only, and live exactly as long as this process: they
are stopped last and cleanly. The data folder:

    lock          held while a Waybill uses the folder; names its pid, empty after a clean end
    postgres/     the database cluster          postgres.log    what Postgres said in this run (.1: the run before)
    redis/        the append-only file          redis.log
    run/          the sockets; a link to a temporary folder where this path is no good for sockets
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import redis.asyncio
import redis.exceptions

from server.binaries import postgres_for, postgres_user, redis_server
from server.children import User, end_leftovers, running
from server.settings import CannotStart

CONNECT_TIMEOUT_S = 5
SOCKET_PATH_BYTES_MAX = 103
"""The shortest limit among our systems (macOS: 104 bytes with the closing zero, Linux: 108)."""
TEMPORARY_PREFIX = "waybill-"
POSTGRES_CONNECTIONS_MAX = 100
ROLE = DATABASE = "waybill"

Say = Callable[[str], None]


@dataclass(frozen=True)
class DataServers:
    """Where the data is; `embedded` when at least one of the two is a child of this process."""

    database_url: str
    redis_url: str
    embedded: bool


@asynccontextmanager
async def data_servers(
    data_dir: Path, database_url: str | None, redis_url: str | None, say: Say
) -> AsyncIterator[DataServers]:
    """Start what has no URL, give both URLs, and stop at the end what was started. Raises `CannotStart`."""
    if database_url and redis_url:
        yield DataServers(database_url, redis_url, embedded=False)
        return
    if sys.platform == "win32":
        raise CannotStart(
            "The embedded data servers do not run on Windows: set DATABASE_URL and REDIS_URL, or use WSL."
        )
    data_dir = data_dir.absolute()
    async with AsyncExitStack() as stack:
        try:
            killed_pid = stack.enter_context(_held(data_dir))
            await end_leftovers([data_dir / name for name in ("postgres", "postgres.new", "redis")], killed_pid, say)
            sockets = stack.enter_context(_socket_folder(data_dir))
            if not redis_url:
                redis_url = await stack.enter_async_context(_redis(data_dir, sockets, say))
            if not database_url:
                database_url = await stack.enter_async_context(_postgres(data_dir, sockets, say))
        except OSError as error:
            reason = f"{error.strerror}: {error.filename}" if error.filename else str(error)
            raise CannotStart(
                f"The data folder {data_dir} cannot be used ({reason}). Make it a folder that this user can write, "
                "or set DATA_DIR to one."
            ) from error
        yield DataServers(database_url, redis_url, embedded=True)


@contextmanager
def _held(data_dir: Path) -> Iterator[int | None]:
    """Hold the folder for this process. Gives the pid of the run before when that one was killed."""
    import fcntl  # not on Windows, where this module must still be importable

    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    # A flock dies with its holder, so a killed run never bars the next one.
    with (data_dir / "lock").open("a+") as lock:
        lock.seek(0)
        written = lock.read(20).strip()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotStart(
                f"Another Waybill (pid {written or 'unknown'}) is using the data folder {data_dir}. Stop it, "
                "or set DATA_DIR to another folder, or DATABASE_URL and REDIS_URL to servers that both can use."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            yield int(written) if written.isdecimal() else None
        finally:
            lock.truncate(0)


@contextmanager
def _socket_folder(data_dir: Path) -> Iterator[Path]:
    folder = data_dir / "run"
    # What a killed run left, or a run before the data folder was moved.
    if folder.is_symlink():
        if folder.readlink().name.startswith(TEMPORARY_PREFIX):
            shutil.rmtree(folder.readlink(), ignore_errors=True)
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
    # In URLs a comma parts hosts and a colon ports, and every library decodes the rest its own way: only plain paths.
    plain = re.fullmatch(r"[A-Za-z0-9/._-]+", str(folder))
    if plain and len(str(folder / ".s.PGSQL.5432")) <= SOCKET_PATH_BYTES_MAX:
        folder.mkdir(mode=0o700)
        yield folder
        return
    # Not TMPDIR: on macOS that path alone is half the limit.
    short = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir="/tmp"))
    try:
        folder.symlink_to(short)
        yield short
    finally:
        folder.unlink(missing_ok=True)
        shutil.rmtree(short, ignore_errors=True)


def _fresh_log(log: Path) -> Path:
    if log.exists():
        log.replace(f"{log}.1")
    return log


@asynccontextmanager
async def _redis(data_dir: Path, sockets: Path, say: Say) -> AsyncIterator[str]:
    server = redis_server()
    say("Starting Redis …")
    data, socket = data_dir / "redis", sockets / "redis.sock"
    data.mkdir(mode=0o700, exist_ok=True)
    options: dict[str, str | Path] = {
        "port": "0",
        "unixsocket": socket,
        "unixsocketperm": "700",
        "dir": data,
        "pidfile": data / "redis.pid",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "daemonize": "no",
    }
    command: list[str | Path] = [server, *(part for name, value in options.items() for part in (f"--{name}", value))]
    url = f"unix://{socket}"
    async with running("Redis", command, _fresh_log(data_dir / "redis.log"), signal.SIGTERM) as child:
        await child.until(lambda: _redis_answers(url))
        yield url


async def _redis_answers(url: str) -> bool:
    client = redis.asyncio.Redis.from_url(
        url, socket_connect_timeout=CONNECT_TIMEOUT_S, socket_timeout=CONNECT_TIMEOUT_S, retry=None
    )
    try:
        return bool(await client.ping())
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError):
        return False  # no socket yet, or it is still loading its file
    finally:
        await client.aclose()


@asynccontextmanager
async def _postgres(data_dir: Path, sockets: Path, say: Say) -> AsyncIterator[str]:
    data, log = data_dir / "postgres", _fresh_log(data_dir / "postgres.log")
    user = postgres_user(data)
    bin_, major = await postgres_for(data, user)
    if data.exists():
        say("Starting Postgres …")
    else:
        say("Starting Postgres (first start: creating the data folder) …")
        await _create_cluster(data, log, bin_, major, user)
    if user:
        os.chown(sockets, user.uid, user.gid)
    with ExitStack() as opened:
        data_name, sockets_name = (_name_for(user, folder, opened) for folder in (data, sockets))
        settings = {
            "listen_addresses": "",
            "port": "5432",
            "unix_socket_directories": '"' + str(sockets_name.path).replace('"', '""') + '"',
            "unix_socket_permissions": "0700",
            "max_connections": str(POSTGRES_CONNECTIONS_MAX),
            "max_wal_size": "256MB",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "log_destination": "stderr",
            "logging_collector": "off",
            # The log holds what went wrong, not the routine.
            "log_checkpoints": "off",
        }
        command: list[str | Path] = [
            bin_ / "postgres",
            "-D",
            data_name.path,
            *(f"--{key}={value}" for key, value in settings.items()),
        ]
        async with running("Postgres", command, log, signal.SIGINT, user, [*data_name.fds, *sockets_name.fds]) as child:
            await child.until(lambda: _postgres_answers(sockets))
            yield f"postgresql://{ROLE}@/{DATABASE}?host={sockets}&port=5432"


async def _postgres_answers(sockets: Path) -> bool:
    async def connect(database: str) -> asyncpg.Connection:
        return await asyncpg.connect(
            host=str(sockets), port=5432, user=ROLE, database=database, timeout=CONNECT_TIMEOUT_S
        )

    try:
        try:
            connection = await connect(DATABASE)
        except asyncpg.InvalidCatalogNameError:
            connection = await connect("postgres")
            await connection.execute(f"CREATE DATABASE {DATABASE}")
        await connection.close()
    except (OSError, asyncpg.CannotConnectNowError):
        return False  # no socket yet, or it is still replaying its log
    return True


async def _create_cluster(data: Path, log: Path, bin_: Path, major: int, user: User | None) -> None:
    """Make the cluster under another name first: a folder called `postgres` is always a whole one."""
    new = data.with_name("postgres.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(mode=0o700)
    if user:
        os.chown(new, user.uid, user.gid)
    # Words sort the same on every machine.
    locale = (
        ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"] if major >= 17 else ["--locale=C.UTF-8"]
    )
    with ExitStack() as opened:
        name = _name_for(user, new, opened)
        command: list[str | Path] = [
            bin_ / "initdb",
            "-D",
            name.path,
            f"--username={ROLE}",
            "--auth=trust",
            "--encoding=UTF8",
            *locale,
        ]
        # SIGINT: initdb then removes what it made and ends its helpers.
        async with running("initdb", command, log, signal.SIGINT, user, name.fds) as child:
            if await child.process.wait() != 0:
                raise CannotStart(f"The data folder of Postgres could not be made. {child.tail()}")
    new.rename(data)


@dataclass(frozen=True)
class _Name:
    path: Path
    fds: Sequence[int] = ()


def _name_for(user: User | None, folder: Path, opened: ExitStack) -> _Name:
    """What the child calls this folder.

    Another user than ours may not pass the folders above it (below /root, say). A folder that we opened and handed down
    may be entered by its descriptor, so no permission has to be widened.
    """
    if user is None or sys.platform != "linux":
        return _Name(folder)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    opened.callback(os.close, fd)
    return _Name(Path(f"/proc/self/fd/{fd}"), [fd])
