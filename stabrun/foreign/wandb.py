"""W&B's files `run-*.wandb`: a log of records in blocks, each with a checksum."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stabrun.foreign.columns import Cells
from stabrun.foreign.documents import flat, parsed
from stabrun.foreign.source import INCOMPLETE, Source

MAGIC = b":W&B"
BLOCK, BEGIN = 32768, 7  # bytes of a block, and of the header of the file
PIECE = struct.Struct("<IHB")  # checksum, length, kind
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def is_wandb(path: Path) -> bool:
    if path.suffix != ".wandb":
        return False
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def records(data: bytes, source: Source) -> Iterator[bytes]:
    """The complete records of a file, up to the first damaged one."""
    at, record, kind = BEGIN, b"", FULL
    while at < len(data):
        left = BLOCK - at % BLOCK
        if left < PIECE.size:
            at += left
            continue
        if at + PIECE.size > len(data):
            source.note(INCOMPLETE)
            return
        checksum, length, kind = PIECE.unpack_from(data, at)
        piece = data[at + PIECE.size : at + PIECE.size + length]
        if not checksum and not length and not any(data[at:]):
            return  # preallocated, never written
        if len(piece) < length:
            source.note(INCOMPLETE)
            return
        if zlib.crc32(piece, zlib.crc32(bytes([kind]))) != checksum:
            source.note("a record is damaged; the file was read up to there")
            return
        record = piece if kind in (FULL, FIRST) else record + piece
        if kind in (FULL, LAST):
            yield record
        at += PIECE.size + length
    if kind in (FIRST, MIDDLE):
        source.note(INCOMPLETE)


def history_rows(source: Source) -> Iterator[Cells]:
    """The rows that were logged."""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # its classes are made at import

    for data in records(source.path.read_bytes(), source):
        record = messages.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {item.key or "/".join(item.nested_key): parsed(item.value_json) for item in items}
            if record.history.HasField("step"):
                row.setdefault("_step", record.history.step.num)
            yield flat(row)
