import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from helpers import RICH, TINY, a_trainer, configured, events, metrics, tiny, train_interrupted
from helpers import run as stabrun
from safetensors.torch import load_file

from stabrun.composition import override
from stabrun.config import UserError
from stabrun.data import tokenizer
from stabrun.data.shards import prepare
from stabrun.model.gpt import GPT
from stabrun.record.jsonl import read_checked, sealed
from stabrun.record.run_dir import RunDir
from stabrun.training import checkpoint, memory, run
from stabrun.training.optimizer import make_optimizer
from stabrun.training.run import Run, train
from stabrun.verdict.judge import Judge


def test_a_run_leaves_all_its_files(tmp_path):
    summary = train(tiny(f"run_dir={tmp_path / 'run'}"))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    files = {"config.yaml", "environment.json", "metrics.jsonl", "events.jsonl", "summary.json", "checkpoints"}
    files |= {"tokenizer.json"}
    assert names - {".lock"} == files
    assert read_checked(tmp_path / "run" / "summary.json") == summary
    assert summary["status"] == "complete"
    assert summary["steps"] == 30
    assert summary["tokens"] == 30 * 4 * 16
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["threads"] == 1
    assert environment["device"].startswith(("cpu", "NVIDIA"))


def test_a_run_keeps_its_tokenizer(tmp_path, monkeypatch):
    """Its file is that of the prepared data, and decodes what the model was trained on."""
    words = "data.tokenizer=bpe", "model.vocab_size=300", f"data.cache_dir={tmp_path / 'cache'}"
    config = tiny(*words, "train.steps=2", f"run_dir={tmp_path / 'run'}")
    train(config)
    prepared = prepare(config.data, config.model)
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (prepared.folder / "tokenizer.json").read_bytes()
    shutil.rmtree(tmp_path / "cache")
    kept = tokenizer.load(tmp_path / "run" / "tokenizer.json")
    assert kept.decode(prepared.train.read(0, 40)).startswith("In the beginning God created")


def test_same_configuration_same_bytes(tmp_path, whole):
    train(tiny(*RICH, f"run_dir={tmp_path / 'again'}"))
    assert metrics(tmp_path / "again") == whole


def test_the_learning_rate_does_not_change_the_data(tmp_path):
    first = []
    for rate in ("1e-4", "1e-1"):
        train(tiny(f"optim.lr={rate}", f"run_dir={tmp_path / rate}", "train.steps=2"))
        first.append(next(RunDir(tmp_path / rate).rows())["train/loss"])
    assert first[0] == first[1]


STEPS = (0, 7, 8, 17, 28, 29)  # at a checkpoint, after it, at a validation, and at both ends


@pytest.mark.parametrize("at", [pytest.param(n, marks=[pytest.mark.slow] * (n not in STEPS)) for n in range(30)])
def test_interrupted_at_any_step_and_resumed(tmp_path, whole, monkeypatch, at):
    config = tiny(*RICH, f"run_dir={tmp_path / 'run'}")
    first = train_interrupted(config, monkeypatch, at)
    last = at == 29
    assert first["status"] == ("complete" if last else "interrupted")
    assert first["steps"] == at + 1
    if not last:
        assert train(config)["status"] == "complete"
    assert metrics(tmp_path / "run") == whole


def test_the_last_update_breaks_the_model(tmp_path, monkeypatch, capsys):
    """Its weights are not finite, which only the validation after it shows."""
    monkeypatch.chdir(tmp_path)
    words = (
        "train",
        *TINY,
        "train.steps=1",
        "schedule.warmup_steps=0",
        "schedule.kind=constant",
        "optim.lr=1e38",
        "optim.weight_decay=0",
    )
    status, out, err = stabrun(capsys, *words, "run_dir=run")
    summary = RunDir(tmp_path / "run").summary()
    assert (status, summary["verdict"], summary["reason"], summary["val_loss"]) == (
        0,
        "diverged",
        "nonfinite_val",
        "nan",
    )
    assert "validation loss nan, perplexity nan" in out, err


def test_ctrl_c_in_the_terminal_and_resumed(tmp_path, whole):
    command = [sys.executable, "-m", "stabrun", "train", *TINY, *RICH, "run_dir=run"]
    codes = []
    for start in (1, 2):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while process.poll() is None and len(events(tmp_path / "run", "start")) < start:
            time.sleep(0.01)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert "Traceback" not in output
        codes.append(process.returncode)
    assert set(codes) <= {0, 130}
    assert train(tiny(*RICH, f"run_dir={tmp_path / 'run'}"))["status"] == "complete"
    assert metrics(tmp_path / "run") == whole


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow), 20])
def test_killed_and_resumed(tmp_path, whole, rows):
    words = ["train", *TINY, *RICH, "run_dir=run"]
    program = (
        "import os, signal, sys\n"
        "from stabrun.record.run_dir import RunWriter\n"
        "write, count = RunWriter.write, [0]\n"
        "def deadly(self, row):\n"
        "    write(self, row)\n"
        "    count[0] += 1\n"
        f"    if count[0] == {rows}:\n"
        "        self.file.write('{\"step\": ')\n"  # half a line, as a kill leaves it
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "RunWriter.write = deadly\n"
        "from stabrun.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, *words], cwd=tmp_path, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    train(tiny(*RICH, f"run_dir={tmp_path / 'run'}"))
    assert metrics(tmp_path / "run") == whole
    assert len(events(tmp_path / "run", "start")) == 2


def test_training_does_not_import_the_compiler(tmp_path):
    """torch imports it, which takes 3 s, in its optimizers and where it sets determinism."""
    program = (
        "import sys\n"
        "from stabrun.cli.main import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit as done:\n"
        "    sys.exit(done.code or {'torch._dynamo', 'torch._inductor'} & set(sys.modules) or 0)\n"
    )
    command = [sys.executable, "-c", program, "train", *TINY, "train.compile=false", "run_dir=run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    config = tiny(f"run_dir={tmp_path / 'run'}", "train.steps=3")
    first = train(config)
    monkeypatch.setattr(run, "Trainer", None)
    assert train(config) == first


def test_observation_does_not_change_a_bit_of_the_losses(tmp_path):
    kept = []
    for every in (1, 0):
        config = tiny(*RICH, f"observe.every={every}", f"run_dir={tmp_path / str(every)}")
        train(config)
        rows = RunDir(tmp_path / str(every)).rows()
        kept.append([(r["step"], r["train/loss"], r["grad/norm"], r.get("val/loss")) for r in rows])
    assert kept[0] == kept[1]


def test_divergence_is_a_result(tmp_path):
    config = tiny("optim.lr=1e18", "optim.weight_decay=0", "optim.clip=null", f"run_dir={tmp_path / 'run'}")
    summary = train(config)
    assert summary["status"] == "stopped"
    assert summary["verdict"] == "diverged"
    assert summary["reason"].startswith("nonfinite")
    rows = list(RunDir(tmp_path / "run").rows())
    assert rows[-1]["step"] == summary["first_bad_step"] == summary["horizon"]
    assert "nan" in metrics(tmp_path / "run").decode() or "inf" in metrics(tmp_path / "run").decode()
    assert train(config) == summary


@pytest.mark.parametrize(
    ("words", "verdict"),
    [(("optim.lr=0.3",), "diverged"), (("+variant=qk_norm", "optim.lr=0.01"), "converged")],
)
def test_the_edge_at_nano(tmp_path, words, verdict):
    fixed = ("schedule=constant", "schedule.warmup_steps=50", "train.steps=150", "train.threads=1", "tracker=none")
    summary = train(
        configured(*fixed, *words, "train.batch_size=8", f"run_dir={tmp_path / 'run'}", "train.val_every=0")
    )
    assert summary["verdict"] == verdict
    assert isinstance(summary["final_loss"], float)
    assert (summary["first_bad_site"] is not None) == (verdict == "diverged")


def test_a_checkpoint_contains_everything_to_resume(tmp_path):
    config = tiny("+variant=sigma_reparam", "model.tied=true", "model.position.kind=learned")
    config = dataclasses.replace(config, run_dir=str(tmp_path / "run"))
    train(config)
    step, path = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert step == 30
    model = GPT(config.model, config.data.seq_len, seed=99)
    optimizer = make_optimizer(model, config.optim)
    checkpoint.load(path, model, optimizer)
    state = load_file(path / "model.safetensors")
    assert {"blocks.0.mlp.layer.fc1.u", "embed.weight"} <= set(state)
    assert "head.weight" not in state
    for name, parameter in model.named_parameters():
        assert parameter.equal(state[name])
        assert float(optimizer.state[parameter]["step"]) == 30
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_an_incomplete_checkpoint_is_ignored(tmp_path):
    config = tiny(*RICH, f"run_dir={tmp_path / 'run'}")
    train(config)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "incomplete").mkdir()
    (folder / "step_00000099").mkdir()
    assert checkpoint.latest(folder)[0] == 30


def test_only_one_process_trains_in_a_run_directory(tmp_path, monkeypatch):
    config = tiny(f"run_dir={tmp_path / 'run'}")
    refused = []

    def meddle(self, stop=None):
        with pytest.raises(UserError, match="another process") as error:
            train(config)
        refused.append(error)
        return start(self, stop)

    start = Run.start
    monkeypatch.setattr(Run, "start", meddle)
    train(config)
    assert len(refused) == 1


def test_rerun_gives_the_same_record(tmp_path, monkeypatch, capsys, whole):
    monkeypatch.chdir(tmp_path)
    for words in (
        ["train", *TINY, *RICH, "run_dir=run"],
        ["rerun", "run"],
        ["rerun", "run", "seed=5", "run_dir=other"],
    ):
        status, _, err = stabrun(capsys, *words)
        assert status == 0, err
    (again,) = (tmp_path / "runs").iterdir()
    assert metrics(again) == whole == metrics(tmp_path / "run")
    assert metrics(tmp_path / "other") != whole


def test_bf16_keeps_fp32_master_weights(tmp_path):
    config = tiny("train.precision=bf16", "train.steps=3", f"run_dir={tmp_path / 'run'}")
    summary = train(config)
    state = load_file(next((tmp_path / "run" / "checkpoints").glob("*/model.safetensors")))
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert summary["steps"] == 3


def test_a_second_ctrl_c_stops_at_once_and_keeps_the_last_checkpoint(tmp_path, whole, monkeypatch):
    launch = Run.launch

    def impatient(self, step):
        if step == 20:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return launch(self, step)

    config = tiny(*RICH, f"run_dir={tmp_path / 'run'}")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "launch", impatient)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert checkpoint.latest(tmp_path / "run" / "checkpoints")[0] == 16
    train(config)
    assert metrics(tmp_path / "run") == whole


def test_data_that_changed_since_the_first_start_are_refused(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("in the beginning " * 1000)
    config = tiny("data=local", f"data.path={text}", f"run_dir={tmp_path / 'run'}")
    train_interrupted(config, monkeypatch, at=0)
    for finish in (False, True):
        if finish:
            text.write_text("in the beginning " * 1000)
            train(config)
        before = metrics(tmp_path / "run")
        text.write_text("and it came to pass " * 1000)
        with pytest.raises(UserError, match="started on other data"):
            train(config)
        assert metrics(tmp_path / "run") == before


def test_an_error_is_recorded(tmp_path, monkeypatch):
    config = tiny(*RICH, f"run_dir={tmp_path / 'run'}")
    launch = Run.launch

    def broken(self, step):
        if step == 10:
            raise RuntimeError("the device fell off the bus")
        return launch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "launch", broken)
        with pytest.raises(RuntimeError, match="fell off"):
            train(config)
    assert "fell off" in events(tmp_path / "run", "failed")[0]["error"]


NONFINITE = ("optim.lr=1e18", "optim.weight_decay=0", "optim.clip=null", "schedule.warmup_steps=2")


@pytest.fixture(scope="module")
def nonfinite(tmp_path_factory):
    """The record of a run without checkpoints whose loss is soon not finite."""
    directory = tmp_path_factory.mktemp("nonfinite") / "run"
    train(tiny(*NONFINITE, "train.checkpoint_every=0", f"run_dir={directory}"))
    return metrics(directory)


@pytest.mark.parametrize("every", [1, 2, 3, 4, 5, 6])
def test_checkpoints_do_not_change_the_record_of_a_run_that_ends_early(tmp_path, nonfinite, every):
    train(tiny(*NONFINITE, f"train.checkpoint_every={every}", f"run_dir={tmp_path / 'run'}"))
    assert metrics(tmp_path / "run") == nonfinite


@pytest.mark.parametrize("at", range(5))
def test_an_interruption_does_not_change_the_record_of_a_run_that_ends_early(tmp_path, monkeypatch, nonfinite, at):
    config = tiny(*NONFINITE, f"run_dir={tmp_path / 'run'}")
    train_interrupted(config, monkeypatch, at)
    train(config)
    assert metrics(tmp_path / "run") == nonfinite


def test_a_run_that_another_process_finished_meanwhile_is_not_trained_again(tmp_path, monkeypatch):
    config = tiny(f"run_dir={tmp_path / 'run'}", "train.steps=3")
    trainer = run.Trainer

    def slow(given, data, ranks):
        monkeypatch.setattr(run, "Trainer", trainer)
        train(given)  # the other process
        return trainer(given, data, ranks)

    monkeypatch.setattr(run, "Trainer", slow)
    summary = train(config)
    assert len(events(tmp_path / "run", "start")) == 1
    assert summary == read_checked(tmp_path / "run" / "summary.json")


def test_steps_without_a_checkpoint_are_reported_and_trained_again(tmp_path, interrupted, whole, capsys):
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    train(interrupted)
    assert "13 of 13 recorded steps have no checkpoint" in capsys.readouterr().err
    assert metrics(tmp_path / "run") == whole


@pytest.mark.parametrize("file", ["summary.json", "environment.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", ["", "[]", '{"step": 5}\n', '{"step": "x", "train/loss": "abc"}\n'])
def test_a_damaged_file_is_named_and_kept(tmp_path, interrupted, file, content):
    (tmp_path / "run" / file).write_text(content)
    if file == "summary.json" and content.startswith("{"):  # an object is not damaged; it has no final status
        assert train(interrupted)["status"] == "complete"
        return
    message = "other data" if file == "environment.json" and content.startswith("{") else Path(file).name
    with pytest.raises(UserError, match=message):
        train(interrupted)
    assert (tmp_path / "run" / file).read_text() == content


def test_damaged_events_are_skipped_and_the_next_event_begins_a_line(tmp_path, interrupted):
    with open(tmp_path / "run" / "events.jsonl", "a") as file:
        file.write(sealed('{"event": "checkpoint", "time": "noon"}') + '\n{"event": "che')
    assert train(interrupted)["seconds"] >= 0
    kinds = [event["event"] for event in RunDir(tmp_path / "run").events()]
    assert kinds.count("start") == 2
    assert kinds[-1] == "complete"


def test_seconds_are_those_of_all_starts_up_to_their_last_event(tmp_path):
    lines = [("start", 100.0), ("checkpoint", 110.0), ("start", 200.0), ("complete", 205.5)]
    text = "".join(json.dumps({"event": kind, "time": at}) + "\n" for kind, at in lines)
    (tmp_path / "events.jsonl").write_text(text)
    assert RunDir(tmp_path).seconds_spent() == 15.5


def test_a_model_too_large_for_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1 << 18)
    with pytest.raises(UserError, match=r"a step needs about .* and 256\.0 KiB are free\. Use a smaller model\."):
        train(tiny(f"run_dir={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("gib", "advice"),
    [
        (79, None),
        (40, "train.micro_batch_size=4 fits."),
        (25, "train.micro_batch_size=1 fits."),
        (20, "train.micro_batch_size=2 train.recompute=blocks fits."),
        (12, "Use a smaller model."),
    ],
)
def test_the_settings_that_fit_a_gpu_are_named(monkeypatch, gib, advice):
    monkeypatch.setattr(memory, "free_memory", lambda device: gib << 30)
    config = configured("model=830m", "+variant=qk_norm_cap", "train.micro_batch_size=8")
    if advice is None:
        memory.refuse_too_large(config, torch.device("cuda"))
        return
    with pytest.raises(UserError, match=re.escape(f"{gib}.0 GiB are free. {advice}")) as refused:
        memory.refuse_too_large(config, torch.device("cuda"))
    assert str(refused.value).startswith("train.micro_batch_size=8: a step needs about ")
    words = [word for word in advice.split() if "=" in word]
    memory.refuse_too_large(override(config, words) if words else configured("model=nano"), torch.device("cuda"))


def test_a_run_outlives_the_reader_of_its_output(tmp_path):
    shell = f"{sys.executable} -m stabrun train {' '.join(TINY)} run_dir=run"
    done = subprocess.run(["bash", "-c", f"{shell} | head -1; exit ${{PIPESTATUS[0]}}"], cwd=tmp_path)
    assert done.returncode == 0
    assert read_checked(tmp_path / "run" / "summary.json")["status"] == "complete"


def test_stop_early_ends_a_run_when_its_divergence_is_certain(tmp_path, monkeypatch):
    """Its record is the beginning of the full one, also after an interruption."""
    words = ("schedule=constant", "optim.lr=0.5", "train.checkpoint_every=5", "train.val_every=0", "train.steps=60")
    train(tiny(*words, f"run_dir={tmp_path / 'whole'}"))
    monkeypatch.setattr(Judge, "_is_certain", lambda self: True)  # looked at in the middle
    full = train(tiny(*words, f"run_dir={tmp_path / 'full'}"))
    assert (full["status"], full["verdict"], full["steps"]) == ("complete", "diverged", 60)
    early = tiny(*words, "train.stop_early=true", f"run_dir={tmp_path / 'early'}")
    assert train_interrupted(early, monkeypatch, 12)["status"] == "interrupted"
    summary = train(early)
    assert (summary["status"], summary["verdict"]) == ("stopped", "diverged")
    assert summary["certain_step"] == full["certain_step"] == summary["horizon"]
    records = [(tmp_path / name / "metrics.jsonl").read_bytes().splitlines() for name in ("early", "whole")]
    assert records[0] == records[1][: summary["steps"]]
    assert train(early) == summary, "it is finished"


def test_free_memory_of_a_gpu_includes_what_an_earlier_run_of_the_process_took(monkeypatch):
    """torch keeps freed memory, and the parameters of a model with hooks are freed by the garbage collector only."""
    trainer = a_trainer(tiny())
    gpu = {"used": weakref.ref(trainer.parameters[0]), "kept": 30 << 30}

    def free(device):
        return (80 << 30) - gpu["kept"] - (10 << 30) * (gpu["used"]() is not None), 80 << 30

    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: gpu.update(kept=0))
    assert memory.free_memory(torch.device("cuda")) == 70 << 30
    del trainer
    gpu["kept"] = 30 << 30
    assert memory.free_memory(torch.device("cuda")) == 80 << 30
