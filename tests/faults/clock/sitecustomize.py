"""Lets a test move the wall clock of a server process: Python imports this module at start when its folder is on
PYTHONPATH. The file that WALL_CLOCK names holds one double, the seconds by which the clock is wrong; a test may change
it at any time.

What stays right is what a real jump leaves alone: the monotonic clock, and with it every timer and time-out.
"""

from __future__ import annotations

import ctypes
import datetime as dt
import gc
import mmap
import os
import struct
import time
from pathlib import Path
from typing import Any


def _wrong_by(file: Path) -> None:
    with file.open("rb") as opened:
        shared = mmap.mmap(opened.fileno(), 8, access=mmap.ACCESS_READ)
    real_time, real_time_ns, real_now = time.time, time.time_ns, dt.datetime.now

    def wrong_s() -> float:
        found: float = struct.unpack_from("d", shared)[0]
        return found

    def now(_: type[dt.datetime], tz: dt.tzinfo | None = None) -> dt.datetime:
        return real_now(tz) + dt.timedelta(seconds=wrong_s())

    time.time = lambda: real_time() + wrong_s()
    time.time_ns = lambda: real_time_ns() + int(wrong_s() * 1e9)
    # The class itself stays, because drivers compare types: only its method is another one.
    members: dict[str, Any] = gc.get_referents(dt.datetime.__dict__)[0]
    members["now"] = classmethod(now)
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(dt.datetime))


if clock := os.environ.get("WALL_CLOCK"):
    _wrong_by(Path(clock))
