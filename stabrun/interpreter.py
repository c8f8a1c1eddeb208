"""How further processes of this Python are started."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder

SAFE = {"PYTHONSAFEPATH": "1"}


def environment() -> dict[str, str]:
    """What to add to the environment of a Python process, so that it does not import files of the working directory.

    Otherwise a file such as `queue.py` there would be run in place of Python's own module. Empty if stabrun itself was
    imported from the working directory and is not installed.
    """
    path = sys.path if sys.flags.safe_path else sys.path[1:]  # the first entry is the script's or working directory
    return dict(SAFE) if PathFinder.find_spec("stabrun", path) else {}


@contextmanager
def inherited() -> Iterator[None]:
    """Add it to the environment of this process, for processes that are started while the block runs."""
    before = {name: os.environ.get(name) for name in SAFE}
    os.environ.update(environment())
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
