"""Norms of many tensors at once."""

from collections.abc import Sequence

import torch
from torch import Tensor


def tensor_norms(tensors: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """The norm of each tensor, `[len(tensors)]`, without waiting for the device.

    `torch._foreach_norm` is private; the public `torch.nn.utils.get_total_norm`, which uses it, returns only the norm
    over all tensors, and one `vector_norm` per tensor costs a kernel launch each.
    """
    return torch.stack(torch._foreach_norm(list(tensors), order))
