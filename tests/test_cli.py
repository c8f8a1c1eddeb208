import os
import re
import resource
import subprocess

import pytest
from helpers import ALL_VARIANTS, PRESETS, TINY, run, stabrun, tiny

import stabrun as package
from stabrun.training.run import train
from stabrun.verdict.chart import LEAST_ROWS


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


USER_ERRORS = [
    # words, and parts of the message: the key, the value given, the values allowed
    (["frobnicate"], ["frobnicate", "train"]),
    (["train", "+variant=nope"], ["variant=nope", "`stabrun variants`"]),
    (["train", "+variant=[qk_nrom,soft_cap]"], ["variant=qk_nrom", "Did you mean qk_norm"]),
    (["train", "+variant=perl_ln"], ["variant=perl_ln", "Did you mean peri_ln?"]),
    (["train", "variant=qk_norm"], ["+variant"]),
    (["train", "model=huge"], ["model=huge", "nano"]),
    (["train", "schedule=sawtooth"], ["schedule=sawtooth", "cosine"]),
    (["train", "optim.lrr=1"], ["optim.lrr", "optim.lr"]),
    (["train", "+optim.lrr=1"], ["optim.lrr", "optim.lr"]),
    (["train", "+foo=1"], ["foo"]),
    (["train", "+optim.lr=1"], ["optim.lr", "leave out the +"]),
    (["train", "optim.lr=fast"], ["optim.lr=fast", "Float"]),
    (["train", "train.steps=1.5"], ["train.steps=1.5", "Integer"]),
    (["train", "model.n_layer=null"], ["model.n_layer=null"]),
    (["train", "optim.lr=0"], ["optim.lr=0", "above 0"]),
    (["train", "optim.lr=-0.1"], ["optim.lr=-0.1", "above 0"]),
    (["train", "optim.lr=nan"], ["optim.lr=nan", "finite"]),
    (["train", "optim.lr=inf"], ["optim.lr=inf", "finite"]),
    (["train", "train.steps=0"], ["train.steps=0", "at least 1"]),
    (["train", "model.dropout=1"], ["model.dropout=1", "below 1"]),
    (["train", "model.n_head=3"], ["model.n_head=3", "model.d_model=64"]),
    (["train", "model.norm.kind=batch"], ["model.norm.kind=batch", "rmsnorm"]),
    (["train", "train.micro_batch_size=3"], ["train.micro_batch_size=3", "train.batch_size=16"]),
    (["train", "model.vocab_size=100"], ["model.vocab_size=100", "256"]),
    (["train", "optim.lr=20"], ["optim.weight_decay", "optim.lr=20"]),
    (["train", "data=local"], ["data.path"]),
    (["train", "data=local", "data.path=/no/such/file"], ["data.path=/no/such/file"]),
    (["train", "data=local", "data.path=/dev/zero"], ["data.path=/dev/zero", "regular file"]),
    (["train", "data=hub"], ["data.path=null", "org/name"]),
    (["train", "data.split=test"], ["data.split", "data=hub"]),
    (["train", "data.separator=''"], ["data.separator", "null"]),
    (["train", "data.tokenizer=/no/such.json"], ["data.tokenizer=/no/such.json", "no such file"]),
    (["train", "data.tokenizer=wordpiece"], ["data.tokenizer=wordpiece", "bpe", "Hub"]),
    (["train", "data.workers=0"], ["data.workers=0", "at least 1"]),
    (["train", "data.val_fraction=1e-9"], ["data.val_fraction=1e-09", "at least 0.001"]),
    (["train", "train.threads=100000"], ["train.threads=100000", "at most 1024"]),
    (["train", "data.cache_dir=/dev/null/x"], ["data.cache_dir=/dev/null/x"]),
    (["train", "train.device=cuda"], ["train.device=cuda", "cpu"]),
    (["train", "optim.lr=1e-3,1e-2"], ["optim.lr=1e-3,1e-2", "-m"]),
    (["train", "optim.lr"], ["optim.lr", "KEY=VALUE"]),
    (["train", "optim.lr=[1"], ["optim.lr=[1"]),
    (["train", "~optim"], ["~optim", "KEY=VALUE"]),
    (["train", "--lr=3"], ["--lr", "--config-dir"]),
    (["train", "-m=1", "seed=0,1"], ["no such option", "--multirun"]),
    (["train", "--cfg", "seed=1"], ["--cfg", "seed=1", "'job', 'hydra', 'all'"]),
    (["train", "--resolve"], ["--resolve", "--cfg"]),
    (["train", "-m", "--cfg", "job", "seed=0,1"], ["--multirun", "--cfg"]),
    (["train", "--cfg", "job", "-p", "optm"], ["--package optm"]),
    (["train", "-cn", "nope"], ["nope"]),
    (["train", "--config-dir", "/no/such/folder"], ["/no/such/folder"]),
    (["train", "-m", "+variant=baseline,null"], ["+variant=baseline,null"]),
    (["train", "run_dir=/dev/null/run"], ["run_dir=/dev/null/run"]),
    (["train", "+hydra.callbacks.x._target_=os.getcwd"], ["hydra.callbacks", "not allowed"]),
    (["train", "hydra.launcher._target_=os.getcwd"], ["hydra.launcher._target_=os.getcwd"]),
    (["train", "-m", "hydra.sweeper._target_=os.getcwd", "seed=0,1"], ["hydra.sweeper._target_=os.getcwd"]),
    (["train", "hydra.searchpath=[pkg://evil]"], ["hydra.searchpath", "--config-dir"]),
    (["train", "+experiment=x"], ["experiment", "quickstart"]),
    (["train", "+schedul=x"], ["schedul"]),
    (["train", "-m", "optim.lr=0.1,0"], ["optim.lr=0", "above 0"]),
    (["train", "-m", "seed=0,1", "train.steps=x"], ["train.steps=x", "Integer"]),
    (["train", f"run_dir={'x' * 300}"], ["run_dir=xxx", "too long"]),
    (["model", "--cfg"], ["--cfg", "--json"]),
    (["model", "-m", "seed=0,1"], ["-m", "--json"]),
    (["data", "prepare", "--cfg"], ["--cfg"]),
    (["rerun"], ["RUN_DIR"]),
    (["rerun", "/no/such/run"], ["/no/such/run", "config.yaml"]),
    (["judge", "/no/such/run"], ["/no/such/run", "no such file"]),
    (["variants", "all"], ["all"]),
    (["model", "model=tiny"], ["model=tiny", "micro"]),
    (["sweep", "optim.lr", "study.lrs=[1]"], ["optim.lr", "KEY=VALUE"]),
    (["sweep", "--resolve"], ["--resolve", "--cfg"]),
    (["ramp", "schedule=cosine"], ["schedule.kind=cosine", "must be ramp"]),
    (["ramp", "schedule.min_lr=0"], ["schedule.min_lr=0", "above 0"]),
    (["ramp", "optim.lr=1e-5"], ["schedule.min_lr=0.0001", "optim.lr=1e-05"]),
    (["ramp", "train.recovery=skip"], ["train.recovery=skip", "must be none"]),
    (["ramp", "-m", "seed=0,1"], ["-m", "--json"]),
    (["data"], ["data", "prepare"]),
    (["data", "clean"], ["clean", "prepare"]),
]


@pytest.mark.parametrize(("words", "named"), USER_ERRORS, ids=lambda v: " ".join(v) if isinstance(v, list) else None)
def test_user_errors_are_one_line_and_status_2(capsys, words, named):
    if "train.device=cuda" in words and __import__("torch").cuda.is_available():
        pytest.skip("there is a CUDA device")
    status, out, err = run(capsys, *words)
    assert status == 2, err
    assert out == ""
    assert err.startswith("stabrun: ")
    assert "Traceback" not in err
    assert err.count("\n") == 1, "one line"
    assert len(re.findall(r"[.!?](?:\s|$)", err)) <= 2, "two sentences at most"
    for part in named:
        assert part in err
    assert os.listdir(".") == []


@pytest.mark.parametrize(
    ("content", "named"), [(b"", "no text"), (b"\x89PNG\r\n\x1a\n\xff", "UTF-8"), (b"too short", "data.seq_len=64")]
)
def test_unusable_texts_are_refused(capsys, tmp_path, content, named):
    (tmp_path / "text.txt").write_bytes(content)
    status, _, err = run(capsys, "train", "data=local", f"data.path={tmp_path}/text.txt", "run_dir=run")
    assert status == 2
    assert named in err


def test_the_directory_of_another_experiment_is_unchanged(capsys, tmp_path):
    train(tiny(f"run_dir={tmp_path / 'run'}", "train.steps=3"))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    status, _, err = run(capsys, "train", *TINY, "train.steps=3", "optim.lr=0.5", "run_dir=run")
    assert status == 2
    assert "optim.lr=0.01 (now 0.5)" in err
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("content", [b"", b"model: [", b"- a list", b"\xff\xfe", b"foo: 3", b"seed: 0", b"just words"])
@pytest.mark.parametrize(
    "command", [["train", *TINY, "train.steps=3", "run_dir=run"], ["judge", "run"], ["rerun", "run"]]
)
def test_a_damaged_configuration_is_refused(capsys, tmp_path, content, command):
    train(tiny(f"run_dir={tmp_path / 'run'}", "train.steps=3"))
    (tmp_path / "run" / "config.yaml").write_bytes(content)
    capsys.readouterr()
    status, _, err = run(capsys, *command)
    assert status == 2
    assert "config.yaml" in err
    assert "Traceback" not in err
    assert os.listdir(".") == ["run"]


@pytest.mark.parametrize("content", ["", "junk\n", '{"step": 0}\n', '{"step": 0, "train/loss": "abc"}\n'])
def test_judge_refuses_a_file_without_rows(capsys, content, tmp_path):
    train(tiny("run_dir=run", "train.steps=3"))
    (tmp_path / "run" / "metrics.jsonl").write_text(content)
    capsys.readouterr()
    status, out, err = run(capsys, "judge", "run")
    assert (status, out) == (2, "")
    assert "metrics.jsonl" in err


def test_a_refused_job_of_a_multirun_does_not_stop_the_others(capsys, tmp_path):
    train(tiny("run_dir=runs/2", "train.steps=3", "optim.lr=0.5"))
    capsys.readouterr()
    status, _, err = run(capsys, "train", "-m", *TINY, "train.steps=3", "run_dir=runs/1,runs/2,runs/3")
    assert status == 2
    assert "runs/2: contains a run" in err
    assert "Error executing" not in err
    assert (tmp_path / "runs" / "3" / "summary.json").exists()


@pytest.mark.parametrize("steps", [LEAST_ROWS - 1, LEAST_ROWS])
def test_a_run_too_short_for_a_verdict_is_warned_about(capsys, tmp_path, steps):
    status, out, err = run(capsys, "train", *TINY, f"train.steps={steps}", "run_dir=run")
    assert status == 0
    short = steps < LEAST_ROWS
    assert ("undecided (too_short)" in out) == short
    named = f"stabrun: warning: train.steps={steps} is too short for a verdict, which needs at least {LEAST_ROWS} steps"
    assert err.startswith(named) if short else err == ""


@pytest.mark.parametrize("redirect", [">&-", ">/dev/full"])
def test_standard_output_closed_or_full(redirect):
    call = f"{__import__('sys').executable} -m stabrun variants {redirect}"
    done = subprocess.run(["bash", "-c", call], capture_output=True, text=True)
    assert done.returncode == (0 if "-" in redirect else 1)
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1


def test_sigterm_during_preparation_is_resumable(tmp_path):
    (tmp_path / "text.txt").write_text("in the beginning was the word " * 200_000)
    words = ["data", "prepare", "data=local", "data.path=text.txt", "data.tokenizer=bpe", "model.vocab_size=4096"]
    command = [__import__("sys").executable, "-m", "stabrun", *words, "data.cache_dir=cache"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("cache/*.part")):
        pass
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == "stabrun: interrupted; the same command resumes from the parts that are finished.\n"
    assert stabrun(*words, "data.cache_dir=cache", cwd=tmp_path).returncode == 0
    assert not list(tmp_path.glob("cache/*.part"))


def test_a_directory_of_other_files_is_unchanged(capsys, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("words")
    status, _, err = run(capsys, "train", *TINY, "run_dir=thesis")
    assert status == 2
    assert "not empty" in err
    assert os.listdir("thesis") == ["chapter.tex"]


def test_a_file_that_names_code_is_refused(capsys, tmp_path):
    (tmp_path / "variant").mkdir()
    sly = "# @package _global_\nhydra: {callbacks: {x: {_target_: builtins.print}}}\n"
    (tmp_path / "variant" / "sly.yaml").write_text(sly)
    status, out, err = run(capsys, "train", "--config-dir", tmp_path, "+variant=sly")
    assert (status, out) == (2, "")
    assert "hydra.callbacks" in err


def test_invalid_yaml_is_one_line(capsys, tmp_path):
    (tmp_path / "variant").mkdir()
    (tmp_path / "variant" / "bad.yaml").write_text("model: {attn: [\n")
    status, _, err = run(capsys, "train", "--config-dir", tmp_path, "+variant=bad")
    assert status == 2
    assert "bad.yaml" in err
    assert "Traceback" not in err


def limited():
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


def test_a_full_disk_is_status_1_and_resumable(capsys):
    """A file size limit takes the place of a disk that fills up while the record grows."""
    words = ["train", *TINY, "train.steps=50", "train.checkpoint_every=0", "run_dir=run"]
    assert run(capsys, "data", "prepare")[0] == 0
    stopped = stabrun(*words, cwd=".", preexec_fn=limited)
    assert stopped.returncode == 1, stopped.stderr
    assert stopped.stderr.startswith("stabrun: ")
    assert "Traceback" not in stopped.stderr
    assert len(stopped.stderr.splitlines()) == 1
    assert run(capsys, "judge", "run")[0] == 0
    status, _, err = run(capsys, *words)
    assert status == 0, err
    assert "complete" in (open("run/summary.json").read())


def test_a_file_system_that_is_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted")
    try:
        stopped = stabrun("train", *TINY, "train.steps=50", f"run_dir={disk}/run", cwd=tmp_path)
        assert stopped.returncode == 1, stopped.stderr
        assert "No space left" in stopped.stderr
        assert len(stopped.stderr.splitlines()) == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_help_and_version(capsys):
    assert run(capsys, "--help")[0] == 0
    assert run(capsys, "--version")[1] == f"stabrun {package.__version__}\n"
    assert run(capsys)[0] == 2


COMMANDS = {
    "train": ("--multirun", "--cfg", "-cd, --config-dir", "-cn, --config-name", "--hydra-help", "optim.lr"),
    "ramp": ("--json", "--cfg", "schedule.min_lr"),
    "sweep": ("--dry-run", "--cfg", "--info", "study.lrs"),
    "status": ("--json",),
    "rerun": ("--cfg",),
    "judge": ("--follow", "--against", "--step", "--loss", "--split", "--json"),
    "report": ("[OTHER]",),
    "pack": ("--every",),
    "unpack": ("[DIR]",),
    "upload": ("--dry-run",),
    "dashboard": ("[STUDY_DIR]", "--dry-run"),
    "model": ("--trace", "--json", "--config-dir"),
    "variants": ("--config-dir", "--json"),
    "data prepare": ("--config-dir", "data.workers"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(capsys, command):
    status, out, err = run(capsys, *command.split(), "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"Usage: stabrun {command} [OPTIONS]")
    for part in ("Examples:", f"stabrun {command}", "Exit status: ", *COMMANDS[command]):
        assert part in out
    if command in ("train", "sweep", "model"):
        for name in (*ALL_VARIANTS, *PRESETS, "quickstart", "inverse_sqrt"):
            assert re.search(rf"\b{name}\b", out)
    assert out in run(capsys, *command.split(), "-h")[1]


def test_help_and_variants_import_nothing_heavy(tmp_path):
    ask = (
        "import sys\nfrom stabrun.cli.main import cli, dispatch\n"
        "NAMES = [[], *([name] for name in cli.commands), ['data', 'prepare']]\n"
        "assert [dispatch([*name, '--help']) for name in NAMES] == [0] * len(NAMES); dispatch(['variants'])\n"
        "heavy = {'torch', 'hydra', 'omegaconf', 'wandb', 'numpy', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([__import__("sys").executable, "-c", ask], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_model_names_the_device_of_its_memory(capsys, device):
    """The memory of a cap is another with each: CUDA has a fused kernel."""
    status, out, _ = run(capsys, "model", "model=830m", "+variant=soft_cap", f"train.device={device}")
    assert status == 0
    assert f"memory of a step of 4 sequences in bf16 on {device}: an estimate; the parts do not all exist" in out


def test_model_as_json(capsys):
    import json

    status, out, _ = run(capsys, "model", "model=830m", "--json")
    facts = json.loads(out)
    assert status == 0
    assert 826e6 <= facts["parameters"]["total"] <= 831e6
    assert facts["memory"]["peak_bytes"] > 16 * facts["parameters"]["total"]
    assert facts["flops_per_token"] > 6 * 302e6


def test_judge_repeats_the_verdict_of_the_run(capsys, tmp_path):
    import json

    summary = train(tiny("run_dir=run", "train.steps=60"))
    capsys.readouterr()
    _, out, _ = run(capsys, "judge", "run", "--json")
    assert json.loads(out)["verdict"] == summary["verdict"]
    assert summary["verdict"] in run(capsys, "judge", "run")[1]


def test_data_prepare_prints_the_directory(capsys, tmp_path):
    status, out, _ = run(capsys, "data", "prepare", f"data.cache_dir={tmp_path / 'c'}")
    assert status == 0
    assert "3,941,242 training" in out
    assert str(tmp_path / "c") in out
