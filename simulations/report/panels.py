"""Small multiples: panels that share their axes, in rows."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def panels_of(figure: Figure, count: int, *, columns: int, share: bool) -> list[Axes]:
    """So many panels in rows, the rest of the last row left out."""
    columns = min(columns, count)
    rows = -(-count // columns)
    grid = figure.subplots(rows, columns, sharex=share, sharey=share, squeeze=False)
    flat: list[Axes] = list(grid.flat)
    for axes in flat[count:]:
        axes.remove()
    for axes in flat[max(0, count - columns) : count]:
        axes.tick_params(labelbottom=True)  # the panel below may have been left out
    return flat[:count]
