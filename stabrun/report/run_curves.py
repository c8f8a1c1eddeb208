"""A run's `metrics.jsonl` as curves of bounded length, whatever the length of the run."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from stabrun.record.jsonl import number
from stabrun.record.schema import Row
from stabrun.report.source import Source, read_rows

POINTS = 400  # of a curve of single numbers, at most; a page and a figure show no more
LAYERED = 120  # of a curve that has a line a layer
KEYS = "train/lr", "grad/norm", "grad/clipped", "val/loss", "scale/loss_scale"


class Curve:
    """Steps and values of one key, thinned to every second, fourth, … observation; the last one is always there."""

    def __init__(self, most: int) -> None:
        self.most, self.stride, self.seen = most, 1, 0
        self._steps, self._values = list[int](), list[list[float]]()
        self._last: tuple[int, list[float]] | None = None

    def add(self, step: int, value: Any) -> None:
        values = [number(item) for item in value] if isinstance(value, list) else [number(value)]
        self._last = step, values
        if self.seen % self.stride == 0:
            if len(self._steps) >= self.most:
                self._steps, self._values, self.stride = self._steps[::2], self._values[::2], self.stride * 2
            if self.seen % self.stride == 0:
                self._steps.append(step)
                self._values.append(values)
        self.seen += 1

    @property
    def steps(self) -> list[int]:
        return [*self._steps, self._last[0]] if self._last and self._thinned else self._steps

    @property
    def values(self) -> list[list[float]]:
        """By observation, then by layer."""
        return [*self._values, self._last[1]] if self._last and self._thinned else self._values

    @property
    def layers(self) -> list[list[float]]:
        """By layer, then by observation."""
        return [list(column) for column in zip(*self.values, strict=True)]

    @property
    def _thinned(self) -> bool:
        return self._last is not None and self._steps[-1:] != [self._last[0]]


@dataclass
class Trace:
    """`loss` keeps the lowest and the highest value of each stretch, so that no spike is lost; `curves` are by key."""

    loss: list[tuple[int, float]] = field(default_factory=list)
    curves: dict[str, Curve] = field(default_factory=dict)
    restarts: list[int] = field(default_factory=list)


def trace(source: Source, run: str) -> Trace:
    """The curves of a run; what could not be read is noted in `source.notes`."""
    found = traced(read_rows(source.run(run), source.notes))
    found.restarts = source.run(run).restarts()
    return found


def traced(rows: Iterable[Row]) -> Trace:
    found = Trace()
    steps, losses = list[int](), list[float]()
    for row in rows:
        steps.append(row["step"])
        losses.append(number(row["train/loss"]))
        for key, value in row.items():
            if key in KEYS or isinstance(value, list):
                curve = found.curves.get(key)
                if curve is None:
                    curve = found.curves[key] = Curve(LAYERED if isinstance(value, list) else POINTS)
                if not curve.values or len(curve.values[-1]) == (len(value) if isinstance(value, list) else 1):
                    curve.add(row["step"], value)
    found.loss = extremes(steps, losses)
    return found


def extremes(steps: list[int], losses: list[float]) -> list[tuple[int, float]]:
    """At most POINTS of the points: of each stretch the lowest and the highest, and what is not finite."""
    if len(losses) <= POINTS:
        return list(zip(steps, losses, strict=True))
    stretch, kept = math.ceil(2 * len(losses) / POINTS), set[int]()
    for start in range(0, len(losses), stretch):
        part = range(start, min(start + stretch, len(losses)))
        finite = [index for index in part if math.isfinite(losses[index])]
        kept |= {min(finite, key=losses.__getitem__), max(finite, key=losses.__getitem__)} if finite else {part[0]}
    return [(steps[index], losses[index]) for index in sorted(kept | {0, len(losses) - 1})]
