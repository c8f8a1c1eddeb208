"""Logs: lines with names and numbers, such as `step 10 | loss: 2.31 | lr 1e-3`, whatever stands between them."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

from stabrun.foreign import names
from stabrun.foreign.columns import Cells
from stabrun.foreign.source import Source

NUMBER = r"(?:[-+]?(?:\d+(?:,\d+)*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?|[-+]?(?:nan|inf(?:inity)?))(?![\w.]*\w)(?!\s?%)"
WORD = r"(?!(?:nan|inf|infinity)\b)[A-Za-z_][\w./@-]*"
PAIR = re.compile(
    rf"(?<![\w.])({WORD}(?: {WORD}){{0,5}})['\"]?(?:\s*\(([a-z ]{{1,20}})\))?"
    rf"\s*(?:[:=]+>?|->|→|\bis\b|\bof\b|\bwas\b|#)?\s*['\"(\[]*\s*(?:[a-zA-Z_][\w.]*\()?({NUMBER})",
    re.IGNORECASE,
)
COUNTER = re.compile(
    r"(?<![\w./])(\d+)\s*/\s*\d+(?= ?\[| ?\]| ?\(| (?:batch|step|iter)| ?━| ?\|| loss| - |,|:|\s{2,}|\s*$)"
)
LEADING = re.compile(r"^\s*(\d+)\s*[:|]\s")
BATCHES = ("batch", "mini_batch", "minibatch", "batch_idx", "batch_index")
BRACKET = re.compile(r"(?:^|\s)\[(\d+)\](?=[\s:])")
EPOCH_AND_BATCH = re.compile(r"\[(\d+),\s*(\d+)\]")
OF_EPOCHS = re.compile(r"epoch\W*$", re.IGNORECASE)
EPOCH_LINE = re.compile(r"\bepoch\b[ :#=\[]*(\d+)", re.IGNORECASE)
REVERSED = re.compile(rf"(?<![\w.])({NUMBER}) (?:([a-z]+) )?loss\b", re.IGNORECASE)
OF_HELD_OUT = re.compile(
    r"(?<![\w./-])(?:val|valid|validation|validate|validating|eval|evaluation|evaluating|test|testing|dev)(?![\w./-]*\w)"
    r"|saving dict for global step", re.IGNORECASE,
)  # fmt: skip
OF_TRAINING = re.compile(r"(?<![\w./-])train(?:ing)?(?![\w./-]*\w)", re.IGNORECASE)
RANK = re.compile(r"\brank[ :=_]{0,2}(\d+)", re.IGNORECASE)
TRIGGERS = ("oss", "OSS", "ntropy", "nll", "xent", "ost ")  # of `loss`, `entropy`, `cost`
TOKEN = re.compile(r"(\d+(?:,\d+)*(?:\.\d*)?(?:[eE][-+]?\d+)?)")
WHOLE, ANY_NUMBER = r"(\d+)", TOKEN.pattern
RECENT = 6  # shapes whose pattern is tried
SHAPES = 10_000  # are kept; some texts have another shape on each line
VERB = re.compile(r" (?:is|was|of|equals|value)$", re.IGNORECASE)
NOISE = frozenset((
    "info", "debug", "warning", "root", "main", "the", "its", "current", "this", "now", "with", "and", "got", "has",
    "at", "log", "metrics", "trainer", "after", "then", "reached", "in", "for", "on", "is", "stdout", "a", "an", "to",
))  # fmt: skip
NO_CLOCK = frozenset((
    "per", "time", "times", "ms", "sec", "secs", "seconds", "s", "max", "maximum", "warmup", "of", "every", "remaining",
    "speed", "avg", "average", "eta", "last", "best", "left", "interval", "skipped",
))  # fmt: skip


@lru_cache(65536)
def column(phrase: str) -> str:
    """The name of a column in the words before a number: `INFO completed step` is `step`."""
    phrase = VERB.sub("", phrase.strip(" -./"))
    if " at " in phrase:
        phrase = phrase.rsplit(" at ", 1)[1]
    words = phrase.split(" ")
    if names.plain(words[-1]) in BATCHES and not NO_CLOCK & set(map(str.lower, words)):
        return "n/m"
    for start in range(len(words)):
        rest, dropped = " ".join(words[start:]), {word.lower().strip(".:-") for word in words[:start]}
        found = names.role(rest)
        if found == names.CLOCK and dropped & NO_CLOCK:
            return phrase
        if found == names.CLOCK or (found and dropped <= NOISE):
            return rest
    return phrase


def pairs(line: str) -> Cells:
    """The numbers of a line by name; the first of those with the same name."""
    row: Cells = {}
    for words, unit, value in PAIR.findall(line):
        row.setdefault(column(f"{words} {unit}" if unit else words), value)
    return row


def counter(line: str) -> str | None:
    """The 3 of `3/100`, unless it counts epochs."""
    for found in COUNTER.finditer(line):
        if not OF_EPOCHS.search(line, 0, found.start()):
            return found[1]
    return None


def line_row(line: str) -> Cells | None:
    """The row on a line of a log; None if it has no loss."""
    if not any(trigger in line for trigger in TRIGGERS):
        return None
    row = pairs(line)
    roles = {names.role(name) or (names.LOSS if names.is_part(name) else None): name for name in row}
    if names.LOSS not in roles and names.VALIDATION not in roles:
        found = REVERSED.search(line)
        if found is None:
            return None
        row["val_loss" if (found[2] or "").lower() in names.HELD_OUT else "loss"] = found[1]
        roles[names.LOSS] = "loss"
    if names.LOSS in roles and OF_HELD_OUT.search(line) and not OF_TRAINING.search(line):
        held_out = [name for name in row if names.is_training_loss(name)]
        if any(names.says_training(name) for name in held_out):
            return row
        if not any(names.is_validation(name) for name in row):
            row["val_loss"] = row[min(held_out, key=lambda name: names.rank(name, names.LOSSES))]
        for name in held_out:
            del row[name]
        return row
    if names.CLOCK not in roles or all(
        names.plain(name) in names.COARSE for name in row if names.role(name) == names.CLOCK
    ):
        if found := EPOCH_AND_BATCH.search(line):
            row.setdefault("epoch", found[1])
            row["n/m"] = found[2]
        elif batch := counter(line):
            row.setdefault("n/m", batch)
        elif (found := LEADING.search(line)) or (found := BRACKET.search(line)):
            row["[n]"] = found[1]
    return row


Plan = list[tuple[str, int | str]]  # the columns of a row, and which number of the line each has, or its text


class Shapes:
    """Reads lines by what stands between their numbers: a line like one before needs no search for names."""

    def __init__(self, read: Callable[[str], Cells | None]) -> None:
        self.read = read
        self.known: dict[str, Plan | None] = {}  # by shape: a pattern of lines
        self.recent: list[tuple[re.Pattern[str], Plan | None]] = []

    def __call__(self, line: str) -> Cells | None:
        for pattern, plan in self.recent:
            if found := pattern.fullmatch(line):
                return filled_in(plan, found.groups()) if plan else None
        parts = TOKEN.split(line)
        numbers = parts[1::2]
        for index, part in enumerate(parts):
            parts[index] = (WHOLE if part.isdecimal() else ANY_NUMBER) if index % 2 else re.escape(part)
        shape = "".join(parts)
        if shape not in self.known:
            row = self.read(line)
            if row is not None and not all(numbers.count(value) == 1 or value.isalpha() for value in row.values()):
                return row  # two numbers are equal: another line will show which is which
            if len(self.known) > SHAPES:
                self.known.clear()
            plan = [(n, v if v.isalpha() else numbers.index(v)) for n, v in row.items()] if row else None
            self.known[shape] = plan
        elif len(self.recent) < RECENT:
            self.recent.append((re.compile(shape), self.known[shape]))
        else:
            self.recent.pop(0)
        plan = self.known[shape]
        return filled_in(plan, numbers) if plan else None


def filled_in(plan: Plan, numbers: Sequence[str]) -> Cells:
    return {name: numbers[at] if type(at) is int else at for name, at in plan}


def log_rows(source: Source, lines: Iterable[str], head: list[str]) -> Iterator[Cells]:
    """The rows of a log. Of several processes that write into it, the first one is read."""
    read = Shapes(line_row)
    epoch: str | None = None
    rank: str | None = None
    for line in lines:
        if "ank" in line and (found := RANK.search(line)):
            rank = rank or found[1]
            if found[1] != rank:
                continue
        row = read(line)
        if row is None:
            if "poch" in line and (found := EPOCH_LINE.search(line)):
                epoch = found[1]
            continue
        if epoch is not None and not any("epoch" in name.lower() for name in row):
            row["epoch"] = epoch
        yield row


def begins_log(head: list[str]) -> bool:
    """Whether one of these lines has a loss."""
    return any(line_row(line) is not None for line in head)
