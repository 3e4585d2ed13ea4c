"""When experts move while the cluster serves, and what that costs: none, EPLB, and our rebalancer.

Ours is the production policy, planner and order of work (cluster/rebalancer.py), in simulated time:
a look at the load every interval, few moves, layer by layer in the background, in force at the next
step. EPLB plans everything anew every so many steps and rewrites it while all wait.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.config import EplbConfig
from cluster.rebalance_draft import draft, worthwhile
from router.load import LoadWindow
from router.placement import IntArray, Placement
from router.policy import Policy, PolicyOptions
from simulations.balance.expert_moves import arrivals
from simulations.deployment import Deployment
from simulations.eplb import eplb
from simulations.hardware.calibration import Calibration
from simulations.serving.record import Event

BANDWIDTH = 1e9
"""Bytes/s of weights that a rank receives at most in the background: 2 % of a 400 Gbit/s link. Steps
take `PolicyOptions.slowdown` longer meanwhile."""
EPLB_INTERVAL_STEPS = 3000
"""vLLM's `eplb_config.step_interval`."""
FloatArray = NDArray[np.float64]
SETTINGS = EplbConfig(enabled=True)
"""Threshold, target, horizon and interval of ours are the server's defaults."""


class Change(NamedTuple):
    """Layers with new slots from now on, seconds for which all had to wait for that, and a report."""

    layers: tuple[int, ...] = ()
    pause_s: float = 0.0
    event: Event | None = None


NOTHING = Change()


class Rebalancing(Protocol):
    """`placement` is the one in force; `slowdown` by how much steps take longer now."""

    placement: Placement
    slowdown: float

    def advance(self, now_s: float, counts_LE: FloatArray) -> Change:
        """Before a step that starts now. `counts_LE` are pairs so far, ever."""

    def abandon(self) -> None:
        """Ranks were lost: what is under way is dropped."""


class Stay:
    """Experts stay where they were loaded."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.slowdown = 0.0

    def advance(self, now_s: float, counts_LE: FloatArray) -> Change:
        return NOTHING

    def abandon(self) -> None:
        """Nothing ever is."""


class Ours:
    """The production policy on looks at the load."""

    def __init__(self, placement: Placement, deployment: Deployment) -> None:
        self.placement = placement
        self.slowdown = 0.0
        self._window = LoadWindow(
            placement.num_layers, placement.num_experts, horizon=SETTINGS.window_size
        )
        self._policy = Policy(
            PolicyOptions(
                threshold=SETTINGS.threshold,
                target=SETTINGS.target,
                horizon_s=SETTINGS.horizon_s,
                bytes_per_expert=deployment.expert_bytes,
                bandwidth=BANDWIDTH,
            )
        )
        self._expert_s = deployment.expert_bytes / BANDWIDTH
        self._least_pairs = SETTINGS.min_tokens * deployment.model.gate.num_experts_per_token
        self._seen_LE = np.zeros((placement.num_layers, placement.num_experts))
        self._next_look_s = SETTINGS.interval_s
        self._under_way: deque[tuple[float, int, IntArray]] = deque()

    def advance(self, now_s: float, counts_LE: FloatArray) -> Change:
        arrived = {}
        while self._under_way and self._under_way[0][0] <= now_s:
            _, layer, row_S = self._under_way.popleft()
            arrived[layer] = row_S
        if arrived:
            self.placement = self.placement.with_layers(arrived)
        event = None
        if now_s >= self._next_look_s:
            self._next_look_s = now_s + SETTINGS.interval_s
            self._window.add(counts_LE - self._seen_LE)
            self._seen_LE = counts_LE.copy()
            if not self._under_way:
                event = self._consider(now_s)
        self.slowdown = self._policy.options.slowdown if self._under_way else 0.0
        return Change(tuple(arrived), event=event) if arrived or event else NOTHING

    def abandon(self) -> None:
        self._under_way.clear()
        self.slowdown = 0.0

    def _consider(self, now_s: float) -> Event | None:
        """As the rebalancer does: ask the policy, plan its layers, begin what pays."""
        if self._window.num_tokens < self._least_pairs or self.placement.num_ranks == 1:
            return None
        decision = self._policy.decide(self._window, self.placement)
        if not decision.rebalance:
            return None
        drafted = draft(
            self._window.estimate(), self.placement, target=SETTINGS.target, only=decision.layers
        )
        drafted = worthwhile(drafted, self._policy, self.placement)
        moves = 0
        done_s = now_s
        for layer, row_S in drafted.rows:
            received_R = _received(self.placement.with_layers({layer: row_S}), self.placement)
            moves += int(received_R.sum())
            done_s += float(received_R.max()) * self._expert_s
            self._under_way.append((done_s, layer, row_S))
        if not drafted.rows:
            return None
        layers = f"{len(drafted.rows)} layer{'s' * (len(drafted.rows) != 1)}"
        what = f"{moves} experts of {layers} move until {done_s:.1f} s"
        return Event(now_s, "rebalance", what)


class Eplb:
    """Global EPLB from the load of the last interval; all wait while the experts travel."""

    def __init__(
        self, placement: Placement, deployment: Deployment, calibration: Calibration
    ) -> None:
        self.placement = placement
        self.slowdown = 0.0
        self._expert_s = deployment.expert_bytes / calibration.links["network"].beta
        self._seen_LE = np.zeros((placement.num_layers, placement.num_experts))
        self._num_steps = 0

    def advance(self, now_s: float, counts_LE: FloatArray) -> Change:
        self._num_steps += 1
        if self._num_steps % EPLB_INTERVAL_STEPS:
            return NOTHING
        load_LE = counts_LE - self._seen_LE
        self._seen_LE = counts_LE.copy()
        current = self.placement
        planned_LS = eplb(load_LE, current.num_slots, 1, 1, current.num_ranks)
        layers = range(current.num_layers)
        self.placement = current.with_layers({layer: planned_LS[layer] for layer in layers})
        received_R = _received(self.placement, current)
        pause_s = float(received_R.max()) * self._expert_s
        what = f"{int(received_R.sum())} experts rewritten, all wait {pause_s:.2f} s"
        return Change(tuple(layers), pause_s, Event(now_s, "rebalance", what))

    def abandon(self) -> None:
        """It never does anything in the background."""


def _received(after: Placement, before: Placement) -> NDArray[np.int64]:
    """[R]: experts that each rank must get."""
    rows = after.physical_to_logical, before.physical_to_logical
    return np.asarray(arrivals(*rows, after.slots_per_rank).sum(axis=0))
