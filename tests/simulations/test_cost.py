"""The cost of steps against plain loops over ranks, slots and products, and what must always hold."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.topology import Topology
from simulations import arithmetic
from simulations.cost import CostModel, Sends, StepWork
from simulations.deployment import Deployment
from simulations.presets import load_model
from simulations.times.expert_times import LAUNCHES
from simulations.times.op_times import NORM_BYTES
from simulations.traffic import node_visits
from tests.simulations.calibrations import calibration

V3, MOSAIC, MIXTRAL = (load_model(name) for name in ("deepseek-v3", "mosaic", "mixtral-8x7b"))
PARTS = ("attention", "gate", "shared", "dispatch", "experts", "combine")


def deployment(model=MOSAIC, nodes=2, ranks=2, size=1, **options) -> Deployment:
    topology = Topology(num_nodes=nodes, ranks_per_node=ranks, tensor_parallel_size=size)
    return Deployment(model=model, topology=topology, **options)


def counts(of: Deployment, steps=2, mean=40.0, seed=0):
    shape = (steps, of.model.num_moe_layers, of.num_slots)
    return np.random.default_rng(seed).poisson(mean, shape).astype(np.int32)


def even(of: Deployment, tokens_per_rank: float):
    """The pairs of so many tokens of every rank, divided evenly."""
    pairs = tokens_per_rank * of.num_ranks * of.model.gate.num_experts_per_token
    shape = (1, of.model.num_moe_layers, of.num_slots)
    return np.full(shape, pairs / of.num_slots, dtype=np.float32)


# -- against plain loops -------------------------------------------------------------------------


def product_seconds(n, k, rows, dtype, count=1):
    """Of the calibration "round"."""
    flops, size = {"bfloat16": (5e14, 2), "float8": (1e15, 1)}[dtype]
    overhead, tile = {"bfloat16": (2e-6, 32), "float8": (3e-6, 64)}[dtype]
    if rows == 0:
        return 0.0
    compute = 2 * n * k * count * math.ceil(rows / tile) * tile / flops
    move = count * (n * k * size + (n + k) * rows * 2) / 2e12
    return overhead + max(compute, move)


def expert_seconds(model, tokens):
    hidden, width = model.hidden_size, model.expert_intermediate_size
    if tokens == 0:
        return 0.0
    compute = math.ceil(tokens / 64) * 64 * 6 * hidden * width / 1e15
    read = 3 * hidden * width + tokens * (hidden + 2 * width)
    written = tokens * 2 * (2 * 2 * width + hidden)
    return max(compute, (read + written) / 2e12)


@pytest.mark.parametrize("model", [V3, MIXTRAL, MOSAIC], ids=["v3", "mixtral", "mosaic"])
def test_experts_are_summed_over_a_ranks_slots(model):
    of = deployment(model, nodes=2, ranks=2, num_redundant_experts=4)
    slot_tokens = counts(of, mean=60.0)
    slot_tokens[0, 0, :5] = [0, 1, 64, 65, 3000]
    found = CostModel(of, calibration()).experts_seconds(slot_tokens)
    assert found.dtype == np.float32
    assert found.shape == (2, model.num_moe_layers, 4)
    for step, layer, rank in np.ndindex(2, min(3, model.num_moe_layers), 4):
        mine = slot_tokens[step, layer].reshape(4, -1)[rank]
        expected = LAUNCHES * 3e-6 + sum(expert_seconds(model, int(n)) for n in mine)
        assert found[step, layer, rank] == pytest.approx(expected, rel=1e-5)


def test_skew_is_free_until_tokens_are_what_takes_time():
    """The published observation that a straggler factor cannot reproduce."""
    of = deployment(V3, nodes=8, ranks=8)
    model = CostModel(of, calibration())

    def seconds(mean, skew):
        slot_tokens = even(of, mean)
        slot_tokens[..., 0] *= skew
        return float(model.experts_seconds(slot_tokens).max())

    assert seconds(16, 3.0) == pytest.approx(seconds(16, 1.0), rel=0.02)
    assert seconds(1024, 3.0) > 1.4 * seconds(1024, 1.0)


def test_dense_work_of_a_step():
    """Every product of a layer by hand, on the fuller of two replicas."""
    of = deployment(V3, nodes=1, ranks=2, weights="float8")
    work = StepWork.decode([[3, 100]], [[4096, 1000]])
    found = CostModel(of, calibration()).step(work, np.zeros((1, 58, 256), np.int32))

    def attention(rows, context):
        products = product_seconds(2112, 7168, rows, "float8")
        products += product_seconds(24576, 1536, rows, "float8")
        products += product_seconds(512, 128, rows, "bfloat16", 128)
        products += product_seconds(128, 512, rows, "bfloat16", 128)
        products += product_seconds(7168, 16384, rows, "float8")
        core = max(rows * context * 128 * 2 * 1088 / 4e14, rows * context * 1152 / 2e12)
        return products + core + 5e-6 + rows * 7168 * NORM_BYTES / 2e12

    fuller = max(attention(3, 4096), attention(100, 1000))
    assert found.layers.attention[0] == pytest.approx([fuller] * 58)
    norm = 100 * 7168 * NORM_BYTES / 2e12
    gate = norm + product_seconds(256, 7168, 100, "bfloat16")
    assert found.layers.gate[0, 0] == pytest.approx(gate)
    shared = product_seconds(4096, 7168, 100, "float8") + product_seconds(7168, 2048, 100, "float8")
    assert found.layers.shared[0, 0] == pytest.approx(shared)
    dense = product_seconds(36864, 7168, 100, "float8")
    dense += product_seconds(7168, 18432, 100, "float8") + norm
    assert found.dense_B[0] == pytest.approx(3 * (fuller + dense))
    assert found.head_B[0] == pytest.approx(product_seconds(129280, 7168, 100, "bfloat16"))
    assert found.overhead_B[0] == pytest.approx(1e-3 + 61e-6)
    parts = found.layers.total[0].sum() + found.dense_B[0] + found.head_B[0] + found.overhead_B[0]
    assert found.total_B[0] == pytest.approx(parts)


def test_tensor_parallel_attention_exchanges_rows_inside_the_node():
    work = StepWork.decode([[64]], [[512]])
    zeros = np.zeros((1, 58, 256), np.int32)
    found = CostModel(deployment(V3, nodes=2, ranks=4, size=4), calibration()).step(work, zeros)
    work_of_rank = arithmetic.attention(V3, 4)
    products = sum(
        product_seconds(g.n, g.k, 64, "float8" if g.count == 1 else "bfloat16", g.count)
        for g in (*work_of_rank.before, *work_of_rank.after)
    )
    core = 5e-6 + max(64 * 512 * 32 * 2 * 1088 / 4e14, 64 * 512 * 1152 / 2e12)
    rows = 2 * (1e-5 + 0.75 * 64 * 7168 * 2 / 1e11)  # gathered, and scattered again
    norm = 64 * 7168 * NORM_BYTES / 2e12
    assert found.layers.attention[0, 0] == pytest.approx(products + core + rows + norm)
    gate = 16 * 7168 * NORM_BYTES / 2e12 + product_seconds(256, 7168, 16, "bfloat16")
    assert found.layers.gate[0, 0] == pytest.approx(gate)  # a quarter of the rows each


@pytest.mark.parametrize("rows", [1, 64, 65, 2001, 4096])
def test_products_by_hand(rows):
    """From reading weights to computing tiles."""
    ops = CostModel(deployment(V3), calibration())._ops
    for n, k, count, dtype in (
        (2112, 7168, 1, "float8"), (7168, 2048, 1, "bfloat16"), (512, 128, 128, "bfloat16"),
    ):  # fmt: skip
        gemm = arithmetic.Gemm(n=n, k=k, count=count)
        found = ops.gemm(gemm, np.array([[rows]]), dtype)
        assert found == pytest.approx(product_seconds(n, k, rows, dtype, count))


def test_prompts_expand_the_latent_in_one_product():
    model = CostModel(deployment(V3, nodes=1, ranks=1), calibration())
    work = StepWork.prefill([[1000]], [[1000]])
    shapes = [(2112, 7168), (24576, 1536), (32768, 512)]
    expected = sum(product_seconds(n, k, 1000, "float8") for n, k in shapes)
    norm = 1000 * 7168 * NORM_BYTES / 2e12
    assert model._ops.before_core(work)[0, 0] == pytest.approx(expected + norm)
    assert model._ops.after_core(work)[0, 0] == pytest.approx(
        product_seconds(7168, 16384, 1000, "float8")
    )


def test_prompts_attend_in_the_plain_form():
    of = deployment(V3, nodes=1, ranks=1)
    model = CostModel(of, calibration())
    zeros = np.zeros((1, 58, 256), np.int32)
    one, two = (
        model.step(StepWork.prefill([[8192]], [[prompt]]), zeros).layers.attention[0, 0]
        for prompt in (4096, 8192)
    )
    pairs = 8192 * (8193 - 4097) / 2
    assert two - one == pytest.approx(pairs * 128 * 2 * 320 / 3e14)
    chunk = StepWork(
        tokens_BD=[[64 + 512]],
        kv_tokens_BD=[[64 * 1000]],
        pairs_BD=[[64 * 1000 + 512 * 600]],
        logits_BD=[[64]],
        has_prompts=True,
    )
    decode = StepWork.decode([[64]], [[1000]])
    both = model._ops.core(chunk)[0, 0]
    alone = model._ops.core(decode)[0, 0]
    assert both - alone == pytest.approx(5e-6 + 512 * 600 * 128 * 2 * 320 / 3e14)


def test_two_tokens_a_sequence_read_its_keys_once():
    once = StepWork.decode([[64]], [[4096]])
    twice = StepWork.decode([[64]], [[4096]], tokens_per_sequence=2)
    model = CostModel(
        deployment(V3, nodes=1, ranks=1), calibration(attention={"decode_flops": 1e18})
    )
    assert model._ops.core(twice) == pytest.approx(model._ops.core(once))
    slow = CostModel(
        deployment(V3, nodes=1, ranks=1), calibration(attention={"decode_flops": 1e12})
    )
    overhead = 2e-6
    single, double = (slow._ops.core(work)[0, 0] - overhead for work in (once, twice))
    assert double == pytest.approx(2 * single)


# -- exchanges -----------------------------------------------------------------------------------


def test_hierarchical_rows_by_link():
    """Even loads: what is sent over rails, and what reaches each rank inside its node."""
    of = deployment(V3, nodes=8, ranks=8)
    sends = Sends(nodes_per_token_L=3.5, ranks_per_token_L=6.5)
    pairs = np.full((1, 58, 64), 100 * 8, np.float32)
    dispatch, combine = CostModel(of, calibration()).exchange_seconds(
        pairs, sends, np.full((1, 64), 100.0)
    )
    network, node = 350, 650 * 7 / 8
    assert dispatch[0] == pytest.approx(
        [max(2e-5 + network * 7392 / 4e10, 1e-5 + node * 7392 / 1e11)] * 58
    )
    assert combine[0] == pytest.approx(
        [max(3e-5 + network * 14336 / 5e10, 1e-5 + node * 14336 / 1e11)] * 58
    )
    apart = calibration(
        overlap={"sm_share": 0, "supports_two_batch": True, "pipelined_stages": False}
    )
    dispatch, _ = CostModel(of, apart).exchange_seconds(pairs, sends, np.full((1, 64), 100.0))
    both = 2e-5 + network * 7392 / 4e10 + 1e-5 + node * 7392 / 1e11
    assert dispatch[0] == pytest.approx([both] * 58)


@pytest.mark.parametrize(("dispatcher", "rows"), [("flat", 6.5), ("low_latency", 8.0)])
def test_straight_rows_by_link(dispatcher, rows):
    of = deployment(V3, nodes=8, ranks=8, dispatcher=dispatcher)
    sends = Sends(nodes_per_token_L=3.5, ranks_per_token_L=6.5)
    pairs = np.full((1, 58, 64), 800, np.float32)
    pairs[0, 1, 3] = 1600
    dispatch, _ = CostModel(of, calibration()).exchange_seconds(
        pairs, sends, np.full((1, 64), 100.0)
    )

    def seconds(received):
        size = received * rows / 8 * 7392
        return max(2e-5 + size * 56 / 64 / 4e10, 1e-5 + size * 7 / 64 / 1e11)

    assert dispatch[0, 0] == pytest.approx(seconds(800))
    assert dispatch[0, 1] == pytest.approx(seconds(1600))


def test_the_replica_with_most_tokens_sends_longest():
    of = deployment(V3, nodes=8, ranks=8)
    source = np.full((1, 64), 100.0)
    pairs = np.full((1, 58, 64), 800, np.float32)
    model = CostModel(of, calibration())
    before = model.exchange_seconds(pairs, None, source)[0]
    source[0, 5] = 400.0
    after = model.exchange_seconds(pairs, None, source)[0]
    assert after - 2e-5 == pytest.approx((before - 2e-5) * 4)


def test_low_latency_kernels_may_use_the_network_inside_a_node_too():
    of = deployment(V3, nodes=8, ranks=8, dispatcher="low_latency")
    links = {"network_only": True, "combine": {"network": {"alpha_s": 1e-6, "beta": 1e10}}}
    dispatch, combine = CostModel(of, calibration(low_latency=links)).exchange_seconds(
        np.full((1, 58, 64), 800, np.float32), None, np.full((1, 64), 100.0)
    )
    assert dispatch[0, 0] == pytest.approx(2e-5 + 800 * 7392 * 63 / 64 / 4e10)
    assert combine[0, 0] == pytest.approx(1e-6 + 800 * 14336 * 63 / 64 / 1e10)


def test_the_ranks_of_a_replica_send_its_tokens_in_equal_shares():
    of = deployment(V3, nodes=2, ranks=4, size=4)
    sends = Sends(nodes_per_token_L=1.0, ranks_per_token_L=0.5)
    found = CostModel(of, calibration()).step(StepWork.decode([[400]], [[9]]), even(of, 100), sends)
    assert found.layers.dispatch[0, 0] == pytest.approx(2e-5 + 100 * 7392 / 4e10)


@pytest.mark.parametrize("dispatcher", ["hierarchical", "flat", "low_latency"])
def test_one_rank_sends_nothing(dispatcher):
    of = deployment(MOSAIC, nodes=1, ranks=1, dispatcher=dispatcher)
    found = CostModel(of, calibration()).step(StepWork.decode([[9]], [[50]]), even(of, 9))
    assert not found.layers.dispatch.any()
    assert not found.layers.combine.any()
    assert (found.layers.exposed_BL == 0).all()


def routing(of: Deployment, tokens, sigma, seed=3):
    """Experts of each rank's tokens: k different ones, by chances that are lognormal."""
    rng = np.random.default_rng(seed)
    log_chance = sigma * rng.standard_normal(of.model.num_experts)
    chosen = of.model.gate.num_experts_per_token
    for _ in range(of.num_ranks):
        score = rng.gumbel(size=(tokens, of.model.num_experts)) + log_chance
        yield np.argpartition(-score, chosen, axis=1)[:, :chosen]


@pytest.mark.parametrize("layout", [(8, 8), (4, 4), (2, 8), (1, 8)])
def test_uniform_sends_are_what_random_routing_makes(layout):
    model = load_model("kimi-k2")  # no groups
    of = deployment(model, *layout)
    visits = node_visits(list(routing(of, 200, 0.0)), of.topology, of.slots_per_rank)
    own = np.arange(of.num_ranks) // layout[1]
    elsewhere = visits.nodes_RN.sum() - visits.nodes_RN[np.arange(of.num_ranks), own].sum()
    expected = Sends.uniform(model, of.topology)
    tokens = 200 * of.num_ranks
    assert expected.nodes_per_token_L[0] == pytest.approx(elsewhere / tokens, rel=0.02)
    assert expected.ranks_per_token_L[0] == pytest.approx(visits.tokens_RR.sum() / tokens, rel=0.01)


def test_uniform_sends_of_grouped_gates():
    """3.46 and 0.98 rows a token were measured with DeepSeek-V3's own gate on random scores."""
    for nodes, rows in ((8, 3.46), (2, 0.98)):
        topology = Topology(num_nodes=nodes, ranks_per_node=8)
        assert Sends.uniform(V3, topology).nodes_per_token_L[0] == pytest.approx(rows, rel=0.02)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.6])
def test_the_busiest_node_and_rank_receive_what_routing_sends_them(sigma):
    """Rows counted one by one on skewed routing, against the rule in closed form."""
    of = deployment(load_model("kimi-k2"), nodes=8, ranks=8)
    visits = node_visits(list(routing(of, 128, sigma)), of.topology, of.slots_per_rank)
    nodes_RN = visits.nodes_RN.copy()
    nodes_RN[np.arange(64), np.arange(64) // 8] = 0
    sends = Sends(
        nodes_per_token_L=nodes_RN.sum() / (64 * 128),
        ranks_per_token_L=visits.tokens_RR.sum() / (64 * 128),
    )
    pairs = visits.pairs_RR.sum(axis=0).astype(np.float32)[None, None]
    rule = CostModel(of, calibration())._exchanges
    rows = rule._hierarchical(pairs, sends, np.full((1, 64), 128.0))
    received = nodes_RN.reshape(8, 8, 8).sum(axis=0)  # by rail and node
    assert rows["network"][0, 0] == pytest.approx(received.mean(axis=0).max(), rel=0.05)
    drawn = visits.tokens_RR.sum(axis=0).max() * 7 / 8
    assert rows["node"][0, 0] == pytest.approx(drawn, rel=0.05)


# -- overlap -------------------------------------------------------------------------------------


def parts_of_half(of: Deployment, work: StepWork, slot_tokens, cal):
    """Each operation of one micro-batch, from the serial model at half the tokens."""
    serial = CostModel(dataclasses.replace(of, overlap="none"), cal)
    return serial, serial.step(work.half(), slot_tokens / 2).layers


BETAS = [1e9, 2e10, 4e10, 1e12]  # from all exposed to all hidden


def network(beta, **overlap):
    """Of one beta, for dispatch and combine."""
    links = {"node": {"alpha_s": 0, "beta": 1e13}, "network": {"alpha_s": 1e-5, "beta": beta}}
    overlap = {"sm_share": 0.2, "supports_two_batch": True, **overlap}
    return calibration(links=links, combine={}, overlap=overlap)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("held", [0.0, 1e-5, 1.0])
def test_two_batches_in_decode(beta, held):
    of = deployment(V3, nodes=8, ranks=8, overlap="two_batch", dispatcher="low_latency")
    work, slot_tokens = StepWork.decode([[128]], [[4096]]), even(of, 128)
    cal = network(beta, held_s=held)
    found = CostModel(of, cal).step(work, slot_tokens).layers
    serial, half = parts_of_half(of, work, slot_tokens, cal)
    before = serial._ops.before_core(work.half())[0, 0]
    after = half.attention - before

    def beside(computed, exchanged):
        return np.maximum(computed + np.minimum(held, exchanged), exchanged)

    expected = beside(half.shared + before, half.dispatch) + half.experts
    if held == 1.0:  # exchanges are over before that
        assert found.hidden_BL == pytest.approx(0)
    expected = 2 * (expected + beside(after + half.gate, half.combine))
    assert found.total == pytest.approx(expected)
    assert found.exposed_BL + found.hidden_BL == pytest.approx(found.dispatch + found.combine)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("slowdown", [1.0, 1.5])
def test_two_batches_of_prompts(beta, slowdown):
    of = deployment(V3, nodes=4, ranks=8, overlap="two_batch")
    work, slot_tokens = StepWork.prefill([[4096]], [[1024]]), even(of, 4096)
    cal = network(beta, exchange_slowdown=slowdown)
    found = CostModel(of, cal).step(work, slot_tokens).layers
    _, half = parts_of_half(of, work, slot_tokens, cal)
    attention, shared, experts = (
        x / 0.8 for x in (half.attention + half.gate, half.shared, half.experts)
    )
    dispatch, combine = half.dispatch * slowdown, half.combine * slowdown
    expected = np.maximum(attention + shared, combine) + np.maximum(attention, dispatch)
    expected = expected + np.maximum(experts, dispatch) + np.maximum(experts + shared, combine)
    assert found.total == pytest.approx(expected)
    assert found.exposed_BL + found.hidden_BL == pytest.approx(found.dispatch + found.combine)


def test_layers_without_experts_take_the_whole_batch():
    work, zeros = StepWork.decode([[128]], [[4096]]), np.zeros((1, 58, 256), np.int32)
    one, two = (
        CostModel(deployment(V3, overlap=how), calibration()).step(work, zeros)
        for how in ("none", "two_batch")
    )
    assert two.dense_B == pytest.approx(one.dense_B)
    assert two.head_B == pytest.approx(one.head_B)


def test_a_micro_batch_is_half_of_everything():
    work = StepWork.decode([[6, 8]], [[10, 20]], tokens_per_sequence=2)
    half = work.half()
    assert half.tokens_BD.tolist() == [[6, 8]]
    assert half.kv_tokens_BD.tolist() == [[30, 80]]
    assert half.pairs_BD.tolist() == [[60, 160]]
    assert half.logits_BD.tolist() == [[6, 8]]
    assert half.context_BD.tolist() == work.context_BD.tolist() == [[10, 20]]


OVERLAPS = st.fixed_dictionaries(
    {
        "sm_share": st.floats(0, 0.5),
        "supports_two_batch": st.just(True),
        "exchange_slowdown": st.floats(1, 2),
        "held_s": st.floats(0, 1e-4),
    }
)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 2000),
    st.integers(1, 8192),
    st.booleans(),
    st.sampled_from(["hierarchical", "flat", "low_latency"]),
    OVERLAPS,
)
def test_two_batches_are_no_slower_than_two_steps_of_half(tokens, context, prompts, how, overlap):
    """But for the computing units that exchanges hold, and no faster than what they overlap."""
    of = deployment(V3, nodes=4, ranks=8, overlap="two_batch", dispatcher=how)
    cal = calibration(overlap=overlap)
    make = StepWork.prefill if prompts else StepWork.decode
    work, slot_tokens = make([[2 * tokens]], [[context]]), even(of, 2 * tokens).round()
    slot_tokens = (slot_tokens // 2) * 2
    found = CostModel(of, cal).step(work, slot_tokens).layers
    _, half = parts_of_half(of, work, slot_tokens, cal)
    slower = (
        1.0
        if how == "low_latency"
        else max(1 / (1 - overlap["sm_share"]), overlap["exchange_slowdown"])
    )
    assert (found.total <= 2 * half.total * slower * (1 + 1e-5)).all()
    compute = 2 * (half.total - half.exposed_BL)
    assert (found.total >= compute * (1 - 1e-5)).all()
    assert (found.total >= (found.experts + found.exposed_BL) * (1 - 1e-5)).all()
    assert (found.hidden_BL >= -1e-12).all()


def test_a_backend_without_overlap_refuses_it():
    alone = calibration(overlap={"sm_share": 0, "supports_two_batch": False})
    with pytest.raises(ValueError, match="without two-batch overlap"):
        CostModel(deployment(overlap="two_batch"), alone)


# -- what must always hold -----------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(0, 31), st.integers(0, 500))
def test_more_tokens_of_an_expert_are_never_faster(seed, slot, more):
    of = deployment(MOSAIC)
    model = CostModel(of, calibration())
    slot_tokens = counts(of, steps=1, seed=seed)
    before = model.experts_seconds(slot_tokens)
    slot_tokens[..., slot] += more
    assert (model.experts_seconds(slot_tokens) >= before).all()


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(["hierarchical", "flat", "low_latency"]),
    st.sampled_from(["none", "two_batch"]),
    st.integers(1, 300),
    st.integers(1, 2000),
    st.floats(1, 8),
)
def test_more_tokens_or_context_are_never_faster(dispatcher, overlap, tokens, context, factor):
    of = deployment(V3, nodes=2, ranks=8, dispatcher=dispatcher, overlap=overlap)
    model = CostModel(of, calibration())

    def total(tokens, context):
        work = StepWork.decode([[tokens]], [[context]])
        return model.step(work, np.ceil(even(of, tokens))).total_B[0]

    base = total(tokens, context) * (1 - 1e-6)
    assert total(tokens, context * factor) >= base
    assert total(tokens * factor, context) >= base


def test_a_step_is_as_slow_as_its_slowest_rank():
    """Replicas: each alone, and all together. Experts: the maximum over ranks."""
    of = deployment(V3, nodes=1, ranks=4)
    model = CostModel(of, calibration())
    slot_tokens = counts(of, steps=1)
    tokens = [10.0, 900.0, 3.0, 50.0]
    context = [9000.0, 100.0, 60.0, 3000.0]
    together = model.step(StepWork.decode([tokens], [context]), slot_tokens, by_rank=True)
    alone = [
        model.step(StepWork.decode([[t]], [[c]]), slot_tokens).layers.attention[0, 0]
        for t, c in zip(tokens, context, strict=True)
    ]
    assert together.layers.attention[0, 0] == pytest.approx(max(alone))
    assert together.experts_by_rank_BLR is not None
    assert (together.layers.experts == together.experts_by_rank_BLR.max(axis=-1)).all()


def test_a_block_of_steps_is_its_steps():
    of = deployment(V3, nodes=2, ranks=8, num_redundant_experts=16)
    model = CostModel(of, calibration())
    slot_tokens = counts(of, steps=5, mean=30)
    rng = np.random.default_rng(4)
    sequences, context = rng.integers(1, 200, (2, 5, 16)).astype(float)
    block = model.step(StepWork.decode(sequences, context), slot_tokens)
    for step in range(5):
        work = StepWork.decode(sequences[[step]], context[[step]])
        one = model.step(work, slot_tokens[[step]])
        assert one.total_B[0] == block.total_B[step]
        for part in PARTS:
            assert (getattr(one.layers, part) == getattr(block.layers, part)[step]).all()


def test_work_that_is_used_again_costs_the_same():
    of = deployment(MOSAIC, overlap="two_batch")
    model = CostModel(of, calibration())
    one, other = StepWork.decode([[5]], [[50]]), StepWork.decode([[500]], [[50]])
    slot_tokens = counts(of)
    first = model.step(one, slot_tokens).total_B
    second = model.step(other, slot_tokens).total_B
    assert (model.step(other, slot_tokens).total_B == second).all()
    assert (model.step(one, slot_tokens).total_B == first).all()
    assert (second > first).all()


def test_whole_numbers_cost_the_same_in_any_type():
    of = deployment(MOSAIC)
    model = CostModel(of, calibration())
    slot_tokens = counts(of)
    expected = model.experts_seconds(slot_tokens)
    for dtype in (np.int64, np.float32, np.float64, np.uint16):
        assert (model.experts_seconds(slot_tokens.astype(dtype)) == expected).all()
    assert (model.experts_seconds(slot_tokens - 0.5) == expected).all()  # rounded up


@pytest.mark.parametrize("overlap", ["none", "two_batch"])
@pytest.mark.parametrize("dispatcher", ["hierarchical", "flat", "low_latency"])
def test_without_tokens_only_launches_are_left(dispatcher, overlap):
    of = deployment(MOSAIC, dispatcher=dispatcher, overlap=overlap)
    zeros = np.zeros((3, 5, 32), np.int32)
    found = CostModel(of, calibration()).step(StepWork.decode([[0]], [[0]]), zeros)
    parts = 2 if overlap == "two_batch" else 1
    slower = 1 / 0.8 if parts == 2 and dispatcher != "low_latency" else 1
    launches = parts * LAUNCHES * 3e-6 * slower
    assert found.layers.total == pytest.approx(np.full((3, 5), launches))
    assert found.total_B == pytest.approx([5 * launches + 1e-3 + parts * 6e-6] * 3)


def test_measured_tables_are_used():
    table = {"axes": {"tokens": [1, 64, 128]}, "unit": "s", "values": [1e-3, 2e-3, 4e-3]}
    experts = {
        "axes": {"experts": [8, 16], "tokens_per_expert": [1, 100]},
        "unit": "s",
        "values": [[8e-3, 8e-3], [16e-3, 16e-3]],
    }
    tables = {"gemm/bfloat16/32x256": table, "grouped_gemm/float8/256x64": experts}
    of = deployment(MOSAIC)
    model = CostModel(of, calibration(tables=tables))
    norm = 64 * 256 * NORM_BYTES / 2e12
    found = model.step(StepWork.decode([[64]], [[9]]), counts(of, steps=1) + 1)
    assert found.layers.gate[0, 0] == pytest.approx(2e-3 + norm)
    assert found.layers.experts[0, 0] == pytest.approx(8e-3)
    assert model.warnings == []
    model.step(StepWork.decode([[129]], [[9]]), counts(of, steps=1) + 101)
    model.step(StepWork.decode([[130]], [[9]]), counts(of, steps=1) + 102)
    assert model.warnings == [
        "extrapolated: tokens beyond table gemm/bfloat16/32x256",
        "extrapolated: tokens beyond table grouped_gemm/float8/256x64",
    ]


def test_attention_from_tables():
    decode = {
        "axes": {"sequences": [1, 64], "context": [100, 1000]},
        "unit": "s",
        "values": [[1e-5, 2e-5], [3e-5, 7e-5]],
    }
    prompt = {"axes": {"tokens": [128, 1024]}, "unit": "s", "values": [1e-4, 5e-3]}
    tables = {"mla_decode/bfloat16/4x160": decode, "attention_prefill/4x128": prompt}
    of = deployment(MOSAIC)
    model = CostModel(of, calibration(tables=tables))
    assert model._ops.core(StepWork.decode([[64]], [[1000]])) == pytest.approx(7e-5)
    assert model._ops.core(StepWork.prefill([[2048]], [[1024]])) == pytest.approx(2 * 5e-3)
    assert model._ops.core(StepWork.decode([[0]], [[0]])) == 0
    assert model.warnings == []
    model._ops.core(StepWork.decode([[65]], [[1000]]))
    assert model.warnings == ["extrapolated: sizes beyond table mla_decode/bfloat16/4x160"]


def test_sizes_outside_the_calibration_are_said_once():
    model = CostModel(deployment(V3, nodes=64, ranks=8, num_redundant_experts=256), calibration())
    zeros = np.zeros((1, 58, 512), np.int32)
    for tokens in (5000, 6000):
        model.step(StepWork.decode([[tokens]], [[40000]]), zeros)
    assert [warning.split(" of calibration")[0] for warning in model.warnings] == [
        "extrapolated: ranks beyond 1 to 256",
        "extrapolated: tokens beyond 1 to 4096",
        "extrapolated: context beyond 1 to 32768",
    ]


def test_what_does_not_fit_together_is_refused():
    of = deployment(MOSAIC)
    model = CostModel(of, calibration())
    work = StepWork.decode([[1]], [[1]])
    with pytest.raises(ValueError, match=r"\[B, 5 layers, 32 slots\], got \[2, 5, 31\]"):
        model.step(work, np.zeros((2, 5, 31), np.int32))
    with pytest.raises(ValueError, match="16,777,216 tokens of one expert"):
        model.experts_seconds(np.full((1, 5, 32), 1 << 25))
    with pytest.raises(ValueError, match="kv_tokens_BD must be finite and >= 0"):
        StepWork.decode([[1]], [[-1]])
    only = calibration(
        peak_flops={"bfloat16": 1e14}, gemm={"bfloat16": {"overhead_s": 0, "tile": 1}}
    )
    with pytest.raises(ValueError, match="has no float8: choose weights from bfloat16"):
        CostModel(of, only)
