"""Batches: a pure function of (seed, step), so that a learning rate changes no data and a resume replays none."""

import numpy as np
import torch
from torch import Tensor

from stabrun.data.shards import Tokens


def training_batch(tokens: Tokens, seed: int, step: int, batch_size: int, seq_len: int) -> Tensor:
    """`[batch_size, seq_len + 1]` int64: windows at random places; the last column is a target only."""
    random = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = random.integers(0, len(tokens) - seq_len, size=batch_size)
    return windows(tokens, starts, seq_len)


def validation_batch(tokens: Tokens, count: int, seq_len: int) -> Tensor:
    """`[≤ count, seq_len + 1]` int64: the same evenly spaced windows, which do not overlap, each time."""
    room = (len(tokens) - 1) // seq_len
    starts = np.linspace(0, room - 1, min(count, room)).astype(np.int64) * seq_len
    return windows(tokens, starts, seq_len)


def windows(tokens: Tokens, starts: np.ndarray, seq_len: int) -> Tensor:
    rows = [tokens.read(int(start), seq_len + 1) for start in starts]
    return torch.from_numpy(np.stack(rows).astype(np.int64))
