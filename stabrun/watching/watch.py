"""The instrument for any model in any training loop: `stabrun.watch`."""

import atexit
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from stabrun.config import ObserveConfig, TrackerConfig, UserError
from stabrun.observe.norms import dense, tensor_norms, whole
from stabrun.observe.probe import PendingRow, Probe
from stabrun.observe.sites import Sites
from stabrun.record.schema import COMPLETE, FAILED, INTERRUPTED, STOPPED, Row, Summary
from stabrun.record.watched import Watched
from stabrun.text import warn
from stabrun.training.environment import machine
from stabrun.verdict.judge import Verdict
from stabrun.watching.arguments import (
    directory_of,
    one_number,
    optional_number,
    recordable,
    refuse_model,
    refuse_other,
    refuse_policy,
    refuse_untrue,
    whole_number,
)
from stabrun.watching.attention import Attention
from stabrun.watching.exchange import (
    gather,
    gather_text,
    is_first,
    on_any,
    rank_count,
    refuse_different,
    refuse_sharding,
)
from stabrun.watching.fault import EXCHANGE, Fault
from stabrun.watching.guard import Guard
from stabrun.watching.log import Log, Policy
from stabrun.watching.replay import LossOf, Replay
from stabrun.watching.sites import Choice, find_sites, table, unwrapped
from stabrun.watching.tap import Tap

CLIP = Tap("clip_grad_norm_", nn.utils, nn.utils.clip_grad, iterable="parameters")
LOCATED = 3  # steps of a run that are repeated at most when values are not finite: it costs a step each time
UNLOCATED = (
    "a loss or gradient is not finite, but those of the same step repeated are: the cause is outside of the model, "
    "such as the loss function (see loss_of=), or depends on chance, such as dropout"
)
NO_UPDATE = (
    "no optimizer has updated the model before this step. Call watch.step once after each optimizer.step(), with "
    "scaler= if a GradScaler skips updates, and with lr= if the optimizer is not of torch."
)
LOSSES = "train/loss", "val/loss"  # what the ranks compute of their own parts of a batch
UNCALLED = (
    "watch: no layer was called in step {step}. If the model was compiled, watch it before that, or call "
    "torch.compiler.reset()."
)
SLOW = 10  # times `every`: steps between two measurements of the expensive statistics, by default


class Watch:
    """Records what the layers of a model put out while any training loop trains it, and judges the run.

        watch = stabrun.watch(model, out="runs/mine", every=10)
        for batch in batches:
            loss = ...
            loss.backward()
            norm = clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            verdict = watch.step(loss=loss, grad_norm=norm)
            optimizer.zero_grad()
        watch.close()

    The directory `out` then holds what a run of stabrun does: `stabrun judge`, `report`, `top` and `upload` read it.
    Losses are recorded for each step; statistics of layers every `every` steps, the expensive ones every `slow_every`.
    Nothing waits for the device in between. The model's results are bit-identical with and without; compiled,
    they may be rounded otherwise in the steps that measure.

    Args:
        model: any module, on its device; give it before it is compiled. With several ranks, watch on all of them once
            the process group is initialized, before or after DistributedDataParallel or fully_shard.
        out: directory of the record; None keeps none.
        every, slow_every: steps between two measurements; `slow_every` is ten times `every` by default.
        sites: what to observe; see `find_sites`. By default all linear layers, embeddings and experts.
        steps: planned steps of the whole run, if known. A run that ends before is not called stable.
        constant_lr: whether the learning rate is constant after its warm-up: a divergence can then be certain early.
        first_step: number of the first step, that of the checkpoint when training is resumed. Later rows are removed.
        overwrite: replace the record that `out` holds.
        on_verdict, on_signal, on_spike: "stop", "warn", or a function; see `Log`. `stopped` says whether to stop.
        on_nonfinite: "locate": check the gradient before each update, which waits for the device, and if it is not
            finite, `locate` the module at fault before the weights are changed.
        loss_of: function of what the model returns, for `locate`; not needed if that has a `loss`.
        tracker, project: "wandb" also sends the record to a W&B run of its own; `stabrun upload` does so afterwards.
        settings: facts about the run for the report, such as `name` and `seed`.
        quiet: do not print the table of sites.

    Raises UserError if the model cannot be observed, no site is found, an argument has a value that is not allowed, or
    `out` holds another record.
    """

    def __init__(
        self,
        model: nn.Module,
        out: str | Path | None = None,
        every: int = 10,
        *,
        slow_every: int | None = None,
        sites: Choice = None,
        steps: int | None = None,
        constant_lr: bool = False,
        first_step: int = 0,
        overwrite: bool = False,
        on_verdict: Policy = None,
        on_signal: Policy = None,
        on_spike: Policy = None,
        on_nonfinite: str | None = None,
        loss_of: LossOf | None = None,
        tracker: str = "none",
        project: str = "stabrun",
        settings: Mapping[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        refuse_model(model)
        directory = directory_of(out)
        every = whole_number("every", every, 1)
        slow_every = SLOW * every if slow_every is None else whole_number("slow_every", slow_every, 0)
        steps = None if steps is None else whole_number("steps", steps, 1)
        first_step = whole_number("first_step", first_step, 0)
        policies = {"on_verdict": on_verdict, "on_signal": on_signal, "on_spike": on_spike}
        for name, policy in policies.items():
            refuse_policy(name, policy)
        for name, flag in {"constant_lr": constant_lr, "overwrite": overwrite, "quiet": quiet}.items():
            refuse_untrue(name, flag)
        if loss_of is not None and not callable(loss_of):
            raise UserError(f"watch: loss_of={loss_of!r}: must be a function or None.")
        refuse_other("on_nonfinite", on_nonfinite, "locate", None)
        refuse_other("tracker", tracker, "wandb", "none")
        facts = recordable(settings)
        refuse_sharding(model)
        self.model = unwrapped(model)
        self.sites: Sites = find_sites(self.model, sites)
        observe = ObserveConfig(every=every, slow_every=slow_every)
        device = next(self.model.parameters()).device
        refuse_different(self.sites, device)
        self.log = Log(
            directory if is_first() else None,
            self._watched(observe, steps, constant_lr, facts),
            first_step,
            overwrite,
            policies,
            device,
        )
        # Each rank's loss is the mean over its own part of the batch; DDP and FSDP average the gradients of the ranks.
        self.probe = Probe(self.model, observe, self.sites, scalars=(), gather=gather, averaged=True)
        self.attention = Attention(self.probe)
        tracking = tracker if is_first() and directory else "none"
        self.log.start(
            first_step,
            machine(self.probe.device) | {"ranks": rank_count()},
            TrackerConfig(name=tracking, project=project, norms_every=every),
        )
        self.next = first_step  # number of the next step
        self.waiting: list[tuple[int, dict[str, Any]]] = []  # steps whose values are still on the device
        self.pending: Pending | None = None
        self.closed = False
        self.clip_norm: Tensor | None = None  # what clip_grad_norm_ returned in this step
        self.total: Tensor | None = None  # norm of all gradients as the optimizer got them
        self.rate: float | Tensor | None = None
        self.scaler: Any = None
        self.stepped, self.found_inf, self.checked = False, None, False
        self.looked = False  # whether the first statistics were looked at
        self.replay = Replay(self.model, loss_of)
        self.guards: list[Guard] = []
        self.locating, self.located = on_nonfinite == "locate", False  # `located`: in this step
        self.warned = False  # that no optimizer has updated the model before a step
        self.faults = 0  # steps that were repeated to locate a fault
        if self.locating:
            self.replay.follow()
        # Optimizer → whether it has parameters of the model. Not by its id, which another one may get after its end.
        self.mine = WeakKeyDictionary[torch.optim.Optimizer, bool]()
        self.handles: list[RemovableHandle] = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]
        CLIP.add(self._clipped)
        atexit.register(self._at_exit)
        if not quiet and is_first():
            print(table(self.sites))
        self._arm()

    def _watched(self, observe: ObserveConfig, steps: int | None, constant: bool, settings: dict[str, Any]) -> Watched:
        return Watched(
            model=type(self.model).__name__,
            planned=steps,
            constant=constant,
            every=observe.every,
            slow_every=observe.slow_every,
            sites={
                name: [", ".join(layer.modules) if layer else "" for layer in layers]
                for name, layers in self.sites.sites.items()
            },
            stacks={name: [*blocks] for name, blocks in self.sites.stacks.items()},
            single=sorted(self.sites.single),
            settings=settings,
        )

    # During a step

    def _arm(self) -> None:
        """Prepare the next step."""
        self.probe.arm(self.next)
        self.attention.rest()
        self.attention.listen()
        self.clip_norm = self.total = self.found_inf = None
        self.stepped = self.located = False
        for guard in self.guards:
            guard.last_skipped = False

    def _clipped(self, norm: Tensor, parameters: Any, *_: Any, **__: Any) -> None:
        """Keep the norm that clip_grad_norm_ returned, if the gradients are the model's."""
        first = parameters if isinstance(parameters, Tensor) else next(iter(parameters), None)
        if any(first is parameter for parameter in self.model.parameters()):  # fully_shard replaces them
            self.clip_norm = norm

    def _owns(self, optimizer: torch.optim.Optimizer) -> bool:
        if optimizer not in self.mine:
            own = {id(parameter) for parameter in self.model.parameters()}
            self.mine[optimizer] = any(id(p) in own for group in optimizer.param_groups for p in group["params"])
        return self.mine[optimizer]

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """Measure before the update; if there is a closure, which computes the gradients, after its first call."""
        if not self._owns(optimizer):
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._before_update(optimizer)
            return None

        def measured() -> Any:
            result = closure()
            self._before_update(optimizer)
            return result

        return (args[:1], {"closure": measured}) if "closure" not in kwargs else (args, {**kwargs, "closure": measured})

    def _before_update(self, optimizer: torch.optim.Optimizer) -> None:
        if self.stepped:
            return
        if not self.checked:  # the model may have been wrapped since
            refuse_sharding(self.model)
            self.checked = True
        self.stepped, self.rate = True, kept(optimizer.param_groups[0]["lr"])  # a schedule may change a tensor in place
        if not self.probe.due and not (self.locating and self.clip_norm is None):
            self._locate_if(self.clip_norm)
            return
        norms = self._gradient_norms(optimizer)
        self.total = torch.linalg.vector_norm(norms)
        self._locate_if(self.total if self.clip_norm is None else self.clip_norm)
        self.probe.merge()  # so that the loss scale is taken out of all
        self.probe.before_update(norms, self._loss_scale())

    def _loss_scale(self) -> Tensor | None:
        """The factor of the loss in the backward pass of fp16, None if there is none."""
        scale = self.scaler.get_scale() if self.scaler is not None else 1.0
        return torch.tensor(scale, device=self.probe.device) if scale != 1.0 else None

    def _locate_if(self, value: Tensor | float | None) -> None:
        """Locate the fault if a loss, or the norm of the gradient, is not finite on any rank."""
        if not self.locating or self.located or value is None:
            return
        number = float(whole(value).detach()) if isinstance(value, Tensor) else value
        if not on_any(not math.isfinite(number), self.probe.device):
            return
        self.located, self.faults = True, self.faults + 1
        if self.faults <= LOCATED:
            text = self._fault()
            self.log.writer.event("nonfinite", step=self.next, fault=text)
            if is_first():
                warn(f"step {self.next}: {text}")

    def _fault(self) -> str:
        """What `locate` finds, of the first rank where it finds more than what others sent."""
        fault = self.locate()
        own = fault.sentence() if fault else UNLOCATED
        texts = gather_text(own if fault and fault.pass_ != EXCHANGE else "", self.probe.device)
        rank, text = next(((rank, text) for rank, text in enumerate(texts) if text), (None, own))
        return text if rank is None or len(texts) == 1 else f"on rank {rank}: {text}"

    @torch.no_grad()
    def _gradient_norms(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Norm of each parameter's gradient `[parameters]`, 0 without one, not scaled for fp16."""
        self.probe.look_up()
        absent = torch.zeros(1, device=self.probe.device)
        norms = tensor_norms([absent if p.grad is None else dense(p.grad) for p in self.probe.parameters]).to(absent)
        scale = getattr(optimizer, "grad_scale", None)  # that a fused optimizer divides by itself
        return norms if scale is None else norms / scale

    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._owns(optimizer):
            self.found_inf = getattr(optimizer, "found_inf", None)
            self.probe.adam(optimizer)

    # After a step

    def step(
        self,
        loss: Tensor | float,
        *,
        grad_norm: Tensor | float | None = None,
        lr: Tensor | float | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        tokens: int | None = None,
        val_loss: Tensor | float | None = None,
        scaler: Any = None,
        step: int | None = None,
    ) -> Verdict:
        """Record a step, after `optimizer.step()`. Returns the newest verdict; it waits for nothing between rows.

        Args:
            loss: the training loss of the step: the mean over micro-batches.
            grad_norm: norm of the gradient before clipping. By default what `clip_grad_norm_` of torch returned in this
                step, or what is measured every `every` steps.
            lr: learning rate of the update; by default that of the first group of parameters.
            optimizer: only needed to learn the rate of one that is not of torch.
            tokens: tokens of this step, on all ranks together.
            val_loss: validation loss after the update.
            scaler: the GradScaler of fp16: the record then shows its scale and the steps that it skipped.
            step: number of the step, if it is not the one after the last.

        Raises UserError if the watch is closed, `step` is not after the last one, or a value is not one number.
        """
        if self.closed:
            raise UserError(
                f"watch: step {self.next if step is None else step} after close(). Watch the model again to go on."
            )
        number = self.next if step is None else whole_number("step", step, self.next, ", the step after the last")
        loss, lr = one_number("loss", loss), optional_number("lr", lr)
        val_loss, grad_norm = optional_number("val_loss", val_loss), optional_number("grad_norm", grad_norm)
        if self.scaler is None and scaler is not None:
            self.scaler = scaler
            if self.probe.due and self.stepped:
                self.probe.unscale(self._loss_scale())  # which was not known before the update
        rate = next((given for given in (lr, self.rate) if given is not None), None)
        if rate is None and optimizer is not None:
            rate = optimizer.param_groups[0]["lr"]
        skipped = any(guard.last_skipped for guard in self.guards)
        explained = skipped or any(given is not None for given in (lr, optimizer, self.scaler))
        if not (self.stepped or explained or self.warned):
            self.warned = True
            if is_first():
                warn(f"step {number}: {NO_UPDATE}")
        norm = next((given for given in (grad_norm, self.clip_norm) if given is not None), None)
        if self.probe.due and self.total is not None:
            norm = self._unclipped(norm, self.total)
        self.log.tokens += 0 if tokens is None else whole_number("tokens", tokens, 0)
        facts = {
            "tokens": self.log.tokens or None,
            "train/lr": rate,
            "val/loss": val_loss,
            "train/loss": loss,
            "grad/norm": norm,
            **self._scaled(),
        }
        if skipped:
            facts["scale/skipped"] = 1.0
            self.log.writer.event("skipped", step=number)
            self._locate_if(math.nan)
        self._locate_if(loss if self.locating else None)
        self.waiting.append((number, {key: kept(value) for key, value in facts.items() if value is not None}))
        self._read()
        if self.probe.due:
            self._launch()
            self._read(wait=rank_count() > 1)
        self.next = number + 1
        self._arm()
        return self.log.verdict

    def _unclipped(self, norm: Tensor | float | None, total: Tensor) -> Tensor:
        """The norm before clipping; the norms of single gradients, measured after it, are scaled by the same factor."""
        if norm is None:
            return total
        norm = torch.as_tensor(whole(norm), device=total.device, dtype=total.dtype).detach()
        factor = norm / total
        self.probe.rescale_gradients(torch.where(factor.isfinite() & (factor > 1), factor, 1.0))
        return norm

    def _scaled(self) -> dict[str, Any]:
        """What the loss scale of fp16 did in this step."""
        if self.scaler is None:
            return {}
        skipped = self.found_inf if self.found_inf is not None else float(not self.stepped)
        return {"scale/loss_scale": self.scaler.get_scale() if self.probe.due or not self.stepped else None} | {
            "scale/skipped": skipped
        }

    def _launch(self, alone: bool = False) -> None:
        """Start the copy of the values of all steps since the last one to the host.

        `alone`: exchange nothing with the other ranks, which may be somewhere else.
        """
        self._read(wait=True)
        self.probe.merge()
        self.probe.update()
        if rank_count() > 1 and not alone:
            self._average()
        places = [
            (row, key)
            for row, (_, facts) in enumerate(self.waiting)
            for key, value in facts.items()
            if isinstance(value, Tensor)
        ]
        host = None
        if places:
            values = torch.stack([self.waiting[row][1][key].to(self.probe.device) for row, key in places])
            host = torch.empty(len(values), pin_memory=values.is_cuda)
            host.copy_(values, non_blocking=values.is_cuda)
        self.pending = Pending(self.waiting, places, host, self.probe.snapshot())
        self.waiting = []

    def _average(self) -> None:
        """Replace each loss of the waiting steps by its mean over the ranks that gave one."""
        places = [(facts, key) for _, facts in self.waiting for key in LOSSES]
        losses = [facts.get(key, 0.0) for facts, key in places]
        given = [float(key in facts) for facts, key in places]
        tensors = [n for n, loss in enumerate(losses) if isinstance(loss, Tensor)]
        numbers = [0.0 if isinstance(loss, Tensor) else float(loss) for loss in losses]
        values = torch.tensor([*numbers, *given], dtype=torch.float64, device=self.probe.device)
        if tensors:
            values[tensors] = torch.stack([losses[n] for n in tensors]).to(values)
        sums, counts = gather(values).sum(0).view(2, -1).tolist()
        for (facts, key), total, count in zip(places, sums, counts, strict=True):
            if count:
                facts[key] = total / count

    def _read(self, wait: bool = False) -> None:
        """Take over the rows whose copies have arrived."""
        if self.pending is not None and (wait or self.pending.arrived()):
            measured, rows, self.pending = bool(self.pending.snapshot.spans), self.pending.rows(), None
            if measured and not self.looked:
                self.looked = True
                if is_first() and not any(key.startswith("norm/out/") for key in rows[-1]):
                    warn(UNCALLED.format(step=rows[-1]["step"]))
            self.log.add(rows)

    # What the caller may ask for

    @property
    def verdict(self) -> Verdict:
        """The newest verdict."""
        return self.log.verdict

    @property
    def stopped(self) -> bool:
        """Whether a policy says that training should stop."""
        return self.log.stopped

    def table(self) -> str:
        """The sites that are observed."""
        return table(self.sites)

    def locate(self, batch: Any = None) -> Fault | None:
        """Repeat the step on a batch with checks at every module: where the first value arises that is not finite.

        The batch is what the model is called with: a mapping as keywords, a tuple or list as arguments; by default,
        with `on_nonfinite="locate"`, that of the last forward pass. Returns None if the loss and all gradients are
        finite. Weights, gradients and random states are not changed. With several ranks, all call it.
        """
        scale = self.scaler.get_scale() if self.scaler is not None else 1.0
        with self.probe.resting():
            return self.replay.locate(batch, scale)

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on, leave out each update of an optimizer whose gradient is not finite. Waits once per step."""
        self.guards.append(Guard(optimizer, lambda: self.clip_norm))

    def saved(self, path: str | Path) -> None:
        """Record that a checkpoint of all steps so far was saved at `path`."""
        self.log.writer.event("checkpoint", step=self.next, path=str(Path(path).absolute()))

    def detach(self) -> None:
        """Remove everything from the model, the optimizers and torch. The record stays open."""
        self.probe.remove()
        self.attention.remove()
        self.replay.remove()
        for guard in self.guards:
            guard.remove()
        CLIP.remove(self._clipped)
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def close(self, status: str = COMPLETE) -> Summary | None:
        """Write what is still on the device and the summary, and detach. Returns the summary, None if closed before.

        `status` is `complete`, `stopped`, `interrupted` or `failed`; a run that a policy stopped is not `complete`.
        With several ranks, all have to call it if it is `complete` or `stopped`; else the losses since the last
        measured step are those of the first rank alone.
        """
        if self.closed:
            return None
        self.closed = True
        atexit.unregister(self._at_exit)
        self.probe.rest()
        if self.waiting:
            self._launch(alone=status not in (COMPLETE, STOPPED))
        self._read(wait=True)
        self.detach()
        return self.log.close(STOPPED if self.stopped and status == COMPLETE else status)

    def _at_exit(self) -> None:
        """Close the record of a loop that has not done so."""
        self.close(INTERRUPTED)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.close(INTERRUPTED if issubclass(kind, KeyboardInterrupt) else FAILED)


watch = Watch


class Pending:
    """Rows on their way to the host."""

    def __init__(
        self,
        steps: list[tuple[int, dict[str, Any]]],
        places: list[tuple[int, str]],
        host: Tensor | None,
        snapshot: PendingRow,
    ) -> None:
        self.steps, self.places, self.host, self.snapshot = steps, places, host, snapshot

    def arrived(self) -> bool:
        """Whether reading them waits for nothing."""
        return self.snapshot.event is None or self.snapshot.event.query()

    def rows(self) -> list[Row]:
        """The rows, of which the last has the statistics of layers."""
        measured = self.snapshot.read()
        rows: list[Row] = [{"step": number, **facts} for number, facts in self.steps]
        for (row, key), value in zip(self.places, self.host.tolist() if self.host is not None else [], strict=True):
            rows[row][key] = value
        rows[-1] |= measured
        return rows


def kept(value: Any) -> Any:
    """A number of a step: a copy of a tensor, which the caller may change in place, or a number."""
    if isinstance(value, Tensor):
        value = whole(value).detach()
        return float(value) if on_host(value) else value.float().reshape(()).clone()
    return value


def on_host(tensor: Tensor) -> bool:
    """Whether reading a tensor waits for no device."""
    return tensor.device.type == "cpu"
