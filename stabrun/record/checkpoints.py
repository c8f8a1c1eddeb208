"""The directories of checkpoints of a run: `checkpoints/step_00000200/` holds the state after 200 updates."""

from pathlib import Path

META = "meta.json"  # is written last: without it, a directory is no checkpoint
DIGITS = 8


def name_of(step: int) -> str:
    return f"step_{step:0{DIGITS}d}"


def steps(folder: Path) -> dict[int, Path]:
    """Updates → path of the checkpoints below `folder`, the newest first. Other files and directories are ignored."""
    found = {}
    for path in folder.glob(f"step_*/{META}"):
        digits = path.parent.name.removeprefix("step_")
        # int() reads at most some thousand digits, and digits of other scripts.
        if digits.isascii() and digits.isdigit() and len(digits) < 20 and path.parent.name == name_of(int(digits)):
            found[int(digits)] = path.parent
    return dict(sorted(found.items(), reverse=True))
