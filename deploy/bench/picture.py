"""Pictures of measurements, with matplotlib (`pip install expertmesh[report]`)."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

_COLOURS = {"static": "tab:gray", "rebalanced": "tab:blue"}


class PictureError(RuntimeError):
    """A picture cannot be made here."""


def check_pictures(path: Path | None) -> None:
    """Before the work: raise PictureError where `path` could not be drawn to. None: none is wanted."""
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise PictureError("pictures need matplotlib: pip install 'expertmesh[report]'")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise PictureError(f"{path}: a picture is a .png, .svg or .pdf file")
    if not path.resolve().parent.is_dir():
        raise PictureError(f"{path}: there is no directory {path.parent}")


def draw_balance(path: Path, curves: Mapping[str, Sequence[tuple[float, str, float]]]) -> None:
    """How even the ranks' load was, one curve per run, with the domains of the traffic marked.

    A point is (thousands of (token, expert) pairs served by a layer, domain, mean over layers of mean
    / max over ranks).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(
            [x for x, _, _ in points],
            [y for _, _, y in points],
            color=_COLOURS.get(name),
            marker=".",
            label=name,
        )
    begins = _domain_begins(next(iter(curves.values())))
    for x, domain in begins:
        axes.axvline(x, color="black", linewidth=0.8, linestyle=":")
        axes.text(x, 0.41, f" {domain}")
    axes.set(
        xlabel="thousand (token, expert) pairs served by each layer",
        ylabel="balancedness (mean / max over ranks)",
        ylim=(0.4, 1.02),
    )
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _domain_begins(points: Sequence[tuple[float, str, float]]) -> list[tuple[float, str]]:
    """Where each domain's traffic begins: at the end of the one before."""
    begins: list[tuple[float, str]] = []
    last = 0.0
    for x, domain, _ in points:
        if not begins or begins[-1][1] != domain:
            begins.append((last, domain))
        last = x
    return begins
