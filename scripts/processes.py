"""Daemons of a temporary cluster on this machine, all of which are ended afterwards. Linux only."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
GRACE = 10.0  # seconds between SIGTERM and SIGKILL


@contextmanager
def reaping_children() -> Iterator[None]:
    """End every process started in the block, including orphans, which become children of this process."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        deadline = time.monotonic() + GRACE
        while left := children():
            for pid in left:
                os.kill(pid, signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL)
            time.sleep(0.2)


def children() -> list[int]:
    """The live children of this process. Ended ones are reaped."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return []
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


def free_ports(count: int) -> list[int]:
    """Unused ports of this machine."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def command_in(environment: dict[str, str], command: list[str]) -> int:
    """Run a command in the cluster. Returns its exit status."""
    return subprocess.run(command, env=os.environ | environment).returncode


def words(usage: str | None) -> tuple[int, list[str]]:
    """Parse `[NODES] COMMAND…`."""
    typed = sys.argv[1:]
    nodes = int(typed.pop(0)) if typed and typed[0].isdigit() else 2
    if not typed or typed[0].startswith("-"):
        sys.exit(usage)
    return nodes, typed
