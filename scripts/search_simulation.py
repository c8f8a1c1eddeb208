"""Searches on simulated outcomes: how often intervals cover the truth, and how many runs ± 0.25 octaves take.

Each line is a way in which runs diverge. The latent variable of a run is z = (log₂ η − μ)/s + noise; the run diverges
if z > 0, and its outcome is clear if z < −a or z > b. The true threshold μ is normal about the middle of a range of ten
octaves, as in the prior, unless the line says how far it is from there. A search of up to 60 runs is followed until its
interval has the width asked for, or certainly cannot get it. Printed for each line: coverage of the interval after 12
runs and at the end, median number of runs, share of the searches that reached the width, and the root mean square error
of log₂ lr50 at the end. `--bits` leaves the grades out, and runs with earlier versions too.

    python scripts/search_simulation.py --searches 300
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stabrun.study.frontier import Frontier, ParameterGrid

LOW, OCTAVES, WIDTH, MOST = 2.0**-12, 10, 0.25, 60
MIDDLE = math.log2(LOW) + OCTAVES / 2
Draw = Callable[[np.random.Generator], float]


@dataclass(frozen=True)
class Case:
    """How outcomes arise: the spread, the noise, and the thresholds of the grades in units of the spread."""

    spread: float
    shift: float | None = None  # of the threshold from the middle of the range, in octaves
    noise: Draw = np.random.Generator.standard_normal
    calm: float = 0.6
    early: float = 1.2
    lapse: float = 0.0
    arbitrary: float = 0.0  # share of the grades that say nothing

    def outcome(self, octaves: float, random: np.random.Generator) -> tuple[bool, bool]:
        """(diverged, clear) of a run `octaves` above the threshold."""
        z = octaves / self.spread + self.noise(random)
        diverged = z > 0 if random.random() >= self.lapse else random.random() < 0.5
        clear = z > self.early if diverged else z < -self.calm
        return diverged, clear if random.random() >= self.arbitrary else random.random() < 0.5


def heavy(random: np.random.Generator) -> float:
    """Student's t of two degrees of freedom, scaled to the slope of a standard normal variable at its middle."""
    return float(random.standard_t(2)) * 0.3536 / 0.3989


def logistic(random: np.random.Generator) -> float:
    return float(random.logistic()) * 0.25 / 0.3989


def skewed(random: np.random.Generator) -> float:
    """An exponential variable, with its median at zero and standard deviation one: the edge is steep on one side."""
    return float(random.exponential()) - math.log(2)


def early_group(random: np.random.Generator) -> float:
    """A group of 30 % of the seeds with a threshold that is two spreads lower; the median is zero."""
    return float(random.standard_normal() * 0.5 + 2.0 * (random.random() < 0.3) - 0.283)


def plateau(random: np.random.Generator) -> float:
    """Two groups of seeds whose thresholds are two spreads apart from the middle."""
    return float(random.standard_normal() * 0.5 + random.choice([-2.0, 2.0]))


CASES = {
    "spread 0.2": Case(0.2),
    "spread 0.3": Case(0.3),
    "spread 0.45": Case(0.45),
    "spread 0.6": Case(0.6),
    "spread 1.2": Case(1.2),
    "threshold 3 octaves above the prior's mean, spread 0.3": Case(0.3, shift=3.0),
    "threshold 3 octaves below, spread 0.6": Case(0.6, shift=-3.0),
    "threshold 2 octaves above, spread 1.2": Case(1.2, shift=2.0),
    "logistic noise, spread 0.45": Case(0.45, noise=logistic),
    "heavy tails (Student's t, 2 degrees of freedom), spread 0.45": Case(0.45, noise=heavy),
    "5 % lapses, spread 0.45": Case(0.45, lapse=0.05),
    "10 % lapses, spread 0.45": Case(0.45, lapse=0.1),
    "an edge that is steep on one side, spread 0.45": Case(0.45, noise=skewed),
    "30 % of the seeds diverge 0.9 octaves earlier": Case(0.45, noise=early_group),
    "two groups of seeds, 1.2 octaves apart": Case(0.3, noise=plateau),
    "grades without information, spread 0.45": Case(0.45, arbitrary=1.0),
    "grades at 0.1 and 0.1 s, spread 0.45": Case(0.45, calm=0.1, early=0.1),
    "grades at 1.2 and 0.4 s, spread 0.45": Case(0.45, calm=1.2, early=0.4),
    "grades at 1.2 and 0.4 s, spread 1.2": Case(1.2, calm=1.2, early=0.4),
    "grades at 3 and 0.3 s, spread 0.6": Case(0.6, calm=3.0, early=0.3),
}


@dataclass(frozen=True)
class End:
    """A search: whether the interval covers the truth after 12 runs and at the end; runs; error in octaves."""

    early: bool
    covered: bool
    reached: bool
    runs: int
    error: float


def search(case: Case, graded: bool, seed: int) -> End:
    random = np.random.default_rng(seed)
    offset = case.shift if case.shift is not None else float(np.clip(random.normal(0, 2), -4.5, 4.5))
    truth, frontier = MIDDLE + offset, Frontier(GRID)
    runs, divergences, early = 0, 0, True
    while not (reached := frontier.known_to(WIDTH)) and runs < MOST and not (hopeless(frontier, runs)):
        rate, _ = frontier.next_rate(diverged_cost=(0.5 + divergences) / (1 + divergences))
        diverged, clear = case.outcome(math.log2(rate) - truth, random)
        frontier = frontier.after(rate, diverged, clear) if graded else frontier.after(rate, diverged)
        runs, divergences = runs + 1, divergences + diverged
        if runs <= 12:
            early = covers(frontier, truth)
    return End(early, covers(frontier, truth), reached, runs, middle(frontier) - truth)


def hopeless(frontier: Frontier, runs: int) -> bool:
    """Whether the search stops because its budget is not enough; never in versions that did not."""
    return runs >= 12 and hasattr(frontier, "out_of_reach") and frontier.out_of_reach(WIDTH, MOST - runs)


def covers(frontier: Frontier, truth: float) -> bool:
    found = frontier.rate_at(0.5)
    low, high = (end and math.log2(end) for end in (found["low"], found["high"]))
    return (low is None or low <= truth) and (high is None or truth <= high)


def middle(frontier: Frontier) -> float:
    """The median of log₂ lr50."""
    return float(frontier.quantiles(frontier.octaves_at(0.5))[0])


GRID = ParameterGrid(LOW, LOW * 2**OCTAVES)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=200)
    parser.add_argument("--bits", action="store_true")
    parser.add_argument("--only", default="", help="cases whose name begins with this")
    arguments = parser.parse_args()
    columns = "outcomes", "coverage after 12 runs", "at the end", "runs", "± 0.25 reached", "RMSE, octaves"
    print(f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", sep="\n")
    for name, case in (CASES).items():
        if not name.startswith(arguments.only):
            continue
        ends = [search(case, not arguments.bits, seed) for seed in range(arguments.searches)]
        early, covered, reached = (
            np.mean([getattr(end, key) for end in ends]) for key in ("early", "covered", "reached")
        )
        runs, error = np.median([end.runs for end in ends]), np.sqrt(np.mean([end.error**2 for end in ends]))
        print(f"| {name} | {early:.3f} | {covered:.3f} | {runs:g} | {reached:.2f} | {error:.3f} |", flush=True)
