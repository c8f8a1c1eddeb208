"""Judge the judge: loss curves drawn at random, judged by eye without the verdict, and then compared to it.

    python scripts/by_eye.py SHEETS    # numbered pictures in SHEETS, and docs/results/by_eye.csv to fill in

It takes 60 finished runs of all committed records: half of them within half an octave of the lr50 of their arm, the
others further away. A picture shows the training loss by step and nothing else. The column `by_eye` of the file takes
the verdict, `remark` the reason; scripts/results.py makes the tables of docs/results/judge.md of it.
"""

import argparse
import csv
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from stabrun.record.jsonl import number
from stabrun.record.schema import Result
from stabrun.report.charts import Axis, Chart, Marks, Panel
from stabrun.report.study_data import StudyData, read_rows
from stabrun.report.tables import Column, Table, plain, rate
from stabrun.study.facts import frontier_of
from stabrun.verdict.judge import CONVERGED, DIVERGED, RECOVERED, STANDARD, UNDECIDED

RUNS, SEED = 60, 2026
NEAR = 0.5  # octaves from lr50
COLUMNS, ROWS = 2, 3  # curves of a sheet
VERDICTS = CONVERGED, RECOVERED, DIVERGED, UNDECIDED
FIELDS = "number", "record", "run_id", "by_eye", "remark"


@dataclass(frozen=True)
class Judged:
    """A run judged by eye: its entry in the file, its row in the results of its record, whether it is near the edge."""

    entry: dict[str, str]
    row: Result
    near: bool

    @property
    def agrees(self) -> bool:
        return self.entry["by_eye"] == self.row["verdict"]


def distance(study: StudyData, row: Result) -> float | None:
    """Octaves between the learning rate of a run and the lr50 of its arm; None if that is unknown."""
    middle = frontier_of(study.arm_summaries[row["arm"]], STANDARD).get("lr50", {}).get("median")
    return middle and abs(log2(row["lr"] / middle))


def is_near(study: StudyData, row: Result) -> bool:
    octaves = distance(study, row)
    return octaves is not None and octaves <= NEAR


def drawn(studies: dict[str, StudyData], count: int = RUNS) -> list[tuple[str, Result]]:
    """(record, run) of runs in random order, half of them near the edge."""
    pools: dict[bool, list[tuple[str, Result]]] = {True: [], False: []}
    for record, study in studies.items():
        for row in study.rows:
            pools[is_near(study, row)].append((record, row))
    chance = random.Random(SEED)
    found = [one for pool in pools.values() for one in chance.sample(pool, count // 2)]
    chance.shuffle(found)
    return found


def draw(studies: dict[str, StudyData], file: Path, sheets: Path) -> None:
    """Write the pictures, and the file whose verdicts are to be filled in."""
    from matplotlib.figure import Figure

    found = drawn(studies)
    sheets.mkdir(parents=True)
    for start in range(0, len(found), COLUMNS * ROWS):
        figure = Figure(figsize=(14, 12), layout="constrained")
        for place, axes in enumerate(figure.subplots(ROWS, COLUMNS).flat):
            if start + place < len(found):
                record, row = found[start + place]
                axes.plot(*zip(*losses(studies[record], row), strict=True), linewidth=0.8)
                axes.set_title(str(start + place + 1))
        figure.savefig(sheets / f"{start // (COLUMNS * ROWS) + 1}.png", dpi=80)
    with open(file, "x", newline="") as target:  # verdicts that are filled in are not overwritten
        writer = csv.writer(target, lineterminator="\n")
        writer.writerow(FIELDS)
        for place, (record, row) in enumerate(found, 1):
            writer.writerow([place, record, row["run_id"], "", ""])


def losses(study: StudyData, row: Result) -> list[tuple[int, float]]:
    """(step, training loss) of a run."""
    return [(step["step"], number(step["train/loss"])) for step in read_rows(study.run(row["run_id"]), [])]


def judged(studies: dict[str, StudyData], file: Path) -> list[Judged]:
    """The runs of a file that is filled in. Raises ValueError at what is no verdict."""
    rows = {(record, row["run_id"]): row for record, study in studies.items() for row in study.rows}
    with open(file, newline="") as source:
        entries = list(csv.DictReader(source))
    if wrong := [entry["number"] for entry in entries if entry["by_eye"] not in VERDICTS]:
        raise ValueError(f"{file}: by_eye of {', '.join(wrong)} must be one of {', '.join(VERDICTS)}")
    found = ((entry, rows[entry["record"], entry["run_id"]]) for entry in entries)
    return [Judged(entry, row, is_near(studies[entry["record"]], row)) for entry, row in found]


def by_eye_tables(found: list[Judged]) -> Iterator[Table]:
    """Agreement of the verdicts by eye with those of the rule: by verdict, as shares, and each disagreement."""
    pairs = Counter((one.entry["by_eye"], one.row["verdict"]) for one in found)
    columns = [Column("by_eye", "by eye"), *(Column(verdict, f"rule: {verdict}") for verdict in VERDICTS)]
    rows = [[plain(eye), *(plain(pairs[eye, rule]) for rule in VERDICTS)] for eye in VERDICTS]
    yield Table("confusion", "Verdicts by eye and by the rule", columns, rows)

    columns = [Column("runs", "runs"), Column("count", "number"), Column("same", "same verdict")]
    columns.append(Column("same_side", "both diverged, or neither"))
    groups = {
        name: [one for one in found if one.near == near]
        for name, near in (("within half an octave of lr50", True), ("others", False))
    }
    rows = []
    for name, own in groups.items():
        sides = [(one.entry["by_eye"] == DIVERGED) == (one.row["verdict"] == DIVERGED) for one in own]
        rows.append([plain(name), plain(len(own)), plain(share([one.agrees for one in own])), plain(share(sides))])
    yield Table("agreement", "Agreement", columns, rows)

    columns = [Column(key, key.replace("_", " ")) for key in ("number", "record", "variant", "lr", "seed", "by_eye")]
    columns += [Column("rule", "rule"), Column("reason", "reason"), Column("remark", "remark")]
    rows = [
        [*map(plain, (one.entry["number"], one.entry["record"], one.row["arm"])), rate(one.row["lr"]),
         *map(plain, (one.row["seed"], one.entry["by_eye"], one.row["verdict"], one.row["reason"])),
         plain(one.entry["remark"])]
        for one in found if not one.agrees
    ]  # fmt: skip
    yield Table("disagreements", "Disagreements", columns, rows)


def disagreements(studies: dict[str, StudyData], found: list[Judged]) -> Chart:
    """The loss curve of each run with another verdict by eye than by the rule."""
    panels = []
    for one in found:
        if not one.agrees:
            marks = Marks(dash="solid", width=0.8).at(losses(studies[one.entry["record"]], one.row))
            title = f"{one.entry['number']}: by eye {one.entry['by_eye']}, rule: {one.row['verdict']}"
            panels.append(Panel(Axis("step"), Axis("training loss (nats/token)"), [marks], title=title))
    return Chart("disagreements", panels, columns=3, row_height=1.7)


def share(hits: list[bool]) -> Any:
    """`55 of 60, 0.92 (0.82–0.97)`: the share with its 95 % interval (Clopper-Pearson)."""
    if not hits:
        return None
    ends = binomtest(sum(hits), len(hits)).proportion_ci()
    return f"{sum(hits)} of {len(hits)}, {sum(hits) / len(hits):.2f} ({ends.low:.2f}–{ends.high:.2f})"


if __name__ == "__main__":
    from results import RECORDS, part

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sheets", type=Path, help="a new directory for the pictures")
    directory = Path(__file__).parents[1] / "docs" / "results"
    draw({name: part(name).study for name in RECORDS}, directory / "by_eye.csv", parser.parse_args().sheets)
