"""Where text comes from: the one shipped in the package, the user's own files, or the hub."""

import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from stabrun.config import DataConfig, UserError
from stabrun.data import formats, hub
from stabrun.data.formats import Document

EMBEDDED = Path(__file__).parent / "text" / "kjv.txt.xz"


class Block(NamedTuple):
    """At most 65,536 characters of one document, and whether that document ends with them."""

    text: str
    last: bool


class Piece(NamedTuple):
    """A block, or a part of one, and its split: "train" or "val"."""

    split: str
    text: str
    last: bool


def files(config: DataConfig) -> list[Path]:
    """The corpus's files, in order. UserError where there are none."""
    if config.name == "embedded":
        return [EMBEDDED]
    path = Path(config.path or "")
    if path.is_dir():
        wanted = formats.known if config.name == "local" else Path.exists
        found = sorted(
            file for file in path.rglob("*") if os.path.isfile(file) and wanted(file) and not hidden(file, path)
        )
        if not found:
            raise UserError(f"data.path={path}: the folder holds no .txt, .jsonl or .parquet file.")
        return found
    if not path.exists():
        raise UserError(f"data.path={path}: there is no such file or folder.")
    if not path.is_file():
        raise UserError(f"data.path={path}: it is neither a regular file nor a folder.")
    return [path]


def hidden(file: Path, folder: Path) -> bool:
    """Whether the file, or a folder on the way to it, has a name that begins with a dot."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def fingerprint(config: DataConfig) -> str:
    """Names the corpus without reading it: a hash of its files' paths, sizes and times, or of its name on the hub."""
    if config.name == "embedded":
        facts: list = [(EMBEDDED.name, EMBEDDED.stat().st_size, 0)]
    elif config.name == "hub" and not hub.is_local(config):
        facts = [config.path]
    else:
        facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files(config)]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def revision(config: DataConfig) -> str | None:
    """What to read, exactly: the hub's commit, or the fingerprint of a local folder that stands for one."""
    if config.name != "hub":
        return None
    return fingerprint(config) if hub.is_local(config) else hub.commit(config)


def blocks(config: DataConfig, at: str | None = None) -> Iterator[Block]:
    """The text in blocks, document by document, of the hub's dataset `at` a revision.

    An empty document is passed over. UserError where something is damaged or no text, or a file is empty.
    """
    left = config.max_documents
    for source, documents in _sources(config, at):
        empty = True
        for document in documents:
            some = False
            for block in _marked(document):
                some, empty = True, False
                yield block
            if some and left is not None:
                left -= 1
                if not left:
                    return
        if empty:
            raise UserError(f"data.path={source}: it holds no text.")


def _sources(config: DataConfig, at: str | None) -> Iterator[tuple[str, Iterator[Document]]]:
    if config.name == "hub":
        yield str(config.path), hub.documents(config, None if hub.is_local(config) else at)
        return
    for file in files(config):
        yield str(file), formats.documents(file, config.text_key)


def _marked(document: Document) -> Iterator[Block]:
    text = next(document, None)
    while text:
        following = next(document, None)
        yield Block(text, following is None)
        text = following


def split_blocks(config: DataConfig, at: str | None = None) -> Iterator[Piece]:
    """Each block with its split: one in every round(1/val_fraction) is held out."""
    every = round(1 / config.val_fraction)
    found = blocks(config, at)
    first = list(itertools.islice(found, every))
    if len(first) < every:
        yield from _evenly(first, every, config.separator is not None)
        return
    for index, block in enumerate(itertools.chain(first, found)):
        yield Piece(_split(index, every), *block)


def _split(index: int, every: int) -> str:
    return "val" if index % every == every - 1 else "train"


def _evenly(blocks: list[Block], every: int, separated: bool) -> Iterator[Piece]:
    """A text of fewer than `every` blocks, cut into `every` even ones so that some can be held out.

    They run on over the ends of documents, unless something is put there.
    """
    if not separated:
        blocks = [Block("".join(block.text for block in blocks), True)]
    total = sum(len(block.text) for block in blocks)
    edges = [total * i // every for i in range(every + 1)]
    start = 0
    for text, last in blocks:
        end = start + len(text)
        for index, (a, b) in enumerate(itertools.pairwise(edges)):
            a, b = max(a, start), min(b, end)
            if a < b:
                yield Piece(_split(index, every), text[a - start : b - start], last and b == end)
        start = end
