"""The part of `expertmesh top` about experts: who served how much, and over which links.

Ranks x layers as a heat map; beside it what each rank sent and how long its steps took; under it
how even each layer was, and how even the placement in force can make it.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from rich.text import Text

from cluster.server.proto.expertmesh.v1 import control_pb2 as pb
from deploy.top import heat_map
from deploy.top.heat_map import FloatArray, short

SURROUNDINGS = 4  # lines beside those of ranks: layers, served, planned, legend
_MIB = 2**20
_LINKS = " node  net   ms"
_MIN_MAP = 10  # characters; narrower than this, the links give way


def load_lines(
    balance: pb.GetBalanceResponse, width: int, max_rows: int, *, ascii_only: bool
) -> list[Text]:
    """At most `max_rows` + SURROUNDINGS lines."""
    if not balance.ranks or not balance.layers:
        return [Text("no rank has reported on its experts", "dim")]
    ranks = sorted(balance.ranks, key=lambda rank: (rank.node, rank.rank))
    rows = heat_map.rank_bins([rank.node for rank in ranks], max_rows)
    margin = max(7, *(len(row.label) + 1 for row in rows))
    with_links = width - margin - len(_LINKS) >= _MIN_MAP
    room = max(1, width - margin - (len(_LINKS) if with_links else 0))
    columns = heat_map.even_bins([layer.layer for layer in balance.layers], room)
    cell = heat_map.cell_width(len(columns), room)

    loads_GB = heat_map.busiest(
        heat_map.relative(_served(ranks, len(balance.layers))), rows, columns
    )
    heat = [heat_map.heat_line(loads_B, cell, ascii_only=ascii_only) for loads_B in loads_GB]
    links = [_links([ranks[i] for i in row.members]) for row in rows]
    lines = [_line("layer", margin, heat_map.header(columns, cell))]
    lines += [_line(row.label, margin, text) for row, text in zip(rows, heat, strict=True)]
    if with_links:
        for line, text in zip(lines, [_LINKS, *links], strict=True):
            line.pad_right(margin + cell * len(columns) - line.cell_len)
            line.append(text, "dim" if text is _LINKS else "")
    for name, values_L in (
        ("served", positive(layer.balancedness for layer in balance.layers)),
        ("plan", positive(layer.planned for layer in balance.layers)),
    ):
        worst_B = np.array([np.fmin.reduce(values_L[list(c.members)]) for c in columns])
        lines.append(_line(name, margin, heat_map.balancedness_line(worst_B, cell)))
    together = len(rows) < len(ranks) or len(columns) < len(balance.layers)
    return [*lines, _legend(cell, together=together, ascii_only=ascii_only)]


def positive(values: Iterable[float]) -> FloatArray:
    """The values, NaN where there is none: 0 on the wire."""
    array = np.array([*values], dtype=np.float64)
    return np.where(array > 0, array, np.nan)


def _served(ranks: Sequence[pb.RankBalance], num_layers: int) -> FloatArray:
    """[R, L] pairs served; a rank that has not reported yet has served none."""
    served_RL = np.zeros((len(ranks), num_layers))
    for row_L, rank in zip(served_RL, ranks, strict=True):
        known = rank.served[:num_layers]
        row_L[: len(known)] = known
    return served_RL


def _links(ranks: Sequence[pb.RankBalance]) -> str:
    """What these ranks send together, and the slowest one's step; as wide as _LINKS."""
    intra = sum(rank.intra_node_bytes_per_s for rank in ranks) / _MIB
    inter = sum(rank.inter_node_bytes_per_s for rank in ranks) / _MIB
    step_ms = max(rank.step_ms for rank in ranks)
    return f" {short(intra):>4} {short(inter):>4} {short(step_ms):>4}"


def _line(name: str, margin: int, content: Text) -> Text:
    return Text(name.ljust(margin)).append_text(content)


def _legend(cell: int, *, together: bool, ascii_only: bool) -> Text:
    """What cells and digits mean, in one line."""
    worst = ", busiest of each" if together else ""
    if cell == heat_map.NUMBER_WIDTH:
        return Text(
            f"load / layer's mean{worst}; served, plan: mean / max; node, net: MiB/s", "dim"
        )
    line = heat_map.scale(ascii_only=ascii_only)
    return line.append(f" x layer's mean{worst}; served, plan: tenths", "dim")
