"""A figure as SVG for the page and as PNG beside it, the same bytes each time.

The SVG is made to stand among others in one page: its ids are its own, it has no fixed size, and what
is drawn in the text's colour follows the page from light to dark.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from simulations.report.style import INK, styled

WIDTH = 10.4  # inches
PIXELS_PER_INCH = 1160 / WIDTH  # in the page, where there is room


@dataclass(frozen=True, kw_only=True)
class Picture:
    """`name` is that of its PNG file; `caption` says how to read it, `alt` what is on it."""

    name: str
    title: str
    caption: str
    alt: str
    svg: str
    png: bytes
    width: float


def draw(
    name: str,
    title: str,
    caption: str,
    alt: str,
    paint: Callable[[Figure], None],
    *,
    height: float,
    width: float = WIDTH,
) -> Picture:
    """Make a figure of this size (inches), let `paint` fill it, and save it both ways."""
    with styled():
        figure = Figure(figsize=(width, height), dpi=2 * PIXELS_PER_INCH, layout="constrained")
        paint(figure)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # done once, for both files
        # Not by `savefig`, which draws everything once more to find a size that is given here.
        png, svg = io.BytesIO(), io.StringIO()
        figure.set_facecolor("white")
        FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})  # type: ignore[no-untyped-call]
        figure.set_facecolor("none")
        # Last, since it leaves the figure at 72 dots per inch.
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None})  # type: ignore[no-untyped-call]
    return Picture(
        name=name,
        title=title,
        caption=caption,
        alt=alt,
        svg=_for_the_page(svg.getvalue(), name),
        png=png.getvalue(),
        width=width * PIXELS_PER_INCH,
    )


def _for_the_page(svg: str, name: str) -> str:
    """Only the drawing, with ids that no other picture has."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s*<style type="text/css">.*?</style>', "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg ", '<svg aria-hidden="true" ', 1)
    svg = re.sub(r'(\sid="|\bhref="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace(INK, "currentColor")
