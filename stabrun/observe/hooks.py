"""Hooks of modules that are not copied or saved with them."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any


class Hook:
    """A function that observes a module. In a copy of the module, and in a file that holds it, it does nothing.

    What such copies compute, for example those of an average of the weights, is not of the run, and a function within
    a function cannot be pickled. A file names nothing of stabrun, so that it can be loaded without.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # which takes any arguments, and returns None
