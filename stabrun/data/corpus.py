"""Where text comes from: the one shipped in the package, or the user's own files."""

import hashlib
import lzma
import os
from collections.abc import Iterator
from pathlib import Path

from stabrun.config import DataConfig, MistakeError

EMBEDDED = Path(__file__).parent / "text" / "kjv.txt.xz"
BLOCK = 1 << 16  # characters; whole blocks go to training or to validation


def files(config: DataConfig) -> list[Path]:
    """The corpus's files, in order. MistakeError where there are none."""
    if config.name == "embedded":
        return [EMBEDDED]
    path = Path(config.path or "")
    if path.is_dir():
        found = sorted(file for file in path.rglob("*.txt") if os.path.isfile(file))
        if not found:
            raise MistakeError(f"data.path={path}: the folder holds no .txt file.")
        return found
    if not path.exists():
        raise MistakeError(f"data.path={path}: there is no such file or folder.")
    if not path.is_file():
        raise MistakeError(f"data.path={path}: it is neither a regular file nor a folder.")
    return [path]


def fingerprint(config: DataConfig) -> str:
    """Names the corpus without reading it: a hash of the paths, sizes and times of its files."""
    facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files(config)]
    if config.name == "embedded":
        facts = [(EMBEDDED.name, EMBEDDED.stat().st_size, 0)]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def blocks(config: DataConfig) -> Iterator[str]:
    """The text in blocks of at most 65,536 characters, file by file. MistakeError where it is not UTF-8 text."""
    for file in files(config):
        opener = lzma.open if file.suffix == ".xz" else open
        try:
            with opener(file, "rt", encoding="utf-8", newline="") as text:
                while block := text.read(BLOCK):
                    if "\0" in block:
                        raise MistakeError(f"data.path={file}: it holds zero bytes, so it is no text file.")
                    yield block
        except (lzma.LZMAError, EOFError) as error:
            raise MistakeError(f"data.path={file}: it is no whole .xz file.") from error
        except UnicodeDecodeError as error:
            raise MistakeError(f"data.path={file}: it is not UTF-8 text ({error.reason}).") from error
