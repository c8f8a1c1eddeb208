"""How lr50 moves with the width of a model and with the tokens of a run, and where a line through it ends at 830M."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from stabrun.report.paper import D_MODEL, PAPER, TOKENS, last_stable
from stabrun.report.study_data import StudyData
from stabrun.report.tables import Column, Table, TableCell, interval, interval_column, plain, rate
from stabrun.study.cost import tokens_per_run
from stabrun.study.facts import frontier_of
from stabrun.study.frontier import LEVEL
from stabrun.verdict.judge import STANDARD

Floats = NDArray[np.float64]
AXES = "width (d_model)", "tokens per run"
WIDTH_AXIS, TOKENS_AXIS = range(2)


@dataclass(frozen=True)
class Line:
    """A linear model y = X·β + ε by least squares: X `[n, p]`, β `[p]`, ε normal with an unknown variance."""

    x: Floats
    y: Floats

    @property
    def degrees(self) -> int:
        return len(self.y) - self.x.shape[1]

    def at(self, row: Sequence[float], noise: bool) -> tuple[float, float, float]:
        """x·β with its 95 % interval by Student's t; `noise`: that of a further observation there."""
        inverse = np.linalg.inv(self.x.T @ self.x)
        beta = inverse @ self.x.T @ self.y
        variance = float(np.sum((self.y - self.x @ beta) ** 2)) / self.degrees
        point = np.array(row)
        middle, spread = float(point @ beta), variance * (float(point @ inverse @ point) + noise)
        half = float(t.ppf((1 + LEVEL) / 2, self.degrees)) * spread**0.5
        return middle, middle - half, middle + half


@dataclass(frozen=True)
class Scale:
    """The line through lr50 of a study: log₂ lr50 = a + Σ b·log₂(size), an a by variant and a b by varied axis.

    `sizes`: width and tokens of each arm whose lr50 is known; `varied`: the places of those that differ.
    """

    variants: list[str]
    sizes: list[tuple[int, int]]
    varied: list[int]
    line: Line

    def row(self, variant: str, size: tuple[int, int]) -> list[float]:
        """A row of the matrix X."""
        return row(self.variants, variant, [size[axis] for axis in self.varied])

    def slope(self, axis: int) -> tuple[float, float, float]:
        return self.line.at([0.0] * len(self.variants) + [float(axis == other) for other in self.varied], noise=False)


def row(variants: list[str], variant: str, sizes: list[int]) -> list[float]:
    return [float(variant == other) for other in variants] + [float(np.log2(size)) for size in sizes]


def scale_of(study: StudyData) -> Scale | None:
    """None if the arms whose lr50 is known vary neither width nor tokens, or are too few."""
    found = [
        (config.variant, (config.model.d_model, tokens_per_run(config)), middle)
        for arm, config in study.plan.arms.items()
        if arm in study.arm_summaries
        and (middle := frontier_of(study.arm_summaries[arm], STANDARD).get("lr50", {}).get("median"))
    ]
    sizes = [size for _, size, _ in found]
    varied = [axis for axis in range(len(AXES)) if len({size[axis] for size in sizes}) > 1]
    variants = list(dict.fromkeys(variant for variant, _, _ in found))
    x = np.array([row(variants, variant, [size[axis] for axis in varied]) for variant, size, _ in found])
    if not varied or len(found) <= x.shape[1] or np.linalg.matrix_rank(x) < x.shape[1]:
        return None
    return Scale(variants, sizes, varied, Line(x, np.log2([middle for _, _, middle in found])))


def scaling(study: StudyData) -> list[Table]:
    """Two tables: lr50 per doubling of width and of tokens, and the line at the size of arXiv 2410.16682."""
    scale = scale_of(study)
    if scale is None:
        return []
    reaches = WIDTH_AXIS in scale.varied and PAPER.keys() & set(scale.variants)
    return [slopes(scale), *([extrapolation(scale)] if reaches else [])]


def slopes(scale: Scale) -> Table:
    rows = []
    for axis in scale.varied:
        sizes = [size[axis] for size in scale.sizes]
        rows.append([plain(AXES[axis]), *map(size_cell, (min(sizes), max(sizes))), factor(scale.slope(axis))])
    columns = [Column("axis", "axis"), Column("lowest", "from"), Column("highest", "to")]
    columns.append(interval_column("factor", "lr50 per doubling"))
    note = (
        "A line through log₂ lr50 over log₂ of these, with a constant for each variant: least squares over "
        f"{len(scale.sizes)} arms whose lr50 is known, 95 % intervals by Student's t. What else differs between the "
        "arms, such as depth or vocabulary, counts as width."
    )
    return Table("scaling", "lr50 by scale", columns, rows, note)


def extrapolation(scale: Scale) -> Table:
    """The line at the width of the paper, and at its tokens if the study varies those."""
    least, rows = min(tokens for _, tokens in scale.sizes), []
    ends = [("width_only", least)] + [("both", TOKENS)] * (TOKENS_AXIS in scale.varied)
    for variant in (variant for variant in scale.variants if variant in PAPER):
        found = [factor(scale.line.at(scale.row(variant, (D_MODEL, tokens)), noise=True)) for _, tokens in ends]
        rows.append([plain(variant), *found, last_stable(variant), rate(PAPER[variant][2])])
    columns = [Column("variant", "variant")]
    columns += [interval_column(key, f"line at width {D_MODEL:,}, {tokens:,} tokens") for key, tokens in ends]
    columns += [Column("paper_last_stable", "paper: last stable LR")]
    columns += [Column("paper_first_diverging", "paper: first diverging LR")]
    note = (
        "An extrapolation far beyond what was trained. The intervals are those of a further observation if the line "
        "holds there; nothing here shows that it does. The slopes are common to all variants."
    )
    return Table("extrapolation", "The line at 830M parameters", columns, rows, note)


def size_cell(size: int) -> TableCell:
    return TableCell(f"{size:,}", (size,))


def factor(octaves: tuple[float, float, float]) -> TableCell:
    """2 to the power of a value and of the ends of its interval."""
    return interval(dict(zip(("median", "low", "high"), map(float, np.exp2(octaves)), strict=True)))
