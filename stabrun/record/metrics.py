"""The table of metrics: every key of `metrics.jsonl`, declared once.

The probe, the signals, the check at initialization, the figures, the report page and the W&B panels derive from
`METRICS`. `python -m stabrun.record.metrics` prints it as `docs/metrics.md`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from stabrun.record.jsonl import is_number, number
from stabrun.record.schema import Row

SITES = ("qkv", "proj", "fc1", "fc2", "head")
"""The linear layers, in the order of the forward pass; all but the head are in each block."""
BLOCK_SITES = SITES[:-1]
HEAD = SITES[-1]

SCALAR, BY_LAYER, BY_SITE = "number", "by layer", "by site and layer"
EVERY, SLOW_EVERY = "observe.every", "observe.slow_every"
ALARM_FACTOR = 1.5  # norms drift smoothly and have little noise: an alarm also requires at least this factor

MERGES = {
    "same": "equal in all parts",
    "mean": "mean of the parts, weighted by tokens",
    "max": "maximum of the parts",
    "root": "square root of the sum of squares: each part is a piece of one vector",
    "once": "computed once per step from the full gradient, weight or optimizer state",
}

STEP, OUTPUT, INPUT, BLOCK, ATTENTION = "step", "layer output", "layer input", "block output", "attention"
INPUT_GRADIENT, PARAMETERS, UPDATE, ADAM = "input gradient", "parameters", "update", "Adam"
SOURCES = {
    STEP: "the training step itself",
    OUTPUT: "output of each linear layer",
    INPUT: "input of each linear layer",
    BLOCK: "output of each block",
    ATTENTION: "queries and keys of each attention core",
    INPUT_GRADIENT: "gradient at the input of each linear layer, through that layer alone",
    PARAMETERS: "weights, and gradients before clipping, before the update",
    UPDATE: "change of each weight by the update",
    ADAM: "state of Adam after the update; only for weights whose optimizer has one",
}


@dataclass(frozen=True)
class Signal:
    """An alarm: the metric leaves its own trend by at least `factor`, upward, or downward if `falling`."""

    name: str
    factor: float = ALARM_FACTOR
    falling: bool = False


@dataclass(frozen=True)
class Metric:
    """A declaration. `key` contains `{site}` if there is a list for each site.

    `label` is a title of charts. `source` is what it is computed from (`SOURCES`): all but `STEP` need a reduction in
    `stabrun.observe.reductions.REDUCTIONS`. `merge` combines micro-batches and ranks (`MERGES`). `variance` is the
    column that it fills in the check at initialization, if any. `log` selects a logarithmic axis.
    """

    key: str
    label: str
    unit: str
    source: str
    cadence: str
    merge: str
    meaning: str
    signal: Signal | None = None
    variance: str = ""
    log: bool = True

    @property
    def shape(self) -> str:
        return BY_SITE if "{site}" in self.key else SCALAR if self.source == STEP else BY_LAYER

    @property
    def keys(self) -> list[str]:
        """The keys in a row: one for each site of stabrun's own models, if `key` contains `{site}`."""
        return [self.key.format(site=site) for site in SITES] if self.shape == BY_SITE else [self.key]

    @property
    def title(self) -> str:
        """Title of an axis: label and unit."""
        return self.label if self.unit == "1" else f"{self.label} ({self.unit})"

    @property
    def slow(self) -> bool:
        return self.cadence == SLOW_EVERY

    @property
    def per_token(self) -> bool:
        """Whether its reduction gives a value for each token, of which the probe takes the mean."""
        return self.merge == "mean" and self.source in (OUTPUT, INPUT, BLOCK)


METRICS = {metric.key: metric for metric in (
    Metric("step", "step", "1", STEP, "each step", "same", "number of the update, from 0", log=False),
    Metric("tokens", "tokens", "1", STEP, "each step", "same", "tokens trained on, including this step", log=False),
    Metric("train/loss", "training loss", "nats/token", STEP, "each step", "mean", "cross-entropy before the update",
           log=False),
    Metric("val/loss", "validation loss", "nats/token", STEP, "train.val_every", "mean",
           "cross-entropy on held-out text after the update", log=False),
    Metric("train/z_loss", "z-loss", "nats²", STEP, "each step if optim.z_loss > 0", "mean",
           "optim.z_loss · mean (log Z)²: minimized together with train/loss, which does not include it"),
    Metric("train/lr", "learning rate", "1", STEP, "each step", "same", "learning rate of the update"),
    Metric("scale/loss_scale", "loss scale", "1", STEP, "each step in fp16", "same",
           "factor applied to the loss in the backward pass"),
    Metric("scale/skipped", "skipped step (0 or 1)", "1", STEP, "each step in fp16", "same",
           "1 if a gradient was not finite: the update was skipped and the scale halved", log=False),
    Metric("recovery/skipped", "outlier left out (0 or 1)", "1", STEP, "each step if train.recovery=skip", "same",
           "1 if the loss or the gradient was an outlier: the update was left out", log=False),
    Metric("recovery/rewinds", "rewinds", "1", STEP, "each step if train.recovery=rewind", "same",
           "number of times that the run had gone back to an earlier state before this step", log=False),
    Metric("scale/underflow", "share of zero gradients", "1", STEP, "each step in fp16", "once",
           "share of zeros in the gradients of the linear layers' weights: fp16 underflow, or dead units",
           log=False),
    Metric("norm/out/{site}", "output norm", "1", OUTPUT, EVERY, "mean",
           "L2 norm of a token's output vector, averaged over tokens", Signal("output_norm"), "{site} out"),
    Metric("norm/in/{site}", "input norm", "1", INPUT, EVERY, "mean",
           "L2 norm of a token's input vector, averaged over tokens", Signal("input_norm")),
    Metric("norm/weight/{site}", "weight norm", "1", PARAMETERS, EVERY, "once",
           "Frobenius norm of the stored weight before the update", Signal("weight_norm")),
    Metric("norm/grad/{site}", "weight gradient norm", "1", PARAMETERS, EVERY, "once",
           "Frobenius norm of the weight's gradient before clipping", Signal("gradient_norm")),
    Metric("grad/norm", "global gradient norm", "1", STEP, "each step", "once",
           "global L2 norm of the gradient before clipping", Signal("global_gradient_norm")),
    Metric("grad/clipped", "clipped share of the gradient", "1", STEP, "each step if gradients are clipped", "once",
           "share of gradient values changed by clipping; by norm or zclip: 0 or 1", log=False),
    Metric("grad/norm_by_layer", "block gradient norm", "1", PARAMETERS, EVERY, "once",
           "L2 norm of the gradient of all parameters of a block, before clipping"),
    Metric("norm/update/{site}", "update norm", "1", UPDATE, SLOW_EVERY, "once",
           "Frobenius norm of the change of the weight, including decay", Signal("update_norm")),
    Metric("norm/in_grad/{site}", "input gradient norm", "1", INPUT_GRADIENT, SLOW_EVERY, "root",
           "L2 norm of the gradient of the batch's mean loss at the layer's input, over all tokens, through that layer "
           "alone", Signal("input_gradient_norm"), "{site} in grad"),
    Metric("norm/adam_m/{site}", "norm of Adam's first moment", "1", ADAM, SLOW_EVERY, "once",
           "Frobenius norm of the first moment after the step, not bias-corrected", Signal("adam_m", factor=3.0)),
    Metric("norm/adam_v/{site}", "norm of Adam's second moment", "1", ADAM, SLOW_EVERY, "once",
           "Frobenius norm of the second moment after the step, not bias-corrected", Signal("adam_v", factor=10.0)),
    Metric("adam/surprise/{site}", "surprise: mean g² / mean v", "1", ADAM, SLOW_EVERY, "once",
           "mean g² (clipped, before L2 decay) over mean bias-corrected v after the step: 1 for a typical gradient",
           Signal("surprise")),
    Metric("attn/max_logit", "maximum attention logit", "1", ATTENTION, SLOW_EVERY, "max",
           "largest QKᵀ/√d over past positions, before temperature and cap, in the first 64 sequences of the batch",
           Signal("max_logit")),
    Metric("attn/entropy", "attention entropy", "nats", ATTENTION, SLOW_EVERY, "mean",
           "−Σ A log A of the rows of the softmax (before soft_clip), averaged over queries, heads and the first 64 "
           "sequences of the batch",
           Signal("entropy", falling=True)),
    Metric("residual/norm", "residual norm", "1", BLOCK, EVERY, "mean",
           "L2 norm of a token's vector after the block, averaged over tokens", Signal("residual_norm"), "residual"),
)}  # fmt: skip


def find(key: str) -> Metric | None:
    """The metric that a key of a row belongs to, whatever its site, or the stack of its layers, is named."""
    parent = key.rpartition("/")[0]
    of_stack = METRICS.get(parent)
    return (
        METRICS.get(key) or METRICS.get(f"{parent}/{{site}}")
        or (of_stack if of_stack and of_stack.shape == BY_LAYER else None)
    )  # fmt: skip


shape_of = lru_cache(4096)(lambda key: (metric := find(key)) and metric.shape)


def is_value(key: str, value: Any) -> bool:
    """Whether a row may have this value: anything if the key is none of the table."""
    shape = shape_of(key)
    if shape is None or is_number(value):
        return True
    if shape == SCALAR or not isinstance(value, list) or not value:
        return False
    return set(map(type, value)) == {float} or all(item is None or is_number(item) for item in value)


def signals() -> dict[str, Metric]:
    """Name of a signal → the metric that feeds it."""
    return {metric.signal.name: metric for metric in METRICS.values() if metric.signal}


def items(key: str, value: Any) -> Iterator[tuple[int | None, Any]]:
    """The layers and items of a row's value; layer None for a number, or for the only item of stabrun's own head.

    An item is None if the layer was not called.
    """
    if not isinstance(value, list):
        yield None, value
    elif len(value) == 1 and key.endswith(f"/{HEAD}"):
        yield None, value[0]
    else:
        yield from enumerate(value)


def site_name(site: str, layer: int | None) -> str:
    """`layer_03/fc2`; a site outside the layers, such as the head, has no layer."""
    return site if layer is None else f"layer_{layer:02d}/{site}"


def place(key: str, layer: int | None) -> str | None:
    """Where an item of a row's value belongs: `layer_03/fc2`, `layer_03`, `head`; None for the whole model.

    A layer of one of several stacks is `layer_03/encoder`.
    """
    metric = find(key)
    if metric is None or metric.shape == SCALAR:
        return None
    if metric.shape == BY_SITE:
        return site_name(key.rpartition("/")[2], layer)
    stack = key.removeprefix(metric.key)
    return stack[1:] or None if layer is None else f"layer_{layer:02d}{stack}"


def by_site(row: Row, prefix: str) -> dict[str, float]:
    """The values of the keys that start with `prefix`, by site and layer: `layer_03/fc2` → value."""
    return {
        site_name(key.removeprefix(prefix), layer): number(item)
        for key, value in row.items()
        if key.startswith(prefix)
        for layer, item in items(key, value)
        if item is not None
    }


def flatten(row: Row, lists: bool = True) -> dict[str, float]:
    """A row as numbers. Lists over layers become `key/layer_03`, or `key` for the head; `lists=False` omits them.

    What is no number, as another version may write it, is left out.
    """
    flat: dict[str, float] = {}
    for key, value in row.items():
        if is_number(value):
            flat[key] = value if isinstance(value, int) else float(value)
        elif isinstance(value, list) and lists:
            flat |= {
                key if layer is None else f"{key}/layer_{layer:02d}": float(item)
                for layer, item in items(key, value)
                if is_number(item)
            }
    return flat


def table() -> str:
    """The metrics as a Markdown page."""
    columns = "key", "meaning", "unit", "shape", "cadence", "source", "merge", "signal"
    rows = [
        (f"`{m.key}`", m.meaning, m.unit, m.shape, m.cadence, m.source, m.merge, m.signal.name if m.signal else "")
        for m in METRICS.values()
    ]
    lines = [
        "# Keys of `metrics.jsonl`",
        "",
        "Each line is a JSON object. `{site}` is one of " + ", ".join(f"`{site}`" for site in SITES) + ". Values by "
        'layer are lists, from layer 0. Numbers that are not finite are the strings `"nan"`, `"inf"` and `"-inf"`.',
        "Each line ends with `crc`, which is no metric but the checksum (CRC-32) of the bytes before its comma. A line "
        "that does not fit it is damaged, and is not read.",
        "",
        "In the record of a run that `stabrun.watch` watches, `{site}` is the last part of a module's path, such as "
        "`q_proj`, or more of it where that is needed to tell sites apart, such as `mlp.c_proj`. A site outside the "
        "layers, such as `lm_head`, has a number. The item of a layer that was not called in a step is `null`. A model "
        "with several stacks of layers has a list for each in the keys by layer, such as `residual/norm/encoder`. Keys "
        "are in the order of the forward pass.",
        "",
        *("| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)),
        "",
        "**Source**: what a metric is computed from.",
        "",
        *(f"- **{name}**: {meaning}" for name, meaning in SOURCES.items()),
        "",
        "**Merge**: how the values of several micro-batches or ranks become one.",
        "",
        *(f"- **{name}**: {meaning}" for name, meaning in MERGES.items()),
        "",
        "**Signal**: the alarm that the metric feeds, see [the verdict](verdict.md).",
        "",
        "This page is generated: `python -m stabrun.record.metrics > docs/metrics.md`.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
