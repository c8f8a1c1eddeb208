"""The table of formats. A new one is a row here, and a function that turns lines into rows."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stabrun.foreign import consoles, documents, logs, tables, tensorboard, wandb
from stabrun.foreign.columns import Cells
from stabrun.foreign.source import Source

HEAD = 20_000  # lines by which a format is recognised: some logs begin with much other text


@dataclass(frozen=True)
class Format:
    """A format of text: its name, how its first lines (without blank ones) are recognised, and its rows."""

    name: str
    recognises: Callable[[list[str]], bool]
    rows: Callable[[Source, Iterable[str], list[str]], Iterator[Cells]]
    grows: bool = True  # whether its rows can be read before the file is complete


@dataclass(frozen=True)
class FileFormat:
    """A format that is not text."""

    name: str
    recognises: Callable[[Path], bool]
    rows: Callable[[Source], Iterator[Cells]]


FILES = (
    FileFormat("TensorBoard", tensorboard.is_events, tensorboard.event_rows),
    FileFormat("W&B", wandb.is_wandb, wandb.history_rows),
)

# The first that recognises the lines is used; those that look for less come later.
TEXTS = (
    Format("MLPerf", consoles.any_line(consoles.MLPERF), consoles.mlperf_rows),
    Format("JSON lines", documents.begins_lines, documents.line_rows),
    Format("JSON", documents.begins_document, documents.document_rows, grows=False),
    Format("llm.c", consoles.any_line(consoles.LLM_C), consoles.llm_c_rows),
    Format("build-nanogpt", consoles.any_line(consoles.NANOGPT), consoles.nanogpt_rows),
    Format("table", lambda head: tables.split_of(head) is not None, lambda source, lines, head: tables.table(
        source, lines, head, tables.split_of(head) or tables.by_blanks)),
    Format("numbers", lambda head: tables.numbers_split(head) is not None, tables.number_rows),
    Format("dictionaries", consoles.begins_dictionaries, consoles.dictionary_rows),
    Format("blocks", consoles.any_line(consoles.BLOCK), consoles.block_rows),
    Format("LitGPT", consoles.any_line(consoles.LITGPT), consoles.litgpt_rows),
    Format("Keras", consoles.begins_keras, consoles.keras_rows),
    Format("fairseq", consoles.any_line(consoles.FAIRSEQ), consoles.fairseq_rows),
    Format("log", logs.begins_log, logs.log_rows),
)  # fmt: skip


def file_format(path: Path) -> FileFormat | None:
    return next((known for known in FILES if known.recognises(path)), None)


def text_format(head: list[str]) -> Format | None:
    """The format of a text by its first lines."""
    return next((known for known in TEXTS if known.recognises(head)), None) if head else None
