"""Text to token numbers: bytes, or a byte-level BPE trained on the training text."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

FILE = "tokenizer.json"


class Tokenizer(Protocol):
    size: int

    def encode(self, text: str) -> np.ndarray: ...

    def save(self, folder: Path) -> None: ...


class Bytes:
    """UTF-8 bytes as tokens."""

    size = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text('{"type": "bytes"}\n')


class Bpe:
    """A byte-level BPE of at most `size` tokens: short texts run out of pairs to merge."""

    def __init__(self, texts: Iterable[str], size: int) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        self.inner = Tokenizer(models.BPE())
        self.inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
        self.inner.train_from_iterator(texts, trainer)
        self.size = self.inner.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self.inner.encode(text).ids, dtype=np.uint32)

    def save(self, folder: Path) -> None:
        self.inner.save(str(folder / FILE))
