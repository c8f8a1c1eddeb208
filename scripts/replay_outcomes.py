"""What grades add, on recorded runs: lr50 of each arm without and with them, and where the clear outcomes begin.

`tests/data/outcomes.csv` holds the ends of runs of five variants with the settings of `+experiment=frontier`, at
learning rates about the edge of each, with seeds from 1000 on. `tests/data/curves.npz.xz` holds loss curves of eleven
variants at a constant learning rate; those of the smallest model are judged again. The numbers below the table are the
posterior of the distances a and b of `stabrun/study/frontier.py`, in units of s, as if they were equal for all arms.

    python scripts/replay_outcomes.py
    python scripts/replay_outcomes.py --collect DIRECTORY    # write outcomes.csv from the runs in a directory
"""

import argparse
import csv
import io
import json
import lzma
from collections import defaultdict
from pathlib import Path
from typing import cast

import numpy as np
from scipy.special import logsumexp

from stabrun.record.jsonl import number
from stabrun.record.run_dir import RunDir
from stabrun.record.schema import Summary
from stabrun.study.frontier import OFFSETS, Floats, Frontier, ParameterGrid
from stabrun.study.search import frontier
from stabrun.verdict.judge import Judge

DATA = Path(__file__).parent.parent / "tests/data"
COLUMNS = (
    "variant",
    "lr",
    "seed",
    "verdict",
    "reason",
    "first_bad_step",
    "init_loss",
    "best_loss",
    "final_loss",
    "steps",
)
NUMBERS = COLUMNS[1:3] + COLUMNS[5:]
STEPS = 400  # of the runs of outcomes.csv
GRID = ParameterGrid(3e-3, 3.0)
Arms = dict[tuple[str, int], list[Summary]]  # the runs of a variant that were to have this many steps


def recorded() -> Arms:
    """The runs of outcomes.csv."""
    arms: Arms = defaultdict(list)
    with (DATA / "outcomes.csv").open(encoding="utf-8") as file:
        for cells in csv.DictReader(file):
            row = {key: (number(value) if value else None) if key in NUMBERS else value for key, value in cells.items()}
            arms[cells["variant"], STEPS].append(cast(Summary, row | {"by_strictness": {}}))
    return arms


def curves() -> Arms:
    """The curves at a constant learning rate, judged."""
    arms: Arms = defaultdict(list)
    arrays = np.load(io.BytesIO(lzma.open(DATA / "curves.npz.xz").read()))
    for index, facts in enumerate(json.loads(str(arrays["facts"]))):
        if facts["schedule"] != "constant" or facts["d_model"] != 64 or facts["steps"] < 300:
            continue
        judge = Judge()
        columns = (arrays[f"{index:03d}/{key}"].tolist() for key in ("train/loss", "train/lr", "grad/norm"))
        for step, (loss, rate, gradient) in enumerate(zip(*columns, strict=True)):
            judge.add({"step": step, "train/loss": loss, "train/lr": rate, "grad/norm": gradient})
        row = vars(judge.conclude()) | {"variant": facts["variant"], "lr": facts["lr"]}
        arms[facts["variant"], facts["steps"]].append(cast(Summary, row))
    return arms


def offset_evidence(found: Frontier) -> Floats:
    """Log likelihood of each a and b: `[2, offsets]`."""
    prior, (stable, unstable) = np.log(found.grid.prior)[:, None], found.likelihoods
    sides = (stable, unstable), (unstable, stable)
    return np.array([logsumexp(prior + own + logsumexp(other, axis=1)[:, None], axis=0) for own, other in sides])


def collect(directory: Path) -> None:
    rows = [summary for path in sorted(directory.iterdir()) if (summary := RunDir(path).summary())]
    with (DATA / "outcomes.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["variant"], row["lr"], row["seed"])))


def main() -> None:
    print("| variant | runs | lr50 without grades | with grades | spread without | with |", "|---" * 6 + "|", sep="\n")
    for (variant, steps), rows in recorded().items():
        cells = list[str]()
        for found in (frontier(GRID, rows), frontier(GRID, rows, steps=steps)):
            for ends in (found.rate_at(0.5), found.spread()):
                cells.append(" – ".join("?" if end is None else f"{end:.2g}" for end in (ends["low"], ends["high"])))
        print(f"| {variant} | {len(rows)} | {cells[0]} | {cells[2]} | {cells[1]} | {cells[3]} |")
    for name, arms in (("outcomes.csv", recorded()), ("curves.npz.xz", curves())):
        evidence = [offset_evidence(frontier(GRID, rows, steps=steps)) for (_, steps), rows in arms.items()]
        pooled = np.sum(evidence, axis=0)
        weights = np.exp(pooled - pooled.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        print(
            f"\n{name}: {sum(map(len, arms.values()))} runs", f"offset {OFFSETS}", f"a {weights[0].round(2)}", sep="\n"
        )
        print(f"b {weights[1].round(2)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", type=Path, metavar="DIRECTORY")
    if (directory := parser.parse_args().collect) is not None:
        collect(directory)
    main()
