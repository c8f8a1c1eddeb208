"""Daemons of a temporary cluster on this machine, all of which are ended afterwards. Linux only."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

PR_SET_CHILD_SUBREAPER = 36
GRACE = 10.0  # seconds between SIGTERM and SIGKILL
START = 90.0  # seconds until a cluster must have started


class Daemons:
    """The daemons of one cluster: their directory, and the environment variables that locate the cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment: dict[str, str] = {}

    def start(self, *command: str) -> None:
        """Start a daemon that writes to a log in the directory."""
        with open(self.folder / f"{Path(command[0]).name}.log", "ab") as log:
            environment = os.environ | self.environment
            subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds. Exits with the logs if it does not in time."""
        deadline = time.monotonic() + START
        while not condition():
            if time.monotonic() > deadline:
                logs = "".join(file.read_text() for file in sorted(self.folder.glob("*.log")))
                sys.exit(f"the cluster did not start.\n{logs}")
            time.sleep(0.1)


@contextmanager
def running(cluster: Callable[[Daemons, int], None], nodes: int) -> Iterator[dict[str, str]]:
    """Start a cluster and end it afterwards. Yields the environment variables that locate it."""
    with TemporaryDirectory(prefix="cluster-") as folder, reaping_children():
        daemons = Daemons(Path(folder))
        cluster(daemons, nodes)
        yield daemons.environment


def main(cluster: Callable[[Daemons, int], None], usage: str | None) -> None:
    """Parse `[NODES] COMMAND…`, run the command in a cluster, and exit with its status."""
    command = sys.argv[1:]
    nodes = int(command.pop(0)) if command and command[0].isdigit() else 2
    if not command or command[0].startswith("-"):
        sys.exit(usage)
    with running(cluster, nodes) as environment:
        status = subprocess.run(command, env=os.environ | environment).returncode
    sys.exit(status)


def output(command: list[str], environment: dict[str, str]) -> str:
    """The standard output of a command."""
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True).stdout


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
