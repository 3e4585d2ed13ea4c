"""A planned rebalance and its outcome in words, for people and as JSON."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from cluster.server.proto.expertmesh.v1 import control_pb2 as pb

_MIB = 2**20


def effect_table(answer: pb.RebalanceResponse) -> Table:
    """One line for each layer that changes, and one for those that stay: the worst of them."""
    table = Table(title="imbalance (max / mean over ranks) by layer", title_justify="left")
    table.add_column("layer")
    for name in ("before", "after", "bound", "moves", "MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("reason")
    for layer in answer.layers:
        if layer.moves:
            table.add_row(str(layer.layer), *_figures([layer]), escape(layer.reason))
    staying = [layer for layer in answer.layers if not layer.moves]
    if staying:
        worst = max(staying, key=lambda layer: layer.imbalance_before)
        table.add_section()
        table.add_row(
            ranges([layer.layer for layer in staying]), *_figures(staying), escape(worst.reason)
        )
    return table


def _figures(layers: list[pb.LayerEffect]) -> list[str]:
    """The worst imbalances of these layers and the sum of what moves."""
    return [
        f"{max(layer.imbalance_before for layer in layers):.3f}",
        f"{max(layer.imbalance_after for layer in layers):.3f}",
        f"{max(layer.lower_bound for layer in layers):.3f}",
        f"{sum(layer.moves for layer in layers):,}",
        f"{sum(layer.bytes for layer in layers) / _MIB:,.1f}",
    ]


def totals(answer: pb.RebalanceResponse) -> str:
    """What the whole plan brings, in two or three lines."""
    lines = []
    if answer.layers:
        before = [layer.imbalance_before for layer in answer.layers]
        after = [layer.imbalance_after for layer in answer.layers]
        lines.append(
            f"mean imbalance {sum(before) / len(before):.3f} -> {sum(after) / len(after):.3f}, "
            f"worst {max(before):.3f} -> {max(after):.3f}"
        )
    moves = sum(layer.moves for layer in answer.layers)
    lines.append(f"experts to move: {moves:,}, {size(answer.bytes)}")
    state = "started" if answer.started else "nothing was changed"
    lines.append(f"{state}: {answer.reason}" if answer.reason else state)
    return "\n".join(lines)


@dataclass(frozen=True)
class Outcome:
    """How a rebalance ended: what came of its plan between two readings of the counters."""

    finished: bool
    moves: int
    bytes: int
    seconds: float
    error: str

    @staticmethod
    def between(
        before: pb.RebalanceStats, after: pb.RebalanceStats, plan: pb.RebalanceResponse
    ) -> "Outcome":
        """The server's count of bytes lags behind that of experts, which are all of one size."""
        moves, planned = after.moves - before.moves, sum(layer.moves for layer in plan.layers)
        abandoned = after.abandoned > before.abandoned
        return Outcome(
            finished=not abandoned,
            moves=moves,
            bytes=plan.bytes * moves // max(1, planned),
            seconds=after.seconds - before.seconds,
            error=(after.last_error or "the server gave no reason") if abandoned else "",
        )

    def __str__(self) -> str:
        moved = f"experts moved: {self.moves:,}, {size(self.bytes)} in {self.seconds:.1f} s"
        return f"finished: {moved}" if self.finished else f"abandoned: {self.error}; {moved}"


def as_json(answer: pb.RebalanceResponse, outcome: Outcome | None) -> dict[str, Any]:
    """started, bytes, reason, layers.<layer>.{...}; `outcome` is null where nothing was begun."""
    fields = ("imbalance_before", "imbalance_after", "lower_bound", "moves", "bytes", "reason")
    return {
        "started": answer.started,
        "epoch": answer.epoch,
        "bytes": answer.bytes,
        "reason": answer.reason,
        "layers": {
            str(layer.layer): {name: getattr(layer, name) for name in fields}
            for layer in answer.layers
        },
        "outcome": asdict(outcome) if outcome else None,
    }


def size(num_bytes: float) -> str:
    """Bytes for people: 0 MiB, 308 MiB, 17.7 GiB."""
    mib = num_bytes / _MIB
    for unit in ("MiB", "GiB", "TiB"):
        if mib < 1000:
            return f"{mib:.1f} {unit}" if 0 < mib < 100 else f"{mib:.0f} {unit}"
        mib /= 1024
    return f"{mib:,.0f} PiB"


def ranges(numbers: list[int]) -> str:
    """[3, 4, 5, 9] as "3-5, 9"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
