"""The part of `expertmesh top` about requests: what each replica has to do, and its KV cache."""

from collections.abc import Sequence

from rich.text import Text

from cluster.server.proto.expertmesh.v1 import control_pb2 as pb
from deploy.top.heat_map import even_bins, short

TITLES = 1  # lines beside those of replicas
_BAR = 16  # characters
_SILENT_S = 5.0  # replicas report every second at least


def replica_lines(loads: pb.GetLoadsResponse, max_rows: int, *, ascii_only: bool) -> list[Text]:
    """A title and at most `max_rows` lines; replicas that do not fit are put together."""
    replicas = sorted(loads.replicas, key=lambda replica: replica.replica)
    if not replicas:
        return [Text("no replica is connected", "bold red")]
    title = f"{'replica':<9}{'running':>8}{'waiting':>8}{'in flight':>10}  {'KV cache in use':<22}"
    lines = [Text(f"{title}{'step':>9}  heard", "dim")]
    for some in even_bins([replica.replica for replica in replicas], max_rows):
        lines.append(_line(some.label, [replicas[i] for i in some.members], ascii_only))
    return lines


def _line(label: str, replicas: Sequence[pb.ReplicaLoad], ascii_only: bool) -> Text:
    """Sums of requests; the fullest cache, the furthest step and the longest silence."""
    kv_usage = min(1.0, max(0.0, *(replica.kv_usage for replica in replicas), 0.0))
    heard_s = max(replica.last_heard_s for replica in replicas)
    line = Text(f"{label:<9}")
    for width, count in (
        (8, sum(replica.running for replica in replicas)),
        (8, sum(replica.waiting for replica in replicas)),
        (10, sum(replica.in_flight for replica in replicas)),
    ):
        line.append(f"{count:>{width},}")
    full = round(_BAR * kv_usage)
    filled, empty = ("#", ".") if ascii_only else ("█", "░")
    line.append("  ").append(filled * full, "red" if kv_usage > 0.9 else "green")
    line.append(empty * (_BAR - full), "dim").append(f" {kv_usage:>4.0%} ")
    line.append(f"{max(replica.step for replica in replicas):>9,}")
    return line.append(f"  {short(heard_s)} s ago", "red" if heard_s > _SILENT_S else "dim")
