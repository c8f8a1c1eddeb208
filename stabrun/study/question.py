"""What a sweep's overrides ask for: the plan of a study and where it goes, in Hydra's own syntax."""

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from stabrun.composition import MOST_RUNS, SHIPPED, Sources, as_key, compose_each, parsed, user_errors
from stabrun.config import RESULT, Config, StudyConfig, UserError, check, hashed, keys, value_of
from stabrun.study.plan import CELL_KEYS, FRONTIER, GRID, Plan, at, refuse_same

EITHER = {"+variant": "study.variants", "optim.lr": "study.lrs", "seed": "study.seeds"}  # ways to give the same


def planned(overrides: list[str], sources: Sources = SHIPPED) -> tuple[Plan, Path, Config]:
    """The plan that the overrides ask for, its directory, and the configuration that its arms have in common.

    Raises UserError, before anything is created, if the overrides are invalid.
    """
    fixed, axes = split_axes(overrides)
    _refuse_conflicts(fixed, axes)
    (common,) = compose_each([fixed], sources)
    study = common.study
    if common.run_dir is not None or "run_dir" in axes:
        raise UserError("run_dir: has no effect in a study; use study_dir=DIR.")
    variants = axes.pop("+variant", None) or [" ".join(entry.split()) for entry in study.variants] or [common.variant]
    if "" in variants:
        raise UserError("study.variants: an entry is empty; give the name of a variant.")
    rates = [_number("optim.lr", value) for value in axes.pop("optim.lr", [])] or list(study.lrs)
    seeds = [_whole_number("seed", value) for value in axes.pop("seed", [])]
    seeds = seeds or list(range(common.seed, common.seed + study.seeds))
    _refuse_duplicates({"study.variants": variants, "study.lrs": rates, "seed": seeds, **axes})
    _refuse_rates(study, rates)
    _refuse_settings(variants, axes)
    runs = len(variants) * (len(rates) or 1) * len(seeds) * math.prod(map(len, axes.values()))
    if runs > MOST_RUNS:
        raise UserError(f"the study would have {runs:,} runs; at most {MOST_RUNS:,} are possible.")
    arm_overrides = dict(_arms(fixed, variants, axes))
    arms = dict(zip(arm_overrides, compose_each(arm_overrides.values(), sources), strict=True))
    if sources.config_dir or any("${" in word for word in overrides):  # stabrun's own files have no interpolations
        _refuse_interpolations(arms, arm_overrides, sources)
    if study.strategy == FRONTIER:
        _refuse_schedules([*fixed, *(word for entry in variants for word in entry.split()[1:])], axes)
        common, arms = for_search(common), {name: for_search(arm) for name, arm in arms.items()}
    refuse_same(arms)
    directory = Path(common.study_dir or f"studies/{study.name}-{identity(common, axes)}")
    arms = {name: in_group(arm, directory.resolve().name) for name, arm in arms.items()}
    plan = Plan(study.name, study.strategy, arms, list(study.lr_range), seeds, study.width, study.max_runs)
    last_seed = max(seeds) if study.strategy == GRID else seeds[0] + study.max_runs - 1
    for arm, rate, seed in itertools.product(arms.values(), rates or study.lr_range, {min(seeds), last_seed}):
        check(at(arm, rate, seed))
    for name, rate, seed in itertools.product(arms, rates, seeds):  # a search has no rates yet
        plan.add(name, rate, seed)
    return plan, directory, common


def _refuse_conflicts(fixed: list[str], axes: dict[str, list[str]]) -> None:
    """Raise UserError if two overrides say what to train, or an axis makes no other runs."""
    given = dict(word.partition("=")[::2] for word in fixed) | {key: ",".join(values) for key, values in axes.items()}
    for one, other in EITHER.items():
        if one in axes and other in given:
            raise UserError(f"{one}={given[one]} and {other}={given[other]} both say what to train; give one of them.")
    for key in axes:
        if key != "run_dir":
            _refuse_axis(key, f"{key}={given[key]}")


def _refuse_axis(key: str, word: str) -> None:
    """Raise UserError if a key cannot make arms."""
    if key.startswith("hydra"):
        raise UserError(f"{word}: all workers use one launcher; give one value.")
    if any(item.path == key and item.mark != RESULT for item in keys()):
        raise UserError(f"{word}: does not change what is computed; all its runs would be the same.")


def _refuse_settings(entries: Iterable[str], axes: dict[str, list[str]]) -> None:
    """Raise UserError if the settings of an entry of `study.variants` are not those of a single arm."""
    swept = {key.lstrip("+~") for key in axes}
    for entry in entries:
        for word in entry.split()[1:]:
            key, equals, _ = word.partition("=")
            if not equals:
                raise UserError(f"study.variants={entry}: {word} is not KEY=VALUE.")
            name = as_key(word.lstrip("+~")).partition("=")[0]
            if name in CELL_KEYS or name.split(".")[0] in ("variant", "study", "experiment", "hydra"):
                raise UserError(f"study.variants={entry}: {key} cannot be set for a single arm.")
            if swept & {name, key.lstrip("+~")}:
                raise UserError(f"study.variants={entry}: {key} is swept as well; give one of them.")
            if split_axes([word])[1]:
                raise UserError(f"study.variants={entry}: {key} takes one value; each entry makes one arm.")
            _refuse_axis(name, f"study.variants={entry}: {word}")


def _refuse_interpolations(arms: dict[str, Config], overrides: dict[str, list[str]], sources: Sources) -> None:
    """Raise UserError if a value depends on the learning rate or the seed, which differ between the cells of an arm."""
    others = [at(arm, arm.optim.lr / 2, arm.seed + 1) for arm in arms.values()]
    words = [
        [*own, f"optim.lr={o.optim.lr}", f"seed={o.seed}"] for own, o in zip(overrides.values(), others, strict=True)
    ]
    for found, expected in zip(compose_each(words, sources), others, strict=True):
        for key in keys():
            value = value_of(found, key.path)
            if value != value_of(expected, key.path):
                raise UserError(
                    f"{key.path}: depends on the learning rate or the seed. A study has one value for all runs of an "
                    "arm; `stabrun train -m` has one for each run."
                )


def _refuse_duplicates(values_by_key: dict[str, list[Any]]) -> None:
    for key, values in values_by_key.items():
        if repeated := [str(value) for value, count in Counter(values).items() if count > 1]:
            raise UserError(f"{key}: {', '.join(repeated)} is given twice; each value may be given once.")


def _refuse_rates(study: StudyConfig, rates: list[float]) -> None:
    """Raise UserError if the learning rates do not fit the strategy."""
    if study.strategy == GRID and not rates:
        raise UserError("study.lrs=[]: a grid needs learning rates, such as study.lrs=[1e-2,3e-2,1e-1].")
    if study.strategy == FRONTIER:
        if rates:
            raise UserError("study.lrs: a search chooses its own learning rates; use study.lr_range=[LOW,HIGH].")
        if len(study.lr_range) != 2 or not 0 < study.lr_range[0] < study.lr_range[1]:
            raise UserError(
                f"study.lr_range={study.lr_range}: must be two learning rates, the lower first, such as [1e-3,1]."
            )


def _refuse_schedules(fixed: list[str], axes: dict[str, list[str]]) -> None:
    """Raise UserError if a search is given another schedule than a constant learning rate."""
    given = [word.partition("=")[::2] for word in fixed] + [(key, ",".join(values)) for key, values in axes.items()]
    for key, value in given:
        if key.lstrip("+") in ("schedule", "schedule.kind") and value != "constant":
            raise UserError(
                f"{key}={value}: a search keeps the learning rate constant after warmup, because a decaying "
                "schedule hides divergence in the middle of a run. Omit it, or run a grid."
            )


def for_search(config: Config) -> Config:
    """The configuration with a constant learning rate after warmup, that stops once a divergence is certain."""
    schedule = replace(config.schedule, kind="constant")
    return replace(config, schedule=schedule, train=replace(config.train, stop_early=True))


def in_group(config: Config, group: str) -> Config:
    """The configuration with this W&B group, unless it names another."""
    return replace(config, tracker=replace(config.tracker, group=config.tracker.group or group))


def _arms(fixed: list[str], entries: Iterable[str], axes: dict[str, list[str]]) -> Iterator[tuple[str, list[str]]]:
    """Name and overrides of each arm: a variant with its own settings, and one value of each further axis."""
    for entry, *values in itertools.product(entries, *axes.values()):
        variant, *settings = entry.split()
        settings += [f"{key}={value}" for key, value in zip(axes, values, strict=True)]
        yield (
            " ".join([variant, *map(short_name, settings)]),
            [*fixed, f"+variant=[{variant.replace('+', ',')}]", *settings],
        )


def short_name(setting: str) -> str:
    """`n_layer=2` of `model.n_layer=2`: the shortest end of the key that no other key has."""
    key, _, value = setting.partition("=")
    parts = key.lstrip("+").split(".")
    ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
    alone = (end for end in ends if sum(f".{item.path}".endswith(f".{end}") for item in keys()) < 2)
    return f"{next(alone, ends[-1])}={value}"


def split_axes(overrides: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The overrides with one value, and the values of each key that is swept.

    `+variant` and the learning rate are always axes. `+variant=[A,B]` is one variant of two parts, as for
    `stabrun train`.
    """
    with user_errors():
        words = parsed(overrides, globs=False)
    fixed, axes = list[str](), dict[str, list[str]]()
    swept = dict[str, str]()  # key → the override that sweeps it, after which there may be no other
    for override in words:
        key, word = override.get_key_element(), str(override.input_line)
        name = key.lstrip("+~")
        if name in swept:
            raise UserError(f"{swept[name]} and {word}: give one of them.")
        if override.is_sweep_override():
            swept[name] = word
            axes[key] = list(override.sweep_string_iterator())
        elif key == "+variant":
            value: Any = override.value()
            name = "+".join(map(str, value)) if isinstance(value, list) else str(value)
            axes.setdefault(key, []).append(name)
        else:
            fixed.append(word)
            if key == "optim.lr":
                axes[key] = [str(override.value())]
    return fixed, axes


def _whole_number(key: str, value: str) -> int:
    number = _number(key, value)
    if not number.is_integer():
        raise UserError(f"{key}={value}: must be a whole number.")
    return int(number)


def _number(key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise UserError(f"{key}={value}: must be a number.") from error


def identity(common: Config, axes: dict[str, list[str]]) -> str:
    """Eight hexadecimal digits that a study keeps when it grows: a hash of what its arms have in common."""
    facts = {key: value for key, value in hashed(common).items() if key not in (*CELL_KEYS, *axes)}
    text = json.dumps([common.study.strategy, facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
