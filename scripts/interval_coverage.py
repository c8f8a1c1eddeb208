"""Coverage and width of the intervals of a grid in simulated studies, as the table of `docs/sweep.md`.

    python scripts/interval_coverage.py

The losses of a study are an expected curve, plus an offset of each seed at all rates of both variants, plus noise of
each run. The baseline is GAIN above the variant. Runs that diverge end at the initial loss of their seed.
"""

import argparse
from dataclasses import dataclass

import numpy as np

from stabrun.study.grid import LrCurve, best_loss, gain, lr_sensitivity

SEEDS = (2, 3, 5)
INITIAL, GAIN = 5.96, 0.05  # nats
HEAD = """\
| losses by rate | best loss | gain | LR sensitivity |
|---|---|---|---|"""


@dataclass(frozen=True)
class Scenario:
    """Expected losses of the rates, standard deviations in nats, and the share of seeds that diverge at each rate.

    `skew`: the σ of log-normal noise; normal noise if zero. `unseen`: divergences count by their share also where
    every seed diverged, or none.
    """

    name: str
    losses: tuple[float, ...]
    noise: tuple[float, ...]
    offset: float = 0.04
    skew: float = 0.0
    diverged: tuple[float, ...] = ()
    unseen: bool = False

    def curve(self, random: np.random.Generator, offsets: np.ndarray, above: float) -> tuple[LrCurve, np.ndarray]:
        """A curve of one loss per rate and seed, and the expected losses `[rates]` that its intervals should cover."""
        shape = len(self.losses), len(offsets)
        draws = random.normal(size=shape)
        if self.skew:
            draws = np.exp(self.skew * draws) - np.exp(self.skew**2 / 2)
        expected = np.array(self.losses) + above
        share = np.array(self.diverged or (0.0,) * shape[0])
        lost = random.random(shape) < share[:, None]
        initial = random.normal(INITIAL, 0.01, shape[1])
        losses = np.where(lost, initial, expected[:, None] + offsets + np.array(self.noise)[:, None] * draws)
        seen = lost.mean(axis=1)
        share = share if self.unseen else np.where((seen == 0) | (seen == 1), seen, share)
        curve = LrCurve(np.arange(1.0, shape[0] + 1), losses, initial)
        return curve, expected + share * (INITIAL - expected)


SHARP = (1.9, 1.7, 1.6, 2.0, 2.6, 2.9, 3.1)
STEEP_NOISE = (0.01, 0.01, 0.01, 0.03, 0.1, 0.2, 0.2)
AT_EDGE = (0, 0, 0, 0, 0.2, 0.5, 0.9)
SCENARIOS = (
    Scenario("sharp minimum, more noise at high rates", SHARP, STEEP_NOISE),
    Scenario("the same, skewed noise", SHARP, STEEP_NOISE, skew=0.8),
    Scenario("two of five rates nearly equal", (1.8, 1.705, 1.7, 1.9, 2.6), (0.01, 0.01, 0.01, 0.03, 0.2), 0.02),
    Scenario("four of nine rates equal", (1.75, 1.7, 1.7, 1.7, 1.7, 1.72, 1.8, 2.2, 2.9), (0.01,) * 7 + (0.05, 0.2)),
    Scenario("the same, no common offsets", (1.75, 1.7, 1.7, 1.7, 1.7, 1.72, 1.8, 2.2, 2.9), (0.02,) * 9, 0.0),
    Scenario("flat, the noise doubles from rate to rate", (1.7, 1.7, 1.7, 1.71, 1.72, 1.8, 2.5),
             (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32), 0.02),
    Scenario("all seeds diverge at the three highest rates", SHARP, STEEP_NOISE, diverged=(0, 0, 0, 0, 1, 1, 1)),
    Scenario("0.2, 0.5, 0.9 of the seeds diverge there", SHARP, STEEP_NOISE, diverged=AT_EDGE),
    Scenario("0.1 to 0.9 diverge, from the best rate on", (1.8, 1.71, 1.7, 1.705, 1.72, 1.8, 2.6), (0.01,) * 6 + (0.2,),
             0.02, diverged=(0, 0, 0.1, 0.3, 0.5, 0.9, 1)),
    Scenario("all of nine rates equal, no common offsets", (1.7,) * 9, (0.02,) * 9, 0.0),
    Scenario("0.2, 0.5, 0.9 diverge, counted also where unseen", SHARP, STEEP_NOISE, diverged=AT_EDGE, unseen=True),
)  # fmt: skip


def coverage(scenario: Scenario, seeds: int, studies: int) -> list[tuple[float, float]]:
    """(coverage, median width in nats) of the intervals of best loss, gain and LR sensitivity."""
    random = np.random.default_rng(seeds)
    covered, widths = [], []
    for _ in range(studies):
        offsets = random.normal(0, scenario.offset, seeds)
        (curve, losses), (baseline, base) = (scenario.curve(random, offsets, above) for above in (0.0, GAIN))
        truths = np.array([losses.min(), base.min() - losses.min(), losses.mean() - losses.min()])
        found = best_loss(curve), gain(curve, baseline), lr_sensitivity(curve)
        low, high = np.array([[one["low"], one["high"]] for one in found if one], dtype=float).T
        covered.append((low <= truths) & (truths <= high))
        widths.append(high - low)
    return list(zip(np.mean(covered, axis=0).tolist(), np.median(widths, axis=0).tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=4000, help="simulated studies per scenario and number of seeds")
    studies = parser.parse_args().studies
    print(HEAD)
    for scenario in SCENARIOS:
        by_statistic = zip(*(coverage(scenario, seeds, studies) for seeds in SEEDS), strict=True)
        cells = [
            f"{', '.join(f'{share:.3f}' for share, _ in found)} ({', '.join(f'{width:.2g}' for _, width in found)})"
            for found in by_statistic
        ]
        print(f"| {scenario.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
