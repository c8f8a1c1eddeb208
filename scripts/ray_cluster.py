"""Run a command in a temporary Ray cluster on this machine.

    python scripts/ray_cluster.py [NODES] COMMAND…

Example: `python scripts/ray_cluster.py 2 stabrun sweep hydra/launcher=ray …`. `… 2 bash` opens a shell.
"""

import importlib.util
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from processes import command_in, free_ports, reaping_children, words

SECONDS = 90  # for all nodes to join
STORE = 80_000_000  # bytes of shared memory per node; Ray requires at least 75 MiB
COUNT = "import ray; ray.init(log_to_driver=False, logging_level='ERROR'); print(sum(n['Alive'] for n in ray.nodes()))"


@contextmanager
def ray_cluster(nodes: int) -> Iterator[dict[str, str]]:
    """Start `nodes` nodes of one CPU each. Yields the environment to connect to them."""
    if not importlib.util.find_spec("ray"):
        sys.exit("ray: not installed. Install it with: pip install 'stabrun[ray]'")
    with TemporaryDirectory(prefix="ray-") as folder, reaping_children():
        port, client = free_ports(2)
        environment = {
            "RAY_ADDRESS": f"127.0.0.1:{port}",
            "RAY_AUTH_MODE": "token",  # it listens on the network, and anyone who connects can run code
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1", "--num-gpus=0"]
        ray += [f"--object-store-memory={STORE}", "--disable-usage-stats"]
        head = ["--head", f"--port={port}", f"--ray-client-server-port={client}", f"--temp-dir={folder}"]
        head += ["--include-dashboard=false"]
        with open(Path(folder) / "start.log", "wb") as log:
            for place in [head, *[[f"--address=127.0.0.1:{port}"]] * (nodes - 1)]:
                subprocess.Popen(
                    ray + place, stdout=log, stderr=log, env=os.environ | environment, start_new_session=True
                )
                await_port(port)
        await_nodes(nodes, environment, Path(folder) / "start.log")
        yield environment


def await_port(port: int) -> None:
    """Wait until the head node listens."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)


def await_nodes(nodes: int, environment: dict[str, str], log: Path) -> None:
    """Wait until every node has joined."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        command = [sys.executable, "-c", COUNT]
        counted = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        if counted.stdout.strip() == str(nodes):
            return
        time.sleep(0.2)
    sys.exit(f"Ray did not start, nodes: {counted.stdout.strip() or 'none'}.\n{counted.stderr}{log.read_text()}")


if __name__ == "__main__":
    count, command = words(__doc__)
    with ray_cluster(count) as found:
        status = command_in(found, command)
    sys.exit(status)
