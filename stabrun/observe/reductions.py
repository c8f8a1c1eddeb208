"""How each statistic is computed: the functions behind the metrics that the probe measures.

A statistic is declared in `stabrun.record.metrics` and registered in `REDUCTIONS` under its key. What a reduction is
given and returns depends on the metric's source:

- `OUTPUT`, `INPUT`, `BLOCK`: a detached tensor `[…, width]`; returns the value of each token, `[…]`.
- `INPUT_GRADIENT`: a gradient `[…, width]`; returns a 0-dim tensor.
- `ATTENTION`: the core, queries and keys `[batch, heads, time, width]`; returns a 0-dim tensor for each of its keys.
- `PARAMETERS`: `Parameters`; `UPDATE`: `Update`; `ADAM`: `AdamState`. Returns the values of all layers or blocks, in
  order, `[n]`. Their `owners` is None if each layer has one weight of its own.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from stabrun.model.switches import scores_at_once
from stabrun.observe.norms import tensor_norms

FAR_BELOW = -1e30  # masks future positions; finite, because 0 · −∞ is NaN in the entropy


class Core(Protocol):
    """What the reductions need of an attention core, such as `stabrun.model.attention.AttentionCore`."""

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        """QKᵀ/√d, `[batch, heads, queries, keys]`."""
        ...

    def shaped(self, logits: Tensor) -> Tensor:
        """The input of the softmax, as a new tensor; the queries are those of the last keys."""
        ...


@runtime_checkable
class Masked(Protocol):
    """An attention core with a mask of its own; those without one attend to the past."""

    def masked(self, q: Tensor, k: Tensor, start: int, stop: int) -> Tensor:
        """The logits of the queries `start` … `stop` − 1 at all keys, as a new tensor; FAR_BELOW where masked."""
        ...


@dataclass(frozen=True)
class Owners:
    """Pairs of a layer and one of its weights: layers may share a weight, and have several."""

    layers: Tensor  # [pairs]: positions in the list of layers
    weights: Tensor  # [pairs]: positions in the list of weights
    count: int  # of layers


@dataclass(frozen=True)
class Parameters:
    """The weights of the layers, and all gradients, before the update."""

    weights: list[Tensor]
    gradient_norms: Tensor  # [parameters]: norm of each gradient before clipping, in the model's order
    weight_index: Tensor  # [len(weights)]: positions of the weights in that order
    block_members: Tensor  # [blocks, parameters]: 1 if the parameter belongs to the block, else 0
    owners: Owners | None = None


@dataclass(frozen=True)
class Update:
    """The changes of the weights by an update."""

    changes: list[Tensor]
    owners: Owners | None = None


@dataclass(frozen=True)
class AdamState:
    """Adam's moments of some weights after the update."""

    gradients: list[Tensor]  # after clipping
    first: list[Tensor]
    second: list[Tensor]
    correction: Tensor  # [len(first)]: 1 − β₂ᵗ, the bias of the second moment
    owners: Owners | None = None

    @classmethod
    def of(cls, weights: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> "AdamState":
        """The state of `weights`, all of which have one (`has_adam_state`)."""
        states = [optimizer.state[weight] for weight in weights]
        betas = {id(p): group["betas"] for group in optimizer.param_groups if "betas" in group for p in group["params"]}
        steps = torch.stack([state["step"] for state in states]).to(weights[0].device)
        runs = [(beta2, len(list(run))) for beta2, run in groupby(betas[id(weight)][1] for weight in weights)]
        # One power for each run of equal β₂: a tensor of bases would be rounded otherwise on CUDA.
        parts = zip(runs, steps.split([count for _, count in runs]), strict=True)
        return cls(
            [weight.grad for weight in weights if weight.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            torch.cat([1 - beta2**part for (beta2, _), part in parts]),
        )


def has_adam_state(weights: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> bool:
    """Whether all weights have a gradient, and the optimizer keeps Adam's moments of each."""
    needed = {"step", "exp_avg", "exp_avg_sq"}
    return all(w.grad is not None and needed <= optimizer.state.get(w, {}).keys() for w in weights)


def layer_sums(values: Tensor, owners: Owners | None) -> Tensor:
    """Values of weights `[n]` added up by layer, `[layers]`."""
    if owners is None:
        return values
    return values.new_zeros(owners.count).index_add_(0, owners.layers, values[owners.weights])


def layer_norms(norms: Tensor, owners: Owners | None) -> Tensor:
    """Norm over all weights of each layer `[layers]`, from those of the weights `[n]`."""
    return norms if owners is None else layer_sums(norms.square(), owners).sqrt()


def token_norms(x: Tensor) -> Tensor:
    """L2 norm of each token's vector in fp32 at least: `[…, width]` → `[…]`."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


def norm(x: Tensor) -> Tensor:
    """L2 norm over all elements, in fp32 at least."""
    return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))


def past_logits(core: Core, q: Tensor, k: Tensor, start: int, stop: int) -> Tensor:
    """The logits of the queries `start` … `stop` − 1 at the keys up to `stop`; future ones are FAR_BELOW."""
    logits = core.logits(q[:, :, start:stop], k[:, :, :stop])
    return logits.add_(torch.full(logits.shape[-2:], FAR_BELOW, device=q.device).triu(1 + start))


def query_blocks(q: Tensor, k: Tensor) -> list[tuple[int, int]]:
    """First and last query, the latter excluded, of blocks whose logits at all keys are in memory at a time."""
    batch, heads, time, _ = q.shape
    queries = min(time, max(1, scores_at_once(q.device.type) // (batch * heads * k.shape[2])))
    return [(start, min(start + queries, time)) for start in range(0, time, queries)]


def largest_logits(core: Core, q: Tensor, k: Tensor) -> Tensor:
    """Largest logit of each head over visible positions, `[heads]`: of the past, as in a core without a mask."""
    return torch.stack([past_logits(core, q, k, *block).amax((0, 2, 3)) for block in query_blocks(q, k)]).amax(0)


def attention_statistics(core: Core, q: Tensor, k: Tensor) -> dict[str, Tensor]:
    """Largest logit over visible positions, and mean entropy of the rows of the softmax, some queries at a time.

    With logits s relative to the largest of their row, p = softmax(s) and log p = s + log max p. The entropy of a row,
    −Σ p log p, is therefore −Σ p·s − log max p: no logarithm of a full matrix, and no difference of large numbers.
    """
    batch, heads, time, _ = q.shape
    peaks, entropies = [], []
    for start, stop in query_blocks(q, k):
        logits = core.masked(q, k, start, stop) if isinstance(core, Masked) else past_logits(core, q, k, start, stop)
        peaks.append(logits.amax())
        shaped = core.shaped(logits)
        shaped.sub_(shaped.amax(-1, keepdim=True))
        p = shaped.softmax(-1)
        # Elementwise, because autocast would round a matrix product; in place, to save memory.
        entropies.append(-shaped.mul_(p).sum() - p.amax(-1).log().sum())
    entropy = torch.stack(entropies).sum() / (batch * heads * time)
    return {"attn/max_logit": torch.stack(peaks).amax(), "attn/entropy": entropy}


def surprise(adam: AdamState) -> Tensor:
    """Mean squared gradient over the mean bias-corrected second moment."""
    squares, usual = tensor_norms(adam.gradients).square(), tensor_norms(adam.second, 1) / adam.correction
    return layer_sums(squares, adam.owners) / layer_sums(usual, adam.owners)


REDUCTIONS: dict[str, Callable[..., Any]] = {
    "norm/out/{site}": token_norms,
    "norm/in/{site}": token_norms,
    "residual/norm": token_norms,
    "norm/in_grad/{site}": norm,
    "attn/max_logit": attention_statistics,
    "attn/entropy": attention_statistics,
    "norm/weight/{site}": lambda parameters: layer_norms(tensor_norms(parameters.weights), parameters.owners),
    "norm/grad/{site}": lambda given: layer_norms(given.gradient_norms[given.weight_index], given.owners),
    "grad/norm_by_layer": lambda parameters: (parameters.block_members @ parameters.gradient_norms.square()).sqrt(),
    "norm/update/{site}": lambda update: layer_norms(tensor_norms(update.changes), update.owners),
    "norm/adam_m/{site}": lambda adam: layer_norms(tensor_norms(adam.first), adam.owners),
    "norm/adam_v/{site}": lambda adam: layer_norms(tensor_norms(adam.second), adam.owners),
    "adam/surprise/{site}": surprise,
}
"""Key of a metric → its reduction."""
