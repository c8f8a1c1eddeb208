"""How a signal stops a run after its step."""

import functools
import signal
import threading
from typing import Any

BOTH = (signal.SIGINT, signal.SIGTERM)
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # what Slurm's --signal and submitit send before the time limit


class Stop:
    """The first signal sets `asked`, so that the run stops after the step; a later SIGINT stops it at once.

    Later ones of another kind are ignored: a cluster sends its signal to all processes of a job, and may repeat it.
    A warning counts unless the program has a handler of its own for it. `patient`: a later SIGINT is ignored, too. A
    rank gets signals from the terminal and from what started it, which ends it.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = (*BOTH, *WARNINGS), patient: bool = False) -> None:
        self.signals, self.patient, self.asked, self.at_once = signals, patient, False, False

    def __enter__(self) -> "Stop":
        own = [which for which in self.signals if which in BOTH or signal.getsignal(which) == signal.SIG_DFL]
        self.before = {which: signal.signal(which, self.ask) for which in own}
        return self

    def be_at_once(self, flag: bool) -> None:
        """From now on, stop at the first signal, by KeyboardInterrupt, or not any more: nothing would be lost."""
        self.at_once = flag
        if flag and self.asked:
            raise KeyboardInterrupt

    def ask(self, which: int, frame: Any) -> None:
        again, self.asked = self.asked, True
        if self.at_once or (again and which == signal.SIGINT and not self.patient):
            self.at_once = False
            raise KeyboardInterrupt

    def __exit__(self, *exception: object) -> None:
        for which, handler in self.before.items():
            signal.signal(which, handler)


def interrupt(which: int, frame: Any) -> None:
    """A handler of SIGTERM: the first one raises KeyboardInterrupt, later ones do not disturb what that does."""
    signal.signal(which, signal.SIG_IGN)
    raise KeyboardInterrupt


def be_interruptible() -> None:
    """Let SIGTERM and the warnings interrupt this program as Ctrl-C does, until a `Stop` handles them.

    The warnings are blocked, and a thread waits for them: further processes inherit that, so that a warning to all
    processes of a job reaches the one that can stop the others in order.
    """
    signal.signal(signal.SIGTERM, interrupt)
    _wait_for_warnings()


@functools.cache  # once per process
def _wait_for_warnings() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, WARNINGS)
    main = threading.main_thread().ident

    def forward() -> None:
        while main:
            signal.sigwait(WARNINGS)
            signal.pthread_kill(main, signal.SIGTERM)

    threading.Thread(target=forward, daemon=True).start()
