"""What could not be written of a watched run: a fault of the disk must not end a training loop that is not ours."""

import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from stabrun.record.disk import sentence
from stabrun.record.run_dir import RunWriter
from stabrun.record.schema import Row
from stabrun.text import warn

KEPT = 10_000  # rows and events that are kept at most: some 50 MB


class Backlog:
    """Writes rows and events as a RunWriter does; what the disk refuses is kept, and tried again with the next.

    The first fault is reported, and so is the end: that all was written after all, or that recording has ended because
    more than `KEPT` are waiting.
    """

    def __init__(self, writer: RunWriter) -> None:
        self.writer = writer
        self.waiting = deque[Callable[[], None]]()
        self.size = 0  # of the record before the last attempt to write
        self.faulty, self.ended = False, False

    def write(self, row: Row) -> None:
        self._add(partial(self.writer.write, row))

    def event(self, kind: str, **facts: Any) -> None:
        self._add(partial(self.writer.event, kind, **facts))

    def _add(self, action: Callable[[], None]) -> None:
        if self.ended:
            return
        self.waiting.append(action)
        try:
            self.drain()
        except OSError as error:
            self._tell(error)

    def drain(self) -> None:
        """Write what is waiting. OSError if the disk refuses."""
        if self.faulty:
            self._mend()
        while self.waiting:
            self.size = self._size()
            self.waiting[0]()
            self.waiting.popleft()
        if self.faulty:
            self.faulty = False
            warn(f"watch: {self.writer.run.path}: all steps so far are recorded after all.")

    def _tell(self, error: OSError) -> None:
        if not self.faulty:
            self.faulty = True
            warn(f"watch: {sentence(error)} Training goes on; up to {KEPT:,} steps are kept until they can be written.")
        elif len(self.waiting) > KEPT:
            self.ended = True
            self.waiting.clear()
            warn(f"watch: {self.writer.run.path}: recording has ended, because {KEPT:,} steps could not be written.")

    def _mend(self) -> None:
        """Remove what a refused write has left of a row, at once or when its file was closed."""
        with suppress(OSError):  # what it still holds is written again
            self.writer.close()
        self.writer.file = None
        if self._size() > self.size:
            os.truncate(self.writer.run.metrics, self.size)

    def _size(self) -> int:
        metrics = self.writer.run.metrics
        return metrics.stat().st_size if metrics.exists() else 0

    def close(self) -> None:
        """Write the rest, and close the record. OSError if the disk refuses."""
        try:
            if not self.ended:
                self.drain()
        finally:
            self.writer.close()
