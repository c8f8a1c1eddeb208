"""A decoder-only GPT made of independent switches."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stabrun.config import ModelConfig
from stabrun.model.attention import AttentionCore
from stabrun.model.block import Block
from stabrun.model.init import initialize
from stabrun.model.linear import SigmaLinear
from stabrun.model.norm import make_norm, wide
from stabrun.model.switches import layers


class GPT(nn.Module):
    """Token ids `[B, T]` → fp32 logits `[B, T, vocab_size]`, T at most `seq_len`.

    Under autocast the linear layers run in the lower precision; the residual stream, norms, softmax and logits
    stay in fp32. The initial weights depend on (config, seed) only, not on the device.
    """

    def __init__(self, config: ModelConfig, seq_len: int, seed: int = 0) -> None:
        super().__init__()
        learned = config.position.kind == "learned"
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.embed_norm = make_norm(config, config.d_model, present=config.embedding == "norm")
        self.embed_scale = config.d_model**0.5 if config.embedding == "scaled" else None
        self.position = nn.Embedding(seq_len, config.d_model) if learned else None
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(layer, seq_len, number) for number, layer in enumerate(layers(config), 1))
        self.norm = make_norm(config, config.d_model, config.final_norm)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.final_cap = config.final_cap
        self.recompute = False
        self.run = run
        self.dropout_rate = config.dropout
        self.cores = [m for m in self.modules() if isinstance(m, AttentionCore)]
        self.sigma_layers = [m for m in self.modules() if isinstance(m, SigmaLinear)]
        if not self.embed.weight.is_meta:
            initialize(self, config, seed)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(self.hidden(tokens))

    def hidden(self, tokens: Tensor) -> Tensor:
        """The input of the output layer: `[B, T]` → `[B, T, d_model]`."""
        x = self.embed_norm(self.embed(tokens))
        if self.embed_scale is not None:
            x = x * self.embed_scale
        if self.position is not None:
            x = x + self.position.weight[: tokens.shape[1]]
        x = self.dropout(x)
        for core in self.cores:
            core.mask_for(tokens.shape[1], tokens.device)
        for block in self.blocks:
            x = self.recomputed(block, x) if self.recompute else self.run(block, x)
        out: Tensor = self.norm(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """The output layer: `[B, T, d_model]` → `[B, T, vocab_size]`."""
        logits = wide(self.head(hidden))
        return logits if self.final_cap is None else self.final_cap * torch.tanh(logits / self.final_cap)

    def recomputed(self, block: nn.Module, x: Tensor) -> Tensor:
        """A block whose activations are computed again in the backward pass instead of being kept."""
        out: Tensor = checkpoint(self.run, block, x, use_reentrant=False, preserve_rng_state=self.dropout_rate > 0)
        return out

    def matrices(self) -> list[Tensor]:
        """The weights of the linear layers."""
        return [layer.weight for layer in self.modules() if isinstance(layer, nn.Linear)]

    def before_step(self) -> None:
        """Work of each training step outside the forward pass: σReparam's power iteration."""
        for layer in self.sigma_layers:
            layer.iterate()


def run(block: nn.Module, x: Tensor) -> Tensor:
    """A block with its hooks, as a function that can be compiled: `nn.Module.compile` leaves the block's hooks out."""
    out: Tensor = block(x)
    return out


def meta_gpt(config: ModelConfig, seq_len: int) -> GPT:
    """The model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return GPT(config, seq_len)
