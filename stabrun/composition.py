"""Hydra's composition as functions: overrides → a checked `Config`. Every invalid override raises `UserError`."""

import copy
import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from hydra import initialize_config_dir

# Hydra's help is made from the parser of its own command line, which has no public name.
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stabrun.bounds import refuse_nesting, refuse_yaml
from stabrun.config import Config, UserError, added_groups, check, choices, conf_dir, groups, keys
from stabrun.safety import BASIC_SWEEPER, CheckedFiles, guarded_environment, refuse_code
from stabrun.variants import combined

MOST_RUNS = 100_000
UNUSED: dict[str, Any] = {
    "hydra.run.dir": ".",
    "hydra.sweep.dir": ".",
    "hydra.sweep.subdir": ".",
    "hydra.job.chdir": False,
    "hydra.output_subdir": None,
}
EXTRAS = {
    "submitit_slurm": "slurm", "submitit_local": "slurm", "ray": "ray", "joblib": "plugins", "optuna": "plugins"
}  # fmt: skip


@dataclass(frozen=True)
class Sources:
    """Where configuration files are read from: `conf/` and a directory of the user; name of the primary file."""

    config_dir: Path | None = None
    config_name: str = "config"

    def __post_init__(self) -> None:
        if self.config_dir is not None and not self.config_dir.is_dir():
            raise UserError(f"--config-dir {self.config_dir}: no such directory.")


SHIPPED = Sources()


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn exceptions of Hydra, OmegaConf and YAML into a UserError of one or two sentences.

    What looks like a secret is not read from the environment meanwhile.
    """
    try:
        with guarded_environment():
            yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(sentence(error)) from error


def sentence(error: BaseException) -> str:
    """An exception and its cause in one or two sentences: key, value given, values allowed."""
    if isinstance(error, OverrideParseException):
        return f"{error.override}: must be KEY=VALUE; quote brackets, commas and spaces in a value."
    text = "\n".join(str(e) for e in (error, error.__cause__) if e)
    for pattern, message in MESSAGES:
        if found := re.search(pattern, text):
            return message.format(*found.groups()) if isinstance(message, str) else message(*found.groups())
    lines = [line.strip() for line in text.splitlines()]
    details = ("full_key:", "object_type=", "reference_type=", "See ")
    words = " ".join(dict.fromkeys(line for line in lines if line and not line.startswith(details)))
    key = getattr(error, "full_key", None)
    return words if not key or key in words else f"{key}: {words}"


def no_such_choice(group: str, name: str, options: str = "") -> str:
    if (extra := EXTRAS.get(name)) and group in ("hydra/launcher", "hydra/sweeper"):
        return f"{group}={name}: its package is not installed: pip install 'stabrun[{extra}]'."
    if (first := group.partition("/")[0]) in groups():  # a name may have slashes, too
        group, name = first, f"{group}/{name}".removeprefix(f"{first}/")
    names = options.split() or (list(choices(group)) if group in groups() else [])
    if group != "variant":
        allowed = f"; must be one of {', '.join(names)}" if names else ""
        return f"{group}={name}: no such {group}{allowed}."
    near = difflib.get_close_matches(name, names)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"variant={name}: no such variant; `stabrun variants` lists them, and --config-dir DIR adds your own.{hint}"


def no_such_key(path: str) -> str:
    near = difflib.get_close_matches(path, [k.path for k in keys()], n=1)
    hint = f" Did you mean {near[0]}?" if near else "" if "." in path else f" The groups are {', '.join(groups())}."
    return f"{path}: no such key.{hint}"


MESSAGES: tuple[tuple[str, str | Callable[..., str]], ...] = (
    (r"UserError raised while resolving interpolation: (.*)", "{0}"),
    (r"Could not find '(\S+)/(\S+)'\s+Available options in '\S+':((?:\s+\S+)*?)\s+Config search", no_such_choice),
    (r"Could not load '(\S+)/(\S+)'", no_such_choice),
    (r"Could not override '(\w+)'. No match in the defaults", "{0}=NAME: has no default to replace; use +{0}=NAME."),
    (
        r"Multiple values for variant\.|^variant appears more than once",
        "+variant: is given twice, or by a configuration file too; combine variants as +variant=[A,B].",
    ),
    (r"([\w.]+)(?:'\.|=)[^\n]*\n.*Key '\w+' (?:not|is not) in", no_such_key),
    (r"An item is already at '([\w.]+)'", "{0}: exists already; leave out the + before it."),
    (r"Error merging override (\S+)\n(.*)", "{0}: {1}."),
    (r"Ambiguous value for argument '([^']*)'", "{0}: several values need --multirun (-m)."),
    (r"Cannot find primary config '(\S+)'", "--config-name {0}: no such file in conf/ or in --config-dir."),
)


@contextmanager
def hydra(sources: Sources = SHIPPED) -> Iterator[Any]:
    """Hydra's own application object, initialized to read from `sources`. Its exceptions become UserError.

    Hydra's public functions take one directory only, and none of them runs a multirun.
    """
    ConfigStore.instance().store(name="schema", node=Config)
    with user_errors(), initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3", job_name="stabrun"):
        application: Any = GlobalHydra.instance().hydra
        if sources.config_dir is not None:
            loader: Any = application.config_loader
            path = loader.get_search_path()
            path.prepend("command-line", f"file://{sources.config_dir.resolve()}", SearchPathQuery(provider="schema"))
            loader.repository.initialize_sources(path)
        repository = application.config_loader.repository
        repository.sources = [CheckedFiles.instead_of(source) for source in repository.sources]
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
    with hydra(sources) as application:
        return [to_config(composed(application, sources, overrides)) for overrides in runs]


def composed(
    application: Any, sources: Sources, overrides: list[str], mode: RunMode = RunMode.RUN, own: Sequence[str] = ()
) -> DictConfig:
    """The composed configuration including Hydra's part, checked for code and for keys without effect.

    `own` are further overrides that stabrun sets.
    """
    refuse_words(overrides, sources)
    primary = application.config_loader.repository.load_config(sources.config_name)
    if primary is not None and OmegaConf.select(primary.config, "hydra.searchpath") is not None:
        raise UserError(f"{sources.config_name}.yaml: hydra.searchpath can name code to run; use --config-dir DIR.")
    with as_user_error(overrides):
        whole: DictConfig = application.compose_config(sources.config_name, [*overrides, *own], mode, from_shell=True)
    refuse_code(whole, [*overrides, *own])
    refuse_unused(whole, own)
    return whole


def shown(overrides: list[str], sources: Sources, kind: str, package: str | None, resolve: bool) -> str:
    """The composed configuration as YAML, as Hydra's --cfg prints it: `kind` is job, hydra or all."""
    with hydra(sources) as application:
        whole = composed(application, sources, overrides)
        HydraConfig.instance().set_config(whole)
        node: Any = copy.deepcopy(whole)
        node.variant = to_config(whole).variant
        OmegaConf.set_readonly(node.hydra, None)
        node = application.get_sanitized_cfg(node, kind)
        if package not in (None, "_global_"):
            node = OmegaConf.select(node, package)
        if node is None:
            raise UserError(f"--package {package}: no such part of the configuration.")
        if not OmegaConf.is_config(node):
            return f"{node}\n"
        if resolve:
            OmegaConf.resolve(node)
        return (f"# @package {package}\n" if package else "") + OmegaConf.to_yaml(node)


def information(overrides: list[str], sources: Sources, info: str | None) -> str:
    """What Hydra's --info prints, or its --hydra-help if `info` is None."""
    with hydra(sources) as application, redirect_stdout(StringIO()) as printed:
        composed(application, sources, overrides)
        if info:
            application.show_info(info, config_name=sources.config_name, overrides=overrides)
        else:
            parser = get_args_parser()
            application.hydra_help(sources.config_name, args_parser=parser, args=parser.parse_args(overrides))
    return printed.getvalue()


def multirun(overrides: list[str], sources: Sources, job: Callable[[Config], float]) -> None:
    """Hydra's multirun: its sweeper and launcher call `job` with the configuration of each run.

    With Hydra's basic sweeper all runs are composed and checked before the first starts, and a run that is refused
    afterwards does not stop the others. Other sweepers choose the runs one by one and minimize what `job` returns.
    """

    def checked(task_config: DictConfig) -> UserError | None:
        return outcome(task_config, lambda config: None)

    def called(task_config: DictConfig) -> UserError | float:
        return outcome(task_config, job)

    def outcome(task_config: DictConfig, do: Callable[[Config], Any]) -> Any:
        try:
            with user_errors():
                config = to_config(task_config, HydraConfig.get())
            return do(config)
        except UserError as error:
            if not basic:
                raise
            return error

    def each(task: Callable[[DictConfig], Any], words: list[str]) -> None:
        batches = application.multirun(sources.config_name, task, words)
        results = [result.return_value for batch in batches or () for result in batch]
        for result in results:
            if isinstance(result, UserError):
                raise result
        if basic and not results:
            raise UserError(f"{' '.join(overrides)}: no run matches; list the values, such as seed=0,1.")

    with hydra(sources) as application, TemporaryDirectory() as scratch:
        # Hydra writes one file per job of a sweep; runs keep their own records.
        own = [f"hydra.sweep.dir={scratch}", "hydra.mode=MULTIRUN"]
        whole = composed(application, sources, overrides, RunMode.MULTIRUN, own)
        basic = whole.hydra.sweeper._target_ == BASIC_SWEEPER
        if basic:
            parsed(overrides, globs=True)
            launcher = ("hydra/launcher", "hydra.launcher")
            with as_user_error(overrides):
                each(checked, [word for word in [*overrides, *own] if not word.lstrip("+~").startswith(launcher)])
        each(called, [*overrides, *own])
        for results in Path(scratch).glob("optimization_results.yaml"):  # written by the sweepers that optimize
            print(results.read_text(), end="")


def parsed(overrides: list[str], globs: bool) -> list[Override]:
    """The overrides as Hydra parses them; it has no public function for this.

    Raises UserError at a sweep over an interval or, unless `globs`, over a pattern of names: neither lists its values.
    Also at more than MOST_RUNS.
    """
    runs = 1
    for text in overrides:
        refuse_nesting(text)
    words = OverridesParser.create().parse_overrides(overrides)
    for word in words:
        if word.is_interval_sweep() or (word.value_type == ValueType.GLOB_CHOICE_SWEEP and not globs):
            raise UserError(
                f"{word.input_line}: list the values, separated by commas; to search for the highest "
                "stable learning rate, use `stabrun sweep` with study.strategy=frontier."
            )
        if word.is_discrete_sweep() and word.value_type != ValueType.GLOB_CHOICE_SWEEP:
            runs *= sum(1 for _ in itertools.islice(word.sweep_string_iterator(), MOST_RUNS + 1))
            if runs > MOST_RUNS:
                raise UserError(f"{word.input_line}: asks for more than {MOST_RUNS:,} runs.")
    return words


@contextmanager
def as_user_error(overrides: list[str]) -> Iterator[None]:
    """Hydra raises built-in exceptions at some invalid overrides: turn them into a UserError."""
    try:
        yield
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{' '.join(overrides)}: invalid combination of overrides ({error}).") from error
    except RecursionError as error:  # values and overrides are never nested that deep: see safety.py
        raise UserError(f"{' '.join(overrides)}: a defaults list names its own file, or one that names it.") from error


def to_config(whole: DictConfig, facts: Any = None) -> Config:
    """A composed configuration as checked objects of the schema. `facts` is Hydra's part if `whole` lacks it."""
    facts = facts or whole.hydra
    words = [_chosen(word) for word in facts.overrides.task]
    chosen = [name for group, names in words if group == "variant" for name in names]
    whole = copy.copy(whole)
    OmegaConf.set_struct(whole, False)
    whole.pop("hydra", None)
    known = {k.path for k in keys()}
    for path in _leaves(OmegaConf.to_container(whole, resolve=True)):
        if path not in known:
            raise UserError(no_such_key(path))
    config: Any = OmegaConf.to_object(whole)
    if chosen:
        config.variant = "+".join(chosen)
        sources = [Path(source.path) for source in facts.runtime.config_sources if source.schema == "file"]
        combined(chosen, sources, {word.lstrip("+").partition("=")[0] for word in facts.overrides.task})
    check(config)
    return config


def refuse_words(overrides: list[str], sources: Sources) -> None:
    """UserError at an override that is not KEY=VALUE, names code to import, or chooses a file that Hydra misreads."""
    for word in overrides:
        refuse_nesting(word)
        if "hydra.searchpath" in word:  # Hydra imports the package that a pkg:// path names
            raise UserError(f"{word}: a search path can name code to run; add a directory with --config-dir DIR.")
        if "=" not in word.lstrip("=~"):
            raise UserError(f"{word}: must be KEY=VALUE, such as optim.lr=3e-2 or +variant=qk_norm.")
        if (key := word.lstrip("+~").partition("=")[0]) in UNUSED:
            raise UserError(no_effect(key))
        group, names = _chosen(word)
        for file in (sources.config_dir / group / f"{name}.yaml" for name in names) if sources.config_dir else ():
            if file.is_file():
                refuse_file(file, group in added_groups())


def refuse_file(file: Path, whole: bool) -> None:
    """UserError if Hydra would not read the header of a file, or if a header is missing that it needs."""
    text = file.read_text(errors="replace")
    if text.startswith("\ufeff"):
        raise UserError(f"{file}: starts with a byte-order mark; save it as UTF-8 without one.")
    if whole and not re.search(r"^#\s*@package\s+_global_", text, re.MULTILINE):
        raise UserError(f"{file}: the line `# @package _global_` is missing at its top.")


def refuse_unused(whole: DictConfig, own: Sequence[str]) -> None:
    """UserError at keys of Hydra that have no effect, because runs and studies choose their own directories."""
    ours = [word.partition("=")[0] for word in own]
    for path, usual in UNUSED.items():
        value = OmegaConf.select(whole, path, throw_on_missing=False)
        if path not in ours and value not in (usual, None):
            raise UserError(no_effect(path))


def no_effect(path: str) -> str:
    return f"{path}: has no effect; use run_dir=DIR for a run and study_dir=DIR for a study."


def override(config: Config, words: Sequence[str]) -> Config:
    """A recorded configuration with other values of single keys, checked.

    A choice of a group that sets one key, such as `tracker=none`, is that key. Raises UserError at anything else but
    KEY=VALUE: what is recorded has no groups to choose from.
    """
    known, node = {k.path for k in keys()}, OmegaConf.structured(config)
    for word in map(as_key, words):
        path, assigned, value = word.partition("=")
        if not assigned or path.lstrip("+~") in groups():
            raise UserError(f"{word}: a recorded configuration accepts single keys, such as optim.lr=3e-2, not groups.")
        if path not in known:
            raise UserError(no_such_key(path))
        refuse_yaml(value.encode(errors="replace"), path)
        try:
            node.merge_with_dotlist([word])
        except OmegaConfBaseException as error:
            raise UserError(f"{word}: {sentence(error)}.") from error
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"{word}: cannot be parsed; quote brackets, commas and spaces.") from error
    with user_errors():
        changed: Any = OmegaConf.to_object(node)
    check(changed)
    result: Config = changed
    return result


def as_key(word: str) -> str:
    """`tracker.name=none` of `tracker=none`, if the file of this choice sets one key; else the word itself."""
    group, _, choice = word.partition("=")
    if group in groups() and choice in choices(group):
        text = (conf_dir() / group / f"{choice}.yaml").read_text()
        values = yaml.safe_load(text)
        if isinstance(values, dict) and len(values) == 1 and "@package" not in text:
            ((key, value),) = values.items()
            return f"{group}.{key}={value}"
    return word


def _chosen(override: str) -> tuple[str, list[str]]:
    """Group and names of `+variant=NAME` or `+variant=[A,B]`."""
    found = re.fullmatch(r"\+{0,2}(\w+)=\[?([^\]]*)\]?", override)
    names = (name.strip(" '\"") for name in found[2].split(",")) if found else ()
    return (found[1] if found else ""), [name for name in names if name]


def _leaves(node: Any, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
