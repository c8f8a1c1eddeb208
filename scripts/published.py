"""The tables of docs/published.md, of what `stabrun sweep` does not print.

    python scripts/published.py edges studies/placements-…
    python scripts/published.py z_loss studies/z_loss-…
    python scripts/published.py qk_clip studies/qk_clip-…
    python scripts/published.py spikes studies/spikes-…
    python scripts/published.py coverage

The first four read a study of `stabrun sweep`. `coverage` simulates grids like those of the page's first section: how
often the intervals of lr50 and of its ratio cover the truth.
"""

import argparse
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pandas import Series
from scipy.stats import binomtest, ttest_1samp

from stabrun.api import Run, load_study
from stabrun.record.jsonl import number
from stabrun.study.facts import frontier_of, interval_text, lr50_over
from stabrun.study.frontier import Floats, Frontier, Interval, ParameterGrid, ratio
from stabrun.study.summary import BASELINE
from stabrun.text import rate_text
from stabrun.verdict.judge import STANDARD

LAST = 100  # steps at the end of a run that its median is of
RATES = (0.022, 2.0)  # lowest and highest rate of the simulated study
HALF_OCTAVES, SEEDS, STUDIES = 5, 3, 500
SPREADS = (0.15, 0.3, 0.6, 1.2)  # octaves

Rows = Iterator[Sequence[str]]
Runs = dict[tuple[str, float], list[Run]]  # by arm and learning rate, in the order of seeds


def runs_of(directory: Path) -> Runs:
    study = load_study(directory)
    found = dict[tuple[str, float], list[Run]]()
    for row in study.results().sort_values(["lr", "seed"], kind="stable").itertuples():
        found.setdefault((str(row.arm), float(row.lr)), []).append(Run(study.files.run(str(row.Index)).path))
    return found


def last_median(values: "Series[float]") -> float:
    """Median of the recorded values of the last steps of a run."""
    return float(values[values.index > values.index[-1] - LAST].median())


def pairs(runs: Runs, arm: str, other: str) -> Iterator[tuple[float, list[Run], list[Run]]]:
    """The runs of two arms at each learning rate that both have."""
    yield from ((lr, runs[arm, lr], runs[other, lr]) for name, lr in runs if name == arm and (other, lr) in runs)


def log_z(run: Run) -> "Series[float]":
    """√(mean (log Z)²) by step."""
    return (run.metrics()["train/z_loss"] / run.config.optim.z_loss) ** 0.5


def edges(directory: Path) -> Rows:
    yield "variant", "diverged of three by LR", "lr50", "lr50 / baseline's"
    for arm, found in load_study(directory).summary["variants"].items():
        counts = (f"{rate_text(one['lr'])}: {one['diverged']}{unknown(one['undecided'])}" for one in found["runs"])
        lr50, over = frontier_of(found, STANDARD).get("lr50"), lr50_over(found, BASELINE)
        yield f"`{arm}`", ", ".join(counts), interval_text(lr50), interval_text(over)


def unknown(undecided: int) -> str:
    return f" ({undecided} undecided)" if undecided else ""


def z_loss(directory: Path) -> Rows:
    runs = runs_of(directory)
    yield "LR", "z-loss", "at step 0", "last 100 steps", "final loss", "verdicts"
    for (_, lr), own in runs.items():
        series = [log_z(run) for run in own]
        yield (
            rate_text(lr), f"{own[0].config.optim.z_loss:g}", listed(each.iloc[0] for each in series),
            listed(map(last_median, series), 3), listed(map(final_loss, own)), verdicts(own),
        )  # fmt: skip


def max_logit(run: Run) -> "Series[float]":
    """The largest attention logit of all layers, at each step that has one."""
    return run.metrics().filter(like="attn/max_logit").max(axis=1).dropna()


def qk_clip(directory: Path) -> Rows:
    runs = runs_of(directory)
    yield (
        "arm",
        "LR",
        "median of the last 100 steps",
        "largest after warmup",
        "final loss",
        "lower by",
        "verdicts",
    )
    for plain, clipped in (("baseline", "qk_clip"), ("muon", "muon+qk_clip")):
        for lr, *both in pairs(runs, plain, clipped):
            for arm, own in zip((plain, clipped), both, strict=True):
                logits = [max_logit(run) for run in own]
                warmup = own[0].config.schedule.warmup_steps
                yield (
                    arm, rate_text(lr), listed(map(last_median, logits), 0),
                    listed((each[each.index >= warmup].max() for each in logits), 0),
                    listed(map(final_loss, own)), "" if arm == plain else lowered(*both), verdicts(own),
                )  # fmt: skip


def lowered(plain: list[Run], changed: list[Run]) -> str:
    """Mean difference of the final losses of pairs in nats, with Student's interval over seeds."""
    differences = [final_loss(one) - final_loss(other) for one, other in zip(plain, changed, strict=True)]
    low, high = ttest_1samp(differences, 0.0).confidence_interval(0.95)
    return f"{statistics.fmean(differences):.3f} ({low:.3f}–{high:.3f})"


def spikes(directory: Path) -> Rows:
    runs = runs_of(directory)
    yield "LR", "arm", "spikes", "final loss", "verdicts"
    arms = list(dict.fromkeys(arm for arm, _ in runs))
    for (arm, lr), own in runs.items():
        yield rate_text(lr), arm, listed(map(spike_count, own), 0), listed(map(final_loss, own)), verdicts(own)
    stable = "stable_adamw+high_beta2"
    for other in arms:
        fewer, more = (
            sum(sign * before > sign * after for before, after in compared(runs, other, stable)) for sign in (1, -1)
        )
        if other != stable and fewer + more:
            p = binomtest(fewer, fewer + more).pvalue
            yield (
                "all",
                f"{other} and {stable}",
                f"fewer with the latter in {fewer}, more in {more} pairs: p = {p:.3f}",
                "",
                "",
            )


def compared(runs: Runs, arm: str, other: str) -> Iterator[tuple[int, int]]:
    """Spikes of the pairs of runs of two arms with the same rate and seed."""
    for _, own, others in pairs(runs, arm, other):
        yield from zip(map(spike_count, own), map(spike_count, others), strict=True)


def spike_count(run: Run) -> int:
    found = run.summary["spikes"]
    return int(found["count"]) if found else 0


def final_loss(run: Run) -> float:
    return number(run.summary["final_loss"])


def verdicts(runs: Iterable[Run]) -> str:
    return ", ".join(run.verdict for run in runs)


def listed(values: Iterable[float], digits: int = 2) -> str:
    return ", ".join(f"{value:,.{digits}f}" for value in values)


def coverage() -> Rows:
    """Intervals of grids of five half octaves about an edge that is known to ± half an octave, with three seeds."""
    yield "spread, octaves", "lr50 in its interval", "ratio in its interval", "median width of the ratio's, octaves"
    random = np.random.default_rng(0)
    for spread in SPREADS:
        inside, ratios, widths = list[bool](), list[bool](), list[float]()
        for _ in range(STUDIES):
            truths = random.uniform(np.log2(RATES[0]) + 1.5, np.log2(RATES[1]) - 1.5, 2)
            one, other = (simulated(truth, spread, random) for truth in truths)
            inside += [covers(found.rate_at(0.5), truth) for found, truth in zip((one, other), truths, strict=True)]
            interval = ratio(one, other)
            ratios.append(covers(interval, truths[0] - truths[1]))
            if interval["low"] and interval["high"]:
                widths.append(float(np.log2(interval["high"] / interval["low"])))
        yield f"{spread:g}", f"{np.mean(inside):.3f}", f"{np.mean(ratios):.3f}", f"{np.median(widths):.2f}"


def simulated(truth: float, spread: float, random: np.random.Generator) -> Frontier:
    """The posterior after a grid about log₂ rate `truth`. A rate is added on a side where all outcomes are the same."""
    steps = np.arange(HALF_OCTAVES, dtype=np.float64) - HALF_OCTAVES // 2
    rates: Floats = truth + random.uniform(-0.5, 0.5) + 0.5 * steps
    diverged = outcomes(rates, truth, spread, random)
    while diverged.all() or not diverged.any():
        further = rates[:1] - 0.5 if diverged.all() else rates[-1:] + 0.5
        rates = np.concatenate([rates, further])
        diverged = np.concatenate([diverged, outcomes(further, truth, spread, random)])
    runs = ((2.0 ** float(rate), bool(one)) for rate, seeds in zip(rates, diverged, strict=True) for one in seeds)
    return Frontier.of(GRID, runs)


def outcomes(rates: Floats, truth: float, spread: float, random: np.random.Generator) -> NDArray[np.bool_]:
    """Which runs diverge: `[rates, seeds]`."""
    return (rates[:, None] - truth) / spread + random.standard_normal((len(rates), SEEDS)) > 0


def covers(interval: Interval, octaves: float) -> bool:
    low, high = interval["low"], interval["high"]
    return (low is None or np.log2(low) <= octaves) and (high is None or octaves <= np.log2(high))


GRID = ParameterGrid(*RATES)
TABLES: dict[str, Callable[[Path], Rows]] = {"edges": edges, "z_loss": z_loss, "qk_clip": qk_clip, "spikes": spikes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=[*TABLES, "coverage"])
    parser.add_argument("study", type=Path, nargs="?", help="directory of the study")
    words = parser.parse_args()
    head, *rows = coverage() if words.table == "coverage" else TABLES[words.table](words.study)
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
