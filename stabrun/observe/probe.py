"""Statistics of a model's layers, computed on its device by hooks that are attached from outside.

The layout follows the table of metrics (`stabrun.record.metrics`), the values come from
`stabrun.observe.reductions`. The model is not modified, and its results are bit-identical without hooks. Each hook
writes into preallocated fp32 tensors of its own, its cells: torch.compile then sees the same hook in every layer, and
makes one graph for all. A hook overwrites and never adds, so that recomputation (activation checkpointing) is harmless.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabrun.config import ObserveConfig
from stabrun.observe.reductions import REDUCTIONS, AdamState, Parameters, has_adam_state
from stabrun.record import metrics
from stabrun.record.metrics import METRICS, Metric

LINEAR = (metrics.OUTPUT, metrics.INPUT, metrics.INPUT_GRADIENT)  # sources at each linear layer
ONCE = (metrics.PARAMETERS, metrics.UPDATE, metrics.ADAM)  # sources that are read once per step, and not by hooks
SAMPLED = 64  # sequences of a batch that attention is measured on: at long contexts all would cost too much


def find_sites(model: nn.Module) -> dict[str, list[tuple[str, nn.Linear]]]:
    """The linear layers of any model by the last part of their name, in order: site → [(name, layer), …]."""
    sites: dict[str, list[tuple[str, nn.Linear]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            sites.setdefault(name.rsplit(".", 1)[-1], []).append((name, module))
    return sites


@dataclass(frozen=True)
class Span:
    """Where the values of one key of the record are in the buffer, one per layer."""

    metric: Metric
    site: str | None
    start: int
    stop: int

    @property
    def key(self) -> str:
        return self.metric.key.format(site=self.site)


Target = tuple[Metric, Tensor]  # a value that a hook measures, and its cell


class Probe:
    """Measures the linear layers of any `nn.Module`, and optionally its blocks and attention cores.

    `shape` is (batch, time) of each forward pass; `scalars` names the values that the caller adds in `snapshot`.
    `calls` names sites whose layers are called on several equal parts of the sequence in turn, and how many. If several
    ranks share the batch in equal parts, `gather` returns the values `[n]` of each rank, `[ranks, n]`. Attention is
    measured on the first `sampled` sequences.

    The order of calls in a step is: `arm(step)`; for each micro-batch `begin(index)` before its forward pass,
    `part(site, index)` after the backward pass of each part of a site in `calls`, and `merge(index, count)` after its
    backward pass; `before_update`; `after_update`; and `snapshot()`, which starts the copy of all values to the host.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ObserveConfig,
        shape: tuple[int, int],
        blocks: Sequence[nn.Module] = (),
        cores: Sequence[Any] = (),
        scalars: Sequence[str] = ("train/loss", "grad/norm"),
        calls: Mapping[str, int] | None = None,
        gather: Callable[[Tensor], Tensor] = lambda values: values[None],
        sampled: int = SAMPLED,
    ) -> None:
        self.config, self.scalars, self.gather = config, tuple(scalars), gather
        self.calls = {site: count for site, count in (calls or {}).items() if count > 1}
        self.first = len(self.scalars)  # they are the first values in the buffer
        self.fast = self.slow = self.attention = False
        self.batch, self.limit = shape[0], sampled  # sequences of a micro-batch; those that attention is measured on
        self.sequences = min(shape[0], sampled)  # of this micro-batch that attention is measured on
        self.due: list[Span] = []  # what this step measures
        self.reduced: set[str] = set()  # keys of sources in `ONCE` that this step has measured
        parameters = list(model.parameters())
        self.device = parameters[0].device
        self.sites = find_sites(model) if config.every else {}
        blocks, cores = (blocks, cores) if config.every else ((), ())
        self.spans = self._layout(len(blocks), len(cores))
        means = [metric for metric in METRICS.values() if metric.merge == "mean"]
        self.means = self._region(lambda metric: metric in means and metric.source != metrics.ATTENTION)
        self.attention_means = self._region(lambda metric: metric in means and metric.source == metrics.ATTENTION)
        self.maxima = self._region(lambda metric: metric.merge == "max")
        self.roots = self._region(lambda metric: metric.merge == "root")
        self.hooked = self._region(lambda metric: metric.source not in ONCE)
        self.size = self.spans[-1].stop if self.spans else self.first
        batch, time = shape
        hooked = [span for span in self.spans if span.metric.source not in ONCE]
        in_parts = [span for span in hooked if span.site in self.calls]
        self.cells = self._cells(hooked, batch, dict.fromkeys(hooked, time))  # of this micro-batch
        self.part_cells = self._cells(in_parts, batch, {span: time // self.calls[span.site or ""] for span in in_parts})
        self.values = torch.zeros(self.size, device=self.device)  # the step
        self.hosts = [torch.zeros(self.size, pin_memory=self.device.type == "cuda") for _ in range(2)]

        for site, layers in self.sites.items():
            for index, (_, layer) in enumerate(layers):
                self._watch(layer, *(self._targets(source, index, site) for source in LINEAR))
        for index, block in enumerate(blocks):
            self._watch(block, self._targets(metrics.BLOCK, index))
        for index, core in enumerate(cores):
            self._watch_attention(core, self._targets(metrics.ATTENTION, index))

        self.site_weights = {site: [layer.weight for _, layer in layers] for site, layers in self.sites.items()}
        self.weights = [weight for weights in self.site_weights.values() for weight in weights]
        numbers = {id(p): i for i, p in enumerate(parameters)}
        self.weight_index = torch.tensor([numbers[id(w)] for w in self.weights], dtype=torch.long, device=self.device)
        self.block_members = torch.zeros(len(blocks), len(parameters), device=self.device)
        for row, block in zip(self.block_members, blocks, strict=True):
            row[[numbers[id(p)] for p in block.parameters()]] = 1.0
        self.before: list[Tensor] = []

    def _layout(self, n_blocks: int, n_cores: int) -> list[Span]:
        """The buffer, ordered by how values merge over micro-batches; means over tokens come first."""
        merges, spans, start = list(metrics.MERGES), list[Span](), self.first
        for metric in sorted(METRICS.values(), key=lambda metric: (merges.index(metric.merge), not metric.per_token)):
            if metric.source == metrics.STEP:
                continue
            counts: dict[str | None, int] = {None: n_cores if metric.source == metrics.ATTENTION else n_blocks}
            if metric.shape == metrics.BY_SITE:
                counts = {site: len(layers) for site, layers in self.sites.items()}
            for site, count in counts.items():
                if count:
                    spans.append(Span(metric, site, start, start + count))
                    start += count
        return spans

    def _cells(self, spans: Iterable[Span], batch: int, times: Mapping[Span, int]) -> dict[int, Tensor]:
        """Place in the buffer → a tensor for what is measured: a value for each token, or one number."""
        return {
            place: torch.zeros((batch, times[span]) if span.metric.per_token else (), device=self.device)
            for span in spans
            for place in range(span.start, span.stop)
        }

    def _region(self, chosen: Callable[[Metric], bool]) -> slice:
        spans = [span for span in self.spans if chosen(span.metric)]
        return slice(spans[0].start, spans[-1].stop) if spans else slice(self.first, self.first)

    def _targets(self, source: str, index: int, site: str | None = None) -> list[Target]:
        spans = [span for span in self.spans if (span.metric.source, span.site) == (source, site)]
        return [(span.metric, (self.cells | self.part_cells)[span.start + index]) for span in spans]

    # Hooks

    def _on(self, metric: Metric) -> bool:
        return self.slow if metric.slow else self.fast

    def _measure(self, targets: Sequence[Target], x: Tensor) -> None:
        for metric, cell in targets:
            if self._on(metric):
                if metric.per_token:
                    REDUCTIONS[metric.key](x.detach(), out=cell)
                else:
                    cell.copy_(REDUCTIONS[metric.key](x.detach()))

    def _watch(
        self, module: nn.Module, outputs: list[Target], inputs: Sequence[Target] = (), gradients: Sequence[Target] = ()
    ) -> None:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if not (any(self._on(metric) for metric, _ in gradients) and args[0].requires_grad):
                return None
            # A view, so that the gradient is the one through this layer alone.
            x = args[0].view_as(args[0])
            x.register_hook(lambda gradient: self._measure(gradients, gradient))
            return (x, *args[1:])

        def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._measure(outputs, output)
            self._measure(inputs, args[0])

        if gradients:
            module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def _watch_attention(self, core: nn.Module, targets: list[Target]) -> None:
        def after(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            values: dict[str, Tensor] = {}
            for metric, cell in targets:
                if self._on(metric) and self.attention:
                    with torch.no_grad():
                        if metric.key not in values:
                            values |= REDUCTIONS[metric.key](module, *(x[: self.sequences] for x in args[:2]))
                        cell.copy_(values[metric.key])

        core.register_forward_hook(after)

    # What the training loop calls

    def arm(self, step: int) -> None:
        """Select what step `step` measures."""
        every, slow_every = self.config.every, self.config.slow_every
        self.fast = bool(every) and step % every == 0
        self.slow = bool(every and slow_every) and step % slow_every == 0
        self.due, self.reduced = [span for span in self.spans if self._on(span.metric)], set()
        self.begin(0)

    def rest(self) -> None:
        """Measure nothing until the next `arm`; for validation."""
        self.fast = self.slow = False
        self.due = []

    def begin(self, index: int) -> None:
        """Select what micro-batch `index` measures: attention on its share of the first `sampled` sequences."""
        self.sequences = min(self.batch, max(0, self.limit - index * self.batch))
        self.attention = self.sequences > 0

    @torch.no_grad()
    def part(self, site: str, index: int) -> None:
        """Keep what the layers of `site` measured on part `index` of the sequence."""
        for span in self.due if site in self.calls else ():
            if span.site == site and span.metric.source not in ONCE:
                for place in range(span.start, span.stop):
                    whole, part = self.cells[place], self.part_cells[place]
                    if span.metric.per_token:
                        width = part.shape[1]
                        whole[:, index * width : (index + 1) * width] = part
                    else:
                        whole.copy_(torch.hypot(whole, part) if index else part)

    @torch.no_grad()
    def merge(self, index: int, count: int) -> None:
        """Merge micro-batch `index` of `count` equal ones into the values of the step."""
        if not (self.fast or self.slow):
            return
        cells = list(self.cells.values())
        tokens = sum(cell.dim() > 0 for cell in cells)  # they come first
        parts = [torch.stack(cells[:tokens]).mean((1, 2))]
        if tokens < len(cells):
            parts.append(torch.stack(cells[tokens:]))
        now = self.values.new_zeros(self.size)
        now[self.hooked] = torch.cat(parts)
        if count == 1:
            self.values[self.hooked].copy_(now[self.hooked])
            return
        if index == 0:
            self.values.zero_()
            self.values[self.maxima] = float("-inf")
        means, maxima, roots = self.means, self.maxima, self.roots
        self.values[means] += now[means] / count
        self.values[maxima] = torch.maximum(self.values[maxima], now[maxima])
        self.values[roots] = torch.hypot(self.values[roots], now[roots])
        if self.attention:
            share = self.sequences / min(self.limit, self.batch * count)
            self.values[self.attention_means] += now[self.attention_means] * share

    @torch.no_grad()
    def before_update(self, gradient_norms: Tensor, loss_scale: Tensor | None = None) -> None:
        """Measure weights and gradients; keep the weights if their change is measured.

        `gradient_norms`, `[parameters]`, are those of each parameter's gradient before clipping, in the model's order.
        `loss_scale`, 0-dim, is the factor of the loss in the backward pass; `gradient_norms` do not contain it.
        """
        if loss_scale is not None:
            for place in joined(span for span in self.due if span.metric.source == metrics.INPUT_GRADIENT):
                self.values[place] /= loss_scale
        parameters = Parameters(self.weights, gradient_norms, self.weight_index, self.block_members)
        self._reduce(metrics.PARAMETERS, parameters)
        if self._is_due(metrics.UPDATE):
            self.before = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure the update, and Adam's state of the sites whose weights all have one."""
        if self._is_due(metrics.UPDATE):
            for before, weight in zip(self.before, self.weights, strict=True):
                before.sub_(weight)
            self._reduce(metrics.UPDATE, self.before)
            self.before = []
        if self._is_due(metrics.ADAM):
            sites = [site for site, weights in self.site_weights.items() if has_adam_state(weights, optimizer)]
            if weights := [weight for site in sites for weight in self.site_weights[site]]:
                self._reduce(metrics.ADAM, AdamState.of(weights, optimizer), sites)

    def _is_due(self, source: str) -> bool:
        return any(span.metric.source == source for span in self.due)

    def _reduce(self, source: str, given: Any, sites: Collection[str] | None = None) -> None:
        """Write the metrics of a source that is read once per step; those by site only for `sites`, by default all."""
        due = [s for s in self.due if s.metric.source == source and (sites is None or s.site in sites)]
        self.reduced |= {span.key for span in due}
        for metric in dict.fromkeys(span.metric for span in due):
            places = joined(span for span in due if span.metric is metric)
            parts = REDUCTIONS[metric.key](given).split([place.stop - place.start for place in places])
            for place, part in zip(places, parts, strict=True):
                self.values[place] = part

    def _merge_ranks(self, ranks: Tensor) -> None:
        """Merge the values of each rank, `[ranks, n]`. What all compute alike is the first one's: their rows are equal.

        A loss and a statistic over tokens are means of equal parts, as in `merge`.
        """
        if len(ranks) == 1:
            return
        self.values.copy_(ranks[0])
        losses = [slice(n, n + 1) for n, name in enumerate(self.scalars) if METRICS[name].merge == "mean"]
        for place in (*losses, self.means, self.attention_means):
            self.values[place] = ranks[:, place].mean(0)
        self.values[self.maxima] = ranks[:, self.maxima].amax(0)
        self.values[self.roots] = torch.linalg.vector_norm(ranks[:, self.roots], dim=0)

    @torch.no_grad()
    def snapshot(self, *scalars: Tensor) -> "PendingRow":
        """Start the copy of the step's values, `scalars` first, to the host; only `PendingRow.read` waits for it."""
        for slot, value in enumerate(scalars):
            self.values[slot] = value
        self._merge_ranks(self.gather(self.values))
        self.hosts.reverse()
        host = self.hosts[0]
        on_cuda = self.device.type == "cuda"  # elsewhere a copy cannot be waited for: pytorch issue 140296
        host.copy_(self.values, non_blocking=on_cuda)
        event = None
        if on_cuda:
            event = torch.cuda.Event()
            event.record()
        measured = [span for span in self.due if span.metric.source not in ONCE or span.key in self.reduced]
        return PendingRow(self.scalars, host, event, measured)


def joined(spans: Iterable[Span]) -> list[slice]:
    """The places of spans in the buffer; adjacent ones become one, so that they are written by one copy."""
    places: list[slice] = []
    for span in spans:
        if places and places[-1].stop == span.start:
            places[-1] = slice(places[-1].start, span.stop)
        else:
            places.append(slice(span.start, span.stop))
    return places


@dataclass(frozen=True)
class PendingRow:
    """The values of a step on their way to the host; valid until the second snapshot after this one."""

    scalars: tuple[str, ...]
    host: Tensor
    event: "torch.cuda.Event | None"
    spans: list[Span]

    def read(self) -> dict[str, Any]:
        """The scalars by name, and a list over layers for each key that the step measured."""
        if self.event is not None:
            self.event.synchronize()
        values = self.host.tolist()
        row: dict[str, Any] = dict(zip(self.scalars, values, strict=False))
        return row | {span.key: values[span.start : span.stop] for span in self.spans}
