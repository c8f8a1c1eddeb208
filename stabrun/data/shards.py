"""Token shards on disk, prepared once and memory-mapped afterwards.

A prepared folder holds `train-00000.bin`, `val-00000.bin`, … (raw little-endian integers of the smallest type
that holds the vocabulary), `tokenizer.json` and `manifest.json`. It appears under its name only when whole; until
then its parts gather beside it in NAME.part, from which the same call goes on after it was stopped.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stabrun.config import DataConfig, ModelConfig, UserError
from stabrun.data import corpus, parts, tokenizer
from stabrun.data.parts import SPLITS

FORMAT = 1
CHECKED_BYTES = 64_000_000  # of shards, whose sha256 is verified at each opening: a fraction of a second
LATER_KEYS = ("config", "split", "revision", "text_key", "max_documents", "separator", "tokenizer_revision")


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

    def where(self, position: int) -> str:
        """The file that holds a token, and its place there, in words: "train-00003.bin, token 1234"."""
        shard = int(np.searchsorted(self.starts, position, side="right")) - 1
        file = getattr(self.shards[shard], "filename", None)
        return f"{Path(file).name if file else f'shard {shard}'}, token {position - int(self.starts[shard])}"


@dataclass(frozen=True)
class Prepared:
    """A tokenized corpus: its two splits and its manifest (`hash`, `vocab_size`, `tokens`, `dtype`, …)."""

    train: Tokens
    val: Tokens
    manifest: dict[str, Any]
    folder: Path


def prepare(data: DataConfig, model: ModelConfig, tell: bool = False) -> Prepared:
    """The shards for this configuration, made now if they are missing; several processes may ask at once.

    `tell` has the speed of tokenizing printed even where it took no time.

    Raises UserError where the corpus is missing, empty, damaged, no text, too short for `data.seq_len`, or its
    tokenizer larger than `model.vocab_size`; and where shards made earlier are damaged.
    """
    if data.separator:
        data = replace(data, separator=unescaped(data.separator))
    if data.tokenizer == "bytes":
        _refuse_larger(tokenizer.Bytes.size, model)
    root = Path(data.cache_dir) if data.cache_dir else default_cache()
    folder = root / name(data, model)
    scratch = root / f"{folder.name}.part"
    if not folder.exists() or scratch.exists():
        try:
            root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"data.cache_dir={root}: it is not a folder.") from error
        with open(root / f"{folder.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                _write(data, model, scratch, folder, tell)
            shutil.rmtree(scratch, ignore_errors=True)
    prepared = opened(folder, CHECKED_BYTES)
    _refuse_larger(prepared.manifest["vocab_size"], model)
    for split, tokens in (("training", prepared.train), ("validation", prepared.val)):
        if len(tokens) <= data.seq_len:
            raise UserError(
                f"data.seq_len={data.seq_len}: the {split} split of {data.path or 'the text'} has only "
                f"{len(tokens)} tokens, and needs at least {data.seq_len + 1}."
            )
    return prepared


def unescaped(text: str) -> str:
    r"""The text with \n, \t and \\ as what they stand for: a command line hands them on as two characters."""
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t", "\\": "\\"}[found[1]], text)


def default_cache() -> Path:
    """$STABRUN_CACHE, or `stabrun` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("STABRUN_CACHE") or Path(base) / "stabrun")


def name(data: DataConfig, model: ModelConfig) -> str:
    """The folder's name: a hash of all that its content depends on, but for what the hub changes."""
    file = tokenizer.file_of(data)
    kind = hashlib.sha256(file.read_bytes()).hexdigest() if file else data.tokenizer
    facts = [FORMAT, corpus.fingerprint(data), kind, _bpe_size(data, model), data.val_fraction]
    usual = asdict(DataConfig())
    changed = {key: value for key, value in asdict(data).items() if key in LATER_KEYS and value != usual[key]}
    if data.name == "hub" or changed:  # so that folders keep the names that they had before there were these keys
        facts.append([data.name, changed])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _bpe_size(data: DataConfig, model: ModelConfig) -> int | None:
    return (data.bpe_size or model.vocab_size) if data.tokenizer == "bpe" else None


def _refuse_larger(needed: int, model: ModelConfig) -> None:
    if needed > model.vocab_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size}: the tokenizer has {needed} tokens, so that it must be at least "
            f"{needed}."
        )


def _write(data: DataConfig, model: ModelConfig, scratch: Path, folder: Path, tell: bool) -> None:
    """Tokenize the corpus into `scratch`, going on from what an earlier pass left there, and rename it to `folder`."""
    scratch.mkdir(exist_ok=True)
    try:
        revision = _revision(data, scratch / "revision")
        saved = scratch / tokenizer.FILE
        if not saved.exists():
            _save_tokenizer(data, model, revision, saved)
        words = tokenizer.load(saved)
        pieces = corpus.split_blocks(data, revision)
        made = parts.make(pieces, scratch, saved, data.separator, data.workers, tell)
        if not sum(part["tokens"]["train"] for part in made):
            raise UserError(f"data.path={data.path}: it holds no text.")
    except UserError:
        if data.name != "hub" or not parts.finished(scratch):  # mended files have another name; the hub may be away
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    whole = scratch / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    shards = parts.join(made, scratch, parts.dtype(words), whole)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "source": data.path or "embedded: King James Bible",
        "revision": revision,
        "separator": data.separator,
        "tokenizer": data.tokenizer,
        "tokenizer_sha256": hashlib.sha256(saved.read_bytes()).hexdigest(),
        "vocab_size": words.size,
        "dtype": parts.dtype(words).str,
        "tokens": {split: sum(part["tokens"][split] for part in made) for split in SPLITS},
        "shards": shards,
        "hash": _hash(shards),
    }
    shutil.copyfile(saved, whole / tokenizer.FILE)
    (whole / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    os.rename(whole, folder)


def _revision(data: DataConfig, file: Path) -> str | None:
    """What is read of the hub: a pass that goes on stays with the commit that it began with."""
    if not file.exists():
        parts.write_whole(file, json.dumps(corpus.revision(data)).encode())
    return json.loads(file.read_bytes())


def _save_tokenizer(data: DataConfig, model: ModelConfig, revision: str | None, file: Path) -> None:
    training = (piece.text for piece in corpus.split_blocks(data, revision) if piece.split == "train")
    words = tokenizer.chosen(data, _bpe_size(data, model) or 0, training)
    _refuse_larger(words.size, model)
    parts.write_whole(file, words.definition.encode())


def _hash(shards: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:16]


def opened(folder: Path, checked_bytes: float) -> Prepared:
    """A prepared folder, memory-mapped. UserError where its files are not those that its manifest tells of.

    Sizes are always compared; the sha256 of the first shards that have `checked_bytes` in all, too.
    """
    manifest = _manifest(folder)
    kind = np.dtype(manifest["dtype"])
    _refuse_changed(folder, tokenizer.FILE, manifest.get("tokenizer_sha256"))

    def tokens(split: str) -> Tokens:
        nonlocal checked_bytes
        shards = []
        facts = [shard for shard in manifest["shards"][split] if shard["tokens"]]
        for shard in facts:
            file, size = folder / shard["file"], shard["tokens"] * kind.itemsize
            if not file.is_file() or file.stat().st_size != size:
                raise _spoilt(folder, f"{file} is missing or cut short, unlike its manifest")
            checked_bytes -= size
            if checked_bytes >= 0:
                _refuse_changed(folder, shard["file"], shard["sha256"])
            shards.append(np.memmap(file, dtype=kind, mode="r"))
        return Tokens(shards, np.cumsum([0, *(shard["tokens"] for shard in facts)], dtype=np.int64))

    return Prepared(tokens("train"), tokens("val"), manifest, folder)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        counts = {split: sum(shard["tokens"] for shard in manifest["shards"][split]) for split in SPLITS}
        whole = manifest["hash"] == _hash(manifest["shards"]) and manifest["tokens"] == counts
        np.dtype(manifest["dtype"]), manifest["vocab_size"] + 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _spoilt(folder, f"{folder}/manifest.json is missing or damaged") from error
    if not whole:
        raise _spoilt(folder, f"{folder}/manifest.json contradicts itself")
    return manifest


def _refuse_changed(folder: Path, file: str, sha256: str | None) -> None:
    """UserError where a file is not the one that the manifest tells of; earlier ones told less."""
    if sha256 is None:
        return
    try:
        with open(folder / file, "rb") as content:
            same = hashlib.file_digest(content, "sha256").hexdigest() == sha256
    except FileNotFoundError:
        same = False
    if not same:
        raise _spoilt(folder, f"{folder / file} is missing or damaged, unlike its manifest")


def _spoilt(folder: Path, what: str) -> UserError:
    return UserError(f"{what}; remove {folder} to prepare it anew.")
