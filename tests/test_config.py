import dataclasses
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from helpers import ALL_VARIANTS, PRESETS, configured, stabrun, tiny

from stabrun.config import RESULT, Config, UserError, check, conf_dir, keys, marked, run_id

ROOT = Path(__file__).parent.parent


def test_every_key_has_a_mark_and_a_description():
    for key in keys():
        assert key.mark in ("result", "resource", "view")
        assert key.doc


def test_run_id_hashes_the_result_keys_alone():
    here = tiny()
    assert run_id(here) == run_id(tiny("train.threads=2", "observe.every=0", "run_dir=elsewhere", "tracker=wandb"))
    assert run_id(here) == run_id(tiny("+variant=baseline"))
    changed = ["optim.lr=1e-3", "seed=1", "+variant=qk_norm", "schedule=constant", "train.precision=bf16"]
    assert len({run_id(here), *(run_id(tiny(word)) for word in changed)}) == 1 + len(changed)


def test_the_same_result_keys_are_the_same_run():
    assert run_id(tiny("+variant=soft_cap")) == run_id(tiny("model.attn.soft_cap=50"))


@pytest.mark.parametrize("name", ALL_VARIANTS)
def test_variant_is_named_and_is_a_few_lines(name):
    config = tiny(f"+variant={name}")
    assert config.variant == name
    text = (conf_dir() / "variant" / f"{name}.yaml").read_text()
    assert len([line for line in text.splitlines() if not line.startswith("#")]) <= (
        9 if "# architecture" in text else 5
    )
    touched = marked(config, RESULT).items() - marked(tiny(), RESULT).items()
    assert bool(touched) == (name != "baseline")
    assert all(path.startswith(("model.", "optim.")) for path, _ in touched)


def test_variants_combine():
    both = tiny("+variant=[qk_norm,soft_cap]")
    assert both.variant == "qk_norm+soft_cap"
    assert run_id(both) == run_id(tiny("+variant=qk_norm_cap"))


@pytest.mark.parametrize("name", PRESETS)
def test_preset_composes(name):
    config = configured(f"model={name}")
    check(config)
    assert config.model.n_layer >= 4


@pytest.mark.parametrize("key", [k for k in keys() if k.bounds], ids=lambda k: k.path)
def test_values_at_and_beyond_each_bound(key):
    below, above = (-(10**12), 10**12) if "int" in str(key.type) else (-1e12, 1e12)
    wrong = {
        "named": lambda b: "a" * (b + 1),
        "above": lambda b: b,
        "below": lambda b: b,
        "at_least": lambda b: below,
        "at_most": lambda b: above,
        "allowed": lambda b: "nonsense",
    }
    for bound, limit in key.bounds.items():
        value = wrong[bound](limit)
        problem = key.problem(value)
        assert problem is not None
        assert key.path in problem
        assert str(value) in problem
    assert key.problem(float("nan")) or "allowed" in key.bounds


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": {"n_head": 3}}, "model.n_head"),
        ({"model": {"n_head": 64}}, "model.position.rope_fraction"),
        ({"train": {"micro_batch_size": 5}}, "train.micro_batch_size"),
        ({"schedule": {"min_lr": 1.0}}, "schedule.min_lr"),
        ({"optim": {"lr": 20.0}}, "optim.weight_decay"),
        ({"data": {"name": "local"}}, "data.path"),
        ({"data": {"path": "x"}}, "data.path"),
    ],
)
def test_keys_that_do_not_fit_each_other(change, named):
    config = Config()
    for part, values in change.items():
        setattr(config, part, dataclasses.replace(getattr(config, part), **values))
    with pytest.raises(UserError, match=named):
        check(config)


def test_multirun_trains_each_job(tmp_path):
    words = [
        "train",
        "-m",
        "+variant=baseline,qk_norm",
        "seed=0,1",
        "train.steps=2",
        "tracker=none",
        "model.d_model=16",
    ]
    done = stabrun(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summaries = [json.loads(file.read_text()) for file in tmp_path.glob("runs/*/summary.json")]
    assert {(s["variant"], s["seed"]) for s in summaries} == {(v, s) for v in ("baseline", "qk_norm") for s in (0, 1)}


def test_a_variant_of_the_user(tmp_path):
    (tmp_path / "mine" / "variant").mkdir(parents=True)
    (tmp_path / "mine" / "variant" / "calm.yaml").write_text("# @package _global_\nmodel: {attn: {soft_cap: 10.0}}\n")
    done = stabrun("train", "--cfg", "job", "--config-dir", tmp_path / "mine", "+variant=calm", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "soft_cap: 10.0" in done.stdout
    assert "variant: calm" in done.stdout


def test_an_installed_wheel_contains_its_configuration(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    wheel = next(tmp_path.glob("*.whl"))
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(site)], check=True)
    # Dependencies come from this environment, stabrun itself from the wheel alone.
    own = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(own) + "\n")
    ask = "import stabrun, sys; print(stabrun.__file__)"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = subprocess.run(
        [python, "-c", ask], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    ).stdout
    assert where.startswith(str(site))
    words = ["train", "+variant=qk_norm_cap", "train.steps=2", "tracker=none"]
    done = subprocess.run([python, "-m", "stabrun", *words], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "undecided (too_short)" in done.stdout
