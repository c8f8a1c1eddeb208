"""`stabrun rerun`: where a recorded run is trained again, and with which configuration."""

import os

import pytest
from helpers import run, tiny
from studies import trained_alone

from stabrun.cli.rerun import rerun_config
from stabrun.config import UserError, read_config, run_id
from stabrun.study.plan import load
from stabrun.training.run import train


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study of two runs, as a folder that holds `study/`."""
    folder = tmp_path_factory.mktemp("rerun")
    trained_alone(folder, "train.steps=3", "study.variants=[baseline]", "study.lrs=[1e-2,1e-1]", "study.seeds=1")
    return folder


@pytest.fixture
def source(whole, tmp_path, monkeypatch):
    """One run of the study; the working directory is another, empty one."""
    monkeypatch.chdir(tmp_path)
    return whole / "study" / "runs" / next(iter(load(whole / "study").cells))


def test_a_run_of_a_study_goes_to_the_working_directory_and_not_into_the_study(source, capsys):
    before = sorted(source.parent.iterdir())
    own = source.name
    for words in (["seed=7"], []):
        assert run(capsys, "rerun", source, *words)[0] == 0
    changed = run_id(rerun_config(source, ["seed=7"]))
    assert sorted(os.listdir("runs")) == sorted([changed, f"{own}-rerun"])
    assert sorted(source.parent.iterdir()) == before
    assert (source / "metrics.jsonl").read_bytes() == open(f"runs/{own}-rerun/metrics.jsonl", "rb").read()


def test_inside_a_study_reruns_stay_apart(source, monkeypatch):
    """A study counts what lies in its `runs/`."""
    monkeypatch.chdir(source.parent.parent)
    assert rerun_config(source, []).run_dir == f"reruns/{source.name}-rerun"
    changed = rerun_config(source, ["seed=7"])
    assert changed.run_dir == f"reruns/{run_id(changed)}"


def test_name_and_group_are_made_anew(source):
    """The record of a study's run names its study's group."""
    recorded = read_config(source / "config.yaml")
    assert recorded.tracker.group.startswith("study-")
    assert recorded.tracker.run_name == "baseline lr=1e-2 s0"
    config = rerun_config(source, ["optim.lr=0.5"])
    assert (config.tracker.group, config.tracker.run_name) == (None, None)
    named = rerun_config(source, ["tracker.group=mine", "run_dir=here"])
    assert (named.tracker.group, named.run_dir) == ("mine", "here")


def test_an_override_that_changes_no_result_is_a_rerun_of_the_same(source):
    assert rerun_config(source, ["train.threads=2"]).run_dir == f"runs/{source.name}-rerun"


def test_the_configuration_is_printed(source, capsys):
    status, out, _ = run(capsys, "rerun", source, "--cfg", "job", "seed=3")
    assert status == 0
    assert "seed: 3" in out
    assert os.listdir(".") == []


@pytest.mark.parametrize(
    ("words", "named"),
    [(["optm.lr=3"], "Did you mean optim.lr?"), (["model=mini"], "single keys"), (["+variant=x"], "single keys"),
     (["seed"], "seed"), (["optim.lr=0"], "above 0"), (["train.steps=x"], "train.steps")],
)  # fmt: skip
def test_user_errors_are_sentences(source, words, named):
    with pytest.raises(UserError) as error:
        rerun_config(source, words)
    assert named in str(error.value)


@pytest.mark.parametrize("words", [["-m"], ["--force"], ["optim.lr=0"], ["+variant=qk_norm"]])
def test_user_errors_leave_nothing_behind(source, capsys, words):
    status, out, err = run(capsys, "rerun", source, *words)
    assert (status, out) == (2, "")
    assert words[0] in err
    assert os.listdir(".") == []


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"not a run directory: config\.yaml is missing"):
        rerun_config(tmp_path, [])


def test_a_rerun_gives_the_same_record_as_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(tiny("train.steps=5", "model.attn.qk_norm=head", "model.dropout=0.1", "run_dir=run"))
    train(rerun_config(tmp_path / "run", ["run_dir=again"]))
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == (tmp_path / "run" / "metrics.jsonl").read_bytes()


def test_a_choice_of_a_group_that_sets_one_key(source):
    config = rerun_config(source, ["tracker=none", "schedule=linear"])
    assert (config.tracker.name, config.schedule.kind) == ("none", "linear")
    assert config.schedule.warmup_steps == rerun_config(source, []).schedule.warmup_steps
    for word in ("schedule=ramp", "model=mini", "tracker=other"):
        with pytest.raises(UserError, match="single keys"):
            rerun_config(source, [word])
