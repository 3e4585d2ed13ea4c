"""Dispatchers by the name that configuration uses."""

from typing import Any

from comms.base import BaseDispatcher
from comms.flat import FlatDispatcher
from comms.groups import ParallelGroups
from comms.hierarchical import HierarchicalDispatcher
from comms.local import LocalDispatcher
from comms.low_latency import LowLatencyDispatcher

DISPATCHERS: dict[str, type[BaseDispatcher]] = {
    "flat": FlatDispatcher,
    "hierarchical": HierarchicalDispatcher,
    "low_latency": LowLatencyDispatcher,
}


def make_dispatcher(name: str, groups: ParallelGroups, **options: Any) -> BaseDispatcher:
    """Options as in `BaseDispatcher`. Raises ValueError naming the dispatchers there are."""
    if name not in DISPATCHERS:
        raise ValueError(f"all2all_backend must be one of {sorted(DISPATCHERS)}, got {name!r}")
    return DISPATCHERS[name](groups, **options)


def dispatcher_for(name: str, groups: ParallelGroups, **options: Any) -> BaseDispatcher:
    """The dispatcher of that name, or, in a world of one rank, the one that sends nothing."""
    if groups.topology.world_size == 1:
        return LocalDispatcher(groups, **options)
    return make_dispatcher(name, groups, **options)
