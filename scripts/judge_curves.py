"""Judge the corpus of own runs at the three strictnesses, and list what became of each: `docs/curves.md`.

    python scripts/judge_curves.py > docs/curves.md

With `--signals RUNS` it tells instead how often each signal raised an alarm, and how long before the loss, in the run
directories that `scripts/make_curves.py --runs RUNS` left: the packed losses hold no statistics.
"""

import argparse
import json
import lzma
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stabrun.record.metrics import signals
from stabrun.record.run_dir import RunDir
from stabrun.verdict.judge import STRICTNESS, Judge

CORPUS = Path(__file__).parent.parent / "tests" / "data" / "curves.npz.xz"
NEAR, FAR = (
    0.05,
    0.3,
)  # nats: an end this near to the best of its kind is healthy, one this far above its own lowest not


HEAD = """# The verdict on every run of the corpus

Written by `python scripts/judge_curves.py > docs/curves.md`; the runs by `scripts/make_curves.py`. Losses are means
of the last 20 steps, in nats. *Healthy* is an end within 0.05 of the best loss of the same variant, size, steps and
schedule; *lost* is a whole last half more than 0.3 above the run's own lowest.

| strictness | healthy, called diverged | at most (95 %) | lost, not called diverged | at most (95 %) |
|---|---|---|---|---|"""


@dataclass
class Run:
    """A packed run: its facts, its rows, its losses, and its loss at the end and at its lowest over 20 steps."""

    facts: dict[str, Any]
    rows: list[dict[str, Any]]
    losses: np.ndarray

    @property
    def kind(self) -> tuple[Any, ...]:
        """What is compared with what: variant, size, steps and schedule."""
        return tuple(self.facts[key] for key in ("variant", "d_model", "steps", "schedule"))

    @property
    def means(self) -> np.ndarray:
        return np.convolve(self.losses, np.ones(20) / 20, "valid")

    @property
    def lost(self) -> bool:
        """Whether it lay above its own lowest by more than FAR for the whole last half."""
        return bool((self.means[-(len(self.losses) // 2) :] > self.means.min() + FAR).all())


def corpus(path: Path = CORPUS) -> Iterator[Run]:
    with lzma.open(path) as file:
        arrays = np.load(file)
        for index, facts in enumerate(json.loads(str(arrays["facts"]))):
            columns = {key: arrays[f"{index:03d}/{key}"].tolist() for key in ("train/loss", "grad/norm", "train/lr")}
            rows = [
                {"step": step, **dict(zip(columns, values, strict=True))}
                for step, values in enumerate(zip(*columns.values(), strict=True))
            ]
            yield Run(facts, rows, np.array(columns["train/loss"]))


def judged(run: Run) -> Judge:
    judge = Judge()
    for row in run.rows:
        judge.add(row)
    return judge


def without_certainty(judge: Judge) -> bool:
    """Whether the run is diverged as it ends, whatever was certain before."""
    kept, judge.certain = judge.certain, None
    diverged = judge.verdict().verdict == "diverged"
    judge.certain = kept
    return diverged


def bound(events: int, trials: int) -> float:
    """Upper end of the exact one-sided 95 % interval of a rate (Clopper and Pearson)."""
    from scipy.stats import beta

    return float(beta.ppf(0.95, events + 1, trials - events)) if trials > events else 1.0


def tell_signals(folder: Path) -> None:
    """Print, by signal, the alarms in converged runs below `folder`, and those in diverged ones with their leads."""
    alarms: Counter[str] = Counter()
    leads: dict[str, list[int]] = {name: [] for name in signals()}
    ended: Counter[str] = Counter()
    named: Counter[str] = Counter()
    for file in sorted(folder.glob("*/metrics.jsonl")):
        judge = Judge()
        for row in RunDir(file.parent).rows():
            judge.add(row)
        verdict = judge.conclude()
        ended[verdict.verdict] += 1
        if verdict.verdict == "converged":
            alarms.update(verdict.signals.keys())
        if verdict.verdict == "diverged":
            named[(verdict.first_bad_site or "none").rpartition("/")[2]] += 1
            for name, signal in verdict.signals.items():
                leads[name].append(signal["lead"])
    print(f"{dict(ended)}; site of the diverged: {dict(named)}\n")
    print("| signal | alarms, converged | alarms, diverged | of these before the loss | median lead |")
    print("|---|---|---|---|---|")
    for name, found in leads.items():
        median = f"{np.median(found):.0f}" if found else ""
        print(f"| {name} | {alarms[name]} | {len(found)} | {sum(lead > 0 for lead in found)} | {median} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=Path, metavar="RUNS")
    folder = parser.parse_args().signals
    if folder:
        tell_signals(folder)
    else:
        list_curves()


def list_curves() -> None:
    runs = list(corpus())
    judges = [judged(run) for run in runs]
    best: dict[tuple[Any, ...], float] = {}
    for run in runs:
        best[run.kind] = min(best.get(run.kind, np.inf), run.means[-1])
    near = [i for i, run in enumerate(runs) if run.means[-1] <= best[run.kind] + NEAR]
    lost = [i for i, run in enumerate(runs) if run.lost]
    print(HEAD)
    for name in STRICTNESS:
        false = sum(judges[i].verdict(name).verdict == "diverged" for i in near)
        missed = sum(judges[i].verdict(name).verdict != "diverged" for i in lost)
        print(
            f"| {name} | {false} of {len(near)} | {bound(false, len(near)):.1%} "
            f"| {missed} of {len(lost)} | {bound(missed, len(lost)):.1%} |"
        )
    certain = [i for i, judge in enumerate(judges) if judge.certain is not None]
    back = sum(not without_certainty(judges[i]) for i in certain)
    early = np.median([(judges[i].certain or 0) / len(runs[i].losses) for i in certain])
    print(f"\nCertain before the end: {len(certain)} runs, half of them by {early:.0%} of their steps;")
    print(
        f"{back} of them would not be called diverged by their ends alone (at most {bound(back, len(certain)):.1%}).\n"
    )
    print("| run | lowest | end | healthy, lost | lenient | standard | strict | first bad step | certain at |")
    print("|---|---|---|---|---|---|---|---|---|")
    count: Counter[str] = Counter()
    for index, (run, judge) in enumerate(zip(runs, judges, strict=True)):
        said = {name: judge.verdict(name) for name in STRICTNESS}
        count[said["standard"].verdict] += 1
        state = "healthy" if index in near else "lost" if index in lost else ""
        words = " ".join(word for word in run.facts["words"] if "warmup" not in word)
        verdicts = " | ".join(f"{v.verdict} ({v.reason})" for v in said.values())
        step = said["standard"].first_bad_step
        print(
            f"| `{words}` | {run.means.min():.2f} | {run.means[-1]:.2f} | {state} | {verdicts} "
            f"| {'' if step is None else step} | {'' if judge.certain is None else judge.certain} |"
        )
    print(f"\nStandard, in all: {', '.join(f'{number} {verdict}' for verdict, number in sorted(count.items()))}.")


if __name__ == "__main__":
    main()
