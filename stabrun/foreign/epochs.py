"""Steps that start again in each epoch, counted on from the begin of the run."""

import itertools
import math
from collections import Counter
from typing import Any

from stabrun.foreign.cells import count, filled

NOTE = "steps start again in each epoch: they are counted on"
MOST = 0.8  # of the epochs begin at the same step
Rows = list[dict[str, Any]]


def length(rows: Rows, clock: str, epoch: str, loss: str) -> tuple[float, float] | None:
    """The first epoch and the steps of an epoch, if the steps of these rows start again in each one."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if filled(row.get(loss)) and filled(row.get(clock)) and filled(row.get(epoch)):
            step, number = count(row[clock]), count(row[epoch])
            if step is not None and number is not None:
                found.setdefault(number, []).append(step)
    long = {number: steps for number, steps in found.items() if number.is_integer() and len(steps) > 1}
    if len(long) < 2 or 2 * sum(map(len, long.values())) < sum(map(len, found.values())):
        return None
    first, last = min(long), max(long)
    begin = Counter(map(min, long.values())).most_common(1)[0][0]  # not that of the first epoch: it may be damaged
    strides = Counter(b - a for steps in long.values() for a, b in itertools.pairwise(sorted(steps)) if b > a)
    stride = max(strides, key=lambda each: (strides[each], each), default=1.0)
    restarted = [number for number in long if number > first and min(long[number]) <= begin]
    if len(restarted) < MOST * (len(long) - 1):
        return None
    each = {number: max(steps) - begin + stride for number, steps in long.items()}
    if len(each) == 2:  # either may lack its last row
        return first, max(each.values())
    return first, Counter(each[number] for number in each if number != last).most_common(1)[0][0]


class Counted:
    """Counts steps on at each begin of an epoch, where the length of an epoch is not known from the first rows."""

    def __init__(self) -> None:
        self.base, self.stride = 0.0, 1.0
        self.first: float | None = None
        self.last, self.epoch = 0.0, math.nan
        self.restarted = False

    def count(self, step: float, epoch: float) -> float:
        """The step of a training row counted from the begin of the run."""
        if self.first is None:
            self.first = step
        elif step <= self.first and epoch > self.epoch:
            self.base += self.last + self.stride - step
            self.restarted = True
        elif step <= self.first and epoch < self.epoch:  # another run
            self.base, self.first = 0.0, step
        elif step > self.last:
            self.stride = step - self.last
        self.last = step
        if not math.isnan(epoch):
            self.epoch = epoch
        return self.base + step
