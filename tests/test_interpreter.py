"""Files of the working directory that have the names of Python's own modules are not run."""

import os
import subprocess
import sys

import pytest
from helpers import TINY

NAMES = "queue", "tokenize", "random", "uuid", "colorsys", "multiprocessing", "numpy", "torch"
WORDS = (*TINY, "train.steps=3", "train.checkpoint_every=0", "train.val_every=0")


@pytest.mark.parametrize("command", [("train", "train.ranks=2"), ("sweep", "study.lrs=[0.1]", "study.seeds=1")])
def test_modules_of_the_working_directory_are_not_imported(tmp_path, command):
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'a').write({name!r})")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "stabrun", *command, *WORDS],  # -P: as the installed command
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "was_run").exists(), (tmp_path / "was_run").read_text()
