"""What is told while a corpus is tokenized: a live line on a terminal, a plain one now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console

EVERY = 10.0  # seconds between plain lines


class Progress:
    """Counts text and tokens of finished parts; `found` parts of an earlier pass are told at once.

    The last line comes where `tell` is set, or where the pass took long enough to be waited for.
    """

    def __init__(self, found: int, tell: bool) -> None:
        self.began = self.told = time.monotonic()
        self.tell = tell
        self.bytes = self.tokens = self.skipped = 0
        if found:
            print(f"going on from {found} finished part{'s'[: found > 1]} of an earlier pass", flush=True)
        self.live = Console().status("tokenizing") if sys.stdout.isatty() else None

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.live:
            self.live.stop()
        if kind is None and self.bytes and (self.tell or time.monotonic() - self.began > EVERY):
            print(f"tokenized {self.line()}", flush=True)

    def skip(self, part: dict[str, Any]) -> None:
        """Count a part that an earlier pass has made."""
        self.skipped += part["bytes"]
        self.tokens += sum(part["tokens"].values())

    def add(self, part: dict[str, Any]) -> None:
        """Count a part that is made now."""
        self.bytes += part["bytes"]
        self.tokens += sum(part["tokens"].values())
        now = time.monotonic()
        if self.live:
            self.live.update(f"tokenizing: {self.line()}")
        elif now - self.told > EVERY:
            print(f"tokenizing: {self.line()}", flush=True)
            self.told = now

    def line(self) -> str:
        """Text and tokens so far, and the speed of this pass alone."""
        speed = self.bytes / 1e6 / max(time.monotonic() - self.began, 1e-9)
        return f"{(self.bytes + self.skipped) / 1e6:,.1f} MB of text, {self.tokens:,} tokens, {speed:.1f} MB/s"
