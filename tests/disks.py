"""Small disks for tests: tmpfs, which only root can mount."""

import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

PAGE = 4096  # what a file in a tmpfs takes at least


def mount(*words):
    return subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)


class Disk:
    """A mounted tmpfs."""

    def __init__(self, path):
        self.path = path

    def resize(self, size):
        """Change the size, in bytes; what the disk holds stays."""
        self.remount(f"size={size}")

    def remount(self, options):
        done = mount("-o", f"remount,{options}", self.path)
        assert done.returncode == 0, done.stderr

    def used(self):
        return int(
            subprocess.run(["df", "-B1", "--output=used", self.path], capture_output=True, text=True).stdout.split()[1]
        )


@contextmanager
def disk(size):
    """A disk of so many bytes. Skips the test, with the reason, where none can be mounted."""
    with tempfile.TemporaryDirectory() as folder:
        done = mount("-t", "tmpfs", "-o", f"size={size}", "stabrun-test", folder)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted: {done.stderr.strip()}")
        try:
            yield Disk(Path(folder))
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)
