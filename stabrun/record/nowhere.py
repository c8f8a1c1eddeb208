"""The record of a process that keeps none: of each rank but the first."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stabrun.config import Config
from stabrun.record.run_dir import RunDir, RunWriter
from stabrun.record.schema import Event, Row, Summary
from stabrun.record.watched import Watched


class NoRunDir(RunDir):
    """A run directory without files, which are below the null device, and to which nothing is written."""

    def __init__(self) -> None:
        super().__init__(Path(os.devnull))

    def events(self) -> list[Event]:
        return []

    def write_summary(self, summary: Summary) -> None:
        pass

    def keep_environment(self, facts: dict[str, Any]) -> None:
        pass

    def keep_tokenizer(self, definition: str) -> None:
        pass

    def write_watched(self, watched: Watched) -> None:
        pass

    @contextmanager
    def hold(self, key: str = "", busy: str = "") -> Iterator[RunWriter]:
        yield NoWriter(self)

    @contextmanager
    def lock(self, config: Config) -> Iterator[RunWriter]:
        yield NoWriter(self)


class NoWriter(RunWriter):
    def cut(self, step: int) -> tuple[list[Row], int]:
        return [], 0

    def cut_from(self, step: int) -> list[Row]:
        return []

    def write(self, row: Row) -> None:
        pass

    def event(self, kind: str, **facts: Any) -> None:
        pass
