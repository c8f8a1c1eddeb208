"""Detection of degenerate batches before the update: constant sequences, repeated batches, invalid tokens."""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np


class Finding(NamedTuple):
    """A problem of a batch: in `sequence` (from 0; None: the whole batch), at token `position` of the split."""

    sequence: int | None
    position: int
    sentence: str
    out_of_range: bool = False


def digest(batch: Any) -> str:
    """Hash of the content of a batch: `[B, T]` integers of numpy or torch, of any width."""
    return hashlib.sha256(_array(batch).astype("<i8").tobytes()).hexdigest()[:32]


def findings(batch: Any, starts: Any, vocab_size: int, earlier: int | None = None) -> Iterator[Finding]:
    """Yield the problems of the batch `[B, T]`, whose sequences begin at tokens `starts` of the split.

    `earlier`: an earlier step with the same batch, if any.
    """
    tokens = _array(batch)
    if earlier is not None:
        yield Finding(None, int(starts[0]), f"the batch is identical to that of step {earlier}")
    for row in np.flatnonzero((tokens == tokens[:, :1]).all(axis=1)):
        sentence = f"sequence {row} is token {tokens[row, 0]} repeated {tokens.shape[1]} times"
        yield Finding(int(row), int(starts[row]), sentence)
    wrong = (tokens < 0) | (tokens >= vocab_size)
    for row in np.flatnonzero(wrong.any(axis=1)):
        column = int(wrong[row].argmax())
        sentence = f"sequence {row} contains token {tokens[row, column]}, but the vocabulary has {vocab_size} tokens"
        yield Finding(int(row), int(starts[row]) + column, sentence, out_of_range=True)


def _array(batch: Any) -> np.ndarray:
    """A numpy view, or a copy if the batch is on a device."""
    return np.asarray(batch.cpu() if hasattr(batch, "cpu") else batch)
