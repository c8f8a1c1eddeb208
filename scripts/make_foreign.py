# mypy: ignore-errors
r"""Write the foreign records of `tests/data/foreign` with common tools. Run by hand, in a separate venv.

    pip install transformers==5.24.0 accelerate wandb==0.31.0 tensorboard==2.21.0 lightning==2.6.6 keras==3.15.1
    python scripts/make_foreign.py tests/data/foreign

The console logs and the W&B files are compressed with xz afterward. The lines before the first step of the console log
of the Trainer are removed; the first run of `trainer_states` prints it, with 120 steps and an evaluation every 30.

`spreadsheet_de.csv` was written by Gnumeric from a `plain.csv` with columns Step and Loss, plus a byte-order mark like
Excel's:

    ssconvert plain.csv sheet.gnumeric
    ssconvert -O "separator=; format=automatic locale=de_DE.UTF-8" sheet.gnumeric sheet.txt
    (printf '\xef\xbb\xbf'; cat sheet.txt) > spreadsheet_de.csv
"""

import contextlib
import glob
import io
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def trainer_states(folder: Path) -> None:
    """`trainer_state.json` of two runs of a tiny GPT-2; in the second one weight becomes infinite at step 120."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    class Walks(torch.utils.data.Dataset):
        def __len__(self):
            return 4000

        def __getitem__(self, index):
            source = torch.Generator().manual_seed(index)
            tokens = torch.randint(0, 8, (16,), generator=source).cumsum(0) % 32
            return {"input_ids": tokens, "labels": tokens}

    class Poison(TrainerCallback):
        def on_step_end(self, arguments, state, control, model=None, **rest):
            if state.global_step == 120:
                with torch.no_grad():
                    model.transformer.h[1].mlp.c_fc.weight.mul_(math.inf)

    for name, callbacks in (("trainer_converged", []), ("trainer_diverged", [Poison()])):
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as scratch:
            arguments = TrainingArguments(
                output_dir=scratch, max_steps=200, per_device_train_batch_size=8, learning_rate=1e-3, logging_steps=1,
                eval_strategy="steps", eval_steps=50, save_strategy="no", report_to=[], use_cpu=True,
                disable_tqdm=bool(callbacks), lr_scheduler_type="constant",
            )  # fmt: skip
            model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2))
            few = torch.utils.data.Subset(Walks(), range(32))
            trainer = Trainer(model, arguments, train_dataset=Walks(), eval_dataset=few, callbacks=callbacks)
            trainer.train()
            trainer.state.save_to_json(folder / f"{name}.json")


def falling(count: int = 150, bad: int | None = None) -> list[float]:
    """A loss that falls, and from row `bad` on has risen by 1."""
    source = random.Random(0)
    return [2 + 3 * math.exp(-i / 20) + source.gauss(0, 0.03) + (bad is not None and i >= bad) for i in range(count)]


BAD = {"converged": None, "diverged": 75}


def event_files(folder: Path) -> None:
    """Event files written by `torch.utils.tensorboard`."""
    from torch.utils.tensorboard import SummaryWriter

    for name, bad in BAD.items():
        with tempfile.TemporaryDirectory() as scratch, SummaryWriter(scratch) as writer:
            writer.add_text("config", "lr 0.1")
            for step, loss in enumerate(falling(bad=bad)):
                writer.add_scalar("Loss/train", loss, step)
                writer.add_scalar("lr", 0.1, step)
                writer.add_scalar("grad_norm", 1.5, step)
                if step % 25 == 24:
                    writer.add_scalar("Loss/val", loss + 0.1, step)
            writer.flush()
            (file,) = Path(scratch).glob("*tfevents*")
            (folder / f"events.out.tfevents.{name}").write_bytes(file.read_bytes())


def lightning_tables(folder: Path) -> None:
    """`metrics.csv` of Lightning's CSVLogger: a linear model, whose loss is raised by 3 from step 80 on."""
    import lightning
    import torch
    from lightning.pytorch.callbacks import LearningRateMonitor
    from lightning.pytorch.loggers import CSVLogger

    class Linear(lightning.LightningModule):
        def __init__(self, raised):
            super().__init__()
            self.linear, self.raised = torch.nn.Linear(4, 1), raised

        def loss(self, batch):
            return ((self.linear(batch[0]) - batch[0].sum(1, keepdim=True)) ** 2).mean()

        def training_step(self, batch, index):
            loss = self.loss(batch) + (3.0 if self.raised and self.global_step >= 80 else 0.0)
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch, index):
            self.log("val_loss", self.loss(batch))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.02)

    for name, bad in BAD.items():
        torch.manual_seed(0)
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(160, 4)), batch_size=4)
        with tempfile.TemporaryDirectory() as scratch:
            trainer = lightning.Trainer(
                max_epochs=4, logger=CSVLogger(scratch), log_every_n_steps=1, enable_checkpointing=False,
                enable_progress_bar=False, accelerator="cpu", callbacks=[LearningRateMonitor()],
            )  # fmt: skip
            trainer.fit(Linear(bad is not None), data, data)
            (file,) = Path(scratch).rglob("metrics.csv")
            (folder / f"lightning_{name}.csv").write_bytes(file.read_bytes())


def keras_tables(folder: Path) -> None:
    """Keras (backend torch): CSVLogger and console; in the second run the weights are shifted at epoch 40."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras
    import numpy as np

    keras.utils.set_random_seed(0)
    inputs = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    targets = inputs.sum(1, keepdims=True)

    class Shift(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 40:
                layer = self.model.layers[0]
                layer.set_weights([weight + 2 for weight in layer.get_weights()])
                self.model.optimizer.learning_rate = 1e-9

    for name, bad in BAD.items():
        model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        logger = keras.callbacks.CSVLogger(str(folder / f"keras_{name}.csv"))
        console = io.StringIO()
        with contextlib.redirect_stdout(console):
            model.fit(inputs, targets, epochs=80, validation_data=(inputs, targets), batch_size=16,
                      callbacks=[logger] if bad is None else [logger, Shift()])  # fmt: skip
        if bad is None:
            (folder / "keras_console.log").write_text(console.getvalue())


def wandb_files(folder: Path) -> None:
    """Offline W&B runs: one that ended, and one that was killed."""
    import wandb

    for name in ("diverged", "killed"):
        scratch = tempfile.mkdtemp()
        if os.fork() == 0:
            quiet = wandb.Settings(console="off", x_disable_stats=True, x_disable_machine_info=True, disable_code=True,
                                   disable_git=True, x_save_requirements=False)  # fmt: skip
            run = wandb.init(project="x", name="fancy", dir=scratch, mode="offline", settings=quiet)
            for row, loss in enumerate(falling(bad=75 if name == "diverged" else None)):
                run.log({"train/loss": loss, "train/grad_norm": 1.5, "lr": 0.1}, step=5 * row)
                if row % 25 == 24:
                    run.log({"eval/loss": loss + 0.1}, step=5 * row + 1)
            if name == "killed":
                time.sleep(3)
                os.kill(os.getpid(), signal.SIGKILL)
            run.finish()
            os._exit(0)
        os.wait()
        (file,) = Path(scratch).rglob("run-*.wandb")
        (folder / f"wandb_{name}.wandb").write_bytes(file.read_bytes())


def wandb_history(folder: Path) -> None:
    """The history of an offline W&B run whose loss rises by 1 at step 350, as `wandb leet inspect --json` prints it."""
    import wandb

    with tempfile.TemporaryDirectory() as scratch:
        source = random.Random(0)
        run = wandb.init(project="x", name="fancy", dir=scratch, mode="offline")
        for row in range(120):
            loss = 2 + 3 * math.exp(-row / 20) + source.gauss(0, 0.03) + (row >= 70)
            run.log({"train/loss": loss, "lr": 0.1}, step=5 * row)
        run.log({"eval/loss": 2.0}, step=601)
        run.finish()
        kept = glob.glob(f"{scratch}/wandb/offline-run-*")[0]
        tool = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", kept]
        printed = subprocess.run(tool, capture_output=True, text=True, check=True)
    history = [line for line in printed.stdout.splitlines(keepends=True) if '"type":"history"' in line]
    (folder / "wandb_history.jsonl").write_text("".join(history))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for write in (trainer_states, wandb_history, event_files, lightning_tables, keras_tables, wandb_files):
        write(target)
