"""Workers started by Hydra's launchers.

`python -m stabrun.study.launch DIR POOL FIRST JOBS CONFIG_DIR CONFIG_NAME OVERRIDE…` starts jobs; CONFIG_DIR may be "".
A job is one worker of the pool POOL. The process waits until all of its jobs have ended. The state of cells is in the
ledger alone.
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

# A launcher's context has required callbacks, and Hydra has no public constructor for them.
from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from stabrun.composition import Sources, composed, hydra
from stabrun.config import UserError
from stabrun.study.ledger import Ledger
from stabrun.study.pool import LauncherPool, LocalPool, WorkerPool, job_numbers, stop_file, threads_per_worker
from stabrun.study.question import split_axes
from stabrun.text import write_any_text
from stabrun.training.place import Place

POLL = 0.5  # seconds between two checks whether the sweep is over


def worker_pool(overrides: list[str], sources: Sources, directory: Path, count: int, ranks: int = 1) -> WorkerPool:
    """The pool that a sweep's overrides ask for; creates nothing yet. UserError if the launcher is not available."""
    if Place.here().started:
        raise UserError("sweep: cannot be started by torchrun; set study.workers and train.ranks.")
    fixed, _ = split_axes(overrides)
    with hydra(sources) as application:
        launcher = with_launcher(application, sources, fixed, directory).hydra.launcher
    if launcher._target_.endswith(".BasicLauncher"):
        return LocalPool(directory, count, ranks)
    for key in ("nodes", "tasks_per_node"):
        if launcher.get(key, 1) != 1:
            raise UserError(f"hydra.launcher.{key}={launcher[key]}: must be 1: a job is one worker; set study.workers.")
    return LauncherPool(directory, count, [str(sources.config_dir or ""), sources.config_name, *fixed])


def with_launcher(application: Any, sources: Sources, overrides: list[str], output: Path) -> DictConfig:
    """The whole configuration including Hydra's own part, whose launcher writes to `output`."""
    quoted = str(output.absolute()).replace("\\", r"\\").replace("'", r"\'")
    own = [f"hydra.sweep.dir='{quoted}'", "hydra.mode=MULTIRUN"]
    whole = composed(application, sources, overrides, RunMode.MULTIRUN, own)
    # Ray's launcher sets a size of memory, which Ray refuses when it joins an existing cluster.
    init = OmegaConf.select(whole, "hydra.launcher.ray.init")
    if init is not None and (init.get("address") or os.environ.get("RAY_ADDRESS")):
        with open_dict(init):
            init.setdefault("object_store_memory", None)
    return whole


def launch(directory: Path, pool: str, first: int, jobs: int, sources: Sources, overrides: list[str]) -> None:
    """Launch workers of a pool, numbered from `first` on, and wait for them. Raises what one of them raised."""
    output = directory / "launcher" / pool
    threading.Thread(target=end_with_sweep, args=(directory, pool, output), daemon=True).start()
    task = partial(run_job, str(directory), pool, os.getcwd(), jobs)
    with hydra(sources) as application:
        whole = with_launcher(application, sources, overrides, output)
        context = HydraContext(config_loader=application.config_loader, callbacks=Callbacks())
        launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=whole)
        try:
            results = launcher.launch([[]] * jobs, initial_job_idx=first)
        finally:
            cancel_queued(output)
    for result in results:
        _ = result.return_value  # raises what the job raised


def end_with_sweep(directory: Path, pool: str, output: Path) -> None:
    """Wait until the sweep is over and its last worker has ended, then end this process.

    A signal to this process would not do: Ray's client would end with its workers at once, and submitit, without Slurm
    accounting, waits forever for a job that was removed from the queue.
    """
    while not stop_file(directory, pool).exists():
        time.sleep(POLL)
    cancel_queued(output)
    ledger = Ledger(directory)
    while job_numbers(ledger, pool)[1]:
        time.sleep(POLL)
    os._exit(0)


def cancel_queued(output: Path) -> None:
    """Remove waiting jobs from Slurm's queue. Running ones stop because of the stop file."""
    ids = {file.name.removesuffix("_submission.sh") for file in output.glob(".submitit/*/*_submission.sh")}
    if ids:
        subprocess.run(["scancel", "--state=PENDING", *sorted(ids)])


def run_job(directory: str, pool: str, working_directory: str, jobs: int, config: Any) -> None:
    """One worker, on whatever machine the job runs, in the working directory of the sweep.

    It stops after its step because of the stop file, SIGUSR1 or SIGUSR2 (which submitit asks Slurm for before the time
    limit) or `scancel`.
    """
    os.chdir(working_directory)
    for stream in (sys.stdout, sys.stderr):
        write_any_text(stream)
    allocated = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE")
    os.environ.setdefault("OMP_NUM_THREADS", allocated or str(threads_per_worker(jobs)))
    from stabrun.study.worker import registered, work
    from stabrun.training.stop import WARNINGS, interrupt

    forward = dict.fromkeys(WARNINGS, lambda *_: signal.raise_signal(signal.SIGTERM))
    handlers = {signal.SIGTERM: interrupt, **forward}
    previous = {which: signal.signal(which, handler) for which, handler in handlers.items()}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WARNINGS)  # a launcher on this machine inherits that they are blocked
    try:
        with registered(Ledger(Path(directory)), pool, HydraConfig.get().job.num) as stop:
            work(Path(directory), stop=stop)
    except KeyboardInterrupt:
        print("interrupted; another worker resumes the cell.")
    finally:
        for which, handler in previous.items():
            signal.signal(which, handler)


if __name__ == "__main__":
    # Ctrl-C in a terminal reaches the sweep as well, which ends its workers.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    from stabrun.study import launch as module  # jobs are pickled by the name of their module

    study, pool, first, jobs, config_dir, config_name, *words = sys.argv[1:]
    sources = Sources(Path(config_dir) if config_dir else None, config_name)
    module.launch(Path(study), pool, int(first), int(jobs), sources, words)
