"""The embedded Postgres and Redis: real processes on temporary folders."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest
import redis.asyncio

from server import binaries
from server.embedded import DataServers, data_servers
from server.settings import CannotStart

WAIT_S = 30
ELSEWHERE = "postgresql://somewhere.invalid/never-asked"
DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
ROOT = Path(__file__).parents[2]

HOLDER = """
import asyncio, json, sys
from pathlib import Path
from server.embedded import data_servers

async def hold():
    async with data_servers(Path(sys.argv[1]), None, None, lambda line: print(line, file=sys.stderr)) as servers:
        print(json.dumps([servers.database_url, servers.redis_url]), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

asyncio.run(hold())
"""


def quiet(line: str) -> None:
    """Nobody listens."""


async def write(servers: DataServers) -> None:
    connection = await asyncpg.connect(servers.database_url)
    await connection.execute("CREATE TABLE kept (word text); INSERT INTO kept VALUES ('still here')")
    await connection.close()
    client = redis.asyncio.Redis.from_url(servers.redis_url)
    await client.set("kept", "still here")
    await client.aclose()


async def read(servers: DataServers) -> tuple[Any, Any]:
    connection = await asyncpg.connect(servers.database_url)
    row = await connection.fetchval("SELECT word FROM kept")
    await connection.close()
    client = redis.asyncio.Redis.from_url(servers.redis_url, decode_responses=True)
    value = await client.get("kept")
    await client.aclose()
    return row, value


def servers_of(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children() if child.name() in ("postgres", "redis-server")]


async def ended(processes: list[psutil.Process]) -> None:
    async with asyncio.timeout(WAIT_S):
        # Nobody may reap what lost its parent: a zombie has ended too.
        while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@asynccontextmanager
async def holder(data_dir: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, DataServers]]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOLDER, str(data_dir)),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout
    assert process.stdin
    try:
        async with asyncio.timeout(WAIT_S):
            database_url, redis_url = json.loads(await process.stdout.readline())
            yield process, DataServers(database_url, redis_url, embedded=True)
    finally:
        process.stdin.close()
        async with asyncio.timeout(WAIT_S):
            await process.wait()


async def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    said: list[str] = []
    others = servers_of(os.getpid())  # those of the whole run
    async with data_servers(tmp_path / "new" / "data", None, None, said.append) as servers:
        assert servers.embedded
        first = [child for child in servers_of(os.getpid()) if child not in others]
        assert {child.name() for child in first} == {"postgres", "redis-server"}
        # Ctrl-C in the terminal goes to our group: the servers are in none of ours.
        assert all(os.getsid(child.pid) == child.pid for child in first)
        await write(servers)
    await ended(first)
    assert said == ["Starting Redis …", "Starting Postgres (first start: creating the data folder) …"]

    said.clear()
    async with data_servers(tmp_path / "new" / "data", None, None, said.append) as servers:
        assert await read(servers) == ("still here", "still here")
    assert said == ["Starting Redis …", "Starting Postgres …"]


async def test_nothing_starts_when_both_urls_are_given(tmp_path: Path) -> None:
    async with data_servers(tmp_path / "data", ELSEWHERE, "redis://somewhere.invalid", quiet) as servers:
        assert servers == DataServers(ELSEWHERE, "redis://somewhere.invalid", embedded=False)
    assert not (tmp_path / "data").exists()


async def test_only_what_has_no_url_starts(tmp_path: Path) -> None:
    others = servers_of(os.getpid())
    async with data_servers(tmp_path / "data", ELSEWHERE, None, quiet) as servers:
        assert servers.database_url == ELSEWHERE
        assert servers.embedded
        started = [child for child in servers_of(os.getpid()) if child not in others]
        assert [child.name() for child in started] == ["redis-server"]


async def test_a_second_start_names_the_first(tmp_path: Path) -> None:
    async with holder(tmp_path / "data") as (first, _):
        with pytest.raises(
            CannotStart, match=rf"Another Waybill \(pid {first.pid}\) is using the data folder {tmp_path}"
        ):
            async with data_servers(tmp_path / "data", None, None, quiet):
                pass
        assert first.returncode is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
async def test_the_servers_of_a_killed_run_end_by_themselves(tmp_path: Path) -> None:
    async with holder(tmp_path / "data") as (first, servers):
        await write(servers)
        left = servers_of(first.pid)
        first.kill()
        await first.wait()
        await ended(left)
    said: list[str] = []
    async with data_servers(tmp_path / "data", None, None, said.append) as again:
        assert await read(again) == ("still here", "still here")
    assert said[0].startswith(f"Found the data of a run that was killed (pid {first.pid})")


async def test_leftovers_of_a_killed_run_are_stopped(tmp_path: Path) -> None:
    async with holder(tmp_path / "data") as (first, servers):
        await write(servers)
        left = servers_of(first.pid)
        for process in left:
            process.send_signal(signal.SIGSTOP)  # held, so that they cannot end by themselves
        first.kill()
        await first.wait()
    said: list[str] = []
    async with data_servers(tmp_path / "data", None, None, said.append) as again:
        assert await read(again) == ("still here", "still here")
        await ended(left)
    assert said[0].startswith(
        f"Stopping leftovers of a run that was killed (pid {first.pid}): postgres and redis-server"
    )
    assert said[1:] == ["Starting Redis …", "Starting Postgres …"]


async def test_a_cluster_that_was_half_made_is_made_anew(tmp_path: Path) -> None:
    half = tmp_path / "data" / "postgres.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    async with data_servers(tmp_path / "data", None, "redis://somewhere.invalid", quiet) as servers:
        await (await asyncpg.connect(servers.database_url)).close()
    assert not half.exists()


async def test_a_path_too_long_for_a_socket_gets_a_short_one(tmp_path: Path) -> None:
    data_dir = tmp_path / ("long" * 30)
    async with data_servers(data_dir, ELSEWHERE, None, quiet) as servers:
        client = redis.asyncio.Redis.from_url(servers.redis_url)
        assert await client.ping()
        await client.aclose()
        short = (data_dir / "run").readlink()
        assert servers.redis_url == f"unix://{short}/redis.sock"
        assert short.stat().st_mode & 0o077 == 0
    assert not short.exists()
    assert not (data_dir / "run").is_symlink()


@pytest.mark.parametrize("name", ["with space", "with,comma", "with%percent", "with:colon", 'with"quote', "Straße"])
async def test_any_folder_name_will_do(tmp_path: Path, name: str) -> None:
    async with data_servers(tmp_path / name, None, None, quiet) as servers:
        await write(servers)
        assert await read(servers) == ("still here", "still here")


async def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    data_dir = tmp_path / "file" / "data"
    with pytest.raises(
        CannotStart, match=rf"The data folder {data_dir} cannot be used \(Not a directory.*set DATA_DIR"
    ):
        async with data_servers(data_dir, None, None, quiet):
            pass


async def test_a_server_that_ends_at_its_start_shows_its_log(tmp_path: Path) -> None:
    async with data_servers(tmp_path, None, "redis://somewhere.invalid", quiet):
        pass
    (tmp_path / "postgres" / "postgresql.conf").write_text("no_such_setting = 1\n")
    with pytest.raises(CannotStart, match=r"Postgres ended at its start \(code 1\)[\s\S]*no_such_setting"):
        async with data_servers(tmp_path, None, "redis://somewhere.invalid", quiet):
            pass


async def test_no_redis_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binaries, "find_redis_server", lambda: None)
    with pytest.raises(CannotStart, match=r"no Redis for this machine .*Python 3\.\d+.*set REDIS_URL"):
        async with data_servers(tmp_path, None, None, quiet):
            pass


async def test_no_postgres_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binaries, "find_postgres_bins", list)
    with pytest.raises(CannotStart, match=r"no Postgres for this machine .*set DATABASE_URL"):
        async with data_servers(tmp_path, None, None, quiet):
            pass


@pytest.mark.skipif(not DEBIAN_15.exists(), reason="needs the Postgres 15 of Debian")
async def test_data_of_one_postgres_is_not_given_to_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel_only = [bin_ for bin_ in binaries.find_postgres_bins() if bin_.is_relative_to(sys.prefix)]
    url = "redis://somewhere.invalid"
    with monkeypatch.context() as patch:
        patch.setattr(binaries, "find_postgres_bins", lambda: [DEBIAN_15])
        async with data_servers(tmp_path, None, url, quiet) as servers:
            connection = await asyncpg.connect(servers.database_url)
            assert connection.get_server_version().major == 15
            await connection.close()
    # Everything that is here: the one that made the data is found again, although the wheel's is newer.
    async with data_servers(tmp_path, None, url, quiet) as servers:
        connection = await asyncpg.connect(servers.database_url)
        assert connection.get_server_version().major == 15
        await connection.close()
    monkeypatch.setattr(binaries, "find_postgres_bins", lambda: wheel_only)
    with pytest.raises(CannotStart, match="was made by Postgres 15"):
        async with data_servers(tmp_path, None, url, quiet):
            pass


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_without_a_wheel_the_servers_on_path_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binaries, "_wheel_folders", lambda package: [])
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert binaries.find_redis_server() is None
    valkey = program(tmp_path / "bin" / "valkey-server")
    assert binaries.find_redis_server() == valkey
    server = program(tmp_path / "bin" / "redis-server")
    assert binaries.find_redis_server() == server

    program(tmp_path / "bin" / "postgres")
    assert tmp_path / "bin" not in binaries.find_postgres_bins()  # no initdb beside it
    program(tmp_path / "bin" / "initdb")
    assert binaries.find_postgres_bins()[0] == tmp_path / "bin"


async def test_a_postgres_that_its_user_cannot_reach_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = next(bin_ for bin_ in binaries.find_postgres_bins() if bin_.is_relative_to(sys.prefix))
    monkeypatch.setattr(binaries, "ROOT_CACHE", tmp_path / "cache")
    copy = binaries._copied_for_all(wheel)
    assert binaries._copied_for_all(wheel) == copy
    assert await binaries._major_version(copy, None) == await binaries._major_version(wheel, None)
    # Everybody may read all of it.
    assert all(path.stat().st_mode & 0o004 for path in (tmp_path / "cache").rglob("*"))
    assert (copy / "postgres").stat().st_mode & 0o001
