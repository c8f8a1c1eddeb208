"""TensorBoard's event files, by the reader of the package `tensorboard`."""

from collections.abc import Iterator
from pathlib import Path

from stabrun.config import UserError
from stabrun.foreign.columns import Cells
from stabrun.foreign.source import Source


def is_events(path: Path) -> bool:
    return "tfevents" in path.name


def event_rows(source: Source) -> Iterator[Cells]:
    """A row for each step: its scalars by tag. A file that was cut is read up to its last complete event."""
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.util import tensor_util
    except ImportError as error:
        raise UserError(
            f"{source.path}: the package tensorboard is missing: pip install 'stabrun[tensorboard]'."
        ) from error
    row: Cells = {}
    events = EventFileLoader(str(source.path)).Load()
    while True:
        try:
            event = next(events, None)
        except Exception as error:  # a damaged record: protobuf and the reader raise errors of many kinds
            source.note(f"the file is damaged and was read up to there ({type(error).__name__})")
            event = None
        if event is None:
            break
        for value in event.summary.value:
            if value.HasField("simple_value"):
                number = float(value.simple_value)
            elif value.HasField("tensor") and value.tensor.dtype in (1, 2):  # float, double
                array = tensor_util.make_ndarray(value.tensor)
                if array.size != 1:
                    continue
                number = float(array.reshape(()))
            else:
                continue
            if row and (row["step"] != event.step or value.tag in row):
                yield row
                row = {}
            row["step"] = event.step
            row[value.tag] = number
    if row:
        yield row
