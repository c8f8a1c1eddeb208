"""What the ranks of someone's distributed training exchange about a watched run.

All is sent through the default process group, so that it ends when that one's timeout does.
"""

from collections.abc import Callable
from typing import TypeVar
from zlib import crc32

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate

from stabrun.config import UserError
from stabrun.observe.sites import Sites

T = TypeVar("T")


def rank_count() -> int:
    """The processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    return rank_count() == 1 or dist.get_rank() == 0


def gather(values: Tensor) -> Tensor:
    """The values `[n]` of each rank, `[ranks, n]`."""
    count = rank_count()
    if count == 1:
        return values[None]
    parts = torch.empty(count, len(values), dtype=values.dtype, device=values.device)
    dist.all_gather(list(parts.unbind()), values.contiguous())
    return parts


def on_any(here: bool, device: torch.device) -> bool:
    """Whether something is so on any rank."""
    return bool(gather(torch.tensor([float(here)], device=device)).any()) if rank_count() > 1 else here


def gather_text(text: str, device: torch.device) -> list[str]:
    """The text of each rank."""
    if rank_count() == 1:
        return [text]
    data = text.encode()
    lengths = gather(torch.tensor([len(data)], device=device)).flatten().tolist()
    padded = torch.tensor([*data.ljust(max(lengths))], dtype=torch.uint8, device=device)
    return [bytes(row[:length]).decode() for row, length in zip(gather(padded).tolist(), lengths, strict=True)]


def from_first(make: Callable[[], T], device: torch.device) -> T:
    """What `make` returns on the first rank, on all of them. A UserError that it raises there is raised on all."""
    if rank_count() == 1:
        return make()
    box: list[T | str | None] = [None, None]
    if is_first():
        try:
            box[0] = make()
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, device=device)
    if box[1] is not None:
        raise UserError(str(box[1]))
    return box[0]  # type: ignore[return-value]


def refuse_different(sites: Sites, device: torch.device) -> None:
    """Raise UserError, on all ranks, if they have different sites: their values could not be merged."""
    names = repr(
        [(name, [sorted(layer.modules) if layer else [] for layer in own]) for name, own in sites.sites.items()]
    )
    if len(gather(torch.tensor([crc32(names.encode())], device=device)).unique()) > 1:
        raise UserError(
            "watch: the ranks have different modules, as in pipeline parallelism; each must have the whole model."
        )


def refuse_sharding(model: nn.Module) -> None:
    """Raise UserError at a model whose layers cannot be observed as they are split over devices or ranks."""
    modules, parameters = [*model.modules()], [*model.named_parameters()]
    # A parameter of a module that was wrapped later, and of which the wrapper is not among the modules, is marked.
    if any(isinstance(m, FullyShardedDataParallel) for m in modules) or any(
        getattr(parameter, "_fsdp_flattened", False) or name.endswith("_flat_param") for name, parameter in parameters
    ):
        raise UserError(
            "watch: the model is wrapped in FullyShardedDataParallel, which hides its weights; use fully_shard (FSDP2)."
        )
    if any(isinstance(module, nn.DataParallel) for module in modules):
        raise UserError(
            "watch: the model is wrapped in DataParallel, which runs copies of it; use DistributedDataParallel."
        )
    devices = {str(parameter.device) for _, parameter in parameters}
    if "meta" in devices:
        raise UserError(
            "watch: the model has parameters on the meta device; watch it after they have values (to_empty)."
        )
    if len(devices) > 1:
        raise UserError(f"watch: the model lies on several devices ({', '.join(sorted(devices))}); only one can be.")
    # fully_shard splits a weight along one dimension of the mesh, and may repeat it along another.
    sharded = any(isinstance(module, FSDPModule) for module in modules)
    for name, parameter in parameters:
        if isinstance(parameter, DTensor):
            kept, used = parameter.device.type, parameter.device_mesh.device_type
            if kept != used:
                raise UserError(f"watch: {name} is kept on {kept} and used on {used}; do without CPUOffloadPolicy.")
            splits = sum(not isinstance(placement, Replicate) for placement in parameter.placements)
            if splits > 1 or not sharded:
                raise UserError(
                    f"watch: {name} is split over ranks by tensor parallelism, whose layer outputs are parts of "
                    "vectors; only data parallelism and fully_shard can be observed."
                )
