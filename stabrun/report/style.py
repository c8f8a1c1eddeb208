"""Color, marker and dash of each variant, the same in every study, figure and page; and the scales of colors.

The colors of the shipped variants extend the palette of Okabe and Ito. The others are those that stay furthest from
them and from each other, also as seen with protanopia and deuteranopia. All are readable on white and on black.
"""

import hashlib
from typing import Any

# Variant → color and marker (plotly's name). An x marks a diverged run and belongs to no variant.
SHIPPED = {
    "baseline": ("#767676", "circle"),
    "qk_norm": ("#0072B2", "square"),
    "qk_norm_cap": ("#D55E00", "triangle-up"),
    "qkv_norm": ("#009E73", "diamond"),
    "qk_fc_norm": ("#C45C99", "triangle-down"),
    "fc_norm": ("#8B6CC1", "cross"),
    "soft_cap": ("#3FA0D8", "star"),
    "soft_temp": ("#D08A00", "hexagon"),
    "soft_clip": ("#8F8A1D", "triangle-left"),
    "layer_scale": ("#B0485E", "triangle-right"),
    "sigma_reparam": ("#2E9C9C", "pentagon"),
    "small_sublayers": ("#A0673A", "diamond-tall"),
}
FURTHER = (  # other shipped variants: the first eight have colors that SHIPPED lacks, the others share colors
    "post_ln", "peri_ln", "reordered_norm", "hybrid_norm", "mix_ln", "dyt", "no_norm", "layer_norm_scaling",
    "embedding_norm", "v_norm", "sandwich", "double_norm", "batch_norm", "gated_attention", "qk_clip", "final_cap",
    "z_loss", "gpt2", "llama", "olmo2", "gemma2", "nemotron", "muon", "stable_adamw", "adagc", "zclip", "no_clip",
    "high_beta2", "small_eps",
)  # fmt: skip
OTHER_COLORS = "#713DFF", "#0088FF", "#9B2DD2", "#C2009B", "#719F60", "#FF3D57", "#496979", "#97560C"
OTHER_MARKERS = "octagon", "hexagon2", "star-diamond", "hexagram", "star-triangle-up"

MATPLOTLIB_MARKERS: dict[str, Any] = {
    "circle": "o", "square": "s", "triangle-up": "^", "diamond": "D", "triangle-down": "v", "cross": "P", "star": "*",
    "hexagon": "h", "triangle-left": "<", "triangle-right": ">", "pentagon": "p", "diamond-tall": "d", "octagon": "8",
    "hexagon2": "H", "star-diamond": (4, 1, 0), "hexagram": (6, 1, 0), "star-triangle-up": (3, 1, 0),
    "x-thin": "x", "y-down": "2", "line-ns": "|",
}  # fmt: skip
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}

DEPTH, TIME = "depth", "time"
SCALES = {
    DEPTH: {
        "light": ["#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39"],
        "dark": ["#8f7fe8", "#5f8ae0", "#3f9cc4", "#2fb09a", "#5cc66e", "#a3d94a", "#f0e650"],
    },
    TIME: {
        "light": ["#0d0887", "#5c01a6", "#9c179e", "#cc4778", "#ed7953", "#e09b20", "#b5a300"],
        "dark": ["#7f7bff", "#a26cf2", "#c95fd0", "#e2659a", "#f0866a", "#fbae45", "#f3e65f"],
    },
}
"""Scale → theme → colors from the first to the last layer or step."""
SHARE = "#F4F1EA", "#F0B040", "#D9581F"  # none, half and all; black text is readable on each


def color(arm: str) -> str:
    return of_variant(arm.split(" ")[0])[0]


def marker(arm: str) -> str:
    return of_variant(arm.split(" ")[0])[1]


def of_variant(variant: str) -> tuple[str, str]:
    """Color and marker. Those of a user's own variant depend on its name alone."""
    if variant in FURTHER:
        place, (colors, markers) = FURTHER.index(variant), zip(*SHIPPED.values(), strict=True)
        return (*OTHER_COLORS, *colors)[place % (len(OTHER_COLORS) + len(colors))], markers[(place + 1) % len(markers)]
    number = int(hashlib.sha256(variant.encode()).hexdigest()[:8], 16)
    other = OTHER_COLORS[number % len(OTHER_COLORS)], OTHER_MARKERS[number % len(OTHER_MARKERS)]
    return SHIPPED.get(variant, other)


def dash(arm: str, arms: list[str]) -> str:
    """Solid for the first setting of the further axes of a variant, other dashes for the next ones."""
    same = [other for other in arms if other.split(" ")[0] == arm.split(" ")[0]]
    return list(DASHES)[same.index(arm) % len(DASHES)]


def on_scale(name: str, position: float) -> str:
    """A color by its position on a scale, from 0 to 1; the renderer picks the theme."""
    return f"{name} {position:.3f}"


def share_color(share: float) -> str:
    """Color of a share from 0 to 1, interpolated."""
    below = min(int(2 * share), 1)
    parts = zip(*(bytes.fromhex(SHARE[place][1:]) for place in (below, below + 1)), strict=True)
    return "#" + "".join(f"{round(low + (high - low) * (2 * share - below)):02X}" for low, high in parts)
