"""One frame of `expertmesh top`: the state of a cluster in any number of lines and columns.

Ranks and replicas share the height that the rest leaves, and are put together where they do not
fit. The last line is always the state of the connection.
"""

import textwrap
from dataclasses import dataclass

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from cluster.server.proto.expertmesh.v1 import control_pb2 as pb
from deploy.rebalance_effect import size
from deploy.top.load import SURROUNDINGS, load_lines, positive
from deploy.top.replicas import TITLES, replica_lines


@dataclass(frozen=True)
class Snapshot:
    """What the server answered, all at about the same time."""

    endpoint: str
    info: pb.GetServerInfoResponse
    balance: pb.GetBalanceResponse
    loads: pb.GetLoadsResponse


@dataclass(frozen=True)
class Frame:
    """Renders a snapshot to at most the width and height of the console."""

    snapshot: Snapshot
    status: Text  # of the connection

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from frame_lines(
            self.snapshot,
            self.status,
            options.max_width,
            options.height or options.size.height,
            ascii_only=options.ascii_only,
        )


def frame_lines(
    snapshot: Snapshot, status: Text, width: int, height: int, *, ascii_only: bool = False
) -> list[Text]:
    """At most `height` lines of at most `width` characters; `status` is the last."""
    balance, loads = snapshot.balance, snapshot.loads
    head, events = _head_lines(snapshot), _rebalance_lines(balance, width)
    # Rows of ranks and of replicas: what lines with a fixed place leave.
    room = height - len(head) - len(events) - SURROUNDINGS - TITLES - 1
    few = replica_lines(loads, max(1, room // 3, room - len(balance.ranks)), ascii_only=ascii_only)
    load = load_lines(balance, width, room - len(few) + TITLES, ascii_only=ascii_only)
    replicas = replica_lines(loads, room - len(load) + SURROUNDINGS, ascii_only=ascii_only)
    lines = _spaced([head, load, events, replicas], height - 1)[: max(0, height - 1)]
    lines.append(status.copy())
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="crop" if ascii_only else "ellipsis")
    return lines


def _spaced(sections: list[list[Text]], height: int) -> list[Text]:
    """All lines, with blank ones after sections as far as there is room."""
    spare = height - sum(map(len, sections))
    lines: list[Text] = []
    for section in sections:
        lines += section
        if section and spare > 0:
            lines.append(Text())
            spare -= 1
    return lines


def _head_lines(snapshot: Snapshot) -> list[Text]:
    """What runs here, and how even it is."""
    info, balance = snapshot.info, snapshot.balance
    state = "draining" if info.draining else "ready" if info.ready else "not ready"
    title = Text()
    title.append(f"{info.model} on {snapshot.endpoint}", "bold")
    title.append(f"  {state}", "green" if state == "ready" else "bold red")
    title.append(
        f"  {info.num_nodes} x {info.ranks_per_node} ranks, TP {info.tensor_parallel_size}"
    )
    title.append(f"  epoch {balance.epoch}")
    line = Text(f"balancedness {balance.window_s:.0f} s:")
    served_L = positive(layer.balancedness for layer in balance.layers)
    if np.isnan(served_L).all():
        return [title, line.append(" no expert has served anything", "dim")]
    worst = balance.layers[int(np.nanargmin(served_L))].layer
    line.append(f" mean {balance.balancedness_mean:.3f}  p50 {balance.balancedness_p50:.3f}")
    line.append(f"  min {balance.balancedness_min:.3f} (layer {worst})", "bold")
    planned_L = positive(layer.planned for layer in balance.layers)
    if not np.isnan(planned_L).all():
        line.append(f"  planned {np.nanmean(planned_L):.3f}")
    return [title, line]


def _rebalance_lines(balance: pb.GetBalanceResponse, width: int) -> list[Text]:
    """What was moved so far, what is going on, why, and what went wrong last."""
    stats = balance.rebalances
    counts = Text()
    counts.append("rebalances: ", "bold").append(f"{stats.started} started, ")
    counts.append(f"{stats.finished} finished, ")
    counts.append(f"{stats.abandoned} abandoned", "red" if stats.abandoned else "")
    counts.append(f"; {size(stats.bytes)} moved, ")
    counts.append(f"stall {stats.stall_ms:.1f} ms", "red" if stats.stall_ms >= 1 else "")
    lines = [counts]
    if stats.running:
        lines.append(Text(f"  now: {_one_line(stats.doing) or 'planning'}", "bold cyan"))
    if stats.last_reason:
        lines.append(Text(f"  last reason: {_one_line(stats.last_reason)}"))
    if stats.last_error:
        told = textwrap.wrap(stats.last_error, max(20, width - 14), max_lines=2, placeholder=" ...")
        label = "  last error: "
        for part in told:
            lines.append(Text(label + part, "red"))
            label = " " * len(label)
    if balance.enabled_reason:
        lines.append(Text(f"  automatic: {_one_line(balance.enabled_reason)}", "dim"))
    return lines


def _one_line(text: str) -> str:
    return " ".join(text.split())
