"""Watched runs under the Trainers of Hugging Face and of Lightning: what they take over from the Trainer, a divergence
that stops training, and training that goes on from a checkpoint."""

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import stabrun
from stabrun.record.jsonl import read_checked, read_lines
from stabrun.report.report import write_report

NEEDED = "transformers", "accelerate", "lightning"
pytestmark = [
    pytest.mark.trainers,
    pytest.mark.skipif(not all(map(find_spec, NEEDED)), reason="stabrun[huggingface,lightning] is not installed"),
]

if all(map(find_spec, NEEDED)):
    import hf_models
    import lightning
    import transformers as hf
    from hf_models import TIME, Examples, logged, trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from stabrun.watching import huggingface
    from stabrun.watching import lightning as of_lightning


def record(directory):
    return [line.value for line in read_lines(directory / "metrics.jsonl")]


def summary(directory):
    return read_checked(directory / "summary.json")


def events(directory, kind):
    lines = [line.value for line in read_lines(directory / "events.jsonl")]
    return [event for event in lines if event["event"] == kind]


# Hugging Face


def watch_hf(directory, every=10, **options):
    return huggingface.WatchCallback(directory / "run", every, quiet=True, **options)


class OwnLoss(hf.Trainer if all(map(find_spec, NEEDED)) else object):
    """A Trainer with a loss of its own, as those of preferences and rewards have."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        loss = model(input_ids=inputs["input_ids"]).logits.square().mean()
        return (loss, None) if return_outputs else loss


LOSSES = {
    "tokens": ("llama", {}),
    "batches": ("vit", {}),
    "smoothed": ("llama", {"label_smoothing_factor": 0.1}),
    "own": ("gpt2", {"cls": OwnLoss}),
}


@pytest.mark.parametrize("case", LOSSES)
def test_the_loss_under_accumulation_is_the_trainers(tmp_path, case):
    name, options = LOSSES[case]
    made = trainer(name, tmp_path, [watch_hf(tmp_path)], 12, gradient_accumulation_steps=3, **options)
    made.train()
    rows = record(tmp_path / "run")
    assert [row["train/loss"] for row in rows] == pytest.approx(logged(made, "loss"), rel=1e-6)
    assert [row["grad/norm"] for row in rows] == pytest.approx(logged(made, "grad_norm"), rel=1e-6)
    assert rows[0]["train/loss"] > 1e-3


def test_validation_checkpoints_and_facts_of_the_trainer(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 5, "seed": 3}
    watch = watch_hf(tmp_path, 2, settings={"name": "mine"})
    options |= {"include_num_input_tokens_seen": True, "lr_scheduler_type": "constant"}
    made = trainer("llama", tmp_path, [watch], 12, **options)
    backward = torch.Tensor.backward  # replaced still, if training was interrupted in an earlier test
    made.train()
    rows = record(tmp_path / "run")
    found = {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}
    assert list(found) == [3, 7, 11]
    assert list(found.values()) == logged(made, "eval_loss")
    checkpoints = events(tmp_path / "run", "checkpoint")
    assert [event["step"] for event in checkpoints] == [5, 10, 12]
    assert [event["path"] for event in checkpoints] == [
        str(tmp_path / "trainer" / f"checkpoint-{step}") for step in (5, 10, 12)
    ]
    facts = json.loads((tmp_path / "run" / "watch.json").read_text())
    assert (facts["planned"], facts["constant"]) == (12, True)
    assert facts["settings"] == {"seed": 3, "name": "mine"}
    assert rows[-1]["tokens"] == 12 * hf_models.BATCH * TIME
    assert torch.Tensor.backward is backward


def test_validation_does_not_change_the_statistics(tmp_path):
    runs = {}
    for strategy in ("no", "steps"):
        directory = tmp_path / strategy
        watch = huggingface.WatchCallback(directory / "run", 1, slow_every=1, quiet=True)
        trainer("llama", directory, [watch], 4, eval_strategy=strategy, eval_steps=1).train()
        runs[strategy] = record(directory / "run")
    for row, validated in zip(runs["no"], runs["steps"], strict=True):
        assert validated.pop("val/loss") > 0
        assert row == validated


def test_a_run_of_hugging_face_that_diverges_is_stopped(tmp_path):
    torch.manual_seed(0)
    watch = watch_hf(tmp_path, 1, on_verdict="stop")
    options = {"learning_rate": 0.5, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 250}
    made = trainer("nemotron", tmp_path, [watch], 300, **options)
    made.train()
    check_stopped(tmp_path / "run", made.state.global_step)


def check_stopped(directory, steps):
    """A run that a verdict stopped: it names step and site, and `stabrun report` makes a page of it."""
    found = summary(directory)
    assert (found["status"], found["verdict"]) == ("stopped", "diverged")
    assert 0 < found["first_bad_step"] < steps < 300
    sites = json.loads((directory / "watch.json").read_text())["sites"]
    assert found["first_bad_site"].rpartition("/")[2] in sites
    assert stabrun.load_run(directory).summary["verdict"] == "diverged"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stabrun.report.report.write_figures", lambda drawn, directory: None)
        write_report(directory)
    assert found["first_bad_site"] in (directory / "report" / "index.html").read_text()


def test_a_run_of_hugging_face_goes_on_from_a_checkpoint(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"save_strategy": "steps", "save_steps": 8}
    trainer("llama", whole, [watch_hf(whole)], 20, **options).train()

    class Interrupts(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 13:
                raise KeyboardInterrupt

    first = watch_hf(parts)
    with pytest.raises(KeyboardInterrupt):
        trainer("llama", parts, [first, Interrupts()], 20, **options).train()
    first.watch.close("interrupted")  # as the end of the process does
    assert summary(parts / "run")["status"] == "interrupted"
    with pytest.raises(stabrun.UserError, match="holds a record up to step 12"):
        trainer("llama", parts, [watch_hf(parts)], 20, **options).train()
    trainer("llama", parts, [watch_hf(parts, overwrite=True)], 20, **options).train(
        resume_from_checkpoint=str(parts / "trainer" / "checkpoint-8")
    )
    check_continued(parts / "run", whole / "run", 20)


def check_continued(parts, whole, steps):
    rows = record(parts)
    assert [row["step"] for row in rows] == list(range(steps))
    assert [row["train/loss"] for row in rows] == [row["train/loss"] for row in record(whole)]
    assert rows == record(whole)
    assert summary(parts)["status"] == "complete"


def test_a_loss_that_is_not_finite_is_recorded_although_the_trainer_hides_it(tmp_path):
    class Breaks(hf.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            if state.global_step == 6:
                with torch.no_grad():
                    model.lm_head.weight[0, 0] = float("nan")

    made = trainer("llama", tmp_path, [watch_hf(tmp_path, 1, on_verdict="stop"), Breaks()], 12, max_grad_norm=0.0)
    made.train()
    assert all(loss == loss for loss in logged(made, "loss"))
    assert made.state.global_step == 7
    assert record(tmp_path / "run")[6]["train/loss"] == "nan"
    assert summary(tmp_path / "run")["first_bad_step"] == 6


def test_trainers_that_hide_the_model_are_refused(tmp_path):
    for name, value, text in (("_n_gpu", 2, "nn.DataParallel on 2 GPUs"), ("deepspeed_plugin", object(), "DeepSpeed")):
        made = trainer("llama", tmp_path, [], 2)
        setattr(made.args, name, value)
        with pytest.raises(stabrun.UserError, match=text):
            huggingface.refuse_trainer(made.args)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "stabrun.watching.huggingface")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(stabrun.UserError, match=r"pip install 'stabrun\[huggingface\]'"):
        import_module("stabrun.watching.huggingface")
    monkeypatch.setattr(of_lightning, "find_spec", lambda name: None)
    with pytest.raises(stabrun.UserError, match=r"pip install 'stabrun\[lightning\]'"):
        of_lightning.base()


def test_an_unknown_argument_is_refused_when_the_callback_is_made():
    for adapter in (huggingface, of_lightning):
        with pytest.raises(TypeError, match="evry"):
            adapter.WatchCallback("run", evry=3)


RANKS = """
import sys
from pathlib import Path
from hf_models import logged, trainer
from stabrun.watching.huggingface import WatchCallback
here = Path(sys.argv[1])
made = trainer("llama", here, [WatchCallback(here / "run", 4, quiet=True)], 10, gradient_accumulation_steps=2)
made.train()
if made.is_world_process_zero():
    (here / "logged.json").write_text(__import__("json").dumps([logged(made, k) for k in ("loss", "grad_norm")]))
"""


@pytest.mark.slow
def test_two_ranks_of_hugging_face(tmp_path):
    (tmp_path / "script.py").write_text(RANKS)
    words = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "script.py", str(tmp_path)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, check=True, timeout=120)
    losses, norms = json.loads((tmp_path / "logged.json").read_text())
    rows = record(tmp_path / "run")
    assert [row["train/loss"] for row in rows] == pytest.approx(losses, rel=1e-6)
    assert [row["grad/norm"] for row in rows] == pytest.approx(norms, rel=1e-6)
    assert len(events(tmp_path / "run", "start")) == 1


# Lightning


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        mean = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return x + self.down(torch.relu(self.up(self.norm(mean))))


class Module(lightning.LightningModule if all(map(find_spec, NEEDED)) else object):
    """A small language model of bytes; `manual` optimizes by itself, `shown` returns its loss."""

    def __init__(self, lr=3e-3, warmup=1, manual=False, shown=True):
        super().__init__()
        torch.manual_seed(0)
        self.lr, self.warmup, self.shown, self.seen = lr, warmup, shown, []
        self.automatic_optimization = not manual
        self.embed, self.head = nn.Embedding(256, 16), nn.Linear(16, 256)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def loss(self, tokens):
        logits = self(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch, index):
        loss = self.loss(batch["input_ids"])
        self.seen.append(float(loss.detach()))
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss if self.shown else None

    def validation_step(self, batch, index):
        self.log("val_loss", self.loss(batch["input_ids"]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def batches(seed=0):
    return torch.utils.data.DataLoader(Examples("gpt2", seed), batch_size=4)


def fit(directory, module, callbacks=(), ckpt_path=None, validate=False, **options):
    options = {"max_epochs": 2, "limit_train_batches": 8, "num_sanity_val_steps": 0, **options}
    made = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
        callbacks=[*callbacks],
        **({"enable_checkpointing": False} if not any(isinstance(c, ModelCheckpoint) for c in callbacks) else {}),
        **options,
    )
    made.fit(module, batches(), *([batches(7)] if validate else []), ckpt_path=ckpt_path)
    return made


def watch_lightning(directory, every=1, **options):
    return of_lightning.WatchCallback(directory / "run", every, quiet=True, **options)


class Norms(lightning.Callback if all(map(find_spec, NEEDED)) else object):
    """The norm of the gradient before clipping, and the learning rate, at each update."""

    def __init__(self):
        self.norms, self.rates = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        gradients = [p.grad.double() for p in module.parameters()]
        self.norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_lightning_is_watched_and_not_changed(tmp_path, accumulate, clip):
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    plain, watched, norms = Module(warmup=5), Module(warmup=5), Norms()
    fit(tmp_path, plain, [norms], **options)
    fit(tmp_path, watched, [watch_lightning(tmp_path, slow_every=1)], **options)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name])
    assert plain.seen == watched.seen
    rows = record(tmp_path / "run")
    epochs = plain.seen[:8], plain.seen[8:]
    parts = [epoch[start : start + accumulate] for epoch in epochs for start in range(0, 8, accumulate)]
    assert [row["train/loss"] for row in rows] == pytest.approx([sum(part) / len(part) for part in parts], rel=1e-6)
    assert [row["grad/norm"] for row in rows] == pytest.approx(norms.norms, rel=1e-5)
    assert [row["train/lr"] for row in rows] == norms.rates
    assert rows[3]["norm/out/up"][1] > 0
    assert rows[3]["norm/update/up"][1] > 0
    assert summary(tmp_path / "run")["status"] == "complete"
    assert json.loads((tmp_path / "run" / "watch.json").read_text())["planned"] == len(rows)


@pytest.mark.parametrize("shown", [True, False])
def test_lightning_with_manual_optimization(tmp_path, shown):
    module = Module(manual=True, shown=shown)
    fit(tmp_path, module, [watch_lightning(tmp_path)])
    assert [row["train/loss"] for row in record(tmp_path / "run")] == module.seen
    assert len(module.seen) == 16


def test_lightning_validation_and_checkpoints(tmp_path):
    saving = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, save_last=True)
    made = fit(tmp_path, Module(), [watch_lightning(tmp_path), saving], validate=True, num_sanity_val_steps=2)
    losses = {row["step"]: row["val/loss"] for row in record(tmp_path / "run") if "val/loss" in row}
    assert list(losses) == [7, 15]
    assert losses[15] == pytest.approx(float(made.callback_metrics["val_loss"]))
    saved = [(event["step"], event["path"]) for event in events(tmp_path / "run", "checkpoint")]
    assert saved == [(n, str(tmp_path / "kept" / f"epoch={n // 8 - 1}-step={n}.ckpt")) for n in (8, 16)]
    without = tmp_path / "without"
    fit(without, Module(), [watch_lightning(without)])
    for row, plain in zip(record(tmp_path / "run"), record(without / "run"), strict=True):
        row.pop("val/loss", None)
        assert row == plain


def test_a_run_of_lightning_that_diverges_is_stopped(tmp_path):
    module = Module(lr=1.0, warmup=250)
    made = fit(tmp_path, module, [watch_lightning(tmp_path, on_verdict="stop")], limit_train_batches=100, max_epochs=3)
    check_stopped(tmp_path / "run", made.global_step)


def test_a_run_of_lightning_goes_on_from_a_checkpoint(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(whole, Module(), [watch_lightning(whole)], max_epochs=3)

    class Fails(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 12:
                raise ValueError("a fault")

    saving = ModelCheckpoint(parts / "kept", save_top_k=-1)
    with pytest.raises(ValueError, match="a fault"):
        fit(parts, Module(), [watch_lightning(parts), saving, Fails()], max_epochs=3)
    assert summary(parts / "run")["status"] == "failed"
    assert len(record(parts / "run")) == 12
    with pytest.raises(stabrun.UserError, match="holds a record up to step 11"):
        fit(parts, Module(), [watch_lightning(parts)], max_epochs=3)
    path = parts / "kept" / "epoch=0-step=8.ckpt"
    fit(parts, Module(), [watch_lightning(parts, overwrite=True)], str(path), max_epochs=3)
    check_continued(parts / "run", whole / "run", 24)
