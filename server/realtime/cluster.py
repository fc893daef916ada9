"""What a client has to know of Redis Cluster: which slot a name belongs to, who serves each slot, and where a refused
command goes instead. https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/"""

from __future__ import annotations

from binascii import crc_hqx
from collections.abc import Sequence
from typing import Any, NamedTuple

from server.realtime.link import Address, Arg, BusAway, BusRefused, Link

SLOTS = 16_384

SHARDED_SINCE = 7
"""Major version of Redis that brought SPUBLISH. Valkey's are all above it."""


def key_slot(name: Arg) -> int:
    """The slot of a key or a channel. What stands in its first braces decides, so names can be kept together."""
    data = name if isinstance(name, bytes) else str(name).encode()
    start = data.find(b"{") + 1
    if start:
        end = data.find(b"}", start)
        if end > start:
            data = data[start:end]
    return crc_hqx(data, 0) % SLOTS


def first_key(args: Sequence[Arg]) -> Arg:
    """The name that decides where a command goes: its first argument, of a script call its first key."""
    return args[3] if args[0] == "EVALSHA" else args[1]


class Greeting(NamedTuple):
    """What kind of Redis this is."""

    cluster: bool
    sharded: bool
    """A cluster whose channels belong to slots like keys."""


async def greeting(link: Link, timeout_s: float) -> Greeting:
    """Ask a Redis what it is. One that knows no HELLO, or lets us not say it, is no cluster."""
    try:
        reply: Any = await link.call("HELLO", timeout_s=timeout_s)
    except BusRefused:
        return Greeting(cluster=False, sharded=False)
    said = dict(zip(reply[::2], reply[1::2], strict=True))
    cluster = said.get(b"mode") == b"cluster"
    return Greeting(cluster, cluster and int(said[b"version"].split(b".")[0]) >= SHARDED_SINCE)


async def read_owners(link: Link, timeout_s: float) -> list[Address]:
    """The primary of every slot, as this node knows them. Raises BusAway: some slot has none.

    CLUSTER SLOTS, which 6.2 knows too; what CLUSTER SHARDS says more is not needed.
    """
    reply: Any = await link.call("CLUSTER", "SLOTS", timeout_s=timeout_s)
    owners: list[Address | None] = [None] * SLOTS
    for first, last, primary, *_ in reply:
        address = Address(_host(primary[0] or b"", link.address), primary[1])
        owners[first : last + 1] = [address] * (last + 1 - first)
    found = [address for address in owners if address is not None]
    if len(found) < SLOTS:
        raise BusAway("slots of the cluster have no primary")
    return found


async def check_state(link: Link, timeout_s: float) -> None:
    """Raises BusAway: this node would refuse what we ask, because it misses too many others."""
    reply: Any = await link.call("CLUSTER", "INFO", timeout_s=timeout_s)
    if b"cluster_state:ok" not in reply:
        raise BusAway("the cluster is down")


def redirected_to(error: str, asked: Address) -> tuple[int, Address]:
    """(slot, address) of a refusal by the node `asked`: `MOVED 3999 127.0.0.1:6381`, `ASK 3999 …`."""
    _, slot, address = error.split(" ", 2)
    host, _, port = address.rpartition(":")
    return int(slot), Address(_host(host.encode(), asked), int(port))


def _host(named: bytes, asked: Address) -> str:
    """A node that does not know its own name is where it was asked."""
    if named in (b"", b"?"):
        return asked.host if asked.port else "127.0.0.1"
    return named.decode()
