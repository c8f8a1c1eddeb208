"""The model written out from the formulas of the paper and the switches, sharing no code with `stabrun.model`.

Elementary operations only (products, exp, sums, roots), one loop per head: slow, and written to be read. `logits` runs
in the precision of the tensors it is given.
"""

import math
from dataclasses import replace
from functools import cache

import torch
from helpers import configured

from stabrun.config import rotated

SIZE = ("model.n_layer=2", "model.n_head=2", "model.d_model=16", "model.vocab_size=40", "data.seq_len=10")


@cache
def small(variant, *words):
    """The checked configuration of `variant` at a small size, after the overrides in `words`."""
    return configured(f"+variant={variant}", *SIZE, *words)


def logits(tensors, config, tokens):
    """Name → tensor of a model's parameters and buffers, its ModelConfig, tokens `[B, T]` → logits `[B, T, vocab]`."""
    embed = tensors["embed.weight"]
    x = embed[tokens]
    if config.embedding == "norm":
        x = norm(tensors, config, "embed_norm", x)
    elif config.embedding == "scaled":
        x = math.sqrt(config.d_model) * x
    if config.position.kind == "learned":
        x = x + tensors["position.weight"][: tokens.shape[1]]
    post_ln = math.floor(config.post_ln_share * config.n_layer)
    for layer in range(config.n_layer):
        for part, body in (("attn", attention), ("mlp", feed_forward)):
            at, switches = f"blocks.{layer}.{part}.", getattr(config, part)
            if layer < post_ln:
                switches = replace(switches, pre_norm=False, post_norm=True)
            branch = x
            if switches.pre_norm and config.norm.doubled:
                branch = norm(tensors, config, at + "pre_norm.1", norm(tensors, config, at + "pre_norm.0", x))
            elif switches.pre_norm:
                branch = norm(tensors, config, at + "pre_norm", x)
            if switches.pre_norm and config.norm.depth_scaled and config.norm.kind != "none":
                branch = branch / math.sqrt(layer + 1)
            branch = body(tensors, config, at + "layer.", branch)
            branch = norm(tensors, config, at + "out_norm", branch) if switches.out_norm else branch
            if config.layer_scale is not None:
                branch = branch * tensors[at + "scale.weight"]
            x = x + branch if config.residual else branch
            x = norm(tensors, config, at + "post_norm", x) if switches.post_norm else x
    head = embed if config.tied else tensors["head.weight"]
    out = (norm(tensors, config, "norm", x) if config.final_norm else x) @ head.T
    return out if config.final_cap is None else config.final_cap * torch.tanh(out / config.final_cap)


def norm(tensors, config, name, x):
    kind, eps = config.norm.kind, config.norm.eps
    over = tuple(range(x.dim() - 1)) if kind == "batchnorm" else -1
    if kind == "none":
        return x
    if kind == "dyt":
        x = torch.tanh(tensors[name + ".alpha"] * x)
    elif kind in ("layernorm", "layernorm1p", "batchnorm", "rmsnorm", "rmsnorm1p"):
        x = x if kind.startswith("rms") else x - x.mean(over, keepdim=True)
        x = x / torch.sqrt((x * x).mean(over, keepdim=True) + eps)
    else:
        raise AssertionError(f"no formula for norm {kind}")
    if not config.norm.affine:
        return x
    gain = tensors[name + ".weight"]
    x = x * (1 + gain if kind.endswith("1p") else gain)
    return x + tensors[name + ".bias"] if (config.bias if config.norm.bias is None else config.norm.bias) else x


def linear(tensors, config, name, x):
    weight = tensors[name + ".weight"]
    if config.sigma_reparam != "none":
        u, v = tensors[name + ".u"], tensors[name + ".v"]
        sigma = (u[:, None] * weight * v[None, :]).sum()
        weight = tensors[name + ".gamma"] / sigma * weight
    y = x @ weight.T
    return y + tensors[name + ".bias"] if config.bias else y


def attention(tensors, config, at, x):
    width, head = config.d_model, config.d_model // config.n_head
    qkv = linear(tensors, config, at + "qkv", x)
    parts = {"q": qkv[..., :width], "k": qkv[..., width : 2 * width], "v": qkv[..., 2 * width : 3 * width]}
    wheres = {"q": config.attn.qk_norm, "k": config.attn.qk_norm, "v": config.attn.v_norm}

    def normed(part, y):
        """`y` is one part at full width."""
        if wheres[part] == "full":
            return norm(tensors, config, f"{at}{part}_norm.norm", y)
        if wheres[part] == "head":  # each head is one more row of numbers to normalize
            pieces = norm(tensors, config, f"{at}{part}_norm", torch.stack(y.split(head, -1), 2))
            return torch.cat(pieces.unbind(2), -1)
        return y

    def placed(y):
        return torch.cat([turned(config, piece) for piece in y.split(head, -1)], -1)

    if config.position.kind != "rope":
        placed = torch.clone
    if config.attn.norm_after_position:
        q, k = normed("q", placed(parts["q"])), normed("k", placed(parts["k"]))
    else:
        q, k = placed(normed("q", parts["q"])), placed(normed("k", parts["k"]))
    v = normed("v", parts["v"])
    each = zip(q.split(head, -1), k.split(head, -1), v.split(head, -1), strict=True)
    out = torch.cat([attend(config.attn, *head) for head in each], -1)
    if config.attn.gate:
        out = out / (1 + torch.exp(-qkv[..., 3 * width :]))
    return linear(tensors, config, at + "proj", out)


def turned(config, x):
    """RoPE of one head, `[B, T, head]`: channels i and i + n/2 are a complex number, turned by t · base^(−2i/n)."""
    n, base = rotated(config), config.position.rope_base
    columns = list(x.unbind(-1))
    for i in range(n // 2):
        angle = torch.tensor([t * base ** (-2 * i / n) for t in range(x.shape[1])], dtype=x.dtype)
        point = torch.complex(columns[i], columns[i + n // 2]) * torch.exp(1j * angle)
        columns[i], columns[i + n // 2] = point.real, point.imag
    return torch.stack(columns, -1)


def attend(switches, q, k, v):
    """One head, `[B, T, head]` each, one query after the other."""
    rows = []
    for t in range(q.shape[1]):
        scores = (k[:, : t + 1] * q[:, t : t + 1]).sum(-1) / math.sqrt(q.shape[-1])
        scores = switches.soft_temp * scores
        if switches.soft_cap is not None:
            scores = switches.soft_cap * torch.tanh(scores / switches.soft_cap)
        odds = torch.exp(scores - scores.detach().amax(-1, keepdim=True))
        weights = odds / odds.sum(-1, keepdim=True)
        low, high = switches.clip_low, switches.clip_high
        weights = torch.clip((high - low) * weights + low, 0, 1)
        rows.append((weights[..., None] * v[:, : t + 1]).sum(1))
    return torch.stack(rows, 1)


def feed_forward(tensors, config, at, x):
    return linear(
        tensors, config, at + "fc2", activation(config.mlp.activation, linear(tensors, config, at + "fc1", x))
    )


def activation(name, x):
    if name == "gelu":
        return x / 2 * (1 + torch.erf(x / math.sqrt(2)))
    if name == "gelu_tanh":
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "relu2":
        return x**2 * (x > 0)
    half = x.shape[-1] // 2
    gate, up = x[..., :half], x[..., half:]
    if name == "swiglu":
        return gate / 2 * (1 + torch.tanh(gate / 2)) * up  # silu(x) = x / (1 + exp(−x)), without overflow
    if name == "geglu_tanh":
        return activation("gelu_tanh", gate) * up
    if name == "geglu":
        return gate / 2 * (1 + torch.erf(gate / math.sqrt(2))) * up
    raise AssertionError(f"no formula for activation {name}")


def cross_entropy(rows, targets):
    """Mean over tokens, in nats: `[B, T, vocab]`, `[B, T]` → 0-dim."""
    log_z = torch.logsumexp(rows, -1)
    return (log_z - rows.gather(-1, targets[..., None])[..., 0]).mean()
