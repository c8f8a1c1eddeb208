"""The commands that repeat a study or a run and its report, derived from the recorded configurations."""

import json
import math
import shlex
from collections.abc import Iterable, Iterator
from contextlib import suppress
from statistics import mode
from typing import Any

from stabrun.composition import compose, compose_each
from stabrun.config import RESULT, Config, UserError, keys, value_of
from stabrun.report.study_data import RUN, StudyData
from stabrun.study.plan import FRONTIER

SET_BY_STUDY = "optim.lr", "seed", "variant", "run_dir", "study_dir", "tracker.group", "tracker.run_name"


def commands(study: StudyData) -> Iterator[str]:
    """One command per line."""
    directory = shlex.quote(str(study.directory))
    if study.plan.strategy == RUN:
        if not study.watched:
            yield f"stabrun rerun {directory}"
    else:
        with suppress(UserError):  # a variant of --config-dir, which the record does not hold
            yield shlex.join(["stabrun", "sweep", *overrides(study)])
    yield f"stabrun report {directory}"


def overrides(study: StudyData) -> list[str]:
    """Overrides that plan the same study: what its arms have in common, and what it varies."""
    plan, arms = study.plan, list(study.plan.arms.values())
    paths = [key.path for key in keys() if key.mark == RESULT and key.path not in SET_BY_STUDY]
    common = {path: values[0] for path in paths if len(set(values := texts(arms, path))) == 1}
    entries = list(dict.fromkeys(config.variant for config in arms))
    default = compose()
    given = composed(entries, changes(common, default))
    varied = [path for path in paths if path not in common and differs(arms, given, path)]
    axes = {path: list(dict.fromkeys(texts(arms, path))) for path in varied}
    if len(entries) * math.prod(map(len, axes.values())) == len(arms):
        words = [*changes(common, default), *(f"{path}={','.join(values)}" for path, values in axes.items())]
    else:
        common |= {path: mode(texts(arms, path)) for path in varied}
        words = changes(common, default)
        given = composed(entries, words)
        entries = [entry(config, varied, given[config.variant]) for config in arms]
    words += [f"study.name={hydra_text(plan.name)}", f"study.variants=[{','.join(map(quoted, entries))}]"]
    if plan.strategy == FRONTIER:
        words += [f"study.strategy={FRONTIER}", f"study.lr_range={json.dumps(plan.lr_range, separators=(',', ':'))}"]
        words += [f"study.width={plan.width}", f"study.max_runs={plan.max_runs}", f"seed={plan.seeds[0]}"]
        return [word for word in words if not word.startswith(("schedule.kind=", "train.stop_early="))]
    rates = sorted({cell.lr for cell in plan.cells.values()})
    seeds = sorted({cell.seed for cell in plan.cells.values()})
    return [*words, f"study.lrs=[{','.join(map(str, rates))}]", f"seed={','.join(map(str, seeds))}"]


def texts(arms: Iterable[Config], path: str) -> list[str]:
    return [hydra_text(value_of(config, path)) for config in arms]


def composed(variants: list[str], words: list[str]) -> dict[str, Config]:
    """Variant → its configuration with these overrides."""
    runs = [[*words, f"+variant=[{variant.replace('+', ',')}]"] for variant in variants]
    return dict(zip(variants, compose_each(runs), strict=True))


def changes(common: dict[str, str], default: Config) -> list[str]:
    """The words of what differs from the defaults."""
    return [f"{path}={text}" for path, text in common.items() if [text] != texts([default], path)]


def differs(arms: list[Config], given: dict[str, Config], path: str) -> bool:
    """Whether a key of an arm differs from what its variant gives it, beside what all arms have in common."""
    return any(value_of(config, path) != value_of(given[config.variant], path) for config in arms)


def entry(config: Config, paths: list[str], given: Config) -> str:
    """The entry of `study.variants` of an arm: its variant, and the settings that the variant does not give it."""
    own = [f"{path}={text}" for path in paths if [text := texts([config], path)[0]] != texts([given], path)]
    return " ".join([config.variant, *own])


def hydra_text(value: Any) -> str:
    """A value in Hydra's syntax; 25.0 as 25, as people type it."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e6:
        value = int(value)
    return quoted(value) if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def quoted(word: str) -> str:
    return word if word.translate(dict.fromkeys(map(ord, "_+-/."))).isalnum() else json.dumps(word)
