"""Hydra's composition as plain functions: overrides → a checked `Config`, every mistake a `UserError`."""

import difflib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stabrun.config import Config, UserError, check, conf_dir, keys

SHELL = ("hydra.launcher.setup", "hydra.launcher.srun_args", "hydra.launcher.ray.init.runtime_env")
OWN_CODE = ("hydra._internal.", "hydra_plugins.")
EXTRAS = {"submitit_slurm": "slurm", "submitit_local": "slurm", "ray": "ray"}  # launcher → what brings it


@dataclass(frozen=True)
class Words:
    """A command's words: Hydra overrides and the few flags that stand beside them."""

    overrides: list[str]
    multirun: bool = False
    show: bool = False

    @staticmethod
    def parse(words: list[str], flags: tuple[str, ...] = ("-m", "--cfg", "--config-dir DIR")) -> "Words":
        """UserError at a flag that is not among `flags`."""
        overrides, multirun, show = [], False, False
        rest = iter(words)
        for word in rest:
            flag = {"--multirun": "-m", "-c": "--cfg"}.get(word, word.partition("=")[0])
            if flag.startswith("-") and flag not in (known.split()[0] for known in flags):
                there = f"there are {' and '.join(flags)}" if flags else "this command has none"
                raise UserError(f"{word}: no such flag here; {there}.")
            if flag == "-m":
                multirun = True
            elif flag == "--cfg":
                show = True
            elif flag == "--config-dir":
                folder = Path(word.partition("=")[2] or next(rest, ""))
                if not folder.name or not folder.is_dir():
                    raise UserError(f"--config-dir {folder}: there is no such folder.")
                overrides.append(f"hydra.searchpath=[file://{folder.resolve()}]")
            elif "hydra.searchpath" in word:  # Hydra imports the package that a pkg:// path names
                raise UserError(f"{word}: search paths can name code to run; a folder is added by --config-dir DIR.")
            elif "=" not in word.lstrip("=~"):
                raise UserError(f"{word}: an override is KEY=VALUE, such as optim.lr=3e-2 or +variant=qk_norm.")
            else:
                overrides.append(word)
        return Words(overrides, multirun, show)


@contextmanager
def plainly() -> Iterator[None]:
    """Turn what Hydra, OmegaConf and YAML raise into a UserError of a sentence or two."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(sentence(error)) from error


def sentence(error: BaseException) -> str:
    """An error of Hydra's and its cause in a sentence or two: the key, what was given, what is allowed."""
    if isinstance(error, OverrideParseException):
        return f"{error.override}: it is no override that can be read; quote brackets, commas and spaces."
    text = "\n".join(str(e) for e in (error, error.__cause__) if e)
    for pattern, say in SENTENCES:
        if found := re.search(pattern, text):
            return say(*found.groups())
    lines = [line.strip() for line in text.splitlines()]
    kept = [
        line for line in lines if line and not line.startswith(("full_key:", "object_type=", "reference_type=", "See "))
    ]
    return " ".join(dict.fromkeys(kept))


def no_such_choice(group: str, name: str, options: str) -> str:
    if group == "hydra/launcher" and name in EXTRAS:
        return f"{group}={name}: its package is not installed; pip install 'stabrun[{EXTRAS[name]}]' brings it."
    return f"{group}={name}: there is no such {group}; it is one of {', '.join(options.split())}."


def no_such_file(group: str, name: str) -> str:
    return f"{group}={name}: there is no such {group}."


def no_such_key(path: str) -> str:
    near = difflib.get_close_matches(path, [k.path for k in keys()], n=1)
    hint = f" Did you mean {near[0]}?" if near else "" if "." in path else f" The groups are {', '.join(groups())}."
    return f"{path}: there is no such key." + hint


def groups() -> list[str]:
    """The folders of `conf/`: the groups that a file is chosen from."""
    return sorted(item.name for item in conf_dir().iterdir() if item.is_dir())


def needs_plus(group: str) -> str:
    return f"{group}=…: it is added to the defaults, so that it is spelled +{group}=NAME."


def not_new(path: str) -> str:
    return f"{path}: the key is there already; leave out the + before it."


def wrong_type(given: str, why: str) -> str:
    return f"{given}: {why}."


def many_values(given: str) -> str:
    return f"{given}: several values need -m, which runs one after the other."


SENTENCES: tuple[tuple[str, Callable[..., str]], ...] = (
    (r"Could not find '(\S+)/(\S+)'\s+Available options in '\S+':((?:\s+\S+)*?)\s+Config search", no_such_choice),
    (r"Could not load '(\S+)/(\S+)'", no_such_file),
    (r"Could not override '(variant|check)'", needs_plus),
    (
        r"([\w.]+)(?:'\.|=)[^\n]*\n.*Key '\w+' (?:not|is not) in",
        no_such_key,
    ),
    (r"An item is already at '([\w.]+)'", not_new),
    (r"Error merging override (\S+)\n(.*)", wrong_type),
    (r"Ambiguous value for argument '([^']*)'", many_values),
)


@contextmanager
def hydra(conf: Path) -> Iterator[None]:
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(config_dir=str(conf), version_base="1.3", job_name="stabrun"):
        yield


def composed(conf: Path, words: Words) -> Config:
    """The checked configuration of one run."""
    return composed_each(conf, [words.overrides])[0]


def composed_each(conf: Path, runs: list[list[str]]) -> list[Config]:
    """The checked configuration of each run, from its overrides."""
    with plainly(), hydra(conf):
        return [_composed(overrides) for overrides in runs]


def _composed(overrides: list[str]) -> Config:
    with foreseen(overrides):
        whole = the_hydra().compose_config("config", overrides, RunMode.RUN, from_shell=True)
    refuse_code(whole)
    return to_config(whole, whole.hydra)


def multirun(conf: Path, words: Words, job: Callable[[Config], None]) -> None:
    """Hydra's own multirun: its sweeper and launcher call `job` with the configuration of each run.

    All are composed and checked before the first is run; one whose run is refused afterwards does not stop the rest.
    """

    def checked(task_config: DictConfig) -> Config | UserError:
        try:
            with plainly():
                return to_config(task_config, HydraConfig.get())
        except UserError as error:
            return error

    def called(task_config: DictConfig) -> UserError | None:
        try:
            job(to_config(task_config, HydraConfig.get()))
        except UserError as error:
            return error
        return None

    def each(task: Callable[[DictConfig], Any], overrides: list[str]) -> None:
        batches = the_hydra().multirun("config", task, overrides)
        for result in (result.return_value for batch in batches for result in batch):
            if isinstance(result, UserError):
                raise result

    with plainly(), hydra(conf), TemporaryDirectory() as scratch:
        # Hydra's note of the sweep goes where nobody looks, for runs keep their own records.
        overrides = [f"hydra.sweep.dir={scratch}", *words.overrides, "hydra.mode=MULTIRUN"]
        with foreseen(words.overrides):
            whole = the_hydra().compose_config("config", overrides, RunMode.MULTIRUN, from_shell=True)
        refuse_code(whole)
        here = [word for word in overrides if not word.lstrip("+~").startswith(("hydra/launcher", "hydra.launcher"))]
        with foreseen(words.overrides):
            each(checked, here)
        each(called, overrides)


def the_hydra() -> Any:
    return GlobalHydra.instance().hydra


@contextmanager
def foreseen(overrides: list[str]) -> Iterator[None]:
    """Hydra meets overrides that it did not foresee with a bare exception: a UserError."""
    try:
        yield
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{' '.join(overrides)}: these overrides do not go together ({error}).") from error


def to_config(whole: DictConfig, facts: Any) -> Config:
    """A composed configuration as the schema's own objects, with the variant's name from Hydra's `facts`, checked."""
    chosen = [name for word in facts.overrides.task for name in _variants(word)]
    OmegaConf.set_struct(whole, False)
    whole.pop("hydra", None)
    known = {k.path for k in keys()}
    for path in _leaves(OmegaConf.to_container(whole, resolve=True)):
        if path not in known:
            raise UserError(no_such_key(path))
    config: Any = OmegaConf.to_object(whole)
    if chosen:
        config.variant = "+".join(chosen)
    check(config)
    return config


def refuse_code(whole: DictConfig) -> None:
    """UserError where a configuration names code to run: callbacks, foreign targets or factories, shell commands.

    A cluster may need the latter: they are allowed where they are typed, and not where a file has them.
    """
    node = OmegaConf.to_container(whole.hydra, resolve=False)
    assert isinstance(node, dict)
    typed = [word.lstrip("+~").partition("=")[0] for word in node["overrides"]["hydra"]]
    for path in SHELL:
        if OmegaConf.select(whole, path) and not any(word.startswith(path) for word in typed):
            raise UserError(f"{path}: it names code to run, which a file may not; give it on the command line.")
    if node.get("callbacks"):
        raise UserError("hydra.callbacks: it names code to run, which stabrun refuses; remove it.")
    for path, value in _targets(node, "hydra"):
        if not str(value).startswith(OWN_CODE):
            raise UserError(f"{path}={value}: it names code to run; only Hydra's own launchers are allowed.")


def _variants(override: str) -> list[str]:
    """The names in `+variant=NAME` or `+variant=[A,B]`."""
    found = re.fullmatch(r"\+{0,2}variant=\[?([^\]]*)\]?", override)
    return found[1].replace(" ", "").split(",") if found else []


def _leaves(node: Any, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _targets(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in items:
        if name in ("_target_", "()", "class"):
            yield f"{path}.{name}", value
        yield from _targets(value, f"{path}.{name}")
