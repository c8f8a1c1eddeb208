"""Ramps: the edge of made-up curves, the command with its files, and how it goes on after a kill."""

import json
import math
import signal
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, configured, metrics, run, tiny
from matplotlib.image import imread
from studies import asked, ended, running, wait_for

from stabrun.cli.ramp import DEFAULTS, search_range, with_defaults
from stabrun.config import UserError
from stabrun.record.run_dir import RunDir
from stabrun.report.ramp import ramp_chart
from stabrun.training.run import Run, train
from stabrun.verdict.ramp import OFFSET, REACH, SPREAD, Edge, Ramp, first_site

LOW, HIGH = 1e-4, 5.0
NEVER = 1e9
COMMAND = ("ramp", *TINY, "train.steps=120", "train.checkpoint_every=20")


def curve(edge, count=400, noise=0.05, steep=0.5, seed=0, start=6.0, bottom=2.0):
    """A ramp whose loss falls from `start` to `bottom`, and rises by `steep` nats per octave above the rate `edge`."""
    rates = np.geomspace(LOW, HIGH, count)
    fall = np.log(rates / LOW) / math.log(HIGH / LOW)
    losses = bottom + (start - bottom) * np.exp(-8 * fall) + steep * np.maximum(0, np.log2(rates / edge))
    return rates, losses + np.random.default_rng(seed).normal(0, noise, count)


def octaves(found, edge):
    return math.log2(found.rate / edge)


@pytest.mark.parametrize("edge", [0.02, 0.1, 0.6])
@pytest.mark.parametrize(("count", "noise"), [(100, 0.03), (200, 0.05), (400, 0.05), (400, 0.2), (2000, 0.1)])
def test_the_edge_of_a_steep_rise_is_within_an_octave(edge, count, noise):
    found = Ramp(*curve(edge, count, noise, steep=2.0)).edge
    assert found.reason == "rise"
    assert 0 < octaves(found, edge) < 1
    assert found.octaves == pytest.approx(math.log2(found.rate))


def test_the_edge_is_where_the_rise_reaches_a_tenth_of_what_was_learned():
    """4 nats were learned; with hardly any noise the level is 0.4 above the lowest 0.8 octaves after the edge."""
    rates, losses = curve(0.1, 2000, noise=1e-3)
    found = Ramp(rates, losses).edge
    lowest = losses.min()
    expected = rates[np.flatnonzero(losses < lowest + 0.1 * (losses[0] - lowest))[-1]]
    assert octaves(found, expected) == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_unit_of_the_loss_does_not_matter(factor):
    rates, losses = curve(0.1)
    assert Ramp(rates, factor * losses).edge == Ramp(rates, losses).edge


def test_what_comes_back_is_no_edge():
    rates, losses = curve(1.0)
    bumpy = losses + 1.5 * ((rates > 0.05) & (rates < 0.15))
    assert Ramp(rates, bumpy).edge.rate == pytest.approx(Ramp(rates, losses).edge.rate, rel=0.1)
    assert Ramp(rates[:320], bumpy[:320]).edge.reason == "no_rise"


def test_curves_without_an_edge():
    rates, falling = curve(NEVER)
    white = np.random.default_rng(0).normal(6.0, 0.05, 400)
    reasons = {
        "no_rise": falling,
        "no_learning": white,
        "too_short": None,
    }
    for reason, losses in reasons.items():
        ramp = Ramp(rates, losses) if losses is not None else Ramp(rates[:15], falling[:15])
        assert ramp.edge == Edge(reason)
        assert ramp.edge.rate is ramp.edge.lr50 is ramp.edge.lr_range is None
    worse = 6.0 + 10 * np.geomspace(1e-3, 1, 400)
    assert Ramp(rates, worse).edge.reason == "no_learning"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite(bad):
    rates, losses = curve(NEVER)
    losses[300:] = bad
    found = Ramp(rates, losses).edge
    assert (found.reason, found.row, found.rate) == ("nonfinite_loss", 300, pytest.approx(rates[300]))
    rates, losses = curve(0.1, steep=2.0)
    losses[350:] = bad
    assert (Ramp(rates, losses).edge.reason, Ramp(rates, losses).edge.row < 300) == ("rise", True)
    for first in (0, 1, 10):
        assert Ramp(rates, np.where(np.arange(400) < first, losses, bad)).edge == Edge("no_learning")
    empty = Ramp(np.array([]), np.array([]))
    assert (empty.edge, empty.lowest) == (Edge("too_short"), None)


def test_how_high_a_diverged_loss_is_does_not_matter():
    rates, losses = curve(0.1)
    assert Ramp(rates, np.where(rates > 1, 1e300, losses)).edge.row == Ramp(rates, losses).edge.row


def test_the_lowest_level_is_that_of_a_window():
    rates, losses = curve(0.1)
    outlier = losses.copy()
    outlier[200] = -5.0
    for each in (losses, outlier):
        rate, level = Ramp(rates, each).lowest
        assert rate == pytest.approx(0.1, rel=0.7)
        assert level == pytest.approx(2.0, abs=0.1)


def test_the_range_for_a_search_is_around_the_guess_and_below_what_weight_decay_allows():
    edge = Edge("rise", -2.0, 200)
    low, high = edge.lr_range
    assert math.log2(low * high) / 2 == pytest.approx(-2.0 - OFFSET)
    assert math.log2(high / low) == pytest.approx(2 * REACH * SPREAD)
    assert search_range(tiny(), edge) == [float(f"{low:.2g}"), float(f"{high:.2g}")]
    assert search_range(tiny(), Edge("rise", 3.0, 200))[1] == 9.0
    assert search_range(tiny("optim.weight_decay=0"), Edge("rise", 3.0, 200))[1] > 9.0
    assert search_range(tiny(), Edge("no_rise")) is None


def rows(rates, losses, site):
    """Rows whose output norm of `layer_01/fc2` leaves its trend at row `site`."""
    for step, (rate, loss) in enumerate(zip(rates, losses, strict=True)):
        grown = 1.3 ** max(0, step - site)
        norms = {"norm/out/fc1": [1.0, 1.0], "norm/out/fc2": [1.0 + 1e-3 * (step % 3), grown * (1 + 1e-3 * (step % 5))]}
        yield {"step": step, "train/lr": float(rate), "train/loss": float(loss), **norms}


def test_the_site_that_leaves_its_trend_before_the_edge_is_the_first():
    made = list(rows(*curve(0.1), site=255))
    ramp = Ramp.of_rows(made)
    assert first_site(made, ramp) == "layer_01/fc2"
    assert first_site(made[:250], Ramp.of_rows(made[:250])) is None, "no edge"


def test_the_figure_shows_the_sites_that_grew_up_to_the_edge():
    made = list(rows(*curve(0.1), site=255))
    ramp = Ramp.of_rows(made)
    upper, lower = ramp_chart(ramp, made, [0.05, 0.2], "a ramp").panels
    assert lower.marks[0].label == "layer_01/fc2"
    assert lower.marks[0].y[270] / lower.marks[0].y[260] == pytest.approx(1.3**10, rel=0.02)
    assert [marks.x[0] for marks in (*upper.marks, *lower.marks) if marks.dash == "dash"] == [ramp.edge.rate] * 2
    bare = [{key: row[key] for key in ("step", "train/lr", "train/loss")} for row in made]
    assert len(ramp_chart(ramp, bare, None, "without norms").panels) == 1


def test_own_words_replace_the_defaults():
    assert with_defaults(["seed=1"]) == [*DEFAULTS, "seed=1"]
    config = configured(*with_defaults(["optim.lr=0.5", "train.steps=50"]))
    assert (config.schedule.kind, config.optim.lr, config.train.steps) == ("ramp", 0.5, 50)
    assert config.schedule.min_lr == LOW


def test_a_grid_may_have_ramps_and_a_search_not():
    plan = asked("schedule=ramp", "study.lrs=[1,5]", "study.seeds=1")
    assert {plan.config(cell).schedule.kind for cell in plan.cells.values()} == {"ramp"}
    with pytest.raises(UserError, match="schedule=ramp: a search keeps"):
        asked("schedule=ramp", "study.strategy=frontier", "study.lr_range=[0.1,1]")


def test_the_command_prints_and_writes_what_the_ramp_shows(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *COMMAND, "run_dir=run")
    assert status == 0, err
    found = Ramp.of_rows(list(RunDir(Path("run")).rows()))
    facts = json.loads(Path("run/ramp.json").read_text())
    assert found.edge.reason == "rise"
    assert (facts["edge_lr"], facts["edge_step"], facts["steps"]) == (found.edge.rate, found.edge.row, 120)
    for part in ("lowest loss: ", "edge: ", "study.lr_range=[", "figure: run/ramp.png", "record: run"):
        assert part in out
    assert imread("run/ramp.png").shape[2] == 4
    assert xml.etree.ElementTree.parse("run/ramp.svg").getroot().tag.endswith("svg")
    before = metrics(tmp_path / "run")
    status, out, err = run(capsys, *COMMAND, "run_dir=run", "--json")
    assert status == 0
    assert json.loads(out) == {key: value for key, value in facts.items() if key != "check"}
    assert "already finished" in err
    assert metrics(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("words", "reason", "said"),
    [
        (("optim.lr=2e-3", "train.steps=60"), "no_rise", "raise optim.lr"),
        (("schedule.min_lr=1e17", "optim.lr=1e18", "optim.weight_decay=0"), "no_learning", "lower schedule.min_lr"),
        (("train.steps=15",), "too_short", "raise train.steps"),
    ],
)
def test_a_ramp_without_an_edge_tells_why(capsys, tmp_path, words, reason, said):
    status, out, _ = run(capsys, *COMMAND, *words, f"run_dir={tmp_path / 'run'}")
    facts = json.loads((tmp_path / "run" / "ramp.json").read_text())
    assert status == 0
    assert "no edge: " in out
    assert said in out
    assert (facts["reason"], facts["edge_lr"], facts["lr_range"]) == (reason, None, None)
    assert imread(facts["figure"]).size


def test_ctrl_c_and_the_same_command_again(capsys, tmp_path, monkeypatch):
    launch = Run.launch

    def interrupted(self, step):
        if step == 33:
            signal.raise_signal(signal.SIGINT)
        return launch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "launch", interrupted)
        status, out, _ = run(capsys, *COMMAND, f"run_dir={tmp_path / 'run'}")
    assert status == 130
    assert out.endswith("interrupted after step 34; the same command resumes from there.\n")
    assert not (tmp_path / "run" / "ramp.json").exists()
    assert run(capsys, *COMMAND, f"run_dir={tmp_path / 'run'}")[0] == 0
    train(configured(*with_defaults(COMMAND[1:])), tmp_path / "whole")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_killed_and_resumed(capsys, tmp_path):
    place, words = RunDir(tmp_path / "run"), (*COMMAND, "train.steps=400")
    with running("-m", "stabrun", *words, f"run_dir={place.path}", cwd=tmp_path) as process:
        wait_for(lambda: process.poll() is not None or (place.checkpoint_step() or 0) >= 20)
        process.kill()
        ended(process)
    assert place.steps_done() < 400
    assert run(capsys, *words, f"run_dir={place.path}")[0] == 0
    train(configured(*with_defaults(words[1:])), tmp_path / "whole")
    assert metrics(place.path) == metrics(tmp_path / "whole")
