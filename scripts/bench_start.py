"""What `stabrun train` costs before its first step, and its peak memory, beside those of `import torch`.

    python scripts/bench_start.py --repeats 5

CPU seconds are those of the process and its children, from its start to the end of its first step at the size `nano`,
with W&B offline; the median of the repeats. Memory is the peak resident set, of runs of 60 and 600 steps.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence

FIRST_STEP = """
import resource, sys
from stabrun.cli.main import main
from stabrun.training.run import Run

def read(self, row):
    if row is not None and row["step"] == 0:
        used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        print("CPU", sum(each.ru_utime + each.ru_stime for each in used), file=sys.stderr)
    original(self, row)

original, Run.read = Run.read, read
main()
"""


def child(words: Sequence[str]) -> tuple[str, float, float]:
    """Run Python with these words. Returns what it wrote to standard error, its CPU seconds and its peak in MB."""
    environment = os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(said)
    return said, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def trained(steps: int, code: Sequence[str] = ("-m", "stabrun")) -> tuple[str, float, float]:
    with tempfile.TemporaryDirectory() as scratch:
        return child([*code, "train", f"train.steps={steps}", f"run_dir={scratch}/run"])


def main(repeats: int) -> None:
    bare = [child(["-c", "import torch"]) for _ in range(repeats)]
    starts = [trained(2, ("-c", FIRST_STEP))[0] for _ in range(repeats)]
    seconds = [float(line.split()[1]) for said in starts for line in said.splitlines() if line.startswith("CPU ")]
    torch_memory = statistics.median(memory for _, _, memory in bare)
    print(f"import torch:           {statistics.median(cpu for _, cpu, _ in bare):.2f} s of CPU, {torch_memory:.0f} MB")
    print(f"to the first step:      {statistics.median(seconds):.2f} s ({min(seconds):.2f} … {max(seconds):.2f})")
    for steps in (60, 600):
        memory = trained(steps)[2]
        print(f"peak of {steps:>3} steps:      {memory:.0f} MB, {memory - torch_memory:.0f} above torch")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    main(parser.parse_args().repeats)
