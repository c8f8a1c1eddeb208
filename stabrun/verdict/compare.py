"""Two runs side by side: from which step their losses differ, which output norm differs first, and by how much."""

from typing import Any

import numpy as np

from stabrun.record.metrics import by_site
from stabrun.record.schema import Row
from stabrun.verdict.chart import NORMAL_MAD, WINDOW_SHARE, trailing_means

LEAST_WINDOW = 20  # rows in the window of the mean difference, and at least WINDOW_SHARE of them
SIGMAS = 6.0  # standard errors of the difference between two losses that differ
FACTOR = 1.5  # between two output norms that differ


def compare(this: list[Row], other: list[Row]) -> dict[str, Any]:
    """How this run differs from another one, on the steps that both have.

    `steps`: the number of common steps. `loss_step`: the step from which on the losses differ, up to the last common
    step. `difference`: this run's loss minus the other's at the end. `site`, `site_step`,
    `site_factor`: the first site whose output norms differ up to the end, from which step on, and the factor at the
    end. None for what does not differ.
    """
    others = {row["step"]: row for row in other}
    pairs = [(row, others[row["step"]]) for row in this if row["step"] in others]
    steps = [row["step"] for row, _ in pairs]
    result: dict[str, Any] = dict.fromkeys(("loss_step", "difference", "site", "site_step", "site_factor"))
    losses = np.array([[float(a["train/loss"]), float(b["train/loss"])] for a, b in pairs], dtype=float).reshape(-1, 2)
    finite = int(np.argmin(np.append(np.isfinite(losses).all(axis=1), False)))
    window = max(LEAST_WINDOW, round(WINDOW_SHARE * len(pairs)))
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
