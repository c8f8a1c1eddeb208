"""Run a command in a temporary Slurm cluster on this machine. Needs Debian's packages.

    python scripts/slurm.py [NODES] COMMAND…

Example: `python scripts/slurm.py 2 stabrun sweep hydra/launcher=submitit_slurm …`. `… 2 bash` opens a shell.
"""

import getpass
import os
import shutil
import socket
import sys

from processes import Daemons, free_ports, main, output

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")

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


def slurm(daemons: Daemons, nodes: int) -> None:
    """Start a controller and `nodes` nodes (n1, n2, …) of two CPUs each."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if missing := [program for program in PROGRAMS if not shutil.which(program)]:
        sys.exit(f"{', '.join(missing)}: not found. On Debian: apt-get install slurmctld slurmd munge slurm-client")
    folder, (control, *ports) = daemons.folder, free_ports(1 + nodes)
    host = socket.gethostname().partition(".")[0]
    lines = [f"NodeName=n{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={p} CPUs=2" for n, p in enumerate(ports, 1)]
    conf = CONF.format(host=host, port=control, user=getpass.getuser(), folder=folder, nodes="\n".join(lines))
    (folder / "slurm.conf").write_text(conf)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "state").mkdir()
    folder.chmod(0o755)  # munge requires that other users can reach its socket
    daemons.environment["SLURM_CONF"] = str(folder / "slurm.conf")
    files = [f"--{kind}={folder}/munge.{kind.partition('-')[0]}" for kind in ("socket", "key-file", "pid-file")]
    daemons.start("munged", "--foreground", "--force", *files, f"--seed-file={folder}/munge.seed")
    daemons.wait((folder / "munge.socket").exists)
    daemons.start("slurmctld", "-D")
    for n in range(nodes):
        daemons.start("slurmd", "-D", "-N", f"n{n + 1}")
    daemons.wait(lambda: output(["sinfo", "-hN", "-o", "%T"], daemons.environment).split() == ["idle"] * nodes)


if __name__ == "__main__":
    main(slurm, __doc__)
