"""W&B that hangs, loses its process or refuses the key: the run goes on, and `upload` fills the gap."""

import os
import signal
import subprocess
import sys

import pytest
from helpers import TINY
from studies import running, wait_for
from wandb_server import KEY, server

from stabrun.record.run_dir import RunDir

STEPS, HALF = 200, 100
RUN = ("train", *TINY, f"train.steps={STEPS}", "observe.every=0", "tracker=wandb", "run_dir=run")
IMPATIENT = """
import sys, time
from pathlib import Path
from stabrun.cli.main import main
from stabrun.record.run_dir import RunWriter
from stabrun.training import tracker

def slow(self, row):
    while row["step"] == HALF and not Path("go").exists():
        time.sleep(0.02)
    write(self, row)

tracker.WAIT, write, RunWriter.write = 2.0, RunWriter.write, slow
main()
"""  # `stabrun WORDS` that waits for W&B 2 seconds only, and in its middle for the file `go`


def wandb_processes(process):
    found = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "wandb-core"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def fault(kind, serving, process):
    if kind == "process killed":
        wait_for(lambda: serving.opened)
        (service,) = wandb_processes(process)
        os.kill(service, signal.SIGKILL)
    elif kind != "hangs at its start":
        wait_for(lambda: serving.rows)
        serving.revoked = kind == "key revoked"
        serving.delay = 600.0 if kind == "server hangs" else 0.0
        for pid in wandb_processes(process) if kind == "process hangs" else ():
            os.kill(pid, signal.SIGSTOP)


KINDS = {
    "process killed": "W&B logging disabled (",
    "process hangs": "W&B has not taken the run within 2 s.",
    "hangs at its start": "W&B has not taken the run within 2 s.",
    "server hangs": "W&B has not taken the run within 2 s.",
    "key revoked": f"of {STEPS} rows.",
}
QUICK = ("process killed",)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k not in QUICK)) for k in KINDS])
def test_training_goes_on_and_the_gap_is_filled(tmp_path, kind):
    run = RunDir(tmp_path / "run")
    with server() as serving:
        env = {**serving.environment, "PYTHONPATH": os.pathsep.join(sys.path)}
        serving.delay = 600.0 if kind == "hangs at its start" else 0.0
        with running("-c", IMPATIENT.replace("HALF", str(HALF)), *RUN, cwd=tmp_path, env=env) as process:
            wait_for(lambda: run.steps_done() == HALF)
            fault(kind, serving, process)
            (tmp_path / "go").touch()
            _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        lines = [line for line in err.splitlines() if line.startswith("stabrun: ")]
        assert len(lines) == 1, err
        assert KINDS[kind] in lines[0]
        assert lines[0].endswith("; `stabrun upload run` sends the rest.")
        assert "Traceback" not in err
        assert KEY not in err
        assert run.summary()["status"] == "complete"
        serving.revoked, serving.delay = False, 0.0
        sent = subprocess.run(
            [sys.executable, "-m", "stabrun", "upload", "run"], cwd=tmp_path, env=os.environ | env, capture_output=True
        )
        assert sent.returncode == 0, sent.stderr
        assert [row["_step"] for row in serving.rows] == list(range(STEPS))
        assert [row["train/loss"] for row in serving.rows] == [row["train/loss"] for row in run.rows()]
        assert serving.summary["verdict"] == run.summary()["verdict"]
