"""stabrun: how high can the learning rate go before a language model diverges?

The Python API is imported when it is first used, so that `import stabrun` is quick. See docs/api.md.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stabrun.version import __version__ as __version__

if TYPE_CHECKING:
    from stabrun.api import Run, Study, judge, load_run, load_study, train
    from stabrun.composition import compose
    from stabrun.config import Config, UserError
    from stabrun.watching.watch import watch

__all__ = ["Config", "Run", "Study", "UserError", "compose", "judge", "load_run", "load_study", "train", "watch"]

MODULES = {
    "Config": "stabrun.config",
    "UserError": "stabrun.config",
    "compose": "stabrun.composition",
    "watch": "stabrun.watching.watch",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'stabrun' has no attribute {name!r}")
    return getattr(import_module(MODULES.get(name, "stabrun.api")), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
