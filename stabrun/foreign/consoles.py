"""Logs whose lines need to be known: abbreviations, blocks of lines, dictionaries, and lines without names."""

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from stabrun.foreign import names
from stabrun.foreign.columns import Cells
from stabrun.foreign.documents import flat
from stabrun.foreign.logs import NUMBER, Shapes, column, pairs
from stabrun.foreign.source import Source
from stabrun.record.jsonl import DECODER

Reader = Callable[[Source, Iterable[str], list[str]], Iterator[Cells]]

LLM_C = re.compile(rf"^s:(\d+) (?:(trl|tel):({NUMBER}))?(.*)$")
LLM_C_NAMES = {"lr": "lr", "norm": "grad_norm"}
NANOGPT = re.compile(rf"^(\d+) (train|val) ({NUMBER})\s*$", re.IGNORECASE)
NANOGPT_ANY = re.compile(r"^\d+ (?:train|val|hella) \d", re.IGNORECASE)
MLPERF = re.compile(r":::MLLOG?\s*(\{.*\})\s*$")
DICTIONARY = re.compile(r"\{[^{}]*\}")
NESTED = re.compile(r"\{[^{}]*\{.*\}")
BARE = re.compile(r"(?<![\w'\"])(-?(?:nan|inf))(?![\w'\"])")
ENTRY = re.compile(r"""['"]([^'"]+)['"]\s*:\s*(?:'([^']*)'|"([^"]*)"|((?:[\w.]+\([^)]*\)|\[[^\]]*\]|[^,{}\[\]])+))""")
BLOCK = re.compile(r"\[(?:(\w+) )?(\w+)=(\d+)(?:/\d+)?(?:,\s*\w+=[^\],]*)*\](?:\[(\w+)=(\d+)(?:/\d+)?\])?:?\s*$")
BLOCK_LINE = re.compile(rf"(?:^|\s)([A-Za-z][\w./ ()-]*?)\s*[=:]\s*({NUMBER})\s*$", re.IGNORECASE)
BLOCK_OTHER = re.compile(r"(?:^|\s)([A-Za-z][\w./ ()-]*?)\s*[=:]\s*\S+\s*$")
LITGPT = re.compile(rf"loss train: ({NUMBER}), val: (\S+)", re.IGNORECASE)
LITGPT_CLOCK = re.compile(r"\b(iter|step) (\d+)")
KERAS_EPOCH = re.compile(r"^Epoch (\d+)(?:/\d+)?\s*$")
KERAS_BATCH = re.compile(r"\b(\d+)/(\d+|Unknown) ")
KERAS_LINE = re.compile(r"\b\d+/(?:\d+|Unknown) (?:\[|━| ?- |\x1b|-).*\bloss: ")
FAIRSEQ = re.compile(r"num_updates?[ =]")
FAIRSEQ_VALID = re.compile(r"valid on|\| valid\w* \|")
FAIRSEQ_EPOCH = re.compile(r"(?:\| |^)epoch \d+ \|")


def any_line(pattern: re.Pattern[str]) -> Callable[[list[str]], bool]:
    return lambda head: any(pattern.search(line) for line in head)


def llm_c_rows(source: Source, lines: Iterable[str], head: list[str]) -> Iterator[Cells]:
    """llm.c: `s:1 trl:10.98 lr:4e-07 norm:29.9`, `s:0 tel:11.0` on held-out data, `s:9 eval:0.25` of a benchmark."""
    for line in lines:
        if (found := LLM_C.match(line)) and found[2]:
            rest = {LLM_C_NAMES[name]: value for name, value in pairs(found[4]).items() if name in LLM_C_NAMES}
            yield {"step": found[1], "loss" if found[2] == "trl" else "val_loss": found[3], **rest}


def nanogpt_rows(source: Source, lines: Iterable[str], head: list[str]) -> Iterator[Cells]:
    """build-nanogpt: `250 train 6.12`, `250 val 6.2`, `250 hella 0.25` of a benchmark."""
    for line in lines:
        if found := NANOGPT.match(line):
            yield {"step": found[1], f"{found[2].lower()}_loss": found[3]}
        elif line.strip() and not NANOGPT_ANY.match(line):
            source.skip(f": a line is not a step and a loss ({line[:40]}).")


def mlperf_rows(source: Source, lines: Iterable[str], head: list[str]) -> Iterator[Cells]:
    """MLPerf: events with a key, a value, and the clock among their metadata."""
    for line in lines:
        event = dictionary(found[1]) if (found := MLPERF.search(line)) else None
        if event is None:
            if ":::MLL" in line:
                source.skip(f": an event is not JSON ({line[:40]}).")
            continue
        metadata = event.get("metadata")
        row = dict(metadata) if isinstance(metadata, dict) else {}
        if isinstance(event.get("key"), str):
            row.setdefault(event["key"], event.get("value"))
        row = {"val_loss" if name == "eval_error" else name: value for name, value in row.items()}
        if any(names.is_training_loss(name) or names.is_validation(name) for name in row):
            yield row


def dictionary(text: str) -> dict[str, Any] | None:
    """The dictionary that a text in JSON is, or as Python prints it; None if it is none."""
    try:
        value = DECODER.raw_decode(text)[0]
    except ValueError:
        value = {name: a or b or c.strip() for name, a, b, c in ENTRY.findall(text)}
    return value if isinstance(value, dict) and value else None


def nested(line: str) -> dict[str, Any] | None:
    """The dictionary of dictionaries on a line, with names such as `train/loss`; None if it cannot be read."""
    text = line[line.index("{") : line.rindex("}") + 1]
    try:
        value = DECODER.raw_decode(text)[0]
    except ValueError:
        try:
            value = ast.literal_eval(BARE.sub(r"'\1'", text))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return flat(value) if isinstance(value, dict) else None


def dictionaries(line: str) -> Iterator[Cells]:
    """The dictionaries with a loss on a line. The summary at the end of a training is none of them."""
    found = [nested(line)] if NESTED.search(line) else map(dictionary, DICTIONARY.findall(line))
    for row in found:
        if row and "train_runtime" not in row and any(
            names.is_training_loss(name) or names.is_validation(name) for name in row
        ):  # fmt: skip
            yield row


def dictionary_rows(source: Source, lines: Iterable[str], head: list[str]) -> Iterator[Cells]:
    """Hugging Face's Trainer and others: a dictionary for each row, among other text such as progress bars."""
    for line in lines:
        if "{" in line:
            found = False
            for row in dictionaries(line):
                found = True
                yield flat(row)
            if not found and "loss" in line and "}" not in line and ("{'" in line or '{"' in line):
                source.skip(f": a dictionary is not complete ({line.strip()[:40]}).")


def begins_dictionaries(head: list[str]) -> bool:
    return any("{" in line and any(True for _ in dictionaries(line)) for line in head)


def block_rows(source: Source, lines: Iterable[str], head: list[str]) -> Iterator[Cells]:
    """OLMo and Composer: `[step=1/100]`, then a line for each number. A line of another kind ends the block."""
    row: Cells | None = None
    for line in lines:
        if found := BLOCK.search(line):
            if row:
                yield row
            row = {}
            if not any(word and "eval" in word.lower() for word in (found[1], found[2])):
                row = {
                    "step" if name == "batch" else name: value
                    for name, value in (found.group(2, 3), found.group(4, 5))
                    if name
                }
        elif row is not None and line.strip():
            pair = BLOCK_LINE.search(line)
            name = column(" ".join(pair[1].split())) if pair else ""
            if pair and name not in row:
                row[name] = pair[2]
            elif not BLOCK_OTHER.search(line) or pair:
                yield row
                row = None
    if row:
        yield row


def litgpt_rows(source: Source, lines: Iterable[str], head: list[str]) -> Iterator[Cells]:
    """LitGPT: `Epoch 1 | iter 10 step 10 | loss train: 2.1, val: n/a | …`."""
    for line in lines:
        if found := LITGPT.search(line):
            clocks = dict(LITGPT_CLOCK.findall(line))
            row: Cells = {"loss": found[1], **{name: clocks[name] for name in ("iter", "step") if name in clocks}}
            if re.fullmatch(NUMBER, found[2]):
                row["val_loss"] = found[2]
            yield row


def keras_rows(source: Source, lines: Iterable[str], head: list[str]) -> Iterator[Cells]:
    """Keras: `Epoch 3/10`, then a progress bar whose last state has the losses of the epoch."""
    epoch, row, over = None, None, False
    for line in lines:
        if found := KERAS_EPOCH.match(line.strip()):
            if row:
                yield row
            epoch, row = found[1], None
        elif epoch is not None and KERAS_LINE.search(line):
            *_, done, planned, text = KERAS_BATCH.split(line)
            last, over = pairs(text), done == planned
            row = {"epoch": epoch} | {name: value for name, value in last.items() if "loss" in name}
    if row and over:  # otherwise its epoch is not over
        yield row


def begins_keras(head: list[str]) -> bool:
    return any(KERAS_EPOCH.match(line.strip()) for line in head) and any_line(KERAS_LINE)(head)


def fairseq_rows(source: Source, lines: Iterable[str], head: list[str]) -> Iterator[Cells]:
    """fairseq: within an epoch, at its end (a mean over it, which is another column), and on held-out data."""
    return filter(None, map(Shapes(fairseq_row), lines))


def fairseq_row(line: str) -> Cells | None:
    if "loss" not in line or not FAIRSEQ.search(line):
        return None
    row = pairs(line)
    if "loss" not in row or "num_updates" not in row:
        return None
    if FAIRSEQ_VALID.search(line):
        return {"num_updates": row["num_updates"], "valid_loss": row["loss"]}
    if FAIRSEQ_EPOCH.search(line):
        row["train_loss"] = row.pop("loss")
    return row
