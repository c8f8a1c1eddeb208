"""Offset and scatter of the edges of ramps against lr50 of constant rates, as the table of `docs/ramp.md`.

    python scripts/ramp_edges.py --runs RUNS

Trains the ramps of five variants at nano with `--seeds` at `--steps`, the defaults of `stabrun ramp`; finished ones are
not trained again. LR50 is from docs/sweep.md: searches of 400 steps at constant rates.
"""

import argparse
import contextlib
import sys
from pathlib import Path

import numpy as np

from stabrun.cli.ramp import with_defaults
from stabrun.composition import compose
from stabrun.record.run_dir import RunDir
from stabrun.text import aligned
from stabrun.training.run import train
from stabrun.verdict.ramp import Edge, Ramp

LR50 = {"baseline": 0.055, "qk_norm": 0.5, "qk_norm_cap": 0.68, "qkv_norm": 0.42, "qk_fc_norm": 0.71}


def edge_of(variant: str, steps: int, seed: int, runs: Path) -> Edge:
    """The edge of a ramp, trained now if it is not yet."""
    run = RunDir(runs / f"{variant}-{steps}-{seed}")
    fixed = ("tracker=none", "train.threads=1", "train.checkpoint_every=0", f"run_dir={run.path}")
    config = compose(with_defaults([f"+variant={variant}", f"train.steps={steps}", f"seed={seed}", *fixed]))
    with contextlib.redirect_stdout(sys.stderr):
        train(config)
    return Ramp.of_rows(list(run.rows())).edge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--steps", type=int, nargs="+", default=[400, 200])
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    words = parser.parse_args()
    edges = {
        (steps, variant): [edge_of(variant, steps, seed, words.runs) for seed in words.seeds]
        for steps in words.steps
        for variant in LR50
    }
    print("edge minus lr50 in octaves, by seed; a reason in place of an edge that was not found\n")
    table = [["steps", "variant", *(f"seed {seed}" for seed in words.seeds), "mean"]]
    for steps in words.steps:
        offsets = list[float]()
        for variant, lr50 in LR50.items():
            found = edges[steps, variant]
            own = [edge.octaves - np.log2(lr50) for edge in found if edge.octaves is not None]
            cells = [edge.reason if edge.octaves is None else f"{edge.octaves - np.log2(lr50):+.2f}" for edge in found]
            table.append([str(steps), variant, *cells, f"{np.mean(own):+.2f}" if own else ""])
            offsets += own
        spread = np.std(offsets, ddof=1)
        table.append([str(steps), "all", *[""] * len(words.seeds), f"{np.mean(offsets):+.2f}, sd {spread:.2f}"])
    print("\n".join(aligned(table)))


if __name__ == "__main__":
    main()
