"""What reads a watched run: judge, status, the API, the report and upload; and what refuses it."""

import json
import math

import pytest
from helpers import run, tiny
from wandb_files import assert_holds
from watched_records import LAYERS, MODELS, a_watched_run

import stabrun
from stabrun.config import UserError
from stabrun.publish.upload import upload
from stabrun.record.run_dir import RunWriter
from stabrun.record.schema import Result
from stabrun.report.charts import depth_panel
from stabrun.report.page import sites, statistics
from stabrun.report.report import part_of, write_report
from stabrun.report.study_data import read
from stabrun.training.run import train

T5 = "T5ForConditionalGeneration"


@pytest.fixture
def lost(tmp_path):
    """A GPT-2 that diverged after step 100, with checkpoints after 50, 110 and 200 steps; the second was removed."""
    files = a_watched_run(tmp_path / "mine", fault="mlp.c_proj", planned=240)
    for step in (50, 110, 200):
        path = files.path / f"saved/{step}"
        path.mkdir(parents=True)
        RunWriter(files).event("checkpoint", step=step, path=str(path))
    (files.path / "saved/110").rmdir()
    return files


def test_judge_names_the_checkpoint_before_the_last_healthy_step(lost, capsys):
    status, out, err = run(capsys, "judge", lost.path)
    assert (status, err) == (0, "")
    verdict = json.loads(run(capsys, "judge", lost.path, "--json")[1])
    healthy = verdict["last_healthy_step"]
    assert 50 < healthy + 1 < 200
    assert verdict["first_bad_site"] == "layer_02/mlp.c_proj"
    assert f"last healthy step: {healthy}; newest checkpoint before it: {lost.path}/saved/50 (step 50)" in out
    assert verdict["last_healthy_checkpoint"] == {"step": 50, "path": f"{lost.path}/saved/50"}
    for command in ("status", "top"):
        assert f"newest checkpoint before it: {lost.path}/saved/50 (step 50)" in run(capsys, command, lost.path)[1]


def test_judge_follows_and_compares_watched_runs(lost, capsys, tmp_path):
    status, out, _ = run(capsys, "judge", lost.path, "--follow")
    assert status == 0
    assert "diverged (runaway)" in out
    assert "saved/50 (step 50)" in out
    sound = a_watched_run(tmp_path / "sound").path
    other = json.loads(run(capsys, "judge", lost.path, "--against", sound, "--json")[1])["against"]
    assert (other["verdict"], other["steps"], other["site"]) == ("converged", 240, "layer_02/mlp.c_proj")
    unlike = a_watched_run(tmp_path / "llama", "LlamaForCausalLM").path
    assert json.loads(run(capsys, "judge", sound, "--against", unlike, "--json")[1])["against"]["site"] is None


def test_stabruns_own_runs_name_their_checkpoint_too(tmp_path, capsys):
    summary = train(tiny(f"run_dir={tmp_path / 'run'}", "train.steps=40", "train.checkpoint_every=10"))
    assert summary["last_healthy_checkpoint"] == {"step": 40, "path": "checkpoints/step_00000040"}
    capsys.readouterr()
    verdict = json.loads(run(capsys, "judge", tmp_path / "run", "--json")[1])
    assert verdict["last_healthy_checkpoint"]["path"] == f"{tmp_path}/run/checkpoints/step_00000040"
    assert "last_healthy_checkpoint" not in Result.__annotations__


@pytest.mark.parametrize(
    ("status", "planned", "line"),
    [
        ("complete", 240, "GPT2LMHeadModel lr=1e-3 s0 is complete: step 240 of 240, loss "),
        (None, None, "GPT2LMHeadModel lr=1e-3 s0 was interrupted: step 240, loss "),
    ],
)
def test_status_of_a_watched_run(tmp_path, capsys, status, planned, line):
    a_watched_run(tmp_path / "mine", status=status, planned=planned)
    code, out, err = run(capsys, "status", tmp_path / "mine")
    assert (code, err) == (0, "")
    assert out.startswith(line)
    assert "converged (fell)" in out
    assert "no checkpoint yet" in out
    facts = json.loads(run(capsys, "status", tmp_path / "mine", "--json")[1])
    assert (facts["step"], facts["steps"], facts["lr"], facts["seed"]) == (240, planned, 1e-3, 0)


def test_status_while_it_is_watched(tmp_path, capsys):
    files = a_watched_run(
        tmp_path / "mine", status=None, planned=480, settings={"name": "long", "lr": None, "seed": None}
    )
    with files.hold() as writer:
        writer.event("checkpoint", step=100, path=str(tmp_path))
        out = run(capsys, "status", tmp_path / "mine")[1]
    assert out.startswith("long is running: step 240 of 480, loss ")
    assert "last checkpoint: after step 100" in out


def test_a_watched_run_as_a_data_frame(lost):
    mine = stabrun.load_run(lost.path)
    frame = mine.metrics()
    assert len(frame) == 240
    assert {"norm/out/wte", "norm/out/lm_head", "norm/out/attn.c_proj/layer_03", "train/loss"} <= {*frame.columns}
    assert frame["norm/out/mlp.c_proj/layer_02"].iloc[-1] > 100 * frame["norm/out/mlp.c_proj/layer_01"].iloc[-1]
    assert mine.verdict == mine.summary["verdict"] == "diverged"
    assert [event["event"] for event in mine.events] == ["start", "complete", *3 * ["checkpoint"]]


@pytest.mark.parametrize("words", [("rerun",), ("eval",), ("sample",), ("rerun", "optim.lr=0.1")])
def test_what_needs_a_configuration_is_refused(tmp_path, capsys, words):
    directory = a_watched_run(tmp_path / "mine").path
    status, out, err = run(capsys, words[0], directory, *words[1:])
    assert (status, out) == (2, "")
    assert "a run that stabrun.watch recorded has no configuration" in err
    with pytest.raises(UserError, match="recorded has no configuration"):
        _ = stabrun.load_run(directory).config


def test_a_layer_that_is_not_called_is_not_a_number_in_its_step(tmp_path):
    a_watched_run(tmp_path / "mine", absent=("c_fc", "wte"))
    frame = stabrun.load_run(tmp_path / "mine").metrics()
    for column in ("norm/out/c_fc/layer_00", "norm/out/wte"):
        missing = frame[column].isna()
        assert [step for step in frame.index if missing[step]] == list(range(0, 240, 3)), column
    assert not frame["norm/out/c_fc/layer_01"].isna().any()


@pytest.mark.parametrize("name", MODELS)
def test_the_page_offers_what_was_recorded(tmp_path, name):
    directory, model = a_watched_run(tmp_path / "mine", name, fault=next(iter(MODELS[name].feeds))).path, MODELS[name]
    part = part_of(read(directory))
    layered = [site for stack in model.stacks.values() for site in stack]
    assert sites(part.curves) == [*model.before, *layered, *model.after]
    keys = [key for key, _, _ in statistics(part.curves)]
    for key in ("residual/norm", "attn/entropy", "grad/norm_by_layer"):
        assert [found for found in keys if found.startswith(key)] == [
            f"{key}/{stack}" if stack else key for stack in model.stacks
        ]
    assert {"norm/out/{site}", "norm/adam_v/{site}", "grad/norm", "train/lr"} <= {*keys}
    charts = {chart.name: chart for chart in part.charts}
    assert len(charts["norms_out"].panels) == len(model.before) + len(layered) + len(model.after)
    assert len(charts["norms_in"].panels) == len(layered) + len(model.after)
    assert {"adam", "attention", "block_output", "gradient_by_depth", "training_curves"} <= charts.keys()
    (curves,) = part.curves.values()
    panel = depth_panel(part.study.rows[0], curves, 239)
    assert [len(marks.x) for marks in panel.marks] == [LAYERS * len(model.stacks)] * len(panel.marks)


def test_the_largest_layer_is_that_of_the_layers_called(tmp_path):
    a_watched_run(tmp_path / "mine", absent=("c_attn",))
    (chart,) = (chart for chart in part_of(read(tmp_path / "mine")).charts if chart.name == "adam")
    (marks,) = (marks for marks in chart.panels[0].marks if marks.label.startswith("c_attn"))
    assert len(marks.y) == 48
    assert all(math.isfinite(value) for value in marks.y)


@pytest.mark.parametrize("settings", [{}, {"lr": None, "seed": None, "name": "a <b>run"}])
@pytest.mark.parametrize("status", ["complete", None])
def test_the_report_of_a_watched_run(tmp_path, monkeypatch, capsys, settings, status):
    monkeypatch.setattr("stabrun.report.report.write_figures", lambda drawn, directory: None)
    directory = a_watched_run(tmp_path / "mine", T5, fault="decoder.wo", settings=settings, status=status).path
    write_report(directory)
    page, out = (directory / "report" / "index.html").read_text(), capsys.readouterr().out
    name = "T5ForConditionalGeneration lr=1e-3 s0" if not settings else "a &lt;b&gt;run"
    assert f"<h1>{name}</h1>" in page
    assert "single run of T5ForConditionalGeneration, recorded by stabrun.watch" in page
    assert "first in layer_02/decoder.wo" in out
    assert ("learning rate 1e-3, seed 0: diverged" in out) == (not settings)
    assert "encoder.block" not in page
    assert "encoder.0.encoder.SelfAttention.q" in page, "the paths of the sites are among the settings"
    assert "stabrun rerun" not in page
    assert '<option value="decoder.wo" selected>' in page


def test_two_watched_runs_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("stabrun.report.report.write_figures", lambda drawn, directory: None)
    one, two = (a_watched_run(tmp_path / name, fault=fault).path for name, fault in (("a", "c_fc"), ("b", None)))
    write_report(one, two)
    rows = (one / "report-beside-b" / "tables" / "side_by_side.csv").read_text().splitlines()
    assert "diverged" in rows[1]
    assert "converged" in rows[1]


def test_upload_of_a_watched_run(lost, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    assert upload(lost.path, ["tracker.project=mine"]) == 0
    out = capsys.readouterr().out
    assert "GPT2LMHeadModel lr=1e-3 s0: 240 rows, 1 summary" in out
    assert "\n1 W&B run written offline" in out
    (folder,) = (lost.path / "wandb").glob("offline-run-*")
    found = assert_holds(folder, list(lost.rows()), norms_every=10)
    assert found.run["display_name"] == "GPT2LMHeadModel lr=1e-3 s0"
    assert found.run["project"] == "mine"
    assert found.summary["verdict"] == "diverged"
    assert upload(lost.path, ["tracker.project=mine"]) == 0
    assert capsys.readouterr().out.endswith("nothing to send.\n")
