"""Hydra's composition as plain functions: overrides → a checked `Config`, every mistake a `MistakeError`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stabrun.config import Config, MistakeError, check

OWN_CODE = ("hydra._internal.", "hydra_plugins.")


@dataclass(frozen=True)
class Words:
    """A command's words: Hydra overrides and the few flags that stand beside them."""

    overrides: list[str]
    multirun: bool = False
    show: bool = False

    @staticmethod
    def parse(words: list[str]) -> "Words":
        """MistakeError at a flag that is not known."""
        overrides, multirun, show = [], False, False
        rest = iter(words)
        for word in rest:
            if word in ("-m", "--multirun"):
                multirun = True
            elif word in ("-c", "--cfg"):
                show = True
            elif word == "--config-dir" or word.startswith("--config-dir="):
                folder = Path(word.partition("=")[2] or next(rest, ""))
                if not folder.is_dir():
                    raise MistakeError(f"--config-dir {folder}: there is no such folder.")
                overrides.append(f"hydra.searchpath=[file://{folder.resolve()}]")
            elif word.startswith("-"):
                raise MistakeError(f"{word}: no such flag here; there are -m, --cfg and --config-dir DIR.")
            elif "=" not in word and not word.startswith("~"):
                raise MistakeError(
                    f"{word}: an override is KEY=VALUE, such as optim.lr=3e-2 or +variant=qk_norm."
                )
            else:
                overrides.append(word)
        return Words(overrides, multirun, show)


@contextmanager
def plainly() -> Iterator[None]:
    """Turn what Hydra, OmegaConf and YAML raise into a MistakeError of a sentence or two."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise MistakeError(sentence(error)) from error


def sentence(error: BaseException) -> str:
    """The error's own words and its cause's, on one line, without the internals."""
    texts = [str(error)] + ([str(error.__cause__)] if error.__cause__ else [])
    lines = [line.strip() for text in texts for line in text.splitlines()]
    drop = ("full_key:", "object_type=", "reference_type=", "See https", "1. To", "2. To", "3. To", "'", '"')
    kept = [line for line in lines if line and not line.startswith(drop)]
    if "Ambiguous value" in kept[0]:
        return f"{kept[0].rstrip(':')}. A list of values to run one after the other needs -m."
    return " ".join(dict.fromkeys(kept))


@contextmanager
def hydra(conf: Path) -> Iterator[None]:
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(config_dir=str(conf), version_base="1.3", job_name="stabrun"):
        yield


def composed(conf: Path, words: Words) -> Config:
    """The checked configuration of one run."""
    with plainly(), hydra(conf):
        whole = compose("config", words.overrides, return_hydra_config=True)
        refuse_code(whole)
        return to_config(whole)


def multirun(conf: Path, words: Words, job: Callable[[Config], None]) -> None:
    """Hydra's own multirun: its sweeper and launcher call `job` with the configuration of each run."""

    def task(task_config: DictConfig) -> None:
        with plainly():
            config = to_config(task_config, HydraConfig.get().runtime.choices)
        job(config)

    with plainly(), hydra(conf):
        overrides = [*words.overrides, "hydra.mode=MULTIRUN"]
        inner: Any = GlobalHydra.instance().hydra
        refuse_code(inner.compose_config("config", overrides, "MULTIRUN", from_shell=True))
        inner.multirun("config", task, overrides)


def to_config(whole: DictConfig, choices: Any = None) -> Config:
    """A composed configuration as the schema's own objects, with the variant's name, checked."""
    chosen = (whole.hydra.runtime.choices if choices is None else choices).get("variant")
    OmegaConf.set_struct(whole, False)
    whole.pop("hydra", None)
    config: Any = OmegaConf.to_object(whole)
    if chosen:
        config.variant = chosen if isinstance(chosen, str) else "+".join(chosen)
    check(config)
    return config


def refuse_code(whole: DictConfig) -> None:
    """MistakeError where a configuration names code for Hydra to run: callbacks, foreign targets or factories."""
    node = OmegaConf.to_container(whole.hydra, resolve=False)
    assert isinstance(node, dict)
    if node.get("callbacks"):
        raise MistakeError("hydra.callbacks: it names code to run, which stabrun refuses; remove it.")
    for path, value in _targets(node, "hydra"):
        if not str(value).startswith(OWN_CODE):
            raise MistakeError(
                f"{path}={value}: it names code to run; only Hydra's own launchers are allowed."
            )


def _targets(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in items:
        if name in ("_target_", "()", "class"):
            yield f"{path}.{name}", value
        yield from _targets(value, f"{path}.{name}")
