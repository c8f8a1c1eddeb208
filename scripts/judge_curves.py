"""Judge the corpus of runs at the three strictnesses, and list the verdicts: `docs/curves.md`.

    python scripts/judge_curves.py > docs/curves.md

`--signals RUNS` prints instead how often each signal raised an alarm, and how long before the loss, in the run
directories of `scripts/make_curves.py --runs RUNS`: the packed losses contain no statistics.
"""

import argparse
import json
import lzma
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stabrun.record.metrics import signals
from stabrun.record.run_dir import RunDir
from stabrun.record.schema import Row
from stabrun.verdict.judge import Judge
from stabrun.verdict.rule import STRICTNESS

CORPUS = Path(__file__).parent.parent / "tests" / "data" / "curves.npz.xz"
HEALTHY, LOST = 0.05, 0.3  # nats; see HEAD


HEAD = """# The verdict on every run of the corpus

Written by `python scripts/judge_curves.py > docs/curves.md`; the runs by `scripts/make_curves.py`. Losses are means
over the last 20 steps, in nats. *Healthy*: the run ends within 0.05 of the best run of the same variant, size, steps
and schedule. *Lost*: the whole second half is more than 0.3 above the run's own lowest loss.

| strictness | healthy, called diverged | at most (95 %) | lost, not called diverged | at most (95 %) |
|---|---|---|---|---|"""


@dataclass
class Run:
    """A packed run: its facts, rows and losses."""

    facts: dict[str, Any]
    rows: list[dict[str, Any]]
    losses: np.ndarray

    @property
    def group(self) -> tuple[Any, ...]:
        """Runs of the same variant, size, steps and schedule are compared with each other."""
        return tuple(self.facts[key] for key in ("variant", "d_model", "steps", "schedule"))

    @property
    def means(self) -> np.ndarray:
        return np.convolve(self.losses, np.ones(20) / 20, "valid")

    @property
    def lost(self) -> bool:
        """Whether the whole second half is more than LOST above the run's own lowest loss."""
        return bool((self.means[-(len(self.losses) // 2) :] > self.means.min() + LOST).all())


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


def judged(judge: Judge, rows: Iterable[Row]) -> Judge:
    for row in rows:
        judge.add(row)
    return judge


def diverged_at_the_end(judge: Judge) -> bool:
    """Whether the verdict at the end is `diverged`, without regard to certainty."""
    certain, judge.certain = judge.certain, None
    diverged = judge.verdict().verdict == "diverged"
    judge.certain = certain
    return diverged


def bound(events: int, trials: int) -> float:
    """Upper end of the exact one-sided 95 % interval of a rate (Clopper and Pearson)."""
    from scipy.stats import beta

    return float(beta.ppf(0.95, events + 1, trials - events)) if trials > events else 1.0


def print_signals(folder: Path) -> None:
    """Print the alarms of each signal in converged runs below `folder`, and those in diverged runs with their leads."""
    alarms: Counter[str] = Counter()
    leads: dict[str, list[int]] = {name: [] for name in signals()}
    verdicts: Counter[str] = Counter()
    sites: Counter[str] = Counter()
    for file in sorted(folder.glob("*/metrics.jsonl")):
        verdict = judged(Judge(), RunDir(file.parent).rows()).conclude()
        verdicts[verdict.verdict] += 1
        if verdict.verdict == "converged":
            alarms.update(verdict.signals.keys())
        if verdict.verdict == "diverged":
            sites[(verdict.first_bad_site or "none").rpartition("/")[2]] += 1
            for name, signal in verdict.signals.items():
                leads[name].append(signal["lead"])
    print(f"{dict(verdicts)}; site of the diverged: {dict(sites)}\n")
    print("| signal | alarms, converged | alarms, diverged | of these before the loss | median lead |")
    print("|---|---|---|---|---|")
    for name, steps in leads.items():
        median = f"{np.median(steps):.0f}" if steps else ""
        print(f"| {name} | {alarms[name]} | {len(steps)} | {sum(lead > 0 for lead in steps)} | {median} |")


def page(runs: list[Run], judges: list[Judge]) -> Iterator[str]:
    """The lines of `docs/curves.md`; `judges` have taken the rows of `runs`."""
    best: dict[tuple[Any, ...], float] = {}
    for run in runs:
        best[run.group] = min(best.get(run.group, np.inf), run.means[-1])
    healthy = [i for i, run in enumerate(runs) if run.means[-1] <= best[run.group] + HEALTHY]
    lost = [i for i, run in enumerate(runs) if run.lost]
    verdicts = [{name: judge.verdict(name) for name in STRICTNESS} for judge in judges]
    yield HEAD
    for name in STRICTNESS:
        false = sum(verdicts[i][name].verdict == "diverged" for i in healthy)
        missed = sum(verdicts[i][name].verdict != "diverged" for i in lost)
        yield (
            f"| {name} | {false} of {len(healthy)} | {bound(false, len(healthy)):.1%} "
            f"| {missed} of {len(lost)} | {bound(missed, len(lost)):.1%} |"
        )
    certain = [i for i, judge in enumerate(judges) if judge.certain is not None]
    back = sum(not diverged_at_the_end(judges[i]) for i in certain)
    early = np.median([(judges[i].certain or 0) / len(runs[i].losses) for i in certain])
    yield f"\n{len(certain)} runs were certainly diverged before their end, half of them by {early:.0%} of their steps."
    yield f"Of these, {back} do not look diverged at their end (at most {bound(back, len(certain)):.1%}).\n"
    yield "| run | lowest | end | healthy, lost | lenient | standard | strict | first bad step | certain at |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for index, (run, judge) in enumerate(zip(runs, judges, strict=True)):
        state = "healthy" if index in healthy else "lost" if index in lost else ""
        words = " ".join(word for word in run.facts["words"] if "warmup" not in word)
        cells = " | ".join(f"{v.verdict} ({v.reason})" for v in verdicts[index].values())
        step = verdicts[index]["standard"].first_bad_step
        yield (
            f"| `{words}` | {run.means.min():.2f} | {run.means[-1]:.2f} | {state} | {cells} "
            f"| {'' if step is None else step} | {'' if judge.certain is None else judge.certain} |"
        )
    counts = Counter(verdict["standard"].verdict for verdict in verdicts)
    yield f"\nTotal, standard: {', '.join(f'{number} {verdict}' for verdict, number in sorted(counts.items()))}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=Path, metavar="RUNS")
    folder = parser.parse_args().signals
    if folder:
        print_signals(folder)
    else:
        runs = list(corpus())
        print(
            "\n".join(
                page(
                    runs,
                    [judged(Judge(run.facts["steps"], run.facts["schedule"] == "constant"), run.rows) for run in runs],
                )
            )
        )


if __name__ == "__main__":
    main()
