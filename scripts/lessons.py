"""Train the runs of `docs/lessons.md` and write it: the effects of switches from the literature, at nano.

    python scripts/lessons.py --runs /tmp/lessons --workers 2 > docs/lessons.md

About sixty runs, ten minutes on two cores. Finished runs are not trained again.
"""

import argparse
import contextlib
import json
import lzma
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stabrun.composition import compose
from stabrun.config import run_id
from stabrun.data.corpus import EMBEDDED
from stabrun.record.jsonl import number
from stabrun.record.run_dir import RunDir
from stabrun.training.initial_check import check_initial

FIXED = ("tracker=none", "train.threads=1", "train.checkpoint_every=0", "train.steps=300")
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
TEXT = "bible20k.txt"

HEAD = """# Lessons: effects of single settings

Written by `python scripts/lessons.py --runs RUNS > docs/lessons.md`. Each section gives the expectation from the
literature, the command, and the result at nano (0.2M parameters, the embedded text, 300 steps unless stated otherwise,
one thread). These are results of a small model with one to three seeds and without intervals. Losses are in nats.
"""

Summary = dict[str, Any]
Row = list[str]


@dataclass(frozen=True)
class Lesson:
    """A section: its runs as label → overrides, and a function from their summaries to table rows and result."""

    title: str
    expected: str
    command: str
    columns: tuple[str, ...]
    runs: dict[tuple[str, ...], tuple[str, ...]]
    table: Callable[[dict[tuple[str, ...], Summary]], tuple[list[Row], str]]


def zero_init() -> Lesson:
    def table(by: dict[tuple[str, ...], Summary]) -> tuple[list[Row], str]:
        rows = [[name, f"{s['init_loss']:.3f}", f"{s['final_loss']:.3f}", s["verdict"]] for (name,), s in by.items()]
        zero = by["zero",]
        still = zero["final_loss"] == zero["init_loss"]
        return rows, f"With `zero` the loss {'stays constant' if still else 'changes'}; with `zero_out` it falls."

    inits = ("zero", "zero_out", "fan_in")
    return Lesson(
        "Zero initialization does not learn",
        "If all matrices are zero, no gradient reaches them. Zeros only in the layers that write to the residual "
        "stream are harmless.",
        "stabrun train -m model.init=zero,zero_out,fan_in train.steps=300",
        ("model.init", "first loss", "last loss", "verdict"),
        {(name,): (f"model.init={name}",) for name in inits},
        table,
    )


def no_warmup() -> Lesson:
    def table(by: dict[tuple[str, ...], Summary]) -> tuple[list[Row], str]:
        rows, sensitivity = [], {}
        for variant in ("baseline", "qk_norm"):
            for warmup in ("0", "75"):
                ends = [mean(by[variant, warmup, str(rate), seed]["final_loss"] for seed in "01") for rate in RATES]
                first = mean(by[variant, warmup, str(RATES[0]), seed]["init_loss"] for seed in "01")
                value = mean(min(end, first) - min(ends) for end in ends)
                sensitivity[variant, warmup] = value
                rows.append([variant, warmup, *(f"{end:.3f}" for end in ends), f"{value:.3f}"])
        ratios = [
            f"{sensitivity[v, '0'] / sensitivity[v, '75']:.2f} times as high for {v}" for v in ("baseline", "qk_norm")
        ]
        return rows, f"Without warmup, LR sensitivity is {' and '.join(ratios)}."

    return Lesson(
        "Without warmup the loss is more sensitive to the learning rate",
        "A longer warmup lowers LR sensitivity (arXiv 2309.14322, section 3.2.1). LR sensitivity is the mean over the "
        "learning rates of min(loss, first loss) minus the lowest loss. Mean of two seeds, cosine schedule.",
        "stabrun train -m +variant=baseline,qk_norm schedule.warmup_steps=0,75 "
        f"optim.lr={','.join(map(str, RATES))} seed=0,1 train.steps=300",
        ("variant", "warmup", *(f"lr {rate:g}" for rate in RATES), "LR sensitivity"),
        {
            (variant, warmup, str(rate), seed): (
                f"+variant={variant}", f"schedule.warmup_steps={warmup}", f"optim.lr={rate}", f"seed={seed}"
            )
            for variant in ("baseline", "qk_norm")
            for warmup in ("0", "75")
            for rate in RATES
            for seed in "01"
        },
        table,
    )  # fmt: skip


def no_clipping() -> Lesson:
    def table(by: dict[tuple[str, ...], Summary]) -> tuple[list[Row], str]:
        rows, spikes, ends = [], {}, {}
        for rate in ("0.03", "0.1", "0.2"):
            for clip in ("1.0", "null"):
                runs = [by[rate, clip, seed] for seed in "012"]
                count = sum(run["spikes"]["count"] for run in runs)
                spikes[rate, clip] = count
                shares = [run["clipped_share"] for run in runs if run["clipped_share"] is not None]
                ends[rate, clip] = mean(run["final_loss"] for run in runs)
                rows.append([
                    rate, clip, str(count), f"{max(run['peak'] for run in runs):.1f}", f"{ends[rate, clip]:.3f}",
                    ", ".join(run["verdict"] for run in runs), f"{mean(shares):.0%}" if shares else "",
                ])  # fmt: skip
        rates = ("0.03", "0.1", "0.2")
        counts = [f"{spikes[rate, 'null']} and {spikes[rate, '1.0']} at {rate}" for rate in rates]
        change = [f"{ends[rate, 'null'] - ends[rate, '1.0']:+.3f}" for rate in rates]
        result = f"Spikes without and with clipping: {'; '.join(counts)}."
        return rows, f"{result} Without clipping the last loss differs by {', '.join(change)}."

    return Lesson(
        "Gradient clipping and spikes",
        "Clipping the global norm to 1 keeps a large gradient from causing a large step. Adam divides by its own "
        "estimate of the gradient's size, so the effect should be smaller than with plain gradient descent. Constant "
        "learning rate after 50 steps; spikes are summed over three seeds.",
        "stabrun train -m optim.clip=1.0,null optim.lr=0.03,0.1,0.2 seed=0,1,2 "
        "schedule=constant schedule.warmup_steps=50 train.steps=300",
        ("lr", "optim.clip", "spikes", "largest gradient norm", "last loss", "verdicts", "steps clipped"),
        {
            (rate, clip, seed): (
                f"optim.clip={clip}", f"optim.lr={rate}", f"seed={seed}",
                "schedule=constant", "schedule.warmup_steps=50",
            )
            for rate in ("0.03", "0.1", "0.2")
            for clip in ("1.0", "null")
            for seed in "012"
        },
        table,
    )  # fmt: skip


def decay_kinds() -> Lesson:
    lambdas = ("0.0", "0.001", "0.01", "0.1", "1.0")

    def table(by: dict[tuple[str, ...], Summary]) -> tuple[list[Row], str]:
        rows = [[kind, λ, f"{s['final_loss']:.3f}", f"{s['val_loss']:.3f}"] for (kind, λ), s in by.items()]
        worst = {kind: by[kind, "0.1"]["final_loss"] - by[kind, "0.0"]["final_loss"] for kind in ("decoupled", "l2")}
        changes = ", ".join(f"{change:+.3f} with {kind}" for kind, change in worst.items())
        return rows, f"λ = 0.1 changes the last loss by {changes}."

    return Lesson(
        "L2 is not decoupled decay",
        "L2 decay passes through Adam's division by the gradient's size. Where gradients are small, the decay becomes "
        "large, so the same λ has a much stronger effect (arXiv 1711.05101). Seed 0, lr 0.01.",
        f"stabrun train -m optim.decay=decoupled,l2 optim.weight_decay={','.join(lambdas)} train.steps=300",
        ("optim.decay", "λ", "last loss", "validation loss"),
        {
            (kind, λ): (f"optim.decay={kind}", f"optim.weight_decay={λ}")
            for kind in ("decoupled", "l2")
            for λ in lambdas
        },
        table,
    )


def dropout_gap(text: Path) -> Lesson:
    rates = ("0.0", "0.1", "0.2", "0.4")

    def table(by: dict[tuple[str, ...], Summary]) -> tuple[list[Row], str]:
        rows = []
        for (rate,), s in by.items():
            since = f"from step {s['overfit']['step']}" if s["overfit"] else "no"
            numbers = (s["final_loss"], s["val_loss"], s["best_val_loss"], s["val_gap"])
            rows.append([rate, *(f"{value:.3f}" for value in numbers), since, s["verdict"]])
        gap = {rate: by[rate,]["val_gap"] for rate in rates}
        return rows, f"The gap is {gap['0.0']:.2f} without dropout and {gap['0.2']:.2f} with 0.2."

    return Lesson(
        "Dropout reduces the gap on a corpus of 20 kB",
        "A small corpus is memorized: the training loss falls while the validation loss rises. The gap is the "
        "difference of their last values. 1,000 steps, seed 0.",
        f"xz -dc stabrun/data/text/kjv.txt.xz | head -c 20000 > {TEXT}\n"
        f"stabrun train -m data=local data.path={TEXT} model.dropout={','.join(rates)} "
        "train.steps=1000 train.val_every=25",
        ("model.dropout", "last training loss", "validation", "lowest validation", "gap", "overfits", "verdict"),
        {
            (rate,): (
                f"model.dropout={rate}", "data=local", f"data.path={text}", "train.steps=1000", "train.val_every=25"
            )
            for rate in rates
        },
        table,
    )  # fmt: skip


def depth_and_init() -> Iterable[str]:
    """The section on vanishing gradients: no training, one pass at the initial weights."""
    yield "\n## Without norm and residual, gradients vanish or explode with depth\n"
    yield (
        "Kaiming initialization preserves the variance through a ReLU network. Without norm and residual, the gradient "
        "of the first layer depends on every layer above it. Squared ReLU is not ReLU, and attention averages, so the "
        "factor per layer is not 1 here. The table shows the norm of the gradient at FC1's input in the last and in "
        "the first of 8 layers.\n"
    )
    words = "model.n_layer=8 model.init=kaiming model.norm.kind=none model.residual=false"
    yield f"```\nstabrun model +check=init {words}\n```\n"
    yield "| model.init | activation | norm and residual | last layer | first layer | first over last | findings |"
    yield "|---|---|---|---|---|---|---|"
    for init in ("kaiming", "xavier", "fan_in", "gpt2"):
        for activation in ("gelu", "relu2"):
            for bare in (("model.norm.kind=none", "model.residual=false"), ()):
                shape = f"model.init={init}", f"model.mlp.activation={activation}", "model.n_layer=8"
                config = configured(*shape, *bare)
                facts = check_initial(config)
                first, last = (facts["variances"]["fc1 in grad"][i] ** 0.5 for i in (0, -1))
                ratio = f"{first / last:.2g}" if last else ""
                found = " ".join(text.split(":")[0].rstrip(".") + "." for text in facts["findings"]) or "none"
                have = "neither" if bare else "both"
                yield f"| {init} | {activation} | {have} | {last:.2g} | {first:.2g} | {ratio} | {found} |"


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(float(value) for value in values)


def configured(*words: str) -> Any:
    return compose([*FIXED, *words])


def train_one(job: tuple[tuple[str, ...], str]) -> str:
    from stabrun.training.run import train

    words, runs = job
    config = configured(*words)
    config.run_dir = str(Path(runs) / run_id(config))
    with contextlib.redirect_stdout(sys.stderr):
        return f"{train(config)['verdict']}: {' '.join(words)}"


def summary(words: tuple[str, ...], runs: Path) -> Summary:
    """The run's summary, and the `peak` of its gradient norm after the first 50 steps."""
    folder = runs / run_id(configured(*words))
    summary: Summary = json.loads((folder / "summary.json").read_text())
    norms = [number(row["grad/norm"]) for row in RunDir(folder).rows()]
    return summary | {"peak": max(norms[50:])}


def section(lesson: Lesson, runs: Path) -> Iterable[str]:
    rows, seen = lesson.table({label: summary(words, runs) for label, words in lesson.runs.items()})
    yield f"\n## {lesson.title}\n\n{lesson.expected}\n\n```\n{lesson.command}\n```\n"
    yield f"| {' | '.join(lesson.columns)} |"
    yield "|---" * len(lesson.columns) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield f"\nResult: {seen}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    text = arguments.runs / TEXT
    if not text.exists():
        text.write_bytes(lzma.open(EMBEDDED).read()[:20_000])
    lessons = [zero_init(), no_warmup(), no_clipping(), decay_kinds(), dropout_gap(text)]
    jobs = [(words, str(arguments.runs)) for lesson in lessons for words in lesson.runs.values()]
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        for done, verdict in enumerate(pool.imap(train_one, jobs), 1):
            print(f"[{done}/{len(jobs)}] {verdict}", file=sys.stderr, flush=True)
    print(HEAD.rstrip())
    for lesson in lessons:
        print("\n".join(section(lesson, arguments.runs)))
    print("\n".join(depth_and_init()))


if __name__ == "__main__":
    main()
