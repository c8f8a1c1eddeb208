"""FLOPs and bytes of a training step at 830M, counted on fake tensors: of each attention path, and of observation.

Every operation of one micro-batch without torch.compile is counted: the FLOPs of its matrix products, by the precision
of their factors, and the bytes of its inputs and outputs, as if none stayed in a cache. The time is that of an H100 at
its peaks (989.5 TFLOP/s in bf16, 67 in fp32, 3.35 TB/s), all added up: an estimate for ratios, not of seconds. Compiled
code moves fewer bytes. Prints the tables of docs/gpu.md.

    python scripts/count_step.py
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from stabrun.composition import compose
from stabrun.config import AttentionConfig, Config, ObserveConfig, micro_batch
from stabrun.model.gpt import GPT
from stabrun.model.switches import FLEX, SAMPLED, sequence_parts
from stabrun.observe.probe import Probe
from stabrun.observe.sites import model_sites
from stabrun.training.objective import Objective
from stabrun.training.precision import autocast

BF16, FP32, BANDWIDTH = 989.5e12, 67e12, 3.35e12  # NVIDIA's data sheet of the H100 SXM
SDPA_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
MOVES_NOTHING = ("detach", "empty", "empty_like", "lift_fresh")
# flex_attention's backward pass computes the logits and the gradient of the weights twice: 7 products in place of 5.
# Of the score function: a tanh forward, and in each of the two passes backward a tanh and its derivative, at 12 FLOPs.
FLEX_PRODUCTS, FLEX_ELEMENTWISE = 2, 3 * 12


class Count(NamedTuple):
    """FLOPs of matrix products with factors of 16 and of 32 bits, and bytes moved."""

    low: float = 0.0
    full: float = 0.0
    bytes: float = 0.0

    def times(self, factor: float) -> "Count":
        return Count(*(factor * value for value in self))

    def plus(self, other: "Count") -> "Count":
        return Count(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def seconds(self) -> float:
        return self.low / BF16 + self.full / FP32 + self.bytes / BANDWIDTH


class Counter(TorchDispatchMode):
    """Counts the operations below it; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.low = self.full = self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or func.overloadpacket.__name__ in MOVES_NOTHING:
            return out
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        self.bytes += sum(x.numel() * x.element_size() for x in [*given, *made])
        flops = self.flops(func, args, kwargs or {}, out)
        if given and given[0].element_size() == 2:
            self.low += flops
        else:
            self.full += flops
        return out

    def flops(self, func: Any, args: Any, kwargs: Any, out: Any) -> float:
        name = func.overloadpacket.__name__
        if name.startswith(SDPA_FORWARD):
            batch, heads, time, width = (args[0] if name == SDPA_FORWARD else args[1]).shape
            products = 2 if name == SDPA_FORWARD else 5
            return products * batch * heads * time * time * width  # 2 FLOPs, on half of the scores
        formula = flop_registry.get(func.overloadpacket)
        return float(formula(*args, **kwargs, out_val=out)) if formula else 0.0


def counted(config: Config, step: int | None, attention: bool = True) -> Count:
    """One micro-batch, measured as in `step`, or not at all; `attention`: whether its attention is measured."""
    shape = micro_batch(config), config.data.seq_len
    with FakeTensorMode():
        model = GPT(config.model, config.data.seq_len)
        for core in model.cores:
            if core.path("cuda") == FLEX:  # has no backward pass on the CPU, and moves what SDPA moves
                core.config = AttentionConfig()
        parts = sequence_parts(config.model.vocab_size, *shape)
        observe = ObserveConfig() if step is not None else ObserveConfig(every=0)
        probe = Probe(model, observe, model_sites(model), shape[0], model.cores)
        objective = Objective(model, 0.0, parts, partial(autocast, config.train, torch.device("cpu")))
        tokens = torch.zeros(shape[0], shape[1] + 1, dtype=torch.long)
        probe.arm(step or 0)
        probe.begin(0 if attention else SAMPLED)
        with Counter() as counter:
            objective.accumulate(tokens, 1, lambda loss: loss)
            probe.merge()
    return Count(counter.low, counter.full, counter.bytes)


def of_flex(config: Config) -> Count:
    """What flex_attention computes in addition to SDPA; its score function without tensor cores."""
    model, time = config.model, config.data.seq_len
    scores = micro_batch(config) * model.n_layer * model.n_head * time * time / 2
    head_dim = model.d_model // model.n_head
    return Count(2 * FLEX_PRODUCTS * scores * head_dim, FLEX_ELEMENTWISE * scores)


def line(name: str, count: Count, base: Count) -> str:
    ratios = (count.low + count.full) / (base.low + base.full), count.bytes / base.bytes, count.seconds / base.seconds
    numbers = f"{count.low:.3g} | {count.full:.3g} | {count.bytes:.3g}"
    return f"| {name} | {numbers} | {' | '.join(f'{ratio:.3f}' for ratio in ratios)} |"


def table(rows: Sequence[tuple[str, Count]], what: str) -> None:
    print(f"| {what} | FLOPs in bf16 | FLOPs in fp32 | bytes | FLOPs, ratio | bytes, ratio | time, ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, count in rows:
        print(line(name, count, rows[0][1]))
    print(flush=True)


def main() -> None:
    configs = {name: compose(["model=830m", f"+variant={name}"]) for name in ("baseline", "soft_cap", "soft_clip")}
    base = counted(configs["baseline"], None)
    capped = base.plus(of_flex(configs["soft_cap"]))
    clipped = counted(configs["soft_clip"], None)
    table([("baseline: SDPA", base), ("soft_cap: flex", capped), ("soft_clip: explicit", clipped)], "micro-batch")

    config = configs["baseline"]
    parts = config.train.batch_size // micro_batch(config)
    sampled = SAMPLED // micro_batch(config)
    fast = counted(config, 1).times(parts)
    with_attention, without = counted(config, 0), counted(config, 0, attention=False)
    slow = with_attention.times(sampled).plus(without.times(parts - sampled))
    every = ObserveConfig().slow_every
    mixed = fast.times((every - 1) / every).plus(slow.times(1 / every))
    rows = [("unobserved", base.times(parts)), ("quick statistics", fast), ("all statistics", slow)]
    table([*rows, (f"all every {every} steps", mixed)], "step")


if __name__ == "__main__":
    main()
