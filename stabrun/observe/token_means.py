"""Means over tokens of what hooks measure, such as the norm of each token's vector."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from stabrun.observe.indices import Indices

KEPT = 4096  # tensors kept before they are added up


@dataclass(eq=False)
class Row:
    """One of the means, by its position among all. Compiled code knows it by its tensor alone.

    torch.compile then sees the same hook in every layer, and makes one graph for all. It guards the fields that are
    read, but every field of a tuple. The tensors share no memory: of those that do, compiled code keeps the offsets,
    and every layer would add to the first one's.
    """

    position: int
    compiled: Tensor  # [2]: sum and number of values, of compiled code


class TokenMeans:
    """Sums and numbers of values per token, from any number of calls of each hook.

    A hook only keeps its values, and all are added up at once: on a CPU, a sum in each hook would take as long as the
    values that it sums. Compiled code cannot keep a tensor, and adds to one, where the sum is part of a larger loop.
    Recomputation doubles sum and number.
    """

    def __init__(self, places: Iterable[int], device: torch.device) -> None:
        self.rows = {place: Row(n, torch.zeros(2, device=device)) for n, place in enumerate(places)}
        self.kept: list[tuple[int, Tensor]] = []  # position, and values
        self.sums = torch.zeros(len(self.rows), 2, device=device)
        self.indices = Indices(device)
        self.places = self.indices.of(self.rows)

    def add(self, row: Row, values: Tensor) -> None:
        """Add values of any shape, which nothing changes before `collect`."""
        if torch.compiler.is_compiling():
            total = values.sum()
            row.compiled += torch.stack([total, torch.full_like(total, values.numel())])
        else:
            self.kept.append((row.position, values))
            if len(self.kept) == KEPT:
                self._add_up()

    def clear(self) -> None:
        """Start again."""
        self.kept.clear()
        torch._foreach_zero_([self.sums, *(row.compiled for row in self.rows.values())])

    def collect(self, sums: Tensor, numbers: Tensor) -> None:
        """Add everything to the `sums` and `numbers` of all places, fp32 `[places]` each, and start again."""
        if not self.rows:
            return
        self._add_up()
        self.sums += torch.stack([row.compiled for row in self.rows.values()])
        for into, column in zip((sums, numbers), self.sums.unbind(1), strict=True):
            into.index_add_(0, self.places, column)
        self.clear()

    def _add_up(self) -> None:
        alike: dict[tuple[torch.Size, torch.dtype], list[tuple[int, Tensor]]] = {}
        for position, values in self.kept:
            alike.setdefault((values.shape, values.dtype), []).append((position, values))
        for (shape, _), group in alike.items():
            totals = torch.stack([values for _, values in group]).reshape(len(group), -1).sum(1).to(self.sums.dtype)
            both = torch.stack([totals, torch.full_like(totals, shape.numel())], dim=1)
            self.sums.index_add_(0, self.indices.of(position for position, _ in group), both)
        self.kept.clear()
