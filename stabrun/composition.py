"""Hydra's composition as plain functions: overrides → a checked `Config`, every mistake a `UserError`."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.core.config_search_path import SearchPathQuery
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
class Sources:
    """Where configuration files are read from: `conf/`, then a directory of the user's; and the primary file's name."""

    config_dir: Path | None = None
    config_name: str = "config"

    def __post_init__(self) -> None:
        if self.config_dir is not None and not self.config_dir.is_dir():
            raise UserError(f"--config-dir {self.config_dir}: no such directory.")


SHIPPED = Sources()


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
def hydra(sources: Sources = SHIPPED) -> Iterator[Any]:
    """Hydra's own application object, initialized to read from `sources`.

    Hydra's public functions take one directory only, and none of them runs a multirun.
    """
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3", job_name="stabrun"):
        application: Any = GlobalHydra.instance().hydra
        if sources.config_dir is not None:
            loader: Any = application.config_loader
            path = loader.get_search_path()
            path.prepend("command-line", f"file://{sources.config_dir.resolve()}", SearchPathQuery(provider="schema"))
            loader.repository.initialize_sources(path)
        yield application


def compose(overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Config:
    """The checked configuration of one run.

    Args:
        overrides: Hydra overrides, such as `["+variant=qk_norm", "optim.lr=3e-2"]`.
        config_dir: a directory with further configuration files, such as `variant/mine.yaml`.

    Raises:
        UserError: an override that cannot be parsed, an unknown key or choice, or a value out of bounds.
    """
    return compose_each([list(overrides)], Sources(Path(config_dir) if config_dir else None))[0]


def compose_each(runs: Iterable[list[str]], sources: Sources = SHIPPED) -> list[Config]:
    """The checked configuration of each run, from its overrides."""
    with plainly(), hydra(sources) as application:
        return [_composed(application, sources.config_name, checked_words(overrides)) for overrides in runs]


def checked_words(overrides: list[str]) -> list[str]:
    """The same overrides. UserError if one is not of the form KEY=VALUE, or names a package to import."""
    for word in overrides:
        if "hydra.searchpath" in word:  # Hydra imports the package that a pkg:// path names
            raise UserError(f"{word}: a search path can name code to run; add a directory with --config-dir DIR.")
        if "=" not in word.lstrip("=~"):
            raise UserError(f"{word}: an override is KEY=VALUE, such as optim.lr=3e-2 or +variant=qk_norm.")
    return overrides


def _composed(application: Any, name: str, overrides: list[str]) -> Config:
    with foreseen(overrides):
        whole = application.compose_config(name, overrides, RunMode.RUN, from_shell=True)
    refuse_code(whole)
    return to_config(whole, whole.hydra)


def multirun(overrides: list[str], sources: Sources, job: Callable[[Config], None]) -> None:
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
        batches = application.multirun(sources.config_name, task, overrides)
        for result in (result.return_value for batch in batches for result in batch):
            if isinstance(result, UserError):
                raise result

    checked_words(overrides)
    with plainly(), hydra(sources) as application, TemporaryDirectory() as scratch:
        # Hydra's note of the sweep goes where nobody looks, for runs keep their own records.
        words = [f"hydra.sweep.dir={scratch}", *overrides, "hydra.mode=MULTIRUN"]
        with foreseen(overrides):
            whole = application.compose_config(sources.config_name, words, RunMode.MULTIRUN, from_shell=True)
        refuse_code(whole)
        here = [word for word in words if not word.lstrip("+~").startswith(("hydra/launcher", "hydra.launcher"))]
        with foreseen(overrides):
            each(checked, here)
        each(called, words)


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
