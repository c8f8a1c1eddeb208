"""Shell completion: the candidates by click's protocol, and the scripts in the shells themselves."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import ALL_VARIANTS, PRESETS, run

from stabrun.cli.completion import SHELLS
from stabrun.cli.overrides import complete
from stabrun.config import keys

EXPECTED = [
    # what has been typed, some of the candidates, and what must not be among them
    ("stabrun ", {"train", "sweep", "judge", "data"}, {"prepare"}),
    ("stabrun tr", {"train"}, {"sweep"}),
    ("stabrun to", {"top"}, {"train"}),
    ("stabrun ra", {"ramp"}, {"train"}),
    ("stabrun data ", {"prepare"}, {"train"}),
    ("stabrun train --c", {"--cfg", "--config-dir", "--config-name"}, {"--resolve"}),
    ("stabrun train --cfg ", {"job", "hydra", "all"}, set()),
    ("stabrun train ", {"+variant=", "model=", "optim.", "seed="}, {"variant=", "+model="}),
    ("stabrun train +variant=", {f"+variant={name}" for name in ALL_VARIANTS}, set()),
    ("stabrun train +variant=qk", {"+variant=qk_norm", "+variant=qk_norm_cap"}, {"+variant=baseline"}),
    ("stabrun train +variant=[qk_norm,soft_c", {"+variant=[qk_norm,soft_cap"}, {"+variant=[qk_norm,qk_norm"}),
    ("stabrun train model=", {f"model={name}" for name in PRESETS}, set()),
    ("stabrun train -m model=nano,mi", {"model=nano,micro", "model=nano,mini"}, {"model=mini"}),
    ("stabrun train optim.", {"optim.lr=", "optim.clip="}, {"seed="}),
    ("stabrun train model.", {"model.n_layer=", "model.attn."}, {"model.attn.qk_norm="}),
    ("stabrun train train.precision=", {"train.precision=bf16", "train.precision=fp32"}, set()),
    ("stabrun train model.bias=", {"model.bias=true", "model.bias=false"}, {"model.bias=null"}),
    ("stabrun train train.compile=", {"train.compile=true"}, set()),
    ("stabrun ramp schedule.", {"schedule.min_lr="}, set()),
    ("stabrun sweep study.str", {"study.strategy="}, set()),
    ("stabrun sweep study.variants=", {f"study.variants={name}" for name in ALL_VARIANTS}, set()),
    ("stabrun sweep study.variants=[qk_norm+soft_c", {"study.variants=[qk_norm+soft_cap"}, set()),
    ("stabrun sweep study.variants=[qk_norm+soft_cap,bas", {"study.variants=[qk_norm+soft_cap,baseline"}, set()),
    ("stabrun upload run tracker.pro", {"tracker.project="}, set()),
    ("stabrun rerun run ", {"optim.", "seed="}, {"+variant=", "model="}),
    ("stabrun upload run op", set(), {"optim."}),
    ("stabrun model --js", {"--json"}, set()),
]


@pytest.fixture
def shell(tmp_path):
    """Runs a program in a shell whose `stabrun` is the one under test; returns its output."""
    program = tmp_path / "bin" / "stabrun"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m stabrun "$@"\n')
    program.chmod(0o755)

    def ask(name, text):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
        env = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
        done = subprocess.run([name, "-c", text], capture_output=True, text=True, env=env, cwd=tmp_path)
        assert done.stderr == ""
        return done.stdout

    return ask


def candidates(shell, line):
    """What click's protocol answers for a shell."""
    env = (
        os.environ
        | {
            "bash": {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_WORDBREAKS": ""},
            "zsh": {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - (not line.endswith(" ")))},
            "fish": {"COMP_WORDS": line, "COMP_CWORD": "" if line.endswith(" ") else line.split()[-1]},
        }[shell]
    )
    command = [sys.executable, "-m", "stabrun"]
    env["_STABRUN_COMPLETE"] = f"{shell}_complete"
    lines = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    if shell == "zsh":
        return {
            value.replace("\\:", ":") for kind, value in zip(lines[::3], lines[1::3], strict=True) if kind == "plain"
        }
    return {text.partition("\t")[0] for kind, _, text in (line.partition(",") for line in lines) if kind == "plain"}


def in_process(capsys, monkeypatch, line):
    for name, value in {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_WORDBREAKS": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("_STABRUN_COMPLETE", "bash_complete")
    status, out, _ = run(capsys)
    assert status == 0
    return {text for kind, _, text in (line.partition(",") for line in out.splitlines()) if kind == "plain"}


@pytest.mark.parametrize(("line", "wanted", "unwanted"), EXPECTED, ids=[line for line, _, _ in EXPECTED])
def test_candidates(capsys, monkeypatch, line, wanted, unwanted):
    found = in_process(capsys, monkeypatch, line)
    assert wanted <= found
    assert not unwanted & found
    if line.endswith(("variant=", "model=", "--cfg ")):
        assert found == wanted


def test_every_key_can_be_completed(capsys, monkeypatch):
    sections = {key.path.rpartition(".")[0] for key in keys()} - {""}
    found = set().union(*(in_process(capsys, monkeypatch, f"stabrun train {name}.") for name in sections))
    assert {f"{key.path}=" for key in keys() if "." in key.path} <= found


def test_a_directory_of_one_s_own_is_completed_too(capsys, monkeypatch, tmp_path):
    (tmp_path / "variant").mkdir()
    (tmp_path / "variant" / "calm.yaml").write_text("# @package _global_\n")
    found = in_process(capsys, monkeypatch, f"stabrun train -cd {tmp_path} +variant=ca")
    assert found == {"+variant=calm"}
    found = in_process(capsys, monkeypatch, f"stabrun sweep --config-dir={tmp_path} study.variants=[qk_norm+ca")
    assert found == {"study.variants=[qk_norm+calm"}


def test_the_description_of_a_variant_is_its_definition_without_its_group():
    described = dict(complete("+variant="))
    assert described["+variant=soft_cap"] == "softmax(c·tanh(logit/c)) with c = 50. [2410.16682]"


@pytest.mark.parametrize("shell", ["zsh", "fish"])
@pytest.mark.parametrize("line", ["stabrun train model=mi", "stabrun tr", "stabrun train optim."])
def test_zsh_and_fish_receive_the_candidates_of_bash(capsys, monkeypatch, shell, line):
    assert candidates(shell, line) == in_process(capsys, monkeypatch, line) != set()


SOURCE = 'eval "$(_STABRUN_COMPLETE=bash_source stabrun)"\n'
BASH = """
COMP_LINE='{line}' COMP_POINT=${{#COMP_LINE}} COMP_TYPE=9
_stabrun_completion stabrun 2>/dev/null  # compopt complains outside of an interactive shell
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("line", "replies"),
    [
        ("stabrun train model=mi", ["micro", "mini"]),  # bash replaces what follows the `=`
        ("stabrun train train.precision=", ["fp32", "tf32", "bf16", "fp16"]),
        ("stabrun train train.prec", ["train.precision="]),
        ("stabrun train +variant=qk_norm_", ["qk_norm_cap"]),
        ("stabrun tr", ["train"]),
    ],
)
def test_the_script_in_bash(shell, line, replies):
    assert shell("bash", SOURCE + BASH.format(line=line)).splitlines() == replies


def test_bash_without_the_equals_sign_among_its_word_breaks(shell):
    text = SOURCE + "COMP_WORDBREAKS=' '" + BASH.format(line="stabrun train model=mi")
    assert shell("bash", text).splitlines() == ["model=micro", "model=mini"]


def test_the_script_in_fish(shell):
    text = "_STABRUN_COMPLETE=fish_source stabrun | source; complete -C 'stabrun train model=mi'"
    assert [line.split("\t")[0] for line in shell("fish", text).splitlines()] == ["model=micro", "model=mini"]


def test_the_script_in_zsh(shell):
    """zsh completes in its line editor only: the completion functions are replaced by ones that print."""
    text = """
    compdef() { :; }
    _describe() { print -rl -- ${(P)3}; }
    eval "$(_STABRUN_COMPLETE=zsh_source stabrun)"
    words=(stabrun train model=mi) CURRENT=3
    _stabrun_completion
    """
    assert [line.partition(":")[0] for line in shell("zsh", text).splitlines()] == ["model=micro", "model=mini"]


@pytest.mark.parametrize("name", SHELLS)
def test_installation_says_what_it_wrote_and_is_repeatable(capsys, monkeypatch, tmp_path, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("ZDOTDIR", raising=False)
    for words in ((name,), ()):  # the second time the shell is found by itself
        monkeypatch.setenv("SHELL", f"/usr/bin/{name}")
        status, out, _ = run(capsys, "--install-completion", *words)
        assert status == 0
    written = sorted(str(file) for file in tmp_path.rglob("*") if file.is_file())
    assert all(file in out for file in written)
    assert len(written) == (1 if name == "fish" else 2)
    startup = tmp_path / f".{name}rc"
    if startup.exists():
        assert len([line for line in startup.read_text().splitlines() if line]) == 1
    status, _, err = run(capsys, "--install-completion", "tcsh")
    assert status == 2
    assert "bash, zsh, fish" in err


def test_installed_completion_works_in_a_new_bash(shell, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    run(capsys, "--install-completion", "bash")
    text = ". ~/.bashrc" + BASH.format(line="stabrun train model=mi")
    assert shell("bash", text).splitlines() == ["micro", "mini"]


def test_completion_imports_nothing_heavy():
    program = (
        "import sys\nfrom stabrun.cli.overrides import complete\nimport stabrun.cli.main\nlist(complete('optim.'))\n"
        "heavy = {'torch', 'hydra', 'omegaconf', 'wandb', 'numpy', 'rich', 'yaml'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
