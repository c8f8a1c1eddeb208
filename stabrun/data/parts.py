"""One pass over a corpus: chunks of text are tokenized into part files by several processes, and joined into shards.

A part is `00007.bin` (the training tokens of the chunk, then its validation tokens) and, once complete, `00007.json`
(SHA-256 of text and tokens, and their counts). After a kill, parts whose text and tokens still match are reused.
"""

import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from stabrun.data.corpus import Piece
from stabrun.data.progress import shown_progress
from stabrun.data.tokenizer import Tokenizer, load
from stabrun.record.disk import writing
from stabrun.record.jsonl import write_atomic
from stabrun.record.synced import file_digest

CHUNK = 8 << 20  # characters of text per part
SHARD_TOKENS = 1 << 28
SPLITS = ("train", "val")
HANDLED = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}  # by the parent, which ends its workers

Part = dict[str, Any]
Tokenize = Callable[[int, list[Piece]], Part]


def chunks(pieces: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    """Group pieces into lists of at least `size` characters. The last may be shorter."""
    chunk: list[Piece] = []
    held = 0
    for piece in pieces:
        chunk.append(piece)
        held += len(piece.text)
        if held >= size:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def finished(folder: Path) -> int:
    """Number of finished parts of an earlier pass."""
    return len(list(folder.glob("[0-9]*.json")))


def make(
    pieces: Iterable[Piece], folder: Path, tokenizer: Path, separator: str | None, workers: int, verbose: bool
) -> list[Part]:
    """Tokenize the pieces into part files in `folder`. Returns the metadata of each part, in order.

    `tokenizer` is the saved file. `verbose`: print the speed even after a short pass.
    Raises ChildProcessError if a worker is killed from outside.
    """
    parts: dict[int, Part] = {}
    pending: dict[Future[Part], int] = {}

    def collect() -> None:
        done, _ = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            index = pending.pop(future)
            parts[index] = future.result()
            progress.add(parts[index])

    with shown_progress(finished(folder), verbose) as progress, _pool(folder, tokenizer, separator, workers) as submit:
        for index, chunk in enumerate(chunks(pieces, CHUNK)):
            if part := _found(folder, index, chunk):
                parts[index] = part
                progress.skip(part)
                continue
            while len(pending) > workers:  # one more than there are workers, so that no worker waits
                collect()
            pending[submit(index, chunk)] = index
        while pending:
            collect()
    return [parts[index] for index in sorted(parts)]


@contextmanager
def _pool(folder: Path, tokenizer: Path, separator: str | None, workers: int) -> Iterator[Callable[..., Future[Part]]]:
    """Yield a function that tokenizes a chunk, in this process or in one of `workers` processes."""
    if workers == 1:
        tokenize = partial(write_part, folder, load(tokenizer), separator)
        yield partial(_at_once, tokenize)
        return
    context = multiprocessing.get_context("spawn")
    read_end, write_end = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (read_end, folder, tokenizer, separator))
    try:
        yield partial(_submit, pool)
        pool.shutdown()
    except BrokenProcessPool as error:
        message = "a worker was killed, possibly out of memory; the same command resumes from the finished parts"
        raise ChildProcessError(errno.ECHILD, message, f"data.workers={workers}") from error
    finally:
        write_end.close()  # ends busy workers, as the end of this process would
        pool.shutdown(cancel_futures=True)
        read_end.close()


def _at_once(tokenize: Tokenize, index: int, chunk: list[Piece]) -> Future[Part]:
    future: Future[Part] = Future()
    future.set_result(tokenize(index, chunk))
    return future


def _submit(pool: ProcessPoolExecutor, index: int, chunk: list[Piece]) -> Future[Part]:
    """Submit a chunk. Workers started here inherit the signal mask, so that only the parent handles signals."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    try:
        return pool.submit(_work, index, chunk)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_tokenize: Tokenize  # set in each worker


def _start_worker(parent: Connection, folder: Path, tokenizer: Path, separator: str | None) -> None:
    global _tokenize
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()
    _tokenize = partial(write_part, folder, load(tokenizer), separator)


def _end_with(parent: Connection) -> None:
    """Exit when the other end of the pipe closes, that is, when the parent has ended."""
    try:
        parent.recv()
    except (EOFError, OSError):
        os._exit(1)


def _work(index: int, chunk: list[Piece]) -> Part:
    return _tokenize(index, chunk)


def write_part(folder: Path, tokenizer: Tokenizer, separator: str | None, index: int, chunk: list[Piece]) -> Part:
    """Tokenize one chunk, with a separator after each document, and write it as a part. Returns its metadata."""
    end = [tokenizer.encode(separator)] if separator else []
    tokens: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for piece in chunk:
        tokens[piece.split] += [tokenizer.encode(piece.text), *(end if piece.last else [])]
    arrays = [np.concatenate([np.empty(0, np.uint8), *tokens[split]]).astype(dtype(tokenizer)) for split in SPLITS]
    raw = b"".join(array.tobytes() for array in arrays)
    counts = {split: len(array) for split, array in zip(SPLITS, arrays, strict=True)}
    part = _facts(chunk) | {"sha256": _sha256(raw), "tokens": counts}
    write_atomic(folder / f"{index:05d}.bin", raw)
    write_atomic(folder / f"{index:05d}.json", json.dumps(part))
    return part


def dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest little-endian integer type for all tokens."""
    return np.min_scalar_type(tokenizer.size - 1).newbyteorder("<")


def _found(folder: Path, index: int, chunk: list[Piece]) -> Part | None:
    """The finished part of this chunk, if it exists and is undamaged."""
    try:
        part = json.loads((folder / f"{index:05d}.json").read_bytes())
        same = part.items() >= _facts(chunk).items()
        return part if same and part["sha256"] == _sha256((folder / f"{index:05d}.bin").read_bytes()) else None
    except (FileNotFoundError, ValueError, KeyError, AttributeError):
        return None


def _facts(chunk: list[Piece]) -> Part:
    texts = [piece.text.encode() for piece in chunk]
    cuts = repr([(piece.split, piece.last, len(text)) for piece, text in zip(chunk, texts, strict=True)])
    return {"text_sha256": _sha256(b"".join([cuts.encode(), *texts])), "bytes": sum(map(len, texts))}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def join(parts: list[Part], scratch: Path, kind: np.dtype, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Copy the parts in `scratch` into shards in `folder`. Returns the shards of each split, for the manifest."""
    shards = {}
    for split in SPLITS:
        cut = _cut(_tokens(parts, scratch, kind, split))
        by_shard = itertools.groupby(cut, key=lambda pair: pair[0])
        shards[split] = [_shard(folder / f"{split}-{n:05d}.bin", (a for _, a in arrays)) for n, arrays in by_shard]
        if not shards[split]:
            shards[split] = [_shard(folder / f"{split}-00000.bin", iter(()))]
    return shards


def _tokens(parts: list[Part], scratch: Path, kind: np.dtype, split: str) -> Iterator[np.ndarray]:
    for index, part in enumerate(parts):
        start = 0 if split == "train" else part["tokens"]["train"]
        whole = np.fromfile(scratch / f"{index:05d}.bin", dtype=kind)
        yield whole[start : start + part["tokens"][split]]


def _cut(arrays: Iterable[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (shard, tokens), cutting the arrays where a shard is full."""
    done = 0
    for array in arrays:
        while len(array):
            shard, used = divmod(done, SHARD_TOKENS)
            now = array[: SHARD_TOKENS - used]
            yield shard, now
            done, array = done + len(now), array[len(now) :]


def _shard(file: Path, arrays: Iterator[np.ndarray]) -> dict[str, Any]:
    count = 0
    with writing(file), open(file, "wb") as out:
        for array in arrays:
            out.write(array.tobytes())
            count += len(array)
    return {"file": file.name, "tokens": count, "sha256": file_digest(file)}
