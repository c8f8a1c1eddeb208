"""Files of documents: plain text, JSON lines and Parquet, each read as a stream.

A document is an iterator of blocks: strings of at most 65,536 characters. A text file, a JSON line and a row of a
Parquet file are one document each. `.xz` and `.gz` files are decompressed while reading.
"""

import codecs
import gzip
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stabrun.config import UserError

BLOCK_CHARS = 1 << 16  # whole blocks go to training or to validation
ROWS = 1024  # rows of a Parquet file in memory at a time, fewer if they are long
ROW_BYTES = 16_000_000  # of the rows of a Parquet file in memory at a time, as far as its metadata tell
LONGEST = 100_000_000  # bytes of a JSON line, which is in memory as a whole, several times
PACKED: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}

Document = Iterator[str]


def documents(file: Path, text_key: str) -> Iterator[Document]:
    """The documents of the file. Raises UserError if it is damaged, not UTF-8, or lacks text under `text_key`."""
    if _ending(file) in TABLES:
        raise UserError(
            f"data.path={file}: not one of {', '.join(FORMATS)}. Rename it to .txt to read it as plain text."
        )
    if _ending(file) != ".parquet" and not file.stat().st_size:  # files of /proc are of size 0; some never end
        raise UserError(f"data.path={file}: contains no text.")
    return FORMATS.get(_ending(file), _text)(file, text_key)


def known(file: Path) -> bool:
    """Whether the file name has the suffix of a supported format."""
    return _ending(file) in FORMATS


def cut(text: str) -> Document:
    """Cut a document into blocks."""
    return (text[i : i + BLOCK_CHARS] for i in range(0, len(text), BLOCK_CHARS))


def _text(file: Path, text_key: str) -> Iterator[Document]:
    def blocks() -> Document:
        try:
            with _whole(file), _opener(file)(file, "rt", encoding="utf-8-sig", newline="") as text:
                while block := text.read(BLOCK_CHARS):
                    if "\0" in block:
                        raise UserError(f"data.path={file}: not a text file: it contains NUL bytes.")
                    yield block
        except UnicodeDecodeError as error:
            where = f"{error.reason} at byte {_bad_byte(file)}"
            raise UserError(f"data.path={file}: not UTF-8 text ({where}).") from error

    yield blocks()


def _lines(file: Path, text_key: str) -> Iterator[Document]:
    with _whole(file), _opener(file)(file, "rb") as lines:
        for number in itertools.count(1):
            line = lines.readline(LONGEST + 1)
            if not line:
                return
            if len(line) > LONGEST:
                raise UserError(
                    f"data.path={file}: line {number} is longer than {LONGEST // 10**6} MB; "
                    "a line is one document: split it into several."
                )
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield cut(_field(line, text_key, f"{file}: line {number}"))


def _field(line: bytes, text_key: str, where: str) -> str:
    """The text of one JSON line."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.path={where} is not UTF-8 ({error.reason} at byte {error.start} of the line)."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"data.path={where} is not a complete JSON object.") from error
    if not isinstance(row, dict):
        raise UserError(f"data.path={where} is not a JSON object.")
    text = text_of(row, text_key, where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"data.path={where} contains an unpaired surrogate, which is not a character.") from error
    return text


def text_of(row: dict[str, Any], text_key: str, where: str) -> str:
    """The text of a row. Null counts as empty text. Raises UserError if the field is missing or not text."""
    if text_key not in row:
        raise UserError(f"data.text_key={text_key}: {where} has no such field. {listed('Fields', row)}.")
    text = row[text_key]
    if not isinstance(text, str | None):
        raise UserError(f"data.text_key={text_key}: this field of {where} must be text, not {type(text).__name__}.")
    return text or ""


def _table(file: Path, text_key: str) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet, types

    try:
        # A dictionary stays one in memory: its values may be long and repeat in all rows.
        repeated = [text_key] if text_key in parquet.read_schema(file).names else []
        with parquet.ParquetFile(file, read_dictionary=repeated) as table:
            schema = table.schema_arrow
            if text_key not in schema.names:
                raise UserError(
                    f"data.text_key={text_key}: {file} has no such column. {listed('Columns', schema.names)}."
                )
            if schema.names.count(text_key) > 1:
                raise UserError(f"data.text_key={text_key}: {file} has several columns with this name.")
            kind = schema.field(text_key).type
            kind = kind.value_type if types.is_dictionary(kind) else kind
            if not any(check(kind) for check in (types.is_string, types.is_large_string, types.is_string_view)):
                raise UserError(f"data.text_key={text_key}: this column of {file} must be text, not {kind}.")
            for batch in table.iter_batches(batch_size=_rows(table.metadata), columns=[text_key]):
                for text in batch.column(0):
                    yield cut(text.as_py() or "")
    except UnicodeDecodeError as error:
        raise UserError(f"data.path={file}: column {text_key} is not UTF-8 ({error.reason}).") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"data.path={file}: not a complete Parquet file.") from error


def _rows(metadata: Any) -> int:
    """Rows to read at a time: fewer if those of a group are long on average."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    longest = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=0.0)
    return max(1, min(ROWS, int(ROW_BYTES / max(1.0, longest))))


FORMATS = {".txt": _text, ".jsonl": _lines, ".parquet": _table}
TABLES = (".json", ".csv", ".tsv")  # not read as plain text, unlike other files in UTF-8


def listed(kind: str, names: Any) -> str:
    """`Columns: id, text`, 20 names at most."""
    few = [str(name)[:40] for name in itertools.islice(names, 21)]
    return f"{kind}: {', '.join(few[:20]) or 'none'}{', …' * (len(few) > 20)}"


def _ending(file: Path) -> str:
    """The format's suffix: `.jsonl` for `a.jsonl` and `a.jsonl.xz`. A compressed Parquet file is not supported."""
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
        raise UserError(f"data.path={file}: not a complete {file.suffix} file.") from error


def _bad_byte(file: Path) -> int:
    """Position, from 0, of the first byte of the decompressed file that is not UTF-8."""
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    with _opener(file)(file, "rb") as raw:
        while True:
            pending, chunk = len(decoder.getstate()[0]), raw.read(BLOCK_CHARS)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return done - pending + error.start
            done += len(chunk)
