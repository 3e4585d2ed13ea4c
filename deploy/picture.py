"""Pictures of measurements, with matplotlib (`pip install expertmesh[report]`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path


class PictureError(RuntimeError):
    """A picture cannot be made here."""


def draw_balance(path: Path, curves: Mapping[str, Sequence[tuple[float, str, float]]]) -> None:
    """Balancedness over time, one curve per run, with the domains of the traffic marked.

    A point is (seconds, domain, mean over layers of mean / max). Raises PictureError without
    matplotlib; the suffix of `path` says which format.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise PictureError("pictures need matplotlib: pip install 'expertmesh[report]'") from None
    figure = Figure(figsize=(8, 1 + 2 * len(curves)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(curves), sharey=True, squeeze=False)[:, 0]
    for axes, (name, points) in zip(rows, curves.items(), strict=True):
        axes.plot([p[0] for p in points], [p[2] for p in points], color="tab:blue", marker=".")
        _mark_domains(axes, points)
        axes.set(title=name, ylabel="balancedness", ylim=(0.3, 1.02))
        axes.grid(alpha=0.3)
    rows[-1].set_xlabel("seconds")
    figure.savefig(path, dpi=120)


def _mark_domains(axes: object, points: Sequence[tuple[float, str, float]]) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    domains = list(dict.fromkeys(domain for _, domain, _ in points))
    for idx, domain in enumerate(domains):
        times = [when for when, name, _ in points if name == domain]
        axes.axvspan(times[0], times[-1], alpha=0.08 + 0.08 * (idx % 2), color="tab:gray")
        axes.text(times[0], 0.33, f" {domain}")
