"""Files of documents: plain text, JSON lines and Parquet, each read as a stream.

A document is an iterator of blocks: strings of at most 65,536 characters. A text file is one document; so is a JSON
line, and a row of a Parquet file. `.xz` and `.gz` are unpacked on the way.
"""

import codecs
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stabrun.config import UserError

BLOCK = 1 << 16  # characters; whole blocks go to training or to validation
ROWS = 1024  # of a Parquet file, held in memory at a time
PACKED: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}

Document = Iterator[str]


def documents(file: Path, text_key: str) -> Iterator[Document]:
    """The file's documents, in order. UserError where it is damaged, no UTF-8, or has no text under `text_key`."""
    if _ending(file) in TABLES:
        raise UserError(
            f"data.path={file}: it is none of {', '.join(FORMATS)}; end its name in .txt to read it as text."
        )
    return FORMATS.get(_ending(file), _text)(file, text_key)


def known(file: Path) -> bool:
    """Whether the file's name ends like one of the formats."""
    return _ending(file) in FORMATS


def cut(text: str) -> Document:
    """A document that is in memory, in blocks."""
    return (text[i : i + BLOCK] for i in range(0, len(text), BLOCK))


def _text(file: Path, text_key: str) -> Iterator[Document]:
    def blocks() -> Document:
        try:
            with _whole(file), _opener(file)(file, "rt", encoding="utf-8-sig", newline="") as text:
                while block := text.read(BLOCK):
                    if "\0" in block:
                        raise UserError(f"data.path={file}: it holds zero bytes, so it is no text file.")
                    yield block
        except UnicodeDecodeError as error:
            where = f"{error.reason} at byte {_bad_byte(file)}"
            raise UserError(f"data.path={file}: it is not UTF-8 text ({where}).") from error

    yield blocks()


def _lines(file: Path, text_key: str) -> Iterator[Document]:
    with _whole(file), _opener(file)(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield cut(_field(line, text_key, f"data.path={file}: line {number}"))


def _field(line: bytes, text_key: str, where: str) -> str:
    """The text of one JSON line; null is an empty one."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 ({error.reason} at its byte {error.start}).") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no whole JSON object.") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is no JSON object.")
    if text_key not in row:
        raise UserError(f"{where} has no field data.text_key={text_key}; {those_there(row)}.")
    text = "" if row[text_key] is None else row[text_key]
    if not isinstance(text, str):
        raise UserError(f"{where} holds no text under data.text_key={text_key}, but {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds half of a surrogate pair, which is no character.") from error
    return text


def _table(file: Path, text_key: str) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet, types

    try:
        with parquet.ParquetFile(file) as table:
            schema = table.schema_arrow
            if text_key not in schema.names:
                raise UserError(f"data.text_key={text_key}: {file} has no such column; {those_there(schema.names)}.")
            if schema.names.count(text_key) > 1:
                raise UserError(f"data.text_key={text_key}: {file} has several columns of that name.")
            kind = schema.field(text_key).type
            kind = kind.value_type if types.is_dictionary(kind) else kind
            if not any(check(kind) for check in (types.is_string, types.is_large_string, types.is_string_view)):
                raise UserError(f"data.text_key={text_key}: that column of {file} is no text, but {kind}.")
            for batch in table.iter_batches(batch_size=ROWS, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    yield cut(text or "")
    except UnicodeDecodeError as error:
        raise UserError(f"data.path={file}: its column {text_key} is not UTF-8 ({error.reason}).") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"data.path={file}: it is no whole Parquet file.") from error


FORMATS = {".txt": _text, ".jsonl": _lines, ".parquet": _table}
TABLES = (".json", ".csv", ".tsv")  # hold text among other things; anything else that is UTF-8 is read as text


def those_there(names: Any) -> str:
    return f"it has {', '.join(map(str, names))}" if names else "it has none at all"


def _ending(file: Path) -> str:
    """`.jsonl` of `a.jsonl` and of `a.jsonl.xz`; a packed Parquet is none of ours."""
    name = Path(file.name.lower())
    if name.suffix not in PACKED:
        return ".jsonl" if name.suffix == ".ndjson" else name.suffix
    ending = Path(name.stem).suffix
    return ending if ending != ".parquet" else ""


def _opener(file: Path) -> Callable[..., Any]:
    return PACKED.get(file.suffix.lower(), open)


@contextmanager
def _whole(file: Path) -> Iterator[None]:
    try:
        yield
    except (lzma.LZMAError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"data.path={file}: it is no whole {file.suffix} file.") from error


def _bad_byte(file: Path) -> int:
    """The place of the first byte, from 0, that is not UTF-8 in the unpacked file."""
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    with _opener(file)(file, "rb") as raw:
        while True:
            pending, chunk = len(decoder.getstate()[0]), raw.read(BLOCK)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return done - pending + error.start
            done += len(chunk)
