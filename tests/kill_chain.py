"""Runs that are killed again and again: each start is a process of its own, which SIGKILL ends at a random moment."""

import multiprocessing
import os
import random
import signal
import threading
from pathlib import Path

from stabrun.config import Config
from stabrun.training.run import train

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["stabrun.training.run", "stabrun.composition"])


def start(config: Config, directory: Path, rows: int | None = None, delay: float = 0.0) -> None:
    """Train. With `rows`, SIGKILL ends this process `delay` seconds after so many rows, whatever it does then."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    seen = 0

    def counted(row: object) -> None:
        nonlocal seen
        seen += 1
        if seen == rows:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    train(config, directory, counted)


def killed(config: Config, directory: Path, kills: int, rows: int, seed: int) -> tuple[int, int]:
    """Train a run whose first `kills` starts are killed. Returns the kills, and those in a checkpoint.

    A quarter of them are killed within half a second of their start, the others within 50 ms of one of their first
    `rows` rows: how far each gets depends little on the speed of the machine. Fewer kills than asked for: the run was
    complete before.
    """
    moments, done, in_checkpoint = random.Random(seed), 0, 0
    while done < kills:
        early, row, delay = moments.random() < 0.25, moments.randint(1, rows), moments.uniform(0, 0.05)
        process = CONTEXT.Process(target=start, args=(config, directory, None if early else row, delay))
        process.start()
        process.join(delay * 10 if early else None)
        process.kill()
        process.join()
        if process.exitcode == 0:  # complete before
            break
        assert process.exitcode == -signal.SIGKILL
        in_checkpoint += (directory / "checkpoints" / "incomplete").exists()
        done += 1
    process = CONTEXT.Process(target=start, args=(config, directory))
    process.start()
    process.join()
    assert process.exitcode == 0
    return done, in_checkpoint
