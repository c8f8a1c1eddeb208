"""Checkpoints in safetensors and JSON: loading one never runs code.

`checkpoints/step_00000200/` is the state after 200 updates: `model.safetensors` (parameters and buffers by name, tied
weights once), `optimizer.safetensors` (Adam's state as `name/part`) and `meta.json` (the step, and the loss scale of
fp16). A checkpoint appears under its name once it is complete, and replaces the previous one.
"""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stabrun.config import UserError
from stabrun.record.jsonl import read_json
from stabrun.training.ranks import Ranks

META = "meta.json"

Scaler = dict[str, Any]  # `LossScale.state`; empty in other precisions than fp16


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Scaler) -> Path:
    """Write the state after `step` updates below `folder` and remove older checkpoints. Returns its path."""
    target, scratch = folder / f"step_{step:08d}", folder / "incomplete"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        _write(scratch, {"step": step, "scaler": scaler}, model, optimizer)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(scratch, target)
        sync(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for old in folder.glob("step_*"):
        if old != target:
            shutil.rmtree(old)
    return target


def _write(scratch: Path, meta: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    scratch.mkdir(parents=True)
    try:
        save_file(_model_state(model), scratch / "model.safetensors")
        save_file(_optimizer_state(model, optimizer), scratch / "optimizer.safetensors")
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(errno.EIO, str(error), str(scratch)) from error
    (scratch / META).write_text(json.dumps(meta) + "\n")
    for file in scratch.iterdir():
        sync(file)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def latest(folder: Path) -> tuple[int, Path] | None:
    """The newest complete checkpoint below `folder`: its updates and path. UserError if its step is damaged."""
    newest = max((meta.parent for meta in folder.glob(f"step_*/{META}")), default=None)
    if newest is None:
        return None
    step = read_json(newest / META).get("step")
    if not isinstance(step, int) or newest.name != f"step_{step:08d}":
        raise UserError(f"{newest / META} is damaged: its step differs from the name of its directory.")
    return step, newest


def at(folder: Path, step: int | None) -> Path:
    """The newest checkpoint below `folder`, or the one after `step` updates. UserError if it is missing."""
    newest = latest(folder)
    if newest is None:
        raise UserError(f"{folder.parent}: no checkpoint; none has been written yet, or train.checkpoint_every=0.")
    if step is not None and step != newest[0]:
        raise UserError(f"step={step}: {folder.parent} has no such checkpoint; the only one is of step {newest[0]}.")
    return newest[1]


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Scaler:
    """Put the state below `path` into a model and optimizer made from the same configuration; returns the scaler's.

    Raises OSError if the files cannot be read, UserError if they are of another model.
    """
    load_model(path, model)
    _put_moments(_read(path / "optimizer.safetensors"), model, optimizer)
    scaler = read_json(path / META).get("scaler")
    return scaler if isinstance(scaler, dict) else {}


@torch.no_grad()
def load_model(path: Path, model: nn.Module) -> None:
    """Put the weights below `path` into a model of the same configuration; raises as `load` does."""
    state = _read(path / "model.safetensors")
    here = _model_state(model)
    if {name: tensor.shape for name, tensor in here.items()} != {name: tensor.shape for name, tensor in state.items()}:
        raise UserError(f"{path} has the weights of another model; delete it to train from the start.")
    for name, tensor in here.items():
        tensor.copy_(state[name])


def copy_first(ranks: Ranks, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Scaler) -> Scaler:
    """Give each rank the state of the first, the only one that reads a checkpoint. Returns the scaler's."""
    moments = _optimizer_state(model, optimizer)
    shapes, scaler = ranks.from_first(({name: (m.shape, m.dtype) for name, m in moments.items()}, scaler))
    if not ranks.first:
        device = next(model.parameters()).device
        moments = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}
        _put_moments(moments, model, optimizer)
    ranks.copy_first([*_model_state(model).values(), *moments.values()])
    return scaler


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
