"""Redis servers of a test's own, to be killed and frozen: one alone, or a cluster of them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio

from server.binaries import find_redis_server, redis_server
from server.children import LAUNCHER
from tests.harness import free_port, until

SLOTS = 16_384

CLUSTER_PORT_OFFSET = 10_000
"""The nodes of a cluster talk to each other on their port plus this."""

NODE_TIMEOUT_MS = 1_000
"""After this silence of a primary the others make its replica their new one."""


class PrivateRedis:
    """One Redis."""

    def __init__(self, folder: Path, *options: str, binary: Path | None = None, port: int | None = None) -> None:
        self.port, self.socket = port or free_port(), folder / "r.sock"
        self.url = f"redis://127.0.0.1:{self.port}"
        self._folder, self._options, self._binary = folder, options, binary
        self._process: subprocess.Popen[bytes] | None = None

    def _launch(self) -> None:
        options = ("--port", str(self.port), "--unixsocket", str(self.socket), "--dir", str(self._folder), "--save", "")
        # the launcher lets the kernel end it with us, even when we are killed
        launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, "0", "0", str(int(signal.SIGKILL)), str(os.getpid())]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*launcher, self._binary or redis_server(), *options, *self._options], stdout=log, stderr=log
            )

    async def start(self) -> None:
        self._launch()

        async def listens() -> bool:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                return False
            writer.close()
            await writer.wait_closed()
            return True

        await until(listens, "Redis listens")

    @property
    def running(self) -> bool:
        return self._process is not None

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def redis_of_major(major: int) -> Path:
    """The Redis of this major version; a developer's machine may be without it, CI may not."""
    on_path = [Path(entry) / "redis-server" for entry in os.environ.get("PATH", "").split(os.pathsep) if entry]
    for found in filter(None, [find_redis_server(), *on_path]):
        if os.access(found, os.X_OK):
            said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
            version = re.search(r"v=(\d+)", said)
            if version and int(version[1]) == major:
                return found
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI needs Redis {major} (Debian: apt install redis-server).")
    pytest.skip(f"Redis {major} is not installed (Debian: apt install redis-server).")


class RedisCluster:
    """Primaries that share the slots evenly, and nodes that have none yet. `encrypted`: they have a TLS port as well,
    and speak TLS with each other."""

    def __init__(
        self,
        folder: Path,
        binary: Path,
        *options: str,
        primaries: int = 3,
        others: int = 0,
        password: str | None = None,
        encrypted: bool = False,
    ) -> None:
        self.nodes: list[PrivateRedis] = []
        self.primaries, self.password = primaries, password
        self.ports: list[int] = []
        """On which the nodes know each other."""
        for number in range(primaries + others):
            home = folder / f"node-{number}"
            home.mkdir()
            port = _free_cluster_port()
            self.ports.append(port)
            own = ["--cluster-enabled", "yes", "--cluster-node-timeout", str(NODE_TIMEOUT_MS)]
            own += ["--repl-diskless-sync-delay", "0"]  # a replica need not wait for others
            own += ["--cluster-allow-replica-migration", "no"]  # who gives its last slot away stays a primary
            if encrypted:
                own += ["--tls-port", str(port), "--tls-cluster", "yes", "--tls-replication", "yes"]
            plain = None if encrypted else port
            self.nodes.append(PrivateRedis(home, *own, *options, binary=binary, port=plain))
        self.url = self.nodes[0].url

    async def ask(self, node: PrivateRedis, *args: Any) -> Any:
        """The raw reply of one node."""
        connection = redis.asyncio.Connection(port=node.port, password=self.password)
        try:
            await connection.send_command(*args)
            return await connection.read_response()
        finally:
            await connection.disconnect()

    async def start(self) -> None:
        await asyncio.gather(*(node.start() for node in self.nodes))
        for number, node in enumerate(self.nodes):
            await self.ask(node, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < self.primaries:
                first, last = (SLOTS * n // self.primaries for n in (number, number + 1))
                await self.ask(node, "CLUSTER", "ADDSLOTS", *range(first, last))
            for port in self.ports[:number]:
                await self.ask(node, "CLUSTER", "MEET", "127.0.0.1", port)
        await self.whole(self.nodes)

    async def whole(self, nodes: Sequence[PrivateRedis]) -> None:
        """Wait until these nodes agree that every slot is served and every node is known."""

        async def agree() -> bool:
            for node in nodes:
                said = await self.ask(node, "CLUSTER", "INFO")
                if b"cluster_state:ok" not in said or b"cluster_known_nodes:%d\r" % len(self.nodes) not in said:
                    return False
            return True

        await until(agree, "the cluster is whole")

    async def id_of(self, node: PrivateRedis) -> str:
        return str((await self.ask(node, "CLUSTER", "MYID")).decode())

    async def owner(self, slot: int, asked: PrivateRedis | None = None) -> PrivateRedis:
        """The primary of a slot, as one node knows it."""
        for first, last, primary, *_ in await self.ask(asked or self.nodes[0], "CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == primary[1])
        raise AssertionError(f"nobody serves slot {slot}")

    async def replicate(self, replica: PrivateRedis, primary: PrivateRedis) -> None:
        """Make a node without slots the replica of another one, and wait until it has caught up."""
        await self.ask(replica, "CLUSTER", "REPLICATE", await self.id_of(primary))
        await self.follows(replica, primary)

    async def follows(self, replica: PrivateRedis, primary: PrivateRedis) -> None:
        """Wait until a node is a replica of another one, has caught up, and everybody knows it."""
        wanted = b"slave " + (await self.id_of(primary)).encode()

        async def caught_up() -> bool:
            return b"master_link_status:up" in await self.ask(replica, "INFO", "replication")

        await until(caught_up, "the replica has caught up")

        async def known() -> bool:
            views = [await self.ask(node, "CLUSTER", "NODES") for node in self.nodes]
            return all(wanted in view and b"fail" not in view for view in views)

        await until(known, "all know the replica")

    async def begin_move(self, slot: int, source: PrivateRedis, target: PrivateRedis) -> None:
        """From now on keys of the slot may be on either side."""
        await self.ask(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", await self.id_of(source))
        await self.ask(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", await self.id_of(target))

    async def move_keys(self, slot: int, source: PrivateRedis, target: PrivateRedis) -> None:
        while keys := await self.ask(source, "CLUSTER", "GETKEYSINSLOT", slot, 100):
            auth = ("AUTH", self.password) if self.password else ()
            await self.ask(source, "MIGRATE", "127.0.0.1", target.port, "", 0, 5000, *auth, "KEYS", *keys)

    async def end_move(self, slot: int, source: PrivateRedis, target: PrivateRedis) -> None:
        owner = await self.id_of(target)
        others = [node for node in self.nodes if node not in (source, target)]
        for node in (target, source, *others):
            if (await self.ask(node, "ROLE"))[0] == b"master":
                await self.ask(node, "CLUSTER", "SETSLOT", slot, "NODE", owner)

    async def move(self, slot: int, source: PrivateRedis, target: PrivateRedis) -> None:
        """Move one slot with its keys, as resharding does."""
        await self.begin_move(slot, source, target)
        await self.move_keys(slot, source, target)
        await self.end_move(slot, source, target)

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()


@contextmanager
def killed_at_the_end(cluster: RedisCluster) -> Iterator[RedisCluster]:
    try:
        yield cluster
    finally:
        cluster.kill()


def _free_cluster_port() -> int:
    while True:
        port = free_port()
        if port + CLUSTER_PORT_OFFSET > 65_535:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port + CLUSTER_PORT_OFFSET))
            except OSError:
                continue
        return port
