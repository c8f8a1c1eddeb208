"""Parameters, FLOPs and memory of a configuration in closed form; no torch, nothing is allocated."""

from typing import Any

from stabrun.config import Config, ModelConfig, keys, rotated, value_of

LOW = {"bf16": "bfloat16", "fp16": "float16"}  # precisions of two bytes → torch's names for them


def norm_parameters(model: ModelConfig, width: int, present: bool = True) -> int:
    """Gain, and bias where there is one."""
    learns = present and model.norm.kind != "none" and model.norm.affine
    return width * (1 + model.bias) if learns else 0


def parameters(model: ModelConfig, seq_len: int) -> dict[str, int]:
    """Parameters by part; `total` counts a tied head once."""
    d, width = model.d_model, model.mlp.width or 4 * model.d_model
    fan_out = width * (2 if model.mlp.activation == "swiglu" else 1)
    head = d // model.n_head
    by_head = {"none": 0, "head": head, "full": d}

    def linear(n_in: int, n_out: int) -> int:
        return n_in * n_out + n_out * model.bias + (model.sigma_reparam != "none")

    attn, mlp = model.attn, model.mlp
    around = sum(
        norm_parameters(model, d, present)
        for branch in (attn, mlp)
        for present in (branch.pre_norm, branch.out_norm, branch.post_norm)
    )
    inside = 2 * norm_parameters(model, by_head[attn.qk_norm]) + norm_parameters(model, by_head[attn.v_norm])
    scales = 2 * d if model.layer_scale is not None else 0
    layers = model.n_layer
    parts = {
        "embedding": model.vocab_size * d,
        "position": seq_len * d if model.position.kind == "learned" else 0,
        "qkv": layers * linear(d, 3 * d),
        "proj": layers * linear(d, d),
        "fc1": layers * linear(d, fan_out),
        "fc2": layers * linear(width, d),
        "norms_and_scales": layers * (around + inside + scales)
        + norm_parameters(model, d) * (1 + (model.embedding == "norm")),
        "head": 0 if model.tied else model.vocab_size * d,
    }
    return {"total": sum(parts.values()), **parts}


def flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """FLOPs of one training step a token, forward and backward: 6 a weight of the matrix products, head included, and
    12 · n_layer · d_model · seq_len for attention, causality not reckoned with (PaLM, arXiv 2204.02311, appendix B).
    """
    d, width = model.d_model, model.mlp.width or 4 * model.d_model
    fan_out = width * (2 if model.mlp.activation == "swiglu" else 1)
    block = 4 * d * d + d * fan_out + width * d
    return 6 * (model.n_layer * block + d * model.vocab_size) + 12 * model.n_layer * d * seq_len


def memory(config: Config) -> dict[str, int]:
    """Bytes of a training step on one device: fp32 weights, gradients and Adam's moments, and a micro-batch's
    activations as autograd keeps them. `peak_bytes` is the larger of two moments: the start of the backward pass and
    the optimizer's step. An estimate: kernels' workspaces and the allocator's slack are left out.
    """
    model, seq_len, train = config.model, config.data.seq_len, config.train
    count = parameters(model, seq_len)["total"]
    sequences = train.micro_batch_size or train.batch_size
    tokens = sequences * seq_len
    logits = 4 * tokens * model.vocab_size
    activations = tokens * model.n_layer * activation_bytes(config)
    low_copies = 2 * count if train.precision in LOW else 0  # autocast's cast weights, kept for the backward
    steady = {
        "weights_bytes": 4 * count,
        "gradients_bytes": 4 * count,
        "optimizer_bytes": 8 * count,
        "activations_bytes": activations + low_copies,
        "logits_bytes": 3 * logits,
    }
    backward = 12 * count + steady["activations_bytes"] + steady["logits_bytes"]
    return {"peak_bytes": max(backward, 16 * count + logits), **steady}


def activation_bytes(config: Config) -> int:
    """Bytes that autograd keeps for one token in one block, with fused kernels for norms and dropout (CPUs lack
    those of RMSNorm and of attention's dropout, and keep more).
    """
    model, seq_len = config.model, config.data.seq_len
    attn, mlp, d = model.attn, model.mlp, model.d_model
    low = 2 if config.train.precision in LOW else 4
    cast = 0 if low == 4 else 1  # an fp32 norm's output is kept once more as its bf16 copy
    width = mlp.width or 4 * d
    normed = model.norm.kind != "none"

    def around(branch: Any) -> int:
        """The residual stream before the branch, its norm's output as the linear layer's input, and out-norms."""
        pre = 4 * d * (branch.pre_norm and normed) + low * d
        return pre + 4 * d * (branch.out_norm + branch.post_norm) * normed

    branches = sum(4 if branch.out_norm and normed else low for branch in (attn, mlp))
    scales = d * branches if model.layer_scale is not None else 0
    rope = model.position.kind == "rope"
    qk = (attn.qk_norm != "none") * normed
    plain = attn.soft_cap is not None or (attn.clip_low, attn.clip_high) != (0.0, 1.0)
    keys_and_queries = 2 * d * (4 if plain else low) if qk or rope or (plain and cast) else 0
    scores = model.n_head * seq_len
    saved_scores = 0
    if plain:
        saved_scores = 4 + (4 if attn.soft_cap is not None else 0)
        saved_scores += 4 if (attn.clip_low, attn.clip_high) != (0.0, 1.0) else 0
        saved_scores += 2 * cast
        saved_scores *= scores
    v_norm = (attn.v_norm != "none") * normed
    # Norms of bf16 keep their inputs in fp32; where all three are normed, the projection itself is let go.
    heart = 3 * d * low * (not (cast and qk and v_norm)) + keys_and_queries
    heart += 8 * d * (cast and qk) + (low + 4 * cast) * d * v_norm
    heart += 2 * d * low + (4 * model.n_head if not plain else 0) + saved_scores
    hidden = {"relu2": 2, "gelu": 2, "gelu_tanh": 2, "swiglu": 4}[mlp.activation] * width * low
    dropout = (2 * d + scores * plain) * (1 if model.dropout else 0)
    return around(attn) + around(mlp) + scales + heart + hidden + dropout


def switches(model: ModelConfig) -> dict[str, Any]:
    """The model's switches that are not at rest: key → value."""
    rest, set_to = Config(), Config(model=model)
    sizes = ("model.n_layer", "model.n_head", "model.d_model", "model.vocab_size")
    paths = [k.path for k in keys() if k.path.startswith("model.") and k.path not in sizes]
    return {p: value_of(set_to, p) for p in paths if value_of(set_to, p) != value_of(rest, p)}


def describe(config: Config) -> dict[str, Any]:
    """All that `stabrun model` tells, as plain data."""
    model = config.model
    return {
        "variant": config.variant,
        "shape": {
            "n_layer": model.n_layer,
            "n_head": model.n_head,
            "d_model": model.d_model,
            "head_dim": model.d_model // model.n_head,
            "rotated": rotated(model) if model.position.kind == "rope" else 0,
            "vocab_size": model.vocab_size,
            "seq_len": config.data.seq_len,
        },
        "parameters": parameters(model, config.data.seq_len),
        "flops_per_token": flops_per_token(model, config.data.seq_len),
        "memory": memory(config),
        "switches": switches(model),
    }


def report(facts: dict[str, Any], config: Config) -> str:
    """The description in lines for a reader."""
    shape, count, bytes_ = facts["shape"], facts["parameters"], facts["memory"]
    sequences = config.train.micro_batch_size or config.train.batch_size
    lines = [
        f"{facts['variant']}: {count['total'] / 1e6:,.2f}M parameters, {shape['n_layer']} layers × "
        f"{shape['d_model']}, {shape['n_head']} heads of {shape['head_dim']}, context {shape['seq_len']}",
        "",
        "parameters",
        *(f"  {name:<18}{value:>15,}" for name, value in count.items() if value),
        "",
        f"FLOPs a token (training)  {facts['flops_per_token']:,}",
        "",
        f"memory of a step of {sequences} sequences in {config.train.precision} (estimate)",
        *(f"  {name.removesuffix('_bytes'):<18}{human(value):>15}" for name, value in bytes_.items()),
        "",
        "switches",
        *(f"  {path} = {value}" for path, value in facts["switches"].items()),
    ]
    return "\n".join(lines if facts["switches"] else [*lines, "  none: all at rest"])


def human(count: float) -> str:
    """Bytes in the unit that reads best."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
