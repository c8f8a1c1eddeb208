"""Where statistics are taken: the layers of a model by site, and its stacks of blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Layer:
    """What a site is in one layer: a module, or the experts of a mixture that share the tokens. Path → module."""

    modules: Mapping[str, nn.Module]

    def weights(self) -> list[nn.Parameter]:
        """The matrices of the modules themselves, looked up now: sharding replaces them. Not quantized ones."""
        own = [p for module in self.modules.values() for p in module.parameters(recurse=False)]
        return [p for p in dict.fromkeys(own) if p.dim() >= 2 and p.is_floating_point()]


@dataclass(frozen=True)
class Sites:
    """The layers to observe.

    `sites`: site → its layer in each block of its stack, None in a block without one; a list of one for a site outside
    all blocks. `single` holds the names of the latter. `stacks`: name of a stack → path → block; the name is empty if
    there is only one.
    """

    sites: Mapping[str, Sequence[Layer | None]] = field(default_factory=dict)
    single: frozenset[str] = frozenset()
    stacks: Mapping[str, Mapping[str, nn.Module]] = field(default_factory=dict)


def linear_sites(model: nn.Module) -> dict[str, list[Layer | None]]:
    """The linear layers of a model by the last part of their name, in order."""
    sites: dict[str, list[Layer | None]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            sites.setdefault(name.rsplit(".", 1)[-1], []).append(Layer({name: module}))
    return sites


def model_sites(model: nn.Module) -> Sites:
    """The sites of stabrun's own model."""
    blocks = {f"blocks.{i}": block for i, block in enumerate(model.get_submodule("blocks").children())}
    return Sites(linear_sites(model), stacks={"": blocks})
