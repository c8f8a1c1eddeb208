"""The peak memory of a training step, traced on fake tensors: slow, and exact up to the workspaces of kernels.

`FakeTensorMode` is private to torch, and the only way to run a step without allocating it.
"""

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from stabrun.config import AttentionConfig, Config, micro_batch
from stabrun.model.attention import AttentionCore
from stabrun.model.gpt import GPT
from stabrun.model.memory import device_type
from stabrun.model.switches import FLEX, SAMPLED, sequence_parts
from stabrun.observe.reductions import attention_statistics
from stabrun.training.objective import Objective
from stabrun.training.optimizer import make_optimizer
from stabrun.training.precision import autocast
from stabrun.training.qk_clip import QKClip


class LiveMemory(TorchDispatchMode):
    """Adds up the storages of all tensors that operations made and that still exist: `now` and `peak`, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive = set[weakref.ref[Any]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return out

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        reference = weakref.ref(storage, partial(self.remove, size))
        if reference not in self.alive:
            self.alive.add(reference)
            self.now += size
            self.peak = max(self.peak, self.now)

    def remove(self, size: int, reference: "weakref.ref[Any]") -> None:
        self.alive.discard(reference)
        self.now -= size


@torch.no_grad()
def measure(core: AttentionCore, qkv: tuple[Tensor, ...], output: Tensor) -> None:
    """The statistics of attention, whose logits exist for a moment."""
    if output.requires_grad:
        attention_statistics(core, *(x[:SAMPLED] for x in qkv[:2]))


def traced_memory(config: Config) -> int:
    """Peak bytes of the second step of a run, when Adam's moments exist; nothing is allocated.

    The kernels are those of the CPU. For CUDA, SDPA stands for flex_attention, which keeps the same tensors.
    """
    train, seq_len = config.train, config.data.seq_len
    sequences = micro_batch(config)
    with FakeTensorMode(), LiveMemory() as memory:
        model = GPT(config.model, seq_len)
        model.recompute = train.recompute == "blocks"
        for core in model.cores:
            if core.path(device_type(config)) == FLEX:
                core.config = AttentionConfig()
        optimizer = make_optimizer(model, config.optim)
        parts = sequence_parts(config.model.vocab_size, sequences, seq_len)
        objective = Objective(model, config.optim.z_loss, parts, partial(autocast, train, torch.device("cpu")))
        tokens = torch.zeros(sequences, seq_len + 1, dtype=torch.long)
        slow = config.observe.every and config.observe.slow_every
        for core in model.cores if slow else ():
            core.register_forward_hook(measure)
        if config.optim.qk_clip:
            QKClip(model, config.optim.qk_clip)
        for _ in range(2):
            memory.peak = memory.now
            for _ in range(min(2, train.batch_size // train.ranks // sequences)):
                objective.accumulate(tokens, 1, lambda loss: loss)
            before = [weight.clone() for weight in model.matrices()] if slow else []
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            del before
    return memory.peak
