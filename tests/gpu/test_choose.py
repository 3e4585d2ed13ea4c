"""The gate on a GPU against the gate on a CPU: the same experts, ties included, and their weights.

exp differs in the last bits between the two, so weights are compared to 1e-6; experts are compared
exactly, but for tokens whose decision hangs on less than that.
"""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from experts.gains import token_ranges
from router.gate import Gate, GateConfig

CONFIGS = {
    "deepseek_v3": GateConfig(
        num_experts=256, num_experts_per_token=8, scoring="sigmoid", num_groups=8,
        num_groups_per_token=4, group_score="top2_sum", renormalize=True, scaling_factor=2.5,
    ),
    "deepseek_v2": GateConfig(
        num_experts=160, num_experts_per_token=6, num_groups=8, num_groups_per_token=3,
        scaling_factor=16.0,
    ),
    "deepseek_v2_lite": GateConfig(num_experts=64, num_experts_per_token=6),
    "qwen3": GateConfig(num_experts=128, num_experts_per_token=8, renormalize=True),
    "mixtral": GateConfig(num_experts=8, num_experts_per_token=2, renormalize=True),
    "ragged": GateConfig(
        num_experts=15, num_experts_per_token=5, scoring="sigmoid", num_groups=3,
        num_groups_per_token=2, group_score="top2_sum", renormalize=True,
    ),
    "all": GateConfig(num_experts=5, num_experts_per_token=5),
}  # fmt: skip


def logits_and_bias(
    config: GateConfig, seed: int, kind: str, tokens: int
) -> tuple[Tensor, Tensor | None]:
    """`kind` ties: numbers from a short list, so that most tokens have equal scores."""
    rng = np.random.default_rng(seed)
    shape = (tokens, config.num_experts)
    if kind == "ties":
        logits = rng.integers(0, 5, shape) / 4
        bias = rng.integers(0, 3, config.num_experts) / 8
    else:
        logits = rng.standard_normal(shape) * 2
        bias = rng.standard_normal(config.num_experts) / 10
    if kind == "peculiar":
        logits[rng.random(shape) < 0.02] = np.nan
        logits[rng.random(shape) < 0.02] = -np.inf if config.scoring == "softmax" else np.inf
        logits[0], logits[1 % tokens] = np.nan, 0.0
    bias_E = torch.from_numpy(bias).float() if config.scoring == "sigmoid" else None
    return torch.from_numpy(logits).float(), bias_E


def compare(
    config: GateConfig, logits_TE: Tensor, bias_E: Tensor | None, device: torch.device
) -> None:
    from experts.kernels.choose import choose

    gate = Gate(config, torch.zeros(config.num_experts, 1), bias_E)
    expected_TK, expected_weights = gate.choose(logits_TE)
    on_device = None if bias_E is None else bias_E.to(device)
    ids_TK, weights_TK = choose(logits_TE.to(device), config, on_device)
    ids_TK, weights_TK = ids_TK.cpu(), weights_TK.cpu()
    assert ids_TK.dtype == torch.int64
    differ_T = (ids_TK != expected_TK).any(1)
    for token in differ_T.nonzero().flatten().tolist():
        assert _hangs_on_a_bit(gate, logits_TE[token]), (token, ids_TK[token], expected_TK[token])
    torch.testing.assert_close(
        weights_TK[~differ_T], expected_weights[~differ_T], rtol=2e-6, atol=1e-30, equal_nan=True
    )


def _hangs_on_a_bit(gate: Gate, logits_E: Tensor) -> bool:
    """Whether scores moved by less than 1e-6 of themselves would be chosen from differently."""
    generator = torch.Generator().manual_seed(0)
    noise = 1 + 2e-6 * torch.randn(64, len(logits_E), generator=generator)
    moved_TK, _ = gate.choose(logits_E * noise)
    return bool((moved_TK != moved_TK[0]).any())


def check(device: torch.device, tokens: int = 24) -> None:
    for idx, config in enumerate(CONFIGS.values()):
        for kind in ("ties", "normal", "peculiar"):
            compare(config, *logits_and_bias(config, idx, kind, tokens), device)


def check_the_rest(device: torch.device, tokens: int = 13) -> None:
    """Slots, ranges, padding, counters: what comes from the same launch."""
    from experts.kernels.choose import Tally, choose_slots

    config = CONFIGS["deepseek_v3"]
    logits_TE, bias_E = logits_and_bias(config, 3, "normal", tokens)
    assert bias_E is not None
    experts = config.num_experts
    table_E = torch.randperm(experts).to(torch.int32)
    table_E[::3] = -1
    gains_E = torch.rand(experts) + 0.5
    gains_E[5] = float("nan")
    tally = Tally(
        chosen_E=torch.full((experts,), 7, dtype=torch.int64, device=device),
        recent_MK=torch.full((16, 8), 99, dtype=torch.int64, device=device),
    )
    for real in (tokens, 5, 0):
        tally.chosen_E.fill_(7)
        choice = choose_slots(
            logits_TE.to(device), config, bias_E.to(device),
            num_tokens=torch.tensor([real], dtype=torch.int32, device=device),
            table_E=table_E.to(device), gains_E=gains_E.to(device), tally=tally,
        )  # fmt: skip
        expected_TK, _ = Gate(config, torch.zeros(experts, 1), bias_E).choose(logits_TE)
        expected_TK[real:] = -1
        ids_TK, weights_TK = choice.ids_TK.cpu(), choice.weights_TK.cpu()
        assert torch.equal(ids_TK, expected_TK)
        assert (weights_TK[:real] > 0).all()
        assert not weights_TK[real:].any()
        slots_TK = torch.where(ids_TK >= 0, table_E[ids_TK], -1)
        assert choice.slots_TK is not None
        assert choice.range_T is not None
        assert torch.equal(choice.slots_TK.cpu(), slots_TK)
        _same_ranges(choice.range_T, ids_TK, weights_TK, gains_E)
        counts_E = torch.bincount(ids_TK[:real].flatten(), minlength=experts)
        assert torch.equal(tally.chosen_E.cpu(), counts_E + 7)
        recent = torch.full((16, 8), -1)
        recent[: min(real, 16)] = ids_TK[: min(real, 16)]
        assert torch.equal(tally.recent_MK.cpu(), recent)


def check_large_ranges(device: torch.device) -> None:
    """Ranges at both ends of what is allowed."""
    from experts.kernels.choose import choose_slots

    config = CONFIGS["mixtral"]
    logits_TE = torch.randn(9, 8)
    for gain in (0.0, 1e-30, 1e30, float("inf")):
        gains_E = torch.full((8,), gain)
        choice = choose_slots(logits_TE.to(device), config, gains_E=gains_E.to(device))
        assert choice.range_T is not None
        _same_ranges(choice.range_T, choice.ids_TK.cpu(), choice.weights_TK.cpu(), gains_E)


def _same_ranges(range_T: Tensor, ids_TK: Tensor, weights_TK: Tensor, gains_E: Tensor) -> None:
    """The bits of IEEE's arithmetic; those of torch on a CPU, whose sqrt is not IEEE's, but for the last."""
    expected_T = token_ranges(ids_TK, weights_TK, gains_E)
    torch.testing.assert_close(range_T.cpu(), expected_T, rtol=2.5e-7, atol=0, equal_nan=True)
    total_T = np.zeros(len(ids_TK), np.float32)
    for ids_T, weights_T in zip(ids_TK.T, weights_TK.T, strict=True):
        with np.errstate(all="ignore"):
            square_T = np.square(weights_T.numpy() * gains_E.numpy()[ids_T.clamp(min=0).numpy()])
        total_T += np.where(ids_T.numpy() < 0, np.float32(0), square_T)
    expected_T = torch.from_numpy(np.sqrt(total_T)).mul(16.0).clamp(2.0**-60, 2.0**100)
    torch.testing.assert_close(range_T.cpu(), expected_T, rtol=0, atol=0, equal_nan=True)


def test_experts_are_those_of_the_cpu(cuda: torch.device) -> None:
    check(cuda, tokens=300)


@settings(
    max_examples=120, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    name=st.sampled_from(sorted(CONFIGS)),
    kind=st.sampled_from(["ties", "normal", "peculiar"]),
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 200),
)
def test_any_logits(cuda: torch.device, name: str, kind: str, seed: int, tokens: int) -> None:
    compare(CONFIGS[name], *logits_and_bias(CONFIGS[name], seed, kind, tokens), cuda)


def test_slots_ranges_padding_and_counters(cuda: torch.device) -> None:
    check_the_rest(cuda)
    check_the_rest(cuda, tokens=200)
    check_large_ranges(cuda)


def check_parts(device: torch.device, sizes: dict[int, int]) -> None:
    """Logits in parts are those parts' sum in order, and products in parts are the product."""
    from experts.kernels.choose import choose_slots
    from experts.kernels.linear import linear_fp32, linear_fp32_parts

    config = GateConfig(num_experts=64, num_experts_per_token=6)
    for num_tokens, num_parts in sizes.items():
        x_TH = torch.randn(num_tokens, 512, device=device).to(torch.bfloat16)
        w_EH = torch.randn(64, 512, device=device)
        parts_PTE, whole_TE = linear_fp32_parts(x_TH, w_EH), linear_fp32(x_TH, w_EH)
        assert len(parts_PTE) == num_parts
        assert torch.equal(parts_PTE.sum(0), whole_TE)
        one, other = choose_slots(parts_PTE, config), choose_slots(whole_TE, config)
        assert torch.equal(one.ids_TK, other.ids_TK)
        assert torch.equal(one.weights_TK, other.weights_TK)


def test_logits_in_parts(cuda: torch.device) -> None:
    check_parts(cuda, {1: 2, 5: 2, 300: 2, 9000: 1})
