"""Token shards on disk, prepared once and memory-mapped afterwards.

A prepared folder holds `train-00000.bin`, `val-00000.bin`, … (raw little-endian integers of the smallest type
that holds the vocabulary), `tokenizer.json` and `manifest.json`. It appears under its name only when whole.
"""

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stabrun.config import DataConfig, MistakeError, ModelConfig
from stabrun.data import corpus
from stabrun.data.tokenizer import Bpe, Bytes, Tokenizer

FORMAT = 1
SHARD_TOKENS = 1 << 28


@dataclass(frozen=True)
class Tokens:
    """A split's tokens: memory-mapped shards, read as one long array."""

    shards: Sequence[np.ndarray]
    starts: np.ndarray  # [shards + 1], the first token of each shard and the total

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from `start` on, `[count]`; they may lie in several shards."""
        parts = []
        while count > 0:
            shard = int(np.searchsorted(self.starts, start, side="right")) - 1
            part = self.shards[shard][start - self.starts[shard] :][:count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


@dataclass(frozen=True)
class Prepared:
    """A tokenized corpus: its two splits and its manifest (`hash`, `vocab_size`, `tokens`, `dtype`, …)."""

    train: Tokens
    val: Tokens
    manifest: dict[str, Any]


def prepare(data: DataConfig, model: ModelConfig) -> Prepared:
    """The shards for this configuration, made now if they are missing; several processes may ask at once.

    Raises MistakeError where the corpus is missing, empty, no text, too short for `data.seq_len`, or its
    tokenizer larger than `model.vocab_size`.
    """
    if data.tokenizer == "bytes" and model.vocab_size < Bytes.size:
        raise _too_small(model, Bytes.size)
    root = Path(data.cache_dir) if data.cache_dir else default_cache()
    folder = root / name(data, model)
    if not folder.exists():
        try:
            root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise MistakeError(f"data.cache_dir={root}: it is not a folder.") from error
        with open(root / f"{folder.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                _write(data, model, folder)
    prepared = _open(folder)
    if prepared.manifest["vocab_size"] > model.vocab_size:
        raise _too_small(model, prepared.manifest["vocab_size"])
    for split, tokens in (("training", prepared.train), ("validation", prepared.val)):
        if len(tokens) <= data.seq_len:
            raise MistakeError(
                f"data.seq_len={data.seq_len}: the {split} split of {data.path or 'the text'} has only "
                f"{len(tokens)} tokens, and needs at least {data.seq_len + 1}."
            )
    return prepared


def default_cache() -> Path:
    """$STABRUN_CACHE, or `stabrun` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("STABRUN_CACHE") or Path(base) / "stabrun")


def name(data: DataConfig, model: ModelConfig) -> str:
    """The folder's name: a hash of all that its content depends on."""
    facts = [FORMAT, corpus.fingerprint(data), data.tokenizer, _bpe_size(data, model), data.val_fraction]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _bpe_size(data: DataConfig, model: ModelConfig) -> int | None:
    return (data.bpe_size or model.vocab_size) if data.tokenizer == "bpe" else None


def _too_small(model: ModelConfig, needed: int) -> MistakeError:
    return MistakeError(
        f"model.vocab_size={model.vocab_size}: the tokenizer has {needed} tokens, so that it must be at least {needed}."
    )


def split_blocks(data: DataConfig) -> Iterator[tuple[str, str]]:
    """("train" or "val", block) for each block of the text: one block in every 1/val_fraction is held out."""
    every = round(1 / data.val_fraction)
    for index, block in enumerate(_at_least(every, corpus.blocks(data))):
        yield ("val" if index % every == every - 1 else "train"), block


def _at_least(count: int, blocks: Iterator[str]) -> Iterator[str]:
    """The blocks; a text of fewer than `count` is cut into `count` even ones, so that some can be held out."""
    first = [block for _, block in zip(range(count), blocks, strict=False)]
    if len(first) == count:
        yield from first
        yield from blocks
        return
    text = "".join(first)
    edges = [len(text) * i // count for i in range(count + 1)]
    yield from (text[a:b] for a, b in itertools.pairwise(edges))


def _write(data: DataConfig, model: ModelConfig, folder: Path) -> None:
    for stale in folder.parent.glob(f"{folder.name}.tmp-*"):  # left by a killed process: we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        tokenizer = _tokenizer(data, model)
        smallest = np.min_scalar_type(tokenizer.size - 1).newbyteorder("<")
        writers = {split: _ShardWriter(scratch, split, smallest) for split in ("train", "val")}
        for split, block in split_blocks(data):
            writers[split].add(tokenizer.encode(block))
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "source": data.path or "embedded: King James Bible",
            "tokenizer": data.tokenizer,
            "vocab_size": tokenizer.size,
            "dtype": smallest.str,
            "tokens": {split: writer.total for split, writer in writers.items()},
            "shards": {split: writer.close() for split, writer in writers.items()},
        }
        if not manifest["tokens"]["train"]:
            raise MistakeError(f"data.path={data.path}: it holds no text.")
        manifest["hash"] = hashlib.sha256(json.dumps(manifest["shards"]).encode()).hexdigest()[:16]
        tokenizer.save(scratch)
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        os.rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _tokenizer(data: DataConfig, model: ModelConfig) -> Tokenizer:
    if data.tokenizer == "bytes":
        return Bytes()
    training = (block for split, block in split_blocks(data) if split == "train")
    return Bpe(training, _bpe_size(data, model) or 0)


class _ShardWriter:
    def __init__(self, folder: Path, split: str, dtype: np.dtype) -> None:
        self.folder, self.split, self.dtype, self.total = folder, split, dtype, 0
        self.shards: list[dict[str, Any]] = []
        self._open()

    def _open(self) -> None:
        self.path = self.folder / f"{self.split}-{len(self.shards):05d}.bin"
        self.file, self.hash, self.count = open(self.path, "wb"), hashlib.sha256(), 0

    def add(self, tokens: np.ndarray) -> None:
        raw = tokens.astype(self.dtype).tobytes()
        self.file.write(raw)
        self.hash.update(raw)
        self.count += len(tokens)
        self.total += len(tokens)
        if self.count >= SHARD_TOKENS:
            self._seal()
            self._open()

    def _seal(self) -> None:
        self.file.close()
        self.shards.append({"file": self.path.name, "tokens": self.count, "sha256": self.hash.hexdigest()})

    def close(self) -> list[dict[str, Any]]:
        self._seal()
        return self.shards


def _open(folder: Path) -> Prepared:
    manifest = json.loads((folder / "manifest.json").read_text())
    dtype = np.dtype(manifest["dtype"])

    def tokens(split: str) -> Tokens:
        facts = [shard for shard in manifest["shards"][split] if shard["tokens"]]
        shards = []
        for shard in facts:
            file = folder / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["tokens"] * dtype.itemsize:
                raise MistakeError(
                    f"{file} is missing or cut short, unlike its manifest; remove {folder} to prepare it anew."
                )
            shards.append(np.memmap(file, dtype=dtype, mode="r"))
        return Tokens(shards, np.cumsum([0, *(shard["tokens"] for shard in facts)]))

    return Prepared(tokens("train"), tokens("val"), manifest)
