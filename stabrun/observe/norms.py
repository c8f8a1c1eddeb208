"""Norms of many tensors at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

HALF = torch.float16, torch.bfloat16


def tensor_norms(tensors: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """The norm of each tensor, `[len(tensors)]`, without waiting for the device; in fp32 at least.

    The norm of a sharded tensor is that of the whole, exchanged with the ranks that share it. `torch._foreach_norm` is
    private; the public `torch.nn.utils.get_total_norm`, which uses it, returns only the norm over all tensors, and one
    `vector_norm` per tensor costs a kernel launch each.
    """
    if len({hasattr(tensor, "full_tensor") for tensor in tensors}) > 1:  # some are sharded: one kind at a time
        return torch.cat([tensor_norms([tensor], order) for tensor in tensors])
    half = any(tensor.dtype in HALF for tensor in tensors)
    return whole(torch.stack(torch._foreach_norm(list(tensors), order, torch.float32 if half else None)))


def whole(tensor: Any) -> Tensor:
    """A tensor that is sharded over ranks, on each of them; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def dense(gradient: Any) -> Tensor:
    """The values that a gradient has: of a sparse one, those that are not zero."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient
