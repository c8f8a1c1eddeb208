"""Token shards on disk, prepared once and memory-mapped afterwards.

A directory of prepared data contains `train-00000.bin`, `val-00000.bin`, … (raw little-endian integers of the smallest
type for the vocabulary), `tokenizer.json` and `manifest.json`. It appears under its name when it is complete. Until
then, its parts are kept in NAME.part, from which the same call resumes.
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
from stabrun.record.jsonl import write_atomic, write_json
from stabrun.record.synced import file_digest

FORMAT = 1
CHECKED_BYTES = 64_000_000  # of shards, verified each time they are opened: takes a fraction of a second
LATER_KEYS = ("config", "split", "revision", "text_key", "max_documents", "separator", "tokenizer_revision")


@dataclass(frozen=True)
class Tokens:
    """The tokens of a split: memory-mapped shards, read as one array."""

    shards: Sequence[np.ndarray]
    starts: np.ndarray  # [shards + 1]: first token of each shard, and the total

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from `start` on, `[count]`, possibly from several shards."""
        parts = []
        while count > 0:
            shard = int(np.searchsorted(self.starts, start, side="right")) - 1
            part = self.shards[shard][start - self.starts[shard] :][:count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def where(self, position: int) -> str:
        """File and position of a token: "train-00003.bin, token 1234"."""
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

    def tokenizer(self) -> str:
        """The definition of the tokenizer: the content of its file."""
        return (self.folder / tokenizer.FILE).read_bytes().decode()


def prepare(data: DataConfig, model: ModelConfig, verbose: bool = False) -> Prepared:
    """The shards for this configuration, prepared now if they are missing. Several processes may call this at once.

    `verbose`: print the speed even if tokenizing took little time.

    Raises UserError if the corpus is missing, empty, damaged, not text or too short for `data.seq_len`, if the
    tokenizer is larger than `model.vocab_size`, or if existing shards are damaged.
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
            raise UserError(f"data.cache_dir={root}: not a directory.") from error
        with open(root / f"{folder.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                _write(data, model, scratch, folder, verbose)
            shutil.rmtree(scratch, ignore_errors=True)
    prepared = opened(folder, CHECKED_BYTES)
    _refuse_larger(prepared.manifest["vocab_size"], model)
    for split, tokens in (("training", prepared.train), ("validation", prepared.val)):
        if len(tokens) <= data.seq_len:
            raise UserError(
                f"data.seq_len={data.seq_len}: the {split} split of {data.path or 'the text'} has only "
                f"{len(tokens)} tokens. It needs at least {data.seq_len + 1}."
            )
    return prepared


def unescaped(text: str) -> str:
    r"""The text with the escapes \n, \t and \\ replaced: a command line passes them as two characters."""
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t", "\\": "\\"}[found[1]], text)


def default_cache() -> Path:
    """$STABRUN_CACHE, or `stabrun` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("STABRUN_CACHE") or Path(base) / "stabrun")


def name(data: DataConfig, model: ModelConfig) -> str:
    """The directory name: a hash of everything that the content depends on, except changes on the Hub."""
    file = tokenizer.file_of(data)
    kind = file_digest(file) if file else data.tokenizer
    facts = [FORMAT, corpus.fingerprint(data), kind, _bpe_size(data, model), data.val_fraction]
    usual = asdict(DataConfig())
    changed = {key: value for key, value in asdict(data).items() if key in LATER_KEYS and value != usual[key]}
    if data.name == "hub" or changed:  # directories made before these keys existed keep their names
        facts.append([data.name, changed])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _bpe_size(data: DataConfig, model: ModelConfig) -> int | None:
    return (data.bpe_size or model.vocab_size) if data.tokenizer == "bpe" else None


def _refuse_larger(needed: int, model: ModelConfig) -> None:
    if needed > model.vocab_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size}: must be at least {needed}, the number of tokens of the tokenizer."
        )


def _write(data: DataConfig, model: ModelConfig, scratch: Path, folder: Path, verbose: bool) -> None:
    """Tokenize the corpus into `scratch`, reusing parts of an earlier pass, and rename it to `folder`."""
    scratch.mkdir(exist_ok=True)
    try:
        revision = _revision(data, scratch / "revision")
        saved = scratch / tokenizer.FILE
        if not saved.exists():
            _save_tokenizer(data, model, revision, saved)
        words = tokenizer.load(saved)
        pieces = corpus.split_blocks(data, revision)
        made = parts.make(pieces, scratch, saved, data.separator, data.workers, verbose)
        if not sum(part["tokens"]["train"] for part in made):
            raise UserError(f"data.path={data.path}: contains no text.")
    except UserError:
        # Parts of the Hub are kept: it may be unreachable for a while. Repaired local files get another name.
        if data.name != "hub" or not parts.finished(scratch):
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
        "tokenizer_sha256": file_digest(saved),
        "vocab_size": words.size,
        "dtype": parts.dtype(words).str,
        "tokens": {split: sum(part["tokens"][split] for part in made) for split in SPLITS},
        "shards": shards,
        "hash": _hash(shards),
    }
    shutil.copyfile(saved, whole / tokenizer.FILE)
    write_json(whole / "manifest.json", manifest)
    os.rename(whole, folder)


def _revision(data: DataConfig, file: Path) -> str | None:
    """The revision to read. A resumed pass uses the revision that it began with."""
    if not file.exists():
        write_atomic(file, json.dumps(corpus.revision(data)))
    return json.loads(file.read_bytes())


def _save_tokenizer(data: DataConfig, model: ModelConfig, revision: str | None, file: Path) -> None:
    training = (piece.text for piece in corpus.split_blocks(data, revision) if piece.split == "train")
    words = tokenizer.chosen(data, _bpe_size(data, model) or 0, training)
    _refuse_larger(words.size, model)
    write_atomic(file, words.definition)


def _hash(shards: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:16]


def opened(folder: Path, checked_bytes: float) -> Prepared:
    """Open prepared data, memory-mapped. Raises UserError if its files do not match the manifest.

    File sizes are always compared; SHA-256 only for the first `checked_bytes` of shards.
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
                raise _damaged(folder, f"{file} is missing or truncated")
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
        raise _damaged(folder, f"{folder}/manifest.json is missing or damaged") from error
    if not whole:
        raise _damaged(folder, f"{folder}/manifest.json is inconsistent")
    return manifest


def _refuse_changed(folder: Path, file: str, sha256: str | None) -> None:
    """Raise UserError if a file does not match the manifest. Manifests of earlier versions lack some hashes."""
    if sha256 is not None and file_digest(folder / file) != sha256:
        raise _damaged(folder, f"{folder / file} is missing or damaged")


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(f"{what}. Delete {folder} to prepare the data again.")
