"""The check at step 0: whether signal and gradient pass through the layers, and the first loss is that of ignorance.

Pure functions of the first row of a record. Variances are mean squares, from norms: of a token's vector over its width,
of a gradient over tokens and width.
"""

import math
from typing import Any

from stabrun.record.jsonl import number

LOSS_OFF = 1.0  # nats above ln(vocab): unit-variance logits cost half a nat
PASSES = 10.0  # between layers' token norms: a factor of 100 in variance
FADES = 100.0  # between layers' gradient norms; a deep pre-norm model has a factor of 10 or so

Variances = dict[str, list[float]]


def variances(row: dict[str, Any], widths: dict[str, tuple[int, int]], tokens: int) -> Variances:
    """Column → variance by layer, from a row that was observed at its slow cadence.

    `widths`: (in, out) of each site; `tokens` of the batch.
    """

    def squares(key: str, count: int) -> list[float]:
        return [number(value) ** 2 / count for value in row[key]]

    columns = {"residual": squares("residual/norm", widths["qkv"][0])}
    columns |= {f"{site} out": squares(f"norm/out/{site}", widths[site][1]) for site in widths}
    grads = {f"{site} in grad": squares(f"norm/in_grad/{site}", tokens * widths[site][0]) for site in widths}
    return columns | grads


def findings(row: dict[str, Any], vocab_size: int) -> list[str]:
    """What is off, a sentence each; nothing where all is well. `row` is one that was observed, before any update."""
    if row.get("scale/skipped"):
        return []  # fp16 still looks for its loss scale
    loss, ignorant = number(row["train/loss"]), math.log(vocab_size)
    if not (math.isfinite(loss) and math.isfinite(number(row["grad/norm"]))):
        return ["The first loss or its gradient is not finite."]
    said = []
    if loss - ignorant > LOSS_OFF:
        said.append(
            f"The first loss is {loss:.2f}, and ln({vocab_size}) = {ignorant:.2f} is what knowing nothing costs: "
            "the logits are too large."
        )
    said += _dead(row)
    stream = [number(value) for value in row["residual/norm"]]
    if not min(stream):
        said.append("The blocks put out zeros: no signal passes through them.")
    elif max(stream) > PASSES * min(stream):
        how = "grows" if stream[-1] > stream[0] else "fades"
        said.append(f"The signal {how} with depth: {_span(stream, 'after')} (norm of a token's vector).")
    return said


def _dead(row: dict[str, Any]) -> list[str]:
    if not number(row["grad/norm"]):
        small = ", or fp16's loss scale is far too small" if "scale/loss_scale" in row else ""
        return [f"All gradients are zero: nothing can be learned from these weights{small}."]
    if not max(number(value) for value in row["grad/norm_by_layer"]):
        return ["No gradient reaches the blocks: nothing is learned but by the embedding and the head."]
    gradients = [number(value) for value in row.get("norm/in_grad/fc1", row["grad/norm_by_layer"])]
    if max(gradients) > FADES * min(gradients):
        how = "fades" if gradients[0] < gradients[-1] else "grows"
        return [f"The gradient {how} on its way to the first layer: {_span(gradients, 'at')} (norm at FC1's input)."]
    return []


def _span(values: list[float], where: str) -> str:
    return f"{values[0]:.2g} {where} layer 0, {values[-1]:.2g} {where} layer {len(values) - 1}"
