"""The Python API; the examples of docs/api.md run as they are printed."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, tiny, train_interrupted
from made_up_curves import drawn
from safetensors.torch import load_file
from studies import trained_alone

import stabrun
from stabrun.record.jsonl import read_checked
from stabrun.study.plan import load as load_plan

DOCS = Path(__file__).parent.parent / "docs" / "api.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, through the API."""
    directory = tmp_path_factory.mktemp("api") / "run"
    return stabrun.train(stabrun.compose([*TINY, "+variant=qk_norm", f"run_dir={directory}"]))


def test_importing_stabrun_imports_nothing_large():
    large = "torch", "hydra", "pandas", "omegaconf", "numpy"
    code = f"import sys, stabrun; dir(stabrun); print([name for name in {large} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["stabrun.training.run", "stabrun.composition", "stabrun.api"])
def test_functions_are_callable_whatever_was_imported_before(module):
    code = f"import {module}, stabrun; print(callable(stabrun.train), callable(stabrun.compose))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


def test_the_module_has_the_documented_names_and_no_others():
    assert set(stabrun.__all__) <= set(dir(stabrun))
    assert all(getattr(stabrun, name) is not None for name in stabrun.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        stabrun.nothing  # noqa: B018


def test_compose_refuses_what_the_command_line_refuses():
    with pytest.raises(stabrun.UserError, match=r"optim\.lr"):
        stabrun.compose(["optim.lr=-1"])


def test_a_run_holds_its_files(run):
    on_disk = read_checked(run.directory / "summary.json")
    assert run.summary == on_disk
    assert run.verdict == on_disk["verdict"]
    assert run.config == tiny("+variant=qk_norm", f"run_dir={run.directory}")
    assert (run.events[0]["event"], run.events[-1]["event"]) == ("start", "complete")
    assert repr(run) == f"Run('{run.directory}')"


def test_metrics_are_the_rows(run):
    frame = run.metrics()
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert frame.index.tolist() == [line["step"] for line in lines] == list(range(30))
    assert frame["train/loss"].tolist() == [line["train/loss"] for line in lines]
    assert frame["norm/out/fc2/layer_01"].tolist() == [line["norm/out/fc2"][1] for line in lines]
    assert frame["norm/out/head"].tolist() == [line["norm/out/head"][0] for line in lines]
    assert math.isnan(frame["attn/entropy/layer_00"][1])  # a row between two with expensive statistics
    assert frame["attn/entropy/layer_00"][10] == lines[10]["attn/entropy"][0]
    assert set(map(str, frame.dtypes)) <= {"float64", "int64"}


def test_metrics_that_are_not_finite_are_floats(run, tmp_path):
    rows = '{"step": 0, "train/loss": "nan", "norm/out/fc1": [1.0, "inf"]}\n{"step": 1, "train/loss": "-inf"}\n'
    (tmp_path / "config.yaml").write_bytes((run.directory / "config.yaml").read_bytes())
    (tmp_path / "metrics.jsonl").write_text(rows)
    frame = stabrun.load_run(tmp_path).metrics()
    assert math.isnan(frame["train/loss"][0])
    assert frame["train/loss"][1] == -math.inf
    assert frame["norm/out/fc1/layer_01"][0] == math.inf


def test_a_run_without_rows_has_an_empty_frame(run, tmp_path):
    (tmp_path / "config.yaml").write_bytes((run.directory / "config.yaml").read_bytes())
    assert stabrun.load_run(tmp_path).metrics().empty


def test_the_model_has_the_weights_of_the_checkpoint(run):
    model = run.model()
    state = load_file(run.directory / "checkpoints" / "step_00000030" / "model.safetensors")
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], state[name]) for name in parameters)
    assert not model.training
    assert {parameter.device.type for parameter in parameters.values()} == {"cpu"}
    assert model(torch.zeros(1, 16, dtype=torch.long)).shape == (1, 16, 256)
    assert torch.equal(run.model(step=30).embed.weight, model.embed.weight)
    with pytest.raises(stabrun.UserError, match=r"step=7.*step 30"):
        run.model(step=7)


def test_a_run_without_checkpoints_says_so(tmp_path):
    run = stabrun.train(tiny(f"run_dir={tmp_path / 'run'}", "train.steps=3", "train.checkpoint_every=0"))
    with pytest.raises(stabrun.UserError, match="no checkpoint"):
        run.model()


def test_an_interrupted_run_is_resumed(tmp_path, monkeypatch):
    config = tiny(f"run_dir={tmp_path / 'run'}")
    assert train_interrupted(config, monkeypatch, at=7)["status"] == "interrupted"
    assert stabrun.train(config).summary["status"] == "complete"


def test_a_study_holds_its_files(tmp_path):
    rows = trained_alone(tmp_path, "study.variants=[baseline]", "study.lrs=[1e-2,1e-1]", "study.seeds=1").rows
    study = stabrun.load_study(tmp_path / "study")
    frame = study.results()
    assert frame.index.tolist() == [row["run_id"] for row in rows]
    assert frame["final_loss"].tolist() == [float(row["final_loss"]) for row in rows]
    assert frame["verdict"].tolist() == [row["verdict"] for row in rows]
    assert study.summary == read_checked(tmp_path / "study" / "study.json")
    assert [run.summary["run_id"] for run in study.runs] == list(load_plan(tmp_path / "study").cells)


@pytest.mark.parametrize("load", [stabrun.load_run, stabrun.load_study])
def test_another_directory_is_refused(load, tmp_path):
    with pytest.raises(stabrun.UserError, match=r"not a \w+ directory: (config|study)\.yaml is missing"):
        load(tmp_path)


def test_judging_arrays_is_judging_their_rows():
    run = drawn("runaway", 3)
    found = stabrun.judge(run.losses)
    assert found == run.verdict()
    assert found.verdict == "diverged"
    steps = 10 * np.arange(len(run.losses))
    assert stabrun.judge(run.losses, steps).first_bad_step == 10 * found.first_bad_step
    changed = drawn("a changed objective", 3)
    val = np.full(len(changed.losses), np.nan)
    val[list(changed.validations)] = list(changed.validations.values())
    assert stabrun.judge(changed.losses, val_loss=val).reason == "objective_changed"
    restart = drawn("restart with a recorded rate", 3)
    assert stabrun.judge(torch.tensor(restart.losses), lr=restart.rates) == restart.verdict()
    norms = np.ones(len(run.losses))
    norms[20] = math.inf
    assert stabrun.judge(run.losses, grad_norm=norms).reason == "nonfinite_grad"
    assert stabrun.judge([]).reason == "too_short"
    with pytest.raises(stabrun.UserError, match=r"train/lr has shape \(3,\)"):
        stabrun.judge([1.0, 2.0], lr=[1, 2, 3])
    with pytest.raises(stabrun.UserError, match="must ascend"):
        stabrun.judge([1.0, 2.0], [3, 3])


def test_the_examples_of_the_documentation_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    names = {}
    for block in blocks:
        exec(compile(block, str(DOCS), "exec"), names)
