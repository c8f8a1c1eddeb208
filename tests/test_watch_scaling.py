"""The loss scale of fp16 in a watched run: no statistic contains it."""

import pytest
import torch
from torch import nn

import stabrun
from stabrun.record.jsonl import read_lines


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x).square().mean()


def rows(directory, scale=None, clip=False, fused=False, accumulate=1):
    """The record of three steps, with the factor `scale` in the backward pass."""
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    watch = stabrun.watch(model, directory, 1, slow_every=1, quiet=True)
    for step in range(3):
        losses = []
        for part in range(accumulate):
            loss = model(torch.randn(16, 8, generator=torch.Generator().manual_seed(10 * step + part))) / accumulate
            scaler.scale(loss).backward()
            losses.append(loss)
        if clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        scaler.step(optimizer)
        scaler.update()
        watch.step(loss=sum(losses), scaler=scaler if scale else None)
        optimizer.zero_grad()
    watch.close()
    return [line.value for line in read_lines(directory / "metrics.jsonl")]


def known(value):
    """A value of a row, with a number for layers that have none."""
    return [-1.0 if item is None else item for item in value] if isinstance(value, list) else value


CASES = {"plain": {}, "clipped": {"clip": True}, "fused": {"fused": True}, "accumulated": {"accumulate": 2}}


@pytest.mark.parametrize("case", CASES)
def test_no_statistic_contains_the_loss_scale(tmp_path, case):
    expected = rows(tmp_path / "plain", **CASES[case])
    found = rows(tmp_path / "scaled", scale=2.0**10, **CASES[case])
    assert [row.pop("scale/loss_scale") for row in found] == [2.0**10] * 3
    assert [row.pop("scale/skipped") for row in found] == [0.0] * 3
    for row, plain in zip(found, expected, strict=True):
        assert row.keys() == plain.keys()
        for key in row:
            assert known(row[key]) == pytest.approx(known(plain[key]), rel=1e-5, abs=1e-12), key
