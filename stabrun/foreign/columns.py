"""The columns of a record that the verdict needs, chosen by their usual names or by the user."""

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stabrun.config import UserError
from stabrun.foreign import epochs, names
from stabrun.foreign.cells import count, filled, number

Cells = dict[str, Any]  # of one row, by the name of the column

LISTED = 20  # columns in a message
FEW = 0.1  # of the numbers of the fullest usual column: a column with fewer is a summary
LEAST_STEPS, LEAST_COARSE = 0.3, 0.5  # share of the rows with a loss that must have the clock; the others are left out
REPEATING = 0.1  # share of repeated values from which a coarse clock does not order the rows
SPLITS = ("split", "phase", "mode", "stage", "subset", "partition", "set", "type", "event", "kind")
TRAIN_WORDS = frozenset(("train", "training", "trn", "tr", "fit", "train_inner", "train_step"))
VALID_WORDS = frozenset(("val", "valid", "validation", "eval", "evaluation", "validate", "dev", "holdout", "val_step"))
TEST_WORDS = frozenset(("test", "testing"))
RUN_NAMES = (
    "run", "run_id", "run_name", "runid", "trial", "trial_id", "trial_name", "trial_number", "experiment",
    "experiment_name", "exp", "exp_name", "experiment_id", "config_id", "model_name", "job_id", "seed",
)  # fmt: skip
PARAMETERS = ("params_", "param_", "hparams_", "hparam_", "hp_", "config_", "hyperparameters_", "user_attrs_")
TABLE_OF_RUNS = ("state", "datetime_start", "datetime_complete", "created", "trial_id", "user_attrs_seed")


@dataclass(frozen=True)
class Columns:
    """The names of the columns. `clock` None: rows are counted. `loss` None: only validations are recorded."""

    loss: str | None
    clock: str | None = None
    validation: str | None = None
    gradient: str | None = None
    rate: str | None = None
    epoch: str | None = None
    first_epoch: float = 0.0
    epoch_steps: float | None = None  # if the clock starts again in each epoch
    run: str | None = None
    split: str | None = None
    training: frozenset[str] = TRAIN_WORDS
    held_out: frozenset[str] = VALID_WORDS
    aliases: tuple[str, ...] = ()
    whole: bool = True  # whether the clock must be a whole number
    notes: list[str] = field(default_factory=list, hash=False, compare=False)


def columns_of(rows: list[Cells]) -> Counter[str]:
    """The names in these rows, in order, and in how many rows each has a number."""
    seen: Counter[str] = Counter()
    for row in rows:
        for name, value in row.items():
            if type(name) is str and name:
                seen[name] += filled(value)
    return seen


def choose(
    path: Path, rows: list[Cells], step: str | None = None, loss: str | None = None, split: str | None = None
) -> Columns:
    """The columns by the first rows of a record. Raises UserError if there is no loss, or if several are possible."""
    seen = columns_of(rows)
    listed = ", ".join(list(seen)[:LISTED])
    for flag, name in (("--step", step), ("--loss", loss), ("--split", split)):
        if name is not None and name not in seen:
            raise UserError(f"{flag} {name}: {path} has no such column. Columns: {listed or 'none'}.")
    sides = split_of(path, rows, seen, split)
    if loss is None and sides is None:
        refuse_table_of_runs(path, rows, seen)
    validation = None
    if loss is None:
        training = rows if sides is None else [row for row in rows if side(row, sides) is True]
        loss = training_loss(path, columns_of(training) if training else seen)
        if sides and loss and not any(filled(row.get(loss)) for row in training):  # only evaluations have a loss
            sides = Columns(None, split=sides.split, training=sides.held_out, held_out=frozenset())
    if sides is None:
        validation = validation_loss(seen, loss)
    if loss is None and validation is None:
        hint = f"choose a column with --loss: {listed}" if seen else "it has no columns"
        raise UserError(f"{path}: no loss column found; {hint}.")
    main = loss or validation
    used = [row for row in rows if filled(row.get(str(main))) and (sides is None or side(row, sides) is True)]
    clock = step or usable_clock(seen, used or rows, str(main))
    whole = clock is None or (step is None and names.plain(clock) in names.STEPS)
    notes = [f"only evaluations are recorded ({main})"] if names.is_validation(str(main)) else []
    if sides and not sides.held_out:
        notes = [f"only evaluations are recorded ({main})"]
    if clock is None:
        notes.append("no step column: rows are counted")
    elif not whole and step is None:
        notes.append(f"the clock is column {clock}")
    epoch_names = [name for name in seen if names.plain(name).endswith("epoch") and name != clock and seen[name]]
    epoch = max(epoch_names, key=lambda name: seen[name]) if epoch_names and clock and whole else None
    each = epochs.length(used, str(clock), epoch, str(main)) if epoch else None
    if each is None and epoch and len({count_or_none(row.get(epoch)) for row in used}) > 1:
        epoch = None  # the steps go on from one epoch to the next
    if each:
        notes.append(epochs.NOTE)
    return Columns(
        loss=loss,
        clock=clock,
        validation=validation,
        gradient=first_usual(seen, names.GRADIENTS),
        rate=learning_rate(seen),
        epoch=epoch,
        first_epoch=each[0] if each else 0.0,
        epoch_steps=each[1] if each else None,
        run=run_column(rows, seen),
        split=sides.split if sides else None,
        held_out=sides.held_out if sides else VALID_WORDS,
        training=sides.training if sides else TRAIN_WORDS,
        aliases=clock_aliases(seen, clock),
        whole=whole,
        notes=notes,
    )


def side(row: Cells, columns: Columns) -> bool | None:
    """Whether a row of a table with a split column is of training; None if it is neither that nor validation."""
    value = str(row.get(columns.split or "", "")).strip().lower()
    return True if value in columns.training else False if value in columns.held_out else None


def split_of(path: Path, rows: list[Cells], seen: Counter[str], given: str | None) -> Columns | None:
    """The column that tells rows of training from those of validation, if there is one."""
    for name in [given] if given else sorted(seen, key=lambda name: names.rank(name, SPLITS)):
        if given is None and names.rank(name, SPLITS) == len(SPLITS):
            break
        values = {str(row[name]).strip().lower() for row in rows if row.get(name) not in (None, "")}
        held_out = values & VALID_WORDS or values & TEST_WORDS
        if values & TRAIN_WORDS or (given and held_out):
            words = frozenset(held_out) or VALID_WORDS
            return Columns(None, split=name, training=TRAIN_WORDS if values & TRAIN_WORDS else words, held_out=words)
        if given is not None:
            known = ", ".join(sorted(map(str, values))[:5]) or "none"
            raise UserError(f"--split {given}: its values in {path} are {known}; one of them must be train or val.")
    return None


def training_loss(path: Path, seen: Counter[str]) -> str | None:
    """The column of the training loss by its usual name; otherwise the only one that ends with `loss`."""
    candidates = [name for name in seen if names.role(name) == names.LOSS and not name.endswith(names.UNUSED)]
    most = max((seen[name] for name in candidates), default=0)
    full = [name for name in candidates if seen[name] >= FEW * most]
    by_rank = sorted(full, key=loss_rank)
    if by_rank:
        equal = [name for name in by_rank if loss_rank(name) == loss_rank(by_rank[0])]
        if len(equal) > 1:
            raise UserError(f"{path}: several columns match; choose one, such as --loss '{equal[0]}'.")
        if loss_rank(by_rank[0]) < len(names.EXACT_LOSSES) + len(names.LOSSES) - 1:
            return by_rank[0]
    parts = [name for name in seen if names.is_part(name) and seen[name] and names.role(name) is None]
    if len(parts) == 1:
        return parts[0]
    if parts:
        raise UserError(f"{path}: no total loss found; choose one with --loss: {', '.join(parts[:LISTED])}.")
    return by_rank[0] if by_rank else None


def loss_rank(name: str) -> int:
    low = name.rsplit(" - ", 1)[-1].strip().lower()
    if low in names.EXACT_LOSSES:
        return names.EXACT_LOSSES.index(low)
    return len(names.EXACT_LOSSES) + names.rank(name, names.LOSSES)


def validation_loss(seen: Counter[str], loss: str | None) -> str | None:
    """The column of the loss on held-out data: the counterpart of the training loss, or a usual name."""
    bare = loss is not None and names.plain(loss) == "train"  # next to `val`
    candidates = [
        name for name in seen
        if name != loss and seen[name] and not name.endswith(names.UNUSED)
        and (names.is_validation(name) or (bare and names.plain(name) in names.HELD_OUT))
    ]  # fmt: skip
    counterpart = without_side(loss) if loss else ""
    return min(
        candidates,
        key=lambda name: (
            names.rank(name, names.VALIDATIONS) if names.plain(name) in names.VALIDATIONS[:4] else 99,
            without_side(name) != counterpart,
            names.rank(name, names.VALIDATIONS),
            -seen[name],
        ),
        default=None,
    )


def without_side(name: str) -> str:
    return "_".join(word for word in names.plain(name).split("_") if word not in names.HELD_OUT | names.TRAINING)


def first_usual(seen: Counter[str], usual: tuple[str, ...]) -> str | None:
    found = [name for name in seen if seen[name] and names.plain(name) in usual and not name.endswith(names.UNUSED)]
    return min(found, key=lambda name: names.rank(name, usual), default=None)


def learning_rate(seen: Counter[str]) -> str | None:
    found = [name for name in seen if seen[name] and names.is_rate(names.plain(name))]
    return min(found, key=lambda name: names.rank(name, names.RATES), default=None)


def usable_clock(seen: Counter[str], rows: list[Cells], loss: str) -> str | None:
    """The first usual clock that orders the rows with a loss; None if they must be counted."""
    usual = (*names.STEPS, *names.COARSE)
    found = [name for name in seen if seen[name] and names.role(name) == names.CLOCK and name != loss]
    for name in sorted(found, key=lambda name: (names.rank(name, usual), not name.islower())):
        if orders(name, rows, loss, whole=names.plain(name) in names.STEPS):
            return name
    return None


def orders(name: str, rows: list[Cells], loss: str, whole: bool) -> bool:
    """Whether the values of a clock tell the rows apart. Steps may repeat (a resume, several processes)."""
    known = total = repeats = differing = 0
    before: tuple[float, float] | None = None
    for row in rows:
        try:
            value, at = number(row.get(loss)), count(row.get(name))
        except (ValueError, OverflowError):
            continue
        if value is None or math.isnan(value):
            continue
        total += 1
        if at is None:
            continue
        known += 1
        if before is not None and before != (at, value):
            differing += 1
            repeats += before[0] == at
        before = at, value
    if not total:
        return True
    if known < (LEAST_STEPS if whole else LEAST_COARSE) * total:
        return False
    return differing < 2 or repeats < (differing if whole else REPEATING * differing)


def count_or_none(value: Any) -> float | None:
    try:
        return count(value)
    except ValueError:
        return None


def clock_aliases(seen: Counter[str], clock: str | None) -> tuple[str, ...]:
    """Clocks of the same kind in other rows, such as `valid_num_updates` next to `num_updates`."""
    if clock is None:
        return ()
    bare = without_side(clock)
    return tuple(
        name for name in seen
        if name != clock and without_side(name) == bare and names.plain(name) not in ("n/m", "[n]")
    )  # fmt: skip


def run_column(rows: list[Cells], seen: Counter[str]) -> str | None:
    """A column that tells the runs of one table apart."""
    for name in sorted(seen, key=lambda name: names.rank(name, RUN_NAMES)):
        if names.rank(name, RUN_NAMES) == len(RUN_NAMES):
            return None
        values = {str(row[name]) for row in rows if row.get(name) not in (None, "")}
        if 1 < len(values) <= len(rows) / 5:
            return name
    return None


def refuse_table_of_runs(path: Path, rows: list[Cells], seen: Counter[str]) -> None:
    """Raise UserError if each row is a run of its own, as in the results of a sweep."""
    if len(rows) < 2:
        return
    low = {names.plain(name): name for name in seen}

    def varies(name: str) -> bool:
        values = [str(row[name]) for row in rows if row.get(name) not in (None, "")]
        return len(values) > 1 and len(set(values)) > max(1, 0.5 * len(values))

    runs = [name for name in map(low.get, RUN_NAMES) if name and varies(name)]
    runs += [name for name in map(low.get, ("name", "id")) if name and varies(name) and not ascends(rows, name)]
    parameters = [name for plain, name in low.items() if plain.startswith(PARAMETERS)]
    clocks = [name for name in seen if names.role(name) == names.CLOCK and seen[name] and name not in runs]
    ordered = any(ascends(rows, name) for name in clocks)
    marks = sum(mark in low for mark in TABLE_OF_RUNS)
    if not ordered and (runs or any(map(varies, parameters)) or (parameters and marks) or marks > 1):
        shown = ", ".join(([*runs, *parameters] or [low[mark] for mark in TABLE_OF_RUNS if mark in low])[:3])
        raise UserError(f"{path}: looks like a table of runs or trials, not a curve: one row per run ({shown}).")


def ascends(rows: list[Cells], name: str) -> bool:
    """Whether most values of a column are above the one before."""
    values = [count(row.get(name)) for row in rows if filled(row.get(name)) and not isinstance(row.get(name), list)]
    known = [value for value in values if value is not None]
    steps = [later > earlier for earlier, later in itertools.pairwise(known)]
    return len(steps) > 0 and sum(steps) > 0.5 * len(steps)
