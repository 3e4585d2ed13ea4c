"""Other experts in a rank's slots, while it serves: prepared in the background, in force at once.

    epoch e in force --prepare(e + 1)--> fetching --all here and verified--> prepared --flip--> e + 1
                                            |                                   |
                                            +--------- failed, abandoned -------+--> as before

A prepared expert lies in memory of its own until `flip` puts it in force together with the map that
says so. Nobody writes to weights that are, or ever were, in force. So at any moment, and whatever
fails, a rank has one map and the weights that it names.

S slots of all ranks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from experts.slot_choice import SlotChoice
from experts.supply import ExpertSupply, SupplyError
from experts.weights import ExpertSlots, ExpertWeights
from router.placement import LayerPlacement, Placement

_CALL_OFF_S = 10.0  # for a fetch to notice; it looks twenty times a second


class MigrationError(RuntimeError):
    """A placement could not be prepared, or may not be flipped to or abandoned; says why."""


class HostsExperts(Protocol):
    """The part of an expert layer that changes."""

    slots: ExpertSlots
    layer_placement: LayerPlacement
    choice: SlotChoice


@dataclass(kw_only=True)
class MigrationMetrics:
    """Since the start. flip_s is the step thread's time, prepare_s that of others."""

    prepared: int = 0
    flipped: int = 0
    failed: int = 0
    abandoned: int = 0
    prepare_s: float = 0.0
    flip_s: float = 0.0
    longest_flip_s: float = 0.0


@dataclass(kw_only=True)
class _Staged:
    """The next placement, and what it puts into this rank's slots of one layer."""

    placement: Placement
    layer: int
    layer_placement: LayerPlacement
    deadline: float
    weights: dict[int, ExpertWeights] = field(default_factory=dict)
    """By local slot."""
    ready: bool = False
    committed: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)
    """Set when `prepare` has ended, well or not."""


class Migrator:
    """One rank's part in migrations. `placement` is the one in force, the same on all ranks.

    `flip` is for the thread that runs the layers, the rest for any other. One placement is prepared
    at a time.
    """

    def __init__(
        self,
        *,
        rank: int,
        placement: Placement,
        layers: Sequence[HostsExperts],
        supply: ExpertSupply,
    ) -> None:
        self.placement = placement
        self._metrics = MigrationMetrics()
        self._rank, self._layers, self._supply = rank, layers, supply
        self._lock = threading.Lock()  # held for a few assignments, never while anything is awaited
        self._staged: _Staged | None = None
        self._out_of_force: list[ExpertWeights] = []

    @property
    def epoch(self) -> int:
        """In force."""
        return self.placement.epoch

    @property
    def preparing(self) -> bool:
        """Whether weights are being fetched."""
        staged = self._staged
        return staged is not None and not staged.ready

    def metrics(self) -> dict[str, Any]:
        """The fields of `MigrationMetrics` and of `SupplyMetrics`."""
        return {**asdict(self._metrics), **asdict(self._supply.metrics)}

    # -- in the background ---------------------------------------------------------------------

    def prepare(self, epoch: int, layer: int, row: ArrayLike, timeout_s: float) -> None:
        """Get ready for `row` [S] in one layer (by its position among the expert layers).

        `epoch` is the one after that in force. Returns when all experts that this rank lacks are here
        and verified. Raises MigrationError, and leaves everything as it was, when one cannot be had
        within timeout_s, when the epoch is abandoned meanwhile or another one is being prepared;
        ValueError for a row that is no placement.
        """
        start = time.monotonic()
        staged = self._begin(epoch, layer, row, start + timeout_s)
        try:
            self._out_of_force.clear()  # here and not in `flip`: freeing much memory takes time
            for slot, expert in self._changes(staged):
                staged.weights[slot] = self._weights(staged, expert)
            self._layers[layer].choice.prepare(staged.layer_placement)  # not in the next step
            with self._lock:
                if self._staged is not staged:
                    raise MigrationError(f"rank {self._rank}: epoch {epoch} was abandoned")
                staged.ready = True
                self._metrics.prepared += 1
        except BaseException:
            with self._lock:
                if self._staged is staged:  # else it was abandoned, and is counted as that
                    self._staged = None
                    self._metrics.failed += 1
            raise
        finally:
            self._metrics.prepare_s += time.monotonic() - start
            staged.left.set()

    def abandon(self, epoch: int) -> bool:
        """Forget what is, or is being, prepared for `epoch`; False if that is nothing.

        Raises MigrationError if the epoch has been committed: then all ranks go there.
        """
        with self._lock:
            staged = self._staged
            if staged is None or staged.placement.epoch != epoch:
                return False
            if staged.committed:
                raise MigrationError(f"rank {self._rank}: epoch {epoch} is committed already")
            self._staged = None
            self._metrics.abandoned += 1
        staged.stop.set()
        staged.left.wait(_CALL_OFF_S)
        return True

    def commit(self, epoch: int) -> bool:
        """From now on `epoch` cannot be abandoned here. False if it is not prepared."""
        with self._lock:
            staged = self._staged
            if staged is None or staged.placement.epoch != epoch or not staged.ready:
                return False
            staged.committed = True
            return True

    # -- between two steps ---------------------------------------------------------------------

    def flip(self, epoch: int) -> None:
        """Put what is prepared for `epoch` in force. All ranks do so before the same step.

        Raises MigrationError if that is not prepared here.
        """
        start = time.perf_counter()
        with self._lock:
            staged = self._staged
            if staged is None or staged.placement.epoch != epoch or not staged.ready:
                raise MigrationError(
                    f"rank {self._rank} stands at epoch {self.epoch} and cannot flip to {epoch}, "
                    "which is not prepared here"
                )
            layer = self._layers[staged.layer]
            self._out_of_force += [layer.slots[slot] for slot in staged.weights]
            layer.slots.replace(staged.weights)
            layer.layer_placement = staged.layer_placement
            self.placement = staged.placement
            self._staged = None
        seconds = time.perf_counter() - start
        self._metrics.flipped += 1
        self._metrics.flip_s += seconds
        self._metrics.longest_flip_s = max(self._metrics.longest_flip_s, seconds)

    # -- inside prepare ------------------------------------------------------------------------

    def _begin(self, epoch: int, layer: int, row: ArrayLike, deadline: float) -> _Staged:
        if not 0 <= layer < self.placement.num_layers:
            raise ValueError(f"layer({layer}) is outside [0, {self.placement.num_layers})")
        current = self.placement
        placement = current.with_layers({layer: np.asarray(row, np.int64)}, epoch)
        layer_placement = placement.layer(layer)
        staged = _Staged(
            placement=placement, layer=layer, layer_placement=layer_placement, deadline=deadline
        )
        with self._lock:
            if self._staged is not None:
                raise MigrationError(
                    f"rank {self._rank}: epoch {self._staged.placement.epoch} is prepared, or being "
                    "prepared, already; abandon it first"
                )
            if self.placement is not current or epoch != current.epoch + 1:
                raise MigrationError(
                    f"rank {self._rank} stands at epoch {self.epoch} and cannot prepare {epoch}"
                )
            self._staged = staged
        return staged

    def _changes(self, staged: _Staged) -> list[tuple[int, int]]:
        """(local slot, expert) of this rank's slots that get another expert."""
        now = self.placement.experts_of_rank(staged.layer, self._rank)
        then = staged.placement.experts_of_rank(staged.layer, self._rank)
        return [(slot, expert) for slot, expert in then.items() if now.get(slot) != expert]

    def _weights(self, staged: _Staged, expert: int) -> ExpertWeights:
        """Those that this rank has in some slot already, or new ones."""
        slots = self._layers[staged.layer].slots
        for slot, mine in self.placement.experts_of_rank(staged.layer, self._rank).items():
            if mine == expert:
                return slots[slot]
        into = slots.new_weights()
        try:
            return self._supply.get(
                self.placement, staged.layer, expert, into, staged.deadline, staged.stop
            )
        except SupplyError as error:
            epoch = staged.placement.epoch
            raise MigrationError(
                f"rank {self._rank} cannot prepare epoch {epoch}: {error}"
            ) from error
