"""One look for a variant everywhere: its colour, marker and dash, the same in every study and on every page.

The colours are those of Okabe and Ito, and their kin, moved so far that each stands out on white and on black.
"""

import hashlib

COLOURS = {
    "baseline": "#767676",
    "qk_norm": "#0072B2",
    "qk_norm_cap": "#D55E00",
    "qkv_norm": "#009E73",
    "qk_fc_norm": "#C45C99",
    "fc_norm": "#8B6CC1",
    "soft_cap": "#3FA0D8",
    "soft_temp": "#D08A00",
    "soft_clip": "#8F8A1D",
    "layer_scale": "#B0485E",
    "sigma_reparam": "#2E9C9C",
    "small_sublayers": "#A0673A",
}
OTHERS = "#5B7FD1", "#4F9A3A", "#B858C8", "#C9774B", "#5C8A99", "#A8803C"
MARKERS = {  # matplotlib's → plotly's; an X means diverged, and is no variant's
    "o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross", "*": "star",
    "h": "hexagon", "<": "triangle-left", ">": "triangle-right", "p": "pentagon", "d": "diamond-tall",
}  # fmt: skip
DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}


def place(variant: str) -> int:
    """A number that a variant of one's own keeps in every study."""
    return int(hashlib.sha256(variant.encode()).hexdigest()[:8], 16)


def colour(arm: str) -> str:
    variant = arm.split(" ")[0]
    return COLOURS.get(variant) or OTHERS[place(variant) % len(OTHERS)]


def marker(arm: str) -> str:
    variant, marks = arm.split(" ")[0], list(MARKERS)
    return marks[list(COLOURS).index(variant) if variant in COLOURS else place(variant) // 7 % len(marks)]


def dash(arm: str, arms: list[str]) -> str:
    """Solid, and others for the further settings of the same variant."""
    same = [other for other in arms if other.split(" ")[0] == arm.split(" ")[0]]
    return list(DASHES)[same.index(arm) % len(DASHES)] if arm in same else "-"


def look(arm: str, arms: list[str]) -> dict[str, str]:
    """How the page draws an arm."""
    return {"colour": colour(arm), "symbol": MARKERS[marker(arm)], "dash": DASHES[dash(arm, arms)]}
