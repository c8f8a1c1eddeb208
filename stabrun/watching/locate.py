"""Repeats a step of training with hooks on every module, and names the one where a value ceased to be finite.

The forward pass is judged by the inputs and the output of each call of a module, the backward pass by the gradients at
these and at the parameters. The order in which they become known is the order of the computation; so the first one is
at the innermost module, or at the one whose own code between its submodules is the cause.

−inf is no fault by itself: models mask with it. A tensor of zeros and −inf counts as finite. Another value that is not
finite is harmless where a module around it, or all modules that get it, return finite values: a harmless one is named
only if there is no other.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stabrun.watching.fault import BACKWARD, EXCHANGE, FORWARD, INPUT, LOSS, TOKEN, WEIGHT_GRADIENT, Fault
from stabrun.watching.sites import WRAPPERS

FINITE, MINUS, BROKEN = range(3)  # severity: finite or a mask; −inf among other numbers; NaN or +inf
SHOWN = 3  # positions
BEFORE = 8  # token ids before each of them


def locate(model: nn.Module, step: Callable[[], Any], tokens: Tensor | None = None, scale: float = 1.0) -> Fault | None:
    """Where the first value of a step that is not finite arises; None if the loss and all gradients are finite.

    `step()` runs one forward pass of the model, under autocast if training does, and returns the loss, an object or
    dictionary with `loss`, or anything else; the backward pass is checked if the loss has one. `scale` multiplies the
    loss before it, as a GradScaler does. `tokens` `[batch, time]` are the ids to show; without them, those that an
    embedding gets.

    Compiled models run eagerly. Weights, gradients, buffers, random states and training mode are afterwards as before;
    what else `step` changes, such as the place in a data loader, is the caller's. In a run on several ranks all of them
    call it, and each judges its own part of the batch.
    """
    trace = Trace(model, tokens, scale)
    value = loss = None
    with ExitStack() as stack:
        stack.enter_context(_unchanged(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.autograd.set_detect_anomaly(False))  # it would raise an error at the first NaN
        stack.callback(trace.remove)
        try:
            trace.attach()
            loss = _loss(value := step())
            trace.recording = False
            if loss is not None and loss.requires_grad:
                with _gradients_apart(model, loss) as leaves:
                    (scale * (loss.float() if loss.dtype.itemsize < 4 else loss)).backward()
                    trace.look_at(leaves)
        except _Stop:
            pass
    return trace.verdict(loss, value) if trace.found is None else trace.found  # weights are read after all is restored


# Tensors


@dataclass(frozen=True)
class Reading:
    severity: int
    largest: float | None  # finite |x|; None without tensors
    worst: Tensor | None = None  # the first one of the highest severity, if that is not FINITE


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in nested containers."""
    if isinstance(value, Tensor):
        if (value.is_floating_point() or value.is_complex()) and not value.is_meta:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from _tensors(getattr(value, entry.name, None))


def _plain(x: Tensor) -> Tensor:
    """The values of a tensor that this rank holds, as a dense one of real numbers."""
    x = x.detach()
    if isinstance(x, DTensor):
        x = x.to_local()
    if x.is_nested or x.layout == torch.sparse_coo:
        x = x.coalesce().values() if x.layout == torch.sparse_coo else x.values()
    if x.is_complex():
        x = torch.view_as_real(x)
    return x.float() if x.dtype.itemsize == 1 else x  # float8 has no arithmetic


@torch.no_grad()
def _read(values: Any, masks: bool = True) -> Reading:
    """`masks`: whether zeros and −inf may be one."""
    severity, largest, worst = FINITE, None, None
    for tensor in _tensors(values):
        x = _plain(tensor)
        largest = largest or 0.0
        if not x.numel():
            continue
        peak = x.abs().amax().item()  # NaN if one is
        if math.isfinite(peak):
            largest = max(largest, peak)
            continue
        finite = x.isfinite()
        largest = max(largest, torch.where(finite, x.abs(), 0).amax().item())
        here = BROKEN
        if (finite | (x == -torch.inf)).all():
            here = FINITE if masks and finite.any() and not x[finite].any() else MINUS
        if here > severity:
            severity, worst = here, tensor
    return Reading(severity, largest, worst)


def _loss(value: Any) -> Tensor | None:
    """The loss among what a step returned, if there is one."""
    loss = value.get("loss") if isinstance(value, Mapping) else getattr(value, "loss", value)
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point() else None


def _without_loss(output: Any) -> Any:
    """What a module computed, apart from a loss that a model returns with it."""
    if isinstance(output, Mapping):
        return [item for key, item in output.items() if key != "loss"]
    if is_dataclass(output) and not isinstance(output, type):
        return [getattr(output, entry.name, None) for entry in fields(output) if entry.name != "loss"]
    return output


def _storages(values: Any) -> set[int]:
    """Addresses of the tensors that are not finite."""
    return {_plain(x).untyped_storage().data_ptr() for x in _tensors(values) if _read([x]).severity}


@dataclass(frozen=True)
class Detail:
    """What a sentence tells about a tensor that is not finite."""

    dtype: str
    overflow: bool
    limit: float
    positions: tuple[tuple[int, int], ...]
    tokens: tuple[tuple[int, ...], ...]


Ids = Mapping[torch.Size, Tensor]  # token ids `[batch, time]`, by their shape


@torch.no_grad()
def _detail(x: Tensor, ids: Ids | None = None) -> Detail:
    """With positions if the tensor is of a batch; `ids` are what is known of its tokens."""
    values = _plain(x)
    places, tokens = ((), ()) if ids is None else _places(~values.isfinite(), ids)
    dtype = x.dtype
    return Detail(_name(dtype), bool(values.isinf().any()), torch.finfo(dtype).max, places, tokens)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _places(bad: Tensor, ids: Ids) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, ...], ...]]:
    """The first (sequence, position) of a mask, with the token ids there and before, as far as its shape tells."""
    for shape, tokens in ids.items():
        by_token = _by_token(bad, *shape)
        if by_token is not None:
            places = [(int(row), int(column)) for row, column in by_token.nonzero()[:SHOWN]]
            lines = [tokens[row, max(0, column - BEFORE) : column + 1].tolist() for row, column in places]
            return tuple(places), tuple(map(tuple, lines))
    if not ids and bad.ndim == 3:
        return tuple((int(row), int(column)) for row, column in bad.any(-1).nonzero()[:SHOWN]), ()
    return (), ()


def _by_token(bad: Tensor, batch: int, time: int) -> Tensor | None:
    """A mask of any layout that models use, as `[batch, time]`; `[1, time]` if all sequences share it."""
    shape = tuple(bad.shape)
    if shape[:2] in ((batch, time), (1, time)):
        return bad.reshape(*shape[:2], -1).any(-1)
    if shape[:1] == (batch * time,):
        return bad.reshape(batch, time, -1).any(-1)
    if len(shape) == 4 and (shape[0], shape[2]) == (batch, time):  # [batch, heads, time, width]
        return bad.any(3).any(1)
    if shape[:2] == (time, batch):
        return bad.reshape(time, batch, -1).any(-1).T
    if shape[:1] == (time,) and len(shape) <= 2:
        return bad.reshape(1, time, -1).any(-1)
    return None


# The state of everything else


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Restores buffers, training mode, and the random states of Python, NumPy, the CPU and the model's devices."""
    modules = list(model.modules())
    training = [module.training for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    unique = {id(buffer): buffer for own in buffers for buffer in own.values() if buffer is not None}
    copies = [(buffer, buffer.detach().clone()) for buffer in unique.values()]
    devices = {x.device for x in (*model.parameters(), *model.buffers())} - {torch.device("cpu")}
    if torch.cuda.is_available():
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    python, numpy = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in {device.type for device in devices} - {"meta", "mps"}:
            numbers = [device.index or 0 for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=numbers, device_type=kind))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for module, mode, own in zip(modules, training, buffers, strict=True):
                module.training = mode
                for name, buffer in own.items():
                    now = module._buffers.get(name)
                    if buffer is not None and now is not None and now.shape == buffer.shape:
                        module._buffers[name] = buffer  # one that has grown is a cache
            with torch.no_grad():
                for buffer, copy in copies:
                    if not torch.equal(buffer, copy):
                        buffer.copy_(copy)


@contextmanager
def _gradients_apart(model: nn.Module, loss: Tensor) -> Iterator[list[Tensor]]:
    """Leaves of the backward pass without `.grad`, and without what is done once it is complete.

    `torch.autograd.grad` would need none of this, but reentrant activation checkpointing does not support it.
    """
    leaves = list({id(leaf): leaf for leaf in (*model.parameters(), *_leaves(loss))}.values())
    gradients = [leaf.grad for leaf in leaves]
    hooks = [getattr(leaf, "_post_accumulate_grad_hooks", None) or {} for leaf in leaves]
    kept = [dict(own) for own in hooks]
    for leaf, own in zip(leaves, hooks, strict=True):
        leaf.grad = None
        own.clear()  # optimizers that work within the backward pass
    try:
        yield leaves
    finally:
        for leaf, gradient, own, before in zip(leaves, gradients, hooks, kept, strict=True):
            leaf.grad = gradient
            own.update(before)


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """Tensors whose `.grad` the backward pass of a loss adds to."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [following for following, _ in node.next_functions]


# The hooks


class _Stop(BaseException):
    """Ends a step. Not an Exception, which a model may catch."""


@dataclass(eq=False)
class Call:
    """One call of a module."""

    path: str
    module: nn.Module
    parent: "Call | None"
    inputs: Reading
    ids: Ids
    sources: set[int] = field(default_factory=set)  # addresses of inputs that are not finite
    output: Reading = Reading(FINITE, None)  # without a loss
    detail: Detail | None = None
    results: list[Tensor] = field(default_factory=list)  # kept if it may be the fault, so that no address is reused
    addresses: set[int] = field(default_factory=set)
    leaves_finite: bool = False  # all that it returned, a loss included
    arrived: list[bool] = field(default_factory=list)  # whether each gradient at its output was finite
    gradient_largest: float | None = None
    gradient_detail: Detail | None = None  # of a gradient at its input that is not finite

    @property
    def gradient_finite(self) -> bool:
        return bool(self.arrived) and all(self.arrived)

    def ancestors(self) -> Iterator["Call"]:
        call = self.parent
        while call is not None:
            yield call
            call = call.parent


class Trace:
    """Hooks on all modules of a model, and what they have seen of one step."""

    def __init__(self, model: nn.Module, tokens: Tensor | None, scale: float) -> None:
        self.model, self.scale = model, scale
        self.recording = True  # the forward pass; false while the backward pass recomputes parts of it
        self.handles: list[Any] = []
        self.stack: list[Call] = []
        self.calls: list[Call] = []  # of the forward pass, in the order of their ends
        self.recomputed: list[Call] = []  # of the backward pass
        self.given = {tokens.shape: tokens} if tokens is not None and tokens.ndim == 2 else {}
        self.seen: dict[torch.Size, tuple[nn.Module, Tensor]] = {}  # shape → embedding and its ids
        self.entered: tuple[Call, Detail] | None = None  # the first call whose input is broken and its parent's is not
        self.first: tuple[str, Any, Detail, Reading] | None = None  # the first gradient that is not finite
        self.bad_parameters = False  # whether one has a gradient that is not finite
        self.left: tuple[Tensor, Detail, Reading] | None = None  # the first leaf whose `.grad` is not finite
        self.found: Fault | None = None
        self.paths = {module: _clean(path) for path, module in model.named_modules()}
        self.names: dict[Tensor, str] = {parameter: _clean(name) for name, parameter in model.named_parameters()}

    def attach(self) -> None:
        for module in self.paths:
            if not isinstance(module, torch.jit.ScriptModule):
                self.handles += [
                    module.register_forward_pre_hook(self._before, with_kwargs=True),
                    module.register_forward_hook(self._after),
                ]
        for parameter in self.names:
            if parameter.requires_grad:
                hook = partial(self._parameter_gradient, parameter)
                self.handles.append(parameter.register_hook(hook))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    # Forward

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if module not in self.paths:  # a copy that DataParallel makes
            return None
        parent = self.stack[-1] if self.stack else None
        if not self.recording and parent is None:  # recomputed
            parent = next((call.parent for call in self.calls if call.module is module), None)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            self._check_ids(module, next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None))
        inputs = _read((args, kwargs))
        call = Call(self.paths[module], module, parent, inputs, self._ids())
        if inputs.worst is not None:
            call.sources = _storages((args, kwargs))
            if (
                self.recording
                and self.entered is None
                and inputs.severity == BROKEN
                and (parent is None or parent.inputs.severity < BROKEN)
            ):
                self.entered = call, _detail(inputs.worst, call.ids)
        call.inputs = Reading(inputs.severity, inputs.largest)
        self.stack.append(call)
        if not torch.is_grad_enabled():
            return None
        views: dict[int, Tensor] = {}  # one for each tensor: modules compare them by `is`
        return (
            tuple(self._own(x, call, views) for x in args),
            {name: self._own(x, call, views) for name, x in kwargs.items()},
        )

    def _own(self, value: Any, call: Call, views: dict[int, Tensor]) -> Any:
        """A view of an input, whose gradient is the one through this call alone."""
        if type(value) is tuple:  # not a list, which the module may change
            return tuple(self._own(x, call, views) for x in value)
        if not isinstance(value, Tensor) or not value.requires_grad or value.is_nested or value.is_sparse:
            return value
        if id(value) not in views:
            views[id(value)] = view = value.view_as(value)
            self.handles.append(view.register_hook(partial(self._input_gradient, call)))
        return views[id(value)]

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if module not in self.paths:
            return
        call = self.stack.pop()
        while call.module is not module:  # it has ended by an exception
            call = self.stack.pop()
        if self.recording:
            self.calls.append(call)
            found = _read(_without_loss(output))
            call.leaves_finite = not _read(output).severity
            if found.worst is not None and found.severity > call.inputs.severity:
                call.detail = _detail(found.worst, call.ids)
                call.results = list(_tensors(output))
                call.addresses = _storages(output)
            call.output = Reading(found.severity, found.largest)
        else:
            self.recomputed.append(call)
        if torch.is_grad_enabled():
            for x in _tensors(output):
                if x.requires_grad:
                    self.handles.append(x.register_hook(partial(self._output_gradient, call)))

    def _ids(self) -> Ids:
        return self.given | {shape: ids for shape, (_, ids) in self.seen.items() if shape not in self.given}

    @torch.no_grad()
    def _check_ids(self, module: nn.Embedding | nn.EmbeddingBag, ids: Tensor | None) -> None:
        """Before the embedding runs: the error of a device cannot be undone."""
        if ids is None or ids.is_floating_point() or not ids.numel():
            return
        if ids.ndim == 2 and self.seen.get(ids.shape, (module,))[0] is module:
            self.seen[ids.shape] = module, ids
        bad = (ids < 0) | (ids >= module.num_embeddings)
        if bad.any():
            places, tokens = _places(bad, {ids.shape: ids} if ids.ndim == 2 else self._ids())
            self.found = Fault(
                module=self.paths[module],
                kind=type(module).__name__,
                pass_=TOKEN,
                dtype=_name(ids.dtype),
                positions=places,
                tokens=tokens,
                token=int(ids[bad][0]),
                rows=module.num_embeddings,
            )
            raise _Stop

    # Backward

    def _see(self, kind: str, target: Any, gradient: Tensor, ids: Ids | None = None) -> Reading:
        reading = _read([gradient], masks=False)
        if reading.worst is not None and self.first is None:
            self.first = kind, target, _detail(gradient, ids), Reading(reading.severity, reading.largest)
        return reading

    def _output_gradient(self, call: Call, gradient: Tensor) -> None:
        reading = self._see("output", call, gradient, call.ids)
        call.arrived.append(reading.severity == FINITE)
        call.gradient_largest = max(call.gradient_largest or 0.0, reading.largest or 0.0)

    def _input_gradient(self, call: Call, gradient: Tensor) -> None:
        if self._see("input", call, gradient, call.ids).severity and call.gradient_detail is None:
            call.gradient_detail = _detail(gradient, call.ids)

    def _parameter_gradient(self, parameter: Tensor, gradient: Tensor) -> None:
        self.bad_parameters |= self._see("parameter", parameter, gradient).severity > FINITE

    def look_at(self, leaves: list[Tensor]) -> None:
        """After the backward pass. Ranks have exchanged their gradients, which the hooks have seen before."""
        for leaf in leaves:
            if self.left is None and leaf.grad is not None and (reading := _read([leaf.grad], False)).severity:
                self.left = leaf, _detail(leaf.grad), reading

    # What follows from it

    def verdict(self, loss: Tensor | None, value: Any) -> Fault | None:
        if loss is not None:
            bad = _read([loss]).severity > FINITE
        else:
            last = [call.output.severity for call in self.calls if call.parent is None]
            bad = BROKEN in ([_read(value).severity] if value is not None else last)
        if bad:
            return self._forward_fault(value if loss is None else loss)
        return self._backward_fault() if self.bad_parameters or self.left else None

    def _forward_fault(self, value: Any) -> Fault:
        strong = [c for c in self.calls if c.output.severity == BROKEN and c.inputs.severity < BROKEN]
        weak = [
            c for c in self.calls if c.output.severity == MINUS and c.inputs.severity == FINITE and not _makes_mask(c)
        ]
        harmful = [call for call in strong if not self._harmless(call)]
        if harmful:
            return self._forward_call(self._origin(harmful[0], weak))
        if self.entered is not None:
            entered, detail = self.entered
            if entered.parent is None:
                return self._fault(entered, INPUT, detail)
            return self._fault(entered.parent, FORWARD, detail)
        for call in (*(c for c in weak if not self._harmless(c)), *strong):
            return self._forward_call(call)
        last = self.calls[-1] if self.calls else None
        worst = _read(value).worst
        assert worst is not None  # else the output of a call was bad, and with it an input or the call
        return self._outside(LOSS, _detail(worst), input_largest=last.output.largest if last else None)

    def _origin(self, call: Call, weak: list[Call]) -> Call:
        """The call itself, or an earlier one whose −inf became NaN in it, or between the modules within it."""
        for earlier in weak:
            within = call in earlier.ancestors()
            before = call.inputs.severity == MINUS and self.calls.index(earlier) < self.calls.index(call)
            if (within or before) and not self._harmless(earlier):
                return earlier
        return call

    def _forward_call(self, call: Call) -> Fault:
        assert call.detail is not None  # kept for each call whose output is worse than its inputs
        return self._fault(call, FORWARD, call.detail)

    def _harmless(self, call: Call) -> bool:
        if any(around.leaves_finite for around in call.ancestors()):
            return True
        around = set(call.ancestors())
        takers = [c for c in self.calls if c not in around and c.sources & call.addresses]
        return bool(takers) and all(c.leaves_finite and c.output.largest is not None for c in takers)

    def _backward_fault(self) -> Fault:
        if self.first is None:  # no hook saw it
            assert self.left is not None
            leaf, detail, reading = self.left
            if leaf in self.names:
                return self._outside(EXCHANGE, detail, parameter=self.names[leaf])
            return self._outside(LOSS, detail, gradient_largest=reading.largest)
        kind, target, detail, reading = self.first
        if kind == "parameter":
            return self._parameter_fault(target, detail)
        call: Call | None = target
        assert call is not None
        if kind == "output" or not all(call.arrived):  # a module may return its input
            call = next((around for around in call.ancestors() if around.gradient_finite), None)
        if call is None:
            return self._outside(LOSS, detail, gradient_largest=reading.largest)
        # Some kernels of attention, and `torch.where`, drop a NaN in the forward pass and find it again in this one.
        within = (c for c in self.calls if call in c.ancestors())
        dropped = next((c for c in within if c.output.severity == BROKEN and c.inputs.severity < BROKEN), None)
        return self._forward_call(dropped) if dropped else self._fault(call, BACKWARD, detail)

    def _parameter_fault(self, parameter: Tensor, detail: Detail) -> Fault:
        owners = [m for m in self.paths if any(p is parameter for p in m._parameters.values())]
        calls = [call for call in (*self.recomputed, *reversed(self.calls)) if call.module in owners]
        calls.sort(key=lambda call: not call.gradient_finite)
        call = calls[0] if calls else Call(self.paths[owners[0]], owners[0], None, Reading(FINITE, None), {})
        if call.gradient_detail is not None:
            return self._fault(call, BACKWARD, call.gradient_detail)
        return self._fault(call, WEIGHT_GRADIENT, detail, self.names[parameter])

    def _outside(self, pass_: str, detail: Detail, **rest: Any) -> Fault:
        return Fault("", "", pass_, scale=self.scale, **vars(detail), **rest)

    def _fault(self, call: Call, pass_: str, detail: Detail, parameter: str = "") -> Fault:
        return Fault(
            module=call.path,
            kind=type(call.module).__name__,
            pass_=pass_,
            input_largest=call.inputs.largest,
            input_finite=call.inputs.severity == FINITE,
            output_largest=call.output.largest,
            gradient_largest=call.gradient_largest if pass_ in (BACKWARD, WEIGHT_GRADIENT) else None,
            weights_largest=_weights(call.module),
            scale=self.scale,
            parameter=parameter,
            **vars(detail),
        )


def _makes_mask(call: Call) -> bool:
    """−inf that comes from no number cannot be an overflow."""
    return call.inputs.largest is None and next(call.module.parameters(), None) is None


@torch.no_grad()
def _weights(module: nn.Module) -> dict[str, float]:
    """Largest |w| of a module's own parameters; NaN for these, and for those and the buffers below, if not finite."""
    largest = {}
    for name, x in module.named_parameters():
        reading = _read([x], masks=False)
        if "." not in name or reading.severity:
            largest[name] = math.nan if reading.severity else reading.largest or 0.0
    return largest | {name: math.nan for name, x in module.named_buffers() if _read([x]).severity == BROKEN}


def _clean(path: str) -> str:
    """A path as users know it."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)
