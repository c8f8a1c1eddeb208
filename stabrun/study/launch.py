"""Workers by Hydra's launchers: it starts jobs and waits.

`python -m stabrun.study.launch DIR CREW FIRST JOBS CONFIG_DIR CONFIG_NAME OVERRIDE…`; CONFIG_DIR may be empty.
A job is one worker. Only a batch of jobs is the launcher's; what becomes of the cells stands in the ledger.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from stabrun.composition import Sources, composed, hydra, plainly
from stabrun.config import UserError
from stabrun.study.ledger import Ledger
from stabrun.study.plan import split_axes
from stabrun.study.pool import LauncherPool, LocalPool, WorkerPool, stop_file, those_of, threads_each

POLL = 0.5  # seconds between two looks whether the sweep is over
BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


def crew_of(overrides: list[str], sources: Sources, directory: Path, count: int) -> WorkerPool:
    """The crew that a sweep's overrides ask for. UserError where the launcher cannot be had; nothing is made yet."""
    words, axes = split_axes(overrides)
    if swept := [key for key in axes if key.startswith("hydra")]:
        raise UserError(f"{swept[0]}={','.join(axes[swept[0]])}: all workers of a sweep are launched alike; give one.")
    with plainly(), hydra(sources) as application:
        launcher = with_launcher(application, sources, words, directory).hydra.launcher
    if launcher._target_ == BASIC:
        return LocalPool(directory, count)
    for key in ("nodes", "tasks_per_node"):
        if launcher.get(key, 1) != 1:
            raise UserError(f"hydra.launcher.{key}={launcher[key]}: a job is one worker; study.workers counts them.")
    return LauncherPool(directory, count, [str(sources.config_dir or ""), sources.config_name, *words])


def with_launcher(application: Any, sources: Sources, words: list[str], folder: Path) -> DictConfig:
    """The whole configuration, Hydra's own part included; what its launcher writes goes to `folder`."""
    quoted = str(folder.absolute()).replace("\\", r"\\").replace("'", r"\'")
    own = [f"hydra.sweep.dir='{quoted}'", "hydra.mode=MULTIRUN"]
    whole = composed(application, sources, words, RunMode.MULTIRUN, own)
    join_ray(whole.hydra.launcher)
    return whole


def join_ray(launcher: DictConfig) -> None:
    """Let Ray's launcher join a cluster: by itself it names a size of memory, which only a new cluster may be given."""
    init = OmegaConf.select(launcher, "ray.init")
    if init is not None and (init.get("address") or os.environ.get("RAY_ADDRESS")):
        with open_dict(init):
            init.setdefault("object_store_memory", None)


def launch(directory: Path, crew: str, first: int, jobs: int, sources: Sources, words: list[str]) -> None:
    """Launch so many workers of a crew, numbered from `first` on, and wait for them. Raises what one of them raised."""
    folder = directory / "launcher" / crew
    threading.Thread(target=end_with_the_sweep, args=(directory, crew, folder), daemon=True).start()
    work = partial(at_work, str(directory), crew, os.getcwd(), jobs)
    with hydra(sources) as application:
        whole = with_launcher(application, sources, words, folder)
        context = HydraContext(config_loader=application.config_loader, callbacks=Callbacks())
        launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=work, config=whole)
        try:
            done = launcher.launch([[]] * jobs, initial_job_idx=first)
        finally:
            cancel_queued(folder)
    for job in done:
        _ = job.return_value  # raises what the job raised


def end_with_the_sweep(directory: Path, crew: str, folder: Path) -> None:
    """Wait until the sweep is over and its last worker has left, then end this process, whatever it waits for.

    No signal does that, for Ray's client would end with its workers at once; nor does submitit: where Slurm keeps no
    accounts, it waits for ever for a job that was taken out of the queue.
    """
    while not stop_file(directory, crew).exists():
        time.sleep(POLL)
    cancel_queued(folder)
    ledger = Ledger(directory)
    while those_of(ledger, crew)[1]:
        time.sleep(POLL)
    os._exit(0)


def cancel_queued(folder: Path) -> None:
    """Take Slurm's jobs that wait out of its queue; those at work are told by their stop file."""
    ids = {file.name.removesuffix("_submission.sh") for file in folder.glob(".submitit/*/*_submission.sh")}
    if ids:
        subprocess.run(["scancel", "--state=PENDING", *sorted(ids)])


def at_work(directory: str, crew: str, here: str, jobs: int, config: Any) -> None:
    """What a job does, wherever it runs: one worker, from the sweep's own folder, until it is told to stop.

    Told by the stop file, by Slurm before it ends the job (SIGUSR2, for submitit asks for it), or by `scancel`.
    """
    os.chdir(here)
    os.environ.setdefault("OMP_NUM_THREADS", threads(jobs))
    from stabrun.study.worker import enrolled, work

    handlers = {
        signal.SIGTERM: signal.default_int_handler,
        signal.SIGUSR2: lambda *_: signal.raise_signal(signal.SIGTERM),
    }
    before = {which: signal.signal(which, handler) for which, handler in handlers.items()}
    try:
        with enrolled(Ledger(Path(directory)), crew, HydraConfig.get().job.num) as stop:
            work(Path(directory), stop=stop)
    except KeyboardInterrupt:
        print("interrupted; another worker goes on from there.")
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def threads(jobs: int) -> str:
    """CPU threads of a job: what Slurm gave to it, or its part of this machine."""
    given = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE")
    return given or str(threads_each(jobs))


if __name__ == "__main__":
    # Ctrl-C in a terminal reaches the sweep as well, which ends its workers.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    from stabrun.study import launch as module  # jobs are pickled by their module's name

    folder, crew, first, jobs, config_dir, config_name, *words = sys.argv[1:]
    sources = Sources(Path(config_dir) if config_dir else None, config_name)
    module.launch(Path(folder), crew, int(first), int(jobs), sources, words)
