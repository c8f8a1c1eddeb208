"""`stabrun judge`: the verdict on saved records, of a run, of a study, or of anyone's curve."""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from stabrun.config import MistakeError, read_config
from stabrun.observe.against import parted
from stabrun.observe.chart import LEAST_WINDOW
from stabrun.observe.curve import read_curves
from stabrun.observe.record import checked_row, parsed, read_metrics, read_object, worded
from stabrun.observe.verdict import DIVERGED, Judge, Verdict

USAGE = "judge: name one PATH; flags are --json, --follow, --against PATH, --step COLUMN and --loss COLUMN."
POLL = 0.2  # seconds between two looks at a growing file


@dataclass
class Asked:
    """The words of `judge`."""

    path: Path
    as_json: bool = False
    follow: bool = False
    against: Path | None = None
    step: str | None = None
    loss: str | None = None

    @staticmethod
    def parse(words: list[str]) -> "Asked":
        """MistakeError at a flag or number of paths that is not known."""
        paths, flags = list[str](), dict[str, Any]()
        rest = iter(words)
        for word in rest:
            flag, joined, value = word.partition("=")
            if word in ("--json", "--follow"):
                flags["as_json" if flag == "--json" else "follow"] = True
            elif flag in ("--against", "--step", "--loss"):
                given = value if joined else next(rest, "")
                if not given:
                    raise MistakeError(f"{flag}: it needs a value. {USAGE}")
                flags[flag[2:]] = Path(given) if flag == "--against" else given
            elif word.startswith("-"):
                raise MistakeError(f"{word}: no such flag. {USAGE}")
            else:
                paths.append(word)
        if len(paths) != 1:
            raise MistakeError(USAGE)
        return Asked(Path(paths[0]), **flags)


@dataclass
class Saved:
    """One run's rows, read anew each time, and how many steps it was planned for where that is known."""

    name: str
    rows: Callable[[], Iterable[dict[str, Any]]]
    planned: int | None = None
    notes: list[str] = field(default_factory=list)

    def verdict(self) -> Verdict:
        judge = Judge()
        for row in self.rows():
            judge.add(row)
        return judge.conclude(self.planned)


def judge(words: list[str]) -> int:
    """Print the verdict on each run at the path that `words` name; returns the exit status."""
    asked = Asked.parse(words)
    if asked.follow:
        return follow(asked)
    records = read(asked.path, asked)
    if len(records) == 1 and next(iter(records[0].rows()), None) is None:
        raise MistakeError(f"{records[0].name}: metrics.jsonl holds no rows yet, or is no record.")
    told = [tell(record, asked) for record in records]
    if asked.as_json:
        print(json.dumps(told[0] if len(told) == 1 else told, indent=1))
    return 0


def read(path: Path, asked: Asked) -> list[Saved]:
    """The runs at `path`: a run directory, a study's, or a foreign file. MistakeError where it is none of these."""
    if path.is_dir():
        if (path / "metrics.jsonl").is_file():
            return [of_directory(path)]
        runs = sorted(file.parent for file in path.glob("runs/*/metrics.jsonl"))
        if not runs:
            raise MistakeError(f"{path}: it is no run or study directory, for it holds no metrics.jsonl.")
        return [of_directory(run) for run in runs]
    if not path.is_file():
        raise MistakeError(f"{path}: there is no such file, run or study.")
    if path.name == "metrics.jsonl" and (path.parent / "config.yaml").is_file():
        return [of_directory(path.parent)]
    return [Saved(str(path), curve.rows, None, curve.notes) for curve in read_curves(path, asked.step, asked.loss)]


def of_directory(directory: Path) -> Saved:
    file = directory / "metrics.jsonl"
    return Saved(str(directory), lambda: read_metrics(file), planned_steps(directory))


def planned_steps(directory: Path) -> int | None:
    """How many steps a run was planned for; None where its configuration is not beside its record."""
    file = directory / "config.yaml"
    return read_config(file).train.steps if file.is_file() else None


def tell(record: Saved, asked: Asked) -> dict[str, Any]:
    """The verdict on one run as plain data; in words on standard output unless JSON was asked for."""
    verdict = record.verdict()
    facts = {"path": record.name, **worded(asdict(verdict)), "notes": record.notes}
    if asked.against is not None:
        others = read(asked.against, asked)
        if len(others) != 1:
            raise MistakeError(f"--against {asked.against}: it holds {len(others)} runs; name one.")
        facts["against"] = {
            "verdict": others[0].verdict().verdict,
            **parted(list(record.rows()), list(others[0].rows())),
        }
    if not asked.as_json:
        name = "" if asked.path == Path(record.name) else f"{record.name}: "
        print(name + verdict_line(facts))
        for line in details(facts):
            print(f"  {line}")
    return facts


def verdict_line(facts: dict[str, Any]) -> str:
    """`diverged (runaway) at step 83, first in layer_00/qkv; loss 5.93 → best 2.71 → 3.02`."""
    text = f"{facts['verdict']} ({facts['reason']})"
    if facts["first_bad_step"] is not None:
        text += f" at step {facts['first_bad_step']}"
    if facts["first_bad_site"]:
        text += f", first in {facts['first_bad_site']}"
    if facts.get("overfit"):
        text += f", overfits from step {facts['overfit']['step']}"
    losses = [(name, facts[f"{name}_loss"]) for name in ("init", "best", "final")]
    told = [f"{name} {short(float(value))}" for name, value in losses if value is not None]
    return f"{text}; loss {' → '.join(told)}" if told else text


def short(loss: float) -> str:
    return f"{loss:.3f}" if loss == 0 or 0.05 <= abs(loss) < 1e5 or not math.isfinite(loss) else f"{loss:.4g}"


def details(facts: dict[str, Any]) -> Iterator[str]:
    """What stands below the verdict: how far it was seen, scar, spikes, signals, the other run, notes."""
    yield f"seen up to step {facts['horizon']}, by rule {facts['rule']}"
    if len(set(facts["by_strictness"].values())) > 1:
        yield "by strictness: " + ", ".join(f"{name} {verdict}" for name, verdict in facts["by_strictness"].items())
    if facts["certain_step"] is not None:
        yield f"certain from step {facts['certain_step']}"
    if facts["scar"]:
        yield f"scar: the last level lies {short(facts['scar'])} above the lowest"
    if over := facts.get("overfit"):
        rise = f"the validation loss lies {short(over['rise'])} above its lowest, of step {over['best_step']}"
        yield f"overfits: {rise}, while the training loss fell; their gap is {short(facts['val_gap'])}"
    if spikes := facts["spikes"] and facts["spikes"]["list"]:
        step, height = max(spikes, key=lambda spike: spike[1])
        yield f"spikes: {facts['spikes']['count']}, the largest {short(height)} at step {step}"
    if facts["first_bad_step"] is not None:
        for name, signal in sorted(facts["signals"].items(), key=lambda item: item[1]["step"]):
            where = f" in {signal['site']}" if signal["site"] else ""
            lead = signal["lead"]
            when = f"{lead} steps before" if lead > 0 else f"{-lead} steps after" if lead < 0 else "together with"
            yield f"{name} broke away at step {signal['step']}{where}, {when} the loss"
    if other := facts.get("against"):
        yield from compared(other)
    yield from facts["notes"]


def compared(other: dict[str, Any]) -> Iterator[str]:
    yield f"against: {other['steps']} step{'s' * (other['steps'] != 1)} in common; the other run is {other['verdict']}"
    if other["loss_step"] is None and other["steps"] < LEAST_WINDOW:
        yield "these are too few to tell whether the losses part"
    elif other["loss_step"] is None:
        yield "the losses do not part"
    elif other["difference"] is None:
        yield f"the losses part at step {other['loss_step']}, where one is not finite"
    else:
        side = "above" if other["difference"] > 0 else "below"
        far = f"{short(abs(other['difference']))} {side}"
        yield f"the losses part at step {other['loss_step']}; at the end this one is {far}"
    if other["site"]:
        factor, step = other["site_factor"], other["site_step"]
        yield f"the first output norms to part are those of {other['site']} at step {step}, ×{factor:.2f} at the end"


def follow(asked: Asked) -> int:
    """Watch a run that grows: say each alarm once, and end when the run does, or is certain to have diverged."""
    file = asked.path / "metrics.jsonl" if asked.path.is_dir() else asked.path
    if asked.against or asked.step or asked.loss:
        raise MistakeError("--follow goes with --json alone.")
    if asked.path.is_dir() and not (file.is_file() or (asked.path / "config.yaml").is_file()):
        raise MistakeError(f"--follow {asked.path}: it is no run directory.")
    if not asked.path.is_dir() and file.suffix != ".jsonl":
        raise MistakeError(f"--follow {file}: it follows a run directory or a file of JSON lines.")
    planned = planned_steps(asked.path)
    said, fold, look_at = set[str](), Judge(), 0

    def enough() -> bool:
        return over(asked.path, fold, planned)

    status = 0
    try:
        for row in grown(file, enough):
            if row is None:  # the file was cut or replaced
                said, fold, look_at = set(), Judge(), 0
                continue
            fold.add(row)
            if len(fold.losses) >= look_at or fold.over:
                look_at = len(fold.losses) + max(10, len(fold.losses) // 100)
                for what, line in alarmed(fold.conclude()):
                    if what not in said and not asked.as_json:
                        print(line, flush=True)
                    said.add(what)
    except KeyboardInterrupt:
        status = 130
    facts = {"path": str(asked.path), **worded(asdict(fold.conclude(planned))), "notes": []}
    print(json.dumps(facts, indent=1) if asked.as_json else "\n  ".join([verdict_line(facts), *details(facts)]))
    return status


def alarmed(verdict: Verdict) -> Iterator[tuple[str, str]]:
    """The alarms that a verdict holds: what each is about, and a line that says it."""
    for step, height in (verdict.spikes or {"list": []})["list"]:
        yield f"spike {step}", f"step {step}: a spike of {short(height)}"
    for name, signal in verdict.signals.items():
        yield name, f"step {signal['step']}: {name} broke away" + (f" in {signal['site']}" if signal["site"] else "")
    if verdict.reason == "rising":
        yield "rising", f"step {verdict.horizon}: the loss is rising"
    elif verdict.first_bad_step is not None:
        first = f", first in {verdict.first_bad_site}" if verdict.first_bad_site else ""
        yield verdict.verdict, f"step {verdict.first_bad_step}: {verdict.verdict} ({verdict.reason}){first}"
    if verdict.certain_step is not None:
        yield "certain", f"step {verdict.certain_step}: the divergence is certain"


def over(path: Path, fold: Judge, planned: int | None) -> bool:
    """Whether a followed run can say nothing new: it has ended, or is certain to have diverged."""
    if fold.over or fold.certain is not None:
        return fold.verdict().verdict == DIVERGED
    if planned is not None and fold.losses and fold.steps[-1] + 1 >= planned:
        return True
    summary = path / "summary.json"
    return summary.is_file() and read_object(summary).get("status") in ("complete", "stopped")


def grown(file: Path, enough: Callable[[], bool]) -> Iterator[dict[str, Any] | None]:
    """The rows of a growing file, as they are completed; None where it was cut or replaced and begins anew.

    Ends when `enough()` and all that is there has been read.
    """
    handle: IO[bytes] | None = None
    half = b""
    while True:
        if handle is None and file.is_file():
            handle = open(file, "rb")
        piece = handle.readline() if handle else b""
        half += piece
        if half.endswith(b"\n"):
            row, half = parsed(half), b""
            if row is None:
                raise MistakeError(f"{file} is damaged: a line of it is no JSON object.")
            yield checked_row(row, file)
            continue
        if piece:
            continue
        if handle and replaced(handle, file):
            handle.close()
            handle, half = None, b""
            yield None
        elif enough():
            return
        else:
            time.sleep(POLL)


def replaced(handle: IO[bytes], file: Path) -> bool:
    """Whether the open file is no longer the one under its name, or has become shorter than what was read."""
    try:
        now = os.stat(file)
    except FileNotFoundError:
        return True
    here = os.fstat(handle.fileno())
    return (now.st_ino, now.st_dev) != (here.st_ino, here.st_dev) or now.st_size < handle.tell()
