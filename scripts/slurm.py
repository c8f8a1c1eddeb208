"""Run a command in a temporary Slurm cluster on this machine. Needs Debian's packages.

    python scripts/slurm.py [NODES] COMMAND…

Example: `python scripts/slurm.py 2 stabrun sweep hydra/launcher=submitit_slurm …`. `… 2 bash` opens a shell.
"""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from processes import command_in, free_ports, reaping_children, words

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SECONDS = 60  # for all nodes to be idle

CONF = """\
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=10
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def slurm(nodes: int) -> Iterator[dict[str, str]]:
    """Start a controller and `nodes` nodes (n1, n2, …) of two CPUs each. Yields the environment to connect to them."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if lacking := [program for program in PROGRAMS if not shutil.which(program)]:
        sys.exit(f"{', '.join(lacking)}: not found. On Debian: apt-get install slurmctld slurmd munge slurm-client")
    with TemporaryDirectory(prefix="slurm-") as name, reaping_children():
        folder, (control, *ports) = Path(name), free_ports(1 + nodes)
        host = socket.gethostname().partition(".")[0]
        lines = [
            f"NodeName=n{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={p} CPUs=2" for n, p in enumerate(ports, 1)
        ]
        conf = CONF.format(host=host, port=control, user=getpass.getuser(), folder=folder, nodes="\n".join(lines))
        (folder / "slurm.conf").write_text(conf)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        (folder / "state").mkdir()
        folder.chmod(0o755)  # munge requires that other users can reach its socket
        environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        files = [f"--{kind}={folder}/munge.{kind.partition('-')[0]}" for kind in ("socket", "key-file", "pid-file")]
        munge = ["munged", "--foreground", "--force", *files, f"--seed-file={folder}/munge.seed"]
        daemons = [munge, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", f"n{n + 1}"] for n in range(nodes))]
        for daemon in daemons:
            with open(folder / f"{daemon[0]}.log", "ab") as log:
                subprocess.Popen(daemon, stdout=log, stderr=log, env=os.environ | environment, start_new_session=True)
            deadline = time.monotonic() + SECONDS
            while not (folder / "munge.socket").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
        await_idle(nodes, environment, folder)
        yield environment


def await_idle(nodes: int, environment: dict[str, str], folder: Path) -> None:
    """Wait until every node is idle."""
    deadline = time.monotonic() + SECONDS
    states: list[str] = []
    while time.monotonic() < deadline:
        listed = subprocess.run(
            ["sinfo", "-hN", "-o", "%T"], env=os.environ | environment, capture_output=True, text=True
        )
        states = listed.stdout.split()
        if states == ["idle"] * nodes:
            return
        time.sleep(0.2)
    logs = "".join(file.read_text() for file in sorted(folder.glob("*.log")))
    sys.exit(f"Slurm did not start, nodes: {states}.\n{logs}")


if __name__ == "__main__":
    count, command = words(__doc__)
    with slurm(count) as found:
        status = command_in(found, command)
    sys.exit(status)
