"""What a study looks like: its table, its counts and who is at work, as text, and live on a terminal."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from stabrun.record.schema import Summary
from stabrun.study.ledger import DONE, FAILED, LEASE, PLANNED, RUNNING, Entry
from stabrun.study.plan import GRID, Cell, Plan
from stabrun.study.snapshot import Attempt, Snapshot, SnapshotReader, seconds_left
from stabrun.text import GAP, aligned, duration_text, rate_text, run_name

MARKS = {"converged": "c", "recovered": "r", "diverged": "D", "undecided": "?", RUNNING: ">", PLANNED: ".", FAILED: "!"}
LEGEND = "c converged, r recovered, D diverged, ? undecided, > running, . planned, ! failed; a mark a seed"
COLOURS = {
    "c": "green",
    "r": "yellow",
    "D": "red",
    "?": "magenta",
    ">": "cyan",
    "!": "bold red",
    ".": "dim",
    "-": "dim",
}
BAR = 8  # characters of a progress bar
TICKS = (1, 3, 2, 5)  # of each decade, the more telling ones first


class LiveTable:
    """Shows a study while it goes: on a terminal a live view, elsewhere only the lines that it is told to say."""

    def __init__(self, directory: Path) -> None:
        self.looker, self.rich = SnapshotReader(directory), Console(markup=False, emoji=False, highlight=False)
        self.live: Live | None = None
        if self.rich.is_terminal:
            self.live = Live(console=self.rich, auto_refresh=False, transient=True)
            self.live.start()

    def show(self, plan: Plan, entries: dict[str, Entry]) -> None:
        """The study as it is now."""
        if self.live:
            look = self.looker.look(plan, entries)
            self.live.update(drawn(look, self.rich.width, self.rich.height), refresh=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.live:
            self.rich.print(text, soft_wrap=True)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """The terminal as it was, but for the lines that stay."""
        if self.live:
            self.live.stop()
            self.live = None


def drawn(look: Snapshot, width: int, height: int) -> Group:
    """Counts, table, legend, and as many of those who are at work as there is room for."""
    lines = [Text(counts(look), style="bold"), *coloured(look, width), Text(LEGEND, style="dim")]
    work = [Text(line, no_wrap=True, overflow="ellipsis") for line in at_work(look)]
    room = max(1, height - len(lines) - 2)  # the legend may take two lines, and the cursor stands on the last
    if len(work) > room:
        work[room - 1 :] = [Text(f"and {len(work) - room + 1} more at work", style="dim")]
    return Group(*lines, *work)


def coloured(look: Snapshot, width: int) -> Iterator[Text]:
    """The table's lines, each kind of mark in its colour."""
    margin = margin_of(look.plan)
    head, *rows = table(look, width)
    yield Text(head, style="bold", no_wrap=True, overflow="ellipsis")
    for row in rows:
        line = Text(row[:margin], no_wrap=True, overflow="ellipsis")
        for mark in row[margin:]:
            line.append(mark, COLOURS.get(mark))
        yield line


def counts(look: Snapshot) -> str:
    """`12 of 50 done, 2 running, 1 failed, ETA 4 min`."""
    parts = [f"{look.count(DONE)} of {len(look.entries)} done"]
    parts += [f"{look.count(status)} {status}" for status in (RUNNING, FAILED) if look.count(status)]
    left = seconds_left(look)
    return ", ".join(parts + ([] if left is None else [f"ETA {duration_text(left)}"]))


def at_work(look: Snapshot) -> Iterator[str]:
    """A line for each running cell: name, progress, speed, owner, when it was last heard of."""
    return aligned([worker_facts(attempt) for attempt in look.running])


def worker_facts(attempt: Attempt) -> list[str]:
    share = min(1.0, attempt.step / attempt.steps)
    full = round(BAR * share)
    speed = f"{attempt.rate:.3g} steps/s" if attempt.rate else "starting" if not attempt.step else ""
    again = f", attempt {attempt.number}" if attempt.number > 1 else ""
    return [
        run_name(attempt.cell.arm, attempt.cell.lr, attempt.cell.seed),
        "━" * full + "─" * (BAR - full),
        f"{math.floor(100 * share)}%".rjust(4),
        "" if attempt.gone else speed,
        f"{attempt.host.partition('.')[0]}:{attempt.pid or '?'}{heard_of(attempt)}{again}",
    ]


def heard_of(attempt: Attempt) -> str:
    if attempt.gone:
        return " is gone"
    if attempt.beat is None:
        return ", not heard of"
    age = duration_text(round(attempt.beat))
    return f", no beat for {age}" if attempt.beat > LEASE else f", beat {age} ago"


def given_up(look: Snapshot) -> Iterator[str]:
    """A sentence for each failed cell."""
    for cell, reason in look.failed.items():
        place, times = look.plan.cells[cell], len(look.entries[cell].claim)
        yield (
            f"{run_name(place.arm, place.lr, place.seed)} ({cell}) was given up "
            f"after {times} attempt{'s' * (times != 1)}: {(reason.splitlines() or [''])[0]}"
        )


def said(cell: Cell, facts: Summary, number: int, cells: int) -> str:
    """`[3/20] qk_norm lr=0.1 s0: diverged (runaway), loss 2.955`."""
    loss = facts["final_loss"]
    end = loss if isinstance(loss, str) or loss is None else f"{loss:.3f}"
    name = run_name(cell.arm, cell.lr, cell.seed)
    return f"[{number}/{cells}] {name}: {facts['verdict']} ({facts['reason']}), loss {end}"


def table(look: Snapshot, width: int) -> list[str]:
    """Arm × learning rate, a mark a seed: a grid in columns where `width` allows, else each arm along an axis.

    The first `margin_of` characters of a line are for the arm's name; the first line has the rates.
    """
    if look.plan.strategy == GRID:
        lines = list(matrix(look))
        if all(len(line) <= width for line in lines):
            return lines
    return list(along_axis(look, width))


def margin_of(plan: Plan) -> int:
    return max(map(len, ["lr", *plan.arms])) + GAP


def marked(look: Snapshot) -> dict[str, dict[float, str]]:
    """Arm → learning rate → a mark for each of its seeds, in the order of the plan."""
    marks: dict[str, dict[float, str]] = {arm: defaultdict(str) for arm in look.plan.arms}
    for cell in look.plan.cells.values():
        fate = look.summaries.get(cell.id, {}).get("verdict", look.entries[cell.id].status)
        marks[cell.arm][cell.lr] += MARKS.get(fate, "?")
    return marks


def matrix(look: Snapshot) -> Iterator[str]:
    """A column a learning rate."""
    rates = sorted({cell.lr for cell in look.plan.cells.values()})
    rows = [["lr", *map(rate_text, rates)]]
    rows += [[arm, *(own.get(rate, "-") for rate in rates)] for arm, own in marked(look).items()]
    return aligned(rows)


def along_axis(look: Snapshot, width: int) -> Iterator[str]:
    """The learning rates along a logarithmic axis, the same for each arm; marks that fall together are stacked."""
    margin = margin_of(look.plan)
    rates = sorted({*look.plan.lr_range, *(cell.lr for cell in look.plan.cells.values())}) or [1.0]
    last = max(1, width - margin - len(rate_text(rates[-1])) - 1)  # the last rate's own label begins there
    octaves = math.log2(rates[-1] / rates[0]) or 1.0

    def column(rate: float) -> int:
        return round(last * math.log2(rate / rates[0]) / octaves)

    yield f"{'lr':<{margin}}{_ticks(rates[0], rates[-1], last, column)}"
    for arm, own in marked(look).items():
        stacks: dict[int, str] = defaultdict(str)
        for rate in sorted(own):
            stacks[column(rate)] += own[rate]
        for level in range(max(map(len, stacks.values()), default=1)):
            line = [stacks[at][level : level + 1] or " " if at in stacks else " " for at in range(last + 1)]
            yield f"{arm if level == 0 else '':<{margin}}{''.join(line)}".rstrip()


def _ticks(low: float, high: float, last: int, column: Callable[[float], int]) -> str:
    """`|1e-3   |1e-2   |0.1`: both ends, and what has room between them; the bar stands at the rate."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    between = [digit * 10.0**decade for digit in TICKS for decade in decades if low < digit * 10.0**decade < high]
    line = [" "] * (last + 1 + len(rate_text(high)))
    for rate in (low, high, *between):
        label, at = f"|{rate_text(rate)}", column(rate)
        room = line[max(0, at - 1) : at + len(label) + 1]
        if not "".join(room).strip():
            line[at : at + len(label)] = label
    return "".join(line).rstrip()
