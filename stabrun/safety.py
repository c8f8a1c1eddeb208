"""What a configuration from outside may not contain: code to run, and secrets of the environment."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_store import ConfigLoadError, ConfigStore
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from stabrun.bounds import LONGEST, refuse_yaml
from stabrun.config import UserError
from stabrun.text import PASSWORD, SECRET

TYPED_ONLY = (
    "hydra.job.env_set",
    "hydra.launcher.setup",
    "hydra.launcher.srun_args",
    "hydra.launcher.ray.init.runtime_env",
    "hydra.sweeper.custom_search_space",
    "hydra.sweeper.storage",
)  # may name code to run
PLACES = ("hydra.launcher.submitit_folder", "hydra.launcher.temp_folder")  # where launchers write
USUAL_PLACES = (None, "${hydra.sweep.dir}/.submitit/%j")
TARGETS = ("_target_", "()", "class")  # of Hydra, and of the standard library's logging
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
OF_HYDRA = re.compile(r"\$\{(?:hydra[.:]|now:)[\w.:%/-]*\}")  # interpolations of Hydra's own part, which is checked


class CheckedFiles(FileConfigSource):
    """Hydra's reader of a directory, which refuses files outside of it and files that `refuse_yaml` refuses."""

    @classmethod
    def instead_of(cls, source: Any) -> Any:
        return cls(source.provider, source.path) if source.scheme() == "file" else source

    def load_config(self, config_path: str) -> ConfigResult:
        if os.path.normpath(config_path).startswith(("..", "/")):
            raise UserError(f"{config_path}: leaves the directory of configuration files.")
        file = Path(self.path) / self._normalize_file_name(config_path)
        with open(file, "rb") as opened:
            refuse_yaml(opened.read(LONGEST + 1), str(file))
        return super().load_config(config_path)


@contextmanager
def guarded_environment() -> Iterator[None]:
    """`${oc.env:NAME}` does not give what looks like a secret: a configuration is recorded, shown and uploaded."""
    OmegaConf.register_new_resolver("oc.env", not_secret, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def not_secret(name: str, *default: Any) -> Any:
    """The value of an environment variable, as `oc.env` gives it. UserError if it looks like a secret."""
    if SECRET.search(str(name)) or PASSWORD.search(os.environ.get(str(name), "")):
        raise UserError(f"oc.env:{name}: looks like a secret, which no configuration may contain.")
    return oc.env(name, *default)


def refuse_code(whole: DictConfig, given: Sequence[str]) -> None:
    """UserError if a configuration names code to run: callbacks, targets, factories or shell commands.

    Shell commands for a cluster, and a sweeper of an installed plugin, are allowed if they are `given` as overrides.
    """
    node = OmegaConf.to_container(whole.hydra, resolve=False)
    assert isinstance(node, dict)
    for name in ("launcher", "sweeper"):
        if not isinstance(node.get(name), dict):
            raise UserError(f"hydra.{name}={node.get(name)}: must be chosen by hydra/{name}=NAME.")
    if sorted([*node["overrides"]["hydra"], *node["overrides"]["task"]]) != sorted(given):
        raise UserError("hydra.overrides: can name code to run; give overrides on the command line.")
    if node["job"]["env_copy"]:
        raise UserError("hydra.job.env_copy: would write environment variables to files; jobs inherit them anyway.")
    typed = [word.lstrip("+~").partition("=")[0] for word in node["overrides"]["hydra"]]
    for path in TYPED_ONLY:
        if OmegaConf.select(whole, path) and not any(word.startswith(path) for word in typed):
            raise UserError(f"{path}: names code to run, which is allowed on the command line only.")
    if node.get("callbacks"):
        raise UserError("hydra.callbacks: names code to run, which is not allowed.")
    for name in ("params", "search_space"):  # further overrides of each job, which is composed after this check
        for key in node["sweeper"].get(name) or ():
            if str(key).lstrip("+~").startswith("hydra"):
                raise UserError(f"hydra.sweeper.{name}: {key} can name code to run; give it on the command line.")
    declared = set(_plugin_targets(node["runtime"]["choices"]))
    for path, name, value in _values(node, "hydra"):
        if name in TARGETS and not ((path, value) in declared and _may_be_chosen(path, value, typed)):
            raise UserError(f"{path}={value}: names code to run; only installed Hydra plugins are allowed.")
        if path in PLACES and value not in USUAL_PLACES and path not in typed:
            raise UserError(f"{path}={value}: names a directory, which is allowed on the command line only.")
        if path.startswith(("hydra.overrides", "hydra.job.override_dirname")) or not isinstance(value, str):
            continue
        if "ext://" in value or _inserts(whole, path, value):
            raise UserError(f"{path}={value}: can name code to run, which is not allowed.")


def _may_be_chosen(path: str, target: str, typed: list[str]) -> bool:
    """Whether a plugin may be used: a launcher that any file chooses, and a sweeper that the command line does."""
    return path == "hydra.launcher._target_" or target == BASIC_SWEEPER or "hydra/sweeper" in typed


def _inserts(whole: DictConfig, path: str, value: str) -> bool:
    """Whether an interpolation may insert more than a text or a number: values that are not checked here."""
    if "${" not in OF_HYDRA.sub("", value):
        return False
    try:
        found = OmegaConf.select(whole, path)
    except OmegaConfBaseException:
        return True  # it may resolve later, in a job
    return not isinstance(found, str | int | float | None)


def _plugin_targets(chosen: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """The targets that installed plugins declare for the chosen groups of Hydra."""
    for group, choice in chosen.items():
        with suppress(ConfigLoadError):
            node = ConfigStore.instance().load(f"{group}/{choice}.yaml").node
            for path, name, value in _values(OmegaConf.to_container(node, resolve=False), group.replace("/", ".")):
                if name in TARGETS:
                    yield path, value


def _values(node: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Path, name and value of everything in a container."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in items:
        inner = f"{path}[{name}]" if isinstance(node, list) else f"{path}.{name}"
        yield inner, name, value
        yield from _values(value, inner)
