"""The engine of four ranks without a model: real leaders, followers, migrators and transfers."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from cluster.config import ServeConfig
from cluster.engine.engine import Leader
from cluster.engine.mailbox import LocalMailbox
from cluster.engine.plan import StepPlan
from cluster.engine.runner import Runner
from cluster.engine.sampler import Sampler
from cluster.engine.scheduler import Scheduler, SchedulerConfig
from cluster.engine.step_timer import StepTimer
from comms.groups import ParallelGroups
from comms.topology import Topology
from comms.transfer import connect_transfers
from comms.transfer_server import TransferServer
from experts.migrate import Migrator
from experts.slot_choice import StaticChoice
from experts.supply import ExpertSupply
from experts.weights import ExpertSlots
from tests.experts.migrating import (
    FINGERPRINTS_LE,
    HIDDEN,
    INTERMEDIATE,
    NUM_LAYERS,
    Layer,
    expert,
    first_placement,
)

FOUR = Topology(num_nodes=2, ranks_per_node=2)
"""Leaders are ranks 0 and 2, followers 1 and 3."""
VOCAB_SIZE = 8


class ModelFreeRunner(Runner):
    """Where a model would run, all ranks meet."""

    def __init__(self, groups: ParallelGroups, migrator: Migrator, server: TransferServer) -> None:
        config = ServeConfig.from_dict({"model": "none"})
        model = SimpleNamespace(close=lambda: None)
        super().__init__(config, model, None, StepTimer(), migrator, server)
        self._world = groups.world

    def execute(
        self, plan: StepPlan, max_tokens: int | None = None, max_blocks: int = 0
    ) -> torch.Tensor:
        self._world.barrier()
        self.num_steps += 1
        return torch.zeros(plan.num_logit_rows, VOCAB_SIZE)


def build_runner(
    groups: ParallelGroups, on_read: Callable[[], None] = lambda: None
) -> tuple[ModelFreeRunner, list[Layer]]:
    placement, layers = first_placement(), []
    for layer in range(NUM_LAYERS):
        slots = ExpertSlots(placement.slots_per_rank, HIDDEN, INTERMEDIATE, torch.float32)
        for slot, number in placement.experts_of_rank(layer, groups.rank).items():
            slots[slot] = expert(layer, number)
        layers.append(Layer(slots, placement.layer(layer), StaticChoice(groups.rank)))

    def read(layer: int, slot: int) -> memoryview:
        on_read()
        return layers[layer].slots[slot].data

    server, client = connect_transfers(groups, read, bytes_per_s=None, stall_s=1.0)
    supply = ExpertSupply(
        rank=groups.rank, fingerprints_LE=FINGERPRINTS_LE, client=client, read_expert=expert
    )
    migrator = Migrator(rank=groups.rank, placement=placement, layers=layers, supply=supply)
    return ModelFreeRunner(groups, migrator, server), layers


def leader_of(
    groups: ParallelGroups, runner: Runner, mailbox: LocalMailbox, **options: Any
) -> Leader:
    """`options` of the Leader."""
    config = SchedulerConfig(
        max_num_seqs=2,
        max_num_batched_tokens=8,
        block_size=16,
        num_blocks=1000,
        max_model_len=9999,
        enable_prefix_caching=True,
    )
    return Leader(groups, runner, Scheduler(config), Sampler(VOCAB_SIZE, ()), mailbox, **options)
