"""Comparison of two runs: where their losses diverge from each other, at which site first, and by how much."""

from typing import Any

import numpy as np

from stabrun.record.metrics import by_site
from stabrun.verdict.chart import NORMAL_MAD, trailing_means, window_of

SIGMAS = 6.0  # standard errors of the difference, from which two losses differ
FACTOR = 1.5  # ratio of two output norms, from which two sites differ

Rows = list[dict[str, Any]]


def parted(here: Rows, there: Rows) -> dict[str, Any]:
    """Compare the run `here` with `there` on their common steps.

    Returns `steps`, the number of common steps; `loss_step`, the first step from which the losses differ until the
    end; `difference` of the losses at the end, positive if `here` is higher; `site`, `site_step` and `site_factor`: the
    first site whose output norms differ until the end, since when, and their ratio at the end. None: no difference.
    """
    other = {row["step"]: row for row in there}
    pairs = [(row, other[row["step"]]) for row in here if row["step"] in other]
    steps = [row["step"] for row, _ in pairs]
    found: dict[str, Any] = dict.fromkeys(("loss_step", "difference", "site", "site_step", "site_factor"))
    losses = np.array([[float(a["train/loss"]), float(b["train/loss"])] for a, b in pairs], dtype=float).reshape(-1, 2)
    finite = int(np.argmin(np.append(np.isfinite(losses).all(axis=1), False)))
    window = window_of(len(pairs))
    if finite < len(pairs):
        found["loss_step"] = steps[finite]
    if finite >= window:
        gap = losses[:finite, 0] - losses[:finite, 1]
        means = trailing_means(gap, window)
        # Use the noise of the quieter run for both: a diverged run would inflate it.
        spread = NORMAL_MAD * float(np.median(np.abs(np.diff(losses[:finite], axis=0)), axis=0).min()) / 2**0.5
        error = spread * (2 / window) ** 0.5
        index = since(np.abs(means) > max(SIGMAS * error, 1e-12))
        if index is not None:
            found["loss_step"] = steps[index + window - 1]
            found["difference"] = float(means[-1]) if finite == len(pairs) else None
    observed = [
        (step, by_site(a, "norm/out/"), by_site(b, "norm/out/")) for step, (a, b) in zip(steps, pairs, strict=True)
    ]
    observed = [(step, a, b) for step, a, b in observed if a and a.keys() == b.keys()]
    if observed:
        found |= first_site(observed)
    return {"steps": len(pairs), **found}


def first_site(observed: list[tuple[int, dict[str, float], dict[str, float]]]) -> dict[str, Any]:
    """The first site whose output norms differ by FACTOR until the end."""
    sites = list(observed[0][1])
    ratios = np.array([[a[site] / b[site] if b[site] else np.inf for site in sites] for _, a, b in observed])
    logs = np.abs(np.log(np.clip(np.nan_to_num(ratios, nan=np.inf), 1e-30, 1e30)))
    starts = [
        (start, -float(logs[-1, i]), i)
        for i in range(len(sites))
        if (start := since(logs[:, i] > np.log(FACTOR))) is not None
    ]
    if not starts:
        return {}
    row, _, index = min(starts)
    return {"site": sites[index], "site_step": observed[row][0], "site_factor": float(ratios[-1, index])}


def since(apart: np.ndarray) -> int | None:
    """The first index from which a boolean array is true until its end, for at least five entries and a twentieth."""
    together = np.flatnonzero(~apart)
    start = int(together[-1]) + 1 if len(together) else 0
    return start if len(apart) - start >= max(5, len(apart) // 20) else None
