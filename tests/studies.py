"""Real studies of tiny runs: what `stabrun sweep` left of them, and what each cell gives when it is trained alone."""

import csv

from stabrun.config import conf_dir
from stabrun.study import results
from stabrun.study.plan import planned
from stabrun.train.run import train

TIMINGS = ("seconds", "tokens_per_second")


def rows(folder):
    """`study/results.csv`, timings aside."""
    with open(folder / "study" / "results.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key not in TIMINGS} for row in csv.DictReader(file)]


def rows_alone(folder, *words):
    """The rows of a study whose cells this process trains one after the other: no sweep, no ledger, no worker."""
    plan, _, _ = planned(conf_dir(), list(words))
    (folder / "study").mkdir()
    plan.save(folder / "study")
    for cell in plan.cells.values():
        train(plan.config(cell), folder / "study" / "runs" / cell.id)
    results.write(plan, folder / "study")
    return rows(folder)
