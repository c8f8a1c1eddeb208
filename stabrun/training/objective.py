"""The training objective: cross-entropy and z-loss, of a part of the sequence at a time."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stabrun.model.gpt import GPT

Terms = tuple[Tensor, ...]
Context = Callable[[], AbstractContextManager[object]]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean −log p of the targets, in nats: `[B, T, V]` and `[B, T]` → 0-dim."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def z_loss(logits: Tensor, weight: float) -> Tensor:
    """weight · mean (log Z)², Z = Σ exp(logit), in nats² (PaLM, arXiv 2204.02311, section 5): `[B, T, V]` → 0-dim."""
    return weight * torch.logsumexp(logits, dim=-1).square().mean()


class Objective:
    """The terms of the objective of a model: the cross-entropy in nats, and the z-loss if it has a weight.

    The sequence is split into `parts` equal parts after the last block. The output layer and the loss of a part are
    computed, and differentiated, before those of the next, so that only the logits of one part are in memory at a time.
    `autocast` makes the context of forward passes.
    """

    def __init__(self, model: GPT, z_weight: float, parts: int, autocast: Context = nullcontext) -> None:
        self.model, self.z_weight, self.parts, self.autocast = model, z_weight, parts, autocast
        self.terms = self.uncompiled_terms

    def compile(self, **options: Any) -> None:
        """Compile the output layer and the loss; `options` are those of torch.compile."""
        self.terms = torch.compile(self.uncompiled_terms, **options)

    def uncompiled_terms(self, hidden: Tensor, targets: Tensor) -> Terms:
        """The terms on the inputs of the output layer `[B, T, d_model]` and the next tokens `[B, T]`; 0-dim each."""
        logits = self.model.logits(hidden)
        loss = cross_entropy(logits, targets)
        return (loss, z_loss(logits, self.z_weight)) if self.z_weight else (loss,)

    def mean(self, tokens: Tensor) -> Terms:
        """The terms on tokens `[B, T + 1]`, each predicted from those before it."""
        with self.autocast():
            pairs = self.pairs(self.model.hidden(tokens[:, :-1]), tokens)
            terms = [self.terms(*pair) for pair in pairs]
        return tuple(sum(part[1:], part[0]) / self.parts for part in zip(*terms, strict=True))

    def accumulate(self, tokens: Tensor, count: int, scaled: Callable[[Tensor], Tensor]) -> Terms:
        """Add the gradient of the mean objective over tokens `[B, T + 1]`, divided by `count`, to the parameters'.

        `scaled` is applied to the loss. Returns the terms divided by `count`.
        """
        with self.autocast():
            hidden = self.model.hidden(tokens[:, :-1])
        totals: Terms = ()
        leaves = []
        for inputs, targets in self.pairs(hidden, tokens):
            leaves.append(inputs if self.parts == 1 else inputs.detach().requires_grad_())
            with self.autocast():
                terms = [term / (self.parts * count) for term in self.terms(leaves[-1], targets)]
            scaled(sum(terms[1:], terms[0])).backward()
            done = [term.detach() for term in terms]
            totals = tuple(map(torch.add, totals, done)) if totals else tuple(done)
        if self.parts > 1:
            hidden.backward(torch.cat([leaf.grad for leaf in leaves if leaf.grad is not None], dim=1))
        return totals

    def pairs(self, hidden: Tensor, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs of the output layer and next tokens of each part."""
        return zip(hidden.chunk(self.parts, 1), tokens[:, 1:].chunk(self.parts, 1), strict=True)
