"""Checkpoints in safetensors and JSON: loading one never runs code.

`checkpoints/step_00000200/` is the state after 200 updates: `model.safetensors` (parameters and buffers by name, tied
weights once), `optimizer.safetensors` (Adam's state as `name/part`) and `meta.json` (the step, what else decides the
next ones, and SHA-256 sums of the files and of itself). A checkpoint appears under its name once it is complete.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stabrun.config import UserError
from stabrun.record.checkpoints import META, name_of, steps
from stabrun.record.disk import as_os_error, writing
from stabrun.record.jsonl import read_json, write_atomic
from stabrun.training.ranks import Ranks

EARLIER = {"step", "scaler"}  # what META had before there were checksums
INCOMPLETE = "incomplete"  # directory of a checkpoint that is being written
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"

State = dict[str, Any]  # `Trainer.state`


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: State,
    keep: int = 1,
    points: Callable[[Iterable[int]], Iterable[int]] = lambda steps: (),
) -> Path:
    """Write the state after `step` updates below `folder`. Returns its path.

    The newest `keep` checkpoints and those of the steps that `points` chooses are kept.
    """
    target, scratch = folder / name_of(step), folder / INCOMPLETE
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        _write(scratch, {"step": step, **state}, model, optimizer)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(scratch, target)
        sync(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    found = steps(folder)
    for old in found.keys() - {*[*found][:keep], *points(found)}:
        shutil.rmtree(found[old])
    return target


def rewind(folder: Path, step: int, state: State) -> None:
    """Give the checkpoint after `step` updates another `state`, and remove newer ones.

    If this is interrupted, a newer checkpoint or the former state leads to the same rewind.
    """
    found = steps(folder)
    for newer in found:
        if newer > step:
            shutil.rmtree(found[newer])
    meta = read_json(found[step] / META)
    meta.pop("check")
    meta |= state
    write_atomic(found[step] / META, json.dumps(meta | {"check": _sum(meta)}) + "\n")
    sync(found[step])


def _write(scratch: Path, meta: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    scratch.mkdir(parents=True)
    files = {MODEL: _model_state(model), OPTIMIZER: _optimizer_state(model, optimizer)}
    try:
        for name, state in files.items():
            save_file(state, scratch / name)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise as_os_error(error, scratch) from error
    meta = meta | {"sha256": {name: _sum_of(scratch / name) for name in files}}
    with writing(scratch / META):
        (scratch / META).write_text(json.dumps(meta | {"check": _sum(meta)}) + "\n")
    mode = (scratch / META).stat().st_mode
    for file in scratch.iterdir():
        file.chmod(mode)  # safetensors lets only the owner read its files
        sync(file)


def _sum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _sum_of(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if its files are as they were written. OSError if reading fails."""
    try:
        meta = read_json(path / META)
        if meta.keys() == EARLIER and isinstance(meta["step"], int) and name_of(meta["step"]) == path.name:
            return None  # whose damage cannot be seen
        if "check" not in meta or meta.pop("check") != _sum(meta) or name_of(meta["step"]) != path.name:
            return f"{META} is damaged"
        return next((f"{file} is damaged" for file, own in meta["sha256"].items() if _sum_of(path / file) != own), None)
    except UserError:
        return f"{META} is damaged"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"


def latest(folder: Path, passed: Callable[[Path, str], None] = lambda path, why: None) -> tuple[int, Path] | None:
    """The newest whole checkpoint below `folder`: its updates and path; None if there is none.

    `passed` is called with each newer one that is damaged, and why. Raises UserError if all are.
    """
    broken = dict[Path, str]()
    for step, path in steps(folder).items():
        why = damage(path)
        if why is None:
            for other, reason in broken.items():
                passed(other, reason)
            return step, path
        broken[path] = why
    if broken:
        (path, why), *_ = broken.items()
        others = "" if len(broken) == 1 else " The older ones are damaged, too."
        raise UserError(f"{path}: {why}.{others} Delete {folder} to train from the start.")
    return None


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it is not found any more. Returns its new path."""
    target = path.with_name(f"damaged_{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    return path.rename(target)


def at(folder: Path, step: int | None) -> Path:
    """The newest whole checkpoint below `folder`, or that after `step` updates. UserError if missing or damaged."""
    found = steps(folder)
    if not found:
        raise UserError(f"{folder.parent}: no checkpoint; none has been written yet, or train.checkpoint_every=0.")
    if step is None:
        newest = latest(folder)
        assert newest
        return newest[1]
    if step not in found:
        there = ", ".join(map(str, sorted(found)))
        raise UserError(f"step={step}: {folder.parent} has no such checkpoint; it has those of step {there}.")
    if why := damage(found[step]):
        raise UserError(f"{found[step]}: {why}.")
    return found[step]


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Put the weights and moments below `path` into a model and optimizer of the same configuration.

    Returns what else decides the next steps.

    Raises OSError if the files cannot be read, UserError if they are of another model.
    """
    load_model(path, model)
    _put_moments(_read(path / OPTIMIZER), model, optimizer)
    return read_json(path / META)


@torch.no_grad()
def load_model(path: Path, model: nn.Module) -> None:
    """Put the weights below `path` into a model of the same configuration; raises as `load` does."""
    state = _read(path / MODEL)
    here = _model_state(model)
    if {name: tensor.shape for name, tensor in here.items()} != {name: tensor.shape for name, tensor in state.items()}:
        raise UserError(f"{path} has the weights of another model; delete it to train from the start.")
    for name, tensor in here.items():
        tensor.copy_(state[name])


def copy_first(ranks: Ranks, model: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> State:
    """Give each rank the state of the first, the only one that reads a checkpoint. Returns what `load` does."""
    moments = _optimizer_state(model, optimizer)
    shapes, state = ranks.from_first(({name: (m.shape, m.dtype) for name, m in moments.items()}, state))
    if not ranks.first:
        device = next(model.parameters()).device
        moments = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}
        _put_moments(moments, model, optimizer)
    ranks.copy_first([*_model_state(model).values(), *moments.values()])
    return state


def _put_moments(moments: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for name, parameter in model.named_parameters():
        parts = {key.split("/")[1]: value for key, value in moments.items() if key.split("/")[0] == name}
        optimizer.state[parameter] = {part: value.to(parameter.device) for part, value in parts.items()}


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise OSError(errno.EIO, f"the checkpoint cannot be read ({error})", str(file)) from error


def _model_state(model: nn.Module) -> dict[str, Tensor]:
    persistent = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name in persistent}
    return {name: p.data for name, p in model.named_parameters()} | buffers


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{part}": value
        for name, parameter in model.named_parameters()
        for part, value in optimizer.state.get(parameter, {}).items()
    }
