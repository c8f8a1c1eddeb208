"""What the ranks of someone's distributed training exchange about a watched run."""

import torch
from torch import Tensor, nn
from torch import distributed as dist

from stabrun.config import UserError


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


def refuse_sharding(model: nn.Module) -> None:
    """Raise UserError at a model whose layers cannot be observed as they are split over devices or ranks."""
    kinds = {type(module).__name__ for module in model.modules()}
    if "FullyShardedDataParallel" in kinds:
        raise UserError(
            "watch: the model is wrapped in FullyShardedDataParallel, which hides its weights; use fully_shard (FSDP2)."
        )
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1:
        raise UserError(f"watch: the model lies on several devices ({', '.join(sorted(devices))}); only one can be.")
    split = [name for name, parameter in model.named_parameters() if hasattr(parameter, "full_tensor")]
    if split and not any(kind.startswith("FSDP") for kind in kinds):
        raise UserError(
            f"watch: {split[0]} is split over ranks by tensor parallelism, whose layer outputs are parts of vectors; "
            "only data parallelism and fully_shard can be observed."
        )
