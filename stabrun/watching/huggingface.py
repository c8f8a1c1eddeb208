"""`stabrun.watch` in the Trainer of Hugging Face, and in those that are built on it, such as TRL's."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stabrun.config import UserError
from stabrun.record.schema import COMPLETE, INTERRUPTED, STOPPED
from stabrun.watching.tap import Tap
from stabrun.watching.watch import Watch

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise UserError("WatchCallback: transformers is missing: pip install 'stabrun[huggingface]'.") from error

BACKWARD = Tap("backward", Tensor)
CONSTANT = "constant", "constant_with_warmup"  # schedules whose learning rate does not change after the warm-up


class WatchCallback(TrainerCallback):
    """Watches the model of a Trainer: `Trainer(..., callbacks=[WatchCallback(out="runs/mine", every=10)])`.

    The arguments are those of `stabrun.watch`. Of these, `steps`, `constant_lr` and the setting `seed` are by default
    what the Trainer's arguments say. Training that is resumed from a checkpoint goes on with the record that `out`
    holds.

    The loss of a step is the sum of what the Trainer called `backward` on, which it has divided by the number of
    micro-batches, or of tokens. With an evaluation strategy, a row is written when the next step begins, so that it can
    hold the validation loss.

    Raises UserError when training begins, if the model cannot be observed or `out` holds another record.
    """

    def __init__(self, out: str | Path | None = None, every: int = 10, **options: Any) -> None:
        inspect.signature(Watch).bind(None, out, every, **options)  # raises TypeError at an unknown argument
        self.out, self.every, self.options = out, every, options
        self.watch: Watch | None = None
        self.losses: list[Tensor] = []  # of the micro-batches of this step
        self.row: dict[str, Any] | None = None  # of the last step, until it is written
        self.tokens = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._close(INTERRUPTED)  # of training that ended by an exception before
        refuse_trainer(args)
        if args.torch_compile:
            torch.compiler.reset()  # code that was compiled before would run without the hooks
        facts = {"steps": state.max_steps or None, "constant_lr": args.lr_scheduler_type in CONSTANT, **self.options}
        facts["settings"] = {"seed": args.seed, **(facts.get("settings") or {})}
        if state.global_step:
            facts |= {"first_step": state.global_step, "overwrite": False}
        self.watch = Watch(model, self.out, self.every, **facts)
        self.watch.scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        self.losses, self.tokens = [], state.num_input_tokens_seen
        BACKWARD.add(self._heard)

    def _heard(self, _: None, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Keep the loss of a micro-batch, without the factor of fp16."""
        if loss.numel() == 1:
            loss = loss.detach().reshape(())
            scaler = self.watch.scaler if self.watch else None
            self.losses.append(loss / scaler.scale(torch.ones_like(loss)) if scaler else loss)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.watch is None:
            return
        if not self.losses:
            raise UserError(f"WatchCallback: step {state.global_step}: the Trainer called backward() on no loss.")
        tokens, self.tokens = state.num_input_tokens_seen - self.tokens, state.num_input_tokens_seen
        self.row = {"loss": torch.stack(self.losses).sum(), "step": state.global_step, "tokens": tokens}
        self.losses = []

    def _write(self, control: TrainerControl, val_loss: float | None = None) -> None:
        if self.watch is not None and self.row is not None:
            self.watch.step(**self.row, val_loss=val_loss)
            self.row = None
            control.should_training_stop = control.should_training_stop or self.watch.stopped

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write(control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.eval_strategy == "no":
            self._write(control)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        losses = {name: value for name, value in (metrics or {}).items() if name.endswith("_loss")}
        self._write(control, losses.get("eval_loss", next(iter(losses.values()), None)))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._write(control)
        if self.watch is not None:
            self.watch.saved(Path(str(args.output_dir)).absolute() / f"checkpoint-{state.global_step}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if "train_loss" in (logs or {}):  # training is over: the Trainer may load its best weights next
            self._write(control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write(control)
        self._close(COMPLETE if state.global_step >= state.max_steps else STOPPED)

    def _close(self, status: str) -> None:
        BACKWARD.remove(self._heard)
        if self.watch is not None:
            self.watch.close(status)
        self.watch = self.row = None


def refuse_trainer(args: TrainingArguments) -> None:
    """Raise UserError at training whose weights and gradients are not where a model has them."""
    if getattr(args, "deepspeed_plugin", None):
        raise UserError("WatchCallback: DeepSpeed hides weights and gradients; use DistributedDataParallel or FSDP2.")
    if args.n_gpu > 1:
        raise UserError(
            f"WatchCallback: nn.DataParallel on {args.n_gpu} GPUs cannot be observed. Start one process per GPU by "
            "torchrun, or set CUDA_VISIBLE_DEVICES to one GPU."
        )
