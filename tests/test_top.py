"""`stabrun top`: what it shows of a run, against the record; live on a real terminal; and of a study."""

import json
import math
import os
import re
import signal
import statistics

import pytest
from helpers import run, tiny
from snapshots import a_plan, a_snapshot
from terminals import on_terminal, plain
from watched_records import a_watched_run, rows

from stabrun.cli.top import BLOCKS, finished, sparkline
from stabrun.record.jsonl import dumps
from stabrun.record.run_dir import RunWriter
from stabrun.training.run import train
from stabrun.verdict.growth import Growth
from stabrun.verdict.judge import Judge


def test_one_view_of_a_watched_run_without_a_terminal(tmp_path, capsys):
    files = a_watched_run(tmp_path / "mine", fault="c_fc", planned=240)
    RunWriter(files).event("checkpoint", step=60, path=str(tmp_path))
    status, out, err = run(capsys, "top", files.path)
    assert (status, err) == (0, "")
    lines, recorded = out.splitlines(), list(files.rows())
    verdict = json.loads(run(capsys, "judge", files.path, "--json")[1])
    loss = recorded[-1]["train/loss"]
    assert lines[0] == f"GPT2LMHeadModel lr=1e-3 s0 is complete: step 240 of 240, loss {loss:.3f}"
    assert lines[1] == "━" * 55 + " 100%"
    assert lines[2].startswith(f"{recorded[0]['train/loss']:.3f} █")
    assert lines[2].endswith(f" {loss:.3f}")
    assert f"diverged (runaway) at step {verdict['first_bad_step']}, first in layer_02/c_fc" in lines[3]
    healthy = verdict["last_healthy_step"]
    assert lines[4] == f"last healthy step: {healthy}; newest checkpoint before it: {tmp_path} (step 60)"
    first, last = (row["norm/out/c_fc"][2] for row in (recorded[0], recorded[-1]))
    place = lines.index("output norms that grew most")
    assert lines[place + 1].split() == ["layer_02/c_fc", f"{first:.3g}", "→", f"{last:.3g}", f"×{last / first:.3g}"]
    assert len([line for line in lines[place:] if "→" in line]) == 8
    alarm = verdict["signals"]["output_norm"]
    assert f"step {alarm['step']}: alarm of output_norm in layer_02/c_fc" in lines
    assert any(line.startswith("spikes: ") for line in lines)


def test_one_view_of_a_run_of_stabrun_that_was_interrupted(tmp_path, capsys):
    train(tiny(f"run_dir={tmp_path / 'run'}", "train.steps=40"))
    (tmp_path / "run" / "summary.json").unlink()
    capsys.readouterr()
    status, out, _ = run(capsys, "top", tmp_path / "run")
    assert status == 0
    assert out.startswith("baseline lr=1e-2 s0 was interrupted: step 40 of 40, loss ")
    assert "so far: " in out
    assert re.search(r"  layer_0\d/\w+ +[\d.]+ → [\d.]+ +×[\d.]+", out)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_study_is_shown_as_status_shows_it(made_study, capsys):
    shown = run(capsys, "top", made_study)
    assert shown == run(capsys, "status", made_study)
    assert "12 of 12 done" in shown[1]


def test_a_study_has_ended_when_no_cell_is_left():
    plan = a_plan("study.lrs=[1e-2]", "study.seeds=1")
    one, other = plan.cells
    assert not finished(a_snapshot(plan, {one: "diverged"}))
    assert finished(a_snapshot(plan, {one: "diverged", other: "failed"}))


def test_what_is_neither_a_run_nor_a_study(tmp_path, capsys):
    status, _, err = run(capsys, "top", tmp_path)
    assert status == 2
    assert "neither a study nor a run" in err


@pytest.mark.parametrize("width", [20, 52])
def test_the_curve_has_the_medians_of_equal_stretches(width):
    losses = [8.0 - 0.05 * step for step in range(120)]
    first, curve, last = sparkline(losses, width).split(" ")
    assert (first, last) == ("8.000", "2.050")
    assert len(sparkline(losses, width)) == width
    assert curve[0] == BLOCKS[-1]
    assert curve[-1] == BLOCKS[0]
    heights = [BLOCKS.index(mark) for mark in curve]
    stretch = 120 // len(curve)
    medians = [statistics.median(losses[place * stretch : (place + 1) * stretch]) for place in range(len(curve))]
    low, high = min(medians), max(medians)
    assert heights == [round(7 * (level - low) / (high - low)) for level in medians]


def test_curves_that_are_short_flat_or_not_finite():
    assert sparkline([2.5], 60) == "2.500 ▁ 2.500"
    assert sparkline([2.0, 2.0], 60) == "2.000 ▁▁ 2.000"
    assert sparkline([2.0, 1.0, math.nan], 60) == "2.000 █▁× nan"
    assert sparkline([math.inf], 60) == "inf × inf"


def test_growth_of_sites_that_are_missing_or_not_finite():
    growth = Growth()
    assert growth.most(3) == []
    growth.add({"norm/out/q": [1.0, None, 2.0], "norm/out/wte": 4.0, "norm/out/head": [0.0]})
    growth.add({"step": 1})
    growth.add({"norm/out/q": [3.0, 5.0, "nan"], "norm/out/wte": 2.0, "norm/out/head": [9.0]})
    assert [(site.site, site.factor) for site in growth.most(9)] == [
        ("layer_02/q", math.inf), ("layer_00/q", 3.0), ("layer_01/q", 1.0), ("wte", 0.5)
    ]  # fmt: skip
    assert [site.site for site in growth.most(1)] == ["layer_02/q"]


def test_a_growing_run_on_a_terminal_from_before_its_first_row_to_its_end(tmp_path):
    """The rows come in pieces, while the directory is held as a training process holds it; the view ends with it."""
    files = a_watched_run(tmp_path / "mine", status=None, planned=120, steps=120)
    lines = files.metrics.read_text().splitlines(keepends=True)
    files.metrics.unlink()
    seen = []

    def write(shown, _):
        text = shown.decode(errors="ignore")
        if not seen and "is running: step 0 of 120" in text:
            files.metrics.write_text("".join(lines[:50]) + lines[50][:20])
            seen.append("first")
        elif seen == ["first"] and "step 50 of 120" in text:
            with open(files.metrics, "a") as file:
                file.write(lines[50][20:] + "".join(lines[51:]))
            judge = Judge.of_record(files)
            for row in files.rows():
                judge.add(row)
            files.write_summary(json.loads(dumps({"status": "complete", **vars(judge.conclude()), "steps": 120})))
            seen.append("last")

    with files.hold():
        status, shown = on_terminal(["top", files.path], tmp_path, write)
    text = plain(shown)
    assert (status, seen) == (0, ["first", "last"])
    assert "so far: " in text
    end = text[text.rindex("GPT2LMHeadModel lr=1e-3 s0") :]
    assert end.startswith("GPT2LMHeadModel lr=1e-3 s0 is complete: step 120 of 120, loss ")
    assert "━ 100%" in end
    assert "converged (fell)" in end


def test_ctrl_c_ends_the_view(tmp_path):
    files, asked = a_watched_run(tmp_path / "mine", status=None), []

    def interrupt(shown, process):
        if not asked and b"output norms that grew most" in shown:
            os.killpg(process.pid, signal.SIGINT)
            asked.append(True)

    with files.hold():
        status, shown = on_terminal(["top", files.path], tmp_path, interrupt)
    assert status == 130
    assert "is running: step 240" in plain(shown)


def test_a_record_that_begins_again(tmp_path):
    """A resume cuts the rows behind its step: the view has only those that are there."""
    files, seen = a_watched_run(tmp_path / "mine", status=None, fault="c_fc"), []

    def resume(shown, _):
        text = shown.decode(errors="ignore")
        if not seen and "diverged (runaway)" in text:
            files.metrics.write_text("".join(dumps(row) + "\n" for row in rows("GPT2LMHeadModel", steps=60)))
            seen.append(True)
        elif seen == [True] and "step 60, loss" in text:
            files.write_summary(json.loads(dumps({"status": "stopped", **vars(Judge().conclude()), "steps": 60})))
            seen.append(False)

    with files.hold():
        status, shown = on_terminal(["top", files.path], tmp_path, resume)
    assert (status, seen) == (0, [True, False])
    text = plain(shown)
    assert "so far: converged" in text[text.rindex("diverged (runaway)") :]
