"""The rows of a run as curves of bounded length, however long the run is."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from stabrun.record.jsonl import is_number, number
from stabrun.record.metrics import BY_SITE, METRICS, SCALAR, find
from stabrun.record.schema import Row
from stabrun.report.study_data import StudyData, read_rows

MAX_POINTS = 400  # of a curve of single numbers
MAX_LAYER_POINTS = 120  # of a curve with a line per layer
SCALARS = {key for key, metric in METRICS.items() if metric.shape == SCALAR} - {"step", "tokens", "train/loss"}


class Series:
    """Steps and values of one key, thinned to every second, fourth, … observation; the last one is always kept."""

    def __init__(self, most: int) -> None:
        self.most, self.stride, self.seen = most, 1, 0
        self.steps, self.values = list[int](), list[list[float]]()  # values by observation, then by layer

    def add(self, step: int, value: Any) -> None:
        """Take an observation; one of another number of layers than the first is ignored.

        A layer that was not called is NaN.
        """
        values = [number(item) for item in value] if isinstance(value, list) else [number(value)]
        if self.values and len(values) != len(self.values[0]):
            return
        if (self.seen - 1) % self.stride:  # the one before was kept only as the last
            del self.steps[-1], self.values[-1]
        if self.seen % self.stride == 0 and len(self.steps) >= self.most:
            self.steps, self.values, self.stride = self.steps[::2], self.values[::2], self.stride * 2
        self.steps.append(step)
        self.values.append(values)
        self.seen += 1

    @property
    def layers(self) -> list[list[float]]:
        """By layer, then by observation."""
        return [list(column) for column in zip(*self.values, strict=True)]


@dataclass
class RunCurves:
    """`loss` keeps the lowest and the highest value of each stretch, so that no spike is lost; `series` is by key."""

    loss: list[tuple[int, float]] = field(default_factory=list)
    series: dict[str, Series] = field(default_factory=dict)
    restarts: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)  # updates that were left out as outliers
    rewinds: list[int] = field(default_factory=list)  # the first step after each


Curves = dict[str, RunCurves]


def read_curves(study: StudyData, run_id: str) -> RunCurves:
    """The curves of a run. What cannot be read is noted in `study.notes`."""
    run = study.run(run_id)
    curves = curves_of(read_rows(run, study.notes))
    curves.restarts = run.restarts()
    return curves


def curves_of(rows: Iterable[Row]) -> RunCurves:
    curves, of_sites = RunCurves(), dict[str, bool]()
    losses, rewinds = list[tuple[int, float]](), 0
    for row in rows:
        losses.append((row["step"], number(row["train/loss"])))
        if row.get("recovery/skipped") == 1:
            curves.skipped.append(row["step"])
        if row.get("recovery/rewinds", rewinds) != rewinds:
            rewinds = row["recovery/rewinds"]
            curves.rewinds.append(row["step"])
        for key, value in row.items():
            if key not in of_sites:
                metric = find(key)
                of_sites[key] = metric is not None and metric.shape == BY_SITE
            if key in SCALARS or isinstance(value, list) or (of_sites[key] and is_number(value)):
                if key not in curves.series:
                    curves.series[key] = Series(MAX_LAYER_POINTS if isinstance(value, list) else MAX_POINTS)
                curves.series[key].add(row["step"], value)
    curves.loss = extremes(losses)
    return curves


def extremes(losses: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """About MAX_POINTS of the points: the lowest and the highest of each stretch, and non-finite stretches."""
    if len(losses) <= MAX_POINTS:
        return losses
    stretch, kept = math.ceil(2 * len(losses) / MAX_POINTS), {losses[0], losses[-1]}
    for start in range(0, len(losses), stretch):
        part = losses[start : start + stretch]
        finite = [point for point in part if math.isfinite(point[1])]
        kept |= {min(finite, key=itemgetter(1)), max(finite, key=itemgetter(1))} if finite else {part[0]}
    return sorted(kept)


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, evenly from the first to the last."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]
