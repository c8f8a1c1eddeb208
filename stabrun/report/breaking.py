"""Where diverged runs break: the sites that deviate most, and their norms compared to those of a converged run."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from statistics import median

from stabrun.record.jsonl import number
from stabrun.record.metrics import BLOCK_SITES, SITES
from stabrun.record.schema import Result, Row
from stabrun.report.selection import highest_stable
from stabrun.report.study_data import StudyData, read_rows
from stabrun.report.tables import Column, Table, plain, significant
from stabrun.verdict.judge import CONVERGED, DIVERGED

ALL = "all"
MAX_RUNS = 50  # diverged runs of an arm, those of the lowest learning rates, whose records are read
NORMS = "out", "in", "weight"
KEYS = [f"{norm}/{site}" for norm in NORMS for site in BLOCK_SITES]
GROWN = 2.0  # the least ratio that arXiv 2410.16682 reports of the outputs of QKV, Proj and FC2

Norms = dict[str, list[float]]  # `out/qkv` → the norm in each layer


def first_sites(study: StudyData) -> Table | None:
    """By arm: in how many diverged runs each site, and each layer, is the first bad one. None without such a run."""
    sites = {arm: [row["first_bad_site"] or "" for row in own] for arm, own in diverged_by_arm(study).items()}
    if not sites:
        return None
    sites |= {ALL: [site for own in sites.values() for site in own]} if len(sites) > 1 else {}
    layers = sorted({layer_of(site) for own in sites.values() for site in own} - {""})
    columns = [Column("variant", "variant"), Column("runs", "diverged runs"), *(Column(site, site) for site in SITES)]
    columns += [Column(layer, f"layer {int(layer.rpartition('_')[2])}") for layer in layers]
    columns += [Column("unknown", "no site found"), Column("most", "most often"), Column("most_runs", "in runs")]
    rows = []
    for arm, own in sites.items():
        of_layer, of_site = Counter(map(layer_of, own)), Counter(site.rpartition("/")[2] for site in own)
        ((most, most_runs),) = Counter(filter(None, own)).most_common(1) or [("", 0)]
        counts = [len(own), *(of_site[site] for site in SITES), *(of_layer[layer] for layer in layers), of_site[""]]
        rows.append([plain(arm), *map(plain, counts), plain(most), plain(most_runs)])
    note = (
        "Diverged runs by their first bad site: the one whose output norm deviated most from its trend while the loss "
        "turned, and whose output reached the next layer."
    )
    return Table("first_sites", "Where diverged runs break", columns, rows, note)


def layer_of(site: str) -> str:
    """`layer_03` of `layer_03/fc2`; empty for the output layer."""
    return site.rpartition("/")[0]


def diverged_by_arm(study: StudyData) -> dict[str, list[Result]]:
    """Arm → its diverged runs, the lowest learning rate first; arms without any are left out."""
    rows = sorted((row for row in study.rows if row["verdict"] == DIVERGED), key=lambda row: (row["lr"], row["seed"]))
    return {arm: own for arm in study.plan.arms if (own := [row for row in rows if row["arm"] == arm])}


def pairs(study: StudyData) -> Iterator[tuple[Result, list[Result]]]:
    """The converged run of each arm with the highest learning rate, and the diverged runs to compare to it."""
    for arm, own in diverged_by_arm(study).items():
        reference = highest_stable([row for row in study.rows if row["verdict"] == CONVERGED], arm)
        found = [row for row in own if row["first_bad_step"] is not None][:MAX_RUNS]
        if reference and found:
            yield reference, found


def steps_compared(study: StudyData) -> dict[str, set[int]]:
    """run_id → the steps whose statistics `growth` reads."""
    found = dict[str, set[int]]()
    for reference, runs in pairs(study):
        for row in runs:
            for one in (row, reference):
                found.setdefault(one["run_id"], set()).add(int(number(row["first_bad_step"])))
    return found


def growth(study: StudyData) -> Table | None:
    """The norms of diverged runs divided by those of a converged run of the same arm, by site. None without a pair."""
    ratios = [ratio for reference, runs in pairs(study) for ratio in ratios_of(study, reference, runs)]
    rows = []
    for key in (key for key in KEYS if any(key in ratio for ratio in ratios)):
        norm, site = key.split("/")
        having = [ratio for ratio in ratios if key in ratio]
        found = sorted(ratio[key] for ratio in having)
        largest = sum(ratio[key] == max(v for other, v in ratio.items() if other.startswith(norm)) for ratio in having)
        ends = [found[math.ceil(share * len(found)) - 1] for share in (0.25, 0.75)]
        quartiles = list(map(significant, (median(found), *ends)))
        counts = [plain(sum(value > GROWN for value in found)), plain(largest)]
        rows.append([plain(norm), plain(site), plain(len(found)), *quartiles, *counts])
    columns = [
        Column("norm", "norm"), Column("site", "site"), Column("runs", "diverged runs"),
        Column("median", "median ratio"), Column("low", "lower quartile"), Column("high", "upper quartile"),
        Column("above", f"above {GROWN:g}"), Column("largest", "largest of the sites"),
    ]  # fmt: skip
    note = (
        "Norm of a diverged run divided by that of the converged run of its variant with the highest learning rate, at "
        "the step from which the first counts as diverged; geometric mean over layers. A run is left out where the "
        f"converged run's norm is 0, and above {MAX_RUNS} runs of a variant. The last two columns count runs."
    )
    return Table("growth", "Norms of diverged runs", columns, rows, note) if rows else None


def ratios_of(study: StudyData, reference: Result, runs: list[Result]) -> Iterator[dict[str, float]]:
    """`out/qkv` → ratio, of each of these diverged runs that recorded statistics after its first bad step."""
    steps = sorted({int(number(row["first_bad_step"])) for row in runs})
    under = norms_from(read_rows(study.run(reference["run_id"]), []), steps)
    for row in runs:
        step = int(number(row["first_bad_step"]))
        over = norms_from(read_rows(study.run(row["run_id"]), []), [step])
        if step in over and step in under:
            yield by_site(over[step], under[step])


def norms_from(rows: Iterable[Row], steps: list[int]) -> dict[int, Norms]:
    """For each of these steps, in order: the norms of the first row with statistics at or after it."""
    found, waiting = dict[int, Norms](), list(steps)
    for row in rows:
        if waiting and row["step"] >= waiting[0] and f"norm/{KEYS[0]}" in row:
            norms = {key: list(map(number, row[f"norm/{key}"])) for key in KEYS if f"norm/{key}" in row}
            while waiting and row["step"] >= waiting[0]:
                found[waiting.pop(0)] = norms
    return found


def by_site(over: Norms, under: Norms) -> dict[str, float]:
    """`out/qkv` → the geometric mean over layers of the ratio of two runs' norms; infinite if the first is not finite.

    A site whose second norm is 0 or not finite in a layer is left out.
    """
    known = [key for key in over if key in under and all(0 < value < math.inf for value in under[key])]
    return {key: geometric_mean(over[key], under[key]) for key in known}


def geometric_mean(over: list[float], under: list[float]) -> float:
    """exp of the mean of log(over / under)."""
    if not all(map(math.isfinite, over)):
        return math.inf
    return math.exp(sum(math.log(max(a, 1e-30) / b) for a, b in zip(over, under, strict=True)) / len(over))
