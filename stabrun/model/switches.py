"""What each value of a switch means, one table row per value, and the shapes that follow from them.

This module imports no torch, so that counting parameters stays quick. Functions of tensors therefore take
`stabrun.model.functional` as their first argument, `F`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from stabrun.config import AttentionConfig, ModelConfig


def gelu(F: Any, x: Any) -> Any:
    return F.gelu(x)


def gelu_tanh(F: Any, x: Any) -> Any:
    return F.gelu(x, approximate="tanh")


def relu2(F: Any, x: Any) -> Any:
    return F.relu2(x)


def swiglu(F: Any, x: Any) -> Any:
    """silu(gate) · up, where gate and up are the halves of x: `[..., 2w]` → `[..., w]` (arXiv 2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(F: Any, x: Any) -> Any:
    """gelu(gate) · up, where gate and up are the halves of x: `[..., 2w]` → `[..., w]` (arXiv 2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate) * up


def geglu_tanh(F: Any, x: Any) -> Any:
    """`geglu` with the approximation of gelu by tanh: `[..., 2w]` → `[..., w]`."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


@dataclass(frozen=True)
class Activation:
    """An activation `function(F, x)`.

    `widths` is FC1's output width as a multiple of FC2's input width. `kept` counts the values that autograd keeps for
    the backward pass, as a multiple of FC2's input width: FC1's output, FC2's input and what the function saves.
    `needed` counts the values that exist in addition while the function is differentiated, when FC2's input is free.
    """

    function: Callable[[Any, Any], Any]
    widths: int = 1
    kept: int = 2
    needed: int = 0


ACTIVATIONS = {
    "gelu": Activation(gelu),
    "gelu_tanh": Activation(gelu_tanh),
    "relu2": Activation(relu2),
    "swiglu": Activation(swiglu, widths=2, kept=4, needed=1),
    "geglu": Activation(geglu, widths=2, kept=4, needed=1),
    "geglu_tanh": Activation(geglu_tanh, widths=2, kept=4, needed=1),
}


def layer_norm(F: Any, x: Any, gain: Any, bias: Any, eps: Any) -> Any:
    """(x − mean) / √(var + ε) · gain + bias, over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], gain, bias, eps)


def rms_norm(F: Any, x: Any, gain: Any, bias: Any, eps: Any) -> Any:
    """x / √(mean(x²) + ε) · gain + bias, over the last dimension (arXiv 1910.07467)."""
    return shifted(F.rms_norm(x, x.shape[-1:], gain, eps), bias)


def dyt(F: Any, x: Any, gain: Any, bias: Any, alpha: Any) -> Any:
    """tanh(α·x) · gain + bias with a learned number α (arXiv 2503.10622, equation 1)."""
    y = F.tanh(alpha * x)
    return shifted(y if gain is None else y * gain, bias)


def batch_norm(F: Any, x: Any, gain: Any, bias: Any, eps: Any) -> Any:
    """(x − mean) / √(var + ε) · gain + bias, over all dimensions but the last (arXiv 1502.03167).

    The statistics are those of the present batch, in validation too: each token sees the tokens after it.
    """
    return F.batch_norm(x.flatten(0, -2), None, None, gain, bias, training=True, eps=eps).view(x.shape)


def shifted(y: Any, bias: Any) -> Any:
    return y if bias is None else y + bias


@dataclass(frozen=True)
class NormKind:
    """A norm `function(F, x, gain, bias, eps)`; `gain_offset` is added to the stored gain.

    With `learned_alpha`, the last argument is a learned number in place of ε. `kept` counts the values of the
    width that autograd keeps, and `kept_on_cpu` more of them where the CPU has no fused kernel. `causal`: whether a
    token sees no later ones.
    """

    function: Callable[..., Any]
    gain_offset: float = 0.0
    learned_alpha: bool = False
    kept: int = 1
    kept_on_cpu: int = 0
    causal: bool = True


NORMS: dict[str, NormKind | None] = {
    "layernorm": NormKind(layer_norm),
    "rmsnorm": NormKind(rms_norm, kept_on_cpu=1),
    "layernorm1p": NormKind(layer_norm, gain_offset=1.0),  # NeMo: weight decay pulls the gain toward 1
    "rmsnorm1p": NormKind(rms_norm, gain_offset=1.0, kept_on_cpu=1),  # Gemma
    "dyt": NormKind(dyt, learned_alpha=True, kept=2),
    "batchnorm": NormKind(batch_norm, causal=False),
    "none": None,
}


def leak(model: ModelConfig) -> str | None:
    """A sentence if tokens see later ones; else None."""
    kind = NORMS[model.norm.kind]
    if kind is None or kind.causal:
        return None
    return f"model.norm.kind={model.norm.kind}: each token sees the tokens after it, so that the losses are too low."


def norm_vectors(model: ModelConfig) -> tuple[bool, bool]:
    """Whether norms have a gain, and a bias."""
    bias = model.bias if model.norm.bias is None else model.norm.bias
    learned = NORMS[model.norm.kind] is not None and model.norm.affine
    return learned, learned and bias


SDPA, FLEX, EXPLICIT = "sdpa", "flex", "explicit"
QUERIES = 256  # of a sequence at a time, where attention weights are computed explicitly


def clips(attn: AttentionConfig) -> bool:
    """Whether attention weights are clipped."""
    return (attn.clip_low, attn.clip_high) != (0.0, 1.0)


def attention_path(attn: AttentionConfig, head_dim: int, dropout: float, device: str) -> str:
    """How attention is computed on a type of device.

    - `SDPA` wherever no cap or clip is set: its scale holds the temperature.
    - `FLEX`: a cap on CUDA, by a fused kernel too. It has no dropout, needs heads of 16 channels or more, and has no
      backward pass on other devices.
    - `EXPLICIT`: weights in fp32, for `QUERIES` queries at a time; computed again in the backward pass if T is larger.
    """
    if attn.soft_cap is None and not clips(attn):
        return SDPA
    fused = device == "cuda" and not clips(attn) and not dropout and head_dim >= 16
    return FLEX if fused else EXPLICIT


LOGITS = 1 << 29  # outputs of the model in memory at a time: above, the weights' traffic for each part is small


SAMPLED = 64  # sequences of a batch that attention is measured on: at long contexts all would cost too much


def scores_at_once(device: str) -> int:
    """Attention logits in memory at a time for their statistics: few on the CPU, whose caches are small."""
    return 1 << (22 if device == "cpu" else 27)


def divisors(number: int) -> list[int]:
    """The divisors of a positive number, in order."""
    lower = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*lower, *(number // n for n in lower)})


def sequence_parts(vocab_size: int, sequences: int, seq_len: int) -> int:
    """Parts of equal length that a sequence is split into for the output layer: the fewest that hold `LOGITS`."""
    fitting = (parts for parts in divisors(seq_len) if seq_len // parts * sequences * vocab_size <= LOGITS)
    return next(fitting, seq_len)


def of_layer(model: ModelConfig, index: int) -> ModelConfig:
    """The configuration of block `index`, counted from 0. A difference between layers is made here and nowhere else."""
    if index < int(model.post_ln_share * model.n_layer):
        attn = replace(model.attn, pre_norm=False, post_norm=True)
        return replace(model, attn=attn, mlp=replace(model.mlp, pre_norm=False, post_norm=True))
    return model


def layers(model: ModelConfig) -> list[ModelConfig]:
    """The configuration of each block, `[n_layer]`."""
    return [of_layer(model, index) for index in range(model.n_layer)]


def linears(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """The linear layers of a block: site → (inputs, outputs)."""
    d, hidden = model.d_model, model.mlp.width or max(1, round(model.mlp.ratio * model.d_model))
    return {
        "qkv": (d, (3 + model.attn.gate) * d),
        "proj": (d, d),
        "fc1": (d, hidden * ACTIVATIONS[model.mlp.activation].widths),
        "fc2": (hidden, d),
    }
