"""Statistics of a model's layers, computed on its device by hooks that are attached from outside.

The layout follows the table of metrics (`stabrun.record.metrics`), the values come from
`stabrun.observe.reductions`. The model is not modified, and its results are bit-identical without hooks. Values of
tokens go to `stabrun.observe.token_means`; for the others, each hook has preallocated fp32 tensors of its own, its
cell: torch.compile then sees the same hook in every layer, and makes one graph for all. Both hold sums and counts, so
that recomputation (activation checkpointing), which doubles them, changes no mean.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stabrun.config import ObserveConfig, UserError
from stabrun.model.switches import SAMPLED
from stabrun.observe.hooks import Hook
from stabrun.observe.indices import Indices
from stabrun.observe.reductions import REDUCTIONS, AdamState, Core, Owners, Parameters, Update, has_adam_state
from stabrun.observe.sites import Layer, Sites
from stabrun.observe.token_means import Row, TokenMeans
from stabrun.record import metrics
from stabrun.record.metrics import METRICS, Metric

LINEAR = (metrics.OUTPUT, metrics.INPUT, metrics.INPUT_GRADIENT)  # sources at each linear layer
BY_TOKEN = (metrics.OUTPUT, metrics.INPUT, metrics.BLOCK)  # sources whose reductions return a value of each token
ONCE = (metrics.PARAMETERS, metrics.UPDATE, metrics.ADAM)  # sources that are read once per step, and not by hooks
WEIGHT = "norm/weight/{site}"  # the sites that have it have weights


class Cell(NamedTuple):
    """What a hook measures in a micro-batch, 0-dim each: the merged value, and the elements or sequences in it."""

    value: Tensor
    number: Tensor

    @classmethod
    def empty(cls, device: torch.device) -> "Cell":
        return cls(torch.zeros((), device=device), torch.zeros((), device=device))


class Target(NamedTuple):
    """A value that a hook measures, and where it goes. Compiled code guards each field that it reads."""

    key: str
    slow: bool
    merge: str
    reduce: Callable[..., Any]
    into: Cell | Row


@dataclass(frozen=True)
class Span:
    """Where the values of one key of the record are in the buffer: one per layer, of those that are `present`.

    `site` is the site, or the name of the stack of a metric by layer. `counts` is where their counts begin.
    """

    metric: Metric
    site: str
    start: int
    present: tuple[bool, ...]
    single: bool
    counts: int | None = None

    @property
    def stop(self) -> int:
        return self.start + len(self.present)

    @property
    def key(self) -> str:
        by_site = self.metric.shape == metrics.BY_SITE
        return self.metric.key.format(site=self.site) if by_site or not self.site else f"{self.metric.key}/{self.site}"

    def read(self, values: Sequence[float]) -> Any:
        """What the row holds: a list over layers, None for one that was not called; a number for a single site."""
        numbers: list[float | None] = list(values[self.start : self.stop])
        if self.counts is not None:
            counts = values[self.counts : self.counts + len(numbers)]
            mean = self.metric.merge == "mean"
            pairs = zip(values[self.start : self.stop], counts, strict=True)
            numbers = [(value / count if mean else value) if count else None for value, count in pairs]
        numbers = [number if here else None for number, here in zip(numbers, self.present, strict=True)]
        return numbers[0] if self.single else numbers


def add(merge: str, cell: Cell, value: Tensor, count: int) -> None:
    """Add a 0-dim value of `count` elements or sequences to a cell."""
    if merge == "mean":
        cell.value.add_(value)
    else:
        cell.value.copy_((torch.maximum if merge == "max" else torch.hypot)(cell.value, value))
    cell.number.add_(count)


class Probe:
    """Measures the layers of any `nn.Module`, and optionally its blocks and attention cores, in passes with gradients.

    `sites` says where. The model is on its device, and stays there. `batch` is the number of sequences of each
    micro-batch; None if that is unknown: attention is then measured on the first `sampled` of each. `cores` are the
    attention modules of a stack whose inputs are queries and keys. `scalars` names the values that the caller adds in
    `snapshot`. If several ranks share the batch, `gather` returns the values `[n]` of each rank, `[ranks, n]`;
    `averaged` says whether each rank's loss is the mean over its own part, and the gradients of the ranks are averaged.
    Attention is measured on the first `sampled` sequences.

    The order of calls in a step is: `arm(step)`; for each micro-batch `begin(index)` before its forward pass and
    `merge()` after its backward pass; `before_update`; `after_update`; and `snapshot()`, which starts the copy of all
    values to the host.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ObserveConfig,
        sites: Sites,
        batch: int | None = None,
        cores: Sequence[Any] = (),
        scalars: Sequence[str] = ("train/loss", "grad/norm"),
        gather: Callable[[Tensor], Tensor] = lambda values: values[None],
        sampled: int = SAMPLED,
        averaged: bool = False,
    ) -> None:
        self.config, self.scalars, self.gather, self.averaged = config, tuple(scalars), gather, averaged
        self.model, self.sites = model, sites if config.every else Sites()
        self.fast = self.slow = self.attention = False
        self.batch, self.limit = batch, sampled  # sequences of a micro-batch; those that attention is measured on
        self.sequences = sampled  # of this micro-batch that attention is measured on
        self.due: list[Span] = []  # what this step measures
        self.reduced: set[str] = set()  # keys of sources in `ONCE` that this step has measured
        self.device = next(model.parameters()).device
        self.indices = Indices(self.device)
        self.first = len(self.scalars)  # they are the first values in the buffer
        self.spans = self._layout(cores if config.every else ())
        self.hooked = [span for span in self.spans if span.counts is not None]
        places = sum(len(span.present) for span in self.hooked)
        self.measured = slice(self.first, self.first + places)  # the values of hooks in the buffer
        self.counts = slice(self.first + places, self.first + 2 * places)
        self.means, self.maxima, self.roots = (self._region(merge) for merge in ("mean", "max", "root"))
        self.size = max([self.counts.stop, *(span.stop for span in self.spans)])
        by_token = [span for span in self.hooked if is_token_mean(span.metric)]
        starts = ((span.start - self.first, len(span.present)) for span in by_token)
        self.tokens = TokenMeans((start + n for start, count in starts for n in range(count)), self.device)
        # Of this micro-batch, place among the values of hooks → cell.
        self.cells = {place: Cell.empty(self.device) for place in range(places) if place not in self.tokens.rows}
        self.cadences = {span.metric.slow for span in self.hooked if not is_token_mean(span.metric)}
        self.targets = self._targets()
        self.values = torch.zeros(self.size, device=self.device)  # the step
        self.hosts = [torch.zeros(self.size, pin_memory=self.device.type == "cuda") for _ in range(2)]
        self.more: list[tuple[int, Cell]] = []  # place of a value, and a further cell of it
        self.selected: dict[tuple[bool, bool], list[Span]] = {}  # (fast, slow) → what is measured

        self.handles: list[RemovableHandle] = []
        for site, layers in self.sites.sites.items():
            for index, layer in enumerate(layers):
                for number, module in enumerate(layer.modules.values() if layer else ()):
                    outputs, inputs, gradients = (self.targets.get((source, site, index), []) for source in LINEAR)
                    self._watch(module, outputs, inputs, self._apart(gradients) if number else gradients)
        for stack, blocks in self.sites.stacks.items():
            for index, block in enumerate(blocks.values()):
                self._watch(block, self.targets.get((metrics.BLOCK, stack, index), []))
        for index, core in enumerate(cores if config.every else ()):
            self._watch_core(core, self.targets[metrics.ATTENTION, "", index])

        self.weights: list[Tensor] = []  # of all sites, in order, as they were when last looked at
        self.parameters: list[nn.Parameter] = []  # of the model
        # Where each is, its module's dictionary and its name there: quicker to check than the modules are to walk.
        self.slots: list[tuple[dict[str, Any], str, nn.Parameter | None]] = []
        self.before: list[Tensor] = []  # copies of them before the update
        self.look_up()
        self.cell_places = self.indices.of([*self.cells])
        self._clear()

    # Layout

    def _layout(self, cores: Sequence[Any]) -> list[Span]:
        """The buffer: what hooks measure, ordered by how it merges, its counts, and what is read once per step."""
        merges = list(metrics.MERGES)
        declared = [metric for metric in METRICS.values() if metric.source != metrics.STEP]
        declared.sort(key=lambda metric: (metric.source in ONCE, merges.index(metric.merge)))
        chosen = [(metric, site, present) for metric in declared for site, present in self._places(metric, cores)]
        places = sum(len(present) for metric, _, present in chosen if metric.source not in ONCE)
        spans, start = list[Span](), self.first
        for metric, site, present in chosen:
            once = metric.source in ONCE
            single = metric.shape == metrics.BY_SITE and site in self.sites.single
            at = start + places * once
            spans.append(Span(metric, site, at, present, single, None if once else start + places))
            start += len(present)
        return spans

    def _places(self, metric: Metric, cores: Sequence[Any]) -> Iterable[tuple[str, tuple[bool, ...]]]:
        """Site or stack → which of its layers have the metric; those without any are left out."""
        if metric.shape == metrics.BY_SITE:
            for site, layers in self.sites.sites.items():
                present = tuple(layer is not None and has(layer, metric.source) for layer in layers)
                if any(present):
                    yield site, present
        elif metric.source == metrics.ATTENTION and cores:
            yield "", (True,) * len(cores)
        elif metric.source != metrics.ATTENTION or self.batch is None:
            for stack, blocks in self.sites.stacks.items():
                if blocks:
                    yield stack, (True,) * len(blocks)

    def _region(self, merge: str) -> slice:
        spans = [span for span in self.hooked if span.metric.merge == merge]
        return slice(spans[0].start, spans[-1].stop) if spans else slice(self.first, self.first)

    def _targets(self) -> dict[tuple[str, str, int], list[Target]]:
        """(source, site or stack, layer) → what is measured there."""
        targets: dict[tuple[str, str, int], list[Target]] = {}
        for span in self.hooked:
            metric = span.metric
            for index in range(len(span.present)):
                place = span.start - self.first + index
                into = self.tokens.rows.get(place) or self.cells[place]
                target = Target(metric.key, metric.slow, metric.merge, REDUCTIONS[metric.key], into)
                targets.setdefault((metric.source, span.site, index), []).append(target)
        return targets

    def _apart(self, targets: Sequence[Target]) -> list[Target]:
        """Targets of the same values with cells of their own.

        A compiled backward pass refuses a cell that that of another graph has changed, and modules that share the
        tokens, such as experts, may be in several graphs.
        """
        apart = list[Target]()
        for target in targets:
            place = next(place for place, cell in self.cells.items() if cell is target.into)
            own = Cell.empty(self.device)
            self.more.append((place, own))
            apart.append(target._replace(into=own))
        return apart

    def look_up(self) -> None:
        """Find the weights of the sites, and all parameters: sharding replaces them after the probe was attached."""
        if self.slots and all(slot.get(name) is parameter for slot, name, parameter in self.slots):
            return
        modules = self.model.modules()
        self.slots = [(m._parameters, name, p) for m in modules for name, p in m._parameters.items()]
        parameters = list(self.model.parameters())
        spans = [span for span in self.spans if span.metric.key == WEIGHT]
        layers = [layer for span in spans for layer in self.sites.sites[span.site]]
        weights, owners = self._owned([layer.weights() if layer else [] for layer in layers])
        self.weights, self.owners, self.parameters = weights, owners, parameters
        numbers = {id(p): i for i, p in enumerate(parameters)}
        self.weight_index = self.indices.of([numbers[id(weight)] for weight in weights])
        blocks = [block for blocks in self.sites.stacks.values() for block in blocks.values()]
        self.block_members = torch.zeros(len(blocks), len(parameters), device=self.device)
        for row, block in zip(self.block_members, blocks, strict=True):
            row[[numbers[id(p)] for p in block.parameters()]] = 1.0

    def _owned(self, layers: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], Owners | None]:
        """The weights of some layers, each once, and whose they are; None if each layer has one of its own."""
        weights = {id(weight): weight for own in layers for weight in own}
        places = {key: place for place, key in enumerate(weights)}
        pairs = [(layer, places[id(weight)]) for layer, own in enumerate(layers) for weight in own]
        if pairs == [(n, n) for n in range(len(layers))]:
            return [*weights.values()], None
        owners, owned = ([pair[side] for pair in pairs] for side in range(2))
        return [*weights.values()], Owners(self.indices.of(owners), self.indices.of(owned), len(layers))

    # Hooks

    def _on(self, slow: bool) -> bool:
        return self.slow if slow else self.fast

    def _measure(self, targets: Sequence[Target], x: Any) -> None:
        for target in targets:
            if not self._on(target.slow):
                continue
            if x.device != self.device:
                raise UserError(
                    f"The model was moved from {self.device} to {x.device} while it was observed. "
                    "Move it to its device before that."
                )
            value = target.reduce(x.detach())
            if isinstance(target.into, Row):
                self.tokens.add(target.into, value)
            else:
                add(target.merge, target.into, value, value.numel())

    def _watch(
        self, module: nn.Module, outputs: list[Target], inputs: Sequence[Target] = (), gradients: Sequence[Target] = ()
    ) -> None:
        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            wanted = any(self._on(target.slow) for target in gradients)
            if not (wanted and args and isinstance(args[0], Tensor) and args[0].requires_grad):
                return None
            # A view, so that the gradient is the one through this layer alone.
            x = args[0].view_as(args[0])
            x.register_hook(lambda gradient: self._measure(gradients, gradient))
            return (x, *args[1:])

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not ((self.fast or self.slow) and torch.is_grad_enabled()):
                return
            if (y := first_tensor(output)) is not None:
                self._measure(outputs, y)
            if inputs and (x := first_tensor(args)) is not None and x.is_floating_point():
                self._measure(inputs, x)

        if gradients:
            self.handles.append(module.register_forward_pre_hook(Hook(before)))
        self.handles.append(module.register_forward_hook(Hook(after)))

    def _watch_core(self, core: nn.Module, targets: Sequence[Target]) -> None:
        def after(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.attend(targets, module, *args[:2])

        self.handles.append(core.register_forward_hook(Hook(after)))

    def attend(self, targets: Sequence[Target], core: Core, q: Tensor, k: Tensor) -> None:
        """Measure attention from queries and keys `[batch, heads, time, width]`, if it is due.

        `targets` are those of a layer: `self.targets[metrics.ATTENTION, stack, layer]`.
        """
        values: dict[str, Tensor] = {}
        for target in targets:
            if self._on(target.slow) and self.attention and torch.is_grad_enabled():
                with torch.no_grad():
                    if target.key not in values:
                        values |= target.reduce(core, *(x[: self.sequences] for x in (q, k)))
                    count, value = min(len(q), self.sequences), values[target.key]
                    assert isinstance(target.into, Cell)
                    add(target.merge, target.into, value * count if target.merge == "mean" else value, count)

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self.handles:
            handle.remove()

    # What the training loop calls

    def arm(self, step: int) -> None:
        """Select what step `step` measures."""
        every, slow_every = self.config.every, self.config.slow_every
        self.fast = bool(every) and step % every == 0
        self.slow = bool(every and slow_every) and step % slow_every == 0
        pair = self.fast, self.slow
        if pair not in self.selected:
            self.selected[pair] = [span for span in self.spans if self._on(span.metric.slow)]
        self.due, self.reduced = self.selected[pair], set()
        if self.due:
            self._clear()
        self.begin(0)

    def rest(self) -> None:
        """Measure nothing until the next `arm`; for validation."""
        self.fast = self.slow = False
        self.due = []

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Measure nothing within; for passes that do not belong to the step."""
        before = self.fast, self.slow
        self.fast = self.slow = False
        try:
            yield
        finally:
            self.fast, self.slow = before

    def begin(self, index: int) -> None:
        """Select what micro-batch `index` measures: attention on its share of the first `sampled` sequences."""
        left = min(self.batch, self.limit - index * self.batch) if self.batch else self.limit
        self.sequences = max(0, left)
        self.attention = self.sequences > 0

    @torch.no_grad()
    def _clear(self) -> None:
        """Start again with the values of a step."""
        self.values[self.first :] = 0.0
        self.values[self.maxima] = float("-inf")
        self.tokens.clear()
        if self._cells_due():
            self._empty_cells()

    def _cells_due(self) -> bool:
        return any(map(self._on, self.cadences))

    def _empty_cells(self) -> None:
        """Start again with the cells of a micro-batch."""
        cells = [*self.cells.values(), *(cell for _, cell in self.more)]
        if cells:
            torch._foreach_zero_([tensor for cell in cells for tensor in cell])
        for place in range(self.maxima.start, self.maxima.stop):
            self.cells[place - self.first].value.fill_(float("-inf"))

    @torch.no_grad()
    def merge(self) -> None:
        """Merge the micro-batch into the values of the step."""
        if not self.due:
            return
        self.tokens.collect(self.values[self.measured], self.values[self.counts])
        if self._cells_due():
            self._merge_cells()

    def _merge_cells(self) -> None:
        now = torch.zeros_like(self.values)
        for place, more in self.more:
            cell = self.cells[place]
            cell.value.copy_(torch.hypot(cell.value, more.value))
            cell.number.add_(more.number)
        now[self.measured][self.cell_places] = torch.stack([cell.value for cell in self.cells.values()])
        now[self.counts][self.cell_places] = torch.stack([cell.number for cell in self.cells.values()])
        for region in (self.means, self.counts):
            self.values[region] += now[region]
        self.values[self.maxima] = torch.maximum(self.values[self.maxima], now[self.maxima])
        self.values[self.roots] = torch.hypot(self.values[self.roots], now[self.roots])
        self._empty_cells()

    @torch.no_grad()
    def before_update(self, gradient_norms: Tensor, loss_scale: Tensor | None = None) -> None:
        """Measure weights and gradients; keep the weights if their change is measured.

        `gradient_norms`, `[parameters]`, are those of each parameter's gradient before clipping, in the model's order.
        `loss_scale`, 0-dim, is the factor of the loss in the backward pass; `gradient_norms` do not contain it.
        """
        self.unscale(loss_scale)
        self.look_up()
        parameters = Parameters(self.weights, gradient_norms, self.weight_index, self.block_members, self.owners)
        self._reduce(metrics.PARAMETERS, parameters)
        if self._is_due(metrics.UPDATE):
            self.before = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def unscale(self, loss_scale: Tensor | None) -> None:
        """Divide what hooks measured in the backward pass, and `merge` merged, by the factor of the loss, if any."""
        if loss_scale is not None:
            self.values[self.roots] /= loss_scale

    @torch.no_grad()
    def rescale_gradients(self, factor: Tensor) -> None:
        """Multiply the norms of gradients by a factor, 0-dim, as if `before_update` had been given them so."""
        for place in joined(span for span in self.due if "grad" in span.key and span.key in self.reduced):
            self.values[place] *= factor

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure the update, and Adam's state of the sites whose weights all have one in `optimizer`."""
        self.update()
        self.adam(optimizer)

    @torch.no_grad()
    def update(self) -> None:
        """Measure the change of the weights since `before_update`."""
        if self.before:
            for before, weight in zip(self.before, self.weights, strict=True):
                before.sub_(weight)
            self._reduce(metrics.UPDATE, Update(self.before, self.owners))
            self.before = []

    @torch.no_grad()
    def adam(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure Adam's state of the sites whose weights all have one in `optimizer`."""
        if not self._is_due(metrics.ADAM):
            return
        chosen = {
            site: own
            for site, layers in self.sites.sites.items()
            if any(own := [layer.weights() if layer else [] for layer in layers])
            and has_adam_state([weight for weights in own for weight in weights], optimizer)
        }
        if chosen:
            weights, owners = self._owned([own for layers in chosen.values() for own in layers])
            self._reduce(metrics.ADAM, replace(AdamState.of(weights, optimizer), owners=owners), chosen)

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

        A loss is a mean of equal parts.
        """
        if len(ranks) == 1:
            return
        self.values.copy_(ranks[0])
        losses = [n for n, name in enumerate(self.scalars) if METRICS[name].merge == "mean"]
        self.values[losses] = ranks[:, losses].mean(0)
        for place in (self.means, self.counts):
            self.values[place] = ranks[:, place].sum(0)
        self.values[self.maxima] = ranks[:, self.maxima].amax(0)
        self.values[self.roots] = torch.linalg.vector_norm(ranks[:, self.roots], dim=0)
        if self.averaged:
            self.values[self.roots] /= len(ranks)

    @torch.no_grad()
    def snapshot(self, *scalars: Tensor) -> "PendingRow":
        """Start the copy of the step's values, `scalars` first, to the host; only `PendingRow.read` waits for it."""
        for slot, value in enumerate(scalars):
            self.values[slot] = value
        if self.due or scalars:
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


def is_token_mean(metric: Metric) -> bool:
    return metric.source in BY_TOKEN and metric.merge == "mean"


def has(layer: Layer, source: str) -> bool:
    """Whether a layer has the metrics of a source: an embedding has no input vectors, other modules no matrices."""
    if source in (metrics.INPUT, metrics.INPUT_GRADIENT):
        return not any(isinstance(module, nn.Embedding) for module in layer.modules.values())
    return source not in ONCE or bool(layer.weights())


def first_tensor(value: Any) -> Tensor | None:
    """The value, or the first one in a tuple, list or mapping, if it is a tensor."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        value = value[0] if value else None
    return value if isinstance(value, Tensor) else None


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
        """The scalars by name, and the value of each key that the step measured: those of no layer are left out."""
        if self.event is not None:
            self.event.synchronize()
        values = self.host.tolist()
        row: dict[str, Any] = dict(zip(self.scalars, values, strict=False))
        for span in self.spans:
            value = span.read(values)
            if value is not None and (span.single or any(item is not None for item in value)):
                row[span.key] = value
        return row
