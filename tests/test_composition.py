"""Hydra's flags, files of the user, and plugins of Hydra, by the command line and by `compose`."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import yaml
from helpers import TINY, configured, run, stabrun

from stabrun.composition import compose
from stabrun.config import UserError

plugins_there = pytest.mark.skipif(
    not (find_spec("joblib") and find_spec("optuna")), reason="stabrun[plugins] is not installed"
)
QUICK = (*TINY, "train.steps=3", "train.checkpoint_every=0")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def mine(tmp_path):
    """Writes a file into a configuration directory of the user's; returns the directory."""

    def write(name, text):
        file = tmp_path / "mine" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return tmp_path / "mine"

    return write


def test_compose_takes_overrides_and_a_directory(mine):
    folder = mine("variant/calm", "# @package _global_\nmodel: {attn: {soft_cap: 10.0}}\n")
    config = compose(["+variant=calm", "optim.lr=3e-2"], folder)
    assert (config.variant, config.model.attn.soft_cap, config.optim.lr) == ("calm", 10.0, 0.03)
    assert compose().optim.lr == 1e-2
    for word in ("optim.lr", "hydra.searchpath=[pkg://os]", "optim.lr=0"):
        with pytest.raises(UserError):
            compose([word])
    with pytest.raises(UserError, match="no such directory"):
        compose([], "nowhere")


def test_a_directory_with_special_characters(mine, tmp_path):
    mine("variant/calm", "# @package _global_\nmodel: {attn: {soft_cap: 10.0}}\n")
    (tmp_path / "mine").rename(tmp_path / "my, 'own' = [conf]")
    assert compose(["+variant=calm"], tmp_path / "my, 'own' = [conf]").variant == "calm"


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_cfg_prints_what_hydra_prints(capsys, command):
    words = ("+variant=qk_norm", "optim.lr=3e-2")
    status, out, _ = run(capsys, command, *words, "--cfg", "job", "--resolve")
    assert status == 0
    shown = yaml.safe_load(out)
    assert shown["model"]["attn"]["qk_norm"] == ("head" if command == "train" else "none"), "a study varies the variant"
    assert shown["optim"]["lr"] == 0.03
    assert run(capsys, command, *words, "--cfg", "job", "-p", "optim.lr")[1] == "0.03\n"
    assert run(capsys, command, *words, "-c", "hydra")[1].startswith("hydra:\n")
    assert {"hydra", "model"} < set(yaml.safe_load(run(capsys, command, "--cfg", "all")[1]))
    assert run(capsys, command, "--cfg", "job", "-p", "schedule")[1].startswith("# @package schedule\nkind: cosine\n")


def test_cfg_resolves_interpolations_if_asked_to(capsys, mine):
    folder = mine("variant/half", "# @package _global_\nschedule: {min_lr: '${optim.eps}'}\n")
    words = ("train", "--config-dir", folder, "+variant=half", "--cfg", "job", "-p", "schedule.min_lr")
    assert "min_lr: ${optim.eps}" in run(capsys, *words[:-2], "-p", "schedule")[1]
    assert "min_lr: 1.0e-08" in run(capsys, *words[:-2], "-p", "schedule", "--resolve")[1]


@pytest.mark.parametrize(
    ("info", "shown"),
    [
        ("defaults", "| model/nano "),
        ("defaults-tree", "schedule: cosine"),
        ("searchpath", "pkg://hydra.conf"),
        ("config", "n_layer: 4"),
        ("plugins", "BasicLauncher"),
        ("all", "Defaults List"),
    ],
)
def test_info_is_hydra_s(capsys, info, shown):
    status, out, _ = run(capsys, "train", "--info", info)
    assert status == 0
    assert shown in out


def test_hydra_help_lists_hydra_s_groups(capsys):
    status, out, _ = run(capsys, "train", "--hydra-help")
    assert status == 0
    assert "hydra/launcher: " in out


def test_a_primary_config_of_one_s_own(capsys, mine):
    folder = mine("own", "defaults: [config, _self_]\noptim: {lr: 0.5}\n")
    status, out, _ = run(capsys, "train", "-cd", folder, "-cn", "own", "--cfg", "job", "-p", "optim.lr")
    assert (status, out) == (0, "0.5\n")
    status, out, _ = run(capsys, "sweep", "-cd", folder, "-cn", "own", "study.lrs=[0.1,0.5]", "--dry-run")
    assert status == 0
    assert "2 learning rates" in out or "6 cells" in out
    sly = mine("sly", """defaults: [config]\nhydra: {"search\\u0070ath": ['pkg://os']}\n""")
    for name in ("sly", "sly.yaml"):
        status, _, err = run(capsys, "train", "-cd", sly, "-cn", name, "--cfg", "job")
        assert status == 2
        assert "searchpath can name code" in err


@pytest.mark.parametrize("word", ["hydra.run.dir=x", "hydra.sweep.dir=x", "hydra.job.chdir=true"])
@pytest.mark.parametrize("command", [("train",), ("train", "-m", "seed=0,1"), ("sweep", "study.lrs=[0.1]")])
def test_directories_of_hydra_are_refused(capsys, tmp_path, command, word):
    status, _, err = run(capsys, *command, word)
    assert status == 2
    assert f"{word.partition('=')[0]}: has no effect; use run_dir" in err
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_sets_a_directory_of_hydra_is_refused(capsys, mine):
    folder = mine("variant/moved", "# @package _global_\nhydra: {run: {dir: elsewhere}}\n")
    status, _, err = run(capsys, "train", "--config-dir", folder, "+variant=moved")
    assert status == 2
    assert "hydra.run.dir: has no effect" in err


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model: {attn: {soft_cap: 10.0}}\n", "# @package _global_"),
        ("\ufeff# @package _global_\nmodel: {attn: {soft_cap: 10.0}}\n", "byte-order mark"),
    ],
)
def test_a_variant_file_without_its_header_is_named(capsys, mine, text, named):
    folder = mine("variant/calm", text)
    commands = (("train", "+variant=calm"), ("sweep", "study.variants=[baseline,calm]", "study.lrs=[0.1]", "--dry-run"))
    for words in commands:
        status, _, err = run(capsys, *words, "--config-dir", folder)
        assert status == 2
        assert named in err
        assert "mine/variant/calm.yaml: " in err


@pytest.mark.parametrize("word", ["hydra.searchpath: '[pkg://this]'", "+hydra.job_logging.root.class: x"])
def test_a_file_gives_the_jobs_of_a_sweeper_no_keys_of_hydra(capsys, mine, word):
    folder = mine("experiment/sly", f"# @package _global_\nhydra: {{sweeper: {{params: {{{word}}}}}}}\n")
    status, _, err = run(capsys, "train", "-m", "--config-dir", folder, "+experiment=sly", *QUICK, "seed=0,1")
    assert status == 2
    assert "can name code to run" in err


@pytest.mark.parametrize(
    "words",
    [
        ("train", "-m", "optim.lr=interval(0.1,1)"),
        ("train", "-m", "optim.lr=glob(*)"),
        ("train", "-m", "+variant=glob(nothing*)"),
        ("sweep", "optim.lr=interval(0.1,1)"),
        ("sweep", "+variant=glob(*)", "study.lrs=[0.1]"),
    ],
)
def test_sweeps_without_a_list_of_values_are_refused(capsys, tmp_path, words):
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "")
    assert "list the values" in err
    assert "Traceback" not in err
    if "interval" in words[-1]:
        assert "study.strategy=frontier" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.plugins
@plugins_there
def test_joblib_s_launcher_trains_each_job(tmp_path):
    done = stabrun("train", "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", *QUICK, "seed=0,1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    seeds = [json.loads(file.read_text())["seed"] for file in tmp_path.glob("runs/*/summary.json")]
    assert sorted(seeds) == [0, 1]
    assert [item.name for item in tmp_path.iterdir()] == ["runs"]


OPTUNA = ("train", "-m", "hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1", *QUICK)


WORDS = ((), ("+variant=[qk_norm,soft_cap]", "schedule=wsd"), ("model=mini", "optim.clip=null"))


@pytest.mark.parametrize("words", WORDS)
def test_the_quick_composition_of_the_tests_is_hydra_s(words):
    words = (*TINY, *words, "optim.lr=3e-2", "run_dir=a/b")
    assert configured(*words) == compose(words)


@pytest.mark.plugins
@plugins_there
def test_optuna_minimizes_the_final_loss(capsys, tmp_path):
    """One of the two learning rates gives a loss that is not finite, which Optuna takes as infinite."""
    words = ("hydra.sweeper.n_trials=2", "hydra/sweeper/sampler=grid", "optim.lr=1e-2,1e18", "optim.weight_decay=0")
    status, out, err = run(capsys, *OPTUNA, *words, "optim.clip=null", "schedule.warmup_steps=1", "train.steps=25")
    assert status == 0, err
    best = yaml.safe_load(out[out.index("name: optuna") :])
    summaries = [json.loads(file.read_text()) for file in tmp_path.glob("runs/*/summary.json")]
    losses = {summary["lr"]: summary["final_loss"] for summary in summaries}
    assert set(losses) == {1e-2, 1e18}
    assert float(best["best_params"]["optim.lr"]) == 1e-2
    assert best["best_value"] == losses[1e-2]


@pytest.mark.plugins
@plugins_there
@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("hydra: {sweeper: {sampler: {_target_: os.getcwd}}}\n", ("hydra/sweeper=optuna",)),
        ("hydra: {sweeper: {search_space: {x: {_target_: os.getcwd}}}}\n", ("hydra/sweeper=optuna",)),
        ("hydra: {sweeper: {custom_search_space: os.getcwd}}\n", ("hydra/sweeper=optuna",)),
        ("defaults:\n  - override /hydra/sweeper: optuna\n", ()),
        ("hydra: {launcher: {_target_: os.getcwd}}\n", ("hydra/launcher=joblib",)),
        ("hydra: {sweeper: {_target_: os.getcwd}}\n", ()),
    ],
)
def test_a_file_names_no_code_for_a_sweeper_or_launcher(capsys, mine, tmp_path, text, typed):
    folder = mine("experiment/sly", f"# @package _global_\n{text}")
    words = ("train", "-m", *typed, "--config-dir", folder, "+experiment=sly", *QUICK, "seed=0,1")
    status, _, err = run(capsys, *words)
    assert status == 2, err
    assert "names code to run" in err
    assert [item.name for item in tmp_path.iterdir()] == ["mine"]


def test_a_plugin_that_is_not_installed_is_named_with_its_extra():
    from stabrun.composition import no_such_choice

    assert "pip install 'stabrun[plugins]'" in no_such_choice("hydra/sweeper", "optuna", "basic")


def test_judge_imports_neither_hydra_nor_torch(tmp_path):
    (tmp_path / "curve.csv").write_text("step,loss\n" + "".join(f"{i},{3 - i / 100}\n" for i in range(100)))
    program = (
        "import sys\nfrom stabrun.cli.main import dispatch\nassert dispatch(['judge', 'curve.csv']) == 0\n"
        "heavy = {'torch', 'hydra', 'wandb'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
