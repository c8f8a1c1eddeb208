"""Parameters and FLOPs of a configuration in closed form: no torch is imported."""

from collections import Counter

from stabrun.config import ModelConfig
from stabrun.model.switches import NORMS, layers, linears, norm_vectors


def parameters(model: ModelConfig, seq_len: int) -> dict[str, int]:
    """Parameters by part; `total` counts a tied head once."""
    d = model.d_model
    blocks: Counter[str] = Counter()
    for layer in layers(model):
        blocks.update(block_parameters(layer))
    blocks["norms_and_scales"] += norm_parameters(model, [d] * (model.final_norm + (model.embedding == "norm")))
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
    widths = {"head": d // model.n_head, "full": d}
    pre = 1 + model.norm.doubled
    branches = sum(pre * branch.pre_norm + branch.out_norm + branch.post_norm for branch in (attn, mlp))
    normed = [d] * branches + [widths[where] for where in (attn.qk_norm, attn.qk_norm, attn.v_norm) if where != "none"]
    scales = 2 * d if model.layer_scale is not None else 0
    extra = model.sigma_reparam != "none"  # γ
    parts = {site: n_in * n_out + n_out * model.bias + extra for site, (n_in, n_out) in linears(model).items()}
    return parts | {"norms_and_scales": norm_parameters(model, normed) + scales}


def norm_parameters(model: ModelConfig, widths: list[int]) -> int:
    """Gains, and biases and α if there are any, of a norm over each number of channels."""
    kind = NORMS[model.norm.kind]
    return sum(widths) * sum(norm_vectors(model)) + len(widths) * (kind is not None and kind.learned_alpha)


def flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """FLOPs of one training step per token, forward and backward: 6 per weight of the matrix products, head included,
    and 12 · n_layer · d_model · seq_len for attention, ignoring causality (PaLM, arXiv 2204.02311, appendix B).
    """
    weights = sum(n_in * n_out for layer in layers(model) for n_in, n_out in linears(layer).values())
    return 6 * (weights + model.d_model * model.vocab_size) + 12 * model.n_layer * model.d_model * seq_len
