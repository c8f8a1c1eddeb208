"""Show that two checkouts of stabrun give the same records: `python scripts/compare_checkouts.py OLD NEW`.

Each runs, in a folder of its own, one short training of every variant of OLD, with other settings varied beside it, one
that diverges, a grid, a search, and `stabrun judge` on the 339 recorded loss curves. Compared byte for byte: the names
of the run and study directories, `metrics.jsonl`, `summary.json`, `results.csv` and `study.json`, timings aside, and
the verdicts. Exit status 1 if anything differs. Takes about three minutes for each checkout.
"""

import csv
import difflib
import itertools
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

TIMINGS = ("check", "seconds", "tokens_per_second", "mfu", "peak_memory_bytes")
SHORT = "train.threads=1 train.val_every=20 train.val_sequences=8 train.checkpoint_every=25 tracker=none"
TINY = (
    "model.n_layer=2 model.d_model=16 data.seq_len=16 train.batch_size=4 train.threads=1 train.steps=60 "
    "schedule.warmup_steps=5 train.val_sequences=4 tracker=none study.workers=1 study.variants=[baseline,qk_norm]"
)
SETTINGS = (  # one per variant in turn, so that more than the variants is compared
    "optim.decay=l2",
    "schedule=constant optim.lr=0.3",
    "train.micro_batch_size=4 optim.z_loss=1e-4",
    "train.precision=fp16",
    "model.norm.kind=rmsnorm model.mlp.activation=swiglu",
    "optim.clip_by=value optim.clip=0.01",
    "schedule=wsd model.bias=true",
    "schedule=linear model.dropout=0.1",
    "schedule=inverse_sqrt model.position.kind=learned",
    "model.tied=true seed=3",
)
DIVERGES = "schedule=constant optim.lr=0.3 train.steps=300 schedule.warmup_steps=50"
STUDIES = (
    "study.name=grid study.lrs=[1e-2,1e-1,3.0] study.seeds=2 data.val_fraction=0.05,0.1",
    "study.name=search study.strategy=frontier study.lr_range=[1e-2,3] study.max_runs=4",
)


def main() -> int:
    old, new = (Path(word).resolve() for word in sys.argv[1:])
    variants = sorted(file.stem for file in (old / "conf" / "variant").glob("*.yaml"))
    with TemporaryDirectory() as scratch:
        facts = [records(checkout, variants, Path(scratch) / name) for checkout, name in ((old, "old"), (new, "new"))]
    differ = [name for name in facts[0].keys() | facts[1].keys() if facts[0].get(name) != facts[1].get(name)]
    for name in sorted(differ):
        before, after = (side.get(name, "missing").splitlines() for side in facts)
        print(name, *list(difflib.unified_diff(before, after, lineterm="", n=0))[2:8], sep="\n  ")
    print(f"{len(facts[0])} files compared, {len(differ)} differ")
    return int(bool(differ))


def records(checkout: Path, variants: list[str], folder: Path) -> dict[str, str]:
    """Name → text of everything that is compared."""
    folder.mkdir()
    stabrun = Command(checkout, folder)
    for variant, setting in zip(variants, itertools.cycle(SETTINGS)):
        stabrun(f"train +variant={variant} train.steps=60 schedule.warmup_steps=10 {SHORT} {setting}")
    stabrun(f"train {SHORT} {DIVERGES}")
    for study in STUDIES:
        stabrun(f"sweep {TINY} {study}")
    curves = json.loads(stabrun(f"judge {write_curves(checkout, folder / 'curves')} --json"))
    found = {f"curves/{Path(facts.pop('path')).name}": json.dumps(facts, indent=1) for facts in curves}
    for pattern in ("runs/*/metrics.jsonl", "runs/*/summary.json", "studies/*/results.csv", "studies/*/study.json"):
        found |= {str(file.relative_to(folder)): without_timings(file) for file in folder.glob(pattern)}
    return found


class Command:
    """`stabrun` of one checkout, run in one folder."""

    def __init__(self, checkout: Path, folder: Path) -> None:
        self.folder = folder
        self.env = os.environ | {"PYTHONPATH": str(checkout), "STABRUN_CACHE": str(folder / "cache")}
        self.env |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def __call__(self, words: str) -> str:
        command = [sys.executable, "-m", "stabrun", *words.split()]
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return done.stdout


def without_timings(file: Path) -> str:
    if file.name == "summary.json":
        summary = json.loads(file.read_text())
        return json.dumps({key: value for key, value in summary.items() if key not in TIMINGS}, indent=1)
    if file.name == "results.csv":
        with open(file, newline="") as lines:
            rows = list(csv.DictReader(lines))
        return json.dumps([{key: value for key, value in row.items() if key not in TIMINGS} for row in rows], indent=1)
    return file.read_text()


def write_curves(checkout: Path, folder: Path) -> Path:
    """The recorded curves as a study directory: losses, gradient norms and learning rates alone."""
    with lzma.open(checkout / "tests" / "data" / "curves.npz.xz") as file:
        arrays = np.load(file)
        for index, facts in enumerate(json.loads(str(arrays["facts"]))):
            columns = {key: arrays[f"{index:03d}/{key}"].tolist() for key in ("train/loss", "grad/norm", "train/lr")}
            run = folder / "runs" / f"{index:03d}"
            run.mkdir(parents=True)
            rows = (
                {"step": step} | {key: values[step] for key, values in columns.items()}
                for step in range(facts["steps"])
            )
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


if __name__ == "__main__":
    sys.exit(main())
