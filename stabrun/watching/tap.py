"""Listens to calls of a function of torch, such as one that models of any kind call."""

from collections.abc import Callable, Iterator
from functools import wraps
from types import ModuleType
from typing import Any

Listener = Callable[..., None]  # called with the result and the arguments of each call


class Tap:
    """Replaces a function of modules or classes while there are listeners, and restores it when the last one has left.

    If other code has replaced it as well since then, its replacement stays, and calls this one, which only forwards.
    The function is found by the name `name` in each of `modules`: code that imported it by `from` before is not heard.
    `iterable` is the name of its first argument, if that is one and the listeners need its items as well.
    """

    def __init__(self, name: str, *modules: ModuleType | type, iterable: str | None = None) -> None:
        self.name, self.modules, self.iterable, self.listeners = name, modules, iterable, list[Listener]()
        self.original: Any = None
        self.replacement: Any = None

    def add(self, listener: Listener) -> None:
        if not self.listeners:
            self._replace()
        self.listeners.append(listener)

    def remove(self, listener: Listener) -> None:
        """Remove a listener, if it was added."""
        if listener in self.listeners:
            self.listeners.remove(listener)
            if not self.listeners:
                for module in self.modules:
                    if getattr(module, self.name) is self.replacement:
                        setattr(module, self.name, self.original)
                self.listeners = []  # the next replacement has a list of its own

    def _replace(self) -> None:
        self.original = original = getattr(self.modules[0], self.name)
        listeners, iterable = self.listeners, self.iterable

        @wraps(original)
        def heard(*args: Any, **kwargs: Any) -> Any:
            if iterable in kwargs:
                kwargs[iterable] = items(kwargs[iterable])
            elif iterable:
                args = (items(args[0]), *args[1:])
            result = original(*args, **kwargs)
            for listener in listeners:
                listener(result, *args, **kwargs)
            return result

        self.replacement = heard
        for module in self.modules:
            setattr(module, self.name, heard)


def items(given: Any) -> Any:
    """What an iterator gives, as a list; anything else as it is."""
    return list(given) if isinstance(given, Iterator) else given
