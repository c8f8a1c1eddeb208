"""What the ranks of a run exchange: data parallel training, each on its share of the batch.

Every rank has the whole model and optimizer. A step exchanges the gradients, by one sum, and the values of its row, so
that each rank takes the same decisions from the same row. Tensors on a GPU go through NCCL; all else through gloo, so
that no decision waits for a GPU.
"""

import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from stabrun.training.place import Place

TOGETHER = 1 << 24  # numbers that are copied into one tensor for an exchange: at most 64 MiB
TIMEOUT = timedelta(minutes=30)  # until a rank that does not answer counts as lost: the first may write a checkpoint
RESUMES = "the same command resumes from the last checkpoint"


class LostRankError(ConnectionResetError):
    """An exchange failed, in most cases because another rank has ended or does not answer."""


class Ranks:
    """The only rank of a run: it exchanges nothing."""

    def __init__(self, place: Place | None = None) -> None:
        self.place = place or Place()
        self.count, self.first = self.place.count, self.place.first

    def part(self, batch: Tensor) -> Tensor:
        """This rank's rows of a batch: every `count`-th, so that the first rows of all ranks are those of the batch.

        Contiguous: a pinned tensor with gaps would be copied to a GPU by way of one that is not pinned, and waited for.
        """
        return batch[self.place.number :: self.count].contiguous()

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks."""

    def gather(self, values: Tensor) -> Tensor:
        """The values `[n]` of each rank, `[ranks, n]`."""
        return values[None]

    def total(self, value: float) -> float:
        """The sum of a number over the ranks."""
        return value

    def any(self, flag: bool) -> bool:
        """Whether any rank has raised a flag."""
        return flag

    def from_first(self, value: Any) -> Any:
        """The first rank's value, which can be pickled."""
        return value

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by that of the first rank."""


class Group(Ranks):
    """One of several ranks. Every rank makes the same calls in the same order; LostRankError if one cannot."""

    def add(self, tensors: Iterable[Tensor]) -> None:
        for bucket in buckets(tensors):
            whole = torch.cat([tensor.flatten() for tensor in bucket]) if len(bucket) > 1 else bucket[0]
            with self._exchange():
                dist.all_reduce(whole)
            if len(bucket) > 1:
                for tensor, part in zip(bucket, whole.split([t.numel() for t in bucket]), strict=True):
                    tensor.copy_(part.view_as(tensor))

    def gather(self, values: Tensor) -> Tensor:
        parts = torch.empty(self.count, len(values), dtype=values.dtype, device=values.device)
        with self._exchange():
            dist.all_gather(list(parts.unbind(0)), values)
        return parts

    def total(self, value: float) -> float:
        return self._reduced(value, dist.ReduceOp.SUM)

    def any(self, flag: bool) -> bool:
        return self._reduced(float(flag), dist.ReduceOp.MAX) > 0

    def _reduced(self, value: float, how: Any) -> float:
        """A number of the host, which no GPU is asked for."""
        number = torch.tensor(value, dtype=torch.float64, device="cpu")
        with self._exchange():
            dist.all_reduce(number, how)
        return number.item()

    def from_first(self, value: Any) -> Any:
        box = [value if self.first else None]
        with self._exchange():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return value if self.first else box[0]

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            with self._exchange():
                dist.broadcast(tensor, src=0)

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            why = f"an exchange with the other ranks failed ({str(error).splitlines()[0][:200]}); {RESUMES}"
            raise LostRankError(errno.ECONNRESET, why, f"rank {self.place.number}") from error


@contextmanager
def joined(place: Place, device: torch.device) -> Iterator[Ranks]:
    """This process among the ranks of its run, while the block runs. Waits for all of them."""
    if place.count == 1:
        yield Ranks(place)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events and the loss scale use the current device
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    yield Group(place)
    dist.destroy_process_group()  # not after an error: NCCL would wait for the rank that is lost


def buckets(tensors: Iterable[Tensor], limit: int = TOGETHER) -> Iterator[Sequence[Tensor]]:
    """Consecutive tensors of at most `limit` elements together; a larger one alone."""
    bucket, size = list[Tensor](), 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
