"""Balanced against static choice on real ranks: the same bits, and loads as even as promised."""

import numpy as np
import pytest
import torch

from comms.make import make_dispatcher
from comms.topology import Topology
from experts.balance import make_balance
from experts.gains import expert_gains
from experts.moe import MoELayer
from experts.slot_choice import make_choice
from experts.weights import ExpertSlots
from router.gate import Gate, GateConfig
from router.placement import Placement
from router.split import LayerSplit
from tests.experts.test_layouts import one_rank

HIDDEN, INTERMEDIATE, EXPERTS, NUM_ROWS = 64, 48, 12, 160
GATE = GateConfig(num_experts=EXPERTS, num_experts_per_token=3, renormalize=True)


def gate_and_weights():
    """A gate that prefers low experts, and every expert's matrices."""
    generator = torch.Generator().manual_seed(5)
    w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator) / 8
    w2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=generator) / 7
    router = torch.randn(EXPERTS, HIDDEN, generator=generator) / 8
    x_TH = torch.randn(NUM_ROWS, HIDDEN, generator=generator)
    x_TH[:, 0] = 8.0
    router[:, 0] = -0.03 * torch.arange(EXPERTS)
    return Gate(GATE, router), w13, w2, x_TH.bfloat16()


def load_slots(placement, rank, w13, w2):
    slots = ExpertSlots(placement.slots_per_rank, HIDDEN, INTERMEDIATE, torch.bfloat16)
    for slot, expert in placement.experts_of_rank(0, rank).items():
        slots.load(slot, *w13[expert].chunk(2), w2[expert])
    return slots


def all_gains(w13, w2):
    everything = Placement.contiguous(1, EXPERTS, 1)
    return expert_gains(load_slots(everything, 0, w13, w2), torch.ones(HIDDEN))


def forward_share(groups, placements, rows, combine, mode):
    """One rank: outputs of its rows under each placement in turn, and what the layer counted."""
    torch.set_num_threads(1)
    gate, w13, w2, x_TH = gate_and_weights()
    dispatcher = make_dispatcher(
        "hierarchical",
        groups,
        slots_per_rank=placements[0].slots_per_rank,
        hidden=HIDDEN,
        combine=combine,
    )
    balance = make_balance(mode, dispatcher, token_flop=1e6)
    layer = MoELayer(
        gate=gate,
        slots=load_slots(placements[0], groups.rank, w13, w2),
        dispatcher=dispatcher,
        layer_placement=placements[0].layer(0),
        rank=groups.rank,
        choice=make_choice(balance, groups.rank),
    )
    layer.gains_E = all_gains(w13, w2) if combine == "fixed" else None
    mine_TH = x_TH[rows[groups.rank] : rows[groups.rank + 1]]
    outputs, loads = [], []
    for number, placement in enumerate(placements):
        layer.layer_placement = placement.layer(0)
        if number:  # prepared or not
            layer.choice.prepare(layer.layer_placement)
        layer.slots = load_slots(placement, groups.rank, w13, w2)
        layer.tokens_per_slot_S.zero_()
        outputs.append(layer.forward(mine_TH))
        loads.append(layer.tokens_per_slot_S.tolist())
    sent = dispatcher.ledger.inter_node_bytes("dispatch/exchange")
    return outputs, loads, layer.routed_E, layer.recent_TK, sent


def placements_of(topology):
    """One with cycles, and another into which the layer is moved."""
    first = Placement.contiguous(
        1, EXPERTS, topology.world_size, 8, ranks_per_node=topology.ranks_per_node
    )
    return [first, first.with_layers({0: np.roll(first.physical_to_logical[0], 5)})]


@pytest.mark.parametrize("combine", ["fixed", "exact"])
@pytest.mark.parametrize(
    ("nodes", "ranks", "rows"),
    [(2, 2, [0, 10, 10, 130, 160]), (1, 3, [0, 60, 61, 160]), (2, 1, [0, 0, 160])],
)
def test_the_same_bits_and_loads_as_promised(rank_pool, combine, nodes, ranks, rows):
    topology = Topology(num_nodes=nodes, ranks_per_node=ranks)
    placements = placements_of(topology)
    alone = [Placement.contiguous(1, EXPERTS, 1)]
    [expected_TH], _, counts_E, ids_TK, _ = forward_share(
        one_rank(), alone, [0, NUM_ROWS], combine, "static"
    )
    results = rank_pool.run(forward_share, topology, placements, rows, combine, "balanced")
    for idx, placement in enumerate(placements):
        assert torch.equal(torch.cat([outputs[idx] for outputs, *_ in results]), expected_TH)
        loads_RS = np.array([loads[idx] for _, loads, *_ in results])
        computed_E = np.zeros(EXPERTS, dtype=int)
        np.add.at(computed_E, placement.physical_to_logical[0], loads_RS.ravel())
        assert computed_E.tolist() == counts_E.tolist()
        best = LayerSplit(placement.layer(0)).optimum(counts_E.numpy())
        assert loads_RS.sum(axis=1).max() <= best
    routed_E = sum(routed_E for _, _, routed_E, *_ in results)
    assert routed_E.tolist() == (len(placements) * counts_E).tolist()
    assert torch.equal(torch.cat([recent_TK for *_, recent_TK, _ in results]), ids_TK)


def test_the_static_choice_is_less_even_here(rank_pool):
    """Or the test above would show nothing."""
    topology = Topology(num_nodes=2, ranks_per_node=2)
    rows = [0, 10, 10, 130, 160]
    most = {}
    for mode in ("static", "auto", "balanced"):
        results = rank_pool.run(
            forward_share, topology, placements_of(topology)[:1], rows, "fixed", mode
        )
        most[mode] = max(sum(loads[0]) for _, loads, *_ in results)
    assert most["balanced"] < 0.9 * most["static"]
    assert most["auto"] == most["static"]  # nobody said how large the step is


def small_steps(groups, rows, mode):
    """One rank: its rows in steps of at most 8 tokens; outputs, and pairs computed here."""
    torch.set_num_threads(1)
    gate, w13, w2, x_TH = gate_and_weights()
    placement = placements_of(groups.topology)[0]
    dispatcher = make_dispatcher(
        "flat", groups, slots_per_rank=placement.slots_per_rank, hidden=HIDDEN, combine="exact"
    )
    balance = make_balance(mode, dispatcher, token_flop=1e5)
    layer = MoELayer(
        gate=gate,
        slots=load_slots(placement, groups.rank, w13, w2),
        dispatcher=dispatcher,
        layer_placement=placement.layer(0),
        rank=groups.rank,
        choice=make_choice(balance, groups.rank),
    )
    mine_TH = x_TH[rows[groups.rank] : rows[groups.rank + 1]].repeat(8, 1)
    outputs = []
    for step_TH in mine_TH.split(8):
        if balance:
            balance.expect(8)
            assert not balance.applies
        outputs.append(layer.forward(step_TH))
    exchanges = dispatcher.ledger.intra_node_bytes("counts/node")
    return torch.cat(outputs), int(layer.tokens_per_slot_S.sum()), exchanges


def test_small_steps_go_by_recent_counts(rank_pool):
    """Where no step is worth an exchange, ranks still come out more even, with the same bits."""
    topology = Topology(num_nodes=2, ranks_per_node=2)
    rows = [0, 40, 80, 120, 160]
    static, recent = (
        rank_pool.run(small_steps, topology, rows, mode) for mode in ("static", "auto")
    )
    assert all(torch.equal(a[0], b[0]) for a, b in zip(static, recent, strict=True))
    loads = {"static": [r[1] for r in static], "recent": [r[1] for r in recent]}
    assert sum(loads["recent"]) == sum(loads["static"]) == 160 * 8 * 3
    assert max(loads["recent"]) < 0.9 * max(loads["static"])
    # 40 steps of 8 tokens, an exchange every 64
    assert [r[2] for r in recent] == [5 * 4 * EXPERTS] * 4


def test_activated_experts_on_one_copy_each(rank_pool):
    topology = Topology(num_nodes=2, ranks_per_node=2)
    placements = placements_of(topology)
    rows = [0, 2, 3, 3, 4]  # four tokens, so that some experts have none
    balanced = rank_pool.run(forward_share, topology, placements, rows, "fixed", "balanced")
    activated = rank_pool.run(forward_share, topology, placements, rows, "fixed", "activated")
    for idx, placement in enumerate(placements):
        pairs = zip(balanced, activated, strict=True)
        assert all(torch.equal(a[0][idx], b[0][idx]) for a, b in pairs)
        used_S = np.array([loads[idx] for _, loads, *_ in activated]).ravel() > 0
        experts = placement.physical_to_logical[0][used_S]
        assert len(set(experts)) == len(experts)
        active_E = np.isin(np.arange(EXPERTS), experts).astype(int)
        most = used_S.reshape(topology.world_size, -1).sum(axis=1).max()
        assert most == LayerSplit(placement.layer(0)).optimum(active_E)


def test_few_nodes_are_visited_and_ranks_are_even(rank_pool):
    """The same bits as by the balanced choice, the least maximum of load, fewer rows on the rails."""
    topology = Topology(num_nodes=2, ranks_per_node=2)
    placements = placements_of(topology)
    rows = [0, 40, 80, 120, 160]
    balanced, nodes = (
        rank_pool.run(forward_share, topology, placements, rows, "exact", mode)
        for mode in ("balanced", "nodes")
    )
    for idx, placement in enumerate(placements):
        pairs = zip(balanced, nodes, strict=True)
        assert all(torch.equal(a[0][idx], b[0][idx]) for a, b in pairs)
        loads_R = [sum(loads[idx]) for _, loads, *_ in nodes]
        counts_E = sum(routed_E for _, _, routed_E, *_ in nodes) // len(placements)
        best = LayerSplit(placement.layer(0)).optimum(counts_E.numpy())
        assert max(loads_R) <= max(best, 1.02 * sum(loads_R) / 4)
    assert sum(r[4] for r in nodes) < 0.98 * sum(r[4] for r in balanced)


def test_auto_balances_large_steps_of_costly_experts():
    dispatcher = make_dispatcher(
        "flat", one_rank(), slots_per_rank=12, hidden=HIDDEN, combine="exact"
    )
    cheap, costly = (make_balance("auto", dispatcher, token_flop=x) for x in (1e5, 1e9))
    for max_tokens, applies in ((None, False), (0, False), (1024, True)):
        cheap.expect(max_tokens)
        costly.expect(max_tokens)
        assert (cheap.applies, costly.applies) == (False, applies)
    always = make_balance("balanced", dispatcher, token_flop=1e5)
    always.expect(None)
    assert always.applies


@pytest.mark.parametrize("mode", ["balanced", "activated", "nodes"])
def test_only_sums_that_do_not_depend_on_copies(mode):
    dispatcher = make_dispatcher("flat", one_rank(), slots_per_rank=12, hidden=HIDDEN)
    assert make_balance("auto", dispatcher, token_flop=1e9) is None
    with pytest.raises(ValueError, match=f'"{mode}" needs combine "fixed" or "exact"'):
        make_balance(mode, dispatcher, token_flop=1e9)
