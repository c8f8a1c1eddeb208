"""Progress of tokenizing: a live line on a terminal, plain lines at intervals elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.status import Status

EVERY = 10.0  # seconds between plain lines


@contextmanager
def shown_progress(reused: int, verbose: bool) -> Iterator["Progress"]:
    """Show the progress of a pass, after `reused` parts of an earlier pass.

    The last line is printed if `verbose` is set or the pass took longer than EVERY.
    """
    if reused:
        print(f"resuming from {reused} finished part{'s'[: reused > 1]} of an earlier pass", flush=True)
    with Console().status("tokenizing") if sys.stdout.isatty() else nullcontext() as live:
        progress = Progress(live)
        yield progress
    if progress.bytes and (verbose or time.monotonic() - progress.began > EVERY):
        print(f"tokenized {progress.line()}", flush=True)


class Progress:
    """Counts text and tokens of finished parts."""

    def __init__(self, live: Status | None) -> None:
        self.live = live
        self.began = self.printed = time.monotonic()
        self.bytes = self.tokens = self.skipped = 0

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
