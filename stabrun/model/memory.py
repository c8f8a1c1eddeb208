"""Memory of a training step in closed form, and the settings that fit a device: no torch, nothing is allocated."""

import shutil
from dataclasses import replace

from stabrun.config import AttentionConfig, Config, MlpConfig, ModelConfig, micro_batch, rotated
from stabrun.model.counts import parameters
from stabrun.model.switches import (
    ACTIVATIONS,
    EXPLICIT,
    NORMS,
    QUERIES,
    SAMPLED,
    attention_path,
    clips,
    divisors,
    layers,
    linears,
    scores_at_once,
    sequence_parts,
)

CPU, CUDA = "cpu", "cuda"
LOW = {"bf16": "bfloat16", "fp16": "float16"}  # precisions of two bytes → torch's names for them


def device_type(config: Config, gpu: str | None = None) -> str:
    """`cpu`, `cuda` or `mps`: where a run trains, by `train.device`; with `auto` on `gpu`, or as on this machine.

    Determined without torch, whose import takes seconds.
    """
    if config.train.device != "auto":
        return config.train.device
    return CUDA if gpu or any(map(shutil.which, ("nvidia-smi", "rocm-smi"))) else CPU


def memory(config: Config, device: str | None = None) -> dict[str, int]:
    """Bytes of a training step on one device, by default the one that the run would use.

    fp32 weights, gradients and moments, the activations of a micro-batch that autograd keeps, and the logits of a part
    of the sequence with their gradients. `peak_bytes` is the largest of four moments: the logits of the last block's
    attention, where they are measured, the loss, the backward pass of a block and the optimizer's step. This is an
    estimate: kernel workspaces, the allocator's overhead and what torch.compile saves are not counted.
    """
    model, seq_len, train = config.model, config.data.seq_len, config.train
    device = device or device_type(config)
    cost = BlockMemory(config, device)
    count, sequences = parameters(model, seq_len)["total"], micro_batch(config)
    tokens, parts = sequences * seq_len, sequence_parts(model.vocab_size, sequences, seq_len)
    head = model.vocab_size * model.d_model
    low = 2 * (train.precision in LOW)  # bytes of a weight that autocast converts, kept for the backward pass
    matrices = [sum(n_in * n_out for n_in, n_out in linears(layer).values()) for layer in layers(model)]
    blocks = [tokens * cost.kept(layer) + low * size for layer, size in zip(layers(model), matrices, strict=True)]
    stream = 4 * tokens * model.d_model  # of the residual stream
    again = train.recompute == "blocks"
    kept = len(blocks) * stream if again else sum(blocks)
    outside = stream * (2 + (parts > 1)) + tokens * model.d_model * cost.mask
    gradients = 4 * (count if sequences * train.ranks < train.batch_size else head * (parts > 1))
    logits = 4 * tokens // parts * model.vocab_size
    loss = logits * (3 + 2 * (config.optim.z_loss > 0) + (model.final_cap is not None)) + low * head
    backward = tokens * cost.gradients() + max(blocks) * again
    slow = bool(config.observe.every and config.observe.slow_every)
    clips_qk = config.optim.qk_clip is not None
    half = tokens * cost.attention_branch(layers(model)[-1])  # the last block has no feed-forward activations yet
    measured = max(cost.scores(min(sequences, SAMPLED), 3) * slow, cost.scores(sequences, 1) * clips_qk)
    scores = (measured + half - blocks[-1] * (not again)) * (measured > 0)
    before_update = 4 * (sum(matrices) + head) * slow  # a copy of the weights, for the norm of the update
    moments, temporary = optimizer_memory(config, count)
    steady = 4 * count + moments + gradients + kept + outside
    return {
        "peak_bytes": max(steady + max(loss, backward, scores), 8 * count + moments + before_update + temporary),
        "weights_bytes": 4 * count,
        "gradients_bytes": 4 * count,
        "optimizer_bytes": moments,
        "activations_bytes": kept + outside,
        "logits_bytes": loss,
    }


def optimizer_memory(config: Config, count: int) -> tuple[int, int]:
    """Bytes of the moments of `count` parameters, and of temporary tensors of the optimizer's step."""
    model, optim, train = config.model, config.optim, config.train
    shapes = [shape for layer in layers(model) for shape in linears(layer).values()]
    if optim.kind == "muon":  # one moment; the iteration in bf16 of one matrix at a time, see torch.optim.Muon
        inside = sum(n_in * n_out for n_in, n_out in shapes)
        iteration = max(8 * n_in * n_out + 4 * min(n_in, n_out) ** 2 for n_in, n_out in shapes)
        copies = 8 * inside * (train.precision == "fp16" or train.recovery == "skip")
        return 8 * count - 4 * inside, iteration + copies
    if optim.kind == "stable_adamw":  # g² and v̂ of one tensor at a time
        return 8 * count, 8 * max(model.vocab_size * model.d_model, *(n_in * n_out for n_in, n_out in shapes))
    return 8 * count, 0


def fitting(config: Config, device: str, free: int) -> list[str]:
    """The overrides that fit `free` bytes: the largest micro-batch, with recomputation if necessary; or none."""
    train = config.train
    sizes = [size for size in divisors(train.batch_size // train.ranks) if size <= micro_batch(config)]
    for recompute in dict.fromkeys([train.recompute, "blocks"]):
        for size in reversed(sizes):
            smaller = replace(config, train=replace(train, micro_batch_size=size, recompute=recompute))
            if memory(smaller, device)["peak_bytes"] <= free:
                return [f"train.micro_batch_size={size}", *["train.recompute=blocks"] * (recompute != train.recompute)]
    return []


class BlockMemory:
    """Bytes that autograd keeps for one token in one block.

    Kernels are assumed to be fused: those of CUDA all are; on the CPU RMSNorm is several operations, and dropout inside
    attention is computed on the whole matrix of weights.
    """

    def __init__(self, config: Config, device: str) -> None:
        self.model, self.seq_len, self.cpu = config.model, config.data.seq_len, device == "cpu"
        self.low = 2 if config.train.precision in LOW else 4
        self.cast = self.low < 4  # the fp32 output of a norm is kept a second time, as its low-precision copy
        norm = NORMS[self.model.norm.kind]
        unfused = self.cpu and self.model.norm.affine and norm is not None
        self.norm = 4 * (norm.kept + unfused * norm.kept_on_cpu) if norm else 0  # bytes of a channel that a norm keeps
        self.mask = (4 if self.cpu else 1) * bool(self.model.dropout)  # bytes that dropout keeps of a value
        head_dim = self.model.d_model // self.model.n_head
        self.path = attention_path(self.model.attn, head_dim, self.model.dropout, device)

    def kept(self, model: ModelConfig) -> int:
        hidden = self.low * ACTIVATIONS[model.mlp.activation].kept * linears(model)["fc2"][0]
        return self.attention_branch(model) + self.branch(model, model.mlp) + hidden

    def attention_branch(self, model: ModelConfig) -> int:
        return self.branch(model, model.attn) + self.attention(model)

    def branch(self, model: ModelConfig, switches: AttentionConfig | MlpConfig) -> int:
        """The residual stream before the branch, the input of its first linear layer, its outer norms and its scale."""
        d, low, normed = model.d_model, self.low, self.norm > 0
        norms = switches.pre_norm * (1 + model.norm.doubled) + switches.out_norm + switches.post_norm
        kept = self.norm * d * norms + low * d
        wide = 4 if switches.out_norm and normed else low
        scaled = wide * d if model.layer_scale is not None else 0
        return kept + scaled + self.mask * d

    def attention(self, model: ModelConfig) -> int:
        attn, d, low = model.attn, model.d_model, self.low
        explicit, whole = self.path == EXPLICIT, self.seq_len <= QUERIES  # whole: the weights are kept
        qk_norm, v_norm = (self.norm and where != "none" for where in (attn.qk_norm, attn.v_norm))
        # The projection's output is freed where nothing keeps a part of it: norms under autocast keep a copy in fp32,
        # and explicit weights are multiplied by a copy of V.
        freed = (self.cast and qk_norm and v_norm) or (explicit and whole and not qk_norm and not v_norm)
        kept = linears(model)["qkv"][1] * low * (not freed) + d * low * (1 + (whole or not explicit))
        kept += 2 * d * low * attn.gate  # what it multiplies, and its sigmoid
        if qk_norm or rotated(model) or (explicit and whole and self.cast):
            kept += 2 * d * (4 if explicit else low)
        kept += 8 * d * bool(self.cast and qk_norm) + (low + 4 * self.cast) * d * bool(v_norm)
        if self.norm > 4:
            kept += 8 * d * bool(qk_norm) + 4 * d * bool(v_norm)
        if self.cpu and self.mask and not explicit:
            return kept + 12 * model.n_head * self.seq_len + (4 - 3 * low) * d
        return kept + (self.seq_len * self.score() if explicit and whole else 4) * model.n_head

    def score(self) -> int:
        """Of one explicit attention weight."""
        attn, dropped = self.model.attn, bool(self.mask)
        kinds = 1 + (attn.soft_cap is not None) + 2 * clips(attn)
        return 4 * kinds + 2 * self.cast + self.mask + 4 * (dropped and not self.cast)

    def scores(self, sequences: int, copies: int) -> int:
        """Of attention logits outside the attention itself, of which there are so many copies at a time."""
        heads = sequences * self.model.n_head
        queries = min(self.seq_len, max(1, scores_at_once(CPU if self.cpu else CUDA) // (heads * self.seq_len)))
        return copies * 4 * heads * queries * self.seq_len

    def gradients(self) -> int:
        """Of a token while its block is differentiated: at the hidden layer, or at the explicit attention weights."""
        model, low = self.model, self.low
        needed = [ACTIVATIONS[layer.mlp.activation].needed * linears(layer)["fc2"][0] for layer in layers(model)]
        hidden = low * max(needed) + 5 * low * model.d_model // 2
        # Of the queries whose weights are computed again; clipped ones are free once they are differentiated.
        block = (self.score() - 4 * clips(self.model.attn)) * (self.seq_len > QUERIES)
        weights = min(QUERIES, self.seq_len) * model.n_head * (block + 8)
        return max(hidden, weights * (self.path == EXPLICIT))
