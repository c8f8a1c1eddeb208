"""The loss of a checkpoint on the run's validation split, or on any other text."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from stabrun.composition import override
from stabrun.config import Config, DataConfig, UserError, micro_batch
from stabrun.data import corpus
from stabrun.data.batches import validation_batch
from stabrun.data.shards import prepare, unescaped
from stabrun.data.tokenizer import Tokenizer
from stabrun.model.gpt import GPT
from stabrun.model.switches import sequence_parts
from stabrun.record.run_dir import RunDir
from stabrun.training.objective import Objective

OF_THE_MODEL = ("data.seq_len", "data.tokenizer", "data.tokenizer_revision", "data.bpe_size")


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy in nats per token, and the tokens predicted."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def evaluate(model: GPT, windows: Iterable[Tensor]) -> Evaluation:
    """Mean loss over windows `[B, T + 1]` of tokens, each predicted from those before it in its window."""
    total, tokens = 0.0, 0
    for window in windows:
        sequences, length = window.shape[0], window.shape[1] - 1
        parts = sequence_parts(model.head.out_features, sequences, length)
        total += float(Objective(model, 0.0, parts).mean(window)[0]) * sequences * length
        tokens += sequences * length
    if not tokens:
        raise UserError("eval: the text must contain at least two tokens.")
    return Evaluation(total / tokens, tokens)


def validation_windows(config: Config, run: RunDir) -> tuple[Tensor, ...]:
    """The sequences of `val/loss`. Raises UserError if the data have changed since the run."""
    data = prepare(config.data, config.model)
    run.refuse_other_data(data.manifest["hash"])
    batch = validation_batch(data.val, config.train.val_sequences, config.data.seq_len)
    return batch.split(micro_batch(config))


def text_windows(config: Config, overrides: Sequence[str], tokenizer: Tokenizer) -> Iterator[Tensor]:
    """All of the text that the overrides name: windows of `data.seq_len` tokens in batches, and a shorter last one."""
    data, length = other_data(config, overrides), config.data.seq_len
    separator = [tokenizer.encode(unescaped(data.separator))] if data.separator else []
    tokens = np.empty(0, np.int64)
    for block in corpus.blocks(data, corpus.revision(data)):
        tokens = np.concatenate([tokens, tokenizer.encode(block.text), *(separator if block.last else [])])
        if len(tokens) > length:
            windows = sliding_window_view(tokens, length + 1)[::length]  # a last token begins the next window
            yield from torch.from_numpy(windows.astype(np.int64)).split(config.train.batch_size)
            tokens = tokens[len(windows) * length :]
    if len(tokens) > 1:
        yield torch.from_numpy(tokens.astype(np.int64))[None]


def other_data(config: Config, overrides: Sequence[str]) -> DataConfig:
    """The run's data configuration with other text. `data=NAME` starts from the defaults of that source."""
    words = [f"data.name={word[5:]}" if word.startswith("data=") else word for word in overrides]
    for word in words:
        key = word.partition("=")[0]
        if not key.startswith("data.") or key in OF_THE_MODEL:
            raise UserError(f"{word}: only keys of data that select the text are allowed, such as data.path=FILE.")
    if any(word.startswith("data.name=") for word in words):
        own = config.data
        config = replace(config, data=DataConfig(seq_len=own.seq_len, tokenizer=own.tokenizer, separator=own.separator))
    return override(config, words).data
