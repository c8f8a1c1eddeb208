"""What `watch.json` says of a watched run, in place of the configuration that a run of stabrun has."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from stabrun.config import UserError
from stabrun.record.jsonl import read_checked, write_checked
from stabrun.record.schema import FORMAT
from stabrun.record.types import wrong_field


@dataclass(frozen=True)
class Watched:
    """A run of another training loop, attached to by `stabrun.watch`.

    `model` is the class of the model. `planned` is the number of steps of the whole run, if known; `constant` says that
    the learning rate is. `every` and `slow_every` are the steps between two measurements. `sites` lists the paths of
    each site's modules by layer, several of one layer joined by ", "; those in `single` lie outside the layers.
    `stacks` lists the paths of the blocks of each stack of layers, whose name is "" if it is the only one. `settings`
    holds what the caller says about the run.
    """

    format: int = FORMAT
    model: str = ""
    planned: int | None = None
    constant: bool = False
    every: int = 1
    slow_every: int = 1
    sites: dict[str, list[str]] = field(default_factory=dict)
    stacks: dict[str, list[str]] = field(default_factory=dict)
    single: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the run is called: the setting `name`, or else the class of its model."""
        return str(self.settings.get("name") or self.model or "watched run")

    @property
    def lr(self) -> float | None:
        """The setting `lr`, if it is a number."""
        value = self.settings.get("lr")
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    @property
    def seed(self) -> int | None:
        """The setting `seed`, if it is a whole number."""
        value = self.settings.get("seed")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @staticmethod
    def read(file: Path) -> "Watched":
        """What a file holds: keys of other versions are left out, missing ones have their defaults.

        Raises UserError if it is damaged.
        """
        facts = read_checked(file, "Restore it.")
        known = {item.name: facts[item.name] for item in fields(Watched) if item.name in facts}
        if wrong := wrong_field(known, Watched):
            raise UserError(f"{file} is damaged: {wrong} is {str(known[wrong])[:40]!r}.")
        return Watched(**known)

    def write(self, file: Path) -> None:
        write_checked(file, asdict(self))
