"""What `stabrun.watch` and `Watch.step` may be given; anything else is refused before something is written."""

import operator
import os
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stabrun.config import UserError
from stabrun.record.jsonl import dumps
from stabrun.watching.log import STOP, WARN


def refuse_model(model: Any) -> None:
    """Raise UserError at what is not a module with parameters."""
    if not isinstance(model, nn.Module):
        raise UserError(f"watch: the model is of type {type(model).__name__}: must be a torch.nn.Module.")
    if next(model.parameters(), None) is None:
        raise UserError(f"watch: the model ({type(model).__name__}) has no parameters.")
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise UserError(f"watch: {name} has no shape yet; run the model once before it is watched.")


def whole_number(name: str, value: Any, least: int, why: str = "") -> int:
    """The value as an int. Raises UserError if it is not a whole number, or below `least`; `why` says what that is."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise UserError(f"watch: {name}={value!r}: must be a whole number, at least {least}{why}.")
    return number


def refuse_other(name: str, value: Any, *allowed: str | None) -> None:
    """Raise UserError if a value is not one of those that are allowed."""
    if value not in allowed:
        words = " or ".join(f'"{word}"' if word else "None" for word in allowed)
        raise UserError(f"watch: {name}={value!r}: must be {words}.")


def refuse_untrue(name: str, value: Any) -> None:
    """Raise UserError if a value is neither True nor False: the text "no" would be taken as true."""
    if not isinstance(value, bool):
        raise UserError(f"watch: {name}={value!r}: must be True or False.")


def directory_of(out: Any) -> Path | None:
    """The directory of the record, or None. Raises UserError if it is neither a path nor None."""
    if out is None:
        return None
    if not isinstance(out, (str, os.PathLike)) or not os.fspath(out):
        raise UserError(f"watch: out={out!r}: must be the path of a directory, or None to keep no record.")
    return Path(out)


def refuse_policy(name: str, value: Any) -> None:
    """Raise UserError at what is not a policy (`stabrun.watching.log.Policy`)."""
    if not callable(value) and value not in (STOP, WARN, None):
        raise UserError(f'watch: {name}={value!r}: must be "{STOP}", "{WARN}", a function or None.')


def recordable(settings: Any) -> dict[str, Any]:
    """The settings. Raises UserError if they are not a mapping, or cannot be written as JSON."""
    if settings is not None and not isinstance(settings, Mapping):
        raise UserError(f"watch: settings={settings!r}: must be a dictionary, such as {{'name': 'mine', 'seed': 0}}.")
    for name, value in (settings or {}).items():
        try:
            dumps({name: value})
        except (TypeError, ValueError) as error:
            kind = type(value).__name__
            raise UserError(
                f"watch: settings: {name} is a {kind}: must be a text, a number or a list of such."
            ) from error
    return dict(settings or {})


def one_number(name: str, value: Any) -> Tensor | float:
    """A number, or a tensor of one element as a 0-dim one. Raises UserError at anything else."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise UserError(
                f"watch.step: {name} is a tensor of shape {[*value.shape]}: must be one number, such as its mean."
            )
        return value.reshape(())
    if not isinstance(value, Real):
        raise UserError(f"watch.step: {name}={value!r}: must be a number or a tensor of one element.")
    return float(value)


def optional_number(name: str, value: Any) -> Tensor | float | None:
    """`one_number`, or None."""
    return None if value is None else one_number(name, value)
