"""Parameters, FLOPs and memory of a configuration in closed form: no torch is imported and nothing is allocated."""

from collections import Counter
from typing import Any

from stabrun.config import AttentionConfig, Config, MlpConfig, ModelConfig, keys, micro_batch, rotated, value_of
from stabrun.model.switches import ACTIVATIONS, NORMS, layers, linears

LOW = {"bf16": "bfloat16", "fp16": "float16"}  # precisions of two bytes → torch's names for them


def parameters(model: ModelConfig, seq_len: int) -> dict[str, int]:
    """Parameters by part; `total` counts a tied head once."""
    d = model.d_model
    blocks: Counter[str] = Counter()
    for layer in layers(model):
        blocks.update(block_parameters(layer))
    blocks["norms_and_scales"] += norm_parameters(model, d) * (1 + (model.embedding == "norm"))
    parts = {
        "embedding": model.vocab_size * d,
        "position": seq_len * d if model.position.kind == "learned" else 0,
        **blocks,
        "head": 0 if model.tied else model.vocab_size * d,
    }
    return {"total": sum(parts.values()), **parts}


def block_parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters of one block by part."""
    attn, mlp, d = model.attn, model.mlp, model.d_model
    widths = {"none": 0, "head": d // model.n_head, "full": d}
    branches = sum(branch.pre_norm + branch.out_norm + branch.post_norm for branch in (attn, mlp))
    normed = branches * d + 2 * widths[attn.qk_norm] + widths[attn.v_norm]
    scales = 2 * d if model.layer_scale is not None else 0
    extra = model.sigma_reparam != "none"  # γ
    parts = {site: n_in * n_out + n_out * model.bias + extra for site, (n_in, n_out) in linears(model).items()}
    return parts | {"norms_and_scales": norm_parameters(model, normed) + scales}


def norm_parameters(model: ModelConfig, width: int) -> int:
    """Gains, and biases if there are any, of norms over `width` channels in all."""
    learned = NORMS[model.norm.kind] is not None and model.norm.affine
    return width * (1 + model.bias) if learned else 0


def flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """FLOPs of one training step per token, forward and backward: 6 per weight of the matrix products, head included,
    and 12 · n_layer · d_model · seq_len for attention, ignoring causality (PaLM, arXiv 2204.02311, appendix B).
    """
    weights = sum(n_in * n_out for layer in layers(model) for n_in, n_out in linears(layer).values())
    return 6 * (weights + model.d_model * model.vocab_size) + 12 * model.n_layer * model.d_model * seq_len


def memory(config: Config) -> dict[str, int]:
    """Bytes of a training step on one device: fp32 weights, gradients and Adam's moments, and the activations of a
    micro-batch that autograd keeps. `peak_bytes` is the larger of two moments: the start of the backward pass and the
    optimizer's step. This is an estimate: kernel workspaces and allocator overhead are not counted.
    """
    model, seq_len, train = config.model, config.data.seq_len, config.train
    count = parameters(model, seq_len)["total"]
    tokens = micro_batch(config) * seq_len
    logits = 4 * tokens * model.vocab_size
    activations = tokens * sum(block_bytes(layer, seq_len, train.precision) for layer in layers(model))
    low_copies = 2 * count if train.precision in LOW else 0  # the weights that autocast converts, kept for the backward
    steady = {
        "weights_bytes": 4 * count,
        "gradients_bytes": 4 * count,
        "optimizer_bytes": 8 * count,
        "activations_bytes": activations + low_copies,
        "logits_bytes": 3 * logits,
    }
    backward = 12 * count + steady["activations_bytes"] + steady["logits_bytes"]
    return {"peak_bytes": max(backward, 16 * count + logits), **steady}


def block_bytes(model: ModelConfig, seq_len: int, precision: str) -> int:
    """Bytes that autograd keeps for one token in one block, assuming fused kernels for norms and dropout. CPUs have no
    such kernels for RMSNorm and for attention's dropout, and keep more.
    """
    attn, d = model.attn, model.d_model
    low = 2 if precision in LOW else 4
    cast = low < 4  # the fp32 output of a norm is kept a second time, as its low-precision copy
    normed = NORMS[model.norm.kind] is not None

    def branch(switches: AttentionConfig | MlpConfig) -> int:
        """The residual stream before the branch, the input of its first linear layer, its outer norms and its scale."""
        kept = 4 * d * (switches.pre_norm + switches.out_norm + switches.post_norm) * normed + low * d
        scaled = 4 if switches.out_norm and normed else low
        return kept + (scaled * d if model.layer_scale is not None else 0)

    clips = (attn.clip_low, attn.clip_high) != (0.0, 1.0)
    explicit = attn.soft_cap is not None or clips  # not SDPA: the matrix of scores is kept
    scores = model.n_head * seq_len * explicit
    qk_norm, v_norm = (normed and where != "none" for where in (attn.qk_norm, attn.v_norm))
    # Under autocast a norm's input is kept in fp32; if Q, K and V are all normed, the projection's output is freed.
    attention = 3 * d * low * (not (cast and qk_norm and v_norm)) + 2 * d * low
    if qk_norm or rotated(model) or (explicit and cast):
        attention += 2 * d * (4 if explicit else low)
    attention += 8 * d * (cast and qk_norm) + (low + 4 * cast) * d * v_norm
    attention += scores * (4 + 4 * (attn.soft_cap is not None) + 4 * clips + 2 * cast)
    attention += 4 * model.n_head * (not explicit)
    hidden = low * ACTIVATIONS[model.mlp.activation].kept * linears(model)["fc2"][0]
    dropout = (2 * d + scores) * bool(model.dropout)
    return branch(attn) + branch(model.mlp) + attention + hidden + dropout


def switches(model: ModelConfig) -> dict[str, Any]:
    """The model's switches that differ from their defaults: key → value."""
    defaults, given = Config(), Config(model=model)
    sizes = ("model.n_layer", "model.n_head", "model.d_model", "model.vocab_size")
    paths = [k.path for k in keys() if k.path.startswith("model.") and k.path not in sizes]
    return {p: value_of(given, p) for p in paths if value_of(given, p) != value_of(defaults, p)}


def describe(config: Config) -> dict[str, Any]:
    """Everything that `stabrun model` reports, as plain data."""
    model = config.model
    return {
        "variant": config.variant,
        "shape": {
            "n_layer": model.n_layer,
            "n_head": model.n_head,
            "d_model": model.d_model,
            "head_dim": model.d_model // model.n_head,
            "rotated": rotated(model),
            "vocab_size": model.vocab_size,
            "seq_len": config.data.seq_len,
        },
        "parameters": parameters(model, config.data.seq_len),
        "flops_per_token": flops_per_token(model, config.data.seq_len),
        "memory": memory(config),
        "switches": switches(model),
    }


def report(facts: dict[str, Any], config: Config) -> str:
    """The description as text."""
    shape, count, bytes_ = facts["shape"], facts["parameters"], facts["memory"]
    sequences = micro_batch(config)
    lines = [
        f"{facts['variant']}: {count['total'] / 1e6:,.2f}M parameters, {shape['n_layer']} layers × "
        f"{shape['d_model']}, {shape['n_head']} heads of {shape['head_dim']}, context {shape['seq_len']}",
        "",
        "parameters",
        *(f"  {name:<18}{value:>15,}" for name, value in count.items() if value),
        "",
        f"FLOPs per token (training)  {facts['flops_per_token']:,}",
        "",
        f"memory of a step of {sequences} sequences in {config.train.precision} (estimate)",
        *(f"  {name.removesuffix('_bytes'):<18}{human(value):>15}" for name, value in bytes_.items()),
        "",
        "switches",
        *(f"  {path} = {value}" for path, value in facts["switches"].items()),
    ]
    return "\n".join(lines if facts["switches"] else [*lines, "  none: all at their defaults"])


def human(count: float) -> str:
    """Bytes in B, KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
