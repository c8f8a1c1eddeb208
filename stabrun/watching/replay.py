"""Repeats the forward pass of a step, to find where a value ceased to be finite."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stabrun.config import UserError
from stabrun.observe.hooks import Hook
from stabrun.watching.fault import Fault
from stabrun.watching.locate import locate

LossOf = Callable[[Any], Tensor]  # from what the model returns


class Replay:
    """Keeps the arguments of the model's last forward pass with gradients, and the autocast that it ran under.

    `loss_of` computes the loss from what the model returns. It is not needed for a model that returns one.
    """

    def __init__(self, model: nn.Module, loss_of: LossOf | None) -> None:
        self.model, self.loss_of = model, loss_of
        self.args: tuple[Any, ...] = ()
        self.kwargs: Mapping[str, Any] = {}
        self.device = next(model.parameters()).device.type
        self.autocast: tuple[bool, torch.dtype] = False, torch.float32
        self.handles: list[RemovableHandle] = []

    def follow(self) -> None:
        """Keep the arguments of each forward pass from now on."""
        self.handles.append(self.model.register_forward_pre_hook(Hook(self._called), with_kwargs=True))

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self.args, self.kwargs = args, kwargs
            self.autocast = torch.is_autocast_enabled(self.device), torch.get_autocast_dtype(self.device)

    def locate(self, batch: Any = None, scale: float = 1.0) -> Fault | None:
        """Where the first value that is not finite arises; None if there is none.

        `batch` is given to the model: a mapping as keywords, a tuple or list as arguments, anything else as the only
        one. By default the arguments of the last forward pass are. Raises UserError if there was none.
        """
        args, kwargs = (self.args, self.kwargs) if batch is None else arguments(batch)
        if not args and not kwargs:
            raise UserError('watch.locate(): give it a batch, or watch with on_nonfinite="locate".')
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        tokens = next((x for x in tensors if x.dim() == 2 and not x.is_floating_point()), None)

        def step() -> Any:
            with self._context():
                output = self.model(*args, **kwargs)
                return self.loss_of(output) if self.loss_of else output

        kept = self.args, self.kwargs, self.autocast
        try:
            return locate(self.model, step, tokens, scale)
        finally:
            self.args, self.kwargs, self.autocast = kept  # those of training: the pass within was followed, too

    def _context(self) -> AbstractContextManager[object]:
        enabled, dtype = self.autocast
        return torch.autocast(self.device, dtype) if enabled else nullcontext()

    def remove(self) -> None:
        """Keep no arguments from now on, nor those of the last pass."""
        for handle in self.handles:
            handle.remove()
        self.args, self.kwargs = (), {}


def arguments(batch: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments and keywords of a model that a batch stands for."""
    if isinstance(batch, Mapping):
        return (), batch
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}
