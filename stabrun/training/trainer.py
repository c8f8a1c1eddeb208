"""One update: batch, gradients, clipping, Adam."""

from typing import Any

import torch
from torch import Tensor, nn

from stabrun.config import Config, UserError
from stabrun.data.batches import starts, validation_batch, windows
from stabrun.data.degenerate import Finding, digest, findings
from stabrun.data.shards import Prepared
from stabrun.model.gpt import GPT
from stabrun.observe.probe import PendingRow, Probe
from stabrun.training.objective import cross_entropy, z_loss
from stabrun.training.optimizer import clip_by_norm, clip_by_value, gradient_norms, make_optimizer, set_rate
from stabrun.training.precision import autocast, compiles, pick_device, prepare_backend, refuse_too_large
from stabrun.training.scaling import LossScale
from stabrun.training.schedule import learning_rate


class Trainer:
    """Model, data, optimizer and probe of one configuration; a pure function of (config, steps done)."""

    def __init__(self, config: Config, data: Prepared) -> None:
        prepare_backend(config.train)
        self.config, self.device, self.data = config, pick_device(config.train), data
        refuse_too_large(config, self.device)
        self.model = GPT(config.model, config.data.seq_len, config.seed).to(self.device)
        self.parameters = list(self.model.parameters())
        self.matrices = [layer.weight for layer in self.model.modules() if isinstance(layer, nn.Linear)]
        self.optimizer = make_optimizer(self.model, config.optim)
        self.scaling = LossScale(config.train, self.device)
        clipped = ("grad/clipped",) * (config.optim.clip is not None)
        beside = ("train/z_loss",) * (config.optim.z_loss > 0)
        scalars = ("train/loss", *beside, "grad/norm", *clipped, *self.scaling.keys)
        blocks: list[Any] = list(self.model.blocks)
        shape = config.train.micro_batch_size or config.train.batch_size, config.data.seq_len
        self.probe = Probe(self.model, config.observe, shape, blocks, [b.attn.layer.core for b in blocks], scalars)
        self.seen: dict[str, int] = {}  # batch's digest → the step that had it, since this start
        self.odd: list[Finding] = []  # about the last batch
        self.compiled = compiles(config.train, self.device)
        self.forward = torch.compile(self.model) if self.compiled else self.model

    def step(self, step: int) -> PendingRow:
        """Update `step` (from 0), queued on the device; the snapshot holds its losses, gradient norm and statistics."""
        self.probe.arm(step)
        self.model.before_step()
        if self.config.model.dropout:
            torch.manual_seed((self.config.seed << 32) + step)
        losses = self.backward(step)
        scale = self.scaling.unscale(self.optimizer, self.matrices)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm, norms = gradient_norms(gradients)
        clipped = self.clip(gradients, norm)
        self.probe.before_update(norms, scale)
        set_rate(self.optimizer, learning_rate(self.config, step))
        self.scaling.step(self.optimizer)
        self.probe.after_update(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        return self.probe.snapshot(*losses, norm, *clipped, *self.scaling.values())

    def clip(self, gradients: list[Tensor], norm: Tensor) -> tuple[Tensor, ...]:
        """Clip as configured; returns the share of the gradient that it changed, where there is a limit."""
        limit = self.config.optim.clip
        if limit is None:
            return ()
        if self.config.optim.clip_by == "value":
            return (clip_by_value(gradients, limit),)
        return (clip_by_norm(gradients, limit, norm),)

    def backward(self, step: int) -> tuple[Tensor, ...]:
        """The gradient of the batch's mean objective, summed over micro-batches, times the loss scale.

        Returns the terms of the objective, 0-dim: the cross-entropy in nats, and the z-loss where it has a weight.
        """
        config = self.config
        parts = self.split(self.batch(step))
        totals = [torch.zeros((), device=self.device)] * (1 + (config.optim.z_loss > 0))
        for index, part in enumerate(parts):
            terms = [term / len(parts) for term in self.terms(part)]
            self.scaling.scaled(sum(terms[1:], terms[0])).backward()
            totals = [total + term.detach() for total, term in zip(totals, terms, strict=True)]
            self.probe.merge(index, len(parts))
        return tuple(totals)

    def batch(self, step: int) -> Tensor:
        """The batch of update `step`, `[batch_size, seq_len + 1]` int64; `odd` says what is odd about it.

        Raises UserError, naming the file and the place, where a token is not of the vocabulary.
        """
        config, tokens = self.config, self.data.train
        places = starts(tokens, config.seed, step, config.train.batch_size, config.data.seq_len)
        batch = windows(tokens, places, config.data.seq_len)
        first = self.seen.setdefault(digest(batch), step)
        self.odd = list(findings(batch, places, config.model.vocab_size, first if first < step else None))
        if wrong := next((found for found in self.odd if found.out_of_range), None):
            raise UserError(
                f"{self.data.folder}, {tokens.where(wrong.position)}: {wrong.sentence}; remove the folder to prepare "
                "the data anew."
            )
        return batch

    def split(self, batch: Tensor) -> tuple[Tensor, ...]:
        """The batch in micro-batches."""
        return batch.split(self.config.train.micro_batch_size or self.config.train.batch_size)

    def terms(self, batch: Tensor) -> tuple[Tensor, ...]:
        """The objective's terms on `[B, T + 1]` tokens, each predicted from those before it; 0-dim."""
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        batch = batch.to(self.device, non_blocking=True)
        with autocast(self.config.train, self.device):
            logits = self.forward(batch[:, :-1])
            loss, weight = cross_entropy(logits, batch[:, 1:]), self.config.optim.z_loss
            return (loss, z_loss(logits, weight)) if weight else (loss,)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean cross-entropy over the validation sequences, in nats."""
        self.probe.rest()
        self.model.eval()
        batch = validation_batch(self.data.val, self.config.train.val_sequences, self.config.data.seq_len)
        total = sum(float(self.terms(part)[0]) * len(part) for part in self.split(batch))
        self.model.train()
        return total / len(batch)
