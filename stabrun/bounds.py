"""How long, deep and repeated a text from outside may be before it is parsed."""

import yaml

from stabrun.config import UserError

DEPTH = 32  # of brackets in an override, and of a configuration file
LONGEST = 100_000  # characters of an override, and bytes of a configuration file
NODES = 10_000  # values of a configuration file, those that aliases repeat included


def refuse_nesting(word: str) -> None:
    """UserError at an override whose brackets are nested too deeply for Hydra's parser, or that is too long."""
    depth = 0
    for character in word:
        depth += (character in "([{") - (character in ")]}")
        if depth > DEPTH:
            raise UserError(f"{word[:40]}…: brackets are nested deeper than {DEPTH} levels.")
    if len(word) > LONGEST:
        raise UserError(f"{word[:40]}…: is longer than {LONGEST:,} characters.")


def refuse_yaml(text: bytes, name: str) -> None:
    """UserError at YAML that is too large, too deep, or whose aliases contain themselves or multiply.

    Reads the events of the YAML only, without making its values. `name`: the file or the override that contains it.
    """
    if len(text) > LONGEST:
        raise UserError(f"{name}: is larger than {LONGEST:,} bytes; it is not a configuration file.")
    anchors = dict[str, tuple[int, int] | None]()  # number of values and depth; None while the value is open
    above = list[tuple[str | None, int, int]]()  # anchor, values and depth of each open value
    try:
        for event in yaml.parse(text, Loader=yaml.CSafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                above.append((event.anchor, 1, 1))
                if event.anchor:
                    anchors[event.anchor] = None
                count, depth = 0, 0
            elif isinstance(event, yaml.AliasEvent):
                found = anchors.get(event.anchor, (1, 1))  # an unknown one is refused by the parser of the values
                if found is None:
                    raise UserError(f"{name}: the alias *{event.anchor} contains itself.")
                count, depth = found
            elif isinstance(event, yaml.ScalarEvent):
                count, depth = 1, 1
                if event.anchor:
                    anchors[event.anchor] = 1, 1
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, count, depth = above.pop()
                if anchor:
                    anchors[anchor] = count, depth
            else:
                continue
            if above:
                anchor, values, height = above[-1]
                above[-1] = anchor, values + count, max(height, depth + 1)
            if count > NODES or (above and above[-1][1] > NODES):
                raise UserError(f"{name}: has more than {NODES:,} values, those that aliases repeat included.")
            if len(above) + depth > DEPTH:
                raise UserError(f"{name}: is nested deeper than {DEPTH} levels.")
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not YAML that can be read: {' '.join(str(error).split())[:200]}.") from error
