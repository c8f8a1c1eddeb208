"""Runs that are killed again and again: each start is a process of its own, which SIGKILL ends at a random moment."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

from stabrun.config import Config
from stabrun.record.run_dir import RunDir
from stabrun.training.run import train

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["stabrun.training.run", "stabrun.composition"])


def start(config: Config, directory: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    train(config, directory)


def starts(directory: Path) -> int:
    return len(RunDir(directory).starts())


def killed(config: Config, directory: Path, kills: int, seconds: float, seed: int) -> tuple[int, int]:
    """Train a run whose first `kills` starts are killed. Returns the kills, and those in a checkpoint.

    A quarter of them are killed within half a second of their start, the others within `seconds` of their first step.
    Fewer kills than asked for: the run was complete before.
    """
    moments, done, in_checkpoint = random.Random(seed), 0, 0
    while done < kills:
        process = CONTEXT.Process(target=start, args=(config, directory))
        before, early = starts(directory), moments.random() < 0.25
        process.start()
        while not early and process.is_alive() and starts(directory) == before:
            time.sleep(0.005)
        process.join(moments.uniform(0, 0.5 if early else seconds))
        if not process.is_alive():
            break
        process.kill()
        process.join()
        if process.exitcode == 0:  # complete just before
            break
        assert process.exitcode == -signal.SIGKILL
        in_checkpoint += (directory / "checkpoints" / "incomplete").exists()
        done += 1
    process = CONTEXT.Process(target=start, args=(config, directory))
    process.start()
    process.join()
    assert process.exitcode == 0
    return done, in_checkpoint
