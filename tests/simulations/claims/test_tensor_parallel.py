"""The tensor-parallel baseline: its sizes, its memory, its limits, and a step counted by hand."""

from dataclasses import replace

import numpy as np
import pytest

from cluster.model.config import GqaConfig
from comms.topology import Topology
from simulations.arithmetic import attention, gate, total_params
from simulations.claims.tensor_parallel import TensorParallel, smallest_group, thinner
from simulations.cost import CostModel, StepWork
from simulations.deployment import Deployment
from simulations.hardware.calibration import Calibration, Launch
from simulations.memory import DoesNotFit
from simulations.presets import load_model
from simulations.times.all_reduce import all_reduce_seconds
from simulations.times.network import Link

V3, QWEN = load_model("deepseek-v3"), load_model("qwen3-235b")
H100 = Calibration.named("h100-published")
PLAIN = replace(  # a roofline and nothing else
    H100,
    tables={},
    gemm={dtype: Launch(overhead_s=0.0, tile=1) for dtype in ("bfloat16", "float8")},
    attention_overhead_s=0.0,
    step_s=0.0,
    layer_s=0.0,
)


def group(model=V3, calibration=H100, num_nodes=2, ranks_per_node=8, **options):
    return TensorParallel(
        model, calibration, num_nodes=num_nodes, ranks_per_node=ranks_per_node, **options
    )


def counts(model, tokens: int, seed: int = 0):
    """Each expert as likely as any other, [1, L, E]."""
    experts = model.num_experts
    pairs = tokens * model.gate.num_experts_per_token
    rng = np.random.default_rng(seed)
    return rng.multinomial(pairs, np.full(experts, 1 / experts), size=(1, model.num_moe_layers))


def decode(tokens: int, context: int = 4096) -> StepWork:
    return StepWork.decode(np.array([[tokens]]), context)


@pytest.mark.parametrize("size", [1, 2, 8, 16])
def test_all_ranks_together_hold_the_model_and_what_is_on_each(size: int) -> None:
    """MLA's two down-projections and the gate are on all ranks, everything else is divided."""
    mla = V3.attention
    down = V3.hidden_size * (mla.q_lora_rank + mla.kv_lora_rank + mla.qk_rope_head_dim)
    on_each = V3.num_layers * down + V3.num_moe_layers * gate(V3).params
    thin = thinner(V3, size)
    assert size * total_params(thin) == total_params(V3) + (size - 1) * on_each


def test_kv_heads_are_divided_as_far_as_they_go() -> None:
    heads = [thinner(QWEN, size).attention for size in (1, 2, 4, 8)]
    assert all(isinstance(config, GqaConfig) for config in heads)
    assert [(config.num_heads, config.num_kv_heads) for config in heads] == [
        (64, 4),
        (32, 2),
        (16, 1),
        (8, 1),
    ]


def test_mla_keeps_its_whole_cache_on_every_rank_gqa_divides_it() -> None:
    assert group(V3, num_nodes=2).of_rank.kv_bytes_per_token == 70272
    assert group(QWEN, num_nodes=1, ranks_per_node=4).of_rank.kv_bytes_per_token == (
        QWEN.num_layers * 2 * 128 * 2
    )


@pytest.mark.parametrize(
    ("model", "size", "equation"),
    [
        (V3, 3, r"num_attention_heads: 128 % 3 = 2"),
        (V3, 256, r"num_attention_heads: 128 % 256 = 128"),
        (QWEN, 0, r"over 0 ranks"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(model, size: int, equation: str) -> None:
    with pytest.raises(ValueError, match=equation):
        thinner(model, size)


def test_a_group_is_as_many_nodes_as_the_weights_need() -> None:
    """671 GB in float8 are 84 GB on each of 8 ranks, 1,342 GB in bfloat16 84 GB on each of 16."""

    def nodes(calibration, **options):
        found = smallest_group(
            V3, calibration, ranks_per_node=8, max_tokens=1, kv_tokens=4096, **options
        )
        return found.num_nodes

    assert nodes(H100) == 2
    assert nodes(H100, weights="bfloat16") == 4
    assert nodes(replace(H100, memory_bytes=141e9)) == 1
    with pytest.raises(DoesNotFit, match="too much"):
        nodes(replace(H100, memory_bytes=4e9))


def test_one_rank_is_a_cluster_of_one_rank() -> None:
    mixtral = load_model("mixtral-8x7b")
    alone = group(mixtral, num_nodes=1, ranks_per_node=1)
    slots = counts(mixtral, 64)
    deployment = Deployment(model=mixtral, topology=Topology(num_nodes=1, ranks_per_node=1))
    expected = CostModel(deployment, H100).step(decode(64), slots)
    found = alone.step(decode(64), slots)
    assert found.all_reduce_B.tolist() == [0.0]
    assert found.total_B.tolist() == expected.total_B.tolist()


def test_a_step_is_its_ranks_work_and_two_all_reduces_a_layer() -> None:
    beta = {tier: H100.links[tier].beta for tier in ("node", "network")}
    links = {
        "node": Link(alpha_s=10e-6, beta=beta["node"]),
        "network": Link(alpha_s=20e-6, beta=beta["network"]),
    }
    for tokens in (1, 100, 5000):
        times = group().step(decode(tokens), counts(V3, tokens))
        message = tokens * 7168 * 2
        one = all_reduce_seconds(message, ranks_per_node=8, num_nodes=2, **links)
        assert times.all_reduce_B == pytest.approx(2 * 61 * one)
        assert times.total_B == pytest.approx(times.compute_B + times.all_reduce_B)


def test_with_endless_links_only_computing_is_left() -> None:
    endless = Link(alpha_s=0.0, beta=1e40)
    fast = replace(H100, links={"node": endless, "network": endless})
    tokens = counts(V3, 256)
    times = group(calibration=fast).step(decode(256), tokens)
    assert times.total_B == pytest.approx(times.compute_B, rel=1e-12)
    assert times.compute_B == pytest.approx(group().step(decode(256), tokens).compute_B)


def test_ring_all_reduces_are_never_faster() -> None:
    for tokens in (1, 64, 4096):
        step = decode(tokens), counts(V3, tokens)
        ring = group(all_reduce="ring").step(*step).all_reduce_B
        assert ring >= group().step(*step).all_reduce_B


def test_a_step_of_one_token_reads_the_weights_that_it_needs() -> None:
    """On a plain roofline, one token is bound by memory: the bytes are countable."""
    size, slots = 16, counts(V3, 1)
    times = group(calibration=PLAIN).step(decode(1, context=1), slots)
    used = int((slots > 0).sum())
    thin = thinner(V3, size)
    hidden = V3.hidden_size
    weights = V3.num_layers * attention(thin).params
    weights += used * 3 * hidden * (2048 // size)
    weights += V3.num_moe_layers * 3 * hidden * (2048 // size)  # shared expert
    weights += 3 * 3 * hidden * (18432 // size)  # dense layers
    in_bfloat16 = V3.num_moe_layers * 256 * hidden + 129280 // size * hidden
    least = (weights + 2 * in_bfloat16) / PLAIN.memory_bandwidth
    assert least < times.compute_B[0] < 1.05 * least  # and reads activations


def test_endless_tokens_are_bound_by_flop_and_divide_perfectly() -> None:
    """So many tokens that weights are nothing: computing takes a T-th, whatever T."""
    tokens = 1 << 20
    no_traffic = replace(PLAIN, memory_bandwidth=1e30)
    slots = counts(V3, tokens)
    work = StepWork(
        tokens_BD=np.array([[tokens]]),
        kv_tokens_BD=np.array([[0.0]]),
        pairs_BD=np.array([[0.0]]),
        logits_BD=np.array([[0.0]]),
    )
    one = group(calibration=no_traffic, num_nodes=1, ranks_per_node=1).step(work, slots)
    eight = group(calibration=no_traffic, num_nodes=1, ranks_per_node=8).step(work, slots)
    mla = V3.attention
    down = V3.hidden_size * (mla.q_lora_rank + mla.kv_lora_rank + mla.qk_rope_head_dim)
    whole = 2 * tokens * V3.num_layers * down / PLAIN.peak_flops["float8"]
    whole += 2 * tokens * V3.num_moe_layers * gate(V3).params / PLAIN.peak_flops["bfloat16"]
    assert eight.compute_B - whole == pytest.approx((one.compute_B - whole) / 8, rel=1e-5)


def test_more_tokens_and_longer_contexts_take_longer() -> None:
    tokens = [1, 4, 16, 64, 256]
    times = [float(group().step(decode(n), counts(V3, n)).total_B[0]) for n in tokens]
    assert times == sorted(times)
    some = counts(V3, 64)
    contexts = [float(group().step(decode(64, c), some).total_B[0]) for c in (512, 4096, 32768)]
    assert contexts == sorted(contexts)


def test_the_one_rank_of_the_model_is_no_extrapolation() -> None:
    calibration = replace(PLAIN, range={**H100.range, "tokens": (1, 100)})
    tp = group(calibration=calibration)
    tp.step(decode(64), counts(V3, 64))
    assert tp.warnings == []
    tp.step(decode(128), counts(V3, 128))
    assert len(tp.warnings) == 1
    assert "tokens" in tp.warnings[0]
