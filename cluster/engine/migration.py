"""What a rank needs for its experts to move while it serves: a server, a client, fingerprints."""

from __future__ import annotations

import torch

from cluster.config import ServeConfig
from cluster.model.checkpoint import Checkpoint
from cluster.model.fingerprints import share_fingerprints
from cluster.model.loader import Loader
from cluster.model.transformer import Transformer
from comms.groups import ParallelGroups
from comms.transfer import connect_transfers
from comms.transfer_server import TransferServer
from experts.migrate import Migrator
from experts.supply import ExpertSupply
from experts.weights import ExpertWeights
from router.placement import Placement

MIB = 1 << 20


def start_migrator(
    config: ServeConfig, groups: ParallelGroups, model: Transformer, placement: Placement
) -> tuple[Migrator, TransferServer]:
    """Serve this rank's experts to the others, and be ready to fetch theirs. Collective.

    Raises CheckpointError if ranks have read different weights for an expert.
    """
    layers = model.moe_layers
    fingerprints_LE = share_fingerprints(
        [layer.slots for layer in layers], placement, groups.world, config.model
    )

    def read_slot(layer: int, slot: int) -> memoryview | None:
        here = layer < len(layers) and slot < layers[layer].slots.num_slots
        return layers[layer].slots[slot].data if here else None

    def read_expert(layer: int, expert: int) -> ExpertWeights:
        loader = Loader(
            checkpoint=Checkpoint(config.model),
            config=model.config,
            topology=groups.topology,
            rank=groups.rank,
            dtype=getattr(torch, config.dtype),
            keep_float8=config.quantization != "bfloat16",
        )
        weights = layers[layer].slots.new_weights()
        loader.fill(weights, layer, expert)
        return weights

    server, client = connect_transfers(
        groups, read_slot, bytes_per_s=config.eplb_config.bandwidth_mib_s * MIB
    )
    supply = ExpertSupply(
        rank=groups.rank, fingerprints_LE=fingerprints_LE, client=client, read_expert=read_expert
    )
    migrator = Migrator(rank=groups.rank, placement=placement, layers=layers, supply=supply)
    return migrator, server
