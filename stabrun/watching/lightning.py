"""`stabrun.watch` in the Trainer of Lightning."""

import inspect
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stabrun.config import UserError
from stabrun.record.schema import COMPLETE, FAILED, INTERRUPTED, STOPPED
from stabrun.watching.watch import Watch

PACKAGES = "lightning.pytorch", "pytorch_lightning"  # of the same contents
VALIDATION = "val_loss", "val/loss"  # usual names of the validation loss


def base() -> Any:
    """The class of callbacks, of the package that is imported, or else installed."""
    for name in sorted(PACKAGES, key=lambda name: name not in sys.modules):
        if find_spec(name.partition(".")[0]):
            return import_module(name).Callback
    raise UserError("WatchCallback: lightning is missing: pip install 'stabrun[lightning]'.")


Callback: Any = base()


class WatchCallback(Callback):
    """Watches the LightningModule of a Trainer: `Trainer(..., callbacks=[WatchCallback(out="runs/mine", every=10)])`.

    The arguments are those of `stabrun.watch`. `steps` is by default what the Trainer plans. Training that is resumed
    from a checkpoint goes on with the record that `out` holds.

    The loss of a step is the mean of what `training_step` returned for its micro-batches, or else of what was passed to
    `manual_backward`. The validation loss is the logged metric `val_loss`. A row is written when the next step begins,
    so that it can hold it. Steps are those of the optimizers: if several take turns, the record has gaps.

    Raises UserError when training begins, if the model cannot be observed or `out` holds another record.
    """

    def __init__(self, out: str | Path | None = None, every: int = 10, **options: Any) -> None:
        inspect.signature(Watch).bind(None, out, every, **options)  # raises TypeError at an unknown argument
        self.out, self.every, self.options = out, every, options
        self.watch: Watch | None = None
        self.losses: list[Tensor] = []  # of the micro-batches of this step
        self.backward: list[Tensor] = []  # what backward was called on in this micro-batch
        self.row: dict[str, Any] | None = None  # of the last step, until it is written
        self.step = 0
        self.checkpoints: set[str] = set()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._close(INTERRUPTED)
        steps = trainer.estimated_stepping_batches
        facts = {"steps": int(steps) if 0 < steps < float("inf") else None, **self.options}
        self.step = trainer.global_step
        if self.step:
            facts |= {"first_step": self.step, "overwrite": False}
        self.watch = Watch(pl_module, self.out, self.every, **facts)
        self.watch.scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.checkpoints, self.losses, self.row = paths_of(trainer), [], None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._write(trainer)
        self.backward = []

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        scaler = self.watch.scaler if self.watch else None
        self.backward.append(loss.detach() / scaler.scale(torch.ones_like(loss)) if scaler else loss.detach())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and pl_module.automatic_optimization:
            loss = loss * trainer.accumulate_grad_batches  # by which Lightning has divided it
        elif loss is None and self.backward:
            loss = sum(self.backward)
        if loss is not None:
            self.losses.append(loss)
        if trainer.global_step > self.step and self.losses:
            self.step = trainer.global_step
            self.row = {"loss": sum(self.losses) / len(self.losses), "step": self.step - 1}
            self.losses = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        metrics = trainer.callback_metrics
        self._write(trainer, next((metrics[name] for name in VALIDATION if name in metrics), None))

    def _write(self, trainer: Any, val_loss: Any = None) -> None:
        """Write the row of the last step, and the checkpoints that were saved since the one before."""
        if self.watch is None:
            return
        if self.row is not None:
            self.watch.step(**self.row, val_loss=val_loss)
            self.row = None
            trainer.should_stop = trainer.should_stop or self.watch.stopped
        found = paths_of(trainer)
        for path in sorted(found - self.checkpoints):
            self.watch.saved(path)
        self.checkpoints = found

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._write(trainer)
        early = trainer.should_stop and trainer.global_step < trainer.estimated_stepping_batches
        self._close(STOPPED if early else COMPLETE)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._write(trainer)
        self._close(FAILED if isinstance(exception, Exception) else INTERRUPTED)

    def _close(self, status: str) -> None:
        if self.watch is not None:
            self.watch.close(status)
        self.watch = self.row = None


def paths_of(trainer: Any) -> set[str]:
    """The checkpoints that a Trainer keeps, without `last.ckpt`, which is overwritten."""
    kept = [(callback.best_model_path, *callback.best_k_models) for callback in checkpointing(trainer)]
    return {str(Path(path).absolute()) for paths in kept for path in paths if path}


def checkpointing(trainer: Any) -> list[Any]:
    return [callback for callback in trainer.checkpoint_callbacks if hasattr(callback, "best_k_models")]
