"""Configurations from outside: nothing in them runs, tells a secret, leaves its directory, or ends in a traceback."""

import pytest
from helpers import TINY, run

from stabrun.composition import SHIPPED, compose, multirun, override
from stabrun.config import Config, UserError
from stabrun.study.question import planned
from stabrun.text import aligned, run_name, shown

QUICK = (*TINY, "train.steps=2", "train.checkpoint_every=0")
SECRET = "marker-of-a-secret"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Writes a variant of the user's, and returns the overrides that choose it. Its name is `mine`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("BASE_URL", f"https://me:{SECRET}@host")

    def write(text, name="variant/mine"):
        file = tmp_path / "conf" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# @package _global_\n{text}\n")
        return tmp_path / "conf"

    return write


def refusal(overrides, folder=None):
    with pytest.raises(UserError) as refused:
        compose(overrides, folder)
    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < 400
    return str(refused.value)


@pytest.mark.parametrize("key", ["study.lrs", "study.variants", "study.lr_range", "tracker.tags"])
@pytest.mark.parametrize("value", ["${optim.lr}", "${optim}", "${variant}"])
def test_an_interpolation_of_a_wrong_type_is_refused(key, value):
    words = ["study.variants=[baseline]"] if key == "tracker.tags" else []
    assert key in refusal([*words, f"{key}={value}"])


def test_an_interpolation_of_the_right_type_is_taken():
    assert compose(["study.lrs=[0.1,1]", "study.lr_range=${study.lrs}"]).study.lr_range == [0.1, 1.0]


def test_a_configuration_made_in_python_is_checked_by_type():
    from dataclasses import replace

    from stabrun.config import check

    check(Config())
    for wrong, key in (({"seed": 0.5}, "seed"), ({"seed": True}, "seed"), ({"variant": None}, "variant")):
        with pytest.raises(UserError, match=f"^{key}="):
            check(replace(Config(), **wrong))


LAUGHS = "\n".join(f"  {b}: &{b} [{','.join([f'*{a}'] * 10)}]" for a, b in zip("abcdef", "bcdefg", strict=True))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("defaults: [mine]", "defaults list names its own file"),
        ("model: &a {attn: *a}", "contains itself"),
        ("tracker: {tags: &a [x, *a]}", "contains itself"),
        (f"model:\n  a: &a [x]\n{LAUGHS}", "values"),
        ("tracker: {tags: " + "[" * 2000 + "]" * 2000 + "}", "depth"),
        ("tracker: {tags: " + "[" * 200 + "]" * 200 + "}", "deeper"),
        ("tracker: " + "{a: " * 200 + "1" + "}" * 200, "deeper"),
        ("tracker:\n" + "".join(" " * depth + "a:\n" for depth in range(1, 200)), "deeper"),
        ("tags: [" + "x," * 60_000 + "]", "larger"),
    ],
)
def test_endless_yaml_is_refused(mine, text, why):
    assert why in refusal(["+variant=mine"], mine(text))


def test_files_that_name_each_other_are_refused(mine):
    mine("defaults: [other]", "variant/mine")
    folder = mine("defaults: [mine]", "variant/other")
    assert "names its own file, or one that names it" in refusal(["+variant=mine"], folder)


def test_aliases_that_repeat_a_little_are_read(mine):
    folder = mine("tracker: {project: &a calm, group: *a}")
    assert compose(["+variant=mine"], folder).tracker.group == "calm"


@pytest.mark.parametrize(("start", "end"), [("[", "]"), ("{a:", "}"), ("[", ""), ("${", "}"), ("(", ")")])
def test_nested_overrides_are_refused(start, end):
    nested = f"tracker.tags={start * 2000}{end * 2000}"
    assert "nested deeper than" in refusal([nested])
    with pytest.raises(UserError):
        planned([nested, "study.lrs=[0.1]"])


def test_nested_overrides_of_a_record_are_refused():
    for value in ("[" * 2000, "[&a [x,x],&b [*a,*a]," + "[" * 50, "${nothing}", "${optim.lr}"):
        with pytest.raises(UserError):
            override(Config(), [f"tracker.tags={value}"])


@pytest.mark.parametrize("words", [["seed=range(0,10000000000)", "study.lrs=[0.1]"], ["optim.lr=range(1,100000000)"]])
def test_more_runs_than_anyone_can_train_are_refused(words):
    with pytest.raises(UserError, match="more than 100,000 runs"):
        planned(words)
    with pytest.raises(UserError, match="more than 100,000 runs"):
        multirun(words, SHIPPED, lambda config: 0.0)


CODE = (
    "variant: !!python/object/apply:os.mkdir [pwned]",
    "model: {_target_: os.mkdir}",
    "hydra: {callbacks: {a: {_target_: os.mkdir, path: pwned}}}",
    "hydra: {callbacks: '${oc.create:{a: {_target_: os.mkdir}}}'}",
    "hydra: {launcher: {_target_: os.mkdir, path: pwned}}",
    "hydra: {sweeper: {_target_: os.mkdir, path: pwned}}",
    "hydra: {sweeper: null}",
    "hydra: {job: {env_set: {LD_PRELOAD: pwned}}}",
    "hydra: {job: {env_copy: [WANDB_API_KEY]}}",
    "hydra: {overrides: {hydra: ['+hydra.callbacks.a={_target_: os.mkdir, path: pwned}']}}",
    "hydra: {overrides: {task: ['+variant=../../pwned']}}",
    "hydra: {job_logging: {handlers: {a: {class: logging.FileHandler, filename: pwned}}}}",
    "hydra: {job_logging: {handlers: {a: {stream: 'ext://antigravity.x'}}}}",
    "hydra: {job_logging: '${oc.create:{handlers: {a: {class: os.mkdir}}}}'}",
    "hydra: {job_logging: {a: '${tracker}'}}",
    "hydra: {output_subdir: ../pwned}",
)


@pytest.mark.parametrize("text", CODE)
def test_nothing_in_a_file_is_run(capsys, mine, tmp_path, text):
    folder = mine(text)
    status, out, err = run(capsys, "train", "-m", "seed=0,1", "--config-dir", folder, "+variant=mine", *QUICK)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert SECRET not in err
    assert [item.name for item in tmp_path.iterdir()] == ["conf"]


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "BASE_URL", "wandb_api_key"])
def test_a_secret_of_the_environment_is_not_read(capsys, mine, monkeypatch, name):
    monkeypatch.setenv("wandb_api_key", SECRET)
    mine(f"defaults: ['${{oc.env:{name}}}']", "variant/sly")
    folder = mine(f"tracker: {{project: '${{oc.env:{name}}}'}}")
    ways = ([f"seed=${{oc.env:{name}}}"], ["+variant=mine"], ["+variant=sly"], ["+variant=mine", "--cfg", "job"])
    for words in ways:
        status, out, err = run(capsys, "train", "--config-dir", folder, *words, "--resolve" if words[1:] else "seed=1")
        assert status == 2
        assert ("looks" if words != ["+variant=sly"] else "interpolation") in err
        assert SECRET not in out + err


def test_other_variables_of_the_environment_are_read(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    assert compose(["tracker.group=${oc.env:SLURM_JOB_ID}"]).tracker.group == "1234"
    assert compose(["tracker.group=${oc.env:NOT_THERE,x}"]).tracker.group == "x"


@pytest.mark.parametrize("name", ["../x", "/x", "", "x" * 101, "a/b", "'a\x1b[2J'", "é" * 51])
def test_the_name_of_a_study_stays_below_its_directory(name):
    with pytest.raises(UserError, match=r"study\.name"):
        planned([f"study.name={name or chr(39) * 2}", "study.lrs=[0.1]"])


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "../../secret", "a/../../../secret"])
def test_a_choice_stays_in_its_directory(mine, tmp_path, name):
    folder = mine("seed: 1")
    (tmp_path / "secret.yaml").write_text("# @package _global_\nseed: 7\n")
    refusal([f"+variant={name}"], folder)
    refusal([f"+variant={name}"])
    mine(f"defaults: ['{name}']", "variant/sly")
    refusal(["+variant=sly"], folder)


def test_control_characters_are_shown_as_escapes():
    assert shown("a\x1b[31m\n\x07\x9b\u202e\ud800é日") == r"a\x1b[31m\n\x07\x9b\u202e\ud800é日"


@pytest.mark.parametrize("name", ["a\x1b[31mred", "<img src=x>", "[red]x", "\u202ex"])
def test_a_variant_s_name_is_not_obeyed(capsys, mine, name):
    folder = mine("seed: 1", f"variant/{name}")
    assert shown(name) in run(capsys, "variants", "-cd", folder)[1]
    for words in (
        ("sweep", "-cd", folder, f"study.variants=['{name}']", "study.lrs=[0.1]", "study.seeds=1", "--dry-run"),
        ("train", f"+variant='{name}'"),
    ):
        _, out, err = run(capsys, *words, *QUICK)
        assert not {"\x1b", "\u202e"} & {*out, *err}


def test_a_study_shows_names_as_escapes():
    name = "a\x1b[31mred"
    assert run_name(name, 0.1, 0) == r"a\x1b[31mred lr=0.1 s0"
    assert list(aligned([[name, "1"], ["b", "2"]])) == [r"a\x1b[31mred  1", "b             2"]
