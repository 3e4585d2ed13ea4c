"""`expertmesh placement`: which rank holds which experts, layer by layer.

Small clusters get a table of ranks x slots for every layer; what would not fit a few screens gets
one line per layer, and `--layer` shows a single one in full.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.server.client import ClientError
from cluster.server.proto.expertmesh.v1 import control_pb2 as pb
from deploy.failed_calls import TIMEOUT_S, report
from deploy.json_file import write_json
from deploy.server_options import Server

_MAX_LINES = 100  # of tables for all layers
_MAX_NAMED = 8  # replicated experts that a summary names


@dataclass(frozen=True)
class LayerView:
    """One or more consecutive layers with the same experts in the same slots."""

    layers: tuple[int, ...]
    experts: tuple[int, ...]  # by slot of all ranks, -1 empty
    slots_per_rank: int

    @property
    def name(self) -> str:
        first, last = self.layers[0], self.layers[-1]
        return f"layer {first}" if first == last else f"layers {first} to {last}"

    @property
    def copies(self) -> Counter[int]:
        """How many slots hold each expert."""
        return Counter(expert for expert in self.experts if expert >= 0)

    def ranks(self) -> list[tuple[int, ...]]:
        size = self.slots_per_rank
        return [self.experts[i : i + size] for i in range(0, len(self.experts), size)]


def placement_command(server: Server, layer: int | None, json_file: Path | None) -> int:
    """Print and write who holds what; 2 for a layer that the model has no experts in."""
    try:
        with server.client(TIMEOUT_S) as calls:
            answer = calls.placement()
    except ClientError as error:
        return report(server.endpoint, error)
    console = Console()
    views = layer_views(answer)
    if layer is not None:
        known = [number for view in views for number in view.layers]
        if layer not in known:
            held = f"{known[0]} to {known[-1]}" if known else "none"
            print(
                f"--layer {layer}: no experts there; layers with experts: {held}", file=sys.stderr
            )
            return 2
        views = [replace(view, layers=(layer,)) for view in views if layer in view.layers]
    console.print(_headline(answer))
    if not views:
        console.print("no layer with experts")
    elif layer is not None or fits(views, console.width):
        _print_tables(console, views, answer)
    else:
        console.print(summary_table(views))
        console.print("expertmesh placement --layer N shows the slots of one layer")
    write_json(json_file, as_json(answer))
    return 0


def layer_views(answer: pb.GetExpertPlacementResponse) -> list[LayerView]:
    """The layers of an answer, equal neighbours together."""
    rows = [(layer.layer, tuple(layer.experts)) for layer in answer.layers]
    return [
        LayerView(tuple(number for number, _ in group), experts, max(1, answer.slots_per_rank))
        for experts, group in groupby(rows, key=lambda row: row[1])
    ]


def fits(views: Sequence[LayerView], width: int) -> bool:
    """Whether tables of all layers are a few screens, each rank on one line."""
    lines = sum(len(view.ranks()) + 5 for view in views)
    return lines <= _MAX_LINES and all(_has_columns(view, width) for view in views)


def _has_columns(view: LayerView, width: int) -> bool:
    """Whether a column for each slot is narrow enough."""
    digits = len(str(max(view.experts)))
    return 20 + (digits + 4) * view.slots_per_rank <= width


def layer_table(view: LayerView, ranks_per_node: int, width: int) -> Table:
    """Ranks x slots; experts with more than one copy carry an asterisk."""
    copies = view.copies
    wide = not _has_columns(view, width)
    columns = ["experts"] if wide else [str(slot) for slot in range(view.slots_per_rank)]
    table = Table(title=f"experts of {view.name} by slot", title_justify="left")
    for name in ("node", "rank"):
        table.add_column(name, justify="right")
    for name in columns:
        table.add_column(name, justify="left" if wide else "right")
    for rank, experts in enumerate(view.ranks()):
        cells = [_cell(expert, copies) for expert in experts]
        last_of_node = (rank + 1) % ranks_per_node == 0
        row = [Text(" ").join(cells)] if wide else cells
        table.add_row(str(rank // ranks_per_node), str(rank), *row, end_section=last_of_node)
    return table


def summary_table(views: Sequence[LayerView]) -> Table:
    """One line per layer: copies beyond the first, empty slots, who has most copies."""
    table = Table("layers", "redundant", "empty", "experts with most copies")
    for view in views:
        copies = view.copies
        table.add_row(
            view.name.partition(" ")[2],
            str(copies.total() - len(copies)),
            str(view.experts.count(-1)),
            _most_copied(copies),
        )
    return table


def _most_copied(copies: Counter[int]) -> str:
    """As "3 of 17, 4; 2 of 0, 1, 2 and 56 more": how many copies of which experts."""
    replicated = sorted((-n, expert) for expert, n in copies.items() if n > 1)
    named = [
        f"{-n} of {', '.join(str(expert) for _, expert in some)}"
        for n, some in groupby(replicated[:_MAX_NAMED], key=lambda pair: pair[0])
    ]
    left = len(replicated) - _MAX_NAMED
    return "; ".join(named) + (f" and {left} more" if left > 0 else "")


def as_json(answer: pb.GetExpertPlacementResponse) -> dict[str, Any]:
    """layers.<layer>[rank][slot]: the expert, -1 where the slot is empty."""
    return {
        "epoch": answer.epoch,
        "num_experts": answer.num_experts,
        "num_ranks": answer.num_ranks,
        "ranks_per_node": answer.ranks_per_node,
        "slots_per_rank": answer.slots_per_rank,
        "layers": {
            str(number): [list(rank) for rank in view.ranks()]
            for view in layer_views(answer)
            for number in view.layers
        },
    }


def _headline(answer: pb.GetExpertPlacementResponse) -> str:
    return (
        f"epoch {answer.epoch}: {answer.num_experts} experts a layer on {answer.num_ranks} ranks, "
        f"{answer.slots_per_rank} slots each"
    )


def _print_tables(
    console: Console, views: Sequence[LayerView], answer: pb.GetExpertPlacementResponse
) -> None:
    for view in views:
        console.print(layer_table(view, max(1, answer.ranks_per_node), console.width))
    if any(max(view.copies.values(), default=0) > 1 for view in views):
        console.print("* expert with more than one copy")


def _cell(expert: int, copies: Counter[int]) -> Text:
    if expert < 0:
        return Text("-", style="dim")
    return Text(f"{expert}*", style="bold cyan") if copies[expert] > 1 else Text(str(expert))
