"""What `train.recovery` is worth, on small models: the tables of `docs/recovery.md`.

    python scripts/recovery.py poison --runs /tmp/recovery     # a stretch of bad batches
    python scripts/recovery.py edge --runs /tmp/recovery       # runs near the largest stable learning rate

`poison`: at nano, random tokens take the place of a stretch of batches, or a single batch has a loss of NaN. `edge`:
runs of two variants on a grid of rates around the edge; those that diverge are trained again with each recovery.
Finished runs are not trained again, so that the script can be stopped and started again.
"""

import argparse
import contextlib
import io
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stabrun.composition import compose
from stabrun.training.run import train
from stabrun.training.trainer import Trainer

NANO = ("train.threads=1", "tracker=none", "train.val_every=0", "train.checkpoint_every=0", "observe.every=0")
HOW = {
    "none": (),
    "skip": ("train.recovery=skip",),
    "rewind": ("train.recovery=rewind", "train.recovery_every=50"),
    "rewind, half the rate": ("train.recovery=rewind", "train.recovery_every=50", "train.recovery_lr=0.5"),
}
STRETCH, SINGLE = range(100, 160), 100  # of batches
EDGE = ("train.steps=300", "schedule=constant", "schedule.warmup_steps=50")
FRAGILE = (  # a model that a long disturbance throws off its course at a rate at which it converges without
    "model.n_layer=2", "train.batch_size=8", "train.steps=320", "schedule=constant", "schedule.warmup_steps=30",
    "optim.clip=null", "optim.lr=0.06",
)  # fmt: skip


class Poisoned(Trainer):
    """A trainer with a bad stretch of batches, or a bad batch, wherever they come in its order of steps."""

    kind = ""

    def batch(self, step: int) -> Tensor:
        batch, self.index = super().batch(step), step + self.rewinds.batches
        if self.kind == "stretch" and self.index in STRETCH:
            random = torch.Generator().manual_seed(self.index)
            return torch.randint(self.config.model.vocab_size, batch.shape, generator=random)
        return batch

    def scaled(self, loss: Tensor) -> Tensor:
        return super().scaled(loss * math.nan if self.kind == "batch" and self.index == SINGLE else loss)


def result(job: tuple[Path, str, tuple[str, ...]]) -> dict[str, Any]:
    """Train a run in a process of its own, and return its summary."""
    directory, poison, words = job
    import stabrun.training.run as module

    Poisoned.kind = poison
    module.Trainer = Poisoned  # type: ignore[misc]
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        return dict(train(compose([*NANO, *words]), directory))


def poison(runs: Path, pool: ProcessPoolExecutor, seeds: int) -> Iterator[str]:
    yield "| disturbance | recovery | verdicts of the seeds | steps left out or rewinds | final loss |"
    yield "|---|---|---|---|---|"
    for kind in ("", "stretch", "batch"):
        for how, words in HOW.items():
            jobs = [
                (
                    runs / "poison" / f"{kind or 'no'}-{how}-{seed}".replace(" ", ""),
                    kind,
                    (*FRAGILE, *words, f"seed={seed}"),
                )
                for seed in range(seeds)
            ]
            found = list(pool.map(result, jobs))
            verdicts = ", ".join(str(run["verdict"]) for run in found)
            needed = ", ".join(str(run["outliers_skipped"] or run["rewinds"] or 0) for run in found)
            losses = ", ".join(f"{float(run['final_loss']):.2f}" for run in found)
            yield f"| {kind or 'none'} | {how} | {verdicts} | {needed} | {losses} |"


def edge(runs: Path, pool: ProcessPoolExecutor, seeds: int) -> Iterator[str]:
    cells = [
        (variant, rate, seed)
        for variant in ("baseline", "qk_norm")
        for rate in (0.05, 0.1, 0.2, 0.4)
        for seed in range(seeds)
    ]

    def jobs(cells: list[tuple[str, float, int]], how: str) -> list[tuple[Path, str, tuple[str, ...]]]:
        return [
            (
                runs / "edge" / f"{variant}-{rate}-{seed}-{how}".replace(" ", ""),
                "",
                (*EDGE, f"+variant={variant}", f"optim.lr={rate}", f"seed={seed}", *HOW[how]),
            )
            for variant, rate, seed in cells
        ]

    plain = dict(zip(cells, pool.map(result, jobs(cells, "none")), strict=True))
    lost = [cell for cell, run in plain.items() if run["verdict"] == "diverged"]
    yield f"{len(cells)} runs, of which {len(lost)} diverged without recovery."
    yield ""
    yield "| recovery | diverged runs | converged or recovered with it | median change of the final loss |"
    yield "|---|---|---|---|"
    for how in list(HOW)[1:]:
        found = list(pool.map(result, jobs(lost, how)))
        saved = sum(run["verdict"] in ("converged", "recovered") for run in found)
        changes = sorted(
            float(run["final_loss"]) - float(plain[cell]["final_loss"]) for cell, run in zip(lost, found, strict=True)
        )
        yield f"| {how} | {len(lost)} | {saved} | {changes[len(changes) // 2]:+.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("poison", "edge"))
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    with ProcessPoolExecutor(given.workers) as pool:
        for line in {"poison": poison, "edge": edge}[given.part](given.runs, pool, given.seeds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
