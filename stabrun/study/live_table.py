"""A study as text: its table, counts and running cells; and live on a terminal."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from stabrun.record.schema import Summary
from stabrun.study.ledger import DONE, FAILED, LEASE, PLANNED, RUNNING
from stabrun.study.plan import GRID, Cell, Plan
from stabrun.study.snapshot import Attempt, Snapshot, SnapshotReader, seconds_left
from stabrun.text import GAP, aligned, duration_text, rate_text, shown

MARKS = {"converged": "c", "recovered": "r", "diverged": "D", "undecided": "?", RUNNING: ">", PLANNED: ".", FAILED: "!"}
COLORS = {"c": "green", "r": "yellow", "D": "red", "?": "magenta", ">": "cyan", "!": "bold red", ".": "dim", "-": "dim"}
LEGEND = ", ".join(f"{mark} {state}" for state, mark in MARKS.items()) + "; one mark per seed"
NO_SUMMARY = (
    "its summary.json is missing or damaged. The same `stabrun sweep` command goes on with it from its last checkpoint."
)
BAR = 8  # characters of a progress bar
TICKS = (1, 3, 2, 5)  # of each decade, the most useful ones first


class LiveTable:
    """Shows a study while it is trained: a live view on a terminal, otherwise only the lines passed to `print_line`."""

    def __init__(self, reader: SnapshotReader) -> None:
        self.reader, self.console = reader, Console(markup=False, emoji=False, highlight=False)
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None
        if self.live:
            self.live.start()

    def update(self) -> Snapshot:
        """Read the study, and show it on a terminal."""
        snapshot = self.reader.read(attempts=self.live is not None)
        if self.live:
            self.live.update(rendered(snapshot, self.console.width, self.console.height), refresh=True)
        return snapshot

    def print_line(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, soft_wrap=True)

    def close(self) -> None:
        """Remove the live view from the terminal."""
        if self.live:
            self.live.stop()


def rendered(snapshot: Snapshot, width: int, height: int) -> Group:
    """Counts, table, legend, and as many running cells as fit."""
    lines = [Text(counts_text(snapshot), style="bold"), *colored_table(snapshot, width), Text(LEGEND, style="dim")]
    running = [Text(line, no_wrap=True, overflow="ellipsis") for line in running_lines(snapshot)]
    room = max(1, height - len(lines) - 2)  # the legend may wrap, and the cursor is on the last line
    if len(running) > room:
        running[room - 1 :] = [Text(f"and {len(running) - room + 1} more running", style="dim")]
    return Group(*lines, *running)


def colored_table(snapshot: Snapshot, width: int) -> Iterator[Text]:
    """The lines of the table, each kind of mark in its color."""
    margin = margin_of(snapshot.plan)
    head, *rows = table(snapshot, width)
    yield Text(head, style="bold", no_wrap=True, overflow="ellipsis")
    for row in rows:
        line = Text(row[:margin], no_wrap=True, overflow="ellipsis")
        for mark in row[margin:]:
            line.append(mark, COLORS.get(mark))
        yield line


def counts_text(snapshot: Snapshot) -> str:
    """`12 of 50 done, 2 running, 1 failed, ETA 4 min`."""
    counts = snapshot.counts
    parts = [f"{counts[DONE]} of {len(snapshot.entries)} done"]
    parts += [f"{counts[status]} {status}" for status in (RUNNING, FAILED) if counts[status]]
    left = seconds_left(snapshot)
    return ", ".join(parts + ([] if left is None else [f"ETA {duration_text(left)}"]))


def running_lines(snapshot: Snapshot) -> Iterator[str]:
    """A line for each running cell: name, progress, speed, owner, last heartbeat."""
    return aligned([attempt_columns(attempt) for attempt in snapshot.running])


def attempt_columns(attempt: Attempt) -> list[str]:
    share, speed = min(1.0, attempt.step / attempt.steps), attempt.steps_per_second
    speed_text = f"{speed:.3g} steps/s" if speed else "starting" if not attempt.step else ""
    again = f", attempt {attempt.attempt}" if attempt.attempt > 1 else ""
    return [
        attempt.cell.name,
        bar(share, BAR),
        percent(share),
        "" if attempt.owner_gone else speed_text,
        f"{attempt.host.partition('.')[0]}:{attempt.pid or '?'}{heartbeat_text(attempt)}{again}",
    ]


def bar(share: float, width: int) -> str:
    full = round(width * share)
    return "━" * full + "─" * (width - full)


def percent(share: float) -> str:
    return f"{math.floor(100 * share)}%".rjust(4)


def heartbeat_text(attempt: Attempt) -> str:
    if attempt.owner_gone:
        return " has ended"
    if attempt.seconds_since_beat is None:
        return ", no heartbeat yet"
    age = duration_text(round(attempt.seconds_since_beat))
    return f", no heartbeat for {age}" if attempt.seconds_since_beat > LEASE else f", heartbeat {age} ago"


def failure_messages(snapshot: Snapshot) -> Iterator[str]:
    """A sentence for each cell that was given up, or whose summary cannot be read."""
    for cell in snapshot.cells(FAILED):
        attempts, reason = len(snapshot.entries[cell.id].claim), snapshot.failed[cell.id].partition("\n")[0]
        yield f"{cell.name} ({cell.id}) was given up after {attempts} attempt{'s' * (attempts != 1)}: {reason}"
    for cell in snapshot.cells(DONE):
        if cell.id not in snapshot.summaries:
            yield f"{cell.name} ({cell.id}) does not count: {NO_SUMMARY}"


def result_line(cell: Cell, summary: Summary, number: int, cells: int) -> str:
    """`[3/20] qk_norm lr=0.1 s0: diverged (runaway), loss 2.955`."""
    loss = summary["final_loss"]
    loss_text = f"{loss:.3f}" if isinstance(loss, float) else loss
    return f"[{number}/{cells}] {cell.name}: {summary['verdict']} ({summary['reason']}), loss {loss_text}"


def table(snapshot: Snapshot, width: int) -> list[str]:
    """Arms by learning rates, one mark per seed: in columns if a grid fits into `width`, else along an axis.

    The first line has the rates. The first `margin_of` characters of each line are the arm's name.
    """
    if snapshot.plan.strategy == GRID:
        lines = list(matrix(snapshot))
        if all(len(line) <= width for line in lines):
            return lines
    return list(along_axis(snapshot, width))


def margin_of(plan: Plan) -> int:
    return max(map(len, ["lr", *map(shown, plan.arms)])) + GAP


def marks_by_arm(snapshot: Snapshot) -> dict[str, dict[float, str]]:
    """Arm → learning rate → a mark for each seed, in the order of the plan."""
    marks: dict[str, dict[float, str]] = {arm: defaultdict(str) for arm in snapshot.plan.arms}
    for cell in snapshot.plan.cells.values():
        state = snapshot.summaries.get(cell.id, {}).get("verdict", snapshot.entries[cell.id].status)
        marks[cell.arm][cell.lr] += MARKS.get(state, "?")
    return marks


def matrix(snapshot: Snapshot) -> Iterator[str]:
    """One column per learning rate."""
    rates = sorted({cell.lr for cell in snapshot.plan.cells.values()})
    rows = [[arm, *(marks.get(rate, "-") for rate in rates)] for arm, marks in marks_by_arm(snapshot).items()]
    return aligned([["lr", *map(rate_text, rates)], *rows])


def along_axis(snapshot: Snapshot, width: int) -> Iterator[str]:
    """The learning rates along one logarithmic axis for all arms; marks in the same column are stacked."""
    margin = margin_of(snapshot.plan)
    rates = sorted({*snapshot.plan.lr_range, *(cell.lr for cell in snapshot.plan.cells.values())}) or [1.0]
    last = max(1, width - margin - len(rate_text(rates[-1])) - 1)  # where the label of the last rate begins
    octaves = math.log2(rates[-1] / rates[0]) or 1.0

    def column(rate: float) -> int:
        return round(last * math.log2(rate / rates[0]) / octaves)

    yield f"{'lr':<{margin}}{_ticks(rates[0], rates[-1], last, column)}"
    for arm, marks in marks_by_arm(snapshot).items():
        stacks: dict[int, str] = defaultdict(str)
        for rate in sorted(marks):
            stacks[column(rate)] += marks[rate]
        for level in range(max(map(len, stacks.values()), default=1)):
            line = [stacks[at][level : level + 1] or " " if at in stacks else " " for at in range(last + 1)]
            yield f"{shown(arm) if level == 0 else '':<{margin}}{''.join(line)}".rstrip()


def _ticks(low: float, high: float, last: int, column: Callable[[float], int]) -> str:
    """`|1e-3   |1e-2   |0.1`: both ends, and the ticks between them that fit. The bar marks the rate."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    between = [digit * 10.0**decade for digit in TICKS for decade in decades if low < digit * 10.0**decade < high]
    line = [" "] * (last + 1 + len(rate_text(high)))
    for rate in (low, high, *between):
        label, at = f"|{rate_text(rate)}", column(rate)
        room = line[max(0, at - 1) : at + len(label) + 1]
        if not "".join(room).strip():
            line[at : at + len(label)] = label
    return "".join(line).rstrip()
