"""Which files this process opens, as the interpreter tells its audit hooks."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

LISTS = []  # those that are being filled


def hook(event, args):
    if event == "open" and isinstance(args[0], (str, os.PathLike)):
        for found in LISTS:
            found.append(Path(args[0]))


@contextmanager
def opened(folder):
    """Yields a list. At the end of the block it has the files below a folder that were opened in it, in order."""
    found = []
    if not hasattr(hook, "added"):
        hook.added = sys.addaudithook(hook)  # there is no way to remove one
    LISTS.append(found)
    try:
        yield found
    finally:
        LISTS.remove(found)
        found[:] = [path for path in found if path.is_relative_to(folder)]
