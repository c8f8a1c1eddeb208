"""How further processes of this Python are started."""

import sys
from importlib.machinery import PathFinder

SAFE = {"PYTHONSAFEPATH": "1"}


def environment() -> dict[str, str]:
    """What to add to the environment of a Python process, so that it does not import files of the working directory.

    Otherwise a file such as `queue.py` there would be run in place of Python's own module. Empty if stabrun itself was
    imported from the working directory and is not installed.
    """
    path = sys.path if sys.flags.safe_path else sys.path[1:]  # the first entry is the script's or working directory
    return dict(SAFE) if PathFinder.find_spec("stabrun", path) else {}
