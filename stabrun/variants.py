"""The files of variants: what they say about themselves, and the keys that they set. Nothing is composed.

A file begins with `# @package _global_` and a comment `# GROUP: Definition. [source]`.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from stabrun.config import UserError, added_groups, choices, conf_dir

GROUPS = ("placement", "logits", "residual", "optimizer", "architecture")
OTHER = "other"  # of a file that names none of GROUPS
HEADER = re.compile(rf"(?:({'|'.join(GROUPS)}): *)?(.*?) *(?:\[([^\[\]]*)\])?", re.DOTALL)
PACKAGE = re.compile(r"^#\s*@package\s+(\S+)", re.MULTILINE)
SELF = "_self_"  # the file's own keys, in a defaults list
WORD = re.compile(r"[\w.$:/+-]+")  # a text that needs no quotes as the value of an override

Values = dict[str, Any]  # dotted key → value


@dataclass(frozen=True)
class Variant:
    """What the header of a file says. `definition` and `source` may be empty."""

    name: str
    group: str
    definition: str
    source: str

    @property
    def text(self) -> str:
        """`Norm of Q and K after the projection. [2410.16682]`."""
        return f"{self.definition} [{self.source}]".strip() if self.source else self.definition


def variants(config_dir: Path | None = None) -> list[Variant]:
    """The variants of `conf/` and of a user's directory: by group, `baseline` first, then by name."""
    found = [read_header(name, comment) for name, comment in choices("variant", config_dir).items()]
    return sorted(found, key=lambda v: ((*GROUPS, OTHER).index(v.group), v.name != "baseline", v.name))


def read_header(name: str, comment: str) -> Variant:
    """The parts of `GROUP: Definition. [source]`."""
    parts = HEADER.fullmatch(comment)
    assert parts is not None
    return Variant(name, parts[1] or OTHER, parts[2], parts[3] or "")


def directories(config_dir: Path | None) -> list[Path]:
    """Where files are looked for: a user's directory comes before `conf/`."""
    return [path for path in (config_dir, conf_dir()) if path is not None]


def combined(names: Iterable[str], directories: list[Path], decided: Collection[str] = ()) -> Values:
    """The keys that variants set together, and their values.

    `decided`: keys that may be set to different values, because the command line sets them.

    Raises UserError if a name is given twice, or if two of the variants set another key to different values.
    """
    names = list(names)
    title = f"variant={'+'.join(names)}"
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"{title}: {repeated[0]} is given twice; each variant may be given once.")
    return _merged(title, [(name, file_values("variant", name, directories, decided)) for name in names], decided)


def file_values(
    group: str, name: str, directories: list[Path], decided: Collection[str] = (), above: tuple[Path, ...] = ()
) -> Values:
    """The keys that a file of a config group sets, those of the files in its defaults list included.

    Raises UserError if the file is missing or not YAML of keys and values, if its defaults list leads back to itself
    (`above`: the files that include this one), or if two files in that list set a key to different values, unless the
    key is `decided` or the file itself sets it after them.
    """
    places = [directory / group / f"{name}.yaml" for directory in directories if ".." not in Path(group, name).parts]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UserError(f"{group}={name}: no such {group}{f', in the defaults list of {above[-1]}' if above else ''}.")
    if file in above:
        raise UserError(f"{file}: its defaults list leads back to itself.")
    defaults, own = _read(file, group)
    included = list(_included(defaults, group))
    parts = [
        (name, own) if other == SELF else (other, file_values(where, other, directories, decided, (*above, file)))
        for where, other in included
    ]
    return _merged(str(file), parts, {*decided, *(own if included[-1][1] == SELF else ())})


def _read(file: Path, group: str) -> tuple[list[Any], Values]:
    """The defaults list of a file, and its own keys with their values."""
    import yaml

    from stabrun.bounds import LONGEST, refuse_yaml

    with open(file, "rb") as opened:
        raw = opened.read(LONGEST + 1)
    refuse_yaml(raw, str(file))
    try:
        content = yaml.load(raw, Loader=_loader())
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{file}: not YAML that can be read: {' '.join(str(error).split())[:200]}.") from error
    content = {} if content is None else content
    defaults = content.pop("defaults", None) or [] if isinstance(content, dict) else None
    if not isinstance(defaults, list):
        raise UserError(f"{file}: must hold keys and their values, and a list as `defaults`.")
    header = PACKAGE.search(raw.decode(errors="replace"))
    package = header[1] if header else "_global_" if group in added_groups() else group.replace("/", ".")
    return defaults, dict(_flat(content, "" if package == "_global_" else f"{package}."))


def _included(defaults: list[Any], group: str) -> Iterator[tuple[str, str]]:
    """Group and name of each file of a defaults list; SELF twice where the file's own keys come."""
    for entry in defaults if SELF in defaults else [*defaults, SELF]:
        if entry == SELF:
            yield SELF, SELF
        elif isinstance(entry, str):
            where, _, name = entry.rpartition("/")
            yield (where.lstrip("/") if entry.startswith("/") else f"{group}/{where}".rstrip("/")), name
        elif isinstance(entry, dict):
            for key, chosen in entry.items():
                where = str(key).rpartition(" ")[2].partition("@")[0]  # `override /schedule`
                where = where[1:] if where.startswith("/") else f"{group}/{where}"
                yield from ((where, str(name)) for name in (chosen if isinstance(chosen, list) else [chosen]) if name)


def _merged(title: str, parts: list[tuple[str, Values]], decided: Collection[str]) -> Values:
    """The keys of several named parts. Raises UserError, which begins with `title`, as `combined` does."""
    found, by = Values(), dict[str, str]()
    for name, values in parts:
        for key, value in values.items():
            if key in found and found[key] != value and key not in decided:
                raise UserError(
                    f"{title}: {by[key]} sets {typed(key, found[key])} and {name} sets {typed(key, value)}; "
                    f"combine others, or set {key} yourself to choose."
                )
            found[key], by[key] = value, name
    return found


def _flat(node: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@cache
def _loader() -> Any:
    """A loader of YAML that reads 1e-4 as a number, as OmegaConf does."""
    import yaml

    class Loader(yaml.CSafeLoader):
        pass

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))
    return Loader


def typed(key: str, value: Any) -> str:
    """A key and its value as one would type them: `model.layer_scale=0.0001`, `model.attn.soft_cap=null`."""
    plain = isinstance(value, str) and WORD.fullmatch(value)
    return f"{key}={value if plain else json.dumps(value, ensure_ascii=False, default=str)}"
