"""What can be typed as an override: groups, keys and values, from `conf/` and the schema, without importing Hydra."""

import re
from collections.abc import Iterator
from pathlib import Path

from stabrun.config import added_groups, choices, groups, keys
from stabrun.variants import variants

Candidate = tuple[str, str]  # a completed word, and a description

COMMON = (
    "optim.lr", "seed", "train.steps", "train.batch_size", "train.micro_batch_size", "train.precision", "train.device",
    "schedule.warmup_steps", "data.path",
)  # fmt: skip
COMMON_OF_STUDY = (
    "study.variants", "study.lrs", "study.seeds", "study.strategy", "study.lr_range", "study.workers", "study.gpu",
    "study.mfu", "study_dir",
)  # fmt: skip


def complete(word: str, config_dir: Path | None = None, only: str | None = None) -> Iterator[Candidate]:
    """Completions of a partial override.

    Args:
        word: what has been typed of it, such as `+variant=qk` or `optim.`.
        config_dir: a directory with further configuration files.
        only: offer only keys with this prefix (may be empty), and no groups.
    """
    name, equals, value = word.partition("=")
    if equals:
        head = re.match(r"(.*[\[,+])?", value)  # `[a,b`, `a,b` and `[a+b` complete the last item
        done = f"{name}={head[0] if head else ''}"
        known = values(name, config_dir) if only is None else key_values(name)
        yield from ((done + item, text) for item, text in known if (done + item).startswith(word))
        return
    added = added_groups() if only is None else []
    if only is None:
        for group in groups():
            spelled = f"+{group}=" if group in added else f"{group}="
            if spelled.startswith(word):
                yield spelled, "config group"
    yield from ((path, text) for path, text in next_segments(word, only or "") if path.rstrip("=") not in added)


def values(name: str, config_dir: Path | None) -> list[Candidate]:
    """The values of a group or a key."""
    group = name.removeprefix("+")
    if group in ("variant", "study.variants"):
        return [(variant.name, variant.text) for variant in variants(config_dir)]
    return list(choices(group, config_dir).items()) if group in groups() else key_values(name)


def key_values(path: str) -> list[Candidate]:
    """The values of a key that has few: an enumeration or a boolean."""
    return [(value, "") for key in keys() if key.path == path for value in key.values()]


def next_segments(word: str, only: str) -> Iterator[Candidate]:
    """The keys that continue `word`, up to their next dot."""
    sections = set[str]()
    for key in keys():
        if not key.path.startswith(word) or not key.path.startswith(only):
            continue
        rest, dot, _ = key.path[len(word) :].partition(".")
        segment = word + rest + dot
        if not dot:
            yield f"{key.path}=", key.doc
        elif segment not in sections:
            sections.add(segment)
            yield segment, "section"
