"""The MoE layer on one rank: against transformers' own blocks, and its batch invariance in BF16."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from comms.flat import FlatDispatcher
from experts.mlp import GatedMLP
from experts.moe import MoELayer
from experts.weights import ExpertSlots
from router.gate import Gate, GateConfig
from router.placement import Placement
from tests.experts.test_layouts import one_rank

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 64, 48, 16, 4


def deepseek_v3():
    config = DeepseekV3Config(
        hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K, n_group=4, topk_group=2, n_shared_experts=1,
    )  # fmt: skip
    return DeepseekV3MoE(config), GateConfig(
        num_experts=EXPERTS,
        num_experts_per_token=TOP_K,
        scoring="sigmoid",
        num_groups=4,
        num_groups_per_token=2,
        group_score="top2_sum",
        renormalize=True,
        scaling_factor=config.routed_scaling_factor,
    )


def qwen3_moe():
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS,
        num_experts_per_tok=TOP_K, norm_topk_prob=True,
    )  # fmt: skip
    return Qwen3MoeSparseMoeBlock(config), GateConfig(
        num_experts=EXPERTS, num_experts_per_token=TOP_K, renormalize=True
    )


def mixtral():
    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )  # fmt: skip
    return MixtralSparseMoeBlock(config), GateConfig(
        num_experts=EXPERTS, num_experts_per_token=TOP_K, renormalize=True
    )


MODELS = {f.__name__: f for f in (deepseek_v3, qwen3_moe, mixtral)}


def build(name, dtype=torch.float32, num_redundant=0, combine="node", **options):
    """transformers' block with random weights, and our layer with the same."""
    torch.manual_seed(3)
    oracle, gate_config = MODELS[name]()
    for weight in oracle.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    bias = getattr(oracle.gate, "e_score_correction_bias", None)
    if bias is not None:
        bias.copy_(torch.randn_like(bias) * 0.1)
    oracle.requires_grad_(False)
    placement = Placement.contiguous(1, EXPERTS, 1, num_redundant)
    slots = ExpertSlots(placement.slots_per_rank, HIDDEN, INTERMEDIATE, dtype)
    for slot, expert in placement.experts_of_rank(0, 0).items():
        gate, up = oracle.experts.gate_up_proj[expert].chunk(2)
        slots.load(slot, gate, up, oracle.experts.down_proj[expert])
    shared = None
    if name == "deepseek_v3":
        mlp = oracle.shared_experts
        w13 = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).to(dtype)
        shared = GatedMLP(w13, mlp.down_proj.weight.to(dtype).contiguous())
    layer = MoELayer(
        gate=Gate(gate_config, oracle.gate.weight, bias),
        slots=slots,
        dispatcher=FlatDispatcher(
            one_rank(), slots_per_rank=slots.num_slots, hidden=HIDDEN, combine=combine
        ),
        layer_placement=placement.layer(0),
        rank=0,
        shared_expert=shared,
        **options,
    )
    return oracle, layer


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_redundant", [0, 5])
def test_equals_transformers_in_fp32(name, num_redundant):
    oracle, layer = build(name, num_redundant=num_redundant)
    x_TH = torch.randn(90, HIDDEN)
    expected = oracle(x_TH.unsqueeze(0)).squeeze(0)
    error = (layer.forward(x_TH) - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 3e-6


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("combine", ["node", "exact"])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_a_row_is_bit_identical_alone_and_in_any_batch(name, combine, data):
    """In BF16, and in fp32, whose outputs show what BF16 rounds away."""
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32]))
    _, layer = build(name, dtype, combine=combine)
    num_rows = data.draw(st.integers(1, 130))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x_TH = torch.randn(num_rows, HIDDEN, generator=generator).to(dtype)
    together = layer.forward(x_TH)
    order = torch.randperm(num_rows, generator=generator)
    assert torch.equal(layer.forward(x_TH[order]), together[order])
    for row in {0, num_rows - 1, data.draw(st.integers(0, num_rows - 1))}:
        assert torch.equal(layer.forward(x_TH[row : row + 1].clone()), together[row : row + 1])
    start = data.draw(st.integers(0, num_rows - 1))
    assert torch.equal(layer.forward(x_TH[start:]), together[start:])


def test_counts_pairs_per_slot_and_accepts_no_tokens():
    _, layer = build("deepseek_v3", torch.bfloat16)
    x_TH = torch.randn(30, HIDDEN).bfloat16()
    ids_TK, _ = layer.gate(x_TH, lambda x, w: x @ w.T)
    layer.forward(x_TH)
    layer.forward(x_TH[:0])
    assert layer.tokens_per_slot_S.dtype == torch.int64
    assert (
        layer.tokens_per_slot_S.tolist() == torch.bincount(ids_TK.flatten(), minlength=16).tolist()
    )
    assert layer.forward(x_TH[:0]).shape == (0, HIDDEN)


def test_phases_are_entered_in_order_and_do_not_nest():
    seen = []

    @contextmanager
    def phase(name):
        seen.append(name)
        yield
        seen.append(f"/{name}")

    _, layer = build("mixtral", phase=phase)
    layer.forward(torch.randn(2, HIDDEN))
    entered = seen[0::2]
    assert seen[1::2] == [f"/{name}" for name in entered]  # they do not nest
    assert list(dict.fromkeys(entered)) == ["gate", "dispatch", "experts", "combine"]


def test_slots_must_match_the_placement():
    _, layer = build("mixtral")
    with pytest.raises(ValueError, match=r"num_slots\(16\) != slots_per_rank\(8\)"):
        MoELayer(
            gate=layer.gate,
            slots=layer.slots,
            dispatcher=layer.dispatcher,
            layer_placement=Placement.contiguous(1, EXPERTS, 2).layer(0),
            rank=0,
        )
