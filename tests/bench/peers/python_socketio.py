"""The tracking room as the manual of python-socketio builds it, with its Redis manager, on aiohttp and uvloop.

usage: python_socketio.py PORT REDIS_URL JWT_SECRET
"""

from __future__ import annotations

import sys
from typing import Any

import jwt
import socketio
import uvloop
from aiohttp import web


async def live(request: web.Request) -> web.Response:
    return web.json_response({"status": "alive"})


def main(port: int, redis_url: str, secret: str) -> None:
    sio = socketio.AsyncServer(async_mode="aiohttp", client_manager=socketio.AsyncRedisManager(redis_url))

    async def connect(sid: str, environ: dict[str, Any], auth: dict[str, Any]) -> None:
        await sio.save_session(sid, jwt.decode(auth["token"], secret, algorithms=["HS256"]))

    async def subscribe(sid: str, data: dict[str, Any]) -> dict[str, Any]:
        await sio.enter_room(sid, f"order:{data['orderId']}")
        return {"ok": True}

    async def update_location(sid: str, data: dict[str, Any]) -> None:
        await sio.emit("orderLocationUpdate", data, room=f"order:{data['orderId']}", skip_sid=sid)

    sio.on("connect", connect)
    sio.on("subscribeToOrder", subscribe)
    sio.on("updateLocation", update_location)
    app = web.Application()
    app.router.add_get("/health/live", live)
    sio.attach(app)
    uvloop.install()
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)


main(int(sys.argv[1]), *sys.argv[2:4])
