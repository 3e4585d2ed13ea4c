"""Dispatchers by the name that configuration uses."""

from comms.dispatcher import CombineMode, DispatchDtype, TokenDispatcher, TrafficLedger
from comms.flat import FlatDispatcher
from comms.groups import ParallelGroups
from comms.hierarchical import HierarchicalDispatcher

DISPATCHERS: dict[str, type[FlatDispatcher] | type[HierarchicalDispatcher]] = {
    "flat": FlatDispatcher,
    "hierarchical": HierarchicalDispatcher,
}


def make_dispatcher(
    name: str,
    groups: ParallelGroups,
    *,
    slots_per_rank: int,
    hidden: int,
    dispatch_dtype: DispatchDtype = "bfloat16",
    combine: CombineMode = "node",
    ledger: TrafficLedger | None = None,
) -> TokenDispatcher:
    """Raises ValueError naming the dispatchers there are."""
    if name not in DISPATCHERS:
        raise ValueError(f"all2all_backend must be one of {sorted(DISPATCHERS)}, got {name!r}")
    return DISPATCHERS[name](
        groups,
        slots_per_rank=slots_per_rank,
        hidden=hidden,
        dispatch_dtype=dispatch_dtype,
        combine=combine,
        ledger=ledger,
    )
