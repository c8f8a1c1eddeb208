"""One update: batch, gradients, clipping, Adam."""

from typing import Any

import torch
from torch import Tensor, nn

from stabrun.config import Config, UserError, micro_batch
from stabrun.data.batches import starts, validation_batch, windows
from stabrun.data.degenerate import Finding, digest, findings
from stabrun.data.shards import Prepared
from stabrun.model.gpt import GPT
from stabrun.observe.norms import tensor_norms
from stabrun.observe.probe import PendingRow, Probe
from stabrun.training.objective import cross_entropy, z_loss
from stabrun.training.optimizer import clip_by_norm, clip_by_value, make_optimizer, set_rate
from stabrun.training.precision import autocast, compiles, pick_device, prepare_backend, refuse_too_large
from stabrun.training.ranks import Ranks
from stabrun.training.scaling import LossScale
from stabrun.training.schedule import learning_rate


class Trainer:
    """Model, data, optimizer and probe of one configuration; its state depends on (config, steps done) only."""

    def __init__(self, config: Config, data: Prepared, ranks: Ranks | None = None) -> None:
        prepare_backend(config.train)
        self.ranks = ranks or Ranks()
        self.config, self.device, self.data = config, pick_device(config.train, self.ranks.place), data
        refuse_too_large(config, self.device)
        self.model = GPT(config.model, config.data.seq_len, config.seed).to(self.device)
        self.parameters = list(self.model.parameters())
        self.matrices = [layer.weight for layer in self.model.modules() if isinstance(layer, nn.Linear)]
        self.optimizer = make_optimizer(self.model, config.optim)
        self.scaling = LossScale(config.train, self.device)
        clipped = ("grad/clipped",) * (config.optim.clip is not None)
        z_term = ("train/z_loss",) * (config.optim.z_loss > 0)
        scalars = ("train/loss", *z_term, "grad/norm", *clipped, *self.scaling.keys)
        blocks: list[Any] = list(self.model.blocks)
        self.micro_batch_size = micro_batch(config)
        shape, gather = (self.micro_batch_size, config.data.seq_len), self.ranks.gather
        cores = [block.attn.layer.core for block in blocks]
        self.probe = Probe(self.model, config.observe, shape, blocks, cores, scalars, gather)
        self.rate = 0.0  # learning rate of the last update
        self.seen: dict[str, int] = {}  # digest of a batch → the step that used it, since this start
        self.findings: list[Finding] = []  # about the last batch
        self.compiled = compiles(config.train, self.device)
        self.forward = torch.compile(self.model) if self.compiled else self.model

    def step(self, step: int) -> PendingRow:
        """Queue update `step` (from 0) on the device; the snapshot holds its losses, gradient norm and statistics."""
        self.probe.arm(step)
        self.model.before_step()
        if self.config.model.dropout:
            torch.manual_seed((self.config.seed << 32) + step)
            if number := self.ranks.place.number:  # a seed of its own, drawn from the step's
                torch.manual_seed(int(torch.randint(1 << 62, (number,))[-1]))
        losses = self.backward(step)
        self.ranks.add(p.grad for p in self.parameters if p.grad is not None)
        scale = self.scaling.unscale(self.optimizer, self.matrices)
        norms = tensor_norms([p.grad for p in self.parameters if p.grad is not None])
        norm = torch.linalg.vector_norm(norms)
        clipped = self.clip(norm)
        self.probe.before_update(norms, scale)
        self.rate = learning_rate(self.config, step)
        set_rate(self.optimizer, self.rate)
        self.scaling.step(self.optimizer)
        self.probe.after_update(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        return self.probe.snapshot(*losses, norm, *clipped, *self.scaling.values())

    def clip(self, norm: Tensor) -> tuple[Tensor, ...]:
        """Clip the gradients as configured; returns the share of them that it changed, if there is a limit."""
        limit = self.config.optim.clip
        if limit is None:
            return ()
        if self.config.optim.clip_by == "value":
            return (clip_by_value(self.parameters, limit),)
        return (clip_by_norm(self.parameters, limit, norm),)

    def backward(self, step: int) -> tuple[Tensor, ...]:
        """Accumulate this rank's share of the gradient of the batch's mean objective, times the loss scale.

        Returns the terms of the objective on this share, 0-dim: the cross-entropy in nats, and the z-loss if it has a
        weight.
        """
        parts = self.ranks.part(self.batch(step)).split(self.micro_batch_size)
        totals = [torch.zeros((), device=self.device)] * (1 + (self.config.optim.z_loss > 0))
        for index, part in enumerate(parts):
            terms = [term / len(parts) for term in self.terms(part)]
            self.scaling.scaled(sum(terms[1:], terms[0]) / self.ranks.count).backward()
            totals = [total + term.detach() for total, term in zip(totals, terms, strict=True)]
            self.probe.merge(index, len(parts))
        return tuple(totals)

    def batch(self, step: int) -> Tensor:
        """The batch of update `step`, `[batch_size, seq_len + 1]` int64; sets `findings`.

        Raises UserError, naming file and position, if a token is not in the vocabulary.
        """
        config, tokens = self.config, self.data.train
        places = starts(tokens, config.seed, step, config.train.batch_size, config.data.seq_len)
        batch = windows(tokens, places, config.data.seq_len)
        first = self.seen.setdefault(digest(batch), step)
        self.findings = list(findings(batch, places, config.model.vocab_size, first if first < step else None))
        if wrong := next((finding for finding in self.findings if finding.out_of_range), None):
            raise UserError(
                f"{self.data.folder}, {tokens.where(wrong.position)}: {wrong.sentence}; delete the directory "
                "to prepare the data again."
            )
        return batch

    def terms(self, batch: Tensor) -> tuple[Tensor, ...]:
        """The terms of the objective on tokens `[B, T + 1]`, each predicted from those before it; 0-dim."""
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
        parts = self.ranks.part(batch).split(self.micro_batch_size)
        total = sum(float(self.terms(part)[0]) * len(part) for part in parts if len(part))
        self.model.train()
        return self.ranks.total(total) / len(batch)
