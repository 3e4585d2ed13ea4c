"""When to rebalance, and which layers: where a placement cannot be evened out by splitting batches
over the copies it has, surely, and for longer than moving experts takes.

A layer counts by its *re-split optimum*: the least max/mean over ranks that any division of the
window's mean load over the placement's copies gives. What the window knows of the load is uncertain;
a layer must exceed the threshold by more than that. Between threshold and target nothing happens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.load import LoadWindow
from router.placement import Placement
from router.split import resplit_optima

MIN_BATCHES = 1.5
"""One batch shows no variance: nobody knows what of it was chance."""
_TINY = 1e-300


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """When a layer is worth moving experts for.

    threshold: max/mean of the re-split optimum above which a layer is planned anew; target: what the
    planner then aims for. horizon_s: how long the present load is expected to last. expert_share: the
    part of a step that lasts as long as its slowest rank's experts. bytes_per_expert: of one expert in
    one layer; bandwidth: bytes/s that each rank may use to fetch them; slowdown: by how much steps
    take longer meanwhile.
    """

    threshold: float = 1.05
    target: float = 1.02
    horizon_s: float = 60.0
    expert_share: float = 0.5
    bytes_per_expert: int = 0
    bandwidth: float = math.inf
    slowdown: float = 0.02
    rank_speeds: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 1.0 <= self.target <= self.threshold:
            raise ValueError(
                f"Invalid policy: 1 <= target({self.target}) <= threshold({self.threshold}) must "
                "hold, or a plan that reaches the target is made anew at once"
            )
        if not (self.horizon_s > 0 and self.bandwidth > 0 and self.bytes_per_expert >= 0):
            raise ValueError(
                f"Invalid policy: horizon_s({self.horizon_s}) and bandwidth({self.bandwidth}) must "
                f"be > 0, bytes_per_expert({self.bytes_per_expert}) >= 0"
            )
        if not (0 <= self.expert_share <= 1 and 0 <= self.slowdown <= 1):
            raise ValueError(
                f"Invalid policy: expert_share({self.expert_share}) and slowdown({self.slowdown}) "
                "must be in [0, 1]"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """What to do and why.

    layers: those to plan anew, worst first. imbalance_L: max/mean of the re-split optimum of the mean
    load; noise_L: how much of it may be chance. gain: seconds saved over the horizon if those layers
    reach the target; bytes: what moving one expert to every rank in each of them would carry.
    """

    rebalance: bool
    layers: tuple[int, ...]
    reason: str
    imbalance_L: NDArray[np.float64]
    noise_L: NDArray[np.float64]
    gain: float = 0.0
    bytes: int = 0


class Policy:
    """Pure: the same window and placement, the same decision."""

    def __init__(self, options: PolicyOptions | None = None) -> None:
        self.options = options or PolicyOptions()

    def decide(self, window: LoadWindow, placement: Placement) -> Decision:
        """Which layers of `placement` to plan anew for the load of `window`.

        Raises ValueError where the two are of different sizes.
        """
        layers, experts = window.num_layers, window.num_experts
        if (layers, experts) != (placement.num_layers, placement.num_experts):
            raise ValueError(
                f"The window has {layers} layers of {experts} experts, the placement "
                f"{placement.num_layers} of {placement.num_experts}"
            )
        if window.num_batches < MIN_BATCHES:
            return _no(f"{window.num_batches:.0f} batches recorded, 2 are needed", layers)
        load = window.estimate()
        imbalance_L = resplit_optima(load.mean_LE, placement, self.options.rank_speeds)
        noise_L = _noise(load.mean_LE, window.error_LE(), placement.num_ranks)
        return self._weigh(imbalance_L, noise_L, placement.num_ranks)

    def pays(
        self, before: float, after: float, moves: int, num_layers: int, num_ranks: int
    ) -> bool:
        """Whether taking one of `num_layers` layers from imbalance `before` to `after` is worth it."""
        gain = self._gain(before, after) / num_layers
        return gain > self._cost(moves * self.options.bytes_per_expert, num_ranks)

    def _weigh(
        self, imbalance_L: NDArray[np.float64], noise_L: NDArray[np.float64], num_ranks: int
    ) -> Decision:
        options = self.options
        worst = int(imbalance_L.argmax())
        shown = f"layer {worst} is worst with {imbalance_L[worst]:.3f}"
        surely = np.flatnonzero(imbalance_L - noise_L > options.threshold)
        if not len(surely):
            if imbalance_L[worst] <= options.threshold:
                reason = f"balanced: {shown}, threshold {options.threshold:.3f}"
            else:
                reason = (
                    f"not sure: {shown}, of which {noise_L[worst]:.3f} may be chance, threshold "
                    f"{options.threshold:.3f}"
                )
            return _no(reason, len(imbalance_L), imbalance_L, noise_L)
        order = sorted(surely.tolist(), key=lambda layer: (-imbalance_L[layer], layer))
        layers = tuple(
            layer
            for layer in order
            if self.pays(imbalance_L[layer], options.target, num_ranks, len(imbalance_L), num_ranks)
        )
        chosen = layers or tuple(order)
        gain = sum(self._gain(float(imbalance_L[layer]), options.target) for layer in chosen)
        gain /= len(imbalance_L)
        num_bytes = len(chosen) * num_ranks * options.bytes_per_expert
        reason = (
            f"{len(chosen)} of {len(imbalance_L)} layers above {options.threshold:.3f}, {shown}: "
            f"saves {gain:.2f} s in {options.horizon_s:.0f} s, costs "
            f"{self._cost(num_bytes, num_ranks):.2f} s"
        )
        if not layers:
            return _no(f"not worth it: {reason}", len(imbalance_L), imbalance_L, noise_L)
        return Decision(
            rebalance=True,
            layers=layers,
            reason=reason,
            imbalance_L=imbalance_L,
            noise_L=noise_L,
            gain=gain,
            bytes=num_bytes,
        )

    def _gain(self, before: float, after: float) -> float:
        """Seconds of the horizon, if all layers went from one imbalance to the other."""
        return self.options.horizon_s * self.options.expert_share * max(0.0, 1 - after / before)

    def _cost(self, num_bytes: int, num_ranks: int) -> float:
        """Seconds lost while so many bytes arrive on all ranks at once."""
        return num_bytes / (self.options.bandwidth * num_ranks) * self.options.slowdown


def _noise(
    mean_LE: NDArray[np.float64], error_LE: NDArray[np.float64], num_ranks: int
) -> NDArray[np.float64]:
    """[L]: how far above the mean the fullest rank of all layers would seem to be if all were even.

    A rank's load is known with the errors of its experts; the largest of n normal errors is about
    sqrt(2 ln n) standard deviations (Cramer, Mathematical Methods of Statistics, 28.6).
    """
    rank_error_L = np.sqrt((error_LE**2).sum(axis=1) / num_ranks)
    rank_mean_L = np.maximum(mean_LE.sum(axis=1) / num_ranks, _TINY)
    noise_L: NDArray[np.float64] = (
        math.sqrt(2 * math.log(max(mean_LE.shape[0] * num_ranks, 2))) * rank_error_L / rank_mean_L
    )
    return noise_L


def _no(
    reason: str,
    num_layers: int,
    imbalance_L: NDArray[np.float64] | None = None,
    noise_L: NDArray[np.float64] | None = None,
) -> Decision:
    return Decision(
        rebalance=False,
        layers=(),
        reason=reason,
        imbalance_L=np.ones(num_layers) if imbalance_L is None else imbalance_L,
        noise_L=np.zeros(num_layers) if noise_L is None else noise_L,
    )
