"""`stabrun model +check=init`: one forward and backward pass at the initial weights."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from stabrun.config import Config, ObserveConfig
from stabrun.model.gpt import GPT
from stabrun.observe.initial import findings, variances
from stabrun.observe.norms import tensor_norms
from stabrun.observe.probe import Probe
from stabrun.observe.sites import model_sites
from stabrun.training.objective import cross_entropy
from stabrun.training.precision import pick_device

TOKENS = 1024  # at most, so that a model of 830M parameters fits on a laptop


def check_initial(config: Config) -> dict[str, Any]:
    """Forward and backward pass on random tokens: `loss`, `ln_vocab`, `variances` by layer and `findings`.

    Runs in fp32 and without dropout, because it is about the weights only.
    """
    time = min(config.data.seq_len, TOKENS)
    batch = max(1, min(config.train.batch_size, TOKENS // time))
    device = pick_device(config.train)
    model = GPT(config.model, config.data.seq_len, config.seed).to(device).eval()
    sites = model_sites(model)
    probe = Probe(model, ObserveConfig(every=1, slow_every=1), sites, batch, model.cores)
    probe.arm(0)
    model.before_step()
    generator = torch.Generator().manual_seed(config.seed)
    tokens = torch.randint(config.model.vocab_size, (batch, time + 1), generator=generator).to(device)
    loss = cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    loss.backward()
    probe.merge()
    norms = tensor_norms([p.grad for p in model.parameters() if p.grad is not None])
    probe.before_update(norms)
    row = probe.snapshot(loss.detach(), torch.linalg.vector_norm(norms)).read()
    layers = [(name.rpartition(".")[2], layer) for name, layer in model.blocks[0].named_modules()]
    widths = {site: (layer.in_features, layer.out_features) for site, layer in layers if isinstance(layer, nn.Linear)}
    return {
        "loss": row["train/loss"],
        "ln_vocab": math.log(config.model.vocab_size),
        "variances": variances(row, widths, batch * time),
        "findings": findings(row, config.model.vocab_size),
    }


def check_lines(facts: dict[str, Any]) -> Iterator[str]:
    """The check as text: a table with one row per layer, and the findings."""
    columns = facts["variances"]
    yield f"first loss {facts['loss']:.3f}, ln(vocab) {facts['ln_vocab']:.3f}; variance by layer:"
    yield "  layer" + "".join(f"{name:>14}" for name in columns)
    for layer, values in enumerate(zip(*columns.values(), strict=True)):
        yield f"  {layer:>5}" + "".join(f"{value:>14.2e}" for value in values)
    yield from facts["findings"] or ["No problems found."]
