"""Which statistic broke away first: charts on the logarithm of every site's norms, and the site that they name."""

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from stabrun.record.metrics import by_site, site_name
from stabrun.verdict.chart import Floats, noise, trailing_means

ORDER = ("qkv", "proj", "fc1", "fc2")  # of the forward pass within a block
SIGMAS = 8.0  # deviation from a statistic's own trend that raises an alarm, in its own noise
FACTOR = 1.5  # and at least this factor: norms wander smoothly, so that their noise is small
LONGEST, SHORTEST, SHARE = 20, 6, 8  # observations in the trend before: an eighth of all, within these bounds
GROWN = 10.0  # growth since the first observation that can name a site where none broke from its trend
KEPT = 4096  # observations kept of a key; a longer record is thinned to every second, fourth, … one

SIGNALS = {
    "output_norm": "norm/out/",
    "input_norm": "norm/in/",
    "weight_norm": "norm/weight/",
    "gradient_norm": "norm/grad/",
    "global_gradient_norm": "grad/norm",
    "update_norm": "norm/update/",
    "input_gradient_norm": "norm/in_grad/",
    "adam_m": "norm/adam_m/",
    "adam_v": "norm/adam_v/",
    "surprise": "adam/surprise/",
    "max_logit": "attn/max_logit",
    "entropy": "attn/entropy",
    "residual_norm": "residual/norm",
}
"""Signal → the key, or the beginning of the keys of its sites."""

FACTORS = {"norm/adam_m/": 3.0, "norm/adam_v/": 10.0}  # at 1.5 they alarm in healthy runs too often
FALLING = ("attn/entropy",)  # keys whose collapse is the alarm, not their growth
CARRIES = {
    "qkv": ("norm/in/proj", "attn/max_logit"),
    "proj": ("residual/norm",),
    "fc1": ("norm/in/fc2",),
    "fc2": ("residual/norm",),
    "head": ("norm/out/head",),
}
"""Site → the keys that its output goes into. A growth that none of these shares does no harm: a norm stops it."""


class Series:
    """The observations of one key: rows of the record and values `[observations, layers]`, bounded in number."""

    def __init__(self) -> None:
        self.rows, self.values, self.seen, self.stride = list[int](), list[list[float]](), 0, 1

    def add(self, row: int, value: Any) -> None:
        layers = value if isinstance(value, list) else [value]
        if self.values and len(layers) != len(self.values[0]):
            return  # no record of one model's
        if self.seen % self.stride == 0:
            self.rows.append(row)
            self.values.append(layers)
            if len(self.rows) > KEPT:
                self.rows, self.values, self.stride = self.rows[::2], self.values[::2], 2 * self.stride
        self.seen += 1

    def logs(self) -> Floats:
        """Natural logarithms `[observations, layers]`; what is not finite counts as 1e30."""
        table = np.abs(np.array(self.values, dtype=float))
        return np.log(np.clip(np.nan_to_num(table, nan=np.inf), 1e-30, 1e30))


@dataclass(frozen=True)
class Break:
    """How far each layer of a key deviates from its own trend, and where that raises an alarm."""

    rows: list[int]
    deviation: Floats  # [observations, layers], in natural logarithms
    alarm: np.ndarray  # the same shape, bool


def chart(key: str, series: Series) -> Break:
    """Each observation against the straight trend of those before it, extrapolated; two in a row make an alarm."""
    logs = -series.logs() if key in FALLING else series.logs()
    least = math.log(next((factor for head, factor in FACTORS.items() if matches(key, head)), FACTOR))
    window = min(LONGEST, max(SHORTEST, len(logs) // SHARE))
    deviation, alarm = np.zeros_like(logs), np.zeros_like(logs, dtype=bool)
    if len(logs) > window + 1:
        half = trailing_means(logs, window // 2)
        early, late = half[: len(logs) - window], half[window - window // 2 :][: len(logs) - window]
        deviation[window:] = logs[window:] - late - 0.5 * (late - early)
        wide = deviation[window:] > np.maximum(SIGMAS * noise(logs, 2 * window)[window - 1 : -1], least)
        alarm[window:-1] = wide[:-1] & wide[1:]
    return Break(series.rows, deviation, alarm)


class Signals:
    """Takes the statistics of rows by `add`; tells the alarms, and the site that broke first."""

    def __init__(self) -> None:
        self.series: dict[str, Series] = {}
        self.wanted: dict[str, bool] = {}

    def add(self, row: int, values: dict[str, Any]) -> None:
        """Keep the statistics of `row`, counted from 0."""
        for key, value in values.items():
            if key not in self.wanted:
                self.wanted[key] = any(matches(key, head) for head in SIGNALS.values())
            if self.wanted[key]:
                if key not in self.series:
                    self.series[key] = Series()
                self.series[key].add(row, value)

    def breaks(self) -> dict[str, Break]:
        """The chart of each key; one that holds no numbers is dropped."""
        found = dict[str, Break]()
        for key, series in list(self.series.items()):
            try:
                found[key] = chart(key, series)
            except (TypeError, ValueError):
                del self.series[key]
        return found


def alarms(breaks: dict[str, Break], since: int) -> dict[str, tuple[int, str | None]]:
    """For each signal that has one, its first alarm at row `since` or later: (row, where)."""
    found = dict[str, tuple[int, str | None]]()
    for name, head in SIGNALS.items():
        for key in (key for key in breaks if matches(key, head)):
            chosen = breaks[key]
            told = np.asarray(chosen.rows) >= since
            for layer in range(chosen.alarm.shape[1]):
                at = np.flatnonzero(chosen.alarm[:, layer] & told)
                if len(at) and (name not in found or chosen.rows[at[0]] < found[name][0]):
                    found[name] = chosen.rows[at[0]], place(key, layer)
    return found


def first_to_break(series: dict[str, Series], breaks: dict[str, Break], low: int, bad: int) -> str | None:
    """The site that went first, of a run whose loss rose too far at row `bad`, after its lowest at row `low`.

    It is the one whose output broke furthest from its own trend between the two (less a window). Where none did, as
    when the learning rate is too high from the start and all grow together, it is the one whose output has grown most
    since the first observation, by a factor of GROWN at least. Either way what the output feeds must share the growth.
    None where nothing did, or no outputs are recorded.
    """

    def furthest(of: Callable[[str, bool], Floats | None], least: float) -> str | None:
        best, named = least, None
        for site, fed in CARRIES.items():
            own = of(f"norm/out/{site}", True)
            if own is None:
                continue
            onward = [there for key in fed if (there := of(key, False)) is not None and len(there) == len(own)]
            harm = np.minimum(own, np.max(onward, axis=0)) if onward else own
            if harm.max() > best:
                best, named = float(harm.max()), site_name(site, int(harm.argmax()))
        return named

    def broke(key: str, alarmed: bool) -> Floats | None:
        return reach(breaks[key], low, bad, alarmed) if key in breaks else None

    def grew(key: str, _: bool) -> Floats | None:
        return growth(series[key], bad) if key in series else None

    return furthest(broke, math.log(FACTOR)) or furthest(grew, math.log(GROWN))


def growth(series: Series, bad: int) -> Floats:
    """Logarithm of the factor by which each layer has grown from the first observation to the last up to `bad`."""
    logs, last = series.logs(), max(0, bisect.bisect_right(series.rows, bad) - 1)
    return logs[last] - logs[0]


def reach(chosen: Break, low: int, bad: int, alarmed: bool) -> Floats:
    """The largest deviation of each layer between `low` less a window and `bad`, `[layers]`; 0 without an alarm."""
    rows = np.asarray(chosen.rows)
    near = (rows >= low - LONGEST) & (rows <= bad)
    if not near.any():
        return np.zeros(chosen.deviation.shape[1])
    furthest = chosen.deviation[near].max(axis=0)
    return np.where(chosen.alarm[near].any(axis=0), furthest, 0.0) if alarmed else furthest


def matches(key: str, head: str) -> bool:
    return key == head or (head.endswith("/") and key.startswith(head))


def place(key: str, layer: int) -> str | None:
    """Where a value stands: `layer_03/fc2`, `layer_03`, `head`, or nowhere in particular."""
    if key == "grad/norm":
        return None
    site = key.rpartition("/")[2]
    return site_name(site, layer) if site in (*ORDER, "head") else f"layer_{layer:02d}"


def first_nonfinite(row: dict[str, Any], prefix: str) -> str | None:
    """The first site, in the order of the forward pass, with a value that is not finite."""
    bad = [name for name, value in by_site(row, prefix).items() if not np.isfinite(value)]

    def order(name: str) -> tuple[bool, str, int]:
        layer, _, site = name.partition("/")
        return name == "head", layer, ORDER.index(site) if site in ORDER else len(ORDER)

    return min(bad, key=order, default=None)
