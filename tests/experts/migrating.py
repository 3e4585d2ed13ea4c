"""Four ranks of two nodes in one process, each with its slots, a transfer server and a migrator.

Experts are random but known, so that it can be told what any slot must hold.
"""

import gc
import os
import threading
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import psutil
import torch

from comms.transfer import Source, TransferClient
from comms.transfer_server import TransferServer
from experts.migrate import Migrator
from experts.slot_choice import SlotChoice, StaticChoice
from experts.supply import ExpertSupply
from experts.weights import ExpertSlots, ExpertWeights
from router.placement import LayerPlacement, Placement, settle
from tests.comms.faulty_proxy import FaultyProxy

NUM_LAYERS, NUM_EXPERTS, NUM_RANKS, REDUNDANT = 3, 10, 4, 6
HIDDEN, INTERMEDIATE = 16, 8
EXPERT_BYTES = 3 * HIDDEN * INTERMEDIATE * 4
CHUNK_BYTES = 200
SECRET = b"of four ranks"


def expert(layer: int, number: int) -> ExpertWeights:
    """What the checkpoint holds."""
    generator = torch.Generator().manual_seed(layer * NUM_EXPERTS + number)
    weights = ExpertWeights(HIDDEN, INTERMEDIATE, torch.float32)
    weights.w13.normal_(generator=generator)
    weights.w2.normal_(generator=generator)
    return weights


FINGERPRINTS_LE = np.array(
    [[expert(layer, e).fingerprint() for e in range(NUM_EXPERTS)] for layer in range(NUM_LAYERS)],
    np.uint64,
)


def first_placement() -> Placement:
    return Placement.contiguous(NUM_LAYERS, NUM_EXPERTS, NUM_RANKS, REDUNDANT, ranks_per_node=2)


def random_row(placement: Placement, layer: int, rng: np.random.Generator) -> list[int]:
    """Some experts change their rank, and which of them have copies; some slots stay empty."""
    row = placement.physical_to_logical[layer]
    spare = rng.integers(-1, NUM_EXPERTS, placement.num_slots - NUM_EXPERTS)
    target = rng.permutation(np.concatenate([np.arange(NUM_EXPERTS), spare]))
    if rng.random() < 0.5:  # most stay
        target = row.copy()
        a, b = rng.choice(placement.num_slots, 2, replace=False)
        target[[a, b]] = target[[b, a]]
    settled: list[int] = settle(row, target, placement.slots_per_rank).tolist()
    return settled


@dataclass
class Layer:
    """What a migrator changes of an expert layer."""

    slots: ExpertSlots
    layer_placement: LayerPlacement
    choice: SlotChoice


class Rank:
    """One rank. Others reach its server through `proxy` only."""

    def __init__(self, rank: int, sources: list[Source], stall_s: float) -> None:
        self.rank = rank
        placement = first_placement()
        self.layers = []
        for layer in range(NUM_LAYERS):
            slots = ExpertSlots(placement.slots_per_rank, HIDDEN, INTERMEDIATE, torch.float32)
            for slot, number in placement.experts_of_rank(layer, rank).items():
                slots[slot] = expert(layer, number)
            self.layers.append(Layer(slots, placement.layer(layer), StaticChoice(rank)))
        self.disk_fails = False
        self.disk_holds: int | None = None  # this expert instead of any other
        self.server = TransferServer(
            lambda layer, slot: self.layers[layer].slots[slot].data,
            host="127.0.0.1",
            secret=SECRET,
            chunk_bytes=CHUNK_BYTES,
        )
        self.proxy = FaultyProxy(self.server.port)
        self.migrator = Migrator(
            rank=rank,
            placement=placement,
            layers=self.layers,
            supply=ExpertSupply(
                rank=rank,
                fingerprints_LE=FINGERPRINTS_LE,
                client=TransferClient(rank=rank, sources=sources, secret=SECRET, stall_s=stall_s),
                read_expert=self._read_expert,
            ),
        )

    def _read_expert(self, layer: int, number: int) -> ExpertWeights:
        if self.disk_fails:
            raise OSError("no disk")
        return expert(layer, number if self.disk_holds is None else self.disk_holds)

    def close(self) -> None:
        self.proxy.close()
        self.server.close()

    def check(self, placement: Placement) -> None:
        """This rank has exactly this map in force, and in each slot the expert that it names."""
        mine = self.migrator.placement
        assert mine.epoch == placement.epoch
        assert np.array_equal(mine.physical_to_logical, placement.physical_to_logical)
        for idx, layer in enumerate(self.layers):
            wanted = placement.layer(idx).logical_to_physical
            used = layer.layer_placement.logical_to_physical
            assert [sorted(set(row) - {-1}) for row in used.tolist()] == [
                sorted(set(row) - {-1}) for row in wanted.tolist()
            ]
            for slot, number in placement.experts_of_rank(idx, self.rank).items():
                assert layer.slots[slot].fingerprint() == int(FINGERPRINTS_LE[idx, number])


class World:
    """All ranks. Use as a context manager."""

    def __init__(self, stall_s: float = 5.0) -> None:
        sources: list[Source] = []
        self.ranks = [Rank(rank, sources, stall_s) for rank in range(NUM_RANKS)]
        sources += [Source(r.rank, "127.0.0.1", r.proxy.port) for r in self.ranks]
        self.placement = first_placement()

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank.close()

    def check(self) -> None:
        for rank in self.ranks:
            rank.check(self.placement)


class LeftOver(NamedTuple):
    """What this process has of transfers, and how many experts in memory."""

    threads: list[str]
    sockets: int
    experts: int


def left_over() -> LeftOver:
    gc.collect()
    return LeftOver(
        threads=[t.name for t in threading.enumerate() if t.name.startswith("transfer-serve")],
        sockets=len(psutil.Process(os.getpid()).net_connections("all")),
        experts=sum(type(x) is ExpertWeights for x in gc.get_objects()),
    )
