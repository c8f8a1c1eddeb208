"""The commands that make a study or a run, and its report, again: worked out from the recorded configurations."""

import json
import shlex
from collections.abc import Iterator
from typing import Any

from stabrun.composition import compose
from stabrun.config import RESULT, keys, value_of
from stabrun.report.source import RUN, Source
from stabrun.study.plan import FRONTIER

OWN = "optim.lr", "seed", "variant", "run_dir", "study_dir", "tracker.group", "tracker.run_name"


def commands(source: Source) -> Iterator[str]:
    """A command a line."""
    place = shlex.quote(str(source.directory))
    if source.strategy == RUN:
        yield f"stabrun rerun {place}"
    else:
        yield shlex.join(["stabrun", "sweep", *overrides(source)])
    yield f"stabrun report {place}"


def overrides(source: Source) -> list[str]:
    """Overrides that ask a study's question again: what its arms have in common, and what it varies."""
    assert source.plan is not None
    arms, usual = list(source.arms.values()), compose()
    words = []
    for key in keys():
        if key.path in OWN or key.path.startswith("study."):
            continue
        values = [value_of(config, key.path) for config in arms]
        if all(value == values[0] for value in values):
            wanted = key.mark == RESULT and values[0] != value_of(usual, key.path)
            words += [f"{key.path}={written(values[0])}"] * wanted
        elif varies_within(source, key.path):
            words.append(f"{key.path}={','.join(dict.fromkeys(map(written, values)))}")
    variants = dict.fromkeys(config.variant for config in arms)
    words += [f"study.name={written(source.name)}", f"study.variants=[{','.join(map(quoted, variants))}]"]
    plan = source.plan
    if plan.strategy == FRONTIER:
        words += [f"study.strategy={FRONTIER}", f"study.lr_range={json.dumps(plan.lr_range, separators=(',', ':'))}"]
        words += [f"study.width={plan.width}", f"study.max_runs={plan.max_runs}", f"seed={plan.seeds[0]}"]
        return [word for word in words if not word.startswith(("schedule.kind=", "train.stop_early="))]
    rates = sorted({cell.lr for cell in plan.cells.values()})
    seeds = sorted({cell.seed for cell in plan.cells.values()})
    return [*words, f"study.lrs=[{','.join(map(str, rates))}]", f"seed={','.join(map(str, seeds))}"]


def varies_within(source: Source, path: str) -> bool:
    """Whether arms of one variant differ in this key: then it is a further axis, and no part of the variant."""
    seen: dict[str, Any] = {}
    return any(
        seen.setdefault(config.variant, value_of(config, path)) != value_of(config, path)
        for config in source.arms.values()
    )


def written(value: Any) -> str:
    """A value in Hydra's syntax."""
    return quoted(value) if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def quoted(word: str) -> str:
    plainly = word.replace("_", "").replace("+", "").replace("-", "").replace("/", "").replace(".", "").isalnum()
    return word if plainly else json.dumps(word)
