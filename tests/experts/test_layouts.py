"""The MoE layer over several ranks: with the exact combine every layout gives the same bits."""

import pytest
import torch

from comms.groups import ParallelGroups
from comms.make import make_dispatcher
from comms.solo import SoloGroup
from comms.topology import Topology
from experts.moe import MoELayer
from experts.weights import ExpertSlots
from router.gate import Gate, GateConfig
from router.placement import Placement

HIDDEN, INTERMEDIATE, NUM_ROWS = 64, 48, 41
GATE = GateConfig(num_experts=10, num_experts_per_token=3, renormalize=True)


def one_rank():
    """Groups of a world of one rank."""
    solo = SoloGroup(name="alone", rank=0)
    return ParallelGroups(
        topology=Topology(num_nodes=1, ranks_per_node=1), rank=0, epoch=0,
        world=solo, node=solo, rail=solo, tp=solo, leaders=solo,
    )  # fmt: skip


def forward_share(groups, rows, backend, num_redundant, dtype):
    """On one rank: the outputs of its share of the rows, and what its slots have counted."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(5)
    topology = groups.topology
    placement = Placement.contiguous(
        1, 10, topology.world_size, num_redundant, ranks_per_node=topology.ranks_per_node
    )
    w13 = torch.randn(10, 2 * INTERMEDIATE, HIDDEN, generator=generator) / 8
    w2 = torch.randn(10, HIDDEN, INTERMEDIATE, generator=generator) / 7
    gate = Gate(GATE, torch.randn(10, HIDDEN, generator=generator))
    x_TH = torch.randn(NUM_ROWS, HIDDEN, generator=generator).to(dtype)
    slots = ExpertSlots(placement.slots_per_rank, HIDDEN, INTERMEDIATE, dtype)
    for slot, expert in placement.experts_of_rank(0, groups.rank).items():
        slots.load(slot, *w13[expert].chunk(2), w2[expert])
    layer = MoELayer(
        gate=gate,
        slots=slots,
        dispatcher=make_dispatcher(
            backend, groups, slots_per_rank=slots.num_slots, hidden=HIDDEN, combine="exact"
        ),
        layer_placement=placement.layer(0),
        rank=groups.rank,
    )
    out_TH = layer.forward(x_TH[rows[groups.rank] : rows[groups.rank + 1]])
    return out_TH, layer.tokens_per_slot_S


@pytest.mark.parametrize("backend", ["flat", "hierarchical"])
@pytest.mark.parametrize(
    ("nodes", "ranks", "num_redundant", "rows"),
    [(1, 2, 0, [0, 30, 41]), (2, 2, 4, [0, 1, 1, 20, 41]), (3, 1, 5, [0, 17, 18, 41])],
)
def test_every_layout_gives_the_bits_of_one_rank(
    rank_pool, backend, nodes, ranks, num_redundant, rows
):
    """Uneven and empty shares, experts that do not divide, redundant copies: the same 41 rows."""
    topology = Topology(num_nodes=nodes, ranks_per_node=ranks)
    for dtype in (torch.float32, torch.bfloat16):
        expected_TH, _ = forward_share(one_rank(), [0, NUM_ROWS], "flat", 0, dtype)
        assert expected_TH.float().norm(dim=1).min() > 0
        results = rank_pool.run(forward_share, topology, rows, backend, num_redundant, dtype)
        assert torch.equal(torch.cat([out_TH for out_TH, _ in results]), expected_TH)
        num_pairs = sum(int(tokens_per_slot_S.sum()) for _, tokens_per_slot_S in results)
        assert num_pairs == NUM_ROWS * GATE.num_experts_per_token
