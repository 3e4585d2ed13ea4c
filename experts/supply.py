"""Where a rank gets an expert from: the nearest rank that can give it, else the checkpoint.

What comes is believed only if it has the fingerprint that the expert had when it was loaded.

L expert layers, E logical experts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from comms.transfer import TransferClient, TransferError
from experts.weights import ExpertWeights
from router.placement import Placement

ReadExpert = Callable[[int, int], ExpertWeights]
"""(layer, expert) -> its weights from the checkpoint."""


class SupplyError(RuntimeError):
    """An expert could not be had; says what each source answered."""


@dataclass(kw_only=True)
class SupplyMetrics:
    """Since the start. bytes: by where they came from; retries: sources that failed."""

    bytes: dict[str, int] = field(default_factory=lambda: {"node": 0, "remote": 0, "disk": 0})
    experts: int = 0
    retries: int = 0


class ExpertSupply:
    """For one rank. fingerprints_LE: `ExpertWeights.fingerprint` of all experts."""

    def __init__(
        self,
        *,
        rank: int,
        fingerprints_LE: NDArray[np.uint64],
        client: TransferClient,
        read_expert: ReadExpert,
    ) -> None:
        self.metrics = SupplyMetrics()
        self._rank, self._fingerprints_LE = rank, fingerprints_LE
        self._client, self._read_expert = client, read_expert

    def get(
        self,
        placement: Placement,
        layer: int,
        expert: int,
        into: ExpertWeights,
        deadline: float,
        stop: threading.Event,
    ) -> ExpertWeights:
        """The expert's weights: `into`, filled by a rank that holds them, or new ones.

        Raises SupplyError if they are not here at `deadline` (on time.monotonic), soon after `stop`
        was set, or when no source is left.
        """
        failures = []
        for source, slot in self._holders(placement, layer, expert):
            try:
                self._fetch(source, slot, layer, expert, into, deadline, stop)
            except TransferError as error:
                failures.append(str(error))
            else:
                self._count("node" if self._is_near(placement, source) else "remote", into)
                return into
            self._check(layer, expert, deadline, stop, failures)
            self.metrics.retries += 1
        try:
            weights = self._read_expert(layer, expert)
        except (OSError, ValueError) as error:
            raise _missing(layer, expert, [*failures, f"the checkpoint: {error}"]) from error
        self._check(layer, expert, deadline, stop, failures)
        if not self._is(weights, layer, expert):
            failures.append("the checkpoint holds other weights than it did when it was loaded")
            raise _missing(layer, expert, failures)
        self._count("disk", weights)
        return weights

    def _fetch(
        self,
        source: int,
        slot: int,
        layer: int,
        expert: int,
        into: ExpertWeights,
        deadline: float,
        stop: threading.Event,
    ) -> None:
        now = time.monotonic()
        half = now + (deadline - now) / 2  # the rest is for another source
        self._client.fetch(source, layer, slot, into.data, deadline=half, stop=stop)
        if not self._is(into, layer, expert):
            raise TransferError(f"rank {source} sent other bytes than the expert was loaded with")

    def _holders(self, placement: Placement, layer: int, expert: int) -> list[tuple[int, int]]:
        """(rank, local slot) of its copies: of my node first, another one first for each rank."""
        slots = np.flatnonzero(placement.physical_to_logical[layer] == expert)
        holders = [divmod(int(s), placement.slots_per_rank) for s in np.roll(slots, self._rank)]
        return sorted(holders, key=lambda holder: not self._is_near(placement, holder[0]))

    def _is_near(self, placement: Placement, rank: int) -> bool:
        per_node = placement.ranks_per_node or placement.num_ranks
        return rank // per_node == self._rank // per_node

    def _is(self, weights: ExpertWeights, layer: int, expert: int) -> bool:
        return weights.fingerprint() == int(self._fingerprints_LE[layer, expert])

    def _count(self, source: str, weights: ExpertWeights) -> None:
        self.metrics.bytes[source] += weights.num_bytes
        self.metrics.experts += 1

    def _check(
        self,
        layer: int,
        expert: int,
        deadline: float,
        stop: threading.Event,
        failures: Sequence[str],
    ) -> None:
        if stop.is_set() or time.monotonic() > deadline:
            raise _missing(layer, expert, failures or ["no time is left"])


def _missing(layer: int, expert: int, failures: Sequence[str]) -> SupplyError:
    return SupplyError(
        f"expert {expert} of expert layer {layer} did not come: {'; '.join(failures)}"
    )
