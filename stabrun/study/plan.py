"""A study's plan, `study.yaml`: what was asked, and the cells to train, each with a frozen configuration; no Hydra."""

import json
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from stabrun.config import RESULT, Config, UserError, as_known, config_of, differences, marked, run_id
from stabrun.record.jsonl import check_text, checked_text, write_atomic
from stabrun.record.run_dir import RunDir, refuse_newer
from stabrun.record.schema import FORMAT
from stabrun.record.study_dir import StudyDir
from stabrun.record.types import wrong_field
from stabrun.text import run_name

GRID, FRONTIER = "grid", "frontier"
PLAN_LOST = "Restore it, or choose another study_dir."
CELL_KEYS = ("optim.lr", "seed")  # differ between the cells of an arm; any other swept key makes further arms


@dataclass(frozen=True)
class Cell:
    """A planned run: its `run_id`, arm, learning rate and seed."""

    id: str
    arm: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """`qk_norm lr=3e-2 s1`."""
        return run_name(self.arm, self.lr, self.seed)


@dataclass
class Plan:
    """A study. An arm's configuration is complete but for the learning rate and the seed."""

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
        config = at(self.arms[cell.arm], cell.lr, cell.seed)
        return replace(config, tracker=replace(config.tracker, run_name=config.tracker.run_name or cell.name))

    def cells_of(self, arm: str) -> list[Cell]:
        return [cell for cell in self.cells.values() if cell.arm == arm]

    def add(self, arm: str, lr: float, seed: int) -> Cell:
        """Plan a cell, unless it is planned already, and return it."""
        cell = Cell(run_id(at(self.arms[arm], lr, seed)), arm, lr, seed)
        return self.cells.setdefault(cell.id, cell)

    def save(self, directory: Path) -> None:
        facts = {key: value for key, value in vars(self).items() if key not in ("arms", "cells")}
        arms = {arm: asdict(config) for arm, config in self.arms.items()}
        text = yaml.dump({"format": FORMAT, **facts, "arms": arms}, Dumper=yaml.CSafeDumper, sort_keys=False)
        rows = [f"\n- {json.dumps(astuple(cell))}" for cell in self.cells.values()]  # JSON is YAML, and fast to write
        whole = checked_text(f"{text}cells:{''.join(rows) or ' []'}\n")
        write_atomic(StudyDir(directory).plan_file, whole)


def at(config: Config, lr: float, seed: int) -> Config:
    """An arm's configuration at a learning rate and a seed."""
    return replace(config, optim=replace(config.optim, lr=lr), seed=seed)


def load(directory: Path, to_train: bool = False) -> Plan:
    """The plan of a study directory, of this version or another.

    Raises UserError if there is none, if it is damaged or, `to_train`, if a newer version wrote it.
    """
    file = StudyDir(directory).plan_file
    try:
        check_text(file, PLAN_LOST)
        facts = yaml.load(file.read_bytes(), Loader=yaml.CSafeLoader)
        if to_train:
            refuse_newer(file, facts["format"])
        facts["arms"] = {arm: config_of(as_known(values, file, to_train)) for arm, values in facts["arms"].items()}
        cells = [dict(zip(Cell.__dataclass_fields__, row[:4], strict=True)) for row in facts["cells"]]
        known = {item.name: facts[item.name] for item in fields(Plan) if item.name in facts}
        if wrong_field({**known, "arms": {}, "cells": {}}, Plan) or not all(map(is_cell, cells)):
            raise ValueError
        if known["strategy"] not in (GRID, FRONTIER) or not {cell["arm"] for cell in cells} <= known["arms"].keys():
            raise ValueError
        return Plan(**known | {"cells": {cell["id"]: Cell(**cell) for cell in cells}})
    except FileNotFoundError as error:
        raise UserError(f"{directory}: not a study directory: {file.name} is missing.") from error
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: not the plan of a study. {PLAN_LOST}") from error


def is_cell(cell: dict[str, Any]) -> bool:
    return wrong_field(cell, Cell) is None and cell["lr"] > 0


def planned_runs(study: StudyDir) -> list[RunDir]:
    """The finished runs of a study's cells, in the order of the plan. Other directories in `runs/` do not count."""
    return [run for cell in load(study.path).cells if (run := study.run(cell)).metrics.is_file()]


def extended(old: Plan, new: Plan) -> Plan:
    """The union of two plans. Raises UserError if they contradict each other."""
    common = [(_arm_keys(old.arms[arm]), _arm_keys(new.arms[arm])) for arm in old.arms if arm in new.arms]
    if differing := differences((_settings(old), _settings(new)), *common):
        raise UserError(f"the existing study has {differing}. Choose another study_dir.")
    refuse_same(old.arms | new.arms)
    seeds = list(dict.fromkeys([*old.seeds, *new.seeds]))
    return replace(new, arms=old.arms | new.arms, seeds=seeds, cells=old.cells | new.cells)


def refuse_same(arms: dict[str, Config]) -> None:
    """UserError if two arms would have the same runs, which belong to one arm only."""
    seen = dict[str, str]()
    for name, config in arms.items():
        other = seen.setdefault(run_id(at(config, 1.0, 0)), name)
        if other != name:
            raise UserError(f"{other} and {name} are the same configuration; leave one of them out of the study.")


def _settings(plan: Plan) -> dict[str, Any]:
    """The settings that cannot change when a study is extended, except those of its arms."""
    first_seed = {"seed": plan.seeds[0]} if plan.strategy == FRONTIER else {}
    return {"strategy": plan.strategy, "lr_range": plan.lr_range, **first_seed}


def _arm_keys(config: Config) -> dict[str, Any]:
    """The result keys that all cells of an arm have in common."""
    return {key: value for key, value in marked(config, RESULT).items() if key not in CELL_KEYS}
