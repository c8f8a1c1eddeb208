"""Two runs side by side: from which step their losses differ, which output norm differs first, and by how much.

`sameness` decides whether their losses are the same within a tolerance.
"""

from typing import Any

import numpy as np
from scipy.special import stdtrit

from stabrun.record.metrics import by_site
from stabrun.record.schema import Row
from stabrun.verdict.chart import LEAST_ROWS, LEAST_WINDOW, NORMAL_MAD, WINDOW_SHARE, trailing_means

WINDOW = 20  # rows in the window of the difference, at most a quarter of all; at least WINDOW_SHARE of them
SIGMAS = 6.0  # standard errors of the difference between two losses that differ
FACTOR = 1.5  # between two output norms that differ
TAIL = 0.025  # of the errors of `sameness`, on each side


def compare(this: list[Row], other: list[Row]) -> dict[str, Any]:
    """How this run differs from another one, on the steps that both have.

    `steps`: the number of common steps. `loss_step`: the step from which on the losses differ, up to the last common
    step. `difference`: this run's loss minus the other's at the end. `site`, `site_step`,
    `site_factor`: the first site whose output norms differ up to the end, from which step on, and the factor at the
    end. None for what does not differ.
    """
    pairs, losses = paired(this, other)
    steps = [row["step"] for row, _ in pairs]
    result: dict[str, Any] = dict.fromkeys(("loss_step", "difference", "site", "site_step", "site_factor"))
    finite = int(np.argmin(np.append(np.isfinite(losses).all(axis=1), False)))
    window = window_of(len(pairs))
    if finite < len(pairs):
        result["loss_step"] = steps[finite]
    if finite >= window:
        means = trailing_means(losses[:finite, 0] - losses[:finite, 1], window)
        # Twice the noise of the quieter run: a diverged run must not hide in its own noise.
        spread = NORMAL_MAD * float(np.median(np.abs(np.diff(losses[:finite], axis=0)), axis=0).min()) / 2**0.5
        error = spread * (2 / window) ** 0.5
        index = since(np.abs(means) > max(SIGMAS * error, 1e-12))
        if index is not None:
            result["loss_step"] = steps[index + window - 1]
            result["difference"] = float(means[-1]) if finite == len(pairs) else None
    norms = [(step, *(by_site(row, "norm/out/") for row in pair)) for step, pair in zip(steps, pairs, strict=True)]
    norms = [(step, a, b) for step, a, b in norms if a and a.keys() == b.keys()]
    return {"steps": len(pairs), **result, **(first_site(norms) if norms else {})}


def paired(this: list[Row], other: list[Row]) -> tuple[list[tuple[Row, Row]], np.ndarray]:
    """The rows of both runs at their common steps, and the losses of these rows `[steps, 2]`."""
    others = {row["step"]: row for row in other}
    pairs = [(row, others[row["step"]]) for row in this if row["step"] in others]
    losses = [[float(a["train/loss"]), float(b["train/loss"])] for a, b in pairs]
    return pairs, np.array(losses, dtype=float).reshape(-1, 2)


@np.errstate(over="ignore", invalid="ignore")  # differences of huge losses may be infinite
def sameness(this: list[Row], other: list[Row], tolerance: float, one_diverged: bool = False) -> dict[str, Any]:
    """Whether the losses of two runs are the same within `tolerance`, in units of the loss (nats in own runs).

    The level of the difference is the mean over a window of this run's loss minus the other's, at every common step
    from the end of the first window on. `same` is

    - True if each level is within ± tolerance together with its 95 % interval. If one is in truth outside, this happens
      with a probability of at most 2.5 %, whatever the number of windows (an intersection-union test, Berger 1982,
      Technometrics 24).
    - False if a level is outside together with its interval at 95 % for all windows at once (Bonferroni), if a loss is
      not finite at a common step where the other one is, or if one of the runs diverged by its verdict, `one_diverged`.
      Steps at which neither loss is finite are left out.
    - None if neither is shown: the difference is too noisy, or there are fewer than LEAST_ROWS common steps.

    The standard error of a level comes from the differences δ of successive means over half a window: √(mean δ² / 4)
    (von Neumann 1941, Annals of Mathematical Statistics 12). It includes correlations that are much shorter than half a
    window. Intervals are Student's, with one degree of freedom per δ.

    `within`: the smallest tolerance within which the losses are shown to be the same. `apart_step`: the step at which
    the level is farthest outside, or the first at which one loss is not finite; `apart`: the level there. None for what
    does not exist.
    """
    pairs, losses = paired(this, other)
    result: dict[str, Any] = dict.fromkeys(("within", "apart_step", "apart"))
    result |= {"tolerance": tolerance, "same": False if one_diverged else None}
    finite = np.isfinite(losses)
    if (unlike := finite[:, 0] != finite[:, 1]).any():
        return result | {"same": False, "apart_step": pairs[int(unlike.argmax())][0]["step"]}
    rows = np.flatnonzero(finite[:, 0])
    if len(rows) < LEAST_ROWS:
        return result
    window = window_of(len(rows))
    difference = losses[rows, 0] - losses[rows, 1]
    levels = trailing_means(difference, window)
    halves = np.diff(trailing_means(difference, window // 2)[:: window // 2])
    error = float(np.mean(halves**2) / 4) ** 0.5
    within = float(np.abs(levels).max() + stdtrit(len(halves), 1 - TAIL) * error)
    index = int(np.abs(levels).argmax())
    if within <= tolerance and not one_diverged:
        result["same"] = True
    elif abs(levels[index]) - stdtrit(len(halves), 1 - TAIL / len(levels)) * error > tolerance:
        step = pairs[rows[index + window - 1]][0]["step"]
        result |= {"same": False, "apart_step": step, "apart": float(levels[index])}
    return result | {"within": within}


def window_of(count: int) -> int:
    """Rows in a window of the difference of `count` losses."""
    return max(LEAST_WINDOW, min(WINDOW, count // 4), round(WINDOW_SHARE * count))


def first_site(norms: list[tuple[int, dict[str, float], dict[str, float]]]) -> dict[str, Any]:
    """The first site whose output norms, given as (step, this run's, the other's), differ by FACTOR up to the end."""
    sites = list(norms[0][1])
    ratios = np.array([[a[site] / b[site] if b[site] else np.inf for site in sites] for _, a, b in norms])
    logs = np.abs(np.log(np.clip(np.nan_to_num(ratios, nan=np.inf), 1e-30, 1e30)))
    starts = [
        (start, -float(logs[-1, i]), i)
        for i in range(len(sites))
        if (start := since(logs[:, i] > np.log(FACTOR))) is not None
    ]
    if not starts:
        return {}
    row, _, index = min(starts)
    return {"site": sites[index], "site_step": norms[row][0], "site_factor": float(ratios[-1, index])}


def since(differs: np.ndarray) -> int | None:
    """The index from which on a boolean array is True up to its end, for at least five entries and a twentieth."""
    same = np.flatnonzero(~differs)
    start = int(same[-1]) + 1 if len(same) else 0
    return start if len(differs) - start >= max(5, len(differs) // 20) else None
