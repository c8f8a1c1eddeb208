"""Which statistic left its trend first: a chart of the logarithm of each statistic, and the site that they point to.

The signals are declared in the table of metrics (`stabrun.record.metrics`).
"""

import bisect
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stabrun.record.jsonl import number
from stabrun.record.metrics import ALARM_FACTOR, Signal, find, items, place, signals, site_name
from stabrun.verdict.chart import Floats, noise, trailing_means
from stabrun.verdict.feeds import feeds, stacks_of

SIGMAS = 8.0  # deviation from the statistic's own trend that raises an alarm, in standard deviations of its noise
LONGEST, SHORTEST, SHARE = 20, 6, 8  # observations in the trend: an eighth of all, within these bounds
GROWN = 10.0  # growth since the first observation that names a site when none left its trend
KEPT = 4096  # observations kept of a key; longer records are thinned to every second, fourth, … observation


class History:
    """The observations of one key: their rows in the record, and their values; at most KEPT of them."""

    def __init__(self, key: str, signal: Signal) -> None:
        self.key, self.signal = key, signal
        self.places: list[str | None] = []  # of each layer
        self.rows, self.values = array("q"), array("d")  # of each observation the values of its layers
        self.uncalled: set[int] = set()  # layers without a value in any observation
        self.last: list[float] = []
        self.seen, self.stride = 0, 1

    def add(self, row: int, value: Any) -> None:
        """Add an observation. A layer that was not called has the value of its observation before.

        Raises TypeError, ValueError or OverflowError if a value is not a number.
        """
        layers = value if isinstance(value, list) else [value]
        if not self.places:
            self.places = [place(self.key, layer) for layer, _ in items(self.key, value)]
            self.uncalled = {layer for layer, item in enumerate(layers) if item is None}
            self.last = [math.nan] * len(layers)
        elif len(layers) != len(self.places):
            return  # not a record of one model
        self.last = [old if item is None else float(item) for old, item in zip(self.last, layers, strict=True)]
        for layer in [layer for layer in self.uncalled if layers[layer] is not None]:
            self.uncalled.remove(layer)  # its first value also takes the place of those before
            for at in range(layer, len(self.values), len(layers)):
                self.values[at] = self.last[layer]
        if self.seen % self.stride == 0:
            self.rows.append(row)
            self.values.extend(self.last)
            if len(self.rows) > KEPT:
                kept = array("d", self.table()[::2].ravel())
                self.rows, self.values, self.stride = self.rows[::2], kept, 2 * self.stride
        self.seen += 1

    def table(self) -> Floats:
        """The values, `[observations, layers]`."""
        return np.array(self.values).reshape(len(self.rows), -1)

    def logs(self) -> Floats:
        """Natural logarithms `[observations, layers]`; values that are not finite count as 1e30."""
        return np.log(np.clip(np.nan_to_num(np.abs(self.table()), nan=np.inf), 1e-30, 1e30))

    def growth(self, row: int) -> Floats:
        """Growth of each layer, `[layers]`, from the first observation to the last one up to `row`, as a logarithm."""
        logs, last = self.logs(), max(0, bisect.bisect_right(self.rows, row) - 1)
        return logs[last] - logs[0]

    def deviation(self) -> "Deviation":
        """Each observation against the extrapolated linear trend of those before; two in a row make an alarm."""
        logs = -self.logs() if self.signal.falling else self.logs()
        window = min(LONGEST, max(SHORTEST, len(logs) // SHARE))
        size, alarm = np.zeros_like(logs), np.zeros_like(logs, dtype=bool)
        if len(logs) > window + 1:
            half = trailing_means(logs, window // 2)
            early, late = half[: len(logs) - window], half[window - window // 2 :][: len(logs) - window]
            size[window:] = logs[window:] - late - 0.5 * (late - early)
            spread = noise(logs, 2 * window)[window - 1 : -1]
            wide = size[window:] > np.maximum(SIGMAS * spread, math.log(self.signal.factor))
            alarm[window:-1] = wide[:-1] & wide[1:]
        return Deviation(self.rows, self.places, size, alarm)


@dataclass(frozen=True)
class Deviation:
    """How far each layer of a key deviates from its own trend, and where that raises an alarm."""

    rows: Sequence[int]
    places: list[str | None]  # of each layer
    size: Floats  # [observations, layers], in natural logarithms
    alarm: np.ndarray  # [observations, layers], bool

    def largest(self, low: int, bad: int, alarmed: bool) -> Floats:
        """The largest deviation of each layer, `[layers]`, from LONGEST rows before `low` to `bad`.

        With `alarmed`, 0 for a layer without an alarm there.
        """
        rows = np.asarray(self.rows)
        near = (rows >= low - LONGEST) & (rows <= bad)
        if not near.any():
            return np.zeros(self.size.shape[1])
        largest = self.size[near].max(axis=0)
        return np.where(self.alarm[near].any(axis=0), largest, 0.0) if alarmed else largest


class Signals:
    """Collects the statistics of rows that feed a signal."""

    def __init__(self) -> None:
        self.histories: dict[str, History | None] = {}  # None for a key that feeds no signal or was dropped

    def add(self, row: int, values: dict[str, Any]) -> None:
        """Add the statistics of `row`, counted from 0. A key with a value that is not a number is dropped."""
        for key, value in values.items():
            if key not in self.histories:
                metric = find(key)
                self.histories[key] = History(key, metric.signal) if metric and metric.signal else None
            try:
                if history := self.histories[key]:
                    history.add(row, value)
            except (TypeError, ValueError, OverflowError):
                self.histories[key] = None

    def deviations(self) -> dict[str, Deviation]:
        """The deviations of each key."""
        return {key: history.deviation() for key, history in self.histories.items() if history}

    def first_site(self, deviations: dict[str, Deviation], low: int, bad: int) -> str | None:
        """The site at fault in a run whose loss rose too far at row `bad`, after its lowest level at row `low`.

        This is the site whose output deviated most from its own trend between the two (from LONGEST rows before). If
        none deviated, as when the learning rate is too high from the start and all outputs grow together, it is the
        site whose output grew most since the first observation, by a factor of at least GROWN. In either case what the
        output feeds, as far as that is known, must share the growth: a norm removes any other. None if there is no such
        site, or no outputs are recorded.
        """
        known = feeds([key for key, history in self.histories.items() if history])

        def most(measure: Callable[[str, bool], Floats | None], least: float) -> str | None:
            largest, site_at_fault = least, None
            for site, fed in known.items():
                output = f"norm/out/{site}"
                own, history = measure(output, True), self.histories[output]
                if own is None or history is None:
                    continue
                onward = [size for key in fed if (size := measure(key, False)) is not None and len(size) == len(own)]
                harm = np.minimum(own, np.max(onward, axis=0)) if onward else own
                if harm.max() > largest:
                    largest, site_at_fault = float(harm.max()), history.places[int(harm.argmax())]
            return site_at_fault

        def deviated(key: str, alarmed: bool) -> Floats | None:
            return deviations[key].largest(low, bad, alarmed) if key in deviations else None

        def grew(key: str, _: bool) -> Floats | None:
            history = self.histories.get(key)
            return history.growth(bad) if history else None

        return most(deviated, math.log(ALARM_FACTOR)) or most(grew, math.log(GROWN))


def alarms(deviations: dict[str, Deviation], since: int) -> dict[str, tuple[int, str | None]]:
    """The first alarm of each signal at row `since` or later: name → (row, place)."""
    first = dict[str, tuple[int, str | None]]()
    for name, metric in signals().items():
        for key, deviation in deviations.items():
            if find(key) is not metric:
                continue
            late = np.asarray(deviation.rows) >= since
            for layer in range(deviation.alarm.shape[1]):
                at = np.flatnonzero(deviation.alarm[:, layer] & late)
                if len(at) and (name not in first or deviation.rows[at[0]] < first[name][0]):
                    first[name] = deviation.rows[at[0]], deviation.places[layer]
    return first


def first_nonfinite(row: dict[str, Any], prefix: str) -> str | None:
    """The first site, in the order of the forward pass, with a value that is not finite.

    Within a layer this is the order of the row's keys. Sites outside the layers come before all of these if their keys
    do, and otherwise after them.
    """
    sites = [key.removeprefix(prefix) for key in row if key.startswith(prefix)]
    stacks = stacks_of(sites, row)
    order = list(dict.fromkeys(stacks.values()))
    bad, layered = list[tuple[int, int, int, str]](), False
    for index, site in enumerate(sites):
        for layer, item in items(prefix + site, row[prefix + site]):
            layered |= layer is not None
            if item is not None and not np.isfinite(number(item)):
                part = order.index(stacks[site]) if layer is not None else len(order) if layered else -1
                bad.append((part, layer or 0, index, site_name(site, layer)))
    return min(bad, default=(None,))[-1]
