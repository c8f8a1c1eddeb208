"""A study as text: table, counts and running cells; and live on a real terminal."""

import math
import os
import random
import re
import signal

import pytest
from helpers import TINY
from snapshots import a_plan, a_snapshot
from terminals import on_terminal, plain

from stabrun.study.ledger import DONE, FAILED, PLANNED, RUNNING
from stabrun.study.live_table import LiveTable, along_axis, attempt_columns, margin_of, rendered, table
from stabrun.study.snapshot import Attempt, SnapshotReader


def test_a_grid_in_columns():
    plan = a_plan("study.lrs=[1e-2,1e-1,1]", "study.seeds=2")
    cells = list(plan.cells)
    fates = dict(zip(cells, ("converged", "recovered", "undecided", "diverged", FAILED, RUNNING), strict=False))
    assert table(a_snapshot(plan, fates), 80) == [
        "lr        1e-2  0.1  1",
        "baseline  cr    ?D   !>",
        "qk_norm   ..    ..   ..",
    ]


def test_missing_cells_and_unknown_verdicts():
    plan = a_plan("study.lrs=[1e-2]", "study.seeds=1")
    plan.add("qk_norm", 0.1, 0)
    lines = table(a_snapshot(plan, dict.fromkeys(plan.cells, "of a later version")), 80)
    assert lines == ["lr        1e-2  0.1", "baseline  ?     -", "qk_norm   ?     ?"]


@pytest.mark.parametrize("strategy", ["grid", "frontier"])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_hundred_rates_along_an_axis(strategy, width):
    """Every mark is in the column of its rate, as are the ticks, and no line is wider than allowed."""
    plan = a_plan("study.strategy=frontier", "study.lr_range=[1e-3,1]")
    plan.strategy, dice = strategy, random.Random(1)
    rates = sorted({1e-3 * 2 ** (0.1 * k) for k in range(0, 100)})
    fates = {}
    for arm, edge in (("baseline", 0.1), ("qk_norm", 0.5)):
        for seed, rate in enumerate(dice.sample(rates, 100)):
            fates[plan.add(arm, rate, seed).id] = "diverged" if rate > edge else "converged"
    snapshot = a_snapshot(plan, fates)
    lines = table(snapshot, width)
    assert lines == list(along_axis(snapshot, width))
    assert max(map(len, lines)) <= width
    margin, last = margin_of(plan), width - margin_of(plan) - 2
    assert "".join(lines[1:]).count("c") + "".join(lines[1:]).count("D") >= 200
    head, baseline = lines[0], lines[1:][: next(i for i, line in enumerate(lines[1:]) if line.startswith("qk_norm"))]
    for tick in re.finditer(r"\|(\S+)", head):
        assert tick.start() == margin + round(last * math.log(float(tick[1]) / 1e-3) / math.log(1e3))
    assert {"1e-3", "1e-2", "0.1", "1"} <= set(re.findall(r"\|(\S+)", head))
    border = head.index("|0.1")
    rows = [line[margin:].ljust(width) for line in baseline]
    assert sum(len(row.strip().replace(" ", "")) for row in rows) == 100
    assert all("D" not in row[: border - margin] and "c" not in row[border - margin + 1 :] for row in rows)


def test_an_axis_of_one_rate_and_a_study_without_cells():
    plan = a_plan("study.strategy=frontier", "study.lr_range=[1e-3,1]")
    assert [line.split() for line in table(a_snapshot(plan), 80)][1:] == [["baseline"], ["qk_norm"]]
    plan = a_plan("study.lrs=[1e-2]", "study.seeds=1")
    assert list(along_axis(a_snapshot(plan), 80)) == ["lr        |1e-2", "baseline  .", "qk_norm   ."]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"seconds_since_beat": 3.2}, "node:7, heartbeat 3 s ago"),
        ({"seconds_since_beat": 85.0}, "node:7, no heartbeat for 85 s"),
        ({}, "node:7, no heartbeat yet"),
        ({"seconds_since_beat": 1.0, "attempt": 2}, "node:7, heartbeat 1 s ago, attempt 2"),
    ],
)
def test_owner_and_heartbeat(facts, expected):
    plan = a_plan("study.lrs=[1e-2]", "study.seeds=1")
    given = {
        "attempt": 1,
        "step": 15,
        "steps": 30,
        "steps_per_second": 12.34,
        "host": "node.of.a.cluster",
        "pid": 7,
    } | facts
    columns = attempt_columns(Attempt(next(iter(plan.cells.values())), **given))
    assert columns == ["baseline lr=1e-2 s0", "━━━━────", " 50%", "12.3 steps/s", expected]


def test_an_owner_that_has_ended_has_no_speed():
    cell = next(iter(a_plan("study.lrs=[1e-2]").cells.values()))
    columns = attempt_columns(Attempt(cell, 1, 15, 30, 12.34, "node", 7, 3.2, owner_gone=True))
    assert columns[2:] == [" 50%", "", "node:7 has ended"]


def test_more_workers_than_lines():
    plan = a_plan("study.lrs=[1e-2]", "study.seeds=50")
    snapshot = a_snapshot(plan, running=[Attempt(cell, 1, 0, 30) for cell in plan.cells.values()])
    lines = [line.plain for line in rendered(snapshot, 200, 24).renderables]
    assert len(lines) < 24
    shown = sum("starting" in line for line in lines)
    assert lines[-1] == f"and {100 - shown} more running"


def test_without_a_terminal_only_lines_are_printed(tmp_path, capsys):
    a_plan("study.lrs=[1e-2]").save(tmp_path)
    live_table = LiveTable(SnapshotReader(tmp_path))
    assert live_table.update().counts == {PLANNED: 2 * 3, RUNNING: 0, DONE: 0, FAILED: 0}
    live_table.print_line("a line")
    live_table.close()
    assert capsys.readouterr() == ("a line\n", "")


def test_the_live_table_on_a_terminal_and_ctrl_c(tmp_path):
    """A real sweep on a pseudo-terminal of 80 columns: it shows the running cells, and restores the terminal."""
    words = (*TINY, "train.steps=20000", "study.variants=[baseline,qk_norm]", "study.lrs=[1e-2,1]", "study.seeds=2")
    asked = []

    def interrupt(shown, process):
        if not asked and re.search(rb"[1-9]\d* steps/s", shown):
            os.killpg(process.pid, signal.SIGINT)
            asked.append(True)

    status, shown = on_terminal(["sweep", *words, "study.workers=1", "study_dir=study"], tmp_path, interrupt)
    assert status == 130
    text = plain(shown)
    assert "lr        1e-2  1\nbaseline  >." in text
    assert "0 of 8 done, 1 running, ETA " in text
    assert re.search(r"baseline lr=1e-2 s0  [━─]{8} +\d+%  [\d.e+]+ steps/s  \S+:\d+, heartbeat \d+ s ago", text)
    assert "interrupted; the same command resumes." in text
    live = text[text.index("0 of 8") : text.rindex("\nlr  ")]
    assert max(map(len, live.splitlines())) <= 80
