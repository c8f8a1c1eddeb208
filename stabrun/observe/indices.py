"""Numbers as tensors of indices on a device."""

from collections.abc import Iterable

import torch
from torch import Tensor

MOST = 256  # tensors kept


class Indices:
    """Makes the usual ones once: the copy of a list waits for a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.made: dict[tuple[int, ...], Tensor] = {}

    def of(self, numbers: Iterable[int]) -> Tensor:
        """The numbers, `[n]` int64. The tensor is shared, and must not be changed."""
        key = tuple(numbers)
        if key not in self.made:
            if len(self.made) == MOST:
                self.made.clear()
            self.made[key] = torch.tensor(key, dtype=torch.long, device=self.device)
        return self.made[key]
