"""Faults of a disk: which file they concern, and what the user can do about them."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SPACE = "Make space there"
REMEDIES = {
    errno.ENOSPC: SPACE,
    errno.EDQUOT: SPACE,
    errno.EFBIG: "Raise the limit on the size of files",
    errno.EROFS: "Make it writable",
    errno.EIO: "Check the disk",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file in an OSError of the block: Python does so when a file is opened, not when it is written."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def as_os_error(error: Exception, path: Path) -> OSError:
    """The OSError of an error of a library in another language, which has its number in its text at most."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number:
        return OSError(int(number[1]), os.strerror(int(number[1])), str(path))
    return OSError(errno.EIO, str(error), str(path))


def sentence(error: OSError) -> str:
    """What went wrong with which file."""
    return f"{error.filename or 'disk'}: {error.strerror or error}."


def advice(error: OSError) -> str:
    """That, and what to do if the disk is at fault."""
    remedy = REMEDIES.get(error.errno or 0)
    return f"{sentence(error)} {remedy}, then run the same command again." if remedy else sentence(error)
