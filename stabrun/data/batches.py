"""Batches as a pure function of (seed, step): independent of the learning rate, and of whether a run was resumed."""

import numpy as np
import torch
from torch import Tensor

from stabrun.data.shards import Tokens


def training_batch(tokens: Tokens, seed: int, step: int, batch_size: int, seq_len: int) -> Tensor:
    """Windows at random positions, `[batch_size, seq_len + 1]` int64. The last column is used as a target only."""
    return windows(tokens, starts(tokens, seed, step, batch_size, seq_len), seq_len)


def starts(tokens: Tokens, seed: int, step: int, batch_size: int, seq_len: int) -> np.ndarray:
    """Start of each sequence of `training_batch` in the training split, `[batch_size]` int64."""
    random = np.random.Generator(np.random.Philox(key=[seed, step]))
    return random.integers(0, len(tokens) - seq_len, size=batch_size)


def validation_batch(tokens: Tokens, count: int, seq_len: int) -> Tensor:
    """Evenly spaced windows that do not overlap, always the same, `[≤ count, seq_len + 1]` int64."""
    room = (len(tokens) - 1) // seq_len
    places = np.linspace(0, room - 1, min(count, room)).astype(np.int64) * seq_len
    return windows(tokens, places, seq_len)


def windows(tokens: Tokens, places: np.ndarray, seq_len: int) -> Tensor:
    rows = [tokens.read(int(place), seq_len + 1) for place in places]
    return torch.from_numpy(np.stack(rows).astype(np.int64))
