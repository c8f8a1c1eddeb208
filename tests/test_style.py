"""Colors and markers of variants: distinct, readable in both themes, and the same in every study."""

import itertools
import re

from helpers import ALL_VARIANTS
from matplotlib.markers import MarkerStyle

from stabrun.report import style

PAGE = "#ffffff", "#15181c"  # backgrounds of the page


def linear(color):
    """Linear sRGB, each channel from 0 to 1."""
    channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    return [channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in channels]


def contrast(color, other):
    """WCAG 2 contrast ratio."""
    low, high = sorted(
        sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), linear(one), strict=True))
        for one in (color, other)
    )
    return (high + 0.05) / (low + 0.05)


def test_shipped_variants_have_colors_and_markers_of_their_own():
    shipped = list(style.SHIPPED)
    assert len(shipped) == len({style.color(name) for name in shipped}) == len({style.marker(name) for name in shipped})
    assert (style.color("baseline"), style.marker("qk_norm")) == ("#767676", "square"), "as in earlier reports"


def test_no_two_shipped_variants_look_the_same():
    named = [*style.SHIPPED, *style.FURTHER]
    assert set(named) <= set(ALL_VARIANTS)
    looks = [style.of_variant(name) for name in named]
    assert len(set(looks)) == len(looks)
    assert not set(looks) & {style.of_variant(f"mine_{number}") for number in range(400)}


def test_a_13th_variant_looks_like_no_shipped_one():
    colors, markers = zip(*style.SHIPPED.values(), strict=True)
    looks = {style.of_variant(f"mine_{number}") for number in range(400)}
    assert len(looks) == len(style.OTHER_COLORS) * len(style.OTHER_MARKERS) == 40
    assert not {color for color, _ in looks} & set(colors)
    assert not {marker for _, marker in looks} & set(markers)
    assert style.of_variant("mine") == style.of_variant("mine")


def test_each_color_is_readable_on_both_themes_and_each_marker_known_to_matplotlib():
    colors = [color for color, _ in style.SHIPPED.values()] + list(style.OTHER_COLORS)
    assert min(contrast(color, background) for color, background in itertools.product(colors, PAGE)) > 2.8
    for _, marker in [*style.SHIPPED.values(), *((None, marker) for marker in style.OTHER_MARKERS)]:
        MarkerStyle(style.MATPLOTLIB_MARKERS[marker])


def test_further_settings_of_a_variant_differ_by_dash():
    assert style.color("qk_norm n_layer=4") == style.color("qk_norm")
    arms = ["qk_norm n_layer=2", "qk_norm n_layer=4", "baseline n_layer=2"]
    assert [style.dash(arm, arms) for arm in arms] == ["solid", "dash", "solid"]


def test_shares_are_colored_from_light_to_dark_with_readable_text():
    assert [style.share_color(share) for share in (0.0, 0.5, 1.0)] == list(style.SHARE)
    assert re.fullmatch("#[0-9A-F]{6}", style.share_color(0.3))
    assert min(contrast(style.share_color(step / 10), "#000000") for step in range(11)) > 4.5
