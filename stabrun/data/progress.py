"""Progress of tokenizing: a live line on a terminal, plain lines at intervals elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console

EVERY = 10.0  # seconds between plain lines


class Progress:
    """Counts text and tokens of finished parts, after `reused` parts of an earlier pass.

    The last line is printed if `verbose` is set or the pass took longer than EVERY.
    """

    def __init__(self, reused: int, verbose: bool) -> None:
        self.began = self.printed = time.monotonic()
        self.verbose = verbose
        self.bytes = self.tokens = self.skipped = 0
        if reused:
            print(f"resuming from {reused} finished part{'s'[: reused > 1]} of an earlier pass", flush=True)
        self.live = Console().status("tokenizing") if sys.stdout.isatty() else None

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.live:
            self.live.stop()
        if kind is None and self.bytes and (self.verbose or time.monotonic() - self.began > EVERY):
            print(f"tokenized {self.line()}", flush=True)

    def skip(self, part: dict[str, Any]) -> None:
        """Count a part of an earlier pass."""
        self.skipped += part["bytes"]
        self.tokens += sum(part["tokens"].values())

    def add(self, part: dict[str, Any]) -> None:
        """Count a part of this pass."""
        self.bytes += part["bytes"]
        self.tokens += sum(part["tokens"].values())
        now = time.monotonic()
        if self.live:
            self.live.update(f"tokenizing: {self.line()}")
        elif now - self.printed > EVERY:
            print(f"tokenizing: {self.line()}", flush=True)
            self.printed = now

    def line(self) -> str:
        """Text and tokens so far, and the speed of this pass."""
        speed = self.bytes / 1e6 / max(time.monotonic() - self.began, 1e-9)
        return f"{(self.bytes + self.skipped) / 1e6:,.1f} MB of text, {self.tokens:,} tokens, {speed:.1f} MB/s"
