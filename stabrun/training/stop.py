"""How a signal stops a run after its step."""

import signal
from typing import Any

BOTH = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """The first SIGINT or SIGTERM sets `asked`, so that the run stops after the step; a second one stops it at once.

    `patient`: later ones are ignored. A rank gets signals from the terminal and from what started it, which ends it.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = BOTH, patient: bool = False) -> None:
        self.signals, self.patient, self.asked = signals, patient, False

    def __enter__(self) -> "Stop":
        self.before = {which: signal.signal(which, self.ask) for which in self.signals}
        return self

    def ask(self, which: int, frame: Any) -> None:
        if self.asked and not self.patient:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *exception: object) -> None:
        for which, handler in self.before.items():
            signal.signal(which, handler)
