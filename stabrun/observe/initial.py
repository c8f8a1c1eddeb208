"""The check at initialization: whether signal and gradient pass through all layers, and the first loss is ln(vocab).

Pure functions of the first row of a record.
"""

import math

from stabrun.record.jsonl import number
from stabrun.record.metrics import BY_SITE, METRICS, OUTPUT
from stabrun.record.schema import Row

LOSS_MARGIN = 1.0  # nats above ln(vocab); logits of unit variance cost half a nat
SIGNAL_RATIO = 10.0  # between the token norms of two layers: a factor of 100 in variance
GRADIENT_RATIO = 100.0  # between the gradient norms of two layers; a deep pre-norm model has a factor of about 10


def variances(row: Row, widths: dict[str, tuple[int, int]], tokens: int) -> dict[str, list[float]]:
    """Mean squares by layer, from the norms in a row: column → one value per layer.

    The columns are declared in the table of metrics (`Metric.variance`). `widths`: (in, out) of the linear layers of a
    block; `tokens`: of the batch. Token norms are divided by the width, gradient norms by width and tokens.
    """
    columns = {}
    for metric in METRICS.values():
        if not metric.variance:
            continue
        for site in widths if metric.shape == BY_SITE else ["qkv"]:  # a block is as wide as the input of QKV
            width = widths[site][metric.source == OUTPUT]
            count = width if metric.per_token else width * tokens
            values = row[metric.key.format(site=site)]
            columns[metric.variance.format(site=site)] = [number(value) ** 2 / count for value in values]
    return columns


def findings(row: Row, vocab_size: int) -> list[str]:
    """Problems of an initialization, one sentence each, from an observed row of step 0; empty if there are none."""
    if row.get("scale/skipped"):
        return []  # fp16 is still lowering its loss scale
    loss, uniform = number(row["train/loss"]), math.log(vocab_size)
    if not (math.isfinite(loss) and math.isfinite(number(row["grad/norm"]))):
        return ["The first loss or its gradient is not finite."]
    problems = []
    if loss - uniform > LOSS_MARGIN:
        problems.append(
            f"The first loss is {loss:.2f}, above ln({vocab_size}) = {uniform:.2f}: the logits are too large."
        )
    problems += gradient_findings(row)
    stream = [number(value) for value in row["residual/norm"]]
    if not min(stream):
        problems.append("The blocks output zeros: no signal passes through them.")
    elif max(stream) > SIGNAL_RATIO * min(stream):
        direction = "grows" if stream[-1] > stream[0] else "fades"
        problems.append(f"The signal {direction} with depth: {ends(stream, 'after')} (norm of a token's vector).")
    return problems


def gradient_findings(row: Row) -> list[str]:
    if not number(row["grad/norm"]):
        cause = ", or the loss scale of fp16 is far too small" if "scale/loss_scale" in row else ""
        return [f"All gradients are zero: these weights cannot learn{cause}."]
    if not max(number(value) for value in row["grad/norm_by_layer"]):
        return ["No gradient reaches the blocks: only the embedding and the head learn."]
    gradients = [number(value) for value in row.get("norm/in_grad/fc1") or row["grad/norm_by_layer"]]
    if max(gradients) > GRADIENT_RATIO * min(gradients):
        direction = "grows" if gradients[0] > gradients[-1] else "fades"
        return [f"The gradient {direction} toward the first layer: {ends(gradients, 'at')} (norm at FC1's input)."]
    return []


def ends(values: list[float], place: str) -> str:
    """`3.1 after layer 0, 0.02 after layer 11`."""
    return f"{values[0]:.2g} {place} layer 0, {values[-1]:.2g} {place} layer {len(values) - 1}"
