"""Gates against transformers' own router modules, and the properties transformers lacks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from router.gate import Gate, GateConfig

HIDDEN = 64


def deepseek_v2(method):
    limited = method == "group_limited_greedy"
    config = DeepseekV2Config(
        hidden_size=HIDDEN, n_routed_experts=24, num_experts_per_tok=5, n_group=6, topk_group=2,
        topk_method=method, routed_scaling_factor=2.5, norm_topk_prob=False,
    )  # fmt: skip
    return DeepseekV2TopkRouter(config), GateConfig(
        num_experts=24,
        num_experts_per_token=5,
        num_groups=6 if limited else 1,
        num_groups_per_token=2 if limited else 1,
        scaling_factor=2.5,
    )


def deepseek_v3(groups=8, groups_per_token=3, renormalize=True):
    config = DeepseekV3Config(
        hidden_size=HIDDEN, n_routed_experts=40, num_experts_per_tok=6, n_group=groups,
        topk_group=groups_per_token, routed_scaling_factor=2.5, norm_topk_prob=renormalize,
    )  # fmt: skip
    return DeepseekV3TopkRouter(config), GateConfig(
        num_experts=40,
        num_experts_per_token=6,
        scoring="sigmoid",
        num_groups=groups,
        num_groups_per_token=groups_per_token,
        group_score="top2_sum",
        renormalize=renormalize,
        scaling_factor=2.5,
    )


def qwen3_moe(renormalize):
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, num_experts=20, num_experts_per_tok=4, norm_topk_prob=renormalize
    )
    return Qwen3MoeTopKRouter(config), GateConfig(
        num_experts=20, num_experts_per_token=4, renormalize=renormalize
    )


def mixtral():
    config = MixtralConfig(hidden_size=HIDDEN, num_local_experts=8, num_experts_per_tok=2)
    return MixtralTopKRouter(config), GateConfig(
        num_experts=8, num_experts_per_token=2, renormalize=True
    )


MODELS = {
    "v2 greedy": lambda: deepseek_v2("greedy"),
    "v2 group_limited_greedy": lambda: deepseek_v2("group_limited_greedy"),
    "v3": deepseek_v3,
    "v3 without groups": lambda: deepseek_v3(1, 1),
    "v3 unnormalised": lambda: deepseek_v3(renormalize=False),
    "qwen3 normalised": lambda: qwen3_moe(True),
    "qwen3": lambda: qwen3_moe(False),
    "mixtral": mixtral,
}


def build(name):
    """transformers' router and our gate with the same random weights, and our hidden states."""
    torch.manual_seed(7)
    oracle, config = MODELS[name]()
    torch.nn.init.normal_(oracle.weight, std=0.3)
    bias = getattr(oracle, "e_score_correction_bias", None)
    if bias is not None:
        bias.copy_(torch.randn_like(bias) * 0.2)
    gate = Gate(config, oracle.weight.detach(), bias)
    return oracle, gate, torch.randn(500, HIDDEN)


def dense(ids, weights, num_experts):
    """[T, E] weights: transformers does not sort its choices."""
    return torch.zeros(len(ids), num_experts).scatter_add_(1, ids, weights.float())


@pytest.mark.parametrize("name", MODELS)
def test_same_experts_and_weights_as_transformers(name):
    oracle, gate, x_TH = build(name)
    with torch.no_grad():
        _, expected_weights, expected_ids = oracle(x_TH)
    ids_TK, weights_TK = gate(x_TH, F.linear)
    assert ids_TK.dtype == torch.int64
    assert weights_TK.dtype == torch.float32
    assert torch.equal(ids_TK.sort(dim=1).values, expected_ids.sort(dim=1).values)
    experts = gate.config.num_experts
    torch.testing.assert_close(
        dense(ids_TK, weights_TK, experts),
        dense(expected_ids, expected_weights, experts),
        rtol=1e-6,
        atol=1e-7,
    )


def test_mixtral_is_a_softmax_over_the_chosen_logits():
    _, gate, x_TH = build("mixtral")
    logits_TE = F.linear(x_TH, gate.weight_EH)
    values, ids = logits_TE.topk(2)
    ids_TK, weights_TK = gate.choose(logits_TE)
    assert torch.equal(ids_TK, ids)
    torch.testing.assert_close(weights_TK, values.softmax(-1), rtol=1e-5, atol=1e-7)


def test_the_bias_chooses_but_does_not_weigh():
    config = GateConfig(num_experts=4, num_experts_per_token=1, scoring="sigmoid")
    bias = torch.tensor([0.0, 0.0, 0.0, 5.0])
    ids, weights = Gate(config, torch.zeros(4, 8), bias).choose(
        torch.tensor([[2.0, 1.0, 0.0, 0.0]])
    )
    assert ids.tolist() == [[3]]
    assert weights.item() == pytest.approx(0.5)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_row_does_not_depend_on_its_batch(name, data):
    _, gate, x_TH = build(name)
    logits_TE = F.linear(x_TH, gate.weight_EH) * data.draw(st.sampled_from([1.0, 20.0]))
    start = data.draw(st.integers(0, 499))
    stop = data.draw(st.integers(start + 1, 500))
    whole_ids, whole_weights = gate.choose(logits_TE)
    ids, weights = gate.choose(logits_TE[start:stop].clone())
    assert torch.equal(ids, whole_ids[start:stop])
    assert torch.equal(weights, whole_weights[start:stop])


@pytest.mark.parametrize("name", MODELS)
def test_every_row_alone_is_as_in_the_batch(name):
    _, gate, x_TH = build(name)
    logits_TE = F.linear(x_TH, gate.weight_EH)
    ids, weights = zip(*[gate.choose(row) for row in logits_TE.clone().split(1)], strict=True)
    whole_ids, whole_weights = gate.choose(logits_TE)
    assert torch.equal(torch.cat(ids), whole_ids)
    assert torch.equal(torch.cat(weights), whole_weights)


@pytest.mark.parametrize("name", MODELS)
def test_ties_go_to_the_lower_id(name):
    _, gate, _ = build(name)
    gate = Gate(gate.config, gate.weight_EH)  # a correction bias would break the ties
    ids, _ = gate.choose(torch.zeros(3, gate.config.num_experts))
    assert ids.tolist() == [list(range(gate.config.num_experts_per_token))] * 3


def test_a_nan_row_fails_alone_and_no_rows_are_fine():
    _, gate, x_TH = build("v3")
    logits_TE = F.linear(x_TH[:4], gate.weight_EH)
    expected = gate.choose(logits_TE)
    logits_TE[1] = float("nan")
    ids, weights = gate.choose(logits_TE)
    keep = [0, 2, 3]
    assert torch.equal(ids[keep], expected[0][keep])
    assert torch.equal(weights[keep], expected[1][keep])
    assert ((ids >= 0) & (ids < 40)).all()
    ids, weights = gate(x_TH[:0], F.linear)
    assert ids.shape == weights.shape == (0, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_groups": 3}, r"num_experts\(8\) % num_groups\(3\) = 2"),
        ({"num_groups": 4, "num_groups_per_token": 5}, r"num_groups_per_token\(5\) > num_groups"),
        ({"num_groups": 4}, r"num_experts_per_token\(3\) > .* = 2"),
        ({"num_experts_per_token": 9}, r"num_experts_per_token\(9\) > .* = 8"),
        ({"num_experts_per_token": 0}, "at least 1"),
        (
            {"num_groups": 8, "num_groups_per_token": 4, "group_score": "top2_sum"},
            r"top2_sum needs 2 .* = 1",
        ),
    ],
)
def test_impossible_configs_show_their_numbers(changes, message):
    with pytest.raises(ValueError, match=message):
        GateConfig(**{"num_experts": 8, "num_experts_per_token": 3, **changes})


def test_wrong_weights_are_refused():
    config = GateConfig(num_experts=8, num_experts_per_token=2)
    with pytest.raises(ValueError, match=r"\[7, 16\] is not \[num_experts\(8\), hidden\]"):
        Gate(config, torch.zeros(7, 16))
    with pytest.raises(ValueError, match=r"\[7\] is not \[num_experts\(8\)\]"):
        Gate(config, torch.zeros(8, 16), torch.zeros(7))
