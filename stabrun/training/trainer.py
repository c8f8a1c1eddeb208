"""One update: batch, gradients, clipping, Adam."""

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stabrun.config import Config, UserError, micro_batch
from stabrun.data.batches import starts, validation_batch, windows
from stabrun.data.degenerate import Finding, digest, findings
from stabrun.data.shards import Prepared
from stabrun.model.gpt import GPT
from stabrun.model.switches import SAMPLED, sequence_parts
from stabrun.observe.norms import tensor_norms
from stabrun.observe.probe import PendingRow, Probe
from stabrun.observe.sites import model_sites
from stabrun.training.clipping import make_clipping
from stabrun.training.compilation import compile_parts, compiles
from stabrun.training.memory import refuse_too_large
from stabrun.training.objective import Objective
from stabrun.training.optimizer import make_optimizer, set_rate
from stabrun.training.outliers import Outliers
from stabrun.training.precision import autocast, pick_device, prepare_backend
from stabrun.training.qk_clip import QKClip
from stabrun.training.ranks import Ranks
from stabrun.training.rewinds import Rewinds
from stabrun.training.scaling import LossScale
from stabrun.training.schedule import learning_rate

REMEMBERED = 10_000  # batches among which a repeated one is found


class Trainer:
    """Model, data, optimizer and probe of one configuration; its state depends on (config, steps done) only."""

    def __init__(self, config: Config, data: Prepared, ranks: Ranks | None = None) -> None:
        prepare_backend(config.train)
        self.ranks = ranks or Ranks()
        self.config, self.device, self.data = config, pick_device(config.train, self.ranks.place), data
        refuse_too_large(config, self.device)
        self.model = GPT(config.model, config.data.seq_len, config.seed).to(self.device)
        self.parameters = list(self.model.parameters())
        self.matrices = self.model.matrices()
        self.optimizer = make_optimizer(self.model, config.optim)
        self.scaling = LossScale(config.train, self.device)
        self.clipping = make_clipping(config.optim, self.parameters)
        z_term = ("train/z_loss",) * (config.optim.z_loss > 0)
        self.outliers = Outliers(config.train, self.device)
        self.qk_clip = None if config.optim.qk_clip is None else QKClip(self.model, config.optim.qk_clip)
        scalars = ("train/loss", *z_term, "grad/norm", *self.clipping.keys, *self.outliers.keys, *self.scaling.keys)
        self.micro_batch_size = micro_batch(config)
        shape = self.micro_batch_size, config.data.seq_len
        parts, sampled = sequence_parts(config.model.vocab_size, *shape), max(1, SAMPLED // self.ranks.count)
        self.probe = Probe(
            self.model, config.observe, model_sites(self.model), self.micro_batch_size, self.model.cores, scalars,
            self.ranks.gather, sampled,
        )  # fmt: skip
        self.rate = 0.0  # learning rate of the last update
        self.rewinds = Rewinds()  # before this step
        self.seen: dict[str, int] = {}  # digest of a batch → the step that used it, of the last REMEMBERED batches
        self.findings: list[Finding] = []  # about the last batch
        self.model.recompute = config.train.recompute == "blocks"
        context = partial(autocast, config.train, self.device)
        self.objective = Objective(self.model, config.optim.z_loss, parts, context)
        self.attention = sorted({core.path(self.device.type) for core in self.model.cores})
        self.compiled = compiles(config.train, self.device)
        if self.compiled:
            compile_parts(self.objective)

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
        skipped = self.outliers.judge(self.mean(losses[0]), norm)
        clipped = self.clipping.clip(norms, norm, skipped)
        self.probe.before_update(norms, scale)
        self.rate = learning_rate(self.config, step) * self.config.train.recovery_lr**self.rewinds.count
        set_rate(self.optimizer, self.rate)
        self.scaling.step(self.optimizer, skipped)
        if self.qk_clip:
            self.qk_clip.step(self.ranks, norm, skipped)
        self.probe.after_update(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        left_out = () if skipped is None else (skipped,)
        return self.probe.snapshot(*losses, norm, *clipped, *left_out, *self.scaling.values())

    def mean(self, loss: Tensor) -> Tensor:
        """The mean over the ranks of a loss, 0-dim, if something asks for it before the row is read."""
        if not self.outliers.active:
            return loss
        total = loss.clone()
        self.ranks.add([total])
        return total / self.ranks.count

    def backward(self, step: int) -> tuple[Tensor, ...]:
        """Accumulate this rank's share of the gradient of the batch's mean objective, times the loss scale.

        Returns the terms of the objective on this share, 0-dim: the cross-entropy in nats, and the z-loss if it has a
        weight.
        """
        parts = self.on_device(self.ranks.part(self.batch(step))).split(self.micro_batch_size)
        totals: tuple[Tensor, ...] = ()
        for index, part in enumerate(parts):
            self.probe.begin(index)
            terms = self.objective.accumulate(part, len(parts), self.scaled)
            totals = tuple(map(torch.add, totals, terms)) if totals else terms
            self.probe.merge()
        return totals

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to differentiate: the ranks' gradients are added up, and fp16 scales them."""
        return self.scaling.scaled(loss / self.ranks.count)

    def batch(self, step: int) -> Tensor:
        """The batch of update `step`, `[batch_size, seq_len + 1]` int64; sets `findings`.

        Raises UserError, naming file and position, if a token is not in the vocabulary.
        """
        config, tokens = self.config, self.data.train
        index = step + self.rewinds.batches
        places = starts(tokens, config.seed, index, config.train.batch_size, config.data.seq_len)
        batch = windows(tokens, places, config.data.seq_len)
        first = self.seen.setdefault(digest(batch), step)
        if len(self.seen) > REMEMBERED:
            del self.seen[next(iter(self.seen))]
        self.findings = list(findings(batch, places, config.model.vocab_size, first if first < step else None))
        if wrong := next((finding for finding in self.findings if finding.out_of_range), None):
            raise UserError(
                f"{self.data.folder}, {tokens.where(wrong.position)}: {wrong.sentence}; delete the directory "
                "to prepare the data again."
            )
        return batch

    def state(self) -> dict[str, Any]:
        """What decides the next steps beside weights, moments and the step: of JSON's types, for a checkpoint."""
        return {
            "scaler": self.scaling.state(),
            "outliers": self.outliers.state(),
            "clipping": self.clipping.state(),
            "rewinds": asdict(self.rewinds),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a `state`; one of an earlier version may lack parts."""
        self.scaling.load(state.get("scaler") or {})
        self.outliers.load(state.get("outliers") or {})
        self.clipping.load(state.get("clipping") or {})
        self.rewinds = Rewinds(**state.get("rewinds") or {})

    def on_device(self, batch: Tensor) -> Tensor:
        """A batch on the device. On CUDA the copy is not waited for; elsewhere that is unsafe: pytorch issue 189690."""
        if self.device.type != "cuda":
            return batch.to(self.device)
        return batch.pin_memory().to(self.device, non_blocking=True)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean cross-entropy over the validation sequences, in nats."""
        self.probe.rest()
        self.model.eval()
        batch = validation_batch(self.data.val, self.config.train.val_sequences, self.config.data.seq_len)
        parts = self.on_device(self.ranks.part(batch)).split(self.micro_batch_size)
        total = sum(float(self.objective.mean(part)[0]) * len(part) for part in parts if len(part))
        self.model.train()
        return self.ranks.total(total) / len(batch)
