"""Statistics of a model's layers, reduced on its device and attached from outside.

Hooks write 0-dim fp32 reductions into one preallocated buffer; the model knows nothing of them and its numbers are
the same bits without them. A hook overwrites, never adds, so that recomputation (activation checkpointing) does no
harm. Shapes: `[B, T, width]` at a linear layer, `[B, h, T, d]` at an attention core.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stabrun.config import ObserveConfig

SCORES_AT_ONCE = 1 << 27  # attention logits held at a time, so that long contexts fit

FAR_BELOW = -1e30  # stands for the future in a row's maximum; finite, for 0 · −∞ is no entropy


class Core(Protocol):
    """What an attention core offers to be observed; see `stabrun.model.attention.AttentionCore`."""

    def logits(self, q: Tensor, k: Tensor) -> Tensor: ...

    def shaped(self, logits: Tensor) -> Tensor:
        """A new tensor: what the softmax takes."""
        ...


def find_sites(model: nn.Module) -> dict[str, list[tuple[str, nn.Linear]]]:
    """The linear layers of any model by the last part of their name, in order: site → [(name, layer), …]."""
    sites: dict[str, list[tuple[str, nn.Linear]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            sites.setdefault(name.rsplit(".", 1)[-1], []).append((name, module))
    return sites


def token_norms(x: Tensor, out: Tensor) -> None:
    """L2 norm of each token's vector in fp32: `[B, T, width]` → `out`, `[B, T]`."""
    torch.linalg.vector_norm(x.detach(), dim=-1, dtype=torch.float32, out=out)


def attention_statistics(core: Core, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Largest logit over the past, and mean entropy of the rows of the softmax; 0-dim each.

    With logits s below their row's largest, p = softmax(s) and so log p = s + log max p, a row's entropy −Σ p log p
    is −Σ p·s − log max p: no logarithm of a whole matrix, and no difference of large numbers.
    """
    batch, heads, time, _ = q.shape
    chunk = max(1, SCORES_AT_ONCE // (heads * time * time))
    future = torch.full((time, time), FAR_BELOW, device=q.device).triu(1)
    peaks, entropies = [], []
    for some_q, some_k in zip(q.split(chunk), k.split(chunk), strict=True):
        logits = core.logits(some_q, some_k)
        peaks.append(logits.add_(future).amax())
        shaped = core.shaped(logits)
        shaped.sub_(shaped.amax(-1, keepdim=True))
        p = shaped.softmax(-1)
        # Elementwise, for autocast would round a matrix product; in place, for `shaped` is as large as memory allows.
        entropies.append(-shaped.mul_(p).sum() - p.amax(-1).log().sum())
    return torch.stack(peaks).amax(), torch.stack(entropies).sum() / (batch * heads * time)


@dataclass(frozen=True)
class Span:
    """Where the values of one key of the record lie in the buffer, one a layer."""

    key: str
    start: int
    stop: int
    slow: bool


class Probe:
    """Watches the linear layers of any `nn.Module`, and optionally its blocks and attention cores.

    Each forward pass takes `shape` tokens, batch and sequence. A step goes: `arm(step)`; after each micro-batch's
    backward pass `merge(index, count)`; `before_update`; `after_update`; and `snapshot()`, which copies all values to
    the host without waiting for them.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ObserveConfig,
        shape: tuple[int, int],
        blocks: Sequence[nn.Module] = (),
        cores: Sequence[Any] = (),
        scalars: Sequence[str] = ("train/loss", "grad/norm"),
    ) -> None:
        self.config, self.scalars = config, tuple(scalars)
        self.first = len(self.scalars)  # they take the first slots of the buffer
        self.fast = self.slow = False
        self.spans: list[Span] = []
        self.size = self.first
        parameters = dict(model.named_parameters())
        self.device = next(iter(parameters.values())).device
        self.sites = find_sites(model) if config.every else {}
        blocks, cores = (blocks, cores) if config.every else ((), ())
        self._lay_out(len(blocks), len(cores))
        self.now = torch.zeros(self.size, device=self.device)  # this micro-batch
        self.norms = torch.zeros(self.by_token.stop - self.first, *shape, device=self.device)
        self.rows = self.norms.unbind(0)
        self.values = torch.zeros(self.size, device=self.device)  # the step
        self.hosts = [self._host() for _ in range(2)]

        for site, layers in self.sites.items():
            for index, (_, layer) in enumerate(layers):
                self._watch_linear(layer, *(self._slot(f"norm/{part}/{site}", index) for part in FORWARD))
        for index, block in enumerate(blocks):
            self._watch_block(block, self._slot("residual/norm", index))
        for index, core in enumerate(cores):
            slots = self._slot("attn/max_logit", index), self._slot("attn/entropy", index)
            core.register_forward_hook(self._attention_hook(*slots))

        self.weights = [layer.weight for layers in self.sites.values() for _, layer in layers]
        self.weight_norms, self.gradient_norms = self._region("norm/weight/"), self._region("norm/grad/")
        self.layer_norms = self._region("grad/norm_by_layer")
        self.update_values = self._region("norm/update/", "adam/surprise/")
        numbers = {id(p): i for i, p in enumerate(parameters.values())}
        self.weight_index = torch.tensor(
            [numbers[id(weight)] for weight in self.weights], dtype=torch.long, device=self.device
        )
        members = torch.zeros(len(blocks), len(parameters), device=self.device)
        for row, block in zip(members, blocks, strict=True):
            row[[numbers[id(p)] for p in block.parameters()]] = 1.0
        self.members = members
        self.before: list[Tensor] = []

    def _lay_out(self, n_blocks: int, n_cores: int) -> None:
        """Order the buffer by how micro-batches merge: means, then maxima, then roots, then once a step."""

        def by_site(part: str, slow: bool) -> None:
            for site, layers in self.sites.items():
                self._add(part.format(site=site), len(layers), slow)

        by_site("norm/out/{site}", slow=False)
        by_site("norm/in/{site}", slow=False)
        self._add("residual/norm", n_blocks, slow=False)
        self.by_token = slice(self.first, self.size)
        self._add("attn/entropy", n_cores, slow=True)
        self.means = slice(self.first, self.size)
        self._add("attn/max_logit", n_cores, slow=True)
        self.maxima = slice(self.means.stop, self.size)
        by_site("norm/in_grad/{site}", slow=True)
        self.roots = slice(self.maxima.stop, self.size)
        by_site("norm/weight/{site}", slow=False)
        by_site("norm/grad/{site}", slow=False)
        self._add("grad/norm_by_layer", n_blocks, slow=False)
        for part in UPDATE:
            by_site(part, slow=True)

    def _add(self, key: str, count: int, slow: bool) -> None:
        self.spans.append(Span(key, self.size, self.size + count, slow))
        self.size += count

    def _slot(self, key: str, index: int) -> int:
        return next(span.start for span in self.spans if span.key == key) + index

    def _region(self, first: str, last: str | None = None) -> slice:
        """From the first span whose key starts with `first` to the last that starts with `last`."""
        starts = [span.start for span in self.spans if span.key.startswith(first)]
        stops = [span.stop for span in self.spans if span.key.startswith(last or first)]
        return slice(starts[0], stops[-1]) if starts else slice(0, 0)

    def _host(self) -> Tensor:
        return torch.zeros(self.size, pin_memory=self.device.type == "cuda")

    # What hooks do

    def _watch_linear(self, layer: nn.Linear, out_slot: int, in_slot: int, grad_slot: int) -> None:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if not (self.slow and args[0].requires_grad):
                return None
            # A view of its own, so that the gradient is the one through this layer alone.
            x = args[0].view_as(args[0])
            x.register_hook(note_gradient)
            return (x, *args[1:])

        def note_gradient(gradient: Tensor) -> None:
            self.now[grad_slot] = torch.linalg.vector_norm(gradient, dtype=torch.float32)

        def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self.fast:
                token_norms(output, self.rows[out_slot - self.first])
                token_norms(args[0], self.rows[in_slot - self.first])

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)

    def _watch_block(self, block: nn.Module, slot: int) -> None:
        def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self.fast:
                token_norms(output, self.rows[slot - self.first])

        block.register_forward_hook(after)

    def _attention_hook(self, peak_slot: int, entropy_slot: int) -> Callable:
        def after(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self.slow:
                with torch.no_grad():
                    peak, entropy = attention_statistics(module, args[0], args[1])
                    self.now[peak_slot] = peak
                    self.now[entropy_slot] = entropy

        return after

    # What the training loop calls

    def arm(self, step: int) -> None:
        """Decide what step `step` measures."""
        every, slow_every = self.config.every, self.config.slow_every
        self.fast = bool(every) and step % every == 0
        self.slow = bool(every and slow_every) and step % slow_every == 0

    def rest(self) -> None:
        """Measure nothing until the next `arm`: for validation."""
        self.fast = self.slow = False

    @torch.no_grad()
    def merge(self, index: int, count: int) -> None:
        """Take in micro-batch `index` of `count` equal ones."""
        if not (self.fast or self.slow):
            return
        if self.fast:
            torch.mean(self.norms, dim=(1, 2), out=self.now[self.by_token])
        if count == 1:
            self.values[: self.roots.stop].copy_(self.now[: self.roots.stop])
            return
        if index == 0:
            self.values.zero_()
            self.values[self.maxima] = float("-inf")
        means, maxima, roots = self.means, self.maxima, self.roots
        self.values[means] += self.now[means] / count
        self.values[maxima] = torch.maximum(self.values[maxima], self.now[maxima])
        self.values[roots] = torch.hypot(self.values[roots], self.now[roots])

    @torch.no_grad()
    def before_update(self, gradient_norms: Tensor, loss_scale: Tensor | None = None) -> None:
        """`gradient_norms`, `[parameters]`: of each parameter's gradient before clipping, in the model's order.

        `loss_scale`, 0-dim, is what the loss was multiplied by in the backward pass; `gradient_norms` are free of it.
        """
        if loss_scale is not None and self.slow:
            self.values[self.roots] /= loss_scale
        if self.fast and self.weights:
            self.values[self.weight_norms] = torch.stack(torch._foreach_norm(self.weights))
            self.values[self.gradient_norms] = gradient_norms[self.weight_index]
            self.values[self.layer_norms] = (self.members @ gradient_norms.square()).sqrt()
        if self.slow:
            self.before = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Norms of the update and of Adam's moments, on slow steps."""
        if not (self.slow and self.weights):
            return
        weights = self.weights
        states = [optimizer.state[w] for w in weights]
        second = [state["exp_avg_sq"] for state in states]
        torch._foreach_sub_(self.before, weights)
        beta2 = optimizer.param_groups[0]["betas"][1]
        steps = torch.stack([state["step"] for state in states]).to(self.device)
        seen = torch.stack(torch._foreach_norm([w.grad for w in weights if w.grad is not None])).square()
        usual = torch.stack(torch._foreach_norm(second, 1)) / (1 - beta2**steps)
        groups = (
            torch.stack(torch._foreach_norm(self.before)),
            torch.stack(torch._foreach_norm([state["exp_avg"] for state in states])),
            torch.stack(torch._foreach_norm(second)),
            seen / usual,
        )
        self.values[self.update_values] = torch.cat(groups)
        self.before = []

    def snapshot(self, *scalars: Tensor) -> "PendingRow":
        """Start the copy of the step's values, `scalars` first, to the host; nothing waits until `PendingRow.read`."""
        for slot, value in enumerate(scalars):
            self.values[slot] = value
        self.hosts.reverse()
        host = self.hosts[0]
        host.copy_(self.values, non_blocking=True)
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        spans = [span for span in self.spans if (self.slow if span.slow else self.fast)]
        return PendingRow(self.scalars, host, event, spans)


FORWARD = ("out", "in", "in_grad")
UPDATE = ("norm/update/{site}", "norm/adam_m/{site}", "norm/adam_v/{site}", "adam/surprise/{site}")


@dataclass(frozen=True)
class PendingRow:
    """A step's values on their way to the host; good until the snapshot after next is taken."""

    scalars: tuple[str, ...]
    host: Tensor
    event: "torch.cuda.Event | None"
    spans: list[Span]

    def read(self) -> dict[str, Any]:
        """The scalars by name, and a list over layers for each key measured in this step."""
        if self.event is not None:
            self.event.synchronize()
        values = self.host.tolist()
        row: dict[str, Any] = dict(zip(self.scalars, values, strict=False))
        row.update({span.key: values[span.start : span.stop] for span in self.spans if span.stop > span.start})
        return row
