"""Train cells of the committed records again, and compare all their losses, bit for bit.

    python scripts/rerun_cells.py --cells 5 --seed 1

The cells are drawn at random from all records of docs/results. Losses are equal on the same kind of machine with one
thread and the constrained version of torch. Exit status 1 if one differs.
"""

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from results import RECORDS, part

from stabrun.record.run_dir import RunDir
from stabrun.text import run_name


def losses(run: RunDir) -> list[object]:
    return [row["train/loss"] for row in run.rows()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    given, differing = parser.parse_args(), 0
    rows = [(record, row) for record in RECORDS for row in part(record).study.rows]
    with tempfile.TemporaryDirectory() as folder:
        for record, row in random.Random(given.seed).sample(rows, given.cells):
            run, again = part(record).study.run(row["run_id"]), RunDir(Path(folder) / record / row["run_id"])
            words = "rerun", str(run.path), f"run_dir={again.path}", "tracker=none"
            subprocess.run([sys.executable, "-m", "stabrun", *words], check=True, stdout=subprocess.DEVNULL)
            before, equal = losses(run), losses(run) == losses(again)
            differing += not equal
            name = run_name(row["arm"], row["lr"], row["seed"])
            print(f"{record}: {name}: {len(before)} losses, {'equal' if equal else 'different'}", flush=True)
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
