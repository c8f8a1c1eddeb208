"""The workers of one sweep: processes of this machine, or jobs of one of Hydra's launchers; no torch."""

import errno
import os
import re
import shutil
import subprocess
import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from stabrun import interpreter
from stabrun.record.disk import REMEDIES
from stabrun.record.jsonl import write_atomic
from stabrun.record.study_dir import StudyDir
from stabrun.study.ledger import Ledger

GRACE = 60.0  # seconds that workers have to stop after Ctrl-C
TAIL = 4096  # bytes of a log in which its last line is looked for
PROBE = 1 << 20  # bytes that must fit on the disk before a worker is started again
NOT_COUNTED = "no attempt is counted"
SPARE = 3  # extra worker restarts allowed before any cell starts

Process = subprocess.Popen[bytes]


class WorkerPool(ABC):
    """`count` workers of the study in `directory`."""

    def __init__(self, directory: Path, count: int) -> None:
        self.directory, self.count = directory, count
        self.attempts, self.starts_left, self.begun = -1, 0, False

    def keep(self, attempts: int) -> None:
        """Start the workers that are missing. `attempts`: those of the whole study so far.

        Raises OSError if workers repeatedly end without beginning an attempt, or have ended and the disk is full.
        """
        if attempts > self.attempts:
            self.attempts, self.starts_left = attempts, self.count + SPARE
        alive = self.alive()
        missing = min(self.count - alive, self.starts_left)
        if missing > 0:
            if self.begun:
                probe_disk(self.directory)
            self.begun = True
            self.starts_left -= missing
            self.start(missing)
        elif alive == 0:
            log = StudyDir(self.directory).worker_log
            last = last_line(log)
            why = f"workers end before they train{': ' if last else ''}{last}"
            raise ChildProcessError(errno.ECHILD, why, str(log))

    @abstractmethod
    def alive(self) -> int:
        """The number of workers, including those that wait in a queue."""

    @abstractmethod
    def start(self, count: int) -> None:
        """Start this many workers."""

    @abstractmethod
    def end(self, interrupt: bool) -> None:
        """Wait for the workers, which have nothing left to do or, with `interrupt`, stop after their step."""

    def process(self, module: str, *arguments: str, **environment: str) -> Process:
        """A process for this pool that writes to `worker.log`."""
        command = [sys.executable, "-m", module, str(self.directory.absolute()), *arguments]
        with open(StudyDir(self.directory).worker_log, "ab") as log:
            whole = os.environ | interpreter.environment() | environment
            return subprocess.Popen(command, stdout=log, stderr=log, env=whole)


def probe_disk(directory: Path) -> None:
    """Write a file and remove it. Raises OSError if that is not possible."""
    with naming_disk(directory):
        write_atomic(directory / ".probe", bytes(PROBE))
        (directory / ".probe").unlink()


@contextmanager
def naming_disk(directory: Path) -> Iterator[None]:
    """Name the directory, and the way on, in the error of a disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        raise OSError(error.errno, f"{error.strerror}; {NOT_COUNTED}", str(directory)) from error


def last_line(log: Path) -> str:
    """The last line of a log that is not empty; empty if there is none."""
    with suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        lines = file.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ""


class LocalPool(WorkerPool):
    """Processes of this machine, which share its cores and GPUs: `ranks` GPUs for each."""

    def __init__(self, directory: Path, count: int, ranks: int = 1) -> None:
        super().__init__(directory, count)
        self.slots: list[Process | None] = [None] * count
        self.threads = os.environ.get("OMP_NUM_THREADS", str(threads_per_worker(count)))
        self.gpus = groups(gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), nvidia_smi()), ranks)

    def alive(self) -> int:
        return sum(worker is not None and worker.poll() is None for worker in self.slots)

    def start(self, count: int) -> None:
        free = [n for n, worker in enumerate(self.slots) if worker is None or worker.poll() is not None]
        for n in free[:count]:
            gpu = {"CUDA_VISIBLE_DEVICES": self.gpus[n % len(self.gpus)]} if self.gpus else {}
            self.slots[n] = self.process("stabrun.study.worker", OMP_NUM_THREADS=self.threads, **gpu)

    def end(self, interrupt: bool) -> None:
        workers = [worker for worker in self.slots if worker]
        if interrupt:
            for worker in workers:
                worker.terminate()
        wait_or_kill(workers)


@dataclass
class Batch:
    """Jobs that were launched together, numbered from `first` on, and the process that waits for them."""

    first: int
    jobs: int
    launcher: Process


class LauncherPool(WorkerPool):
    """Jobs of one of Hydra's launchers. Each registers in the ledger as an attempt at a cell named after the pool.

    The ledger, unlike the launcher, reliably knows which jobs are alive: without Slurm accounting, submitit does not
    notice a job that died.
    """

    def __init__(self, directory: Path, count: int, arguments: list[str]) -> None:
        super().__init__(directory, count)
        self.arguments, self.id = arguments, uuid.uuid4().hex[:8]
        self.batches: list[Batch] = []
        self.ledger = Ledger(directory)

    def alive(self) -> int:
        registered, alive = job_numbers(self.ledger, self.id)
        waiting = [batch for batch in self.batches if batch.launcher.poll() is None]
        queued = [set(range(batch.first, batch.first + batch.jobs)) - registered for batch in waiting]
        return len(alive) + sum(map(len, queued))

    def start(self, count: int) -> None:
        first = sum(batch.jobs for batch in self.batches) + 1
        launcher = self.process("stabrun.study.launch", self.id, str(first), str(count), *self.arguments)
        self.batches.append(Batch(first, count, launcher))

    def end(self, interrupt: bool) -> None:
        stop_file(self.directory, self.id).touch()
        wait_or_kill([batch.launcher for batch in self.batches])


def wait_or_kill(processes: list[Process]) -> None:
    """Wait for processes that are about to end, and kill those that do not."""
    for process in processes:
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()


def job_numbers(ledger: Ledger, pool: str) -> tuple[frozenset[int], set[int]]:
    """The numbers of a pool's jobs that ever registered, and of those that are alive."""
    entry = ledger.entries([pool])[pool]
    return entry.claim, {number for number in entry.claim - entry.left if ledger.is_alive(pool, number)}


def stop_file(directory: Path, pool: str) -> Path:
    """Tells the workers of a launched pool to stop after their step: signals do not reach other machines."""
    return StudyDir(directory).ledger / f"{pool}.stop"


def threads_per_worker(workers: int) -> int:
    """Threads per worker if the workers share all cores of this machine."""
    return max(1, (os.cpu_count() or 1) // workers)


def gpus(visible: str | None, listed: str) -> list[str]:
    """The GPUs that workers share: those in CUDA_VISIBLE_DEVICES, or all that `nvidia-smi -L` lists."""
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    return re.findall(r"^GPU \d+: .*\(UUID: (GPU-[\w-]+)\)", listed, re.MULTILINE)


def gpu_names(listed: str) -> list[str]:
    """The name of each GPU that `nvidia-smi -L` lists."""
    return re.findall(r"^GPU \d+: (.*) \(UUID: ", listed, re.MULTILINE)


def groups(names: list[str], size: int) -> list[str]:
    """Consecutive GPUs as values of CUDA_VISIBLE_DEVICES, `size` in each; all in one if there are fewer."""
    whole = len(names) // size * size or len(names)
    return [",".join(names[first : first + size]) for first in range(0, whole, size)]


def nvidia_smi() -> str:
    """The output of `nvidia-smi -L`; empty if it is not installed."""
    if not shutil.which("nvidia-smi"):
        return ""
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
