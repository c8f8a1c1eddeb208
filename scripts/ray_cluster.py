"""Run a command in a temporary Ray cluster on this machine.

    python scripts/ray_cluster.py [NODES] COMMAND…

Example: `python scripts/ray_cluster.py 2 stabrun sweep hydra/launcher=ray …`. `… 2 bash` opens a shell.
"""

import importlib.util
import secrets
import socket
import sys
from pathlib import Path

from processes import Daemons, free_ports, main, output

STORE = 80_000_000  # bytes of shared memory per node; Ray requires at least 75 MiB
COUNT = "import ray; ray.init(log_to_driver=False, logging_level='ERROR'); print(sum(n['Alive'] for n in ray.nodes()))"


def ray_cluster(daemons: Daemons, nodes: int) -> None:
    """Start `nodes` nodes of one CPU each."""
    if not importlib.util.find_spec("ray"):
        sys.exit("ray: not installed. Install it with: pip install 'stabrun[ray]'")
    port, client = free_ports(2)
    daemons.environment |= {
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_AUTH_MODE": "token",  # it listens on the network, and anyone who connects can run code
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1", "--num-gpus=0"]
    ray += [f"--object-store-memory={STORE}", "--disable-usage-stats"]
    head = ["--head", f"--port={port}", f"--ray-client-server-port={client}", f"--temp-dir={daemons.folder}"]
    daemons.start(*ray, *head, "--include-dashboard=false")
    daemons.wait(lambda: listens(port))
    for _ in range(nodes - 1):
        daemons.start(*ray, f"--address=127.0.0.1:{port}")
    daemons.wait(lambda: output([sys.executable, "-c", COUNT], daemons.environment).strip() == str(nodes))


def listens(port: int) -> bool:
    """Whether a process of this machine listens on the port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    main(ray_cluster, __doc__)
