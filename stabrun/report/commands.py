"""The commands that repeat a study or a run and its report, derived from the recorded configurations."""

import json
import math
import shlex
from collections.abc import Iterator
from statistics import mode
from typing import Any

from stabrun.composition import compose
from stabrun.config import RESULT, Config, keys, value_of
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
        yield shlex.join(["stabrun", "sweep", *overrides(study)])
    yield f"stabrun report {directory}"


def overrides(study: StudyData) -> list[str]:
    """Overrides that plan the same study: what its arms have in common, and what it varies."""
    plan, default = study.plan, compose()
    arms = list(plan.arms.values())
    words, axes = [], dict[str, list[str]]()
    for key in keys():
        if key.path in SET_BY_STUDY or key.path.startswith("study."):
            continue
        values = [value_of(config, key.path) for config in arms]
        if all(value == values[0] for value in values):
            if key.mark == RESULT and values[0] != value_of(default, key.path):
                words.append(f"{key.path}={hydra_text(values[0])}")
        elif varies_within_variant(study, key.path):
            axes[key.path] = list(dict.fromkeys(map(hydra_text, values)))
    entries = list(dict.fromkeys(config.variant for config in arms))
    if len(entries) * math.prod(map(len, axes.values())) == len(arms):
        words += [f"{path}={','.join(values)}" for path, values in axes.items()]
    else:
        usual = {path: mode(hydra_text(value_of(config, path)) for config in arms) for path in axes}
        words += [f"{path}={value}" for path, value in usual.items() if value != hydra_text(value_of(default, path))]
        entries = [entry(config, words, list(axes)) for config in arms]
    words += [f"study.name={hydra_text(plan.name)}", f"study.variants=[{','.join(map(quoted, entries))}]"]
    if plan.strategy == FRONTIER:
        words += [f"study.strategy={FRONTIER}", f"study.lr_range={json.dumps(plan.lr_range, separators=(',', ':'))}"]
        words += [f"study.width={plan.width}", f"study.max_runs={plan.max_runs}", f"seed={plan.seeds[0]}"]
        return [word for word in words if not word.startswith(("schedule.kind=", "train.stop_early="))]
    rates = sorted({cell.lr for cell in plan.cells.values()})
    seeds = sorted({cell.seed for cell in plan.cells.values()})
    return [*words, f"study.lrs=[{','.join(map(str, rates))}]", f"seed={','.join(map(str, seeds))}"]


def entry(config: Config, common: list[str], paths: list[str]) -> str:
    """The entry of `study.variants` of an arm: its variant, and the settings that the variant does not give it."""
    alone = compose([*common, f"+variant=[{config.variant.replace('+', ',')}]"])
    own = ((path, value_of(config, path)) for path in paths if value_of(config, path) != value_of(alone, path))
    return " ".join([config.variant, *(f"{path}={hydra_text(value)}" for path, value in own)])


def varies_within_variant(study: StudyData, path: str) -> bool:
    """Whether arms of one variant differ in this key: it is a further axis then, and not part of the variant."""
    settings = {(config.variant, hydra_text(value_of(config, path))) for config in study.plan.arms.values()}
    return len(settings) > len({variant for variant, _ in settings})


def hydra_text(value: Any) -> str:
    """A value in Hydra's syntax."""
    return quoted(value) if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def quoted(word: str) -> str:
    return word if word.translate(dict.fromkeys(map(ord, "_+-/."))).isalnum() else json.dumps(word)
