"""Time from SIGTERM to the exit of a training run, with its checkpoint.

    python scripts/bench_stop.py [COUNT] [OVERRIDE ...]

Starts `stabrun train` COUNT times (20 by default), one thread each, signals it at a random moment within two seconds of
its first row, and prints the median and the longest time in seconds. The overrides default to the nano model.
"""

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUIET = os.environ | {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}


def time_to_exit(run: Path, words: list[str], delay: float) -> float:
    """Seconds from the signal to the exit of a run that is written to `run`."""
    fixed = ["train.threads=1", "train.steps=100000", "tracker=none", f"run_dir={run}"]
    command = [sys.executable, "-m", "stabrun", "train", *fixed, *words]
    process = subprocess.Popen(command, env=QUIET, stdout=subprocess.DEVNULL)
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").stat().st_size:
        if process.poll() is not None:
            sys.exit(f"the run ended early with status {process.returncode}")
        time.sleep(0.02)
    time.sleep(delay)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    status = process.wait()
    seconds = time.monotonic() - began
    saved = list((run / "checkpoints").glob("step_*"))
    if status != 130 or not saved:
        sys.exit(f"status {status}, checkpoints {saved}")
    return seconds


def main() -> None:
    words = sys.argv[1:]
    count = int(words.pop(0)) if words and words[0].isdigit() else 20
    moments = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        times = [time_to_exit(Path(folder, str(i)), words, moments.uniform(0, 2)) for i in range(count)]
    print(f"{count} signals: exit after {statistics.median(times):.2f} s (median), {max(times):.2f} s (longest)")


if __name__ == "__main__":
    main()
