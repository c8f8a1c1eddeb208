"""What became of a run: a fold over the rows of its record, the same live, after a resume and afterwards.

No torch here. First form of the rule; its constants and blind spots are in `docs/verdict.md`.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stabrun.observe.record import number

RULE = 1
WINDOW_SHARE, WINDOW_LEAST = (
    0.05,
    20,
)  # rows that a mean of the loss runs over: DESIGN's best_loss, final_loss
RISE = 0.1  # nats: GROUND's edge runs rise by 0.1 to 0.3 and stay; below that a rise is not told from noise
RISE_SIGMA = 6.0  # a rise must also exceed this many standard errors of a window's mean
LEARNED = 0.02  # a run whose loss falls by less than this share of its start has not learned

CONVERGED, RECOVERED, DIVERGED, UNDECIDED = "converged", "recovered", "diverged", "undecided"


@dataclass(frozen=True)
class Verdict:
    """`verdict`, its `reason`, the last step it has seen (`horizon`), and where it first went wrong."""

    verdict: str
    reason: str
    horizon: int
    first_bad_step: int | None = None
    first_bad_site: str | None = None
    scar: float | None = None
    init_loss: float | None = None
    best_loss: float | None = None
    final_loss: float | None = None
    rule: int = RULE

    @property
    def stable(self) -> bool:
        return self.verdict in (CONVERGED, RECOVERED)


class Judge:
    """Takes rows of `metrics.jsonl` in order by `add`; `verdict` says what is known so far."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.outputs: list[tuple[int, list[float]]] = []  # (row, output norm of each site)
        self.sites: list[str] = []
        self.broken: tuple[int, str, str | None] | None = None  # (step, reason, site) of the first non-finite

    def add(self, row: dict[str, Any]) -> None:
        loss, gradient = number(row["train/loss"]), number(row.get("grad/norm", 0.0))
        self.steps.append(row["step"])
        self.losses.append(loss)
        norms = by_site(row, "norm/out/")
        if norms:
            self.sites = list(norms)
            self.outputs.append((len(self.losses) - 1, list(norms.values())))
        if self.broken is None and not np.isfinite(loss):
            self.broken = row["step"], "nonfinite_loss", _first_nonfinite(row, "norm/out/")
        elif self.broken is None and not np.isfinite(gradient):
            self.broken = row["step"], "nonfinite_grad", _first_nonfinite(row, "norm/grad/")

    @property
    def over(self) -> bool:
        """Whether nothing that follows can change the verdict."""
        return self.broken is not None

    def verdict(self) -> Verdict:
        count = len(self.losses)
        horizon = self.steps[-1] if count else -1
        finite = np.asarray(self.losses)
        if self.broken is not None:
            finite = finite[np.isfinite(finite)]
        if not len(finite):
            reason = self.broken[1] if self.broken else "too_short"
            step, site = (self.broken[0], self.broken[2]) if self.broken else (None, None)
            return Verdict(DIVERGED if self.broken else UNDECIDED, reason, horizon, step, site)

        window = max(WINDOW_LEAST, round(WINDOW_SHARE * count))
        means = trailing_means(finite, min(window, len(finite)))
        losses: dict[str, Any] = {
            "init_loss": float(finite[0]),
            "best_loss": float(means.min()),
            "final_loss": float(means[-1]),
        }
        if self.broken is not None:
            step, reason, site = self.broken
            losses["final_loss"] = self.losses[-1]
            return Verdict(DIVERGED, reason, horizon, step, site, **losses)
        if count < 2 * window:
            return Verdict(UNDECIDED, "too_short", horizon, **losses)

        floor = np.minimum.accumulate(means)
        up = means > floor + rise_that_counts(finite, means, window)
        run_starts = np.flatnonzero(np.diff(up, prepend=False) & up)
        offset = window - 1  # means[i] ends at row i + offset
        if up[-1]:
            start = int(run_starts[-1])
            if len(up) - start < window:
                return Verdict(UNDECIDED, "rising", horizon, **losses)
            row = start + offset
            low = int(np.argmin(means[: start + 1])) + offset
            return Verdict(DIVERGED, "runaway", horizon, self.steps[row], self._grew_most(low, row), **losses)
        if losses["init_loss"] - losses["best_loss"] < LEARNED * abs(losses["init_loss"]):
            return Verdict(UNDECIDED, "no_learning", horizon, **losses)
        if up.any():
            scar = max(0.0, losses["final_loss"] - losses["best_loss"])
            row = int(run_starts[0]) + offset
            return Verdict(RECOVERED, "came_back", horizon, self.steps[row], scar=scar, **losses)
        return Verdict(CONVERGED, "fell", horizon, **losses)

    def _grew_most(self, low: int, bad: int) -> str | None:
        """The site whose output norm grew by the largest factor from row `low` to row `bad`."""
        if not self.outputs:
            return None
        rows = np.array([row for row, _ in self.outputs])
        table = np.log(np.maximum([norms for _, norms in self.outputs], 1e-30))
        at_low, at_bad = (min(int(np.searchsorted(rows, r)), len(rows) - 1) for r in (low, bad))
        span = WINDOW_LEAST // 2
        early = table[max(0, at_low - span) : at_low + 1].mean(0)
        late = table[max(0, at_bad - span) : at_bad + 1].mean(0)
        return self.sites[int(np.argmax(late - early))]


def of_run(verdict: Verdict, planned: int) -> Verdict:
    """The verdict on a run of `planned` steps: one that ended before them is not called stable."""
    if verdict.stable and verdict.horizon + 1 < planned:
        return replace(verdict, verdict=UNDECIDED, reason="interrupted")
    return verdict


def trailing_means(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each `window` values in a row: `[n]` → `[n − window + 1]`.

    A window is put together from sums over powers of two, which only add: a difference of cumulative sums would
    forget all that comes after one huge value.
    """
    count = len(values) - window + 1
    sums, width, start, total = np.asarray(values, dtype=float), 1, 0, np.zeros(count)
    while width <= window:
        if window & width:
            total += sums[start : start + count]
            start += width
        sums = sums[:-width] + sums[width:]
        width *= 2
    return total / window


def rise_that_counts(losses: np.ndarray, means: np.ndarray, window: int) -> float:
    """How far a window's mean must lie above the lowest before it, in nats."""
    noise = losses[window - 1 :] - means
    spread = 1.4826 * float(np.median(np.abs(noise - np.median(noise))))
    return max(RISE, RISE_SIGMA * spread / window**0.5)


def site_name(site: str, layer: int) -> str:
    """`layer_03/fc2`; the head stands alone."""
    return site if site == "head" else f"layer_{layer:02d}/{site}"


def by_site(row: dict[str, Any], prefix: str) -> dict[str, float]:
    """The values of the keys that start with `prefix`, by site, such as `layer_03/fc2`."""
    return {
        site_name(key.removeprefix(prefix), layer): number(value)
        for key, values in row.items()
        if key.startswith(prefix)
        for layer, value in enumerate(values)
    }


def _first_nonfinite(row: dict[str, Any], prefix: str) -> str | None:
    """The first site, in the order of the forward pass, with a value that is not finite."""
    bad = [name for name, value in by_site(row, prefix).items() if not np.isfinite(value)]
    order = {"qkv": 0, "proj": 1, "fc1": 2, "fc2": 3}

    def place(name: str) -> tuple[bool, str, int]:
        layer, _, site = name.partition("/")
        return name == "head", layer, order.get(site, 9)

    return min(bad, key=place, default=None)
