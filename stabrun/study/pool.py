"""The workers of one sweep: processes of this machine, or jobs of one of Hydra's launchers; no torch."""

import errno
import os
import re
import shutil
import subprocess
import sys
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from stabrun.record.study_dir import StudyDir
from stabrun.study.ledger import Ledger

GRACE = 60.0  # seconds that workers have to end after Ctrl-C
SPARE = 3  # workers that may die before they have a cell, beyond one life each, until another cell is begun

Process = subprocess.Popen[bytes]


class WorkerPool(ABC):
    """`count` workers of the study in `directory`."""

    def __init__(self, directory: Path, count: int) -> None:
        self.directory, self.count = directory, count
        self.begun, self.lives = -1, 0

    def keep(self, begun: int) -> None:
        """Start the workers that are missing. `begun`: attempts in the study so far, which show that workers work.

        Raises OSError where they die before they train, for they must not be started for ever.
        """
        if begun > self.begun:
            self.begun, self.lives = begun, self.count + SPARE
        at_work = self.at_work()
        missing = min(self.count - at_work, self.lives)
        if missing > 0:
            self.lives -= missing
            self.start(missing)
        elif at_work == 0:
            log = StudyDir(self.directory).worker_log
            raise ChildProcessError(errno.ECHILD, "workers die before they train", str(log))

    @abstractmethod
    def at_work(self) -> int:
        """How many workers there are, those that wait for their turn included."""

    @abstractmethod
    def start(self, missing: int) -> None:
        """Start so many."""

    @abstractmethod
    def end(self, status: int) -> int:
        """Wait for the workers, which have nothing left to do, or are to stop after their step where `status` is not 0.

        Returns `status`.
        """

    def process(self, module: str, *words: str, **environment: str) -> Process:
        """A process of this crew, which writes into the log of workers."""
        command = [sys.executable, "-m", module, str(self.directory.absolute()), *words]
        with open(StudyDir(self.directory).worker_log, "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment)


class LocalPool(WorkerPool):
    """Processes of this machine, which share its cores and its GPUs."""

    def __init__(self, directory: Path, count: int) -> None:
        super().__init__(directory, count)
        self.seats: list[Process | None] = [None] * count
        self.threads = os.environ.get("OMP_NUM_THREADS", str(threads_each(count)))
        self.gpus = gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), listed_gpus())

    def at_work(self) -> int:
        return sum(seat is not None and seat.poll() is None for seat in self.seats)

    def start(self, missing: int) -> None:
        free = [n for n, seat in enumerate(self.seats) if seat is None or seat.poll() is not None]
        for n in free[:missing]:
            gpu = {"CUDA_VISIBLE_DEVICES": self.gpus[n % len(self.gpus)]} if self.gpus else {}
            self.seats[n] = self.process("stabrun.study.worker", OMP_NUM_THREADS=self.threads, **gpu)

    def end(self, status: int) -> int:
        workers = [seat for seat in self.seats if seat]
        for worker in workers:
            if status:
                worker.terminate()
        return awaited(workers, status)


@dataclass
class Batch:
    """Jobs that were launched together, numbered from `first` on, and the process that waits for them."""

    first: int
    jobs: int
    launch: Process


class LauncherPool(WorkerPool):
    """Jobs of one of Hydra's launchers. Each enrols in the ledger as an attempt at a cell that is named after the crew.

    So it is known who is at work, whatever the launcher knows: submitit notices no death where Slurm keeps no accounts.
    """

    def __init__(self, directory: Path, count: int, words: list[str]) -> None:
        super().__init__(directory, count)
        self.words, self.id = words, uuid.uuid4().hex[:8]
        self.batches: list[Batch] = []
        self.ledger: Ledger | None = None

    def at_work(self) -> int:
        if not self.batches:
            return 0
        self.ledger = self.ledger or Ledger(self.directory)
        enrolled, alive = those_of(self.ledger, self.id)
        total = 0
        for batch in self.batches:
            numbers = set(range(batch.first, batch.first + batch.jobs))
            waiting = len(numbers - enrolled) if batch.launch.poll() is None else 0
            total += len(alive & numbers) + waiting
        return total

    def start(self, missing: int) -> None:
        first = sum(batch.jobs for batch in self.batches) + 1
        launch = self.process("stabrun.study.launch", self.id, str(first), str(missing), *self.words)
        self.batches.append(Batch(first, missing, launch))

    def end(self, status: int) -> int:
        stop_file(self.directory, self.id).touch()
        return awaited([batch.launch for batch in self.batches], status)


def awaited(processes: list[Process], status: int) -> int:
    """Wait for processes that are about to end, and kill those that do not."""
    for process in processes:
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
    return status


def those_of(ledger: Ledger, crew: str) -> tuple[set[int], set[int]]:
    """The numbers of a launched crew's workers that ever began, and of those that are still at work."""
    entry = ledger.entries([crew])[crew]
    return entry.claim, {number for number in entry.claim - entry.left if ledger.alive(crew, number)}


def stop_file(directory: Path, crew: str) -> Path:
    """Once it is there, the workers of a launched crew stop after their step: no signal reaches another machine."""
    return StudyDir(directory).ledger / f"{crew}.stop"


def threads_each(workers: int) -> int:
    """How many threads a worker has, where all cores of this machine are shared among them."""
    return max(1, (os.cpu_count() or 1) // workers)


def gpus(visible: str | None, listed: str) -> list[str]:
    """The GPUs that workers share out: those that CUDA_VISIBLE_DEVICES names, or all that `nvidia-smi -L` lists."""
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    return re.findall(r"^GPU \d+: .*\(UUID: (GPU-[\w-]+)\)", listed, re.MULTILINE)


def listed_gpus() -> str:
    """What `nvidia-smi -L` says; nothing where it is not there."""
    if not shutil.which("nvidia-smi"):
        return ""
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
