"""SIGTERM with hundreds of sockets: all are told, then they leave in batches, and meanwhile nothing is lost."""

from __future__ import annotations

import asyncio
import json
import time

import aiohttp

from tests.harness import SERVICE, SOON_S, Fleet, Instance, until

SOCKETS = 300
BATCH = 20
LIMIT_S = 12
WEBSOCKET = "/socket.io/?EIO=4&transport=websocket"


class Client:
    """One of many sockets that watch one order."""

    def __init__(self) -> None:
        self.told: list[int] = []
        self.seqs: list[int] = []
        self.told_at = self.closed_at = 0.0
        self.reading: asyncio.Task[None] | None = None

    async def watch(self, session: aiohttp.ClientSession, instance: Instance, order_id: str) -> None:
        socket = await session.ws_connect(instance.url + WEBSOCKET)
        await socket.receive_str()
        await socket.send_str(f'40{{"token":"{SERVICE}"}}')
        assert (await socket.receive_str()).startswith("40")
        await socket.send_str(f'421["subscribeToOrder",{{"orderId":"{order_id}"}}]')
        assert (await socket.receive_str()).startswith('431[{"ok":true')
        self.reading = asyncio.create_task(self._read(socket))

    async def _read(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for message in socket:
            if message.data == "2":
                await socket.send_str("3")
                continue
            name, payload = json.loads(message.data[2:])
            if name == "serverDraining":
                self.told.append(payload["retryInMs"])
                self.told_at = time.monotonic()
            else:
                self.seqs.append(payload["seq"])
        self.closed_at = time.monotonic()
        assert socket.close_code == 1001, "the transport ends; the session was not ended for good"


async def test_hundreds_leave_in_batches_and_are_told_first(fleet: Fleet) -> None:
    a = await fleet.start(DRAIN_BATCH_MAX=str(BATCH), DRAIN_TIMEOUT_S=str(LIMIT_S))
    b = await fleet.start()
    order_id = (await b.place())["id"]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        clients = [Client() for _ in range(SOCKETS)]
        for start in range(0, SOCKETS, 50):
            await asyncio.gather(*(client.watch(session, a, order_id) for client in clients[start : start + 50]))
        began = time.monotonic()
        stopping = asyncio.create_task(a.stop())
        await until(lambda: any(client.closed_at for client in clients), "the first one has left")
        await b.move(order_id, "confirmed")
        moved_at = time.monotonic()
        async with session.get(a.url + "/health/ready") as ready:
            assert (ready.status, (await ready.json())["status"]) == (503, "draining")
        async with session.get(f"{a.url}/socket.io/?EIO=4&transport=polling") as handshake:
            assert handshake.status == 503
            assert handshake.headers["Retry-After"]
        assert await stopping == 0
        assert time.monotonic() - began < LIMIT_S
        await asyncio.wait_for(asyncio.gather(*(client.reading for client in clients if client.reading)), SOON_S)
    first, last = min(client.closed_at for client in clients), max(client.closed_at for client in clients)
    assert all(len(client.told) == 1 for client in clients)
    assert max(client.told_at for client in clients) <= first + 0.1, "all were told before the first one left"
    batches = -(-SOCKETS // BATCH)
    assert last - first > 0.1 * (batches - 1) * 0.8
    for client in clients:
        together = sum(abs(other.closed_at - client.closed_at) < 0.02 for other in clients)
        assert together <= 4 * BATCH, f"{together} left in one instant"
    retries = [client.told[0] for client in sorted(clients, key=lambda client: client.closed_at)]
    assert {*retries} == {1000 + 100 * number for number in range(batches)}
    assert [client.closed_at for client in clients] != sorted(client.closed_at for client in clients), "shuffled"
    stayed = [client for client in clients if client.closed_at > moved_at + 0.5]
    assert len(stayed) > BATCH
    assert all(client.seqs == [2] for client in stayed), "who is not sent away yet goes on hearing"


async def test_few_leave_at_once(fleet: Fleet) -> None:
    a = await fleet.start()
    order_id = (await a.place())["id"]
    async with aiohttp.ClientSession() as session:
        clients = [Client() for _ in range(20)]
        for client in clients:
            await client.watch(session, a, order_id)
        began = time.monotonic()
        assert await a.stop() == 0
        assert time.monotonic() - began < 3
        await asyncio.gather(*(client.reading for client in clients if client.reading))
    assert all(client.told == [1000] for client in clients)
