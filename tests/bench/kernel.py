"""What the kernel knows of a process: its CPU time, its memory, and the memory of its sockets."""

from __future__ import annotations

import ctypes
import os
import resource
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, DUMP_REQUEST, DONE, ERROR = 4, 20, 0x301, 3, 2
MEMORY_ATTRIBUTE = 7
"""INET_DIAG_SKMEMINFO: the counters that `ss -m` shows."""
ANSWER_HEADER = struct.Struct("=BBBB48xIIIII")
OPEN_STATES = 1 << 1 | 1 << 8
"""ESTABLISHED and CLOSE_WAIT: the server has not let go of the connection."""

_libc = ctypes.CDLL(None, use_errno=True)


def tree(pid: int) -> list[int]:
    """A process and all its descendants: what serving costs, however a server splits it."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def cpu_s(pids: Sequence[int]) -> float:
    """CPU seconds, user and system, with the resolution of the scheduler and not of its ticks."""
    total = 0.0
    clock = ctypes.c_int()
    for pid in pids:
        if error := _libc.clock_getcpuclockid(pid, ctypes.byref(clock)):
            raise OSError(error, os.strerror(error))
        total += time.clock_gettime(clock.value)
    return total


def resident_bytes(pids: Sequence[int]) -> int:
    """Resident size of the processes."""
    return sum(psutil.Process(pid).memory_info().rss for pid in pids)


def pin(pids: Sequence[int], core: int | None) -> None:
    """Hold all threads of these processes on one core."""
    if core is None:
        return
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})


def raise_file_limit(needed: int) -> None:
    """Let this process, and those it starts, open as many files as the machine allows. Raises `OSError` if those are
    fewer than needed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise OSError(
            f"one process may open {hard} files here, and {needed} are needed: raise the hard limit (ulimit -Hn)"
        )


def connections(port: int) -> list[int]:
    """The bytes of buffers that the kernel holds for each open connection to this port, at the server's end.

    The socket itself costs some 3 KB more, whoever serves it.
    """
    identity = struct.pack("!H46x", port)
    request = struct.pack("=BBBBI", socket.AF_INET, socket.IPPROTO_TCP, 1 << (MEMORY_ATTRIBUTE - 1), 0, OPEN_STATES)
    message = request + identity
    header = struct.pack("=IHHII", 16 + len(message), SOCK_DIAG_BY_FAMILY, DUMP_REQUEST, 1, 0)
    sizes: list[int] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as link:
        link.sendto(header + message, (0, 0))
        while True:
            answer = memoryview(link.recv(1 << 20))
            while answer:
                length, kind = struct.unpack_from("=IH", answer)
                if kind == DONE:
                    return sizes
                if kind == ERROR:
                    code = -struct.unpack_from("=i", answer, 16)[0]
                    raise OSError(code, os.strerror(code))
                sizes.append(_buffer_bytes(answer[16 + ANSWER_HEADER.size : length]))
                answer = answer[(length + 3) & ~3 :]


def _buffer_bytes(attributes: memoryview) -> int:
    while attributes:
        length, kind = struct.unpack_from("=HH", attributes)
        if kind == MEMORY_ATTRIBUTE:
            received, _, _, _, reserved, queued, options = struct.unpack_from("=7I", attributes, 4)
            return int(received + reserved + queued + options)
        attributes = attributes[(length + 3) & ~3 :]
    return 0
