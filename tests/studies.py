"""Real studies of tiny runs: what `stabrun sweep` left of them, and what each cell gives when it is trained alone."""

import csv
import subprocess
import sys

from helpers import TINY, stabrun

from stabrun.study import results
from stabrun.study.plan import planned
from stabrun.training.run import train

TIMINGS = ("seconds", "tokens_per_second")


def rows(folder):
    """`study/results.csv`, timings aside."""
    with open(folder / "study" / "results.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key not in TIMINGS} for row in csv.DictReader(file)]


def rows_alone(folder, *words):
    """The rows of a study whose cells this process trains one after the other: no sweep, no ledger, no worker."""
    plan, _, _ = planned(list(words))
    (folder / "study").mkdir()
    plan.save(folder / "study")
    for cell in plan.cells.values():
        train(plan.config(cell), folder / "study" / "runs" / cell.id)
    results.write(plan, folder / "study")
    return rows(folder)


QUESTION = (
    *TINY,
    "study.variants=[baseline,qk_norm]",
    "study.lrs=[1e-2,1e-1]",
    "study.seeds=2",
    "train.checkpoint_every=5",
)


def started(folder, *words):
    """A sweep in a session of its own, so that all of it can be killed."""
    command = [sys.executable, "-m", "stabrun", "sweep", *QUESTION, "study.workers=2", "study_dir=study", *words]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def swept(folder, *words):
    return stabrun("sweep", *QUESTION, "study.workers=2", "study_dir=study", *words, cwd=folder)
