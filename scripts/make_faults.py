"""Train runs with a fault injected into one layer, and healthy runs, and pack their records for the tests.

Faults: the weights of one layer scaled at one step, its learning rate multiplied by 100 from one step on, its norms
removed at one step. Faults are injected into the trainer from outside.

    python scripts/make_faults.py --runs /tmp/faults --workers 2 --pack tests/data/faults.jsonl.xz
"""

import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from make_curves import main
from torch import nn

from stabrun.composition import compose
from stabrun.record.run_dir import RunDir
from stabrun.training.run import Run
from stabrun.training.trainer import Trainer

FIXED = [
    "tracker=none", "train.threads=1", "train.val_every=0", "train.checkpoint_every=0", "train.steps=240",
    "schedule=constant", "schedule.warmup_steps=40",
]  # fmt: skip
AT = 120
KEPT = ("step", "train/", "grad/norm", "norm/out/", "norm/in/proj", "norm/in/fc2", "attn/max_logit", "residual/")
KINDS = ("scaled", "fast", "normless")
FAULTY = ("baseline", "qk_norm", "qkv_norm", "soft_cap")


def plan() -> Iterator[tuple[str, list[str], str, int]]:
    """(name, overrides, fault, layer): 20 faults of three kinds, one harmless fault, and 20 healthy runs."""
    for number in range(20):
        kind, variant, turn = KINDS[number % 3], FAULTY[number % 4], number // 3
        layer = 1 + turn % 3 if kind == "normless" else turn % 4
        words = [f"+variant={variant}", "optim.lr=0.02", f"seed={number}"]
        yield f"{kind}-{number:02d}-layer-{layer}", words, kind, layer
    words = ["+variant=qk_fc_norm", "optim.lr=0.02", "seed=30"]  # norms after Proj and FC2 undo a scale
    yield "harmless-scaled-layer-2", words, "scaled", 2
    for seed in range(4):
        for variant in (*FAULTY, "qk_fc_norm"):
            yield f"healthy-{variant}-{seed}", [f"+variant={variant}", "optim.lr=0.01", f"seed={seed + 50}"], "", -1


class Removed(nn.Module):
    """A norm that does nothing. Its parameters have zero gradients."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for parameter in self.norm.parameters():
            x = x + 0 * parameter.sum()
        return x


def planted(step: Callable[..., object], trainer: Trainer, kind: str, layer: int) -> Callable[[int], object]:
    """The trainer's `step` with the fault in `layer` from step `AT` on."""
    block: Any = trainer.model.blocks[layer]

    def faulty(number: int) -> object:
        before = [p.detach().clone() for p in block.parameters()] if kind == "fast" else []
        if number == AT and kind == "scaled":
            with torch.no_grad():
                for parameter in (p for p in block.parameters() if p.dim() == 2):
                    parameter.mul_(30)
        if number == AT and kind == "normless":
            for parent in list(block.modules()):
                for name, norm in list(parent.named_children()):
                    if name.endswith("_norm"):
                        setattr(parent, name, Removed(norm))
        result = step(number)
        if number >= AT and kind == "fast":
            with torch.no_grad():
                for parameter, old in zip(block.parameters(), before, strict=True):
                    parameter.add_(parameter - old, alpha=99)
        return result

    return faulty


def train_one(job: tuple[tuple[str, list[str], str, int], str]) -> str:
    from stabrun.data.shards import prepare

    (name, words, kind, layer), runs = job
    config = compose([*FIXED, *words, f"run_dir={Path(runs) / name}"])
    if RunDir(Path(runs) / name).summary_file.exists():
        return f"{name}: done"
    trainer = Trainer(config, prepare(config.data, config.model))
    if kind:
        setattr(trainer, "step", planted(trainer.step, trainer, kind, layer))  # noqa: B010
    with RunDir(Path(runs) / name).lock(config) as record:
        summary = Run(trainer, record).start()
    return f"{name} layer {layer}: {summary['verdict']} {summary['first_bad_step']} {summary['first_bad_site']}"


def pack(runs: Path, target: Path) -> int:
    """One line per run: name, faulty layer (−1 for none), and the fields that the verdict reads."""

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(item) for item in value]
        return float(f"{value:.4g}") if isinstance(value, float) else value

    with lzma.open(target, "wt") as file:
        for name, _, _, layer in plan():
            rows = [
                {key: short(value) for key, value in row.items() if key.startswith(KEPT)}
                for row in RunDir(runs / name).rows()
            ]
            file.write(json.dumps({"name": name, "layer": layer, "at": AT, "rows": rows}) + "\n")
    return len(list(plan()))


if __name__ == "__main__":
    main(__doc__, list(plan()), train_one, pack)
