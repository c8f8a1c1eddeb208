"""Sources of text: the embedded one, local files, or the Hugging Face Hub."""

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


class TextBlock(NamedTuple):
    """At most 65,536 characters of a document. `last`: whether the document ends here."""

    text: str
    last: bool


class Piece(NamedTuple):
    """A block or a part of one, and its split ("train" or "val")."""

    split: str
    text: str
    last: bool


def files(config: DataConfig) -> list[Path]:
    """The files of the corpus, in order. Raises UserError if there are none."""
    if config.name == "embedded":
        return [EMBEDDED]
    path = Path(config.path or "")
    if path.is_dir():
        wanted = formats.known if config.name == "local" else Path.exists
        found = sorted(
            file for file in path.rglob("*") if os.path.isfile(file) and wanted(file) and not hidden(file, path)
        )
        if not found:
            raise UserError(f"data.path={path}: no .txt, .jsonl or .parquet file in this directory.")
        return found
    if not path.exists():
        raise UserError(f"data.path={path}: no such file or directory.")
    if not path.is_file():
        raise UserError(f"data.path={path}: neither a regular file nor a directory.")
    return [path]


def hidden(file: Path, folder: Path) -> bool:
    """Whether the name of the file, or of a directory above it in `folder`, begins with a dot."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def fingerprint(config: DataConfig) -> str:
    """Hash of the paths, sizes and times of the corpus's files, or of its name on the Hub, without reading it."""
    if config.name == "embedded":
        facts: list = [(EMBEDDED.name, EMBEDDED.stat().st_size, 0)]
    elif config.name == "hub" and not hub.is_local(config):
        facts = [config.path]
    else:
        facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files(config)]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def revision(config: DataConfig) -> str | None:
    """The version to read: a commit on the Hub, or the fingerprint of a local directory that is used as a dataset."""
    if config.name != "hub":
        return None
    return fingerprint(config) if hub.is_local(config) else hub.commit(config)


def blocks(config: DataConfig, at: str | None = None) -> Iterator[TextBlock]:
    """Yield the text in blocks, document by document. `at`: revision of a dataset on the Hub.

    Empty documents are skipped. Raises UserError if data is damaged or not text, or a file is empty.
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
            raise UserError(f"data.path={source}: contains no text.")


def _sources(config: DataConfig, at: str | None) -> Iterator[tuple[str, Iterator[Document]]]:
    if config.name == "hub":
        yield str(config.path), hub.documents(config, None if hub.is_local(config) else at)
        return
    for file in files(config):
        yield str(file), formats.documents(file, config.text_key)


def _marked(document: Document) -> Iterator[TextBlock]:
    text = next(document, None)
    while text:
        following = next(document, None)
        yield TextBlock(text, following is None)
        text = following


def split_blocks(config: DataConfig, at: str | None = None) -> Iterator[Piece]:
    """Yield each block with its split: one in every round(1/val_fraction) is held out."""
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


def _evenly(blocks: list[TextBlock], every: int, separated: bool) -> Iterator[Piece]:
    """Cut a text of fewer than `every` blocks into `every` equal pieces, so that some can be held out.

    Without a separator, pieces may span several documents.
    """
    if not separated:
        blocks = [TextBlock("".join(block.text for block in blocks), True)]
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
