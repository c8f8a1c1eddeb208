"""Batches that teach nothing or break: found before the update, as pure functions of what is in them."""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np


class Finding(NamedTuple):
    """What is odd about a batch: `sequence` counts from 0 (None: all of it), `position` is a token of the split."""

    sequence: int | None
    position: int
    sentence: str
    out_of_range: bool = False


def digest(batch: Any) -> str:
    """Names a batch by its content: `[B, T]` integers of numpy or torch, of any width."""
    return hashlib.sha256(_array(batch).astype("<i8").tobytes()).hexdigest()[:32]


def findings(batch: Any, starts: Any, vocab_size: int, earlier: int | None = None) -> Iterator[Finding]:
    """What is odd about the batch `[B, T]`, whose sequences begin at the tokens `starts` of the split.

    `earlier`: the step that had the same batch.
    """
    tokens = _array(batch)
    if earlier is not None:
        yield Finding(None, int(starts[0]), f"the whole batch is the one of step {earlier}")
    for row in np.flatnonzero((tokens == tokens[:, :1]).all(axis=1)):
        sentence = f"sequence {row} is token {tokens[row, 0]} repeated {tokens.shape[1]} times"
        yield Finding(int(row), int(starts[row]), sentence)
    wrong = (tokens < 0) | (tokens >= vocab_size)
    for row in np.flatnonzero(wrong.any(axis=1)):
        column = int(wrong[row].argmax())
        sentence = f"sequence {row} holds token {tokens[row, column]}, and the vocabulary has {vocab_size}"
        yield Finding(int(row), int(starts[row]) + column, sentence, out_of_range=True)


def _array(batch: Any) -> np.ndarray:
    """A numpy view, or a copy of what lies on a device."""
    return np.asarray(batch.cpu() if hasattr(batch, "cpu") else batch)
