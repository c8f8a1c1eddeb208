"""Finds the sites and layers of any model from the types and paths of its modules."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from stabrun.config import UserError
from stabrun.observe.sites import Layer, Sites
from stabrun.text import aligned

Pattern = str | re.Pattern[str]  # a glob, or a regular expression
Patterns = Pattern | Sequence[Pattern]
Choice = Patterns | Mapping[str, Patterns] | None
Parts = tuple[str, ...]

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # parts of a path that wrappers add
EXPERT = re.compile(r"(expert_?)?\d+")  # the name of one of several experts
SHOWN = 8  # sites that an error names


@dataclass(frozen=True)
class Place:
    """A module, and where it is: its path, the stack and the block that it is in, and its path inside the block.

    Outside of all stacks, `block` is empty and `inside` is the whole path. Of a block itself, `inside` is empty.
    """

    path: str
    module: nn.Module
    stack: Parts
    block: tuple[int, ...]
    inside: Parts


def find_sites(model: nn.Module, chosen: Choice = None) -> Sites:
    """The sites of a model: linear layers, embeddings and experts, or the modules that `chosen` selects.

    `chosen`: globs or compiled regular expressions of module paths, or names of sites, which select modules of any
    type; or a mapping of names to such patterns, which adds sites to those that are found. Raises UserError if a
    pattern matches no module, or is none.
    """
    places = all_places(model)
    usual = [place for place in places if is_site(place.module)]
    names = site_names(usual)
    sites = {place: names[place.stack, place.inside] for place in usual}
    if isinstance(chosen, Mapping):
        for name, patterns in chosen.items():
            sites |= {place: name for pattern in listed(patterns) for place in matching(places, sites, pattern)}
    elif chosen is not None:
        selected = [place for pattern in listed(chosen) for place in matching(places, sites, pattern)]
        others = site_names(selected)
        sites = {place: sites.get(place, others[place.stack, place.inside]) for place in selected}
    if not sites:
        raise UserError("watch: the model has no linear layer or embedding; name its modules with sites=.")
    return in_layers({place: sites[place] for place in places if place in sites}, places)


def in_layers(sites: Mapping[Place, str], places: Iterable[Place]) -> Sites:
    """Sites by name, each with its layer in every block of its stack."""
    used = {place.stack for place in sites if place.block}
    blocks: dict[Parts, dict[tuple[int, ...], Place]] = {}
    for place in places:
        if place.stack in used and place.block and not place.inside:
            blocks.setdefault(place.stack, {})[place.block] = place
    found: dict[str, list[dict[str, nn.Module]]] = {}
    for place, name in sites.items():
        order: list[tuple[int, ...]] = [*blocks[place.stack]] if place.block else [()]
        layers = found.setdefault(name, [{} for _ in order])
        layers[order.index(place.block)][place.path] = place.module
    names = stack_names([*blocks])
    return Sites(
        {name: [Layer(own) if own else None for own in layers] for name, layers in found.items()},
        frozenset(name for place, name in sites.items() if not place.block),
        {names[stack]: {p.path: p.module for p in order.values()} for stack, order in blocks.items()},
    )


def is_site(module: nn.Module) -> bool:
    """Whether statistics of a module are taken by default.

    Linear layers, embeddings, GPT-2's Conv1D (a linear layer with a transposed weight), and the experts of a mixture
    that are matrices of one tensor.
    """
    if isinstance(module, (nn.Linear, nn.Embedding)) or type(module).__name__ == "Conv1D":
        return True
    experts = type(module).__name__.endswith("Experts")
    return experts and any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))


def all_places(model: nn.Module) -> list[Place]:
    """Every module below a model once, in order.

    A numbered container is a stack of blocks unless its children are sites themselves. Within a block, numbers belong
    to the path, with two exceptions: experts share one place, and the blocks of a stage continue the stack.
    """
    seen = set[nn.Module]()

    def walk(module: nn.Module, path: Parts, stack: Parts, block: tuple[int, ...], inside: Parts) -> Iterator[Place]:
        for name, wrapped in module.named_children():
            child, where = unwrapped(wrapped), (stack, block, (*inside, name))
            if child in seen:
                continue
            seen.add(child)
            if inside and "expert" in inside[-1].lower() and EXPERT.fullmatch(name):
                where = stack, block, inside
            elif name.isdigit() and not is_site(child) and (not block or is_stage(module)):
                where = stack + inside, (*block, int(name)), ()
            yield Place(".".join((*path, name)), child, *where)
            yield from walk(child, (*path, name), *where)

    return list(walk(unwrapped(model), (), (), (), ()))


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of wrappers, such as that of torch.compile or DistributedDataParallel."""
    while True:
        name = next((name for name in WRAPPERS if name in module._modules), None)
        if isinstance(module, nn.parallel.DistributedDataParallel):
            name = "module"
        if name is None:
            return module
        module = module.get_submodule(name)


def is_stage(container: nn.Module) -> bool:
    """Whether the children of a container within a block are blocks again: of one type, with children of their own."""
    children = list(container.children())
    return len({type(child) for child in children}) == 1 and any(True for _ in children[0].children())


def listed(patterns: Patterns) -> list[Pattern]:
    """One pattern or several, as a list. Raises UserError if there is none, or one is no glob or regular expression."""
    found = [patterns] if not isinstance(patterns, Sequence) or isinstance(patterns, str) else [*patterns]
    if not found or not all(isinstance(pattern, (str, re.Pattern)) for pattern in found):
        raise UserError(
            f"watch: sites={patterns!r}: must be a glob or a compiled regular expression of module paths, a list of "
            "such, or a dictionary of names to such."
        )
    return found


def matching(places: Iterable[Place], sites: Mapping[Place, str], pattern: Pattern) -> list[Place]:
    """The places whose path, or site, a pattern matches. Raises UserError if there is none."""
    found = [place for place in places if matches(pattern, place.path) or matches(pattern, sites.get(place, ""))]
    if not found:
        names = list(dict.fromkeys(sites.values()))
        more = f" and {len(names) - SHOWN} more" * (len(names) > SHOWN)
        text = pattern if isinstance(pattern, str) else pattern.pattern
        raise UserError(f"watch: sites={text!r} matches no module; the model has {', '.join(names[:SHOWN])}{more}.")
    return found


def matches(pattern: Pattern, text: str) -> bool:
    return fnmatchcase(text, pattern) if isinstance(pattern, str) else pattern.search(text) is not None


# Names


def site_names(places: Iterable[Place]) -> dict[tuple[Parts, Parts], str]:
    """(stack, path inside the block) → a short name: the last part, and the fewest others that tell it apart."""
    paths = {(place.stack, place.inside): (*place.stack, *place.inside) for place in places}
    short = short_names(list(dict.fromkeys(paths.values())))
    return {key: short[path] for key, path in paths.items()}


def short_names(paths: Sequence[Parts]) -> dict[Parts, str]:
    """Path → a name that no other has: its last part, and those parts, from the right, in which it differs."""

    def part(path: Parts, place: int) -> str:
        return path[-place] if place <= len(path) else ""

    def split(group: Sequence[Parts], places: tuple[int, ...]) -> Iterator[tuple[Parts, str]]:
        if len(group) == 1:
            yield group[0], ".".join(part(group[0], place) for place in sorted(places, reverse=True)).strip(".")
            return
        differing = [n for n in range(1, 1 + max(map(len, group))) if len({part(path, n) for path in group}) > 1]
        named = [n for n in differing if not any(part(path, n).isdigit() for path in group)]
        place = (named or differing)[0]
        for value in dict.fromkeys(part(path, place) for path in group):
            yield from split([path for path in group if part(path, place) == value], (*places, place))

    names: dict[Parts, str] = {}
    for last in dict.fromkeys(path[-1] for path in paths):
        first = (1, 2) if last.isdigit() else (1,)
        names |= split([path for path in paths if path[-1] == last], first)
    repeated = {name for name in names.values() if list(names.values()).count(name) > 1}
    return {path: ".".join(path) if name in repeated else name for path, name in names.items()}


def stack_names(stacks: Sequence[Parts]) -> dict[Parts, str]:
    """Path of a stack → its name: empty if it is the only one, else the last part that no other stack has."""
    if len(stacks) == 1:
        return {stacks[0]: ""}
    names = {}
    for stack in stacks:
        others = {part for other in stacks if other != stack for part in other}
        own = [part for part in stack if part not in others]
        names[stack] = own[-1] if own else ".".join(stack)
    return names


# What is printed


def table(sites: Sites) -> str:
    """The sites as a table: name, layers, type, shape of the weights, path with * for what differs between layers."""
    rows = [["site", "layers", "type", "weights", "modules"]]
    for name, layers in sites.sites.items():
        present = [layer for layer in layers if layer]
        kinds = dict.fromkeys(type(module).__name__ for layer in present for module in layer.modules.values())
        shapes = dict.fromkeys("×".join(map(str, w.shape)) for layer in present for w in layer.weights())
        count = "" if name in sites.single else str(len(present))
        paths = [path for layer in present for path in layer.modules]
        rows.append([name, count, ", ".join(kinds), ", ".join([*shapes][:2]) or "none", common_path(paths)])
    return "\n".join(aligned(rows))


def common_path(paths: Sequence[str]) -> str:
    """Paths of equal length as one, with * for the parts in which they differ."""
    columns = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(column[0] if len(set(column)) == 1 else "*" for column in columns)
