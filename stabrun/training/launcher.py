"""Ranks on this machine, started and supervised by torch's elastic launcher."""

import errno
import logging
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from multiprocessing import get_context, parent_process
from typing import Any

import torch

from stabrun import interpreter
from stabrun.training.place import Place
from stabrun.training.ranks import RESUMES, LostRankError
from stabrun.training.stop import BOTH, WARNINGS, Stop

POLL = 0.1  # seconds between two looks at the ranks
PATIENCE = 20.0  # seconds that a rank waits to be ended after it lost another, so that the launcher names that one


def launch(
    count: int, target: Callable[..., Any], args: tuple[Any, ...], stop: Stop, follow: Callable[[], None]
) -> Any:
    """Call `target(*args, stop)` in `count` new processes. Returns what the first one returned.

    `follow` is called every POLL seconds; what it raises ends the ranks, as a second Ctrl-C does. `stop` reaches the
    ranks as SIGINT. Raises the first error that a rank raised, or, if one ended without, ChildProcessError, or
    KeyboardInterrupt after `stop`.
    """
    threads = max(1, torch.get_num_threads() // count)
    ranks = Launch(count, target, args, threads)
    ranks.start()
    told = set[int]()
    try:
        while ranks.is_alive():
            ranks.join(POLL)
            follow()
            if stop.asked:
                new = ranks.pids() - told
                ranks.signal(signal.SIGINT, new)
                told |= new
    except BaseException:
        while ranks.is_alive():
            ranks.signal(signal.SIGKILL, ranks.pids())
            ranks.join(POLL)
        raise
    try:
        return ranks.result()
    except ChildProcessError:
        if stop.asked:  # before a first step, after which they could have stopped
            raise KeyboardInterrupt from None
        raise


class Launch(threading.Thread):
    """Waits for the ranks. In a thread, so that torch's launcher leaves the handlers of signals as they are."""

    def __init__(self, count: int, target: Callable[..., Any], args: tuple[Any, ...], threads: int) -> None:
        super().__init__(daemon=True)
        self.count, self.given = count, (target, args, threads)
        self.reports: Any = None  # from the ranks: the process id of each, and errors
        self.found = set[int]()
        self.errors: list[Exception] = []  # of the ranks, in order
        self.failure: Exception | None = None  # of the launcher
        self.value: Any = None

    def run(self) -> None:
        with interpreter.inherited():
            self._run()

    def _run(self) -> None:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        for name in ("torch.distributed.elastic", "torch.multiprocessing"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # they log tracebacks; the error is one sentence
        self.reports = get_context("spawn").SimpleQueue()
        # Ranks inherit the mask, until they can handle the signals. After the queue, which may reset the mask.
        signal.pthread_sigmask(signal.SIG_BLOCK, {*BOTH, *WARNINGS})
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self.count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=POLL,
            start_method="spawn",
            logs_specs=DefaultLogsSpecs(os.devnull),
        )
        try:
            self.value = elastic_launch(config, rank)(*self.given, self.reports)[0]
        except Exception as error:
            self.failure = error

    def pids(self) -> set[int]:
        """The process ids of the ranks that have begun."""
        while self.reports is not None and not self.reports.empty():
            report = self.reports.get()
            if isinstance(report, int):
                self.found.add(report)
            else:
                self.errors.append(report)
        return self.found

    def signal(self, which: signal.Signals, pids: set[int]) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, which)

    def result(self) -> Any:
        """What the first rank returned, after the end. Raises what `launch` does."""
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        self.pids()
        if self.errors:
            raise self.errors[0]
        if isinstance(self.failure, ChildFailedError):
            number, ended = self.failure.get_first_failure()
            how = f"signal {-ended.exitcode}" if ended.exitcode < 0 else f"status {ended.exitcode}"
            then = RESUMES if self.found else 'a script must call stabrun.train below `if __name__ == "__main__":`'
            raise ChildProcessError(errno.ECHILD, f"ended ({how}); {then}", f"rank {number}")
        if self.failure:
            raise self.failure
        return self.value


def rank(target: Callable[..., Any], args: tuple[Any, ...], threads: int, reports: Any) -> Any:
    """The process of one rank. The first error of all is reported; only the first rank prints."""
    reports.put(os.getpid())
    torch.set_num_threads(threads)
    threading.Thread(target=end_with_launcher, daemon=True).start()
    stop = Stop((signal.SIGINT,), patient=True)
    with stop, redirect_stdout(sys.stdout if Place.here().first else open(os.devnull, "w")):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        try:
            value = target(*args, stop=stop)
        except KeyboardInterrupt:
            os._exit(130)  # without a traceback
        except Exception as error:
            if isinstance(error, LostRankError):
                time.sleep(PATIENCE)
            reports.put(portable(error))
            sys.exit(1)
        parent = parent_process()
        if parent is not None and not parent.is_alive():
            os._exit(0)  # nobody waits for the value
        return value


def end_with_launcher() -> None:
    """End this rank at SIGTERM of its launcher. One that all processes of a job get is left to the launcher to tell.

    A rank that was sent it alone tells the others, as at Ctrl-C.
    """
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    os._exit(1)


def portable(error: Exception) -> Exception:
    """The error, or its text if it cannot be pickled, with its traceback as a note."""
    note = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(note)
    return error
