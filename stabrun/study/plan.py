"""A study's plan: the question that was asked, and the cells that answer it, each with a frozen configuration."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from stabrun.composition import SHIPPED, Sources, compose_each, plainly, refuse_unlisted
from stabrun.config import RESULT, Config, UserError, as_known, check, config_of, differences, hashed, marked, run_id
from stabrun.record.jsonl import write_atomic
from stabrun.record.run_dir import refuse_newer
from stabrun.record.schema import FORMAT
from stabrun.record.study_dir import StudyDir
from stabrun.text import run_name

GRID, FRONTIER = "grid", "frontier"
OWN_AXES = ("optim.lr", "seed")  # axes of every study; any other key that sweeps makes arms of its own


@dataclass(frozen=True)
class Cell:
    """A planned run: its `run_id`, the arm that it belongs to, learning rate and seed."""

    id: str
    arm: str
    lr: float
    seed: int


@dataclass
class Plan:
    """A study. An arm is a variant at one setting of the further axes; its configuration lacks only rate and seed."""

    name: str
    strategy: str
    arms: dict[str, Config]
    lr_range: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    width: float = 0.25
    max_runs: int = 40
    cells: dict[str, Cell] = field(default_factory=dict)

    def config(self, cell: Cell) -> Config:
        """The frozen configuration of a cell."""
        config = with_rate(self.arms[cell.arm], cell.lr, cell.seed)
        name = config.tracker.run_name or run_name(cell.arm, cell.lr, cell.seed)
        return replace(config, tracker=replace(config.tracker, run_name=name))

    def add(self, arm: str, lr: float, seed: int) -> Cell:
        """The cell at this place, planned now if it was not."""
        cell = Cell(run_id(with_rate(self.arms[arm], lr, seed)), arm, lr, seed)
        return self.cells.setdefault(cell.id, cell)

    def save(self, directory: Path) -> None:
        facts = {key: value for key, value in vars(self).items() if key not in ("arms", "cells")}
        arms = {arm: asdict(config) for arm, config in self.arms.items()}
        cells = [[cell.id, cell.arm, cell.lr, cell.seed] for cell in self.cells.values()]
        text = yaml.dump({"format": FORMAT, **facts, "arms": arms}, Dumper=yaml.CSafeDumper, sort_keys=False)
        rows = "".join(f"- {json.dumps(row)}\n" for row in cells)  # a flow sequence a line: YAML, and quick
        write_atomic(StudyDir(directory).plan_file, f"{text}cells:\n{rows}" if cells else f"{text}cells: []\n")


def with_rate(config: Config, lr: float, seed: int) -> Config:
    return replace(config, optim=replace(config.optim, lr=lr), seed=seed)


class Latest:
    """The plan of a study that may grow; its file is read again only when it has changed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stamp: tuple[int, int] | None = None
        self.known: Plan | None = None

    def plan(self) -> Plan:
        facts = StudyDir(self.directory).plan_file.stat()
        stamp = facts.st_mtime_ns, facts.st_ino
        if self.known is None or stamp != self.stamp:
            self.known, self.stamp = load(self.directory), stamp
        return self.known


def tokens_of(config: Config) -> int:
    """Tokens of a whole run."""
    return config.train.steps * config.train.batch_size * config.data.seq_len


def load(directory: Path, to_train: bool = False) -> Plan:
    """The plan of a study directory, of this version or another.

    Raises UserError if there is none, if it is damaged or, `to_train`, if a newer version wrote it.
    """
    file = StudyDir(directory).plan_file
    try:
        facts = yaml.load(file.read_bytes(), Loader=yaml.CSafeLoader)
        if to_train:
            refuse_newer(file, facts["format"])
        facts["arms"] = {arm: config_of(as_known(values, file, to_train)) for arm, values in facts["arms"].items()}
        facts["cells"] = {row[0]: Cell(*row[:4]) for row in facts["cells"]}
        return Plan(**{item.name: facts[item.name] for item in fields(Plan) if item.name in facts})
    except FileNotFoundError as error:
        raise UserError(f"{directory}: not a study: {file.name} is missing.") from error
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is damaged: not the plan of a study.") from error


def planned(overrides: list[str], sources: Sources = SHIPPED) -> tuple[Plan, Path, Config]:
    """The plan that a command's overrides ask for, where it goes, and the configuration that its arms have in common.

    Raises UserError at a question that cannot be asked, before anything is made.
    """
    fixed, axes = split_axes(overrides)
    (common,) = compose_each([fixed], sources)
    study = common.study
    variants = axes.pop("+variant", None) or study.variants or [common.variant]
    rates = [_number("optim.lr", value) for value in axes.pop("optim.lr", [])] or list(study.lrs)
    seeds = [int(_number("seed", value)) for value in axes.pop("seed", [])]
    seeds = seeds or list(range(common.seed, common.seed + study.seeds))
    named: list[tuple[str, Sequence[Any]]] = [("study.variants", variants), ("study.lrs", rates), ("seed", seeds)]
    for key, values in [*named, *axes.items()]:
        if twice := [str(value) for value, count in Counter(values).items() if count > 1]:
            raise UserError(f"{key}: {', '.join(twice)} is there twice; each may be named once.")
    _refuse_unasked(study, rates)
    words = dict(_arms(fixed, variants, axes))
    arms = dict(zip(words, compose_each(words.values(), sources), strict=True))
    if study.strategy == FRONTIER:
        _refuse_schedules(fixed, axes)
        common, arms = for_search(common), {name: for_search(arm) for name, arm in arms.items()}
    directory = Path(common.study_dir or f"studies/{study.name}-{identity(common, axes)}")
    arms = {name: in_group(arm, directory.resolve().name) for name, arm in arms.items()}
    plan = Plan(study.name, study.strategy, arms, list(study.lr_range), seeds, study.width, study.max_runs)
    tried = rates if study.strategy == GRID else study.lr_range
    last_seed = max(seeds) if study.strategy == GRID else seeds[0] + study.max_runs - 1
    for arm, rate in itertools.product(arms.values(), tried):
        for seed in {min(seeds), last_seed}:
            check(with_rate(arm, rate, seed))
    if study.strategy == GRID:
        for name, rate, seed in itertools.product(arms, rates, seeds):
            plan.add(name, rate, seed)
    return plan, directory, common


def _refuse_unasked(study: Any, rates: list[float]) -> None:
    if study.strategy == GRID and not rates:
        raise UserError("study.lrs=[]: a grid needs learning rates, such as study.lrs=[1e-2,3e-2,1e-1].")
    if study.strategy == FRONTIER:
        if rates:
            raise UserError("study.lrs: a search chooses its own learning rates; it takes study.lr_range=[LOW,HIGH].")
        if len(study.lr_range) != 2 or not 0 < study.lr_range[0] < study.lr_range[1]:
            raise UserError(
                f"study.lr_range={study.lr_range}: it must be two learning rates, the lower first, such as [1e-3,1]."
            )


def _refuse_schedules(fixed: list[str], axes: dict[str, list[str]]) -> None:
    """UserError where a search is to hold its learning rate, and is told otherwise."""
    said = [word.partition("=")[::2] for word in fixed] + [(key, ",".join(values)) for key, values in axes.items()]
    for key, value in said:
        if key in ("schedule", "schedule.kind") and value != "constant":
            raise UserError(
                f"{key}={value}: a search holds the learning rate after the warm-up, for a schedule that falls hides "
                "at its end what broke in the middle; leave it out, or run a grid."
            )


def for_search(config: Config) -> Config:
    """The configuration with a constant rate after the warm-up, and an end where a divergence is certain."""
    schedule = replace(config.schedule, kind="constant")
    return replace(config, schedule=schedule, train=replace(config.train, stop_early=True))


def in_group(config: Config, group: str) -> Config:
    """The configuration of a run that W&B shows in this group, unless it names another."""
    return replace(config, tracker=replace(config.tracker, group=config.tracker.group or group))


def _arms(fixed: list[str], variants: Iterable[str], axes: dict[str, list[str]]) -> Iterator[tuple[str, list[str]]]:
    """Name → overrides of each arm: a variant, and a value of each further axis."""
    for variant, *values in itertools.product(variants, *axes.values()):
        settings = [f"{key}={value}" for key, value in zip(axes, values, strict=True)]
        names = [setting.rsplit(".", 1)[-1].lstrip("+") for setting in settings]
        yield " ".join([variant, *names]), [*fixed, f"+variant=[{variant.replace('+', ',')}]", *settings]


def split_axes(overrides: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The overrides of one value, and key → values of each that sweeps, in Hydra's own syntax."""
    with plainly():
        refuse_unlisted(overrides, globs=False)
        parsed = OverridesParser.create().parse_overrides(overrides)
    axes = {word.get_key_element(): list(word.sweep_string_iterator()) for word in parsed if word.is_sweep_override()}
    single = [
        str(word.input_line) for word in parsed if not word.is_sweep_override() and word.get_key_element() != "+variant"
    ]
    alone = {"+variant": [_joined(word.value()) for word in parsed if word.get_key_element() == "+variant"]}
    return single, axes | ({} if "+variant" in axes or not alone["+variant"] else alone)


def _joined(value: Any) -> str:
    """`[A,B]` is one variant of two parts, as it is for `stabrun train`."""
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise UserError(f"{key}={value}: it must be a number.") from error


def identity(common: Config, axes: dict[str, list[str]]) -> str:
    """Eight hexadecimal digits that a study keeps when it grows: of all that its arms have in common."""
    facts = {key: value for key, value in hashed(common).items() if key not in (*OWN_AXES, *axes)}
    text = json.dumps([common.study.strategy, facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def extended(old: Plan, new: Plan) -> Plan:
    """What was asked before and what is asked now, as one study. UserError where they contradict each other."""
    arms = [(_result(old.arms[arm]), _result(new.arms[arm])) for arm in old.arms if arm in new.arms]
    if differing := differences((_question(old), _question(new)), *arms):
        raise UserError(f"the study there has {differing}; name another study_dir.")
    seeds = list(dict.fromkeys([*old.seeds, *new.seeds]))
    return replace(new, arms=old.arms | new.arms, seeds=seeds, cells=old.cells | new.cells)


def _question(plan: Plan) -> dict[str, Any]:
    """What one study has one value of, its arms aside."""
    first_seed = {"seed": plan.seeds[0]} if plan.strategy == FRONTIER else {}
    return {"strategy": plan.strategy, "lr_range": plan.lr_range, **first_seed}


def _result(config: Config) -> dict[str, Any]:
    return {key: value for key, value in marked(config, RESULT).items() if key not in OWN_AXES}
