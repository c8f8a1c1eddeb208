"""One update: batch, gradients, clipping, AdamW."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stabrun.config import Config
from stabrun.data.batches import training_batch, validation_batch
from stabrun.data.shards import Prepared
from stabrun.model.gpt import GPT
from stabrun.observe.probe import Probe, Snapshot
from stabrun.train.optimizer import clip, make_optimizer, set_rate
from stabrun.train.precision import autocast, compiles, pick_device, prepare_backend, refuse_too_large
from stabrun.train.schedule import learning_rate


class Trainer:
    """Model, data, optimizer and probe of one configuration; a pure function of (config, steps done)."""

    def __init__(self, config: Config, data: Prepared) -> None:
        prepare_backend(config.train)
        self.config, self.device, self.data = config, pick_device(config.train), data
        refuse_too_large(config, self.device)
        self.model = GPT(config.model, config.data.seq_len, config.seed).to(self.device)
        self.parameters = list(self.model.parameters())
        self.optimizer = make_optimizer(self.model, config.optim)
        blocks: list[Any] = list(self.model.blocks)
        shape = config.train.micro_batch_size or config.train.batch_size, config.data.seq_len
        self.probe = Probe(self.model, config.observe, shape, blocks, [b.attn.layer.core for b in blocks])
        self.compiled = compiles(config.train, self.device)
        self.forward = torch.compile(self.model) if self.compiled else self.model

    def step(self, step: int) -> Snapshot:
        """Update `step` (from 0), queued on the device; the snapshot holds its loss, gradient norm and statistics."""
        self.probe.arm(step)
        self.model.before_step()
        if self.config.model.dropout:
            torch.manual_seed((self.config.seed << 32) + step)
        loss = self.backward(step)
        norm, norms = clip([p.grad for p in self.parameters if p.grad is not None], self.config.optim.clip)
        self.probe.before_update(norms)
        set_rate(self.optimizer, learning_rate(self.config, step))
        self.optimizer.step()
        self.probe.after_update(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        return self.probe.snapshot(loss, norm)

    def backward(self, step: int) -> Tensor:
        """The gradient of the batch's mean loss, summed over micro-batches; returns that loss, 0-dim, in nats."""
        config = self.config
        batch = training_batch(self.data.train, config.seed, step, config.train.batch_size, config.data.seq_len)
        parts = self.split(batch)
        total = torch.zeros((), device=self.device)
        for index, part in enumerate(parts):
            loss = self.loss(part) / len(parts)
            loss.backward()
            total += loss.detach()
            self.probe.merge(index, len(parts))
        return total

    def split(self, batch: Tensor) -> tuple[Tensor, ...]:
        """The batch in micro-batches."""
        return batch.split(self.config.train.micro_batch_size or self.config.train.batch_size)

    def loss(self, batch: Tensor) -> Tensor:
        """Mean cross-entropy of `[B, T + 1]` tokens, each predicted from those before it; 0-dim, in nats."""
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        batch = batch.to(self.device, non_blocking=True)
        with autocast(self.config.train, self.device):
            logits = self.forward(batch[:, :-1])
            return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    @torch.no_grad()
    def validate(self) -> float:
        """Mean cross-entropy over the validation sequences, in nats."""
        self.probe.rest()
        self.model.eval()
        batch = validation_batch(self.data.val, self.config.train.val_sequences, self.config.data.seq_len)
        total = sum(float(self.loss(part)) * len(part) for part in self.split(batch))
        self.model.train()
        return total / len(batch)
