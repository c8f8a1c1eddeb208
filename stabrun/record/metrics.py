"""Every key of `metrics.jsonl`: its meaning, unit, cadence and how it merges over micro-batches and ranks.

`docs/metrics.md` is this table, written by `python -m stabrun.record.metrics`; a test holds the two together.
"""

from dataclasses import dataclass
from typing import Any

from stabrun.record.jsonl import number

SITES = ("qkv", "proj", "fc1", "fc2", "head")


@dataclass(frozen=True)
class Metric:
    """`key` may hold `{site}`. `shape`: a number, or a list over layers. `merge`: see `MERGES`."""

    key: str
    shape: str
    unit: str
    cadence: str
    merge: str
    meaning: str


MERGES = {
    "same": "equal in every part",
    "mean": "the parts' mean, weighted by tokens",
    "max": "the parts' largest",
    "root": "square root of the sum of squares: the parts are pieces of one vector",
    "once": "taken from the whole gradient, weight or moment, once a step",
}

METRICS = (
    Metric("step", "number", "updates before this one", "each step", "same", "number of the update, from 0"),
    Metric("tokens", "number", "tokens", "each step", "same", "tokens trained on, this step's included"),
    Metric("train/loss", "number", "nats a token", "each step", "mean", "cross-entropy before the update"),
    Metric(
        "val/loss",
        "number",
        "nats a token",
        "train.val_every",
        "mean",
        "cross-entropy on held-out text after the update",
    ),
    Metric(
        "train/z_loss",
        "number",
        "nats²",
        "each step, where optim.z_loss > 0",
        "mean",
        "optim.z_loss · mean (log Z)²: minimised beside the cross-entropy, and not part of train/loss",
    ),
    Metric("train/lr", "number", "1", "each step", "same", "learning rate of the update"),
    Metric("grad/norm", "number", "1", "each step", "once", "global L2 norm of the gradient before clipping"),
    Metric(
        "grad/clipped",
        "number",
        "share",
        "each step, where optim.clip is set",
        "once",
        "share of the gradient's values that clipping changed: 0 or 1 by norm",
    ),
    Metric(
        "scale/loss_scale", "number", "1", "each step of fp16", "same", "what the loss was multiplied by in this step"
    ),
    Metric(
        "scale/skipped",
        "number",
        "0 or 1",
        "each step of fp16",
        "same",
        "1 where a gradient was not finite, so that the update was left out and the scale halved",
    ),
    Metric(
        "scale/underflow",
        "number",
        "share",
        "each step of fp16",
        "once",
        "zeros among the gradients of the linear layers' weights: below fp16's smallest number, or dead",
    ),
    Metric(
        "grad/norm_by_layer",
        "list",
        "1",
        "observe.every",
        "once",
        "L2 norm of the gradient of all of a block's parameters, before clipping",
    ),
    Metric(
        "residual/norm",
        "list",
        "1",
        "observe.every",
        "mean",
        "L2 norm of a token's vector after the block, averaged over tokens",
    ),
    Metric(
        "norm/out/{site}",
        "list",
        "1",
        "observe.every",
        "mean",
        "L2 norm of a token's output of the linear layer, averaged over tokens",
    ),
    Metric(
        "norm/in/{site}",
        "list",
        "1",
        "observe.every",
        "mean",
        "L2 norm of a token's input to the linear layer, averaged over tokens",
    ),
    Metric(
        "norm/weight/{site}",
        "list",
        "1",
        "observe.every",
        "once",
        "Frobenius norm of the stored weight before the update",
    ),
    Metric(
        "norm/grad/{site}",
        "list",
        "1",
        "observe.every",
        "once",
        "Frobenius norm of the weight's gradient before clipping",
    ),
    Metric(
        "norm/in_grad/{site}",
        "list",
        "1",
        "observe.slow_every",
        "root",
        "L2 norm of the gradient of the batch's mean loss at the linear layer's input, over all tokens, through "
        "that layer alone",
    ),
    Metric(
        "norm/update/{site}",
        "list",
        "1",
        "observe.slow_every",
        "once",
        "Frobenius norm of what the step changed in the weight, decay included",
    ),
    Metric(
        "norm/adam_m/{site}",
        "list",
        "1",
        "observe.slow_every",
        "once",
        "Frobenius norm of Adam's first moment after the step, not bias-corrected",
    ),
    Metric(
        "norm/adam_v/{site}",
        "list",
        "1",
        "observe.slow_every",
        "once",
        "Frobenius norm of Adam's second moment after the step, not bias-corrected",
    ),
    Metric(
        "adam/surprise/{site}",
        "list",
        "1",
        "observe.slow_every",
        "once",
        "mean g² (clipped, before L2 decay) over mean bias-corrected v after the step: 1 when the gradient is as "
        "large as usual",
    ),
    Metric(
        "attn/max_logit",
        "list",
        "1",
        "observe.slow_every",
        "max",
        "largest QKᵀ/√d over the past, before temperature and cap",
    ),
    Metric(
        "attn/entropy",
        "list",
        "nats",
        "observe.slow_every",
        "mean",
        "−Σ A log A of the softmax's rows (before soft_clip), averaged over queries, heads and sequences",
    ),
)


def expand(key: str) -> list[str]:
    """A key for each site, where it holds `{site}`."""
    return [key.format(site=site) for site in SITES] if "{site}" in key else [key]


def site_name(site: str, layer: int) -> str:
    """`layer_03/fc2`; the head stands alone."""
    return site if site == "head" else f"layer_{layer:02d}/{site}"


def by_site(row: dict[str, Any], prefix: str) -> dict[str, float]:
    """The values of the keys that start with `prefix`, by site, such as `layer_03/fc2`."""
    return {
        site_name(key.removeprefix(prefix), layer): number(value)
        for key, values in row.items()
        if key.startswith(prefix)
        for layer, value in enumerate(values if isinstance(values, list) else [values])
    }


def table() -> str:
    """The keys as a Markdown page."""
    lines = [
        "# Keys of `metrics.jsonl`",
        "",
        "An object a line. Lists run over layers, from 0; `{site}` is one of "
        + ", ".join(f"`{site}`" for site in SITES)
        + '. Numbers that are not finite are the strings `"nan"`, `"inf"`, `"-inf"`. '
        "This page is written by `python -m stabrun.record.metrics > docs/metrics.md`.",
        "",
        "| key | shape | unit | cadence | merges by | meaning |",
        "|---|---|---|---|---|---|",
        *(f"| `{m.key}` | {m.shape} | {m.unit} | {m.cadence} | {m.merge} | {m.meaning} |" for m in METRICS),
        "",
        "How a value of several micro-batches or ranks becomes one:",
        "",
        *(f"- **{name}**: {meaning}" for name, meaning in MERGES.items()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
