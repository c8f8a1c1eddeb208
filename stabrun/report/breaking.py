"""Where diverging runs break: the sites that leave their trend first, and how much the norms of each site grow."""

import math
from collections import Counter
from collections.abc import Iterator
from statistics import median, quantiles

from stabrun.record.jsonl import number
from stabrun.record.metrics import BLOCK_SITES, SITES
from stabrun.record.schema import Result
from stabrun.report.selection import highest_stable
from stabrun.report.study_data import StudyData, read_rows
from stabrun.report.tables import Column, Table, plain, significant
from stabrun.verdict.judge import CONVERGED, DIVERGED

ALL = "all"
MAX_RUNS = 20  # diverged runs of an arm, those of the lowest learning rates, whose records are read
NORMS = "out", "in", "weight"
GROWN = 2.0  # the least growth that arXiv 2410.16682 reports of the outputs of QKV, Proj and FC2

Norms = dict[str, list[float]]  # `out/qkv` → the norm in each layer


def first_sites(study: StudyData) -> Table | None:
    """By arm: in how many diverged runs each site, and each layer, left its trend first. None without such a run."""
    places = {arm: [place(row["first_bad_site"]) for row in own] for arm, own in diverged_by_arm(study).items()}
    if not places:
        return None
    places |= {ALL: [one for own in places.values() for one in own]} if len(places) > 1 else {}
    layers = sorted({layer for own in places.values() for layer, _ in own if layer})
    columns = [Column("variant", "variant"), Column("runs", "diverged runs"), *(Column(site, site) for site in SITES)]
    columns += [*(Column(layer, layer.replace("_0", "_").replace("_", " ")) for layer in layers)]
    columns.append(Column("unknown", "no site found"))
    rows = []
    for arm, own in places.items():
        of_layer, of_site = Counter(layer for layer, _ in own), Counter(site for _, site in own)
        counts = [len(own), *(of_site[site] for site in SITES), *(of_layer[layer] for layer in layers), of_site[""]]
        rows.append([plain(arm), *map(plain, counts)])
    note = "Diverged runs, by the site and the layer whose statistics left their trend first."
    return Table("first_sites", "Where diverged runs break first", columns, rows, note)


def place(site: str | None) -> tuple[str, str]:
    """Layer and site of `layer_03/fc2`; the output layer has no layer, and what is unknown neither."""
    layer, _, name = (site or "").rpartition("/")
    return layer, name


def diverged_by_arm(study: StudyData) -> dict[str, list[Result]]:
    """Arm → its diverged runs, the lowest learning rate first; arms without any are left out."""
    rows = sorted((row for row in study.rows if row["verdict"] == DIVERGED), key=lambda row: (row["lr"], row["seed"]))
    return {arm: own for arm in study.plan.arms if (own := [row for row in rows if row["arm"] == arm])}


def growth(study: StudyData) -> Table | None:
    """The norms of diverged runs divided by those of a stable run of the same arm, by site. None without a pair."""
    ratios = list(map(by_site, compared(study)))
    keys = [
        key for key in (f"{norm}/{site}" for norm in NORMS for site in BLOCK_SITES) if any(key in r for r in ratios)
    ]
    rows = []
    for key in keys:
        norm, site = key.split("/")
        having = [each for each in ratios if key in each]
        found = [each[key] for each in having]
        low, _, high = quantiles(found, n=4) if len(found) > 1 else (None, None, None)
        largest = sum(
            each[key] == max(value for other, value in each.items() if other.startswith(norm)) for each in having
        )
        numbers = [significant(value) for value in (median(found), low, high)]
        counts = [plain(sum(value > GROWN for value in found)), plain(largest)]
        rows.append([plain(norm), plain(site), plain(len(found)), *numbers, *counts])
    columns = [
        Column("norm", "norm"), Column("site", "site"), Column("runs", "diverged runs"),
        Column("median", "median ratio"), Column("low", "lower quartile"), Column("high", "upper quartile"),
        Column("above", f"above {GROWN:g}"), Column("largest", "largest of the sites"),
    ]  # fmt: skip
    note = (
        "Norm of a diverged run divided by that of the converged run of its variant with the highest learning rate, at "
        "the step from which the first counts as diverged; geometric mean over layers. A run is left out where the "
        "converged run's norm is 0. The last two columns count runs."
    )
    return Table("growth", "Growth of norms in diverged runs", columns, rows, note) if rows else None


def compared(study: StudyData) -> Iterator[tuple[Norms, Norms]]:
    """Norms of a diverged run at its first bad step, and of the converged run to compare it to at the same step.

    In thinned records, at the next step that the first recorded, and at the nearest that the second did.
    """
    for arm, own in diverged_by_arm(study).items():
        converged = highest_stable([row for row in study.rows if row["verdict"] == CONVERGED], arm)
        reference = norms_by_step(study, converged["run_id"]) if converged else {}
        for row in own[:MAX_RUNS] if reference else []:
            found = norms_by_step(study, row["run_id"])
            if later := [step for step in found if step >= (row["first_bad_step"] or 0)]:
                step = min(later)
                yield found[step], reference[min(reference, key=lambda other: abs(other - step))]


def norms_by_step(study: StudyData, run_id: str) -> dict[int, Norms]:
    """Step → the norms that a run recorded there."""
    keys = [f"{norm}/{site}" for norm in NORMS for site in BLOCK_SITES]
    return {
        row["step"]: {key: list(map(number, row[f"norm/{key}"])) for key in keys if f"norm/{key}" in row}
        for row in read_rows(study.run(run_id), study.notes)
        if f"norm/{keys[0]}" in row
    }


def by_site(pair: tuple[Norms, Norms]) -> dict[str, float]:
    """`out/qkv` → the geometric mean over layers of the ratio of two runs' norms; infinite if a norm is not finite."""
    over, under = pair
    return {
        key: geometric_mean(over[key], under[key]) for key in over if all(value > 0 for value in under.get(key, [0]))
    }


def geometric_mean(over: list[float], under: list[float]) -> float:
    """exp of the mean of log(over / under)."""
    if not all(map(math.isfinite, over)):
        return math.inf
    return math.exp(sum(math.log(max(a, 1e-30) / b) for a, b in zip(over, under, strict=True)) / len(over))
