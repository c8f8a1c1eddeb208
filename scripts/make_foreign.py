# mypy: ignore-errors
r"""Write the foreign records of `tests/data/foreign` with common tools. Run by hand, in a separate venv.

    pip install transformers==5.23.0 accelerate wandb==0.31.0 && python scripts/make_foreign.py tests/data/foreign

`spreadsheet_de.csv` was written by Gnumeric from a `plain.csv` with columns Step and Loss, plus a byte-order mark like
Excel's:

    ssconvert plain.csv sheet.gnumeric
    ssconvert -O "separator=; format=automatic locale=de_DE.UTF-8" sheet.gnumeric sheet.txt
    (printf '\xef\xbb\xbf'; cat sheet.txt) > spreadsheet_de.csv
"""

import glob
import math
import random
import subprocess
import sys
import tempfile
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
                eval_strategy="steps", eval_steps=50, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
                lr_scheduler_type="constant",
            )  # fmt: skip
            model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2))
            few = torch.utils.data.Subset(Walks(), range(32))
            trainer = Trainer(model, arguments, train_dataset=Walks(), eval_dataset=few, callbacks=callbacks)
            trainer.train()
            trainer.state.save_to_json(folder / f"{name}.json")


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
    trainer_states(target)
    wandb_history(target)
