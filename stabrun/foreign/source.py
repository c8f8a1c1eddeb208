"""A file of another tool as lines of text: compression, encoding, terminal codes, an incomplete last line."""

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from stabrun.config import UserError

LONGEST = 1 << 26  # characters of a line
TOO_LONG = f"one of its lines is longer than {LONGEST >> 20} MiB; it is no record of losses"
PROBE = 1 << 16  # bytes that decide about the encoding
TERMINAL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07|[\x00\x08]")  # colors, titles, backspaces
TERMINAL_SIGN = re.compile("[\x00\x08\x1b]").search
CONTROLS = bytes(set(range(32)) - {0, *b"\t\n\r\f\b\x1b\x0b"})
LARGEST_SHARE = 0.05  # of control characters in a text
COMPRESSED = ((b"\x1f\x8b", gzip.open), (b"\xfd7zXZ\x00", lzma.open), (b"BZh", bz2.open))
CUT_STREAM = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
CLOSERS = "\"'}])|"  # a line that ends with one of these is complete without a line break
INCOMPLETE = "the last line is incomplete and was skipped"
TOLERATED = 20  # one unreadable row in so many is skipped with a note; more are an error


class Source:
    """One file, as text; collects the notes of those who read it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        self.unread: list[str] = []  # a sentence about each line or row that cannot be read
        self.good = 0  # rows that were read
        self.unterminated = False  # whether the line read last has no line break

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def skip(self, why: str) -> None:
        """Leave out a line or row that cannot be read."""
        self.unread.append(why)

    def skip_last(self) -> None:
        """Leave out the last line, which the writer did not complete."""
        self.note(INCOMPLETE)

    def check(self) -> None:
        """Report the unreadable rows. Raises UserError if they are many compared with those that were read."""
        if len(self.unread) * TOLERATED > self.good:
            raise UserError(f"{self.path}{self.unread[0]}")
        if self.unread:
            total, first = self.good + len(self.unread), self.unread[0].lstrip(":, ").removesuffix(".")
            self.note(f"{len(self.unread)} of {total} rows cannot be read and were skipped; the first: {first}")

    def probe(self) -> bytes:
        """The first bytes, decompressed."""
        start = b""
        with self._open() as file:
            try:
                while len(start) < PROBE and (piece := file.read1(PROBE - len(start))):  # type: ignore[attr-defined]
                    start += piece
            except CUT_STREAM as error:
                if not start:
                    raise UserError(f"{self.path}: cannot be read ({error}).") from error
        return start

    def lines(self) -> Iterator[str]:
        """The lines without their breaks (`\\n`, `\\r\\n` or `\\r`) and terminal codes. An incomplete last line is left
        out with a note."""
        encoding = encoding_of(self.path, self.probe())
        with io.TextIOWrapper(self._open(), encoding, errors="replace") as text:
            self.unterminated = False
            try:
                while line := text.readline(LONGEST):
                    if len(line) == LONGEST:
                        raise UserError(f"{self.path}: {TOO_LONG}.")
                    if line[-1] == "\n":
                        yield plain_text(line[:-1]) if TERMINAL_SIGN(line) else line[:-1]
                    elif line.rstrip().endswith(tuple(CLOSERS)):
                        self.unterminated = True
                        yield plain_text(line)
                    elif line.strip():
                        self.skip_last()
            except CUT_STREAM:
                self.skip_last()

    def _open(self) -> IO[bytes]:
        file = open(self.path, "rb")
        start = file.read(8)
        for magic, opened in COMPRESSED:
            if start.startswith(magic):
                file.close()
                return cast(IO[bytes], opened(self.path, "rb"))
        file.seek(0)
        return file


def plain_text(line: str) -> str:
    """A line without terminal codes."""
    return TERMINAL.sub("", line)


def encoding_of(path: Path, start: bytes) -> str:
    """The encoding of a text by its first bytes. Raises UserError if it is not text."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            if len(start) < PROBE and not start.decode("utf-16").strip():
                raise UserError(f"{path}: the file is empty.")
        except UnicodeDecodeError as error:
            if len(start) < 8:  # a longer text may be cut within a character
                raise UserError(f"{path}: not UTF-8, UTF-16 or 8-bit text.") from error
        return "utf-16"
    if start.count(0) < 0.6 * len(start):  # Latin letters in UTF-16 without a mark: every other byte is zero
        if start[1::2].count(0) > 0.4 * len(start):
            return "utf-16-le"
        if start[::2].count(0) > 0.4 * len(start):
            return "utf-16-be"
    controls = len(start) - len(start.translate(None, CONTROLS)) + start[: PROBE // 16].count(0)
    if controls > LARGEST_SHARE * len(start):
        raise UserError(f"{path}: no loss column found; it is not text.")
    if start.startswith(codecs.BOM_UTF8):
        return "utf-8-sig"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        text = start.decode("utf-8", errors="replace")
        wide = sum(character > "\x7f" for character in text)
        # A damaged byte leaves the other characters valid; a text in a local encoding has no valid ones.
        return "utf-8-sig" if wide > 2 * text.count("\ufffd") else "cp1252"
    return "utf-8-sig"
