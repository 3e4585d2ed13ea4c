"""Where the simulated experts are, what their slots get, and when they move."""

import numpy as np
import pytest

from cluster.rebalance_draft import draft
from comms.topology import Topology
from router.load import ExpertLoad
from router.placement import Placement
from router.split import LayerSplit, resplit_optima
from simulations.balance.divisions import EvenDivision, ResplitDivision
from simulations.balance.load_shares import LoadShape, Workload
from simulations.cost import CostModel, StepWork
from simulations.deployment import Deployment
from simulations.hardware.calibration import Calibration
from simulations.presets import load_model
from simulations.serving.cluster_steps import ClusterSteps
from simulations.serving.demand import Demand
from simulations.serving.experts import ServedExperts
from simulations.serving.rebalance import (
    BANDWIDTH,
    EPLB_INTERVAL_STEPS,
    NOTHING,
    Change,
    Eplb,
    Ours,
    Stay,
)
from simulations.serving.replica import Work

MODEL = load_model("mosaic")
LAYERS, EXPERTS = MODEL.num_moe_layers, MODEL.num_experts
TOP_K = MODEL.gate.num_experts_per_token
RANKS = 4
DEPLOYMENT = Deployment(
    model=MODEL,
    topology=Topology(num_nodes=2, ranks_per_node=2, tensor_parallel_size=1),
    num_redundant_experts=RANKS,
)
LOADED = Placement.contiguous(LAYERS, EXPERTS, RANKS, RANKS, ranks_per_node=2)


def demand(seed=0, **workload):
    shape = LoadShape(num_layers=LAYERS, num_experts=EXPERTS, num_nodes=2)
    return Demand(Workload(**workload), shape, MODEL.gate, seed)


def served(rebalancing, division, **options):
    return ServedExperts(demand(**options), rebalancing, division, TOP_K)


def test_every_token_goes_to_top_k_slots_of_its_experts():
    experts = served(Stay(LOADED), EvenDivision(1))
    totals = np.zeros((LAYERS, EXPERTS))
    for step in range(200):
        experts.advance(step * 0.1)
        slot_LS = experts.slot_tokens(500 + step % 3)
        np.testing.assert_allclose(slot_LS.sum(axis=1), TOP_K * (500 + step % 3), rtol=1e-5)
        for layer in range(LAYERS):
            np.add.at(totals[layer], LOADED.physical_to_logical[layer], slot_LS[layer])
    share_LE = totals / totals.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(share_LE, demand().mean_LE, atol=0.01)


def test_a_resplit_step_is_as_even_as_its_own_counts_allow():
    experts = served(Stay(LOADED), ResplitDivision())
    experts.advance(0.0)
    slot_LS = experts.slot_tokens(512)
    counts_LE = demand().draw(512 * TOP_K, 16, 0)[0]
    for layer in range(LAYERS):
        rank_R = slot_LS[layer].reshape(RANKS, -1).sum(axis=1)
        assert rank_R.max() == LayerSplit(LOADED.layer(layer)).optimum(counts_LE[layer])


def test_a_lost_rank_s_experts_are_served_by_their_other_copies():
    rows = np.tile(np.arange(EXPERTS), (LAYERS, 2))  # two of each, on ranks 0 and 1, 2 and 3
    twice = Placement(
        physical_to_logical=rows, num_experts=EXPERTS, num_ranks=RANKS, ranks_per_node=2
    )
    experts = served(Stay(twice), ResplitDivision())
    experts.advance(0.0)
    before = experts.slot_tokens(512)
    assert experts.set_lost([3])
    experts.advance(1.0)
    rank_LR = experts.slot_tokens(512).reshape(LAYERS, RANKS, -1).sum(axis=2)
    assert (rank_LR[:, 3] == 0).all()
    np.testing.assert_allclose(rank_LR.sum(axis=1), before.sum(axis=1))
    assert not experts.set_lost([1, 3]), "both copies of rank 1's experts are gone"
    assert experts.set_lost([])
    experts.advance(2.0)
    assert (experts.slot_tokens(512).reshape(LAYERS, RANKS, -1).sum(axis=2)[:, 3] > 0).all()


class OneChange:
    """At the third step layer 1 gets the slots of another placement."""

    def __init__(self, after):
        self.placement, self.slowdown = LOADED, 0.0
        self._after, self._step = after, 0

    def advance(self, now_s, counts_LE):
        self._step += 1
        if self._step != 3:
            return NOTHING
        self.placement = self._after
        return Change(layers=(1,), pause_s=0.25)

    def abandon(self):
        pass


def test_experts_that_have_moved_get_their_tokens_where_they_are_now():
    row_S = np.roll(LOADED.physical_to_logical[1], LOADED.slots_per_rank)
    changing = served(OneChange(LOADED.with_layers({1: row_S})), EvenDivision(1))
    staying = served(Stay(LOADED), EvenDivision(1))
    for step in range(4):
        assert changing.advance(step * 1.0) == (0.25 if step == 2 else 0.0)
        staying.advance(step * 1.0)
        after_LS, before_LS = changing.slot_tokens(256), staying.slot_tokens(256)
        if step >= 2:
            before_LS[1] = np.roll(before_LS[1], LOADED.slots_per_rank)
        np.testing.assert_array_equal(after_LS, before_LS)


def test_another_subject_asks_other_experts():
    experts = served(Stay(LOADED), EvenDivision(1), name="task_shift", shift_every=8, jitter=0.0)
    tokens = []
    for step in range(16):
        experts.advance(step * 0.1)
        tokens.append(experts.slot_tokens(4096).ravel())
    same = np.corrcoef(tokens)
    assert same[0, 7] > 0.99
    assert same[0, 8] < 0.7


def test_a_step_costs_what_its_work_and_its_slots_do():
    """The cost model asked by hand, with a pause before the step and experts on their way."""
    cost = CostModel(DEPLOYMENT, Calibration.named("h100-published"))
    experts = served(OneChange(LOADED), EvenDivision(1))
    experts.advance(0.0)
    steps = ClusterSteps(cost, experts)
    work = [Work(30, 0, 465, 1), Work(3, 90, 90, 3), Work(), Work(1, 7, 7, 1)]
    step = steps.step(0.0, work)
    twin = served(Stay(LOADED), EvenDivision(1))
    slot_LS = twin.slot_tokens(34)
    expected = cost.step(
        StepWork(
            tokens_BD=[[30, 3, 0, 1]],
            kv_tokens_BD=[[0, 90, 0, 7]],
            pairs_BD=[[465, 90, 0, 7]],
            logits_BD=[[1, 3, 0, 1]],
            has_prompts=True,
        ),
        slot_LS[None],
    )
    assert step.seconds == pytest.approx(float(expected.total_B[0]), rel=1e-6)
    rank_LR = slot_LS.reshape(LAYERS, RANKS, -1).sum(axis=2)
    assert step.balancedness == pytest.approx((rank_LR.mean(axis=1) / rank_LR.max(axis=1)).mean())
    paused = steps.step(1.0, work).seconds
    assert 0.25 < paused < 0.25 + 2 * step.seconds


def test_steps_are_longer_while_experts_are_on_their_way():
    cost = CostModel(DEPLOYMENT, Calibration.named("h100-published"))
    staying, moving = Stay(LOADED), Stay(LOADED)
    moving.slowdown = 0.02
    seconds = [
        ClusterSteps(cost, served(r, EvenDivision(1)))
        .step(0.0, [Work(8, 80, 80, 8)] * RANKS)
        .seconds
        for r in (staying, moving)
    ]
    assert seconds[1] == pytest.approx(1.02 * seconds[0])


def test_ours_moves_what_the_production_draft_says_one_layer_after_the_other():
    """A load that is far from even: planned after the second look, fetched at the bandwidth."""
    ours = Ours(LOADED, DEPLOYMENT)
    load_LE = np.exp(np.random.default_rng(0).standard_normal((LAYERS, EXPERTS))) * 1e4
    seen = []
    events = []
    for tick in range(1, 200):
        change = ours.advance(tick * 0.5, np.rint(load_LE * tick))
        events += [change.event] if change.event else []
        seen += [(tick * 0.5, layer) for layer in change.layers]
    [event] = events
    drafted = draft(ExpertLoad(mean_LE=load_LE), LOADED, target=1.02)
    assert [layer for _, layer in seen] == [layer for layer, _ in drafted.rows]
    assert f"{drafted.num_moves} experts" in event.what
    placed = LOADED.with_layers(dict(drafted.rows))
    np.testing.assert_array_equal(ours.placement.physical_to_logical, placed.physical_to_logical)
    assert resplit_optima(load_LE, ours.placement).max() < 1.05
    assert ours.slowdown == 0.0
    expert_s = DEPLOYMENT.expert_bytes / BANDWIDTH
    assert event.time_s < seen[0][0] <= event.time_s + 0.5 + drafted.num_moves * expert_s


def test_eplb_rewrites_everything_every_interval_while_all_wait():
    calibration = Calibration.named("h100-published")
    eplb = Eplb(LOADED, DEPLOYMENT, calibration)
    load_LE = np.exp(np.random.default_rng(0).standard_normal((LAYERS, EXPERTS))) * 1e4
    changes = [
        eplb.advance(step * 0.1, load_LE * step) for step in range(1, EPLB_INTERVAL_STEPS + 1)
    ]
    assert all(change.event is None for change in changes[:-1])
    last = changes[-1]
    assert last.layers == tuple(range(LAYERS))
    received_R = np.zeros(RANKS)
    for layer in range(LAYERS):
        for rank in range(RANKS):
            had = set(LOADED.experts_of_rank(layer, rank).values())
            received_R[rank] += len(set(eplb.placement.experts_of_rank(layer, rank).values()) - had)
    seconds = received_R.max() * DEPLOYMENT.expert_bytes / calibration.links["network"].beta
    assert last.pause_s == pytest.approx(seconds)


def test_another_subject_is_another_popularity():
    moving = demand(name="task_shift", shift_every=10)
    assert not moving.advance(9)
    before = moving.mean_LE
    assert moving.advance(10)
    assert abs(np.corrcoef(before.ravel(), moving.mean_LE.ravel())[0, 1]) < 0.5


def test_the_same_seed_gives_the_same_steps():
    def tokens(seed):
        experts = served(Stay(LOADED), EvenDivision(1), seed=seed)
        experts.advance(0.0)
        return experts.slot_tokens(300)

    np.testing.assert_array_equal(tokens(1), tokens(1))
    assert (tokens(1) != tokens(2)).any()
