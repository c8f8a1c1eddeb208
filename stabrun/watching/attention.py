"""Attention statistics of models that call torch's scaled_dot_product_attention, found without changing them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from stabrun.observe.hooks import Hook
from stabrun.observe.probe import Probe, Target
from stabrun.observe.reductions import FAR_BELOW
from stabrun.record import metrics
from stabrun.watching.tap import Tap

SDPA = Tap("scaled_dot_product_attention", F)


@dataclass(frozen=True)
class Scores:
    """The logits of one call of scaled_dot_product_attention, whose arguments these are."""

    mask: Tensor | None
    causal: bool
    scale: float

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        """QKᵀ · scale in fp32; groups of query heads share a head of keys."""
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return (q @ k.transpose(-1, -2)).float() * self.scale

    def shaped(self, logits: Tensor) -> Tensor:
        return logits.clone()

    def masked(self, q: Tensor, k: Tensor, start: int, stop: int) -> Tensor:
        logits = self.logits(q[:, :, start:stop], k)
        if self.causal:
            logits += torch.full(logits.shape[-2:], FAR_BELOW, device=q.device).triu(1 + start)
        if self.mask is not None:
            mask = self.mask[: len(q)] if self.mask.dim() == 4 else self.mask
            mask = mask[..., start:stop, :] if mask.shape[-2] > 1 else mask
            hidden = ~mask if mask.dtype == torch.bool else mask.float()
            logits = logits.masked_fill(hidden, FAR_BELOW) if mask.dtype == torch.bool else logits + hidden
        return logits.clamp_min_(FAR_BELOW)


class Attention:
    """Measures the calls of scaled_dot_product_attention within the blocks of a probe, in the steps that are due.

    Nothing is changed in other steps: the function is replaced from `listen` to `rest` only.
    """

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        # What is measured in the block that is running. A list: Dynamo of torch 2.13 loses the change of an attribute
        # if a hook of a tensor is registered in between.
        self.running: list[Sequence[Target] | None] = [None]
        self.listening = False
        self.handles: list[RemovableHandle] = []
        for stack, blocks in probe.sites.stacks.items():
            for index, block in enumerate(blocks.values()):
                self._watch(block, probe.targets.get((metrics.ATTENTION, stack, index), []))

    def _watch(self, block: nn.Module, targets: Sequence[Target]) -> None:
        def enter(*_: Any) -> None:
            if self.listening:
                self.running[0] = targets

        def leave(*_: Any) -> None:
            if self.listening:
                self.running[0] = None

        self.handles += [block.register_forward_pre_hook(Hook(enter)), block.register_forward_hook(Hook(leave))]

    def listen(self) -> None:
        """Measure until `rest`, if the step that the probe is armed for does."""
        due = any(span.metric.source == metrics.ATTENTION for span in self.probe.due)
        if due and not self.listening:
            self.listening = True
            SDPA.add(self.heard)

    def rest(self) -> None:
        self.running[0], self.listening = None, False
        SDPA.remove(self.heard)

    def heard(
        self,
        result: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        """Measure a call; those with tensors that are not `[batch, heads, time, width]` are left out."""
        targets = self.running[0]
        if targets is None or query.dim() != 4:
            return
        scores = Scores(attn_mask, is_causal, query.shape[-1] ** -0.5 if scale is None else scale)
        self.probe.attend(targets, scores, query.detach(), key.detach())

    def remove(self) -> None:
        """Remove all hooks."""
        self.rest()
        for handle in self.handles:
            handle.remove()
