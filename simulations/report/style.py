"""How pictures look: one palette, one colour for each policy everywhere, readable on light and dark.

Colours are those of Okabe and Ito ("Color universal design", 2008), which people who do not see red
and green apart can tell from each other; lines also differ in their dashes. What is drawn in INK takes
the colour of the page's text.
"""

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_rgb

INK = "#1b2733"
FAINT = "#8a949e"  # grids, rules, marks: on white and on near-black alike
BLUE, SKY, ORANGE, RED = "#0072b2", "#56b4e9", "#e69f00", "#d55e00"
GREEN, PINK, GREY = "#009e73", "#cc79a7", "#868e96"

_POLICIES = {"none": GREY, "eplb": ORANGE, "eplb_relabel": RED, "static": SKY, "ours": BLUE}
_OTHERS = (GREEN, PINK, "#b8a500", "#7b5ea7", "#8c564b")
_LABELS = {
    "none": "no balancing",
    "eplb": "EPLB",
    "eplb_relabel": "EPLB, relabelled",
    "static": "ours, even split",
    "ours": "ours",
}
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.2, 1.5)), (0, (9, 2)))
MAX_LABEL = 32
Colour = tuple[float, float, float, float]

_SETTINGS: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.parse_math": False,  # names are not formulas
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "figure.facecolor": "none",
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.7,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",  # text stays text: small files, can be searched
    "svg.hashsalt": "expertmesh",  # the same picture has the same bytes
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


def _colour_map(name: str, colours: Sequence[str]) -> Colormap:
    """Between these colours, in even steps; a cell without a value is grey on any page."""
    made = LinearSegmentedColormap.from_list(name, colours)
    return made.with_extremes(bad=(0.5, 0.5, 0.5, 0.25))


LOAD_MAP = _colour_map("load", ["#05396b", "#3f8fcf", "#f4f4f2", "#e58a2f", "#7a2e00"])
"""Below the mean blue, the mean white, above it orange to brown."""
AMOUNT_MAP = _colour_map("amount", ["#f3f6f9", "#a9cfe8", "#4a98cf", "#115a99", "#08264d"])
"""From nothing to the most."""


@contextmanager
def styled() -> Iterator[None]:
    """Inside, figures are made and saved in this style. Names in any script are let through."""
    with mpl.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        warnings.filterwarnings("ignore", "Matplotlib currently does not support")
        yield


def colour_of(name: str, names: Collection[str]) -> str:
    """A policy's colour; others than ours take turns, in the order of `names`."""
    if name in _POLICIES:
        return _POLICIES[name]
    others = [other for other in names if other not in _POLICIES]
    return _OTHERS[others.index(name) % len(_OTHERS)]


def dashes_of(name: str, names: Collection[str]) -> str | tuple[float, tuple[float, ...]]:
    """A policy's line style; that of ours, and of what stands alone, is solid."""
    if name == "ours" or len(names) == 1:
        return "-"
    known = [policy for policy in _POLICIES if policy != "ours"]
    place = known.index(name) if name in known else list(names).index(name)
    return _DASHES[1 + place % (len(_DASHES) - 1)]


def label_of(name: str) -> str:
    """What a policy is called in legends and tables."""
    return _LABELS.get(name, name)


def short(text: str, longest: int = MAX_LABEL) -> str:
    """A label that leaves room for the picture: one line, cut after so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def readable_on(colour: Colour) -> str:
    """Black or white, whichever is easier to read on this colour (WCAG relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#ffffff" if luminance < 0.179 else "#000000"
