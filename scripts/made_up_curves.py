"""Made-up losses of every kind that a verdict must tell apart, with what a careful reading says of each.

python scripts/made_up_curves.py --count 500          # how often the verdict agrees, by kind
python scripts/made_up_curves.py --draw docs/verdict.png   # one of each kind with its verdict
python scripts/made_up_curves.py --certain 10000      # certain divergences of runs whose loss returns
"""

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from stabrun.verdict.judge import Judge, Verdict
from stabrun.verdict.rule import CONVERGED, DIVERGED, RECOVERED, UNDECIDED

Floats = NDArray[np.float64]
STABLE = (CONVERGED, RECOVERED)


@dataclass(frozen=True)
class Curve:
    """Losses by row; learning rates, and validation losses by row, if recorded."""

    losses: Floats
    rates: Floats | None = None
    validations: dict[int, float] = field(default_factory=dict)

    def judge(self, planned: int | None = None) -> Judge:
        judge = Judge(planned, constant=True)
        for row, loss in enumerate(self.losses.tolist()):
            values = {"step": row, "train/loss": loss, "grad/norm": 1.0}
            if self.rates is not None:
                values["train/lr"] = float(self.rates[row])
            if row in self.validations:
                values["val/loss"] = self.validations[row]
            judge.add(values)
        return judge

    def verdict(self) -> Verdict:
        return self.judge().conclude()


@dataclass(frozen=True)
class Kind:
    """How to draw a curve of a kind, and what a careful reading says of it."""

    draw: Callable[[Generator], Curve]
    verdicts: tuple[str, ...]


KINDS: dict[str, Kind] = {}


def kind(*verdicts: str) -> Callable[[Callable[[Generator], Curve]], Callable[[Generator], Curve]]:
    def register(draw: Callable[[Generator], Curve]) -> Callable[[Generator], Curve]:
        KINDS[draw.__name__.replace("_", " ")] = Kind(draw, verdicts)
        return draw

    return register


@dataclass(frozen=True)
class Fall:
    """A loss that falls from `start` to `end` over time 0 to 1, with the standard deviation `noise` of a row."""

    time: Floats
    losses: Floats
    start: float
    end: float
    noise: Floats

    @property
    def depth(self) -> float:
        return self.start - self.end


def fall(draw: Generator, least: int = 30, most: int = 1000, noise: float = 0.03) -> Fall:
    count = round(np.exp(draw.uniform(np.log(least), np.log(most))))
    time, start, end = np.arange(count) / count, draw.uniform(4, 12), draw.uniform(1.5, 3)
    white = draw.uniform(0.1, 1) * noise * (start - end) * draw.normal(0, 1, count)
    return Fall(time, end + (start - end) * np.exp(-time * draw.uniform(10, 60)), start, end, white)


@kind(*STABLE)
def healthy(draw: Generator) -> Curve:
    run = fall(draw)
    return Curve(run.losses + run.noise)


@kind(*STABLE)
def spikes(draw: Generator) -> Curve:
    run = fall(draw, least=100)
    losses = run.losses + run.noise
    losses[draw.integers(10, len(losses) - 10, 3)] += draw.uniform(0.2, 5, 3) * run.depth
    return Curve(losses)


@kind(*STABLE)
def came_back(draw: Generator) -> Curve:
    run = fall(draw, least=100)
    begin, length = draw.uniform(0.3, 0.5), draw.uniform(0.1, 0.2)
    inside = (run.time >= begin) & (run.time < begin + length)
    return Curve(run.losses + draw.uniform(0.3, 3) * run.depth * inside + run.noise)


@kind(*STABLE, UNDECIDED)
def slow_drift(draw: Generator) -> Curve:
    """A rise by less than 2 % of what was learned, at the end."""
    run = fall(draw, least=100)
    return Curve(run.losses + 0.02 * run.depth * np.maximum(0, run.time - 0.6) + run.noise / 3)


@kind(*STABLE)
def a_spike_when_nothing_is_left(draw: Generator) -> Curve:
    run = fall(draw, least=100)
    left = 1e-5 * np.exp(draw.normal(0, 0.3, len(run.time)) + 2 * (run.time > 0.6))
    decay = np.exp(-np.maximum(0, run.time - 0.6) * 300) * (run.time >= 0.6)
    return Curve(run.start * np.exp(-200 * run.time) + left + 20 * decay)


@kind(UNDECIDED, *STABLE)
def stuck_on_a_plateau(draw: Generator) -> Curve:
    run = fall(draw, least=60)
    return Curve(np.where(run.time == 0, run.start, run.start - 0.4 * run.depth) + run.noise)


@kind(UNDECIDED)
def never_learns(draw: Generator) -> Curve:
    """Above its start for most of the run, and at last below it by less than 2 %."""
    run = fall(draw, least=100)
    hump = 0.05 * np.sin(np.pi * np.minimum(1, run.time / 0.8)) - 0.015 * np.maximum(0, run.time - 0.8) / 0.2
    return Curve(run.start * (1 + hump + 0.003 * draw.normal(0, 1, len(run.time))))


@kind(UNDECIDED)
def noise_around_the_start(draw: Generator) -> Curve:
    run = fall(draw)
    return Curve(run.start * (1 + draw.uniform(0.001, 0.02) * draw.normal(0, 1, len(run.time))))


@kind(UNDECIDED, *STABLE)
def restart_of_the_schedule(draw: Generator) -> Curve:
    """A jump, and a fall to less than half of it until the end."""
    run = fall(draw, least=150, noise=0.01)
    begin, up = draw.uniform(0.4, 0.7), draw.uniform(0.2, 0.6) * run.depth
    since = np.maximum(0, run.time - begin) / (1 - begin)
    return Curve(run.losses + up * (since > 0) * np.exp(-draw.uniform(1, 3) * since) + run.noise)


@kind(UNDECIDED, *STABLE)
def restart_with_a_recorded_rate(draw: Generator) -> Curve:
    """The rate is raised again; the loss jumps, and stays where it is."""
    run = fall(draw, least=150, noise=0.01)
    later = run.time >= draw.uniform(0.4, 0.7)
    rates = 0.1 * np.where(later, 1 - run.time / 2, 1 - run.time)
    return Curve(run.losses + draw.uniform(0.1, 0.4) * run.depth * later + run.noise, rates)


@kind(*STABLE)
def several_runs(draw: Generator) -> Curve:
    run = fall(draw, least=100, noise=0.01)
    return Curve(np.concatenate([run.losses + run.noise, run.losses + draw.permutation(run.noise)]))


@kind(UNDECIDED, *STABLE)
def a_long_way_back(draw: Generator) -> Curve:
    run = fall(draw, least=150, noise=0.01)
    begin = draw.uniform(0.3, 0.5)
    since = np.maximum(0, run.time - begin) / (1 - begin)
    up = draw.uniform(0.3, 0.6) * run.depth
    return Curve(run.losses + up * (1 - draw.uniform(0.5, 0.9) * since) * (since > 0) + run.noise)


@kind(UNDECIDED)
def a_changed_objective(draw: Generator) -> Curve:
    """The training loss rises, while the validation loss falls all along."""
    run = fall(draw, least=100, noise=0.01)
    losses = run.losses + 0.5 * run.depth * np.maximum(0, run.time - 0.4) + run.noise
    rows = range(0, len(losses), len(losses) // 20)
    return Curve(losses, validations={row: float(run.start - 0.9 * run.depth * run.time[row]) for row in rows})


@kind(RECOVERED, DIVERGED)
def a_wild_middle(draw: Generator) -> Curve:
    """Far above its start for half of the run, and back at last."""
    run = fall(draw, least=150)
    wild = run.start * np.exp(np.abs(draw.normal(0, 1.5, len(run.time))) + 0.1)
    begin = run.losses[int(0.1 * len(run.time))]
    last = run.end + 0.1 * run.depth + (begin - run.end) * np.exp(-20 * np.maximum(0, run.time - 0.7))
    return Curve(np.where((run.time > 0.1) & (run.time < 0.7), wild, np.where(run.time <= 0.1, run.losses, last)))


@kind(DIVERGED)
def above_its_start(draw: Generator) -> Curve:
    run = fall(draw)
    rise = draw.uniform(0.02, 1) * np.minimum(1, run.time / draw.uniform(0.01, 0.3))
    return Curve(run.start * (1 + rise) + 0.003 * run.start * draw.normal(0, 1, len(run.time)) * (run.time > 0))


@kind(DIVERGED)
def far_above_its_start_with_noise(draw: Generator) -> Curve:
    run = fall(draw)
    return Curve(run.start * np.where(run.time == 0, 1, np.exp(draw.normal(2, 0.4, len(run.time)))))


@kind(DIVERGED)
def runaway(draw: Generator) -> Curve:
    run = fall(draw, least=60)
    begin, up = draw.uniform(0.3, 0.7), draw.uniform(0.3, 3) * run.depth
    return Curve(run.losses + up * np.clip((run.time - begin) / 0.05, 0, 1) + run.noise)


@kind(DIVERGED)
def creep(draw: Generator) -> Curve:
    run = fall(draw, least=100)
    return Curve(run.losses + draw.uniform(0.4, 1) * run.depth * np.maximum(0, run.time - 0.4) + run.noise)


@kind(DIVERGED, UNDECIDED)
def a_climb_over_few_rows(draw: Generator) -> Curve:
    run = fall(draw, least=25, most=60)
    return Curve(run.losses + draw.uniform(0.3, 0.8) * run.depth * np.maximum(0, run.time - 0.4) / 0.6 + run.noise)


@kind(DIVERGED)
def nan_after_a_runaway(draw: Generator) -> Curve:
    run = fall(draw, least=60)
    begin = int(0.4 * len(run.time))
    losses = run.losses + run.noise
    losses[begin:] = run.start * np.exp(np.linspace(0.1, 60, len(losses) - begin))
    losses[-5:] = np.nan
    return Curve(losses)


def drawn(name: str, seed: int) -> Curve:
    """The curve of a kind that belongs to a seed."""
    return KINDS[name].draw(np.random.default_rng(seed))


def returning(seed: int) -> Curve:
    """A loss that rises above its start after the first 5 % of the run, and returns to what it had learned."""
    draw = np.random.default_rng(seed)
    run = fall(draw, least=60, most=300)
    begin = draw.uniform(0.05, 0.8)
    end = draw.uniform(begin, 0.9)
    shape = draw.choice([0.0, 1.0, 4.0]) * np.maximum(0, run.time - begin) / (end - begin)
    inside = (run.time >= begin) & (run.time < end)
    return Curve(run.losses + draw.uniform(0.1, 20) * run.depth * inside * np.exp(-shape) + run.noise)


def print_counts(count: int) -> None:
    print("| kind | a careful reading says | the verdict says | agree |")
    print("|---|---|---|---|")
    for name, each in KINDS.items():
        verdicts = [drawn(name, seed).verdict() for seed in range(count)]
        said = Counter(f"{verdict.verdict} ({verdict.reason})" for verdict in verdicts)
        agree = sum(verdict.verdict in each.verdicts for verdict in verdicts)
        told = ", ".join(f"{number} {text}" for text, number in said.most_common())
        print(f"| {name} | {' or '.join(each.verdicts)} | {told} | {agree} of {count} |")


def print_certain(count: int) -> None:
    certain = back = 0
    for seed in range(count):
        curve = returning(seed)
        judge = curve.judge(planned=len(curve.losses))
        if judge.certain is not None:
            certain += 1
            judge.certain = None
            back += judge.verdict().verdict != DIVERGED
    print(f"{count} runs whose loss rises and returns: {certain} certain divergences, {back} of these came back.")


def draw_kinds(path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 15), layout="constrained")
    for seed, (axes, name) in enumerate(zip(figure.subplots(5, 4).flat, KINDS, strict=True)):
        curve = drawn(name, seed)
        verdict = curve.verdict()
        axes.plot(curve.losses, ".-", markersize=2, linewidth=0.6)
        if curve.validations:
            axes.plot(list(curve.validations), list(curve.validations.values()), "s", markersize=3)
        finite = curve.losses[np.isfinite(curve.losses)]
        if finite.max() > 10 * finite[0] or finite.min() < 1e-3 * finite[0]:
            axes.set_yscale("log")
        for step in verdict.restarts:
            axes.axvline(float(step), color="tab:green", linestyle=":")
        if verdict.first_bad_step is not None:
            axes.axvline(float(verdict.first_bad_step), color="tab:red", linewidth=0.8)
        axes.axhline(curve.losses[0], color="gray", linewidth=0.5)
        axes.set_title(f"{name}\n{verdict.verdict} ({verdict.reason}), {verdict.direction}", fontsize=10)
    figure.savefig(path, dpi=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--draw", type=Path, metavar="PNG")
    parser.add_argument("--certain", type=int, metavar="RUNS")
    asked = parser.parse_args()
    if asked.draw:
        draw_kinds(asked.draw)
    elif asked.certain:
        print_certain(asked.certain)
    else:
        print_counts(asked.count)


if __name__ == "__main__":
    main()
