"""Steps whose loss or gradient is far above the recent ones, found on the device: nothing waits for it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from stabrun.config import TrainConfig
from stabrun.record.jsonl import jsonable, number

WINDOW = 128  # steps that a loss or a gradient norm is compared with
LEAST = 32  # of them: with fewer, only values that are not finite are outliers
NORMAL_MAD = 1.4826  # standard deviation of a normal variable over its median absolute deviation
LEAST_SPREAD = 1e-3  # of the median: losses that hardly change have no outliers within that


def highest_loss(recent: Tensor, sigmas: float) -> Tensor:
    """The highest loss that is no outlier, 0-dim: median + `sigmas` · 1.4826 · median absolute deviation.

    `recent` is `[n]`; NaN stands for no value. Neither statistic is moved much by less than half of the values.
    """
    median = recent.nanmedian()
    spread = NORMAL_MAD * (recent - median).abs().nanmedian()
    return median + sigmas * torch.maximum(spread, LEAST_SPREAD * median.abs())


class Outliers:
    """Decides which updates `train.recovery=skip` leaves out.

    A step is an outlier if its loss or gradient norm is not finite, its loss is above `highest_loss` of the last WINDOW
    steps that were none, or its gradient norm is above `train.outlier_grad` times their median. Outliers in a row after
    `train.recovery_limit` of them are applied, and compared with from then on: the level may have changed for good.
    In fp16, gradients that overflow are left to the loss scale.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config, self.active = config, config.recovery == "skip"
        self.keys = ("recovery/skipped",) if self.active else ()
        self.recent = torch.full((2, WINDOW), torch.nan, device=device)  # losses and gradient norms
        self.in_a_row = torch.zeros((), device=device)

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor | None:
        """1 if the update with this loss and gradient norm is to be left out, else 0; 0-dim. None if not active."""
        if not self.active:
            return None
        config, finite = self.config, torch.isfinite(torch.stack([loss, norm]))
        enough = (~self.recent[0].isnan()).sum() >= LEAST
        far = (loss > highest_loss(self.recent[0], config.outlier_loss)) | (
            norm > config.outlier_grad * self.recent[1].nanmedian()
        )
        scaled = config.precision == "fp16"
        outlier = ~finite[0] | (enough & far & finite[1]) | (torch.zeros_like(far) if scaled else ~finite[1])
        skipped = outlier & (self.in_a_row < config.recovery_limit)
        self.in_a_row = torch.where(outlier, self.in_a_row + 1, torch.zeros_like(self.in_a_row))
        values = torch.stack([loss, norm])[:, None]
        self.recent = torch.where(finite.all() & ~skipped, torch.cat([self.recent[:, 1:], values], dim=1), self.recent)
        return skipped.float()

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, of JSON's types; empty if not active."""
        if not self.active:
            return {}
        state: dict[str, Any] = jsonable({"recent": self.recent.tolist(), "in_a_row": self.in_a_row.item()})
        return state

    def load(self, state: dict[str, Any]) -> None:
        if self.active and state:
            self.recent.copy_(torch.tensor([numbers(row) for row in state["recent"]]))
            self.in_a_row.fill_(state["in_a_row"])


def numbers(row: Iterable[Any]) -> list[float]:
    return [number(value) for value in row]
