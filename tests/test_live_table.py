"""What a study looks like: texts, table, time left and cost by formula, and the live view on a real terminal."""

import fcntl
import json
import math
import os
import pty
import random
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress

import pytest
from helpers import TINY

from stabrun.record.jsonl import read_last, read_lines
from stabrun.study.cost import costs, described
from stabrun.study.ledger import DONE, FAILED, PLANNED, RUNNING, Entry
from stabrun.study.live_table import LiveTable, along_axis, counts, drawn, margin_of, table, worker_facts
from stabrun.study.plan import planned
from stabrun.study.snapshot import Attempt, Snapshot, SnapshotReader, seconds_a_step, seconds_left

ENTRIES = {
    PLANNED: Entry(),
    RUNNING: Entry({1}),
    DONE: Entry({1}, done=True),
    FAILED: Entry({1, 2}, {1, 2}),
}


def a_plan(*words):
    return planned([*TINY, "study.variants=[baseline,qk_norm]", *words])[0]


def a_look(plan, fates=(), running=()):
    """A study as it would be seen: cell → verdict or status, the rest planned; and attempts that go on."""
    fates = dict(fates) | {attempt.cell.id: RUNNING for attempt in running}
    states = {cell: fate if (fate := fates.get(cell, PLANNED)) in ENTRIES else DONE for cell in plan.cells}
    summaries = {cell: {"verdict": fate} for cell, fate in fates.items() if fate not in ENTRIES}
    return Snapshot(plan, {cell: ENTRIES[state] for cell, state in states.items()}, summaries, list(running), {})


def timed(look, times):
    """Finished runs of 10 steps that took so many seconds."""
    for cell, seconds in times.items():
        look.summaries[cell] |= {"steps": 10, "seconds": seconds}
    return look


def test_the_last_row_is_that_of_a_whole_reading(tmp_path):
    """Wherever a write was cut short, and with rows longer than the piece that is read first."""
    dice, file = random.Random(0), tmp_path / "metrics.jsonl"
    assert read_last(file) is None
    rows = [{"step": step, "pad": "x" * dice.choice([0, 100, 70_000, 300_000])} for step in range(12)]
    whole = "".join(json.dumps(row) + "\n" for row in rows).encode()
    ends = [match.end() for match in re.finditer(rb"\n", whole)]
    for cut in [0, 1, *(end + shift for end in ends for shift in (-1, 0, 1)), *dice.sample(range(len(whole)), 20)]:
        file.write_bytes(whole[:cut])
        whole_lines = [line.value for line in read_lines(file) if line.terminated]
        assert read_last(file) == (whole_lines or [None])[-1]


def test_a_grid_in_columns():
    plan = a_plan("study.lrs=[1e-2,1e-1,1]", "study.seeds=2")
    cells = list(plan.cells)
    fates = dict(zip(cells, ("converged", "recovered", "undecided", "diverged", FAILED, RUNNING), strict=False))
    assert table(a_look(plan, fates), 80) == [
        "lr        1e-2  0.1  1",
        "baseline  cr    ?D   !>",
        "qk_norm   ..    ..   ..",
    ]


def test_an_arm_with_other_rates_has_gaps_and_an_unknown_verdict_a_question_mark():
    plan = a_plan("study.lrs=[1e-2]", "study.seeds=1")
    plan.add("qk_norm", 0.1, 0)
    lines = table(a_look(plan, dict.fromkeys(plan.cells, "of a later version")), 80)
    assert lines == ["lr        1e-2  0.1", "baseline  ?     -", "qk_norm   ?     ?"]


@pytest.mark.parametrize("strategy", ["grid", "frontier"])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_hundred_rates_along_an_axis(strategy, width):
    """Every mark is there, in the column of its rate, which is that of the tick's bar; none is wider than asked."""
    plan = a_plan("study.strategy=frontier", "study.lr_range=[1e-3,1]")
    plan.strategy, dice = strategy, random.Random(1)
    rates = sorted({1e-3 * 2 ** (0.1 * k) for k in range(0, 100)})
    fates = {}
    for arm, edge in (("baseline", 0.1), ("qk_norm", 0.5)):
        for seed, rate in enumerate(dice.sample(rates, 100)):
            fates[plan.add(arm, rate, seed).id] = "diverged" if rate > edge else "converged"
    look = a_look(plan, fates)
    lines = table(look, width)
    assert lines == list(along_axis(look, width))
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
    assert [line.split() for line in table(a_look(plan), 80)][1:] == [["baseline"], ["qk_norm"]]
    plan = a_plan("study.lrs=[1e-2]", "study.seeds=1")
    assert list(along_axis(a_look(plan), 80)) == ["lr        |1e-2", "baseline  .", "qk_norm   ."]


def test_time_left_by_formula():
    plan = a_plan("study.lrs=[1e-2,1e-1]", "study.seeds=3")  # 30 steps a run
    base, normed = ([cell for cell in plan.cells.values() if cell.arm == arm] for arm in plan.arms)
    running = [Attempt(base[3], 1, 12, 30, 5.0), Attempt(normed[0], 1, 20, 30, 4.0)]
    look = a_look(plan, {cell.id: "converged" for cell in base[:3]}, running)
    timed(look, {base[0].id: 2.0, base[1].id: 3.0, base[2].id: 9.0})
    assert seconds_a_step(look) == {"baseline": 0.3, "qk_norm": 0.25}, "finished runs' median, else of running ones"
    steps = 0.3 * (18 + 2 * 30) + 0.25 * (10 + 5 * 30)
    assert seconds_left(look) == pytest.approx(steps / 2)
    assert counts(look) == f"3 of 12 done, 2 running, ETA {steps / 2:.0f} s"


def test_time_left_of_the_last_ones_is_that_of_the_slowest():
    plan = a_plan("study.lrs=[1e-2]", "study.seeds=1")
    one, other = plan.cells.values()
    look = a_look(plan, running=[Attempt(one, 1, 29, 30, 1.0), Attempt(other, 1, 0, 30, 1.0)])
    assert seconds_left(look) == pytest.approx(30.0)


def test_time_left_of_an_arm_that_was_never_timed_goes_by_its_flops():
    plan = a_plan("study.lrs=[1e-2]", "study.seeds=1", "model.n_layer=2,8", "study.variants=[baseline]")
    small, large = plan.cells.values()
    look = timed(a_look(plan, {small.id: "converged"}, [Attempt(large, 1, 0, 30)]), {small.id: 1.0})
    times = costs(plan, [], 1.0)
    assert seconds_left(look) == pytest.approx(0.1 * times[1].flops / times[0].flops * 30)


def test_time_left_is_unknown_while_nothing_is_or_nobody_works_or_the_search_decides():
    plan = a_plan("study.lrs=[1e-2]", "study.seeds=1")
    one, _ = plan.cells.values()
    assert seconds_left(a_look(plan)) is None
    assert seconds_left(a_look(plan, running=[Attempt(one, 1, 0, 30)])) is None
    assert seconds_left(a_look(plan, running=[Attempt(one, 1, 5, 30, 2.0, gone=True)])) is None
    known = a_look(plan, running=[Attempt(one, 1, 5, 30, 2.0)])
    assert seconds_left(known) == pytest.approx((25 + 30) / 2.0)
    plan.strategy = "frontier"
    assert seconds_left(known) is None


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"beat": 3.2}, "node:7, beat 3 s ago"),
        ({"beat": 85.0}, "node:7, no beat for 85 s"),
        ({}, "node:7, not heard of"),
        ({"beat": 1.0, "number": 2}, "node:7, beat 1 s ago, attempt 2"),
    ],
)
def test_what_is_said_of_an_owner(facts, said):
    plan = a_plan("study.lrs=[1e-2]", "study.seeds=1")
    given = {"number": 1, "step": 15, "steps": 30, "rate": 12.34, "host": "node.of.a.cluster", "pid": 7} | facts
    told = worker_facts(Attempt(next(iter(plan.cells.values())), **given))
    assert told == ["baseline lr=1e-2 s0", "━━━━────", " 50%", "12.3 steps/s", said]


def test_nothing_is_said_of_the_speed_of_an_owner_that_is_gone():
    cell = next(iter(a_plan("study.lrs=[1e-2]").cells.values()))
    told = worker_facts(Attempt(cell, 1, 15, 30, 12.34, "node", 7, 3.2, gone=True))
    assert told[2:] == [" 50%", "", "node:7 is gone"]


def test_more_workers_than_there_is_room_for():
    plan = a_plan("study.lrs=[1e-2]", "study.seeds=50")
    look = a_look(plan, running=[Attempt(cell, 1, 0, 30) for cell in plan.cells.values()])
    lines = [line.plain for line in drawn(look, 200, 24).renderables]
    assert len(lines) < 24
    shown = sum("starting" in line for line in lines)
    assert lines[-1] == f"and {100 - shown} more at work"


def test_two_thousand_cells_are_looked_at_quickly_and_the_finished_read_once(tmp_path):
    plan = a_plan("study.lrs=" + str([1e-3 * 1.05**k for k in range(100)]).replace(" ", ""), "study.seeds=10")
    assert len(plan.cells) == 2000
    for cell in plan.cells.values():
        (tmp_path / "runs" / cell.id).mkdir(parents=True)
        (tmp_path / "runs" / cell.id / "summary.json").write_text('{"verdict": "converged"}')
    looker = SnapshotReader(tmp_path)
    for _ in range(2):
        began = time.monotonic()
        look = looker.look(plan)
        lines = table(look, 80)
        print(f"{time.monotonic() - began:.3f} s")
        assert "".join(lines[1:]).count("c") >= 2000
        for cell in plan.cells:
            (tmp_path / "runs" / cell / "summary.json").unlink(missing_ok=True)


def test_a_board_without_a_terminal_says_only_what_it_is_told(tmp_path, capsys):
    board = LiveTable(tmp_path)
    board.show(a_plan("study.lrs=[1e-2]"), {})
    board.say("a line")
    board.close()
    assert capsys.readouterr() == ("a line\n", "")


def test_costs_by_formula():
    plan = a_plan("study.lrs=[1e-2,1e-1]", "study.seeds=2")
    first = next(cell for cell in plan.cells.values() if cell.arm == "qk_norm")
    rows = [{"run_id": first.id, "arm": "qk_norm", "tokens_per_second": 100.0}]
    bounded, measured = costs(plan, rows, speed=1e6)
    tokens, weights = 30 * 4 * 16, 2 * 12 * 16 * 16 + 16 * plan.arms["baseline"].model.vocab_size
    assert (bounded.cells, bounded.tokens, bounded.rates) == (4, 4 * tokens, [0.01, 0.1])
    assert bounded.flops == bounded.tokens * (6 * weights + 12 * 2 * 16 * 16)
    assert bounded.seconds == pytest.approx(bounded.flops / 1e6)
    assert (measured.cells, measured.seconds) == (3, pytest.approx(3 * tokens / 100.0))
    assert [cost.seconds for cost in costs(plan, [], None)] == [None, None]


def test_on_a_gpu_no_time_is_told_before_a_run_is_finished(tmp_path):
    lines = list(described(a_plan("study.lrs=[1e-2]", "train.device=cuda"), tmp_path, workers=2))
    assert lines[-2].startswith("how many hours is not known until a run of each variant is finished")
    assert "workers" not in "".join(lines)


def test_the_live_view_on_a_terminal_and_ctrl_c(tmp_path):
    """A real sweep behind a pseudo-terminal of 80 columns: it shows who is at work, and leaves the terminal whole."""
    words = (*TINY, "train.steps=20000", "study.variants=[baseline,qk_norm]", "study.lrs=[1e-2,1]", "study.seeds=2")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "stabrun", "sweep", *words, "study.workers=1", "study_dir=study"],
        cwd=tmp_path,
        env=os.environ | {"TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown, asked, deadline = b"", False, time.monotonic() + 120
    try:
        while True:
            assert time.monotonic() < deadline, shown[-2000:]
            if not select.select([ours], [], [], 0.1)[0]:
                continue
            try:
                piece = os.read(ours, 1 << 16)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
            if not asked and re.search(rb"[1-9]\d* steps/s", shown):
                os.killpg(process.pid, signal.SIGINT)
                asked = True
        assert process.wait(timeout=60) == 130
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(ours)
    text = shown.decode()
    assert "Traceback" not in text
    assert text.count("\x1b[?25l") == 1
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is there again"
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r\n", "\n").replace("\r", "\n")
    assert "lr        1e-2  1\nbaseline  >." in plain
    assert "0 of 8 done, 1 running, ETA " in plain
    assert re.search(r"baseline lr=1e-2 s0  [━─]{8} +\d+%  [\d.e+]+ steps/s  \S+:\d+, beat \d+ s ago", plain)
    assert "interrupted; the same command goes on from there." in plain
    live = plain[plain.index("0 of 8") : plain.rindex("\nlr  ")]
    assert max(map(len, live.splitlines())) <= 80


def test_a_search_costs_at_most_its_budget(tmp_path):
    plan = a_plan("study.strategy=frontier", "study.lr_range=[1e-2,1]", "study.max_runs=5")
    whole = 30 * 4 * 16
    ended = [{"run_id": "a", "arm": "qk_norm", "tokens_per_second": 100.0}] * 2
    baseline, qk_norm = costs(plan, ended, speed=None)
    assert (baseline.cells, baseline.tokens, baseline.seconds) == (5, 5 * whole, None)
    assert (qk_norm.cells, qk_norm.seconds) == (3, 3 * whole / 100)
    lines = list(described(plan, tmp_path, workers=2))
    assert lines[0].startswith("baseline: up to 5 cells to train, 9,600 tokens")
    assert lines[2].startswith("in all up to 10 cells, 19,200 tokens")
